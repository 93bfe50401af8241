"""One pretraining run: ``step()`` does one optimizer step, ``fit()`` is the loop around it.

What makes a resumed run equal to one that was never stopped, bit for bit on a CPU: the learning rate is a function
of the step, the data a function of the position, and a checkpoint holds everything else that moves (weights,
optimizer, random states, the sums behind the next log line). On a GPU nothing in a step waits for the device but
every ``log.every``-th, which reads the loss.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evenstep.data import BatchLoader, eval_batches
from evenstep.errors import EvenstepError
from evenstep.models.hf import require_safetensors
from evenstep.train import setup
from evenstep.train.advice import diverged
from evenstep.train.checkpoint import newest_checkpoint, read_tensors, save_checkpoint, way_on
from evenstep.train.config import Config
from evenstep.train.config_io import build, read_toml, to_toml
from evenstep.train.evaluate import EvalResult, evaluate
from evenstep.train.files import locked, replace_text
from evenstep.train.hardware import pick_device
from evenstep.train.interrupts import Interrupted, Interrupts, Stopped
from evenstep.train.metrics import Metrics
from evenstep.train.optimizers import LearningRates, build_optimizer, check_optimizer
from evenstep.train.progress import LineProgress, make_progress, tell
from evenstep.train.records import StepResult, Window, train_record, validation_record
from evenstep.train.schedule import lr_factor
from evenstep.train.state import check_resume, restore_state, write_state
from evenstep.train.summary import finish
from evenstep.train.telemetry import RunTelemetry

Say = Callable[[str], None]


class Run:
    """A run in its directory. ``Run(config)`` starts one, ``Run.resume(directory)`` takes one up; both build
    everything and train nothing.

    Raises EvenstepError, one line, for whatever does not fit together: data, model, optimizer, directory, checkpoint.
    """

    def __init__(self, config: Config, *, say: Say = tell, data_progress: Any = None) -> None:
        if config.model.init:
            config = setup.with_shape_of(config, Path(config.model.init))
        out = setup.fresh_directory(config)
        self._build(
            dataclasses.replace(config, out=str(out), name=setup.default_name(config)), None, say, data_progress
        )
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise EvenstepError(f"{self.out} cannot be created ({problem.strerror}); give another --out") from None
        if (self.out / "config.toml").exists():
            say(f"{self.out} stopped before its first checkpoint; it starts again")
            (self.out / "metrics.jsonl").unlink(missing_ok=True)
        replace_text(self.out / "config.toml", to_toml(self.config))
        self.metrics = Metrics(self.out / "metrics.jsonl")

    @classmethod
    def resume(
        cls, directory: Path | str, config: Config | None = None, *, say: Say = tell, data_progress: Any = None
    ) -> Run:
        """The run of ``directory`` at its newest whole checkpoint; ``config`` may change what does not touch exactness.

        A larger ``train.steps`` trains on; under a cosine or wsd schedule it also changes the learning rates from
        here on. One below the steps done is refused. Nothing is written before all of it fits.
        """
        directory = Path(directory)
        if not (directory / "config.toml").is_file():
            raise EvenstepError(f"{directory} is not a run: it has no config.toml; evenstep runs lists runs")
        config = config or build(read_toml(directory / "config.toml"))
        config = dataclasses.replace(config, out=str(directory), name=config.name or directory.name)
        with locked(directory):
            checkpoint = newest_checkpoint(directory, say)
        if config.model.init:
            config = setup.with_shape_of(config, checkpoint)
        trainer = read_tensors(checkpoint / "trainer.pt")
        check_resume(directory, config, trainer)
        run = cls.__new__(cls)
        run._build(config, checkpoint, say, data_progress)
        restore_state(run, checkpoint, trainer)
        run.saved = checkpoint
        replace_text(directory / "config.toml", to_toml(config))
        (directory / "summary.json").unlink(missing_ok=True)  # it spoke of another end
        run.metrics = Metrics(directory / "metrics.jsonl", last_step=run.step_number)
        run.seconds = max(run.seconds, run.metrics.seconds)  # what came after the save and is not repeated
        left = config.total_steps - run.step_number
        say(f"resumed from {checkpoint}, {f'{left} steps to go' if left else 'nothing left to do'}")
        return run

    def _build(self, config: Config, checkpoint: Path | None, say: Say, data_progress: Any) -> None:
        self.config = config
        self.say = say
        self.out = Path(config.out or "")
        self.device = pick_device(config.train.device)
        check_optimizer(config.optim)
        require_safetensors()  # without it the first checkpoint would end the run
        setup.set_up_torch(config)
        self.data = setup.load_data(config, data_progress)
        self.tokenizer = self.data.tokenizer
        self.model = setup.build_model(config, self.data.vocab_size, checkpoint, self.device, say)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.rates = LearningRates(self.optimizer)
        self.telemetry = RunTelemetry(self)
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
        self.saved: Path | None = None  # the checkpoint of this very moment
        self.window = self._new_window()

    def _new_window(self) -> Window:
        return Window(torch.zeros((), dtype=torch.float64, device=self.device))

    # ---- one step ----

    def step(self) -> StepResult:
        """Read a batch, run forward and backward in micro batches, update. The loss is the mean over tokens, however
        they are split.

        EvenstepError when the loss is NaN or infinite: on a CPU before the weights are touched, and with a checkpoint
        of them beside the earlier ones, on a GPU at the next log step.
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
            rescue = self.step_number > 0 and self._weights_are_finite()
            rescued = (self.saved or self.save(keep_all=True)) if rescue else None
            raise diverged(self.config, number, f"the loss is {loss.item()}", rescued)
        norm = None
        if config.train.clip_norm:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.train.clip_norm, foreach=True)
        elif self._is_log_step(number):
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None], foreach=True)
        self.telemetry.observe(loss, position)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        self.step_number = number
        self.saved = None
        self.tokens += targets.numel()
        elapsed = time.perf_counter() - began
        self.window.add(loss, elapsed, waited)
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

    # ---- validation, checkpoints ----

    def evaluate(self, stop: Interrupts | None = None) -> EvalResult:
        """Token-weighted loss on the validation split (at most ``eval.max_tokens`` of it); the model is left in
        training mode. A signal to ``stop`` ends it between two batches, with Stopped."""
        config, val = self.config, self.data.val
        batch_size = config.eval.batch_size or config.micro_batch_size
        batches = eval_batches(val, config.train.seq_len, batch_size, config.eval.max_tokens or None)
        batches = stop.watch(batches) if stop else batches
        per_token = val.num_bytes / max(1, len(val))
        return evaluate(self.model, batches, per_token, device=self.device, autocast=self.autocast, chunk=self.chunk)

    def save(self, *, keep_all: bool = False) -> Path:
        """Write a checkpoint of this moment; returns its directory. EvenstepError on a full disk, earlier
        checkpoints intact. ``keep_all``: one that may be worthless, so no earlier one is deleted for it."""
        self.telemetry.settle(last=keep_all or self.step_number == self.config.total_steps)
        self.saved = save_checkpoint(
            self.out / "checkpoints",
            self.step_number,
            lambda directory: write_state(self, directory),
            None if keep_all else self.config.checkpoint.keep,
        )
        return self.saved

    # ---- the loop ----

    def fit(self) -> dict[str, Any]:
        """Train to the end of the budget with log, validation, checkpoints; returns what summary.json holds.

        SIGINT, SIGTERM or SIGHUP: the step is finished or the validation given up, a checkpoint saved and Interrupted
        raised with the way to go on.
        """
        self._since = time.perf_counter() - self.seconds
        with locked(self.out), Interrupts() as stop:
            try:
                progress = make_progress(self.config.total_steps, self.step_number)
                with progress, self.telemetry.live(progress):
                    self._train(progress, stop)
            except KeyboardInterrupt:
                message = f"stopped at once, without saving; {way_on(self.out)}"
                raise Interrupted(message, signal.SIGINT) from None
        self.seconds = self._clock()
        return finish(self)

    def _train(self, progress: LineProgress, stop: Interrupts) -> None:
        config, total = self.config, self.config.total_steps
        while True:
            at_end = self.step_number >= total
            if stop.signal is None and (at_end or _due(self.step_number, config.eval.every)):
                self._validate(progress, stop)
            if stop.signal is not None:
                saved = self.saved or self._save_finite()
                raise Interrupted(
                    f"stopped after step {self.step_number} of {total}, saved {saved}; {way_on(self.out)}", stop.signal
                )
            if at_end:
                return
            result = self.step()
            progress.step(result.step, result.loss.item() if self.device.type == "cpu" else None)
            self.seconds = self._clock()
            if self._is_log_step(result.step):
                self._log(result, progress)
            if _due(result.step, config.checkpoint.every) or result.step == total:
                self._save_finite()

    def _clock(self) -> float:
        """Seconds of training, with those before a resume."""
        return time.perf_counter() - self._since

    def _save_finite(self) -> Path:
        """Save, but never weights that are lost: the loss is of the weights before the update, so these are looked
        at too."""
        loss = self.window.loss.item()
        if not math.isfinite(loss):
            raise diverged(self.config, self.step_number, f"the loss is {loss}")
        if not self._weights_are_finite():
            raise diverged(self.config, self.step_number, "the norm of the weights is not finite")
        return self.save()

    def _weights_are_finite(self) -> bool:
        return math.isfinite(torch.nn.utils.get_total_norm(self.parameters, foreach=True).item())

    def _log(self, result: StepResult, progress: LineProgress) -> None:
        window, waiting = self.window, time.perf_counter()
        loss = window.loss.item() / window.steps  # waits for the GPU
        if not math.isfinite(loss):
            raise diverged(self.config, result.step, f"the loss is {loss}")
        waited = time.perf_counter() - waiting
        self.step_seconds += waited
        seconds = window.seconds + waited
        self.telemetry.settle(last=False)
        record = train_record(self, result, loss, seconds)
        self.telemetry.write(record)
        progress.train(record)
        self.window = self._new_window()

    def _validate(self, progress: LineProgress, stop: Interrupts) -> None:
        if not len(self.data.val) or self.metrics.validated == self.step_number:
            return
        try:
            result = self.evaluate(stop)
        except Stopped:  # it is done again by whoever resumes
            return
        self.seconds = self._clock()
        record = validation_record(self, result)
        self.telemetry.write(record)
        progress.validation(record)


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0
