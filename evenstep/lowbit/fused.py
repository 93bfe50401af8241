"""``fake_quantize`` in one pass over memory on a CPU: what of it the kernel of evenstep/kernels/cpu_quant.cpp does.

The same numbers to the bit, in eager mode and compiled (the operator is opaque to the compiler). Without the compiled
library, and for what the kernel leaves out (stochastic rounding, two-dimensional blocks, fp16, scales of 16 bits,
E3M0), the plain code serves.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from evenstep.kernels import cpu_quant
from evenstep.kernels.cpu import chosen
from evenstep.kernels.interface import under_observation
from evenstep.lowbit.formats import FORMATS, Format

_PLAIN = (Tensor, Parameter)  # a DTensor, or a fake tensor, has a type of its own


def serves(x: Tensor, fmt: Format, dtype: torch.dtype) -> bool:
    """Whether the kernel makes ``dtype`` of ``x`` in this format."""
    return _has(x, fmt, dtype) and cpu_quant.ready() and trusted()


def _has(x: Tensor, fmt: Format, dtype: torch.dtype) -> bool:
    return (
        x.device.type == "cpu"
        and type(x) in _PLAIN
        and x.dtype in cpu_quant.DTYPES
        and dtype in (x.dtype, torch.bfloat16)
        and fmt.rounding == "nearest"
        and fmt.block_rows == 1
        and fmt.scale in cpu_quant.SCALES
        and fmt.outliers <= cpu_quant.MOST_OUTLIERS
        and fmt.spec.mantissa != 0
    )


_CHECKED = ("fp4-official", "int4-weight-official", "e2m1", "int4", "fp8", "mxfp4", "nvfp4", "nvfp4-row")
"""Formats that are tried before the kernel serves: every rule of scales, groups and outliers."""
_problem: str | None = None
_checked = False


@torch.compiler.assume_constant_result
def trusted() -> bool:
    """Whether the kernel gives the plain code's numbers here: looked into before it serves for the first time, with a
    warning if it does not."""
    global _checked, _problem
    if not _checked and not under_observation():
        _checked, _problem = True, "it is being checked"  # so that the plain code serves meanwhile
        apart = differences(_CHECKED)
        worst = max(apart, key=lambda name: apart[name][0])
        _problem = apart[worst][1]
        if _problem is not None:
            warnings.warn(
                f"the kernel for low-bit formats (cpu {chosen()}, {worst}) {_problem}; the plain code serves instead "
                "(see evenstep doctor --check)",
                stacklevel=2,
            )
    return _problem is None


def differences(names: Iterable[str] = tuple(FORMATS)) -> dict[str, tuple[float, str | None]]:
    """By format, for a small tensor: the largest difference between kernel and plain code, which should be none, and
    what is wrong."""
    from evenstep.lowbit.fake_quant import as_rows_shape, plain

    x = torch.arange(1, 1 + 6 * 80, dtype=torch.float64, device="cpu").square_().mul_(0.7).sin_().float().view(6, 80)
    x[1, 2] = 1e4
    found = {}
    for name in names:
        fmt = FORMATS[name]
        if not cpu_quant.ready() or not _has(x, fmt, x.dtype):
            continue
        width = as_rows_shape(x.shape, fmt)[1]
        try:
            apart = (fake_quantize(x, width, fmt, x.dtype, None) - plain(x, fmt, None, x.dtype)).abs().amax().item()
            problem = f"differs from the plain code by {apart:.2g}" if apart else None
        except Exception as error:
            apart, problem = float("inf"), f"raises {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        found[name] = apart, problem
    return found


def fake_quantize(x: Tensor, width: int, fmt: Format, dtype: torch.dtype, after: Tensor | None) -> Tensor:
    """``x`` (at least one entry) as rows of ``width``, quantised and dequantised, in its own shape and ``dtype``; not
    before ``after`` is there."""
    grid = fmt.spec
    plan = [
        fmt.group,
        int(grid.mantissa is None),
        grid.mantissa or 0,
        grid.low,
        grid.top_exponent,
        cpu_quant.SCALES.index(fmt.scale),
        cpu_quant.RULES.index(fmt.rule),
        cpu_quant.TOTALS.index(fmt.tensor_scale),
        int(not fmt.symmetric),
        int(fmt.official),
        fmt.outliers,
    ]
    return torch.ops.evenstep.cpu_fake_quantize(x, width, plan, float(grid.top), dtype, after)
