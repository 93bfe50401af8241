"""What callbacks of trainers that are not ours share: metrics.jsonl, opened anew, or cut where a resumed run goes on;
sinks that outlive a training; and methods that end none."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from evenstep.telemetry.schema import read_records, to_line
from evenstep.telemetry.sinks import Guarded, JsonlSink, Record, Sink, as_sinks
from evenstep.telemetry.trouble import Troubles
from evenstep.train.files import replace_text
from evenstep.train.log import up_to

F = TypeVar("F", bound=Callable[..., Any])

_troubles = Troubles("SpikeCallback")
_open: dict[Path, int] = {}
"""Logs that are open, and the training that each belongs to."""


def harmless(method: F) -> F:
    """A method of a callback that never raises: the first failure warns, and the training goes on."""

    @functools.wraps(method)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except Exception as problem:
            _troubles.failed(f"do its part ({method.__name__})", problem)
            return None

    return guarded  # type: ignore[return-value]


class Log(JsonlSink):
    """metrics.jsonl of one training."""

    def close(self) -> None:
        _open.pop(self.path, None)
        super().close()


def open_log(path: Path, step: int, training: object = None) -> Log:
    """A sink that appends to ``path``, which a run that starts at ``step`` owns: at step 0 an older file goes; later
    its lines up to that step stay. Where another callback of the same ``training`` writes to it, the file is ``path``
    with a number in its name.
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
    """``sinks`` as `SpikeMonitor` takes them, for a callback that may serve several trainings: they stay open between
    these, and are closed when the callback goes or the program ends."""
    lent = [Guarded(sink, lent=True) for sink in as_sinks("SpikeCallback", sinks)]
    weakref.finalize(callback, _end, lent)
    return [*lent]


def _end(sinks: list[Guarded]) -> None:
    for sink in sinks:
        sink.end()


def go_on(monitor: Any, saved: Mapping[str, Any]) -> None:
    """Load ``saved`` into ``monitor``; a warning where it does not fit, as after a change of the model."""
    try:
        monitor.load_state_dict(saved)
    except Exception as problem:
        monitor.troubles.failed("take up what it knew before the resume", problem)


def write_line(sinks: Iterable[Sink], step: int, values: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """A line of training or validation: of ``values`` those that ``names`` gives a name of ours, if there are any."""
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
    """A sink that counts: spikes since `take` was last called, and the newest spike rate."""

    def __init__(self) -> None:
        self.spikes, self.spike_rate = 0, 0.0

    def write(self, record: Record) -> None:
        self.spikes += record.get("event") == "spike"
        if record.get("kind") == "window":
            self.spike_rate = record["spike_rate"]

    def close(self) -> None:
        """Nothing is held."""

    def take(self) -> dict[str, float]:
        found = {"spikes": float(self.spikes), "spike_rate": float(self.spike_rate)}
        self.spikes = 0
        return found
