"""`SpikeMonitor` and `SpikeGuard` in the Trainer of transformers, and in programs built on it (TRL, axolotl,
LLaMA-Factory)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from evenstep.errors import EvenstepError
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
from evenstep.integrations.log import Tally, go_on, harmless, lent_sinks, open_log, write_line
from evenstep.telemetry.guard import Event, SpikeGuard
from evenstep.telemetry.monitor import SpikeMonitor
from evenstep.telemetry.options import checked_options, checked_path
from evenstep.telemetry.sinks import Sink
from evenstep.telemetry.subject import bare

STATE = "spike_monitor.pt"
"""File of the monitor's state in each checkpoint of the Trainer."""

TRAINING = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad_norm"}
VALIDATION = {"eval_loss": "val_loss"}
"""The Trainer's name of a metric -> its key in metrics.jsonl."""


class ModelLosses:
    """The losses that a model returns in training, until `take` asks for them. A callback does not get the Trainer's.

    Args:
        model: it returns its loss if it gets labels; not where the Trainer computes the loss.
    """

    def __init__(self, model: nn.Module) -> None:
        self._losses: list[Tensor] = []
        self.summed = False
        self._hook = model.register_forward_hook(self._heard, with_kwargs=True)

    @harmless
    def _heard(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        loss = output.get("loss") if hasattr(output, "get") else getattr(output, "loss", None)
        if model.training and isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses.append(loss.detach().reshape(()))
            # A model that gets the number of items of the whole step returns its share of the loss instead of a mean.
            self.summed = kwargs.get("num_items_in_batch") is not None

    def take(self) -> Tensor | None:
        """The loss over the batches since the last call, 0-d; None where the model returned none."""
        losses, self._losses = self._losses, []
        if not losses:
            return None
        together = torch.stack([loss.to(losses[0]) for loss in losses])  # models may span several devices
        return together.sum() if self.summed else together.mean()

    def close(self) -> None:
        self._hook.remove()


class SpikeCallback(TrainerCallback):
    """Watches the Trainer's optimizer with a `SpikeMonitor`: ``Trainer(..., callbacks=[SpikeCallback()])``.

    Writes metrics.jsonl, which includes the Trainer's losses and evaluations, for ``evenstep report OUTPUT_DIR``, and
    adds ``spikes`` (since the last log) and ``spike_rate`` to the Trainer's log history. Events have the loss of their
    step if the model returns one (with labels, and without a loss function of the Trainer). The monitor's state is in
    the Trainer's checkpoints, so that its baselines continue after a resume.

    Args:
        path: the file. Default: ``metrics.jsonl`` in the Trainer's ``output_dir``. A run that starts at step 0 replaces
            it, a resumed run continues it.
        sinks: further destinations of the records, as in `SpikeMonitor`. They stay open from one ``train`` to the
            next, and are closed when the callback is deleted or the program ends.
        **options: options of `SpikeMonitor`: ``every``, ``say``, ``samples``, ``ratio``, ``sigma``, ``window``,
            ``parameters_every``, ``lowbit``.

    Attributes:
        monitor: the `SpikeMonitor` of the newest training, None before.
    """

    def __init__(
        self,
        path: Path | str | None = None,
        *,
        sinks: Iterable[Sink | Path | str] | Sink | Path | str = (),
        **options: Any,
    ) -> None:
        self.path = checked_path("SpikeCallback", path)
        self.options = checked_options("SpikeCallback", options)
        self.extra = lent_sinks(self, sinks)
        self.monitor: SpikeMonitor | None = None
        self._tally = Tally()
        self._losses: ModelLosses | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        self._end()
        assert model is not None
        step, output = state.global_step, Path(str(args.output_dir))
        sinks: list[Sink] = [self._tally, *self.extra]
        if state.is_world_process_zero:
            sinks.insert(0, open_log(Path(self.path or output / "metrics.jsonl"), step, state))
        self.monitor = SpikeMonitor(model, optimizer, sinks=sinks, **self.options)
        self.monitor.step = step
        record_decisions_in(self.monitor)
        folder = _checkpoint(output, step)
        saved = next((folder / name for name in (self._state, STATE) if (folder / name).exists()), None)
        if step and saved:
            self._load(saved)
        self._losses = ModelLosses(model)

    @property
    def _state(self) -> str:
        """Name of the state's file, which differs between the callbacks of one training."""
        return STATE if self.path is None else f"spike_monitor-{Path(self.path).stem}.pt"

    @harmless
    def _load(self, saved: Path) -> None:
        go_on(self.monitor, torch.load(saved, weights_only=True))

    @harmless
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        loss = None if self._losses is None else self._losses.take()
        if self.monitor and loss is not None:
            self.monitor.observe(loss, step=state.global_step + 1)

    @harmless
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if self.monitor is None or logs is None:
            return
        self.monitor.drain()
        for names in (TRAINING, VALIDATION):
            write_line(self.monitor.sinks, state.global_step, logs, names)
        if "loss" in logs:
            found = self._tally.take()
            logs.update(found)
            if state.log_history:
                state.log_history[-1].update(found)

    @harmless
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.monitor is None:
            return
        saved, folder = self.monitor.state_dict(), _checkpoint(Path(str(args.output_dir)), state.global_step)
        if state.is_world_process_zero and folder.is_dir():
            torch.save(saved, folder / self._state)

    @harmless
    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._end()

    def _end(self) -> None:
        if self._losses is not None:
            self._losses.close()
            self._losses = None
        if self.monitor is not None:
            close_monitor(self.monitor)


GUARD_STATE = "spike_guard.pt"
"""File of the guard's state in each checkpoint of the Trainer."""

NO_LIMIT = float(torch.finfo(torch.float32).max)
"""A ``max_grad_norm`` that changes no finite gradient, and an infinite one only where it is infinite."""

UNGUARDED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)
"""Engines that take the optimizer's step, or clip, where no callback can prevent it."""


class SpikeGuardCallback(TrainerCallback):
    """Acts on spikes with a `SpikeGuard`: ``Trainer(..., callbacks=[SpikeGuardCallback(ladder=("skip", "stop"))])``.

    The Trainer's optimizer step becomes `SpikeGuard.step`, on all processes together. Gradients are judged before
    ``max_grad_norm`` clips them. The loss is that of the model; where the Trainer computes it (``compute_loss_func``,
    ``label_smoothing_factor``, trainers that override ``compute_loss``), gradients alone are judged. A step that is not
    taken does not advance the learning rate's schedule, and counts in ``state.global_step``.

    After a rewind the data goes on from the present position, since the Trainer's loader cannot go back: the batches
    since the snapshot are left out with the bad one. If the Trainer shuffles, rows of a bad batch come again in the
    next epoch, in other batches, and are judged again.

    With fp16, a step that overflows is left to the GradScaler. Decisions are in ``guard.events`` (with the Trainer's
    number of the step as ``rows``), in ``state.log_history``, and in the metrics.jsonl of a `SpikeCallback` of the same
    Trainer; the guard's state is in the Trainer's checkpoints.

    Args:
        say: called with one line of text for each decision, on the main process. Default ``print``; None prints
            nothing.
        **options: options of `SpikeGuard`: ``ladder``, ``sigma``, ``norm_ratio``, ``loss_rise``, ``floor``,
            ``window``, ``min_history``, ``skips``, ``patience``, ``budget``, ``lr_factor``, ``lr_steps``,
            ``snapshot_every``, ``check_every``, ``process_group``, ``on_event``.

    Attributes:
        guard: the `SpikeGuard` of the newest training, None before.

    Raises:
        TypeError: for an unknown option.
        ValueError: for an option out of its range, and when training starts under DeepSpeed, Megatron, XLA or FSDP 1.
    """

    def __init__(self, *, say: Callable[[str], object] | None = print, **options: Any) -> None:
        self.say = checked_say(say)
        checked_guard_options(options)
        self.options = options
        self.guard: SpikeGuard | None = None
        self._args: TrainingArguments | None = None
        self._state = TrainerState()
        self._steps = 0  # guard.num_steps before the decision that is being made
        self._max_norm: float | None = None  # the Trainer's limit, while the Trainer must not clip
        self._losses: ModelLosses | None = None
        self._optimizer: Any = None
        self._take: Callable[[], object] = lambda: None  # the step of the Trainer's optimizer
        self._undo: list[Callable[[], None]] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        self._release()
        assert model is not None
        _refuse_engines(optimizer)
        scaler = optimizer.scaler
        self.guard = SpikeGuard(
            model,
            bare(optimizer),
            schedulers=[lr_scheduler] if scaler is None else [lr_scheduler, scaler],
            **self.options,
        )
        self.guard.on_event = self._decided
        self._args, self._state = args, state
        saved = _checkpoint(Path(str(args.output_dir)), state.global_step) / GUARD_STATE
        if state.global_step and saved.exists():
            load_guard(self.guard, torch.load(saved, weights_only=True))
        self._optimizer, self._take, self._losses = optimizer, optimizer.step, ModelLosses(model)
        self._undo = [self._losses.close, replace_step(optimizer, self._step)]

    def _step(self) -> None:
        """Takes the place of ``step`` of the Trainer's optimizer, which is accelerate's wrapper of the real one."""
        guard, args = self.guard, self._args
        assert guard is not None and args is not None and self._losses is not None
        limit, loss = self._give_back_limit(), self._losses.take()
        optimizer, scaler = self._optimizer, self._optimizer.scaler
        if scaler is not None and _overflowed(scaler, bare(optimizer)):
            self._take()  # which skips the step, and lowers the scale
            return
        if loss is None:
            loss = torch.zeros(())
        elif self._losses.summed and args.average_tokens_across_devices:
            loss = loss * args.world_size  # the model's is the share of one process

        def clip_and_take() -> None:
            if limit:
                torch.nn.utils.clip_grad_norm_(guard.model.parameters(), limit)
            self._take()

        self._steps = guard.num_steps
        took = guard.step(loss, rows=self._state.global_step + 1, take=clip_and_take)
        # The Trainer steps its schedule only where no optimizer says that it skipped the step.
        optimizer._is_overflow = not took
        if scaler is not None and not took:
            scaler.update()  # it expects one for each time that gradients were unscaled

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # The Trainer clips before any callback sees the gradients. Until the step it gets a limit that clips nothing,
        # and its own is applied once the gradients were judged. Without a limit (0) it multiplies all gradients by NaN
        # where one is infinite, and none could be named. Those on several meshes need the Trainer's own code.
        if self.guard is not None and self._max_norm is None and self._on_one_mesh():
            self._max_norm, args.max_grad_norm = args.max_grad_norm, NO_LIMIT

    def _on_one_mesh(self) -> bool:
        assert self.guard is not None
        params = [p for p in self.guard.model.parameters() if p.requires_grad]
        return len({p.device_mesh if isinstance(p, DTensor) else None for p in params}) <= 1

    def _give_back_limit(self) -> float | None:
        """Put ``max_grad_norm`` back. Returns the limit that is still to be applied, None where there is none."""
        limit, self._max_norm = self._max_norm, None
        if limit is not None:
            assert self._args is not None
            self._args.max_grad_norm = limit
        return limit

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if control.should_save or control.should_evaluate or control.should_training_stop:
            self._flush()
        self._stop(control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._flush()
        self._stop(control)

    def _flush(self) -> None:
        """Judge the steps that a ladder without ``"skip"`` has not judged, before the Trainer saves their result."""
        if self.guard is not None:
            self._steps = self.guard.num_steps
            self.guard.flush()

    def _stop(self, control: TrainerControl) -> None:
        if self.guard is not None and self.guard.stopped:
            control.should_training_stop = True

    def _decided(self, event: Event) -> None:
        assert self.guard is not None
        entry = {"step": event["rows"], "guard": event["action"], "guard_reason": event["reason"]}
        self._state.log_history.append(entry)
        record_decision(event, self.guard)
        if self.say is not None and self._state.is_world_process_zero:
            self.say(event_line(event, self.guard, self._steps))
        if self.options.get("on_event") is not None:
            self.options["on_event"](event)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.guard is None:
            return
        self._steps = self.guard.num_steps
        saved, folder = self.guard.state_dict(), _checkpoint(Path(str(args.output_dir)), state.global_step)
        if state.is_world_process_zero and folder.is_dir():
            torch.save(saved, folder / GUARD_STATE)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._release()

    def _release(self) -> None:
        """Give the optimizer its own step back, also after a training that ended with an exception."""
        self._give_back_limit()
        for undo in self._undo:
            undo()
        self._undo = []


def _refuse_engines(optimizer: Any) -> None:
    accelerated = optimizer.accelerator_state
    kind = accelerated.distributed_type
    plugin = getattr(accelerated, "fsdp_plugin", None)
    if kind in UNGUARDED or (kind == DistributedType.FSDP and plugin is not None and plugin.fsdp_version == 1):
        name = "FSDP 1" if kind == DistributedType.FSDP else kind.value
        raise EvenstepError(f"{OWNER}: does not work with {name}; use one process, DDP or FSDP 2")


def _overflowed(scaler: Any, optimizer: Any) -> bool:
    """Whether unscaling found a gradient that is not finite. Processes agree: they have the same gradients, or shards
    whose findings torch reduces."""
    return any(float(found) for found in scaler._found_inf_per_device(optimizer).values())


def _checkpoint(output: Path, step: int) -> Path:
    return output / f"checkpoint-{step}"
