"""metrics.jsonl: one JSON object a line, written at once, and never two lines for one moment of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from evenstep.errors import EvenstepError
from evenstep.telemetry.schema import read_records, to_line
from evenstep.train.checkpoint import way_on
from evenstep.train.files import replace_text

if TYPE_CHECKING:
    from evenstep.train.run import Run


class Metrics:
    """Appends records to a file. ``last_step`` (on resume): later lines, and a line torn by a kill, are cut first.

    Lines of training and validation, and those of telemetry, which have a ``kind``.
    ``last_train`` and ``last_validation`` are the newest records of the former, None before the first.
    """

    def __init__(self, path: Path, last_step: int | None = None) -> None:
        self.path = path
        self.seconds = 0.0  # of training, as the newest record has them
        self.last_train: dict[str, Any] | None = None
        self.last_validation: dict[str, Any] | None = None
        if last_step is not None and path.exists():
            kept = up_to(last_step, read_records(path))
            for record in kept:
                self._remember(record)
            replace_text(path, "".join(to_line(record) for record in kept))
        try:
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run
        except OSError as problem:
            raise EvenstepError(f"could not write {path}: {problem.strerror}; give another --out") from problem

    @property
    def validated(self) -> int | None:
        """The step of the newest validation."""
        return self.last_validation["step"] if self.last_validation else None

    def _remember(self, record: dict[str, Any]) -> None:
        if "kind" in record:
            return
        self.seconds = record.get("seconds", self.seconds)
        if "val_loss" in record:
            self.last_validation = record
        else:
            self.last_train = record

    def write(self, record: dict[str, Any]) -> None:
        try:
            self._file.write(to_line(record))
            self._file.flush()
        except OSError as problem:
            raise EvenstepError(
                f"could not write {self.path}: {problem.strerror}; make room and {way_on(self.path.parent)}"
            ) from problem
        self._remember(record)

    def close(self) -> None:
        self._file.close()


class NoMetrics(Metrics):
    """Those of a process that does not write them."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.last_train = self.last_validation = None

    def write(self, record: dict[str, Any]) -> None:
        self._remember(record)

    def close(self) -> None:
        pass


def metrics_of(run: Run) -> Metrics | NoMetrics:
    """The log of ``run``, cut to what came up to its step. What it says decides what is done next, so all processes
    know it."""
    path, step, world = run.out / "metrics.jsonl", run.step_number, run.world
    metrics = Metrics(path, last_step=step) if world.speaks else NoMetrics()
    metrics.seconds, metrics.last_train, metrics.last_validation = world.from_first(
        lambda: (metrics.seconds, metrics.last_train, metrics.last_validation)
    )
    return metrics


def up_to(last_step: int, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a run resumed at ``last_step`` keeps. Telemetry tells of a step when it is drained, so of its lines those
    that stand after a later step's are cut too: they are written again."""
    kept, past = [], False
    for record in records:
        later = record["step"] > last_step
        past = past or later
        if not later and not (past and "kind" in record):
            kept.append(record)
    return kept


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The training and validation records of the file in order, telemetry's left out; lines that are no JSON object
    with a step (torn by a kill) are left out too."""
    return [record for record in read_records(path, telemetry=False) if "kind" not in record]
