"""One training of a task with a remedy, and its measures."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
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
from evenstep.train.config import OptimConfig, ScheduleConfig
from evenstep.train.optimizers import LearningRates, build_optimizer, lr_factor

EVERY = 20  # steps between two validations
EPISODE = 0.5  # nats above the lowest smoothed loss at which a spike episode starts
SMOOTH = 0.9  # of the exponential mean of the training loss


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
    steps = variant.steps or family.steps
    data = data_of(source, family.vocab_size)
    torch.manual_seed(seed)
    model = build(family, data.vocab_size, {**variant.shape, **remedy.shape}, variant.lowbit)
    values = {**remedy.optim, "lr": variant.lr or lr}
    model.to(device, torch.bfloat16 if variant.dtype == "bf16" else torch.float32)
    optimizer = build_optimizer(model, _optim(values, steps))
    clip_norm = values.get("clip_norm")
    rates, schedule = LearningRates(optimizer), ScheduleConfig(name=family.schedule)
    # A longer warm-up of a family without one is 20 steps.
    warmup = min(steps // 2, round((family.warmup or 5 * (remedy.warmup > 1)) * remedy.warmup))
    at = fault_step(family, seed)
    rows = Rows(family, source, variant.fault, at, seed)
    spoil = GRADIENT_FAULTS.get(variant.fault)
    guard = None
    if remedy.ladder:
        guard = SpikeGuard(model, optimizer, ladder=remedy.ladder, snapshot_every=10, data=[rows])
    extra: dict[str, Any] = {} if remedy.z_loss is None else {"z_loss": remedy.z_loss}
    losses: list[float] = []
    curve: dict[int, float] = {}
    held, seconds = [(x.to(device), y.to(device)) for x, y in validation(data, family)], 0.0
    draw = torch.Generator().manual_seed(seed)
    done = 0
    while done < steps:
        began = time.perf_counter()
        # Rows are read in order. After a rewind, those of bad steps are left out, and with them the fault.
        number = rows.position
        tokens, targets = (part.to(device) for part in rows.next_batch())
        if guard is not None and not guard.wanted(number):
            continue
        rates.set(optimizer, lr_factor(schedule, done + 1, steps, warmup))
        # [], or [2] with a z-loss; only a LLaMA has one.
        parts: Tensor = model.loss(tokens, targets, **extra)
        (parts.sum() * variant.loss_scale).backward()
        losses.append(float(parts.detach().reshape(-1)[0]))
        if spoil is not None:
            spoil(model, number - at, draw)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        if guard is None:
            optimizer.step()
            done += 1
        else:
            guard.step(parts.detach().reshape(-1)[0] * variant.loss_scale, rows=number)
            done = guard.num_steps
        optimizer.zero_grad()
        seconds += time.perf_counter() - began
        if not math.isfinite(losses[-1]) and guard is None:
            break  # the weights are lost
        if done and (done % EVERY == 0 or done == steps):
            curve[done] = evaluate(model, held)
    return _measured(model, steps, losses, curve, at if variant.fault else None, seed, guard, seconds)


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


def _measured(
    model: nn.Module,
    steps: int,
    losses: list[float],
    curve: dict[int, float],
    at: int | None,
    seed: int,
    guard: SpikeGuard | None,
    seconds: float,
) -> Trial:
    whole = [curve.get(step, math.nan) for step in range(EVERY, steps + 1, EVERY)]
    last = curve.get(steps, math.nan) if all(bool(p.isfinite().all()) for p in model.parameters()) else math.nan
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
        episodes=episodes(losses),
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
