"""``evenstep inspect``: what a checkpoint holds, and whether it is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evenstep.baselines.catalog import allow_known_state
from evenstep.errors import EvenstepError
from evenstep.train.checkpoint import MANIFEST, TRAINER, file_fault, list_checkpoints, read_manifest, read_trainer


def inspect(path: Path, *, everything: bool, as_json: bool) -> None:
    """Print what the checkpoint ``path`` holds, or the newest one of a run. EvenstepError, after that, when a file of
    it is broken, and for what is neither."""
    checkpoint, others = _checkpoint(path)
    facts = facts_of_checkpoint(checkpoint)
    print(json.dumps(facts, indent=1) if as_json else "\n".join([*_lines(facts, everything), *others]))
    broken = [f"{name} {fault}" for name, fault in facts["faults"].items()]
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise EvenstepError(f"{checkpoint} is not whole: {broken[0]}{more}; resume passes it over")


def _checkpoint(path: Path) -> tuple[Path, list[str]]:
    """The checkpoint, and a line on others of its run."""
    if not path.is_dir():
        raise EvenstepError(f"{path}: no such directory; give a run or one of its checkpoints")
    if (path / MANIFEST).exists():
        return path, []
    found = list_checkpoints(path / "checkpoints")
    if not found:
        raise EvenstepError(f"{path} is neither a checkpoint ({MANIFEST} is missing) nor a run with checkpoints")
    older = ", ".join(other.name for other in found[1:])
    return found[0], ["", f"older ones of this run: {older}"] if older else []


def facts_of_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Everything as plain values: ``step``, ``tokens``, ``world_size``, ``optimizer``, ``files`` and ``tensors`` (by
    name: shape, dtype, bytes), ``faults`` (by file: what is wrong). What cannot be read is None or missing, and is
    among the faults. EvenstepError when the manifest cannot be read."""
    manifest = read_manifest(checkpoint)
    faults = {name: file_fault(checkpoint, name, facts) for name, facts in sorted(manifest["files"].items())}
    found: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "step": manifest["step"],
        "tokens": None,
        "world_size": manifest["world_size"],
        "model": None,
        "optimizer": None,
        "files": {name: facts["bytes"] for name, facts in sorted(manifest["files"].items())},
        "tensors": {},
        "faults": {name: fault for name, fault in faults.items() if fault},
    }
    for name, read in ((TRAINER, _read_trainer), ("the shards", _read_shards)):
        try:
            found |= read(checkpoint)
        except Exception as problem:  # of a broken file; it raises whatever its parser does
            found["faults"].setdefault(name, "cannot be read: " + next(iter(str(problem).splitlines()), "no reason"))
    return found


def _read_trainer(checkpoint: Path) -> dict[str, Any]:
    allow_known_state()
    trainer = read_trainer(checkpoint)
    config = trainer["config"]
    return {
        "tokens": int(trainer["tokens"]),
        "model": config["model"].get("size", "custom"),
        "optimizer": {key: value for key, value in config["optim"].items() if isinstance(value, str | int | float)},
    }


def _read_shards(checkpoint: Path) -> dict[str, Any]:
    from evenstep.train.tensors import reader

    tensors = {}
    for name, facts in sorted(reader(checkpoint).read_metadata().state_dict_metadata.items()):
        dtype = facts.properties.dtype
        tensors[name] = {
            "shape": list(facts.size),
            "dtype": str(dtype).removeprefix("torch."),
            "bytes": facts.size.numel() * dtype.itemsize,
        }
    return {"tensors": tensors}


def _lines(facts: dict[str, Any], everything: bool) -> list[str]:
    count, whole = len(facts["files"]), _size(sum(facts["files"].values()))
    state = f"{len(facts['faults'])} faults" if facts["faults"] else "every checksum is right"
    tokens = "unknown" if facts["tokens"] is None else f"{facts['tokens']:,}"
    by = f"{facts['world_size']} process{'es' * (facts['world_size'] > 1)}"
    optimizer = ", ".join(f"{key} {value}" for key, value in (facts["optimizer"] or {"name": "unknown"}).items())
    lines = [
        f"{facts['checkpoint']}: {state}",
        f"step {facts['step']}, {tokens} tokens, written by {by}, {whole} in {count} files",
        f"model {facts['model'] or 'unknown'}; optimizer: {optimizer.removeprefix('name ')}",
        "",
    ]
    for name, size in facts["files"].items():
        lines.append(f"  {name:52} {_size(size):>10}  {facts['faults'].get(name, 'ok')}")
    lines += [f"  {name:52} {'':>10}  {fault}" for name, fault in facts["faults"].items() if name not in facts["files"]]
    return [*lines, "", *_tensor_lines(facts["tensors"], everything)]


def _tensor_lines(tensors: dict[str, Any], everything: bool) -> list[str]:
    lines = []
    entries: dict[tuple[str, str], list[int]] = {}
    for name, tensor in tensors.items():
        if name.startswith("model.") or everything:
            lines.append(f"  {name:60} {tensor['shape']!s:16} {tensor['dtype']:9} {_size(tensor['bytes']):>10}")
        else:
            entries.setdefault((name.rpartition(".")[2], tensor["dtype"]), []).append(tensor["bytes"])
    for (entry, dtype), sizes in sorted(entries.items()):
        what = f"optimizer: {entry} of {len(sizes)} parameters"
        lines.append(f"  {what:60} {'':16} {dtype:9} {_size(sum(sizes)):>10}")
    return lines


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"
