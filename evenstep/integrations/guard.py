"""The common part of the callbacks that act on spikes: checked options, a replaced optimizer step, a line for each
decision, and its record in the log of a `SpikeCallback` beside them."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from evenstep.errors import nearest
from evenstep.telemetry.guard import SpikeGuard
from evenstep.telemetry.monitor import SpikeMonitor
from evenstep.telemetry.trouble import Troubles

OWNER = "SpikeGuardCallback"
GIVEN = ("model", "optimizer", "schedulers", "data")
"""Arguments of `SpikeGuard` that a callback passes itself. The trainers' loaders cannot go back, so there is no
``data``."""

_troubles = Troubles(OWNER)
_monitors: weakref.WeakSet[SpikeMonitor] = weakref.WeakSet()
"""The open monitors of the callbacks that record spikes."""


def checked_guard_options(options: Mapping[str, Any]) -> None:
    """Check ``options`` of `SpikeGuard` now: the guard itself is made when training starts.

    Raises:
        TypeError: an unknown name, or ``on_event`` that cannot be called.
        ValueError: a value out of its range.
    """
    known = [name for name in inspect.signature(SpikeGuard.__init__).parameters if name not in ("self", *GIVEN)]
    for name in options:
        if name not in known:
            raise TypeError(f"{OWNER}: unknown argument '{name}'{nearest(name, known)}; there are {', '.join(known)}")
    on_event = options.get("on_event")
    if on_event is not None and not callable(on_event):
        raise TypeError(f"{OWNER}: on_event={on_event!r:.80} must be a function of one event, or None")
    small = nn.Linear(1, 1)
    try:
        SpikeGuard(small, torch.optim.SGD(small.parameters(), lr=0.1), **options)
    except (TypeError, ValueError) as problem:
        raise type(problem)(str(problem).replace("SpikeGuard:", f"{OWNER}:", 1)) from None


def checked_say(say: Any) -> Callable[[str], object] | None:
    """``say`` if it is a function or None; else TypeError."""
    if say is not None and not callable(say):
        raise TypeError(f"{OWNER}: say={say!r:.80} must be a function of one line of text, such as print, or None")
    return cast("Callable[[str], object] | None", say)


def replace_step(optimizer: Optimizer, step: Callable[..., Any]) -> Callable[[], None]:
    """Let ``optimizer.step`` call ``step``, for this object only. Returns a function that undoes it."""
    before = vars(optimizer).get("step")  # of a learning-rate scheduler, which replaces it too

    @functools.wraps(step)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)

    # torch's schedulers replace a step without this mark. They would bind the function of `step` to the optimizer.
    replaced._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = replaced  # type: ignore[method-assign]

    def restore() -> None:
        if vars(optimizer).get("step") is replaced:
            del optimizer.step
            if before is not None:
                optimizer.step = before  # type: ignore[method-assign]

    return restore


def event_line(event: Mapping[str, Any], guard: SpikeGuard, steps_before: int) -> str:
    """A decision in words.

    Args:
        event: of `SpikeGuard.events`; its ``rows`` are the trainer's number of the bad step.
        guard: the guard after the decision.
        steps_before: its ``num_steps`` before the decision.
    """
    effects = {
        "skip": "its gradients are not applied",
        "lower_lr": f"its gradients are not applied, and the learning rate is multiplied by {guard.lr_factor:g} for "
        f"{guard.lr_steps} steps",
        "stop": "the training stops",
    }
    if event["action"] == "rewind":
        undone = steps_before - event["to"]
        effect = f"the {undone} steps before it are undone, and the data goes on from here without their batches"
    else:
        effect = effects[event["action"]]
    return f"SpikeGuard: step {event['rows']} is bad: {event['reason']}; {event['action']}: {effect}"


def record_decisions_in(monitor: SpikeMonitor) -> None:
    """Let the guards of the monitor's optimizer write their decisions to its log, until `close_monitor`. Neither of the
    two callbacks gets the other from its trainer, and either may start first."""
    _monitors.add(monitor)


def close_monitor(monitor: SpikeMonitor, *, flush: bool = True) -> None:
    """Close a monitor of `record_decisions_in`."""
    _monitors.discard(monitor)
    monitor.close(flush=flush)


def record_decision(event: Mapping[str, Any], guard: SpikeGuard) -> None:
    """Write a decision of ``guard`` to the log of each callback that watches the same optimizer."""
    # The monitor would take a number of the trainer's steps for data rows
    facts = {key: value for key, value in event.items() if key != "rows"}
    for monitor in [each for each in _monitors if each.optimizer is guard.optimizer]:
        monitor.record(facts)


def load_guard(guard: SpikeGuard, saved: Mapping[str, Any]) -> None:
    """Load a saved state. One that does not fit, as after a change of the model, is a warning."""
    try:
        guard.load_state_dict(dict(saved))
    except Exception as problem:
        _troubles.failed("take up what it knew before the resume", problem)
