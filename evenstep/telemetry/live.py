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


NAME_WIDTH = 20
"""Columns that a parameter's name has at least."""


def worst_table(names: list[str], record: dict[str, Any], count: int = 4, width: int | None = None) -> Table:
    """The ``count`` parameters with the largest ratio (before there is one: norm) in a ``parameters`` record, as a
    table. Where ``width`` is too small for all columns the last ones are left out: a number is never cut."""
    by = record.get("ratio") or record.get("grad_norm") or [0.0] * len(names)
    worst = sorted(range(len(names)), key=lambda i: -(by[i] or 0.0))[:count]
    there = {key: head for key, head in COLUMNS.items() if key in record}
    cells = {
        key: ["-" if (value := record[key][i]) is None else form.format(value) for i in worst]
        for key, (_, form) in there.items()
    }
    room = width - NAME_WIDTH if width is not None else None
    for key in list(cells):
        needed = 1 + max(map(len, (there[key][0], *cells[key])))
        if room is not None and (room := room - needed) < 0:
            cells = dict(list(cells.items())[: list(cells).index(key)])
            break
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(f"steps {record['first']}-{record['step']}", no_wrap=True, overflow="ellipsis")
    for key in cells:
        table.add_column(there[key][0], justify="right", no_wrap=True)
    for place, i in enumerate(worst):
        table.add_row(Text(short(names[i])), *(column[place] for column in cells.values()))  # a name is not markup
    return table
