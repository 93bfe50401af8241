"""Finds events in the numbers of each step, on the host.

Two rules, and neither is the paper's GSS, which is measured per coordinate (probe.py):

* A tensor **spikes** when the largest entry of its gradient is more than ``ratio`` times the mean of that largest entry
  over its last 100 steps, and suddenly: more than twice that of the step before, so that neither the growth of a young
  model's gradients nor the later steps of a long spike count. The largest entry, because one wild entry among millions
  hardly moves a norm; a factor, because norms fall a hundredfold while a training settles and a standard deviation over
  that is of no use. A mean below a floor counts as the floor, so that rounding noise has no spikes: a millionth of the
  mean norm of all gradients (`FLOOR`), and the optimizer's ``eps``, below which Adam's updates fade, unless the
  optimizer brings gradients to a norm of its own before (``gain``).
* The **spike rate** is the share of the last ``window`` steps on which the norm of the gradient or the loss was more
  than ``sigma`` standard deviations above its mean over the ``window`` steps before (OLMo 2's spike score: 7 and 1000).
  A loss that does so is a loss spike, until it is back within two deviations of the mean it had.

A gradient that is **not finite** is an event of its step where it is the first one, and, where the optimizer skips such
tensors, up to `PATIENCE` steps in a row. Later ones tell nothing of their batches: once weights are not finite, all
gradients are. `weighed` then tells once since when, with the rows of the first.

What is above its limit enters the means at the limit, so that one spike does not hide the next. Nothing is judged
before 20 values are there.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evenstep.telemetry.series import Rolling, Vector

RATIO_WINDOW = 100
SUDDEN = 2.0
ENOUGH = 20
SHOWN = 5
"""Tensors named in one event."""

FLOOR = 1e-6
"""Of the mean norm of all gradients. Rounding in fp32 is of this size: a gradient that is zero on paper, such as that
of the bias of attention's keys, is noise of about a ten-millionth of the others.
"""

PATIENCE = 3
"""Steps in a row whose skipped gradients are told of one by one."""

NARROW = 0.01
"""A standard deviation is at least this share of its mean: a loss that stands still has no spikes of 1e-6."""

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
"""Attributes of a `Detector` that are saved as JSON."""

Event = dict[str, Any]


class Detector:
    """Takes one step after the other; returns the events that are complete.

    An event with ``loss_after`` is held back for one step, until that loss is known.
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
        self.levels = Rolling(k + 2, window)  # the norm of each tensor, of all together, and the loss
        self.flags = Rolling(k + 1, window)  # was it above: each tensor; norm or loss of the run
        self.waiting: Event | None = None
        self.loss_spike: Event | None = None
        self.last_loss = math.nan
        self.previous = np.full(k, np.nan)
        self.blame: Event | None = None  # step and rows of the first gradient that was not finite
        self.bad_count = 0  # of such steps since
        self.bad_steps = 0  # in a row, up to now
        self.unsure = False  # there was one since weights were looked at
        self.patience = PATIENCE
        self.persisting = False  # it was told that gradients stay so
        self.weights_bad = False

    # ---- one step ----

    def feed(self, step: int, row: dict[str, Vector], loss: float, rows: tuple[int, int] | None) -> list[Event]:
        """``row``: a vector ``[k]`` per column of `probe.COLUMNS`; ``ratio`` is added to it. ``loss`` NaN: not known.
        ``rows``: the data rows of the step, first and one past the last.
        """
        done = self._complete(loss)
        where = {"step": step} | ({"rows": list(rows)} if rows else {})
        level = self.levels.mean()[-1]
        row["ratio"] = self._ratios(row["grad_max"], self._floor(row))
        above = self._above(np.append(row["grad_norm"], [total(row["grad_norm"]), loss]))
        peaks = np.where(np.isfinite(row["grad_max"]), row["grad_max"], np.nan)
        spiking = np.flatnonzero((row["ratio"] > self.ratio) & ~(peaks <= SUDDEN * self.previous))
        self.previous = np.where(np.isnan(peaks), self.previous, peaks)
        if len(spiking):
            self.waiting = self._spike(where, row, spiking, self.last_loss)
        done += self._lost(where, row)
        done += self._loss_events(where, row, loss, level, bool(above[-1]))
        self.last_loss = loss
        return done

    def _floor(self, row: dict[str, Vector]) -> Vector:
        scale = self.levels.mean()[-2]
        eps = np.where(np.isfinite(row["gain"]), 0.0, self.eps)
        return np.fmax(eps, 0.0 if math.isnan(scale) else FLOOR * scale)

    def _ratios(self, peaks: Vector, floor: Vector) -> Vector:
        mean = np.where(self.peaks.count >= ENOUGH, self.peaks.mean(), np.nan)
        mean = np.where(mean > 0, np.maximum(mean, floor), mean)
        finite = np.where(np.isfinite(peaks), peaks, np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where(mean > 0, finite / mean, np.nan)
        # A mean of zero is no limit: a tensor that has only begun to get gradients would stay at zero for ever.
        self.peaks.push(np.fmin(finite, np.where(mean > 0, self.ratio * mean, np.nan)))
        return ratios

    def _above(self, values: Vector) -> NDArray[np.bool_]:
        mean, deviation = self.levels.mean(), self.levels.deviation()
        limit = mean + self.sigma * np.maximum(deviation, NARROW * np.abs(mean))
        limit[(self.levels.count < ENOUGH) | (limit == 0)] = np.nan  # nothing but zeros so far is no limit
        values = np.where(np.isfinite(values), values, np.nan)
        above = np.asarray(values > limit)
        self.levels.push(np.fmin(values, limit))
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
            column: float(f"{row[column][i]:.4g}") for column in columns if np.isfinite(row[column][i])
        }

    def _largest(self, row: dict[str, Vector]) -> Event:
        """Where a loss spike shows in the gradients: the tensors that are most above their mean, at least one."""
        ratios = np.nan_to_num(row["ratio"], nan=0.0)
        order = [i for i in np.argsort(-ratios)[:SHOWN] if ratios[i] > 0]
        shown = [i for i in order if ratios[i] > SUDDEN] or order[:1]
        return {"tensors": [self._tensor(row, i, "ratio", "grad_max") for i in shown]} if shown else {}

    def _complete(self, loss: float) -> list[Event]:
        """The event that waited for this loss, which is None at the end of the run."""
        event, self.waiting = self.waiting, None
        return [] if event is None else [event | {"loss_after": loss}]

    def _lost(self, where: Event, row: dict[str, Vector]) -> list[Event]:
        skipped = row["skipped"] > 0
        broken = np.isposinf(row["grad_max"]) & ~skipped
        if not (skipped | broken).any():
            if np.isfinite(row["grad_max"]).any():
                self.bad_steps, self.persisting = 0, False
            return []
        if self.bad_steps == 0:
            self.patience = 1 if broken.any() else PATIENCE
        self.bad_steps += 1
        if self.blame is None:
            self.blame = {"since": where["step"]} | ({"rows": where["rows"]} if "rows" in where else {})
            self.bad_count = 0
        self.bad_count += 1
        self.unsure = not self.weights_bad and not self.persisting
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
        """What follows from a look at the weights after ``step``, which is due when `unsure`: vectors ``[k]`` of
        `Probe.weigh`. The event that tells of them comes once, with the second gradient that is not finite."""
        broken = ~np.isfinite(peaks)
        self.unsure = False
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
        if not loss <= spike["back"]:
            return []
        self.loss_spike = None
        steps = where["step"] - spike["since"]
        facts = {"since": spike["since"], "steps": steps, "peak": spike["peak"]}
        return [{"kind": "event", "event": "recovered", "step": where["step"], **facts}]

    def end(self) -> list[Event]:
        """What still waits for a loss that will not come."""
        return self._complete(math.nan)

    # ---- what is asked ----

    def spike_rates(self) -> Vector:
        """Share of recent steps above ``sigma``: each tensor, then the run, ``[k + 1]``; NaN where nothing was
        measured.
        """
        return self.flags.mean()

    def state(self) -> dict[str, Any]:
        open_events = {name: getattr(self, name) for name in OPEN}
        series = {name: getattr(self, name).state() for name in ("peaks", "levels", "flags")}
        return {"open": json.dumps(open_events), "previous": self.previous.copy(), **series}

    def load(self, state: dict[str, Any]) -> None:
        for name, value in json.loads(state["open"]).items():
            if name in OPEN:
                setattr(self, name, value)
        self.previous = np.array(state["previous"])
        for name in ("peaks", "levels", "flags"):
            getattr(self, name).load(state[name])


def total(norms: Vector) -> float:
    """The norm of all tensors together, those that are not finite left out; NaN when nothing was measured."""
    known = norms[np.isfinite(norms)]
    return math.sqrt(float(np.square(known).sum())) if len(known) else math.nan
