"""The tables of the benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evenstep import console
from evenstep.bench.registry import KNOWN, SETS

Table = tuple[str, Sequence[str], Sequence[Sequence[str]], str]
"""Title, heads, rows, and a line below."""


def known_optimizers() -> Table:
    """Every optimizer there is, with its package and whether it is installed."""
    rows = []
    for name, entry in KNOWN.items():
        version = entry.version()
        installed = version or f"no (pip install {entry.package})"
        rows.append([name, entry.package, installed, entry.note])
    below = f"for several: {', '.join(SETS)}"
    return "", ["optimizer", "package", "installed", "note"], rows, below


def step_time_tables(document: dict[str, Any]) -> list[Table]:
    """One table for each comparison, the fastest first, skipped ones at the end."""
    return [_step_time_table(facts, _rows_of(document, facts)) for facts in document["comparisons"] if facts]


def _rows_of(document: dict[str, Any], facts: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in document["rows"] if all(row[key] == facts[key] for key in ("shapes", "threads"))]


def _step_time_table(facts: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    heads = ["optimizer", "ms", "quartiles", "x adamw_fused", "state B/param", "transient", "GB/s", "of roof", "rounds"]
    lines = []
    for row in sorted(rows, key=lambda row: (row["ms"] is None, row["ratio_to_adamw_fused"])):
        if row["ms"] is None:
            lines.append([row["optimizer"], "skipped: " + row["skipped"], *[""] * (len(heads) - 2)])
            continue
        lines.append(
            [
                row["optimizer"],
                f"{row['ms']:.2f}",
                f"{row['ms_q1']:.2f}-{row['ms_q3']:.2f}",
                f"{row['ratio_to_adamw_fused']:.2f}",
                f"{row['state_bytes_per_param']:.2f}",
                f"{_size(row['transient_bytes'])} ({row['transient_share']:.1%})",
                f"{row['gb_per_s']:.1f}",
                f"{row['roof_share']:.0%}",
                str(row["rounds"]),
            ]
        )
    roof = f"; in-place read and write of a buffer (the roof): {facts['roof_gb_per_s']:.1f} GB/s"
    below = "transient: peak of a step beside the state (share of the parameters' bytes); GB/s: 2 x parameters, "
    below += "gradients and 2 x state over the time" + (roof if "roof_gb_per_s" in facts else "")
    return _title(facts), heads, lines, below


def _title(facts: dict[str, Any]) -> str:
    threads = f"{facts['threads']} thread{'s' if facts['threads'] > 1 else ''}"
    size = (
        f"{facts['parameters'] / 1e6:.1f}M parameters in {facts['tensors']} tensor{'s' if facts['tensors'] > 1 else ''}"
    )
    return f"{facts['shapes']}: {size}, {facts['dtype']}, {threads}"


def scaling_tables(document: dict[str, Any]) -> list[Table]:
    """For each number of threads: nanoseconds per parameter (and the ratio to the reference) of each optimizer over the
    shapes."""
    tables: list[Table] = []
    facts = [facts for facts in document["comparisons"] if facts]
    for threads in dict.fromkeys(item["threads"] for item in facts):
        shapes = {item["shapes"]: item["parameters"] for item in facts if item["threads"] == threads}
        cells: dict[str, dict[str, str]] = {}
        for row in document["rows"]:
            if row["threads"] == threads:
                number = f"{row['ns_per_param']:.3f} ({row['ratio_to_adamw_fused']:.2f})" if row["ms"] else "skipped"
                cells.setdefault(row["optimizer"], {})[row["shapes"]] = number
        heads = ["optimizer", *(f"{name} ({size / 1e6:.0f}M)" for name, size in shapes.items())]
        lines = [[name, *(found.get(shape, "") for shape in shapes)] for name, found in cells.items()]
        title = f"ns per parameter (x adamw_fused), {threads} thread{'s' if threads > 1 else ''}"
        left = [f"{item['shapes']} left out: {item['why']}" for item in document["left_out"]]
        tables.append((title, heads, lines, "\n".join(dict.fromkeys(left))))
    return tables


def _size(number: float) -> str:
    for unit in ("B", "KB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def print_table(*table: Any) -> None:
    """``table`` on the terminal, our own optimizers marked."""
    console.print_table(*table, marked=lambda name: name in KNOWN and KNOWN[name].ours)
