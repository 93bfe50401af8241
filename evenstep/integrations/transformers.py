"""Spike telemetry in the Trainer of transformers, and in programs built on it (TRL, axolotl, LLaMA-Factory)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from evenstep.integrations.log import Tally, go_on, harmless, lent_sinks, open_log, write_line
from evenstep.telemetry.monitor import SpikeMonitor
from evenstep.telemetry.options import checked_options, checked_path
from evenstep.telemetry.sinks import Sink

STATE = "spike_monitor.pt"
"""File of the monitor's state in each checkpoint of the Trainer."""

TRAINING = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad_norm"}
VALIDATION = {"eval_loss": "val_loss"}
"""The Trainer's name of a metric -> its key in metrics.jsonl."""


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
        self._losses: list[Tensor] = []
        self._summed = False
        self._hook: Any = None

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
        folder = _checkpoint(output, step)
        saved = next((folder / name for name in (self._state, STATE) if (folder / name).exists()), None)
        if step and saved:
            self._load(saved)
        self._hook = model.register_forward_hook(self._heard, with_kwargs=True)

    @property
    def _state(self) -> str:
        """Name of the state's file, which differs between the callbacks of one training."""
        return STATE if self.path is None else f"spike_monitor-{Path(self.path).stem}.pt"

    @harmless
    def _load(self, saved: Path) -> None:
        go_on(self.monitor, torch.load(saved, weights_only=True))

    @harmless
    def _heard(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        loss = output.get("loss") if hasattr(output, "get") else getattr(output, "loss", None)
        if model.training and isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses.append(loss.detach().reshape(()))
            # A model that gets the number of items of the whole step returns its share of the loss instead of a mean.
            self._summed = kwargs.get("num_items_in_batch") is not None

    @harmless
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        losses, self._losses = self._losses, []
        if self.monitor and losses:
            together = torch.stack([loss.to(losses[0]) for loss in losses])  # models may span several devices
            self.monitor.observe(together.sum() if self._summed else together.mean(), step=state.global_step + 1)

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
        self._losses = []
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self.monitor is not None:
            self.monitor.close()


def _checkpoint(output: Path, step: int) -> Path:
    return output / f"checkpoint-{step}"
