"""The telemetry of a run: its monitor, the sinks that its configuration asks for, and its lines in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evenstep.lowbit.metrics import Metrics, lowbit_metrics, observe_gradients
from evenstep.telemetry.monitor import SpikeMonitor
from evenstep.telemetry.sinks import Guarded, TensorBoardSink, TrackioSink, WandbSink, opened
from evenstep.train.config import BaseConfig
from evenstep.train.config_io import to_tables
from evenstep.train.interrupts import Interrupted
from evenstep.train.log import LineProgress

DRAIN_STEPS = 1000
"""The largest number of steps whose values stay on the device before they are read; they take memory."""


class LowBitNoise:
    """The quantisation error of every low-bit layer, in the form that `SpikeMonitor` takes: ``saturation``,
    ``underflow`` and ``error`` of the weight and, where the recipe quantises gradients, ``gradient_error``.

    Measured at every drain, where it takes up to a tenth of a step. Gradients exist within the backward pass alone:
    those of log steps are observed, in eager mode. Named recipes round weights to the nearest, and the rounding of
    gradients draws from a generator of its own, so the run is bitwise the same without telemetry.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self.generator = torch.Generator(device).manual_seed(0)
        self.gradients: Metrics = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around a forward and backward pass."""
        with observe_gradients(self.model, self.generator) as gradients:
            yield
        self.gradients = gradients

    def __call__(self) -> dict[str, dict[str, Tensor]]:
        layers = {
            layer: {"saturation": of["saturation"], "underflow": of["underflow"], "error": of["relative_error"]}
            for layer, of in lowbit_metrics(self.model).items()
        }
        for layer, of in self.gradients.items():
            layers.setdefault(layer, {})["gradient_error"] = of["relative_error"]
        return layers


class RunTelemetry:
    """Made with the run; ``monitor`` is None where ``telemetry.enabled`` is false. ``write_metrics`` writes a record
    into metrics.jsonl."""

    def __init__(
        self,
        config: BaseConfig,
        model: Any,
        optimizer: Optimizer,
        device: torch.device,
        *,
        sharded: bool,
        write_metrics: Callable[[dict[str, Any]], None],
    ) -> None:
        self.config, self.write_metrics = config, write_metrics
        self.sinks: list[Guarded] = []
        self.monitor = None
        self.noise = None
        telemetry = config.telemetry
        # A process holds only a part of a sharded matrix, whose scales are those of the whole.
        if config.lowbit and telemetry.enabled and not sharded:
            self.noise = LowBitNoise(model, device)
        if telemetry.enabled:
            self.monitor = SpikeMonitor(
                model,
                optimizer,
                every=min(config.log.every, DRAIN_STEPS),
                sinks=[self],
                say=None,
                samples=telemetry.samples,
                ratio=telemetry.ratio,
                sigma=telemetry.sigma,
                window=telemetry.window,
                parameters_every=telemetry.every,
                lowbit=self.noise,
            )

    def watching(self, log_step: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a step."""
        if self.noise is None or not log_step or self.config.train.compile:
            return nullcontext()
        return self.noise.watching()

    def observe(self, loss: Tensor, position: int, step: int) -> None:
        """Before the optimizer's step number ``step``: its loss, and the loader's position before its batch."""
        if self.monitor:
            self.monitor.observe(loss, rows=(position, position + self.config.train.batch_size), step=step)

    def write(self, record: dict[str, Any]) -> None:
        """Write a record of any kind into metrics.jsonl and the other sinks."""
        self.write_metrics(record)
        for sink in self.sinks:
            sink.write(record)

    def close(self) -> None:
        """Part of the interface of a sink. Does nothing: the run closes its files, `live` its sinks."""

    def settle(self, *, last: bool) -> None:
        """Write the observed steps. ``last``: also the newest one, which otherwise waits for the next step."""
        if self.monitor:
            self.monitor.flush() if last else self.monitor.drain()

    @contextmanager
    def live(self, progress: LineProgress, out: Path, *, quiet: bool, is_saved: Callable[[], bool]) -> Iterator[None]:
        """Context of the training: sinks are open, and events are printed. The last steps are not lost however it ends:
        they are in the checkpoint if the current step ``is_saved``, and are written here otherwise."""
        self.sinks = [] if quiet else self._open(out)
        if self.monitor:
            self.monitor.say, self.monitor.show = progress.say, progress.parameters
        try:
            yield
        except (Interrupted, KeyboardInterrupt):
            raise
        except Exception:
            if not is_saved():
                self.settle(last=True)
            raise
        finally:
            for sink in self.sinks:
                sink.close()
            self.sinks = []

    def _open(self, out: Path) -> list[Guarded]:
        config = self.config.telemetry
        name, tables = str(self.config.name), to_tables(self.config)
        builders: list[tuple[bool, str, Any]] = [
            (config.tensorboard, "tensorboard", lambda: TensorBoardSink(out / "tensorboard")),
            (config.wandb != "off", "wandb", lambda: WandbSink(out, name, mode=config.wandb, config=tables)),
            (config.trackio, "trackio", lambda: TrackioSink(name, config=tables)),
        ]
        sinks = [opened(build, package) for wanted, package, build in builders if wanted]
        return [sink for sink in sinks if sink is not None]

    def state(self) -> dict[str, Any] | None:
        return self.monitor.state_dict() if self.monitor else None

    def load(self, state: dict[str, Any] | None, step: int) -> None:
        """Continue from ``step``. ``state`` None: the checkpoint has no telemetry, which then starts with this step."""
        if not self.monitor:
            return
        self.monitor.seen.clear()
        self.monitor.step = step
        # Another kind of parallelism may have put the parameters into another order.
        if state is not None and list(state["names"]) == self.monitor.names:
            self.monitor.load_state_dict(state)
