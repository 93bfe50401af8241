"""From the rows of single steps to the records of metrics.jsonl."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch.nn.parameter import is_lazy

from evenstep.telemetry.detect import Detector, Event, total
from evenstep.telemetry.probe import COLUMNS
from evenstep.telemetry.schema import USELESS_ERROR, VERSION
from evenstep.telemetry.series import Vector, digits
from evenstep.telemetry.subject import plain_name

Record = dict[str, Any]

LARGEST = ("ratio", "grad_max", "gss")
"""Of these a record of several steps holds the largest; of ``skipped`` the sum, of the others the mean."""

LOWBIT_KEYS = ("saturation", "underflow", "error", "gradient_error")


class Records:
    """Gathers rows until a record is due; ``k`` parameters, ``every`` steps at least between two of their records."""

    def __init__(self, k: int, every: int) -> None:
        self.every = every
        self.started = False
        self.lost = 0  # steps that could not be measured, since the last line that told of some
        self.weight_rms: Vector = np.full(k, np.nan)
        self.steps: list[tuple[dict[str, Any], float, float, float, bool]] = []
        self.pending: list[int] = []
        self._largest: dict[str, Vector] = {}
        self._sum: dict[str, Vector] = {}
        self._count: dict[str, Vector] = {}

    def add(self, fact: dict[str, Any], row: dict[str, Vector], loss: float) -> None:
        bad = bool((np.isposinf(row["grad_max"]) | (row["skipped"] > 0)).any())
        self.steps.append((fact, loss, total(row["grad_norm"]), total(row["norm_after"]), bad))
        self.pending.append(fact["step"])
        for name, values in row.items():
            there = np.isfinite(values)
            if name in LARGEST:
                self._largest[name] = np.fmax(self._largest.get(name, np.nan), np.where(there, values, np.nan))
            else:
                self._sum[name] = self._sum.get(name, 0.0) + np.where(there, values, 0.0)
                self._count[name] = self._count.get(name, 0.0) + there

    def window(self, spike_rate: float) -> Record:
        """The numbers of each step since the last such record: loss and norm of all gradients."""
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
        """The numbers of each parameter over the steps since the last such record; columns that nobody knows are left
        out, and the record where none is left."""
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
        gathered = {"largest": self._largest, "sum": self._sum, "count": self._count}
        return {
            "started": self.started,
            "pending": list(self.pending),
            "weight_rms": self.weight_rms.copy(),
            **{name: {key: values.copy() for key, values in vectors.items()} for name, vectors in gathered.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        self.started, self.pending = bool(state["started"]), list(state["pending"])
        self.weight_rms = np.array(state["weight_rms"])
        self._largest, self._sum, self._count = (dict(state[name]) for name in ("largest", "sum", "count"))


def start_record(names: list[str], optimizer: Any, params: list[Any], detector: Detector, step: int) -> Record:
    """The line before all others: the names that the vectors of later lines belong to, and the rules of the events."""
    return {
        "kind": "start",
        "step": step,
        "version": VERSION,
        "optimizer": type(optimizer).__name__,
        "names": names,
        "shapes": [[] if is_lazy(p) else list(p.shape) for p in params],
        "rules": {"ratio": detector.ratio, "sigma": detector.sigma, "window": len(detector.flags.values)},
    }


def lowbit_record(step: int, values: list[tuple[str, str, float]]) -> Record:
    """``values``: (layer, key, number), the keys being of `LOWBIT_KEYS`."""
    layers: dict[str, dict[str, float | None]] = {}
    for layer, key, value in values:
        layers.setdefault(plain_name(layer), {})[key] = digits([value])[0]
    return {"kind": "lowbit", "step": step, "layers": layers}


def lowbit_events(record: Record, useless: set[str]) -> tuple[list[Event], set[str]]:
    """An event for the layers whose gradients have just become useless at their precision, and the set of all such."""
    errors = {name: layer.get("gradient_error") for name, layer in record["layers"].items()}
    now = {name for name, error in errors.items() if error is not None and error > USELESS_ERROR}
    new = sorted(now - useless, key=lambda name: -(errors[name] or 0.0))
    if not new:
        return [], now
    tensors = [{"name": name, "gradient_error": errors[name]} for name in new[:5]]
    return [{"kind": "event", "event": "useless", "step": record["step"], "count": len(new), "tensors": tensors}], now
