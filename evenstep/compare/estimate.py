"""What a comparison will cost, before it is started."""

from __future__ import annotations

from collections.abc import Sequence

from evenstep.compare.cells import Cell
from evenstep.compare.schedule import Plan

SECONDS_PER_TOKEN = 22 / 250_000
"""One core, size tiny, vocabulary 2048, 8 x 128 tokens, fp32; low bits take 1.4 times that (docs/log.md)."""

LOWBIT = 1.4


def estimate(plans: Sequence[Plan]) -> tuple[list[Cell], list[str]]:
    """Every cell of the tables, each once, as if each line's best rate were its middle one, and lines that sum them
    up."""
    cells: dict[str, Cell] = {}
    for plan in plans:
        for group in plan.groups:
            rates = plan.table.rates(group)
            found = plan.sweep(group, {})
            if plan.table.has_final(group):
                seeds = plan.table.document["final"].get("seeds", [0])
                found += [plan.cell(group, "final", rates[(len(rates) - 1) // 2], seed) for seed in seeds]
            cells |= {cell.name: cell for cell in found}
    all_cells = list(cells.values())
    tokens = sum(cell.tokens for cell in all_cells)
    lines = [f"{len(all_cells)} runs, {tokens / 1e6:,.1f}M tokens"]
    if all(plan.table.scale == "small" for plan in plans):
        seconds = sum(c.tokens * SECONDS_PER_TOKEN * (LOWBIT if c.config.lowbit else 1) for c in all_cells)
        lines.append(
            f"about {seconds / 3600:.1f} hours of one core (size tiny; rates that turn out useless are left out, "
            "rates beyond the outermost may come to it)"
        )
    return all_cells, lines
