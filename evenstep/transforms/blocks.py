"""Reading large tensors a cache-sized piece at a time.

An optimizer step only moves bytes. A chain of elementwise operations over a whole tensor streams it through memory once
per operation; the same chain over pieces that fit in the second-level cache streams it once in all, and its temporaries
stay small.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import Parameter

BLOCK = 1 << 16
"""Entries per piece: 256 KiB in fp32, so that the buffers of an Adam update share a 2 MiB cache (best of 2^13 to 2^17
as measured).
"""


def splittable(*tensors: Tensor) -> bool:
    """Whether taking these tensors apart is possible and helps."""
    first = tensors[0]
    return (
        first.device.type == "cpu"
        and first.numel() > BLOCK
        and not torch.compiler.is_compiling()
        and all(type(t) in (Tensor, Parameter) and t.is_contiguous() for t in tensors)
    )


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield matching pieces (views) of tensors of one size; the tensors themselves where splitting cannot help or is
    not possible.
    """
    if splittable(*tensors):
        yield from zip(*(t.view(-1).split(BLOCK) for t in tensors), strict=True)
    else:
        yield tensors
