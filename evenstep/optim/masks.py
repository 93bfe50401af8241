"""Random masks of an exact size, one bit per entry, for SPAM's sparse momentum."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T", Tensor, Tensor | None)

CHUNK = 1 << 20
"""Entries drawn at a time, so that a mask over a tensor of any size needs only a few megabytes."""


def draw_mask(n: int, density: float, seed: tuple[int, ...]) -> Tensor:
    """``round(density * n)`` of ``n`` entries, all subsets equally likely, as packed bits (uint8 CPU tensor of ``ceil(n
    / 8)``).

    Equal seeds give equal masks on every machine and rank; no global random state is read or changed. The number of
    entries in each chunk is drawn first (hypergeometric), then the entries within it.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    left, parts = round(density * n), []
    for start in range(0, n, CHUNK):
        size = min(CHUNK, n - start)
        after = n - start - size
        # NumPy's hypergeometric takes populations below 1e9; beyond that the draw is a binomial to within 1e-9.
        if n - start < 10**9:
            kept = int(rng.hypergeometric(left, n - start - left, size))
        else:
            kept = int(np.clip(rng.binomial(size, left / (n - start)), left - after, min(left, size)))
        chunk = np.zeros(size, dtype=bool)
        chunk[rng.permutation(size)[:kept]] = True
        parts.append(np.packbits(chunk, bitorder="little"))
        left -= kept
    return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint8))


def pack(mask: Tensor) -> Tensor:
    """A bool tensor as packed bits, in the order of the flattened tensor, on the same device."""
    return torch.from_numpy(np.packbits(mask.detach().reshape(-1).cpu().numpy(), bitorder="little")).to(mask.device)


def unpack(bits: Tensor, n: int) -> Tensor:
    """The first ``n`` bits as a flat bool tensor."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(1) >> shifts) & 1).view(-1)[:n].bool()


def taken(tensors: Sequence[T], where: list[Tensor | None]) -> list[T]:
    """The entries ``where`` of each tensor, flat; all of it where that is None."""
    return [
        x if x is None or entries is None else torch.take(x, entries) for x, entries in zip(tensors, where, strict=True)
    ]


def put_back(tensors: Sequence[T], values: Sequence[T], where: list[Tensor | None]) -> None:
    """What was `taken`, back into the tensors."""
    for x, some, entries in zip(tensors, values, where, strict=True):
        if x is not None and some is not None and entries is not None:
            flat = x.reshape(-1).index_copy_(0, entries, some)  # put_ has no deterministic form
            if not x.is_contiguous():
                x.copy_(flat.view(x.shape))
