"""What a paper says, as a rule on two lines of a table, and whether our runs say so too.

A claim names two lines, ``better`` and ``than``, and a rule:

- ``lower``: better's loss is below than's.
- ``reaches``: better's loss is at most than's (for rows that train less, or keep less).
- ``level``: the two losses are the same within the noise, and the memory of model and state together is between the two
  shares of than's in ``memory``.
- ``memory``: the memory of model and state together is between the two shares of than's in ``memory``.
- ``flatter``: better suffers less from the wrong learning rate (`evenstep.compare.results.sensitivity`), by a fifth.

Noise is twice the standard error of the difference of the two means over seeds, at least `FLOOR`; with a single seed on
one side it is `SINGLE`, what the loss of a small model moves by from seed to seed. A difference beyond the noise on the
paper's side is "confirmed", beyond it on the other side "opposite", within it "not confirmed".
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import variance
from typing import Any

FLOOR = 0.005
SINGLE = 0.03
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
    seeds = min(len(losses_of(line)) or min(1, len(line["sweep"])) for line in (better, than))
    return {**claim, "verdict": verdict, "ours": ours, "seeds": seeds}


def _called(lines: list[Line], name: str) -> Line | None:
    return next((line for line in lines if name in (line["name"], f"{line['name']}/{line['size']}")), None)


def losses_of(line: Line) -> list[float]:
    """Of the seeds that ended well."""
    return [cell["loss"] for cell in line["finals"] if cell["status"] == "finished" and cell["loss"] is not None]


def noise(better: Line, than: Line) -> float:
    """In nats, of the difference of the two means."""
    first, second = losses_of(better), losses_of(than)
    if min(len(first), len(second)) < 2:
        return SINGLE
    return max(FLOOR, 2 * (variance(first) / len(first) + variance(second) / len(second)) ** 0.5)


def _difference(better: Line, than: Line) -> tuple[float, float, str] | None:
    """By how much better is below than, the noise of that, and both as a text."""
    if better["mean"] is None or than["mean"] is None:
        return None
    found, within = than["mean"] - better["mean"], noise(better, than)
    text = f"{better['mean']:.4f} against {than['mean']:.4f} ({-found:+.4f}, noise {within:.4f})"
    return found, within, text


def _lower(better: Line, than: Line, claim: dict[str, Any]) -> Verdict:
    measured = _difference(better, than)
    if measured is None:
        return _diverged(better, than)
    found, within, text = measured
    return (CONFIRMED if found > within else OPPOSITE if found < -within else UNCONFIRMED), text


def _reaches(better: Line, than: Line, claim: dict[str, Any]) -> Verdict:
    measured = _difference(better, than)
    if measured is None:
        return _diverged(better, than)
    found, within, text = measured
    share = better["tokens"] / than["tokens"]
    text += f" with {share:.0%} of the tokens" if share != 1 else ""
    return (CONFIRMED if found >= -within else OPPOSITE), text


def _level(better: Line, than: Line, claim: dict[str, Any]) -> Verdict:
    measured = _difference(better, than)
    if measured is None:
        return _diverged(better, than)
    found, within, text = measured
    share = kept_bytes(better) / kept_bytes(than)
    low, high = claim["memory"]
    text += f"; memory of model and state {share:.0%}"
    if found < -within:
        return OPPOSITE, text
    return (CONFIRMED if low <= share <= high else UNCONFIRMED), text


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
    lost = [bool(line["finals"]) and not losses_of(line) for line in (better, than)]
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
