"""SpikeMonitor: measures every step of an optimizer, finds events such as gradient spikes, and writes records.

A step writes one row of numbers into a buffer on the device (probe.py) and never waits for the device. When the buffer
is full, or at `SpikeMonitor.drain`, the buffer comes to the host in one transfer; the host then finds the events
(detect.py), makes records (schema.py) and passes them to the sinks (sinks.py).

Two rules hold everywhere in this file. The monitor changes nothing: no gradient, weight or random number of the run.
And it never ends a training: a failure within ``optimizer.step()`` is caught, counted, and reported once as a warning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable would import Dynamo, which takes seconds
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from evenstep.errors import EvenstepError
from evenstep.telemetry.activations import ActivationProbe, Sample
from evenstep.telemetry.clocks import resets
from evenstep.telemetry.detect import LIMITS, Detector, Event, Warnings, lowbit_events
from evenstep.telemetry.lines import event_line
from evenstep.telemetry.options import Rows, checked_loss, checked_options, checked_rows, checked_step
from evenstep.telemetry.probe import Probe
from evenstep.telemetry.records import Records, activations_record, lowbit_record
from evenstep.telemetry.schema import COLUMNS, HEAD_KEYS, LOWBIT_KEYS, VERSION, Record
from evenstep.telemetry.sinks import Sink, as_sinks, guarded
from evenstep.telemetry.subject import bare, parameter_names, plain_name, plain_names, watched
from evenstep.telemetry.trouble import Troubles

T = TypeVar("T")

WEIGHTS_EVERY = 250
"""Steps between two measurements of all weights, which change slowly and take two passes to measure."""

LINES = 3
"""Events printed at one transfer; a last line counts the others."""

MOST = 2**30
"""Largest number of entries of one buffer: 8 GiB in fp64."""

LowBit = Callable[[], Mapping[str, Mapping[str, "float | Tensor"]]]
"""Returns the state of quantised layers: layer -> key -> a number or a 0-d tensor. The keys are ``saturation`` and
``underflow`` (shares of entries), ``error`` and ``gradient_error`` (2-norm of the quantisation noise over that of the
values), or some of these."""


class SpikeMonitor:
    """Watches the steps of an optimizer, from construction until `close`. A context manager.

    Construct the monitor, then train as before; it works through hooks of the optimizer. `observe`, called before
    ``optimizer.step()``, adds the loss to the events. Each ``optimizer.step()`` is one step, however many backward
    passes it follows. The first one has the number 1 unless `observe` passes another.

    * A step that gets a closure (as under Lightning) is measured after the first call of the closure, whose value is
      the loss of the step unless `observe` was called.
    * accelerate's wrapper of an optimizer is looked through. Compiled steps are measured between their graphs, which
      excludes ``fullgraph=True``. A CUDA graph runs no hooks when it is replayed: its steps are not measured.
    * Under DDP and FSDP2 every rank constructs a monitor. Numbers are those of whole tensors; rank 0 alone writes and
      prints.
    * Parameters whose entries cannot be read (int8, bool, fp8, some subclasses of Tensor) are skipped.

    Args:
        model: provides the names of the parameters, without the parts that wrappers add (DDP, FSDP, torch.compile,
            activation checkpointing).
        optimizer: any torch optimizer. Statistics come from its ``stats`` if it is of evenstep; otherwise the monitor
            measures gradients, with one pass over them in each step.
        every: steps between two transfers from the device, and so between records. Default 10.
        sinks: destinations of the records: paths of files, which get one line of JSON for each record, or sinks (see
            `evenstep.telemetry.sinks`). A sink that fails is dropped, with one warning.
        say: called with one line of text for each event. Default ``print``; None prints nothing.
        samples: number of coordinates of each tensor whose GSS is computed, 0 for none. Default 64.
        ratio: a tensor spikes when the largest entry of its gradient exceeds this multiple of the entry's recent mean;
            above 1. Default 10.
        sigma, window: standard deviations and steps of the spike rate. Default 7 and 1000 (OLMo 2, arXiv:2501.00656).
        parameters_every: least number of steps between two records with the numbers of every parameter. Default 10.
        lowbit: returns the state of quantised layers, called at every transfer; see `LowBit`.
        activations: steps between two measurements inside the forward pass (`evenstep.telemetry.activations`), which
            give early warnings; 0 (default) for none.

    Attributes:
        step: number of the newest step.
        lost: number of steps that could not be measured. Each reason is reported in one warning.

    Raises:
        ValueError: a number is out of range, or the optimizer has no parameters.
        TypeError: ``optimizer`` is no torch Optimizer, ``model`` no Module, or another argument has a wrong type.

    >>> model = nn.Linear(2, 1)
    >>> _ = nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    >>> with SpikeMonitor(model, optimizer) as monitor:  # sinks="metrics.jsonl" writes a file for evenstep report
    ...     for step in range(1, 31):
    ...         x = torch.full((4, 2), 50.0 if step == 25 else 1.0)  # batch 25 is an outlier
    ...         loss = (model(x) - 1.0).abs().mean()
    ...         optimizer.zero_grad()
    ...         loss.backward()
    ...         monitor.observe(loss, rows=(4 * step, 4 * step + 4))
    ...         optimizer.step()
    step 25 loss spike, loss 0.655 -> 23.24, largest gradient in weight (x50.0), data rows 100-104
    step 25 spike x50 in weight, loss 0.31 -> 1.29, data rows 100-104
    step 26 the loss has recovered, 1 steps after its spike at 25
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
        activations: int = 0,
    ) -> None:
        given: dict[str, Any] = {
            "every": every,
            "say": say,
            "samples": samples,
            "ratio": ratio,
            "sigma": sigma,
            "window": window,
        }
        given |= {"parameters_every": parameters_every, "lowbit": lowbit, "activations": activations}
        options = checked_options("SpikeMonitor", given)
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
        self.step = self.lost = 0
        self.speaks = not (torch.distributed.is_available() and torch.distributed.is_initialized()) or (
            torch.distributed.get_rank() == 0
        )
        self.troubles = Troubles("SpikeMonitor")
        self.probe = Probe(optimizer, samples)
        self.names = parameter_names(model, optimizer)
        limits = {"ratio": options["ratio"], "sigma": options["sigma"], "window": window}
        self.detector = Detector(self.names, **limits, eps=_eps(optimizer))
        self.warnings = Warnings()
        self.records = Records(len(self.names), options["parameters_every"])
        # The buffer on the device, filled row by row: numbers of each step [every, columns, k]; losses and those
        # learning rates that are on the device [2, every].
        self.rows = torch.full((every, len(COLUMNS), len(self.names)), math.nan, device=self.probe.device)
        self.losses = torch.full((2, every), math.nan, device=self.probe.device)
        self.seen: list[dict[str, Any]] = []  # facts of the rows in the buffer that the host knows: step, rows, lr
        self.observed: dict[str, Any] = {}  # what `observe` was told of the next step
        self.stepping = False  # between the two hooks of a step
        self.looked = False  # whether the gradients of this step have been measured
        self.weighed: int | None = None  # step of the newest measurement of all weights
        self.useless: set[str] = set()  # layers whose quantised gradients are useless
        self.sinks = [guarded(sink) for sink in as_sinks("SpikeMonitor", sinks)] if self.speaks else []
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        self.activations_every: int = options["activations"]
        self.activations = self._attached(model) if self.activations_every else None

    def _attached(self, model: nn.Module) -> ActivationProbe | None:
        probe = self._try("attach to the forward pass", lambda: ActivationProbe(model, self.troubles), None)
        if probe is not None:
            probe.arm(self.activations_every == 1)
        return probe

    # ---- at every step ----

    @_disable_dynamo
    def observe(self, loss: Tensor | float | None = None, *, rows: Rows | None = None, step: int | None = None) -> None:
        """Describe the next step, before ``optimizer.step()``. Of several calls the last one counts.

        Args:
            loss: its loss, one number. A tensor is detached and stays on its device.
            rows: its data rows: (first, one past the last), a range, or the number of a single row.
            step: its number. Default: one more than the last. A loop that counts its steps from 0 passes them here.

        Raises:
            ValueError, TypeError: an argument is none of these.
        """
        observed = {"loss": checked_loss(loss), "rows": checked_rows(rows), "step": checked_step(step)}
        if step is not None and self.seen and observed["step"] != self.step + 1:
            self.drain()  # a record holds its first step and a list of values: numbers must not jump within it
        self.observed = observed

    def record(self, event: Mapping[str, Any]) -> None:
        """Write a decision of a `SpikeGuard`: ``SpikeGuard(model, optimizer, on_event=monitor.record)``. The monitor
        does not see a step that a guard leaves out, since the optimizer does not take it.

        Args:
            event: an element of `SpikeGuard.events`. ``bad_step`` of the record is the monitor's number of the step,
                which counts taken steps only. ``rows`` are written if `observe` would accept them.
        """
        facts = {key: event[key] for key in ("action", "reason", "to") if key in event}
        with suppress(TypeError, ValueError):  # a guard's rows may be anything hashable
            facts["rows"] = checked_rows(event.get("rows"))
        self.drain()  # the steps before it come first
        bad_step = self.step + 1 - event.get("late", 0)
        decision = {"kind": "event", "event": "guard", "step": self.step, "bad_step": bad_step, **facts}
        self._try("write a decision of the guard", lambda: self._publish([], [decision]), None)

    def arm(self, on: bool = True) -> None:
        """Measure the next forward pass if it belongs to a step that is sampled, and forget what has been measured
        since the last step. ``on=False``: measure no pass until the step is done.

        A loop that repeats a batch, or that runs other passes of the model in training mode between steps, calls this
        around the pass of the step. All others need not: each step prepares the next one.
        """
        if self.activations is not None:
            self.activations.arm(on and (self.step + 1) % self.activations_every == 0)

    def _try(self, what: str, act: Callable[[], T], instead: T) -> T:
        """The result of ``act``. If it raises: one warning that the monitor could not do ``what``, and ``instead``."""
        try:
            return act()
        except Exception as problem:
            self.troubles.failed(what, problem)
            return instead

    @_disable_dynamo
    def _before(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """The hook before a step. ``args`` and ``kwargs`` are those of ``step``, the optimizer first; the hook returns
        them changed where it wraps a closure."""
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
        """Whether a CUDA graph is being captured, which allows no synchronisation and would record the monitor's own
        kernels."""
        return self.probe.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    @_disable_dynamo
    def _evaluated(self, loss: Any) -> None:
        """After the first call of a closure, which returned ``loss``: gradients exist now."""
        self._look()
        if self.observed.get("loss") is None:
            with suppress(TypeError, ValueError):  # a closure may return anything
                self.observed["loss"] = checked_loss(loss)

    def _look(self) -> None:
        """Measure the gradients, before the optimizer uses them."""

        def look() -> bool:
            with torch.no_grad():
                if self.probe.follow():
                    self.rows, self.losses = self.rows.to(self.probe.device), self.losses.to(self.probe.device)
                self.probe.before(weights=not self.seen)  # updates are sampled on the first step of each buffer
            return True

        self.looked = self._try("measure a step", look, False)
        if self.probe.strangers:
            self.troubles.tell(
                "strangers",
                f"{self.probe.strangers} parameters have joined the optimizer since the monitor was made and are not "
                "watched; make a new monitor to watch them",
            )

    @_disable_dynamo
    def _after(self, *_: Any) -> None:
        """The hook after a step: write its row into the buffer."""
        # Not stepping: the step was captured, or this is the outer of two hooks. A class whose ``step`` calls that of
        # its base class runs both hooks twice for one step.
        if not self.stepping:
            return
        self.stepping = False
        observed, self.observed = self.observed, {}
        step = observed.get("step")
        self.step = self.step + 1 if step is None else step
        fact = {"step": self.step, "rows": observed.get("rows"), "lr": None}
        if self.activations is not None:
            fact["activations"] = self._try("keep its numbers of the forward pass", self.activations.take, None)
            self.arm()

        def read() -> bool:
            i, loss = len(self.seen), observed.get("loss")
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
        """The largest learning rate of the groups that keep it on the host. One that is a tensor on the device goes
        into row ``i`` of the buffer instead: reading it here would synchronise. Groups with an ``lr_scale`` (an
        embedding that learns 10 times as fast) are left out, unless all have one."""
        groups = [group for group in self.optimizer.param_groups if group.get("lr") is not None]
        rates = [group["lr"] for group in [g for g in groups if g.get("lr_scale") is None] or groups]
        away = [rate for rate in rates if isinstance(rate, Tensor) and rate.device.type != "cpu"]
        if away:
            self.losses[1, i] = torch.stack([rate.detach().reshape(()) for rate in away]).amax()
        here = [float(rate) for rate in rates if not isinstance(rate, Tensor) or rate.device.type == "cpu"]
        return max(here, default=None)

    # ---- at a transfer to the host ----

    @_disable_dynamo
    def drain(self) -> list[Event]:
        """Transfer the buffer to the host, find events and write records; returns the events.

        This waits for the device: one transfer, and a second one when gradients have just become not finite. If
        parameters are sharded it also communicates, so every rank must call it at the same step.
        """
        if not self.seen:
            return []
        try:
            with torch.no_grad():
                return self._drain()
        except Exception as problem:
            self.troubles.failed("transfer its numbers to the host", problem)
            self._lose(sum("lost" not in fact for fact in self.seen))
            return []
        finally:
            self.seen.clear()

    def _drain(self) -> list[Event]:
        n = len(self.seen)
        # 1. Everything that comes from the device, concatenated into one tensor: one synchronisation.
        weigh = self.weighed is None or self.step - self.weighed >= WEIGHTS_EVERY
        nothing: list[tuple[str, str, Tensor]] = []
        values = self._try("ask lowbit for its numbers", self._lowbit_values, nothing) if self.lowbit else nothing
        parts = [self.probe.agree(self.rows[:n]).flatten(), self.losses[:, :n].flatten()]
        parts += [self.probe.weigh().flatten()] if weigh else []
        samples: list[tuple[dict[str, Any], Sample]] = [
            (fact, sample) for fact in self.seen if (sample := fact.pop("activations", None)) is not None
        ]
        parts += [value for _, _, value in values] + [sample[1].to(self.losses) for _, sample in samples]
        numbers = torch.cat(parts).cpu().numpy().astype("float64")
        # 2. The same parts as NumPy arrays: rows [n, columns, k], losses and rates [n], weights [2, k], low-bit values,
        # and the numbers of the sampled forward passes.
        rows = numbers[: self.rows[:n].numel()].reshape(n, len(COLUMNS), -1)
        rest = numbers[rows.size :]
        losses, rates, rest = rest[:n], rest[n : 2 * n], rest[2 * n :]
        weights = None
        if weigh:
            weights, rest = rest[: 2 * len(self.names)].reshape(2, -1), rest[2 * len(self.names) :]
        # 3. Events, and one row of each record, step by step.
        events: list[Event] = []
        steps = [fact["step"] for fact in self.seen]
        reset_steps = self._try("read when moments are reset", lambda: resets(self.optimizer, steps), set[int]())
        for fact, row, loss, rate in zip(self.seen, rows, losses, rates, strict=True):
            columns = dict(zip(COLUMNS, row, strict=True))
            # fmax ignores NaN: the larger of the rates on the host and on the device, if there are both.
            fact["lr"] = float(np.fmax(math.nan if fact["lr"] is None else fact["lr"], rate))
            events += self.detector.feed(fact["step"], columns, float(loss), fact["rows"])
            if fact["step"] in reset_steps:
                events.append({"kind": "event", "event": "reset", "step": fact["step"]})
            self.records.add(fact, columns, float(loss))
        if weights is None and self.detector.unsure:  # a gradient was not finite: are the weights still?
            weights = self.probe.weigh().cpu().numpy().astype("float64")
        rest, passes = rest[: len(values)], rest[len(values) :]
        if weights is not None:
            self.weighed, self.records.weight_rms = self.step, weights[0]
            events += self.detector.weighed(self.step, *np.where(self.probe.trained(), weights, 0.0))
        # 4. The records that are due.
        written = [self.records.window(self.detector.spike_rates()[-1])]
        if self.records.due():
            written += self.records.parameters(self.detector.spike_rates()[:-1])
        for fact, (layout, _) in samples:
            sizes = [size for _, _, size in layout]
            mine, passes = np.split(passes, [sum(sizes)])
            vectors = np.split(mine, np.cumsum(sizes)[:-1])
            measured = [(name, key, x) for (name, key, _), x in zip(layout, vectors, strict=True)]
            written.append(activations_record(fact["step"], [(name, key, x.tolist()) for name, key, x in measured]))
            events += self._pass_warnings(fact, measured)
        if self.activations_every:
            events += self._update_warnings(rows[:, COLUMNS.index("update_rms")])
        if values:
            named = [(plain_name(layer), key, x) for (layer, key, _), x in zip(values, rest, strict=True)]
            record = lowbit_record(self.step, named)
            found, self.useless = lowbit_events(record, self.useless)
            written.append(record)
            events += found
        self._publish(written, events)
        return events

    def _lowbit_values(self) -> list[tuple[str, str, Tensor]]:
        """(layer, key, number) of all that ``lowbit`` returns, numbers as tensors ``[1]`` on the probe's device."""
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

    def _pass_warnings(self, fact: dict[str, Any], measured: list[tuple[str, str, Any]]) -> list[Event]:
        """The warnings of a forward pass, ``measured``: (module, key, vector)."""
        events = []
        for quantity in LIMITS:
            found = [(name, x) for name, key, x in measured if key == quantity]
            if not found:
                continue
            names, vectors = [name for name, _ in found], [x for _, x in found]
            heads = np.array([int(x.argmax()) for x in vectors]) if quantity in HEAD_KEYS else None
            largest = np.array([x.max() for x in vectors])
            events += self.warnings.feed(fact["step"], quantity, names, largest, heads)
        rows = {"rows": list(fact["rows"])} if fact["rows"] else {}
        return [event | rows for event in events]

    def _update_warnings(self, updates: Any) -> list[Event]:
        """The warnings of updates that are large for their weights, from the RMS of updates ``[n, k]``."""
        known = np.isfinite(updates)
        mean = np.divide(
            np.where(known, updates, 0.0).sum(0), known.sum(0), where=known.any(0), out=np.full(known.shape[1], np.nan)
        )
        # Norms and biases begin at one or at zero, where the ratio means little.
        matrices = np.array([not is_lazy(p) and p.dim() >= 2 for p in self.probe.params])
        ratio = np.divide(
            mean,
            self.records.weight_rms,
            where=matrices & (self.records.weight_rms > 0),
            out=np.full_like(mean, np.nan),
        )
        return self.warnings.feed(self.step, "update_ratio", self.names, ratio)

    def _publish(self, written: list[Record], events: list[Event]) -> None:
        """Pass records and events to the sinks, to ``show`` and to ``say``."""
        if not self.records.started:
            self.records.started = True
            before = max(0, written[0]["first"] - 1) if written else 0
            written.insert(0, self._start_record(before))
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

    def _start_record(self, step: int) -> Record:
        """The record before all others: the names to which the vectors of later records belong, and the rules."""
        rules = {"ratio": self.detector.ratio, "sigma": self.detector.sigma, "window": len(self.detector.flags.values)}
        return {
            "kind": "start",
            "step": step,
            "version": VERSION,
            "optimizer": type(self.optimizer).__name__,
            "names": self.names,
            "shapes": [[] if is_lazy(p) else list(p.shape) for p in self.probe.params],
            "rules": rules,
        }

    def _speak(self, how: Callable[..., None], *what: Any) -> None:
        self._try("print an event", lambda: how(*what), None)

    def close(self, *, flush: bool = True) -> None:
        """Write what is left, close the sinks and remove the hooks. A second call has no effect.

        Args:
            flush: False discards the buffer. Needed where one of several processes fails: the numbers of sharded
                tensors would wait for the other processes.
        """
        for handle in self._handles:
            handle.remove()
        if self.activations is not None:
            self.activations.close()
        if self._handles:
            self._handles = []
            if flush:
                self.flush()
        for sink in self.sinks:
            sink.close()

    def flush(self) -> None:
        """Write everything up to now, including the spike that waits for the loss of the next step."""
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
        """Everything that later records depend on, in types that ``torch.load(weights_only=True)`` reads. Calls
        `drain` first."""
        self.drain()
        return {
            "step": self.step,
            "names": self.names,
            "weighed": self.weighed,
            "useless": sorted(self.useless),
            "probe": self.probe.state(),
            "detector": _saved(self.detector.state()),
            "records": _saved(self.records.state()),
            "warnings": _saved(self.warnings.state()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, so that baselines continue after a resume.

        ``state["probe"]`` may be None, where the sampled coordinates are not those of this process. Raises ValueError
        for the state of a model with other parameters.
        """
        if plain_names(state["names"]) != plain_names(self.names):
            raise EvenstepError("SpikeMonitor: the saved state is of a model with other parameters")
        self.step, self.weighed, self.useless = state["step"], state["weighed"], set(state["useless"])
        if state["probe"] is not None:
            self.probe.load(state["probe"])
        self.detector.load(_loaded(state["detector"]))
        self.records.load(_loaded(state["records"]))
        if "warnings" in state:  # states of older versions have none
            self.warnings.load(_loaded(state["warnings"]))
        self.arm()


def _eps(optimizer: Optimizer) -> Any:
    """``eps`` of each parameter ``[k]``; 0 where its group has no positive number of this name."""
    given = [(group.get("eps"), len(group["params"])) for group in optimizer.param_groups]
    return np.concatenate([np.full(n, eps if isinstance(eps, int | float) and eps > 0 else 0.0) for eps, n in given])


def _saved(state: Any) -> Any:
    """``state`` with tensors in place of arrays, which ``weights_only=True`` does not load."""
    if isinstance(state, dict):
        return {key: _saved(value) for key, value in state.items()}
    return torch.from_numpy(state) if hasattr(state, "__array__") and not isinstance(state, Tensor) else state


def _loaded(state: Any) -> Any:
    """The inverse of `_saved`."""
    if isinstance(state, dict):
        return {key: _loaded(value) for key, value in state.items()}
    return state.numpy() if isinstance(state, Tensor) else state
