"""SCALE's normalisation: each row (or column) of a matrix is divided by its own norm (arXiv:2506.16659)."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from evenstep.transforms.blocks import BLOCK, splittable

FLOOR = 1e-8
"""Smallest norm that is divided by (official code)."""


def row_blocks(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching groups of rows, small enough to stay in cache, of tensors of one shape seen as (dim 0, rest)."""
    if not splittable(*matrices):
        yield tuple(x.reshape(x.shape[0], -1) if x.dim() > 2 and x.is_contiguous() else x for x in matrices)
        return
    rows = max(BLOCK // max(matrices[0][0].numel(), 1), 1)
    yield from zip(*(x.view(x.shape[0], -1).split(rows) for x in matrices), strict=True)


def row_norms(g: Tensor, norm: str) -> Tensor:
    """The norm of each row, all dimensions but the first taken together, in a shape that divides ``g``.

    ``"rms"`` is the root mean square (the official code; published learning rates belong to it), ``"l2"`` the paper's
    text.
    """
    dims = tuple(range(1, g.dim()))
    unit = _unit(*torch.aminmax(g)) if g.numel() else g.new_ones(())
    size = torch.linalg.vector_norm(g / unit, dim=dims, keepdim=True) * unit
    return _floored(size, g.numel() // max(g.shape[0], 1), norm)


def column_norms(
    pieces: Iterable[Tensor], read: Callable[[Tensor], Tensor], peak: Tensor, rows: int, norm: str
) -> Tensor:
    """The norm of each column over all ``rows``, which come in ``pieces``; ``peak`` is their largest absolute entry."""
    unit = _unit(-peak, peak)
    squares = torch.stack([(read(piece) / unit).square_().sum(0, keepdim=True) for piece in pieces])
    return _floored(squares.sum(0).sqrt() * unit, rows, norm)


def _unit(low: Tensor, high: Tensor) -> Tensor:
    """What squares are measured in, so that they neither overflow nor vanish."""
    return torch.maximum(-low, high).clamp(min=torch.finfo(high.dtype).tiny)


def _floored(size: Tensor, count: int, norm: str) -> Tensor:
    return (size / math.sqrt(max(count, 1)) if norm == "rms" else size).clamp(min=FLOOR)
