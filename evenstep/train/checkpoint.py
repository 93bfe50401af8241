"""Checkpoints on the disk: layout, manifest, atomic commit and verification.

A checkpoint has the same layout for any number of processes::

    RUN/checkpoints/step-000100/
        manifest.json                   {"format": 2, "step": 100, "world_size": 2, "files": {NAME: {"bytes", ...}}}
        shard-00001-model-00001-of-00001.safetensors    the tensors of process 0; shard-00002 is process 1's, and so on
        trainer.pt                      everything else that changes: step, position, clocks, random states, the config
        config.json                     the shape of the model, as Hugging Face writes it
        tokenizer.json, ...             the tokenizer

The shards are those of torch.distributed.checkpoint in its safetensors format (``hf_storage``). A tensor may be divided
among several shards, whose headers contain the offsets of its pieces, so any number of processes can read what any
other number has written. The keys are ``model.NAME`` and ``optimizer.NAME.ENTRY``, where NAME is the name of a
parameter. The default storage of torch.distributed.checkpoint has its metadata in a pickle, which can run code when it
is read. Here only trainer.pt is pickled, and it is read by ``torch.load(weights_only=True)``: an untrusted checkpoint
cannot run code.

A checkpoint is committed atomically. It is written to ``.step-N.partial``, forced to the disk, and renamed with its
manifest inside, so a name ``step-*`` exists only for a complete checkpoint. Old checkpoints are deleted after the
rename, never before. A reader verifies the files against the manifest, and skips and reports a truncated or altered
checkpoint. The checksums detect accidents; they do not protect against somebody who also rewrites the manifest.

Other programs use `read_manifest` and `load_model_state`. `evenstep.train.saving` writes the tensors. This module does
not import torch until tensors are read.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shlex
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from evenstep.console import program
from evenstep.errors import EvenstepError
from evenstep.paths import is_plain_name, unused
from evenstep.train.config import BaseConfig

if TYPE_CHECKING:
    from torch import Tensor

# ---- the cause of an exception ----


def reason_of(problem: BaseException) -> str:
    """The message of the operating system if a disk error caused ``problem``, else the first line of its message."""
    rank, problem = _first_failure(problem)
    disk = of_the_disk(problem)
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    said = (disk.strerror if disk else None) or (lines[0] if lines else type(problem).__name__)
    return f"{said} (process {rank})" if rank else said


def _first_failure(problem: BaseException) -> tuple[int, BaseException]:
    """The rank and the exception of the process that failed. For the exception of torch.distributed.checkpoint, which
    contains rank -> (exception, stack), the rank is 0 if several processes failed. Any other exception has rank 0."""
    failures = getattr(problem, "failures", None)
    if not isinstance(failures, dict) or not failures:
        return 0, problem
    rank, (inner, _) = min(failures.items(), key=lambda item: item[0])
    return (rank if len(failures) == 1 else 0), _first_failure(inner)[1]


def of_the_disk(problem: BaseException) -> OSError | None:
    """The error of the operating system in the chain of causes of ``problem``, or None."""
    seen: BaseException | None = _first_failure(problem)[1]
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


MANIFEST = "manifest.json"
TRAINER = "trainer.pt"
PARENT = "parent.json"
FORMAT = 2
SHARD = ".safetensors"
_NAME = re.compile(r"step-(\d+)")
_LEFT_BEHIND = re.compile(r"\.(step-\d+)\.(partial|former)")
_EARLIER = "it is in a layout from before the first release, which cannot be resumed"

# ---- reading ----


def read_manifest(checkpoint: Path | str) -> dict[str, Any]:
    """The manifest of a checkpoint's directory: ``format``, ``step``, ``world_size`` and ``files``, which gives
    ``bytes`` and ``sha256`` by name.

    A name that contains a path is refused. The files themselves are not read, see `find_fault`. EvenstepError when
    there is no manifest, or one of another layout.
    """
    path = Path(checkpoint) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if "format" not in manifest and "optimizer.pt" in manifest["files"]:
            raise EvenstepError(
                f"{checkpoint}: {_EARLIER}; its weights are in Hugging Face layout: start a new run from them with "
                f"--model.init {shlex.quote(str(checkpoint))}"
            )
        if manifest["format"] != FORMAT:
            raise EvenstepError(f"{path} has format {manifest['format']!r}, not {FORMAT}; use a newer evenstep")
        for name, facts in manifest["files"].items():
            if not is_plain_name(name):
                raise EvenstepError(f"{path} lists '{name}', a file outside of the checkpoint; do not trust it")
            if not isinstance(facts["bytes"], int) or not isinstance(facts["sha256"], str):
                raise TypeError(f"{name} has no bytes and sha256")
        for key in ("step", "world_size"):
            if type(manifest[key]) is not int or manifest[key] < 0:
                raise TypeError(f"{key} is no whole number")
    except FileNotFoundError:
        raise EvenstepError(f"{checkpoint} has no {MANIFEST}: it is not a complete checkpoint of a run") from None
    except EvenstepError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise EvenstepError(f"{path} cannot be read ({problem})") from None
    return manifest


def load_model_state(checkpoint: Path | str) -> dict[str, Tensor]:
    """The weights of a checkpoint's directory, whole and on the CPU, by parameter name (``lm_head.weight``), in the
    dtype they were saved in. One process reads them, however many wrote them; nothing else of the checkpoint is read.

    The checksums are not verified, which `newest_checkpoint` and `find_fault` do. EvenstepError for a directory that is
    not a checkpoint, or whose shards cannot be read or do not cover a tensor.
    """
    read_manifest(checkpoint)
    return read_whole(Path(checkpoint), "model.")


# ---- reading tensors ----


def quiet_dcp() -> None:
    """Silence the warning of torch.distributed.checkpoint about its use by a single process, which is intended here."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def reader(directory: Path) -> Any:
    """torch's reader of the shards in ``directory``."""
    from evenstep.models.hf import require_safetensors

    require_safetensors()
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    quiet_dcp()
    return HuggingFaceStorageReader(str(directory))


def shard_metadata(directory: Path) -> dict[str, Any]:
    """Shape and dtype of every tensor in the shards. EvenstepError when a shard cannot be read, or the parts of a
    tensor do not cover it."""
    try:
        found = reader(directory).read_metadata().state_dict_metadata
    except Exception as problem:  # safetensors raises a type of its own
        raise EvenstepError(f"the shards in {directory} cannot be read: {problem}") from None
    for name, facts in found.items():
        here = {chunk.offsets: chunk.sizes.numel() for chunk in facts.chunks}
        if sum(here.values()) != facts.size.numel():
            raise EvenstepError(f"the shards in {directory} contain only a part of {name}; a shard is missing")
    return found


def fill(directory: Path, tensors: dict[str, Tensor], *, single: bool = False) -> None:
    """Read the shards into ``tensors``, in place; a DTensor gets its local part. ``single``: this process reads alone,
    without the others. EvenstepError for a tensor that is missing or has another shape."""
    import torch.distributed.checkpoint as dcp

    known = shard_metadata(directory)
    for name, tensor in tensors.items():
        if name not in known:
            raise EvenstepError(f"the checkpoint {directory} has no {name}; it is from another model or optimizer")
        if known[name].size != tensor.shape:
            raise EvenstepError(
                f"the checkpoint {directory} has {name} with shape {list(known[name].size)}, not "
                f"{list(tensor.shape)}; it is from another model or optimizer"
            )
    try:
        dcp.load(tensors, storage_reader=reader(directory), no_dist=single or not _distributed())
    except (Exception, dcp.api.CheckpointException) as problem:
        raise EvenstepError(f"the shards in {directory} cannot be read: {str(problem).splitlines()[-1]}") from None


def _distributed() -> bool:
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()


def read_whole(directory: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose key starts with ``prefix``, by the remainder of the key, whole and on the CPU."""
    import torch

    wanted = {name: facts for name, facts in shard_metadata(directory).items() if name.startswith(prefix)}
    if not wanted:
        raise EvenstepError(f"the shards in {directory} have no tensors named {prefix}*; give another checkpoint")
    tensors = {name: torch.empty(facts.size, dtype=facts.properties.dtype) for name, facts in wanted.items()}
    fill(directory, tensors, single=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


# ---- finding and verifying a checkpoint ----


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a directory, the newest first, not verified."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


class Parent(NamedTuple):
    """The checkpoint of another run from which a run goes on. ``step`` is None for the newest valid one."""

    run: Path
    step: int | None

    @classmethod
    def parse(cls, text: str) -> Parent:
        """The run and the step of RUN@STEP, or of RUN alone.

        >>> Parent.parse("runs/base@400").step
        400
        """
        match = re.fullmatch(r"(.+)@(\d+)", text)
        return cls(Path(text), None) if match is None or Path(text).is_dir() else cls(Path(match[1]), int(match[2]))

    def find(self, say: Callable[[str], None]) -> Path:
        """The directory of the checkpoint. EvenstepError when the run has none, none of this step, or it is damaged."""
        if self.step is None:
            return newest_checkpoint(self.run, say)
        steps = [int(path.name.removeprefix("step-")) for path in list_checkpoints(self.run / "checkpoints")]
        if self.step not in steps:
            kept = ", ".join(map(str, sorted(steps))) or "none"
            raise EvenstepError(
                f"{self.run} has no checkpoint of step {self.step}; it has those of steps {kept} (checkpoint.keep says "
                "how many are kept)"
            )
        checkpoint = self.run / "checkpoints" / f"step-{self.step:06d}"
        if fault := find_fault(checkpoint):
            raise EvenstepError(f"{checkpoint} is damaged: {fault}; give another step")
        return checkpoint


def newest_checkpoint(run: Path, say: Callable[[str], None]) -> Path:
    """The newest valid checkpoint of the run, whose files match its manifest. ``say`` is called with one line for each
    invalid one that is skipped. EvenstepError when the run has no valid checkpoint."""
    candidates = list_checkpoints(run / "checkpoints")
    faults = []
    for path in candidates:
        fault = find_fault(path)
        if fault is None:
            return path
        faults.append(fault)
        say(f"checkpoint {path} skipped: {fault}")
    if faults and all(_EARLIER in fault for fault in faults):
        raise EvenstepError(faults[0])
    if candidates:
        raise EvenstepError(
            f"{run}: all of its {len(candidates)} checkpoints are damaged; start a new run with another --out"
        )
    if (run / "config.toml").is_file():
        raise EvenstepError(f"{run} has no checkpoint yet; {how_to_continue(run)}")
    raise EvenstepError(f"{run} has no checkpoints; give the directory of a run that has (evenstep runs lists runs)")


def find_fault(path: Path) -> str | None:
    """A short description of what is wrong with a checkpoint, or None. Reads all of its files."""
    try:
        files = read_manifest(path)["files"]
        if TRAINER not in files or not any(name.endswith(SHARD) for name in files):
            return f"{MANIFEST} lists no {TRAINER} or no shards"
        for name, facts in files.items():
            if fault := file_fault(path, name, facts):
                return f"{name} {fault}"
        for name in sorted(os.listdir(path)):
            if name.endswith(SHARD) and name not in files:
                return f"{name} is not in the manifest"
    except (EvenstepError, OSError) as problem:
        return str(problem)
    return None


def file_fault(checkpoint: Path, name: str, facts: dict[str, Any]) -> str | None:
    """A short description of what is wrong with one file of a checkpoint, or None. ``facts`` is its entry in the
    manifest."""
    file = checkpoint / name
    try:
        if file.is_symlink() or not file.is_file():
            return "is missing"
        if file.stat().st_size != facts["bytes"]:
            return f"has {file.stat().st_size} bytes, the manifest says {facts['bytes']}"
        if _sha256(file) != facts["sha256"]:
            return "was altered (its SHA-256 differs from the manifest)"
    except OSError as problem:
        return f"cannot be read ({problem.strerror})"
    return None


# ---- writing ----


def begin(directory: Path, step: int) -> Path:
    """Create the directory into which the checkpoint of ``step`` is written, beside its final place in ``directory``.
    Deletes what processes that were killed have left: partial checkpoints, and former ones that were replaced."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.iterdir():
        if not (match := _LEFT_BEHIND.fullmatch(path.name)):
            continue
        final = directory / match[1]
        if match[2] == "former" and not final.exists():
            path.rename(final)  # its process was killed before the new one had the name
        else:
            shutil.rmtree(path, ignore_errors=True)
    partial = directory / f".step-{step:06d}.partial"
    partial.mkdir()
    return partial


def facts_of(file: Path) -> dict[str, Any]:
    """The entry of a file in the manifest. The file is forced to the disk first."""
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def commit(partial: Path, step: int, world_size: int, files: dict[str, dict[str, Any]], keep: int | None) -> Path:
    """Turn ``partial`` into the checkpoint of ``step`` by one rename, with ``files`` in its manifest. Then delete all
    but the ``keep`` newest checkpoints (None: keep all)."""
    directory = partial.parent
    final = directory / f"step-{step:06d}"
    manifest = {"format": FORMAT, "step": step, "world_size": world_size, "files": dict(sorted(files.items()))}
    with open(partial / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    # Without this fsync a power failure could keep the rename and lose entries of the directory that it names.
    _sync_directory(partial)
    # A checkpoint of the same step (invalid, or saved before) keeps its name until the new one takes it, and is deleted
    # after that.
    former = directory / f".step-{step:06d}.former"
    if not final.exists():
        partial.rename(final)
    elif _exchange(partial, final):
        former = partial
    else:
        shutil.rmtree(former, ignore_errors=True)
        final.rename(former)
        partial.rename(final)
    _sync_directory(directory)
    _sync_directory(directory.parent)  # holds the entry of ``directory``, which the first save creates
    shutil.rmtree(former, ignore_errors=True)
    for old in list_checkpoints(directory)[keep:] if keep else []:
        if old != final:
            shutil.rmtree(old, ignore_errors=True)
    return final


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories in one operation of the file system. False where that is not possible: outside of Linux, and
    on some network file systems."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0)


def delete_newer(directory: Path, step: int) -> None:
    """Delete the checkpoints of later steps than ``step``, which a rewind has undone."""
    for path in list_checkpoints(directory):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path, ignore_errors=True)


def could_not_save(directory: Path, step: int, problem: BaseException) -> EvenstepError:
    """The error of a failed save. torch and safetensors wrap errors of the disk in exceptions of other types."""
    intact = "earlier checkpoints are intact, " if list_checkpoints(directory) else ""
    room = "make room and " if of_the_disk(problem) else ""
    return EvenstepError(
        f"could not save the checkpoint of step {step} in {directory}: {reason_of(problem)}; {intact}{room}"
        f"{how_to_continue(directory.parent)}"
    )


def how_to_continue(run: Path) -> str:
    """The command that continues a run that has stopped, or that starts it again where it has no checkpoint."""
    try:
        tuned = "\n[tune]\n" in (run / "config.toml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        tuned = False
    command = f"{program()} {'finetune' if tuned else 'pretrain'}"
    if list_checkpoints(run / "checkpoints"):
        return f"continue with: {command} --resume {shlex.quote(str(run))}"
    return f"start it again with: {command} {shlex.quote(str(run / 'config.toml'))}"


def write_tensors(path: Path, content: Any) -> None:
    """``torch.save`` through a Python file, so that a full disk is an OSError with its reason."""
    import torch

    with open(path, "wb") as file:
        torch.save(content, file)


def read_tensors(path: Path) -> Any:
    """``torch.load`` of only tensors and plain values: an untrusted checkpoint cannot run code."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # a damaged file: torch's parsers raise exceptions of any type
        reason = reason_of(problem) if isinstance(problem, OSError) else "it is damaged, or holds more than tensors"
        raise EvenstepError(f"{path} cannot be read: {reason}") from problem


_KINDS: dict[str, type | tuple[type, ...]] = {
    "step": int, "tokens": int, "position": int, "seconds": (int, float), "step_seconds": (int, float),
    "window_steps": int, "skipped": list, "tokenizer": str, "data": str, "config": dict, "optimizer": dict,
    "processes": list,
}  # fmt: skip
"""The entries of trainer.pt that `evenstep.train.trainer` reads, and their types."""


def read_trainer(checkpoint: Path) -> dict[str, Any]:
    """The content of a checkpoint's trainer.pt. EvenstepError when it cannot be read, or lacks an entry that a resume
    needs."""
    trainer = read_tensors(checkpoint / TRAINER)
    whole = isinstance(trainer, dict) and all(isinstance(trainer.get(key), kind) for key, kind in _KINDS.items())
    if not whole:
        raise EvenstepError(f"{checkpoint / TRAINER} is not of a run of this evenstep; give another checkpoint")
    return trainer


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


# ---- the error of a run that diverges ----


def diverged(config: BaseConfig, step: int, what: str, rescued: Path | None = None) -> EvenstepError:
    """The error of a run that met a NaN or an infinity at ``step``. ``rescued`` is a checkpoint of the weights before
    that step.

    After a transient fault the rescued weights are good. However, an earlier update may have ruined them although they
    are still finite, so the advice for a new run starts from the checkpoint before, or from scratch.
    """
    out = Path(config.out or "")
    kept = [path for path in list_checkpoints(out / "checkpoints") if path != rescued]
    facts = [f"{what} at step {step}, training stopped"]
    if rescued:
        facts.append(f"the weights before that step are saved as {rescued}, but may already be ruined")
    if kept:
        facts.append(f"the checkpoint before is {kept[0]}")
    if rescued or kept:
        resume = f"{program()} {config.COMMAND} --resume {shlex.quote(str(out))}"
        facts.append(f"after a transient fault continue with: {resume}")
    else:
        facts.append("no checkpoint was saved before it")
    command = [config.COMMAND, str(out / "config.toml")]
    command += ["--model.init", str(kept[0])] if kept and config.COMMAND == "pretrain" else []
    command += ["--optim.lr", f"{config.optim.lr / 10:g}", "--out", str(unused(out))]
    again = f"{program()} {shlex.join(command)}"
    facts.append(f"otherwise lower the rate in a new run (or lengthen schedule.warmup_steps): {again}")
    return EvenstepError("; ".join(facts))
