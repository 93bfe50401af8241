"""The records of metrics.jsonl: their keys, and how lines are written and read.

Each line of the file is one record, a JSON object with a ``step``. Records of training and validation have no ``kind``;
a record of telemetry has one, as its first key, so that a reader who wants the losses alone can skip its line without
parsing it. docs/telemetry.md documents every key. This module needs
neither NumPy nor torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]

VERSION = 1
"""Version of the schema, in every ``start`` record. It increases when a key changes its meaning; a new key does not
increase it."""

STATS = ("grad_max", "grad_norm", "norm_after", "clip_limit", "clipped", "gain", "update_rms", "skipped")
"""Statistics of a step that an optimizer of evenstep may provide in ``optimizer.stats``."""

COLUMNS = (*STATS, "gss", "gss_share")
"""Numbers of a step, one vector of ``k`` entries each, in the order of the rows of `probe.Probe`."""

LARGEST = ("ratio", "grad_max", "gss")
"""Columns of which a record of several steps holds the maximum. It holds the sum of ``skipped`` and the mean of all
other columns."""

LOWBIT_KEYS = ("saturation", "underflow", "error", "gradient_error")
"""Keys of a quantised layer: shares of entries that saturated or became zero, and relative errors in the 2-norm."""

HEAD_KEYS = ("attention_max", "attention_logsumexp", "attention_entropy")
BLOCK_KEYS = ("rms", "kurtosis", "dead", "saturated")
OUTPUT_KEYS = ("logit_rms", "logit_max", "logsumexp")
"""Keys of a module in an ``activations`` record: vectors over the heads of a block, numbers of a block, and numbers of
the output head (activations.py)."""

TO_DEVIATION = 1.4826
"""The standard deviation of a normal distribution is 1.4826 times its median absolute deviation."""

GSS_THRESHOLD = 50.0
"""A coordinate spikes when |g| is more than this multiple of its mean over time (SPAM, arXiv:2501.06842, section 2)."""

USELESS_ERROR = 1 / math.sqrt(3)
"""Quantised gradients stop being useful once their norm is below sqrt(3) times the norm of the quantisation noise
(arXiv:2505.19115). The relative error is noise over norm, so this is the largest useful relative error."""

TELEMETRY_LINE = '{"kind":'
"""Every line of telemetry begins with this text."""


# ---- lines ----


def to_line(record: Record) -> str:
    r"""``record`` as one line of JSON. NaN and infinities, which JSON does not have, become null.

    >>> to_line({"step": 1, "loss": float("nan")})
    '{"step": 1, "loss": null}\n'
    """
    clean = {key: finite(value) for key, value in record.items()}
    return json.dumps(clean, ensure_ascii=False) + "\n"


def finite(value: Any) -> Any:
    """``value`` with None in place of NaN and infinities, also inside lists and dicts."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value


def read_records(path: Path, *, telemetry: bool = True) -> list[Record]:
    """The records of a file in order. Lines that are no JSON object with a valid step, such as a line cut short when
    the process was killed, are left out.

    Args:
        path: a metrics.jsonl.
        telemetry: False leaves out the records of telemetry, without parsing them.
    """
    return [record for record in iter_records(path, telemetry=telemetry) if record is not None]


def iter_records(path: Path, *, telemetry: bool = True) -> Iterator[Record | None]:
    """The records of a file in order, as `read_records`, but with None in place of each unusable line."""
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
    """Whether ``value`` is a whole number that can be a step; 2**53 is the limit of JavaScript's integers."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
