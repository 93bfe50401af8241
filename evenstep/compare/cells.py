"""The cells of a grid: a command with options, a directory with its files, and a result.

`Cell` is a pretraining run, `Task` the call of a Python function (as in the studies of lab/). Both make a `Job` for an
engine, and read their outcome from the files that the job writes. As a program, this module performs a task:
``python -m evenstep.compare.cells DIRECTORY`` reads ``DIRECTORY/task.json`` and writes ``DIRECTORY/result.json``.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from evenstep.compare.engines import Command, Job
from evenstep.compare.table import Group, Table, merged
from evenstep.errors import EvenstepError
from evenstep.train.config import Config
from evenstep.train.config_io import build, config_hash, override, to_toml
from evenstep.train.files import replace_text
from evenstep.train.log import read_metrics

FINISHED, HOPELESS, DIVERGED = "finished", "hopeless", "diverged"

QUIET = (
    ("telemetry.enabled", "false"), ("sample.tokens", "0"), ("checkpoint.keep", "1"), ("log.curve", "false"),
    ("log.report", "false"),
)  # fmt: skip
"""Options of every run of a grid, and their texts, unless the table or the command line has them: they turn off files
and texts that are of use for a single run only."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """The result of a cell. ``loss``: final validation loss, or None if the run did not complete. ``why``: the reason
    why the run was given up. ``curve``: (tokens, validation loss)."""

    status: str
    loss: float | None = None
    why: str = ""
    tokens: int = 0
    summary: dict[str, Any] = field(default_factory=dict, repr=False)
    curve: list[tuple[int, float]] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Cell:
    """A pretraining run.

    Args:
        named: the cell's name. By default the name holds a hash of everything that decides the result, so that two
            tables which need the same run share it.
        setting: facts that a study stores with the result.
    """

    group: Group
    stage: str
    lr: float
    seed: int
    tokens: int
    config: Config = field(repr=False, compare=False)
    named: str = ""
    setting: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def name(self) -> str:
        config = self.config
        kind = (config.optim.name, config.lowbit or config.train.dtype, config.model.label)
        words = (*kind, f"lr{self.lr:g}", f"seed{self.seed}")
        return self.named or re.sub(r"[^\w.-]+", "-", "-".join((*words, config_hash(self.config)[:10])))

    @property
    def label(self) -> str:
        where = f"{self.group.row}/{self.group.precision}/{self.group.size}"
        return f"{where} lr {self.lr:g} seed {self.seed} ({self.stage}, {self.tokens:,} tokens)"

    def job(self, pool: Pool, say: Say, processes: int = 1) -> Job:
        """A job of `evenstep pretrain`, which resumes from the last checkpoint if there is one. With several processes
        it runs through torchrun, data-parallel unless its options choose another mode; the batch size is the same."""
        recipe, out = pool.directory / f"{self.name}.toml", pool.run(self)
        if not recipe.exists():
            recipe.parent.mkdir(parents=True, exist_ok=True)
            replace_text(recipe, to_toml(self.config))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        program = [sys.executable, *(launcher if processes > 1 else ()), "-m", "evenstep", "pretrain"]
        how = ["--parallel.mode", "ddp"] if processes > 1 and self.config.parallel.mode == "none" else []
        first, again = [*program, str(recipe), "--out", str(out), *how], [*program, "--resume", str(out)]
        command = Command(first, again, out / "checkpoints", pool.log(self))
        return Job(self.name, command, lambda: self._train_here(pool), processes)

    def _train_here(self, pool: Pool) -> None:
        from contextlib import redirect_stdout

        from evenstep.train.run import Run

        # Cells that are trained in this process are too short to be worth resuming.
        shutil.rmtree(pool.run(self), ignore_errors=True)
        with pool.log(self).open("a") as log, redirect_stdout(log):
            Run(replace(self.config, out=str(pool.run(self))), say=lambda text: None).fit()

    def outcome(self, pool: Pool) -> Outcome | None:
        path, given_up = pool.run(self) / "summary.json", pool.given_up(self)
        study = {"setting": self.setting} if self.setting else {}
        if path.exists():
            summary = json.loads(path.read_text(encoding="utf-8")) | study
            curve = pool.curve(self, "val_loss")
            return Outcome(FINISHED, summary["val_loss"], "", summary["tokens"], summary, curve)
        if given_up.exists():
            facts = json.loads(given_up.read_text(encoding="utf-8"))
            loss = facts["loss"] if facts["status"] == HOPELESS else None
            return Outcome(facts["status"], loss, facts["why"], facts["tokens"], study)
        return None

    def check_setting(self, outcome: Outcome, where: str) -> None:
        """Do nothing: the name of the cell identifies its setting."""


def make_cell(table: Table, group: Group, stage: str, lr: float, seed: int) -> Cell:
    """The cell of one run of a table. Raises EvenstepError, with the table and the line, for invalid options."""
    tokens = table.tokens(group, stage)
    options = merged(merged(override({}, QUIET), table.options(group)), {"optim": {"lr": lr}, "seed": seed})
    options["train"] = {**options.get("train", {}), "tokens": tokens}
    try:
        return Cell(group, stage, lr, seed, tokens, build(options))
    except EvenstepError as problem:
        raise EvenstepError(f"{table.name}, {group.name}/{group.size}: {problem}") from None


# ---- calls of a function ----


@dataclass(frozen=True)
class Task:
    """A call of a function, ``work(setting, directory, say, **given)``, which returns a dict of results.

    Args:
        work: the function, as "module:function".
        setting: everything that the results depend on, in JSON types; stored with the results.
        packages: names of packages whose versions are stored, in addition to evenstep, torch and Python.
        given: arguments that do not change the results, such as the location of the data.
    """

    name: str
    work: str
    setting: Mapping[str, Any] = field(compare=False)
    packages: tuple[str, ...] = field(default=(), compare=False)
    given: Mapping[str, Any] = field(default_factory=dict, compare=False)
    tokens: int = 1

    @property
    def label(self) -> str:
        return self.name

    def job(self, pool: Pool, say: Say, processes: int = 1) -> Job:
        out = pool.run(self)
        out.mkdir(parents=True, exist_ok=True)
        facts = {"work": self.work, "setting": self.setting, "packages": self.packages, "given": self.given}
        replace_text(out / "task.json", _to_json(facts) + "\n")
        again = [sys.executable, "-m", "evenstep.compare.cells", str(out)]
        # A task has no checkpoints: it looks for the files that it keeps in its directory by itself.
        here = functools.partial(perform, out, lambda text: say(f"{self.name}: {text}"))
        return Job(self.name, Command(again, again, out, pool.log(self)), here, processes)

    def outcome(self, pool: Pool) -> Outcome | None:
        path = pool.run(self) / "result.json"
        if not path.exists():
            return None
        run = json.loads(path.read_text(encoding="utf-8"))
        return None if self._different(run) else Outcome(FINISHED, run.get("val_loss"), "", self.tokens, run)

    def check_setting(self, outcome: Outcome, where: str) -> None:
        """Raise EvenstepError if the stored ``outcome`` belongs to another setting."""
        if different := self._different(outcome.summary):
            raise EvenstepError(
                f"{where}: the stored run {self.name} has another setting ({', '.join(different)}); remove its line, "
                "or choose another directory with --store"
            )

    def _different(self, run: Mapping[str, Any]) -> list[str]:
        wanted, known = json.loads(_to_json(self.setting)), run.get("setting", {})
        return sorted(key for key in {*wanted, *known} if wanted.get(key) != known.get(key))


def perform(directory: Path, say: Say = print) -> dict[str, Any]:
    """Perform the task in ``directory`` and write its result there: setting, results, seconds, commit, hardware and
    versions."""
    import torch

    from evenstep.train.hardware import commit, describe_hardware, versions

    task = json.loads((directory / "task.json").read_text(encoding="utf-8"))
    setting, (module, _, function) = task["setting"], task["work"].partition(":")
    where, started = commit(), time.perf_counter()  # before the work, during which someone may commit
    results = getattr(importlib.import_module(module), function)(setting, directory, say, **task["given"])
    run = {
        "setting": setting,
        **results,
        "seconds": round(time.perf_counter() - started, 1),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": where,
        "hardware": describe_hardware(torch.device(setting.get("device", "cpu"))),
        "versions": versions(*task["packages"]),
    }
    replace_text(directory / "result.json", _to_json(run) + "\n")
    return run


def _to_json(value: Any) -> str:
    from evenstep.telemetry.schema import finite

    plain = finite(json.loads(json.dumps(value)))  # JSON has no tuples and no NaN
    return json.dumps(plain, ensure_ascii=False)


# ---- files ----


class Pool:
    """The directory of the cells. ``NAME/`` is a run; beside it are its recipe, its log, and, if it was given up, the
    reason."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()  # a job may run in another working directory

    def run(self, cell: Cell | Task) -> Path:
        return self.directory / cell.name

    def log(self, cell: Cell | Task) -> Path:
        return self.directory / f"{cell.name}.log"

    def given_up(self, cell: Cell) -> Path:
        return self.directory / f"{cell.name}.given-up.json"

    def give_up(self, cell: Cell, status: str, why: str, tokens: int, loss: float | None) -> None:
        """Record that this cell is not to be trained any further."""
        facts = {"status": status, "why": why, "tokens": tokens, "loss": loss}
        replace_text(self.given_up(cell), json.dumps(facts) + "\n")

    def settle(self, cell: Cell | Task, problem: str) -> None:
        """Record a divergence. Any other ``problem`` (a missing package, a full disk) is not recorded, so that the next
        call tries again."""
        if "training stopped" in problem and isinstance(cell, Cell):
            at = self.curve(cell, "loss")
            self.give_up(cell, DIVERGED, problem.split(";")[0].removeprefix("error: "), at[-1][0] if at else 0, None)

    def tidy(self, cell: Cell | Task) -> None:
        """Delete the checkpoints of a cell that has an outcome; those of hundreds of cells would fill a disk."""
        shutil.rmtree(self.run(cell) / "checkpoints", ignore_errors=True)

    def curve(self, cell: Cell | Task, key: str) -> list[tuple[int, float]]:
        """(tokens, value) of ``key`` in the run's metrics.jsonl so far: "loss" of training, or "val_loss"."""
        path = self.run(cell) / "metrics.jsonl"
        records: Iterable[dict[str, Any]] = read_metrics(path) if path.exists() else ()
        return [(r["tokens"], r[key]) for r in records if r.get(key) is not None]


_FACTS = (
    "commit", "hardware", "model_bytes", "parameters", "peak_memory", "seconds", "state_bytes", "tokens",
    "tokens_per_second", "val_loss", "versions",
)  # fmt: skip


class Store:
    """``DIR/cells.jsonl``, one line for each cell; a later line replaces an earlier one of the same name.

    The file is small enough for a repository, so that a grid can continue on another machine. A result is never used
    for another setting: its name holds a hash of everything that decides it, or its summary has the ``setting``, which
    is compared.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / "cells.jsonl"
        self.outcomes = self._read() if self.path.exists() else {}

    def keep(self, name: str, outcome: Outcome) -> None:
        known = self.outcomes.get(name)
        if known is not None and (known.status, known.loss, known.tokens) == (
            outcome.status, outcome.loss, outcome.tokens,
        ):  # fmt: skip
            return
        whole = "setting" in outcome.summary  # a task has no other record of its results
        summary = {key: value for key, value in outcome.summary.items() if whole or key in _FACTS}
        self.outcomes[name] = outcome
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, **asdict(outcome), "summary": summary}, ensure_ascii=False) + "\n")

    def _read(self) -> dict[str, Outcome]:
        outcomes: dict[str, Outcome] = {}
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                facts = json.loads(line)
                name = facts.pop("name")
                curve = [(int(at), float(loss)) for at, loss in facts.pop("curve")]
                outcomes[name] = Outcome(**facts, curve=curve)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise EvenstepError(
                    f"{self.path}, line {number}: not the outcome of a run; delete the line to repeat the run"
                ) from None
        return outcomes


if __name__ == "__main__":
    perform(Path(sys.argv[1]))
