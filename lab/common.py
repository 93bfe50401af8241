"""The common part of the studies: the options and exit status of their programs, stored runs, and numbers over seeds.

A study is a list of `evenstep.compare.cells.Task`. `train` performs the tasks that are not stored yet, on any engine;
`stored` reads all results for a page.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from evenstep.compare.cells import Store
from evenstep.compare.claims import judge
from evenstep.compare.commands import add_engine, runner_of
from evenstep.compare.grid import CellList, Outcomes
from evenstep.errors import EvenstepError
from evenstep.train.interrupts import Interrupted

Run = dict[str, Any]


# ---- programs ----


def status(work: Callable[[], object]) -> int:
    """Do ``work()`` and return the exit status of the program: 0, or 2 after an EvenstepError or for a missing package,
    with one line on stderr."""
    try:
        work()
    except EvenstepError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as problem:
        print(f"error: the package {problem.name} is not installed; pip install {problem.name}", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_status
    return 0


def add_options(parser: argparse.ArgumentParser, store: Path, out: Path, note: str = "") -> None:
    """Add --store, --out, --jobs and the options of the engine."""
    add = parser.add_argument
    add("--store", metavar="DIR", type=Path, help=f"results go to DIR/cells.jsonl (default: {store}{note})")
    add("--out", metavar="DIR", type=Path, help=f"directory for the files of the runs (default: {out}{note})")
    add("--jobs", metavar="N", type=int, default=0, help="runs at a time; 0: in this process (default: 0)")
    add_engine(parser)


HERE = argparse.Namespace(engine="local", engine_option=[], jobs=0, processes=1)
"""The engine of a study that is called from Python: this process."""


def train(
    cells: Callable[[Outcomes], Iterable[Any]],
    store: Path,
    out: Path,
    args: argparse.Namespace = HERE,
    *,
    say: Callable[[str], None] = lambda text: None,
    show: Callable[[int, Any, Run], None] = lambda number, cell, run: None,
) -> list[Run]:
    """Train the cells that are not stored yet, and return the results of all.

    Args:
        cells: returns the cells for the outcomes known so far.
        show: called as ``show(number, cell, run)`` once for each cell, in their order, as soon as its result is known.
    """
    runner = runner_of([CellList(cells)], args, out, store, say)
    shown = 0

    def done() -> None:
        nonlocal shown
        known = list(cells(runner.outcomes))
        while shown < len(known) and known[shown].name in runner.outcomes:
            cell = known[shown]
            shown += 1
            show(shown, cell, runner.outcomes[cell.name].summary)

    runner.run(done)
    runner.check()
    return [runner.outcomes[cell.name].summary for cell in cells(runner.outcomes)]


# ---- stored runs ----


def stored(directory: Path) -> list[Run]:
    """All runs of ``directory``/cells.jsonl, sorted by name. Raises EvenstepError if there are none."""
    outcomes = Store(directory).outcomes
    if not outcomes:
        raise EvenstepError(f"{directory} holds no runs; run an experiment with --store {directory} first")
    return [{**outcomes[name].summary, "name": name} for name in sorted(outcomes, key=lambda name: name.split("/"))]


def grouped(runs: Iterable[Run], *keys: str) -> dict[Any, list[Run]]:
    """Group runs by a key of their setting, or by the tuple of several keys, in order of first appearance."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        values = tuple(run["setting"].get(key) for key in keys)
        groups.setdefault(values if len(keys) > 1 else values[0], []).append(run)
    return groups


# ---- numbers ----


@dataclass(frozen=True)
class Number:
    """Mean and sample standard deviation (0 for one seed) over ``n`` seeds; NaN if a run has no value."""

    mean: float
    std: float
    n: int

    def text(self, digits: int = 3) -> str:
        if math.isnan(self.mean):
            return "diverged"
        return f"{self.mean:.{digits}f} ± {self.std:.{digits}f}" if self.n > 1 else f"{self.mean:.{digits}f}"


def over_seeds(values: Sequence[float | None]) -> Number:
    known = [math.nan if value is None else float(value) for value in values]
    if not known or any(math.isnan(value) for value in known):
        return Number(math.nan, math.nan, len(known))
    return Number(mean(known), stdev(known) if len(known) > 1 else 0.0, len(known))


def direction(
    better: Iterable[Run], worse: Iterable[Run], key: str, *, higher_is_better: bool, floor: float = 0.0
) -> str:
    """The verdict on the claim that ``better`` beats ``worse`` in ``key``, by `evenstep.compare.claims.judge` over the
    common seeds. ``floor``: the smallest difference that counts."""
    first, second = ({run["setting"]["seed"]: run[key] for run in side} for side in (better, worse))
    return (judge(second, first, floor=floor) if higher_is_better else judge(first, second, floor=floor))[0]


INTERVAL = (
    "*Confirmed* or *opposite*: the whole 95 % interval of the mean difference (Student's t, over the seeds that both "
    "have, which start from the same weights) is on one side of zero; *not confirmed*: it is not, or some runs "
    "diverged; *open*: fewer than two common seeds."
)
