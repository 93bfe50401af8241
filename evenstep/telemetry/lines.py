"""Telemetry in a terminal: an event as a line of text, and the table of the largest spikes below a run's progress bar.

Needs no torch; the table needs rich, which is imported when a table is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Event = dict[str, Any]

TABLE_COLUMNS = {
    "ratio": ("spike", "x{:.1f}"),
    "gss": ("GSS", "{:.0f}"),
    "grad_norm": ("gradient", "{:.2e}"),
    "norm_after": ("after", "{:.2e}"),
    "clipped": ("clipped", "{:.2%}"),
    "spike_rate": ("spike rate", "{:.2%}"),
}
"""Columns of the table: key of the ``parameters`` record -> heading and format."""

NAME_WIDTH = 20
"""Least width of the column of names, in characters."""


def short(name: str) -> str:
    """A parameter's name without the parts that carry no information. A bare number keeps its suffix.

    >>> short("model.layers.3.mlp.down_proj.weight"), short("3.weight")
    ('layers.3.mlp.down_proj', '3.weight')
    """
    brief = name.removeprefix("model.").removesuffix(".weight")
    return name if brief.rpartition(".")[2].isdigit() else brief


# ---- events ----


def _tensors(event: Event) -> str:
    names = ", ".join(short(tensor["name"]) for tensor in event.get("tensors", ())[:1])
    more = event.get("count", 1) - 1
    return names + (f" and {more} more tensor{'s' if more > 1 else ''}" if more > 0 else "")


def _number(value: Any) -> str:
    return "?" if value is None or value != value else f"{value:.4g}"


def _loss(event: Event) -> str:
    return f"loss {_number(event.get('loss_before'))} -> {_number(event.get('loss_after'))}"


def _spike(event: Event) -> str:
    worst = event["tensors"][0]
    parts = [f"spike x{worst['ratio']:.0f} in {_tensors(event)}"]
    if worst.get("clipped"):
        parts.append(f"{100 * worst['clipped']:.2g} % clipped")
    return ", ".join([*parts, _loss(event)])


def _loss_spike(event: Event) -> str:
    worst = next(iter(event.get("tensors", ())), None)
    where = f", largest gradient in {short(worst['name'])} (x{worst['ratio']:.1f})" if worst else ""
    return f"loss spike, {_loss(event)}{where}"


def _weights(event: Event) -> str:
    what = "NaN" if event.get("nan", True) else "infinite"
    return f"weights are {what} since step {event['since']} in {_tensors(event)}"


QUANTITIES = {
    "attention_max": "attention logit",
    "logit_max": "output logit",
    "rms": "RMS of activations",
    "kurtosis": "kurtosis of activations",
    "dead": "share of dead units",
    "saturated": "share of saturated units",
    "update_ratio": "update over weight",
    "weight_max": "weight",
}
"""Quantity of a warning -> its name in a line."""


def _warning(event: Event) -> str:
    worst, more = event["tensors"][0], event.get("count", 1) - 1
    head = f" head {worst['head']}" if "head" in worst else ""
    others = f" and {more} more" if more else ""
    name = QUANTITIES.get(event["quantity"], event["quantity"])
    # Not `short`, which keeps the whole name where its last part is a number, as that of a block is.
    where = f"in {worst['name'].removeprefix('model.').removesuffix('.weight')}{head}{others}"
    return f"warning: {name} {_number(worst['value'])}, usually {_number(worst['usual'])}, {where}"


LINES: dict[str, Callable[[Event], str]] = {
    "spike": _spike,
    "loss_spike": _loss_spike,
    "recovered": lambda event: f"the loss has recovered, {event['steps']} steps after its spike at {event['since']}",
    "skipped": lambda event: f"gradient not finite, skipped {_tensors(event)}",
    "nonfinite": lambda event: f"gradient not finite in {_tensors(event)}",
    "weights_nonfinite": _weights,
    "stays_nonfinite": lambda event: f"gradients have not been finite since step {event['since']}",
    "reset": lambda event: "moments reset",
    "guard": lambda event: f"guard: {event['action']} at step {event['bad_step']}, {event['reason']}",
    "warning": _warning,
    "useless": lambda event: f"gradient below sqrt(3) times its quantisation noise in {_tensors(event)}",
}
"""Kind of an event -> the text of its line, after the step."""


def event_line(event: Event) -> str:
    """An event as one line of text.

    >>> event_line({"step": 9, "event": "loss_spike", "loss_before": 3.4, "loss_after": 8.1, "rows": [64, 72]})
    'step 9 loss spike, loss 3.4 -> 8.1, data rows 64-72'
    """
    text = f"step {event['step']} {LINES[event['event']](event)}"
    rows, label = event.get("rows"), "first bad rows" if "since" in event else "data rows"
    return f"{text}, {label} {rows[0]}-{rows[1]}" if rows else text


# ---- the live table ----


def worst_table(names: list[str], record: dict[str, Any], count: int = 4, width: int | None = None) -> Table:
    """The parameters with the largest spikes in a ``parameters`` record, as a rich table.

    Args:
        names: names of the parameters, in the order of the record's vectors.
        record: the record. Parameters are ordered by ``ratio``, or by ``grad_norm`` before the first ratio is known.
        count: number of parameters.
        width: width of the terminal in characters. Columns that do not fit are left out from the right, so that no
            number is cut. None keeps all columns.
    """
    from rich.table import Table
    from rich.text import Text

    by = record.get("ratio") or record.get("grad_norm") or [0.0] * len(names)
    worst = sorted(range(len(names)), key=lambda i: -(by[i] or 0.0))[:count]
    known = {key: head for key, head in TABLE_COLUMNS.items() if key in record}
    cells = {
        key: ["-" if (value := record[key][i]) is None else form.format(value) for i in worst]
        for key, (_, form) in known.items()
    }
    room = width - NAME_WIDTH if width is not None else None
    for key in list(cells):
        needed = 1 + max(map(len, (known[key][0], *cells[key])))
        if room is not None and (room := room - needed) < 0:
            cells = dict(list(cells.items())[: list(cells).index(key)])
            break
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(f"steps {record['first']}-{record['step']}", no_wrap=True, overflow="ellipsis")
    for key in cells:
        table.add_column(known[key][0], justify="right", no_wrap=True)
    for place, i in enumerate(worst):
        # Text instead of str: brackets in a parameter's name must not be read as markup.
        table.add_row(Text(short(names[i])), *(column[place] for column in cells.values()))
    return table
