"""One pretraining run: ``step()`` does one optimizer step, ``fit()`` is the loop around it.

What makes a resumed run equal to one that was never stopped, bit for bit on a CPU: the learning rate is a function
of the step, the data a function of the position, and a checkpoint holds everything else that moves (weights,
optimizer, random states, the sums behind the next log line). On a GPU nothing in a step waits for the device but
every ``log.every``-th, which reads the loss.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evenstep.data import BatchLoader, eval_batches
from evenstep.errors import EvenstepError
from evenstep.train import setup
from evenstep.train.checkpoint import list_checkpoints, newest_checkpoint, read_tensors, save_checkpoint
from evenstep.train.config import Config
from evenstep.train.config_io import build, changed_options, read_toml, to_toml
from evenstep.train.evaluate import EvalResult, evaluate
from evenstep.train.files import locked, replace_text
from evenstep.train.hardware import pick_device
from evenstep.train.interrupts import Interrupted, Interrupts
from evenstep.train.metrics import Metrics
from evenstep.train.optimizers import LearningRates, build_optimizer, check_optimizer
from evenstep.train.progress import LineProgress, make_progress
from evenstep.train.records import StepResult, Window, train_record, validation_record
from evenstep.train.schedule import lr_factor
from evenstep.train.state import restore_state, write_state
from evenstep.train.summary import finish

Say = Callable[[str], None]


class Run:
    """A run in its directory. ``Run(config)`` starts one, ``Run.resume(directory)`` takes one up; both build
    everything and train nothing.

    Raises EvenstepError, one line, for whatever does not fit together: data, model, optimizer, directory, checkpoint.
    """

    def __init__(self, config: Config, *, say: Say = print, data_progress: Any = None) -> None:
        out = setup.fresh_directory(config)
        self._build(
            dataclasses.replace(config, out=str(out), name=setup.default_name(config)), None, say, data_progress
        )
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise EvenstepError(f"{self.out} cannot be created ({problem.strerror}); give another --out") from None
        replace_text(self.out / "config.toml", to_toml(self.config))
        self.metrics = Metrics(self.out / "metrics.jsonl")

    @classmethod
    def resume(
        cls, directory: Path | str, config: Config | None = None, *, say: Say = print, data_progress: Any = None
    ) -> Run:
        """The run of ``directory`` at its newest whole checkpoint; ``config`` may change what does not touch exactness.

        A larger ``train.steps`` trains on; under a cosine or wsd schedule it also changes the learning rates from
        here on.
        """
        directory = Path(directory)
        if not (directory / "config.toml").is_file():
            raise EvenstepError(f"{directory} is not a run: it has no config.toml; evenstep runs lists runs")
        config = config or build(read_toml(directory / "config.toml"))
        config = dataclasses.replace(config, out=str(directory), name=config.name or directory.name)
        with locked(directory):
            checkpoint = newest_checkpoint(directory, say)
        trainer = read_tensors(checkpoint / "trainer.pt")
        saved = build(trainer["config"])
        if changed := changed_options(saved, config):
            raise EvenstepError(
                f"{directory} was trained with another {', '.join(changed)}; resuming keeps these as they were: "
                "leave them out, or start a new run with another --out"
            )
        run = cls.__new__(cls)
        run._build(config, checkpoint, say, data_progress)
        restore_state(run, checkpoint, trainer)
        replace_text(directory / "config.toml", to_toml(config))
        (directory / "summary.json").unlink(missing_ok=True)  # it spoke of another end
        run.metrics = Metrics(directory / "metrics.jsonl", last_step=run.step_number)
        say(f"resumed from {checkpoint}, {run.config.total_steps - run.step_number} steps to go")
        return run

    def _build(self, config: Config, checkpoint: Path | None, say: Say, data_progress: Any) -> None:
        self.config = config
        self.say = say
        self.out = Path(config.out or "")
        self.device = pick_device(config.train.device)
        check_optimizer(config.optim)
        setup.check_model(config)
        setup.set_up_torch(config)
        self.data = setup.load_data(config, data_progress)
        self.tokenizer = self.data.tokenizer
        self.model = setup.build_model(config, self.data.vocab_size, checkpoint, self.device)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.rates = LearningRates(self.optimizer)
        train = config.train
        self.loader = BatchLoader(self.data.train, train.seq_len, train.batch_size, config.seed)
        self.chunk = setup.loss_chunk(config, self.model.config.vocab_size, self.device, say)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=train.dtype == "bf16-autocast")
        if train.compile:  # block by block: one small graph serves all, and the chunked loss cannot be compiled
            for block in self.model.model.layers:
                block.compile(dynamic=False)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.step_number = 0
        self.tokens = 0
        self.seconds = 0.0
        self.step_seconds = 0.0
        self.window = self._new_window()

    def _new_window(self) -> Window:
        return Window(torch.zeros((), dtype=torch.float64, device=self.device))

    # ---- one step ----

    def step(self) -> StepResult:
        """Read a batch, run forward and backward in micro batches, update. The loss is the mean over tokens, however
        they are split.

        EvenstepError when the loss is NaN or infinite: on a CPU before the weights are touched, and with a checkpoint
        of them, on a GPU at the next log step.
        """
        config, began = self.config, time.perf_counter()
        number = self.step_number + 1
        factor = lr_factor(config.schedule, number, config.total_steps, config.warmup_steps)
        self.rates.set(self.optimizer, factor)
        position = self.loader.position
        inputs, targets = self.loader.next_batch()
        waited = time.perf_counter() - began
        inputs, targets = inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
        loss = self._accumulate(inputs, targets)
        if self.device.type == "cpu" and not math.isfinite(loss.item()):
            self.loader.position = position
            self.optimizer.zero_grad(set_to_none=True)
            if self.step_number and self._weights_are_finite():
                self.save()
            raise self._diverged(number, f"the loss is {loss.item()}")
        norm = None
        if config.train.clip_norm:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.train.clip_norm, foreach=True)
        elif self._is_log_step(number):
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None], foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        self.step_number = number
        self.tokens += targets.numel()
        window = self.window
        window.loss += loss
        window.steps += 1
        window.timed_steps += 1
        window.data_seconds += waited
        elapsed = time.perf_counter() - began
        window.seconds += elapsed
        self.step_seconds += elapsed
        return StepResult(number, loss, config.optim.lr * factor, norm)

    def _accumulate(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Backward through all micro batches; returns the mean loss over tokens, detached."""
        size, total = self.config.micro_batch_size, targets.numel()
        parts = []
        for x, y in zip(inputs.split(size), targets.split(size), strict=True):
            with self.autocast:
                part = self.model.loss(x, y, chunk=self.chunk) * (y.numel() / total)
            part.backward()
            parts.append(part.detach())
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum()

    def _is_log_step(self, number: int) -> bool:
        return number % self.config.log.every == 0 or number == self.config.total_steps

    def _diverged(self, step: int, what: str) -> EvenstepError:
        kept = list_checkpoints(self.out / "checkpoints")
        way_on = (
            f"the last good checkpoint is {kept[0]}; --resume {self.out} goes on from it"
            if kept
            else "no checkpoint was saved before it"
        )
        return EvenstepError(
            f"{what} at step {step}, training stopped; {way_on}. "
            "Lower optim.lr, lengthen schedule.warmup_steps or set train.clip_norm in a new run"
        )

    # ---- validation, checkpoints ----

    def evaluate(self) -> EvalResult:
        """Token-weighted loss on the validation split (at most ``eval.max_tokens`` of it); the model is left in
        training mode."""
        config, val = self.config, self.data.val
        batch_size = config.eval.batch_size or config.micro_batch_size
        batches = eval_batches(val, config.train.seq_len, batch_size, config.eval.max_tokens or None)
        per_token = val.num_bytes / max(1, len(val))
        return evaluate(self.model, batches, per_token, device=self.device, autocast=self.autocast, chunk=self.chunk)

    def save(self) -> Path:
        """Write a checkpoint of this moment; returns its directory. EvenstepError on a full disk, earlier
        checkpoints intact."""
        return save_checkpoint(
            self.out / "checkpoints",
            self.step_number,
            lambda directory: write_state(self, directory),
            self.config.checkpoint.keep,
        )

    # ---- the loop ----

    def fit(self) -> dict[str, Any]:
        """Train to the end of the budget with log, validation, checkpoints; returns what summary.json holds.

        SIGINT or SIGTERM: the step is finished, a checkpoint saved and Interrupted raised with the way to go on.
        """
        config, total = self.config, self.config.total_steps
        began, before = time.perf_counter(), self.seconds
        with locked(self.out), make_progress(total, self.step_number) as progress, Interrupts() as stop:
            while True:
                at_end = self.step_number >= total
                if (at_end or _due(self.step_number, config.eval.every)) and self.metrics.validated != self.step_number:
                    self._validate(progress)
                if at_end:
                    break
                result = self.step()
                progress.step(result.step, result.loss.item() if self.device.type == "cpu" else None)
                self.seconds = before + time.perf_counter() - began
                if self._is_log_step(result.step):
                    self._log(result, progress)
                if stop.signal is not None:
                    saved = self._save_finite()
                    raise Interrupted(
                        f"stopped after step {self.step_number} of {total}, saved {saved}; "
                        f"go on with: evenstep pretrain --resume {self.out}",
                        stop.signal,
                    )
                if _due(result.step, config.checkpoint.every) or result.step == total:
                    self._save_finite()
        self.seconds = before + time.perf_counter() - began
        return finish(self)

    def _save_finite(self) -> Path:
        """Save, but never weights that are lost: the loss is of the weights before the update, so these are looked
        at too."""
        loss = self.window.loss.item()
        if not math.isfinite(loss):
            raise self._diverged(self.step_number, f"the loss is {loss}")
        if not self._weights_are_finite():
            raise self._diverged(self.step_number, "the norm of the weights is not finite")
        return self.save()

    def _weights_are_finite(self) -> bool:
        return math.isfinite(torch.nn.utils.get_total_norm(self.parameters, foreach=True).item())

    def _log(self, result: StepResult, progress: LineProgress) -> None:
        window, waiting = self.window, time.perf_counter()
        loss = window.loss.item() / window.steps  # waits for the GPU
        if not math.isfinite(loss):
            raise self._diverged(result.step, f"the loss is {loss}")
        waited = time.perf_counter() - waiting
        self.step_seconds += waited
        seconds = window.seconds + waited
        record = train_record(self, result, loss, seconds)
        self.metrics.write(record)
        progress.train(record)
        self.window = self._new_window()

    def _validate(self, progress: LineProgress) -> None:
        result = self.evaluate()
        record = validation_record(self, result)
        self.metrics.write(record)
        progress.validation(record)


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0
