"""The gradients of one step, read but never written.

A transform such as AdaClip or AdaGN needs a few numbers per tensor (its largest entry, its norm) and results in a few
more (a limit, a gain). `Gradients` carries those numbers beside the raw tensors and applies them when a piece is read,
so that no transformed copy of a whole gradient ever exists and ``p.grad`` stays as the user left it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from evenstep.kernels import Kernels, Measured
from evenstep.transforms.blocks import blocks
from evenstep.transforms.lockstep import Combine, Steps


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
    """``k`` gradient tensors (or the parts of them that are here) on one device.

    Per-tensor numbers are vectors of shape ``[k]`` in ``dtype``, the dtype of the statistics, and speak of whole
    tensors.
    """

    tensors: list[Tensor]
    dtype: torch.dtype
    peak: Tensor
    """Largest absolute entry; 0 for an empty tensor, Inf when any entry is not finite."""
    here: Tensor
    """2-norm of the part that is here, before any transform."""
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
    origin: "Gradients | None" = None
    """The gradients as they came, where `replaced` put other tensors in their place."""
    kernels: Kernels | None = None
    """What reads the tensors; None for the plain code."""
    measured: Measured | None = None
    """What the kernels found of the parts that are here."""

    @classmethod
    def measure(
        cls,
        tensors: list[Tensor],
        dtype: torch.dtype,
        sign: float = 1.0,
        kernels: Kernels | None = None,
        measured: Measured | None = None,
    ) -> "Steps[Gradients]":
        """Take the largest absolute entry and the norm of each tensor, in one pass (none if ``kernels`` have
        ``measured`` them).
        """
        if kernels is not None:
            measured = measured or kernels.measure(tensors)
            bound, here = measured.peak, measured.norm
        else:
            peaks, norms = [], []
            for g in tensors:
                parts = [peak_and_norm(piece.to(dtype)) for (piece,) in blocks(g)]
                peaks.append(torch.stack([peak for peak, _ in parts]).amax())
                norms.append(peak_and_norm(torch.stack([norm for _, norm in parts]))[1])
            # A maximum over machines may lose a NaN, but not an infinity.
            bound = torch.nan_to_num(torch.stack(peaks), nan=torch.inf, posinf=torch.inf)
            here = torch.stack(norms)
        [peak] = yield (Combine("max", bound),)
        finite = torch.isfinite(peak)
        gain = finite.to(dtype)
        return cls(tensors, dtype, peak, here, finite, gain, sign=sign, kernels=kernels, measured=measured)

    def numbers(self) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Gain, limit and reduced gain as kernels read them."""
        gain = self.gain * self.sign
        return (gain, torch.inf, gain) if self.limit is None else (gain, self.limit, self._rescale * gain)

    def of(self, tensors: list[Tensor]) -> "Gradients":
        """The same numbers for other tensors, such as a part of each."""
        return replace(self, tensors=tensors)

    @property
    def largest(self) -> Tensor:
        """Largest absolute entry of each tensor as it stands, before any clipping."""
        return self.peak * self.gain

    @property
    def norm(self) -> Tensor:
        """2-norm of each tensor as it stands; `with_norms` must have been asked before."""
        assert self.norms is not None
        return self.norms.clipped * self.gain

    def clipped(self, limit: Tensor) -> "Gradients":
        """Entries above ``limit`` as they stand now are scaled so that the largest lands on it (a rescale, not a
        clamp).

        Raises ValueError when the gradients are clipped already.
        """
        if self.limit is not None:
            raise ValueError("these gradients are clipped already; a step clips once")
        return replace(self, limit=torch.where(self.gain > 0, limit / self.gain, torch.inf), norms=None)

    def amplified(self, gain: Tensor) -> "Gradients":
        """Every entry is multiplied by ``gain``, after clipping."""
        return replace(self, gain=torch.where(self.finite, self.gain * gain, 0.0))

    def kept_if(self, keep: Tensor) -> "Gradients":
        """Those where ``keep`` (bool ``[k]``, or 0-d for all), else zeros that count as not finite."""
        finite = self.finite & keep
        return replace(self, finite=finite, gain=torch.where(finite, self.gain, 0.0))

    def replaced(self, tensors: list[Tensor]) -> "Steps[Gradients]":
        """The same gradients with other values, for a transform that limits and gains cannot express; takes one pass,
        and where sharded a message more.
        """
        new = yield from Gradients.measure(tensors, self.dtype, kernels=self.kernels)
        finite = self.finite & new.finite
        return replace(new, finite=finite, gain=finite.to(self.dtype), origin=self.origin or self)

    def read(self, i: int) -> Tensor:
        """All of tensor ``i`` as it stands: a new tensor in ``dtype``."""
        return self.reader(i)(self.tensors[i])

    def reader(self, i: int) -> Callable[[Tensor], Tensor]:
        """A function from a piece of tensor ``i`` to its transformed entries, in ``dtype``; never the piece's own
        memory.
        """
        gain, dtype = self.gain[i] * self.sign, self.dtype
        # In a tensor that is not finite the gain is 0, which leaves zeros and NaNs: nan_to_num makes them zeros.
        if self.limit is None:
            return lambda piece: torch.nan_to_num_(piece.to(dtype) * gain, nan=0.0)
        limit = self.limit[i]
        reduced = self._rescale[i] * gain
        return lambda piece: torch.nan_to_num_(_scale(piece.to(dtype), limit, gain, reduced)[0], nan=0.0)

    def with_norms(self) -> "Steps[Gradients]":
        """Take the norms of whole tensors, once for all who ask; one pass if clipped, none if not."""
        if self.norms is not None:
            return self
        if self.origin is None or self.origin.norms is not None:
            [sums] = yield (self.squares(),)
            return self.with_sums(sums)
        sums, before = yield self.squares(), self.origin.squares()
        return replace(self.with_sums(sums), origin=self.origin.with_sums(before))

    def within_range(self) -> "Gradients":
        """Those whose norm is beyond the range of ``dtype``, though no entry is, count as not finite too; for whoever
        computes with norms. `with_norms` must have been asked before.
        """
        assert self.norms is not None
        return self.kept_if(self.norms.raw <= torch.finfo(self.dtype).max)

    def squares_within(self, most: float) -> "Gradients":
        """Those with an entry whose square is above ``most`` count as not finite too; for whoever keeps a mean of
        squares.
        """
        return self.kept_if((self._left * self.gain).square() <= most)

    def squares(self) -> Combine:
        """What `with_sums` wants summed over the parts: squares in units of the largest entry that is left, so that
        they neither overflow nor vanish.
        """
        here, count = self._clipped_here()
        tiny = torch.finfo(self.dtype).tiny
        raw, clipped = self.here / self.peak.clamp(min=tiny), here / self._left.clamp(min=tiny)
        return Combine("sum", torch.cat([raw.square(), clipped.square(), count]))

    def with_sums(self, sums: Tensor) -> "Gradients":
        raw, clipped, count = sums.view(3, -1).unbind()
        return replace(self, norms=Norms(raw.sqrt() * self.peak, clipped.sqrt() * self._left, count))

    @property
    def _left(self) -> Tensor:
        """Largest entry after clipping."""
        return self.peak if self.limit is None else torch.minimum(self.peak, self.limit)

    def _clipped_here(self) -> tuple[Tensor, Tensor]:
        """2-norm after clipping and number of clipped entries, of the parts that are here."""
        if self.limit is None:
            return self.here, torch.zeros_like(self.here)
        if self.kernels is not None and self.measured is not None:
            return self.kernels.clip_norms(self.tensors, self.measured, self.limit, self._rescale)
        unit = self._left
        inverse = 1 / unit.clamp(min=torch.finfo(self.dtype).tiny)
        norms, counts = [], []
        for tensor, limit, gain, reduced in zip(
            self.tensors, self.limit.unbind(), inverse.unbind(), (self._rescale * inverse).unbind(), strict=True
        ):
            parts = []
            for (piece,) in blocks(tensor):
                values, over = _scale(piece.to(self.dtype), limit, gain, reduced)
                parts.append((torch.linalg.vector_norm(values), over.sum()))
            norms.append(torch.linalg.vector_norm(torch.stack([norm for norm, _ in parts])))
            counts.append(torch.stack([count for _, count in parts]).sum())
        return torch.stack(norms) * unit, torch.stack(counts)

    @property
    def _rescale(self) -> Tensor:
        assert self.limit is not None
        return torch.where(self.limit < self.peak, self.limit / self.peak, torch.ones_like(self.peak))


def _scale(g: Tensor, limit: Tensor, gain: Tensor, reduced: Tensor) -> tuple[Tensor, Tensor]:
    """``g`` times ``reduced`` where it is above the limit, else times ``gain``; and 1 or 0 for above or not.

    The mask is in floats because torch's boolean masks and ``where`` are not vectorised on CPU.
    """
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
