"""Claims of the papers as rules on two lines of a table, and the verdict of our runs on them.

A claim names two lines, ``better`` and ``than``, and a rule:

- ``lower``: the loss of ``better`` is below that of ``than``.
- ``reaches``: it is at most `LEVEL` above that of ``than`` (for lines with fewer tokens or less memory).
- ``level``: the same, and the memory of model and optimizer state, relative to that of ``than``, lies between the two
  numbers in ``memory``.
- ``memory``: only the second half of ``level``.
- ``flatter``: ``better`` loses less at a wrong learning rate (`evenstep.compare.results.sensitivity`), by a fifth.

Losses are compared by their mean difference over the seeds that both lines have (`judge`). The half-width of its
interval is at least `FLOOR`; with fewer than three common seeds it is `FEW`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

CONFIRMED, UNCONFIRMED, OPPOSITE, OPEN = "confirmed", "not confirmed", "opposite", "open"

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""The 97.5 % quantile of Student's t with 1, 2, ..., 10 degrees of freedom; the last one is used for more, too."""

BySeed = Mapping[int, float | None]
"""Seed -> a measured value, of which lower is better; None or infinite if the run diverged."""


@dataclass(frozen=True)
class Difference:
    """``first``, ``second``: means over the ``seeds`` common seeds. ``mean``: of first minus second. ``within``: the
    half-width of its 95 % confidence interval by Student's t, infinite for one seed, unless `judge` has set it."""

    first: float
    second: float
    mean: float
    within: float
    seeds: int


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """The difference over the common seeds, or None if there are none."""
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    differences = [first[seed] - second[seed] for seed in seeds]
    n = len(differences)
    within = STUDENT[min(n - 1, len(STUDENT)) - 1] * stdev(differences) / n**0.5 if n > 1 else math.inf
    means = [mean(side[seed] for seed in seeds) for side in (first, second)]
    return Difference(means[0], means[1], mean(differences), within, n)


def judge(
    first: BySeed, second: BySeed, *, mark: float = 0.0, floor: float = 0.0, few: float | None = None
) -> tuple[str, Difference | None]:
    """Judge whether first is less than ``mark`` above second.

    The verdict is ``confirmed`` or ``opposite`` if the whole interval of the difference is on that side of ``mark``,
    ``not confirmed`` if it is not, and ``open`` if there are too few common seeds. A side of which all seeds diverged
    has lost against one of which all seeds finished; if only some diverged, the verdict is ``not confirmed``. In both
    cases the difference is None.

    Args:
        first: the side that the claim says is lower.
        second: the other side.
        mark: the difference that counts as equal.
        floor: lower bound of the interval's half-width.
        few: half-width for fewer than three common seeds. None: at least two are needed, and Student's t applies.

    Example:
        >>> judge({0: 3.1, 1: 3.2, 2: 3.0}, {0: 3.4, 1: 3.5, 2: 3.3})[0]
        'confirmed'
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
    difference = paired(*ended)
    assert difference is not None
    within = few if few is not None and difference.seeds < 3 else max(floor, difference.within)
    below, above = difference.mean + within < mark, difference.mean - within > mark
    return CONFIRMED if below else OPPOSITE if above else UNCONFIRMED, replace(difference, within=within)


# ---- claims of a table ----

FLOOR = 0.005
FEW = 0.08
"""Nats. Chosen because in our claims with three seeds, no seed's difference is further from the mean of the three."""
LEVEL = 0.02
"""Nats, 2 % of a perplexity: lines that differ by no more count as level. In the paper that says "matches", one row is
0.025 above."""
FLATTER = 0.2

UNMEASURED = "not measured"

Line = dict[str, Any]
Verdict = tuple[str, str]


def judged(claim: dict[str, Any], lines: list[Line]) -> dict[str, Any] | None:
    """The claim with ``verdict``, ``ours`` (the numbers behind it) and ``seeds``; None if one of its two lines is not
    among ``lines``, which are of one size."""
    pair = [called(lines, claim[key])[:1] for key in ("better", "than")]
    if not all(pair):
        return None
    better, than = (line for [line] in pair)
    verdict, ours = RULES[claim["rule"]](better, than, claim)
    pairs = len(by_seed(better).keys() & by_seed(than).keys())
    seeds = pairs or min(1, len(better["sweep"]), len(than["sweep"]))
    return {**claim, "verdict": verdict, "ours": ours, "seeds": seeds}


def called(lines: list[Line], name: str | None) -> list[Line]:
    """The lines with ``name``, which is ROW/PRECISION or ROW/PRECISION/SIZE."""
    return [line for line in lines if name in (line["name"], f"{line['name']}/{line['size']}")]


def by_seed(line: Line) -> BySeed:
    """Seed -> loss of the long runs; None for a run that diverged."""
    return {cell["seed"]: cell["loss"] if cell["status"] == "finished" else None for cell in line["finals"]}


def losses_of(line: Line) -> list[float]:
    """The losses of the runs that finished."""
    return [loss for loss in by_seed(line).values() if loss is not None]


def difference(better: Line, than: Line, mark: float = 0.0) -> tuple[str, Difference | None]:
    """The verdict of `judge` on two lines of a table."""
    return judge(by_seed(better), by_seed(than), mark=mark, floor=FLOOR, few=FEW)


def _compared(better: Line, than: Line, mark: float = 0.0) -> Verdict:
    """Whether ``better`` is at most ``mark`` above ``than``, and the numbers."""
    verdict, gap = difference(better, than, mark)
    if verdict == OPEN:
        return UNMEASURED, ""
    if gap is None:
        runs = [(line["name"], len(losses_of(line)), len(by_seed(line))) for line in (better, than)]
        return verdict, "; ".join(f"{name}: {ended} of {n} runs ended well" for name, ended, n in runs)
    return verdict, f"{gap.first:.4f} against {gap.second:.4f} ({gap.mean:+.4f} ± {gap.within:.4f})"


def _lower(better: Line, than: Line, claim: dict[str, Any]) -> Verdict:
    return _compared(better, than)


def _reaches(better: Line, than: Line, claim: dict[str, Any]) -> Verdict:
    verdict, text = _compared(better, than, LEVEL)
    share = better["tokens"] / than["tokens"] if text and better["tokens"] and than["tokens"] else 1
    return verdict, text + (f" with {share:.0%} of the tokens" if share != 1 else "")


def _level(better: Line, than: Line, claim: dict[str, Any]) -> Verdict:
    verdict, text = _compared(better, than, LEVEL)
    kept, memory = _keeps(better, than, claim)
    if UNMEASURED in (verdict, kept):
        return verdict, text
    return (UNCONFIRMED if verdict == CONFIRMED and kept != CONFIRMED else verdict), f"{text}; {memory}"


def kept_bytes(line: Line) -> float:
    """Bytes of model and optimizer state together."""
    return float(line["model_bytes"] + line["state_bytes"])


def _keeps(better: Line, than: Line, claim: dict[str, Any]) -> Verdict:
    if better["model_bytes"] is None or than["model_bytes"] is None:
        return UNMEASURED, ""
    share = kept_bytes(better) / kept_bytes(than)
    low, high = claim["memory"]
    return (CONFIRMED if low <= share <= high else OPPOSITE), f"{share:.0%} of its memory of model and state"


def _flatter(better: Line, than: Line, claim: dict[str, Any]) -> Verdict:
    first, second = better["sensitivity"], than["sensitivity"]
    if first is None or second is None:
        return UNMEASURED, ""
    text = f"mean excess over the best rate {first:.3f} against {second:.3f} nats"
    if first < second * (1 - FLATTER):
        return CONFIRMED, text
    return (OPPOSITE if second < first * (1 - FLATTER) else UNCONFIRMED), text


RULES: dict[str, Callable[[Line, Line, dict[str, Any]], Verdict]] = {
    "lower": _lower,
    "reaches": _reaches,
    "level": _level,
    "memory": _keeps,
    "flatter": _flatter,
}
