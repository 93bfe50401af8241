"""How a run went, in a few numbers: for the head of the report, for the comparison of runs, and for conditions in
continuous integration (``evenstep report --fail-on``). diagnosis.py says it in words."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from evenstep.errors import EvenstepError, nearest
from evenstep.telemetry.runlog import RunLog, is_number

FACTS: dict[str, str] = {
    "steps": "steps done",
    "loss": "last training loss (mean over the last log line)",
    "val_loss": "last validation loss",
    "tokens_per_second": "training speed, the last one logged",
    "spike_rate": "largest spike rate of the run: share of recent steps with a norm or loss above its window",
    "spikes": "steps on which a tensor spiked",
    "max_ratio": "largest spike: largest entry of a gradient over its recent mean",
    "max_gss": "largest GSS of a sampled coordinate",
    "loss_spikes": "loss spikes",
    "recovery_steps": "longest recovery from a loss spike, in steps",
    "unrecovered": "1 if the last loss spike has not recovered, else 0",
    "skipped": "steps on which a gradient was not finite",
    "weights_nonfinite": "1 if weights became NaN or infinite, else 0",
    "resets": "moment resets",
    "warnings": "early warnings: attention, activations, output logits or updates grew beyond their limits",
    "clipped": "largest share of a tensor's entries clipped in one record",
    "gradient_error": "largest relative quantisation error of a layer's gradients",
}
"""Name of a fact -> its meaning, as the page and the help of ``--fail-on`` show it."""


def facts(run: RunLog) -> dict[str, float]:
    """The `FACTS` of a run. A fact that the run has no number for is left out."""
    found: dict[str, float] = {"steps": run.steps}
    for name in ("loss", "val_loss", "tokens_per_second"):
        values = run.series(name)[1]
        if values:
            found[name] = values[-1]
    if run.windows or run.events:
        rates = [w["spike_rate"] for w in run.windows if is_number(w.get("spike_rate"))]
        found |= {"spike_rate": max(rates)} if rates else {}
        kinds = [event["event"] for event in run.events]
        found |= {name: kinds.count(kind) for name, kind in _COUNTED.items()}
        # Windows count the steps whose gradients were not finite, also those without an event of their own. The
        # windows of older logs have no such count; there the events are counted.
        counted = sum(w["nonfinite"] for w in run.windows if is_number(w.get("nonfinite")))
        found["skipped"] = max(counted, found["skipped"] + kinds.count("nonfinite"))
        found["weights_nonfinite"] = float("weights_nonfinite" in kinds)
        recoveries = [e["steps"] for e in run.events if e["event"] == "recovered" and is_number(e.get("steps"))]
        found["unrecovered"] = float(kinds.count("loss_spike") > kinds.count("recovered"))
        found["recovery_steps"] = max(recoveries, default=0)
    for name, column in {"max_ratio": "ratio", "max_gss": "gss", "clipped": "clipped"}.items():
        numbers = run.columns.get(column)
        if numbers is not None and np.isfinite(numbers).any():
            found[name] = float(np.nanmax(numbers))
    errors = [layer.get("gradient_error") for record in run.lowbit for layer in record["layers"].values()]
    known = [error for error in errors if is_number(error)]
    return found | ({"gradient_error": max(known)} if known else {})


_COUNTED = {
    "spikes": "spike",
    "loss_spikes": "loss_spike",
    "skipped": "skipped",
    "resets": "reset",
    "warnings": "warning",
}

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}


class ConditionMet(Exception):
    """A condition of ``--fail-on`` holds for a run; the program ends with status 1."""

    exit_status = 1


def spikes(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The number of steps of a log on which a tensor spiked, and of the guard's actions; and the largest of these
    spikes, if there is one: its step, tensor, ratio, and data rows."""
    events = [record for record in records if record.get("event") == "spike"]
    actions = sum(record.get("event") == "guard" for record in records)
    found: dict[str, Any] = {"count": len(events), "actions": actions}
    tensors = [(tensor, event) for event in events for tensor in event["tensors"]]
    if tensors:
        worst, event = max(tensors, key=lambda pair: pair[0]["ratio"])
        found |= {"step": event["step"], "tensor": worst["name"], "ratio": worst["ratio"], "rows": event.get("rows")}
    return found


def parse_condition(text: str) -> tuple[str, str, float]:
    """The name, the comparison and the number of a condition. EvenstepError for anything else.

    >>> parse_condition("spike_rate>0.02")
    ('spike_rate', '>', 0.02)
    """
    match = re.fullmatch(r"\s*(\w+)\s*(>=|<=|==|>|<)\s*(\S+)\s*", text)
    try:
        if not match or math.isnan(float(match[3])):  # a comparison with NaN never holds: the check would always pass
            raise ValueError(text)
        name, sign, number = match[1], match[2], float(match[3])
    except ValueError:
        raise EvenstepError(f"--fail-on {text!r}: give NAME>NUMBER (or >=, <, <=, ==), like spike_rate>0.02") from None
    if name not in FACTS:
        raise EvenstepError(f"--fail-on: no number '{name}'{nearest(name, list(FACTS))}; there are {', '.join(FACTS)}")
    return name, sign, number


def check_conditions(conditions: list[tuple[str, str, float]], runs: list[RunLog]) -> None:
    """Raise `ConditionMet`, which names each condition that holds for a run; EvenstepError if a run does not have the
    number of a condition, because a check that cannot be made must not pass."""
    met = []
    for run in runs:
        found = facts(run)
        for name, sign, number in conditions:
            if name not in found:
                raise EvenstepError(f"--fail-on {name}: {run.path} does not have that number")
            if _OPERATORS[sign](found[name], number):
                met.append(f"{run.name}: {name} is {found[name]:.4g}, failing on {sign} {number:g}")
    if met:
        raise ConditionMet("; ".join(met))
