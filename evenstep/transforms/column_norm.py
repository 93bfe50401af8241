"""SCALE's normalisation: each row (or column) of a matrix is divided by its own norm (arXiv:2506.16659)."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from evenstep.transforms.blocks import BLOCK, splittable

FLOOR = 1e-8
"""Smallest norm that is divided by (official code)."""


def row_blocks(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching groups of rows of tensors of one shape, small enough to stay in cache where splitting is possible."""
    if splittable(*matrices):
        rows = max(BLOCK // max(matrices[0][0].numel(), 1), 1)
        yield from zip(*(x.split(rows) for x in matrices), strict=True)
    else:
        yield matrices


def row_norms(g: Tensor, count: int, norm: str) -> Tensor:
    """The norm of each row, all dimensions but the first taken together, in a shape that divides ``g``.

    ``"rms"`` is the root mean square over ``count`` entries (the official code; published learning rates belong to it),
    ``"l2"`` the paper's text.
    """
    low, high = torch.aminmax(g) if g.numel() else (g.new_zeros(()), g.new_zeros(()))
    # Squares are taken in units of the largest entry, so that they neither overflow nor vanish.
    unit = torch.maximum(-low, high).clamp(min=torch.finfo(g.dtype).tiny)
    size = torch.linalg.vector_norm(g / unit, dim=tuple(range(1, g.dim())), keepdim=True) * unit
    return floored(size, count, norm)


def squared_norms(pieces: Iterable[Tensor], read: Callable[[Tensor], Tensor], over: int) -> Tensor:
    """Squared norms in fp64 of the rows (``over=1``) or, over the rows of all pieces, of the columns (``over=0``)."""
    found = [read(piece).double().square_() for piece in pieces]
    if over == 0:
        return torch.stack([squares.sum(0, keepdim=True) for squares in found]).sum(0)
    return torch.cat([squares.sum(tuple(range(1, squares.dim())), keepdim=True) for squares in found])


def floored(size: Tensor, count: int, norm: str) -> Tensor:
    """A 2-norm over ``count`` entries as the norm of that name, at least `FLOOR`."""
    return (size / math.sqrt(max(count, 1)) if norm == "rms" else size).clamp(min=FLOOR)
