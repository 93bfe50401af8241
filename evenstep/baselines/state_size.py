"""The memory of an optimizer's state, in bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The plain tensors inside a state: in containers, in tensor subclasses (their inner tensors), and in objects such
    as the projectors of low-rank optimizers.

    Example:
        >>> [tuple(t.shape) for t in tensors_in({"moments": [torch.zeros(2), torch.zeros(3)], "step": 7})]
        [(2,), (3,)]
    """
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
    """Bytes of the memory of all tensors in ``state``; of sharded tensors, the part in this process.

    Shared memory counts once, and memory that ``beside`` (parameters, gradients) uses does not count.

    Example:
        >>> moment = torch.zeros(10)
        >>> state_bytes({"exp_avg": moment, "view": moment[:5]})
        40
    """
    others = {_memory(tensor) for one in beside for tensor in tensors_in(one)}
    storages = {_memory(tensor): tensor.untyped_storage() for tensor in tensors_in(state)}
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in others)


def _memory(tensor: Tensor) -> tuple[bool, int]:
    """A key of the memory of a tensor: its address, or, on the meta device without addresses, its storage object."""
    storage = tensor.untyped_storage()
    return (True, storage._cdata) if tensor.is_meta else (False, storage.data_ptr())
