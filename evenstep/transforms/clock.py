"""What depends on time: resets, schedules, re-warm-up and bias corrections.

Everything here is arithmetic on 0-d tensors, without branches on their values, so that the same lines serve a clock
that lives on a device. ``t`` is the 1-based number of the current ``step()`` call, a 0-d tensor or, where kernels make
a whole step on the host, a number.
"""

import math
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", Tensor, float)


def reset_due(t: T, every: int) -> T:
    """1 on the steps whose number is a multiple of ``every``, else 0; never for ``every == 0``."""
    return 0 * t if every == 0 else (t % every == 0) + 0 * t


def bias_correction(beta: float | Tensor, count: Tensor) -> Tensor:
    """``1 - beta**count`` without the cancellation that fp32 suffers for a beta near one (0.99999 at count 1 would be
    off by 0.6 %).
    """
    log_beta = torch.log(beta) if isinstance(beta, Tensor) else (math.log(beta) if beta > 0 else -math.inf)
    return -torch.expm1(count * log_beta)


def cosine_factor(t: T, total_steps: int, eta_min: float, *, hold: bool) -> T:
    """Stable-SPAM's optional factor on beta1 and gamma1: from 1 down to ``eta_min`` over ``total_steps``, then held
    (or, with ``hold=False``, rising again).
    """
    if hold:
        t = t.clamp(max=total_steps + 1) if isinstance(t, Tensor) else min(t, total_steps + 1)
    return eta_min + (1 - eta_min) * (1 + _cos(math.pi * t / (total_steps + 1))) / 2


def rewarm_factor(t: T, every: int, warmup_steps: int) -> T:
    """SPAM's factor on the update after a reset: from 0.01 on the reset step to 1 after ``warmup_steps``; 1 before the
    first reset.
    """
    if every == 0:
        return 0 * t + 1
    since = t % every
    rising = 1 - 0.99 * (1 + _cos(math.pi * since / (warmup_steps + 1))) / 2
    warming = (t >= every) & (since < warmup_steps)
    if isinstance(t, Tensor):
        return torch.where(warming, rising, torch.ones_like(t))
    return rising if warming else 1.0


def _cos(x: T) -> T:
    return torch.cos(x) if isinstance(x, Tensor) else math.cos(x)
