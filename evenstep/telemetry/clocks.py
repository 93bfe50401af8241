"""When an optimizer resets its moments, read from the clocks of its groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer

CLOCKS = ("t", "stabilize_t")
"""Where evenstep's optimizers and `stabilize` count their steps."""


def _clocks(optimizer: Optimizer) -> Iterator[tuple[int, Any]]:
    for group in optimizer.param_groups:
        interval = int(group.get("reset_interval") or getattr(optimizer, "reset_interval", 0) or 0)
        clock = next((group[name] for name in CLOCKS if name in group), None)
        if interval and clock is not None:
            yield interval, clock


def steps_to_reset(optimizer: Optimizer) -> int | None:
    """Steps until the next moment reset of any group, None when the optimizer has none."""
    return min((interval - int(clock) % interval for interval, clock in _clocks(optimizer)), default=None)


def resets(optimizer: Optimizer, steps: list[int]) -> set[int]:
    """Those of the newest ``steps`` (the last one is the step just done) on which moments were reset."""
    found = set()
    for interval, clock in _clocks(optimizer):
        now = int(clock)
        found |= {step for back, step in enumerate(reversed(steps)) if now > back and (now - back) % interval == 0}
    return found


def steps_done(optimizer: Optimizer) -> int:
    """Steps that the optimizer has made, 0 when it does not count them."""
    clocks = [int(group[name]) for group in optimizer.param_groups for name in CLOCKS if name in group]
    return max(clocks or [int(state["step"]) for state in optimizer.state.values() if "step" in state], default=0)
