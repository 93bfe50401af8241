"""Pictures of a comparison: curves with bands over the seeds, loss by learning rate, memory against perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evenstep.compare.claims import kept_bytes
from evenstep.errors import EvenstepError
from evenstep.train.log import short_count

Document = dict[str, Any]


def draw(document: Document, directory: Path) -> list[Path]:
    """Write the pictures that there is something to show in; remove the others. EvenstepError without matplotlib."""
    written = []
    for name, wanted, paint in PICTURES:
        lines = [line for line in document["lines"] if wanted(line)]
        path = directory / f"{document['table']}-{name}.png"
        if not lines:
            path.unlink(missing_ok=True)
            continue
        with picture(path, document["title"], _footer(document)) as axes:
            paint(axes, lines)
        written.append(path)
    return written


@contextmanager
def picture(path: Path, title: str, footer: str) -> Iterator[Any]:
    """Axes to paint on, written to ``path`` in the end. EvenstepError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise EvenstepError("pictures need matplotlib; pip install 'evenstep[plots]'") from None
    figure = Figure(figsize=(7, 4.4), layout="constrained")  # no pyplot: nothing global, no display
    axes = figure.add_subplot()
    yield axes
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.set_title(title, fontsize=10, loc="left")
    figure.supxlabel(footer, fontsize=7, color="gray")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def band(
    axes: Any,
    x: Sequence[float],
    mean: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    label: str,
) -> None:
    """A curve over the seeds, with a band from the lowest to the highest."""
    [drawn] = axes.plot(x, mean, label=label, linewidth=1.4)
    axes.fill_between(x, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)


def _footer(document: Document) -> str:
    hardware = document["hardware"][0] if document["hardware"] else {}
    commit = (document["commit"] or [None])[0] or "no commit"
    place = hardware.get("gpu") or hardware.get("cpu", "")
    return f"scale {document['scale']}, {place}, {commit[:10]}, {document['date']}"


def _name(line: Document) -> str:
    return f"{line['label']}, {line['precision_label']}"


def _curves(axes: Any, lines: list[Document]) -> None:
    losses = []
    for line in lines:
        curve = line["curve"]
        band(axes, curve["tokens"], curve["mean"], curve["low"], curve["high"], _name(line))
        losses += curve["mean"][len(curve["mean"]) // 4 :]
    low, high = min(losses), max(losses)
    axes.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
    axes.set(xlabel="tokens", ylabel="validation loss (nats per token)")
    axes.xaxis.set_major_formatter(lambda x, _: short_count(x))
    axes.legend(fontsize=7, frameon=False, ncols=2 if len(lines) > 8 else 1)


def _rates(axes: Any, lines: list[Document]) -> None:
    for line in lines:
        cells = [cell for cell in line["sweep"] if cell["loss"] is not None]
        [drawn] = axes.plot([c["lr"] for c in cells], [c["loss"] for c in cells], "-", linewidth=1.2, label=_name(line))
        for status, mark in (("finished", "o"), ("hopeless", "x")):
            some = [cell for cell in cells if cell["status"] == status]
            axes.plot([c["lr"] for c in some], [c["loss"] for c in some], mark, color=drawn.get_color(), markersize=4)
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss after the sweep (x: stopped early)")
    axes.legend(fontsize=7, frameon=False, ncols=2 if len(lines) > 8 else 1)


def _memory(axes: Any, lines: list[Document]) -> None:
    """Memory of model and state against perplexity; the front is what nothing else beats in both."""
    points = [(kept_bytes(line) / 1e6, math.exp(line["mean"]), line) for line in lines]
    for x, y, line in points:
        axes.plot(x, y, "o", markersize=6, label=_name(line))
    front: list[tuple[float, float]] = []
    for x, y, _ in sorted(points, key=lambda point: point[:2]):
        if not front or y < front[-1][1]:
            front.append((x, y))
    axes.step(*zip(*front, strict=True), where="post", color="gray", linewidth=1, linestyle="--", zorder=0)
    axes.set(xlabel="model and optimizer state (MB)", ylabel="perplexity")
    axes.legend(fontsize=7, frameon=False, ncols=2 if len(lines) > 8 else 1)


def _has_curve(line: Document) -> bool:
    return len(line["curve"]["tokens"]) > 1


def _has_sweep(line: Document) -> bool:
    return sum(cell["loss"] is not None for cell in line["sweep"]) > 1


def _has_memory(line: Document) -> bool:
    return line["mean"] is not None and line["state_bytes"] is not None


PICTURES: list[tuple[str, Callable[[Document], bool], Callable[[Any, list[Document]], None]]] = [
    ("curves", _has_curve, _curves),
    ("rates", _has_sweep, _rates),
    ("memory", _has_memory, _memory),
]
