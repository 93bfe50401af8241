"""Events as lines of text. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Event = dict[str, Any]


def short(name: str) -> str:
    """A parameter's name as people say it: ``model.layers.3.mlp.down_proj.weight`` -> ``layers.3.mlp.down_proj``, but
    ``3.weight`` stays: a number alone says nothing.
    """
    brief = name.removeprefix("model.").removesuffix(".weight")
    return name if brief.rpartition(".")[2].isdigit() else brief


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


LINES: dict[str, Callable[[Event], str]] = {
    "spike": _spike,
    "loss_spike": _loss_spike,
    "recovered": lambda event: f"the loss has recovered, {event['steps']} steps after its spike at {event['since']}",
    "skipped": lambda event: f"gradient not finite, skipped {_tensors(event)}",
    "nonfinite": lambda event: f"gradient not finite in {_tensors(event)}",
    "weights_nonfinite": _weights,
    "stays_nonfinite": lambda event: f"gradients have not been finite since step {event['since']}",
    "reset": lambda event: "moments reset",
    "useless": lambda event: f"gradient below sqrt(3) times its quantisation noise in {_tensors(event)}",
}
"""What is said of each kind of event."""


def event_line(event: Event) -> str:
    """One line: ``step 812 spike x143 in layers.3.mlp.down_proj, 0.012 % clipped, loss 3.41 -> 3.44, data rows
    51968-52000``."""
    text = f"step {event['step']} {LINES[event['event']](event)}"
    rows, label = event.get("rows"), "first bad rows" if "since" in event else "data rows"
    return f"{text}, {label} {rows[0]}-{rows[1]}" if rows else text
