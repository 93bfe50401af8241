"""Copies of a training's state in host memory, to go back to.

A snapshot holds the parameters and buffers of a model, the state and the param groups of an optimizer, the random
states of the process, and the ``state_dict()`` of data loaders, learning-rate schedulers
and the like. `Snapshot.restore` writes the saved values into the tensors that the model and the optimizer hold, so that
references to them, CUDA graphs among them, stay valid; the values are the same bits.

On a CUDA device the copies go into pinned memory and run beside the next forward pass; `restore` waits for them. Each
process holds its own shards and its own random states, so all processes have to take and restore snapshots at the same
steps.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from evenstep.optim.distributed import local


class Snapshot:
    """The state of a training at one step.

    Args:
        step: the number of steps taken so far.
        model: its parameters and buffers are copied, those that ``state_dict()`` leaves out included.
        optimizer: its state and its groups are copied, and the statistics of the transforms in front of it
            (`evenstep.stabilize`).
        data: objects with ``state_dict()`` and ``load_state_dict()`` that say which data comes next.

    Memory: as much host memory as the model and the optimizer's state take on the device.
    """

    def __init__(self, step: int, model: nn.Module, optimizer: Optimizer, data: Iterable[Any] = ()) -> None:
        self.step = step
        self.is_complete = False
        self._optimizer = optimizer
        self._tensors = [_Saved(x) for x in (*model.parameters(), *model.buffers())]
        self._state = _saved(dict(optimizer.state))
        self._statistics = [(owner, _saved(dict(owner))) for owner in _statistics(optimizer)]
        self._dicts = [(one, _saved(one.state_dict())) for one in data]
        self._random = _random_state()
        self._copied = {
            device: torch.cuda.current_stream(device).record_event()
            for device in {part.device for saved in self._tensors for part in saved.parts if part.is_cuda}
        }

    def complete(self, schedulers: Iterable[Any]) -> None:
        """Add the param groups and ``schedulers``, objects with ``state_dict()`` and ``load_state_dict()``: a training
        loop changes them between the optimizer's step and the next forward pass."""
        groups = self._optimizer.param_groups
        self._groups = [{key: _saved(value) for key, value in g.items() if key != "params"} for g in groups]
        self._dicts += [(one, _saved(one.state_dict())) for one in schedulers]
        self.is_complete = True

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back. The snapshot stays as it is and can be restored again."""
        for event in self._copied.values():
            event.synchronize()
        for saved in self._tensors:
            saved.put_back()
        _replace(self._optimizer.state, _restored(self._state))
        for group, kept in zip(self._optimizer.param_groups, self._groups, strict=True):
            _replace(group, {"params": group["params"], **_restored(kept)})
        for owner, kept in self._statistics:
            _replace(owner, _restored(kept))
        for one, kept in self._dicts:
            one.load_state_dict(copy.deepcopy(_restored(kept)))
        _set_random_state(self._random)


class _Saved:
    """A tensor and copies of its plain parts: the shard of a DTensor, the codes and scales of a quantised one."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.parts = _parts(tensor)
        self.copies = [_host_copy(part) for part in self.parts]

    def put_back(self) -> Tensor:
        # A module may have replaced the storage of a parameter (p.data = ...): the parts are looked up again.
        self.parts = _parts(self.tensor)
        for part, kept in zip(self.parts, self.copies, strict=True):
            part.copy_(kept, non_blocking=True)
        return self.tensor


def _parts(tensor: Tensor) -> list[Tensor]:
    x: Any = local(tensor.detach())
    if not is_traceable_wrapper_subclass(x):
        return [x]
    names, _ = x.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(x, name))]


def _host_copy(x: Tensor) -> Tensor:
    if not x.is_cuda:
        return x.clone()
    return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)


# Nested dicts, lists and tuples of tensors and plain values.


def _saved(x: Any) -> Any:
    if isinstance(x, Tensor):
        return _Saved(x)
    if isinstance(x, Mapping):
        return {key: _saved(value) for key, value in x.items()}
    if type(x) in (list, tuple):
        return type(x)(_saved(value) for value in x)
    return copy.deepcopy(x)


def _restored(x: Any) -> Any:
    if isinstance(x, _Saved):
        return x.put_back()
    if isinstance(x, Mapping):
        return {key: _restored(value) for key, value in x.items()}
    if type(x) in (list, tuple):
        return type(x)(_restored(value) for value in x)
    return copy.deepcopy(x)


def _replace(target: dict[Any, Any], content: Mapping[Any, Any]) -> None:
    """Give ``target`` the ``content``, in place: others hold references to it."""
    target.clear()
    target.update(content)


def _statistics(optimizer: Any) -> list[dict[Any, Any]]:
    """The statistics of the transforms in front of an optimizer, which `stabilize` keeps beside its state."""
    found = []
    while isinstance(optimizer, Optimizer):
        statistics = vars(optimizer).get("chain")
        if statistics is not None:
            found.append(statistics.statistics)
        optimizer = vars(optimizer).get("base")
    return found


def _random_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
