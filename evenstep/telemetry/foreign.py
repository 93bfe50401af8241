"""Reads the logs of other trainers as a `RunLog`: transformers, TensorBoard, Weights & Biases, CSV.

Such a log holds a few series of numbers under names that vary: the loss, often the learning rate and the norm of all
gradients, once in some steps. `load_log` maps the names to those of the training records of evenstep, and finds the
events of the series with the detector of a run. What a log cannot say, such as the tensor or the batch of a spike, is
listed in the ``notes`` of the result.

TensorBoard and W&B files are read with their packages, which are imported when they are needed.
"""

from __future__ import annotations

import csv
import importlib
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evenstep.errors import EvenstepError
from evenstep.telemetry.detect import Detector
from evenstep.telemetry.incidents import ALL
from evenstep.telemetry.runlog import RunLog, is_number, load_run
from evenstep.telemetry.schema import COLUMNS, is_step

Row = dict[str, float]
"""Name as in the log -> number, at one step."""

NAMES: dict[str, tuple[str, ...]] = {
    "step": ("step", "global_step", "train_global_step", "trainer_global_step", "iteration", "iter"),
    "loss": ("loss", "train_loss", "training_loss", "loss_train", "train_loss_step", "train_lm_loss", "lm_loss"),
    "lr": ("lr", "learning_rate", "train_lr", "train_learning_rate", "optim_lr"),
    "grad_norm": ("grad_norm", "train_grad_norm", "gradient_norm", "global_grad_norm", "optim_total_grad_norm"),
    "val_loss": ("eval_loss", "val_loss", "valid_loss", "validation_loss", "validation_val_loss", "test_loss"),
    "tokens_per_second": ("tokens_per_second", "train_tokens_per_second"),
}
"""Key of a record -> the names that stand for it, the preferred one first. Case does not matter, and every character
but letters and digits counts as "_"."""

TITLES = {"loss": "losses", "lr": "learning rates", "grad_norm": "gradient norms", "val_loss": "validation losses"}

FORMATS = "a run of evenstep, metrics.jsonl, trainer_state.json, a TensorBoard folder, a W&B offline run, or a CSV file"


def load_log(path: Path) -> RunLog:
    r"""The log of any trainer at ``path``: a run of evenstep as `load_run` reads it, or a log of another trainer.

    EvenstepError if ``path`` has none of the known formats, or has no losses, or if its package is missing.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "log.csv"
    >>> _ = path.write_text("Step,train/loss\n10,2.5\n20,2.0\n")
    >>> load_log(path).losses()
    ([10, 20], [2.5, 2.0])
    """
    if not path.exists():
        raise EvenstepError(f"{path} does not exist; give {FORMATS}")
    try:
        return _load(path)
    except OSError as problem:
        raise EvenstepError(f"{path} cannot be read ({problem.strerror})") from None


def _load(path: Path) -> RunLog:
    if path.is_dir():
        if any((path / name).exists() for name in ("metrics.jsonl", "config.toml")):
            return load_run(path)
        if state := _newest_trainer_state(path):
            return _with_guard(_as_run(path, state, _read_trainer_state(state)), state)
        if (newest := _newest(path, "*.wandb")) is not None:
            return _as_run(path, newest, _read_wandb(newest))
        if (newest := _newest(path, "*tfevents*")) is not None:
            return _as_run(path, newest.parent, _read_tensorboard(newest.parent))
        raise EvenstepError(f"{path} holds no log that evenstep reads; give {FORMATS}")
    readers: dict[str, Callable[[Path], list[Row]]] = {
        ".json": _read_trainer_state,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".wandb": _read_wandb,
    }
    if path.suffix in readers:
        run = _as_run(path, path, readers[path.suffix](path))
        return _with_guard(run, path) if path.suffix == ".json" else run
    if "tfevents" in path.name:
        return _as_run(path, path, _read_tensorboard(path))
    return load_run(path)


def _newest_trainer_state(directory: Path) -> Path | None:
    """trainer_state.json of ``directory``, or that of the newest checkpoint in it."""
    direct = directory / "trainer_state.json"
    if direct.exists():
        return direct
    numbered = {
        int(file.parent.name.rpartition("-")[2]): file
        for file in directory.glob("checkpoint-*/trainer_state.json")
        if file.parent.name.rpartition("-")[2].isdecimal()
    }
    return numbered[max(numbered)] if numbered else None


def _newest(directory: Path, pattern: str) -> Path | None:
    """The newest file of a pattern in a directory or up to two levels below it."""
    files = [file for place in ("", "*/", "*/*/") for file in directory.glob(place + pattern) if file.is_file()]
    return max(files, key=lambda file: file.stat().st_mtime, default=None)


# ---- rows of the formats ----


def _read_trainer_state(path: Path) -> list[Row]:
    return [_numbers(entry.items()) for entry in _history(path)]


def _history(path: Path) -> list[dict[str, Any]]:
    """The entries of the log of a trainer_state.json."""
    try:
        state = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError):
        raise EvenstepError(f"{path} is no JSON; give trainer_state.json as transformers writes it") from None
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list):
        raise EvenstepError(f"{path} has no log_history; give trainer_state.json as transformers writes it")
    return [entry for entry in history if isinstance(entry, dict)]


def _with_guard(run: RunLog, path: Path) -> RunLog:
    """``run`` with the decisions that the callback of a `SpikeGuard` has added to trainer_state.json."""
    for entry in _history(path):
        if isinstance(entry.get("guard"), str) and is_step(entry.get("step")):
            facts = {"action": entry["guard"], "reason": str(entry.get("guard_reason", "")), "bad_step": entry["step"]}
            run.events.append({"kind": "event", "event": "guard", "step": entry["step"], **facts})
    run.events.sort(key=lambda event: event["step"])
    return run


def _read_csv(path: Path) -> list[Row]:
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        delimiter = "\t" if path.suffix == ".tsv" else ";" if file.readline().count(";") else ","
        file.seek(0)
        try:
            return [_numbers(row.items()) for row in csv.DictReader(file, delimiter=delimiter)]
        except csv.Error as problem:
            raise EvenstepError(f"{path} is no CSV file ({problem})") from None


def _read_tensorboard(path: Path) -> list[Row]:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError:
        raise EvenstepError(f"{path}: a TensorBoard log needs tensorboard; pip install tensorboard") from None
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    rows: dict[int, Row] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            rows.setdefault(event.step, {"step": event.step})[tag] = float(event.value)
    for tag in events.Tags()["tensors"]:  # scalars of TensorFlow 2
        for event in events.Tensors(tag):
            value = make_ndarray(event.tensor_proto)
            if value.size == 1 and np.issubdtype(value.dtype, np.number):
                rows.setdefault(event.step, {"step": event.step})[tag] = float(value.reshape(())[()])
    return [rows[step] for step in sorted(rows)]


def _read_wandb(path: Path) -> list[Row]:
    try:
        messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    except ImportError:
        raise EvenstepError(f"{path}: a W&B run needs wandb; pip install wandb") from None
    rows = []
    for data in _leveldb_records(path.read_bytes()):
        record = messages.Record()
        try:
            record.ParseFromString(data)
        except Exception:  # DecodeError, whose module depends on the version of protobuf
            continue
        if record.WhichOneof("record_type") == "history":
            pairs = (("/".join(item.nested_key) or item.key, _json(item.value_json)) for item in record.history.item)
            rows.append(_numbers(pairs) | {"_step": float(record.history.step.num)})
    return rows


def _leveldb_records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: a header of 7 bytes, then the log format of LevelDB. Blocks of 32 KiB hold pieces
    of records, each with a checksum, a length and a type (1: whole, 2: first, 3: middle, 4: last)."""
    block, header = 32768, struct.Struct("<IHB")
    at, parts = 7, bytearray()
    while at + header.size <= len(data):
        if block - at % block < header.size:  # the rest of a block, too short for a header, is padding
            at += block - at % block
            continue
        _, length, kind = header.unpack_from(data, at)
        if kind not in (1, 2, 3, 4):
            return
        at += header.size
        parts = bytearray() if kind in (1, 2) else parts
        parts += data[at : at + length]
        at += length
        if kind in (1, 4):
            yield bytes(parts)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _numbers(pairs: Iterable[tuple[Any, Any]]) -> Row:
    """The numbers among values, including NaN and infinities and such written as text."""
    found: Row = {}
    for name, value in pairs:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            continue
        try:
            found[str(name)] = float(value)
        except (ValueError, OverflowError):
            continue
    return found


# ---- rows -> a run ----


def _as_run(path: Path, file: Path, rows: Sequence[Row]) -> RunLog:
    """The rows of ``file`` as a run. EvenstepError without steps or losses."""
    names = dict.fromkeys(name for row in rows for name in row)
    found = {key: name for key in NAMES if (name := _named(key, names)) is not None}
    step_name = found.pop("step", "_step" if "_step" in names else None)
    if step_name is None or "loss" not in found:
        missing = "steps" if step_name is None else "training losses"
        listed = ", ".join(list(names)[:8]) or "none"
        raise EvenstepError(f"{file} has no {missing} under a name that evenstep knows; its numbers are: {listed}")
    run = RunLog(name=(path if path.is_dir() else path.with_suffix("")).resolve().name, path=path)
    train: dict[int, dict[str, Any]] = {}
    validation: dict[int, dict[str, Any]] = {}
    for row in rows:
        step = row.get(step_name, math.nan)
        if not is_number(step) or not is_step(int(step)):
            continue
        for key, name in found.items():
            if name in row:  # a resumed run repeats steps: the newest numbers count
                records = validation if key == "val_loss" else train
                records.setdefault(int(step), {"step": int(step)})[key] = row[name]
    run.train = [train[step] for step in sorted(train)]
    run.validation = [validation[step] for step in sorted(validation)]
    run.events = _events(run)
    run.notes.append(_contents(file, found, [record["step"] for record in run.train if "loss" in record]))
    return run


def _named(key: str, names: Iterable[str]) -> str | None:
    """The name in a log that stands for ``key``; None if there is none."""
    plain = {re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_"): name for name in names if name != "_step"}
    exact = next((plain[name] for name in NAMES[key] if name in plain), None)
    if exact is None and key == "lr":  # Lightning: lr-AdamW; one name for each group of parameters
        return next((name for text, name in plain.items() if re.match(r"(train_)?(lr|learning_rate)_", text)), None)
    return exact


def _events(run: RunLog) -> list[dict[str, Any]]:
    """The events that the detector of a run finds in the losses and gradient norms of the training records."""
    detector = Detector([ALL])
    events = []
    for record in run.train:
        columns = {name: np.full(1, np.nan) for name in COLUMNS}
        norm = record.get("grad_norm", math.nan)
        if "grad_norm" in record:
            columns["grad_norm"][:] = norm if math.isfinite(norm) else np.nan
            columns["grad_max"][:] = norm if math.isfinite(norm) else np.inf
        columns["skipped"][:] = 0.0
        events += detector.feed(record["step"], columns, record.get("loss", math.nan), None)
    return events + detector.end()


def _contents(file: Path, found: dict[str, str], steps: Sequence[int]) -> str:
    """A sentence about what a log holds and what it lacks."""
    holds = [title for key, title in TITLES.items() if key in found]
    lacks = [title for key, title in TITLES.items() if key not in found and key != "val_loss"]
    every = int(np.median(np.diff(steps))) if len(steps) > 1 else 1
    often = "" if every <= 1 else f" of one in {every} steps, so that events have no exact step"
    missing = " and ".join([*lacks, "the numbers of single tensors", "data rows"])
    return f"{file.name} holds {', '.join(holds)}{often}. It lacks {missing}, so no tensor and no batch can be named"
