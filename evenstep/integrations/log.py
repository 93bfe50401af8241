"""The common part of the callbacks: metrics.jsonl, started anew or truncated to the step of a resume; sinks that
outlive a training; and methods that never end one."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from evenstep.telemetry.schema import Record, read_records, to_line
from evenstep.telemetry.sinks import Guarded, JsonlSink, Sink, as_sinks
from evenstep.telemetry.trouble import Troubles
from evenstep.train.files import replace_text
from evenstep.train.log import up_to

F = TypeVar("F", bound=Callable[..., Any])

_troubles = Troubles("SpikeCallback")
_open: dict[Path, int] = {}
"""Open logs -> the id of the training that writes to each."""


def harmless(method: F) -> F:
    """Decorator of a callback's method, which then never raises: the first exception becomes a warning."""

    @functools.wraps(method)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except Exception as problem:
            _troubles.failed(f"do its part ({method.__name__})", problem)
            return None

    return guarded  # type: ignore[return-value]


class Log(JsonlSink):
    """The metrics.jsonl of one training."""

    def close(self) -> None:
        _open.pop(self.path, None)
        super().close()


def open_log(path: Path, step: int, training: object = None) -> Log:
    """A sink that appends to a run's metrics.jsonl.

    Args:
        path: the file. Missing folders are created.
        step: the step at which the run starts. At step 0 an older file is emptied; later, the records up to ``step``
            are kept and the others removed.
        training: identifies the training. If another callback of the same training writes to ``path``, the name of the
            file gets a number.
    """
    path = path.absolute()
    given, count = path, 1
    while training is not None and _open.get(path) == id(training):
        count += 1
        path = given.with_name(f"{given.stem}-{count}{given.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        kept = up_to(step, read_records(path)) if step else []
        replace_text(path, "".join(to_line(record) for record in kept))
    log = Log(path)
    _open[path] = id(training)
    return log


def lent_sinks(callback: object, sinks: Any) -> list[Sink]:
    """The argument ``sinks`` of a callback, which may serve several trainings: the sinks stay open between them, and
    are closed when ``callback`` is deleted or the program ends."""
    lent = [Guarded(sink, lent=True) for sink in as_sinks("SpikeCallback", sinks)]
    weakref.finalize(callback, _end, lent)
    return [*lent]


def _end(sinks: list[Guarded]) -> None:
    for sink in sinks:
        sink.end()


def go_on(monitor: Any, saved: Mapping[str, Any]) -> None:
    """Load a saved state into ``monitor``. A state that does not fit, as after a change of the model, is a warning."""
    try:
        monitor.load_state_dict(saved)
    except Exception as problem:
        monitor.troubles.failed("take up what it knew before the resume", problem)


def write_line(sinks: Iterable[Sink], step: int, values: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Write a record of training or validation, with those of ``values`` that are numbers.

    Args:
        sinks: where the record goes.
        step: its step.
        values: metrics of the trainer.
        names: the trainer's name of a metric -> its key in metrics.jsonl.
    """
    found = {ours: number for theirs, ours in names.items() if (number := _number(values.get(theirs))) is not None}
    if found:
        for sink in sinks:
            sink.write({"step": step, **found})


def _number(value: Any) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError, RuntimeError):  # text, or several numbers
        return None


class Tally:
    """A sink that counts the spikes since the last call of `take`, and keeps the newest spike rate."""

    def __init__(self) -> None:
        self.spikes, self.spike_rate = 0, 0.0

    def write(self, record: Record) -> None:
        self.spikes += record.get("event") == "spike"
        if record.get("kind") == "window":
            self.spike_rate = record["spike_rate"]

    def close(self) -> None:
        """Do nothing: the sink holds no resource."""

    def take(self) -> dict[str, float]:
        """``spikes`` and ``spike_rate``; the count starts again."""
        found = {"spikes": float(self.spikes), "spike_rate": float(self.spike_rate)}
        self.spikes = 0
        return found
