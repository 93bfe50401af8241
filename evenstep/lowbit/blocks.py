"""From one block of numbers to values on the grid and back: scales, outliers, zero points.

Here "blocks" are views whose entries along ``dims`` share a scale: [..., n, g] with dims (-1,), or [..., r, R, n, g]
with dims (-3, -1) for two-dimensional ones. Scales are small tensors that broadcast over them.

Magnitudes are compared as the integers of their bits, which order non-negative fp32 numbers rightly (NaN above
everything) and are several times faster than float comparisons and ``torch.where`` in eager mode: a mask is a
difference shifted by 31. Inductor is the other way round: it copies numbers one by one to reinterpret their bits, and
vectorises comparisons. So under ``torch.compile`` magnitudes are floats, with the same results but for one: there a NaN
among the kept outliers makes its group NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from evenstep.lowbit.formats import Format
from evenstep.lowbit.grids import GRIDS

_TINY = 2.0**-126  # the smallest normal fp32 number
LARGEST = {"bf16": torch.finfo(torch.bfloat16).max, "fp16": torch.finfo(torch.float16).max}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Blocks(NamedTuple):
    """Quantised blocks: ``values`` on the grid (fp32), ``scale`` as it is stored but in fp32 (E8M0: the biased exponent
    in int32), ``zero`` for asymmetric formats; ``bits``, the entries' ``magnitudes``, and ``limit``: what is above
    it is kept as it is."""

    values: Tensor
    scale: Tensor
    zero: Tensor | None = None
    bits: Tensor | None = None
    limit: Tensor | None = None


def magnitudes(x: Tensor) -> Tensor:
    """\\|x\\| of fp32 ``x`` as something to compare: its bits (int32), or itself under a compiler."""
    return x.abs() if torch.compiler.is_compiling() else x.abs().view(torch.int32)


def encode(x: Tensor, fmt: Format, dims: tuple[int, ...], total: Tensor | None, noise: Tensor | None) -> Blocks:
    """Quantise the blocks of fp32 ``x``; ``total`` is the tensor scale (broadcasting), ``noise`` for stochastic
    rounding."""
    if not fmt.symmetric:
        return _encode_asymmetric(x, fmt, dims, noise)
    grid, bits = fmt.spec, magnitudes(x)
    limit = _ranked(bits, fmt.outliers, dims)
    peak = limit.view(torch.float32)  # (what is a float already stays)
    if fmt.official:
        peak = peak.clamp_min(1e-6)
        y, scale = (x * grid.top).div_(peak), peak
    elif fmt.scale == "e8m0":
        scale = _exponent(peak, fmt)
        y = x / _divisor(scale, fmt)
    elif fmt.scale == "e4m3":
        scale = peak / grid.top if total is None else (peak / grid.top) / total
        scale = GRIDS["e4m3"].round(scale.clamp_min(2.0**-6))
        # torchao multiplies by reciprocals, and so decides its rounding.
        y = x * (1.0 / scale if total is None else (1.0 / total) / scale)
    else:
        scale = _rounded(peak / grid.top, fmt)
        y = x / scale
    return Blocks(grid.round(y, noise), scale, bits=bits, limit=limit if fmt.outliers else None)


def decode(blocks: Blocks, fmt: Format, total: Tensor | None) -> Tensor:
    """The values times their scale, fp32; ``blocks.values`` may be overwritten. Outliers are not put back."""
    if fmt.official and fmt.symmetric:
        return blocks.values.mul_(blocks.scale).div_(fmt.spec.top)
    if fmt.scale == "e8m0":
        # 255 is NaN, 0 the subnormal 2 ** -127, whose bits are those of half the smallest normal number.
        scale = (blocks.scale << 23).clamp_min(1 << 22).view(torch.float32)
        return blocks.values.mul_(torch.where(blocks.scale == 255, torch.nan, scale))
    return blocks.values.mul_(blocks.scale if total is None else total * blocks.scale)


def keep_outliers(out: Tensor, x: Tensor, coded: Blocks) -> Tensor:
    """``out`` (overwritten) with the outliers of ``x`` (both fp32) put back, bit for bit; ``coded`` is x encoded."""
    if coded.limit is None or coded.bits is None:
        return out
    if coded.bits.is_floating_point():
        return torch.where(coded.bits > coded.limit, x, out)
    mask = (coded.limit - coded.bits).bitwise_right_shift_(31)  # all ones there
    old, new = out.view(torch.int32), x.view(torch.int32)
    return old.bitwise_xor_(mask.bitwise_and_(old ^ new)).view(torch.float32)


def tensor_scale(x: Tensor, fmt: Format) -> Tensor | None:
    """The second-level scale: peak / (448 * top) of each row [..., 1] or of the tensor (0-d); None without one."""
    if fmt.tensor_scale == "none":
        return None
    bits = magnitudes(x)
    peak = bits.amax(-1, keepdim=True) if fmt.tensor_scale == "row" else bits.amax()
    # The lower bound keeps its reciprocal, and that of the smallest scale below it, finite.
    scale = (peak.view(torch.float32) / (GRIDS["e4m3"].top * fmt.spec.top)).clamp_min(2.0**-120)
    return _shortened(scale) if fmt.tensor_scale == "row" else scale


def _ranked(bits: Tensor, rank: int, dims: tuple[int, ...]) -> Tensor:
    """The (rank + 1)-th largest of each block, equal ones counted one by one; 0 where a block is too small.

    Each pass takes the largest, counts how often it occurs and sets it to zero. Where the count uses up the rank, the
    answer is found, and the rest of the passes leave it alone.
    """
    found = bits.amax(dims, keepdim=True)
    if not rank:
        return found
    size, top, lower = bits.shape[dims[0]], found, None
    for done in range(1, rank + 1):
        if bits.is_floating_point():
            smaller = bits < top
            count, bits = torch.where(smaller, -1.0, 0.0).sum(dims, keepdim=True), torch.where(smaller, bits, 0.0)
        else:
            below = torch.sub(bits, top).sign_()  # -1 below the largest, 0 at it
            count, bits = below.sum(dims, keepdim=True, dtype=torch.int32), below.bitwise_and_(bits)
        lower = count if lower is None else lower + count
        top = bits.amax(dims, keepdim=True)
        # So far done * size + lower entries were the largest of their pass: no more than the rank?
        found = torch.where(lower <= rank - done * size, top, found)
    return found


def _rounded(step: Tensor, fmt: Format) -> Tensor:
    """A scale as its kind stores it."""
    if fmt.scale == "fp32":
        return _shortened(step.clamp_min(_TINY))
    largest = LARGEST[fmt.scale]
    smallest = 2.0**-14 if fmt.scale == "fp16" else _TINY
    return step.clamp(smallest, largest).to(_DTYPES[fmt.scale]).float()


def _shortened(scale: Tensor) -> Tensor:
    """fp32 rounded to 21 bits. Taking the scale of quantised numbers again is off by the last bit or two of the
    product and the quotient; rounding them away makes quantising twice the same as quantising once."""
    short = ((scale.view(torch.int32) + 4) & ~7).view(torch.float32)
    return torch.where(scale.isnan(), scale, short)  # of all NaNs, the last few would overflow to zero


def _exponent(peak: Tensor, fmt: Format) -> Tensor:
    """The biased E8M0 exponent (int32; 255 is NaN) of blocks with this peak."""
    grid = fmt.spec
    if fmt.rule == "rceil":  # the power of two at or above peak / top
        bits = (peak / grid.top).view(torch.int32)
        exponent = bits >> 23
        up = (bits & 0x7FFFFF) > torch.where(exponent == 0, 1 << 22, 0)
        return torch.where(bits > 0x7F800000, 255, (exponent + up).clamp_max(254))
    bits = peak.view(torch.int32)
    if fmt.rule == "even":  # round the peak to the grid's mantissa first
        bits = torch.where(bits > 0x7F800000, bits, bits + (1 << (22 - (grid.mantissa or 0))))
    exponent = bits >> 23
    if fmt.rule == "ceil":
        exponent = exponent + ((bits & 0x7FFFFF) > 0)
    return torch.where(peak.isnan(), 255, (exponent - grid.top_exponent).clamp_min(0))


def _divisor(exponent: Tensor, fmt: Format) -> Tensor:
    """What entries are divided by: 2 ** (e - 127), but never subnormal; as in torchao."""
    scale = (exponent << 23).clamp_min(1 << 23).view(torch.float32)
    return torch.where(exponent == 0, 1.0, scale) if fmt.rule == "rceil" else scale


def _encode_asymmetric(x: Tensor, fmt: Format, dims: tuple[int, ...], noise: Tensor | None) -> Blocks:
    low, top = x.amin(dims, keepdim=True), 2**fmt.spec.bits - 1
    span = x.amax(dims, keepdim=True) - low
    scale = span.clamp_min(1e-5) / top if fmt.official else _rounded(span / top, fmt)
    zero = torch.round(low / scale).neg_().clamp_(0, top)
    y = x / scale
    y = y.round_() if noise is None else y.add_(noise).floor_()
    return Blocks(y.add_(zero).clamp_(0, top).sub_(zero), scale, zero=zero)
