"""What a paper says, as a rule on two lines of a table, and whether our runs say so too.

A claim names two lines, ``better`` and ``than``, and a rule:

- ``lower``: better's loss is below than's.
- ``reaches``: better's loss is at most `LEVEL` above than's (for rows that train less, or keep less).
- ``level``: the same, and the memory of model and state together is between the two shares of than's in ``memory``.
- ``memory``: the memory of model and state together is between the two shares of than's in ``memory``.
- ``flatter``: better suffers less from the wrong learning rate (`evenstep.compare.results.sensitivity`), by a fifth.

Losses are compared by their difference over the seeds that both lines have (`evenstep.compare.paired`). When all of its
95 % interval is on the paper's side of the mark, the claim is "confirmed", all of it on the other side "opposite", else
"not confirmed". Half of the interval is taken as at least `FLOOR`; with fewer than three seeds in common it is `FEW`:
no difference of two lines with three seeds strayed further from its mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from evenstep.compare.paired import paired

FLOOR = 0.005
FEW = 0.05
LEVEL = 0.02
"""Nats: two lines that differ by no more are level. The paper that says "matches" has differences of up to 0.025."""
FLATTER = 0.2

CONFIRMED, UNCONFIRMED, OPPOSITE, UNMEASURED = "confirmed", "not confirmed", "opposite", "not measured"

Line = dict[str, Any]
Verdict = tuple[str, str]


def judged(claim: dict[str, Any], lines: list[Line]) -> dict[str, Any] | None:
    """The claim with ``verdict``, ``ours`` (the numbers behind it) and ``seeds``; None when ``lines``, those of one
    size, lack one that it is about."""
    better, than = (_called(lines, claim[key]) for key in ("better", "than"))
    if better is None or than is None:
        return None
    verdict, ours = RULES[claim["rule"]](better, than, claim)
    pairs = len(by_seed(better).keys() & by_seed(than).keys())
    seeds = pairs or min(1, len(better["sweep"]), len(than["sweep"]))
    return {**claim, "verdict": verdict, "ours": ours, "seeds": seeds}


def _called(lines: list[Line], name: str) -> Line | None:
    return next((line for line in lines if name in (line["name"], f"{line['name']}/{line['size']}")), None)


def by_seed(line: Line) -> dict[int, float]:
    """The losses of the seeds that ended well."""
    return {
        cell["seed"]: cell["loss"]
        for cell in line["finals"]
        if cell["status"] == "finished" and cell["loss"] is not None
    }


def difference(better: Line, than: Line) -> tuple[float, float] | None:
    """By how much better's loss is above than's, and half of the interval of that, in nats."""
    found = paired(by_seed(better), by_seed(than))
    if found is None:
        return None
    return found.mean, max(FLOOR, found.within or 0.0) if found.seeds > 2 else FEW


def _compared(better: Line, than: Line, mark: float) -> Verdict:
    """Is better at most ``mark`` above than?"""
    found = difference(better, than)
    if found is None:
        return _diverged(better, than)
    above, within = found
    text = f"{better['mean']:.4f} against {than['mean']:.4f} ({above:+.4f} ± {within:.4f})"
    return (CONFIRMED if above + within < mark else OPPOSITE if above - within > mark else UNCONFIRMED), text


def _lower(better: Line, than: Line, claim: dict[str, Any]) -> Verdict:
    return _compared(better, than, 0.0)


def _reaches(better: Line, than: Line, claim: dict[str, Any]) -> Verdict:
    verdict, text = _compared(better, than, LEVEL)
    share = better["tokens"] / than["tokens"] if text and better["tokens"] and than["tokens"] else 1
    return verdict, text + (f" with {share:.0%} of the tokens" if share != 1 else "")


def _level(better: Line, than: Line, claim: dict[str, Any]) -> Verdict:
    verdict, text = _compared(better, than, LEVEL)
    if difference(better, than) is None:
        return verdict, text
    kept, memory = _keeps(better, than, claim)
    return (UNCONFIRMED if verdict == CONFIRMED != kept else verdict), f"{text}; {memory}"


def kept_bytes(line: Line) -> float:
    """Of model and optimizer state together."""
    return line["model_bytes"] + line["state_bytes"]


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


def _diverged(better: Line, than: Line) -> Verdict:
    """Every seed of one side diverged: the other side has won."""
    lost = [bool(line["finals"]) and not by_seed(line) for line in (better, than)]
    if lost[0] == lost[1]:
        return UNMEASURED, ""
    return (OPPOSITE, f"{better['name']} diverged") if lost[0] else (CONFIRMED, f"{than['name']} diverged")


RULES: dict[str, Callable[[Line, Line, dict[str, Any]], Verdict]] = {
    "lower": _lower,
    "reaches": _reaches,
    "level": _level,
    "memory": _keeps,
    "flatter": _flatter,
}
