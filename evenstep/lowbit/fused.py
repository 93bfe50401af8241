"""``fake_quantize`` in one pass over memory on a CPU: what of it the kernel of evenstep/kernels/cpu_quant.cpp does.

The same numbers to the bit, in eager mode and compiled (the operator is opaque to the compiler). Without the compiled
library, and for what the kernel leaves out (stochastic rounding, two-dimensional blocks, fp16, scales of 16 bits,
E3M0), the plain code serves.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from evenstep.kernels import cpu_quant
from evenstep.lowbit.formats import Format

_PLAIN = (Tensor, Parameter)  # a DTensor, or a fake tensor, has a type of its own


def serves(x: Tensor, fmt: Format, dtype: torch.dtype) -> bool:
    """Whether the kernel makes ``dtype`` of ``x`` in this format."""
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
        and cpu_quant.ready()
    )


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
