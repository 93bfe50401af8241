"""A diagnosis of a run in words: what happened first, where, because of what, what followed from it, what to try.

`diagnose` turns the records of a run into findings, each of which is a few sentences with their numbers. Weights,
gradients and losses that are not finite are judged here; rises of the loss are the incidents of incidents.py. Incidents
with the same kind of cause are one finding. Gradient spikes outside of incidents had no effect on the loss, and are
grouped. Findings are ordered by what they mean for the run: lost weights and losses that did not recover come first.

All functions are pure. Needs NumPy and no torch.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from evenstep.telemetry.incidents import (
    ALL,
    ENOUGH,
    LEAST_OF_RANGE,
    LEAST_RISE,
    REACH,
    RULED,
    WINDOW,
    Cause,
    Evidence,
    Incident,
    Losses,
    Rise,
    all_rises,
    cause_of,
    event_rows,
    factor_text,
    first_rows,
    is_single,
    line_of,
    names_of,
    ratio_of,
    rise_incidents,
    spiking_text,
    tensors_text,
)
from evenstep.telemetry.lines import short
from evenstep.telemetry.runlog import RunLog, is_number
from evenstep.telemetry.schema import TO_DEVIATION, Record, finite

OUTSTANDING = 100.0
"""A gradient spike of at least this factor has a finding of its own, although the loss did not follow."""

LASTING = 3
"""Losses in a row, up to the end of the log, that must not be finite for the loss to count as lost."""

SHOWN = 3
"""Steps or names that a sentence lists."""

LEVELS = ("bad", "spikes", "good", "")
"""Levels of findings, the worst first. ``"spikes"``: something happened and the run went on. ``"good"``: a calm run."""


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


ADVICE: dict[str, str] = {
    "rate": "Look at the schedule of the learning rate at that step; a longer warm-up or a lower rate after a restart"
    " avoids the jump.",
    "growth": "Give a lower peak learning rate or a longer warm-up (optim.lr, schedule.warmup_steps).",
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
    "nonfinite": "Read the text of that batch; guard.ladder or SpikeGuard leaves such batches out.",
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
    findings += spike_findings(rest, others=bool(findings), with_losses=bool(log.losses))
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


# ---- rises of the loss ----


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
    if cause.kind == "written":
        return event.get("quantity") == "weight_max"
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
        event_rows(facts) or first_rows(first),
        "weights_nonfinite",
        names_of(facts),
        since,
    )
    numbers: dict[str, float] = {"since": since}
    if rise is not None:  # 1. The loss had risen before, for a cause of its own.
        cause = cause_of(log, rise)
        head += [f"the loss had risen at {rise.step}", cause.clause]
        kind, begin, numbers = cause.kind, min(cause.step, rise.step), numbers | cause.numbers
    elif (jump := log.jump_before(since)) is not None:  # 2. So had the learning rate.
        head.append(f"the learning rate had risen {factor_text(jump.factor)} times at {jump.step}")
        kind, begin, numbers = "rate", jump.step, numbers | {"factor": jump.factor, "rate_step": jump.step}
    elif first and facts["event"] == "weights_nonfinite" and all(e["event"] == "skipped" for e in first):
        # 3. No gradient was applied, so that none can have spoiled the weights.
        head.append(f"the optimizer skipped these gradients, so {tensors_text(facts)} was not finite before them")
        kind, rows = "written", None
    elif len(first) == 1 and is_single(first[0]):  # 4. One gradient, of a backward pass that began with a finite loss.
        loss = log.losses.get(since, math.nan)
        finite = f", and the loss of that step was finite ({loss:.4g})" if math.isfinite(loss) else ""
        head.append(f"the first gradient that was not finite is that of {tensors_text(first[0])} alone{finite}")
        kind, names = "overflow" if finite else kind, names_of(first[0])
    if rows:
        head.append(f"the first bad batch is rows {rows[0]}-{rows[1]}")
    own = log.within(begin, math.inf)
    told = {id(one) for one in [*first, event, *(e for e in own if rise is not None and _begins(e, rise, cause))]}
    later = [one for one in own if id(one) not in told]
    head += [text.lower().rstrip(".") for text in consequences(len(later))]
    sentences = ["; ".join(head) + "."]
    if facts["event"] == "weights_nonfinite" and names_of(facts):
        sentences.append(f"They are in {tensors_text(facts)}.")
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
    own_rows = event_rows(first)
    if first is None:
        head = f"The loss was not finite at step {steps[0]}."
    else:
        rows = f", rows {own_rows[0]}-{own_rows[1]}" if own_rows else ""
        verb = "skipped" if first["event"] == "skipped" else "applied"
        what = f"The gradient of {tensors_text(first)}" if names_of(first) else "A gradient"
        done = "" if names_of(first)[:1] == (ALL,) else f", and was {verb}"
        head = f"{what} was not finite at step {steps[0]}{rows}{done}."
    sentences = [head, f"{'Gradients were' if own else 'The loss was'} not finite on {_times(count, 'step')}."]
    if len(steps) > 1:
        sentences.append(f"The others were at {_listed(steps[1:])}.")
    names = list(names_of(first))
    kind = "overflow" if first is not None and is_single(first) and steps[0] not in bad_losses else "nonfinite"
    return [
        Finding("nonfinite", "spikes", sentences, ADVICE[kind], steps[0], own_rows, names, len(own), {"steps": count})
    ]


# ---- gradient spikes, low-bit layers, the guard, warnings, slow divergence ----


def spike_findings(events: Sequence[Record], *, others: bool = False, with_losses: bool = True) -> list[Finding]:
    """Findings of gradient spikes outside of incidents: each outstanding one, and all others together.

    Args:
        events: events outside of incidents.
        others: whether there are incidents, so that these spikes are "other" ones.
        with_losses: whether the log has losses, and so shows that they did not follow.
    """
    calm = ["The loss did not follow."] if with_losses else []
    spikes = [event for event in events if event["event"] == "spike"]
    findings, rest = [], []
    until, following = -math.inf, 0
    large: list[tuple[Record, int]] = []
    for spike in spikes:
        follows = spike["step"] <= until  # the newest of the outstanding ones
        if ratio_of(spike) >= OUTSTANDING and not (follows and ratio_of(spike) <= ratio_of(large[-1][0])):
            large.append((spike, 0))
            until = spike["step"] + REACH
        elif follows:
            large[-1] = (large[-1][0], large[-1][1] + 1)
        else:
            rest.append(spike)
    if len(large) > SHOWN:  # a run with many of them: the largest stands for all
        large.sort(key=lambda one: -ratio_of(one[0]))
        following = sum(count for _, count in large[1:])
        rest = sorted([*rest, *(spike for spike, _ in large[1:])], key=lambda spike: spike["step"])
        large = large[:1]
    for spike, count in sorted(large, key=lambda one: -ratio_of(one[0])):
        where = f", rows {rows[0]}-{rows[1]}" if (rows := event_rows(spike)) else ""
        text = f"{spiking_text(spike)} spiked x{factor_text(ratio_of(spike))} at step {spike['step']}{where}."
        sentences = [text[0].upper() + text[1:], *consequences(count), *calm]
        kind = "batch" if spike.get("rows") and not is_single(spike) else "update"
        findings.append(
            Finding(
                "spike", "spikes", sentences, ADVICE[kind], spike["step"], rows, list(names_of(spike)), count + 1,
                {"ratio": ratio_of(spike)},
            )
        )  # fmt: skip
    if rest:
        worst = max(rest, key=ratio_of)
        names = names_of(worst)
        at = f", at most x{factor_text(ratio_of(worst))} ({short(names[0])}, step {worst['step']})" if names else ""
        sentences = [f"Gradients spiked on {_times(len(rest), 'other step' if others or findings else 'step')}{at}."]
        often = [name for name, count in _counts(rest) if count > 2 and count > len(rest) / 3][:SHOWN]
        if often:
            sentences.append(f"Most often in {', '.join(short(name) for name in often)}.")
        sentences += calm
        numbers = {"steps": len(rest), "ratio": ratio_of(worst)}
        findings.append(
            Finding(
                "spikes", "spikes", sentences, ADVICE["spikes"], worst["step"], event_rows(worst), list(names),
                len(rest) + following, numbers,
            )
        )  # fmt: skip
    return findings


def _counts(events: Iterable[Record]) -> list[tuple[str, int]]:
    """How often each tensor is the first that an event names, the most frequent first."""
    counts: dict[str, int] = {}
    for event in events:
        for name in names_of(event)[:1]:
            counts[name] = counts.get(name, 0) + 1
    return sorted(counts.items(), key=lambda item: -item[1])


def lowbit_finding(events: Sequence[Record]) -> list[Finding]:
    """The finding of layers whose quantised gradients are below their noise."""
    own = [event for event in events if event["event"] == "useless"]
    if not own:
        return []
    names = list(dict.fromkeys(name for event in own for name in names_of(event)))
    first = own[0]["step"]
    text = f"The quantised gradient of {tensors_text(own[0])} is below its noise since step {first}."
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
    return [Finding("guard", "spikes", sentences, "", step, event_rows(first), [], len(own), dict(counts))]


def warning_findings(events: Sequence[Record]) -> list[Finding]:
    """A finding for each quantity of early warnings, and for each kind of event that this module has no rule for."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for event in events:
        if event["event"] not in RULED:
            groups.setdefault((event["event"], str(event.get("quantity", ""))), []).append(event)
    findings = []
    for (kind, _), own in groups.items():
        first = own[0]
        sentences = [f"Early warning at step {first['step']}: {line_of(first)}."]
        if len(own) > 1:
            sentences.append(f"The same was reported {_times(len(own) - 1, 'later time')}.")
        rows, names, count = event_rows(first), list(names_of(first)), len(own)
        findings.append(Finding(kind, "spikes", sentences, ADVICE["warning"], first["step"], rows, names, count))
    return findings


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


def _listed(steps: Sequence[int]) -> str:
    shown = ", ".join(str(step) for step in steps[:SHOWN])
    return shown + (f" and {len(steps) - SHOWN} more" if len(steps) > SHOWN else "")
