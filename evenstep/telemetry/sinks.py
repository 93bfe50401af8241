"""Destinations of records. A sink receives one record at a time, a dict with the keys of docs/telemetry.md, and is
closed at the end.

metrics.jsonl is the file that all tools of evenstep read; the other sinks show the same numbers in TensorBoard,
Weights & Biases, trackio and MLflow. A sink that fails is dropped with one warning, and training continues.
"""

from __future__ import annotations

import io
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import Context
from pathlib import Path
from typing import Any, Protocol, cast

from evenstep.errors import EvenstepError, first_line
from evenstep.telemetry.lines import event_line
from evenstep.telemetry.schema import Record, to_line
from evenstep.telemetry.trouble import warn


class Sink(Protocol):
    """The interface of a sink. Any object with these two methods is one.

    >>> from evenstep import SpikeMonitor
    >>> import torch
    >>> class Last:
    ...     def write(self, record):
    ...         self.record = record
    ...     def close(self):
    ...         print(self.record["kind"])
    >>> model = torch.nn.Linear(2, 1)
    >>> with SpikeMonitor(model, torch.optim.SGD(model.parameters(), lr=0.1), sinks=Last()) as monitor:
    ...     monitor.optimizer.step()
    parameters
    """

    def write(self, record: Record) -> None:
        """Receive a record. Called on one thread, in the order of the steps."""

    def close(self) -> None:
        """Release what the sink holds."""


class JsonlSink:
    """Appends each record to a file as one line of JSON, and flushes it.

    Args:
        path: the file, in a directory that exists. OSError where it cannot be opened.

    A record that arrives after `close`, as where two monitors share a sink, opens the file again.

    >>> import tempfile
    >>> from evenstep.telemetry.schema import read_records
    >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> sink = JsonlSink(path)
    >>> sink.write({"step": 1, "loss": 2.5}); sink.close()
    >>> read_records(path)
    [{'step': 1, 'loss': 2.5}]
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run

    def write(self, record: Record) -> None:
        if self._file.closed:
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self._file.write(to_line(record))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """Writes scalars and events for TensorBoard into ``directory``. Needs the package tensorboard."""

    def __init__(self, directory: Path | str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory))

    def write(self, record: Record) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])
        if record.get("kind") == "event":
            self._writer.add_text(f"events/{record['event']}", event_line(record), record["step"])

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Logs to Weights & Biases, as a run of its own beside the program's run. Needs the package wandb.

    Args:
        directory: where wandb keeps its files.
        name: name of the run.
        mode: "offline" writes to ``directory``/wandb, for a later ``wandb sync``; "online" sends at once.
        config: stored with the run.

    After `close`, wandb's service process writes the last block of an offline file; the exit of the program waits for
    it.
    """

    def __init__(self, directory: Path | str, name: str, *, mode: str = "offline", config: Any = None) -> None:
        import wandb

        self._run: Any = wandb.init(
            project="evenstep",
            name=name,
            dir=str(directory),
            mode=mode,  # type: ignore[arg-type]
            config=config,
            reinit="create_new",  # the default returns the program's own run, which `close` would finish
            settings=wandb.Settings(silent=True),
        )

    def write(self, record: Record) -> None:
        values = scalars(record)
        if record.get("kind") == "event":
            values[f"events/{record['event']}"] = record["step"]
        if values:  # the step is logged as a value: wandb drops values logged for an earlier step than the newest
            self._run.log(values | {"step": record["step"]})

    def close(self) -> None:
        self._run.finish()


class TrackioSink:
    """Logs to trackio's local database (``TRACKIO_DIR``), as a run of its own; ``trackio show`` displays it. Needs the
    package trackio."""

    def __init__(self, name: str, *, config: Any = None) -> None:
        import trackio

        # `init` finishes the run of the current context; an empty context has none.
        self._run: Any = Context().run(
            lambda: trackio.init(project="evenstep", name=name, config=config, embed=False, resume="allow")
        )

    def write(self, record: Record) -> None:
        values = scalars(record)
        if values:
            self._run.log(values, step=record["step"])

    def close(self) -> None:
        self._run.finish()


MLFLOW_PENDING = 100
"""Number of requests to MLflow whose outcome has not been looked at yet. A server that is further behind delays the
training, and a failed request is noticed this many records later at the latest."""


class MlflowSink:
    """Logs to MLflow, as a run of its own in the experiment "evenstep", at the place that MLFLOW_TRACKING_URI names.
    Needs the package mlflow.

    Args:
        name: name of the run.
        config: stored as the run's parameters, ``section.key``; the longest values are cut at 500 characters.
    """

    def __init__(self, name: str, *, config: Any = None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        # A client, and not mlflow.start_run, which would change the program's own active run
        self._client: Any = MlflowClient()
        found = self._client.get_experiment_by_name("evenstep")
        experiment = found.experiment_id if found else self._client.create_experiment("evenstep")
        self._run: str = self._client.create_run(experiment, run_name=name).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in _flat(config or {})]
        for first in range(0, len(params), 100):  # the most that one request may have
            self._client.log_batch(self._run, params=params[first : first + 100])
        # One thread, so that records arrive in order. MLflow's own logging in the background has ten, which collided in
        # its directory of files.
        self._sender = ThreadPoolExecutor(1, "evenstep-mlflow")
        self._sent: deque[Future[Any]] = deque()

    def write(self, record: Record) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(key, float(value), now, record["step"]) for key, value in scalars(record).items()]
        if values:  # by the thread, so that a slow server does not delay the training
            self._sent.append(self._sender.submit(self._client.log_batch, self._run, metrics=values))
        if len(self._sent) > MLFLOW_PENDING:
            self._sent.popleft().result()  # raises if the request has failed

    def close(self) -> None:
        try:
            while self._sent:
                self._sent.popleft().result()
        finally:
            self._sender.shutdown()
            self._client.set_terminated(self._run)


def _flat(tables: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """("section.key", value) for every value of nested tables."""
    found: list[tuple[str, Any]] = []
    for key, value in tables.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return found


def scalars(record: Record) -> dict[str, Any]:
    """The single numbers of a record, under ``group/name``. A vector of all parameters is replaced by its maximum.

    >>> scalars({"step": 3, "loss": 2.5})
    {'train/loss': 2.5}
    """
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
    if kind == "activations":  # a vector of heads is replaced by its maximum
        numbers = {f"{name}/{key}": x for name, module in record["modules"].items() for key, x in module.items()}
        largest = {
            key: max(filter(_number, x), default=None) if isinstance(x, list) else x for key, x in numbers.items()
        }
        return {f"activations/{key}": x for key, x in largest.items() if _number(x)}
    if kind is not None:
        return {}
    group = "validation" if "val_loss" in record else "train"
    return {f"{group}/{key}": value for key, value in record.items() if key != "step" and _number(value)}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


class Guarded:
    """A sink that never raises. The first failure is a warning; later records are dropped and counted in ``lost``.

    Args:
        sink: the sink that does the work.
        lent: the sink is used again later. `close` then only calls its ``flush``, if it has one; `end` closes it.
    """

    def __init__(self, sink: Sink, *, lent: bool = False) -> None:
        self.sink: Sink | None = sink
        self.lent = lent
        self.lost = 0

    def _try(self, act: Callable[[], None], what: str) -> None:
        try:
            act()
        except Exception as problem:  # network clients, disks and databases raise exceptions of any class
            name, self.sink = type(self.sink).__name__, None
            warn(f"{name} could not {what} ({first_line(problem)}); training goes on without it")

    def write(self, record: Record) -> None:
        if self.sink is not None:
            sink = self.sink
            self._try(lambda: sink.write(record), "write")
        if self.sink is None:
            self.lost += 1

    def close(self) -> None:
        if self.sink is None:
            return
        sink = self.sink
        if self.lent:
            self._try(lambda: getattr(sink, "flush", lambda: None)(), "write")
        else:
            self._try(sink.close, "be closed")
            self.sink = None

    def end(self) -> None:
        """Close the sink, even if it is lent."""
        self.lent = False
        self.close()


def guarded(sink: Sink) -> Guarded:
    """``sink`` as a `Guarded` one."""
    return sink if isinstance(sink, Guarded) else Guarded(sink)


def as_sinks(owner: str, given: Any) -> list[Sink]:
    """The sinks that an argument ``sinks`` stands for: one sink or path, or several. A path becomes a `JsonlSink`.

    TypeError, which begins with ``owner``, for anything else. Files are opened only if all of ``given`` is usable.
    """
    if given is None:
        return []
    alone = _is_sink(given) or _is_path(given) or isinstance(given, Mapping) or not isinstance(given, Iterable)
    several = [given] if alone else list(given)
    for sink in several:
        if not _is_path(sink) and not _is_sink(sink):
            raise TypeError(
                f"{owner}: sinks: {sink!r:.80} is no sink; give the path of a .jsonl file, a sink of "
                "evenstep.telemetry.sinks, or an object with write(record) and close()"
            )
    return [JsonlSink(sink) if _is_path(sink) else cast(Sink, sink) for sink in several]


def _is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)


def _is_sink(value: Any) -> bool:
    """Whether ``value`` has the methods of a sink. An open file has them too, but its ``write`` takes text."""
    methods = all(callable(getattr(value, name, None)) for name in ("write", "close"))
    return methods and not isinstance(value, type | io.IOBase)


def opened(build: Callable[[], Sink], extra: str) -> Guarded | None:
    """The sink that ``build`` constructs, guarded; None, with a warning, if that fails (no network, no space). An
    EvenstepError that names ``extra``, what pip installs, if its package is missing."""
    try:
        return Guarded(build())
    except ModuleNotFoundError as problem:
        raise EvenstepError(f"telemetry: {problem.name} is not installed; pip install '{extra}'") from None
    except Exception as problem:
        warn(f"{extra} could not be started ({first_line(problem)}); training goes on without it")
        return None
