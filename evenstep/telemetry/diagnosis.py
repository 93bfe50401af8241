"""A diagnosis of a run in words: what happened first, where, because of what, what followed from it, what to try.

`diagnose` turns the records of a run into findings, each of which is a few sentences with their numbers. It works in
three steps:

1. **Marks.** The events of the log are complemented by rises of the loss (`loss_rises`) and of the learning rate
   (`rate_jumps`), which are found in the numbers of single steps. The detector of a running training compares a loss
   with 1000 steps; a diagnosis may compare it with the 50 steps before, which also finds a bad batch in a young run.
2. **Incidents.** A gradient that is not finite or a loss that rises begins an incident. Everything until `REACH` steps
   after its end is a consequence of it, because after one large update gradients and losses stay unusual for a while.
   Gradient spikes outside of incidents had no effect on the loss.
3. **Causes.** `cause_of` looks back from the first step of an incident: at the learning rate, at the gradients of the
   two updates before, at whether the loss of a single batch was high and fell back at once, and at early warnings.

Incidents with the same kind of cause are one finding. Findings are ordered by what they mean for the run: lost weights
and losses that did not recover come first. All functions are pure. Needs NumPy and no torch.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from evenstep.telemetry.lines import event_line, short
from evenstep.telemetry.runlog import RunLog, Series, is_number
from evenstep.telemetry.schema import Record, finite

WINDOW = 50
"""Losses before a step that its loss is compared with."""

ENOUGH = 20
"""Losses that must be known before one is judged."""

SIGMA = 8.0
"""Deviations (scaled median absolute deviations) by which a loss exceeds the median of its window when it has risen."""

TO_DEVIATION = 1.4826
"""The standard deviation of a normal distribution is 1.4826 times its median absolute deviation."""

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

OUTSTANDING = 100.0
"""A gradient spike of at least this factor has a finding of its own, although the loss did not follow."""

LASTING = 3
"""Losses in a row, up to the end of the log, that must not be finite for the loss to count as lost."""

WARNED = 200
"""Steps before an incident within which early warnings are named."""

ALL = "all parameters"
"""Name in the events of logs that only hold the norm of all gradients (foreign.py)."""

SHOWN = 3
"""Steps or names that a sentence lists."""

LEVELS = ("bad", "spikes", "good", "")
"""Levels of findings, the worst first. ``"spikes"``: something happened and the run went on. ``"good"``: a calm run."""

Losses = dict[int, float]
"""Step -> loss; NaN for a loss that is NaN or infinite."""


@dataclass(frozen=True)
class Finding:
    """One finding of a diagnosis.

    ``kind`` is the kind of cause and ``level`` one of `LEVELS`. ``sentences`` say what happened, with their numbers:
    the first names the step and the cause. ``advice`` is what to try, or "". ``step`` is the first step, None for a
    calm run; ``rows`` are the data rows of the batch that is to blame (first, and one past the last), if they are
    known; ``tensors`` are names of parameters; ``events`` is the number of events of the log that the finding covers;
    ``numbers`` are the numbers of the sentences, by name.
    """

    kind: str
    level: str
    sentences: list[str]
    advice: str = ""
    step: int | None = None
    rows: list[int] | None = None
    tensors: list[str] = field(default_factory=list)
    events: int = 0
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The sentences as one paragraph, without the advice."""
        return " ".join(self.sentences)

    def as_json(self) -> dict[str, Any]:
        """The finding as a dict of types that JSON has."""
        return {**asdict(self), "text": self.text}


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
    """Why an incident began: a ``kind`` (a key of `ADVICE`), the ``clause`` of a sentence, the ``step`` of the cause,
    and what is known of ``rows``, ``tensors`` and ``numbers``."""

    kind: str
    clause: str
    step: int
    rows: list[int] | None = None
    tensors: tuple[str, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)


ADVICE: dict[str, str] = {
    "rate": "Look at the schedule of the learning rate at that step; a longer warm-up or a lower rate after a restart"
    " avoids the jump.",
    "growth": "Give a lower peak learning rate or a longer warm-up (optim.lr, optim.warmup).",
    "batch": "Read the text of that batch; leave out documents like it, or bound their effect with StableSPAM, a"
    " clipped norm (train.clip_norm) or SpikeGuard.",
    "update": "Bound the gradient of a single tensor: StableSPAM or AdaClip clip entries, AdaGC clips tensors;"
    " SpikeGuard skips such steps.",
    "warning": "Lower the learning rate; if attention logits grow, normalise queries and keys (model.qk_norm).",
    "unexplained": "Lower the learning rate, or rewind to a checkpoint before this step and leave its batch out"
    " (SpikeGuard with the action rewind).",
    "weights_nonfinite": "Go back to a checkpoint before that step. If its batch is ordinary text, a weight was"
    " already not finite, which this log cannot show.",
    "written": "The optimizer did not write these values. Look for code that writes weights: initialisation,"
    " resizing of embeddings, merging, conversion between dtypes, or a defective device.",
    "overflow": "The loss was finite, so the backward pass overflowed or divided by zero: look at this tensor's layer,"
    " at its dtype and at the loss scale.",
    "nonfinite": "Read the text of that batch; train.on_nan or SpikeGuard leave such batches out.",
    "spikes": "Nothing needs to be done while the loss does not follow.",
    "lowbit": "Keep these layers in higher precision, or use a recipe that leaves gradients unquantised.",
    "drift": "Lower the learning rate, decay it earlier, or go back to the checkpoint with the lowest loss.",
    "guard": "",
}
"""Kind of a finding -> what to try."""


def diagnose(run: RunLog) -> list[Finding]:
    """The findings of a run, the most serious first; none where nothing can be judged.

    A run without incidents has one finding, which says so.

    >>> from evenstep.telemetry.runlog import run_of
    >>> losses = [3.0 + 0.01 * (i % 5) for i in range(60)]
    >>> losses[30:40] = [6.0] * 10
    >>> rates = [0.001] * 29 + [0.1] * 11 + [0.001] * 20
    >>> window = {"kind": "window", "first": 1, "step": 60, "losses": losses, "lrs": rates}
    >>> print(diagnose(run_of([window], "example"))[0].sentences[0])
    Loss rose at 31; the learning rate had risen 100 times at 30.
    """
    log = Evidence.of(run)
    rises = all_rises(log.losses, log.events)
    lost = lost_weights(log, rises)
    end = lost.step if lost is not None and lost.step is not None else math.inf
    incidents = rise_incidents(log, [rise for rise in rises if rise.step < end], end)
    covered = {id(event) for incident in incidents for event in incident.events}
    rest = [event for event in log.events if event["step"] < end and id(event) not in covered]
    findings = [lost] if lost is not None else []
    # An open incident before the loss of the weights led to it, and is told there.
    findings += rise_findings([incident for incident in incidents if lost is None or not incident.is_open])
    findings += nonfinite_finding(run, rest, log.losses, end)
    findings += spike_findings(rest, others=bool(findings), followed=not log.losses)
    findings += lowbit_finding(rest)
    findings += guard_finding(log.events)
    findings += warning_findings(rest)
    if not any(finding.level == "bad" for finding in findings):
        findings = with_drift(findings, drift_finding(log.losses))
    order = {level: i for i, level in enumerate(LEVELS)}
    findings.sort(key=lambda finding: order[finding.level])  # stable: within a level, the order above
    enough = bool(run.windows) or len(log.losses) > ENOUGH
    return findings or ([CALM] if enough else [])


CALM = Finding("calm", "good", ["Calm: no gradient or loss spiked, and all of them were finite."])


def level_of(findings: Sequence[Finding]) -> str:
    """The level of a whole run: that of its worst finding."""
    return findings[0].level if findings else ""


def loss_summary(run: RunLog) -> str:
    """One sentence about the loss from the first to the last steps, "" for a run with less than two losses."""
    losses = run.losses()[1]
    if len(losses) < 2:
        return ""
    few = max(1, min(20, len(losses) // 2))
    ends = f"from {float(np.median(losses[:few])):.4g} to {float(np.median(losses[-few:])):.4g}"
    return f"The loss went {ends} in {_times(run.steps, 'step')}."


def rows_command(run: RunLog, rows: Sequence[int] | None = None) -> str | None:
    """The command that prints the text of data rows; None for a run whose data evenstep does not know."""
    if "data" not in run.config:
        return None
    return f"evenstep rows {shlex.quote(str(run.path))}" + (f" {rows[0]}-{rows[1]}" if rows else "")


# ---- the diagnosis as text ----


def as_text(run: RunLog) -> str:
    """The diagnosis of a run for a terminal: a paragraph for each finding with what to try, then the notes of the log.

    >>> from evenstep.telemetry.runlog import run_of
    >>> print(as_text(run_of([{"kind": "window", "first": 1, "step": 3, "losses": [3.0, 2.5, 2.0]}], "example")))
    Calm: no gradient or loss spiked, and all of them were finite.
    <BLANKLINE>
    The loss went from 3 to 2 in 3 steps.
    """
    findings = diagnose(run)
    paragraphs = []
    for finding in findings:
        lines = [finding.text]
        lines += [f"  Try: {finding.advice}"] if finding.advice else []
        command = rows_command(run, finding.rows) if finding.rows else None
        lines += [f"  Text of the rows: {command}"] if command else []
        paragraphs.append("\n".join(lines))
    if not findings:
        paragraphs.append(f"Nothing can be said yet: more than {ENOUGH} losses, or telemetry, are needed.")
    last = [*filter(None, [loss_summary(run)]), *(f"Note: {note}." for note in run.notes)]
    return "\n\n".join([*paragraphs, *(["\n".join(last)] if last else [])])


def as_json(run: RunLog) -> str:
    """The diagnosis as JSON: ``run``, ``level``, ``findings`` (the fields of `Finding`, and ``text``), ``loss``, a
    sentence, and the ``notes`` of the log."""
    findings = diagnose(run)
    data = {
        "run": str(run.path),
        "level": level_of(findings),
        "findings": [finding.as_json() for finding in findings],
        "loss": loss_summary(run),
        "notes": run.notes,
    }
    return json.dumps(finite(data), indent=2, ensure_ascii=False)


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


_ASIDE = ("reset", "recovered", "guard", "useless")
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
        return [event for event in self.events if first <= event["step"] <= last and event["event"] not in _ASIDE]

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
    """The cause of a rise of the loss. The rules are tried in this order, because each of the first three is evidence
    of its own and a spike is usual in a young run."""
    rules = (_rate_cause, _batch_cause, _warning_cause, _update_cause, _growth_cause)
    return next((cause for rule in rules if (cause := rule(log, rise)) is not None), _unexplained(log, rise))


def _rate_cause(log: Evidence, rise: Rise) -> Cause | None:
    jump = log.jump_before(rise.step)
    if jump is None:
        return None
    numbers = {"factor": jump.factor, "rate": jump.rate, "rate_step": jump.step}
    clause = f"the learning rate had risen {_factor(jump.factor)} times at {jump.step}"
    return Cause("rate", clause, jump.step, numbers=numbers)


def _batch_cause(log: Evidence, rise: Rise) -> Cause | None:
    """The batch of the step itself: its loss is high before the weights change, and that of the next batch is not."""
    own, after = log.losses.get(rise.step, math.nan), log.loss_after(rise.step)
    if not after - rise.before < 0.5 * (own - rise.before):  # False for a NaN
        return None
    at_step = log.within(rise.step, rise.step)
    rows = _first_rows(at_step)
    which = f" (rows {rows[0]}-{rows[1]})" if rows else ""
    clause = f"the batch of that step{which} differs from the others: the loss of the next one was {after:.4g}"
    return Cause("batch", clause, rise.step, rows, tuple(name for event in at_step for name in _names(event)))


def _warning_cause(log: Evidence, rise: Rise) -> Cause | None:
    """An early warning before the loss moved."""
    warnings = [event for event in log.within(rise.step - WARNED, rise.step) if event["event"] not in RULED]
    if not warnings:
        return None
    first = warnings[0]
    clause = f"{rise.step - first['step']} steps before, at {first['step']}, came the first warning: {_line(first)}"
    return Cause("warning", clause, first["step"], rows_of_event(first), _names(first))


def _update_cause(log: Evidence, rise: Rise) -> Cause | None:
    """One of the two updates before: the loss of a step is that of the weights before its own update."""
    events = log.within(rise.step - 2 * log.stride, rise.step - 1)
    spike = max((event for event in events if event["event"] == "spike"), key=_ratio, default=None)
    if spike is None:
        return None
    clause = f"{_spiking(spike)} had spiked x{_factor(_ratio(spike))} at {spike['step']}"
    return Cause("update", clause, spike["step"], rows_of_event(spike), _names(spike), {"ratio": _ratio(spike)})


def _growth_cause(log: Evidence, rise: Rise) -> Cause | None:
    growth = growth_before(rise.step, *log.rates)
    if growth is None:
        return None
    clause = f"the learning rate had grown {_factor(growth.factor)} times since {growth.since}"
    return Cause("growth", clause, rise.step, numbers={"factor": growth.factor, "rate": growth.rate})


def _unexplained(log: Evidence, rise: Rise) -> Cause:
    """No cause: the gradients of the step itself, which are as likely a consequence."""
    at_step = log.within(rise.step, rise.step)
    rows = _first_rows(at_step)
    spike = max((event for event in at_step if event["event"] == "spike"), key=_ratio, default=None)
    if spike is not None:
        clause = f"{_spiking(spike)} spiked x{_factor(_ratio(spike))} on the same step"
        return Cause("unexplained", clause, rise.step, rows, _names(spike), {"ratio": _ratio(spike)})
    named = next((event for event in at_step if _names(event)), None)
    where = f"; the largest gradient was that of {short(_names(named)[0])}" if named is not None else ""
    return Cause("unexplained", f"nothing in the log before it explains it{where}", rise.step, rows, _names(named))


def rise_findings(incidents: Sequence[Incident]) -> list[Finding]:
    """Findings of rises of the loss: one for each that did not recover and one for each kind of cause, worst first."""
    findings = [_rise_finding([incident]) for incident in incidents if incident.is_open]
    kinds = dict.fromkeys(incident.cause.kind for incident in incidents)
    groups = [[one for one in incidents if one.cause.kind == kind and not one.is_open] for kind in kinds]
    groups = [group for group in groups if group]
    groups.sort(key=lambda group: -max(incident.height for incident in group))
    return findings + [_rise_finding(group) for group in groups]


def _rise_finding(group: Sequence[Incident]) -> Finding:
    """The finding of incidents with the same kind of cause: the worst in detail, the others by their steps."""
    worst = max(group, key=lambda incident: incident.height)
    rise, cause = worst.rises[0], worst.cause
    peak = max((one.peak for one in worst.rises if math.isfinite(one.peak)), default=math.nan)
    sentences = [f"Loss rose at {rise.step}; {cause.clause}."]
    if math.isfinite(rise.before) and math.isfinite(peak):
        sentences.append(f"It went from {rise.before:.4g} to at most {peak:.4g}.")
    sentences += consequences(len([e for e in worst.events if not _begins(e, rise, cause)]))
    if worst.is_open:
        sentences.append("The loss has not recovered from its last spike.")
    else:
        within = max((incident.rises[-1].until or 0) - incident.rises[0].step for incident in group)
        sentences.append(f"The loss spiked {_times(len(group))} and recovered within {_times(within, 'step')}.")
    others = [incident.rises[0].step for incident in group if incident is not worst]
    if others:
        sentences.append(f"The {'other was' if len(others) == 1 else 'others were'} at {_listed(others)}.")
    level = "bad" if worst.is_open else "spikes"
    numbers = {"loss_before": rise.before, "loss_peak": peak, "times": len(group), **cause.numbers}
    return Finding(
        f"loss_{cause.kind}",
        level,
        sentences,
        ADVICE[cause.kind],
        rise.step,
        cause.rows,
        list(cause.tensors),
        sum(len(incident.events) for incident in group),
        {name: value for name, value in numbers.items() if math.isfinite(value)},
    )


def _begins(event: Record, rise: Rise, cause: Cause) -> bool:
    """Whether an event is the beginning of an incident, which its first sentence tells, and no consequence of it."""
    if event["event"] == "loss_spike":
        return bool(event["step"] <= rise.step + 2)
    return bool(event["event"] == "spike" and event["step"] == (rise.step if cause.kind == "batch" else cause.step))


def consequences(count: int) -> list[str]:
    """The sentence about later events, if there are any."""
    if not count:
        return []
    return ["The later event is a consequence."] if count == 1 else [f"The {count:,} later events are consequences."]


# ---- weights, losses and gradients that are not finite ----


def lost_weights(log: Evidence, rises: Sequence[Rise]) -> Finding | None:
    """The finding of weights that are not finite, or of gradients or losses that stay so until the end of the log."""
    kinds = ("weights_nonfinite", "stays_nonfinite")
    event = next((event for kind in kinds for event in log.events if event["event"] == kind), None)
    trailing = _trailing(log.losses)
    if event is None and not trailing:
        return None
    facts: Record = event or {"event": "loss_nonfinite", "step": trailing[0], "since": trailing[0]}
    since = int(facts["since"]) if is_number(facts.get("since")) else int(facts["step"])
    what = {
        "weights_nonfinite": f"Weights are {'NaN' if facts.get('nan', True) else 'infinite'} since step {since}",
        "stays_nonfinite": f"Gradients were not finite on many steps in a row from step {since}",
        "loss_nonfinite": f"The loss is not finite since step {since}",
    }
    head = [what[facts["event"]]]
    first = [e for e in log.within(since, since) if e["event"] in ("nonfinite", "skipped")]
    rise = next((r for r in rises if r.step < since and (r.until is None or r.until + log.reach >= since)), None)
    rows, kind, names, begin = (
        rows_of_event(facts) or _first_rows(first),
        "weights_nonfinite",
        _names(facts),
        since,
    )
    numbers: dict[str, float] = {"since": since}
    if rise is not None:  # 1. The loss had risen before, for a cause of its own.
        cause = cause_of(log, rise)
        head += [f"the loss had risen at {rise.step}", cause.clause]
        kind, begin, numbers = cause.kind, min(cause.step, rise.step), numbers | cause.numbers
    elif (jump := log.jump_before(since)) is not None:  # 2. So had the learning rate.
        head.append(f"the learning rate had risen {_factor(jump.factor)} times at {jump.step}")
        kind, begin, numbers = "rate", jump.step, numbers | {"factor": jump.factor, "rate_step": jump.step}
    elif first and facts["event"] == "weights_nonfinite" and all(e["event"] == "skipped" for e in first):
        # 3. No gradient was applied, so that none can have spoiled the weights.
        head.append(f"the optimizer skipped these gradients, so {_some(facts)} was not finite before them")
        kind, rows = "written", None
    elif len(first) == 1 and _is_single(first[0]):  # 4. One gradient, of a backward pass that began with a finite loss.
        loss = log.losses.get(since, math.nan)
        finite = f", and the loss of that step was finite ({loss:.4g})" if math.isfinite(loss) else ""
        head.append(f"the first gradient that was not finite is that of {_some(first[0])} alone{finite}")
        kind, names = "overflow" if finite else kind, _names(first[0])
    if rows:
        head.append(f"the first bad batch is rows {rows[0]}-{rows[1]}")
    own = log.within(begin, math.inf)
    told = {id(one) for one in [*first, event, *(e for e in own if rise is not None and _begins(e, rise, cause))]}
    later = [one for one in own if id(one) not in told]
    head += [text.lower().rstrip(".") for text in consequences(len(later))]
    sentences = ["; ".join(head) + "."]
    if facts["event"] == "weights_nonfinite" and _names(facts):
        sentences.append(f"They are in {_some(facts)}.")
    advice = ADVICE[kind]
    if begin < since:
        advice = f"Go back to a checkpoint before step {begin}. {advice}"
    return Finding(facts["event"], "bad", sentences, advice, since, rows, list(names), len(own), numbers)


def _trailing(losses: Losses) -> list[int]:
    """The last steps of a log whose losses are all not finite; none if they are fewer than `LASTING`."""
    steps: list[int] = []
    for step, loss in reversed(losses.items()):
        if math.isfinite(loss):
            break
        steps.insert(0, step)
    return steps if len(steps) >= LASTING else []


def nonfinite_finding(run: RunLog, events: Sequence[Record], losses: Losses, end: float) -> list[Finding]:
    """The finding of single steps whose gradient or loss was not finite, before step ``end``."""
    own = [event for event in events if event["event"] in ("skipped", "nonfinite")]
    bad_losses = [step for step, loss in losses.items() if not math.isfinite(loss) and step < end]
    if not own and not bad_losses:
        return []
    counted = sum(window["nonfinite"] for window in run.windows if is_number(window.get("nonfinite")))
    steps = sorted({event["step"] for event in own} | set(bad_losses))
    # Windows also count steps without an event of their own; with lost weights they would count the steps after it.
    count = max(int(counted), len(steps)) if math.isinf(end) else len(steps)
    first = next((event for event in own if event["step"] == steps[0]), None)
    own_rows = rows_of_event(first)
    if first is None:
        head = f"The loss was not finite at step {steps[0]}."
    else:
        rows = f", rows {own_rows[0]}-{own_rows[1]}" if own_rows else ""
        verb = "skipped" if first["event"] == "skipped" else "applied"
        what = f"The gradient of {_some(first)}" if _names(first) else "A gradient"
        done = "" if _names(first)[:1] == (ALL,) else f", and was {verb}"
        head = f"{what} was not finite at step {steps[0]}{rows}{done}."
    sentences = [head, f"{'Gradients were' if own else 'The loss was'} not finite on {_times(count, 'step')}."]
    if len(steps) > 1:
        sentences.append(f"The others were at {_listed(steps[1:])}.")
    names = list(_names(first))
    kind = "overflow" if first is not None and _is_single(first) and steps[0] not in bad_losses else "nonfinite"
    return [
        Finding("nonfinite", "spikes", sentences, ADVICE[kind], steps[0], own_rows, names, len(own), {"steps": count})
    ]


# ---- gradient spikes, low-bit layers, the guard, warnings, slow divergence ----


def spike_findings(events: Sequence[Record], *, others: bool = False, followed: bool = False) -> list[Finding]:
    """Findings of gradient spikes outside of incidents: each outstanding one, and all others together. ``others``:
    spikes within incidents have been told. ``followed``: it is not known that the loss did not follow them."""
    calm = [] if followed else ["The loss did not follow."]
    spikes = [event for event in events if event["event"] == "spike"]
    findings, rest = [], []
    until, following = -math.inf, 0
    large: list[tuple[Record, int]] = []
    for spike in spikes:
        if _ratio(spike) >= OUTSTANDING and not (spike["step"] <= until and _ratio(spike) <= _ratio(large[-1][0])):
            large.append((spike, 0))
            until = spike["step"] + REACH
        elif spike["step"] <= until:
            large[-1] = (large[-1][0], large[-1][1] + 1)
        else:
            rest.append(spike)
    if len(large) > SHOWN:  # a run with many of them: the largest stands for all
        large.sort(key=lambda one: -_ratio(one[0]))
        following = sum(count for _, count in large[1:])
        rest = sorted([*rest, *(spike for spike, _ in large[1:])], key=lambda spike: spike["step"])
        large = large[:1]
    for spike, count in sorted(large, key=lambda one: -_ratio(one[0])):
        where = f", rows {rows[0]}-{rows[1]}" if (rows := rows_of_event(spike)) else ""
        text = f"{_spiking(spike)} spiked x{_factor(_ratio(spike))} at step {spike['step']}{where}."
        sentences = [text[0].upper() + text[1:], *consequences(count), *calm]
        kind = "batch" if spike.get("rows") and not _is_single(spike) else "update"
        findings.append(
            Finding(
                "spike", "spikes", sentences, ADVICE[kind], spike["step"], rows, list(_names(spike)), count + 1,
                {"ratio": _ratio(spike)},
            )
        )  # fmt: skip
    if rest:
        worst = max(rest, key=_ratio)
        names = _names(worst)
        at = f", at most x{_factor(_ratio(worst))} ({short(names[0])}, step {worst['step']})" if names else ""
        sentences = [f"Gradients spiked on {_times(len(rest), 'other step' if others or findings else 'step')}{at}."]
        often = [name for name, count in _counts(rest) if count > 2 and count > len(rest) / 3][:SHOWN]
        if often:
            sentences.append(f"Most often in {', '.join(short(name) for name in often)}.")
        sentences += calm
        numbers = {"steps": len(rest), "ratio": _ratio(worst)}
        findings.append(
            Finding(
                "spikes", "spikes", sentences, ADVICE["spikes"], worst["step"], rows_of_event(worst), list(names),
                len(rest) + following, numbers,
            )
        )  # fmt: skip
    return findings


def _counts(events: Iterable[Record]) -> list[tuple[str, int]]:
    """How often each tensor is the first that an event names, the most frequent first."""
    counts: dict[str, int] = {}
    for event in events:
        for name in _names(event)[:1]:
            counts[name] = counts.get(name, 0) + 1
    return sorted(counts.items(), key=lambda item: -item[1])


def lowbit_finding(events: Sequence[Record]) -> list[Finding]:
    """The finding of layers whose quantised gradients are below their noise."""
    own = [event for event in events if event["event"] == "useless"]
    if not own:
        return []
    names = list(dict.fromkeys(name for event in own for name in _names(event)))
    first = own[0]["step"]
    text = f"The quantised gradient of {_some(own[0])} is below its noise since step {first}."
    return [Finding("lowbit", "spikes", [text], ADVICE["lowbit"], first, None, names, len(own))]


def guard_finding(events: Sequence[Record]) -> list[Finding]:
    """The finding of the actions of a `SpikeGuard`: how many of each kind, and the first with its reason."""
    own = [event for event in events if event["event"] == "guard"]
    if not own:
        return []
    counts: dict[str, int] = {}
    for event in own:
        action = str(event.get("action", "act"))
        counts[action] = counts.get(action, 0) + 1
    verbs = {"skip": "skipped a step", "lower_lr": "lowered the rate", "rewind": "rewound", "stop": "stopped the run"}
    done = " and ".join(f"{verbs.get(action, action)} {_times(count)}" for action, count in counts.items())
    first = own[0]
    # The step of the log is the one that training goes on from; after a rewind it is before the bad one.
    step = int(first["bad_step"]) if is_number(first.get("bad_step")) else first["step"]
    reason = f": {first['reason']}" if first.get("reason") else ""
    sentences = [f"The guard {done}, first at step {step}{reason}."]
    return [Finding("guard", "spikes", sentences, "", step, rows_of_event(first), [], len(own), dict(counts))]


def warning_findings(events: Sequence[Record]) -> list[Finding]:
    """A finding for each quantity of early warnings, and for each kind of event that this module has no rule for."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for event in events:
        if event["event"] not in RULED:
            groups.setdefault((event["event"], str(event.get("quantity", ""))), []).append(event)
    findings = []
    for (kind, _), own in groups.items():
        first = own[0]
        sentences = [f"Early warning at step {first['step']}: {_line(first)}."]
        if len(own) > 1:
            sentences.append(f"The same was reported {_times(len(own) - 1, 'later time')}.")
        rows, names, count = rows_of_event(first), list(_names(first)), len(own)
        findings.append(Finding(kind, "spikes", sentences, ADVICE["warning"], first["step"], rows, names, count))
    return findings


RULED = (
    "spike", "loss_spike", "recovered", "skipped", "nonfinite", "weights_nonfinite", "stays_nonfinite", "reset",
    "useless", "guard",
)  # fmt: skip
"""Kinds of events that have a rule of their own; all others are early warnings."""


def drift_finding(losses: Losses) -> Finding | None:
    """The finding of a loss that ends clearly above its lowest level, None for any other."""
    known = [(step, loss) for step, loss in losses.items() if math.isfinite(loss)]
    width = max(10, min(WINDOW, len(known) // 10))
    if len(known) < 4 * width:
        return None
    x = np.array([loss for _, loss in known])
    levels = np.array([np.median(x[i : i + width]) for i in range(0, len(x) - width + 1, width)])
    levels[-1] = np.median(x[-width:])
    lowest, last = int(levels.argmin()), float(levels[-1])
    noise = TO_DEVIATION * float(np.median(np.abs(np.diff(x)))) / math.sqrt(2)
    least = max(3 * noise, LEAST_RISE * abs(float(levels[lowest])), LEAST_OF_RANGE * float(np.ptp(x)))
    if last - levels[lowest] <= least:
        return None
    step = known[lowest * width + width // 2][0]
    text = f"The loss ends at {last:.4g}, above the {levels[lowest]:.4g} that it had at about step {step}."
    numbers = {"lowest": float(levels[lowest]), "last": last}
    return Finding("drift", "bad", [text, SLOW], ADVICE["drift"], step, numbers=numbers)


SLOW = "It rose slowly: no single step stands out."


def with_drift(findings: Sequence[Finding], drift: Finding | None) -> list[Finding]:
    """``findings`` with the ``drift`` of the loss: a part of the largest rise after the lowest level, if there is one,
    and a finding of its own otherwise."""
    if drift is None or drift.step is None:
        return list(findings)
    found = list(findings)
    for i, finding in enumerate(found):
        if finding.kind.startswith("loss_") and finding.step is not None and finding.step >= drift.step - WINDOW:
            sentences = [*finding.sentences, *(one for one in drift.sentences if one != SLOW)]
            found[i] = replace(finding, level="bad", sentences=sentences, numbers=finding.numbers | drift.numbers)
            return found
    return [*found, drift]


# ---- words ----


def _times(n: int, what: str = "") -> str:
    if what:
        return f"{n:,} {what}{'' if n == 1 else 's'}"
    return "once" if n == 1 else f"{n:,} times"


def _factor(value: float) -> str:
    """A factor with three digits at most: 99.99999 -> "100"."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}" if value < 9.95 else f"{value:.0f}"


def _listed(steps: Sequence[int]) -> str:
    shown = ", ".join(str(step) for step in steps[:SHOWN])
    return shown + (f" and {len(steps) - SHOWN} more" if len(steps) > SHOWN else "")


def _names(event: Record | None) -> tuple[str, ...]:
    return tuple(str(tensor["name"]) for tensor in (event or {}).get("tensors", ()))


def _some(event: Record) -> str:
    """The first tensor of an event, and how many more there are."""
    names = _names(event)
    if not names:
        return "some tensors"
    more = int(event["count"]) - 1 if is_number(event.get("count")) else len(names) - 1
    return short(names[0]) + (f" and {more} more tensor{'s' if more > 1 else ''}" if more > 0 else "")


def _is_single(event: Record) -> bool:
    """Whether an event concerns one tensor alone."""
    return bool(event.get("count") == 1 and _names(event)[:1] != (ALL,))


def _spiking(event: Record) -> str:
    """The subject of a sentence about a gradient spike."""
    if _names(event)[:1] == (ALL,):
        return "the norm of all gradients"
    alone = _is_single(event)
    return f"the gradient of {_some(event)} alone" if alone else f"the gradients of {_some(event)}"


def _ratio(event: Record) -> float:
    ratios = [tensor.get("ratio") for tensor in event.get("tensors", [])]
    return max((float(ratio) for ratio in ratios if is_number(ratio)), default=0.0)


def _number(event: Record, key: str) -> float:
    return float(event[key]) if is_number(event.get(key)) else math.nan


def rows_of_event(event: Record | None) -> list[int] | None:
    """The data rows of an event, the first and one past the last; None without valid ones."""
    rows = (event or {}).get("rows")
    fits = isinstance(rows, list) and len(rows) == 2 and all(is_number(row) for row in rows)
    return [int(row) for row in rows] if fits and isinstance(rows, list) else None


def _first_rows(events: Iterable[Record]) -> list[int] | None:
    return next((rows for rows in map(rows_of_event, events) if rows), None)


def _line(event: Record) -> str:
    """The text of an event without its step, for kinds that may be unknown or damaged."""
    try:
        line = event_line({key: value for key, value in event.items() if key != "rows"})
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
        return str(event["event"])
    return line.removeprefix(f"step {event['step']} ").removeprefix("warning: ")
