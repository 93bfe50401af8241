"""One ranking over all tables: every line that was trained at the same setting, by precision, best first."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from evenstep.compare.claims import kept_bytes, losses_of

Document = dict[str, Any]

HEAD = """\
## Every line, best first

Lines of all tables that saw the same data with the same budget ({setting}). **loss**: mean over the seeds; **behind**:
nats above the best line of that precision; **model + state**: bytes relative to {reference}; **wrong rate**: how much
the loss suffers from it, the mean excess over the best rate's in the sweep. In brackets: one seed.
"""
REFERENCE = "Adam"
COLUMNS = ("line", "loss", "spread", "behind", "best lr", "model + state", "wrong rate", "tables")
SAME = ("data", "vocab_size", "batch_size", "seq_len", "tokens", "schedule")


def overview(documents: list[Document]) -> str:
    """Markdown; empty where no two tables were trained at the same setting."""
    settings = Counter(_setting(d) for d in documents if any(line["mean"] is not None for line in d["lines"]))
    if not settings or settings.most_common(1)[0][1] < 2:
        return ""
    common = settings.most_common(1)[0][0]
    found: dict[tuple[Any, ...], Entry] = {}
    for document in documents:
        for line in document["lines"] if _setting(document) == common else []:
            if line["mean"] is None or line["tokens"] < 0.99 * document["setting"]["tokens"]:
                continue  # not trained to the end here, or with a smaller budget of its own
            entry = found.setdefault((line["precision_label"], line["best_lr"], *losses_of(line)), Entry(line))
            entry.labels[line["label"]] = None
            entry.tables[document["table"]] = None
    named = dict(zip(SAME, common, strict=True))
    setting = f"{named['data']}, {named['tokens']:,} tokens, {named['batch_size']} x {named['seq_len']} a step"
    parts = [HEAD.format(setting=setting, reference=REFERENCE)]
    for precision in sorted({key[0] for key in found}, key=lambda label: ("bit" not in label, label)):
        some = [entry for key, entry in found.items() if key[0] == precision]
        parts.append(f"### {precision}\n\n{_ranking(some)}")
    return "\n".join(parts)


@dataclass
class Entry:
    """A line, which may stand in several tables, there under several names."""

    line: Document
    labels: dict[str, None] = field(default_factory=dict)
    tables: dict[str, None] = field(default_factory=dict)


def _setting(document: Document) -> tuple[Any, ...]:
    return tuple(document["setting"][key] for key in SAME)


def _ranking(entries: list[Entry]) -> str:
    entries = sorted(entries, key=lambda entry: entry.line["mean"])
    best = entries[0].line["mean"]
    reference = next((kept_bytes(entry.line) for entry in entries if REFERENCE in entry.labels), None)
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for entry in entries:
        line, seeds = entry.line, len(losses_of(entry.line))
        rows.append((
            ", ".join(entry.labels),
            f"{line['mean']:.4f}" if seeds > 1 else f"({line['mean']:.4f})",
            f"{line['spread']:.4f}" if seeds > 1 else "-",
            f"{line['mean'] - best:.4f}",
            f"{line['best_lr']:g}",
            f"{kept_bytes(line) / reference:.0%}" if reference else "-",
            "-" if line["sensitivity"] is None else f"{line['sensitivity']:.3f}",
            ", ".join(f"[{table}](#{table})" for table in entry.tables),
        ))  # fmt: skip
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
