"""The pictures of docs/results-lowbit.md."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from lowbit_claims import Results
from matplotlib.figure import Figure

COLOURS = {"adamw": "#8d99ae", "adamw + clip": "#264653", "spam": "#e9a23b", "stable_spam": "#2a9d8f"}


def draw_rates(results: Results, path: Path) -> None:
    """Loss against the rate, a panel for each precision, a line for each optimizer; a cross on top: diverged."""
    cells = results.cells(results.sweep)
    precisions = list(dict.fromkeys(precision for _, precision in cells))
    rates = sorted({row.lr for row in results.sweep})
    finite = [row.loss for row in results.sweep if row.loss < math.inf]
    roof = max(finite) + 0.05 * (max(finite) - min(finite))
    figure = Figure(figsize=(2.5 * len(precisions) + 0.8, 3.2), layout="constrained")
    panels = figure.subplots(1, len(precisions), sharey=True, squeeze=False)[0]
    for axes, precision in zip(panels, precisions, strict=True):
        for optimizer, colour in COLOURS.items():
            loss = results.by_rate(optimizer, precision)
            if not loss:
                continue
            there = [(lr, x) for lr, x in sorted(loss.items()) if x < math.inf]
            axes.plot(*zip(*there, strict=True), marker="o", markersize=4, color=colour, label=optimizer)
            gone = [lr for lr, x in loss.items() if x == math.inf]
            axes.plot(gone, [roof] * len(gone), "x", color=colour)
        axes.set_xscale("log")
        axes.set_xticks(rates, [f"{lr * 1000:g}" for lr in rates])
        axes.minorticks_off()
        axes.set_title(precision, fontsize=10)
        axes.grid(axis="y", color="#e5e7eb")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("validation loss (nats per token)")
    figure.supxlabel("learning rate / 1e-3", fontsize=10)
    panels[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def draw_seeds(results: Results, path: Path) -> None:
    """A row for each cell, the lowest on top: its seeds as dots, their mean as a stroke, their range as a line."""
    cells = {cell: list(results.seeds(*cell).values()) for cell in results.cells(results.long)}
    shown = {cell: [x for x in losses if x < math.inf] for cell, losses in cells.items()}
    order = sorted((cell for cell in cells if shown[cell]), key=lambda cell: statistics.mean(cells[cell]))
    figure = Figure(figsize=(7, 0.36 * len(order) + 1.1), layout="constrained")
    axes = figure.subplots()
    for place, cell in enumerate(order):
        losses, colour = shown[cell], COLOURS[cell[0]]
        axes.plot([min(losses), max(losses)], [place, place], color=colour, linewidth=2, alpha=0.5)
        axes.plot(losses, [place] * len(losses), "o", color=colour, markersize=5)
        if len(losses) == len(cells[cell]):
            axes.plot(statistics.mean(losses), place, "|", color=colour, markersize=16, markeredgewidth=2)
    labels = [f"{optimizer}, {precision}" for optimizer, precision in order]
    for place, cell in enumerate(order):
        if gone := len(cells[cell]) - len(shown[cell]):
            labels[place] += f" ({gone} diverged)"
    axes.set_yticks(range(len(order)), labels)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xlabel("validation loss (nats per token); each dot a seed, the stroke their mean")
    axes.grid(axis="x", color="#e5e7eb")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
