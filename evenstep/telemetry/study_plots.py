"""The pictures of the spike study."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from evenstep.telemetry.schema import GSS_THRESHOLD

if TYPE_CHECKING:
    from evenstep.telemetry.study import Trained

COLUMNS = 100
"""Of a picture: the largest value of each stretch of steps is shown."""

COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:purple")


def draw_all(out: Path, trained: list[Trained], moments: dict[str, Any]) -> list[Path]:
    """Write how-often.png, where.png, how-large.png and moments.png; returns their paths."""
    figures = {"how-often": _how_often(trained), "where": _where(trained), "how-large": _how_large(trained)}
    paths = []
    for name, figure in (figures | {"moments": _moments(moments)}).items():
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        paths.append(out / f"{name}.png")
        figure.savefig(paths[-1], dpi=110)
    return paths


def _how_often(trained: list[Trained]) -> Figure:
    figure = Figure(figsize=(9, 2.7 * len(trained)), layout="constrained")
    for axes, one in zip(figure.subplots(len(trained), squeeze=False).flat, trained, strict=True):
        steps = np.arange(1, len(one.losses) + 1)
        axes.bar(steps, 100 * one.spikes(), width=1.0, color="tab:red", alpha=0.8)
        axes.set(title=one.name, xlabel="step", ylabel=f"coordinates with GSS > {GSS_THRESHOLD:.0f} (%)")
        beside = axes.twinx()
        beside.plot(steps, one.losses, color="tab:blue", linewidth=1)
        beside.set_ylabel("loss", color="tab:blue")
    return figure


def _where(trained: list[Trained]) -> Figure:
    figure = Figure(figsize=(10, 4.2 * len(trained)), layout="constrained")
    grid = figure.subplots(len(trained), 2, squeeze=False, width_ratios=(1, 3))
    for (bars, picture), one in zip(grid, trained, strict=True):
        parts = one.by_part()
        drawn = bars.barh(list(parts)[::-1], [100 * share for share in parts.values()][::-1], color="tab:red")
        bars.bar_label(drawn, fmt="%.2g", padding=3, fontsize=8)
        bars.set(title=one.name, xlabel="coordinates and steps\nthat are spikes (%)")
        bars.margins(x=0.25)
        rows, largest = one.largest()
        starts = np.arange(0, largest.shape[1], -(-largest.shape[1] // COLUMNS))
        pooled = np.maximum.reduceat(largest, starts, axis=1)
        scale, extent = LogNorm(1, max(100.0, largest.max())), (0, largest.shape[1], len(rows) - 0.5, -0.5)
        shown = picture.imshow(
            np.maximum(pooled, 1), aspect="auto", norm=scale, cmap="magma_r", extent=extent, interpolation="nearest"
        )
        every = max(1, len(rows) // 12)
        picture.set_yticks(
            range(0, len(rows), every), [row.removeprefix("gpt_neox.") for row in rows[::every]], fontsize=7
        )
        picture.set(xlabel="step", title="largest GSS of each tensor")
        figure.colorbar(shown, ax=picture, label="GSS")
    return figure


def _how_large(trained: list[Trained]) -> Figure:
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    steps = max(len(one.losses) for one in trained)
    edges = np.geomspace(1, steps, 40)
    for one, color in zip(trained, COLORS * len(trained), strict=False):
        scores = np.concatenate([score.ravel() for score in one.scores.values()])
        counts, _ = np.histogram(scores, edges)
        axes.stairs(counts / len(scores), edges, color=color, label=one.name, linewidth=1.6)
    axes.axvline(GSS_THRESHOLD, color="grey", linestyle=":", label=f"GSS {GSS_THRESHOLD:.0f}")
    axes.set(xscale="log", yscale="log", xlabel="GSS", ylabel="share of coordinates and steps")
    axes.legend(frameon=False)
    return figure


def _moments(moments: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    titles = {"exp_avg": "first moment", "exp_avg_sq": "second moment"}
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for (name, found), color in zip(moments.items(), COLORS, strict=False):
            axes.plot(np.maximum(found[key], 1e-3), color=color, label=name, linewidth=1.5)
        axes.axhline(0.1, color="grey", linestyle=":")
        axes.set(yscale="log", title=title, xlabel="steps after the spike", ylim=(7e-4, None))
        axes.legend(frameon=False)
    figure.axes[0].set_ylabel("difference to the twin\nwithout a spike (share)")
    return figure
