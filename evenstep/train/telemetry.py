"""The telemetry of a run: the SpikeMonitor, and the sinks that the configuration selects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evenstep.lowbit.metrics import Metrics, lowbit_metrics, observe_gradients, observe_weights
from evenstep.telemetry.monitor import SpikeMonitor
from evenstep.telemetry.sinks import Guarded, MlflowSink, TensorBoardSink, TrackioSink, WandbSink, opened
from evenstep.train.config import BaseConfig
from evenstep.train.config_io import to_tables
from evenstep.train.interrupts import Interrupted
from evenstep.train.log import LineProgress

DRAIN_STEPS = 1000
"""The largest number of steps whose values stay on the device before they are read, which bounds their memory."""


class LowBitNoise:
    """The quantisation error of every low-bit layer, in the form that `SpikeMonitor` accepts: ``saturation``,
    ``underflow`` and ``error`` of the weight and, if the recipe quantises gradients, ``gradient_error``.

    The errors of weights are measured at every drain, which takes up to a tenth of a step. If the weights are
    ``sharded``, they are measured in the forward pass of a log step instead, where FSDP2 has gathered them: the scales
    of the format belong to the whole matrix. The gradients of a layer
    exist only during the backward pass, so they are observed in log steps, in eager mode. Named recipes round weights
    to nearest, and gradients are rounded with a separate generator, so telemetry does not change a bit of the run.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, sharded: bool) -> None:
        self.model, self.sharded = model, sharded
        self.generator = torch.Generator(device).manual_seed(0)
        self.weights: Metrics = {}
        self.gradients: Metrics = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context of a forward and backward pass."""
        whole = observe_weights(self.model) if self.sharded else nullcontext(self.weights)
        with whole as weights, observe_gradients(self.model, self.generator) as gradients:
            yield
        self.weights, self.gradients = weights, gradients

    def __call__(self) -> dict[str, dict[str, Tensor]]:
        layers = {
            layer: {"saturation": of["saturation"], "underflow": of["underflow"], "error": of["relative_error"]}
            for layer, of in (self.weights if self.sharded else lowbit_metrics(self.model)).items()
        }
        for layer, of in self.gradients.items():
            layers.setdefault(layer, {})["gradient_error"] = of["relative_error"]
        return layers


class RunTelemetry:
    """The telemetry of a `Trainer`. ``monitor`` is None if ``telemetry.enabled`` is false. ``write_metrics`` writes a
    record to metrics.jsonl."""

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
        if config.lowbit and telemetry.enabled:
            self.noise = LowBitNoise(model, device, sharded=sharded)
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
                activations=telemetry.activations,
            )

    @contextmanager
    def watching(self, log_step: bool) -> Iterator[None]:
        """Context of the forward and backward pass of a step."""
        if self.monitor:
            self.monitor.arm()
        noise = self.noise if log_step and not self.config.train.compile else None
        with noise.watching() if noise else nullcontext():
            yield

    def observe(self, loss: Tensor, position: int, step: int) -> None:
        """Called before the optimizer's step number ``step``, with the loss and the loader's position before the
        batch."""
        if self.monitor:
            self.monitor.observe(loss, rows=(position, position + self.config.train.batch_size), step=step)

    def write(self, record: dict[str, Any]) -> None:
        """Write a record of any kind to metrics.jsonl and the other sinks."""
        self.write_metrics(record)
        for sink in self.sinks:
            sink.write(record)

    def close(self) -> None:
        """Required of a sink. Does nothing: the trainer closes metrics.jsonl, and `live` closes the other sinks."""

    def settle(self, *, last: bool) -> None:
        """Write the records of observed steps. ``last``: including the newest step, which otherwise waits for the next
        one."""
        if self.monitor:
            self.monitor.flush() if last else self.monitor.drain()

    @contextmanager
    def live(self, progress: LineProgress, out: Path, *, quiet: bool, is_saved: Callable[[], bool]) -> Iterator[None]:
        """Context of the training, in which the sinks are open and events are printed. The last steps are never lost:
        they are in the checkpoint if the current step ``is_saved``, and are written at the end of the context if
        not."""
        # Only process 0 writes to sinks.
        self.sinks = [] if quiet else self._open(out)
        if self.monitor:
            self.monitor.say, self.monitor.show = progress.event, progress.parameters
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
            (config.mlflow, "mlflow", lambda: MlflowSink(name, config=tables)),
        ]
        sinks = [opened(build, package) for wanted, package, build in builders if wanted]
        return [sink for sink in sinks if sink is not None]

    def state(self) -> dict[str, Any] | None:
        return self.monitor.state_dict() if self.monitor else None

    def load(self, state: dict[str, Any] | None, step: int) -> None:
        """Continue from ``step``. ``state`` is None if the checkpoint has no telemetry, which then starts at this
        step."""
        if not self.monitor:
            return
        self.monitor.seen.clear()
        self.monitor.step = step
        # The statistics are listed by the position of the parameter, whose order may differ in another parallel mode.
        if state is not None and list(state["names"]) == self.monitor.names:
            self.monitor.load_state_dict(state)
