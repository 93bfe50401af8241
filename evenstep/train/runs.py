"""The list of runs, read from what each run wrote; needs no torch."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from evenstep.errors import EvenstepError
from evenstep.paths import check_own_file, read_own
from evenstep.toml import parse_toml
from evenstep.train.files import is_running
from evenstep.train.metrics import read_metrics


@dataclass(frozen=True)
class RunRow:
    name: str
    when: str
    size: str
    optimizer: str
    steps: int
    val_loss: float | None
    status: str


def list_runs(directory: Path) -> list[RunRow]:
    """The runs in ``directory`` (or the one it is), the newest first. EvenstepError when the directory does not exist.

    ``status``: finished, running (a process holds its lock), interrupted otherwise, or unreadable.
    """
    if not directory.is_dir():
        raise EvenstepError(
            f"{directory}: no such directory; evenstep pretrain makes runs/, or give the one with your runs"
        )
    configs = [path for path in (directory / "config.toml", *directory.glob("*/config.toml")) if os.path.lexists(path)]
    return [_row(path) for path in sorted(configs, key=_changed, reverse=True)]


def _changed(path: Path) -> float:
    return os.lstat(path).st_mtime


def _row(config: Path) -> RunRow:
    run = config.parent
    when = f"{datetime.fromtimestamp(_changed(config)):%Y-%m-%d %H:%M}"
    try:
        tables = parse_toml(read_own(run, config.name))
        records = []
        if os.path.lexists(run / "metrics.jsonl"):
            check_own_file(run, "metrics.jsonl")
            records = read_metrics(run / "metrics.jsonl")
        size, optimizer = tables["model"].get("size", "custom"), tables["optim"]["name"]
        finished = os.path.lexists(run / "summary.json") and bool(json.loads(read_own(run, "summary.json")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return RunRow(run.name, when, "", "", 0, None, "unreadable")
    status = "running" if is_running(run) else "finished" if finished else "interrupted"
    losses = [record["val_loss"] for record in records if record.get("val_loss") is not None]
    steps = max((record["step"] for record in records), default=0)
    return RunRow(run.name, when, size, optimizer, steps, losses[-1] if losses else None, status)


def table(rows: list[RunRow]) -> str:
    """The rows as text in aligned columns, with a head."""
    cells = [("name", "when", "size", "optimizer", "steps", "val loss", "status")]
    for row in rows:
        loss = "-" if row.val_loss is None else f"{row.val_loss:.4f}"
        cells.append((row.name, row.when, row.size, row.optimizer, str(row.steps), loss, row.status))
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = []
    for line in cells:
        padded = [
            text.rjust(w) if i in (4, 5) else text.ljust(w)
            for i, (text, w) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
