"""Spike telemetry in Lightning."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

try:
    import lightning.pytorch as pl
except ModuleNotFoundError:  # the older name of the same package
    import pytorch_lightning as pl  # type: ignore[no-redef]

from evenstep.errors import EvenstepError
from evenstep.integrations.log import open_log, write_line
from evenstep.telemetry.monitor import SpikeMonitor
from evenstep.telemetry.sinks import Record, Sink, scalars
from evenstep.telemetry.subject import bare


class LoggerSink:
    """The single numbers of the records, by ``telemetry/name``, in the loggers of a Lightning trainer."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self.trainer = trainer

    def write(self, record: Record) -> None:
        values = scalars(record) if "kind" in record else {}
        if record.get("kind") == "event":
            values[f"events/{record['event']}"] = 1.0
        for logger in self.trainer.loggers if values else ():
            logger.log_metrics(values, step=record["step"])

    def close(self) -> None:
        """The trainer closes its loggers."""


class SpikeCallback(pl.Callback):
    """Watches an optimizer of a Lightning module with a `SpikeMonitor`: ``Trainer(callbacks=[SpikeCallback()])``.

    Writes metrics.jsonl for ``evenstep report``, and the single numbers to the trainer's loggers. Its state is in
    Lightning's checkpoints, so that baselines go on after a resume. Events know the loss of their step, over all
    accumulated batches. Gradients are seen as the optimizer gets them: after Lightning's own clipping.

    Args:
        path: the file; default ``metrics.jsonl`` in the trainer's ``log_dir`` (or its ``default_root_dir``). A run that
            starts at step 0 replaces it; one that resumes goes on with it.
        optimizer: which one, where the module has several.
        loggers: whether the trainer's loggers get the numbers too. Default True.
        validation: name of the metric that becomes ``val_loss``. Default ``"val_loss"``.
        sinks: further places for the records, see `evenstep.telemetry.sinks`.
        **options: those of `SpikeMonitor`: ``every``, ``say``, ``samples``, ``ratio``, ``sigma``, ``window``,
            ``parameters_every``, ``lowbit``.

    ``monitor`` is the `SpikeMonitor` while training runs, None before. EvenstepError, when training starts, for an
    ``optimizer`` that the module does not have.
    """

    def __init__(
        self,
        path: Path | str | None = None,
        *,
        optimizer: int = 0,
        loggers: bool = True,
        validation: str = "val_loss",
        sinks: Iterable[Sink] = (),
        **options: Any,
    ) -> None:
        self.path, self.which, self.loggers, self.validation = path, optimizer, loggers, validation
        self.extra = list(sinks)
        self.options = options  # alone on its line: LightningCLI reads here which names ``options`` may hold
        self.monitor: SpikeMonitor | None = None
        self._saved: dict[str, Any] | None = None
        self._losses: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not 0 <= self.which < len(trainer.optimizers):
            raise EvenstepError(
                f"SpikeCallback: optimizer={self.which}, but the module has {len(trainer.optimizers)}; count from 0"
            )
        step = trainer.global_step
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        sinks: list[Sink] = [LoggerSink(trainer)] if self.loggers else []
        if trainer.is_global_zero:
            sinks.append(open_log(Path(self.path or folder / "metrics.jsonl"), step))
        self.monitor = SpikeMonitor(
            pl_module, trainer.optimizers[self.which], sinks=[*sinks, *self.extra], **self.options
        )
        self.monitor.step = step
        if self._saved is not None:
            self.monitor.load_state_dict(self._saved)
            self._saved = None

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        # Lightning divides the loss by the number of accumulated batches, and under fp16 multiplies it by the scale.
        scale = getattr(getattr(trainer.precision_plugin, "scaler", None), "_scale", None)
        loss = loss.detach()
        self._losses.append(loss if scale is None else loss / scale)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        losses, self._losses = self._losses, []  # of the optimizer that steps now, whichever it is
        if self.monitor and losses and bare(optimizer) is self.monitor.optimizer:
            self.monitor.observe(torch.stack(losses).sum())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.monitor and not trainer.sanity_checking:
            self.monitor.drain()
            names = {self.validation: "val_loss"}
            write_line(self.monitor.sinks, trainer.global_step, trainer.callback_metrics, names)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.monitor:
            self.monitor.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self.monitor:
            self.monitor.close(flush=trainer.world_size == 1)

    def state_dict(self) -> dict[str, Any]:
        return self.monitor.state_dict() if self.monitor else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict or None
