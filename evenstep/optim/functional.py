"""The equations of the optimizers, each written once, as functions on lists of tensors.

Shapes: a step works on ``k`` parameters at a time. ``[k]`` is a vector with one entry per parameter, in the dtype of
the statistics (fp32, or fp64 for fp64 parameters); 0-d values hold for all of them. A list of tensors has ``k`` entries
in the shapes of the parameters.

* `adaclip`: T_t = gamma3 T_{t-1} + (1 - gamma3) max|g_t|; larger entries are scaled down to T_t's bias-corrected value
  (AdaClip, Stable-SPAM, arXiv:2502.17055, section 4).
* `adagn`: g * m_t / (sqrt(v_t) + eps) / ||g||, with the running mean m and mean square v of the norm (AdaGN,
  Stable-SPAM; alone it is GradientStabilizer, v3 of that paper).
* `EntryClip`: g^2 > theta v becomes sign(g) sqrt(theta v) (SPAM, arXiv:2501.06842, section 4).
* `AdamPlan`, `adam_step`: Adam with decoupled weight decay, and the moment resets of both papers.
* `row_norms`, `squared_norms`, `floored`: g / ||g|| by row or column (SCALE, arXiv:2506.16659).
* `reset_due`, `rewarm_factor`, `cosine_factor`, `bias_correction`: what depends on the step count.

Three rules make the functions exact everywhere. Gradients are read and never written. No value is read back from a
device, so nothing branches on a tensor: a gradient that is not finite leaves its tensor unchanged by arithmetic (decay
1, step 0). A number of a whole tensor that may be sharded comes from a generator that yields `Reduction` requests; see
`evenstep.optim.distributed`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from evenstep.kernels.interface import Kernels, Measured, constant, is_coded, table
from evenstep.optim.distributed import Reduction, Steps, run_batched_collectives

T = TypeVar("T", Tensor, float)
R = TypeVar("R")


def completed(step: Steps[R]) -> R:
    """Run a step on parameters that are not sharded to its end; each request is its own answer."""
    return run_batched_collectives([step], lambda requests: None)[0]


# ---- time: resets, schedules, bias correction ----
#
# ``t`` is the 1-based number of the current ``step()`` call: a 0-d tensor, which may live on a device and is never
# branched on, or a number where a fused step is prepared on the host.


def reset_due(t: T, every: int) -> T:
    """1 on the steps whose number is a multiple of ``every``, else 0; never for ``every == 0``.

    Stable-SPAM's MoRet and SPAM's momentum reset: the moments start from zero on such a step.
    """
    return 0 * t if every == 0 else (t % every == 0) + 0 * t


def bias_correction(beta: float | Tensor, count: Tensor) -> Tensor:
    """``1 - beta**count`` without the cancellation that fp32 suffers for a beta near one (0.99999 at count 1 would be
    off by 0.6 %).
    """
    log_beta = torch.log(beta) if isinstance(beta, Tensor) else (math.log(beta) if beta > 0 else -math.inf)
    return -torch.expm1(count * log_beta)


def cosine_factor(t: T, total_steps: int, eta_min: float, *, hold: bool) -> T:
    """Stable-SPAM's optional factor on beta1 and gamma1: from 1 down to ``eta_min`` over ``total_steps``, then held
    (or, with ``hold=False``, rising again).
    """
    if hold:
        t = t.clamp(max=total_steps + 1) if isinstance(t, Tensor) else min(t, total_steps + 1)
    return eta_min + (1 - eta_min) * (1 + _cos(math.pi * t / (total_steps + 1))) / 2


def rewarm_factor(t: T, every: int, warmup_steps: int) -> T:
    """SPAM's factor on the update after a reset: from 0.01 on the reset step to 1 after ``warmup_steps``; 1 before the
    first reset.
    """
    if every == 0:
        return 0 * t + 1
    since = t % every
    rising = 1 - 0.99 * (1 + _cos(math.pi * since / (warmup_steps + 1))) / 2
    warming = (t >= every) & (since < warmup_steps)
    if isinstance(t, Tensor):
        return torch.where(warming, rising, torch.ones_like(t))
    return rising if warming else 1.0


def _cos(x: T) -> T:
    return torch.cos(x) if isinstance(x, Tensor) else math.cos(x)


# ---- blocks: a large tensor is read one cache-sized piece at a time ----
#
# An optimizer step only moves bytes. A chain of elementwise operations over a whole tensor streams it through memory
# once per operation; the same chain over pieces that fit in the second-level cache streams it once in all, and its
# temporaries stay small.

BLOCK = 1 << 16
"""Entries per piece: 256 KiB in fp32, so that the buffers of an Adam update share a 2 MiB cache (best of 2^13 to 2^17
as measured).
"""


def splittable(*tensors: Tensor) -> bool:
    """Whether taking these tensors apart is possible and helps."""
    first = tensors[0]
    return (
        first.device.type == "cpu"
        and first.numel() > BLOCK
        and not torch.compiler.is_compiling()
        and all(type(t) in (Tensor, Parameter) and t.is_contiguous() for t in tensors)
    )


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield matching pieces (views) of tensors of one size; the tensors themselves where splitting cannot help or is
    not possible.
    """
    if splittable(*tensors):
        yield from zip(*(t.view(-1).split(BLOCK) for t in tensors), strict=True)
    else:
        yield tensors


def row_blocks(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching groups of rows of tensors of one shape, small enough to stay in cache where splitting is possible."""
    if splittable(*matrices):
        rows = max(BLOCK // max(matrices[0][0].numel(), 1), 1)
        yield from zip(*(x.split(rows) for x in matrices), strict=True)
    else:
        yield matrices


# ---- gradients: what is known of them, and how they are read ----


@dataclass(frozen=True, slots=True)
class Norms:
    """2-norms ``[k]`` of whole tensors and how many of their entries were clipped."""

    raw: Tensor
    """Before any transform."""
    clipped: Tensor
    """After clipping, before any gain."""
    count: Tensor


@dataclass(frozen=True, slots=True)
class Gradients:
    """``k`` gradient tensors (or the local shards of them) on one device, with what a step knows of each.

    A transform such as AdaClip needs a few numbers per tensor (its largest entry, its norm) and results in a few more
    (a limit, a gain). They are kept beside the raw tensors and applied when a piece is read, so that no transformed
    copy of a whole gradient exists and ``p.grad`` stays as it is. Entry ``g`` is read as
    ``sign * gain * (g if |g| <= limit else g * limit / peak)``.

    Numbers are vectors ``[k]`` in ``dtype``, the dtype of the statistics, and speak of whole tensors.

    >>> grads = completed(Gradients.measure([torch.tensor([3.0, 4.0])], torch.float32))
    >>> grads.peak
    tensor([4.])
    >>> completed(grads.clipped(torch.tensor([2.0])).with_norms()).read(0)
    tensor([1.5000, 2.0000])
    """

    tensors: list[Tensor]
    dtype: torch.dtype
    peak: Tensor
    """Largest absolute entry; 0 for an empty tensor, Inf when any entry is not finite."""
    local_norm: Tensor
    """2-norm of the local shard, before any transform."""
    finite: Tensor
    """Boolean: every entry is finite. The other tensors are read as zeros."""
    gain: Tensor
    """Every entry is multiplied by it, after clipping; 0 where not finite."""
    limit: Tensor | None = None
    """Entries of the raw tensor above it (absolute value) are multiplied by ``limit / peak``."""
    sign: float = 1.0
    """-1 to ascend."""
    norms: Norms | None = None
    """What `with_norms` found."""
    origin: Gradients | None = None
    """The gradients before `replaced` put other tensors in their place."""
    kernels: Kernels | None = None
    """What reads the tensors, for `stabilize` and fused steps; None for the plain code."""
    measured: Measured | None = None
    """What the kernels measured."""

    @classmethod
    def measure(
        cls,
        tensors: list[Tensor],
        dtype: torch.dtype,
        sign: float = 1.0,
        kernels: Kernels | None = None,
        measured: Measured | None = None,
    ) -> Steps[Gradients]:
        """Measure ``tensors`` in one pass (none if ``kernels`` have ``measured`` them): the largest absolute entry of
        each whole tensor, and the norm of each local shard.
        """
        if kernels is not None:
            measured = measured or kernels.measure(tensors)
            bound, norm = measured.peak, measured.norm
        else:
            peaks, norms = [], []
            for g in tensors:
                blockwise = [peak_and_norm(piece.to(dtype)) for (piece,) in blocks(g)]
                peaks.append(torch.stack([peak for peak, _ in blockwise]).amax())
                norms.append(peak_and_norm(torch.stack([norm for _, norm in blockwise]))[1])
            # An all-reduce by maximum may lose a NaN, but not an infinity.
            bound = torch.nan_to_num(torch.stack(peaks), nan=torch.inf, posinf=torch.inf)
            norm = torch.stack(norms)
        [peak] = yield (Reduction("max", bound),)
        finite = torch.isfinite(peak)
        gain = finite.to(dtype)
        return cls(tensors, dtype, peak, norm, finite, gain, sign=sign, kernels=kernels, measured=measured)

    def numbers(self) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Gain, limit and reduced gain ``[k]``: an entry is multiplied by the reduced gain where it is above the limit,
        else by the gain."""
        gain = self.gain * self.sign
        return (gain, torch.inf, gain) if self.limit is None else (gain, self.limit, self._rescale * gain)

    def of(self, tensors: list[Tensor]) -> Gradients:
        """The same numbers for other tensors, such as the trained entries of each."""
        return replace(self, tensors=tensors)

    @property
    def largest(self) -> Tensor:
        """Largest absolute entry of each tensor with its gain, before any clipping."""
        return self.peak * self.gain

    @property
    def norm(self) -> Tensor:
        """2-norm of each tensor after clipping and gain; needs `with_norms` first."""
        assert self.norms is not None
        return self.norms.clipped * self.gain

    def clipped(self, limit: Tensor) -> Gradients:
        """Scale entries above ``limit`` ``[k]`` so that the largest lands on it (a rescale, not a clamp): AdaClip's
        rule. The limit applies to entries with the gain so far. ValueError when the gradients are clipped already.
        """
        if self.limit is not None:
            raise ValueError("these gradients are clipped already; a step clips once")
        return replace(self, limit=torch.where(self.gain > 0, limit / self.gain, torch.inf), norms=None)

    def amplified(self, gain: Tensor) -> Gradients:
        """Multiply every entry by ``gain`` ``[k]``, after clipping."""
        return replace(self, gain=torch.where(self.finite, self.gain * gain, 0.0))

    def kept_if(self, keep: Tensor) -> Gradients:
        """Let tensors where ``keep`` (bool ``[k]`` or 0-d) is False count as not finite: they are read as zeros."""
        finite = self.finite & keep
        return replace(self, finite=finite, gain=torch.where(finite, self.gain, 0.0))

    def replaced(self, tensors: list[Tensor]) -> Steps[Gradients]:
        """Other values in place of these, for a transform that limits and gains cannot express. Costs one pass, and one
        more all-reduce where sharded.
        """
        new = yield from Gradients.measure(tensors, self.dtype, kernels=self.kernels)
        finite = self.finite & new.finite
        return replace(new, finite=finite, gain=finite.to(self.dtype), origin=self.origin or self)

    def read(self, i: int) -> Tensor:
        """Tensor ``i``, transformed: a new tensor in ``dtype``."""
        return self.reader(i)(self.tensors[i])

    def reader(self, i: int) -> Callable[[Tensor], Tensor]:
        """A function from a piece of tensor ``i`` to its transformed entries: a new tensor in ``dtype``."""
        gain, dtype = self.gain[i] * self.sign, self.dtype
        # Where a tensor is not finite the gain is 0, and 0 * Inf is NaN: nan_to_num makes zeros of what is left.
        if self.limit is None:
            return lambda piece: torch.nan_to_num_(piece.to(dtype) * gain, nan=0.0)
        limit = self.limit[i]
        reduced = self._rescale[i] * gain
        return lambda piece: torch.nan_to_num_(_scale(piece.to(dtype), limit, gain, reduced)[0], nan=0.0)

    def write(self, indices: Sequence[int], outs: list[Tensor]) -> None:
        """Write the transformed tensors of these indices into ``outs``, in their dtype."""
        sources = [self.tensors[i] for i in indices]
        if self.kernels is not None and all(out.is_contiguous() for out in outs):
            numbers = table(self.peak, *self.numbers())  # [3, k]
            if len(indices) < len(self.tensors):
                numbers = numbers.index_select(1, constant(list(indices), torch.int64, numbers.device))
            self.kernels.transform(outs, sources, numbers)
            return
        for i, source, out in zip(indices, sources, outs, strict=True):
            read = self.reader(i)
            for piece, target in blocks(source, out):
                target.copy_(read(piece))

    def with_norms(self) -> Steps[Gradients]:
        """Take the norms of whole tensors, unless they are known. One pass if clipped, none if not."""
        if self.norms is not None:
            return self
        if self.origin is None or self.origin.norms is not None:
            [sums] = yield (self.squares(),)
            return self.with_sums(sums)
        sums, before = yield self.squares(), self.origin.squares()
        return replace(self.with_sums(sums), origin=self.origin.with_sums(before))

    def within_range(self) -> Gradients:
        """Let tensors whose norm is beyond the range of ``dtype``, though no entry is, count as not finite: for steps
        that compute with norms. Needs `with_norms` first.
        """
        assert self.norms is not None
        return self.kept_if(self.norms.raw <= torch.finfo(self.dtype).max)

    def squares_within(self, most: float) -> Gradients:
        """Let tensors with an entry whose square is above ``most`` count as not finite: for steps that keep a mean of
        squares, which such an entry would make infinite for good.
        """
        return self.kept_if((self._largest_left * self.gain).square() <= most)

    def squares(self) -> Reduction:
        """The request whose answer `with_sums` takes: squared norms before and after clipping, and clipped entries, of
        each shard. Squares are in units of the largest entry, so that they neither overflow nor vanish.
        """
        local, count = self._clipped_locally()
        tiny = torch.finfo(self.dtype).tiny
        raw, clipped = self.local_norm / self.peak.clamp(min=tiny), local / self._largest_left.clamp(min=tiny)
        return Reduction("sum", torch.cat([raw.square(), clipped.square(), count]))

    def with_sums(self, sums: Tensor) -> Gradients:
        """Set the norms from the answer to `squares`."""
        raw, clipped, count = sums.view(3, -1).unbind()
        return replace(self, norms=Norms(raw.sqrt() * self.peak, clipped.sqrt() * self._largest_left, count))

    @property
    def _largest_left(self) -> Tensor:
        """Largest entry after clipping."""
        return self.peak if self.limit is None else torch.minimum(self.peak, self.limit)

    def _clipped_locally(self) -> tuple[Tensor, Tensor]:
        """2-norm after clipping and number of clipped entries of each local shard, ``[k]``."""
        if self.limit is None:
            return self.local_norm, torch.zeros_like(self.local_norm)
        if self.kernels is not None and self.measured is not None:
            return self.kernels.clip_norms(self.tensors, self.measured, self.limit, self._rescale)
        unit = self._largest_left  # [k]
        inverse = 1 / unit.clamp(min=torch.finfo(self.dtype).tiny)
        norms, counts = [], []
        # Entries are read in units of the largest one that is left, so that their squares stay in range.
        for tensor, limit, gain, reduced in zip(
            self.tensors, self.limit.unbind(), inverse.unbind(), (self._rescale * inverse).unbind(), strict=True
        ):
            blockwise = []
            for (piece,) in blocks(tensor):
                values, over = _scale(piece.to(self.dtype), limit, gain, reduced)
                blockwise.append((torch.linalg.vector_norm(values), over.sum()))
            norms.append(torch.linalg.vector_norm(torch.stack([norm for norm, _ in blockwise])))
            counts.append(torch.stack([count for _, count in blockwise]).sum())
        return torch.stack(norms) * unit, torch.stack(counts)

    @property
    def _rescale(self) -> Tensor:
        assert self.limit is not None
        return torch.where(self.limit < self.peak, self.limit / self.peak, torch.ones_like(self.peak))


def _scale(g: Tensor, limit: Tensor, gain: Tensor, reduced: Tensor) -> tuple[Tensor, Tensor]:
    """``g`` times ``reduced`` where it is above the limit, else times ``gain``; and 1 or 0 for above or not."""
    # The mask is in floats because torch's boolean masks and ``where`` are not vectorised on CPU.
    over = g.abs().gt_(limit)
    return torch.rsub(over, 1.0).mul_(gain).addcmul_(over, reduced).mul_(g), over


def peak_and_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest absolute entry and 2-norm, the squares taken in units of the former: 1e20 does not overflow, 1e-30 does
    not vanish.
    """
    if x.numel() == 0:
        return x.new_zeros(()), x.new_zeros(())
    low, high = torch.aminmax(x)
    peak = torch.maximum(-low, high)
    unit = peak.clamp(min=torch.finfo(x.dtype).tiny, max=torch.finfo(x.dtype).max)
    return peak, torch.linalg.vector_norm(x / unit) * unit


# ---- Stable-SPAM: AdaClip and AdaGN ----


def adaclip(grads: Gradients, peak_ema: Tensor, n: Tensor, gamma3: float) -> tuple[Gradients, Tensor]:
    """AdaClip: scale each tensor's entries down to a running mean of its largest entry.

    ``peak_ema`` is T_{t-1} and ``n`` the number of updates, this one included; both ``[k]``. Returns the clipped
    gradients and T_t.
    """
    # T_t = gamma3 T_{t-1} + (1 - gamma3) max|g_t|; the limit is T_t / (1 - gamma3^n).
    peak_ema = gamma3 * peak_ema + (1 - gamma3) * grads.largest
    return grads.clipped(peak_ema / bias_correction(gamma3, n)), peak_ema


def adagn(
    norm: Tensor, norm_ema: Tensor, norm_rms: Tensor, n: Tensor, gamma1: float | Tensor, gamma2: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """AdaGN: the gain that gives each tensor the norm ``m_hat / (sqrt(v_hat) + eps)`` of its norm's history.

    All are ``[k]``: the norm of this gradient, the running mean m of the norm, ``norm_rms`` = sqrt(v), the root of the
    running mean of the squared norm, and the number of updates. Returns the gain, m and ``norm_rms``. The gain is 0 for
    a gradient that is zero, or whose norm is below the smallest normal number, which no gain could bring back.
    """
    # The root of v is kept because v itself overflows where the norm does not. hypot does the same for the sum.
    norm_ema = gamma1 * norm_ema + (1 - gamma1) * norm
    norm_rms = torch.hypot(math.sqrt(gamma2) * norm_rms, math.sqrt(1 - gamma2) * norm)
    span = torch.finfo(norm.dtype)
    # Rounding may take the largest norms out of range, and Inf / Inf would be no gain.
    mean = (norm_ema / bias_correction(gamma1, n)).clamp(max=span.max)
    root = (norm_rms / bias_correction(gamma2, n).sqrt() + eps).clamp(max=span.max)
    gain = (mean / root / norm).clamp(max=span.max)
    return torch.where(norm >= span.tiny, gain, 0.0), norm_ema, norm_rms


# ---- SPAM: clipping by the history of each entry ----


class EntryClip:
    """Spike-aware clipping of one step: entries with ``g**2 > threshold * v`` become ``sign(g) * sqrt(threshold * v)``,
    and are counted.

    ``active`` and ``forget`` are 0-d tensors, 1 or 0: whether to clip on this step, and whether it clears the history.
    An entry with ``v == 0`` has no history and stays as it is, unless ``zero_history`` (the published code's rule)
    makes it zero.
    """

    def __init__(self, threshold: float, active: Tensor, *, forget: Tensor, zero_history: bool):
        self.factor = threshold * (1 - forget)
        self.spread = torch.where(active > 0, 0.0, torch.inf)
        self.zero_history = zero_history
        # Tensor -> 2-norm after clipping and number of clipped entries of each of its pieces.
        self.pieces: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def __call__(self, i: int, g: Tensor, v: Tensor) -> Tensor:
        """Clip a piece ``g`` of tensor ``i``, with ``v`` its second moment before this step."""
        cap = torch.mul(v, self.factor).sqrt_().add_(self.spread)  # spread is Inf on a step without clipping
        if not self.zero_history:  # no cap where v is 0
            cap.add_(cap.clone().eq_(0), alpha=torch.finfo(v.dtype).max)
        clipped = torch.clamp(g, -cap, cap)
        self.pieces.setdefault(i, []).append((torch.linalg.vector_norm(clipped), torch.ne(clipped, g).sum()))
        return clipped

    def norms(self) -> Tensor:
        """2-norm of each tensor after clipping, ``[k]``."""
        return torch.stack(
            [torch.linalg.vector_norm(torch.stack([norm for norm, _ in self.pieces[i]])) for i in sorted(self.pieces)]
        )

    def counts(self) -> Tensor:
        """Number of entries clipped in each tensor, ``[k]``."""
        return torch.stack([torch.stack([count for _, count in self.pieces[i]]).sum() for i in sorted(self.pieces)])


# ---- Adam ----


@dataclass(frozen=True, slots=True)
class AdamPlan:
    """The factors of one Adam step for ``k`` tensors: vectors ``[k]`` where tensors differ.

    ``m <- keep1 m + add1 g``, ``v <- keep2 v + add2 g^2``, then ``p <- shrink p - step_size m / (sqrt(v) / root_bias2 +
    eps)``. A tensor whose gradient is not finite keeps its parameters and moments bit for bit: its decays are 1, its
    step is 0, and its gradient is read as 0.
    """

    keep1: Tensor
    """[k] what the first moment is multiplied by: beta1, 0 on a reset, 1 when skipped."""
    keep2: Tensor
    """[k] likewise for the second moment."""
    add1: Tensor
    """0-d: 1 - beta1."""
    add2: float
    step_size: Tensor
    """[k] lr (times any warm-up) over the first bias correction; 0 when skipped."""
    root_bias2: Tensor
    """[k] square root of the second bias correction."""
    shrink: Tensor | None
    """[k] decoupled weight decay: what the parameter is multiplied by before the update; None for no decay."""
    eps: float
    after: Tensor | None = None
    """[k] what the moments are multiplied by once the step is taken; None for 1."""
    shrink_after: Tensor | None = None
    """[k] likewise for the parameter."""

    @classmethod
    def of(
        cls,
        finite: Tensor,
        age: Tensor,
        forget: Tensor | float,
        *,
        lr: Tensor | float,
        betas: tuple[float | Tensor, float],
        eps: float,
        weight_decay: float = 0.0,
        warmup: Tensor | float = 1.0,
        eps_before_correction: bool = False,
        forget_after: Tensor | float | None = None,
        weight_decay_after: float = 0.0,
    ) -> AdamPlan:
        """``age`` ``[k]``: updates since the last reset, this one included, for the bias corrections. ``forget`` (0-d,
        1 or 0): clear the moments before the gradient enters.

        ``eps_before_correction`` adds ``eps`` to the root of the second moment before its bias is corrected (published
        SPAM), not after. ``forget_after`` (0-d, 1 or 0) and ``weight_decay_after`` are as ``forget`` and
        ``weight_decay``, but after the update (the order of the published code).
        """
        beta1, beta2 = betas
        one = torch.ones_like(age)  # [k]
        keep = one * (1 - forget)
        step_size = lr * warmup / bias_correction(beta1, age)
        root_bias2 = bias_correction(beta2, age).sqrt()
        if eps_before_correction:
            step_size, root_bias2 = step_size * root_bias2, one
        return cls(
            keep1=torch.where(finite, keep * beta1, one),
            keep2=torch.where(finite, keep * beta2, one),
            add1=one.new_ones(()) - beta1,
            add2=1 - beta2,
            step_size=torch.where(finite, step_size, 0 * one),
            root_bias2=root_bias2,
            shrink=torch.where(finite, one - lr * weight_decay, one) if weight_decay else None,
            eps=eps,
            after=None if forget_after is None else torch.where(finite, one * (1 - forget_after), one),
            shrink_after=torch.where(finite, one - lr * weight_decay_after, one) if weight_decay_after else None,
        )


def adam_step(
    weights: Weights,
    grads: Gradients,
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    plan: AdamPlan,
    clip: EntryClip | None = None,
) -> Tensor:
    """One Adam step, in place: parameters (in ``weights``) and both moments. ``clip`` is applied to each entry with its
    second moment before this step. Returns the 2-norm of each tensor's update, without the decay, ``[k]``.
    """
    # The second moment is capped at the largest finite number, so that rounding cannot make it infinite for good.
    largest = torch.finfo(grads.dtype).max
    norms = []
    for i, tensors in enumerate(zip(weights.tensors, grads.tensors, exp_avg, exp_avg_sq, strict=True)):
        read, norms_of_pieces, start = grads.reader(i), [], 0
        keep1, keep2, step_size, root_bias2 = plan.keep1[i], plan.keep2[i], plan.step_size[i], plan.root_bias2[i]
        for p, piece, stored_m, stored_v, *extras in blocks(*tensors, *weights.extras(i)):
            # m and v are the stored tensors themselves, updated in place, unless those are of another dtype.
            g, m, v = read(piece), opened(stored_m, grads.dtype), opened(stored_v, grads.dtype)
            if clip is not None:
                g = clip(i, g, v)  # judged by v before this gradient enters it
            m.mul_(keep1).addcmul_(g, plan.add1)  # m <- beta1 m + (1 - beta1) g
            v.mul_(keep2).addcmul_(g, g, value=plan.add2).clamp_(max=largest)
            update = torch.div(m, v.sqrt().div_(root_bias2).add_(plan.eps)).mul_(step_size)
            if plan.after is not None:  # a reset in the order of the published code
                m.mul_(plan.after[i])
                v.mul_(plan.after[i])
            close(stored_m, m, weights.finite[i])
            close(stored_v, v, weights.finite[i])
            norms_of_pieces.append(torch.linalg.vector_norm(update))
            # The parameter is updated in the dtype of the statistics and rounded once, by `Weights.write`.
            exact = p if p.dtype == grads.dtype else p.to(grads.dtype)
            if plan.shrink is not None:
                exact.mul_(plan.shrink[i])
            exact.sub_(update)
            if plan.shrink_after is not None:
                exact.mul_(plan.shrink_after[i])
            if exact is not p:
                weights.write(i, p, exact, extras, start)
                start += p.numel()
        norms.append(torch.linalg.vector_norm(torch.stack(norms_of_pieces)))
    return torch.stack(norms)


# ---- SCALE: each row or column of a matrix is divided by its norm ----

FLOOR = 1e-8
"""Smallest norm that is divided by (official code)."""


def row_norms(g: Tensor, count: int, norm: str) -> Tensor:
    """The norm of each row, all dimensions but the first taken together, in a shape that divides ``g``.

    ``"rms"`` is the root mean square over ``count`` entries (the official code; published learning rates belong to it),
    ``"l2"`` the paper's text.
    """
    low, high = torch.aminmax(g) if g.numel() else (g.new_zeros(()), g.new_zeros(()))
    # Squares are taken in units of the largest entry, so that they neither overflow nor vanish.
    unit = torch.maximum(-low, high).clamp(min=torch.finfo(g.dtype).tiny)
    size = torch.linalg.vector_norm(g / unit, dim=tuple(range(1, g.dim())), keepdim=True) * unit
    return floored(size, count, norm)


def squared_norms(pieces: Iterable[Tensor], read: Callable[[Tensor], Tensor], over: int) -> Tensor:
    """Squared norms in fp64 of the rows (``over=1``) or, over the rows of all pieces, of the columns (``over=0``)."""
    found = [read(piece).double().square_() for piece in pieces]
    if over == 0:
        return torch.stack([squares.sum(0, keepdim=True) for squares in found]).sum(0)
    return torch.cat([squares.sum(tuple(range(1, squares.dim())), keepdim=True) for squares in found])


def floored(size: Tensor, count: int, norm: str) -> Tensor:
    """A 2-norm over ``count`` entries as the norm of that name, at least `FLOOR`."""
    return (size / math.sqrt(max(count, 1)) if norm == "rms" else size).clamp(min=FLOOR)


# ---- writing: low-precision parameters and moments ----


@dataclass(slots=True)
class Weights:
    """The parameters of a step (local shards) and how results are written into them."""

    tensors: list[Tensor]
    finite: Tensor
    """bool ``[k]``: parameters with False stay as they are."""
    lost: list[Tensor | None]
    """Kahan compensation, where rounding is ``"kahan"``."""
    seeds: list[Tensor | None]
    """0-d int32, where rounding is ``"stochastic"``."""

    def extras(self, i: int) -> list[Tensor]:
        lost = self.lost[i]
        return [] if lost is None else [lost]

    def write(self, i: int, p: Tensor, exact: Tensor, extras: list[Tensor], start: int) -> None:
        """Round ``exact`` into ``p``, a piece of tensor ``i`` that begins at its entry ``start``."""
        seed = self.seeds[i]
        if p.dtype == exact.dtype:
            p.copy_(exact)
        elif extras:
            write_kahan(p, exact, extras[0], self.finite[i].to(exact.dtype))
        elif seed is not None:
            p.copy_(stochastically_rounded(exact, p.dtype, seed, start))
        else:
            p.copy_(exact)


def opened(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """A stored moment in ``dtype`` for arithmetic: itself where it is stored so, else a decoded copy."""
    return stored.dequantize().to(dtype) if is_coded(stored) else stored.to(dtype)


def close(stored: Tensor, moment: Tensor, accepted: Tensor) -> None:
    """Store the result of arithmetic on what `opened` returned, if ``accepted`` (0-d bool)."""
    if is_coded(stored):
        # Decoding and encoding again may give other codes (a block's largest entry is coded exactly only if it is
        # positive), so a moment that has to stay needs its old ones.
        before = stored.codes.clone(), stored.scale.clone()  # type: ignore[attr-defined]
        stored.copy_(moment)
        if not stored.signed:  # type: ignore[attr-defined]
            # Beside a spike whose square is 4e6 times larger, the code of a second moment would be 0, and its entry's
            # next update m / eps. The smallest code that is not 0 keeps such an update small instead.
            codes = stored.codes  # type: ignore[attr-defined]
            codes.copy_(codes + ((codes == 0) & (moment.view(codes.shape) > 0)).to(codes.dtype))
        for new, old in zip((stored.codes, stored.scale), before, strict=True):  # type: ignore[attr-defined]
            new.copy_(torch.where(accepted, new, old))
    elif stored.dtype != moment.dtype:  # the largest numbers of fp32 would round to Inf in bf16, and stay there
        most = min(torch.finfo(stored.dtype).max, torch.finfo(moment.dtype).max)
        stored.copy_(moment.clamp(-most, most))


# A bf16 parameter of 1.0 has a neighbour at 0.996: updates below half of that gap vanish when rounded to nearest.
# Stochastic rounding takes the upper or lower neighbour with probabilities that make the mean right (as torchao's
# optimizers do); Kahan summation keeps what rounding lost in a second 16-bit tensor and adds it to the next update (as
# optimi does).

_GOLDEN, _MIX1, _MIX2 = -1640531527, -2048144789, -1028477387  # odd 32-bit constants of the usual mixers


def write_kahan(p: Tensor, exact: Tensor, lost: Tensor, accepted: Tensor) -> None:
    """Round ``exact`` (fp32) plus what was ``lost`` into ``p``, and keep what is lost now. With ``accepted`` (0-d, 1 or
    0) 0 nothing changes, provided that ``exact`` is ``p``.
    """
    exact = torch.addcmul(exact, lost.to(exact.dtype), accepted)
    p.copy_(exact)
    lost.copy_((exact - p.to(exact.dtype)).addcmul_(lost.to(exact.dtype), 1 - accepted))


def noise_seeds(t: Tensor, places: list[tuple[int, int]], device: torch.device | None = None) -> list[Tensor]:
    """A 0-d int32 seed for each tensor on ``device`` (default: that of ``t``), from the step ``t`` (0-d) and the place
    of the tensor (numbers of its group and in the group).

    Seeds are the same after a resume and on all replicas, and no random state is touched.
    """
    step = _mixed(t.to(torch.int32) * _GOLDEN)
    tensor = constant([(place * 1_000_003 + index) % 2**31 for place, index in places], torch.int32, device or t.device)
    return list((tensor ^ step).unbind())


def _mixed(x: Tensor) -> Tensor:
    """32 bits, changed in place, of which each depends on all (Murmur's finaliser)."""
    x.bitwise_xor_(x >> 16).mul_(_MIX1)
    x.bitwise_xor_(x >> 13).mul_(_MIX2)
    return x.bitwise_xor_(x >> 16)


def stochastically_rounded(x: Tensor, dtype: torch.dtype, seed: Tensor, start: int = 0) -> Tensor:
    """fp32 ``x`` as ``dtype`` (bf16 or fp16), up or down at random, unbiased. Inf and NaN stay as they are.

    Random bits are added below the last bit that stays, then all below are cut off. They are a hash of ``seed`` and the
    number of the entry (``start`` is that of the first), thrice as fast as a generator on CPUs. Values below fp16's
    smallest normal number (6e-5) have fewer bits there and are rounded to nearest.
    """
    below = 16 if dtype == torch.bfloat16 else 13
    number = torch.arange(start, start + x.numel(), dtype=torch.int32, device=x.device)
    noise = _mixed(number.mul_(_GOLDEN).add_(seed)).bitwise_and_((1 << below) - 1).view(x.shape)
    rounded = noise.add_(x.contiguous().view(torch.int32)).bitwise_and_(-(1 << below)).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x).to(dtype)


# ---- what a step reports ----


def statistics(grads: Gradients, sizes: Tensor, update_norm: Tensor, *, sharded: bool = False) -> dict[str, Tensor]:
    """``optimizer.stats`` of ``k`` parameters of ``sizes`` entries (all ``[k]``); norms are those of whole tensors."""
    first = grads.origin or grads
    assert first.norms is not None
    unknown = torch.full_like(grads.peak, math.nan)
    limited = grads if first.limit is None else first
    assert limited.norms is not None
    return {
        "grad_max": first.peak,
        "grad_norm": first.norms.raw,
        "norm_after": grads.norm,
        "clip_limit": unknown if limited.limit is None else limited.limit,
        "clipped": limited.norms.count / sizes,
        "gain": grads.gain if grads is first else grads.gain * first.gain,
        # Of a sharded tensor's update only a shard is here, and its norm is not worth an all-reduce of its own.
        "update_rms": unknown if sharded else update_norm / sizes.sqrt(),
        "skipped": (~grads.finite).to(grads.dtype),
    }


def scale_statistics(
    grads: Gradients, sizes: Tensor, directions: Tensor, lr: Tensor | float, *, sharded: bool = False
) -> dict[str, Tensor]:
    """The same for SCALE's matrices, from the norms of their normalised gradients ``[k]``."""
    found = statistics(grads, sizes, directions * lr * grads.finite, sharded=sharded)
    after = torch.full_like(directions, torch.nan) if sharded else directions
    gain = after / found["grad_norm"].clamp(min=torch.finfo(grads.dtype).tiny)
    return found | {"norm_after": after, "gain": gain}
