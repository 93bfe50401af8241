"""Results of ``evenstep bench`` as tables and as pictures: a bar for each optimizer, or a line over the model sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from evenstep import console
from evenstep.bench.registry import KNOWN, REFERENCE, SETS
from evenstep.console import counted
from evenstep.errors import EvenstepError

Row = dict[str, Any]
Table = tuple[str, Sequence[str], Sequence[Sequence[str]], str]
"""Title, column heads, rows, and a line below the table."""


def known_optimizers() -> Table:
    """Every optimizer of the registry, with its package and installed version."""
    rows = [
        [name, entry.package, entry.version() or f"no (pip install {entry.package})", entry.note]
        for name, entry in KNOWN.items()
    ]
    return "", ["optimizer", "package", "installed", "note"], rows, f"for several: {', '.join(SETS)}"


def comparisons(document: dict[str, Any]) -> Iterator[tuple[Row, list[Row]]]:
    """Facts and rows of each comparison: the fastest optimizer first, skipped ones last."""
    for facts in filter(None, document["comparisons"]):
        rows = [row for row in document["rows"] if all(row[key] == facts[key] for key in ("shapes", "threads"))]
        yield facts, sorted(rows, key=lambda row: (row["ms"] is None, row["ratio_to_adamw_fused"]))


def step_time_tables(document: dict[str, Any]) -> list[Table]:
    """One table for each comparison."""
    return [_step_time_table(facts, rows) for facts, rows in comparisons(document)]


def _step_time_table(facts: Row, rows: list[Row]) -> Table:
    heads = ["optimizer", "ms", "quartiles", "x adamw_fused", "state B/param", "transient", "GB/s", "of roof", "rounds"]
    lines = []
    for row in rows:
        if row["ms"] is None:
            lines.append([row["optimizer"], "skipped: " + row["skipped"], *[""] * (len(heads) - 2)])
            continue
        lines.append([
            row["optimizer"],
            f"{row['ms']:.2f}",
            f"{row['ms_q1']:.2f}-{row['ms_q3']:.2f}",
            f"{row['ratio_to_adamw_fused']:.2f}",
            f"{row['state_bytes_per_param']:.2f}",
            f"{_size(row['transient_bytes'])} ({row['transient_share']:.1%})",
            f"{row['gb_per_s']:.1f}",
            f"{row['roof_share']:.0%}",
            str(row["rounds"]),
        ])  # fmt: skip
    size = f"{facts['parameters'] / 1e6:.1f}M parameters in {counted(facts['tensors'], 'tensor')}"
    title = f"{facts['shapes']}: {size}, {facts['dtype']}, {counted(facts['threads'], 'thread')}"
    roof = f"; in-place read and write of a buffer (the roof): {facts['roof_gb_per_s']:.1f} GB/s"
    below = "transient: peak of a step beside the state (share of the parameters' bytes); GB/s: 2 x parameters, "
    below += "gradients and 2 x state over the time" + (roof if "roof_gb_per_s" in facts else "")
    return title, heads, lines, below


def scaling_tables(document: dict[str, Any]) -> list[Table]:
    """One table for each number of threads: nanoseconds per parameter and the ratio to the reference, by optimizer and
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
        lines = [[name, *(numbers.get(shape, "") for shape in shapes)] for name, numbers in cells.items()]
        left = [f"{item['shapes']} left out: {item['why']}" for item in document["left_out"]]
        title = f"ns per parameter (x adamw_fused), {counted(threads, 'thread')}"
        tables.append((title, heads, lines, "\n".join(dict.fromkeys(left))))
    return tables


def _size(number: float) -> str:
    for unit in ("B", "KB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def print_table(*table: Any) -> None:
    """Print ``table`` to the terminal, with evenstep's own optimizers marked."""
    console.print_table(*table, marked=lambda name: name in KNOWN and KNOWN[name].ours)


# ---- pictures ----

OURS, REFERENCE_COLOUR, OTHERS = "#2a9d8f", "#264653", "#c9ced6"
SUFFIXES = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> None:
    """Raise EvenstepError if ``path`` has an unknown suffix or matplotlib is not installed."""
    if path.suffix not in SUFFIXES:
        raise EvenstepError(f"--plot {path}: the name must end in {', '.join(SUFFIXES)}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise EvenstepError("--plot needs matplotlib; pip install 'evenstep[plots]'") from None


def _colour(row: Row) -> str:
    if row["optimizer"] == REFERENCE:
        return REFERENCE_COLOUR
    return OURS if row["package"] == "evenstep" else OTHERS


def draw_ratios(document: dict[str, Any], path: Path) -> None:
    """Draw the step time relative to fused AdamW: a panel for each comparison, the fastest optimizer on top."""
    panels = [(facts, [row for row in rows if row["ms"]]) for facts, rows in comparisons(document)]
    panels = [(facts, rows) for facts, rows in panels if rows]
    heights = [0.7 + 0.23 * len(rows) for _, rows in panels]
    _save(document, path, heights, [partial(_ratio_panel, facts=facts, rows=rows) for facts, rows in panels])


def _ratio_panel(axes: Any, facts: Row, rows: list[Row]) -> None:
    ratios = [row["ratio_to_adamw_fused"] for row in rows]
    spread = [
        [row["ratio_to_adamw_fused"] - row["ratio_q1"] for row in rows],
        [row["ratio_q3"] - row["ratio_to_adamw_fused"] for row in rows],
    ]
    names, colours = [row["optimizer"] for row in rows], [_colour(row) for row in rows]
    style: dict[str, Any] = {"ecolor": "#6b7280", "error_kw": {"elinewidth": 1}, "height": 0.72}
    bars = axes.barh(names, ratios, xerr=spread, color=colours, **style)
    axes.bar_label(bars, [f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}" for ratio in ratios], padding=3, fontsize=9)
    axes.axvline(1, color=REFERENCE_COLOUR, linewidth=1, linestyle="--", zorder=0)
    axes.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    if max(ratios) > 4:
        axes.set_xscale("log")
        axes.set_xlim(min(0.5, min(ratios) * 0.8), max(ratios) * 1.6)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    else:
        axes.set_xlim(0, max(ratios) * 1.12)
    where = f"{facts['shapes']} shapes, {facts['dtype']}, {counted(facts['threads'], 'thread')}"
    axes.set_title(f"Step time relative to torch's fused AdamW: {where}", fontsize=11, loc="left")
    axes.tick_params(labelsize=9, length=0)


def draw_scaling(document: dict[str, Any], path: Path) -> None:
    """Draw nanoseconds per parameter over the number of parameters: a panel for each number of threads."""
    sizes = {(facts["shapes"], facts["threads"]): facts["parameters"] for facts, _ in comparisons(document)}

    def panel(axes: Any, threads: int) -> None:
        rows = [row for row in document["rows"] if row["threads"] == threads and row["ms"]]
        for name in dict.fromkeys(row["optimizer"] for row in rows):
            points = sorted((sizes[r["shapes"], threads], r["ns_per_param"]) for r in rows if r["optimizer"] == name)
            dashed = "--" if name == REFERENCE else "-"
            axes.plot(*zip(*points, strict=True), dashed, marker="o", markersize=4, label=name)
        axes.set(xscale="log", xlabel="parameters", ylabel="ns per parameter")
        axes.set_ylim(bottom=0)
        axes.set_title(f"Cost of a step, {counted(threads, 'thread')}", fontsize=11, loc="left")
        axes.legend(fontsize=8, frameon=False)

    panels = [partial(panel, threads=threads) for threads in dict.fromkeys(threads for _, threads in sizes)]
    _save(document, path, [3.6] * len(panels), panels)


def _save(document: dict[str, Any], path: Path, heights: list[float], panels: Sequence[Callable[[Any], None]]) -> None:
    from matplotlib.figure import Figure  # not pyplot, which has global state and may open a display

    from evenstep.train.hardware import short_commit

    figure = Figure(figsize=(8, sum(heights) + 0.3), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, draw in zip(grid, panels, strict=True):
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
    hardware, torch = document["hardware"], document["versions"]["torch"]
    place = hardware.get("gpu") or hardware["cpu"]
    when = f"{document['date'][:10]}, {short_commit(document['commit'])}"
    figure.supxlabel(f"{place}, torch {torch}, {when}", fontsize=8, color="gray")
    figure.savefig(path, dpi=150)
