"""Incidents of a run: what began, because of what, and which events followed. `diagnosis.py` puts them into words.

1. **Marks.** The events of the log are complemented by rises of the loss (`loss_rises`) and of the learning rate
   (`rate_jumps`), which are found in the numbers of single steps. The detector of a running training compares a loss
   with 1000 steps; a diagnosis may compare it with the 50 steps before, which also finds a bad batch in a young run.
2. **Incidents.** A loss that rises begins an incident (`rise_incidents`). Everything until `REACH` steps after its end
   is a consequence of it, because after one large update gradients and losses stay unusual for a while.
3. **Causes.** `cause_of` looks back from the first step of an incident: at the learning rate, at the gradients of the
   two updates before, at whether the loss of a single batch was high and fell back at once, and at early warnings.

All functions are pure. Needs NumPy and no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from evenstep.telemetry.lines import event_line, short
from evenstep.telemetry.runlog import RunLog, Series, is_number
from evenstep.telemetry.schema import TO_DEVIATION, Record

WINDOW = 50
"""Losses before a step that its loss is compared with."""

ENOUGH = 20
"""Losses that must be known before one is judged."""

SIGMA = 8.0
"""Deviations (scaled median absolute deviations) by which a loss exceeds the median of its window when it has risen."""

LEAST_RISE = 0.05
"""A rise is at least this share of the median, so that a loss that stands still has no rises of rounding noise."""

LEAST_OF_RANGE = 0.02
"""A rise is at least this share of the range of all losses: near zero, a loss that doubles has not risen."""

RECOVERED = 5
"""Losses whose median must be back at the usual loss for it to have recovered."""

REACH = 20
"""Steps after the end of an incident within which further events are its consequences, and steps before it within
which a change of the learning rate is its cause. In a log of one in 10 steps, these are 20 of its records."""

JUMP = 3.0
"""A learning rate jumps when it grows by at least this factor from one record to the next. A linear warm-up at most
doubles it."""

GROWTH = 2.0
"""A learning rate that grew by at least this factor in the `WINDOW` steps before an incident is named as its cause."""

WARNED = 200
"""Steps before an incident within which early warnings are named."""

ALL = "all parameters"
"""Name in the events of logs that only hold the norm of all gradients (foreign.py)."""

RULED = (
    "spike", "loss_spike", "recovered", "skipped", "nonfinite", "weights_nonfinite", "stays_nonfinite", "reset",
    "useless", "guard",
)  # fmt: skip
"""Kinds of events that have a rule of their own; all others are early warnings."""

Losses = dict[int, float]
"""Step -> loss; NaN for a loss that is NaN or infinite."""


@dataclass(frozen=True)
class Rise:
    """A loss above its usual range: from ``step`` until the loss is back at ``until`` (None: never), usually
    ``before``, at most ``peak``. The last two are NaN when unknown."""

    step: int
    until: int | None
    before: float
    peak: float


@dataclass(frozen=True)
class Jump:
    """A learning rate that rose by ``factor`` at ``step``, to ``rate``. ``since`` is None for a jump from one record
    to the next, and otherwise the step at which a slower growth began."""

    step: int
    factor: float
    rate: float
    since: int | None = None


@dataclass(frozen=True)
class Cause:
    """Why an incident began: a ``kind`` (a key of `diagnosis.ADVICE`), the ``clause`` of a sentence, the ``step`` of
    the cause, and the ``rows``, ``tensors`` and ``numbers`` that are known."""

    kind: str
    clause: str
    step: int
    rows: list[int] | None = None
    tensors: tuple[str, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)


# ---- marks: rises of the loss and of the learning rate ----


def losses_by_step(run: RunLog) -> Losses:
    """The loss of each step that the log has a loss for, from telemetry or else from the training records. A ``null``
    among other losses is one that was not finite."""
    found: Losses = {}
    for window in run.windows:
        for i, value in enumerate(window.get("losses") or ()):
            found[window["first"] + i] = float(value) if is_number(value) else math.nan
    if not found:
        for record in run.train:
            if "loss" in record:
                found[record["step"]] = float(record["loss"]) if is_number(record["loss"]) else math.nan
    return dict(sorted(found.items()))


def loss_rises(losses: Losses) -> list[Rise]:
    """Rises of the loss above the median of the `WINDOW` losses before, by more than `SIGMA` deviations and the least
    rises. Losses that are not finite are left out.

    >>> loss_rises({step: 9.0 if step == 40 else 3.0 + 0.01 * (step % 7) for step in range(60)})
    [Rise(step=40, until=41, before=3.03, peak=9.0)]
    """
    known = [(step, loss) for step, loss in losses.items() if math.isfinite(loss)]
    if len(known) <= ENOUGH:
        return []
    steps, x = [step for step, _ in known], np.array([loss for _, loss in known])
    median, deviation = _usual(x)  # of the losses before each one
    least = np.maximum(LEAST_RISE * np.abs(median), LEAST_OF_RANGE * float(np.ptp(x)))
    limit = median + np.maximum(SIGMA * deviation, least)
    padded = np.append(x, np.full(RECOVERED - 1, x[-1]))
    level = np.median(sliding_window_view(padded, RECOVERED), axis=1)  # of each loss and the four after it
    rises: list[Rise] = []
    end = 0
    for i in np.flatnonzero(x > limit):
        if i < end:
            continue
        # Back at the usual loss: the median of five losses is within one deviation of it, or within a tenth of the
        # least rise for a loss without noise.
        is_back = level <= median[i] + max(deviation[i], 0.1 * least[i])
        after = np.flatnonzero((is_back & (x <= limit[i]))[i + 1 :])
        end = int(i + 1 + after[0]) if len(after) else len(x)
        until = steps[end] if end < len(x) else None
        rises.append(Rise(steps[i], until, float(median[i]), float(x[i:end].max())))
    return rises


def _usual(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Median and scaled median absolute deviation of up to `WINDOW` values before each of ``x`` ``[n]``; NaN for the
    first `ENOUGH`, which no comparison with exceeds."""
    median, deviation = np.full(len(x), np.nan), np.full(len(x), np.nan)
    for i in range(ENOUGH, min(WINDOW, len(x))):
        median[i] = np.median(x[:i])
        deviation[i] = np.median(np.abs(x[:i] - median[i]))
    if len(x) > WINDOW:
        windows = sliding_window_view(x[:-1], WINDOW)  # [n - WINDOW, WINDOW]
        median[WINDOW:] = np.median(windows, axis=1)
        deviation[WINDOW:] = np.median(np.abs(windows - median[WINDOW:, None]), axis=1)
    return median, TO_DEVIATION * deviation


def all_rises(losses: Losses, events: Iterable[Record]) -> list[Rise]:
    """The rises in the losses, and those of ``loss_spike`` events that they do not cover, by step."""
    rises = loss_rises(losses)
    ends = [event for event in events if event["event"] == "recovered"]
    recovered = {event["since"]: event["step"] for event in ends if is_number(event.get("since"))}
    for event in events:
        step = event["step"]
        covered = any(rise.step - 2 <= step <= (math.inf if rise.until is None else rise.until) for rise in rises)
        if event["event"] == "loss_spike" and not covered:
            until = recovered.get(step)
            if until is None:  # an event without a ``since``
                until = next((event["step"] for event in ends if event["step"] >= step), None)
            rises.append(Rise(step, until, _number(event, "loss_before"), _number(event, "loss_after")))
    return sorted(rises, key=lambda rise: rise.step)


def rate_jumps(steps: Sequence[float], rates: Sequence[float]) -> list[Jump]:
    """Jumps of the learning rate from one record to the next, and its growth over `WINDOW` steps.

    >>> rate_jumps(range(1, 9), [1.0, 2.0, 3.0, 3.0, 3.0, 3.0, 300.0, 300.0])
    [Jump(step=7, factor=100.0, rate=300.0, since=None)]
    """
    found = []
    for i in range(3, len(steps)):  # the first rates of a warm-up may grow by any factor
        step, before, now = int(steps[i]), rates[i - 1], rates[i]
        if before > 0 and now >= JUMP * before:
            found.append(Jump(step, now / before, now))
    return found


def growth_before(step: int, steps: Sequence[float], rates: Sequence[float]) -> Jump | None:
    """The growth of the learning rate by at least `GROWTH` in the `WINDOW` steps before ``step``, None for less."""
    recent = [(int(at), rate) for at, rate in zip(steps, rates, strict=True) if step - WINDOW <= at <= step]
    if len(recent) < 3 or recent[0][1] <= 0 or recent[-1][1] < GROWTH * recent[0][1]:
        return None
    (since, low), (at, high) = recent[0], recent[-1]
    return Jump(at, high / low, high, since)


# ---- incidents ----


@dataclass
class Incident:
    """A rise of the loss with its cause and its consequences. ``events`` are the events of the log that belong to it;
    ``rises`` are the rise that began it and the later ones that belong to it."""

    cause: Cause
    rises: list[Rise]
    events: list[Record]

    @property
    def is_open(self) -> bool:
        """Whether the loss has not recovered."""
        return self.rises[-1].until is None

    @property
    def height(self) -> float:
        """The largest rise of the loss; 0 when unknown."""
        heights = [rise.peak - rise.before for rise in self.rises]
        return max((height for height in heights if math.isfinite(height)), default=0.0)


ASIDE = ("reset", "recovered", "guard", "useless")
"""Events that are no consequences of an incident: they are planned, or told otherwise."""


@dataclass(frozen=True)
class Evidence:
    """What causes are looked for in: the ``events`` of a log and its ``losses``, by step, the ``rates`` with their
    ``jumps``, and ``stride``, the steps between two losses."""

    events: list[Record]
    losses: Losses
    rates: Series
    jumps: list[Jump]
    stride: int

    @classmethod
    def of(cls, run: RunLog) -> Evidence:
        """The evidence of a run."""
        losses, rates = losses_by_step(run), run.rates()
        events = sorted(run.events, key=lambda event: event["step"])  # stable: keeps the order within a step
        stride = int(np.median(np.diff([*losses]))) if len(losses) > 1 else 1
        return cls(events, losses, rates, rate_jumps(*rates), max(1, stride))

    @property
    def reach(self) -> int:
        """`REACH` in steps of this log."""
        return REACH * self.stride

    def jump_before(self, step: int) -> Jump | None:
        """The newest jump of the learning rate within `reach` of ``step``."""
        return next((jump for jump in reversed(self.jumps) if step - self.reach <= jump.step <= step), None)

    def within(self, first: float, last: float) -> list[Record]:
        """The events of the steps ``first`` to ``last``, without those that are no consequences."""
        return [event for event in self.events if first <= event["step"] <= last and event["event"] not in ASIDE]

    def loss_after(self, step: int) -> float:
        """The first loss after ``step``, NaN for none."""
        return next(
            (self.losses[at] for at in range(step + 1, step + 2 * self.stride + 1) if at in self.losses), math.nan
        )


def rise_incidents(log: Evidence, rises: Sequence[Rise], end: float = math.inf) -> list[Incident]:
    """The incidents of the ``rises``, in their order, with their events before step ``end``. A rise within
    `Evidence.reach` of the end of the last one belongs to it."""
    groups: list[list[Rise]] = []
    for rise in rises:
        last = groups[-1][-1] if groups else None
        if last is not None and (last.until is None or rise.step <= last.until + log.reach):
            groups[-1].append(rise)
        else:
            groups.append([rise])
    incidents = []
    for group in groups:
        cause, until = cause_of(log, group[0]), group[-1].until
        last_step = math.inf if until is None else until + log.reach
        own = log.within(min(cause.step, group[0].step), min(last_step, end - 1))
        incidents.append(Incident(cause, group, own))
    return incidents


def cause_of(log: Evidence, rise: Rise) -> Cause:
    """The cause of a rise of the loss. The rules are tried in this order, because each of the first four is evidence
    of its own and a spike is usual in a young run."""
    rules = (_weight_cause, _rate_cause, _batch_cause, _warning_cause, _update_cause, _growth_cause)
    return next((cause for rule in rules if (cause := rule(log, rise)) is not None), _unexplained(log, rise))


def _weight_cause(log: Evidence, rise: Rise) -> Cause | None:
    """A weight far above all others: a flipped bit, or code that writes weights. It was found at the first look at the
    weights after the rise, and was not there at the look before."""
    for event in log.events:
        if event["event"] == "warning" and event.get("quantity") == "weight_max":
            since = event.get("since", math.inf)
            if since <= rise.step <= event["step"]:
                value, name = event["tensors"][0]["value"], tensors_text(event)
                clause = f"between {since} and {event['step']} a weight of {name} had become {value:.2g}"
                return Cause("written", clause, rise.step, None, names_of(event), {"weight": float(value)})
    return None


def _rate_cause(log: Evidence, rise: Rise) -> Cause | None:
    jump = log.jump_before(rise.step)
    if jump is None:
        return None
    numbers = {"factor": jump.factor, "rate": jump.rate, "rate_step": jump.step}
    clause = f"the learning rate had risen {factor_text(jump.factor)} times at {jump.step}"
    return Cause("rate", clause, jump.step, numbers=numbers)


def _batch_cause(log: Evidence, rise: Rise) -> Cause | None:
    """The batch of the step itself: its loss is high before the weights change, and that of the next batch is not."""
    own, after = log.losses.get(rise.step, math.nan), log.loss_after(rise.step)
    if not after - rise.before < 0.5 * (own - rise.before):  # False for a NaN
        return None
    at_step = log.within(rise.step, rise.step)
    rows = first_rows(at_step)
    which = f" (rows {rows[0]}-{rows[1]})" if rows else ""
    clause = f"the batch of that step{which} differs from the others: the loss of the next one was {after:.4g}"
    return Cause("batch", clause, rise.step, rows, tuple(name for event in at_step for name in names_of(event)))


def _warning_cause(log: Evidence, rise: Rise) -> Cause | None:
    """An early warning before the loss moved."""
    warnings = [event for event in log.within(rise.step - WARNED, rise.step) if event["event"] not in RULED]
    if not warnings:
        return None
    first = warnings[0]
    clause = f"{rise.step - first['step']} steps before, at {first['step']}, came the first warning: {line_of(first)}"
    return Cause("warning", clause, first["step"], event_rows(first), names_of(first))


def _update_cause(log: Evidence, rise: Rise) -> Cause | None:
    """One of the two updates before: the loss of a step is that of the weights before its own update."""
    events = log.within(rise.step - 2 * log.stride, rise.step - 1)
    spike = max((event for event in events if event["event"] == "spike"), key=ratio_of, default=None)
    if spike is None:
        return None
    clause = f"{spiking_text(spike)} had spiked x{factor_text(ratio_of(spike))} at {spike['step']}"
    return Cause("update", clause, spike["step"], event_rows(spike), names_of(spike), {"ratio": ratio_of(spike)})


def _growth_cause(log: Evidence, rise: Rise) -> Cause | None:
    growth = growth_before(rise.step, *log.rates)
    if growth is None:
        return None
    clause = f"the learning rate had grown {factor_text(growth.factor)} times since {growth.since}"
    return Cause("growth", clause, rise.step, numbers={"factor": growth.factor, "rate": growth.rate})


def _unexplained(log: Evidence, rise: Rise) -> Cause:
    """No cause: the gradients of the step itself, which are as likely a consequence."""
    at_step = log.within(rise.step, rise.step)
    rows = first_rows(at_step)
    spike = max((event for event in at_step if event["event"] == "spike"), key=ratio_of, default=None)
    if spike is not None:
        clause = f"{spiking_text(spike)} spiked x{factor_text(ratio_of(spike))} on the same step"
        return Cause("unexplained", clause, rise.step, rows, names_of(spike), {"ratio": ratio_of(spike)})
    named = next((event for event in at_step if names_of(event)), None)
    where = f"; the largest gradient was that of {short(names_of(named)[0])}" if named is not None else ""
    return Cause("unexplained", f"nothing in the log before it explains it{where}", rise.step, rows, names_of(named))


# ---- facts of an event ----


def factor_text(value: float) -> str:
    """A factor in few digits: 99.99999 is "100", 3.0256 is "3.03", 2e36 is "2e+36"."""
    return f"{value:.0f}" if 9.95 <= value < 1e6 else f"{value:.3g}"


def names_of(event: Record | None) -> tuple[str, ...]:
    """The names of the tensors that an event lists."""
    return tuple(str(tensor["name"]) for tensor in (event or {}).get("tensors", ()))


def tensors_text(event: Record) -> str:
    """The first tensor of an event, and how many more there are."""
    names = names_of(event)
    if not names:
        return "some tensors"
    more = int(event["count"]) - 1 if is_number(event.get("count")) else len(names) - 1
    return short(names[0]) + (f" and {more} more tensor{'s' if more > 1 else ''}" if more > 0 else "")


def is_single(event: Record) -> bool:
    """Whether an event concerns one tensor alone."""
    return bool(event.get("count") == 1 and names_of(event)[:1] != (ALL,))


def spiking_text(event: Record) -> str:
    """The subject of a sentence about a gradient spike."""
    if names_of(event)[:1] == (ALL,):
        return "the norm of all gradients"
    alone = is_single(event)
    return f"the gradient of {tensors_text(event)} alone" if alone else f"the gradients of {tensors_text(event)}"


def ratio_of(event: Record) -> float:
    """The largest ratio of a gradient spike; 0 for other events."""
    ratios = [tensor.get("ratio") for tensor in event.get("tensors", [])]
    return max((float(ratio) for ratio in ratios if is_number(ratio)), default=0.0)


def _number(event: Record, key: str) -> float:
    return float(event[key]) if is_number(event.get(key)) else math.nan


def event_rows(event: Record | None) -> list[int] | None:
    """The data rows of an event, the first and one past the last; None without valid ones."""
    rows = (event or {}).get("rows")
    fits = isinstance(rows, list) and len(rows) == 2 and all(is_number(row) for row in rows)
    return [int(row) for row in rows] if fits and isinstance(rows, list) else None


def first_rows(events: Iterable[Record]) -> list[int] | None:
    """The data rows of the first of the events that has any."""
    return next((rows for rows in map(event_rows, events) if rows), None)


def line_of(event: Record) -> str:
    """The text of an event without its step, for kinds that may be unknown or damaged."""
    try:
        line = event_line({key: value for key, value in event.items() if key != "rows"})
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
        return str(event["event"])
    return line.removeprefix(f"step {event['step']} ").removeprefix("warning: ")
