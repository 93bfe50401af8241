"""Named tensors in and out of a checkpoint's shards, by torch.distributed.checkpoint.

The tensors of the model are ``model.NAME``, those of the optimizer ``optimizer.NAME.ENTRY``; the numbers of a state
that are no tensors, and the options of the groups, go into trainer.pt.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evenstep.errors import EvenstepError
from evenstep.models.hf import require_safetensors
from evenstep.optim.sharding import like, local

_BLOCKS = ("codes", "scale")
"""The parts of torchao's tensors of 8-bit blocks that change; each is a tensor of its own in a shard."""


def quiet_dcp() -> None:
    """torch.distributed.checkpoint warns at each use by a single process, which is what is meant."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def reader(directory: Path) -> Any:
    """torch's reader of the shards in ``directory``."""
    require_safetensors()
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    quiet_dcp()
    return HuggingFaceStorageReader(str(directory))


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
    """By key, sharing their memory."""
    return {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}


def _names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """The parameters in the optimizer's order."""
    known = {id(p): name for name, p in model.named_parameters()}
    return [known[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _split(value: Tensor) -> dict[str, Tensor]:
    """``value`` as the plain tensors it is made of, by the end of their key."""
    part = local(value)
    if hasattr(part, "codes") and hasattr(part, "qmap"):
        return {f".{name}": like(value, getattr(part, name)) for name in _BLOCKS}
    return {"": value.detach()}


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the state by key, sharing their memory, and the rest of it: ``groups`` (options, and the names of
    the parameters) and ``values`` (numbers by name and entry)."""
    names, saved = _names(model, optimizer), optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for i, state in saved["state"].items():
        for entry, value in state.items():
            if isinstance(value, Tensor):
                tensors |= {f"optimizer.{names[i]}.{entry}{end}": part for end, part in _split(value).items()}
            else:
                values.setdefault(names[i], {})[entry] = value
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in saved["param_groups"]]
    return tensors, {"groups": groups, "values": values}


def load_optimizer(model: nn.Module, optimizer: Optimizer, directory: Path, rest: dict[str, Any]) -> None:
    """Put a saved state back, whatever number of processes wrote it; ``rest`` as `optimizer_tensors` gave it. Groups
    may be cut otherwise: each parameter gets the options it had."""
    names, fresh = _names(model, optimizer), optimizer.state_dict()
    params = dict(model.named_parameters())
    wanted: dict[str, Tensor] = {}
    state: dict[int, dict[str, Any]] = {}
    entries = _entries(directory, names)
    for i, name in enumerate(names):
        here = state[i] = dict(rest["values"].get(name, {}))
        for entry, (shape, dtype) in entries.get(name, {}).items():
            base, _, end = entry.rpartition(".")
            if end not in _BLOCKS:
                base = entry
            template = fresh["state"].get(i, {}).get(base)
            if base != entry:
                if template is None or f".{end}" not in _split(template):
                    raise EvenstepError(
                        f"the 8-bit state of {name} in {directory} is cut for another number of processes; resume "
                        "with as many as saved it"
                    )
                here[base] = template
                wanted[f"optimizer.{name}.{entry}"] = _split(template)[f".{end}"]
                continue
            if template is not None and template.shape == shape:
                target = template.detach()
            elif shape == params[name].shape and shape:
                target = torch.zeros_like(params[name].detach(), dtype=dtype)
            else:
                target = torch.zeros(shape, dtype=dtype, device=local(params[name]).device)
            here[base] = wanted[f"optimizer.{name}.{entry}"] = target
    fill(directory, wanted)
    options = {name: group for group in rest["groups"] for name in group["params"]}
    groups = []
    for group in fresh["param_groups"]:
        old = options[names[group["params"][0]]]
        groups.append({**old, "params": group["params"]})
    optimizer.load_state_dict({"state": {i: s for i, s in state.items() if s}, "param_groups": groups})


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
