"""A whole tensor through a format and back: ``fake_quantize``.

The tensor is cut into pieces whose blocks are all alike (the full groups, and the shorter last one of each row), each
piece is a view in blocks, and ``blocks.py`` does the arithmetic. In eager mode on a CPU a large tensor is done a few
rows at a time, so that the intermediate results stay in the cache. Where there is a kernel for it (``fused.py``), that
does the same in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from evenstep.errors import EvenstepError
from evenstep.lowbit import blocks, fused
from evenstep.lowbit.formats import Format, get_format

CACHE_ENTRIES = 2**17
"""Entries done at a time in eager mode on a CPU: their intermediates fill about two megabytes."""


def fake_quantize(x: Tensor, format: Format | str, generator: torch.Generator | None = None) -> Tensor:
    """``x`` (any floating dtype and shape) rounded to what ``format`` can hold, in its own dtype and shape.

    The gradient passes straight through. ``generator`` is used by stochastic rounding alone (default: torch's global
    one). EvenstepError for an unknown name, and where the format needs more dimensions than x has.
    """
    fmt = check(x, format)
    if x.requires_grad and torch.is_grad_enabled():
        return _StraightThrough.apply(x, fmt, generator)
    return apply(x, fmt, generator)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fmt: Format, generator: torch.Generator | None) -> Tensor:
        return apply(x, fmt, generator)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def check(x: Tensor, format: Format | str) -> Format:
    """The format; EvenstepError where ``x`` cannot be brought into it."""
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
    """``fake_quantize`` without its checks, and without a gradient; then in ``dtype``, if given. ``after``: a tensor
    that is there first, whatever a compiler would like."""
    dtype = dtype or x.dtype
    if not x.numel():
        return x.detach().clone().to(dtype)
    with torch.no_grad():
        if fmt.axis not in (-1, x.dim() - 1) and x.dim():
            return _by_rows(x.movedim(fmt.axis, -1), fmt, generator, dtype, after).movedim(-1, fmt.axis)
        return _by_rows(x, fmt, generator, dtype, after)


def _by_rows(
    x: Tensor, fmt: Format, generator: torch.Generator | None, dtype: torch.dtype, after: Tensor | None
) -> Tensor:
    if fused.serves(x, fmt, dtype):
        return fused.fake_quantize(x, as_rows_shape(x.shape, fmt)[1], fmt, dtype, after)
    return plain(x, fmt, generator, dtype)


def plain(x: Tensor, fmt: Format, generator: torch.Generator | None, dtype: torch.dtype) -> Tensor:
    """``apply`` along the last dimension, without a kernel."""
    rows = as_rows(x, fmt)
    total = blocks.tensor_scale(rows, fmt)
    step = max(1, CACHE_ENTRIES // rows.shape[-1]) if fmt.block_rows == 1 else len(rows)
    if torch.compiler.is_compiling() or not x.is_cpu or len(rows) < 2 * step:
        out = _fake(rows, fmt, total, generator)
    else:
        out = torch.empty_like(rows)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            share = total[part] if total is not None and total.dim() else total
            out[part] = _fake(rows[part], fmt, share, generator)
    return as_dtype(out, x.dtype).view(x.shape).to(dtype)


def as_rows(x: Tensor, fmt: Format) -> Tensor:
    """``x`` in fp32 as a matrix of rows to be grouped; flattened formats have groups for rows where they can."""
    return x.float().reshape(as_rows_shape(x.shape, fmt))


def as_rows_shape(shape: torch.Size, fmt: Format) -> tuple[int, int]:
    """Rows and columns of a tensor of ``shape`` in this format."""
    count = shape.numel()
    if fmt.flatten:
        return (count // fmt.group, fmt.group) if count % fmt.group == 0 else (1, count)
    return (count // shape[-1], shape[-1]) if shape else (1, 1)


def as_dtype(out: Tensor, dtype: torch.dtype) -> Tensor:
    """A power-of-two scale can round a number near fp16's largest up beyond it: that saturates."""
    if dtype == torch.float16:
        out = out.clamp_(-blocks.LARGEST["fp16"], blocks.LARGEST["fp16"])
    return out.to(dtype)


def _fake(rows: Tensor, fmt: Format, total: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """``rows`` [R, C] in fp32, quantised and dequantised."""
    strips = []
    for strip in split(rows, -2, fmt.block_rows):
        parts = [_fake_piece(piece, fmt, total, generator) for piece in split(strip, -1, fmt.group)]
        strips.append(parts[0] if len(parts) == 1 else torch.cat(parts, -1))
    return strips[0] if len(strips) == 1 else torch.cat(strips, -2)


def _fake_piece(piece: Tensor, fmt: Format, total: Tensor | None, generator: torch.Generator | None) -> Tensor:
    x, dims = in_blocks(piece, fmt)
    share = spread(total)
    coded = blocks.encode(x, fmt, dims, share, noise_like(x, fmt, generator))
    return blocks.keep_outliers(blocks.decode(coded, fmt, share), x, coded).reshape(piece.shape)


def noise_like(x: Tensor, fmt: Format, generator: torch.Generator | None) -> Tensor | None:
    if fmt.rounding == "nearest":
        return None
    return torch.rand(x.shape, dtype=torch.float32, device=x.device, generator=generator)


def split(x: Tensor, dim: int, size: int) -> Iterator[Tensor]:
    """Views of ``x``: as many whole groups of ``size`` along ``dim`` as there are, and what is left; 0: all of it."""
    whole = x.shape[dim] // size * size if size else x.shape[dim]
    if whole:
        yield x.narrow(dim, 0, whole)
    if whole < x.shape[dim]:
        yield x.narrow(dim, whole, x.shape[dim] - whole)


def in_blocks(piece: Tensor, fmt: Format) -> tuple[Tensor, tuple[int, ...]]:
    """A piece [R, C] as blocks, and the dimensions that share a scale; a piece narrower than a group is one block."""
    x = piece.unflatten(-1, (-1, min(fmt.group or piece.shape[-1], piece.shape[-1])))
    if fmt.block_rows == 1:
        return x, (-1,)
    return x.unflatten(0, (-1, min(fmt.block_rows, piece.shape[0]))), (-3, -1)


def spread(total: Tensor | None) -> Tensor | None:
    """A tensor scale in the shape that broadcasts over blocks: [R, 1] becomes [R, 1, 1]."""
    return total.unsqueeze(-1) if total is not None and total.dim() else total
