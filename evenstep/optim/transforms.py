"""Gradient transforms, which `stabilize` puts before any optimizer.

A transform reads the gradients of a step, keeps a few statistics by name, and returns the gradients that the optimizer
sees. `AdaClip`, `AdaGN`, `GradientStabilizer`, `SpikeClip`, `ValueClip` and `AGC` treat each tensor on its own;
`NormClip`, `ZClip`, `AutoClip` and `SkipStep` use the 2-norm of all gradients together; `MomentumReset` resets the
optimizer's moments.

To write one, subclass `Transform`. ``__call__`` is a generator: it requests statistics of whole tensors by ``yield
from`` and returns the gradients with the new statistics. `AdaClip` is a short example for statistics per tensor,
`NormClip` for the whole model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from evenstep.optim.distributed import Reduction, Steps, reduced
from evenstep.optim.functional import EntryClip, Gradients, adaclip, adagn, peak_and_norm
from evenstep.optim.options import check

# Statistics by name: for `scalars` a vector [k], for `entries` a list of k tensors (local shards), for `shared` one
# tensor.
Statistics = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StepInfo:
    """The facts of a step that a transform may use besides the gradients."""

    params: list[Tensor]  # the k parameters (local shards)
    t: int = 1  # number of this step, from 1
    reset_interval: int = 0  # steps between resets of the base's moments; 0 for never
    loss: Tensor | None = None  # the value that the closure returned, if one was given

    def since_reset(self) -> int:
        """Steps since the moments were last reset (0 on the step of the reset), or since the start."""
        # The step whose number is a multiple of the interval is the reset step itself.
        return self.t % self.reset_interval if self.reset_interval else self.t


class Transform:
    """Base class of gradient transforms. A subclass names its statistics, which all start at zero, and implements
    ``__call__``.

    New statistics are kept only where the gradient is finite, whatever the call returns for the other tensors. Shared
    statistics are kept only if all gradients are finite. No statistics are kept of a step that is skipped.

    Example:
        >>> import torch
        >>> from evenstep import stabilize
        >>> from evenstep.optim.transforms import Transform
        >>> class Halve(Transform):
        ...     name = "halve"
        ...     scalars = ("count",)  # one number per tensor
        ...     def __call__(self, grads, state, step):
        ...         yield from ()  # no statistic of whole tensors is needed
        ...         return grads.amplified(torch.full_like(grads.peak, 0.5)), {"count": state["count"] + 1}
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = stabilize(torch.optim.SGD([w], lr=1.0), Halve())
        >>> w.grad = torch.tensor([1.0, 2.0])
        >>> optimizer.step()
        >>> w.data
        tensor([-0.5000, -1.0000])
    """

    name: str
    """Prefix of the statistics in a saved state; a chain holds each name once."""
    scalars: ClassVar[tuple[str, ...]] = ()
    """Statistics with one number per tensor."""
    entries: ClassVar[tuple[str, ...]] = ()
    """Statistics in the shape of each tensor."""
    options: tuple[str, ...] = ()
    """Hyperparameters, for ``repr``."""
    whole_model: ClassVar[bool] = False
    """Whether it needs the gradients of all parameters at once, as every transform with shared statistics does."""
    sees_skipped_steps: ClassVar[bool] = False
    """Whether the shared statistics are kept also of a step that is skipped."""

    @property
    def shared(self) -> Mapping[str, tuple[int, ...]]:
        """Statistics with one value for the whole model: name -> shape."""
        return {}

    def __call__(self, grads: Gradients, state: Statistics, step: StepInfo) -> Steps[tuple[Gradients, Statistics]]:
        """Transform ``k`` gradients. Returns the new gradients and the new values of all statistics.

        ``state`` has the present values: a vector ``[k]`` for each name in ``scalars``, a list of ``k`` tensors for
        each in ``entries``, one tensor for each in ``shared``. It must not be changed.
        """
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.options)})"


def shared_dtype(device: torch.device) -> torch.dtype:
    """Dtype of shared statistics: fp64, where the device has it."""
    # Shared statistics are few, and running means of norms over many orders of magnitude need the digits.
    return torch.float32 if device.type == "mps" else torch.float64


# The type of every transform's call: a generator of requests that returns the gradients and the new statistics.
Result = Steps[tuple[Gradients, Statistics]]


# ---- transforms of one tensor at a time ----


class AdaClip(Transform):
    """AdaClip of Stable-SPAM (arXiv:2502.17055, section 4): entries above a running mean of their tensor's largest
    entry are scaled down to that mean.

    The limit is ``T_t / (1 - gamma3**n)`` with ``T_t = gamma3 T_{t-1} + (1 - gamma3) max|g_t|``. This is a rescale and
    not a clamp: the largest entry lands on the limit, smaller ones above it land below. Statistics, 0-d per tensor:
    ``peak`` (T) and ``n`` (updates).

    Args:
        gamma3: decay of the running mean, in [0, 1). Default 0.999 (paper).
        robust: bound the largest entry as it enters T, so that a spike hardly raises the limit: from the 11th update
            on, the bound is twice the limit so far, or the value that raises it by 10 %, whichever is larger. Default
            False (paper).

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import torch
        >>> from evenstep import AdaClip, stabilize
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = stabilize(torch.optim.SGD([w], lr=1.0), AdaClip(gamma3=0.5))
        >>> for g in ([1.0, 1.0], [0.0, 4.0]):
        ...     w.grad = torch.tensor(g)
        ...     optimizer.step()
        >>> w.data  # the second limit is (0.5 * 0.5 + 0.5 * 4) / (1 - 0.5**2) = 3
        tensor([-1., -4.])
    """

    name = "adaclip"
    scalars = ("peak", "n")
    options = ("gamma3", "robust")

    def __init__(self, gamma3: float = 0.999, robust: bool = False):
        check(type(self).__name__, gamma3=gamma3, robust=robust)  # with the name of a subclass, if it is one
        self.gamma3, self.robust = gamma3, robust

    def __call__(self, grads: Gradients, state: Statistics, step: StepInfo) -> Result:
        # T_t = gamma3 T_{t-1} + (1 - gamma3) max|g_t|; entries above T_t / (1 - gamma3^n) are scaled down to it.
        n = state["n"] + 1  # [k]
        if grads.limit is not None:  # clipped already, and `Gradients` has one limit: go on from the clipped entries
            grads = yield from grads.replaced([grads.read(i) for i in range(len(grads.tensors))])
        grads, peak = adaclip(grads, state["peak"], n, self.gamma3, self.robust)
        return grads, {"peak": peak, "n": n}


class AdaGN(Transform):
    """AdaGN of Stable-SPAM (arXiv:2502.17055, section 4): each tensor gets the norm that the history of its norm
    suggests, mean over root mean square.

    ``g <- g / ||g|| * mu_hat / (sqrt(nu_hat) + eps)`` with running means ``mu`` of the norm and ``nu`` of its square,
    both bias-corrected. A gradient that is zero, or whose norm is below 1.2e-38, becomes zero; a gradient whose norm is
    above 3.4e38 counts as not finite. Statistics, 0-d per tensor: ``norm`` (mu), ``norm_rms`` (sqrt(nu)) and ``n``
    (updates).

    On a spike after a long calm history the new norm is up to ``(1 - gamma1) / sqrt(1 - gamma2)`` times the usual one
    (0.95 for the defaults, 47 for BF16), and small afterwards for about ``1 / (1 - gamma2)`` steps.

    Args:
        gamma1: decay of the mean of the norm, in [0, 1). Default 0.7 (paper, 4-bit; 0.85 for BF16).
        gamma2: decay of the mean square of the norm, in [0, 1). Default 0.9 (paper, 4-bit; 0.99999 for BF16).
        eps: added to the root, at least 0. Default 1e-8 (official code).
        robust: bound the norm as it enters both means, so that a spike does not shrink the steps after it: from the
            11th update on, the bound is twice mu_hat, or the norm that raises mu_hat by 10 %, whichever is larger.
            Default False (paper).

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch
        >>> from evenstep import AdaGN, stabilize
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = stabilize(torch.optim.SGD([w], lr=1.0), AdaGN())
        >>> w.grad = torch.tensor([30.0, 40.0])
        >>> optimizer.step()  # on the first step mean and root mean square are equal: the norm becomes 1
        >>> w.data
        tensor([-0.6000, -0.8000])
    """

    name = "adagn"
    skips_zeros: ClassVar[bool] = False
    """Whether a gradient of zeros leaves the statistics as they are. In AdaGN it enters them like any other."""
    scalars = ("norm", "norm_rms", "n")
    options = ("gamma1", "gamma2", "eps", "robust")

    def __init__(self, gamma1: float = 0.7, gamma2: float = 0.9, eps: float = 1e-8, robust: bool = False):
        check(type(self).__name__, gamma1=gamma1, gamma2=gamma2, eps=eps, robust=robust)
        self.gamma1, self.gamma2, self.eps, self.robust = gamma1, gamma2, eps, robust

    def __call__(self, grads: Gradients, state: Statistics, step: StepInfo) -> Result:
        n = state["n"] + 1  # [k]
        before = yield from grads.with_norms()  # all-reduce: the norms of whole tensors
        # mu_t = gamma1 mu_{t-1} + (1 - gamma1) ||g_t||, nu_t = gamma2 nu_{t-1} + (1 - gamma2) ||g_t||^2;
        # gain = mu_hat / (sqrt(nu_hat) + eps) / ||g_t||, [k]. sqrt(nu) is kept, see `adagn`.
        grads, ema, rms = adagn(
            before, state["norm"], state["norm_rms"], n, self.gamma1, self.gamma2, self.eps, self.robust
        )
        after = {"norm": ema, "norm_rms": rms, "n": n}
        if self.skips_zeros:
            after = {key: torch.where(before.norm > 0, value, state[key]) for key, value in after.items()}
        return grads, after


class GradientStabilizer(AdaGN):
    """AdaGN with the defaults of GradientStabilizer (arXiv:2502.17055 v3): gamma1 0.6, gamma2 0.999, eps 0.

    As in its official code, a gradient of zeros leaves the statistics of its tensor as they are: fed into the means, it
    would change the norm of the gradients after it. Args, statistics and errors are those of `AdaGN`.

    Example:
        >>> import torch
        >>> from evenstep import GradientStabilizer, stabilize
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = stabilize(torch.optim.AdamW([w]), GradientStabilizer())
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        >>> optimizer.stats["grad_norm"], optimizer.stats["norm_after"].round()
        (tensor([5.]), tensor([1.]))
    """

    name = "gradient_stabilizer"
    skips_zeros = True

    def __init__(self, gamma1: float = 0.6, gamma2: float = 0.999, eps: float = 0.0, robust: bool = False):
        super().__init__(gamma1, gamma2, eps, robust)


class SpikeClip(Transform):
    """Spike-aware clipping of SPAM (arXiv:2501.06842, section 4) before any optimizer: each entry is clipped to
    ``sqrt(threshold * v)``, v the running mean of its own square before this step.

    Statistics: ``exp_avg_sq`` (v), in the shape of each tensor, fp32 (fp64 for fp64 parameters); clipped entries enter
    it. An entry with ``v == 0`` has no history and passes. v starts anew when the base's moments are reset
    (`MomentumReset`). A tensor with an entry whose square is beyond the range of v (above 1.8e19 in fp32) counts as not
    finite.

    Args:
        threshold: theta, at least 0. Default 5000 (paper); 0 for no clipping.
        beta2: decay of v, in [0, 1). Default 0.999 (paper: that of the base's second moment).
        clip_start: number of steps without clipping at the start and after a reset. Default 20 (official code).
        spikes: ``"clip"`` (default), or ``"zero"`` to make such an entry 0, which the paper calls nullifying.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch
        >>> from evenstep import SpikeClip, stabilize
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = stabilize(torch.optim.SGD([w], lr=1.0), SpikeClip(threshold=4.0, beta2=0.75, clip_start=1))
        >>> for g in ([1.0, 1.0], [1.0, 100.0]):
        ...     w.grad = torch.tensor(g)
        ...     optimizer.step()  # v = 0.25 on the second step, so the limit is sqrt(4 * 0.25) = 1
        >>> w.data
        tensor([-2., -2.])
    """

    name = "spike_clip"
    entries = ("exp_avg_sq",)
    options = ("threshold", "beta2", "clip_start", "spikes")

    def __init__(self, threshold: float = 5000.0, beta2: float = 0.999, clip_start: int = 20, spikes: str = "clip"):
        check(type(self).__name__, threshold=threshold, beta2=beta2, clip_start=clip_start, spikes=spikes)
        # Read again at every step, so that they may be changed during training; `Stabilized` checks them anew.
        self.threshold, self.beta2, self.clip_start, self.spikes = threshold, beta2, clip_start, spikes

    def __call__(self, grads: Gradients, state: Statistics, step: StepInfo) -> Result:
        grads = grads.squares_within(torch.finfo(grads.dtype).max)
        # On the step of a reset v starts from zero, so its entries have no history; clip_start counts from there.
        forget = step.reset_interval > 0 and step.since_reset() == 0
        # Both are Python bools: t is a number here, since `stabilize` keeps its clock on the host.
        clips = self.threshold > 0 and min(step.t, step.since_reset()) >= self.clip_start
        flag = grads.peak.new_ones(())  # EntryClip takes 0-d tensors on the device
        clip = EntryClip(self.threshold, flag * clips, forget=flag * forget, zero_history=False)
        kept = 0.0 if forget else self.beta2
        largest = torch.finfo(grads.dtype).max
        clipped, second = [], []  # k tensors each: transformed gradients, new v
        for i, v in enumerate(state["exp_avg_sq"]):
            before = grads.read(i)  # a copy, in the dtype of the statistics
            g = clip(i, before, v) if self.threshold else before  # |g| <= sqrt(threshold v)
            if self.spikes == "zero":  # entries that the clip has changed
                g = g.mul_(g == before)
            clipped.append(g)
            # v <- beta2 v + (1 - beta2) g^2 with the clipped g: one spike must not raise the limit for the next.
            second.append((v * kept).addcmul_(g, g, value=1 - self.beta2).clamp_(max=largest))
        # Each entry has its own limit, so the values themselves are replaced: one pass more than a limit or a gain.
        grads = yield from grads.replaced(clipped)
        return grads, {"exp_avg_sq": second}


class ValueClip(Transform):
    """Clamp every entry to ``[-limit, limit]``. No statistics.

    Args:
        limit: largest absolute value, above 0. Default 0.1, the value that GradientStabilizer is compared with
            (arXiv:2502.17055 v3).

    Raises:
        ValueError: ``limit`` is out of range.

    Example:
        >>> import torch
        >>> from evenstep import ValueClip, stabilize
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = stabilize(torch.optim.SGD([w], lr=1.0), ValueClip(limit=0.5))
        >>> w.grad = torch.tensor([0.25, -3.0])
        >>> optimizer.step()
        >>> w.data
        tensor([-0.2500,  0.5000])
    """

    name = "value_clip"
    options = ("limit",)

    def __init__(self, limit: float = 0.1):
        check(type(self).__name__, limit=limit)
        self.limit = limit

    def __call__(self, grads: Gradients, state: Statistics, step: StepInfo) -> Result:
        # A clamp changes entries one by one, which limit and gain cannot express: the values are replaced.
        clamped = [grads.read(i).clamp_(-self.limit, self.limit) for i in range(len(grads.tensors))]
        grads = yield from grads.replaced(clamped)
        return grads, {}


class AGC(Transform):
    """Adaptive gradient clipping of NFNets (arXiv:2102.06171, section 4.1): the gradient of each unit has at most
    ``clipping`` times the norm of its weights. No statistics.

    A unit is a row of a matrix, the weights of one output (all dimensions but the first), or a whole vector. The paper
    leaves the last linear layer out; give that layer an optimizer of its own to do the same.

    Args:
        clipping: largest ratio of the two norms, above 0. Default 0.01 (paper, large batches, and the value that
            GradientStabilizer is compared with).
        eps: smallest norm of the weights, at least 0, so that weights of zero can move. Default 1e-3 (paper).

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch
        >>> from evenstep import AGC, stabilize
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        >>> optimizer = stabilize(torch.optim.SGD([w], lr=1.0), AGC(clipping=0.1))
        >>> w.grad = torch.tensor([[0.0, 5.0], [0.05, 0.0]])  # 1.0 and 0.05 times the norm of the weights
        >>> optimizer.step()
        >>> w.data
        tensor([[3.0000, 3.5000],
                [0.9500, 0.0000]])
    """

    name = "agc"
    options = ("clipping", "eps")

    def __init__(self, clipping: float = 0.01, eps: float = 1e-3):
        check(type(self).__name__, clipping=clipping, eps=eps)
        self.clipping, self.eps = clipping, eps

    def __call__(self, grads: Gradients, state: Statistics, step: StepInfo) -> Result:
        values = [grads.read(i) for i in range(len(grads.tensors))]
        # Squared norms of the units of weights and gradient, [2 m] for a tensor of m units. The units of a tensor that
        # is cut along dimension 0 are whole; other cuts are summed over the shards.
        requests = [
            Reduction("sum", torch.cat([_unit_squares(p), _unit_squares(g)]), 1 if p.dim() > 1 else None)
            for p, g in zip(step.params, values, strict=True)
        ]
        answers = yield from reduced(*requests)
        for g, answer in zip(values, answers, strict=True):
            # g_u <- clipping max(||w_u||, eps) / ||g_u|| g_u where ||g_u|| is above that limit
            weight, size = answer.sqrt().chunk(2)
            limit = self.clipping * weight.clamp(min=self.eps)
            factor = shrinking(size, limit).to(g.dtype)
            # [m] as [m, 1, ...], or 0-d for a vector
            g.mul_(factor.view(-1, *[1] * (g.dim() - 1)) if g.dim() > 1 else factor.view(()))
        grads = yield from grads.replaced(values)
        return grads, {}


def _unit_squares(x: Tensor) -> Tensor:
    """Squared norms of the units of ``x``, flat, in fp64: ``[m]`` for a tensor ``[m, ...]``, ``[1]`` for a vector."""
    rows = x.flatten(1) if x.dim() > 1 else x.reshape(1, -1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=shared_dtype(x.device))
    return norms.square()


# ---- transforms of the whole model: the 2-norm of all gradients together ----
#
# The norms of single tensors are known on every rank once they are all-reduced, and the global norm follows without
# another message. "All" means the tensors that this optimizer holds on this process: with pipeline stages, the stage.
# The shared statistics are kept, in fp64, under each parameter. A gradient with a NaN or Inf, or with a norm out of the
# range of its statistics (fp32; 1e150 for fp64), is left out of the global norm and of the step; such a step leaves the
# statistics unchanged.

# Largest norm that counts as finite: fp64 cannot hold the squares of larger ones, which fp64 parameters may have.
SQUARABLE = 1e150


def global_norm(grads: Gradients) -> Steps[tuple[Gradients, Tensor, Tensor]]:
    """The gradients with their norms; the 2-norm of all finite ones as transformed so far (0-d, fp64); and whether all
    are finite (0-d bool)."""
    grads = (yield from grads.with_norms()).within_range()
    grads = grads.kept_if(grads.norm <= SQUARABLE)
    dtype = shared_dtype(grads.peak.device)
    # The norms of all buckets, [number of parameters]. A tensor that is not finite contributes 0.
    norms, finite = yield from reduced(
        Reduction("gather", torch.where(grads.finite, grads.norm, 0.0).to(dtype)),
        Reduction("gather", grads.finite.to(dtype)),
    )
    # ||g||^2 = sum of the squared norms. `peak_and_norm` takes them relative to the largest, against overflow.
    return grads, peak_and_norm(norms)[1], finite.amin() > 0


def shrinking(norm: Tensor, limit: Tensor | float) -> Tensor:
    """The factor that brings ``norm`` down to ``limit``, elementwise: min(1, limit / norm)."""
    # where and not clamp: a norm of 0 makes limit / norm Inf
    return torch.where(norm > limit, limit / norm, torch.ones_like(norm))


def limited(grads: Gradients, norm: Tensor, limit: Tensor | float) -> Gradients:
    """All gradients scaled so that their global ``norm`` is at most ``limit``."""
    return grads.amplified(shrinking(norm, limit).to(grads.dtype).expand_as(grads.peak))


class NormClip(Transform):
    """Scale all gradients together so that their global 2-norm is at most ``max_norm`` (arXiv:1211.5063), as
    ``torch.nn.utils.clip_grad_norm_`` does, without its 1e-6. No statistics.

    Args:
        max_norm: above 0. Default 1.0 (the common choice, and the value that GradientStabilizer is compared with).

    Raises:
        ValueError: ``max_norm`` is out of range.

    Example:
        >>> import torch
        >>> from evenstep import NormClip, stabilize
        >>> a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
        >>> optimizer = stabilize(torch.optim.SGD([a, b], lr=1.0), NormClip(max_norm=1.0))
        >>> a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
        >>> optimizer.step()
        >>> a.data, b.data
        (tensor([-0.6000]), tensor([-0.8000]))
    """

    name = "norm_clip"
    whole_model = True
    options = ("max_norm",)

    def __init__(self, max_norm: float = 1.0):
        check(type(self).__name__, max_norm=max_norm)
        self.max_norm = max_norm

    def __call__(self, grads: Gradients, state: Statistics, step: StepInfo) -> Result:
        # g <- g min(1, max_norm / ||g||), ||g|| over all parameters; no reduction beyond that of the single norms.
        grads, norm, _ = yield from global_norm(grads)
        return limited(grads, norm, self.max_norm), {}


class ZClip(Transform):
    """Clip global norms that are outliers by their z-score (arXiv:2504.02507, section 3).

    With the running mean and variance of the norm, ``z = (norm - mean) / std``; a norm with z above the threshold is
    scaled to ``mean + threshold**2 / z * std``: the further out, the closer to the mean. The clipped norm enters the
    statistics. They start from the plain mean and variance of the first ``warmup_steps`` norms, which are not clipped.
    Statistics of the whole model, 0-d fp64: ``mean``, ``var``, ``n`` (steps).

    Args:
        alpha: decay of mean and variance, in [0, 1). Default 0.97 (paper).
        threshold: z-score above which a norm is an outlier, at least 0. Default 2.5 (paper).
        warmup_steps: number of norms that start the statistics. Default 25 (paper).
        eps: added to the standard deviation, at least 0. Default 1e-6 (official code).

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch
        >>> from evenstep import ZClip, stabilize
        >>> w = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = stabilize(torch.optim.SGD([w], lr=1.0), ZClip(warmup_steps=4))
        >>> for g in (1.0, 2.0, 1.0, 2.0, 1000.0):
        ...     w.grad = torch.tensor([g])
        ...     optimizer.step()
        >>> optimizer.stats["norm_after"].round(decimals=2)  # mean 1.5, std 0.5
        tensor([1.5000])
    """

    name = "zclip"
    options = ("alpha", "threshold", "warmup_steps", "eps")
    shared = {"mean": (), "var": (), "n": ()}  # noqa: RUF012

    def __init__(self, alpha: float = 0.97, threshold: float = 2.5, warmup_steps: int = 25, eps: float = 1e-6):
        check(type(self).__name__, alpha=alpha, threshold=threshold, warmup_steps=warmup_steps, eps=eps)
        # alpha is the decay (weight of the past), as in the paper.
        self.alpha, self.threshold, self.warmup_steps, self.eps = alpha, threshold, warmup_steps, eps

    def __call__(self, grads: Gradients, state: Statistics, step: StepInfo) -> Result:
        grads, norm, _ = yield from global_norm(grads)
        mean, var, n = state["mean"], state["var"], state["n"]  # 0-d each
        warm = n >= max(self.warmup_steps, 1)  # 0-d bool
        std = var.sqrt()
        z = (norm - mean) / (std + self.eps)
        outlier = warm & (z > self.threshold)
        # Reciprocal clipping: z* = threshold^2 / z, so that a norm far out is scaled to just above the mean.
        kept = torch.where(outlier, mean + self.threshold**2 / z * std, norm)
        # During the warm-up: the mean and variance of the n + 1 norms so far (Welford's update).
        first_mean = mean + (norm - mean) / (n + 1)
        first_var = (n * var + (norm - mean) * (norm - first_mean)) / (n + 1)
        # Afterwards: exponential means, which see the clipped norm and the new mean.
        later_mean = self.alpha * mean + (1 - self.alpha) * kept
        later_var = self.alpha * var + (1 - self.alpha) * (kept - later_mean).square()
        new = {
            "mean": torch.where(warm, later_mean, first_mean),
            "var": torch.where(warm, later_var, first_var),
            "n": n + 1,
        }
        return limited(grads, norm, kept), new


class AdaGC(Transform):
    """Clip the norm of each tensor to a multiple of its own running mean (AdaGC, arXiv:2502.11034, section 4).

    A norm above ``ratio`` times gamma, the running mean of the tensor's clipped norms, is scaled down to that. During
    the first ``warmup_steps`` updates the global norm is clipped to ``max_norm`` instead, and gamma is the smallest
    clipped norm so far. A spike therefore enters gamma as ``ratio`` times gamma at most. Statistics, 0-d per tensor:
    ``mean`` (gamma) and ``n`` (updates). A tensor without a norm above 0 so far is not clipped.

    Args:
        ratio: lambda_rel, above 0. Default 1.05 (paper).
        beta: decay of gamma, in [0, 1). Default 0.98 (paper).
        max_norm: lambda_abs, above 0. Default 1.0 (paper).
        warmup_steps: Default 100 (paper).

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch
        >>> from evenstep import AdaGC, stabilize
        >>> w = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = stabilize(torch.optim.SGD([w], lr=1.0), AdaGC(warmup_steps=2, max_norm=10.0))
        >>> for g in (3.0, 2.0, 1000.0):
        ...     w.grad = torch.tensor([g])
        ...     optimizer.step()
        >>> optimizer.stats["norm_after"].round(decimals=2)  # 1.05 times the smaller of the first two norms
        tensor([2.1000])
    """

    name = "adagc"
    scalars = ("mean", "n")
    options = ("ratio", "beta", "max_norm", "warmup_steps")
    whole_model = True

    def __init__(self, ratio: float = 1.05, beta: float = 0.98, max_norm: float = 1.0, warmup_steps: int = 100):
        check(type(self).__name__, ratio=ratio, beta=beta, max_norm=max_norm, warmup_steps=warmup_steps)
        self.ratio, self.beta, self.max_norm, self.warmup_steps = ratio, beta, max_norm, warmup_steps

    def __call__(self, grads: Gradients, state: Statistics, step: StepInfo) -> Result:
        grads, whole, _ = yield from global_norm(grads)  # whole: 0-d
        mean, n = state["mean"], state["n"] + 1  # [k] each
        norm, known, warm = grads.norm, mean > 0, n <= self.warmup_steps  # [k] each
        # Warm-up: h = min(1, lambda_abs / ||g||), the norm of all gradients. Later: h_i = min(1, lambda_rel gamma_i /
        # ||g_i||).
        shared = shrinking(whole, self.max_norm).to(grads.dtype)  # 0-d
        own = shrinking(norm, torch.where(known, self.ratio * mean, torch.inf))  # [k]
        gain = torch.where(warm, shared, own)
        # Warm-up: gamma = min(gamma, ||h g||). Later: gamma = beta gamma + (1 - beta) ||h g||. The first norm above 0
        # starts it: a gamma of 0 would make every later gradient 0.
        kept = norm * gain
        smallest = torch.where(kept > 0, torch.minimum(mean, kept), mean)
        later = self.beta * mean + (1 - self.beta) * kept
        new = torch.where(known, torch.where(warm, smallest, later), kept)
        return grads.amplified(gain), {"mean": new, "n": n}


class AutoClip(Transform):
    """Clip the global norm to a percentile of its own history, this step included (arXiv:2007.14469).

    Statistics of the whole model, fp64: ``history`` ``[window]`` and ``n`` (steps).

    Args:
        percentile: between 0 and 100. Default 10 (paper).
        window: number of norms in the history. Default 1000. The paper's history goes back to the start; this one has a
            fixed size, 8 bytes per norm.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> import torch
        >>> from evenstep import AutoClip, stabilize
        >>> w = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = stabilize(torch.optim.SGD([w], lr=1.0), AutoClip(percentile=50))
        >>> for g in (1.0, 2.0, 9.0):
        ...     w.grad = torch.tensor([g])
        ...     optimizer.step()
        >>> optimizer.stats["norm_after"]  # the median of 1, 2 and 9
        tensor([2.])
    """

    name = "autoclip"
    options = ("percentile", "window")

    def __init__(self, percentile: float = 10.0, window: int = 1000):
        check(type(self).__name__, percentile=percentile, window=window)
        self.percentile, self.window = percentile, window

    @property
    def shared(self) -> dict[str, tuple[int, ...]]:
        return {"history": (self.window,), "n": ()}  # name -> shape; n counts all steps, beyond the window too

    def __call__(self, grads: Gradients, state: Statistics, step: StepInfo) -> Result:
        grads, norm, finite = yield from global_norm(grads)  # 0-d fp64 and bool
        # The present norm is part of its own history, so the first step is never clipped.
        history, n = appended(state["history"], state["n"], norm)
        limit = percentile(history, n.clamp(max=self.window), self.percentile)
        # Where a gradient is not finite, the norm is that of the others alone and not comparable with the history.
        return limited(grads, norm, torch.where(finite, limit, norm)), {"history": history, "n": n}


class SkipStep(Transform):
    """Skip the whole step when the global norm, or the loss, is an outlier over the last steps, as in the training of
    OLMo 2 (arXiv:2501.00656; the rule is OLMo-core's).

    The step is skipped when the value is more than ``sigma`` standard deviations above the mean of the ``window``
    values before it. The value enters the window in either case. Nothing is skipped before half a window of steps. A
    step with a gradient (or watched loss) that is not finite is skipped too, and its value does not enter. A skipped
    step changes no parameter, moment or other statistic. Statistics of the whole model, fp64: ``history`` ``[window]``
    and ``n`` (values).

    Args:
        window: number of values. Default 128 (OLMo-core).
        sigma: number of standard deviations, at least 0. Default 6 (OLMo-core).
        watch: ``"norm"`` (default) or ``"loss"``. The loss is the value of the closure, or the 0-d tensor in the
            attribute ``loss`` of the transform, set before the step; on several ranks, all need the same mean. OLMo
            watches both: put two transforms in the chain.

    Raises:
        ValueError: a value is out of range, or (at the step) a watched loss is not given.

    Example:
        >>> import torch
        >>> from evenstep import SkipStep, stabilize
        >>> w = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = stabilize(torch.optim.SGD([w], lr=1.0), SkipStep(window=4))
        >>> for g in (1.0, 1.5, 1.0, 1000.0):
        ...     w.grad = torch.tensor([g])
        ...     optimizer.step()
        >>> w.data
        tensor([-3.5000])
    """

    options = ("window", "sigma", "watch")
    sees_skipped_steps = True

    def __init__(self, window: int = 128, sigma: float = 6.0, watch: str = "norm"):
        check(type(self).__name__, window=window, sigma=sigma, watch=watch)
        self.window, self.sigma, self.watch = window, sigma, watch
        # Two names, because a chain may hold one of each and keeps statistics by name.
        self.name = "skip_step" if watch == "norm" else "skip_step_loss"
        self.loss: Tensor | None = None

    @property
    def shared(self) -> dict[str, tuple[int, ...]]:
        return {"history": (self.window,), "n": ()}

    def __call__(self, grads: Gradients, state: Statistics, step: StepInfo) -> Result:
        history, n = state["history"], state["n"]
        if self.watch == "norm":
            grads, value, usable = yield from global_norm(grads)
        else:
            loss = step.loss if self.loss is None else self.loss
            if loss is None:  # a skipped check would be a silent fallback
                raise ValueError(
                    "SkipStep(watch='loss') was given no loss: step with a closure, or set unit.loss before"
                )
            value = loss.detach().to(history)  # fp64 on the device of the statistics
            usable = torch.isfinite(value)
            value = torch.where(usable, value, torch.zeros_like(value))
        # The ring buffer fills from place 0 on; after `window` values all places count.
        past = torch.arange(self.window, device=history.device) < n  # [window] bool: places that are filled
        count = past.sum()
        # Mean and sample variance of the values before this one, as torch.std of the filled window would give.
        mean = (history * past).sum() / count.clamp(min=1)
        variance = ((history - mean).square() * past).sum() / (count - 1).clamp(min=1)
        # All in tensors: the decision stays on the device, and a skipped step costs no synchronisation.
        # At least half a window of values, and three, so that there is a standard deviation.
        judged = n + 1 >= max(3, self.window // 2)
        # value > mean + sigma std, for values that are judged; NaN and Inf are skipped at any time.
        keep = usable & ~(judged & (value - mean > self.sigma * variance.sqrt()))
        # An outlier enters the window, so that a lasting change of level is accepted after a while.
        longer, more = appended(history, n, value)
        # A step with a NaN has no value: the window stays as it is.
        new = {"history": torch.where(usable, longer, history), "n": torch.where(usable, more, n)}
        return grads.kept_if(keep), new


def appended(history: Tensor, n: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """A ring buffer of the last values ``[window]`` with one more, and the number ``n`` of all values so far."""
    # A comparison instead of an index, which would have to be read from the device.
    place = torch.arange(len(history), device=history.device) == torch.remainder(n, len(history))
    return torch.where(place, value, history), n + 1


def percentile(history: Tensor, count: Tensor, percent: float) -> Tensor:
    """The percentile ``percent`` of the first ``count`` (0-d tensor) values, interpolated linearly as NumPy does."""
    # Unused places sort to the end as Inf.
    used = torch.arange(len(history), device=history.device) < count
    ordered = torch.where(used, history, torch.inf).sort().values
    place = (count - 1) * (percent / 100)  # fractional index into the sorted values
    below = place.floor()
    low, high = ordered[torch.stack([below, torch.minimum(below + 1, count - 1)]).long()].unbind()
    return low + (place - below) * (high - low)


# ---- moment resets ----


class MomentumReset(Transform):
    """Reset the base's moments and step counts before every ``every``-th step: SPAM's momentum reset (arXiv:2501.06842,
    section 4), Stable-SPAM's MoRet (arXiv:2502.17055, section 4), for any optimizer.

    The gradients pass unchanged, and the place in the chain makes no difference. ``stabilize(..., reset_interval=N)``
    is a short form. No statistics.

    Args:
        every: steps between resets, 0 for never. Default 1000 (Stable-SPAM; SPAM 500).
        moments: names of state entries to reset besides the known ones, for bases with names of their own.

    Raises:
        ValueError: ``every`` is out of range.

    Example:
        >>> import torch
        >>> from evenstep import MomentumReset, stabilize
        >>> w = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = stabilize(torch.optim.Adam([w]), MomentumReset(every=2))
        >>> for g in (1.0, 5.0):
        ...     w.grad = torch.tensor([g])
        ...     optimizer.step()
        >>> optimizer.state[w]["step"], optimizer.state[w]["exp_avg"]  # as after one step with the gradient 5
        (tensor(1.), tensor([0.5000]))
    """

    name = "momentum_reset"
    options = ("every", "moments")

    def __init__(self, every: int = 1000, moments: Iterable[str] = ()):
        check(type(self).__name__, every=every)
        self.every, self.moments = every, tuple(moments)

    def __call__(self, grads: Gradients, state: Statistics, step: StepInfo) -> Result:
        yield from ()  # a generator, as all transforms are; `Stabilized` does the reset
        return grads, {}
