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

from evenstep.errors import EvenstepError, nearest
from evenstep.integrations.log import go_on, harmless, lent_sinks, open_log, write_line
from evenstep.telemetry.monitor import SpikeMonitor
from evenstep.telemetry.options import checked_options, checked_path
from evenstep.telemetry.schema import Record
from evenstep.telemetry.sinks import Sink, scalars
from evenstep.telemetry.subject import bare


class LoggerSink:
    """Passes the single numbers of records to the loggers of a Lightning trainer, under ``telemetry/name``."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self.trainer = trainer

    def write(self, record: Record) -> None:
        values = scalars(record) if "kind" in record else {}
        if record.get("kind") == "event":
            values[f"events/{record['event']}"] = 1.0
        for logger in self.trainer.loggers if values else ():
            logger.log_metrics(values, step=record["step"])

    def close(self) -> None:
        """Do nothing: the trainer closes its loggers."""


class SpikeCallback(pl.Callback):
    """Watches an optimizer of a Lightning module with a `SpikeMonitor`: ``Trainer(callbacks=[SpikeCallback()])``.

    Writes metrics.jsonl for ``evenstep report``, and the single numbers to the trainer's loggers. Its state is in
    Lightning's checkpoints, so that its baselines continue after a resume. The loss of an event is the mean over all
    accumulated batches. Gradients are measured as the optimizer gets them, after Lightning's clipping.

    Args:
        path: the file. Default: ``metrics.jsonl`` in the trainer's ``log_dir`` (or its ``default_root_dir``). A run
            that starts at step 0 replaces it, a resumed run continues it.
        optimizer: index of the optimizer, for modules with several. Default 0.
        loggers: whether the trainer's loggers get the numbers too. Default True.
        validation: name of the metric that is written as ``val_loss``. Default ``"val_loss"``.
        sinks: further destinations of the records, as in `SpikeMonitor`. They stay open from one ``fit`` to the
            next, and are closed when the callback is deleted or the program ends.
        **options: options of `SpikeMonitor`: ``every``, ``say``, ``samples``, ``ratio``, ``sigma``, ``window``,
            ``parameters_every``, ``lowbit``.

    Attributes:
        monitor: the `SpikeMonitor` of the newest training, None before.

    Raises:
        EvenstepError: when training starts, if the module does not have that ``optimizer``.
    """

    def __init__(
        self,
        path: Path | str | None = None,
        *,
        optimizer: int = 0,
        loggers: bool = True,
        validation: str = "val_loss",
        sinks: Iterable[Sink | Path | str] | Sink | Path | str = (),
        **options: Any,
    ) -> None:
        if isinstance(optimizer, bool) or not isinstance(optimizer, int):
            raise TypeError(f"SpikeCallback: optimizer={optimizer!r:.80} must be its number, counted from 0")
        if optimizer < 0:
            raise EvenstepError(f"SpikeCallback: optimizer={optimizer}; count from 0")
        if not isinstance(validation, str):
            raise TypeError(f"SpikeCallback: validation={validation!r:.80} must be the name of a metric")
        self.path, self.which = checked_path("SpikeCallback", path), optimizer
        self.loggers, self.validation = loggers, validation
        checked_options("SpikeCallback", options)
        self.options = options  # LightningCLI parses this line for the names in ``options``: keep it as it is
        self.extra = lent_sinks(self, sinks)
        self.monitor: SpikeMonitor | None = None
        self._saved: dict[str, Any] | None = None
        self._losses: list[Tensor] = []

    @property
    def state_key(self) -> str:
        return self._generate_state_key(optimizer=self.which, path=None if self.path is None else str(self.path))

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        saved = checkpoint.get("callbacks", {})
        # The second key is that of evenstep 0.1.
        self._saved = saved.get(self.state_key) or saved.get(type(self).__qualname__)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not 0 <= self.which < len(trainer.optimizers):
            raise EvenstepError(
                f"SpikeCallback: optimizer={self.which}, but the module has {len(trainer.optimizers)}; count from 0"
            )
        before, step = self.monitor, self._step(trainer)
        if before is not None:
            before.close()
            if self._saved is None and before.step == step > 0:  # fit() called again
                self._saved = before.state_dict()
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        sinks: list[Sink] = [LoggerSink(trainer)] if self.loggers else []
        if trainer.is_global_zero:
            sinks.append(open_log(Path(self.path or folder / "metrics.jsonl"), step, trainer))
        self.monitor = SpikeMonitor(
            pl_module, trainer.optimizers[self.which], sinks=[*sinks, *self.extra], **self.options
        )
        self._losses.clear()
        if self._saved is not None:
            go_on(self.monitor, self._saved)
            self._saved = None
        self.monitor.step = step

    def _step(self, trainer: pl.Trainer) -> int:
        """Number of steps that the optimizer has made. ``trainer.global_step`` is the sum over all optimizers."""
        if len(trainer.optimizers) == 1:
            return trainer.global_step
        if self._saved is not None:
            return int(self._saved["step"])
        return self.monitor.step if self.monitor and trainer.global_step else 0

    @harmless
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        # Lightning divides the loss by the number of accumulated batches, and under fp16 multiplies it by the scale.
        scale = getattr(getattr(trainer.precision_plugin, "scaler", None), "_scale", None)
        loss = loss.detach()
        self._losses.append(loss if scale is None else loss / scale)

    @harmless
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        losses, self._losses = self._losses, []  # they belong to the optimizer that steps now, watched or not
        if self.monitor and losses and bare(optimizer) is self.monitor.optimizer:
            self.monitor.observe(torch.stack(losses).sum())

    @harmless
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.monitor and not trainer.sanity_checking:
            self.monitor.drain()
            metrics, names = trainer.callback_metrics, {self.validation: "val_loss"}
            write_line(self.monitor.sinks, self.monitor.step, metrics, names)
            if self.validation not in metrics and self.validation != "val_loss":
                hint = nearest(self.validation, list(metrics)) or f"; there are {', '.join(metrics) or 'none'}"
                self.monitor.troubles.tell("validation", f"no metric '{self.validation}' was logged{hint}")

    @harmless
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.monitor:
            self.monitor.close()

    @harmless
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self.monitor:
            self.monitor.close(flush=trainer.world_size == 1)

    def state_dict(self) -> dict[str, Any]:
        return self.monitor.state_dict() if self.monitor else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict or None
