"""Low-bit number formats: the grid of values, the groups that share a scale, and the arithmetic of one group.

The file has three parts. A `Grid` is the set of values that an entry may take before the multiplication by the scale
of its group. A `Format` adds the groups and the way their scale is stored. `quantize_blocks` and `dequantize_blocks`
are the arithmetic that both describe; everything else in this package (fake_quant.py, quantized.py, metrics.py) calls
these two functions. The arithmetic is fp32 for every dtype of the tensor, and the result is in the tensor's own dtype.

Special values, in every format:

- Zero stays zero, and a group of zeros stays zeros.
- Entries beyond the grid saturate at its largest value. Only a scale that was rounded down can cause it.
- NaN makes its group NaN (with a tensor scale: all groups that share it), and an infinity makes its group NaN too, with
  two exceptions. Outliers that are kept exactly, among which NaN and infinities count as the largest, stay as they are
  and leave their group alone. E8M0 scales are finite for an infinity, which then saturates, as in torchao.
- A group whose peak is below 2 ** -126 times the largest value of the grid becomes zero (fp16 scales: 2 ** -14).
- A scale that would overflow fp16 or bf16 is the largest finite value, and the group saturates.
- An empty tensor stays empty.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from evenstep.errors import EvenstepError, nearest

# IEEE 754 binary32: 1 sign bit, 8 exponent bits (bias 127), 23 mantissa bits.
_EXPONENT = 0x7F800000  # the exponent field, which is also the bit pattern of infinity; larger magnitudes are NaN
_MANTISSA = 0x007FFFFF
_TINY = 2.0**-126  # the smallest normal number

# ---- grids ----


@dataclass(frozen=True)
class Grid:
    """The values that an entry may take before the multiplication by its scale.

    Integer grids are ``-top ... top`` in steps of one. Float grids have a sign, exponent and mantissa as in the OCP
    specifications: the values between two powers of two are evenly spaced, and the spacing doubles with each power.
    They have no infinity, and only the 8-bit ones have codes for NaN.

    Args:
        name: the name in ``GRIDS``.
        bits: the width of a code.
        top: the largest value.
        mantissa: mantissa bits of a float grid; None for evenly spaced values.
        low: the exponent of the smallest normal number of a float grid.
        twos_complement: True where the code is a two's complement integer; otherwise its first bit is the sign.
    """

    name: str
    bits: int
    top: float
    mantissa: int | None = None
    low: int = 0
    twos_complement: bool = False

    @property
    def top_exponent(self) -> int:
        """The exponent of the largest power of two on the grid (emax in OCP MX v1.0, section 6.3)."""
        return int(self.top).bit_length() - 1

    def round(self, y: Tensor, noise: Tensor | None = None) -> Tensor:
        """Round ``y`` (fp32, any shape, overwritten) to the grid: to the nearest, ties to the even code, saturated.

        NaN stays NaN; a zero may lose its sign. ``noise`` in [0, 1), of the shape of ``y``, makes the rounding
        stochastic: the probability of the upper neighbour is the distance from the lower one, so that the expected
        value is ``y`` wherever ``y`` is within the grid.
        """
        y = y.clamp_(-self.top, self.top)
        if self.mantissa is None:
            # torch.round rounds ties to even. The two's complement code -2 ** (bits - 1) is never used.
            return y.round_() if noise is None else y.add_(noise).floor_()
        # Subnormals have the spacing of the smallest normal power of two.
        power = self._power(y)
        if noise is not None:
            step = power.mul_(2.0**-self.mantissa)  # the distance between neighbours, 2 ** (exponent - mantissa)
            return y.div_(step).add_(noise).floor_().mul_(step)
        if self.name in FLOAT8 and y.is_cuda:
            return y.copy_(y.to(FLOAT8[self.name]))  # one kernel, and on sm_89 and later one instruction
        if self.mantissa == 0:
            return _round_to_powers(y, self.low)
        # Rounding without a table: with p = power, the anchor 1.5 * 2 ** (23 - mantissa) * p is a number of 24 bits
        # whose last bit is worth one step of the grid. Adding it makes the processor round y to a whole number of steps
        # by its own rule (nearest, ties to even); subtracting it again is exact. The factor 1.5 instead of 1 keeps the
        # sum within one power of two for negative y. Five vectorised operations, which a compiler fuses.
        # Hazard: this is exact in fp32 only, and -ffast-math or a reassociating compiler would cancel the two.
        anchor = power.mul_(1.5 * 2.0 ** (23 - self.mantissa))
        return y.add_(anchor).sub_(anchor)

    def _power(self, y: Tensor) -> Tensor:
        """The power of two at or below ``|y|``, but at least 2 ** low; fp32, of the shape of ``y``."""
        # Eager mode masks the exponent bits. Inductor does not vectorise the reinterpretation of bits (see
        # `magnitudes`), so a compiled grid with few powers of two compares with each of them.
        if not torch.compiler.is_compiling() or self.top_exponent - self.low > 6:
            return (y.view(torch.int32) & _EXPONENT).clamp_min_((self.low + 127) << 23).view(torch.float32)
        magnitude, power = y.abs(), torch.full_like(y, 2.0**self.low)
        for exponent in range(self.low + 1, self.top_exponent + 1):
            power = torch.where(magnitude >= 2.0**exponent, 2.0**exponent, power)
        return power

    def values(self, device: torch.device | None = None) -> Tensor:
        """The value of each code, fp32 [2 ** bits]; NaN for the codes that 8-bit floats reserve for it."""
        return torch.tensor(_values(self), device=device)

    def encode(self, v: Tensor, negative: Tensor) -> Tensor:
        """Codes (uint8) of ``v``, which is on the grid; ``negative`` (bool) is the sign, so that -0 has a code."""
        if self.twos_complement:
            masked: Tensor = v.to(torch.int16) & (2**self.bits - 1)
            return masked.to(torch.uint8)
        # A sign-magnitude code is the rank of |v| among the non-negative values, plus 2 ** (bits - 1) if negative,
        # computed without a table, for whose upload a GPU would have to wait.
        size, half = v.abs(), 2 ** (self.bits - 1)
        if self.name in FLOAT8:
            rank = size.to(FLOAT8[self.name]).view(torch.uint8)
        elif self.mantissa is None:
            rank = size.to(torch.uint8).clamp_(max=half - 1)
        else:
            # The fields of fp32 with exponent and mantissa shortened: the exponent code of 2 ** low is 1. Below it,
            # numbers count steps of 2 ** (low - mantissa).
            normal = (size.view(torch.int32) >> (23 - self.mantissa)) - ((self.low + 126) << self.mantissa)
            steps = (size * 2.0 ** (self.mantissa - self.low)).to(torch.int32)
            # NaN, which has no code, must not spill into the neighbour's bits.
            rank = torch.where(size < 2.0**self.low, steps, normal).clamp_(0, half - 1)
        codes: Tensor = (rank + negative * half).to(torch.uint8)
        return codes


FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
"""Grids that torch has a dtype for. Its casts round to nearest, ties to even, as `Grid.round`."""


def _round_to_powers(y: Tensor, low: int) -> Tensor:
    """Round to 0 and the powers of two from 2 ** low on, ties to the even exponent code; for an empty mantissa.

    The anchor of `Grid.round` does not serve here, because an empty mantissa has no even neighbour to prefer.
    """
    bits = y.abs().view(torch.int32)
    # Adding just below half of the mantissa's range carries into the exponent from 1.5 * 2 ** e on; adding one more
    # where the exponent code is odd sends ties to the even one.
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
            # Normal numbers: (1 + fraction / 2 ** mantissa) * 2 ** (exponent - bias). Exponent code 0 is subnormal:
            # no leading one, and the power of two of exponent code 1.
            exponent, fraction = code >> grid.mantissa, code & (2**grid.mantissa - 1)
            normal = exponent > 0
            value = (normal + fraction / 2**grid.mantissa) * 2.0 ** (grid.low + max(exponent - 1, 0))
        upper.append(value if value <= grid.top else float("nan"))
    return upper + [-value for value in upper]


# eXmY: one sign bit, X exponent bits, Y mantissa bits. E2M1, E2M3, E3M2, E4M3 and E5M2 are the element formats of OCP
# MX v1.0 (section 5.3). E4M3 and E5M2 are OCP FP8 v1.0: E4M3 gives up infinity for one more power of two, so its top
# is 1.75 * 2 ** 8 = 448; E5M2 follows IEEE 754, and its infinity is treated as NaN here.
GRIDS: dict[str, Grid] = {
    # Without -2 ** (bits - 1), so that the grid is symmetric around zero.
    **{f"int{b}": Grid(f"int{b}", b, 2 ** (b - 1) - 1, twos_complement=True) for b in range(2, 9)},
    # The single exponent bit only tells subnormal from normal numbers, so that all 15 values are evenly spaced.
    "e1m2": Grid("e1m2", 4, 7),
    # The nine even levels of the "FP4" in the official code of Stable-SPAM.
    "uniform9": Grid("uniform9", 4, 4),
    "e2m1": Grid("e2m1", 4, 6, mantissa=1, low=0),  # 0, 0.5, 1, 1.5, 2, 3, 4, 6
    "e3m0": Grid("e3m0", 4, 16, mantissa=0, low=-2),  # 0 and the powers of two from 0.25 to 16
    "e2m3": Grid("e2m3", 6, 7.5, mantissa=3, low=0),
    "e3m2": Grid("e3m2", 6, 28, mantissa=2, low=-2),
    "e4m3": Grid("e4m3", 8, 448, mantissa=3, low=-6),
    "e5m2": Grid("e5m2", 8, 57344, mantissa=2, low=-14),
}


def get_grid(name: str) -> Grid:
    """Return the grid of this name; raise ``EvenstepError`` with the nearest name if there is none."""
    if name not in GRIDS:
        raise EvenstepError(f"unknown grid {name!r}: choose one of {', '.join(GRIDS)}{nearest(name, list(GRIDS))}")
    return GRIDS[name]


# ---- formats ----

# Bits of a stored scale. E8M0 is the scale of OCP MX v1.0: eight exponent bits with bias 127, no sign, no mantissa; 255
# is NaN.
SCALES = {"fp32": 32, "bf16": 16, "fp16": 16, "e8m0": 8, "e4m3": 8}
E8M0_RULES = ("floor", "ceil", "even", "rceil")
TENSOR_SCALES = ("none", "row", "tensor")
ROUNDINGS = ("nearest", "stochastic")


@dataclass(frozen=True)
class Format:
    """A low-bit format: a grid, the groups that share a scale, and how the scale is stored.

    Args:
        grid: the values of an entry: ``int2`` to ``int8``, ``e1m2``, ``e2m1``, ``e3m0``, ``e2m3``, ``e3m2``, ``e4m3``
            or ``e5m2``; ``uniform9`` is the nine levels of the official "FP4".
        group: number of entries of a row that share a scale; 0 is the whole row. The last group of a row is shorter
            where the width is no multiple of it.
        axis: the dimension along which rows run, default -1.
        scale: ``fp32``; ``bf16`` or ``fp16`` (rounded to nearest); ``e8m0`` (a power of two); ``e4m3`` (2 ** -6 to
            448). An fp32 scale is rounded to 21 bits (2e-7), as is a tensor scale per row, so that quantising twice
            equals quantising once; with ``official``, and for a scale of the whole tensor (torchao's), all 24 bits are
            kept.
        rule: for ``e8m0``, how the exponent is computed from the peak: ``floor`` (OCP), ``ceil``, ``even`` or
            ``rceil``, with torchao's names.
        tensor_scale: for ``e4m3``, a second fp32 scale, peak / (448 * top): ``none``, one for each ``row``, or one for
            the whole ``tensor``. Through the last one the entries of all tokens influence each other.
        symmetric: False for integers from the group's minimum to its maximum, with an integer zero point.
        outliers: number of entries of largest magnitude in each group that are kept exactly and do not count for the
            scale.
        rounding: ``nearest`` (ties to even) or ``stochastic`` (unbiased within the grid).
        block_rows: number of neighbouring rows that share a scale too (two-dimensional blocks).
        flatten: groups run over the flattened tensor, across rows. Only the official formats do this; a group may then
            contain two tokens.
        official: the arithmetic of the official code: scales of 24 bits with its lower bounds (1e-5 for a range, 1e-6
            for a peak), and, with ``symmetric``, value * peak / top in that order.

    Raises:
        EvenstepError: an unknown name, a number out of range, or fields that do not fit together.

    Example:
        >>> Format("e2m1", group=32, scale="e8m0") == FORMATS["mxfp4"]
        True
        >>> FORMATS["nvfp4"].bits_per_value()
        4.5
    """

    grid: str
    group: int = 0
    axis: int = -1
    scale: str = "fp32"
    rule: str = "floor"
    tensor_scale: str = "none"
    symmetric: bool = True
    outliers: int = 0
    rounding: str = "nearest"
    block_rows: int = 1
    flatten: bool = False
    official: bool = False

    def __post_init__(self) -> None:
        get_grid(self.grid)
        for field, allowed in (
            ("scale", tuple(SCALES)),
            ("rule", E8M0_RULES),
            ("tensor_scale", TENSOR_SCALES),
            ("rounding", ROUNDINGS),
        ):
            value = getattr(self, field)
            if value not in allowed:
                raise EvenstepError(
                    f"Format.{field} is {value!r}: choose one of {', '.join(allowed)}{nearest(str(value), allowed)}"
                )
        for field, low in (("group", 0), ("outliers", 0), ("block_rows", 1)):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise EvenstepError(f"Format.{field} is {value!r}: it must be a whole number of at least {low}")
        conflicts = {
            "an asymmetric format needs an integer grid": not self.symmetric and not self.spec.twos_complement,
            "an asymmetric format needs an fp32, bf16 or fp16 scale": not self.symmetric and SCALES[self.scale] < 16,
            "outliers need a symmetric format": self.outliers and not self.symmetric,
            "outliers need groups within one row": self.outliers and self.block_rows > 1,
            "a tensor scale needs scale='e4m3'": self.tensor_scale != "none" and self.scale != "e4m3",
            "flatten and block_rows or axis contradict each other": self.flatten
            and (self.block_rows > 1 or self.axis != -1),
            "flatten needs a group": self.flatten and not self.group,
            "block_rows and tensor_scale='row' contradict each other": self.block_rows > 1
            and self.tensor_scale == "row",
            "official needs an fp32 scale": self.official and self.scale != "fp32",
        }
        if found := [text for text, there in conflicts.items() if there]:
            raise EvenstepError(f"Format({self.grid!r}, ...): {found[0]}")

    @property
    def spec(self) -> Grid:
        """The grid itself, ``GRIDS[self.grid]``."""
        return get_grid(self.grid)

    @property
    def token_local(self) -> bool:
        """Whether the result of a row depends on that row alone."""
        return not self.flatten and self.tensor_scale != "tensor" and self.block_rows == 1

    def bits_per_value(self, width: int | None = None) -> float:
        """Bits per entry of a row of ``width`` entries (default: the limit of long rows).

        The code, and the entry's share of what its group stores: scale, zero point, and for each kept outlier 16 bits
        and its position.
        """
        group = self.group or width
        if not group:
            return float(self.spec.bits)
        outlier = 16 + max(group - 1, 1).bit_length()  # the position counts from 0 to group - 1
        shared = SCALES[self.scale] + (0 if self.symmetric else self.spec.bits) + self.outliers * outlier
        groups = -(-width // group) / width if width and not self.flatten else 1 / group
        row = 32 / width if width and self.tensor_scale == "row" else 0
        return self.spec.bits + shared * groups / self.block_rows + row


def _mx(grid: str, rule: str = "floor") -> Format:
    return Format(grid, group=32, scale="e8m0", rule=rule)


FORMATS: dict[str, Format] = {
    # The official code of arXiv:2502.17055, with its quirks: nine levels, groups across rows, 24-bit scales.
    "fp4-official": Format("uniform9", group=256, outliers=2, flatten=True, official=True),
    "int4-weight-official": Format("int4", group=256, symmetric=False, flatten=True, official=True),
    "int4-input-official": Format("int4", group=256, outliers=2, flatten=True, official=True),
    "int8-weight-official": Format("int8", group=256, symmetric=False, flatten=True, official=True),
    "int8-input-official": Format("int8", group=256, outliers=2, flatten=True, official=True),
    # The same formats with groups that end with their row.
    "e2m1": Format("e2m1", group=256),
    "e1m2": Format("e1m2", group=256),
    "e3m0": Format("e3m0", group=256),
    **{f"int{b}": Format(f"int{b}", group=256) for b in range(2, 8)},
    "int8": Format("int8"),
    "fp8": Format("e4m3"),
    "fp8-e5m2": Format("e5m2"),
    # OCP Microscaling v1.0: blocks of 32 entries with an E8M0 scale; without a suffix, the rule is floor (OCP).
    "mxfp4": _mx("e2m1"),
    **{f"mxfp4-{rule}": _mx("e2m1", rule) for rule in ("floor", "ceil", "even", "rceil")},
    "mxfp6": _mx("e2m3"),
    "mxfp6-e3m2": _mx("e3m2"),
    "mxfp8": _mx("e4m3"),
    "mxfp8-e5m2": _mx("e5m2"),
    # NVFP4 (arXiv:2509.25149): blocks of 16 entries with an E4M3 scale, and an fp32 scale of the whole tensor. The
    # variants have the second level per row, none, or blocks of 16 x 16 whose transpose has the same scales.
    "nvfp4": Format("e2m1", group=16, scale="e4m3", tensor_scale="tensor"),
    "nvfp4-row": Format("e2m1", group=16, scale="e4m3", tensor_scale="row"),
    "nvfp4-block": Format("e2m1", group=16, scale="e4m3"),
    "nvfp4-16x16": Format("e2m1", group=16, block_rows=16, scale="e4m3", tensor_scale="tensor"),
}


def get_format(given: Format | str) -> Format:
    """Return a Format as it is, or look up its name; raise ``EvenstepError`` with the nearest name if there is none."""
    if isinstance(given, Format):
        return given
    if given not in FORMATS:
        raise EvenstepError(
            f"unknown format {given!r}: choose one of {', '.join(FORMATS)}{nearest(str(given), list(FORMATS))}"
        )
    return FORMATS[given]


# ---- the arithmetic of a group ----
#
# Blocks are views of a tensor whose entries along the dimensions `dims` share a scale:
#     [rows, groups, group]                            dims (-1,)      a group is part of one row
#     [row blocks, block_rows, groups, group]          dims (-3, -1)   two-dimensional blocks
# A scale has the same shape with 1 in the place of the dimensions `dims`, so that it broadcasts over its block.
#
# evenstep/kernels/cpu_quant.cpp does the same operations in the same order, and its results are equal to the bit. A
# change here needs the same change there.

LARGEST = {"bf16": torch.finfo(torch.bfloat16).max, "fp16": torch.finfo(torch.float16).max}
_SCALE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Blocks(NamedTuple):
    """Quantised blocks.

    Attributes:
        values: the entries on the grid (fp32), in the shape of the blocks.
        scale: the scale as it is stored, in fp32; for E8M0 the biased exponent in int32.
        zero: the integer zero point of an asymmetric format, in fp32.
        bits: the `magnitudes` of the entries before quantisation; None for an asymmetric format.
        limit: the magnitude above which an entry is kept exactly; None without outliers.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor | None = None
    bits: Tensor | None = None
    limit: Tensor | None = None


def magnitudes(x: Tensor) -> Tensor:
    """``|x|`` of fp32 ``x`` in a form that can be compared: its bits (int32), or the floats under torch.compile."""
    # The bits of non-negative fp32 numbers, read as integers, have the order of the numbers, with NaN above infinity.
    # In eager mode integer comparisons are several times faster than float comparisons with torch.where: the mask of
    # a < b is (a - b) >> 31. Inductor is the other way round: it reinterprets bits one number at a time, and vectorises
    # float comparisons. The results are the same with one exception: in a compiled model a NaN among the kept outliers
    # makes its group NaN.
    return x.abs() if torch.compiler.is_compiling() else x.abs().view(torch.int32)


def quantize_blocks(
    x: Tensor, fmt: Format, dims: tuple[int, ...], total: Tensor | None, noise: Tensor | None
) -> Blocks:
    """Quantise the blocks of fp32 ``x``.

    ``total`` is the tensor scale in a shape that broadcasts over the blocks, None without one; ``noise`` in [0, 1), of
    the shape of ``x``, is for stochastic rounding.
    """
    if not fmt.symmetric:
        return _quantize_asymmetric(x, fmt, dims, noise)
    grid, bits = fmt.spec, magnitudes(x)
    # With k outliers the scale comes from the (k + 1)-th largest magnitude, and what is larger is kept exactly.
    limit = _ranked(bits, fmt.outliers, dims)
    peak = limit.view(torch.float32)  # under torch.compile this is a float already, and the view does nothing
    if fmt.official:
        # The official code stores the peak and computes round(x * top / peak), which rounds otherwise than x / scale.
        peak = peak.clamp_min(1e-6)
        y, scale = (x * grid.top).div_(peak), peak
    elif fmt.scale == "e8m0":
        scale = _e8m0_exponent(peak, fmt)
        y = x / _e8m0_divisor(scale, fmt)
    elif fmt.scale == "e4m3":
        # NVFP4: the block scale is peak / top in units of the tensor scale, rounded to E4M3.
        scale = peak / grid.top if total is None else (peak / grid.top) / total
        scale = GRIDS["e4m3"].round(scale.clamp_min(2.0**-6))
        # torchao multiplies by the reciprocals. x / (total * scale) would differ in the last bit, which can move an
        # entry across a rounding boundary.
        y = x * (1.0 / scale if total is None else (1.0 / total) / scale)
    else:
        scale = _stored_scale(peak / grid.top, fmt)
        y = x / scale
    return Blocks(grid.round(y, noise), scale, bits=bits, limit=limit if fmt.outliers else None)


def dequantize_blocks(blocks: Blocks, fmt: Format, total: Tensor | None) -> Tensor:
    """Multiply the values by their scale, fp32. ``blocks.values`` is overwritten; outliers are not put back."""
    if fmt.official and fmt.symmetric:
        return blocks.values.mul_(blocks.scale).div_(fmt.spec.top)
    if fmt.scale == "e8m0":
        # A biased exponent e moved into the exponent field is 2 ** (e - 127). Exponent 0 stands for 2 ** -127, which is
        # subnormal in fp32: mantissa bit 22 alone. Exponent 255 is NaN, but its bit pattern would be infinity.
        scale = (blocks.scale << 23).clamp_min(1 << 22).view(torch.float32)
        return blocks.values.mul_(torch.where(blocks.scale == 255, torch.nan, scale))
    return blocks.values.mul_(blocks.scale if total is None else total * blocks.scale)


def restore_outliers(out: Tensor, x: Tensor, coded: Blocks) -> Tensor:
    """Put the outliers of ``x`` into ``out`` (both fp32, ``out`` overwritten) bit for bit; ``coded`` is x quantised."""
    if coded.limit is None or coded.bits is None:
        return out
    if coded.bits.is_floating_point():
        return torch.where(coded.bits > coded.limit, x, out)
    # The sign of limit - magnitude, spread over 32 bits, is a mask of ones where x is kept: out ^ (mask & (out ^ x)).
    mask = (coded.limit - coded.bits).bitwise_right_shift_(31)
    old, new = out.view(torch.int32), x.view(torch.int32)
    return old.bitwise_xor_(mask.bitwise_and_(old ^ new)).view(torch.float32)


def tensor_scale(x: Tensor, fmt: Format) -> Tensor | None:
    """The second-level scale of NVFP4, peak / (448 * top): [..., 1] per row, 0-d per tensor; None without one."""
    if fmt.tensor_scale == "none":
        return None
    bits = magnitudes(x)
    peak = bits.amax(-1, keepdim=True) if fmt.tensor_scale == "row" else bits.amax()
    # The lower bound keeps the reciprocal finite, also divided by the smallest block scale, 2 ** -6.
    scale = (peak.view(torch.float32) / (GRIDS["e4m3"].top * fmt.spec.top)).clamp_min(2.0**-120)
    return _shortened(scale) if fmt.tensor_scale == "row" else scale


def _ranked(bits: Tensor, rank: int, dims: tuple[int, ...]) -> Tensor:
    """The (rank + 1)-th largest magnitude of each block, equal ones counted one by one; 0 where a block is too small.

    Each pass takes the largest magnitude, counts how often it occurs and sets those entries to zero. Once the count has
    used up the rank, the answer is found, and the remaining passes leave it alone.
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
            below = torch.sub(bits, top).sign_()  # -1 (all bits set) below the largest, 0 at it: count and mask at once
            count, bits = below.sum(dims, keepdim=True, dtype=torch.int32), below.bitwise_and_(bits)
        lower = count if lower is None else lower + count
        top = bits.amax(dims, keepdim=True)
        # Each pass removed size + count entries, so done * size + lower so far. If that is at most rank, the next
        # largest is a candidate.
        found = torch.where(lower <= rank - done * size, top, found)
    return found


def _stored_scale(step: Tensor, fmt: Format) -> Tensor:
    """An fp32, bf16 or fp16 scale as it is stored, in fp32, bounded away from zero and infinity."""
    if fmt.scale == "fp32":
        return _shortened(step.clamp_min(_TINY))
    largest = LARGEST[fmt.scale]
    smallest = 2.0**-14 if fmt.scale == "fp16" else _TINY  # the smallest normal numbers
    return step.clamp(smallest, largest).to(_SCALE_DTYPES[fmt.scale]).float()


def _shortened(scale: Tensor) -> Tensor:
    """Round an fp32 scale to 21 bits.

    The scale computed from quantised numbers differs from the first one in the last bit or two, by the rounding of the
    product and of the quotient. Rounding these bits away makes quantising twice equal to quantising once.
    """
    short = ((scale.view(torch.int32) + 4) & ~7).view(torch.float32)
    # NaN patterns near the top of the integers would overflow to zero in the addition.
    return torch.where(scale.isnan(), scale, short)


def _e8m0_exponent(peak: Tensor, fmt: Format) -> Tensor:
    """The biased E8M0 exponent (int32; 255 is NaN) of blocks with this peak.

    OCP MX v1.0, section 6.3: shared exponent = floor(log2(peak)) - emax of the grid, which is ``floor``. An entry above
    the largest value of the grid then saturates. The other rules, named as in torchao, round up sooner.
    """
    grid = fmt.spec
    if fmt.rule == "rceil":  # the power of two at or above peak / top, so that nothing saturates
        bits = (peak / grid.top).view(torch.int32)
        exponent = bits >> 23
        # A nonzero mantissa rounds up. Below the normal numbers the threshold is 2 ** -127, mantissa bit 22.
        up = (bits & _MANTISSA) > torch.where(exponent == 0, 1 << 22, 0)
        return torch.where(bits > _EXPONENT, 255, (exponent + up).clamp_max(254))
    bits = peak.view(torch.int32)
    if fmt.rule == "even":
        # Round the peak to the mantissa of the grid first: adding half of its last place carries into the exponent.
        bits = torch.where(bits > _EXPONENT, bits, bits + (1 << (22 - (grid.mantissa or 0))))
    exponent = bits >> 23
    if fmt.rule == "ceil":
        exponent = exponent + ((bits & _MANTISSA) > 0)
    return torch.where(peak.isnan(), 255, (exponent - grid.top_exponent).clamp_min(0))


def _e8m0_divisor(exponent: Tensor, fmt: Format) -> Tensor:
    """The divisor 2 ** (e - 127) of the entries, but never subnormal; torchao does the same."""
    scale = (exponent << 23).clamp_min(1 << 23).view(torch.float32)
    return torch.where(exponent == 0, 1.0, scale) if fmt.rule == "rceil" else scale


def _quantize_asymmetric(x: Tensor, fmt: Format, dims: tuple[int, ...], noise: Tensor | None) -> Blocks:
    """Integers 0 ... 2 ** bits - 1 with zero point: x is about (code - zero) * scale, and 0 is exactly on the grid."""
    low, top = x.amin(dims, keepdim=True), 2**fmt.spec.bits - 1
    span = x.amax(dims, keepdim=True) - low
    scale = span.clamp_min(1e-5) / top if fmt.official else _stored_scale(span / top, fmt)
    # The clamp matters for groups of one sign: their zero point would lie outside of the codes.
    zero = torch.round(low / scale).neg_().clamp_(0, top)
    y = x / scale
    y = y.round_() if noise is None else y.add_(noise).floor_()
    # The values are returned without the zero point, so that dequantising is one product as for every other format.
    return Blocks(y.add_(zero).clamp_(0, top).sub_(zero), scale, zero=zero)
