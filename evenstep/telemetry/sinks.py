"""Where records go. A sink takes records one by one, as dicts with the keys of docs/telemetry.md, and is closed at the
end.

metrics.jsonl is the file that all tools of evenstep read; the others show the same numbers in the programs people have
open anyway. A sink that fails is told of once and left alone from then on: no training stops for it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextvars import Context
from pathlib import Path
from typing import Any, Protocol

from evenstep.errors import EvenstepError
from evenstep.telemetry.lines import event_line
from evenstep.telemetry.schema import to_line

Record = dict[str, Any]


class Sink(Protocol):
    """Anything that has these two."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """Appends each record to a file as one line of JSON, at once. ``path``: its directory must exist."""

    def __init__(self, path: Path | str) -> None:
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run

    def write(self, record: Record) -> None:
        self._file.write(to_line(record))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """Scalars and events for TensorBoard, in ``directory``. Needs the package tensorboard."""

    def __init__(self, directory: Path | str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory))

    def write(self, record: Record) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])
        if record.get("kind") == "event":
            self._writer.add_text(f"events/{record['event']}", event_line(record), record["step"])

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Weights & Biases, as a run of its own beside any that the program has. ``mode``: "offline" writes to
    ``directory``/wandb, to be sent later with ``wandb sync``; "online" sends at once. ``config`` is kept with the run.

    After `close`, wandb's service process writes the last block of an offline file; the program's exit waits for it.
    """

    def __init__(self, directory: Path | str, name: str, *, mode: str = "offline", config: Any = None) -> None:
        import wandb

        self._run = wandb.init(
            project="evenstep",
            name=name,
            dir=str(directory),
            mode=mode,  # type: ignore[arg-type]
            config=config,
            reinit="create_new",  # the default hands out the program's own run, which `close` would finish
            settings=wandb.Settings(silent=True),
        )

    def write(self, record: Record) -> None:
        values = scalars(record)
        if record.get("kind") == "event":
            values[f"events/{record['event']}"] = record["step"]
        if values:  # the step as a value: wandb drops what comes for a step before the newest
            self._run.log(values | {"step": record["step"]})

    def close(self) -> None:
        self._run.finish()


class TrackioSink:
    """trackio's local database (``TRACKIO_DIR``), as a run of its own; ``trackio show`` displays it."""

    def __init__(self, name: str, *, config: Any = None) -> None:
        import trackio

        # `init` finishes the run of the current context: in an empty one it finds none.
        self._run = Context().run(
            lambda: trackio.init(project="evenstep", name=name, config=config, embed=False, resume="allow")
        )

    def write(self, record: Record) -> None:
        values = scalars(record)
        if values:
            self._run.log(values, step=record["step"])

    def close(self) -> None:
        self._run.finish()


def scalars(record: Record) -> dict[str, Any]:
    """The single numbers of a record, by ``group/name``; of a column of all parameters its largest."""
    kind = record.get("kind")
    if kind == "parameters":
        columns = {name: values for name, values in record.items() if isinstance(values, list)}
        found = {
            f"telemetry/max_{name}": max(filter(_number, values), default=None) for name, values in columns.items()
        }
        return {name: value for name, value in found.items() if value is not None}
    if kind == "window":
        last = {"norms": "norm", "norms_after": "norm_after"}
        numbers = {short: record[name][-1] for name, short in last.items() if name in record}
        numbers |= {"spike_rate": record["spike_rate"]}
        return {f"telemetry/{name}": value for name, value in numbers.items() if _number(value)}
    if kind == "lowbit":
        layers = record["layers"].items()
        return {f"lowbit/{name}/{key}": x for name, layer in layers for key, x in layer.items() if _number(x)}
    if kind is not None:
        return {}
    group = "validation" if "val_loss" in record else "train"
    return {f"{group}/{key}": value for key, value in record.items() if key != "step" and _number(value)}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


class Guarded:
    """A sink that never raises: the first failure warns, later records are dropped."""

    def __init__(self, sink: Sink) -> None:
        self.sink: Sink | None = sink

    def _try(self, act: Callable[[], None], what: str) -> None:
        try:
            act()
        except Exception as problem:  # whatever a network client, a disk or a database may raise
            name, self.sink = type(self.sink).__name__, None
            first = next(iter(str(problem).splitlines()), "") or type(problem).__name__
            warnings.warn(f"{name} could not {what} ({first}); training goes on without it", stacklevel=4)

    def write(self, record: Record) -> None:
        if self.sink is not None:
            sink = self.sink
            self._try(lambda: sink.write(record), "write")

    def close(self) -> None:
        if self.sink is not None:
            sink = self.sink
            self._try(sink.close, "be closed")
            self.sink = None


def guarded(sink: Sink) -> Guarded:
    return sink if isinstance(sink, Guarded) else Guarded(sink)


def opened(build: Callable[[], Sink], extra: str) -> Guarded | None:
    """The sink that ``build`` makes; None, with a warning, where it cannot be made (no network, no disk). EvenstepError
    when its package is not installed."""
    try:
        return Guarded(build())
    except ModuleNotFoundError as problem:
        raise EvenstepError(f"telemetry: {problem.name} is not installed; pip install '{extra}'") from None
    except Exception as problem:
        first = next(iter(str(problem).splitlines()), "") or type(problem).__name__
        warnings.warn(f"{extra} could not be started ({first}); training goes on without it", stacklevel=2)
        return None
