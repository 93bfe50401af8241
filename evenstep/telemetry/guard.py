"""SpikeGuard: acts on a spike instead of recording it only.

The guard judges every step by three numbers: the loss, the norm of all gradients, and the norm of each gradient. A step
is bad where one of them is not finite, or far above its usual value: the median of the last accepted steps, in units of
their spread (the median absolute deviation). Medians are not moved by the spikes that they judge. All processes judge
the same numbers, the largest of any process, which one small all-reduce brings together; so no process acts alone.

A bad step climbs a ladder of actions, from the cheapest to the last:

* ``"skip"``: the gradients are not applied.
* ``"lower_lr"``: they are not applied, and the learning rates are lowered for some steps.
* ``"rewind"``: weights, optimizer state, random states and data position go back to a snapshot of before the first bad
  step, and the data rows of the bad steps are left out from then on.
* ``"stop"``: the guard takes no more steps, and says so.

``"skip"`` has to know the verdict before the optimizer's step, which costs one read of the device per step. A ladder
without it reads the device once in ``check_every`` steps, since a rewind can also undo steps that were taken.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from evenstep.telemetry.probe import Probe
from evenstep.telemetry.schema import TO_DEVIATION
from evenstep.telemetry.snapshot import Snapshot

ACTIONS = ("skip", "lower_lr", "rewind", "stop")

LEAST_SPREAD = 0.02
"""The spread of a series is taken to be at least this share of its median, so that a series that stands still has no
spikes of rounding noise."""

TENSOR_FLOOR = 1e-3
"""A single gradient is judged where its norm exceeds this share of the usual norm of all gradients: the norm of a
smaller one is noise to the training, however much it varies."""

Event = dict[str, Any]


class SpikeGuard:
    """A policy around any optimizer and any training loop: what to do about a spike.

    >>> import torch
    >>> from evenstep import SpikeGuard
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> guard = SpikeGuard(model, optimizer, ladder=("skip", "rewind", "stop"))
    >>> for batch in range(30):
    ...     x = torch.ones(8, 4) if batch != 25 else torch.full((8, 4), torch.inf)
    ...     loss = model(x).square().mean()
    ...     loss.backward()
    ...     took = guard.step(loss, rows=batch)
    ...     optimizer.zero_grad()
    >>> guard.events[0]["step"], guard.events[0]["action"], guard.events[0]["rows"]
    (25, 'skip', 25)

    Args:
        model: the module that is trained; needed for snapshots.
        optimizer: any ``torch.optim.Optimizer``, sharded parameters (FSDP2, tensor parallelism) included.
        ladder: actions in the order in which they are tried, of ``"skip"``, ``"lower_lr"``, ``"rewind"``, ``"stop"``.
        sigma: deviations above the median from which the loss, the logarithm of the norm of all gradients, or that of
            one gradient is a spike (default 8). With ``math.inf`` only a step that is not finite is bad.
        norm_ratio: besides, a norm of all gradients is a spike only where it exceeds its median by this factor
            (default 3), and that of one gradient by three times the factor.
        loss_rise: besides, a loss is a spike only where it exceeds its median by this many units (default 0.5; nats
            for a language model).
        floor: a norm below it is never a spike (default 1e-8). Choose it larger for gradients that are nearly zero.
        window: accepted steps that the medians are taken of (default 100).
        min_history: accepted steps before finite spikes are judged (default 20).
        skips: bad steps that ``"skip"`` takes care of before the next action is tried (default 3). The others are
            tried once.
        patience: steps without a bad one after which the ladder starts from its first action again (default 50).
        budget: actions in all (default 20). When they are spent, the last action of the ladder serves if it is
            ``"stop"``; otherwise finite spikes are taken as they come and those that are not finite are skipped.
        lr_factor, lr_steps: what ``"lower_lr"`` multiplies the rates by, and for how many steps (default 0.1, 20).
        snapshot_every: steps between snapshots for ``"rewind"`` (default 100); the first is taken after the first
            step. The newest is kept. It takes as much host memory as the model and the optimizer's state on the device,
            and twice that while it is replaced. Where there is none yet, a bad step is skipped.
        check_every: steps between two reads of the device for a ladder without ``"skip"`` (default 10).
        rewind: goes back to a state from before the first bad step and returns the number of steps taken by then, for
            a trainer that has snapshots of its own. None (default): the guard takes snapshots and restores them. A
            guard whose state is saved with those of the trainer keeps its place on the ladder in a rewind.
        data: data loaders that go back with a rewind: objects with ``state_dict()`` and ``load_state_dict()`` whose
            state, when `step` is called, is the position after this step's rows.
        schedulers: learning-rate schedulers, a GradScaler: such objects that the loop advances after a step was taken
            and before the next.
        process_group: the processes that act together; None for all.
        on_event: called with every event, for instance ``print``. An exception that it raises is not caught.

    Attributes:
        events: a dict per decision: ``step`` (the first is 0), ``action``, ``reason``, ``rows``; for a rewind ``to``,
            the step that training went back to; and ``late``, the number of steps from the bad one to the present one
            if it was taken before it was judged. The newest 1000.
        stopped: True once the ladder's end is reached.
        num_steps: steps taken or skipped since the start, less those that a rewind undid.
        excluded: the rows of bad steps that a rewind leaves out (see `wanted`).

    Raises:
        ValueError: for an unknown action, an empty ladder, or a number out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        ladder: Sequence[str] = ACTIONS,
        sigma: float = 8.0,
        norm_ratio: float = 3.0,
        loss_rise: float = 0.5,
        floor: float = 1e-8,
        window: int = 100,
        min_history: int = 20,
        skips: int = 3,
        patience: int = 50,
        budget: int = 20,
        lr_factor: float = 0.1,
        lr_steps: int = 20,
        snapshot_every: int = 100,
        check_every: int = 10,
        data: Iterable[Any] = (),
        schedulers: Iterable[Any] = (),
        rewind: Callable[[], int] | None = None,
        process_group: Any = None,
        on_event: Callable[[Event], object] | None = None,
    ) -> None:
        self.ladder = _checked_ladder(ladder)
        if sigma != math.inf:
            _check("sigma", sigma, above=0.0)
        _check("norm_ratio", norm_ratio, above=1.0)
        _check("loss_rise", loss_rise, least=0.0)
        _check("floor", floor, least=0.0)
        _check("lr_factor", lr_factor, above=0.0, below=1.0)
        counts = {
            "window": window, "min_history": min_history, "skips": skips, "patience": patience, "budget": budget,
            "lr_steps": lr_steps, "snapshot_every": snapshot_every, "check_every": check_every,
        }  # fmt: skip
        for name, value in counts.items():
            _check_count(name, value)
        if min_history > window:
            raise ValueError(f"SpikeGuard: min_history={min_history} exceeds window={window}; give at most the window")
        self.model, self.optimizer = model, optimizer
        self.data, self.schedulers = tuple(data), tuple(schedulers)
        self.sigma, self.floor = sigma, floor
        self.skips, self.patience, self.budget = skips, patience, budget
        self.lr_factor, self.lr_steps = lr_factor, lr_steps
        self.snapshot_every, self.check_every = snapshot_every, 1 if "skip" in self.ladder else check_every
        self.rewind, self.process_group, self.on_event = rewind, process_group, on_event

        self.events: deque[Event] = deque(maxlen=1000)
        self.stopped = False
        self.num_steps = 0
        self.excluded: set[Hashable] = set()
        self._probe = Probe(optimizer, samples=0)
        self._probe.reports = False  # measure the gradients before the step, whatever the optimizer tells after it
        k = len(self._probe.params)
        self._rises = np.array([loss_rise, math.log(norm_ratio), *[math.log(3.0 * norm_ratio)] * k])
        self._baseline = _Baseline(2 + k, window, min_history)
        self._waiting: list[tuple[int, Hashable, Tensor]] = []  # steps not judged yet: step, rows, numbers [2 + k]
        self._snapshot: tuple[Snapshot, dict[str, Any]] | None = None  # with the state of the baseline
        self._rung = 0
        self._uses = 0  # of the action at this rung, since it was reached
        self._calm = 0  # steps since the last bad one
        self._bad: list[tuple[int, Hashable]] = []  # step and rows of the bad steps since the ladder's start
        self._actions = 0
        self._low = 0  # steps that are still to be taken at lowered learning rates

    def step(self, loss: Tensor | float, rows: Hashable = None, *, take: Callable[[], object] | None = None) -> bool:
        """Take the optimizer's step, or act instead. Call it after ``backward``, where the loop called
        ``optimizer.step()``, and clear the gradients after it as usual.

        Args:
            loss: the loss of this step, a 0-d tensor or a number.
            rows: what the step was trained on, anything hashable: a number, a range, the name of a file. A rewind
                leaves the rows of bad steps out (`wanted`).
            take: takes the step instead of ``optimizer.step``, for instance ``lambda: scaler.step(optimizer)``, with
                gradients that were unscaled before.

        Returns:
            Whether the step was taken. It is not where it was bad, and never once the guard has ``stopped``. No bad
            gradient raises.
        """
        if self.stopped:
            return False
        if self._snapshot is not None and not self._snapshot[0].is_complete:
            self._snapshot[0].complete(self.schedulers)
        self._waiting.append((self.num_steps, rows, self._numbers(loss)))
        rewinds = "rewind" in self.ladder and self.rewind is None
        due = len(self._waiting) >= self.check_every or (rewinds and self._snapshot is None)
        if due and not self._judge():
            return False
        with self._learning_rates():
            (take or self.optimizer.step)()
        self.num_steps += 1
        if rewinds and (self._snapshot is None or self.num_steps % self.snapshot_every == 0):
            self.flush()  # a snapshot of an unjudged state could hold the damage
            if not self._bad and not self.stopped:
                self._take_snapshot()
        return True

    @property
    def is_calm(self) -> bool:
        """Whether no bad step is remembered and none waits for its verdict, so that a snapshot taken now is from before
        the next bad step."""
        return not self._bad and not self._waiting

    @property
    def lr_scale(self) -> float:
        """The factor of the learning rates in the next step: 1, or ``lr_factor`` after ``"lower_lr"``."""
        return self.lr_factor if self._low else 1.0

    def wanted(self, rows: Hashable) -> bool:
        """False for rows of a bad step that a rewind leaves out. Ask before training on rows that may come again."""
        return rows is None or rows not in self.excluded

    def flush(self) -> None:
        """Judge the steps that a ladder without ``"skip"`` has not judged yet, for instance at the end of a training.
        Actions appear in ``events``."""
        self._judge()

    # ---- numbers of a step ----

    @torch.no_grad()
    def _numbers(self, loss: Tensor | float) -> Tensor:
        """``[2 + k]`` in fp32 on the device: loss, norm of all gradients, norm of each; Inf for what is not finite."""
        self._probe.follow()
        self._probe.before(weights=False)
        found = self._probe.measured
        if found:
            norms = found["grad_norm"].masked_fill(found["grad_max"].isinf(), math.inf)
            # What has no gradient, or none that can be read (a quantised one), is NaN and counts as zero.
            norms = norms.to(self._probe.device, torch.float32).nan_to_num(nan=0.0, posinf=math.inf)
        else:
            norms = torch.zeros(len(self._probe.params), device=self._probe.device)
        value = loss.detach().to(norms).reshape(1) if isinstance(loss, Tensor) else norms.new_tensor([float(loss)])
        # NaN becomes Inf, which an all-reduce by maximum keeps. The norm of the norms is that of all gradients.
        numbers = torch.cat(
            [value.nan_to_num(nan=math.inf, posinf=math.inf), torch.linalg.vector_norm(norms).reshape(1), norms]
        )
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(self.process_group) > 1:
            # The largest of all processes, so that a fault that one process alone sees is judged alike by all.
            dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.process_group)
        return numbers

    # ---- verdicts ----

    def _judge(self) -> bool:
        """Judge the waiting steps in their order, and act on bad ones. False where the step that is about to be taken
        must not be."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return True
        go_on = True
        # [waiting steps, 2 + k]: the only place where the guard waits for the device.
        table = torch.stack([numbers for _, _, numbers in waiting]).double().cpu().numpy()
        for (step, rows, _), numbers in zip(waiting, table, strict=True):
            reason = self._reason(numbers)
            if reason is None:
                self._calm += 1
                if self._calm >= self.patience:  # the fault is over: the next one starts at the first rung again
                    self._rung, self._uses, self._bad = 0, 0, []
                continue
            action = self._act(step, rows, reason, finite=bool(np.isfinite(numbers).all()))
            if action in ("rewind", "stop"):
                return False
            # Earlier steps of this round were taken: only the current one can still be left out.
            if action is not None and step == self.num_steps:
                self.num_steps += 1
                go_on = False
        return go_on

    def _reason(self, numbers: NDArray[np.float64]) -> str | None:
        """Why a step is bad; None where it is not. Adds its numbers to those that later steps are judged by."""
        loss, norm = numbers[:2]
        if not np.isfinite(numbers).all():
            names = [self._name(i) for i in np.flatnonzero(~np.isfinite(numbers[2:]))[:3]]
            return "the loss is not finite" if loss == math.inf else f"gradients of {', '.join(names)} are not finite"
        if self.sigma == math.inf:  # finite steps are never bad, so no history is needed
            return None
        # Norms are compared by their logarithms: they change by factors while a training settles.
        values = np.append(loss, np.log(np.maximum(numbers[1:], max(self.floor, 1e-30))))
        median, spread, known = self._baseline.usual()  # [2 + k] each
        # Without a least spread, the first change after a plateau would be a spike. That of the loss is relative; those
        # of the logarithms are relative already.
        least = np.full(len(values), LEAST_SPREAD)
        least[0] *= abs(median[0])
        # 1.4826 MAD estimates a standard deviation and, unlike one, is not moved by the spikes in the window.
        limit = median + np.maximum(self.sigma * TO_DEVIATION * np.maximum(spread, least), self._rises)
        above = (values > limit) & known
        # Norms below the floor, and those of a tensor that has hardly a share of the whole, may jump without harm.
        above[1:] &= numbers[1:] > self.floor
        above[2:] &= numbers[2:] > TENSOR_FLOOR * math.exp(median[1])
        # A spike enters at its limit, so that a level which stays becomes the usual one in time.
        self._baseline.push(np.where(above, limit, values))
        if above[0]:
            return f"the loss is {loss:.4g}, usually {median[0]:.4g}"
        if above[1]:
            return f"the norm of the gradients is {norm:.3g}, usually {math.exp(median[1]):.3g}"
        for i in np.flatnonzero(above[2:])[:1]:  # the first tensor is enough for the message
            usual = math.exp(median[2 + i])
            return f"the norm of the gradient of {self._name(i)} is {numbers[2 + i]:.3g}, usually {usual:.3g}"
        return None

    def _name(self, i: int) -> str:
        names = {id(p): name for name, p in self.model.named_parameters()}
        return names.get(id(self._probe.params[i]), f"parameter {i}")

    # ---- actions ----

    def _act(self, step: int, rows: Hashable, reason: str, *, finite: bool) -> str | None:
        """Act on a bad step, and return the action; None where its gradients are to be applied all the same."""
        self._calm = 0
        self._bad.append((step, rows))
        action = self._next_action()
        if action is None:
            if finite:
                return None
            action = "skip"  # whatever the budget: gradients that are not finite would destroy the weights
        event: Event = {"step": step, "action": action, "reason": reason, "rows": rows}
        if step < self.num_steps:
            event["late"] = self.num_steps - step
        if action == "rewind":
            event["to"] = self._rewind()
        elif action == "lower_lr":
            self._low = self.lr_steps
        elif action == "stop":
            self.stopped = True
        self.events.append(event)
        if self.on_event is not None:
            self.on_event(event)
        return action

    def _next_action(self) -> str | None:
        """The action for the next bad step; None where the budget is spent and the ladder has no end."""
        if self._actions >= self.budget:
            return "stop" if self.ladder[-1] == "stop" else None
        # A rung that has been used up leads to the next one; the last rung is used again and again.
        while self._uses >= self._allowed(self.ladder[self._rung]) and self._rung + 1 < len(self.ladder):
            self._rung, self._uses = self._rung + 1, 0
        # There is nothing to go back to before the first snapshot. Such a skip uses up nothing.
        if self.ladder[self._rung] == "rewind" and self._snapshot is None and self.rewind is None:
            return "skip"
        self._uses += 1
        self._actions += 1
        return self.ladder[self._rung]

    def _allowed(self, action: str) -> int:
        return self.skips if action == "skip" else 1

    def _rewind(self) -> int:
        """Go back to the snapshot, and return its step. It is older than the first bad step: none is taken while the
        ladder remembers a bad one."""
        self.excluded |= {rows for _, rows in self._bad if rows is not None}
        self._bad = []
        if self.rewind is not None:
            place = self._place()
            self.num_steps = self.rewind()  # may load a former state of this guard: only its medians are to change
            self._go_to(place)
        else:
            assert self._snapshot is not None
            snapshot, baseline = self._snapshot
            snapshot.restore()
            # The medians go back too: the steps that are undone must not be part of what is usual.
            self._baseline.load(baseline)
            self.num_steps = snapshot.step
        return self.num_steps

    def _take_snapshot(self) -> None:
        taken = Snapshot(self.num_steps, self.model, self.optimizer, self.data)
        self._snapshot = taken, self._baseline.state()

    @contextlib.contextmanager
    def _learning_rates(self) -> Iterator[None]:
        """The rates during a step. They are put back after it, so that schedulers see their own."""
        if not self._low:
            yield
            return
        self._low -= 1
        # Replaced and not multiplied in place: a rate may be a tensor that a scheduler or a CUDA graph holds.
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * self.lr_factor
        try:
            yield
        finally:
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    # ---- saving ----

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to judge and act as this one would, in types that
        ``torch.load(weights_only=True)`` reads. Snapshots are not in it: the first step after a resume takes one. The
        steps that wait for their verdict are judged first."""
        self._judge()
        return {
            "names": [self._name(i) for i in range(len(self._probe.params))],
            "baseline": self._baseline.state(),
            "num_steps": self.num_steps,
            "place": self._place(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned. ValueError for a state of other parameters or another window,
        which changes nothing."""
        names = [self._name(i) for i in range(len(self._probe.params))]
        if state["names"] != names:
            raise ValueError(f"SpikeGuard: the saved state is of {len(state['names'])} other parameters; start anew")
        self._baseline.load(state["baseline"])
        self.num_steps = state["num_steps"]
        self._go_to(state["place"])
        self._waiting = []
        self._snapshot = None

    def _place(self) -> dict[str, Any]:
        """The place on the ladder, and what has been done so far: everything that a rewind does not undo."""
        return {
            "counters": [self._rung, self._uses, self._calm, self._actions, self._low],
            "bad": list(self._bad),
            "excluded": sorted(self.excluded, key=repr),
            "events": list(self.events),
            "stopped": self.stopped,
        }

    def _go_to(self, place: dict[str, Any]) -> None:
        self._rung, self._uses, self._calm, self._actions, self._low = place["counters"]
        self._bad = [tuple(one) for one in place["bad"]]
        self.excluded = set(place["excluded"])
        self.events = deque(place["events"], maxlen=1000)
        self.stopped = place["stopped"]


class _Baseline:
    """Median and spread of the last ``window`` values of each of ``k`` series.

    A median over the window costs more than all else here, so it is taken anew once in ten steps, and every step while
    there are few values.
    """

    def __init__(self, k: int, window: int, min_history: int) -> None:
        self.values = np.full((window, k), np.nan)  # a ring: value number n is in row n % window
        self.count = 0
        self.min_history = min_history
        self._usual: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

    def push(self, values: NDArray[np.float64]) -> None:
        self.values[self.count % len(self.values)] = values
        self.count += 1
        if self.count <= 2 * self.min_history or self.count % 10 == 0:
            self._usual = None

    def usual(self) -> tuple[NDArray[np.float64], NDArray[np.float64], bool]:
        """Medians ``[k]``, median absolute deviations ``[k]``, and whether there are enough values to judge by."""
        # The order of the rows does not matter for a median, so the ring is used as it is.
        filled = self.values[: min(self.count, len(self.values))]
        if not len(filled):
            nothing = np.zeros(self.values.shape[1])
            return nothing, nothing, False
        if self._usual is None:
            median = np.median(filled, axis=0)
            self._usual = median, np.median(np.abs(filled - median), axis=0)
        return *self._usual, self.count >= self.min_history

    def state(self) -> dict[str, Any]:
        usual = None if self._usual is None else [torch.tensor(x) for x in self._usual]
        return {"values": torch.tensor(self.values), "count": self.count, "usual": usual}

    def load(self, state: dict[str, Any]) -> None:
        values = state["values"].numpy()
        if values.shape != self.values.shape:
            raise ValueError(
                f"SpikeGuard: the saved window has the shape {values.shape}, this one {self.values.shape}; load it "
                "with the same window and the same parameters"
            )
        self.values, self.count = values.copy(), state["count"]
        usual = state["usual"]
        self._usual = None if usual is None else (usual[0].numpy().copy(), usual[1].numpy().copy())


def _checked_ladder(ladder: Sequence[str]) -> tuple[str, ...]:
    if isinstance(ladder, str):
        ladder = (ladder,)
    for action in ladder:
        if action not in ACTIONS:
            raise ValueError(f"SpikeGuard: ladder holds {action!r}; allowed are {', '.join(ACTIONS)}")
    places = [ACTIONS.index(action) for action in ladder]
    if not places or places != sorted(set(places)):
        raise ValueError(f"SpikeGuard: ladder={tuple(ladder)!r}; give each action once, in the order {ACTIONS}")
    return tuple(ladder)


def _check(
    name: str, value: float, *, least: float = -math.inf, above: float = -math.inf, below: float = math.inf
) -> None:
    right = isinstance(value, (int, float)) and least <= value and above < value < below
    if not right:
        bounds = [f"at least {least:g}"] * math.isfinite(least) + [f"above {above:g}"] * math.isfinite(above)
        bounds += [f"below {below:g}"] * math.isfinite(below)
        raise ValueError(f"SpikeGuard: {name}={value!r}; give a finite number {' and '.join(bounds)}")


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"SpikeGuard: {name}={value!r}; give a whole number of at least 1")
