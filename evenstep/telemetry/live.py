"""The live summary below the bar of a run: the parameters with the largest spikes of late. Needs rich."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from evenstep.telemetry.lines import short

COLUMNS = {
    "ratio": ("spike", "x{:.1f}"),
    "gss": ("GSS", "{:.0f}"),
    "grad_norm": ("gradient", "{:.2e}"),
    "norm_after": ("after", "{:.2e}"),
    "clipped": ("clipped", "{:.2%}"),
    "spike_rate": ("spike rate", "{:.2%}"),
}


def worst_table(names: list[str], record: dict[str, Any], count: int = 4) -> Table:
    """The ``count`` parameters with the largest ratio (before there is one: norm) in a ``parameters`` record, as a
    table."""
    by = record.get("ratio") or record.get("grad_norm") or [0.0] * len(names)
    worst = sorted(range(len(names)), key=lambda i: -(by[i] or 0.0))[:count]
    there = {key: head for key, head in COLUMNS.items() if key in record}
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(f"steps {record['first']}-{record['step']}", no_wrap=True, overflow="ellipsis")
    for title, _ in there.values():
        table.add_column(title, justify="right", no_wrap=True)
    for i in worst:
        values = [(record[key][i], form) for key, (_, form) in there.items()]
        cells = ["-" if value is None else form.format(value) for value, form in values]
        table.add_row(Text(short(names[i])), *cells)  # Text: a name is not markup
    return table
