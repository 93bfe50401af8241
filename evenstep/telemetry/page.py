"""The report: one HTML file that needs nothing but a browser, also served live by watch.py.

`payload` reduces runs to few enough points to draw at once without losing a peak, and `page` puts these data and the
files of assets/ into one file. Curves keep the lowest and the highest value of each stretch of steps. The numbers of
all parameters over all steps become images of one byte a cell on a logarithmic scale (0: missing, 1: zero, 2 to 255:
from the smallest to the largest value); where there are too many steps, neighbouring ones share a column, which holds
their maximum.

Charts are drawn by uPlot (51 KB, MIT, with its licence in assets/); plotly, bokeh and echarts have 1 to 5 MB each, more
than the numbers of most runs. The heat map is painted on uPlot's canvas and shares its axes, zoom and cursor. The page
loads nothing: its Content-Security-Policy forbids the browser to.
"""

from __future__ import annotations

import base64
import html
import json
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evenstep.errors import EvenstepError
from evenstep.paths import leaves
from evenstep.telemetry.diagnosis import diagnose, level_of, loss_summary, rows_command
from evenstep.telemetry.facts import FACTS, facts
from evenstep.telemetry.incidents import event_rows
from evenstep.telemetry.lines import event_line, short
from evenstep.telemetry.runlog import RunLog, Series, is_number, matrix
from evenstep.telemetry.schema import is_step

SCRIPTS = ("uplot.min.js", "format.js", "charts.js", "heat.js", "tables.js", "page.js")
STYLES = ("uplot.min.css", "page.css")

POINTS = 8000
"""Largest number of points of a curve."""

CELLS = 400_000
"""Largest number of cells of the image of one column, over all runs of a page."""

EVENTS = 1000
"""Largest number of events of a run; the largest ones are kept."""

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
"""Columns that the heat map offers, with their titles."""

ACTIVATIONS = ("attention_max", "rms", "logit_rms", "logit_max")
"""Keys of `activations` records that have a curve."""

COLORS: dict[str, tuple[float, float]] = {"ratio": (2.0, 100.0), "gss": (5.0, 500.0), "gradient_error": (0.01, 1.0)}
"""Column -> the value at which its colours begin, and the least value at which they end, so that a run without spikes
does not look like one with spikes. The colours of the other columns go from the smallest to the largest value."""

LOWBIT_FIELDS: dict[str, str] = {
    "gradient_error": "relative error, gradients",
    "error": "relative error",
    "saturation": "saturated entries",
    "underflow": "entries that became zero",
}


def payload(runs: list[RunLog], *, live: bool = False) -> dict[str, Any]:
    """Everything that the page shows, in types that JSON has.

    Args:
        runs: one or several runs, shown side by side.
        live: whether the page fetches new data from its server.
    """
    cells = CELLS // max(1, len(runs))
    titles = {"facts": FACTS, "fields": FIELDS, "lowbit_fields": LOWBIT_FIELDS, "colors": COLORS}
    return {"live": live, **titles, "runs": [_run(run, cells) for run in runs]}


def _run(run: RunLog, cells: int) -> dict[str, Any]:
    found = facts(run)
    findings = diagnose(run)
    events = sorted(run.events, key=_size, reverse=True)
    notes = list(run.notes)
    if len(events) > EVENTS:
        notes.append(f"of {len(events)} events the {EVENTS} largest are shown")
    return {
        "name": run.name,
        "optimizer": run.optimizer,
        "notes": notes,
        "level": level_of(findings),
        "verdict": [*(finding.text for finding in findings), *filter(None, [loss_summary(run)] if findings else [])],
        "findings": [finding.as_json() | {"texts": _texts(run, finding.rows)} for finding in findings],
        "rows_command": rows_command(run),
        "facts": {name: _rounded(value) for name, value in found.items()},
        "config": [[name, _text(value)] for name, value in _flat(run.config)],
        "hardware": [[name, _text(run.summary[name])] for name in _HARDWARE if name in run.summary],
        "curves": _curves(run),
        "heat": _heat(run.names, run.first, run.last, run.columns, FIELDS, cells),
        "lowbit": _lowbit(run, cells),
        "events": sorted((_event(run, event) for event in events[:EVENTS]), key=lambda event: event["step"]),
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
    found |= {key: _largest(run, key) for key in ACTIVATIONS}
    # A series of zeros, such as the spike rate of a calm run, is no chart.
    return {name: _thinned(*series) for name, series in found.items() if any(series[1])}


def _largest(run: RunLog, key: str) -> Series:
    """The largest number under ``key`` of each `activations` record, over modules and heads."""
    found = []
    for record in run.activations:
        values = [module.get(key) for module in record["modules"].values()]
        flat = [x for value in values for x in (value if isinstance(value, list) else [value]) if is_number(x)]
        if flat:
            found.append((record["step"], max(flat)))
    return [step for step, _ in found], [value for _, value in found]


def _thinned(steps: list[float], values: list[float]) -> dict[str, list[float]]:
    """At most about `POINTS` points of a curve: the lowest and the highest of each stretch."""
    x, y = np.array(steps, np.int64), np.array(values, np.float64)
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    keep = np.append(x[1:] != x[:-1], True)  # uPlot needs strictly increasing steps; the last value of a step counts
    x, y = x[keep], y[keep]
    if len(x) > POINTS:
        edges = np.linspace(0, len(x), POINTS // 2 + 1).astype(int)
        stretches = [slice(a, b) for a, b in pairwise(edges)]
        picked = {i for s in stretches for i in (s.start + int(y[s].argmin()), s.start + int(y[s].argmax()))}
        index = np.array(sorted({0, len(x) - 1} | picked))
        x, y = x[index], y[index]
    return {"x": x.tolist(), "y": [float(f"{value:.5g}") for value in y]}


# ---- images ----


def _heat(
    names: list[str],
    first: NDArray[np.int64],
    last: NDArray[np.int64],
    columns: dict[str, NDArray[np.float32]],
    fields: dict[str, str],
    cells: int,
) -> dict[str, Any] | None:
    """The heat map of ``columns`` ``[n, k]``; None without a known number. ``cells`` limits the cells of an image."""
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
    """Maxima over the records from each of ``starts`` to the next, ``[len(starts), k]``."""
    if len(starts) == len(values):
        return values
    largest = np.maximum.reduceat(np.where(np.isnan(values), -np.inf, values), starts, axis=0)
    return np.where(np.isinf(largest), np.nan, largest)


def _codes(values: NDArray[np.float32]) -> dict[str, Any]:
    """Values ``[n, k]`` as the base64 of ``[k, n]`` bytes, with the values that the codes 2 and 255 stand for."""
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
    """Order of importance of events: resets least, spikes by their ratio, all other kinds most."""
    if event["event"] == "reset":
        return -1.0
    if event["event"] != "spike":
        return float("inf")
    ratios = [tensor.get("ratio") for tensor in event.get("tensors", [])]
    return max((float(ratio) for ratio in ratios if is_number(ratio)), default=0.0)


def _texts(run: RunLog, rows: list[int] | None) -> list[tuple[int, str]]:
    return run.texts.get((rows[0], rows[1]), []) if rows else []


def _event(run: RunLog, event: dict[str, Any]) -> dict[str, Any]:
    try:
        line = event_line(event)
    # The event may be damaged, or come from another version.
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
        line = f"step {event['step']} {event['event']}"
    size, rows = _size(event), event_rows(event)
    return {
        "step": event["bad_step"] if is_step(event.get("bad_step")) else event["step"],
        "event": event["event"],
        "where": ", ".join(short(str(tensor["name"])) for tensor in event.get("tensors", []))
        or str(event.get("reason", "")),
        "count": event["count"] if is_number(event.get("count")) else 0,
        "size": _rounded(size) if 0 <= size < float("inf") else None,
        "before": _known(event.get("loss_before")),
        "after": _known(event.get("loss_after")),
        "rows": rows,
        "texts": _texts(run, rows),
        "line": line,
    }


def _known(value: Any) -> float | None:
    return float(f"{value:.5g}") if is_number(value) else None


# ---- the file ----


def page(data: dict[str, Any], title: str) -> str:
    """The page of a `payload`. Texts of the run are data in it and never markup."""
    parts = {
        "title": _escaped(title),
        "connect": "'self'" if data["live"] else "'none'",
        "styles": "".join(asset(name) for name in STYLES),
        "data": data_text(data),
        "scripts": "\n".join(asset(name) for name in SCRIPTS),
    }
    text = asset("page.html")
    # All placeholders are replaced in one pass: a value may itself look like a placeholder.
    pieces = text.split("@@")
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def asset(name: str) -> str:
    """The text of a file in assets/."""
    return (files("evenstep.telemetry") / "assets" / name).read_text(encoding="utf-8")


def data_text(data: dict[str, Any]) -> str:
    """JSON for the inside of a script element: no text in it can end the element or begin a comment."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace").decode("utf-8")


def _escaped(text: str) -> str:
    return html.escape(text).encode("utf-8", "replace").decode("utf-8")


def write_report(runs: list[RunLog], out: Path) -> int:
    """Write the page of one or several runs to ``out``; returns its size in bytes. EvenstepError if that fails."""
    text = page(payload(runs), ", ".join(run.name for run in runs)).encode()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(text)
    except OSError as problem:
        raise EvenstepError(f"could not write {out}: {problem.strerror}; give another --out") from None
    return len(text)


def report_of_run(directory: Path) -> bool:
    """Write report.html of the run in ``directory`` into it, with the text of bad rows; returns True. EvenstepError if
    that fails."""
    from evenstep.telemetry.foreign import load_log

    if leaves(directory, "report.html"):
        raise EvenstepError(f"{directory / 'report.html'} is a link that leads out of the folder")
    run = load_log(directory)
    look_up_texts(run)
    return write_report([run], directory / "report.html") > 0


# ---- the text of bad rows ----

TEXTS = 20
"""Largest number of events of a report that show the text of their data rows."""

TEXT_ROWS, TEXT_LENGTH = 4, 240
"""Rows of an event that a report shows, and characters of each."""


def look_up_texts(run: RunLog) -> None:
    """Set ``run.texts``: the beginnings of the rows of its findings and first events. Only for a run whose tokens are
    in the cache; for all others the report shows the command that prints the rows."""
    if rows_command(run) is None:
        return
    found = [*(finding.rows for finding in diagnose(run)), *map(event_rows, run.events)]
    ranges = list(dict.fromkeys((rows[0], rows[1]) for rows in found if rows and 0 <= rows[0] < rows[1]))[:TEXTS]
    if not ranges:
        return
    try:
        from evenstep.train.runs import prepared_rows

        read = prepared_rows(run.path)
        if read is None:
            return
        for start, stop in ranges:
            texts = [text[:TEXT_LENGTH] for _, text in read(start, min(stop, start + TEXT_ROWS))]
            run.texts[start, stop] = list(enumerate(texts, start))
    except (EvenstepError, OSError, ValueError, ImportError):
        run.texts = {}  # the command tells why
