"""Named tensors in and out of a checkpoint's shards, by torch.distributed.checkpoint.

The tensors of the model are ``model.NAME``, those of the optimizer ``optimizer.NAME.ENTRY``; what a state holds
that is no tensor of a parameter, and the options of the groups, go into trainer.pt.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evenstep.baselines.state_size import tensors_in
from evenstep.errors import EvenstepError
from evenstep.models.hf import require_safetensors
from evenstep.optim.distributed import is_sharded, local
from evenstep.optim.state import keep_dtypes
from evenstep.train.packed import blank, facts_of, taken_apart


def quiet_dcp() -> None:
    """torch.distributed.checkpoint warns at each use by a single process, which is what is meant."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def reader(directory: Path) -> Any:
    """torch's reader of the shards in ``directory``."""
    require_safetensors()
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    quiet_dcp()
    return HuggingFaceStorageReader(str(directory))


def write(directory: Path, tensors: dict[str, Tensor], group: Any) -> None:
    """Write ``tensors`` into shards in ``directory``, each process of ``group`` (None: this one alone) its parts."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    quiet_dcp()
    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)


def _metadata(directory: Path) -> dict[str, Any]:
    """Shape and dtype of every tensor in the shards. EvenstepError when one cannot be read, or its parts do not cover
    it."""
    try:
        found = reader(directory).read_metadata().state_dict_metadata
    except Exception as problem:  # safetensors raises a type of its own
        raise EvenstepError(f"the shards in {directory} cannot be read: {problem}") from None
    for name, facts in found.items():
        here = {chunk.offsets: chunk.sizes.numel() for chunk in facts.chunks}
        if sum(here.values()) != facts.size.numel():
            raise EvenstepError(f"the shards in {directory} hold only a part of {name}; a shard is missing")
    return found


def fill(directory: Path, tensors: dict[str, Tensor], *, single: bool = False) -> None:
    """Read the shards into ``tensors``, in place; DTensors get their own parts. ``single``: this process reads alone,
    whatever others do. EvenstepError for what is missing or of another shape."""
    import torch.distributed.checkpoint as dcp

    known = _metadata(directory)
    for name, tensor in tensors.items():
        if name not in known:
            raise EvenstepError(f"the checkpoint {directory} holds no {name}; it is of another model or optimizer")
        if known[name].size != tensor.shape:
            raise EvenstepError(
                f"the checkpoint {directory} holds {name} as {list(known[name].size)}, wanted is {list(tensor.shape)}"
            )
    try:
        dcp.load(tensors, storage_reader=reader(directory), no_dist=single or not _distributed())
    except (Exception, dcp.api.CheckpointException) as problem:
        raise EvenstepError(f"the shards in {directory} cannot be read: {str(problem).splitlines()[-1]}") from None


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def read_whole(directory: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose key starts with ``prefix``, by the rest of it, whole and on the CPU."""
    wanted = {name: facts for name, facts in _metadata(directory).items() if name.startswith(prefix)}
    if not wanted:
        raise EvenstepError(f"the shards in {directory} hold nothing named {prefix}...")
    tensors = {name: torch.empty(facts.size, dtype=facts.properties.dtype) for name, facts in wanted.items()}
    fill(directory, tensors, single=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


# ---- of a model and its optimizer ----


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """By key, sharing their memory; a tied weight under the first of its names alone."""
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in model.named_parameters()}
    return {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items() if name not in tied}


def _names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """The parameters in the optimizer's order."""
    known = {id(p): name for name, p in model.named_parameters()}
    return [known[id(p)] for group in optimizer.param_groups for p in group["params"]]


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the state by key, sharing their memory, and the rest of ``optimizer.state_dict()``: ``groups``
    (options, and the names of the parameters), ``values`` (what is no tensor, by name and entry), ``packed`` (tensors
    of codes and scales, by name and entry), ``loose`` (state that belongs to no parameter) and ``more`` (keys beside
    ``state`` and ``param_groups``).

    EvenstepError for state that a checkpoint cannot hold.
    """
    names, saved = _names(model, optimizer), optimizer.state_dict()
    params = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {}
    held: set[int] = set()
    rest: dict[str, Any] = {"groups": [], "values": {}, "packed": {}, "loose": {}, "more": {}}
    for i, state in saved["state"].items():
        if not _is_of_parameter(i, names):
            rest["loose"][i] = state
            continue
        name = names[i]
        for entry, value in state.items():
            key = f"optimizer.{name}.{entry}"
            if not isinstance(value, Tensor):
                if is_sharded(params[name]) and next(tensors_in(value), None) is not None:
                    raise EvenstepError(
                        f"the state '{entry}' of {name} holds tensors inside a {type(value).__name__}, of which every "
                        "process has others; a checkpoint of several processes cannot hold it: take parallel.mode ddp"
                    )
                rest["values"].setdefault(name, {})[entry] = value
            elif (facts := facts_of(value)) is not None:
                rest["packed"].setdefault(name, {})[entry] = facts
                tensors |= {f"{key}.{part}": tensor for part, tensor in taken_apart(value).items()}
            else:
                # What is one tensor for all parameters, as the statistics of a global norm, is written for each:
                # safetensors refuses keys that share memory.
                tensors[key] = value.detach().clone() if id(value) in held else value.detach()
                held.add(id(value))
    rest["groups"] = [{**group, "params": [names[i] for i in group["params"]]} for group in saved["param_groups"]]
    rest["more"] = {key: value for key, value in saved.items() if key not in ("state", "param_groups")}
    return tensors, rest


def _is_of_parameter(key: Any, names: list[str]) -> bool:
    return type(key) is int and 0 <= key < len(names)


def load_optimizer(model: nn.Module, optimizer: Optimizer, directory: Path, rest: dict[str, Any]) -> None:
    """Put a saved state back, whatever number of processes wrote it; ``rest`` as `optimizer_tensors` gave it. Groups
    may be cut otherwise: each parameter gets the options it had."""
    names, fresh = _names(model, optimizer), optimizer.state_dict()
    params = dict(model.named_parameters())
    present = {name: fresh["state"].get(i, {}) for i, name in enumerate(names)}
    packed = rest.get("packed", _packed(present))
    wanted: dict[str, Tensor] = {}
    state: dict[Any, dict[str, Any]] = {}
    entries = _entries(directory, names)
    for i, name in enumerate(names):
        here = state[i] = dict(rest["values"].get(name, {}))
        parts: set[str] = set()
        for entry, facts in packed.get(name, {}).items():
            value = blank(params[name], facts)
            found = (
                {f"{entry}.{part}": tensor for part, tensor in taken_apart(value).items()} if value is not None else {}
            )
            if value is None or not found.keys() <= entries.get(name, {}).keys():
                raise EvenstepError(
                    f"the 8-bit state of {name} in {directory} is cut for another number of processes; resume "
                    "with as many as saved it"
                )
            here[entry] = value
            parts |= found.keys()
            wanted |= {f"optimizer.{name}.{key}": tensor for key, tensor in found.items()}
        for entry, (shape, dtype) in entries.get(name, {}).items():
            if entry not in parts:
                target = _target(params[name], present[name].get(entry), shape, dtype)
                here[entry] = wanted[f"optimizer.{name}.{entry}"] = target
    fill(directory, wanted)
    options = {name: group for group in rest["groups"] for name in group["params"]}
    groups = []
    for group in fresh["param_groups"]:
        old = options[names[group["params"][0]]]
        groups.append({**old, "params": group["params"]})
    state = {i: entries for i, entries in state.items() if entries} | rest.get("loose", {})
    saved = {**rest.get("more", {}), "state": state, "param_groups": groups}
    optimizer.load_state_dict(saved)
    keep_dtypes(optimizer, saved)


def _packed(present: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What an older checkpoint does not say: the packed tensors that a fresh state has."""
    found = {name: {entry: facts_of(value) for entry, value in state.items()} for name, state in present.items()}
    return {name: {entry: facts for entry, facts in state.items() if facts} for name, state in found.items()}


def _target(p: Tensor, present: Any, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Where a plain tensor of the state of ``p`` is read to."""
    if isinstance(present, Tensor) and present.shape == shape and facts_of(present) is None:
        return present.detach()
    if shape == p.shape and shape:
        return torch.zeros_like(p.detach(), dtype=dtype)
    return torch.zeros(shape, dtype=dtype, device=local(p).device)


def _entries(directory: Path, names: list[str]) -> dict[str, dict[str, tuple[torch.Size, torch.dtype]]]:
    found: dict[str, dict[str, tuple[torch.Size, torch.dtype]]] = {}
    known = set(names)
    for key, facts in _metadata(directory).items():
        if not key.startswith("optimizer."):
            continue
        parts = key.removeprefix("optimizer.").split(".")
        cut = next((k for k in range(len(parts) - 1, 0, -1) if ".".join(parts[:k]) in known), None)
        if cut is None:
            raise EvenstepError(f"the checkpoint {directory} holds {key}, and the model has no such parameter")
        found.setdefault(".".join(parts[:cut]), {})[".".join(parts[cut:])] = (facts.size, facts.properties.dtype)
    return found
