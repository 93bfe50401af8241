"""Gradient transforms: units that `stabilize` puts in front of any optimizer.

A unit looks at the gradients of a step, keeps a few statistics by name, and returns the gradients as the optimizer is
to see them. `AdaClip`, `AdaGN`, `GradientStabilizer`, `SpikeClip`, `ValueClip` and `AGC` look at one tensor at a time;
`NormClip`, `ZClip`, `AutoClip` and `SkipStep` at the 2-norm of all gradients together; `MomentumReset` resets the
optimizer's moments.
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

Statistics = dict[str, Any]
"""Statistics by name: for ``scalars`` a vector ``[k]``, for ``entries`` a list of ``k`` tensors (local shards), for
``shared`` one tensor.
"""


@dataclass(frozen=True, slots=True)
class StepInfo:
    """What a unit may know of a step besides its gradients."""

    params: list[Tensor]
    """The ``k`` parameters (local shards)."""
    t: int = 1
    """Number of this step, from 1."""
    reset_interval: int = 0
    """Every so many steps the base's moments start anew; 0 for never."""
    loss: Tensor | None = None
    """What the closure returned, if one was given."""

    def since_reset(self) -> int:
        """Steps since the moments were last reset (0 on the step of the reset), or since the start."""
        return self.t % self.reset_interval if self.reset_interval else self.t


class Transform:
    """Base class of the units that `stabilize` puts before an optimizer. A subclass names its statistics, which all
    start at zero, and implements ``__call__``.

    The statistics of a tensor whose gradient is not finite stay as they were whatever the call returns for them; so do
    the shared ones when any gradient is not finite, and all of them when the step is skipped.
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
    """Whether it needs the gradients of all parameters at once, as everything does that has shared statistics."""
    sees_skipped_steps: ClassVar[bool] = False
    """Whether the shared statistics are kept as returned also of a step that is skipped."""

    @property
    def shared(self) -> Mapping[str, tuple[int, ...]]:
        """Statistics with one value for the whole model: name -> shape."""
        return {}

    def __call__(self, grads: Gradients, state: Statistics, step: StepInfo) -> Steps[tuple[Gradients, Statistics]]:
        """Transform ``k`` gradients. Returned are the gradients and the new values of the statistics."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.options)})"


def shared_dtype(device: torch.device) -> torch.dtype:
    """Dtype of shared statistics: fp64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


Result = Steps[tuple[Gradients, Statistics]]


# ---- units that look at one tensor at a time ----


class AdaClip(Transform):
    """Clip entries to a running mean of their tensor's largest entry, by scaling them down to it (arXiv:2502.17055,
    section 4).

    ``gamma3`` is the decay of that mean, default 0.999 (paper). Raises ValueError when it is not in [0, 1).
    """

    name = "adaclip"
    scalars = ("peak", "n")
    options = ("gamma3",)

    def __init__(self, gamma3: float = 0.999):
        check(type(self).__name__, gamma3=gamma3)
        self.gamma3 = gamma3

    def __call__(self, grads: Gradients, state: Statistics, step: StepInfo) -> Result:
        n = state["n"] + 1
        if grads.limit is not None:  # clipped already: this limit speaks of the entries as they are after that
            grads = yield from grads.replaced([grads.read(i) for i in range(len(grads.tensors))])
        grads, peak = adaclip(grads, state["peak"], n, self.gamma3)
        return grads, {"peak": peak, "n": n}


class AdaGN(Transform):
    """Give each tensor the norm that the history of its norm suggests: mean over root mean square (arXiv:2502.17055,
    section 4).

    ``gamma1`` and ``gamma2`` are the decays of the norm's mean and mean square, defaults 0.7 and 0.9 (paper, 4-bit;
    0.85 and 0.99999 for BF16); ``eps`` is added to the root. A gradient that is zero, or whose norm is below
    1.2e-38, becomes zero; one whose norm is above 3.4e38 counts as not finite. Raises ValueError when a value is out of
    range.
    """

    name = "adagn"
    scalars = ("norm", "norm_rms", "n")
    options = ("gamma1", "gamma2", "eps")

    def __init__(self, gamma1: float = 0.7, gamma2: float = 0.9, eps: float = 1e-8):
        check(type(self).__name__, gamma1=gamma1, gamma2=gamma2, eps=eps)
        self.gamma1, self.gamma2, self.eps = gamma1, gamma2, eps

    def __call__(self, grads: Gradients, state: Statistics, step: StepInfo) -> Result:
        n = state["n"] + 1
        grads = (yield from grads.with_norms()).within_range()
        gain, ema, rms = adagn(grads.norm, state["norm"], state["norm_rms"], n, self.gamma1, self.gamma2, self.eps)
        return grads.amplified(gain), {"norm": ema, "norm_rms": rms, "n": n}


class GradientStabilizer(AdaGN):
    """AdaGN alone with the defaults of GradientStabilizer (arXiv:2502.17055 v3): gamma1 0.6, gamma2 0.999, no eps."""

    name = "gradient_stabilizer"

    def __init__(self, gamma1: float = 0.6, gamma2: float = 0.999, eps: float = 0.0):
        super().__init__(gamma1, gamma2, eps)


class SpikeClip(Transform):
    """Clip each entry to ``sqrt(threshold * v)``, v the running mean of its own square before this step: SPAM's rule
    (arXiv:2501.06842, section 4) in front of any optimizer.

    It keeps v itself, one fp32 number per entry, fed with what it lets through. An entry with ``v == 0`` has no history
    and passes. v starts anew when the base's moments are reset (`MomentumReset`). A tensor with an entry whose square
    is beyond the range of v (1.8e19 in fp32) counts as not finite.

    Args:
        threshold: default 5000 (paper); 0 for no clipping.
        beta2: decay of v, default 0.999 (paper: the base's second moment).
        clip_start: no clipping in the first steps and as many after a reset; default 20 (official code).
        spikes: ``"clip"`` (default), or ``"zero"`` to make such an entry 0, which the paper compares with as
            nullifying.

    Raises ValueError when a value is out of range.
    """

    name = "spike_clip"
    entries = ("exp_avg_sq",)
    options = ("threshold", "beta2", "clip_start", "spikes")

    def __init__(self, threshold: float = 5000.0, beta2: float = 0.999, clip_start: int = 20, spikes: str = "clip"):
        check(type(self).__name__, threshold=threshold, beta2=beta2, clip_start=clip_start, spikes=spikes)
        self.threshold, self.beta2, self.clip_start, self.spikes = threshold, beta2, clip_start, spikes

    def __call__(self, grads: Gradients, state: Statistics, step: StepInfo) -> Result:
        grads = grads.squares_within(torch.finfo(grads.dtype).max)
        forget = step.reset_interval > 0 and step.since_reset() == 0
        clips = self.threshold > 0 and min(step.t, step.since_reset()) >= self.clip_start
        flag = grads.peak.new_ones(())
        clip = EntryClip(self.threshold, flag * clips, forget=flag * forget, zero_history=False)
        kept = 0.0 if forget else self.beta2
        largest = torch.finfo(grads.dtype).max
        clipped, second = [], []
        for i, v in enumerate(state["exp_avg_sq"]):
            before = grads.read(i)
            g = clip(i, before, v) if self.threshold else before
            if self.spikes == "zero":
                g = g.mul_(g == before)
            clipped.append(g)
            second.append((v * kept).addcmul_(g, g, value=1 - self.beta2).clamp_(max=largest))
        grads = yield from grads.replaced(clipped)
        return grads, {"exp_avg_sq": second}


class ValueClip(Transform):
    """Clamp every entry to ``[-limit, limit]``.

    ``limit`` defaults to 0.1, as compared with GradientStabilizer (arXiv:2502.17055 v3). Raises ValueError when it is
    not above 0.
    """

    name = "value_clip"
    options = ("limit",)

    def __init__(self, limit: float = 0.1):
        check(type(self).__name__, limit=limit)
        self.limit = limit

    def __call__(self, grads: Gradients, state: Statistics, step: StepInfo) -> Result:
        clamped = [grads.read(i).clamp_(-self.limit, self.limit) for i in range(len(grads.tensors))]
        grads = yield from grads.replaced(clamped)
        return grads, {}


class AGC(Transform):
    """Adaptive gradient clipping: each unit's gradient has at most ``clipping`` times the norm of its weights
    (arXiv:2102.06171, section 4.1).

    A unit is a row of a matrix (what feeds one output: all dimensions but the first), or a whole vector. The paper
    leaves the last linear layer out; give that layer an optimizer of its own to do the same.

    Args:
        clipping: largest ratio of the two norms, default 0.01 (paper, large batches; as compared with
            GradientStabilizer).
        eps: least norm of the weights, so that weights of zero can move; default 1e-3 (paper).

    Raises ValueError when a value is out of range.
    """

    name = "agc"
    options = ("clipping", "eps")

    def __init__(self, clipping: float = 0.01, eps: float = 1e-3):
        check(type(self).__name__, clipping=clipping, eps=eps)
        self.clipping, self.eps = clipping, eps

    def __call__(self, grads: Gradients, state: Statistics, step: StepInfo) -> Result:
        values = [grads.read(i) for i in range(len(grads.tensors))]
        asked = [
            Reduction("sum", torch.cat([_unit_squares(p), _unit_squares(g)]), 1 if p.dim() > 1 else None)
            for p, g in zip(step.params, values, strict=True)
        ]
        answers = yield from reduced(*asked)
        for g, answer in zip(values, answers, strict=True):
            weight, size = answer.sqrt().chunk(2)
            limit = self.clipping * weight.clamp(min=self.eps)
            factor = torch.where(size > limit, limit / size, torch.ones_like(size)).to(g.dtype)
            g.mul_(factor.view(-1, *[1] * (g.dim() - 1)) if g.dim() > 1 else factor.view(()))
        grads = yield from grads.replaced(values)
        return grads, {}


def _unit_squares(x: Tensor) -> Tensor:
    """Squared norms of the rows of ``x`` in fp64, of all of it for fewer than 2 dimensions; flat."""
    rows = x.flatten(1) if x.dim() > 1 else x.reshape(1, -1)
    return torch.linalg.vector_norm(rows, dim=1, dtype=shared_dtype(x.device)).square()


# ---- units that look at the whole model: the 2-norm of all gradients together ----
#
# The norms of single tensors are known on every rank once they are all-reduced, and the global norm follows without
# another message. "All" means the tensors that this optimizer holds on this process: with pipeline stages, the stage.
# The shared statistics are kept, in fp64, under each parameter. A gradient with a NaN or Inf, or with a norm out of the
# range of its statistics (fp32; 1e150 for fp64), is left out of the global norm and of the step; such a step leaves the
# statistics unchanged.

SQUARABLE = 1e150
"""fp64 cannot hold the squares of norms above it, which fp64 parameters may have."""


def global_norm(grads: Gradients) -> Steps[tuple[Gradients, Tensor, Tensor]]:
    """The 2-norm of all finite gradients as they stand (0-d, fp64), and whether all are finite (0-d bool)."""
    grads = (yield from grads.with_norms()).within_range()
    grads = grads.kept_if(grads.norm <= SQUARABLE)
    dtype = shared_dtype(grads.peak.device)
    norms, finite = yield from reduced(
        Reduction("gather", torch.where(grads.finite, grads.norm, 0.0).to(dtype)),
        Reduction("gather", grads.finite.to(dtype)),
    )
    return grads, peak_and_norm(norms)[1], finite.amin() > 0


def limited(grads: Gradients, norm: Tensor, limit: Tensor | float) -> Gradients:
    """All gradients scaled so that their global norm is at most ``limit``."""
    gain = torch.where(norm > limit, limit / norm, torch.ones_like(norm)).to(grads.dtype)
    return grads.amplified(gain.expand_as(grads.peak))


class NormClip(Transform):
    """Scale all gradients together so that their global 2-norm is at most ``max_norm`` (arXiv:1211.5063), as
    ``torch.nn.utils.clip_grad_norm_`` does, without its 1e-6.

    ``max_norm`` defaults to 1.0 (the common choice, and as compared with GradientStabilizer). Raises ValueError when it
    is not above 0.
    """

    name = "norm_clip"
    whole_model = True
    options = ("max_norm",)

    def __init__(self, max_norm: float = 1.0):
        check(type(self).__name__, max_norm=max_norm)
        self.max_norm = max_norm

    def __call__(self, grads: Gradients, state: Statistics, step: StepInfo) -> Result:
        grads, norm, _ = yield from global_norm(grads)
        return limited(grads, norm, self.max_norm), {}


class ZClip(Transform):
    """Clip global norms that are outliers by their z-score (arXiv:2504.02507, section 3).

    With the running mean and variance of the norm, ``z = (norm - mean) / std``; a norm with z above the threshold is
    scaled to ``mean + threshold**2 / z * std``: the further out, the closer to the mean. The statistics see what is
    left. They start from the plain mean and variance of the first ``warmup_steps`` norms, which are not clipped.

    Args:
        alpha: decay of mean and variance, default 0.97 (paper).
        threshold: z-score from which a norm is an outlier, default 2.5 (paper).
        warmup_steps: default 25 (paper).
        eps: added to the standard deviation, default 1e-6 (official code).

    Raises ValueError when a value is out of range.
    """

    name = "zclip"
    options = ("alpha", "threshold", "warmup_steps", "eps")
    shared = {"mean": (), "var": (), "n": ()}  # noqa: RUF012

    def __init__(self, alpha: float = 0.97, threshold: float = 2.5, warmup_steps: int = 25, eps: float = 1e-6):
        check(type(self).__name__, alpha=alpha, threshold=threshold, warmup_steps=warmup_steps, eps=eps)
        self.alpha, self.threshold, self.warmup_steps, self.eps = alpha, threshold, warmup_steps, eps

    def __call__(self, grads: Gradients, state: Statistics, step: StepInfo) -> Result:
        grads, norm, _ = yield from global_norm(grads)
        mean, var, n = state["mean"], state["var"], state["n"]
        warm = n >= max(self.warmup_steps, 1)
        std = var.sqrt()
        z = (norm - mean) / (std + self.eps)
        outlier = warm & (z > self.threshold)
        kept = torch.where(outlier, mean + self.threshold**2 / z * std, norm)
        # While warming up: the mean and variance of the n + 1 norms so far (Welford).
        first_mean = mean + (norm - mean) / (n + 1)
        first_var = (n * var + (norm - mean) * (norm - first_mean)) / (n + 1)
        later_mean = self.alpha * mean + (1 - self.alpha) * kept
        later_var = self.alpha * var + (1 - self.alpha) * (kept - later_mean).square()
        new = {
            "mean": torch.where(warm, later_mean, first_mean),
            "var": torch.where(warm, later_var, first_var),
            "n": n + 1,
        }
        return limited(grads, norm, kept), new


class AutoClip(Transform):
    """Clip the global norm to a percentile of its own history, this step included (arXiv:2007.14469).

    Args:
        percentile: between 0 and 100, default 10 (paper).
        window: how many norms back the history goes, default 1000. (The paper's goes back to the start; kept here is a
            fixed number, 8 bytes each.)

    Raises ValueError when a value is out of range.
    """

    name = "autoclip"
    options = ("percentile", "window")

    def __init__(self, percentile: float = 10.0, window: int = 1000):
        check(type(self).__name__, percentile=percentile, window=window)
        self.percentile, self.window = percentile, window

    @property
    def shared(self) -> dict[str, tuple[int, ...]]:
        return {"history": (self.window,), "n": ()}

    def __call__(self, grads: Gradients, state: Statistics, step: StepInfo) -> Result:
        grads, norm, finite = yield from global_norm(grads)
        history, n = appended(state["history"], state["n"], norm)
        limit = percentile(history, n.clamp(max=self.window), self.percentile)
        # A norm that is not the whole model's is not compared with those that are.
        return limited(grads, norm, torch.where(finite, limit, norm)), {"history": history, "n": n}


class SkipStep(Transform):
    """Skip the whole step when the global norm, or the loss, is an outlier over the last steps, as OLMo 2 was trained
    (arXiv:2501.00656; the rule is OLMo-core's).

    The step is skipped when the value is more than ``sigma`` standard deviations above the mean of the ``window``
    values before it; the value itself joins the window either way. Nothing is skipped before half a window of steps. A
    step with a gradient (or watched loss) that is not finite is skipped too and does not join. A skipped step changes
    no parameter, moment or other statistic.

    Args:
        window: default 128 (OLMo-core).
        sigma: default 6 (OLMo-core).
        watch: ``"norm"`` or ``"loss"``. The loss is what the closure returned, or what was put into ``unit.loss`` (a
            0-d tensor) before the step; training on several ranks, give all the same mean. OLMo watches both: put two
            units in the chain.

    Raises ValueError when a value is out of range, or at the step when a watched loss is not given.
    """

    options = ("window", "sigma", "watch")
    sees_skipped_steps = True

    def __init__(self, window: int = 128, sigma: float = 6.0, watch: str = "norm"):
        check(type(self).__name__, window=window, sigma=sigma, watch=watch)
        self.window, self.sigma, self.watch = window, sigma, watch
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
            if loss is None:
                raise ValueError(
                    "SkipStep(watch='loss') was given no loss: step with a closure, or set unit.loss before"
                )
            value = loss.detach().to(history)
            usable = torch.isfinite(value)
            value = torch.where(usable, value, torch.zeros_like(value))
        past = torch.arange(self.window, device=history.device) < n
        count = past.sum()
        mean = (history * past).sum() / count.clamp(min=1)
        variance = ((history - mean).square() * past).sum() / (count - 1).clamp(min=1)
        judged = n + 1 >= max(3, self.window // 2)
        keep = usable & ~(judged & (value - mean > self.sigma * variance.sqrt()))
        longer, more = appended(history, n, value)
        new = {"history": torch.where(usable, longer, history), "n": torch.where(usable, more, n)}
        return grads.kept_if(keep), new


def appended(history: Tensor, n: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """A ring of the last values with one more; ``n`` counts all there have been."""
    place = torch.arange(len(history), device=history.device) == torch.remainder(n, len(history))
    return torch.where(place, value, history), n + 1


def percentile(history: Tensor, count: Tensor, percent: float) -> Tensor:
    """That percentile of the first ``count`` values (0-d tensor), between neighbours linearly."""
    used = torch.arange(len(history), device=history.device) < count
    ordered = torch.where(used, history, torch.inf).sort().values
    place = (count - 1) * (percent / 100)
    below = place.floor()
    low, high = ordered[torch.stack([below, torch.minimum(below + 1, count - 1)]).long()].unbind()
    return low + (place - below) * (high - low)


# ---- moment resets ----


class MomentumReset(Transform):
    """Every so many steps the base's moments and step counts start anew before the step: SPAM's momentum reset
    (arXiv:2501.06842, section 4), Stable-SPAM's MoRet (arXiv:2502.17055, section 4), for any optimizer.

    The gradients pass; where it stands in the chain makes no difference. ``stabilize(..., reset_interval=N)`` is short
    for it.

    Args:
        every: default 1000 (Stable-SPAM; SPAM 500); 0 for never.
        moments: names of state entries to reset besides the known ones, for bases with names of their own.

    Raises ValueError when ``every`` is out of range.
    """

    name = "momentum_reset"
    options = ("every", "moments")

    def __init__(self, every: int = 1000, moments: Iterable[str] = ()):
        check(type(self).__name__, every=every)
        self.every, self.moments = every, tuple(moments)

    def __call__(self, grads: Gradients, state: Statistics, step: StepInfo) -> Result:
        yield from ()
        return grads, {}
