"""Claims of the papers as rules on two lines of a table, and the verdict of our runs on them.

A claim names two lines, ``better`` and ``than``, and a rule:

- ``lower``: the loss of ``better`` is below that of ``than``.
- ``reaches``: it is at most `LEVEL` above that of ``than`` (for lines with fewer tokens or less memory).
- ``level``: the same, and the memory of model and optimizer state, relative to that of ``than``, lies between the two
  numbers in ``memory``.
- ``memory``: only the second half of ``level``. Bytes are counted and not sampled, so they are compared without a test.
- ``flatter``: ``better`` loses less at a wrong learning rate (`evenstep.compare.results.sensitivity`). Sweeps have one
  seed, so the numbers are shown and there is no verdict.

Losses are compared by their differences over the seeds that both lines have, at least two: a paired t-test (`judge`).
The half-width of the 95 % interval is at least `FLOOR`. A page tests many claims at once, so `settled` corrects their
p-values by Holm's method: the probability that any verdict of the page is wrong by chance is at most `ALPHA`. Every
registered claim about losses counts, measured or not. A claim with ``untestable``, the reason why this scale cannot
test it, has no verdict and does not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

CONFIRMED, UNCONFIRMED, OPPOSITE, OPEN = "confirmed", "not confirmed", "opposite", "open"
UNMEASURED, UNTESTED, UNTESTABLE = "not measured", "not tested", "not testable here"

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""The 97.5 % quantile of Student's t with 1, 2, ..., 10 degrees of freedom; the last one is used for more, too."""

BySeed = Mapping[int, float | None]
"""Seed -> a measured value, of which lower is better; None or infinite if the run diverged."""


@dataclass(frozen=True)
class Difference:
    """``first``, ``second``: means over the ``seeds`` common seeds. ``mean``: of first minus second. ``within``: the
    half-width of its 95 % confidence interval by Student's t, infinite for one seed, unless `judge` has set it. ``p``:
    two-sided p-value of the mean against the mark of `judge`."""

    first: float
    second: float
    mean: float
    within: float
    seeds: int
    p: float = 1.0


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """The difference over the common seeds, or None if there are none."""
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    differences = [first[seed] - second[seed] for seed in seeds]
    n = len(differences)
    within = _quantile(n) * stdev(differences) / n**0.5 if n > 1 else math.inf
    means = [mean(side[seed] for seed in seeds) for side in (first, second)]
    return Difference(means[0], means[1], mean(differences), within, n)


def _quantile(seeds: int) -> float:
    return STUDENT[min(seeds - 1, len(STUDENT)) - 1]


def student(t: float, degrees: int) -> float:
    """The two-sided p-value of ``t`` by Student's t distribution with ``degrees`` of freedom, at least one.

    >>> [round(student(t, n), 4) for t, n in ((12.706, 1), (4.303, 2), (3.182, 3), (2.776, 4))]
    [0.05, 0.05, 0.05, 0.05]
    """
    # The finite sums of Abramowitz and Stegun, 26.7.3 for odd and 26.7.4 for even degrees, with tan(a) = t / sqrt(n).
    sine, cosine = abs(t) / math.hypot(t, degrees**0.5), degrees**0.5 / math.hypot(t, degrees**0.5)
    odd = degrees % 2
    term = sine * cosine if odd else sine
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    inside = (math.atan2(sine, cosine) + total) * 2 / math.pi if odd else total
    return max(0.0, 1.0 - inside)


def judge(first: BySeed, second: BySeed, *, mark: float = 0.0, floor: float = 0.0) -> tuple[str, Difference | None]:
    """Judge whether first is less than ``mark`` above second, by itself: without a correction for other claims.

    The verdict is ``confirmed`` or ``opposite`` if the whole interval of the difference is on that side of ``mark``,
    ``not confirmed`` if it is not, and ``open`` if there are fewer than two common seeds. A side of which all seeds
    diverged has lost against one of which all seeds finished; if only some diverged, the verdict is ``not confirmed``.
    In both cases the difference is None.

    Args:
        first: the side that the claim says is lower.
        second: the other side.
        mark: the difference that counts as equal.
        floor: lower bound of the interval's half-width.

    Example:
        >>> judge({0: 3.1, 1: 3.2, 2: 3.0}, {0: 3.4, 1: 3.5, 2: 3.3})[0]
        'confirmed'
    """
    shared = first.keys() & second.keys()
    if len(shared) < 2:
        return OPEN, None
    ended = [
        {seed: x for seed in shared if (x := side[seed]) is not None and math.isfinite(x)} for side in (first, second)
    ]
    if any(len(side) < len(shared) for side in ended):
        won = {(0, len(shared)): OPPOSITE, (len(shared), 0): CONFIRMED}
        return won.get((len(ended[0]), len(ended[1])), UNCONFIRMED), None
    difference = paired(*ended)
    assert difference is not None
    within = max(floor, difference.within)
    error = within / _quantile(difference.seeds)  # standard error of the mean
    away = difference.mean - mark
    p = student(away / error, difference.seeds - 1) if error else float(away == 0)
    verdict = CONFIRMED if away + within < 0 else OPPOSITE if away - within > 0 else UNCONFIRMED
    return verdict, replace(difference, within=within, p=p)


# ---- claims of a table ----

FLOOR = 0.005
"""Nats."""
LEVEL = 0.02
"""Nats, 2 % of a perplexity: lines that differ by no more count as level. In the paper that says "matches", one row is
0.025 above."""
ALPHA = 0.05

Line = dict[str, Any]
Verdict = tuple[str, str, float | None]
"""The verdict of the claim by itself, the numbers behind it, and the p-value of its test; None if there is no test."""


def judged(claim: dict[str, Any], lines: list[Line]) -> dict[str, Any] | None:
    """The claim by itself, with ``verdict``, ``p``, ``ours`` (the numbers behind it) and ``seeds``; None if one of its
    two lines is not among ``lines``, which are of one size. ``{precision}`` in its text is that of the second line."""
    pair = [called(lines, claim[key])[:1] for key in ("better", "than")]
    if not all(pair):
        return None
    better, than = (line for [line] in pair)
    verdict, ours, p = RULES[claim["rule"]](better, than, claim)
    if reason := claim.get("untestable"):
        verdict, ours, p = UNTESTABLE, "; ".join(filter(None, (ours, reason))), None
    text = claim["text"].replace("{precision}", than.get("precision_label", than["name"]))
    seeds = len(by_seed(better).keys() & by_seed(than).keys()) or min(1, len(better["sweep"]), len(than["sweep"]))
    return {**claim, "text": text, "verdict": verdict, "ours": ours, "seeds": seeds, "p": p}


def settled(claims: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The claims, each judged by itself, with their verdicts corrected by Holm's method over all of them, and ``holm``,
    the corrected p-value (None for a claim that is not tested).

    The smallest of m p-values is multiplied by m, the next by m - 1, and so on, and none may be below the one before.
    A verdict stands if the product is below `ALPHA`. A claim that is not measured counts as one with p = 1, so that
    leaving a claim out makes no other one easier.
    """
    claims = [{**claim, "holm": None} for claim in claims]
    tests = sorted((claim for claim in claims if claim["p"] is not None), key=lambda claim: claim["p"])
    least = 0.0
    for rank, claim in enumerate(tests):
        least = max(least, min(1.0, (len(tests) - rank) * claim["p"]))
        if claim["verdict"] in (UNMEASURED, UNTESTED, OPEN):
            continue
        claim["holm"] = least
        if least >= ALPHA:
            claim["verdict"] = UNCONFIRMED
    return claims


def below_the_false_discovery_rate(claims: Iterable[dict[str, Any]]) -> int:
    """How many of the claims would keep a verdict under the weaker method of Benjamini and Hochberg, by which a share
    of `ALPHA` of the verdicts may be wrong."""
    p = sorted(claim["p"] for claim in claims if claim["p"] is not None)
    return max((rank for rank, one in enumerate(p, 1) if one <= ALPHA * rank / len(p)), default=0)


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
    return judge(by_seed(better), by_seed(than), mark=mark, floor=FLOOR)


def _compared(better: Line, than: Line, mark: float = 0.0) -> Verdict:
    """Whether ``better`` is at most ``mark`` above ``than``, and the numbers."""
    verdict, gap = difference(better, than, mark)
    if verdict == OPEN:
        return (UNTESTED, "fewer than two seeds", 1.0) if better["finals"] and than["finals"] else (UNMEASURED, "", 1.0)
    if gap is None:
        runs = [(line["name"], len(losses_of(line)), len(by_seed(line))) for line in (better, than)]
        text = "; ".join(f"{name}: {ended} of {n} runs ended well" for name, ended, n in runs)
        return verdict, text, 1.0 if verdict == UNCONFIRMED else None
    return verdict, f"{gap.first:.4f} against {gap.second:.4f} ({gap.mean:+.4f} ± {gap.within:.4f})", gap.p


def _lower(better: Line, than: Line, claim: dict[str, Any]) -> Verdict:
    return _compared(better, than)


def _reaches(better: Line, than: Line, claim: dict[str, Any]) -> Verdict:
    verdict, text, p = _compared(better, than, LEVEL)
    share = better["tokens"] / than["tokens"] if text and better["tokens"] and than["tokens"] else 1
    return verdict, text + (f" with {share:.0%} of the tokens" if share != 1 else ""), p


def _level(better: Line, than: Line, claim: dict[str, Any]) -> Verdict:
    verdict, text, p = _compared(better, than, LEVEL)
    kept, memory, _ = _keeps(better, than, claim)
    if verdict in (UNMEASURED, UNTESTED) or kept == UNMEASURED:
        return verdict, text, p
    return (UNCONFIRMED if verdict == CONFIRMED and kept != CONFIRMED else verdict), f"{text}; {memory}", p


def kept_bytes(line: Line) -> float:
    """Bytes of model and optimizer state together."""
    return float(line["model_bytes"] + line["state_bytes"])


def _keeps(better: Line, than: Line, claim: dict[str, Any]) -> Verdict:
    if better["model_bytes"] is None or than["model_bytes"] is None:
        return UNMEASURED, "", None
    share = kept_bytes(better) / kept_bytes(than)
    low, high = claim["memory"]
    return (CONFIRMED if low <= share <= high else OPPOSITE), f"{share:.0%} of its memory of model and state", None


def _flatter(better: Line, than: Line, claim: dict[str, Any]) -> Verdict:
    first, second = better["sensitivity"], than["sensitivity"]
    if first is None or second is None:
        return UNMEASURED, "", None
    rates = [[cell["lr"] for cell in line["sweep"]] for line in (better, than)]
    if rates[0] != rates[1]:
        return UNTESTED, "the sweeps have different rates", None
    return UNTESTED, f"mean excess over the best rate {first:.3f} against {second:.3f} nats; one seed", None


RULES: dict[str, Callable[[Line, Line, dict[str, Any]], Verdict]] = {
    "lower": _lower,
    "reaches": _reaches,
    "level": _level,
    "memory": _keeps,
    "flatter": _flatter,
}
