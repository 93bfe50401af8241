"""One training of a task with a remedy, and its measures."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from evenstep.models.llama import Llama
from evenstep.stability.remedies import Remedy
from evenstep.stability.tasks import (
    GRADIENT_FAULTS,
    Batch,
    Family,
    Recurrent,
    Rows,
    Variant,
    build,
    data_of,
    fault_step,
    validation,
)
from evenstep.telemetry.guard import SpikeGuard
from evenstep.telemetry.monitor import SpikeMonitor
from evenstep.train.config import OptimConfig, ScheduleConfig
from evenstep.train.optimizers import LearningRates, build_optimizer, lr_factor

EVERY = 20  # steps between two validations
EPISODE = 0.5  # nats above the lowest smoothed loss at which a spike episode starts
SMOOTH = 0.9  # of the exponential mean of the training loss
WARM, ROUNDS = 5, 150  # steps before the cost of a step is measured, and steps that are measured


@dataclass(frozen=True)
class Trial:
    """The result of one training.

    Attributes:
        loss: final validation loss; None if a weight or the loss is not finite.
        curve: validation losses after every `EVERY` steps, None where not finite.
        fault: the step at which the fault started, None without one.
        episodes: number of spike episodes of the training loss.
        actions: actions of the guard, by name.
        first: the step of the guard's first action after the fault started, None without one.
        false: actions of the guard before the fault started, or at all where there was none.
        seconds: of the training, without the validation.
    """

    seed: int
    loss: float | None
    curve: list[float | None]
    fault: int | None
    episodes: int
    actions: dict[str, int]
    first: int | None
    false: int
    seconds: float


class Training:
    """One training of a task with a remedy, step by step.

    Args:
        lr: the tuned learning rate, for a variant without a rate of its own.

    Attributes:
        done: steps taken so far, less those that a rewind undid.
        losses: the training losses of all steps.
        at: the step at which a fault starts.
    """

    def __init__(
        self, family: Family, variant: Variant, remedy: Remedy, lr: float, seed: int, source: str, device: str
    ) -> None:
        self.steps = variant.steps or family.steps
        data = data_of(source, family.vocab_size)
        torch.manual_seed(seed)
        self.model = build(family, data.vocab_size, {**variant.shape, **remedy.shape}, variant.lowbit)
        values = {**remedy.optim, "lr": variant.lr or lr}
        self.model.to(device, torch.bfloat16 if variant.dtype == "bf16" else torch.float32)
        self.optimizer = build_optimizer(self.model, _optim(values, self.steps))
        self.clip_norm, self.loss_scale, self.device = values.get("clip_norm"), variant.loss_scale, device
        self._rates, self._schedule = LearningRates(self.optimizer), ScheduleConfig(name=family.schedule)
        # A longer warm-up of a family without one is 20 steps.
        self._warmup = min(self.steps // 2, round((family.warmup or 5 * (remedy.warmup > 1)) * remedy.warmup))
        self.at = fault_step(family, seed)
        self._rows = Rows(family, source, variant.fault, self.at, seed)
        self._spoil = GRADIENT_FAULTS.get(variant.fault)
        self._draw = torch.Generator().manual_seed(seed)
        self.guard = None
        if remedy.ladder:
            rows = [self._rows]
            self.guard = SpikeGuard(self.model, self.optimizer, ladder=remedy.ladder, snapshot_every=10, data=rows)
        self._extra: dict[str, Any] = {} if remedy.z_loss is None else {"z_loss": remedy.z_loss}
        self.monitor: SpikeMonitor | None = None
        self.done = 0
        self.losses: list[float] = []

    def step(self) -> None:
        """Train on the next batch. Rows are read in order; after a rewind, those of bad steps are left out, and with
        them the fault."""
        number = self._rows.position
        batch = self._rows.next_batch()
        while self.guard is not None and not self.guard.wanted(number):
            number = self._rows.position
            batch = self._rows.next_batch()
        tokens, targets = (part.to(self.device) for part in batch)
        self._rates.set(self.optimizer, lr_factor(self._schedule, self.done + 1, self.steps, self._warmup))
        # [], or [2] with a z-loss; only a LLaMA has one.
        parts: Tensor = self.model.loss(tokens, targets, **self._extra)
        (parts.sum() * self.loss_scale).backward()
        loss = parts.detach().reshape(-1)[0]
        self.losses.append(float(loss))
        if self._spoil is not None:
            self._spoil(self.model, number - self.at, self._draw)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        if self.monitor is not None:
            self.monitor.observe(loss * self.loss_scale, rows=number)
        if self.guard is None:
            self.optimizer.step()
            self.done += 1
        else:
            self.guard.step(loss * self.loss_scale, rows=number)
            self.done = self.guard.num_steps
        self.optimizer.zero_grad()


def train(
    family: Family,
    variant: Variant,
    remedy: Remedy,
    lr: float,
    seed: int,
    source: str = "kjv",
    device: str = "cpu",
) -> Trial:
    """Train once. ``lr``: the tuned rate, for a variant without a rate of its own."""
    training = Training(family, variant, remedy, lr, seed, source, device)
    data = data_of(source, family.vocab_size)
    held, seconds = [(x.to(device), y.to(device)) for x, y in validation(data, family)], 0.0
    curve: dict[int, float] = {}
    while training.done < training.steps:
        began = time.perf_counter()
        training.step()
        seconds += time.perf_counter() - began
        if not math.isfinite(training.losses[-1]) and training.guard is None:
            break  # the weights are lost
        if training.done and (training.done % EVERY == 0 or training.done == training.steps):
            curve[training.done] = evaluate(training.model, held)
    return _measured(training, curve, training.at if variant.fault else None, seed, seconds)


def step_cost(family: Family, remedy: Remedy, lr: float, source: str = "kjv", device: str = "cpu") -> dict[str, float]:
    """The cost of a training step in units of one with plain Adam: processor time on a CPU, elapsed time on a GPU.

    Both train in turn in this process, so that a slow moment of the machine meets both. Returns the median ``ratio`` of
    `ROUNDS` pairs of steps, as many as a run of the family has at most, and the median ``seconds`` of a step with Adam.
    """
    pair = [Training(family, Variant("cost"), one, lr, 0, source, device) for one in (Remedy("Adam"), remedy)]
    spent: tuple[list[float], list[float]] = ([], [])
    now = time.process_time if device == "cpu" else time.perf_counter
    for number in range(WARM + min(ROUNDS, family.steps)):
        for training, times in zip(pair, spent, strict=True):
            began = now()
            training.step()  # which reads the loss, so that a GPU has finished all but the optimizer's step
            if device != "cpu":
                torch.cuda.synchronize()
            if number >= WARM:
                times.append(now() - began)
    ratio = median(ours / adam for adam, ours in zip(*spent, strict=True))
    return {"ratio": round(ratio, 3), "seconds": round(median(spent[0]), 5)}


ALARMS = ("spike", "loss_spike", "nonfinite")
"""Events of a SpikeMonitor that name a fault."""


def watch(
    family: Family, variant: Variant, remedy: Remedy, lr: float, seed: int, source: str = "kjv", device: str = "cpu"
) -> dict[str, int | None]:
    """Train once with a SpikeMonitor. Returns ``seed``, ``fault``, the step (0-based) at which the fault starts, None
    without one; ``before``: steps with an alarm before the fault, of all steps without one; and ``delay``: steps from
    the start of the fault to the first alarm, None if there was none."""
    training = Training(family, variant, remedy, lr, seed, source, device)
    alarms: set[int] = set()

    class Alarms:
        def write(self, record: Mapping[str, Any]) -> None:
            if record.get("event") in ALARMS:
                alarms.add(record["step"] - 1)  # the monitor counts from 1

        def close(self) -> None:
            pass

    with SpikeMonitor(training.model, training.optimizer, sinks=[Alarms()], say=None) as training.monitor:
        while training.done < training.steps:
            training.step()
            if not math.isfinite(training.losses[-1]):
                break  # the weights are lost
    at = training.at if variant.fault else None
    since = [step - at for step in alarms if at is not None and step >= at]
    return {"seed": seed, "fault": at, "before": len(alarms) - len(since), "delay": min(since, default=None)}


def _optim(values: Mapping[str, Any], steps: int) -> OptimConfig:
    # "run", as in evenstep pretrain: the number of steps.
    values = {key: steps if value == "run" else value for key, value in values.items() if key != "clip_norm"}
    known = {"name", "before", "lr"}
    return OptimConfig(
        **{key: value for key, value in values.items() if key in known},
        options={key: value for key, value in values.items() if key not in known},
    )


@torch.no_grad()
def evaluate(model: Llama | Recurrent, batches: list[Batch]) -> float:
    """The mean loss over all targets."""
    model.eval()
    total = sum(float(model.loss(*batch)) * batch[1].numel() for batch in batches)
    model.train()
    return total / sum(batch[1].numel() for batch in batches)


def _measured(training: Training, curve: dict[int, float], at: int | None, seed: int, seconds: float) -> Trial:
    steps, guard = training.steps, training.guard
    whole = [curve.get(step, math.nan) for step in range(EVERY, steps + 1, EVERY)]
    finite = all(bool(p.isfinite().all()) for p in training.model.parameters())
    last = curve.get(steps, math.nan) if finite else math.nan
    events = guard.events if guard else []
    actions: dict[str, int] = {}
    for event in events:
        actions[event["action"]] = actions.get(event["action"], 0) + 1
    after = [event["rows"] for event in events if at is not None and event["rows"] >= at]
    return Trial(
        seed=seed,
        loss=_rounded(last),
        curve=[_rounded(value) for value in whole],
        fault=at,
        episodes=episodes(training.losses),
        actions=actions,
        first=min(after) - at if after and at is not None else None,
        false=len(events) - len(after),
        seconds=round(seconds, 2),
    )


def _rounded(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def episodes(losses: list[float]) -> int:
    """The number of times that the training loss rises above its lowest smoothed value by `EPISODE`."""
    mean, lowest, inside, count = 0.0, math.inf, False, 0
    for n, loss in enumerate(losses, 1):
        high = not loss <= lowest + EPISODE  # true for NaN
        count += high and not inside
        inside = high
        if math.isfinite(loss):
            mean = SMOOTH * mean + (1 - SMOOTH) * loss
            lowest = min(lowest, mean / (1 - SMOOTH**n))
    return count
