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
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evenstep.optim.distributed import plain_parts
from evenstep.optim.stabilize import Stabilized
from evenstep.telemetry.subject import bare


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
        self._optimizer = optimizer = bare(optimizer)
        self._tensors = [_Saved(x) for x in (*model.parameters(), *model.buffers())]
        self._states = [_saved(state) for state in _states(optimizer)]
        self._dicts = [(one, _saved(one.state_dict())) for one in data]
        self._random = rng_state()
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
        for group, kept in zip(self._optimizer.param_groups, self._groups, strict=True):
            _replace(group, {"params": group["params"], **_restored(kept)})
        for state, kept in zip(_states(self._optimizer), self._states, strict=True):
            _replace(state, _restored(kept))
        for one, kept in self._dicts:
            one.load_state_dict(copy.deepcopy(_restored(kept)))
        set_rng_state(self._random)


class _Saved:
    """A tensor and copies of its plain parts: the shard of a DTensor, the codes and scales of a quantised one."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.parts = [*plain_parts(tensor)]
        self.copies = [_host_copy(part) for part in self.parts]

    def put_back(self) -> Tensor:
        # A module may have replaced the storage of a parameter (p.data = ...): the parts are looked up again.
        for part, kept in zip(plain_parts(self.tensor), self.copies, strict=True):
            part.copy_(kept, non_blocking=True)
        return self.tensor


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


def _states(optimizer: Any) -> Iterator[dict[Any, Any]]:
    """The dicts in which an optimizer keeps its state: its own, or those of the optimizers that it consists of, and the
    statistics that `stabilize` keeps beside the state of the optimizer behind it."""
    if isinstance(optimizer, Stabilized):
        yield optimizer.statistics
        yield from _states(optimizer.base)
    elif isinstance(getattr(optimizer, "optimizers", None), list | tuple):  # its own `state` is put together anew
        for one in optimizer.optimizers:
            yield from _states(one)
    else:
        yield optimizer.state


def rng_state() -> dict[str, Any]:
    """Every random state of the process, in types that ``torch.load(weights_only=True)`` reads."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(np.array(keys, dtype=np.int64)), position, has_gauss, cached],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the generators of Python, NumPy and torch. Those of GPUs only if their number is the same."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
