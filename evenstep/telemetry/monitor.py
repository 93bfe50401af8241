"""SpikeMonitor: sees every step of an optimizer, and says something when something happened.

During a step nothing is asked of the device: a row of numbers is written into a buffer there. When the buffer is full,
or at `drain`, it comes over in one transfer; the host then finds the events and hands records to the sinks. The
measurement changes nothing: no gradient, weight or random number of the run is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evenstep.telemetry.clocks import resets
from evenstep.telemetry.detect import Detector, Event
from evenstep.telemetry.lines import event_line
from evenstep.telemetry.probe import COLUMNS, Probe
from evenstep.telemetry.records import Records, lowbit_events, lowbit_record, start_record
from evenstep.telemetry.sinks import Sink, guarded
from evenstep.telemetry.subject import bare, parameter_names, watched

WEIGHTS_EVERY = 250
"""Steps between two looks at all weights, which move slowly."""

LINES = 3
"""Events told at one drain; the others are counted."""

LowBit = Callable[[], Mapping[str, Mapping[str, "float | Tensor"]]]
"""Gives, per quantised layer, ``saturation`` and ``underflow`` (shares of entries), ``error`` and ``gradient_error``
(relative: 2-norm of the noise over that of the values), or some of these, as numbers or 0-d tensors.
"""


class SpikeMonitor:
    """Watches ``optimizer``, any torch optimizer, from its construction until `close`; a context manager.

    ``monitor = SpikeMonitor(model, optimizer, sinks=[JsonlSink("metrics.jsonl")])``, then train as ever. Call
    ``monitor.observe(loss)`` before ``optimizer.step()`` and events know the loss as well. One row is made per
    ``optimizer.step()``, however many backward passes came before. Where the step gets a closure that runs the backward
    pass (as Lightning does), gradients are looked at after its first call, and its value is the loss of the step unless
    `observe` told another. Accelerate's wrapper of an optimizer is looked through. Under DDP and FSDP2 every rank makes
    a monitor;
    numbers are those of whole tensors, and rank 0 alone writes and speaks.

    Args:
        model: gives the parameters their names (those of wrappers such as DDP are stripped).
        optimizer: read through its ``stats`` where it has some; otherwise gradients are measured, one pass a step.
        every: steps between two transfers from the device, and so between lines of the log. Default 10.
        sinks: where records go, see `evenstep.telemetry.sinks`. A sink that fails is dropped with one warning.
        say: gets a line of text for each event. Default ``print``; None for silence.
        samples: coordinates of each tensor whose GSS is followed, 0 for none. Default 64.
        ratio: an event when the largest entry of a tensor's gradient exceeds this many times its recent mean.
            Default 10.
        sigma, window: of the spike rate. Default 7 and 1000 (OLMo 2).
        parameters_every: least number of steps between two records with the numbers of every parameter. Default 10.
        lowbit: gives the state of quantised layers, asked at every drain; see `LowBit`.

    Raises:
        ValueError: a number out of range, or an optimizer without parameters. TypeError: ``optimizer`` is no torch
            Optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        every: int = 10,
        sinks: Iterable[Sink] = (),
        say: Callable[[str], None] | None = print,
        samples: int = 64,
        ratio: float = 10.0,
        sigma: float = 7.0,
        window: int = 1000,
        parameters_every: int = 10,
        lowbit: LowBit | None = None,
    ) -> None:
        _check(optimizer, every=every, ratio=ratio, sigma=sigma, window=window, parameters_every=parameters_every)
        if samples < 0:
            raise ValueError(f"SpikeMonitor: samples={samples} must be at least 0")
        optimizer = bare(optimizer)
        self.optimizer, self.say, self.lowbit = optimizer, say, lowbit
        self.show: Callable[[list[str], dict[str, Any]], None] | None = None
        self.step = 0  # the newest one seen
        self.speaks = not (torch.distributed.is_available() and torch.distributed.is_initialized()) or (
            torch.distributed.get_rank() == 0
        )
        self.sinks = [guarded(sink) for sink in sinks] if self.speaks else []
        self.probe = Probe(optimizer, samples)
        self.names = parameter_names(model, optimizer)
        self.detector = Detector(self.names, ratio=ratio, sigma=sigma, window=window)
        self.records = Records(len(self.names), parameters_every)
        self.rows = torch.zeros(every, len(COLUMNS), len(self.names), device=self.probe.device)
        self.losses = torch.full((every,), math.nan, device=self.probe.device)
        self.seen: list[dict[str, Any]] = []  # what the host knows of the rows in the buffer
        self.told: dict[str, Any] = {}
        self.weighed: int | None = None
        self.useless: set[str] = set()
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    # ---- at every step ----

    def observe(
        self, loss: Tensor | float | None = None, *, rows: tuple[int, int] | None = None, step: int | None = None
    ) -> None:
        """Facts of the step that comes, before ``optimizer.step()``: its loss (0-d; detached), the data rows behind it
        (the first, and one past the last), its number (default: one more than the last). ValueError when the loss is
        more than one number."""
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(f"SpikeMonitor.observe: loss must be one number, got the shape {list(loss.shape)}")
        if step is not None and self.seen and step != self.step + 1:
            self.drain()  # records date their values by the first step: numbers must not jump within one
        self.told = {"loss": loss.detach() if isinstance(loss, Tensor) else loss, "rows": rows, "step": step}

    def _before(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """The hook before a step: ``args`` are the step's, the optimizer first."""
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if closure is None:
            self._look()
            return None
        return args[:1], kwargs | {"closure": watched(closure, self._evaluated)}

    def _evaluated(self, loss: Any) -> None:
        self._look()
        one_number = loss.numel() == 1 if isinstance(loss, Tensor) else isinstance(loss, float)
        if one_number and self.told.get("loss") is None:
            self.told["loss"] = loss.detach() if isinstance(loss, Tensor) else loss

    def _look(self) -> None:
        with torch.no_grad():
            self.probe.before(weights=not self.seen)

    def _after(self, *_: Any) -> None:
        told, self.told = self.told, {}
        step = told.get("step")
        self.step = self.step + 1 if step is None else step
        i, loss = len(self.seen), told.get("loss")
        with torch.no_grad():
            self.rows[i] = self.probe.after()
            self.losses[i] = math.nan if loss is None else loss
        rates = [group["lr"] for group in self.optimizer.param_groups]
        rate = max((float(rate) for rate in rates if not isinstance(rate, Tensor)), default=None)
        self.seen.append({"step": self.step, "rows": told.get("rows"), "lr": rate})
        if len(self.seen) == len(self.rows):
            self.drain()

    # ---- at log steps ----

    @torch.no_grad()
    def drain(self) -> list[Event]:
        """Bring the buffer over, find events, write records; returns the events. One transfer from the device; a
        message between ranks if parameters are sharded."""
        if not self.seen:
            return []
        n = len(self.seen)
        weigh = self.weighed is None or self.step - self.weighed >= WEIGHTS_EVERY
        layers = self.lowbit() if self.lowbit else {}
        values = [(layer, name, value) for layer, found in layers.items() for name, value in found.items()]
        parts = [self.probe.agree(self.rows[:n]).flatten(), self.losses[:n]]
        parts += [self.probe.weight_rms()] if weigh else []
        parts += [torch.as_tensor(value).detach().reshape(1).to(self.losses) for _, _, value in values]
        numbers = torch.cat(parts).cpu().numpy().astype("float64")
        rows = numbers[: self.rows[:n].numel()].reshape(n, len(COLUMNS), -1)
        rest = numbers[rows.size :]
        losses, rest = rest[:n], rest[n:]
        if weigh:
            self.weighed, self.records.weight_rms, rest = self.step, rest[: len(self.names)], rest[len(self.names) :]
        events: list[Event] = []
        reset_steps = resets(self.optimizer, [fact["step"] for fact in self.seen])
        for fact, row, loss in zip(self.seen, rows, losses, strict=True):
            columns = dict(zip(COLUMNS, row, strict=True))
            events += self.detector.feed(fact["step"], columns, float(loss), fact["rows"])
            if fact["step"] in reset_steps:
                events.append({"kind": "event", "event": "reset", "step": fact["step"]})
            self.records.add(fact, columns, float(loss))
        written = [self.records.window(self.detector.spike_rates()[-1])]
        if self.records.due():
            written.append(self.records.parameters(self.detector.spike_rates()[:-1]))
        if values:
            record = lowbit_record(self.step, [(*place[:2], x) for place, x in zip(values, rest, strict=True)])
            found, self.useless = lowbit_events(record, self.useless)
            written.append(record)
            events += found
        self.seen.clear()
        self._publish(written, events)
        return events

    def _publish(self, written: list[dict[str, Any]], events: list[Event]) -> None:
        if not self.records.started:
            self.records.started = True
            written.insert(0, start_record(self.names, self.optimizer, self.detector, max(0, written[0]["first"] - 1)))
        for record in [*written, *events]:
            for sink in self.sinks:
                sink.write(record)
        for record in written:
            if self.show and record["kind"] == "parameters":
                self.show(self.names, record)
        if self.say and self.speaks:
            told = [event for event in events if event["event"] != "reset"]
            for event in told[:LINES]:
                self.say(event_line(event))
            if len(told) > LINES:
                self.say(f"and {len(told) - LINES} more events up to step {self.step}")

    def close(self, *, flush: bool = True) -> None:
        """Write what is left, close the sinks and let go of the optimizer. Nothing happens the second time.

        ``flush=False`` leaves what has not been drained, for when one of several processes fails: numbers of sharded
        tensors would wait for the others.
        """
        for handle in self._handles:
            handle.remove()
        if self._handles:
            self._handles = []
            if flush:
                self.flush()
        for sink in self.sinks:
            sink.close()

    def flush(self) -> None:
        """Write everything seen so far, also events that wait for the loss of the next step."""
        self.drain()
        written = [self.records.parameters(self.detector.spike_rates()[:-1])] if self.records.pending else []
        events = self.detector.end()
        if written or events:
            self._publish(written, events)

    def __enter__(self) -> SpikeMonitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.close(flush=kind is None or not several)

    # ---- saving and loading ----

    def state_dict(self) -> dict[str, Any]:
        """All that later records depend on, in types that ``torch.load(weights_only=True)`` reads; drains first."""
        self.drain()
        return {
            "step": self.step,
            "names": self.names,
            "weighed": self.weighed,
            "useless": sorted(self.useless),
            "probe": self.probe.state(),
            "detector": _saved(self.detector.state()),
            "records": _saved(self.records.state()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave; ``probe`` may be None, where its samples are not those of this process. ValueError
        when it is of a model with other parameters or of another window."""
        if list(state["names"]) != self.names:
            raise ValueError("SpikeMonitor: the saved state is of a model with other parameters")
        self.step, self.weighed, self.useless = state["step"], state["weighed"], set(state["useless"])
        if state["probe"] is not None:
            self.probe.load(state["probe"])
        self.detector.load(_loaded(state["detector"]))
        self.records.load(_loaded(state["records"]))


def _check(optimizer: Optimizer, **numbers: float) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"SpikeMonitor: expected a torch optimizer, got {type(optimizer).__name__}")
    if not any(group["params"] for group in optimizer.param_groups):
        raise ValueError("SpikeMonitor: the optimizer has no parameters")
    for name, value in numbers.items():
        low = 1 if isinstance(value, int) and name in ("every", "window", "parameters_every") else 0
        if not (value >= low and value > 0):
            raise ValueError(f"SpikeMonitor: {name}={value} must be {'at least 1' if low else 'above 0'}")


def _saved(state: Any) -> Any:
    """Arrays as tensors, which a checkpoint can hold."""
    if isinstance(state, dict):
        return {key: _saved(value) for key, value in state.items()}
    return torch.from_numpy(state) if hasattr(state, "__array__") and not isinstance(state, Tensor) else state


def _loaded(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _loaded(value) for key, value in state.items()}
    return state.numpy() if isinstance(state, Tensor) else state
