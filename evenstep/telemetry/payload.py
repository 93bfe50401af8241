"""A run as the page gets it: few enough points to draw at once, none of the peaks lost.

Curves keep the lowest and highest value of each stretch. The numbers of parameters over steps become pictures of one
byte a cell, on a logarithmic scale (0 missing, 1 zero, 2 to 255 from the smallest to the largest value); where there
are too many steps, neighbours share a column that holds the largest of them.
"""

from __future__ import annotations

import base64
import json
import shlex
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evenstep.telemetry.facts import FACTS, facts, verdict
from evenstep.telemetry.lines import event_line, short
from evenstep.telemetry.runlog import RunLog, Series, is_number, matrix

POINTS = 8000
"""Of a curve."""

CELLS = 400_000
"""Of the picture of one column of numbers, over all runs of a page."""

EVENTS = 1000

FIELDS: dict[str, str] = {
    "ratio": "spike: largest entry over its mean",
    "gss": "GSS: |g| over its time mean, sampled",
    "spike_rate": "spike rate of the norm",
    "grad_norm": "gradient norm before",
    "norm_after": "gradient norm after",
    "grad_max": "largest entry",
    "clip_limit": "AdaClip limit",
    "clipped": "share of entries clipped",
    "gain": "gain",
    "update_ratio": "update over weight (RMS)",
}
"""Columns that the heat map shows, with their titles."""

COLORS: dict[str, tuple[float, float]] = {"ratio": (2.0, 100.0), "gss": (5.0, 500.0), "gradient_error": (0.01, 1.0)}
"""Where the colours of a picture begin, and where they end at the earliest: a calm run looks calm. Of the other columns
they go from the smallest to the largest value.
"""

LOWBIT_FIELDS: dict[str, str] = {
    "gradient_error": "relative error, gradients",
    "error": "relative error",
    "saturation": "saturated entries",
    "underflow": "entries that became zero",
}


def payload(runs: list[RunLog], *, live: bool = False) -> dict[str, Any]:
    """All that the page shows, in types that JSON has."""
    cells = CELLS // max(1, len(runs))
    titles = {"facts": FACTS, "fields": FIELDS, "lowbit_fields": LOWBIT_FIELDS, "colors": COLORS}
    return {"live": live, **titles, "runs": [_run(run, cells) for run in runs]}


def _run(run: RunLog, cells: int) -> dict[str, Any]:
    found = facts(run)
    level, sentences = verdict(run)
    events = sorted(run.events, key=_size, reverse=True)
    notes = list(run.notes)
    if len(events) > EVENTS:
        notes.append(f"of {len(events)} events the {EVENTS} largest are shown")
    return {
        "name": run.name,
        "optimizer": run.optimizer,
        "notes": notes,
        "level": level,
        "verdict": sentences,
        "rows_command": f"evenstep rows {shlex.quote(str(run.path))}" if "data" in run.config else None,
        "facts": {name: _rounded(value) for name, value in found.items()},
        "config": [[name, _text(value)] for name, value in _flat(run.config)],
        "hardware": [[name, _text(run.summary[name])] for name in _HARDWARE if name in run.summary],
        "curves": _curves(run),
        "heat": _heat(run.names, run.first, run.last, run.columns, FIELDS, cells),
        "lowbit": _lowbit(run, cells),
        "events": sorted((_event(event) for event in events[:EVENTS]), key=lambda event: event["step"]),
        "steps": run.steps,
    }


_HARDWARE = ("hardware", "versions", "commit", "parameters", "seconds", "peak_memory", "finished")


def _flat(table: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in table.items():
        name = f"{prefix}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return found


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")


# ---- curves ----


def _curves(run: RunLog) -> dict[str, Any]:
    found: dict[str, Series] = {
        "loss": run.losses(),
        "val_loss": run.series("val_loss"),
        "lr": run.rates(),
        "norm": run.per_step("norms"),
        "norm_after": run.per_step("norms_after"),
        "tokens_per_second": run.series("tokens_per_second"),
    }
    if not found["norm"][0]:
        found["norm"] = run.series("grad_norm")
    rates = [(w["step"], w["spike_rate"]) for w in run.windows if is_number(w.get("spike_rate"))]
    found["spike_rate"] = [x for x, _ in rates], [y for _, y in rates]
    for column in ("clipped", "update_ratio"):
        for name, reduce in (("mean", np.nanmean), ("max", np.nanmax)):
            values = run.columns.get(column)
            if values is not None and values.size:
                there = np.isfinite(values).any(1)
                found[f"{column}_{name}"] = run.last[there].tolist(), reduce(values[there], axis=1).tolist()
    return {name: _thinned(*series) for name, series in found.items() if series[0]}


def _thinned(steps: list[float], values: list[float]) -> dict[str, list[float]]:
    """At most about `POINTS` points: of each stretch the lowest and the highest."""
    x, y = np.array(steps, np.int64), np.array(values, np.float64)
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    keep = np.append(x[1:] != x[:-1], True)  # uPlot wants one value a step
    x, y = x[keep], y[keep]
    if len(x) > POINTS:
        edges = np.linspace(0, len(x), POINTS // 2 + 1).astype(int)
        stretches = [slice(a, b) for a, b in pairwise(edges)]
        picked = {i for s in stretches for i in (s.start + int(y[s].argmin()), s.start + int(y[s].argmax()))}
        index = np.array(sorted({0, len(x) - 1} | picked))
        x, y = x[index], y[index]
    return {"x": x.tolist(), "y": [float(f"{value:.5g}") for value in y]}


# ---- pictures ----


def _heat(
    names: list[str],
    first: NDArray[np.int64],
    last: NDArray[np.int64],
    columns: dict[str, NDArray[np.float32]],
    fields: dict[str, str],
    cells: int,
) -> dict[str, Any] | None:
    """None when there is nothing to show."""
    known = {name: columns[name] for name in fields if name in columns and np.isfinite(columns[name]).any()}
    if not known:
        return None
    share = -(-len(last) * len(names) // cells)  # steps that share a column
    starts = np.arange(0, len(last), share)
    ends = np.append(starts[1:], len(last)) - 1
    return {
        "rows": [short(name) for name in names],
        "names": names,
        "first": first[starts].tolist(),
        "last": last[ends].tolist(),
        "fields": {name: _codes(_pooled(values, starts)) for name, values in known.items()},
    }


def _pooled(values: NDArray[np.float32], starts: NDArray[np.int64]) -> NDArray[np.float32]:
    if len(starts) == len(values):
        return values
    largest = np.maximum.reduceat(np.where(np.isnan(values), -np.inf, values), starts, axis=0)
    return np.where(np.isinf(largest), np.nan, largest)


def _codes(values: NDArray[np.float32]) -> dict[str, Any]:
    """``[n, k]`` as base64 of ``[k, n]`` bytes, with the values that codes 2 and 255 stand for."""
    size = np.abs(values)
    positive = size[size > 0]
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (1.0, 1.0)
    span = np.log(high / low) or 1.0
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.clip(np.rint(2 + 253 * np.log(size / low) / span), 2, 255)
    codes = np.where(np.isnan(values), 0, np.where(size == 0, 1, scaled)).astype(np.uint8)
    return {"low": low, "high": high, "codes": base64.b64encode(np.ascontiguousarray(codes.T).tobytes()).decode()}


def _lowbit(run: RunLog, cells: int) -> dict[str, Any] | None:
    names = list(dict.fromkeys(str(name) for record in run.lowbit for name in record["layers"]))
    if not names:
        return None
    steps = np.array([record["step"] for record in run.lowbit], np.int64)
    columns = {
        field: matrix(
            [[record["layers"].get(name, {}).get(field) for name in names] for record in run.lowbit], len(names)
        )
        for field in LOWBIT_FIELDS
    }
    first = np.append([0], steps[:-1] + 1) if len(steps) else steps
    return _heat(names, np.minimum(first, steps), steps, columns, LOWBIT_FIELDS, cells)


# ---- events ----


def _size(event: dict[str, Any]) -> float:
    """How much an event matters: resets least, spikes by their ratio, lost gradients and losses most."""
    if event["event"] == "reset":
        return -1.0
    if event["event"] != "spike":
        return float("inf")
    ratios = [tensor.get("ratio") for tensor in event.get("tensors", [])]
    return max((float(ratio) for ratio in ratios if is_number(ratio)), default=0.0)


def _event(event: dict[str, Any]) -> dict[str, Any]:
    try:
        line = event_line(event)
    except (
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
    ):  # of another version, or damaged
        line = f"step {event['step']} {event['event']}"
    size, rows = _size(event), event.get("rows")
    fits = isinstance(rows, list) and len(rows) == 2 and all(is_number(row) for row in rows)
    return {
        "step": event["step"],
        "event": event["event"],
        "where": ", ".join(short(str(tensor["name"])) for tensor in event.get("tensors", [])),
        "count": event["count"] if is_number(event.get("count")) else 0,
        "size": _rounded(size) if 0 <= size < float("inf") else None,
        "before": _known(event.get("loss_before")),
        "after": _known(event.get("loss_after")),
        "rows": rows if fits else None,
        "line": line,
    }


def _known(value: Any) -> float | None:
    return float(f"{value:.5g}") if is_number(value) else None
