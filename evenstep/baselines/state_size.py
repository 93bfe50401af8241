"""Bytes that an optimizer keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The plain tensors inside a state: in containers, in tensor subclasses (the ones they are made of), and in objects
    such as the projectors of low-rank optimizers."""
    if isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):
        inner = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
        yield from tensors_in([x for x in inner if isinstance(x, Tensor)])  # a DTensor also names its mesh
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dict__") and not isinstance(value, type | torch.nn.Module):
        yield from tensors_in(vars(value))


def state_bytes(state: Any, beside: Iterable[Tensor] = ()) -> int:
    """Bytes of the memory behind all tensors in ``state`` (the parts of sharded ones that are here), shared memory
    counted once, that of ``beside`` (parameters, gradients) not at all."""
    others = {_memory(tensor) for one in beside for tensor in tensors_in(one)}
    storages = {_memory(tensor): tensor.untyped_storage() for tensor in tensors_in(state)}
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in others)


def _memory(tensor: Tensor) -> tuple[bool, int]:
    """What tells the memory of a tensor from that of another; on the meta device, where none has an address, the
    storage does."""
    storage = tensor.untyped_storage()
    return (True, storage._cdata) if tensor.is_meta else (False, storage.data_ptr())
