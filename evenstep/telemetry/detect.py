"""Events, found on the host in the numbers of each step. Needs NumPy and no torch.

`Detector` has two rules, and neither is the paper's GSS, which is measured per coordinate (probe.py):

* A tensor **spikes** when the largest entry of its gradient exceeds ``ratio`` times the mean of that entry over the
  last 100 steps, and more than twice the entry of the step before. The second condition excludes the growing gradients
  of a young model and the later steps of a long spike. The rule uses the largest entry, because one outlier among
  millions of entries hardly changes a norm. It uses a factor, because gradients shrink a hundredfold while a training
  settles, so that a standard deviation over that time says nothing. A mean below a floor counts as the floor, so that
  rounding noise does not spike. The floor is the larger of a millionth of the mean norm of all gradients (`FLOOR`) and
  the optimizer's ``eps``, below which the updates of Adam fade. ``eps`` does not apply where the optimizer rescales
  gradients to a norm of its own first (``gain``).
* The **spike rate** is the share of the last ``window`` steps on which the norm of the gradient, or the loss, was more
  than ``sigma`` standard deviations above its mean over the ``window`` steps before (the spike score of OLMo 2, with
  7 and 1000). A loss that does so is a loss spike, which lasts until the loss is within two deviations of the old mean.

A gradient that is **not finite** is an event of its step if it is the first one and, where the optimizer skips such
tensors, for up to `PATIENCE` steps in a row. Later ones do not identify a bad batch: once weights are not finite, all
gradients are not. In that case `Detector.weighed` reports once since which step, with the data rows of that step.

Values above a limit enter the means at the limit, so that one spike does not hide the next. No value is judged before
20 values are known.

`Warnings` judges what the forward pass and the weights show before an instability reaches the loss.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evenstep.telemetry.records import Vector, total_norm
from evenstep.telemetry.schema import USELESS_ERROR, Record

RATIO_WINDOW = 100
"""Steps over which the mean of the largest entry is taken."""

SUDDEN = 2.0
"""A spike is at least this many times as large as the largest entry of the step before."""

ENOUGH = 20
"""Values that must be known before a limit applies."""

SHOWN = 5
"""Number of tensors that one event names."""

FLOOR = 1e-6
"""Floor of the mean, relative to the mean norm of all gradients. It is the size of rounding errors in fp32: a gradient
that is zero in exact arithmetic, such as that of the bias of attention keys, is noise of about 1e-7 of the others."""

PATIENCE = 3
"""Steps in a row whose skipped gradients are reported one by one."""

NARROW = 0.01
"""Least standard deviation, relative to the mean: a constant loss must not spike at a change of 1e-6."""

FAR = 1000.0
"""A norm of all gradients this many times as large or as small as its mean makes the weights worth a look, and a weight
this many times as large as all others were is reported."""

OPEN = (
    "waiting",
    "loss_spike",
    "last_loss",
    "blame",
    "bad_count",
    "bad_steps",
    "unsure",
    "patience",
    "persisting",
    "weights_bad",
)
"""Attributes of a `Detector` that saved states hold as JSON, under these names."""

Event = dict[str, Any]


class Rolling:
    """Means and standard deviations of ``k`` series over their last ``size`` values. A NaN is a missing value and does
    not count.

    >>> losses = Rolling(k=1, size=2)
    >>> for loss in (9.0, 1.0, 3.0):
    ...     losses.push(np.array([loss]))
    >>> losses.mean(), losses.deviation()
    (array([2.]), array([1.]))
    """

    def __init__(self, k: int, size: int) -> None:
        self.values = np.full((size, k), np.nan)  # a ring buffer; ``at`` is the row of the oldest values
        self.at = 0
        self._recompute_sums()

    def _recompute_sums(self) -> None:
        self.count = np.isfinite(self.values).sum(0).astype(float)
        self.sum, self.squares = np.nansum(self.values, 0), np.nansum(self.values**2, 0)

    def push(self, values: Vector) -> None:
        """Replace the oldest value of each series by the newest, ``[k]``."""
        oldest = self.values[self.at]
        for vector, sign in ((oldest, -1.0), (values, 1.0)):
            is_known = np.isfinite(vector)
            known = np.where(is_known, vector, 0.0)
            self.count += sign * is_known
            self.sum += sign * known
            self.squares += sign * known * known
        self.values[self.at] = values
        self.at = (self.at + 1) % len(self.values)
        if self.at == 0:  # running sums accumulate rounding errors; start them anew once per round of the buffer
            self._recompute_sums()

    def mean(self) -> Vector:
        """Means ``[k]``, NaN for a series without values."""
        mean: Vector = np.divide(self.sum, self.count, out=np.full_like(self.sum, np.nan), where=self.count > 0)
        return mean

    def deviation(self) -> Vector:
        """Standard deviations ``[k]``, NaN for a series without values."""
        mean = self.mean()
        squares = np.divide(self.squares, self.count, out=np.full_like(self.sum, np.nan), where=self.count > 0)
        deviation: Vector = np.sqrt(np.maximum(squares - mean * mean, 0.0))  # rounding can make the argument negative
        return deviation

    def state(self) -> dict[str, Any]:
        """The series and its sums, for `load`."""
        # The sums are saved too: computed anew, they would differ in their last bits from those of an unbroken run.
        return {"values": self.values.copy(), "at": self.at, "sums": np.stack([self.count, self.sum, self.squares])}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned; the state of another window size is ignored."""
        if state["values"].shape != self.values.shape:
            return
        self.values[:] = state["values"]
        self.at = int(state["at"])
        self.count, self.sum, self.squares = np.array(state["sums"])


class Detector:
    """Judges the steps of a run in order, and returns the events that are complete.

    A spike is held back for one step, until its ``loss_after`` is known.

    Args:
        names: names of the ``k`` parameters.
        ratio, sigma, window: limits of the two rules above.
        eps: the optimizer's ``eps``, one number or one for each parameter ``[k]``.
    """

    def __init__(
        self,
        names: list[str],
        *,
        ratio: float = 10.0,
        sigma: float = 7.0,
        window: int = 1000,
        eps: Vector | float = 0.0,
    ) -> None:
        k = len(names)
        self.names, self.ratio, self.sigma, self.eps = names, ratio, sigma, eps
        self.peaks = Rolling(k, RATIO_WINDOW)
        self.levels = Rolling(k + 2, window)  # gradient norm of each tensor, of all together, and the loss
        self.flags = Rolling(k + 1, window)  # 1 where above the limit: each tensor's norm; norm or loss of the run
        self.waiting: Event | None = None  # a spike whose ``loss_after`` is not known yet
        self.loss_spike: Event | None = None  # the loss spike that has not recovered yet
        self.last_loss = math.nan
        self.previous = np.full(k, np.nan)  # largest entries of the last step on which they were finite
        self.blame: Event | None = None  # step and rows of the first gradient that was not finite
        self.bad_count = 0  # number of such steps since ``blame``
        self.bad_steps = 0  # number of such steps in a row, up to the newest
        self.unsure = False  # such a step, or one with a norm `FAR` from the others, since the last look at the weights
        self.weights = np.full(k, np.nan)  # largest weights at that look
        self.weighed_at = 0  # the step after which it was
        self.patience = PATIENCE
        self.persisting = False  # ``stays_nonfinite`` has been reported for the current row of such steps
        self.weights_bad = False  # ``weights_nonfinite`` has been reported

    # ---- one step ----

    def feed(self, step: int, row: dict[str, Vector], loss: float, rows: tuple[int, int] | None) -> list[Event]:
        """Judge one step, and return the events that are now complete.

        Args:
            step: its number.
            row: a vector ``[k]`` for each of `schema.COLUMNS`. The column ``ratio`` is added to it.
            loss: its loss, NaN when unknown.
            rows: its data rows, the first and one past the last, or None.
        """
        done = self._complete(loss)
        where = {"step": step} | ({"rows": list(rows)} if rows else {})
        level = self.levels.mean()[-1]  # the mean loss before this step enters it
        row["ratio"] = self._ratios(row["grad_max"], self._floor(row))
        total, usual = total_norm(row["grad_norm"]), self.levels.mean()[-2]
        # From gradients alone: all ranks have the same, and must agree to look at the weights.
        far = math.isfinite(total) and not usual / FAR <= total <= usual * FAR
        self.unsure |= bool(far and self.levels.count[-2] >= ENOUGH)
        above = self._above(np.append(row["grad_norm"], [total, loss]))
        peaks = np.where(np.isfinite(row["grad_max"]), row["grad_max"], np.nan)
        # "not (peaks <= ...)" instead of ">": without a previous entry (NaN) a spike counts as sudden.
        spiking = np.flatnonzero((row["ratio"] > self.ratio) & ~(peaks <= SUDDEN * self.previous))
        self.previous = np.where(np.isnan(peaks), self.previous, peaks)
        if len(spiking):
            self.waiting = self._spike(where, row, spiking, self.last_loss)
        done += self._lost(where, row)
        done += self._loss_events(where, row, loss, level, bool(above[-1]))
        self.last_loss = loss
        return done

    def _floor(self, row: dict[str, Vector]) -> Vector:
        """The least value ``[k]`` that the mean of the largest entry counts as."""
        scale = self.levels.mean()[-2]
        eps = np.where(np.isfinite(row["gain"]), 0.0, self.eps)
        return np.fmax(eps, 0.0 if math.isnan(scale) else FLOOR * scale)

    def _ratios(self, peaks: Vector, floor: Vector) -> Vector:
        """Largest entries ``[k]`` over their means, NaN where a mean is unknown; then the entries enter the means."""
        mean = np.where(self.peaks.count >= ENOUGH, self.peaks.mean(), np.nan)
        mean = np.where(mean > 0, np.maximum(mean, floor), mean)
        finite = np.where(np.isfinite(peaks), peaks, np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where(mean > 0, finite / mean, np.nan)
        # A mean of zero sets no limit: a tensor whose gradients have only just begun would stay at zero for ever.
        self.peaks.push(np.fmin(finite, np.where(mean > 0, self.ratio * mean, np.nan)))
        return ratios

    def _above(self, values: Vector) -> NDArray[np.bool_]:
        """Which of the values ``[k + 2]`` of `levels` are above their limit; then the values enter the means."""
        mean, deviation = self.levels.mean(), self.levels.deviation()
        limit = mean + self.sigma * np.maximum(deviation, NARROW * np.abs(mean))
        limit[(self.levels.count < ENOUGH) | (limit == 0)] = np.nan  # a series of zeros sets no limit either
        values = np.where(np.isfinite(values), values, np.nan)
        above = np.asarray(values > limit)
        self.levels.push(np.fmin(values, limit))
        # The flag of the run is set by its norm or its loss, and unknown only where both are.
        flags = np.append(above[:-2], above[-2:].any()).astype(float)
        self.flags.push(np.where(np.isfinite(np.append(values[:-2], np.fmax(values[-2], values[-1]))), flags, np.nan))
        return above

    # ---- events ----

    def _spike(self, where: Event, row: dict[str, Vector], spiking: Any, loss_before: float) -> Event:
        worst = spiking[np.argsort(-row["ratio"][spiking])]
        tensors = [self._tensor(row, i, "ratio", "grad_max", "clipped", "gain") for i in worst[:SHOWN]]
        facts = {"count": len(worst), "tensors": tensors, "loss_before": loss_before}
        return {"kind": "event", "event": "spike", **where, **facts}

    def _tensor(self, row: dict[str, Vector], i: int, *columns: str) -> dict[str, Any]:
        return {"name": self.names[i]} | {
            column: _four(row[column][i]) for column in columns if np.isfinite(row[column][i])
        }

    def _largest(self, row: dict[str, Vector]) -> Event:
        """``tensors`` of a loss spike: those whose gradients exceed their mean most, at least one if any is known."""
        ratios = np.nan_to_num(row["ratio"], nan=0.0)
        order = [i for i in np.argsort(-ratios)[:SHOWN] if ratios[i] > 0]
        shown = [i for i in order if ratios[i] > SUDDEN] or order[:1]
        return {"tensors": [self._tensor(row, i, "ratio", "grad_max") for i in shown]} if shown else {}

    def _complete(self, loss: float) -> list[Event]:
        """The spike that waited for this loss, the loss of the step after it."""
        event, self.waiting = self.waiting, None
        return [] if event is None else [event | {"loss_after": loss}]

    def _lost(self, where: Event, row: dict[str, Vector]) -> list[Event]:
        """The events of gradients that are not finite, which the optimizer skipped or applied."""
        skipped = row["skipped"] > 0
        broken = np.isposinf(row["grad_max"]) & ~skipped
        if not (skipped | broken).any():
            if np.isfinite(row["grad_max"]).any():
                self.bad_steps, self.persisting = 0, False
            return []
        if self.bad_steps == 0:
            # A gradient that was applied has spoiled the weights, so the steps after it have no cause of their own.
            self.patience = 1 if broken.any() else PATIENCE
        self.bad_steps += 1
        if self.blame is None:
            self.blame = {"since": where["step"]} | ({"rows": where["rows"]} if "rows" in where else {})
            self.bad_count = 0
        self.bad_count += 1
        self.unsure |= not self.weights_bad and not self.persisting
        if self.weights_bad or self.bad_steps > self.patience:
            return []
        return [
            {"kind": "event", "event": name, **where, "count": int(mask.sum())} | self._named(mask)
            for name, mask in (("skipped", skipped), ("nonfinite", broken))
            if mask.any()
        ]

    def _named(self, mask: NDArray[np.bool_]) -> Event:
        return {"tensors": [{"name": self.names[i]} for i in np.flatnonzero(mask)[:SHOWN]]}

    def weighed(self, step: int, rms: Vector, peaks: Vector) -> list[Event]:
        """Judge the weights after ``step``, which is due when ``unsure`` is set.

        ``rms`` and ``peaks`` are the vectors ``[k]`` of `probe.Probe.weigh`. The event ``weights_nonfinite`` is
        reported once, with the second gradient that is not finite: the first one has an event of its own. A weight far
        above all weights of the look before, such as one with a flipped bit, is a ``warning``.
        """
        broken = ~np.isfinite(peaks)
        self.unsure = False
        warnings = self._far_weights(step, peaks)
        self.weights, self.weighed_at = np.where(broken, self.weights, peaks), step
        return warnings + self._lost_weights(step, rms, broken)

    def _far_weights(self, step: int, peaks: Vector) -> list[Event]:
        known = self.weights[np.isfinite(self.weights)]
        with np.errstate(invalid="ignore"):
            far = np.isfinite(peaks) & (peaks > FAR * max(known, default=math.inf))
        if not far.any():
            return []
        worst = np.flatnonzero(far)[np.argsort(-peaks[far])]
        tensors = [
            {"name": self.names[i], "value": _four(peaks[i]), "usual": _four(self.weights[i])} for i in worst[:SHOWN]
        ]
        facts = {"quantity": "weight_max", "count": len(worst), "tensors": tensors, "since": self.weighed_at}
        return [{"kind": "event", "event": "warning", "step": step, **facts}]

    def _lost_weights(self, step: int, rms: Vector, broken: NDArray[np.bool_]) -> list[Event]:
        event = {"kind": "event", "step": step, **(self.blame or {"since": step})}
        if broken.any():
            if self.weights_bad or (self.blame is not None and self.bad_count < 2):
                return []
            self.weights_bad = True
            facts = {"event": "weights_nonfinite", "nan": bool(np.isnan(rms[broken]).any()), "count": int(broken.sum())}
            return [event | facts | self._named(broken)]
        self.weights_bad = False
        if self.bad_steps == 0:
            self.blame = None
        elif self.bad_steps > self.patience and not self.persisting:
            self.persisting = True
            return [event | {"event": "stays_nonfinite"}]
        return []

    def _loss_events(self, where: Event, row: dict[str, Vector], loss: float, level: float, above: bool) -> list[Event]:
        """``loss_spike`` at its first step, ``recovered`` at the first step back near ``level``, the mean loss."""
        if self.loss_spike is None:
            if not above:
                return []
            deviation = max(self.levels.deviation()[-1], NARROW * abs(level))
            self.loss_spike = {"since": where["step"], "peak": loss, "back": level + 2 * deviation}
            facts = {"loss_before": level, "loss_after": loss, **self._largest(row)}
            return [{"kind": "event", "event": "loss_spike", **where, **facts}]
        spike = self.loss_spike
        if math.isfinite(loss):
            spike["peak"] = max(spike["peak"], loss)
        if not loss <= spike["back"]:  # also while the loss is NaN
            return []
        self.loss_spike = None
        steps = where["step"] - spike["since"]
        facts = {"since": spike["since"], "steps": steps, "peak": spike["peak"]}
        return [{"kind": "event", "event": "recovered", "step": where["step"], **facts}]

    def end(self) -> list[Event]:
        """At the end of a run: the spike of the last step, whose ``loss_after`` stays unknown."""
        return self._complete(math.nan)

    def spike_rates(self) -> Vector:
        """Spike rates ``[k + 1]`` of each tensor and, last, of the run; NaN where nothing was measured."""
        return self.flags.mean()

    # ---- saving and loading ----

    def state(self) -> dict[str, Any]:
        """All that later events depend on, as text and arrays."""
        open_events = {name: getattr(self, name) for name in OPEN}
        series = {name: getattr(self, name).state() for name in ("peaks", "levels", "flags")}
        return {"open": json.dumps(open_events), "previous": self.previous.copy(), **series}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        for name, value in json.loads(state["open"]).items():
            if name in OPEN:
                setattr(self, name, value)
        self.previous = np.array(state["previous"])
        for name in ("peaks", "levels", "flags"):
            getattr(self, name).load(state[name])


# ---- early warnings ----


@dataclass(frozen=True)
class Limit:
    """A quantity is unusual when it is above ``least`` and above ``growth`` times its median over the last samples.

    The first number alone would warn of a pretrained model that was always there, the second of a young model whose
    numbers all grow from near zero.
    """

    least: float
    growth: float


LIMITS: dict[str, Limit] = {
    # A softmax over logits 50 apart is one-hot up to e^-50. QK-clip (MuonClip, arXiv:2507.20534) acts at 100.
    "attention_max": Limit(50.0, 1.5),
    "logit_max": Limit(100.0, 2.0),
    "rms": Limit(10.0, 3.0),
    "kurtosis": Limit(200.0, 4.0),
    "dead": Limit(0.5, 2.0),
    "saturated": Limit(0.5, 2.0),
    # Adam's updates are near 0.001 of the weights in a healthy run, and above 0.1 in none.
    "update_ratio": Limit(0.1, 3.0),
}
"""Quantity, as in the records, -> its limit."""

SAMPLES = 40
"""Number of samples of which the median is taken."""

FEW = 5
"""Samples that must be known before a quantity is judged."""

CALM = 0.5
"""A warning ends, and may be repeated, when the quantity is below this share of both its limits."""


class Warnings:
    """Warns of a quantity that grows beyond its limit, once until it is usual again.

    >>> warnings = Warnings()
    >>> for step, logit in enumerate([20.0, 21.0, 19.0, 22.0, 20.0, 80.0, 90.0]):
    ...     for event in warnings.feed(step, "attention_max", ["layers.0"], np.array([logit])):
    ...         print(event["step"], event["tensors"])
    5 [{'name': 'layers.0', 'value': 80.0, 'usual': 20.0}]
    """

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}
        self.history: dict[str, NDArray[np.float64]] = {}  # quantity -> its last samples [n, names], oldest first
        self.open: dict[str, list[str]] = {}  # quantity -> names that are above the limit and have been reported

    def feed(
        self, step: int, quantity: str, names: list[str], values: Vector, heads: NDArray[np.int64] | None = None
    ) -> list[Event]:
        """Judge one sample of a quantity of `LIMITS`, and return its event, if there is one.

        Args:
            step: the step at which it was measured.
            quantity: a key of `LIMITS`.
            names: the ``n`` blocks or parameters.
            values: the quantity of each, ``[n]``, NaN where it is unknown.
            heads: for each of them the attention head that has this value.
        """
        limit = LIMITS[quantity]
        if self.names.get(quantity) != names:
            self.names[quantity], self.open[quantity] = names, []
            self.history[quantity] = np.full((0, len(names)), np.nan)
        history = self.history[quantity]
        known = np.isfinite(history)
        usual = np.full(len(names), np.nan)
        enough = known.sum(0) >= FEW
        if enough.any():
            usual[enough] = np.nanmedian(np.where(known, history, np.nan)[:, enough], 0)
        # NaN, where the median is not known or the pass was not finite, compares as False.
        above = (values > limit.least) & (values > limit.growth * usual)
        calm = (values < CALM * limit.least) | (values < CALM * limit.growth * usual)
        was = np.isin(names, self.open[quantity])
        self.open[quantity] = [name for name, on in zip(names, above | (was & ~calm), strict=True) if on]
        self.history[quantity] = np.concatenate([history, values[None]])[-SAMPLES:]
        new = np.flatnonzero(above & ~was)
        if not len(new):
            return []
        worst = new[np.argsort(-values[new])][:SHOWN]
        tensors = [{"name": names[i], "value": _four(values[i]), "usual": _four(usual[i])} for i in worst]
        if heads is not None:
            tensors = [tensor | {"head": int(heads[i])} for tensor, i in zip(tensors, worst, strict=True)]
        facts = {"quantity": quantity, "count": len(new), "tensors": tensors}
        return [{"kind": "event", "event": "warning", "step": step, **facts}]

    def state(self) -> dict[str, Any]:
        """All that later warnings depend on, as text and arrays."""
        text = json.dumps({"names": self.names, "open": self.open})
        return {"text": text, "history": {name: values.copy() for name, values in self.history.items()}}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        text = json.loads(state["text"])
        known = [name for name in text["names"] if name in LIMITS]
        self.names, self.open = ({name: text[key][name] for name in known} for key in ("names", "open"))
        self.history = {name: np.array(state["history"][name]) for name in known}


def _four(value: Any) -> float:
    """``value`` with four significant digits."""
    return float(f"{value:.4g}")


def lowbit_events(record: Record, useless: set[str]) -> tuple[list[Event], set[str]]:
    """The event of layers whose quantised gradients have just become useless, and the set of all such layers.

    Args:
        record: a ``lowbit`` record.
        useless: the layers that were useless at the record before, which are not reported again.
    """
    errors = {name: layer.get("gradient_error") for name, layer in record["layers"].items()}
    now = {name for name, error in errors.items() if error is not None and error > USELESS_ERROR}
    new = sorted(now - useless, key=lambda name: -(errors[name] or 0.0))
    if not new:
        return [], now
    tensors = [{"name": name, "gradient_error": errors[name]} for name in new[:SHOWN]]
    return [{"kind": "event", "event": "useless", "step": record["step"], "count": len(new), "tensors": tensors}], now
