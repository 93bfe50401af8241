"""Which cells of a table are wanted, in which order, and which are hopeless.

Two stages for each line: its learning rates with one seed and few tokens, then its seeds at the best rate. The rates
go from the middle outwards. A rate is left out when the one before it, on the way outwards, was already worse than
its inner neighbour by more than `RISING`; when the best rate is the outermost, one more is tried beyond it, at most
``sweep.extend`` times. With ``sweep.all`` every rate is trained to its end.

Lines that a claim speaks of go first, sweep and seeds, so that the question is settled before the table is full.

A cell of a sweep is hopeless when, after `PATIENCE` of its tokens, its training loss is above that of another rate of
the same line at the same tokens by more than `MARGIN`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from statistics import mean

from evenstep.compare.cells import Cell, Outcome, make_cell
from evenstep.compare.table import Group, Table

RISING = 0.02
MARGIN = 0.3
PATIENCE = 0.4
STEP = 2.0
"""Between a rate and the one tried beyond it."""

Outcomes = Mapping[str, Outcome]
Curve = list[tuple[int, float]]


class Plan:
    """The cells of one table."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.groups = table.groups()
        self._cells: dict[tuple[Group, str, float, int], Cell] = {}
        for group in self.groups:  # what cannot be built is found out now
            self.cell(group, "final", self.table.rates(group)[0], 0)

    def cell(self, group: Group, stage: str, lr: float, seed: int) -> Cell:
        key = (group, stage, lr, seed)
        if key not in self._cells:
            self._cells[key] = make_cell(self.table, *key)
        return self._cells[key]

    # ---- first stage ----

    def sweep(self, group: Group, outcomes: Outcomes) -> list[Cell]:
        """Cells of the rates that are wanted so far, from the middle outwards; empty when there is but one rate."""
        rates = self.table.rates(group)
        if len(rates) == 1:
            return []
        rates = self._extended(group, rates, outcomes)
        middle = (len(self.table.rates(group)) - 1) // 2 + rates.index(self.table.rates(group)[0])
        order = sorted(range(len(rates)), key=lambda i: (abs(i - middle), -i))
        cells = [self.cell(group, "sweep", rates[i], 0) for i in order]
        if self.table.document["sweep"].get("all"):
            return cells
        return [
            cell for cell, i in zip(cells, order, strict=True) if not self._rises(group, rates, i, middle, outcomes)
        ]

    def _rises(self, group: Group, rates: list[float], i: int, middle: int, outcomes: Outcomes) -> bool:
        """Did the loss rise already on the way from the middle to rate ``i``?"""
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
        """Infinite for a cell that was given up, None for one that is not done."""
        outcome = outcomes.get(self.cell(group, "sweep", rate, 0).name)
        if outcome is None:
            return None
        return outcome.loss if outcome.status == "finished" and outcome.loss is not None else float("inf")

    def swept(self, group: Group, outcomes: Outcomes) -> bool:
        return all(cell.name in outcomes for cell in self.sweep(group, outcomes))

    def best_rate(self, group: Group, outcomes: Outcomes) -> float | None:
        """The rate of the second stage; None before the sweep has one that ended well."""
        rates = self.table.rates(group)
        if len(rates) == 1:
            return rates[0]
        found = {cell.lr: self._loss(group, cell.lr, outcomes) for cell in self.sweep(group, outcomes)}
        known = {rate: loss for rate, loss in found.items() if loss is not None and loss < float("inf")}
        return min(known, key=lambda rate: known[rate]) if known else None

    # ---- second stage ----

    def finals(self, group: Group, outcomes: Outcomes) -> list[Cell]:
        """The seeds at the best rate, once that is known."""
        rate = self.best_rate(group, outcomes)
        if not self.table.has_final(group) or rate is None or not self.swept(group, outcomes):
            return []
        return [self.cell(group, "final", rate, seed) for seed in self.table.document["final"].get("seeds", [0])]

    def wanted(self, outcomes: Outcomes) -> list[tuple[tuple[int, ...], Cell]]:
        """Every cell known to be needed now, with its place in the order."""
        found: list[tuple[tuple[int, ...], Cell]] = []
        for place, group in enumerate(self.groups):
            later = 0 if self.table.is_claimed(group) else 1
            found += [((later, 0, i, place), cell) for i, cell in enumerate(self.sweep(group, outcomes))]
            found += [((later, 1, i, place), cell) for i, cell in enumerate(self.finals(group, outcomes))]
        return sorted(found, key=lambda item: item[0])

    def _known(self, cell: Cell) -> list[Cell]:
        """Cells of this table that are the same run as ``cell``, which may be another table's."""
        return [own for own in self._cells.values() if own.name == cell.name]

    def rivals(self, cell: Cell) -> list[Cell]:
        """The other rates of the same line, where one of them may show that this one is hopeless."""
        lines = {own.group for own in self._known(cell) if own.stage == "sweep"}
        return [c for c in self._cells.values() if c.group in lines and c.stage == "sweep" and c.name != cell.name]

    def spares(self, cell: Cell) -> bool:
        """Does this table need ``cell`` trained to its end, hopeless or not?"""
        return any(own.stage != "sweep" or self.table.document["sweep"].get("all") for own in self._known(cell))


def hopeless(mine: Curve, others: list[Curve], tokens: int) -> str | None:
    """Why a cell with the training curve ``mine`` and a budget of ``tokens`` is hopeless, or None."""
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
    """The mean of the last three training losses up to ``tokens``."""
    values = [loss for at, loss in curve if at <= tokens][-3:]
    return mean(values) if values else None
