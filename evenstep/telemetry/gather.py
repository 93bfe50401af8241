"""Entries of many tensors on a GPU, read by one kernel for each dtype. Imports triton.

``torch.take`` is a launch for each tensor, and a model has hundreds of them. Here a table on the device holds the
addresses of the tensors, and each program of a launch reads the entries of one tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from evenstep.kernels.interface import capturing, is_plain, stream, uploaded

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
BLOCK = 128


def can_gather(tensors: Sequence[Tensor | None], device: torch.device) -> bool:
    """Whether `gathered` reads these tensors: whole and contiguous in the memory of ``device``, in at most 32 bits."""
    return all(
        x is None or (is_plain(x) and x.device == device and x.dtype in TYPES and x.is_contiguous()) for x in tensors
    )


def gathered(tensors: Sequence[Tensor | None], where: Tensor) -> Tensor:
    """Entries ``where`` [k, n] (int64, positions in the flattened tensor) of ``k`` tensors, fp32 [k, n].

    A row of None is NaN. Positions are not checked.
    """
    out = torch.full(where.shape, torch.nan, dtype=torch.float32, device=where.device)
    rows: dict[torch.dtype, list[int]] = {}
    for i, x in enumerate(tensors):
        if x is not None and x.numel():
            rows.setdefault(x.dtype, []).append(i)
    n = where.shape[1]
    with torch.cuda.device(where.get_device() if where.is_cuda else -1):
        for dtype, members in rows.items():
            found = tuple(tensors[i].data_ptr() for i in members)  # type: ignore[union-attr]
            make = _table.__wrapped__ if capturing(where.device) else _table
            table = make(found, tuple(members), where.device, stream(where.device))
            grid = (len(members), triton.cdiv(n, BLOCK))
            _gather[grid](table, where, out, len(members), n, DTYPE=TYPES[dtype], BLOCK=BLOCK)
    return out


@functools.lru_cache(maxsize=16)
def _table(addresses: tuple[int, ...], rows: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """Addresses and rows, int64 [2, members]. Gradients usually keep their addresses, so that a step copies nothing."""
    # Addresses are unsigned, and some machines use the highest bit.
    signed = [address - (1 << 64 if address >> 63 else 0) for address in addresses]
    return uploaded(torch.tensor([signed, rows], dtype=torch.int64), device)


@triton.jit(do_not_specialize=["members", "n"])  # type: ignore[untyped-decorator]
def _gather(table: Any, where: Any, out: Any, members: Any, n: Any, DTYPE: tl.constexpr, BLOCK: tl.constexpr) -> None:
    member = tl.program_id(0)
    x = tl.load(table + member).to(tl.pointer_type(DTYPE))
    row = tl.load(table + members + member)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    at = tl.load(where + row * n + column, mask=inside, other=0)
    tl.store(out + row * n + column, tl.load(x + at, mask=inside, other=0.0).to(tl.float32), mask=inside)
