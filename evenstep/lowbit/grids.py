"""The number grids of low-bit formats, and rounding onto them.

A grid is what an entry may be before it is multiplied with its group's scale. Integer grids are ``-top ... top`` in
steps of one. Float grids are sign, exponent and mantissa as in OCP's specifications (no Infinity; of NaN only what the
8-bit ones have): between two powers of two the steps are even, and double with each power.

Rounding is to the nearest, ties to the even code, and saturates at ``top``. A float grid is rounded to without tables:
with p the power of two at or below \\|y\\|, a number of 24 bits whose last bit is worth one step, added and taken off
again, leaves y rounded by the processor's own rule. That is five vectorised operations, which a compiler fuses.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from evenstep.errors import EvenstepError, nearest

_EXPONENT = 0x7F800000  # of an fp32 number's bits


@dataclass(frozen=True)
class Grid:
    """``bits`` of a code, ``top`` the largest value. Float grids: ``mantissa`` bits and ``low``, the exponent of the
    smallest normal number; integer grids have ``mantissa`` None. ``twos_complement``: how the code holds the sign
    (otherwise its first bit is the sign)."""

    name: str
    bits: int
    top: float
    mantissa: int | None = None
    low: int = 0
    twos_complement: bool = False

    @property
    def top_exponent(self) -> int:
        """The exponent of the largest power of two on the grid."""
        return int(self.top).bit_length() - 1

    def round(self, y: Tensor, noise: Tensor | None = None) -> Tensor:
        """``y`` (fp32, overwritten) on the grid, saturated; NaN stays NaN, a zero may lose its sign.

        ``noise`` in [0, 1), shaped like y, makes the rounding stochastic: the probability of the upper neighbour is
        the distance from the lower one, so the mean is y where y is within the grid.
        """
        y = y.clamp_(-self.top, self.top)
        if self.mantissa is None:
            return y.round_() if noise is None else y.add_(noise).floor_()
        # The smallest normal power of two is the unit of the subnormals, too.
        power = self._power(y)
        if noise is not None:
            step = power.mul_(2.0**-self.mantissa)
            return y.div_(step).add_(noise).floor_().mul_(step)
        if self.mantissa == 0:
            return _round_to_powers(y, self.low)
        anchor = power.mul_(1.5 * 2.0 ** (23 - self.mantissa))
        return y.add_(anchor).sub_(anchor)

    def _power(self, y: Tensor) -> Tensor:
        """The power of two at or below \\|y\\|, at least 2 ** low. Inductor reinterprets bits slowly (see blocks.py):
        a compiled grid of few powers compares instead."""
        if not torch.compiler.is_compiling() or self.top_exponent - self.low > 6:
            return (y.view(torch.int32) & _EXPONENT).clamp_min_((self.low + 127) << 23).view(torch.float32)
        magnitude, power = y.abs(), torch.full_like(y, 2.0**self.low)
        for exponent in range(self.low + 1, self.top_exponent + 1):
            power = torch.where(magnitude >= 2.0**exponent, 2.0**exponent, power)
        return power

    def values(self, device: torch.device | None = None) -> Tensor:
        """What each code means, fp32 [2 ** bits]; NaN for the codes that 8-bit floats keep for it."""
        return torch.tensor(_values(self), device=device)

    def encode(self, v: Tensor, negative: Tensor) -> Tensor:
        """Codes (uint8) of ``v`` on the grid; ``negative`` (bool) gives the sign, so that -0 keeps its own."""
        if self.twos_complement:
            return (v.to(torch.int16) & (2**self.bits - 1)).to(torch.uint8)
        half = 2 ** (self.bits - 1)
        upper = self.values(v.device)[:half]
        upper = upper[upper <= self.top]
        return torch.bucketize(v.abs().contiguous(), upper).add_(negative * half).to(torch.uint8)


def _round_to_powers(y: Tensor, low: int) -> Tensor:
    """Nearest of 0 and the powers of two from 2 ** low, ties to the even exponent code (the addition trick has no
    even neighbour to prefer when the mantissa is empty)."""
    bits = y.abs().view(torch.int32)
    rounded = ((bits + 0x3FFFFF + ((bits >> 23) & 1)) & _EXPONENT).view(torch.float32)
    smallest = 2.0**low
    small = torch.where(y.abs() > smallest / 2, smallest, 0.0)
    return torch.where(y.isnan(), y, torch.where(rounded < smallest, small, rounded).copysign(y))


@functools.cache
def _values(grid: Grid) -> list[float]:
    if grid.twos_complement:
        half = 2 ** (grid.bits - 1)
        return [float(code - 2 * half if code >= half else code) for code in range(2 * half)]
    upper = []
    for code in range(2 ** (grid.bits - 1)):
        if grid.mantissa is None:
            value = float(code)
        else:
            exponent, fraction = code >> grid.mantissa, code & (2**grid.mantissa - 1)
            normal = exponent > 0
            value = (normal + fraction / 2**grid.mantissa) * 2.0 ** (grid.low + max(exponent - 1, 0))
        upper.append(value if value <= grid.top else float("nan"))
    return upper + [-value for value in upper]


GRIDS: dict[str, Grid] = {
    **{f"int{b}": Grid(f"int{b}", b, 2 ** (b - 1) - 1, twos_complement=True) for b in range(2, 9)},
    "e1m2": Grid("e1m2", 4, 7),  # evenly spaced: its one exponent bit only tells the subnormals from the rest
    "uniform9": Grid("uniform9", 4, 4),
    "e2m1": Grid("e2m1", 4, 6, mantissa=1, low=0),
    "e3m0": Grid("e3m0", 4, 16, mantissa=0, low=-2),
    "e2m3": Grid("e2m3", 6, 7.5, mantissa=3, low=0),
    "e3m2": Grid("e3m2", 6, 28, mantissa=2, low=-2),
    "e4m3": Grid("e4m3", 8, 448, mantissa=3, low=-6),
    "e5m2": Grid("e5m2", 8, 57344, mantissa=2, low=-14),
}


def get_grid(name: str) -> Grid:
    """EvenstepError, with the nearest name, for a grid there is not."""
    if name not in GRIDS:
        raise EvenstepError(f"unknown grid {name!r}: choose one of {', '.join(GRIDS)}{nearest(name, list(GRIDS))}")
    return GRIDS[name]
