"""Tables for the terminal: with rich where it is installed and the output is a terminal, else plain text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

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


def print_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], below: str) -> None:
    """A row whose second cell starts with ``skipped:`` is written across the columns."""
    draw = _rich if sys.stdout.isatty() else _plain
    draw(title, heads, rows)
    if below:
        print(below)
    print()


def _is_across(row: Sequence[str]) -> bool:
    return row[1].startswith("skipped:")


def _numeric(rows: Sequence[Sequence[str]], column: int) -> bool:
    cells = [row[column] for row in rows if not _is_across(row) and row[column]]
    return column > 0 and bool(cells) and all(cell[0].isdigit() for cell in cells)


def _plain(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    full = [heads, *(row for row in rows if not _is_across(row))]
    widths = [max(len(row[i]) for row in full) for i in range(len(heads))]
    widths[0] = max(len(row[0]) for row in [heads, *rows])
    right = [_numeric(rows, i) for i in range(len(heads))]
    if title:
        print(title)
    for row in [heads, *rows]:
        cells = zip(row, widths, right, strict=True)
        text = "  ".join(cell.rjust(width) if is_right else cell.ljust(width) for cell, width, is_right in cells)
        print((f"{row[0].ljust(widths[0])}  {row[1]}" if _is_across(row) else text).rstrip())


def _rich(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table as RichTable
    except ImportError:
        _plain(title, heads, rows)
        return
    table = RichTable(title=title or None, title_justify="left")
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if _numeric(rows, i) else "left", no_wrap=i == 0)
    for row in rows:
        if not _is_across(row):
            table.add_row(*map(escape, row), style="bold green" if _is_ours(row[0]) else "")
    console = Console()
    console.print(table)
    for row in rows:
        if _is_across(row):
            console.print(f"[dim]{escape(row[0])}  {escape(row[1])}[/dim]")


def _is_ours(name: str) -> bool:
    return name in KNOWN and KNOWN[name].ours
