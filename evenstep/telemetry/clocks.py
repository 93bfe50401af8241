"""Steps of an optimizer and of its moment resets, read from the step counters of its parameter groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer

CLOCKS = ("t", "stabilize_t")
"""Keys of a group under which evenstep's optimizers and `stabilize` count their steps."""


def _clocks(optimizer: Optimizer) -> Iterator[tuple[int, Any]]:
    """(reset interval, step counter) of each group that resets its moments."""
    for group in optimizer.param_groups:
        interval = int(group.get("reset_interval") or getattr(optimizer, "reset_interval", 0) or 0)
        clock = next((group[name] for name in CLOCKS if name in group), None)
        if interval and clock is not None:
            yield interval, clock


def steps_to_reset(optimizer: Optimizer) -> int | None:
    """Number of steps until the next moment reset of any group; None when the optimizer resets no moments.

    >>> import torch, evenstep
    >>> steps_to_reset(evenstep.SPAM([torch.nn.Parameter(torch.zeros(2))], lr=0.1, reset_interval=500))
    500
    """
    return min((interval - int(clock) % interval for interval, clock in _clocks(optimizer)), default=None)


def resets(optimizer: Optimizer, steps: list[int]) -> set[int]:
    """The members of ``steps`` on which moments were reset. ``steps`` are the newest steps in order, up to the one that
    the optimizer has just made."""
    reset = set()
    for interval, clock in _clocks(optimizer):
        now = int(clock)
        reset |= {step for back, step in enumerate(reversed(steps)) if now > back and (now - back) % interval == 0}
    return reset


def steps_done(optimizer: Optimizer) -> int:
    """Number of steps that the optimizer has made, 0 when it does not count them."""
    clocks = [int(group[name]) for group in optimizer.param_groups for name in CLOCKS if name in group]
    return max(clocks or [int(state["step"]) for state in optimizer.state.values() if "step" in state], default=0)
