"""The rows of single steps become the records of metrics.jsonl."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evenstep.telemetry.schema import COLUMNS, HEAD_KEYS, LARGEST, Record

Vector = NDArray[np.float64]
"""One number for each of the ``k`` watched parameters; NaN where the number is unknown."""


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
        """Whether the next ``parameters`` record is due."""
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


def activations_record(step: int, values: list[tuple[str, str, list[float]]]) -> Record:
    """The ``activations`` record of ``values``: (module, key, numbers), with the keys of `schema.HEAD_KEYS` (a number
    for each head), `schema.BLOCK_KEYS` and `schema.OUTPUT_KEYS` (a single number)."""
    modules: dict[str, dict[str, Any]] = {}
    for module, key, numbers in values:
        short = digits(numbers)
        modules.setdefault(module, {})[key] = short if key in HEAD_KEYS else short[0]
    return {"kind": "activations", "step": step, "modules": modules}


def lowbit_record(step: int, values: list[tuple[str, str, float]]) -> Record:
    """The ``lowbit`` record of ``values``: (layer, key, number), with the keys of `LOWBIT_KEYS`."""
    layers: dict[str, dict[str, float | None]] = {}
    for layer, key, value in values:
        layers.setdefault(layer, {})[key] = digits([value])[0]
    return {"kind": "lowbit", "step": step, "layers": layers}
