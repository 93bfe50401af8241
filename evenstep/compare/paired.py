"""The difference of two lines over the seeds that both have.

Runs of one seed begin with the same weights and see the same data in the same order, so that what a seed does to both
falls out of their difference: here its spread is a third of that of the losses themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean, stdev

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""The 97.5 % point of Student's t with 1, 2, ... 10 degrees of freedom; the last serves for more, too."""


@dataclass(frozen=True)
class Difference:
    """``mean`` of first minus second over ``seeds`` pairs; ``within``: half of its 95 % confidence interval by
    Student's t, None with a single pair."""

    mean: float
    within: float | None
    seeds: int


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """Of two lines' results by seed; None when they have no seed in common."""
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    found = [first[seed] - second[seed] for seed in seeds]
    n = len(found)
    within = STUDENT[min(n - 1, len(STUDENT)) - 1] * stdev(found) / n**0.5 if n > 1 else None
    return Difference(mean(found), within, n)
