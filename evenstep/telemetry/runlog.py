"""Reads the files of a run: metrics.jsonl, config.toml and summary.json. Needs no torch.

metrics.jsonl may be half written, come from another version, or hold anything at all. Lines that do not fit the schema
are left out and counted in ``RunLog.notes``, which the report shows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evenstep.errors import EvenstepError
from evenstep.paths import check_own_file, read_own
from evenstep.telemetry.schema import VERSION, Record, is_step, iter_records
from evenstep.toml import parse_toml

Series = tuple[list[float], list[float]]
"""Steps, and a value for each of them."""

STEP_LISTS = ("losses", "norms", "norms_after", "lrs")
"""Keys of a ``window`` record that hold one value for each of its steps."""


@dataclass
class RunLog:
    """What is known of a run.

    ``train`` and ``validation`` are the records of the log, ``windows``, ``events``, ``lowbit`` and ``activations``
    those of telemetry, all in the order of their steps. The ``parameters`` records are kept as arrays: ``first`` and
    ``last`` are the steps ``[n]`` of each record, and ``columns`` maps a name to its values ``[n, k]``, NaN where none.
    ``texts`` maps data rows (first, and one past the last) to numbers of rows and their texts, where these have been
    looked up.
    """

    name: str
    path: Path
    notes: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    optimizer: str = ""
    rules: dict[str, Any] = field(default_factory=dict)
    train: list[Record] = field(default_factory=list)
    validation: list[Record] = field(default_factory=list)
    windows: list[Record] = field(default_factory=list)
    events: list[Record] = field(default_factory=list)
    lowbit: list[Record] = field(default_factory=list)
    activations: list[Record] = field(default_factory=list)
    first: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    last: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    columns: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    texts: dict[tuple[int, int], list[tuple[int, str]]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Number of the last step."""
        records = [*self.train[-1:], *self.validation[-1:], *self.windows[-1:]]
        return max((record["step"] for record in records), default=0)

    def series(self, key: str) -> Series:
        """A number of the training or validation records over the steps."""
        records = self.validation if key in ("val_loss", "perplexity", "bits_per_byte") else self.train
        points = [(r["step"], r[key]) for r in records if is_number(r.get(key))]
        return [p[0] for p in points], [p[1] for p in points]

    def per_step(self, key: str) -> Series:
        """A number of each single step; ``key`` is one of `STEP_LISTS`."""
        steps: list[float] = []
        values: list[float] = []
        for window in self.windows:
            for i, value in enumerate(window.get(key) or ()):
                if is_number(value):
                    steps.append(window["first"] + i)
                    values.append(value)
        return steps, values

    def rates(self) -> Series:
        """The learning rate of each step that has a known one: those of the ``window`` records, which list the rates
        where they change and otherwise hold the last one, and those of the training records for all other steps."""
        points: dict[float, float] = {}
        for window in self.windows:
            several, last = window.get("lrs"), window.get("lr")
            ends = dict.fromkeys((window["first"], window["step"]), last)
            values: dict[int, Any] = dict(enumerate(several, window["first"])) if several else ends
            points.update({step: float(value) for step, value in values.items() if is_number(value)})
        points = dict(zip(*self.series("lr"), strict=True)) | points
        steps = sorted(points)
        return [*steps], [points[step] for step in steps]

    def losses(self) -> Series:
        """The loss of every step, or that of the training records where there is no telemetry."""
        found = self.per_step("losses")
        return found if found[0] else self.series("loss")


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number small enough for fp64 arithmetic."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 and value == value


def load_run(path: Path) -> RunLog:
    r"""The run in a directory, or the run of a single .jsonl file.

    EvenstepError if ``path`` is no run. Every other problem is described in the ``notes`` of the result.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> _ = path.write_text('{"step": 10, "loss": 2.5}\n{"step": 20, "loss": 2.0}\n')
    >>> load_run(path).series("loss")
    ([10, 20], [2.5, 2.0])
    """
    metrics = path / "metrics.jsonl" if path.is_dir() else path
    directory = metrics.parent
    if not path.exists() or (path.is_dir() and not metrics.exists() and not (path / "config.toml").exists()):
        raise EvenstepError(f"{path} is not a run: it has no metrics.jsonl; evenstep runs lists runs")
    run = RunLog(name=(path if path.is_dir() else path.with_suffix("")).resolve().name, path=path)
    if path.is_dir():
        _read_facts(run, directory)
    try:
        if path.is_dir():
            check_own_file(path, metrics.name)
        if not _read_records(run, iter_records(metrics)) and metrics == path:
            raise EvenstepError(
                f"{path} is no metrics.jsonl: none of its lines is a record; give the directory of a run"
            )
    except FileNotFoundError:
        run.notes.append("metrics.jsonl is not there yet")
    except OSError as problem:
        raise EvenstepError(f"{metrics} cannot be read ({problem.strerror})") from None
    if not run.train and not run.windows and not run.validation:
        run.notes.append("no step has been logged yet")
    elif not run.windows:
        run.notes.append("there is no telemetry in this run: telemetry.enabled was false, or it is of an older version")
    return run


# ---- files ----


def _read_facts(run: RunLog, directory: Path) -> None:
    readers: dict[str, tuple[str, Callable[[bytes], Any]]] = {
        "config.toml": ("config", parse_toml),
        "summary.json": ("summary", json.loads),
    }
    for name, (where, read) in readers.items():
        try:
            found = read(read_own(directory, name))
            if not isinstance(found, dict):
                raise ValueError("it is no table")
            setattr(run, where, found)
        except FileNotFoundError:  # the run of another trainer, or one that has only just started
            pass
        except (OSError, ValueError, RecursionError) as problem:
            run.notes.append(f"{name} cannot be read: {problem}")


def run_of(records: Iterable[Record], name: str, path: Path | None = None) -> RunLog:
    """The run of records in their order, without a file.

    >>> run_of([{"step": 10, "loss": 2.5}], "example").losses()
    ([10], [2.5])
    """
    run = RunLog(name=name, path=path or Path(name))
    _read_records(run, records)
    return run


def _read_records(run: RunLog, records: Iterable[Record | None]) -> bool:
    """Add the records of a log to ``run``; None stands for a line that could not be read. False where there are lines,
    and none of them could be read."""
    unreadable, misfits, unknown, total = 0, 0, set(), 0
    parameters: list[Record] = []
    readers = {"start": _start, "window": _window, "parameters": _parameters, "event": _event, "lowbit": _lowbit}
    readers["activations"] = _activations
    for record in records:
        total += 1
        if record is None:
            unreadable += 1
            continue
        kind = record.get("kind")
        if kind is None:
            (run.validation if "val_loss" in record else run.train).append(record)
        elif isinstance(kind, str) and kind in readers:
            misfits += not readers[kind](run, record, parameters)
        else:
            unknown.add(str(kind))
    _stack(run, parameters)
    if unreadable:
        run.notes.append(f"{_lines(unreadable)} of metrics.jsonl could not be read and {_are(unreadable)} left out")
    lost = sum(window["lost"] for window in run.windows if is_number(window.get("lost")))
    if lost:
        run.notes.append(f"{lost} step{'s' if lost > 1 else ''} could not be measured")
    if misfits:
        run.notes.append(f"{_lines(misfits)} of telemetry did not fit its schema and {_are(misfits)} left out")
    if unknown:
        run.notes.append(f"lines of an unknown kind were left out: {', '.join(sorted(unknown))[:200]}")
    return not total or unreadable < total


def _lines(n: int) -> str:
    return f"{n} line{'s' if n > 1 else ''}"


def _are(n: int) -> str:
    return "were" if n > 1 else "was"


# ---- records: each reader returns whether the record fits the schema ----


def _start(run: RunLog, record: Record, parameters: list[Record]) -> bool:
    names = record.get("names")
    if not isinstance(names, list):
        return False
    # A run that was resumed from a checkpoint repeats steps in the same file: the repeated steps replace the old ones.
    kept = (run.train, run.validation, run.windows, run.events, run.lowbit, run.activations, parameters)
    if any(line["step"] > record["step"] for lines in kept for line in lines):
        for lines in kept:
            lines[:] = [line for line in lines if line["step"] <= record["step"]]
        run.notes.append(
            f"the log begins again after step {record['step']}; later steps that it held before are left out"
        )
    if run.names and [str(name) for name in names] != run.names:
        parameters.clear()
        run.notes.append(f"the parameters changed at step {record['step']}; their numbers are shown from there on")
    run.names, run.optimizer = [str(name) for name in names], str(record.get("optimizer", ""))
    run.rules = record["rules"] if isinstance(record.get("rules"), dict) else {}
    version = record.get("version")
    if not isinstance(version, int) or version > VERSION:
        run.notes.append(f"telemetry of version {version}, this program knows {VERSION}: some may be missing")
    return True


def _window(run: RunLog, record: Record, _: list[Record]) -> bool:
    lists = [record.get(name) or [] for name in STEP_LISTS]
    if not is_step(record.get("first")) or not all(isinstance(values, list) for values in lists):
        return False
    run.windows.append(record)
    return True


def _parameters(run: RunLog, record: Record, parameters: list[Record]) -> bool:
    columns = {name: values for name, values in record.items() if isinstance(values, list)}
    fits = all(len(values) == len(run.names) for values in columns.values())
    if not columns or not fits or not is_step(record.get("first")):
        return False
    parameters.append(record)
    return True


def _event(run: RunLog, record: Record, _: list[Record]) -> bool:
    tensors = record.get("tensors", [])
    if not isinstance(record.get("event"), str) or not isinstance(tensors, list):
        return False
    if not all(isinstance(tensor, dict) and "name" in tensor for tensor in tensors):
        return False
    run.events.append(record)
    return True


def _lowbit(run: RunLog, record: Record, _: list[Record]) -> bool:
    return _add_table(run.lowbit, record, "layers")


def _activations(run: RunLog, record: Record, _: list[Record]) -> bool:
    return _add_table(run.activations, record, "modules")


def _add_table(records: list[Record], record: Record, key: str) -> bool:
    """Add a record whose ``key`` is a dict of dicts."""
    table = record.get(key)
    if not isinstance(table, dict) or not all(isinstance(row, dict) for row in table.values()):
        return False
    records.append(record)
    return True


# ---- arrays ----


def _stack(run: RunLog, parameters: list[Record]) -> None:
    """Set the arrays of ``run`` from its ``parameters`` records, with the derived column ``update_ratio``."""
    run.first = np.array([record["first"] for record in parameters], np.int64)
    run.last = np.array([record["step"] for record in parameters], np.int64)
    names = dict.fromkeys(name for record in parameters for name, values in record.items() if isinstance(values, list))
    for name in names:
        run.columns[name] = matrix([record.get(name) for record in parameters], len(run.names))
    if "update_rms" in names and "weight_rms" in names:
        weights = between_looks(run.columns["weight_rms"], run.last)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = run.columns["update_rms"] / weights
        run.columns["update_ratio"] = np.where(np.isfinite(ratio), ratio, np.nan)


def between_looks(values: NDArray[np.float32], steps: NDArray[np.int64]) -> NDArray[np.float32]:
    """``values`` ``[n, k]``, interpolated linearly between the steps at which they were measured.

    Weights are measured every 250 steps, and the records in between repeat the last values. A ratio to values that are
    constant and then jump would jump as well, where nothing happened.
    """
    # A record in which no value changed repeats the one before; all others are measurements ("looks").
    same = (values[1:] == values[:-1]) | (np.isnan(values[1:]) & np.isnan(values[:-1]))
    looks = np.append([0], 1 + np.flatnonzero(~same.all(axis=1))) if len(values) else np.zeros(0, np.int64)
    if len(looks) < 2:
        return values
    at = np.searchsorted(looks, np.arange(len(values)), side="right") - 1
    a, b = looks[at], looks[np.minimum(at + 1, len(looks) - 1)]
    span = np.maximum(steps[b] - steps[a], 1)
    share = ((steps - steps[a]) / span * (b > a)).astype(np.float32)[:, None]
    straight = values[a] + (values[b] - values[a]) * share
    return np.where(np.isnan(straight), values, straight)


def matrix(rows: list[Any], k: int) -> NDArray[np.float32]:
    """Lists of ``k`` numbers as an array ``[n, k]``. Entries that are no numbers become NaN, as does every entry of a
    row that is no list."""
    result = np.full((len(rows), k), np.nan, np.float32)
    for i, row in enumerate(rows):
        if not isinstance(row, list):
            continue
        try:
            result[i] = np.array(row, dtype=np.float32)  # None becomes NaN
        except (TypeError, ValueError, OverflowError):
            result[i] = [value if is_number(value) else math.nan for value in row]
    return np.where(np.isfinite(result), result, np.float32(math.nan))
