"""What the papers claim about low-bit training, and what our numbers say to each claim, by rule."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from compare_lowbit import CLAIMS, LOW, OPTIMIZERS, PRECISIONS

from evenstep.compare.claims import FLOOR
from evenstep.compare.paired import judge

Cell = tuple[str, str]
"""Optimizer and precision."""

# Perplexity on C4, arXiv:2502.17055; "bf16, 4-bit budget" is Adam trained as long as the 4-bit runs.
_4BIT = ("130M", "350M", "1B")
_BF16 = ("60M", "130M", "350M", "1B")
BUDGET = "bf16, 4-bit budget"
PUBLISHED: dict[Cell, dict[str, float]] = {
    ("adamw", "bf16"): dict(zip(_BF16, (34.09, 24.91, 18.77, 16.13), strict=True)),
    ("adamw + clip", "bf16"): dict(zip(_BF16, (33.33, 24.88, 18.51, 15.22), strict=True)),
    ("spam", "bf16"): dict(zip(_BF16, (30.46, 23.36, 17.42, 14.66), strict=True)),
    ("stable_spam", "bf16"): dict(zip(_BF16, (28.84, 22.21, 16.85, 13.90), strict=True)),
    ("adamw", BUDGET): dict(zip(_4BIT, (24.53, 21.38, 19.73), strict=True)),
    ("adamw", "int4"): dict(zip(_4BIT, (26.4, 24.14, 21.59), strict=True)),
    ("adamw + clip", "int4"): dict(zip(_4BIT, (26.30, 21.64, 19.74), strict=True)),
    ("spam", "int4"): dict(zip(_4BIT, (25.03, 20.19, 19.98), strict=True)),
    ("stable_spam", "int4"): dict(zip(_4BIT, (24.33, 17.76, 17.42), strict=True)),
    ("adamw", "fp4"): dict(zip(_4BIT, (28.9, 24.59, 22.01), strict=True)),
    ("adamw + clip", "fp4"): dict(zip(_4BIT, (28.27, 20.84, 20.25), strict=True)),
    ("spam", "fp4"): dict(zip(_4BIT, (26.78, 20.35, 19.74), strict=True)),
    ("stable_spam", "fp4"): dict(zip(_4BIT, (26.31, 19.49, 18.48), strict=True)),
}

RULES = [
    "Two cells with several seeds are compared by the 95 % interval of their mean difference over the seeds that both "
    f"have, which begin alike (Student's t, at least {FLOOR} to each side): all of it on the claim's side is "
    "*confirmed*, all of it on the other side *opposite*, else *not confirmed*. What rests on the sweep's one seed "
    "must differ by more than the largest range over seeds that any long cell has. *Open*: runs are missing. A "
    "side whose runs all diverged has lost; where some did, nothing is confirmed. "
    '"Rise at the highest rate" was added when "range over rates" was known.',
]


@dataclass(frozen=True)
class Row:
    """One run; ``val_loss`` None: it diverged."""

    optimizer: str
    precision: str
    lr: float
    seed: int
    tokens: int
    val_loss: float | None
    tokens_per_second: int | None = None

    @property
    def loss(self) -> float:
        return math.inf if self.val_loss is None else self.val_loss


class Results:
    """The runs: ``sweep`` (the fewest tokens, seed 0) and ``long`` (more)."""

    def __init__(self, rows: list[Row]) -> None:
        fewest = min(row.tokens for row in rows)
        self.sweep = [row for row in rows if row.tokens == fewest]
        most = max(row.tokens for row in rows)
        self.long = [row for row in rows if row.tokens == most and most > fewest]

    @staticmethod
    def cells(rows: list[Row]) -> list[Cell]:
        return list(dict.fromkeys((row.optimizer, row.precision) for row in rows))

    def by_rate(self, optimizer: str, precision: str) -> dict[float, float]:
        return {r.lr: r.loss for r in self.sweep if (r.optimizer, r.precision) == (optimizer, precision)}

    def best_rate(self, optimizer: str, precision: str) -> float | None:
        loss = {lr: x for lr, x in self.by_rate(optimizer, precision).items() if x < math.inf}
        return min(loss, key=lambda lr: loss[lr]) if loss else None

    def rate_range(self, optimizer: str, precision: str) -> float | None:
        """Largest minus smallest loss over all rates of the sweep; None where some are missing."""
        loss = self.whole(optimizer, precision)
        return _minus(max(loss.values()), min(loss.values())) if loss else None

    def rise(self, optimizer: str, precision: str) -> float | None:
        """Loss at the highest rate minus that at the best one; None where some are missing."""
        loss = self.whole(optimizer, precision)
        return _minus(loss[max(loss)], min(loss.values())) if loss else None

    def whole(self, optimizer: str, precision: str) -> dict[float, float]:
        """``by_rate`` where no rate of the sweep is missing, else nothing."""
        loss = self.by_rate(optimizer, precision)
        return loss if len(loss) == len({row.lr for row in self.sweep}) else {}

    def seeds(self, optimizer: str, precision: str) -> dict[int, float]:
        """Losses of the long runs by seed, at ``long_rate``."""
        rate = self.long_rate(optimizer, precision)
        return {r.seed: r.loss for r in self._long(optimizer, precision) if r.lr == rate}

    def long_rate(self, optimizer: str, precision: str) -> float | None:
        """The rate of a cell's long runs; of several, that with the most seeds, then with the lowest mean."""
        by_rate = self.long_by_rate(optimizer, precision)
        return min(by_rate, key=lambda lr: (-len(by_rate[lr]), statistics.mean(by_rate[lr])), default=None)

    def long_by_rate(self, optimizer: str, precision: str) -> dict[float, list[float]]:
        """The losses of a cell's long runs at each rate tried."""
        by_rate: dict[float, list[float]] = {}
        for row in self._long(optimizer, precision):
            by_rate.setdefault(row.lr, []).append(row.loss)
        return by_rate

    def _long(self, optimizer: str, precision: str) -> list[Row]:
        return [r for r in self.long if (r.optimizer, r.precision) == (optimizer, precision)]

    def seed_range(self) -> float | None:
        """The largest range over seeds of a long cell, of those with several seeds that did not diverge."""
        ranges = []
        for cell in self.cells(self.long):
            losses = list(self.seeds(*cell).values())
            if len(losses) > 1 and max(losses) < math.inf:
                ranges.append(max(losses) - min(losses))
        return max(ranges, default=None)

    def missing(self) -> str:
        rates = {row.lr for row in self.sweep}
        wanted = [(o, p) for p in PRECISIONS if p != "bf16" for o in OPTIMIZERS if p != "fp4-official" or "adamw" in o]
        short = sum(len(rates - set(self.by_rate(*cell))) for cell in wanted)
        seeds = {row.seed for row in self.long} | set(range(3))
        long = sum(len(seeds - set(self.seeds(*cell))) for cell in CLAIMS)
        parts = [f"{short} runs of the sweep"] * bool(short) + [f"{long} long runs"] * bool(long)
        return " and ".join(parts) + " are missing" if parts else ""


@dataclass(frozen=True)
class Verdict:
    claim: str
    papers: str
    here: str
    verdict: str


def compare(lower: dict[int, float], higher: dict[int, float]) -> str:
    """The verdict on "lower is below higher" by their losses, seed for seed."""
    return judge(lower, higher, floor=FLOOR)[0]


def compare_single(lower: float | None, higher: float | None, margin: float | None) -> str:
    """The same for two numbers that have to differ by more than ``margin``."""
    if lower is None or higher is None or margin is None:
        return "open"
    if lower == higher:  # both may be infinite
        return "not confirmed"
    return "not confirmed" if abs(lower - higher) <= margin else "confirmed" if lower < higher else "opposite"


def verdicts(results: Results) -> list[Verdict]:
    found = [_below(results, ("stable_spam", low), ("adamw", "bf16"), BUDGET) for low in LOW]
    found += [_below(results, ("stable_spam", low), ("adamw", low), low) for low in LOW]
    found += [_below(results, ("stable_spam", "fp32"), (name, "fp32"), "bf16") for name in ("adamw", "adamw + clip")]
    margin = results.seed_range()
    for what, measured in (("range over rates", results.rate_range), ("rise at the highest rate", results.rise)):
        for precision in ("fp32", *LOW):
            ours, theirs = measured("stable_spam", precision), measured("adamw", precision)
            here = f"{_number(ours)} against {_number(theirs)}"
            claim = f"{what}: stable_spam {precision} below adamw {precision}"
            found.append(Verdict(claim, "", here, compare_single(ours, theirs, margin)))
    leaky, honest = (_best(results, "adamw", name) for name in ("fp4-official", "fp4"))
    claim = "the official FP4's groups leak: adamw fp4-official below adamw fp4 (narrower grid, yet lower loss)"
    here = f"{_number(leaky)} against {_number(honest)}"
    return [*found, Verdict(claim, "", here, compare_single(leaky, honest, margin))]


def _best(results: Results, optimizer: str, precision: str) -> float | None:
    return min(results.whole(optimizer, precision).values(), default=None)


def _minus(a: float, b: float) -> float:
    return math.inf if a == math.inf else a - b


def _number(x: float | None) -> str:
    return "-" if x is None else "diverged" if x == math.inf else f"{x:.3f}"


def _below(results: Results, lower: Cell, higher: Cell, published: str) -> Verdict:
    """``published``: the precision of the papers' row for the higher cell."""
    a, b = (results.seeds(*cell) for cell in (lower, higher))
    means = [statistics.mean(x.values()) if x else None for x in (a, b)]
    here = f"{_number(means[0])} against {_number(means[1])}"
    their = PUBLISHED.get((lower[0], "bf16" if lower[1] == "fp32" else lower[1]))
    other = PUBLISHED.get((higher[0], published))
    both = [size for size in other or {} if size in (their or {})]
    papers = ", ".join(f"{their[size]:g} against {other[size]:g} ({size})" for size in both)
    return Verdict(f"{' '.join(lower)} below {' '.join(higher)}", papers, here, compare(a, b))
