"""The telemetry of a run: its monitor, the sinks that its configuration asks for, and its lines in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from evenstep.lowbit.metrics import Metrics, lowbit_metrics, observe_gradients
from evenstep.telemetry.monitor import SpikeMonitor
from evenstep.telemetry.sinks import Guarded, TensorBoardSink, TrackioSink, WandbSink, opened
from evenstep.train.config_io import to_tables
from evenstep.train.interrupts import Interrupted
from evenstep.train.log import LineProgress

if TYPE_CHECKING:
    from evenstep.train.run import Run


DRAIN_STEPS = 1000
"""Steps that are kept on the device before they are read, at most: their numbers take memory."""


class LowBitNoise:
    """What quantisation does to every low-bit layer, as `SpikeMonitor` takes it: ``saturation``, ``underflow`` and
    ``error`` of the weight and, where the recipe quantises gradients, ``gradient_error``.

    Asked at every drain, where it takes up to a tenth of a step. The gradients exist within the backward pass alone:
    those of log steps are looked at, in eager mode. Named recipes round weights to the nearest, and the rounding of
    gradients is drawn here from a generator apart, so the run is the same to the bit without telemetry.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self.generator = torch.Generator(device).manual_seed(0)
        self.gradients: Metrics = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around a forward and backward pass."""
        with observe_gradients(self.model, self.generator) as found:
            yield
        self.gradients = found

    def __call__(self) -> dict[str, dict[str, Tensor]]:
        layers = {
            layer: {"saturation": of["saturation"], "underflow": of["underflow"], "error": of["relative_error"]}
            for layer, of in lowbit_metrics(self.model).items()
        }
        for layer, of in self.gradients.items():
            layers.setdefault(layer, {})["gradient_error"] = of["relative_error"]
        return layers


class RunTelemetry:
    """Made with the run; ``monitor`` is None where ``telemetry.enabled`` is false."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.sinks: list[Guarded] = []
        config = run.config.telemetry
        self.monitor = None
        # Of a sharded matrix only a part is here, and its scales are those of the whole.
        self.noise = None
        if run.config.lowbit and config.enabled and not run.parallel.sharded:
            self.noise = LowBitNoise(run.model, run.device)
        if config.enabled:
            self.monitor = SpikeMonitor(
                run.model,
                run.optimizer,
                every=min(run.config.log.every, DRAIN_STEPS),
                sinks=[self],
                say=None,
                samples=config.samples,
                ratio=config.ratio,
                sigma=config.sigma,
                window=config.window,
                parameters_every=config.every,
                lowbit=self.noise,
            )

    def watching(self, log_step: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a step."""
        if self.noise is None or not log_step or self.run.config.train.compile:
            return nullcontext()
        return self.noise.watching()

    def observe(self, loss: Tensor, position: int) -> None:
        """Before the optimizer's step: its loss, and the loader's position before its batch."""
        if self.monitor:
            rows = (position, position + self.run.config.train.batch_size)
            self.monitor.observe(loss, rows=rows, step=self.run.step_number + 1)

    def write(self, record: dict[str, Any]) -> None:
        """A record of any kind into metrics.jsonl and the other sinks."""
        self.run.metrics.write(record)
        for sink in self.sinks:
            sink.write(record)

    def close(self) -> None:
        """The run closes its own files; what `live` opened it closes."""

    def settle(self, *, last: bool) -> None:
        """Write what has been seen. ``last``: also what waits for the next step, which may never come."""
        if self.monitor:
            self.monitor.flush() if last else self.monitor.drain()

    @contextmanager
    def live(self, progress: LineProgress) -> Iterator[None]:
        """While the run trains: sinks are open, events are told. Whatever ends it, the last steps are not lost: they
        are in the checkpoint, or written here."""
        self.sinks = self._open()
        if self.monitor:
            self.monitor.say, self.monitor.show = progress.say, progress.parameters
        try:
            yield
        except (Interrupted, KeyboardInterrupt):
            raise
        except Exception:
            if self.run.saved is None:
                self.settle(last=True)
            raise
        finally:
            for sink in self.sinks:
                sink.close()
            self.sinks = []

    def _open(self) -> list[Guarded]:
        run, config = self.run, self.run.config.telemetry
        name, tables = str(run.config.name), to_tables(run.config)
        builders: list[tuple[bool, str, Any]] = [
            (config.tensorboard, "tensorboard", lambda: TensorBoardSink(run.out / "tensorboard")),
            (config.wandb != "off", "wandb", lambda: WandbSink(run.out, name, mode=config.wandb, config=tables)),
            (config.trackio, "trackio", lambda: TrackioSink(name, config=tables)),
        ]
        found = [opened(build, package) for wanted, package, build in builders if wanted and run.world.speaks]
        return [sink for sink in found if sink is not None]

    def state(self) -> dict[str, Any] | None:
        return self.monitor.state_dict() if self.monitor else None

    def load(self, state: dict[str, Any] | None) -> None:
        """None: the checkpoint was written without telemetry, which then starts with this step."""
        if not self.monitor:
            return
        self.monitor.seen.clear()
        self.monitor.step = self.run.step_number
        # Another kind of parallelism may have put the parameters into another order.
        if state is not None and list(state["names"]) == self.monitor.names:
            self.monitor.load_state_dict(state)
