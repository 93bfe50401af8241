"""A random rotation in blocks of 16 along the dimension that a matrix product sums over.

With H the Hadamard matrix of size 16 divided by 4 and D a diagonal of random signs, H D is orthogonal, so (A D H)(B D
H)^T = A B^T; but an outlier of A is spread over its 16 neighbours, where four bits can hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SIZE = 16


def rotate(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``a`` [M, N] and ``b`` [K, N] in fp32, rotated alike along N; zeros are appended where N is no multiple of 16.

    The signs come from torch's global random generator of the device.
    """
    signs = torch.randint(0, 2, (SIZE,), device=a.device, dtype=torch.float32).mul_(2).sub_(1)
    matrix = signs[:, None] * hadamard(SIZE, a.device)
    return _rotated(a, matrix), _rotated(b, matrix)


def _rotated(a: Tensor, matrix: Tensor) -> Tensor:
    a = F.pad(a.float(), (0, -a.shape[1] % SIZE))
    return (a.reshape(-1, SIZE) @ matrix).view(a.shape)


def hadamard(size: int, device: torch.device) -> Tensor:
    """The orthogonal Sylvester-Hadamard matrix, fp32 [size, size]; entry (i, j) has the sign of the parity of i & j."""
    i = torch.arange(size, device=device)
    both, parity = i[:, None] & i[None, :], torch.zeros(size, size, dtype=torch.int64, device=device)
    for bit in range(size.bit_length() - 1):
        parity = parity ^ (both >> bit & 1)
    return (1.0 - 2.0 * parity) / size**0.5
