"""Entries of many tensors on a GPU, read by one kernel for each dtype. Imports triton.

``torch.take`` is a launch for each tensor, and a model has hundreds of them. Here a table on the device holds the
addresses of the tensors, and each program of a launch reads the entries of one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from evenstep.kernels.cuda_launch import addresses
from evenstep.kernels.interface import is_plain

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
            # Gradients usually keep their addresses, so that a step copies nothing.
            found = [tensors[i].data_ptr() for i in members]  # type: ignore[union-attr]
            table = addresses([found, members], where.device)  # int64 [2, members]: addresses, and rows of the result
            grid = (len(members), triton.cdiv(n, BLOCK))
            _gather[grid](table, where, out, len(members), n, DTYPE=TYPES[dtype], BLOCK=BLOCK)
    return out


@triton.jit(do_not_specialize=["members", "n"])  # type: ignore[untyped-decorator]
def _gather(table: Any, where: Any, out: Any, members: Any, n: Any, DTYPE: tl.constexpr, BLOCK: tl.constexpr) -> None:
    member = tl.program_id(0)
    x = tl.load(table + member).to(tl.pointer_type(DTYPE))
    row = tl.load(table + members + member)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    at = tl.load(where + row * n + column, mask=inside, other=0)
    tl.store(out + row * n + column, tl.load(x + at, mask=inside, other=0.0).to(tl.float32), mask=inside)
