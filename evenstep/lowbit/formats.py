"""What a low-bit format is: a grid, groups that share a scale, and how the scale is kept.

A Format is a small frozen value. The arithmetic that reads it is in ``blocks.py`` (one group), ``fake_quant.py`` (a
tensor) and ``quantized.py`` (codes and packing). All of it is fp32, whatever the dtype of the tensor; the result is in
the tensor's own dtype.

What happens to special values, in every format:

- zero stays zero, and a group of zeros stays zeros;
- entries beyond the grid saturate at its top (only scales that were rounded down can cause it);
- NaN makes its group NaN (with a tensor scale: all that share it), an infinity its group NaN too. Two exceptions:
  kept outliers, NaN and infinities count among them as the largest, stay as they are and leave their group alone; E8M0
  scales are finite for an infinity, which then saturates, as in torchao;
- groups whose peak is below 2 ** -126 times the grid's top lose their entries to zero (fp16 scales: 2 ** -14);
- a scale that would overflow fp16 or bf16 is the largest finite one, and the group saturates;
- an empty tensor stays empty.
"""

from __future__ import annotations

from dataclasses import dataclass

from evenstep.errors import EvenstepError, nearest
from evenstep.lowbit.grids import Grid, get_grid

SCALES = {"fp32": 32, "bf16": 16, "fp16": 16, "e8m0": 8, "e4m3": 8}
"""How a group's scale is kept, with its bits."""

E8M0_RULES = ("floor", "ceil", "even", "rceil")
TENSOR_SCALES = ("none", "row", "tensor")
ROUNDINGS = ("nearest", "stochastic")


@dataclass(frozen=True)
class Format:
    """A low-bit format; ``EvenstepError`` on construction where fields do not fit together.

    Args:
        grid: what an entry may be: ``int2`` to ``int8``, ``e1m2``, ``e2m1``, ``e3m0``, ``e2m3``, ``e3m2``, ``e4m3``,
            ``e5m2``; ``uniform9`` is the nine levels of the official "FP4".
        group: entries of a row that share a scale; 0: the whole row. The last group of a row is shorter where the
            width is no multiple of it.
        axis: the dimension that rows run along, default -1.
        scale: ``fp32``; ``bf16``, ``fp16`` (rounded to nearest); ``e8m0`` (a power of two); ``e4m3`` (2 ** -6 to 448).
            An fp32 scale is rounded to 21 bits (2e-7), as is one per row, so that quantising twice is quantising once;
            ``official`` ones and a scale per tensor (torchao's) keep all 24.
        rule: for ``e8m0``, how the exponent comes from the peak: ``floor`` (OCP), ``ceil``, ``even``, ``rceil``, as
            torchao names them.
        tensor_scale: for ``e4m3``, an fp32 scale on top, peak / (448 * top): ``none``, one for each ``row``, or for the
            whole ``tensor``, through which entries of all tokens influence each other.
        symmetric: False: integers from minimum to maximum with an integer zero point.
        outliers: so many largest magnitudes of each group are kept exactly and do not count for the scale.
        rounding: ``nearest`` (ties to even) or ``stochastic`` (unbiased within the grid).
        block_rows: a scale is shared by so many neighbouring rows too (two-dimensional blocks).
        flatten: groups run over the flattened tensor, across rows. Only the official formats do this: a group may
            then hold two tokens.
        official: the official code's arithmetic: scales to all 24 bits with its floors (1e-5 for a range, 1e-6 for a
            peak), and with ``symmetric`` value * peak / top in that order.
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
        return get_grid(self.grid)

    @property
    def token_local(self) -> bool:
        """Does a row's result depend on that row alone?"""
        return not self.flatten and self.tensor_scale != "tensor" and self.block_rows == 1

    def bits_per_value(self, width: int | None = None) -> float:
        """Bits per entry of a row of ``width`` (default: endless rows): its code, and its share of what a group stores:
        scale, zero point, and kept outliers (16 bits and the position each)."""
        group = self.group or width
        if not group:
            return float(self.spec.bits)
        outlier = 16 + max(group - 1, 1).bit_length()
        shared = SCALES[self.scale] + (0 if self.symmetric else self.spec.bits) + self.outliers * outlier
        groups = -(-width // group) / width if width and not self.flatten else 1 / group
        row = 32 / width if width and self.tensor_scale == "row" else 0
        return self.spec.bits + shared * groups / self.block_rows + row


def _mx(grid: str, rule: str = "floor") -> Format:
    return Format(grid, group=32, scale="e8m0", rule=rule)


FORMATS: dict[str, Format] = {
    # The official code's, quirks included.
    "fp4-official": Format("uniform9", group=256, outliers=2, flatten=True, official=True),
    "int4-weight-official": Format("int4", group=256, symmetric=False, flatten=True, official=True),
    "int4-input-official": Format("int4", group=256, outliers=2, flatten=True, official=True),
    "int8-weight-official": Format("int8", group=256, symmetric=False, flatten=True, official=True),
    "int8-input-official": Format("int8", group=256, outliers=2, flatten=True, official=True),
    # Ours: a group ends where its row ends.
    "e2m1": Format("e2m1", group=256),
    "e1m2": Format("e1m2", group=256),
    "e3m0": Format("e3m0", group=256),
    **{f"int{b}": Format(f"int{b}", group=256) for b in range(2, 8)},
    "int8": Format("int8"),
    "fp8": Format("e4m3"),
    "fp8-e5m2": Format("e5m2"),
    # OCP microscaling (MX), blocks of 32 with a power of two.
    "mxfp4": _mx("e2m1"),
    **{f"mxfp4-{rule}": _mx("e2m1", rule) for rule in ("floor", "ceil", "even", "rceil")},
    "mxfp6": _mx("e2m3"),
    "mxfp6-e3m2": _mx("e3m2"),
    "mxfp8": _mx("e4m3"),
    "mxfp8-e5m2": _mx("e5m2"),
    # NVIDIA's FP4, blocks of 16 with an E4M3 scale.
    "nvfp4": Format("e2m1", group=16, scale="e4m3", tensor_scale="tensor"),
    "nvfp4-row": Format("e2m1", group=16, scale="e4m3", tensor_scale="row"),
    "nvfp4-block": Format("e2m1", group=16, scale="e4m3"),
    "nvfp4-16x16": Format("e2m1", group=16, block_rows=16, scale="e4m3", tensor_scale="tensor"),
}


def get_format(given: Format | str) -> Format:
    """A Format as it is, a name looked up; EvenstepError with the nearest name."""
    if isinstance(given, Format):
        return given
    if given not in FORMATS:
        raise EvenstepError(
            f"unknown format {given!r}: choose one of {', '.join(FORMATS)}{nearest(str(given), list(FORMATS))}"
        )
    return FORMATS[given]
