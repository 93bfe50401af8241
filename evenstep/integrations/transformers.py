"""Spike telemetry in transformers' Trainer, and in what is built on it (TRL, axolotl, LLaMA-Factory)."""

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
"""In each checkpoint of the Trainer, so that baselines go on after a resume."""

TRAINING = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad_norm"}
VALIDATION = {"eval_loss": "val_loss"}
"""The Trainer's names of what is in lines of ours."""


class SpikeCallback(TrainerCallback):
    """Watches the Trainer's optimizer with a `SpikeMonitor`: ``Trainer(..., callbacks=[SpikeCallback()])``.

    Writes metrics.jsonl, with the Trainer's own losses and evaluations in it, for ``evenstep report OUTPUT_DIR``. Adds
    ``spikes`` (since the last log) and ``spike_rate`` to the Trainer's log history. Events know the loss of their step
    where the model returns one (with labels, no loss function of the Trainer's own).

    Args:
        path: the file; default ``metrics.jsonl`` in the Trainer's ``output_dir``. A run that starts at step 0 replaces
            it; one that resumes goes on with it.
        sinks: further places for the records, as `SpikeMonitor` takes them. They stay open from one ``train`` to the
            next, and are closed when the callback goes or the program ends.
        **options: those of `SpikeMonitor`: ``every``, ``say``, ``samples``, ``ratio``, ``sigma``, ``window``,
            ``parameters_every``, ``lowbit``.

    ``monitor`` is the `SpikeMonitor` while training runs, None before.
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
        """Several callbacks keep their states apart by the names of their files."""
        return STATE if self.path is None else f"spike_monitor-{Path(self.path).stem}.pt"

    @harmless
    def _load(self, saved: Path) -> None:
        go_on(self.monitor, torch.load(saved, weights_only=True))

    @harmless
    def _heard(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        loss = output.get("loss") if hasattr(output, "get") else getattr(output, "loss", None)
        if model.training and isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses.append(loss.detach().reshape(()))
            # Given the number of items of the whole step, models return their share of its loss instead of a mean.
            self._summed = kwargs.get("num_items_in_batch") is not None

    @harmless
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        losses, self._losses = self._losses, []
        if self.monitor and losses:
            together = torch.stack([loss.to(losses[0]) for loss in losses])  # a model may lie on several devices
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
