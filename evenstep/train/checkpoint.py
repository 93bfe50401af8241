"""Checkpoints that a kill at any moment cannot spoil.

A checkpoint is a directory ``step-000100`` with the model in Hugging Face layout, the tokenizer, ``optimizer.pt``,
``trainer.pt`` and ``manifest.json``, the size and SHA-256 of every other file. It is written under another name
beside its place, forced to the disk, and renamed: the name ``step-*`` exists only for a whole checkpoint. Old ones
are deleted after that, never before. Whoever reads checks the manifest first, so a truncated or altered checkpoint
is passed over by name instead of being loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evenstep.errors import EvenstepError

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d+)")
_PARTIAL = re.compile(r"\.step-\d+\.partial")


def save_checkpoint(directory: Path, step: int, write: Callable[[Path], None], keep: int | None) -> Path:
    """Let ``write`` fill a fresh directory, then make it ``directory/step-NNNNNN`` and keep the ``keep`` newest (None:
    all).

    Whatever goes wrong (a full disk, an interruption), the partial directory is removed and every earlier checkpoint
    stays as it is; an error of the disk becomes an EvenstepError of one line.
    """
    final = directory / f"step-{step:06d}"
    partial = directory / f".step-{step:06d}.partial"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        remove_partials(directory)
        partial.mkdir()
        write(partial)
        manifest = {"step": step, "files": {path.name: _facts(path) for path in sorted(partial.iterdir())}}
        with open(partial / MANIFEST, "w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync_directory(partial)
        if final.exists():  # an invalid one that a resume passed over, or the same step saved twice
            shutil.rmtree(final)
        partial.rename(final)
        _sync_directory(directory)
    except EvenstepError:
        raise
    except Exception as problem:  # torch and safetensors wrap the disk's errors in types of their own
        intact = "earlier checkpoints are intact, " if list_checkpoints(directory) else ""
        raise EvenstepError(
            f"could not save the checkpoint of step {step} in {directory}: {_reason(problem)}; {intact}make room and "
            f"{way_on(directory.parent)}"
        ) from problem
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in list_checkpoints(directory)[keep:] if keep else []:
        if old != final:
            shutil.rmtree(old, ignore_errors=True)
    return final


def _reason(problem: BaseException) -> str:
    """The system's own words where an error of the disk is behind the problem, else the problem's first line."""
    seen: BaseException | None = problem
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        seen = seen.__cause__ or seen.__context__
    return next(iter(str(problem).splitlines()), type(problem).__name__)


def way_on(run: Path) -> str:
    """How to go on with a run that stopped: from its checkpoints, or from the start where it has none."""
    if list_checkpoints(run / "checkpoints"):
        return f"go on with: evenstep pretrain --resume {shlex.quote(str(run))}"
    return f"start it again with: evenstep pretrain {shlex.quote(str(run / 'config.toml'))}"


def list_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints by name, the newest first; not yet verified."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def remove_partials(directory: Path) -> None:
    """Delete what a killed process left half written."""
    for path in directory.iterdir():
        if _PARTIAL.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def newest_checkpoint(run: Path, say: Callable[[str], None]) -> Path:
    """The newest checkpoint of the run whose files match its manifest; ``say`` gets one line for each that is passed
    over.

    EvenstepError when the run has none.
    """
    candidates = list_checkpoints(run / "checkpoints")
    for path in candidates:
        fault = find_fault(path)
        if fault is None:
            return path
        say(f"checkpoint {path} passed over: {fault}")
    if candidates:
        raise EvenstepError(
            f"{run}: none of its {len(candidates)} checkpoints is whole; start again with another --out"
        )
    if (run / "config.toml").is_file():
        raise EvenstepError(f"{run} holds no checkpoint yet; {way_on(run)}")
    raise EvenstepError(
        f"{run}: no checkpoint there; give the directory of a run that has saved one (evenstep runs lists runs)"
    )


def find_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words, or None. Reads every byte of it."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, facts in files.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != facts["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, the manifest says {facts['bytes']}"
            if _sha256(file) != facts["sha256"]:
                return f"{name} was altered (its SHA-256 is not the manifest's)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        return f"{MANIFEST} cannot be read ({problem})"
    return None


def write_tensors(path: Path, content: Any) -> None:
    """``torch.save`` through a Python file, so that a full disk is an OSError with its reason."""
    import torch

    with open(path, "wb") as file:
        torch.save(content, file)


def read_tensors(path: Path) -> Any:
    """``torch.load`` of tensors and plain values alone: a checkpoint from elsewhere cannot run code."""
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


def _facts(path: Path) -> dict[str, Any]:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_directory(path: Path) -> None:
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
