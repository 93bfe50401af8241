"""The table of a comparison, as rows of text, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

from evenstep.compare.claims import kept_bytes
from evenstep.compare.results import reference_of, stopped_early

Document = dict[str, Any]

HEADS = (
    *("optimizer", "precision", "size", "best lr", "loss", "spread", "perplexity", "paper's perplexity"),
    *("tokens to reference", "state MB", "model + state", "peak MB", "tokens/s", "seeds"),
)


def rows(document: Document) -> list[list[str]]:
    """One row for each line; with no second stage the loss is the sweep's best, in brackets."""
    lines = document["lines"]
    return [_row(line, reference_of(line, lines, document["reference"])) for line in lines]


def _row(line: Document, reference: Document | None) -> list[str]:
    swept = [cell["loss"] for cell in line["sweep"] if cell["status"] == "finished" and cell["loss"] is not None]
    loss = line["mean"] if line["mean"] is not None else min(swept, default=None)
    brackets = "{}" if line["mean"] is not None else "({})"
    lost = sum(cell["status"] == "diverged" for cell in line["finals"])
    ended = len(line["finals"]) - lost
    return [
        line["label"],
        line["precision_label"],
        line["size"],
        _number(line["best_lr"], "g") + _at_the_edge(line),
        brackets.format(f"{loss:.4f}") if loss is not None else ("diverged" if lost else "-"),
        _number(line["spread"] if ended > 1 else None, ".4f"),
        brackets.format(f"{math.exp(loss):.2f}") if loss is not None else "-",
        "/".join(f"{value:g}" for value in line["published"].values()) or "-",
        _reached(line, reference),
        _number(line["state_bytes"], ".2f", 1e6),
        _share(line, reference),
        _number(line["peak_memory"], ".0f", 2**20),
        _number(line["tokens_per_second"], ",.0f"),
        f"{ended}" + (f" ({lost} diverged)" if lost else ""),
    ]


def _at_the_edge(line: Document) -> str:
    """A better rate may lie beyond the outermost that was tried."""
    rates = [cell["lr"] for cell in line["sweep"]]
    if len(rates) < 2 or line["best_lr"] not in (rates[0], rates[-1]):
        return ""
    return " (lowest tried)" if line["best_lr"] == rates[0] else " (highest tried)"


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "-" if value is None else format(value / unit, form)


def _reached(line: Document, reference: Document | None) -> str:
    at = line["tokens_to_reference"]
    if at is None or reference is None or not reference["tokens"]:
        return "-"
    return f"{at / reference['tokens']:.0%}"


def _share(line: Document, reference: Document | None) -> str:
    if line["model_bytes"] is None or reference is None or reference["model_bytes"] is None:
        return "-"
    return f"{kept_bytes(line) / kept_bytes(reference):.0%}"


def below(document: Document) -> str:
    """The lines under the table: what was stopped, what the columns mean."""
    lines = [f"stopped early: {text}" for text in stopped_early(document)]
    if document["reference"]:
        lines.append(
            f"tokens to reference: after which share of the tokens of {document['reference']} its final loss was "
            f"reached; model + state: bytes relative to it"
        )
    for claim in document["claims"]:
        lines.append(f"claim ({claim['size']}): {claim['text']}: {claim['verdict']} {claim['ours']}".rstrip())
    return "\n".join(lines)


def markdown(document: Document) -> str:
    head = f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}\n"
    return head + "".join(f"| {' | '.join(row)} |\n" for row in rows(document))


def comma_separated(document: Document) -> str:
    """Every cell, one a row, for spreadsheets: unlike the table, in full precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "precision", "size", "stage", "lr", "seed", "status", "loss", "tokens", "state_bytes"])
    for line in document["lines"]:
        for stage in ("sweep", "finals"):
            for cell in line[stage]:
                where = (line["row"], line["precision"], line["size"], stage.removesuffix("s"), cell["lr"])
                what = (cell["seed"], cell["status"], cell["loss"], cell["tokens"], line["state_bytes"])
                writer.writerow([*where, *what])
    return text.getvalue()
