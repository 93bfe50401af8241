"""`fake_quantize`: round a whole tensor to a low-bit format and return it in its own dtype.

The tensor is viewed as a matrix of rows [R, C] (`as_rows`), cut into pieces whose groups all have the same length
(`split`: the full groups, and the shorter last one of each row), and each piece is viewed as blocks (`in_blocks`), on
which the arithmetic of formats.py works. quantized.py and metrics.py cut a tensor with the same functions.

On a CPU a C++ kernel (evenstep/kernels/cpu_quant.cpp) does the same in one pass over memory, in eager mode and under
torch.compile, with results equal to the bit. The second part of the file decides where it serves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from evenstep.errors import EvenstepError
from evenstep.kernels import cpu_quant
from evenstep.kernels.cpu import chosen
from evenstep.kernels.interface import under_observation
from evenstep.lowbit.formats import (
    FORMATS,
    LARGEST,
    Format,
    dequantize_blocks,
    get_format,
    quantize_blocks,
    restore_outliers,
    tensor_scale,
)

# Entries that eager mode processes at a time on a CPU. The intermediate results of so many entries fill about two
# megabytes, which stay in the second-level cache.
CACHE_ENTRIES = 2**17


def fake_quantize(x: Tensor, format: Format | str, generator: torch.Generator | None = None) -> Tensor:
    """Round ``x`` to the values that ``format`` can represent.

    The gradient passes straight through: the derivative of the rounding is taken as one.

    Args:
        x: a tensor of any shape and any floating dtype.
        format: a ``Format``, or a name in ``FORMATS``.
        generator: the random generator of stochastic rounding, on the device of ``x``; default: torch's global one.

    Returns:
        A new tensor with the shape and dtype of ``x``.

    Raises:
        EvenstepError: an unknown name, a tensor that is not floating-point, or fewer dimensions than the format needs.

    Example:
        >>> x = torch.tensor([0.1, -0.7, 2.4, 6.0])
        >>> fake_quantize(x, Format("e2m1"))  # the scale is 6 / 6
        tensor([ 0.0000, -0.5000,  2.0000,  6.0000])
    """
    fmt = check(x, format)
    if x.requires_grad and torch.is_grad_enabled():
        return _straight_through(x, fmt, generator)
    return apply(x, fmt, generator)


# The straight-through estimator: the true derivative of rounding is zero almost everywhere.
class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fmt: Format, generator: torch.Generator | None) -> Tensor:
        return apply(x, fmt, generator)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


_straight_through: Callable[..., Tensor] = _StraightThrough.apply


def check(x: Tensor, format: Format | str) -> Format:
    """Return the format; raise ``EvenstepError`` where ``x`` cannot be quantised to it."""
    fmt = get_format(format)
    if not x.is_floating_point():
        raise EvenstepError(f"a tensor of dtype {x.dtype} cannot be quantised: give a floating-point one")
    if fmt.block_rows > 1 and x.dim() < 2:
        raise EvenstepError(f"two-dimensional blocks need a matrix; the tensor has shape {list(x.shape)}")
    return fmt


def apply(
    x: Tensor,
    fmt: Format,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    after: Tensor | None = None,
) -> Tensor:
    """`fake_quantize` without its checks and without a gradient; the result in ``dtype`` (default: that of ``x``).

    ``after`` is a tensor that exists before the quantisation starts. In the backward pass this is the gradient:
    without it, a compiler may quantise all weights and inputs at the start of the pass and keep them alive.
    """
    dtype = dtype or x.dtype
    if not x.numel():
        return x.detach().clone().to(dtype)  # a new tensor here too, so that the result never aliases x
    with torch.no_grad():
        # Rows run along the last dimension from here on; another axis is moved there and back (views).
        if fmt.axis not in (-1, x.dim() - 1) and x.dim():
            return _along_rows(x.movedim(fmt.axis, -1), fmt, generator, dtype, after).movedim(-1, fmt.axis)
        return _along_rows(x, fmt, generator, dtype, after)


def _along_rows(
    x: Tensor, fmt: Format, generator: torch.Generator | None, dtype: torch.dtype, after: Tensor | None
) -> Tensor:
    if kernel_serves(x, fmt, dtype):
        return kernel_fake_quantize(x, as_rows_shape(x.shape, fmt)[1], fmt, dtype, after)
    return plain(x, fmt, generator, dtype)


# ---- the plain code ----


def plain(x: Tensor, fmt: Format, generator: torch.Generator | None, dtype: torch.dtype) -> Tensor:
    """`apply` along the last dimension, without the kernel."""
    rows = as_rows(x, fmt)
    # The tensor scale needs the peak of the whole tensor, so it is computed before the rows are divided.
    total = tensor_scale(rows, fmt)
    step = max(1, CACHE_ENTRIES // rows.shape[-1]) if fmt.block_rows == 1 else len(rows)
    # A compiler fuses the operations, and a GPU prefers few large kernels: there the tensor stays whole. So it
    # does with two-dimensional blocks, whose rows share a scale.
    if torch.compiler.is_compiling() or not x.is_cpu or len(rows) < 2 * step:
        out = _fake_rows(rows, fmt, total, generator)
    else:
        out = torch.empty_like(rows)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            # A scale per row [R, 1] is divided with the rows; one of the tensor (0-d) serves all parts.
            share = total[part] if total is not None and total.dim() else total
            out[part] = _fake_rows(rows[part], fmt, share, generator)
    return as_dtype(out, x.dtype).view(x.shape).to(dtype)


def _fake_rows(rows: Tensor, fmt: Format, total: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """``rows`` [R, C] in fp32, quantised and dequantised; ``total`` 0-d or [R, 1]."""
    # With one-dimensional blocks there is one strip, and usually one piece: nothing is concatenated then.
    strips = []
    for strip in split(rows, -2, fmt.block_rows):
        parts = [_fake_piece(piece, fmt, total, generator) for piece in split(strip, -1, fmt.group)]
        strips.append(parts[0] if len(parts) == 1 else torch.cat(parts, -1))
    return strips[0] if len(strips) == 1 else torch.cat(strips, -2)


def _fake_piece(piece: Tensor, fmt: Format, total: Tensor | None, generator: torch.Generator | None) -> Tensor:
    x, dims = in_blocks(piece, fmt)  # [R, G, group] or [R / block_rows, block_rows, G, group]
    share = spread(total)
    coded = quantize_blocks(x, fmt, dims, share, noise_like(x, fmt, generator))
    return restore_outliers(dequantize_blocks(coded, fmt, share), x, coded).reshape(piece.shape)


def as_rows(x: Tensor, fmt: Format) -> Tensor:
    """``x`` in fp32 as the matrix [R, C] whose rows are divided into groups."""
    # fp32 tensors are not copied: the arithmetic never writes to its input.
    return x.float().reshape(as_rows_shape(x.shape, fmt))


def as_rows_shape(shape: torch.Size, fmt: Format) -> tuple[int, int]:
    """Rows and columns of a tensor of ``shape`` in this format."""
    count = shape.numel()
    if fmt.flatten:
        # Where whole groups fill the tensor, a row is a group, so that large tensors can be divided by rows.
        return (count // fmt.group, fmt.group) if count % fmt.group == 0 else (1, count)
    return (count // shape[-1], shape[-1]) if shape else (1, 1)


def as_dtype(out: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast the fp32 result. A value near the largest of fp16 can be rounded up beyond it (the scale is a power of two):
    it saturates instead of becoming infinite."""
    if dtype == torch.float16:
        out = out.clamp_(-LARGEST["fp16"], LARGEST["fp16"])
    return out.to(dtype)


def noise_like(x: Tensor, fmt: Format, generator: torch.Generator | None) -> Tensor | None:
    """Uniform fp32 numbers in [0, 1) of the shape of ``x`` for stochastic rounding; None for rounding to nearest."""
    if fmt.rounding == "nearest":
        return None
    # One number per entry, in the order of the entries: the same seed gives the same result on the same device.
    return torch.rand(x.shape, dtype=torch.float32, device=x.device, generator=generator)


def split(x: Tensor, dim: int, size: int) -> Iterator[Tensor]:
    """Views of ``x``: the part along ``dim`` that whole groups of ``size`` fill, and the remainder; 0 is all of it."""
    # Two pieces at most, so that every piece can be viewed as blocks of equal size.
    whole = x.shape[dim] // size * size if size else x.shape[dim]
    if whole:
        yield x.narrow(dim, 0, whole)
    if whole < x.shape[dim]:
        yield x.narrow(dim, whole, x.shape[dim] - whole)


def in_blocks(piece: Tensor, fmt: Format) -> tuple[Tensor, tuple[int, ...]]:
    """A piece [R, C] as blocks, and the dimensions that share a scale.

    [R, C] becomes [R, C / group, group] with dimensions (-1,), or, with two-dimensional blocks,
    [R / block_rows, block_rows, C / group, group] with dimensions (-3, -1). A piece narrower than a group is one block.
    """
    # Views: `piece` may be a slice of a row, whose strides unflatten keeps.
    x = torch.unflatten(piece, -1, (-1, min(fmt.group or piece.shape[-1], piece.shape[-1])))
    if fmt.block_rows == 1:
        return x, (-1,)
    return torch.unflatten(x, 0, (-1, min(fmt.block_rows, piece.shape[0]))), (-3, -1)


def spread(total: Tensor | None) -> Tensor | None:
    """A tensor scale in the shape that broadcasts over blocks: [R, 1] becomes [R, 1, 1]; 0-d stays."""
    return total.unsqueeze(-1) if total is not None and total.dim() else total


# ---- the CPU kernel ----
#
# The plain code serves where the kernel does not: stochastic rounding, two-dimensional blocks, fp16 tensors, 16-bit
# scales, E3M0, and installations without the compiled library.

_PLAIN_TYPES = (Tensor, Parameter)  # a DTensor, or a fake tensor, has a type of its own
# The formats that are compared with the plain code before the kernel is first used. Together they have every rule of
# scales, groups and outliers.
_CHECKED_FORMATS = ("fp4-official", "int4-weight-official", "e2m1", "int4", "fp8", "mxfp4", "nvfp4", "nvfp4-row")
_checked = False
_problem: str | None = None  # the result of the comparison; None where kernel and plain code agree


def kernel_serves(x: Tensor, fmt: Format, dtype: torch.dtype) -> bool:
    """Whether the kernel quantises ``x`` to this format with a result in ``dtype``."""
    return _supported(x, fmt, dtype) and cpu_quant.ready() and _trusted()


def _supported(x: Tensor, fmt: Format, dtype: torch.dtype) -> bool:
    # The dtype of the result is that of x, or the bf16 of autocast. E3M0 (mantissa 0) has a rounding of its own.
    return (
        x.device.type == "cpu"
        and type(x) in _PLAIN_TYPES
        and x.dtype in cpu_quant.DTYPES
        and dtype in (x.dtype, torch.bfloat16)
        and fmt.rounding == "nearest"
        and fmt.block_rows == 1
        and fmt.scale in cpu_quant.SCALES
        and fmt.outliers <= cpu_quant.MOST_OUTLIERS
        and fmt.spec.mantissa != 0
    )


@cpu_quant.constant_result
def _trusted() -> bool:
    """Whether the kernel reproduces the plain code on this machine.

    The comparison runs once, before the kernel is first used; a difference warns once, and the plain code serves.
    """
    global _checked, _problem
    # Under a tracer or a dispatch mode the comparison would be recorded into the user's graph: wait for a plain call.
    if not _checked and not under_observation():
        _checked, _problem = True, "it is being checked"  # until the result is known, the plain code serves
        apart = kernel_differences(_CHECKED_FORMATS)
        worst = max(apart, key=lambda name: apart[name][0])
        _problem = apart[worst][1]
        if _problem is not None:
            warnings.warn(
                f"the kernel for low-bit formats (cpu {chosen()}, {worst}) {_problem}; the plain code serves instead "
                "(see evenstep doctor --check)",
                stacklevel=2,
            )
    return _problem is None


def kernel_differences(names: Iterable[str] = tuple(FORMATS)) -> dict[str, tuple[float, str | None]]:
    """Compare kernel and plain code on a small tensor.

    Returns, by name of a format that the kernel supports, the largest absolute difference (0 where all is well) and a
    description of the problem (None where all is well).
    """
    # Deterministic values without the random generator, whose state belongs to the user; one outlier; 80 columns, so
    # that groups of 32 leave a shorter one at the end.
    x = torch.arange(1, 1 + 6 * 80, dtype=torch.float64, device="cpu").square_().mul_(0.7).sin_().float().view(6, 80)
    x[1, 2] = 1e4
    found = {}
    for name in names:
        fmt = FORMATS[name]
        if not cpu_quant.ready() or not _supported(x, fmt, x.dtype):
            continue
        width = as_rows_shape(x.shape, fmt)[1]
        try:
            # Any exception counts as a problem of the kernel: the plain code can serve instead.
            ours = kernel_fake_quantize(x, width, fmt, x.dtype, None)
            apart = (ours - plain(x, fmt, None, x.dtype)).abs().amax().item()
            problem = f"differs from the plain code by {apart:.2g}" if apart else None
        except Exception as error:
            apart, problem = float("inf"), f"raises {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        found[name] = apart, problem  # a NaN difference is truthy, and is a problem
    return found


def kernel_fake_quantize(x: Tensor, width: int, fmt: Format, dtype: torch.dtype, after: Tensor | None) -> Tensor:
    """Quantise and dequantise ``x`` (at least one entry) as rows of ``width`` by the kernel; its own shape, ``dtype``.

    The operator depends on ``after``, so that a compiler cannot call it before that tensor exists.
    """
    # Integers only, because an operator's schema has no place for a Format.
    grid = fmt.spec
    plan = [  # the order of cpu_quant.FIELDS
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
    return cast(Tensor, torch.ops.evenstep.cpu_fake_quantize(x, width, plan, float(grid.top), dtype, after))
