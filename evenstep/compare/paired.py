"""Two lines compared seed for seed: is one below the other, and how sure is that?

Runs of one seed begin with the same weights and see the same data in the same order, so what a seed does to both falls
out of their difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import mean, stdev

CONFIRMED, UNCONFIRMED, OPPOSITE, OPEN = "confirmed", "not confirmed", "opposite", "open"

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""The 97.5 % point of Student's t with 1, 2, ... 10 degrees of freedom; the last serves for more, too."""

BySeed = Mapping[int, float | None]
"""What is measured (lower is better) by seed; None or infinite where the run diverged."""


@dataclass(frozen=True)
class Difference:
    """``first`` and ``second``: means over the ``seeds`` that both have. ``mean``: of first minus second; ``within``:
    half of its 95 % confidence interval by Student's t, infinite with a single seed, unless `judge` set it."""

    first: float
    second: float
    mean: float
    within: float
    seeds: int


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """None when the two have no seed in common."""
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    found = [first[seed] - second[seed] for seed in seeds]
    n = len(found)
    within = STUDENT[min(n - 1, len(STUDENT)) - 1] * stdev(found) / n**0.5 if n > 1 else math.inf
    means = [mean(side[seed] for seed in seeds) for side in (first, second)]
    return Difference(means[0], means[1], mean(found), within, n)


def judge(
    first: BySeed, second: BySeed, *, mark: float = 0.0, floor: float = 0.0, few: float | None = None
) -> tuple[str, Difference | None]:
    """Is first less than ``mark`` above second? ``confirmed`` or ``opposite`` where all of the interval of the
    difference says so, else ``not confirmed``; ``open`` where too few seeds are in common.

    A side whose seeds all diverged while the other's all ended has lost; where only some did nothing is confirmed, and
    there is no difference to tell.

    Args:
        floor: half of the interval is at least this.
        few: half of the interval with fewer than three seeds in common; none: two are needed, and Student's t.
    """
    shared = first.keys() & second.keys()
    if len(shared) < (2 if few is None else 1):
        return OPEN, None
    ended = [
        {seed: x for seed in shared if (x := side[seed]) is not None and math.isfinite(x)} for side in (first, second)
    ]
    if any(len(side) < len(shared) for side in ended):
        won = {(0, len(shared)): OPPOSITE, (len(shared), 0): CONFIRMED}
        return won.get((len(ended[0]), len(ended[1])), UNCONFIRMED), None
    found = paired(*ended)
    assert found is not None
    within = few if few is not None and found.seeds < 3 else max(floor, found.within)
    below, above = found.mean + within < mark, found.mean - within > mark
    return CONFIRMED if below else OPPOSITE if above else UNCONFIRMED, replace(found, within=within)
