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
* `reset_due`, `rewarm_factor`, `cosine_factor`, `bias_correction`: functions of the step count.

Three rules make the functions exact everywhere. Gradients are read and never written. No value is read back from a
device, so no code branches on a tensor: a gradient that is not finite leaves its tensor unchanged by arithmetic (decay
1, step 0). A statistic of a whole tensor that may be sharded comes from a generator that yields `Reduction` requests;
see `evenstep.optim.distributed`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from evenstep.kernels.cuda import TritonKernels
from evenstep.kernels.interface import Kernels, Measured, is_coded, table
from evenstep.optim.distributed import Reduction, Steps, run_batched_collectives
from evenstep.optim.rounding import stochastically_rounded, write_kahan

T = TypeVar("T", Tensor, float)
R = TypeVar("R")


def completed(step: Steps[R]) -> R:
    """Run the generator of a step to its end and return its result, for parameters that are not sharded: the answer to
    each `Reduction` is its own values.
    """
    return run_batched_collectives([step], lambda requests: None)[0]


# ---- time: resets, schedules, bias correction ----
#
# ``t`` is the 1-based number of the current ``step()`` call: a 0-d tensor, which may live on a device and is never
# branched on, or a number where a fused step is prepared on the host.


def reset_due(t: T, every: int) -> T:
    """1 on the steps whose number is a multiple of ``every``, else 0; never for ``every == 0``.

    Stable-SPAM's MoRet and SPAM's momentum reset: the moments start from zero on such a step.
    """
    # "+ 0 * t" turns the boolean into the type, dtype and device of t.
    return 0 * t if every == 0 else (t % every == 0) + 0 * t


def bias_correction(beta: float | Tensor, count: Tensor) -> Tensor:
    """``1 - beta**count`` without the cancellation that fp32 suffers for a beta near one (0.99999 at count 1 would be
    off by 0.6 %).
    """
    # 1 - beta^n = -expm1(n log beta). beta = 0 has the logarithm -Inf, which gives 1, as it should for n >= 1.
    log_beta = torch.log(beta) if isinstance(beta, Tensor) else (math.log(beta) if beta > 0 else -math.inf)
    return -torch.expm1(count * log_beta)


def cosine_factor(t: T, total_steps: int, eta_min: float, *, hold: bool) -> T:
    """Stable-SPAM's optional factor on beta1 and gamma1: from 1 down to ``eta_min`` over ``total_steps``, then held
    (or, with ``hold=False``, rising again).
    """
    # s(t) = eta_min + (1 - eta_min) (1 + cos(pi t / (T + 1))) / 2. The published code does not hold it at T + 1.
    if hold:
        t = t.clamp(max=total_steps + 1) if isinstance(t, Tensor) else min(t, total_steps + 1)
    return eta_min + (1 - eta_min) * (1 + _cos(math.pi * t / (total_steps + 1))) / 2


def rewarm_factor(t: T, every: int, warmup_steps: int) -> T:
    """SPAM's factor on the update after a reset: from 0.01 on the reset step to 1 after ``warmup_steps``; 1 before the
    first reset.
    """
    if every == 0:
        return 0 * t + 1
    since = t % every  # k, steps since the reset: 0 on the reset step itself
    # w(k) = 1 - 0.99 (1 + cos(pi k / (N + 1))) / 2 for k < N, else 1. There is no warm-up before the first reset.
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

# Entries per piece: 256 KiB in fp32, so that the buffers of an Adam update share a 2 MiB cache (best of 2^13 to 2^17 as
# measured).
BLOCK = 1 << 16


def splittable(*tensors: Tensor) -> bool:
    """Whether splitting these tensors into pieces is possible and faster."""
    first = tensors[0]
    return (
        first.device.type == "cpu"  # a GPU wants few large launches instead
        and first.numel() > BLOCK
        and not torch.compiler.is_compiling()  # a compiler fuses the chain itself
        # Pieces are views, which tensors of 8-bit codes and transposed memory do not have.
        and all(type(t) in (Tensor, Parameter) and t.is_contiguous() for t in tensors)
    )


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield matching flat pieces (views) of tensors of one size; the tensors themselves where splitting is slower or
    not possible.
    """
    if splittable(*tensors):
        yield from zip(*(torch.split(t.view(-1), BLOCK) for t in tensors), strict=True)
    else:
        yield tensors


def row_blocks(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching groups of rows of tensors of one shape, small enough to stay in cache where splitting is possible."""
    if splittable(*matrices):
        rows = max(BLOCK // max(matrices[0][0].numel(), 1), 1)
        yield from zip(*(torch.split(x, rows) for x in matrices), strict=True)
    else:
        yield matrices


# ---- gradients: their statistics, and how a transformed gradient is read ----


@dataclass(frozen=True, slots=True)
class Norms:
    """2-norms ``[k]`` of whole tensors and how many of their entries were clipped."""

    raw: Tensor  # before any transform
    clipped: Tensor  # after clipping, before any gain
    count: Tensor  # number of clipped entries


@dataclass(frozen=True, slots=True)
class Gradients:
    """``k`` gradient tensors (or their local shards) on one device, with the statistics that a step has of each.

    A transform such as AdaClip needs a few numbers per tensor (its largest entry, its norm) and results in a few more
    (a limit, a gain). They are kept beside the raw tensors and applied when a piece is read, so that no transformed
    copy of a whole gradient exists and ``p.grad`` stays as it is. Entry ``g`` is read as
    ``sign * gain * (g if |g| <= limit else g * rescale)``.

    Statistics are vectors ``[k]`` in ``dtype`` and describe whole tensors, also where the tensors are shards. An
    instance is never changed: each transform returns a new one that shares the tensors.

    >>> grads = completed(Gradients.measure([torch.tensor([3.0, 4.0])], torch.float32))
    >>> grads.peak
    tensor([4.])
    >>> completed(grads.clipped(torch.tensor([2.0])).with_norms()).read(0)
    tensor([1.5000, 2.0000])
    """

    tensors: list[Tensor]
    dtype: torch.dtype
    peak: Tensor  # [k] largest absolute entry; 0 for an empty tensor, Inf when any entry is not finite
    local_norm: Tensor  # [k] 2-norm of the local shard, before any transform
    finite: Tensor  # [k] bool: every entry is finite; the other tensors are read as zeros
    gain: Tensor  # [k] every entry is multiplied by it, after clipping; 0 where not finite
    limit: Tensor | None = None  # [k] raw entries above it (absolute value) are multiplied by `rescale`
    rescale: Tensor | None = None  # [k] limit / peak where that is below 1, so that the largest lands on the limit
    sign: float = 1.0  # -1 to ascend
    norms: Norms | None = None  # the result of `with_norms`; None before
    origin: Gradients | None = None  # the gradients before `replaced` put other tensors in their place
    # The kernels that read the tensors, for `stabilize` and fused steps; None for the plain code.
    kernels: Kernels | None = None
    measured: Measured | None = None  # statistics of blocks that the kernels measured, for their second pass

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
            peaks, norms = [], []  # k entries, 0-d each
            for g in tensors:
                # On a CPU a bf16 gradient is converted piece by piece, without a full copy in fp32.
                blockwise = [peak_and_norm(piece.to(dtype)) for (piece,) in blocks(g)]
                peaks.append(torch.stack([peak for peak, _ in blockwise]).amax())
                norms.append(peak_and_norm(torch.stack([norm for _, norm in blockwise]))[1])
            # An all-reduce by maximum may lose a NaN, but not an infinity.
            bound = torch.nan_to_num(torch.stack(peaks), nan=torch.inf, posinf=torch.inf)
            norm = torch.stack(norms)
        [peak] = yield (Reduction("max", bound),)  # [k], of whole tensors
        # bool [k], equal on all ranks: one bad shard skips the whole tensor. One operator, since `peak` is never NaN.
        finite = peak < math.inf
        gain = finite.to(dtype)
        return cls(tensors, dtype, peak, norm, finite, gain, sign=sign, kernels=kernels, measured=measured)

    def numbers(self) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Gain, limit and reduced gain ``[k]``: an entry is multiplied by the reduced gain where it is above the limit,
        else by the gain."""
        gain = self.gain if self.sign == 1 else self.gain * self.sign  # [k]
        if self.limit is None or self.rescale is None:
            return gain, torch.inf, gain
        return gain, self.limit, self.rescale * gain

    def of(self, tensors: list[Tensor]) -> Gradients:
        """The same statistics for other tensors, such as the entries that a mask selects from each."""
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
        # Stored for raw entries: gain |g| <= limit is |g| <= limit / gain. A gain of 0 leaves nothing to clip.
        limit = torch.where(self.gain > 0, limit / self.gain, torch.inf)
        return self.with_limit(limit, torch.where(limit < self.peak, limit / self.peak, torch.ones_like(self.peak)))

    def with_limit(self, limit: Tensor, rescale: Tensor) -> Gradients:
        """Multiply raw entries above ``limit`` by ``rescale``, both ``[k]``. ValueError as in `clipped`."""
        if self.limit is not None:
            raise ValueError("these gradients are clipped already; a step clips once")
        return replace(self, limit=limit, rescale=rescale, norms=None)

    def amplified(self, gain: Tensor) -> Gradients:
        """Multiply every entry by ``gain`` ``[k]``, after clipping."""
        return replace(self, gain=torch.where(self.finite, self.gain * gain, 0.0))

    def kept_if(self, keep: Tensor) -> Gradients:
        """Treat tensors where ``keep`` (bool ``[k]`` or 0-d) is False as not finite: they are read as zeros, and the
        step leaves their parameters and state as they were.
        """
        finite = self.finite & keep
        return replace(self, finite=finite, gain=torch.where(finite, self.gain, 0.0))

    def replaced(self, tensors: list[Tensor]) -> Steps[Gradients]:
        """Use other values in place of these, for a transform that limits and gains cannot express. The cost is one
        pass over the values and, where sharded, one more all-reduce.
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
        # Where a tensor is not finite the gain is 0, and 0 * Inf is NaN, which nan_to_num replaces by 0: zeros leave
        # the moments as they were, a NaN would stay in them.
        if self.limit is None or self.rescale is None:
            return lambda piece: torch.nan_to_num_(piece.to(dtype) * gain, nan=0.0)
        limit, reduced = self.limit[i], self.rescale[i] * gain
        return lambda piece: torch.nan_to_num_(_scale(piece.to(dtype), limit, gain, reduced)[0], nan=0.0)

    def factors(self) -> Tensor:
        """Gain, limit and reduced gain as a table ``[3, k]``, for `write`."""
        return table(self.peak, *self.numbers())

    def write(self, indices: Sequence[int], outs: list[Tensor], factors: Tensor | None = None) -> None:
        """Write the transformed tensors of these indices into ``outs``, in their dtype. ``factors``: the result of
        `factors`, for callers that write several times."""
        sources = [self.tensors[i] for i in indices]
        if self.kernels is not None and all(out.is_contiguous() for out in outs):
            self.kernels.transform(outs, sources, self.factors() if factors is None else factors, indices)
            return
        for i, source, out in zip(indices, sources, outs, strict=True):
            read = self.reader(i)
            for piece, target in blocks(source, out):
                target.copy_(read(piece))

    def with_norms(self) -> Steps[Gradients]:
        """Compute the norms of whole tensors, unless they are known. This takes one pass over the gradients if they are
        clipped, and none if not: `measure` has taken the norms of the shards.
        """
        if self.norms is not None:
            return self
        if isinstance(self.kernels, TritonKernels):
            yield ()  # no request; but steps that share a later one go through equally many rounds
            return self._with_local_norms()
        if self.origin is None or self.origin.norms is not None:
            [sums] = yield (self.squares(),)
            return self.with_sums(sums)
        # The norms before `replaced` are requested in the same message, for the statistics of the step.
        sums, before = yield self.squares(), self.origin.squares()
        return replace(self.with_sums(sums), origin=self.origin.with_sums(before))

    def _with_local_norms(self) -> Gradients:
        """`with_norms` where no tensor is sharded: the local norms are those of whole tensors."""
        if self.norms is not None:
            return self
        origin = None if self.origin is None else self.origin._with_local_norms()
        return replace(self, norms=Norms(self.local_norm, *self._clipped_locally()), origin=origin)

    def within_range(self) -> Gradients:
        """Treat tensors whose norm is beyond the range of ``dtype``, though no entry is, as not finite: for steps that
        compute with norms. Needs `with_norms` first.
        """
        assert self.norms is not None
        return self.kept_if(self.norms.raw <= torch.finfo(self.dtype).max)

    def squares_within(self, most: float) -> Gradients:
        """Treat tensors with an entry whose square is above ``most`` as not finite: for steps that keep a running mean
        of squares, which such an entry would make infinite for good.
        """
        return self.kept_if((self._largest_left * self.gain).square() <= most)

    def squares(self) -> Reduction:
        """The request whose answer `with_sums` takes, ``[3 k]``: squared norms before clipping and after it, and the
        number of clipped entries, of each shard.
        """
        local, count = self._clipped_locally()
        # Squares are in units of the largest entry of the whole tensor, so that they neither overflow nor vanish in the
        # sum over shards: ||g||^2 = peak^2 * sum over shards of (||g_shard|| / peak)^2.
        tiny = torch.finfo(self.dtype).tiny
        raw, clipped = self.local_norm / self.peak.clamp(min=tiny), local / self._largest_left.clamp(min=tiny)
        return Reduction("sum", torch.cat([raw.square(), clipped.square(), count]))

    def with_sums(self, sums: Tensor) -> Gradients:
        """Set the norms from the answer to `squares`."""
        raw, clipped, count = sums.view(3, -1).unbind()  # [k] each
        return replace(self, norms=Norms(raw.sqrt() * self.peak, clipped.sqrt() * self._largest_left, count))

    @property
    def _largest_left(self) -> Tensor:
        """Largest entry after clipping."""
        return self.peak if self.limit is None else torch.minimum(self.peak, self.limit)

    def _clipped_locally(self) -> tuple[Tensor, Tensor]:
        """2-norm after clipping and number of clipped entries of each local shard, ``[k]``."""
        if self.limit is None or self.rescale is None:
            return self.local_norm, torch.zeros_like(self.local_norm)
        if self.kernels is not None and self.measured is not None:
            return self.kernels.clip_norms(self.tensors, self.measured, self.limit, self.rescale)
        # Entries are read in units of the largest one after clipping, so that their squares stay in range.
        unit = self._largest_left  # [k]
        inverse = 1 / unit.clamp(min=torch.finfo(self.dtype).tiny)  # [k]
        norms, counts = [], []  # k entries, 0-d each
        for tensor, limit, gain, reduced in zip(
            self.tensors, self.limit.unbind(), inverse.unbind(), (self.rescale * inverse).unbind(), strict=True
        ):
            blockwise = []
            for (piece,) in blocks(tensor):
                values, over = _scale(piece.to(self.dtype), limit, gain, reduced)
                blockwise.append((torch.linalg.vector_norm(values), over.sum()))
            norms.append(torch.linalg.vector_norm(torch.stack([norm for norm, _ in blockwise])))
            counts.append(torch.stack([count for _, count in blockwise]).sum())
        return torch.stack(norms) * unit, torch.stack(counts)


def _scale(g: Tensor, limit: Tensor, gain: Tensor, reduced: Tensor) -> tuple[Tensor, Tensor]:
    """``g`` times ``reduced`` where its absolute value is above ``limit``, else times ``gain``; and the mask of the
    former, 1 or 0 in the dtype of ``g``."""
    # The mask is in floats because torch's boolean masks and ``where`` are not vectorised on CPU.
    over = g.abs().gt_(limit)
    # ((1 - over) gain + over reduced) g
    return torch.rsub(over, 1.0).mul_(gain).addcmul_(over, reduced).mul_(g), over


def peak_and_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest absolute entry and 2-norm of ``x``, 0-d each. The squares are taken in units of the largest entry, so
    that 1e20 does not overflow and 1e-30 does not vanish in fp32.
    """
    if x.numel() == 0:
        return x.new_zeros(()), x.new_zeros(())
    low, high = torch.aminmax(x)  # one pass and no temporary, unlike x.abs().max(); NaN propagates
    peak = torch.maximum(-low, high)
    # Clamped so that a tensor of zeros, or with an Inf, is not divided by 0 or Inf.
    unit = peak.clamp(min=torch.finfo(x.dtype).tiny, max=torch.finfo(x.dtype).max)
    return peak, torch.linalg.vector_norm(x / unit) * unit


# ---- Stable-SPAM: AdaClip and AdaGN ----


ROBUST_RATIO, ROBUST_RISE, ROBUST_START = 2.0, 0.1, 10  # as in kernels/cpu_adam.h


def robust_input(x: Tensor, ema: Tensor, n: Tensor, gamma: float | Tensor) -> Tensor:
    """The value that enters a running mean in place of ``x`` with ``robust=True``, all ``[k]``. The bound is twice the
    bias-corrected mean of the earlier values, or the value that raises this mean by 10 %, whichever is larger. It
    applies once there are `ROBUST_START` earlier values.

    A spike then moves the mean little, however large it is. A lasting rise is still followed, by a factor of 1.1 or
    more per update. The rule is evenstep's own and not in the paper.
    """
    # The corrected mean moves by w (x - mean), with w the share of the newest value: (1 - gamma) / (1 - gamma^n).
    before = ema / bias_correction(gamma, (n - 1).clamp(min=1))
    ratio = (1 + ROBUST_RISE * bias_correction(gamma, n) / (1 - gamma)).clamp(min=ROBUST_RATIO)
    # A mean of 0 has no scale: the first gradient of a tensor that had none so far enters as it is.
    known = (n > ROBUST_START) & (before > 0)
    return torch.where(known, torch.minimum(x, ratio * before), x)


def adaclip(
    grads: Gradients, peak_ema: Tensor, n: Tensor, gamma3: float, robust: bool = False
) -> tuple[Gradients, Tensor]:
    """AdaClip: scale each tensor's entries down to a running mean of its largest entry.

    ``peak_ema`` is T_{t-1} and ``n`` the number of updates, this one included; both ``[k]``. Returns the clipped
    gradients and T_t. ``robust``: see `robust_input`.
    """
    # T_t = gamma3 T_{t-1} + (1 - gamma3) max|g_t|, so that this gradient raises its own limit a little.
    # Limit: That_t = T_t / (1 - gamma3^n). Entries above it become g_i / max|g_t| * That_t. n counts the updates of
    # this tensor and goes on after a moment reset, which does not touch T.
    if isinstance(grads.kernels, TritonKernels):
        limit, rescale, peak_ema = grads.kernels.adaclip(grads.peak, grads.gain, peak_ema, n, gamma3, robust)
        return grads.with_limit(limit, rescale), peak_ema
    largest = robust_input(grads.largest, peak_ema, n, gamma3) if robust else grads.largest
    peak_ema = gamma3 * peak_ema + (1 - gamma3) * largest
    return grads.clipped(peak_ema / bias_correction(gamma3, n)), peak_ema


def adagn(
    grads: Gradients,
    norm_ema: Tensor,
    norm_rms: Tensor,
    n: Tensor,
    gamma1: float | Tensor,
    gamma2: float,
    eps: float,
    robust: bool = False,
) -> tuple[Gradients, Tensor, Tensor]:
    """AdaGN: give each tensor the norm ``m_hat / (sqrt(v_hat) + eps)`` of its norm's history.

    ``norm_ema`` is the running mean m of the norm, ``norm_rms`` = sqrt(v) the root of the running mean of the squared
    norm, ``n`` the number of updates, this one included; all ``[k]``. Needs `Gradients.with_norms` first. Returns the
    gradients, m and ``norm_rms``. The gain is 0 for a gradient that is zero, or whose norm is below the smallest normal
    number, which no gain could bring back; a tensor whose norm is out of range counts as not finite. ``robust``: see
    `robust_input`.
    """
    # Paper: mu_t = gamma1 mu_{t-1} + (1 - gamma1) ||g_t||,   nu_t = gamma2 nu_{t-1} + (1 - gamma2) ||g_t||^2,
    #        g_t <- g_t / ||g_t|| * mu_hat / (sqrt(nu_hat) + eps),   both corrected by 1 - gamma^n.
    # sqrt(nu) is kept, because nu itself overflows where the norm does not, and hypot takes the root of the sum of
    # squares without forming them.
    if isinstance(grads.kernels, TritonKernels) and grads.norms is not None:
        before = grads.norms.raw, grads.norms.clipped, grads.gain, grads.finite
        found, finite = grads.kernels.adagn(*before, norm_ema, norm_rms, n, [gamma1, gamma2, eps, robust])
        gain, norm_ema, norm_rms = found.unbind()
        return replace(grads, gain=gain, finite=finite), norm_ema, norm_rms
    grads = grads.within_range()
    norm = grads.norm  # [k]
    entering = robust_input(norm, norm_ema, n, gamma1) if robust else norm  # [k]
    norm_ema = gamma1 * norm_ema + (1 - gamma1) * entering  # [k]
    norm_rms = torch.hypot(math.sqrt(gamma2) * norm_rms, math.sqrt(1 - gamma2) * entering)
    span = torch.finfo(norm.dtype)
    # Hazard: rounding may take the largest norms out of range, and Inf / Inf would be NaN.
    mean = (norm_ema / bias_correction(gamma1, n)).clamp(max=span.max)
    root = (norm_rms / bias_correction(gamma2, n).sqrt() + eps).clamp(max=span.max)
    gain = (mean / root / norm).clamp(max=span.max)
    return grads.amplified(torch.where(norm >= span.tiny, gain, 0.0)), norm_ema, norm_rms


# ---- SPAM: clipping by the history of each entry ----


class EntryClip:
    """Spike-aware clipping of one step: entries with ``g**2 > threshold * v`` become ``sign(g) * sqrt(threshold * v)``,
    and are counted.

    ``active`` and ``forget`` are 0-d tensors, 1 or 0: whether to clip on this step, and whether it clears the history.
    An entry with ``v == 0`` has no history and stays as it is, unless ``zero_history`` (the published code's rule)
    makes it zero.
    """

    def __init__(self, threshold: float, active: Tensor, *, forget: Tensor, zero_history: bool):
        # Paper: g^2 > theta v. The cap on |g| is sqrt(theta v) + spread; on a reset step v counts as 0.
        self.factor = threshold * (1 - forget)
        self.spread = torch.where(active > 0, 0.0, torch.inf)
        self.zero_history = zero_history
        # Number of a tensor -> for each of its pieces the 2-norm after clipping and the number of clipped entries.
        self.pieces: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def __call__(self, i: int, g: Tensor, v: Tensor) -> Tensor:
        """Clip a piece ``g`` of tensor ``i``, with ``v`` its second moment before this step."""
        cap = torch.mul(v, self.factor).sqrt_().add_(self.spread)  # spread is Inf on a step without clipping
        if not self.zero_history:  # no cap where v is 0: the published code freezes such entries, since v stays 0
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

    keep1: Tensor  # [k] factor of the first moment: beta1, 0 on a reset, 1 when skipped
    keep2: Tensor  # [k] factor of the second moment, likewise
    add1: Tensor  # 0-d: 1 - beta1; a tensor because the cosine schedule makes beta1 one
    add2: float  # 1 - beta2
    step_size: Tensor  # [k] lr (times any warm-up) over the first bias correction; 0 when skipped
    root_bias2: Tensor  # [k] square root of the second bias correction, sqrt(1 - beta2^age)
    shrink: Tensor | None  # [k] weight decay: factor of the parameter before the update, 1 - lr wd; None for 1
    eps: float
    after: Tensor | None = None  # [k] factor of both moments after the update (published resets); None for 1
    shrink_after: Tensor | None = None  # [k] factor of the parameter after the update; None for 1

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
        keep = one * (1 - forget)  # [k]: 0 on a reset, so that the old moments do not enter
        # lr m_hat / (sqrt(v_hat) + eps) with m_hat = m / (1 - beta1^age), v_hat = v / (1 - beta2^age): the first
        # correction goes into the step size, the root of the second divides sqrt(v).
        step_size = lr * warmup / bias_correction(beta1, age)
        root_bias2 = bias_correction(beta2, age).sqrt()
        if eps_before_correction:  # lr sqrt(1 - beta2^age) / (1 - beta1^age) * m / (sqrt(v) + eps)
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
    norms = []  # k entries, 0-d each
    for i, tensors in enumerate(zip(weights.tensors, grads.tensors, exp_avg, exp_avg_sq, strict=True)):
        read, norms_of_pieces, start = grads.reader(i), [], 0
        keep1, keep2, step_size, root_bias2 = plan.keep1[i], plan.keep2[i], plan.step_size[i], plan.root_bias2[i]
        # All buffers of a piece stay in cache from the read of the gradient to the write of the parameter.
        for p, piece, stored_m, stored_v, *extras in blocks(*tensors, *weights.extras(i)):
            # m and v are the stored tensors themselves, updated in place, unless those are of another dtype.
            g, m, v = read(piece), opened(stored_m, grads.dtype), opened(stored_v, grads.dtype)
            if clip is not None:
                g = clip(i, g, v)  # judged by v before this gradient enters it
            m.mul_(keep1).addcmul_(g, plan.add1)  # m <- beta1 m + (1 - beta1) g
            v.mul_(keep2).addcmul_(g, g, value=plan.add2).clamp_(max=largest)  # v <- beta2 v + (1 - beta2) g^2
            # step_size * m / (sqrt(v) / sqrt(1 - beta2^age) + eps)
            update = torch.div(m, v.sqrt().div_(root_bias2).add_(plan.eps)).mul_(step_size)
            if plan.after is not None:  # a reset in the order of the published code
                m.mul_(plan.after[i])
                v.mul_(plan.after[i])
            close(stored_m, m, weights.finite[i])
            close(stored_v, v, weights.finite[i])
            norms_of_pieces.append(torch.linalg.vector_norm(update))
            # The parameter is updated in the dtype of the statistics and rounded once, by `Weights.write`.
            exact = p if p.dtype == grads.dtype else p.to(grads.dtype)
            if plan.shrink is not None:  # p <- p (1 - lr wd), decoupled from the moments
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

FLOOR = 1e-8  # smallest norm that is divided by (official code)


def row_norms(g: Tensor, count: int, norm: str) -> Tensor:
    """The norm of each row of ``g`` ``[m, ...]``, over all dimensions but the first: ``[m, 1, ...]``.

    ``"rms"`` is the root mean square over ``count`` entries (the official code; published learning rates belong to it),
    ``"l2"`` the paper's text.
    """
    low, high = torch.aminmax(g) if g.numel() else (g.new_zeros(()), g.new_zeros(()))
    # Squares are taken in units of the largest entry, so that they neither overflow nor vanish.
    unit = torch.maximum(-low, high).clamp(min=torch.finfo(g.dtype).tiny)
    size = torch.linalg.vector_norm(g / unit, dim=tuple(range(1, g.dim())), keepdim=True) * unit
    return floored(size, count, norm)


def squared_norms(pieces: Iterable[Tensor], read: Callable[[Tensor], Tensor], over: int) -> Tensor:
    """Squared norms in fp64 of the rows of a matrix that comes in pieces of rows (``over=1``: ``[m, 1, ...]``), or of
    its columns (``over=0``: ``[1, n, ...]``). ``read`` makes the entries of a piece."""
    # fp64 holds the squares of all fp32 numbers, and sums that are all-reduced need no common unit.
    squared = [read(piece).double().square_() for piece in pieces]
    if over == 0:  # a column runs through all pieces
        return torch.stack([squares.sum(0, keepdim=True) for squares in squared]).sum(0)
    return torch.cat([squares.sum(tuple(range(1, squares.dim())), keepdim=True) for squares in squared])


def floored(size: Tensor, count: int, norm: str) -> Tensor:
    """The 2-norm ``size`` over ``count`` entries, converted to the norm of that name and at least `FLOOR`."""
    # RMS = ||x|| / sqrt(count)
    return (size / math.sqrt(max(count, 1)) if norm == "rms" else size).clamp(min=FLOOR)


# ---- writing: low-precision parameters and moments ----


@dataclass(slots=True)
class Weights:
    """The ``k`` parameters of a step (local shards) and how results are rounded into them."""

    tensors: list[Tensor]
    finite: Tensor  # [k] bool: parameters with False stay as they are
    lost: list[Tensor | None]  # Kahan compensation, where rounding is "kahan"
    seeds: list[Tensor | None]  # 0-d int32, where rounding is "stochastic"

    def extras(self, i: int) -> list[Tensor]:
        """The Kahan compensation of tensor ``i``, or an empty list."""
        lost = self.lost[i]
        return [] if lost is None else [lost]

    def write(self, i: int, p: Tensor, exact: Tensor, extras: list[Tensor], start: int) -> None:
        """Round ``exact`` into ``p``, a piece of tensor ``i`` that begins at its entry ``start``."""
        seed = self.seeds[i]
        # A tensor that is skipped has `exact` equal to `p`, which rounds to itself; only the
        # compensation of Kahan summation depends on `finite`.
        if p.dtype == exact.dtype:
            p.copy_(exact)
        elif extras:
            write_kahan(p, exact, extras[0], self.finite[i].to(exact.dtype))
        elif seed is not None:
            p.copy_(stochastically_rounded(exact, p.dtype, seed, start))
        else:
            p.copy_(exact)


def opened(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """A stored moment in ``dtype`` for arithmetic: the stored tensor itself if it has that dtype, else a decoded copy.

    Arithmetic in place therefore changes an fp32 moment at once, and any other only through `close`.
    """
    return stored.dequantize().to(dtype) if is_coded(stored) else stored.to(dtype)


def close(stored: Tensor, moment: Tensor, accepted: Tensor) -> None:
    """Store ``moment``, the tensor that `opened` returned and arithmetic has changed, if ``accepted`` (0-d bool)."""
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


# ---- what a step reports ----


def statistics(
    grads: Gradients, sizes: Tensor, update_norm: Tensor | None, *, sharded: bool = False
) -> dict[str, Tensor]:
    """``optimizer.stats`` of ``k`` parameters of ``sizes`` entries (all ``[k]``); norms are those of whole tensors.
    ``update_norm``: None where another optimizer computes the update."""
    first = grads.origin or grads  # before any transform that put new tensors in place of the gradients
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
        "update_rms": unknown if sharded or update_norm is None else update_norm / sizes.sqrt(),
        # One operator instead of two.
        "skipped": torch.logical_not(grads.finite, out=torch.empty_like(grads.peak)),
    }


def scale_statistics(
    grads: Gradients, sizes: Tensor, directions: Tensor, lr: Tensor | float, *, sharded: bool = False
) -> dict[str, Tensor]:
    """The same for SCALE's matrices, from the norms of their normalised gradients ``[k]``."""
    stats = statistics(grads, sizes, directions * lr * grads.finite, sharded=sharded)
    # The direction replaces the gradient, so the norm after is its norm, and the gain the ratio of the two.
    after = torch.full_like(directions, torch.nan) if sharded else directions
    gain = after / stats["grad_norm"].clamp(min=torch.finfo(grads.dtype).tiny)
    return stats | {"norm_after": after, "gain": gain}
