"""The lines that telemetry adds to metrics.jsonl, and how they are read. Needs no torch.

A line of training or validation has no ``kind``; a line of telemetry has one, as its first key, so that who wants the
losses alone can pass over it unread. docs/telemetry.md has every key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VERSION = 1
"""Of the schema, in every ``start`` line. It is raised when a key changes its meaning; new keys do not raise it."""

GSS_THRESHOLD = 50.0
"""A coordinate is a spike when |g| is more than this times its mean over time (SPAM, arXiv:2501.06842, section 2)."""

USELESS_ERROR = 1 / math.sqrt(3)
"""Quantised gradients stop being useful once their norm is below sqrt(3) times the norm of the quantisation noise
(arXiv:2505.19115); noise over norm is the relative error, so that is an error above this.
"""

TELEMETRY_LINE = '{"kind":'


def to_line(record: dict[str, Any]) -> str:
    """A record as a line; JSON has no NaN or infinity, such numbers become null."""
    clean = {key: finite(value) for key, value in record.items()}
    return json.dumps(clean, ensure_ascii=False) + "\n"


def finite(value: Any) -> Any:
    """JSON has no NaN or infinity: such numbers become None (null), also inside of lists and dicts."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value


def read_records(path: Path, *, telemetry: bool = True) -> list[dict[str, Any]]:
    """The records of a file in order; lines that are no JSON object with a step (torn by a kill) are left out."""
    return [record for record in iter_records(path, telemetry=telemetry) if record is not None]


def iter_records(path: Path, *, telemetry: bool = True) -> Iterator[dict[str, Any] | None]:
    """The records of a file in order, None for each line that cannot be used. ``telemetry=False`` leaves its lines
    out.
    """
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for line in file:
            if not telemetry and line.startswith(TELEMETRY_LINE):
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                yield None
                continue
            usable = isinstance(record, dict) and is_step(record.get("step"))
            yield record if usable else None


def is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
