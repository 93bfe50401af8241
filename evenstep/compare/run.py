"""The loop of a comparison: start what is wanted, watch what runs, note what ended, until nothing is wanted."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evenstep.compare.cells import FINISHED, HOPELESS, Cell, Outcome, Pool
from evenstep.compare.schedule import Plan, hopeless
from evenstep.compare.store import Store
from evenstep.compare.workers import FAILED, Here, Process, Worker, settle
from evenstep.errors import EvenstepError
from evenstep.train.files import locked
from evenstep.train.interrupts import Interrupted, raising
from evenstep.train.log import clock

Say = Callable[[str], None]
POLL = 0.5
WATCH = 5.0
"""Seconds between two looks at the processes, and at their logs."""

ENOUGH = 3
"""Runs that fail before any has ended well, for all to be given up."""


@dataclass
class Runner:
    """``run()`` trains what the plans want. ``jobs`` processes at a time, 0: in this process."""

    plans: Sequence[Plan]
    pool: Pool
    jobs: int
    gpus: int
    say: Say
    store: Store | None = None
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    running: dict[str, tuple[Cell, Worker, int, float]] = field(default_factory=dict)
    speeds: list[float] = field(default_factory=list)
    _queue: list[Cell] | None = None
    """What waits, planned anew when something has ended; None before the first look."""
    _watched: float = 0.0

    def run(self, done: Callable[[], None] = lambda: None) -> None:
        """``done`` is called after each cell that ended. Interrupted on Ctrl-C, SIGTERM and SIGHUP, with every running
        cell saved."""
        with locked(self.pool.directory), raising() as raised:
            self.look_up()
            try:
                while self._turn(done):
                    pass
            except KeyboardInterrupt:
                raise Interrupted(
                    "stopped; what was running is saved, and the same command goes on from there",
                    raised[0] if raised else signal.SIGINT,
                ) from None
            finally:
                workers = [worker for _, worker, _, _ in self.running.values()]
                for worker in workers:  # all are asked before one is waited for
                    worker.ask()
                for worker in workers:
                    worker.stop()

    # ---- one turn ----

    def _turn(self, done: Callable[[], None]) -> bool:
        for name in [name for name, (_, worker, _, _) in self.running.items() if worker.done()]:
            self._ended(name)
            done()
        if self._queue is None:
            self._queue = self._waiting()
        free = [slot for slot in range(max(1, self.jobs)) if slot not in {s for _, _, s, _ in self.running.values()}]
        for slot in free[: len(self._queue)]:
            cell = self._queue.pop(0)
            start = Process.start if self.jobs else Here.start
            began = time.monotonic()
            self.running[cell.name] = (cell, start(cell, self.pool, slot, self.gpus), slot, began)
        if self.jobs and self.running and not any(worker.done() for _, worker, _, _ in self.running.values()):
            time.sleep(POLL)
            self._watch()
        return bool(self.running or self._queue)

    def wanted(self) -> list[Cell]:
        """What all plans want now, each run once: the claims of one table after the other's, then the other lines."""
        found: dict[str, tuple[tuple[int, ...], Cell]] = {}
        for number, plan in enumerate(self.plans):
            for (later, stage, turn, place), cell in plan.wanted(self.outcomes):
                key = (later, number, stage, turn, place)
                if cell.name not in found or key < found[cell.name][0]:
                    found[cell.name] = (key, cell)
        return [cell for _, cell in sorted(found.values(), key=lambda item: item[0])]

    def look_up(self) -> None:
        """What earlier calls found; what is wanted depends on it, so again until nothing new is known."""
        while True:
            known = {c.name: self._outcome(c) for c in self.wanted() if c.name not in self.outcomes}
            new = {name: outcome for name, outcome in known.items() if outcome is not None}
            if not new:
                return
            for name, outcome in new.items():
                self._keep(name, outcome)

    def _outcome(self, cell: Cell) -> Outcome | None:
        """What became of it. A cell that was cut short for one table is trained again when another needs its end."""
        stored = self.store.outcomes.get(cell.name) if self.store else None
        outcome = self.pool.outcome(cell) or stored
        return None if outcome is not None and outcome.status == HOPELESS and self._spared(cell) else outcome

    def _keep(self, name: str, outcome: Outcome) -> None:
        self.outcomes[name] = outcome
        if self.store:
            self.store.keep(name, outcome)

    def _spared(self, cell: Cell) -> bool:
        return any(plan.spares(cell) for plan in self.plans)

    def _waiting(self) -> list[Cell]:
        self.look_up()
        busy = {*self.outcomes, *self.failed, *self.running}
        return [cell for cell in self.wanted() if cell.name not in busy]

    def _ended(self, name: str) -> None:
        cell, worker, _, began = self.running.pop(name)
        problem = worker.problem()
        seconds = time.monotonic() - began
        outcome = self._outcome(cell)  # a process that was stopped as hopeless has one, too
        if outcome is None and settle(cell, self.pool, problem or "no summary was written") != FAILED:
            outcome = self._outcome(cell)
        if outcome is None:
            self.failed[name] = problem or "no summary was written"
            self._queue = self._waiting()
            self._tell(cell, f"failed: {self.failed[name]}", seconds)
            if len(self.failed) >= ENOUGH and not self.speeds:
                raise EvenstepError(f"the first {ENOUGH} runs failed, the last one because: {problem}")
            return
        self._keep(name, outcome)
        self.pool.tidy(cell)
        self._queue = self._waiting()
        if outcome.status == FINISHED:
            self.speeds.append(seconds / cell.tokens)
            said = "no validation" if outcome.loss is None else f"validation loss {outcome.loss:.4f}"
        else:
            said = f"{outcome.status}: {outcome.why}"
        self._tell(cell, said, seconds)

    def _tell(self, cell: Cell, said: str, seconds: float) -> None:
        left = self._queue or []
        rest = sum(c.tokens for c in left) + sum(c.tokens for c, _, _, _ in self.running.values())
        pace = sum(self.speeds) / len(self.speeds) if self.speeds else 0.0
        about = f", about {clock(rest * pace / max(1, self.jobs))}" if rest and pace else ""
        group = cell.group
        self.say(
            f"{group.row}/{group.precision}/{group.size} lr {cell.lr:g} seed {cell.seed} ({cell.stage}, "
            f"{cell.tokens:,} tokens): {said} [{clock(seconds)}; {len(left)} waiting{about}]"
        )

    def _watch(self) -> None:
        """Stop what is hopeless."""
        if time.monotonic() - self._watched < WATCH:
            return
        self._watched = time.monotonic()
        for cell, worker, _, _ in list(self.running.values()):
            if self._spared(cell):
                continue
            rivals = {r.name: r for plan in self.plans for r in plan.rivals(cell)}
            curves = [self.pool.training(r) for r in rivals.values()]
            mine = self.pool.training(cell)
            why = hopeless(mine, curves, cell.tokens)
            if why and not worker.done():
                worker.stop()
                if not (self.pool.run(cell) / "summary.json").exists():
                    self.pool.give_up(cell, HOPELESS, why, *mine[-1])


def default_jobs(gpus: int) -> int:
    """One process for each GPU, else for each core that this process may use."""
    import os

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return gpus or cores


def pool_directory(out: Path) -> Path:
    return out / "cells"
