"""SpikeMonitor: sees every step of an optimizer, and says something when something happened.

During a step nothing is asked of the device: a row of numbers is written into a buffer there. When the buffer is full,
or at `drain`, it comes over in one transfer; the host then finds the events and hands records to the sinks. The
measurement changes nothing: no gradient, weight or random number of the run is touched. And it ends nothing: what goes
wrong in here is told of once and counted, and the step goes on.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evenstep.errors import EvenstepError
from evenstep.optim.distributed import is_sharded
from evenstep.telemetry.clocks import resets
from evenstep.telemetry.detect import Detector, Event
from evenstep.telemetry.lines import event_line
from evenstep.telemetry.options import checked_options
from evenstep.telemetry.probe import COLUMNS, Probe
from evenstep.telemetry.records import LOWBIT_KEYS, Records, lowbit_events, lowbit_record, start_record
from evenstep.telemetry.sinks import Sink, as_sinks, guarded
from evenstep.telemetry.subject import bare, parameter_names, plain_names, watched
from evenstep.telemetry.trouble import Troubles

T = TypeVar("T")

WEIGHTS_EVERY = 250
"""Steps between two looks at all weights, which move slowly."""

LINES = 3
"""Events told at one drain; the others are counted."""

MOST = 2**30
"""Numbers that one buffer may hold: 8 GB in fp64."""

LowBit = Callable[[], Mapping[str, Mapping[str, "float | Tensor"]]]
"""Gives, per quantised layer, ``saturation`` and ``underflow`` (shares of entries), ``error`` and ``gradient_error``
(relative: 2-norm of the noise over that of the values), or some of these, as numbers or 0-d tensors.
"""

Rows = int | tuple[int, int] | range | slice


class SpikeMonitor:
    """Watches ``optimizer``, any torch optimizer, from its construction until `close`; a context manager.

    ``monitor = SpikeMonitor(model, optimizer, sinks=["metrics.jsonl"])``, then train as ever. Call
    ``monitor.observe(loss)`` before ``optimizer.step()`` and events know the loss as well. One row is made per
    ``optimizer.step()``, however many backward passes came before. Where the step gets a closure that runs the backward
    pass (as Lightning does), gradients are looked at after its first call, and its value is the loss of the step unless
    `observe` told another. Accelerate's wrapper of an optimizer is looked through. Compiled steps are measured between
    their graphs (not with ``fullgraph=True``). Under DDP and FSDP2 every rank makes a monitor; numbers are those of
    whole tensors, and rank 0 alone writes and speaks.

    The first step is number 1, unless `observe` gives another; ``for step, batch in enumerate(batches)`` counts from 0
    where it is given as ``observe(loss, step=step)``.

    Bad arguments fail in the call that gives them. Nothing fails within ``optimizer.step()``: a step that cannot be
    measured is counted in ``lost``, with one warning for each reason. Parameters that are quantised or no numbers
    (int8, bool, fp8, subclasses of Tensor whose entries cannot be read) are passed over.

    Args:
        model: gives the parameters their names (without the parts of wrappers such as DDP, FSDP, torch.compile or
            activation checkpointing).
        optimizer: read through its ``stats`` where it is of evenstep; otherwise gradients are measured, one pass a
            step.
        every: steps between two transfers from the device, and so between lines of the log. Default 10.
        sinks: where records go: paths of files that get a line of JSON each, or see `evenstep.telemetry.sinks`. A sink
            that fails is dropped with one warning.
        say: gets a line of text for each event. Default ``print``; None for silence.
        samples: coordinates of each tensor whose GSS is followed, 0 for none. Default 64.
        ratio: an event when the largest entry of a tensor's gradient exceeds this many times its recent mean; above 1.
            Default 10.
        sigma, window: of the spike rate. Default 7 and 1000 (OLMo 2).
        parameters_every: least number of steps between two records with the numbers of every parameter. Default 10.
        lowbit: gives the state of quantised layers, asked at every drain; see `LowBit`.

    Raises:
        ValueError: a number out of range, or an optimizer without parameters. TypeError: ``optimizer`` is no torch
            Optimizer, ``model`` no Module, or an argument of another type than it must be.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        every: int = 10,
        sinks: Iterable[Sink | Path | str] | Sink | Path | str = (),
        say: Callable[[str], None] | None = print,
        samples: int = 64,
        ratio: float = 10.0,
        sigma: float = 7.0,
        window: int = 1000,
        parameters_every: int = 10,
        lowbit: LowBit | None = None,
    ) -> None:
        given = {"every": every, "say": say, "samples": samples, "ratio": ratio, "sigma": sigma, "window": window}
        options = checked_options("SpikeMonitor", given | {"parameters_every": parameters_every, "lowbit": lowbit})
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"SpikeMonitor: expected a torch optimizer, got {type(optimizer).__name__}")
        if not callable(getattr(model, "named_parameters", None)):
            raise TypeError(f"SpikeMonitor: expected a torch.nn.Module as the model, got {type(model).__name__}")
        optimizer = bare(optimizer)
        k = sum(len(group["params"]) for group in optimizer.param_groups)
        if not k:
            raise EvenstepError("SpikeMonitor: the optimizer has no parameters")
        every, samples, window = (options[name] for name in ("every", "samples", "window"))
        for name, each in {"every": len(COLUMNS) * k, "samples": k, "window": 2 * k + 3}.items():
            if options[name] * each > MOST:
                size = f"{8 * options[name] * each / 2**30:,.0f} GiB for {k} parameters"
                raise EvenstepError(
                    f"SpikeMonitor: {name}={options[name]} would take {size}; give at most {MOST // each}"
                )
        self.optimizer, self.say, self.lowbit = optimizer, say, lowbit
        self.show: Callable[[list[str], dict[str, Any]], None] | None = None
        self.step = 0  # the newest one seen
        self.lost = 0
        """Steps that could not be measured."""
        self.speaks = not (torch.distributed.is_available() and torch.distributed.is_initialized()) or (
            torch.distributed.get_rank() == 0
        )
        self.troubles = Troubles("SpikeMonitor")
        self.probe = Probe(optimizer, samples)
        self.names = parameter_names(model, optimizer)
        limits = {"ratio": options["ratio"], "sigma": options["sigma"], "window": window}
        self.detector = Detector(self.names, **limits, eps=_eps(optimizer))
        self.records = Records(len(self.names), options["parameters_every"])
        self.rows = torch.full((every, len(COLUMNS), len(self.names)), math.nan, device=self.probe.device)
        self.losses = torch.full((2, every), math.nan, device=self.probe.device)  # and rates that are on the device
        self.seen: list[dict[str, Any]] = []  # what the host knows of the rows in the buffer
        self.told: dict[str, Any] = {}
        self.stepping = self.looked = False
        self.weighed: int | None = None
        self.useless: set[str] = set()
        self.sinks = [guarded(sink) for sink in as_sinks("SpikeMonitor", sinks)] if self.speaks else []
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    # ---- at every step ----

    @torch._disable_dynamo
    def observe(self, loss: Tensor | float | None = None, *, rows: Rows | None = None, step: int | None = None) -> None:
        """Facts of the step that comes, before ``optimizer.step()``; of several calls the last counts. Its loss (one
        number; detached), the data rows behind it (the first, and one past the last; also a range, or the number of a
        single row), its number (default: one more than the last). ValueError or TypeError for what is none of these."""
        told = {"loss": _one_number(loss), "rows": _first_and_past(rows), "step": _step_number(step)}
        if step is not None and self.seen and told["step"] != self.step + 1:
            self.drain()  # records date their values by the first step: numbers must not jump within one
        self.told = told

    def _try(self, what: str, act: Callable[[], T], instead: T) -> T:
        """What ``act`` gives; where it fails, one warning and ``instead``."""
        try:
            return act()
        except Exception as problem:
            self.troubles.failed(what, problem)
            return instead

    @torch._disable_dynamo
    def _before(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """The hook before a step: ``args`` are the step's, the optimizer first."""
        self.looked = False
        self.stepping = not self._captured()
        if not self.stepping:
            self.troubles.tell("capture", "a captured graph runs no hooks when it is replayed: its steps are not seen")
            return None
        if callable(kwargs.get("closure")):
            return args, kwargs | {"closure": watched(kwargs["closure"], self._evaluated)}
        if len(args) > 1 and callable(args[1]):
            return (args[0], watched(args[1], self._evaluated), *args[2:]), kwargs
        self._look()
        return None

    def _captured(self) -> bool:
        """Whether a CUDA graph is being captured: nothing may be asked of the device meanwhile."""
        return self.probe.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    @torch._disable_dynamo
    def _evaluated(self, loss: Any) -> None:
        self._look()
        if self.told.get("loss") is None:
            with suppress(TypeError, ValueError):  # a closure may return what it likes
                self.told["loss"] = _one_number(loss)

    def _look(self) -> None:
        def look() -> bool:
            with torch.no_grad():
                if self.probe.follow():
                    self.rows, self.losses = self.rows.to(self.probe.device), self.losses.to(self.probe.device)
                self.probe.before(weights=not self.seen)
            return True

        self.looked = self._try("measure a step", look, False)
        if self.probe.strangers:
            self.troubles.tell(
                "strangers",
                f"{self.probe.strangers} parameters have joined the optimizer since the monitor was made and are not "
                "watched; make a new monitor to watch them",
            )

    @torch._disable_dynamo
    def _after(self, *_: Any) -> None:
        if not self.stepping:  # captured; or of a class whose step calls that of its base: both run the hooks
            return
        self.stepping = False
        told, self.told = self.told, {}
        step = told.get("step")
        self.step = self.step + 1 if step is None else step
        fact = {"step": self.step, "rows": told.get("rows"), "lr": None}

        def read() -> bool:
            i, loss = len(self.seen), told.get("loss")
            with torch.no_grad():
                if not i:
                    self.rows.fill_(math.nan)
                    self.losses.fill_(math.nan)
                if loss is not None:
                    self.losses[0, i] = loss
                fact["lr"] = self._rate(i)
                self.rows[i] = self.probe.after()
            return True

        if not self._try("measure a step", read, False) or not self.looked:
            fact["lost"] = True
            self._lose(1)
        self.looked = False
        self.seen.append(fact)
        if len(self.seen) == len(self.rows):
            self.drain()

    def _lose(self, steps: int) -> None:
        self.lost += steps
        self.records.lost += steps

    def _rate(self, i: int) -> float | None:
        """The largest learning rate; where it is on the device, it goes into the buffer."""
        rates = [group["lr"] for group in self.optimizer.param_groups if group.get("lr") is not None]
        away = [rate for rate in rates if isinstance(rate, Tensor) and rate.device.type != "cpu"]
        if away:
            self.losses[1, i] = torch.stack([rate.detach().reshape(()) for rate in away]).amax()
        here = [float(rate) for rate in rates if not isinstance(rate, Tensor) or rate.device.type == "cpu"]
        return max(here, default=None)

    # ---- at log steps ----

    @torch._disable_dynamo
    def drain(self) -> list[Event]:
        """Bring the buffer over, find events, write records; returns the events. One transfer from the device, a second
        one when gradients have begun not to be finite; a message between ranks if parameters are sharded."""
        if not self.seen:
            return []
        try:
            with torch.no_grad():
                return self._drain()
        except Exception as problem:
            self.troubles.failed("bring its numbers over", problem)
            self._lose(sum("lost" not in fact for fact in self.seen))
            return []
        finally:
            self.seen.clear()

    def _drain(self) -> list[Event]:
        n = len(self.seen)
        weigh = self.weighed is None or self.step - self.weighed >= WEIGHTS_EVERY
        nothing: list[tuple[str, str, Tensor]] = []
        values = self._try("ask lowbit for its numbers", self._lowbit_values, nothing) if self.lowbit else nothing
        parts = [self.probe.agree(self.rows[:n]).flatten(), self.losses[:, :n].flatten()]
        parts += [self.probe.weigh().flatten()] if weigh else []
        parts += [value for _, _, value in values]
        numbers = torch.cat(parts).cpu().numpy().astype("float64")
        rows = numbers[: self.rows[:n].numel()].reshape(n, len(COLUMNS), -1)
        rest = numbers[rows.size :]
        losses, rates, rest = rest[:n], rest[n : 2 * n], rest[2 * n :]
        weights = None
        if weigh:
            weights, rest = rest[: 2 * len(self.names)].reshape(2, -1), rest[2 * len(self.names) :]
        events: list[Event] = []
        steps = [fact["step"] for fact in self.seen]
        reset_steps = self._try("read when moments are reset", lambda: resets(self.optimizer, steps), set[int]())
        for fact, row, loss, rate in zip(self.seen, rows, losses, rates, strict=True):
            columns = dict(zip(COLUMNS, row, strict=True))
            fact["lr"] = float(np.fmax(math.nan if fact["lr"] is None else fact["lr"], rate))
            events += self.detector.feed(fact["step"], columns, float(loss), fact["rows"])
            if fact["step"] in reset_steps:
                events.append({"kind": "event", "event": "reset", "step": fact["step"]})
            self.records.add(fact, columns, float(loss))
        if weights is None and self.detector.unsure:
            weights = self.probe.weigh().cpu().numpy().astype("float64")
        if weights is not None:
            self.weighed, self.records.weight_rms = self.step, weights[0]
            events += self.detector.weighed(self.step, *np.where(self.probe.trained(), weights, 0.0))
        written = [self.records.window(self.detector.spike_rates()[-1])]
        if self.records.due():
            written += self.records.parameters(self.detector.spike_rates()[:-1])
        if values:
            record = lowbit_record(self.step, [(*place[:2], x) for place, x in zip(values, rest, strict=True)])
            found, self.useless = lowbit_events(record, self.useless)
            written.append(record)
            events += found
        self._publish(written, events)
        return events

    def _lowbit_values(self) -> list[tuple[str, str, Tensor]]:
        """Layer, key and number of all that `lowbit` gives."""
        assert self.lowbit is not None
        values = []
        for layer, found in self.lowbit().items():
            for key, value in found.items():
                if key in LOWBIT_KEYS:
                    values.append((layer, key, torch.as_tensor(value).detach().reshape(1).to(self.losses)))
                else:
                    known = ", ".join(LOWBIT_KEYS)
                    self.troubles.tell(
                        f"lowbit {key}", f"lowbit gives '{layer}' the unknown key '{key}'; known are {known}"
                    )
        return values

    def _publish(self, written: list[dict[str, Any]], events: list[Event]) -> None:
        if not self.records.started:
            self.records.started = True
            before = max(0, written[0]["first"] - 1) if written else 0
            written.insert(0, start_record(self.names, self.optimizer, self.probe.params, self.detector, before))
        for record in [*written, *events]:
            for sink in self.sinks:
                sink.write(record)
        for record in written:
            if self.show and record["kind"] == "parameters":
                self._speak(self.show, self.names, record)
        if self.say and self.speaks:
            told = [event for event in events if event["event"] != "reset"]
            for event in told[:LINES]:
                self._speak(self.say, event_line(event))
            if len(told) > LINES:
                self._speak(self.say, f"and {len(told) - LINES} more events up to step {self.step}")

    def _speak(self, how: Callable[..., None], *what: Any) -> None:
        self._try("print an event", lambda: how(*what), None)

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

        def rest() -> None:
            written = self.records.parameters(self.detector.spike_rates()[:-1]) if self.records.pending else []
            events = self.detector.end()
            if written or events:
                self._publish(written, events)

        self._try("write its last numbers", rest, None)

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
        if plain_names(state["names"]) != plain_names(self.names):
            raise EvenstepError("SpikeMonitor: the saved state is of a model with other parameters")
        self.step, self.weighed, self.useless = state["step"], state["weighed"], set(state["useless"])
        if state["probe"] is not None:
            self.probe.load(state["probe"])
        self.detector.load(_loaded(state["detector"]))
        self.records.load(_loaded(state["records"]))


def _eps(optimizer: Optimizer) -> Any:
    """``eps`` of each parameter, 0 where its group has none that is a number."""
    given = [(group.get("eps"), len(group["params"])) for group in optimizer.param_groups]
    return np.concatenate([np.full(n, eps if isinstance(eps, int | float) and eps > 0 else 0.0) for eps, n in given])


def _one_number(loss: Any) -> Tensor | float | None:
    if loss is None or isinstance(loss, float):
        return loss
    if isinstance(loss, Tensor):
        loss = loss.detach()
        if is_sharded(loss):
            loss = loss.full_tensor()
        if loss.numel() != 1:
            raise EvenstepError(f"SpikeMonitor.observe: loss must be one number, got the shape {list(loss.shape)}")
        if loss.is_complex():
            raise TypeError("SpikeMonitor.observe: loss must be a real number, got a complex one")
        return loss.reshape(())
    shape = getattr(loss, "shape", ())
    if getattr(loss, "size", 1) != 1:
        raise EvenstepError(f"SpikeMonitor.observe: loss must be one number, got the shape {list(shape)}")
    try:
        if isinstance(loss, str | bytes):
            raise TypeError
        return float(loss.item() if shape else loss)
    except (TypeError, ValueError):
        raise TypeError(
            f"SpikeMonitor.observe: loss must be one number, got {type(loss).__name__}; give loss.item() or None"
        ) from None


def _whole(value: Any, what: str) -> int:
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"SpikeMonitor.observe: {what} must be whole numbers, got {value!r:.80}") from None
    if number < 0:
        raise EvenstepError(f"SpikeMonitor.observe: {what} must be at least 0, got {number}")
    return number


def _step_number(step: Any) -> int | None:
    return None if step is None else _whole(step, "step numbers")


def _first_and_past(rows: Any) -> tuple[int, int] | None:
    """The first row and one past the last."""
    if rows is None:
        return None
    if isinstance(rows, range | slice):
        if rows.step not in (None, 1):
            raise EvenstepError(f"SpikeMonitor.observe: rows={rows!r} leaves rows out; give (first, one past the last)")
        rows = (0 if rows.start is None else rows.start, rows.stop)
    if not hasattr(rows, "__len__") or getattr(rows, "shape", None) in ((), torch.Size([])):
        first = _whole(rows, "rows")
        return first, first + 1
    if isinstance(rows, str | bytes | Mapping | set) or len(rows) != 2:
        raise TypeError(
            f"SpikeMonitor.observe: rows={rows!r:.80} must be (first, one past the last), or a row's number"
        )
    first, past = (_whole(row, "rows") for row in rows)
    if past <= first:
        raise EvenstepError(f"SpikeMonitor.observe: rows={rows!r} holds no row; give (first, one past the last)")
    return first, past


def _saved(state: Any) -> Any:
    """Arrays as tensors, which a checkpoint can hold."""
    if isinstance(state, dict):
        return {key: _saved(value) for key, value in state.items()}
    return torch.from_numpy(state) if hasattr(state, "__array__") and not isinstance(state, Tensor) else state


def _loaded(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _loaded(value) for key, value in state.items()}
    return state.numpy() if isinstance(state, Tensor) else state
