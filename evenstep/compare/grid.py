"""The grid runner: the cells that are needed, their order, the ones that are hopeless, and the loop that trains them.

Each line has two stages: its learning rates with one seed and few tokens, then its seeds at the best rate. The first
stage has the seed `TUNING_SEED`, which is never tested: a rate that is chosen on a tested seed is chosen by the test.
Older results were tuned on seed 0 (`Plan.tuning_seed`). The rates are tried from the middle outwards. A rate is left
out if the one before it, on the way outwards, was already worse than its inner neighbour by more than `RISING`. If the
best rate is the outermost one, another one beyond it is tried, at most ``sweep.extend`` times. With ``sweep.all``,
every rate is trained to its end.

Lines that a claim names go first, with both stages, so that the claims are settled before the table is complete.

A cell of a sweep is hopeless if, after `PATIENCE` of its tokens, its training loss is more than `MARGIN` above that of
another rate of the same line at the same number of tokens.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import mean
from typing import Any, Protocol

from evenstep.compare.cells import FINISHED, HOPELESS, Cell, Outcome, Pool, Say, Store, Task, make_cell
from evenstep.compare.engines import PREEMPTED, Engine
from evenstep.compare.table import Group, Table
from evenstep.errors import EvenstepError
from evenstep.train.files import locked
from evenstep.train.interrupts import Interrupted, raising
from evenstep.train.log import clock

RISING = 0.02
MARGIN = 0.3
PATIENCE = 0.4
STEP = 2.0
"""Ratio between the outermost rate and the one tried beyond it."""
TUNING_SEED = 100
"""Seed of the first stage; tested are seeds from 0 on."""
OLD_TUNING_SEED = 0
"""Seed of the first stage in results that were stored before the two were kept apart."""

Outcomes = Mapping[str, Outcome]
Curve = list[tuple[int, float]]


class CellSource(Protocol):
    """A set of cells as the runner sees it. ``wanted``: the cells needed now, each with its place in the order.
    ``rivals``: the cells whose losses may show that a cell is hopeless. ``spares``: whether a cell is trained to its
    end, hopeless or not."""

    def wanted(self, outcomes: Outcomes) -> list[tuple[tuple[int, ...], Any]]: ...
    def rivals(self, cell: Any) -> list[Any]: ...
    def spares(self, cell: Any) -> bool: ...


@dataclass(frozen=True)
class CellList:
    """The cells that a function returns for the outcomes so far. Each one is trained to its end."""

    cells: Callable[[Outcomes], Iterable[Cell | Task]]

    def wanted(self, outcomes: Outcomes) -> list[tuple[tuple[int, ...], Cell | Task]]:
        return [((0, 0, i, 0), cell) for i, cell in enumerate(self.cells(outcomes))]

    def rivals(self, cell: Cell | Task) -> list[Cell]:
        return []

    def spares(self, cell: Cell | Task) -> bool:
        return True


class Plan:
    """The cells of a table.

    Args:
        table: the table file at one scale.
        stored: the outcomes of earlier calls, among which each line's sweep may be.

    Attributes:
        tuning_seed: line -> the seed of its sweep: ``sweep.seed`` of the table file if it is given, else `TUNING_SEED`,
            unless ``stored`` has runs of the sweep with the old seed and not the whole one with the new seed.
    """

    def __init__(self, table: Table, stored: Outcomes | None = None) -> None:
        self.table = table
        self.groups = table.groups()
        self._cells: dict[tuple[Group, str, float, int], Cell] = {}
        self.tuning_seed = dict.fromkeys(self.groups, int(table.document["sweep"].get("seed", TUNING_SEED)))
        for group in self.groups:  # invalid options raise here, before anything is trained
            self.cell(group, "final", self.table.rates(group)[0], 0)
            if "seed" not in table.document["sweep"] and stored and not self.swept(group, stored):
                self.tuning_seed[group] = OLD_TUNING_SEED
                if not any(cell.name in stored for cell in self.sweep(group, stored)):
                    self.tuning_seed[group] = TUNING_SEED

    def cell(self, group: Group, stage: str, lr: float, seed: int) -> Cell:
        key = (group, stage, lr, seed)
        if key not in self._cells:
            self._cells[key] = make_cell(self.table, *key)
        return self._cells[key]

    # ---- first stage ----

    def sweep(self, group: Group, outcomes: Outcomes) -> list[Cell]:
        """Cells of the rates that are needed so far, from the middle outwards; empty if there is only one rate."""
        rates = self.table.rates(group)
        if len(rates) == 1:
            return []
        rates = self._extended(group, rates, outcomes)
        middle = (len(self.table.rates(group)) - 1) // 2 + rates.index(self.table.rates(group)[0])
        order = sorted(range(len(rates)), key=lambda i: (abs(i - middle), -i))
        cells = [self.cell(group, "sweep", rates[i], self.tuning_seed[group]) for i in order]
        if self.table.document["sweep"].get("all"):
            return cells
        return [
            cell for cell, i in zip(cells, order, strict=True) if not self._rises(group, rates, i, middle, outcomes)
        ]

    def _rises(self, group: Group, rates: list[float], i: int, middle: int, outcomes: Outcomes) -> bool:
        """Whether the loss has already risen on the way from the middle to rate ``i``."""
        step = 1 if i > middle else -1
        way = [self._loss(group, rates[j], outcomes) for j in range(middle, i, step)]
        return any(a is not None and b is not None and b > a + RISING for a, b in pairwise(way))

    def _extended(self, group: Group, rates: list[float], outcomes: Outcomes) -> list[float]:
        for _ in range(self.table.document["sweep"].get("extend", 0)):
            losses = {rate: self._loss(group, rate, outcomes) for rate in rates}
            known = {rate: loss for rate, loss in losses.items() if loss is not None}
            if not known:
                break
            best = min(known, key=lambda rate: known[rate])
            if best == rates[0]:
                rates = [float(f"{best / STEP:.6g}"), *rates]
            elif best == rates[-1]:
                rates = [*rates, float(f"{best * STEP:.6g}")]
        return rates

    def _loss(self, group: Group, rate: float, outcomes: Outcomes) -> float | None:
        """The loss of a sweep's cell: infinite if it was given up, None if it has no outcome yet."""
        outcome = outcomes.get(self.cell(group, "sweep", rate, self.tuning_seed[group]).name)
        if outcome is None:
            return None
        return outcome.loss if outcome.status == "finished" and outcome.loss is not None else float("inf")

    def swept(self, group: Group, outcomes: Outcomes) -> bool:
        return all(cell.name in outcomes for cell in self.sweep(group, outcomes))

    def best_rate(self, group: Group, outcomes: Outcomes) -> float | None:
        """The rate of the second stage; None until a cell of the sweep has finished."""
        rates = self.table.rates(group)
        if len(rates) == 1:
            return rates[0]
        losses = {cell.lr: self._loss(group, cell.lr, outcomes) for cell in self.sweep(group, outcomes)}
        known = {rate: loss for rate, loss in losses.items() if loss is not None and loss < float("inf")}
        return min(known, key=lambda rate: known[rate]) if known else None

    # ---- second stage ----

    def finals(self, group: Group, outcomes: Outcomes) -> list[Cell]:
        """Cells of the seeds at the best rate, once it is known."""
        rate = self.best_rate(group, outcomes)
        if not self.table.has_final(group) or rate is None or not self.swept(group, outcomes):
            return []
        return [self.cell(group, "final", rate, seed) for seed in self.table.document["final"].get("seeds", [0])]

    def wanted(self, outcomes: Outcomes) -> list[tuple[tuple[int, ...], Cell]]:
        """Every cell that is known to be needed, with its place in the order."""
        placed: list[tuple[tuple[int, ...], Cell]] = []
        for place, group in enumerate(self.groups):
            later = 0 if self.table.is_claimed(group) else 1
            placed += [((later, 0, i, place), cell) for i, cell in enumerate(self.sweep(group, outcomes))]
            placed += [((later, 1, i, place), cell) for i, cell in enumerate(self.finals(group, outcomes))]
        return sorted(placed, key=lambda item: item[0])

    def _known(self, cell: Cell) -> list[Cell]:
        """Cells of this table that are the same run as ``cell``, which may belong to another table."""
        return [own for own in self._cells.values() if own.name == cell.name]

    def rivals(self, cell: Cell) -> list[Cell]:
        """The cells of the same line at other rates, one of which may show that this one is hopeless."""
        lines = {own.group for own in self._known(cell) if own.stage == "sweep"}
        return [c for c in self._cells.values() if c.group in lines and c.stage == "sweep" and c.name != cell.name]

    def spares(self, cell: Cell) -> bool:
        """Whether this table needs ``cell`` trained to its end, hopeless or not."""
        return any(own.stage != "sweep" or self.table.document["sweep"].get("all") for own in self._known(cell))


def hopeless(mine: Curve, others: list[Curve], tokens: int) -> str | None:
    """The reason why a cell with the training curve ``mine`` and a budget of ``tokens`` is hopeless, or None."""
    if not mine or mine[-1][0] < PATIENCE * tokens:
        return None
    here, loss = mine[-1][0], recent(mine, mine[-1][0])
    for other in others:
        if other and other[-1][0] >= here:
            least = recent(other, here)
            if loss is not None and least is not None and loss > least + MARGIN:
                return f"training loss {loss:.3f} at {here} tokens, another rate had {least:.3f} there"
    return None


def recent(curve: Curve, tokens: int) -> float | None:
    """Mean of the last three training losses up to ``tokens``."""
    values = [loss for at, loss in curve if at <= tokens][-3:]
    return mean(values) if values else None


# ---- cost ----

SECONDS_PER_TOKEN = 22 / 250_000
"""On one core, for size tiny, a vocabulary of 2048 and 8 x 128 tokens a step in fp32 (docs/log.md)."""
LOWBIT = 1.4
"""Factor on it for low-bit training."""


def estimate(plans: Sequence[Plan], outcomes: Outcomes) -> tuple[list[Cell], list[str]]:
    """The cells of the tables that have no outcome yet, each once; and lines of text that sum them up. For a line whose
    rates are not all tried, the best one is assumed to be the middle one."""
    cells: dict[str, Cell] = {}
    for plan in plans:
        for group in plan.groups:
            rates = plan.table.rates(group)
            of_line = plan.sweep(group, outcomes) + plan.finals(group, outcomes)
            if plan.table.has_final(group) and not plan.swept(group, outcomes):
                seeds = plan.table.document["final"].get("seeds", [0])
                of_line += [plan.cell(group, "final", rates[(len(rates) - 1) // 2], seed) for seed in seeds]
            cells |= {cell.name: cell for cell in of_line if cell.name not in outcomes}
    all_cells = list(cells.values())
    tokens = sum(cell.tokens for cell in all_cells)
    lines = [f"{len(all_cells)} runs, {tokens / 1e6:,.1f}M tokens"]
    if all(plan.table.scale == "small" for plan in plans):
        seconds = sum(c.tokens * SECONDS_PER_TOKEN * (LOWBIT if c.config.lowbit else 1) for c in all_cells)
        lines.append(
            f"about {seconds / 3600:.1f} hours of one core (size tiny; rates that turn out useless are left out, rates "
            "beyond the outermost may be added)"
        )
    return all_cells, lines


# ---- the loop ----

POLL, WATCH = 0.5, 5.0
"""Seconds between two polls of the jobs, and between two readings of their logs."""
ENOUGH = 3
"""Number of failed runs, with none completed, after which the whole grid is given up."""
REQUEUES = 3
"""How often a preempted cell is submitted again."""


@dataclass
class Runner:
    """Trains the cells that the plans want, on an engine.

    Attributes:
        outcomes: those known so far, by the cell's name.
        failed: cell's name -> problem, for cells without an outcome.
        running: cell's name -> cell, the engine's handle, and the time of its start.
        speeds: seconds per token of each run that finished.
    """

    plans: Sequence[CellSource]
    pool: Pool
    engine: Engine
    say: Say
    store: Store | None = None
    processes: int = 1
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    running: dict[str, tuple[Any, Any, float]] = field(default_factory=dict)
    speeds: list[float] = field(default_factory=list)
    _preempted: Counter[str] = field(default_factory=Counter)
    _queue: list[Any] | None = None
    """The waiting cells, planned again whenever a cell has ended; None before the first plan."""
    _watched: float = 0.0

    def run(self, done: Callable[[], None] = lambda: None) -> None:
        """Train until nothing more is wanted.

        Args:
            done: called at the start, when stored outcomes are known, and after each cell that has ended.

        Raises:
            Interrupted: on Ctrl-C, SIGTERM and SIGHUP, after every running cell has saved.
        """
        self.pool.directory.mkdir(parents=True, exist_ok=True)
        with locked(self.pool.directory), raising() as raised:
            self.look_up()
            done()
            try:
                while self._turn(done):
                    pass
            except KeyboardInterrupt:
                raise Interrupted(
                    "stopped; every run is saved, and the same command continues from there",
                    raised[0] if raised else signal.SIGINT,
                ) from None
            finally:
                for wait in (False, True):  # every job is asked to save before any is waited for
                    for _, handle, _ in self.running.values():
                        self.engine.stop(handle, wait)

    def check(self) -> None:
        """Raise EvenstepError if a cell has failed."""
        for name, problem in self.failed.items():
            raise EvenstepError(f"{len(self.failed)} runs failed, the first is {name}: {problem}")

    # ---- one turn ----

    def _turn(self, done: Callable[[], None]) -> bool:
        for name in [name for name, (_, handle, _) in self.running.items() if self.engine.poll(handle)]:
            self._ended(name)
            done()
        if self._queue is None:
            self._queue = self._waiting()
        while self._queue and len(self.running) < self.engine.slots:
            cell = self._queue.pop(0)
            began = time.monotonic()
            self.running[cell.name] = (cell, self.engine.submit(cell.job(self.pool, self.say, self.processes)), began)
        if self.running and not any(self.engine.poll(handle) for _, handle, _ in self.running.values()):
            time.sleep(POLL)
            self._watch()
        return bool(self.running or self._queue)

    def wanted(self) -> list[Any]:
        """The cells that the plans want now, each run once: the lines with claims of every table, then the others."""
        chosen: dict[str, tuple[tuple[int, ...], Any]] = {}
        for number, plan in enumerate(self.plans):
            for (later, stage, turn, place), cell in plan.wanted(self.outcomes):
                key = (later, number, stage, turn, place)
                if cell.name not in chosen or key < chosen[cell.name][0]:
                    chosen[cell.name] = (key, cell)
        return [cell for _, cell in sorted(chosen.values(), key=lambda item: item[0])]

    def look_up(self) -> None:
        """Read the outcomes of earlier calls. The wanted cells depend on them, so repeat until nothing new is found."""
        while True:
            known = {c.name: self._outcome(c) for c in self.wanted() if c.name not in self.outcomes}
            new = {name: outcome for name, outcome in known.items() if outcome is not None}
            if not new:
                return
            for name, outcome in new.items():
                self._keep(name, outcome)

    def _outcome(self, cell: Any) -> Outcome | None:
        """The known outcome of a cell. One that was stopped as hopeless is trained again if another table spares it."""
        stored = self.store.outcomes.get(cell.name) if self.store else None
        if self.store and stored is not None:
            cell.check_setting(stored, str(self.store.path))
        outcome = cell.outcome(self.pool) or stored
        return None if outcome is not None and outcome.status == HOPELESS and self._spared(cell) else outcome

    def _keep(self, name: str, outcome: Outcome) -> None:
        self.outcomes[name] = outcome
        if self.store:
            self.store.keep(name, outcome)

    def _spared(self, cell: Any) -> bool:
        return any(plan.spares(cell) for plan in self.plans)

    def _waiting(self) -> list[Any]:
        self.look_up()
        busy = {*self.outcomes, *self.failed, *self.running}
        return [cell for cell in self.wanted() if cell.name not in busy]

    def _ended(self, name: str) -> None:
        cell, handle, began = self.running.pop(name)
        problem = self.engine.fetch(handle) or "no result was written"
        seconds = time.monotonic() - began
        outcome = self._outcome(cell)  # a job that was stopped as hopeless has one, too
        if outcome is None and problem.startswith(PREEMPTED) and self._preempted[name] < REQUEUES:
            self._preempted[name] += 1
            self._queue = [cell, *(self._queue or ())]
            self._tell(cell, f"{problem}; submitted again", seconds)
            return
        if outcome is None:
            self.pool.settle(cell, problem)
            outcome = self._outcome(cell)
        if outcome is None:
            self.failed[name] = problem
            self._queue = self._waiting()
            self._tell(cell, f"failed: {problem}", seconds)
            if len(self.failed) >= ENOUGH and not self.speeds:
                raise EvenstepError(f"the first {ENOUGH} runs failed, the last one because: {problem}")
            return
        self._keep(name, outcome)
        self.pool.tidy(cell)
        self._queue = self._waiting()
        if outcome.status == FINISHED:
            self.speeds.append(seconds / cell.tokens)
            text = "no validation" if isinstance(cell, Cell) else "done"
            text = text if outcome.loss is None else f"validation loss {outcome.loss:.4f}"
        else:
            text = f"{outcome.status}: {outcome.why}"
        self._tell(cell, text, seconds)

    def _tell(self, cell: Any, text: str, seconds: float) -> None:
        left = self._queue or []
        rest = sum(c.tokens for c in left) + sum(c.tokens for c, _, _ in self.running.values())
        pace = sum(self.speeds) / len(self.speeds) if self.speeds else 0.0
        about = f", about {clock(rest * pace / self.engine.slots)}" if rest and pace else ""
        self.say(f"{cell.label}: {text} [{clock(seconds)}; {len(left)} waiting{about}]")

    def _watch(self) -> None:
        """Stop the running cells that are hopeless."""
        if time.monotonic() - self._watched < WATCH:
            return
        self._watched = time.monotonic()
        for cell, handle, _ in list(self.running.values()):
            if self._spared(cell):
                continue
            rivals = {r.name: r for plan in self.plans for r in plan.rivals(cell)}
            curves = [self.pool.curve(r, "loss") for r in rivals.values()]
            mine = self.pool.curve(cell, "loss")
            why = hopeless(mine, curves, cell.tokens)
            if why and not self.engine.poll(handle):
                self.engine.stop(handle)
                if not (self.pool.run(cell) / "summary.json").exists():
                    self.pool.give_up(cell, HOPELESS, why, *mine[-1])
