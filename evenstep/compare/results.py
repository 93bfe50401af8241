"""From the outcomes of a table's cells to one document: what is tabled, drawn, judged, and kept as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from statistics import mean
from typing import Any

from evenstep.compare.cells import FINISHED, Cell, Outcome
from evenstep.compare.claims import judged
from evenstep.compare.grid import Plan
from evenstep.compare.table import Group

Document = dict[str, Any]
POINTS = 40
"""Points that are kept of a curve, at most."""


def document_of(plan: Plan, outcomes: Mapping[str, Outcome]) -> Document:
    """Everything about a table: lines with sweep, seeds and curve, claims with verdicts, where it was trained."""
    table = plan.table
    lines = [_line(plan, group, outcomes) for group in plan.groups]
    for line in lines:
        line["tokens_to_reference"] = _reached(line, reference_of(line, lines, table.reference))
    summaries = [outcomes[c.name].summary for c in _cells(plan, outcomes) if outcomes[c.name].summary]
    return {
        "table": table.name,
        "title": table.title,
        "paper": table.document["paper"],
        "about": table.document.get("about", ""),
        "scale": table.scale,
        "reference": table.reference,
        "setting": _setting(plan),
        "lines": lines,
        "claims": _judged(table.claims, lines),
        "hardware": _each(summaries, "hardware"),
        "commit": _each(summaries, "commit"),
        "versions": _each(summaries, "versions"),
        "seconds": sum(summary["seconds"] for summary in summaries),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _cells(plan: Plan, outcomes: Mapping[str, Outcome]) -> list[Cell]:
    cells = {c.name: c for _, c in plan.wanted(outcomes)}
    return [c for name, c in cells.items() if name in outcomes]


def _each(summaries: list[Document], key: str) -> list[Any]:
    """Distinct values, in order of first appearance."""
    found: list[Any] = []
    for summary in summaries:
        if summary.get(key) not in found:
            found.append(summary.get(key))
    return found


def reference_of(line: Document, lines: list[Document], name: str | None) -> Document | None:
    """The reference of a line: that of the same size, or the only one."""
    named = [other for other in lines if name in (other["name"], f"{other['name']}/{other['size']}")]
    return next((other for other in named if other["size"] == line["size"]), named[0] if len(named) == 1 else None)


def _judged(claims: list[Document], lines: list[Document]) -> list[Document]:
    """Each claim once for every size that has both of its lines."""
    found = []
    for claim in claims:
        for size in dict.fromkeys(line["size"] for line in lines):
            verdict = judged(claim, [line for line in lines if line["size"] == size])
            if verdict is not None:
                found.append({**verdict, "size": size})
    return found


def _setting(plan: Plan) -> Document:
    """What all runs have in common, from the first line."""
    config = plan.cell(plan.groups[0], "final", plan.table.rates(plan.groups[0])[0], 0).config
    return {
        "data": config.data.source,
        "vocab_size": config.data.vocab_size,
        "seq_len": config.train.seq_len,
        "batch_size": config.train.batch_size,
        "schedule": config.schedule.name,
        "min_lr_ratio": config.schedule.min_lr_ratio,
        "sweep_tokens": plan.table.tokens(plan.groups[0], "sweep"),
        "tokens": plan.table.tokens(plan.groups[0], "final"),
    }


def _line(plan: Plan, group: Group, outcomes: Mapping[str, Outcome]) -> Document:
    table = plan.table
    sweep = [(c, outcomes[c.name]) for c in plan.sweep(group, outcomes) if c.name in outcomes]
    finals = [(c, outcomes[c.name]) for c in plan.finals(group, outcomes) if c.name in outcomes]
    ended = [o for _, o in finals if o.status == FINISHED and o.loss is not None]
    best = plan.best_rate(group, outcomes) if sweep or finals else None
    only = [o for c, o in sweep if c.lr == best and o.loss is not None]
    losses = [o.loss for o in ended if o.loss is not None]
    facts = [o.summary for o in ended or only]
    return {
        "name": group.name,
        "row": group.row,
        "label": table.label(group.row),
        "precision": group.precision,
        "precision_label": table.document["precision"][group.precision].get("label", group.precision),
        "size": group.size,
        "best_lr": best,
        "sweep": [_swept(c, o) for c, o in sorted(sweep, key=lambda item: item[0].lr)],
        "finals": [
            {"seed": c.seed, "lr": c.lr, "status": o.status, "loss": o.loss, "tokens": o.tokens, "why": o.why}
            for c, o in finals
        ],
        "mean": mean(losses) if losses else None,
        "spread": max(losses) - min(losses) if losses else None,
        "tokens": ended[0].tokens if ended else (only[0].tokens if only else None),
        "curve": _curve([o.curve for o in ended]),
        "published": table.published(group),
        "sensitivity": sensitivity([_swept(c, o) for c, o in sweep]),
        **{key: _mean(facts, key) for key in ("state_bytes", "model_bytes", "peak_memory", "parameters")},
        "seconds": _mean(facts, "seconds"),
        "tokens_per_second": _mean(facts, "tokens_per_second"),
    }


def _swept(cell: Cell, outcome: Outcome) -> Document:
    return {
        "lr": cell.lr, "seed": cell.seed, "status": outcome.status, "loss": outcome.loss, "tokens": outcome.tokens,
        "why": outcome.why,
    }  # fmt: skip


def _mean(facts: list[Document], key: str) -> float | None:
    values = [fact[key] for fact in facts if fact.get(key) is not None]
    return mean(values) if values else None


def _curve(curves: list[list[tuple[int, float]]]) -> Document:
    """Mean, minimum and maximum over the seeds, at the token counts that all seeds have."""
    if not curves or not all(curves):
        return {"tokens": [], "mean": [], "low": [], "high": []}
    common = sorted(set.intersection(*({at for at, _ in curve} for curve in curves)))
    step = max(1, math.ceil(len(common) / POINTS))
    common = [*common[:-1:step], common[-1]] if common else []
    values = [[dict(curve)[at] for curve in curves] for at in common]
    return {
        "tokens": common,
        "mean": [round(mean(v), 5) for v in values],
        "low": [round(min(v), 5) for v in values],
        "high": [round(max(v), 5) for v in values],
    }


def sensitivity(sweep: list[Document]) -> float | None:
    """How much the loss suffers from a wrong learning rate: the mean, over all rates tried, of the excess over the best
    one's loss. A rate that was given up counts with the loss it had, or 1 nat where it diverged."""
    known = [s["loss"] for s in sweep if s["status"] == FINISHED and s["loss"] is not None]
    if len(sweep) < 3 or not known:
        return None
    best = min(known)
    return mean((s["loss"] - best) if s["loss"] is not None else 1.0 for s in sweep)


def _reached(line: Document, reference: Document | None) -> float | None:
    """Tokens after which the mean validation loss first reaches the reference's final loss, interpolated linearly."""
    if reference is None or reference["mean"] is None or line["name"] == reference["name"]:
        return None
    goal, before = reference["mean"], None
    for at, loss in zip(line["curve"]["tokens"], line["curve"]["mean"], strict=True):
        if loss <= goal:
            if before is None:
                return float(at)
            share = (before[1] - goal) / (before[1] - loss)
            return before[0] + share * (at - before[0])
        before = (at, loss)
    return None


def stopped_early(document: Document) -> list[str]:
    """A line for each cell that was given up."""
    return [
        f"{line['name']} at lr {cell['lr']:g}: {cell['status']}, {cell['why']}"
        for line in document["lines"]
        for cell in (*line["sweep"], *line["finals"])
        if cell["status"] != FINISHED
    ]


def is_measured(document: Document) -> bool:
    return any(line["mean"] is not None or line["sweep"] for line in document["lines"])
