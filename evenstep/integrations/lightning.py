"""`SpikeMonitor` and `SpikeGuard` in Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from evenstep.integrations.guard import (
    OWNER,
    checked_guard_options,
    checked_say,
    close_monitor,
    event_line,
    load_guard,
    record_decision,
    record_decisions_in,
    replace_step,
)
from evenstep.integrations.log import go_on, harmless, lent_sinks, open_log, write_line
from evenstep.telemetry.guard import Event, SpikeGuard
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
        _check_number("SpikeCallback", optimizer)
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
        _check_there("SpikeCallback", self.which, trainer)
        before, step = self.monitor, self._step(trainer)
        if before is not None:
            close_monitor(before)
            if self._saved is None and before.step == step > 0:  # fit() called again
                self._saved = before.state_dict()
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        sinks: list[Sink] = [LoggerSink(trainer)] if self.loggers else []
        if trainer.is_global_zero:
            sinks.append(open_log(Path(self.path or folder / "metrics.jsonl"), step, trainer))
        self.monitor = SpikeMonitor(
            pl_module, trainer.optimizers[self.which], sinks=[*sinks, *self.extra], **self.options
        )
        record_decisions_in(self.monitor)
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
        self._losses.append(_unscaled(trainer, loss))

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
            close_monitor(self.monitor)

    @harmless
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self.monitor:
            close_monitor(self.monitor, flush=trainer.world_size == 1)

    def state_dict(self) -> dict[str, Any]:
        return self.monitor.state_dict() if self.monitor else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict or None


class SpikeGuardCallback(pl.Callback):
    """Acts on spikes with a `SpikeGuard`: ``Trainer(callbacks=[SpikeGuardCallback(ladder=("skip", "stop"))])``.

    The optimizer's step becomes `SpikeGuard.step`, on all processes together, in automatic and in manual optimization.
    In automatic optimization, gradients are judged before Lightning clips them; gradients that the module clips itself
    are judged after it. A step that is not taken does not advance schedules with ``interval="step"`` and
    ``frequency=1``, and counts in ``trainer.global_step``.

    After a rewind the data goes on from the present position: the batches since the snapshot are left out with the bad
    one. If the loader shuffles, rows of a bad batch come again in the next epoch, in other batches, and are judged
    again.

    With fp16, a step that overflows is left to the GradScaler. Decisions are in ``guard.events``, with the number of
    the step (from 1) as ``rows``, and in the metrics.jsonl of a `SpikeCallback` of the same optimizer. The guard's
    state is in Lightning's checkpoints.

    Args:
        optimizer: index of the optimizer, for modules with several. Default 0. The ladder of a callback in such a
            module must not have ``"rewind"``, which would restore weights of the other optimizers.
        say: called with one line of text for each decision, on the main process. Default ``print``; None prints
            nothing.
        **options: options of `SpikeGuard`: ``ladder``, ``sigma``, ``norm_ratio``, ``loss_rise``, ``floor``,
            ``window``, ``min_history``, ``skips``, ``patience``, ``budget``, ``lr_factor``, ``lr_steps``,
            ``snapshot_every``, ``check_every``, ``process_group``, ``on_event``.

    Attributes:
        guard: the `SpikeGuard` of the newest training, None before.

    Raises:
        TypeError: for an unknown option.
        ValueError: for an option out of its range. When training starts: under DeepSpeed, FSDP 1 or XLA, if the module
            does not have that ``optimizer``, or has several and the ladder has ``"rewind"``.
    """

    def __init__(self, optimizer: int = 0, *, say: Callable[[str], object] | None = print, **options: Any) -> None:
        _check_number(OWNER, optimizer)
        self.which = optimizer
        self.say = checked_say(say)
        checked_guard_options(options)
        self.options = options  # LightningCLI parses this line, as in SpikeCallback
        self.guard: SpikeGuard | None = None
        self._trainer: pl.Trainer | None = None
        self._saved: dict[str, Any] | None = None
        self._number = 0  # of the optimizer's step, the first is 1; steps that are not taken count
        self._steps = 0  # guard.num_steps before the decision that is being made
        self._took = True
        self._losses: list[Tensor] = []  # of the backward passes since the last step
        self._loss = torch.zeros(())
        self._take: Callable[[], object] = lambda: None  # the optimizer's own step
        self._clip: Callable[[], object] | None = None  # the clipping that Lightning asked for in this step
        self._undo: list[Callable[[], None]] = []

    @property
    def state_key(self) -> str:
        return self._generate_state_key(optimizer=self.which)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._release()
        _check_there(OWNER, self.which, trainer)
        strategy = type(trainer.strategy).__name__
        if any(name in strategy for name in ("DeepSpeed", "FSDP", "XLA")):
            raise EvenstepError(
                f"{OWNER}: does not work with {strategy}; use one process, DDP or ModelParallelStrategy"
            )
        if len(trainer.optimizers) > 1 and "rewind" in self.options.get("ladder", ("rewind",)):
            raise EvenstepError(
                f"{OWNER}: the module has {len(trainer.optimizers)} optimizers; give a ladder without 'rewind'"
            )
        before, number = self.guard, self._number
        if self._saved is None and before is not None and trainer.global_step and self._trainer is trainer:
            self._saved = {"number": number, "guard": before.state_dict()}  # fit() called again
        optimizer = trainer.optimizers[self.which]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        self.guard = SpikeGuard(
            pl_module,
            optimizer,
            data=(),
            schedulers=schedules if scaler is None else [*schedules, scaler],
            **self.options,
        )
        self.guard.on_event = self._decided
        self._trainer, self._number, self._took, self._clip = trainer, 0, True, None
        self._losses.clear()
        if self._saved:
            self._number = self._saved["number"]
            load_guard(self.guard, self._saved["guard"])
        self._saved = None
        self._take = optimizer.step
        self._undo = [replace_step(optimizer, self._step)]
        if pl_module.automatic_optimization:
            self._undo += [
                _replace(pl_module, "configure_gradient_clipping", self._clip_later(pl_module)),
                _replace(pl_module, "lr_scheduler_step", self._schedule_step(trainer, pl_module)),
            ]

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._losses.append(_unscaled(trainer, loss))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Called after the backward pass and before the clipping; also where a GradScaler then takes no step."""
        losses, self._losses = self._losses, []  # they belong to the optimizer that steps now, guarded or not
        if self.guard is not None and bare(optimizer) is self.guard.optimizer:
            self._loss = torch.stack(losses).sum() if losses else torch.zeros(())
            self._number += 1
            self._took, self._clip = True, None

    def _clip_later(self, pl_module: pl.LightningModule) -> Callable[..., None]:
        clip = pl_module.configure_gradient_clipping

        def later(*args: Any, **kwargs: Any) -> None:
            self._clip = lambda: clip(*args, **kwargs)

        return later

    def _schedule_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Callable[..., None]:
        advance = pl_module.lr_scheduler_step
        # A schedule that advances once in several steps goes on: the step that is not taken may be any of them.
        each_step = [c.scheduler for c in trainer.lr_scheduler_configs if c.interval == "step" and c.frequency == 1]

        def step(scheduler: Any, metric: Any) -> None:
            if self._took or not any(scheduler is one for one in each_step):
                advance(scheduler, metric)

        return step

    def _step(self, closure: Callable[[], Any] | None = None, **options: Any) -> Any:
        """Takes the place of the optimizer's ``step``. Lightning runs the forward and backward pass in ``closure``."""
        guard, trainer = self.guard, self._trainer
        assert guard is not None and trainer is not None
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
            if result is None and trainer.lightning_module.automatic_optimization:  # training_step left the batch out
                return self._take(**options)
        clip = self._clip

        def clip_and_take() -> None:
            if clip is not None:
                clip()
            self._take(**options)

        self._steps = guard.num_steps
        self._took = guard.step(self._loss, rows=self._number, take=clip_and_take)
        if guard.stopped:
            trainer.should_stop = True
        return result

    def _flush(self) -> None:
        """Judge the steps that a ladder without ``"skip"`` has not judged."""
        if self.guard is not None:
            self._steps = self.guard.num_steps
            self.guard.flush()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._flush()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._flush()
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release()

    def _decided(self, event: Event) -> None:
        assert self.guard is not None and self._trainer is not None
        record_decision(event, self.guard)
        if self.say is not None and self._trainer.is_global_zero:
            self.say(event_line(event, self.guard, self._steps))
        if self.options.get("on_event") is not None:
            self.options["on_event"](event)

    def _release(self) -> None:
        for undo in self._undo:
            undo()
        self._undo = []

    def state_dict(self) -> dict[str, Any]:
        if self.guard is None:
            return {}
        self._steps = self.guard.num_steps
        return {"number": self._number, "guard": self.guard.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict or None


def _replace(module: pl.LightningModule, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Let ``module.name`` be ``method``, for this object only. Returns a function that undoes it."""
    before = vars(module).get(name)
    setattr(module, name, method)

    def restore() -> None:
        delattr(module, name)
        if before is not None:
            setattr(module, name, before)

    return restore


def _unscaled(trainer: pl.Trainer, loss: Tensor) -> Tensor:
    """The loss of a backward pass. Lightning divides it by the number of accumulated batches, and under fp16
    multiplies it by the scale."""
    scale = getattr(getattr(trainer.precision_plugin, "scaler", None), "_scale", None)
    return loss.detach() if scale is None else loss.detach() / scale


def _check_number(owner: str, optimizer: Any) -> None:
    if isinstance(optimizer, bool) or not isinstance(optimizer, int):
        raise TypeError(f"{owner}: optimizer={optimizer!r:.80} must be its number, counted from 0")
    if optimizer < 0:
        raise EvenstepError(f"{owner}: optimizer={optimizer}; count from 0")


def _check_there(owner: str, optimizer: int, trainer: pl.Trainer) -> None:
    if optimizer >= len(trainer.optimizers):
        raise EvenstepError(
            f"{owner}: optimizer={optimizer}, but the module has {len(trainer.optimizers)}; count from 0"
        )
