"""cpu_loss.cpp: the cross entropy of logits on a CPU and its derivative, which takes their place."""

import ctypes
import functools

import torch
from torch import Tensor

from evenstep.kernels.cpu import library, threads
from evenstep.kernels.interface import Unavailable

DTYPES = (torch.float32, torch.bfloat16)  # in the order of ``enum Type``


@functools.cache
def ready() -> bool:
    """Whether the CPU library is there and has this function, which an older build lacks."""
    try:
        return hasattr(library(), "evenstep_cross_entropy")
    except Unavailable:
        return False


def terms(
    logits: Tensor, picked: Tensor, counts: Tensor, z_loss: float, cap: float | None, gradients: bool
) -> tuple[Tensor, Tensor]:
    """`evenstep.models.ops._terms` for contiguous fp32 and bf16 logits on a CPU; ``cap`` is None, as the kernel has no
    soft-cap. IndexError for a target that is not a word."""
    rows, words = logits.shape
    low, high = (int(x) for x in picked.aminmax()) if rows else (0, 0)
    if low < 0 or high >= words:
        raise IndexError(f"a target is {low if low < 0 else high}; targets are 0 to {words - 1}, or -100 for none")
    picked, counts = picked.contiguous(), counts.contiguous()
    sums = torch.empty(2, dtype=torch.float64, device="cpu")
    library().evenstep_cross_entropy(
        ctypes.c_void_p(logits.data_ptr()),
        ctypes.c_int64(DTYPES.index(logits.dtype)),
        ctypes.c_int64(rows),
        ctypes.c_int64(words),
        # Below 2^16 logits, which fit a cache, starting threads costs more than they save.
        ctypes.c_int64(threads() if logits.numel() > 1 << 16 else 1),
        ctypes.c_void_p(picked.data_ptr()),
        ctypes.c_void_p(counts.data_ptr()),
        ctypes.c_double(z_loss),
        ctypes.c_int64(gradients),
        ctypes.c_void_p(sums.data_ptr()),
    )
    return sums.to(torch.float32), logits
