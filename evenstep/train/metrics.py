"""metrics.jsonl: one JSON object a line, written at once, and never two lines for one moment of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from evenstep.errors import EvenstepError
from evenstep.train.checkpoint import way_on
from evenstep.train.files import replace_text


class Metrics:
    """Appends records to a file. ``last_step`` (on resume): later lines, and a line torn by a kill, are cut first.

    ``last_train`` and ``last_validation`` are the newest records of each kind, None before the first.
    """

    def __init__(self, path: Path, last_step: int | None = None) -> None:
        self.path = path
        self.seconds = 0.0  # of training, as the newest record has them
        self.last_train: dict[str, Any] | None = None
        self.last_validation: dict[str, Any] | None = None
        if last_step is not None and path.exists():
            kept = [record for record in read_metrics(path) if record["step"] <= last_step]
            for record in kept:
                self._remember(record)
            replace_text(path, "".join(_line(record) for record in kept))
        try:
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run
        except OSError as problem:
            raise EvenstepError(f"could not write {path}: {problem.strerror}; give another --out") from problem

    @property
    def validated(self) -> int | None:
        """The step of the newest validation."""
        return self.last_validation["step"] if self.last_validation else None

    def _remember(self, record: dict[str, Any]) -> None:
        self.seconds = record.get("seconds", self.seconds)
        if "val_loss" in record:
            self.last_validation = record
        else:
            self.last_train = record

    def write(self, record: dict[str, Any]) -> None:
        try:
            self._file.write(_line(record))
            self._file.flush()
        except OSError as problem:
            raise EvenstepError(
                f"could not write {self.path}: {problem.strerror}; make room and {way_on(self.path.parent)}"
            ) from problem
        self._remember(record)

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of the file in order; lines that are no JSON object with a step (torn by a kill) are left out."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


def finite(value: Any) -> Any:
    """JSON has no NaN or infinity: such numbers become None (null)."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(record: dict[str, Any]) -> str:
    return json.dumps({key: finite(value) for key, value in record.items()}, ensure_ascii=False) + "\n"
