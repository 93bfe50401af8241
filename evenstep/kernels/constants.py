"""Small tables of numbers that a step needs on the device of its tensors, brought there once.

A copy of a few numbers to a GPU, made the usual way (``torch.tensor(..., device="cuda")``), waits until the GPU has
done all that it was given before. Here they go through pinned memory without waiting, and stay.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_CAPTURED: list[Tensor] = []
"""Pinned memory that captured CUDA graphs read again at each replay: a few KB per capture, kept for good because a
graph's end cannot be seen from here.
"""


def constant(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values`` as a vector on ``device``. On a GPU it may be one that others have too: never write to it."""
    if torch.compiler.is_compiling():  # fills, which a compiler makes one kernel of; a table would be copied each step
        return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    make = _constant.__wrapped__ if capturing(device) else _constant
    return make(tuple(values), dtype, device, stream(device), _fake_mode())


@functools.lru_cache(maxsize=256)
def _constant(
    values: tuple[float, ...], dtype: torch.dtype, device: torch.device, stream: int, fake_mode: Any
) -> Tensor:
    return uploaded(torch.tensor(values, dtype=dtype, device="cpu"), device)


def uploaded(host: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor's copy on ``device``, without waiting for it. The allocator keeps pinned memory until the copy is
    done."""
    if device.type != "cuda":
        return host.to(device)
    host = torch.empty(host.shape, dtype=host.dtype, device="cpu", pin_memory=True).copy_(host)
    if capturing(device):
        _CAPTURED.append(host)
    return host.to(device, non_blocking=True)


# A table is copied on one stream and would not be seen in time on another; one of a graph is filled when it is replayed
# and must not be used before. So each stream has its own, and a capture makes new ones.


def stream(device: torch.device) -> int:
    """The stream that work on ``device`` goes to now."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" and _fake_mode() is None else 0


def capturing(device: torch.device) -> bool:
    """Whether work on ``device`` becomes part of a CUDA graph."""
    return device.type == "cuda" and _fake_mode() is None and torch.cuda.is_current_stream_capturing()


def under_observation() -> bool:
    """Whether operators now do not simply run: they are traced, have no data, or somebody looks at each of them."""
    return (
        torch.compiler.is_compiling()
        or torch._guards.TracingContext.try_get() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _fake_mode() -> Any:
    """The mode in which tensors have no data, None for the usual one: what is made in one is of no use in another."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
