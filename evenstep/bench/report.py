"""What was measured, as tables and as pictures: a bar for each optimizer, or a line over the sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evenstep import console
from evenstep.bench.registry import KNOWN, REFERENCE, SETS
from evenstep.errors import EvenstepError

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


# ---- pictures ----

OURS, REFERENCE_COLOUR, OTHERS = "#2a9d8f", "#264653", "#c9ced6"
SUFFIXES = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> None:
    """EvenstepError when there will be no picture: no matplotlib, or a kind of file it should not be."""
    if path.suffix not in SUFFIXES:
        raise EvenstepError(f"--plot {path}: the name must end in {', '.join(SUFFIXES)}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise EvenstepError("--plot needs matplotlib; pip install 'evenstep[plots]'") from None


def _colour(row: dict[str, Any]) -> str:
    if row["optimizer"] == REFERENCE:
        return REFERENCE_COLOUR
    return OURS if row["package"] == "evenstep" else OTHERS


def draw_ratios(document: dict[str, Any], path: Path) -> None:
    """Time of a step relative to fused AdamW, a panel for each comparison, the fastest on top."""
    panels = []
    for facts in filter(None, document["comparisons"]):
        rows = [r for r in document["rows"] if r["ms"] and all(r[k] == facts[k] for k in ("shapes", "threads"))]
        if rows:
            panels.append((facts, sorted(rows, key=lambda row: row["ratio_to_adamw_fused"])))

    def draw(axes: Any, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        ratios = [row["ratio_to_adamw_fused"] for row in rows]
        wide = max(ratios) > 4
        spread = [
            [row["ratio_to_adamw_fused"] - row["ratio_q1"] for row in rows],
            [row["ratio_q3"] - row["ratio_to_adamw_fused"] for row in rows],
        ]
        bars = axes.barh(
            [row["optimizer"] for row in rows],
            ratios,
            xerr=spread,
            ecolor="#6b7280",
            error_kw={"elinewidth": 1},
            color=[_colour(row) for row in rows],
            height=0.72,
        )
        texts = [f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}" for ratio in ratios]
        axes.bar_label(bars, texts, padding=3, fontsize=9)
        axes.axvline(1, color=REFERENCE_COLOUR, linewidth=1, linestyle="--", zorder=0)
        axes.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
        if wide:
            axes.set_xscale("log")
            axes.set_xlim(min(0.5, min(ratios) * 0.8), max(ratios) * 1.6)
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        else:
            axes.set_xlim(0, max(ratios) * 1.12)
        threads = f"{facts['threads']} thread{'s' if facts['threads'] > 1 else ''}"
        axes.set_title(
            f"Step time relative to torch's fused AdamW: {facts['shapes']} shapes, {facts['dtype']}, {threads}",
            fontsize=11,
            loc="left",
        )
        axes.tick_params(labelsize=9, length=0)

    heights = [0.7 + 0.23 * len(rows) for _, rows in panels]
    _save(document, path, heights, [lambda axes, f=facts, r=rows: draw(axes, f, r) for facts, rows in panels])  # type: ignore[misc]


def draw_scaling(document: dict[str, Any], path: Path) -> None:
    """Nanoseconds per parameter over the number of parameters, a panel for each number of threads."""
    sizes = {
        (facts["shapes"], facts["threads"]): facts["parameters"] for facts in filter(None, document["comparisons"])
    }

    def draw(axes: Any, threads: int) -> None:
        rows = [row for row in document["rows"] if row["threads"] == threads and row["ms"]]
        for name in dict.fromkeys(row["optimizer"] for row in rows):
            points = sorted((sizes[r["shapes"], threads], r["ns_per_param"]) for r in rows if r["optimizer"] == name)
            dashed = "--" if name == REFERENCE else "-"
            axes.plot(*zip(*points, strict=True), dashed, marker="o", markersize=4, label=name)
        axes.set(xscale="log", xlabel="parameters", ylabel="ns per parameter")
        axes.set_ylim(bottom=0)
        axes.set_title(f"Cost of a step, {threads} thread{'s' if threads > 1 else ''}", fontsize=11, loc="left")
        axes.legend(fontsize=8, frameon=False)

    numbers = list(dict.fromkeys(threads for _, threads in sizes))
    _save(document, path, [3.6] * len(numbers), [lambda axes, n=n: draw(axes, n) for n in numbers])  # type: ignore[misc]


def _save(document: dict[str, Any], path: Path, heights: list[float], draws: list[Callable[[Any], None]]) -> None:
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    figure = Figure(figsize=(8, sum(heights) + 0.3), layout="constrained")
    panels = figure.subplots(len(draws), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, draw in zip(panels, draws, strict=True):
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
    hardware, torch = document["hardware"], document["versions"]["torch"]
    place = hardware.get("gpu") or hardware["cpu"]
    head = document["commit"] or "no commit"
    commit = head[:10] + head[40:]  # a + stands for changes
    figure.supxlabel(f"{place}, torch {torch}, {document['date'][:10]}, {commit}", fontsize=8, color="gray")
    figure.savefig(path, dpi=150)
