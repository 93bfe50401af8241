"""The learning rate over time, as a factor of the highest rate: a pure function of the step, so a resume needs no
state for it."""

from __future__ import annotations

import math

from evenstep.train.config import ScheduleConfig


def lr_factor(schedule: ScheduleConfig, step: int, total_steps: int, warmup_steps: int) -> float:
    """Factor for optimizer step ``step`` (1-based) of ``total_steps``.

    Warm-up: step / warmup_steps, so the first step already moves and the last warm-up step has the full rate. After
    it, with x = (step - warmup) / (total - warmup) in (0, 1]:
    cosine: min + (1 - min) (1 + cos(pi x)) / 2, exactly ``min_lr_ratio`` on the last step;
    wsd: 1, then linear down to ``min_lr_ratio`` over the last ``decay_fraction`` of all steps;
    constant: 1.
    Steps beyond the total keep the last value.
    """
    if step <= warmup_steps:
        return step / warmup_steps
    step = min(step, total_steps)
    return _SHAPES[schedule.name](schedule, step, total_steps, warmup_steps)


def _cosine(schedule: ScheduleConfig, step: int, total: int, warmup: int) -> float:
    low = schedule.min_lr_ratio
    return low + (1 - low) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def _wsd(schedule: ScheduleConfig, step: int, total: int, warmup: int) -> float:
    decay_steps = min(max(1, round(schedule.decay_fraction * total)), total - warmup)
    remaining = (total - step) / decay_steps
    return min(1.0, schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * remaining)


def _constant(schedule: ScheduleConfig, step: int, total: int, warmup: int) -> float:
    return 1.0


_SHAPES = {"cosine": _cosine, "wsd": _wsd, "constant": _constant}
