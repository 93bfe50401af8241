"""What became of cells, in one small file of a repository: a comparison goes on with it on another machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from evenstep.compare.cells import Outcome
from evenstep.errors import EvenstepError

NAME = "cells.jsonl"

_FACTS = (
    "commit", "hardware", "model_bytes", "parameters", "peak_memory", "seconds", "state_bytes", "tokens",
    "tokens_per_second", "val_loss", "versions",
)  # fmt: skip


class Store:
    """``DIR/cells.jsonl``: a line for each cell, a later line instead of an earlier one. A cell's name holds a hash of
    everything that decides the result, so a line is never used for another setting."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / NAME
        self.outcomes = self._read() if self.path.exists() else {}

    def keep(self, name: str, outcome: Outcome) -> None:
        known = self.outcomes.get(name)
        if known is not None and (known.status, known.loss, known.tokens) == (
            outcome.status, outcome.loss, outcome.tokens,
        ):  # fmt: skip
            return
        summary = {key: outcome.summary[key] for key in _FACTS if key in outcome.summary}
        self.outcomes[name] = outcome
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, **asdict(outcome), "summary": summary}) + "\n")

    def _read(self) -> dict[str, Outcome]:
        found: dict[str, Outcome] = {}
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                facts = json.loads(line)
                name = facts.pop("name")
                curve = [(int(at), float(loss)) for at, loss in facts.pop("curve")]
                found[name] = Outcome(**facts, curve=curve)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise EvenstepError(
                    f"{self.path}, line {number}: not the outcome of a run; delete that line, and the run is repeated"
                ) from None
        return found
