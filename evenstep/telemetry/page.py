"""The report: one HTML file that needs nothing but a browser.

Charts are drawn by uPlot (51 KB, MIT, in assets/ with its licence); plotly, bokeh and echarts weigh 1 to 5 MB each,
more than the numbers of most runs. The heat map is painted on uPlot's canvas and shares its axes, zoom and cursor. The
page may load nothing: its policy forbids the browser to.
"""

from __future__ import annotations

import html
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from evenstep.errors import EvenstepError
from evenstep.telemetry.payload import payload
from evenstep.telemetry.runlog import RunLog

SCRIPTS = ("uplot.min.js", "format.js", "charts.js", "heat.js", "tables.js", "page.js")
STYLES = ("uplot.min.css", "page.css")


def page(data: dict[str, Any], title: str) -> str:
    """The page for a `payload`. Texts from the run are data in it, never markup."""
    parts = {
        "title": _escaped(title),
        "connect": "'self'" if data["live"] else "'none'",
        "styles": "".join(asset(name) for name in STYLES),
        "data": data_text(data),
        "scripts": "\n".join(asset(name) for name in SCRIPTS),
    }
    text = asset("page.html")
    # In one pass: a value may look like a placeholder.
    pieces = text.split("@@")
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def asset(name: str) -> str:
    return (files("evenstep.telemetry") / "assets" / name).read_text(encoding="utf-8")


def data_text(data: dict[str, Any]) -> str:
    """JSON that can stand inside of a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace").decode("utf-8")


def _escaped(text: str) -> str:
    return html.escape(text).encode("utf-8", "replace").decode("utf-8")


def write_report(runs: list[RunLog], out: Path) -> int:
    """Write the page of one or several runs; returns its size in bytes. EvenstepError when it cannot be written."""
    text = page(payload(runs), ", ".join(run.name for run in runs)).encode()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(text)
    except OSError as problem:
        raise EvenstepError(f"could not write {out}: {problem.strerror}; give another --out") from None
    return len(text)
