"""The records of metrics.jsonl: their keys, how the rows of single steps become records, and how lines are written.

Each line of the file is one record, a JSON object with a ``step``. Records of training and validation have no ``kind``;
a record of telemetry has one, as its first key, so that a reader who wants the losses alone can skip its line without
parsing it. docs/telemetry.md documents every key. This module needs NumPy and no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Record = dict[str, Any]
Vector = NDArray[np.float64]
"""One number for each of the ``k`` watched parameters; NaN where the number is unknown."""

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

GSS_THRESHOLD = 50.0
"""A coordinate spikes when |g| is more than this multiple of its mean over time (SPAM, arXiv:2501.06842, section 2)."""

USELESS_ERROR = 1 / math.sqrt(3)
"""Quantised gradients stop being useful once their norm is below sqrt(3) times the norm of the quantisation noise
(arXiv:2505.19115). The relative error is noise over norm, so this is the largest useful relative error."""

TELEMETRY_LINE = '{"kind":'
"""Every line of telemetry begins with this text."""


# ---- lines ----


def to_line(record: Record) -> str:
    """``record`` as one line of JSON. NaN and infinities, which JSON does not have, become null.

    >>> to_line({"step": 1, "loss": float("nan")})
    '{"step": 1, "loss": null}\\n'
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


def digits(values: Any) -> list[float | None]:
    """``values`` (array-like) rounded to four significant digits; None for numbers that are not finite.

    >>> digits([0.123456, 98765.4, float("inf")])
    [0.1235, 98770.0, None]
    """
    x = np.asarray(values, dtype=np.float64)
    known = np.isfinite(x)
    with np.errstate(divide="ignore", invalid="ignore"):
        places = np.clip(3 - np.floor(np.log10(np.abs(np.where(known & (x != 0), x, 1.0)))), -300, 300)
    # 10.0 ** n is exact for 0 <= n <= 22 and 10.0 ** -n never is: a product and a quotient of exact powers give the
    # double nearest to the decimal number, which prints with few digits.
    up, down = 10.0 ** np.maximum(places, 0), 10.0 ** np.maximum(-places, 0)
    rounded = np.round(np.where(known, x, 0.0) * up / down) / up * down
    return [value if is_known else None for value, is_known in zip(rounded.tolist(), known.tolist(), strict=True)]


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


# ---- from rows to records ----


def total_norm(norms: Vector) -> float:
    """The norm of all tensors together, from the norms of each. Norms that are not finite are left out; NaN when none
    is left."""
    known = norms[np.isfinite(norms)]
    return math.sqrt(float(np.square(known).sum())) if len(known) else math.nan


class Records:
    """Accumulates the rows of single steps until a record is due.

    Args:
        k: number of parameters.
        every: least number of steps between two ``parameters`` records.
    """

    def __init__(self, k: int, every: int) -> None:
        self.every = every
        self.started = False  # whether the ``start`` record has been written
        self.lost = 0  # unmeasured steps that no record has reported yet
        self.weight_rms: Vector = np.full(k, np.nan)
        # Two independent accumulators: a window record describes each step of one transfer from the device, a
        # parameters record summarises many transfers.
        self.steps: list[tuple[dict[str, Any], float, float, float, bool]] = []
        self.pending: list[int] = []
        self._largest: dict[str, Vector] = {}
        self._sum: dict[str, Vector] = {}
        self._count: dict[str, Vector] = {}

    def add(self, fact: dict[str, Any], row: dict[str, Vector], loss: float) -> None:
        """Add one step: ``fact`` as in `monitor.SpikeMonitor.seen`, ``row`` one vector ``[k]`` for each column."""
        bad = bool((np.isposinf(row["grad_max"]) | (row["skipped"] > 0)).any())
        self.steps.append((fact, loss, total_norm(row["grad_norm"]), total_norm(row["norm_after"]), bad))
        self.pending.append(fact["step"])
        for name, values in row.items():
            known = np.isfinite(values)
            if name in LARGEST:
                self._largest[name] = np.fmax(self._largest.get(name, np.nan), np.where(known, values, np.nan))
            else:
                self._sum[name] = self._sum.get(name, 0.0) + np.where(known, values, 0.0)
                self._count[name] = self._count.get(name, 0.0) + known

    def window(self, spike_rate: float) -> Record:
        """The ``window`` record: loss and total gradient norms of each step since the last such record."""
        facts, losses, norms, after, bad = zip(*self.steps, strict=True)
        rates = [fact["lr"] for fact in facts]
        record: Record = {"kind": "window", "step": facts[-1]["step"], "first": facts[0]["step"]}
        record |= {"lr": rates[-1], "spike_rate": digits([spike_rate])[0]}
        record |= {name: n for name, n in (("nonfinite", sum(bad)), ("lost", self.lost)) if n}
        self.steps, self.lost = [], 0
        if len({*rates}) > 1:
            record["lrs"] = digits([math.nan if rate is None else rate for rate in rates])
        series = {"losses": losses, "norms": norms, "norms_after": after}
        return record | {name: digits(values) for name, values in series.items() if any(map(math.isfinite, values))}

    def due(self) -> bool:
        return len(self.pending) >= self.every

    def parameters(self, spike_rates: Vector) -> list[Record]:
        """The ``parameters`` record: the numbers of each parameter over the steps since the last such record. Columns
        without a known number are left out; the list is empty where no column is left."""
        record: Record = {"kind": "parameters", "step": self.pending[-1], "first": self.pending[0]}
        columns = dict(self._largest)
        for name, values in self._sum.items():
            counts = self._count[name]
            mean = np.divide(values, counts, out=np.full_like(values, np.nan), where=counts > 0)
            columns[name] = np.where(counts > 0, values, np.nan) if name == "skipped" else mean
        columns |= {"weight_rms": self.weight_rms, "spike_rate": spike_rates}
        self.pending, self._largest, self._sum, self._count = [], {}, {}, {}
        names = ("ratio", *COLUMNS, "weight_rms", "spike_rate")
        known = {name: digits(columns[name]) for name in names if np.isfinite(columns[name]).any()}
        return [record | known] if known else []

    def state(self) -> dict[str, Any]:
        """What later ``parameters`` records depend on, as numbers, lists and arrays."""
        accumulated = {"largest": self._largest, "sum": self._sum, "count": self._count}
        return {
            "started": self.started,
            "pending": list(self.pending),
            "weight_rms": self.weight_rms.copy(),
            **{name: {key: values.copy() for key, values in vectors.items()} for name, vectors in accumulated.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.started, self.pending = bool(state["started"]), list(state["pending"])
        self.weight_rms = np.array(state["weight_rms"])
        self._largest, self._sum, self._count = (dict(state[name]) for name in ("largest", "sum", "count"))


def lowbit_record(step: int, values: list[tuple[str, str, float]]) -> Record:
    """The ``lowbit`` record of ``values``: (layer, key, number), with the keys of `LOWBIT_KEYS`."""
    layers: dict[str, dict[str, float | None]] = {}
    for layer, key, value in values:
        layers.setdefault(layer, {})[key] = digits([value])[0]
    return {"kind": "lowbit", "step": step, "layers": layers}
