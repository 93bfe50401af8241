"""The document of a table: everything that is tabulated, drawn, judged and stored as JSON, from the outcomes of its
cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import mean
from typing import Any

from evenstep.compare.cells import FINISHED, HOPELESS, Cell, Outcome
from evenstep.compare.claims import called, judged, settled
from evenstep.compare.grid import Plan
from evenstep.compare.table import Document, Group

POINTS = 40
"""Largest number of points that are stored of a curve."""


def document_of(plan: Plan, outcomes: Mapping[str, Outcome]) -> Document:
    """The document of a table: its lines with sweep, seeds and curve, its claims with verdicts, and the hardware,
    commits and versions of its runs."""
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
        "claims": settled(_judged(table.claims, lines)),
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
    """The distinct values of ``key``, in order of first appearance."""
    values = [summary.get(key) for summary in summaries]
    return [value for i, value in enumerate(values) if value not in values[:i]]


def reference_of(line: Document, lines: list[Document], name: str | None) -> Document | None:
    """The line ``name`` with which ``line`` is compared: the one of the same size, or the only one."""
    named = called(lines, name)
    return next((other for other in named if other["size"] == line["size"]), named[0] if len(named) == 1 else None)


def _judged(claims: list[Document], lines: list[Document]) -> list[Document]:
    """Every claim by itself, once for each size that has both of its lines."""
    verdicts = []
    for claim in claims:
        for size in dict.fromkeys(line["size"] for line in lines):
            verdict = judged(claim, [line for line in lines if line["size"] == size])
            verdicts += [] if verdict is None else [{**verdict, "size": size}]
    return verdicts


def _setting(plan: Plan) -> Document:
    """The options that all runs share, read from the first line."""
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
    sweep = sorted(
        ((c, outcomes[c.name]) for c in plan.sweep(group, outcomes) if c.name in outcomes), key=lambda run: run[0].lr
    )
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
        "sweep": [_run(c, o) for c, o in sweep],
        "finals": [_run(c, o) for c, o in finals],
        "mean": mean(losses) if losses else None,
        "spread": max(losses) - min(losses) if losses else None,
        "tokens": ended[0].tokens if ended else (only[0].tokens if only else None),
        "curve": _curve([o.curve for o in ended]),
        "published": table.published(group),
        "sensitivity": sensitivity([_run(c, o) for c, o in sweep]),
        **{key: _mean(facts, key) for key in MEASURED},
    }


MEASURED = ("state_bytes", "model_bytes", "peak_memory", "parameters", "seconds", "tokens_per_second")
"""Facts of a line that are the mean over its runs."""


def _run(cell: Cell, outcome: Outcome) -> Document:
    facts = {key: getattr(outcome, key) for key in ("status", "loss", "tokens", "why")}
    return {"lr": cell.lr, "seed": cell.seed, **facts}


def _mean(facts: list[Document], key: str) -> float | None:
    values = [fact[key] for fact in facts if fact.get(key) is not None]
    return mean(values) if values else None


def _curve(curves: list[list[tuple[int, float]]]) -> Document:
    """The envelope of the curves of all seeds, thinned to about `POINTS` points."""
    rows = envelope([dict(curve) for curve in curves])
    step = max(1, math.ceil(len(rows) / POINTS))
    rows = [*rows[:-1:step], *rows[-1:]]
    values = {key: [round(row[i], 5) for row in rows] for i, key in enumerate(("mean", "low", "high"), 1)}
    return {"tokens": [row[0] for row in rows], **values}


def envelope(curves: Sequence[Mapping[Any, float]]) -> list[tuple[Any, float, float, float]]:
    """(x, mean, lowest, highest) over the ``curves``, which map x to y, at every x that all of them have."""
    common = sorted(set.intersection(*map(set, curves))) if curves else []
    values = [[curve[x] for curve in curves] for x in common]
    return [(x, mean(v), min(v), max(v)) for x, v in zip(common, values, strict=True)]


def sensitivity(sweep: list[Document]) -> float | None:
    """How much a wrong learning rate costs: the mean, over all rates tried, of the loss above that of the best rate. A
    run that diverged counts with 1 nat. None for fewer than three rates, and if a run was given up, whose last loss is
    one of training."""
    if any(s["status"] == HOPELESS for s in sweep):
        return None
    known = [s["loss"] for s in sweep if s["status"] == FINISHED and s["loss"] is not None]
    if len(sweep) < 3 or not known:
        return None
    best = min(known)
    return mean((s["loss"] - best) if s["loss"] is not None else 1.0 for s in sweep)


def _reached(line: Document, reference: Document | None) -> float | None:
    """Tokens after which the mean validation loss first reaches the final loss of the reference, by linear
    interpolation; None if it never does."""
    if reference is None or reference["mean"] is None or line["name"] == reference["name"]:
        return None
    goal: float = reference["mean"]
    before: tuple[float, float] | None = None
    for at, loss in zip(line["curve"]["tokens"], line["curve"]["mean"], strict=True):
        if loss <= goal:
            if before is None:
                return float(at)
            share = (before[1] - goal) / (before[1] - loss)
            return float(before[0] + share * (at - before[0]))
        before = (at, loss)
    return None


def stopped_early(document: Document) -> list[str]:
    """A text for each cell that was given up."""
    return [
        f"{line['name']} at lr {cell['lr']:g}: {cell['status']}, {cell['why']}"
        for line in document["lines"]
        for cell in (*line["sweep"], *line["finals"])
        if cell["status"] != FINISHED
    ]


def is_measured(document: Document) -> bool:
    """Whether a document has any result."""
    return any(line["mean"] is not None or line["sweep"] for line in document["lines"])
