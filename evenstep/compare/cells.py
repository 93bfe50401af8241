"""A cell: one run of a grid, its configuration, its files, and what became of it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from evenstep.compare.table import Group, Table, merged
from evenstep.errors import EvenstepError
from evenstep.train.config import Config
from evenstep.train.config_io import build, config_hash, to_toml
from evenstep.train.files import replace_text
from evenstep.train.log import read_metrics

FINISHED, HOPELESS, DIVERGED = "finished", "hopeless", "diverged"

_BASE = {
    "telemetry": {"enabled": False},
    "sample": {"tokens": 0},
    "checkpoint": {"keep": 1},
    "log": {"curve": False},
}


@dataclass(frozen=True)
class Cell:
    """``name`` holds a hash of everything that decides the result: two tables that need the same run share it."""

    group: Group
    stage: str
    lr: float
    seed: int
    tokens: int
    config: Config = field(repr=False, compare=False)

    @cached_property
    def name(self) -> str:
        config = self.config
        kind = (config.optim.name, config.lowbit or config.train.dtype, config.model.label)
        words = (*kind, f"lr{self.lr:g}", f"seed{self.seed}")
        return re.sub(r"[^\w.-]+", "-", "-".join((*words, config_hash(self.config)[:10])))


@dataclass(frozen=True)
class Outcome:
    """What became of a cell. ``loss``: of validation at the end; None when it did not get there."""

    status: str
    loss: float | None = None
    why: str = ""
    tokens: int = 0
    summary: dict[str, Any] = field(default_factory=dict, repr=False)
    curve: list[tuple[int, float]] = field(default_factory=list, repr=False)


def make_cell(table: Table, group: Group, stage: str, lr: float, seed: int) -> Cell:
    """EvenstepError, naming table and line, for options that do not make a run."""
    tokens = table.tokens(group, stage)
    options = merged(merged(_BASE, table.options(group)), {"optim": {"lr": lr}, "seed": seed})
    options["train"] = {**options.get("train", {}), "tokens": tokens}
    try:
        return Cell(group, stage, lr, seed, tokens, build(options))
    except EvenstepError as problem:
        raise EvenstepError(f"{table.name}, {group.name}/{group.size}: {problem}") from None


class Pool:
    """The cells' directory: ``NAME/`` is a run, beside it are its recipe, its log, and why it was given up."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def run(self, cell: Cell) -> Path:
        return self.directory / cell.name

    def recipe(self, cell: Cell) -> Path:
        """The recipe that trains it, written."""
        path = self.directory / f"{cell.name}.toml"
        if not path.exists():
            replace_text(path, to_toml(cell.config))
        return path

    def log(self, cell: Cell) -> Path:
        return self.directory / f"{cell.name}.log"

    def _given_up(self, cell: Cell) -> Path:
        return self.directory / f"{cell.name}.given-up.json"

    def give_up(self, cell: Cell, status: str, why: str, tokens: int, loss: float | None) -> None:
        """Remember that this cell is not to be trained (further)."""
        facts = {"status": status, "why": why, "tokens": tokens, "loss": loss}
        replace_text(self._given_up(cell), json.dumps(facts) + "\n")

    def tidy(self, cell: Cell) -> None:
        """Delete the checkpoints of a cell that has an outcome: hundreds of cells would fill a disk."""
        shutil.rmtree(self.run(cell) / "checkpoints", ignore_errors=True)

    def outcome(self, cell: Cell) -> Outcome | None:
        """None while there is none."""
        path = self.run(cell) / "summary.json"
        if path.exists():
            summary = json.loads(path.read_text(encoding="utf-8"))
            return Outcome(FINISHED, summary["val_loss"], "", summary["tokens"], summary, self.validation(cell))
        if self._given_up(cell).exists():
            facts = json.loads(self._given_up(cell).read_text(encoding="utf-8"))
            loss = facts["loss"] if facts["status"] == HOPELESS else None
            return Outcome(facts["status"], loss, facts["why"], facts["tokens"])
        return None

    def records(self, cell: Cell) -> list[dict[str, Any]]:
        path = self.run(cell) / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []

    def training(self, cell: Cell) -> list[tuple[int, float]]:
        """Tokens and training loss of every line of the log so far."""
        return [(r["tokens"], r["loss"]) for r in self.records(cell) if r.get("loss") is not None]

    def validation(self, cell: Cell) -> list[tuple[int, float]]:
        return [(r["tokens"], r["val_loss"]) for r in self.records(cell) if r.get("val_loss") is not None]
