"""What depends on time: resets, schedules, re-warm-up and bias corrections.

Everything here is arithmetic on 0-d tensors, without branches on their values, so that the same lines serve a clock
that lives on a device. ``t`` is the 1-based number of the current ``step()`` call.
"""

import math

import torch
from torch import Tensor


def reset_due(t: Tensor, every: int) -> Tensor:
    """1 on the steps whose number is a multiple of ``every``, else 0; never for ``every == 0``."""
    return torch.zeros_like(t) if every == 0 else (torch.remainder(t, every) == 0).to(t.dtype)


def bias_correction(beta: float | Tensor, count: Tensor) -> Tensor:
    """``1 - beta**count`` without the cancellation that fp32 suffers for a beta near one (0.99999 at count 1 would be
    off by 0.6 %).
    """
    log_beta = torch.log(beta) if isinstance(beta, Tensor) else (math.log(beta) if beta > 0 else -math.inf)
    return -torch.expm1(count * log_beta)


def cosine_factor(t: Tensor, total_steps: int, eta_min: float, *, hold: bool) -> Tensor:
    """Stable-SPAM's optional factor on beta1 and gamma1: from 1 down to ``eta_min`` over ``total_steps``, then held
    (or, with ``hold=False``, rising again).
    """
    if hold:
        t = t.clamp(max=total_steps + 1)
    return eta_min + (1 - eta_min) * (1 + torch.cos(math.pi * t / (total_steps + 1))) / 2


def rewarm_factor(t: Tensor, every: int, warmup_steps: int) -> Tensor:
    """SPAM's factor on the update after a reset: from 0.01 on the reset step to 1 after ``warmup_steps``; 1 before the
    first reset.
    """
    if every == 0:
        return torch.ones_like(t)
    since = torch.remainder(t, every)
    rising = 1 - 0.99 * (1 + torch.cos(math.pi * since / (warmup_steps + 1))) / 2
    return torch.where((t >= every) & (since < warmup_steps), rising, torch.ones_like(t))
