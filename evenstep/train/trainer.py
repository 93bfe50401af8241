"""The training loop. `Trainer.fit` trains to the end of the budget; `Trainer.step` does one optimizer step.

The file reads from top to bottom: the parts of a trainer (`Trainer._build`), the loop (`Trainer.train`), one step, the
log, validation, checkpoints and resume, bad steps, and the end of a run. A
`evenstep.train.task.Task` provides the data, the model, the loss and the validation.

A resumed run equals an uninterrupted one bit for bit on a CPU. The learning rate is a function of the step, the data
are a function of the loader's position, and a checkpoint contains everything else that changes: weights, optimizer
state, random states, and the sums for the next training record. On a GPU a step does not wait for the device, except
every ``log.every``-th step, which reads the loss.

With several processes, each one has its own Trainer, and all processes call the same methods in the same order.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

import torch
from torch import Tensor

from evenstep.baselines.catalog import allow_known_state
from evenstep.data import prepare_display
from evenstep.errors import EvenstepError
from evenstep.kernels import uploaded
from evenstep.telemetry.clocks import steps_to_reset
from evenstep.telemetry.guard import Event, SpikeGuard
from evenstep.telemetry.snapshot import Snapshot, rng_state, set_rng_state
from evenstep.train.checkpoint import (
    PARENT,
    TRAINER,
    Parent,
    delete_newer,
    diverged,
    fill,
    how_to_continue,
    list_checkpoints,
    newest_checkpoint,
    read_trainer,
    write_tensors,
)
from evenstep.train.config import BaseConfig
from evenstep.train.config_io import (
    build,
    check_parent,
    check_resume,
    config_file,
    new_run,
    read_toml,
    to_tables,
    to_toml,
)
from evenstep.train.distributed import Heartbeat, Parallel, World, clip_, launched, open_world, restarts, total_norm
from evenstep.train.evaluate import Evaluation
from evenstep.train.files import RunLock, check_own, default_name, fresh_directory, hold, locked, replace_text
from evenstep.train.hardware import bf16_advice, peak_flops, peak_memory, pick_device, set_up_torch
from evenstep.train.interrupts import Interrupted, Interrupts, Stopped, Votes
from evenstep.train.log import (
    LineProgress,
    Metrics,
    NoMetrics,
    make_progress,
    print_line,
    print_nothing,
    resume_metrics,
)
from evenstep.train.optimizers import (
    LearningRates,
    build_optimizer,
    changed_state,
    check_optimizer,
    lr_factor,
    rising_rate,
)
from evenstep.train.saving import Saver, load_optimizer, optimizer_tensors
from evenstep.train.summary import attempt, finish, header, run_facts
from evenstep.train.task import Pretraining, Task
from evenstep.train.telemetry import RunTelemetry

T = TypeVar("T")

BAD_BATCH_LIMIT = 10
"""Number of non-finite batches without a checkpoint in between after which ``train.on_nan`` ends the run. So many point
to the weights or the learning rate, not to the data."""

SAVE_FAILED = 1000
"""The vote of a process whose background save has failed. It is larger than every signal number, so it wins the
vote."""


@dataclasses.dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step.

    ``loss`` is the mean over the tokens of the step, a 0-d tensor on the device. ``grad_norm`` is the norm of all
    gradients before clipping, None where the step did not compute it (it does on log steps and when clipping).
    """

    step: int
    loss: Tensor
    lr: float
    grad_norm: Tensor | None


@dataclasses.dataclass
class Window:
    """Sums over the steps since the last training record. A checkpoint contains the sum of losses and the number of
    steps, but not the times."""

    loss: Tensor
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0

    def add(self, loss: Tensor, tokens: int, seconds: float, data_seconds: float) -> None:
        """Add one step."""
        self.loss += loss
        self.steps += 1
        self.tokens += tokens
        self.seconds += seconds
        self.data_seconds += data_seconds


class Trainer:
    """A run in its directory. ``Trainer(config)`` starts a run, `Trainer.resume` continues one; both build everything
    and train nothing.

    Args:
        config: a `evenstep.train.config.Config`, or the configuration type of the task.
        world: the processes that train together; None for this process alone.
        say: called with each line of text that is meant for the user. Default: print it.
        data_progress: called with the progress of the data's preparation.
        parent: the checkpoint of another run to go on from. The options may differ; the state of the optimizer and the
            position in the data are taken over where they fit, and ``say`` is called with a line where they do not.

    Raises EvenstepError when data, model, optimizer, directory and checkpoint do not fit together.

    Process 0 holds the lock of the directory from before the first write to the end of `fit`; without `fit`, as long as
    the object exists.
    """

    TASK: ClassVar[type[Task]] = Pretraining
    lock: RunLock | None = None

    def __init__(
        self,
        config: Any,
        *,
        world: World | None = None,
        say: Callable[[str], None] = print_line,
        data_progress: Any = None,
        parent: Parent | None = None,
    ) -> None:
        world = world or World(pick_device(config.train.device))
        task = self.TASK(world, say if world.is_main else print_nothing)
        checkpoint = Path(world.on_rank_0(lambda: str(parent.find(task.say)))) if parent else None
        state = None
        if parent and checkpoint:
            allow_known_state()
            state = read_trainer(checkpoint)
            check_parent(parent.run, config, state)
        config = task.resolve(config, checkpoint)
        # Process 0 chooses the directory: its name contains the time, and the processes may see different files.
        out = world.on_rank_0(lambda: str(fresh_directory(config)))
        config = dataclasses.replace(config, out=out, name=default_name(config))
        # Nothing is written before the whole run is built, so that an error leaves no empty run behind.
        self._build(config, task, data_progress, blank=checkpoint is not None)
        if checkpoint and state:
            with world.raise_on_all_ranks():
                self._adopt(checkpoint, state)
        world.on_rank_0(lambda: self._create_directory(parent))
        if parent is None:
            self.metrics = Metrics(self.out / "metrics.jsonl") if world.is_main else NoMetrics()
        else:  # at once: the new run depends on no file of the other one
            self.metrics = resume_metrics(self.out / "metrics.jsonl", self.step_number, world)
            self.save()

    def _create_directory(self, parent: Parent | None) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise EvenstepError(f"{self.out} cannot be created ({problem.strerror}); give another --out") from None
        self.lock = hold(self.out)
        # Checked again under the lock: another run may have started and ended here in the meantime.
        fresh_directory(self.config)
        check_own(self.out)
        if (self.out / "config.toml").exists():
            self.say(f"{self.out} stopped before its first checkpoint; it starts again")
            (self.out / "metrics.jsonl").unlink(missing_ok=True)
        if parent:
            facts = {"run": str(parent.run.resolve()), "step": self.step_number}
            replace_text(self.out / PARENT, json.dumps(facts, indent=1) + "\n")
            with suppress(FileNotFoundError):
                shutil.copyfile(parent.run / "metrics.jsonl", self.out / "metrics.jsonl")
        replace_text(self.out / "config.toml", to_toml(self.config))

    def _build(self, config: Any, task: Task, data_progress: Any, *, blank: bool) -> None:
        """Create everything that a step needs. ``blank``: a checkpoint will provide the weights."""
        world = task.world
        self.config, self.task, self.world, self.say = config, task, world, task.say
        self.out = Path(config.out or "")
        self.device = world.device
        check_optimizer(config.optim)
        self.heart = Heartbeat(world, config.parallel.timeout)
        self.saver = Saver(self.out / "checkpoints", world, alive=self.heart.alive)
        set_up_torch(config.train.threads, config.train.deterministic, self.device)

        # The order matters: the loader checks the data before the memory is estimated, and both come before the model,
        # whose construction takes long.
        self.data = task.open_data(data_progress if world.is_main else None)
        self.tokenizer = self.data.tokenizer
        self.parallel = Parallel(config, world)
        with world.raise_on_all_ranks():
            self.loader = task.make_loader()
            task.check_memory()
            # FSDP moves each block to the GPU after sharding it; the whole model may not fit there.
            first = torch.device("cpu") if self.parallel.mode in ("fsdp", "hsdp") else self.device
            self.model = task.build_model(first, blank=blank)
            self.parallel.check(self.model)
        if config.lowbit and self.device.type == "cuda" and not config.train.compile:
            # Every operation of a quantisation is a kernel that reads and writes the tensor; a compiler fuses them.
            self.say("low-bit layers run slowly on a GPU without compilation; --compile makes them faster")
        if advice := bf16_advice(self.device, config.train.dtype):
            self.say(advice)
        # The optimizer is built from the sharded parameters. Frozen weights, as beside LoRA adapters, are left out.
        self.parallel.apply(self.model)
        self.parallel.materialise(draw=not blank)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.model, config.optim)
        self.rates = LearningRates(self.optimizer, self.model if config.optim.decay_correction else None)
        self.telemetry = RunTelemetry(
            config,
            self.model,
            self.optimizer,
            self.device,
            sharded=self.parallel.sharded,
            # Not the bound method: the log is opened later, and a rewind replaces it.
            write_metrics=lambda record: self.metrics.write(record),
        )
        self.micro_batch_size = min(config.micro_batch_size, config.train.batch_size // world.data_size)
        self.chunk = task.loss_chunk(self.model)
        # FSDP gathers the weights in bf16 already, so autocast has nothing to cast.
        casts = config.train.dtype == "bf16-autocast" and not self.parallel.sharded
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=casts)

        self.step_number = 0
        self.tokens = 0
        self.seconds = 0.0
        """Time of training, including the time before a resume."""
        self.step_seconds = 0.0
        """Time of the steps alone, without validation and checkpoints."""
        self.skipped: list[tuple[int, int]] = []
        """Ranges of rows of the data that are skipped because their loss or gradient was bad."""
        self.guard = self._make_guard()
        self.snapshot: Snapshot | None = None
        self.actions: list[dict[str, Any]] = []
        """Records of the guard's actions since the snapshot."""
        self.bad_batches = 0
        self.bad_since: int | None = None
        self.saved: Path | None = None
        """The checkpoint of the current step, if there is one."""
        self._grad_norm: Tensor | None = None
        self.window = self.new_window()

    def new_window(self) -> Window:
        # fp64: the sum of thousands of losses must not depend on how often the log is written.
        return Window(torch.zeros((), dtype=torch.float64, device=self.device))

    # ---- the loop ----

    def fit(self) -> dict[str, Any]:
        """Train to the end of the budget with log, validation and checkpoints.

        After SIGINT, SIGTERM or SIGHUP the current step is finished or the current validation abandoned, a checkpoint
        is saved, and Interrupted is raised with the command that continues the run.

        Returns:
            The content of summary.json on process 0, an empty dictionary on the others.
        """
        with locked(self.out) if self.world.is_main else nullcontext():
            self.lock = None  # `locked` has the lock now and releases it at the end of this block
            with self.heart:
                self._fit()
            return self._finish() if self.world.is_main else {}  # the others wait in open_world

    def _fit(self) -> None:
        self._since = time.perf_counter() - self.seconds
        votes = Votes(self.world.control)
        quiet = not self.world.is_main
        with Interrupts(votes, quiet=quiet) as stop:
            try:
                progress = make_progress(self.config.total_steps, self.step_number, quiet=quiet)
                sinks = self.telemetry.live(progress, self.out, quiet=quiet, is_saved=lambda: self.saved is not None)
                with progress, sinks:
                    self.train(progress, stop)
                # The collective of the last vote is still pending, and has to end before the process group does.
                votes.close()
                self.saver.wait()
            except KeyboardInterrupt:
                message = f"stopped at once, without saving; {how_to_continue(self.out)}"
                raise Interrupted(message, signal.SIGINT) from None
            finally:
                self.saver.close()
        self.seconds = time.perf_counter() - self._since

    def train(self, progress: LineProgress, stop: Interrupts) -> None:
        """The loop from the current step to the end of the budget: validate, step, log, save.

        The validation of a step precedes the next step, so that a resumed run repeats it if it was interrupted.
        """
        config, total = self.config, self.config.total_steps
        while True:
            # The processes agree on a signal or a failed save, so that all of them stop at the same step.
            agreed = stop.poll(SAVE_FAILED if self.saver.failed() else 0)
            at_end = self.step_number >= total
            if agreed is None and (at_end or _due(self.step_number, config.eval.every)):
                self._validate(progress, stop)
            if stop.agreed == SAVE_FAILED:
                self.saver.wait()  # raises the error of the save
                # It did not raise: the failed save was that of another process, and has been repeated since.
                stop.agreed = stop.signal
            if stop.agreed is not None:  # also when the signal came during the validation
                saved = self.saved or self.save_finite(wait=True)
                self.saver.wait()
                where = f"stopped after step {self.step_number} of {total}, saved {saved}"
                raise Interrupted(f"{where}; {how_to_continue(self.out)}", stop.agreed)
            if at_end:
                return
            if self._snapshot_is_due():
                self._take_snapshot()
            result = self.step()
            # Reading the loss would wait for the GPU; there the bar shows the loss of the last log step.
            progress.step(result.step, result.loss.item() if self.device.type == "cpu" else None)
            self.seconds = time.perf_counter() - self._since
            save = _due(result.step, config.checkpoint.every) or result.step == total
            if self.guard and (save or self.is_log_step(result.step)):
                self.guard.flush()  # neither the log nor a checkpoint may contain a step that a rewind will undo
                if self.step_number != result.step:
                    continue
            if self.is_log_step(result.step):
                self._log(result, progress)
            if save:
                self.save_finite(wait=not config.checkpoint.background)

    # ---- one step ----

    def step(self) -> StepResult:
        """Read a batch, run forward and backward in micro batches, and update the weights.

        The loss is the mean over the tokens of all processes, independent of how the batch is divided. The guard
        (``guard.ladder``, ``train.on_nan``) decides what happens at a bad step: it reads another batch, and after a
        rewind, this method does an earlier step. Without a guard, a loss that is not finite raises EvenstepError: on a
        CPU before the weights change, with a checkpoint of them; on a GPU at the next log step.
        """
        config, began = self.config, time.perf_counter()
        data_seconds = 0.0
        while True:  # until the optimizer's step is taken
            number = self.step_number + 1
            # A function of the step alone: after a rewind or a resume the rates are right without a state.
            factor = lr_factor(config.schedule, number, config.total_steps, config.warmup_steps)
            self.rates.set(self.optimizer, factor)
            position = self._pass_over_skipped()
            self.heart.beat(number, "reading data")
            asked = time.perf_counter()
            inputs, targets = self.loader.next_batch()
            data_seconds += time.perf_counter() - asked
            self.heart.beat(number, "forward and backward")
            # [rows of this process, T]; the copy to a GPU is asynchronous.
            inputs, targets = uploaded(inputs, self.device), uploaded(targets, self.device)
            with self.telemetry.watching(self.is_log_step(number)):
                loss = self._accumulate(inputs, targets)
            update = functools.partial(self._update, loss, number, position)
            if self.guard is None:
                self._check_loss(loss, number, position)
                update()
                break
            factor *= self.guard.lr_scale
            # The guard judges the gradients as they are before clipping.
            if self.guard.step(loss, (position, position + config.train.batch_size), take=update):
                break
            self.guard.num_steps = self.step_number  # the step is done again
            self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)

        self.step_number = number
        self.saved = None  # the newest checkpoint is of an earlier step now
        tokens = self.task.step_tokens()
        self.tokens += tokens
        elapsed = time.perf_counter() - began
        self.window.add(loss, tokens, elapsed, data_seconds)
        self.step_seconds += elapsed
        return StepResult(number, loss, config.optim.lr * factor, self._grad_norm)

    def _update(self, loss: Tensor, number: int, position: int) -> None:
        """Clip the gradients and take the optimizer's step."""
        self._grad_norm = self._gradient_norm(number)
        # Before the step: telemetry pairs this loss with the statistics that the optimizer is about to compute.
        self.telemetry.observe(loss, position, number)
        self.heart.beat(number, "the optimizer's step")
        self.optimizer.step()

    def _accumulate(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Run all micro batches forward and backward; returns the mean loss over the tokens of all processes, detached.

        ``inputs`` and ``targets`` are int64 [B, T] in pretraining, where B is the rows of this process; fine-tuning has
        shapes of its own, rows first.
        """
        size, losses = self.micro_batch_size, []
        weights = self.task.loss_weights(targets, size)
        for i, (x, y, weight) in enumerate(zip(inputs.split(size), targets.split(size), weights, strict=True)):
            # Gradients accumulate in p.grad over the micro batches [b, T]; only the last one reduces them between
            # processes. The weight of a micro batch is its share of the targets, so that the sum is the mean loss.
            with self.parallel.accumulating(last=i == len(weights) - 1):
                with self.autocast:
                    loss = self.task.loss(self.parallel.loss, x, y, self.chunk) * weight
                loss.backward()
            losses.append(loss.detach())
        # The losses are weighted, so their sum is the mean over the rows of this process, 0-d.
        mean = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        if self.world.data_size > 1:  # DDP and FSDP average the gradients; every process has as many tokens
            mean = self.world.sum(mean / self.world.data_size)
        return mean

    def _gradient_norm(self, number: int) -> Tensor | None:
        """The norm of all gradients together before clipping, 0-d; None in steps that do not use it."""
        clip = self.config.train.clip_norm
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        # The norm takes a pass over all gradients, so steps that neither clip nor report it do without.
        if clip:
            return clip_(gradients, clip)
        return total_norm(gradients) if self.is_log_step(number) else None

    def is_log_step(self, number: int) -> bool:
        return number % self.config.log.every == 0 or number == self.config.total_steps

    # ---- the log ----

    def header(self) -> list[str]:
        """The lines that the command line prints before the first step."""
        trained = sum(p.numel() for p in self.parameters)
        data = self.task.describe_data()
        reset, left = steps_to_reset(self.optimizer), self.config.total_steps - self.step_number
        resets = reset is not None and reset <= left
        return header(self.config, self.model, trained, data, self.world, self.micro_batch_size, resets=resets)

    def _log(self, result: StepResult, progress: LineProgress) -> None:
        """Write a training record to metrics.jsonl. Its loss is the mean over the steps since the last record.

        ``data_share`` is the fraction of the time spent waiting for batches, ``memory`` the peak in bytes, ``mfu`` (on
        a GPU) the model's FLOP/s divided by the peak of the GPU. ``steps_to_reset`` is present if the optimizer resets
        its moments, ``z_loss`` (of the last step) with train.z_loss.
        """
        window, waiting = self.window, time.perf_counter()
        loss = window.loss.item() / window.steps  # waits for the GPU
        if not math.isfinite(loss):  # on a GPU the first place where the loss is read
            self.saver.wait()  # the error names the checkpoints that exist
            raise diverged(self.config, result.step, f"the loss is {loss}")
        # On a GPU the steps only queue their work. The time of this wait belongs to them.
        waited = time.perf_counter() - waiting
        self.step_seconds += waited
        seconds = window.seconds + waited
        self.telemetry.settle(last=False)
        tokens_per_second = window.tokens / seconds
        record: dict[str, Any] = {
            "step": result.step,
            "tokens": self.tokens,
            "loss": loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm.item() if result.grad_norm is not None else None,
            "tokens_per_second": tokens_per_second,
            "data_share": window.data_seconds / seconds,
            "memory": peak_memory(self.device),
            "seconds": self.seconds,
        }
        if peak := peak_flops(self.device, self.config.train.dtype):
            flops = tokens_per_second * self.model.flops_per_token(self.config.train.seq_len)
            record["mfu"] = flops / (peak * self.world.size)
        if (reset := steps_to_reset(self.optimizer)) is not None:
            record["steps_to_reset"] = reset
        record |= self.task.step_record()
        self.telemetry.write(record)
        progress.train(record)
        self.window = self.new_window()

    # ---- validation ----

    def evaluate(self, stop: Interrupts | None = None) -> Any:
        """Validate the model; returns the result of `Task.evaluate`. After a signal to ``stop`` the validation raises
        Stopped between two batches."""

        def watch(items: Iterable[T]) -> Iterator[T]:
            for item in stop.watch(items) if stop else items:
                self.heart.beat(self.step_number, "validation")
                yield item

        batch_size = self.config.eval.batch_size or self.micro_batch_size
        return self.task.evaluate(
            Evaluation(self.model, self.parallel, self.device, self.autocast, self.chunk, batch_size, watch)
        )

    def _validate(self, progress: LineProgress, stop: Interrupts) -> None:
        if not len(self.data.val) or self.metrics.validated == self.step_number:
            return
        try:
            result = self.evaluate(stop)
        except Stopped:  # the resumed run repeats the validation
            return
        self.seconds = time.perf_counter() - self._since
        record = {"step": self.step_number, "tokens": self.tokens, **result.fields(), "seconds": self.seconds}
        self.telemetry.write(record)
        progress.validation(record)

    # ---- checkpoints ----

    def save(self, *, keep_all: bool = False, wait: bool = True) -> Path:
        """Write a checkpoint of the current step; returns its directory, which is complete at once with ``wait``, else
        when `Saver.wait` returns.

        With ``keep_all`` no earlier checkpoint is deleted: the weights of this one may be ruined. EvenstepError on a
        full disk; earlier checkpoints stay intact.
        """
        self.heart.beat(self.step_number, "saving")
        self.telemetry.settle(last=keep_all or self.step_number == self.config.total_steps)
        tensors, rest = optimizer_tensors(self.model, self.optimizer)
        state = self._state(rest)
        self.saved = self.saver.save(
            self.step_number,
            self.tensors() | tensors,
            lambda directory: self._write_small(state, directory),
            None if keep_all else self.config.checkpoint.keep,
            wait=wait,
        )
        return self.saved

    def save_finite(self, *, wait: bool) -> Path:
        """Save a checkpoint, or raise EvenstepError if loss or weights are not finite. The weights are checked too,
        because the loss was computed before the last update."""
        loss = self.window.loss.item()
        problem = None if math.isfinite(loss) else f"the loss is {loss}"
        if problem is None and not self.weights_are_finite():
            problem = "the norm of the weights is not finite"
        if problem is None:
            return self.save(wait=wait)
        self.saver.wait()
        raise diverged(self.config, self.step_number, problem)

    def weights_are_finite(self) -> bool:
        return math.isfinite(total_norm(self.parameters).item())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the model in a checkpoint."""
        return self.task.tensors(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes during a run except model, optimizer and random states."""
        return {
            "step": self.step_number,
            "tokens": self.tokens,
            "position": self.loader.position,
            "skipped": [list(rows) for rows in self.skipped],
            "seconds": self.seconds,
            "step_seconds": self.step_seconds,
            "window_loss": self.window.loss.cpu(),
            "window_steps": self.window.steps,
            "telemetry": self.telemetry.state(),
            "guard": self.guard.state_dict() if self.guard else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.step_number, self.tokens = state["step"], state["tokens"]
        self.seconds, self.step_seconds = state["seconds"], state["step_seconds"]
        self.loader.position = state["position"]
        self.skipped = [(start, stop) for start, stop in state["skipped"]]
        self.window.loss.copy_(state["window_loss"])
        self.window.steps = state["window_steps"]
        self.telemetry.load(state["telemetry"], self.step_number)
        if self.guard:
            self._load_guard(state.get("guard"))

    def _state(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        """The content of trainer.pt: everything that changes during a run, except the tensors of the model and of the
        optimizer. ``optimizer`` is the rest of its state. Random states are gathered from all processes."""
        state = self.state_dict()
        telemetry = state["telemetry"]
        # What differs between processes, and is restored only if as many processes resume.
        own = {"rng": rng_state(), "probe": telemetry.pop("probe") if telemetry else None}
        return state | {
            "tokenizer": self.tokenizer.fingerprint,
            "data": self.task.data_identity(),
            "config": to_tables(self.config),
            "optimizer": optimizer,
            "processes": self.world.gather(lambda: own),
        }

    def _write_small(self, state: dict[str, Any], directory: Path) -> None:
        """Write the files of a checkpoint other than its shards and manifest.

        The first trainer.pt is read back. The state of an optimizer may contain objects that can be pickled, but that
        ``torch.load(weights_only=True)`` refuses. EvenstepError in this case, so that a run does not train for days
        before its first resume fails.
        """
        self.task.save_shape(self.model, directory)
        self.tokenizer.save(directory)
        write_tensors(directory / TRAINER, state)
        if self.saver.last is not None:
            return
        try:
            read_trainer(directory)
        except EvenstepError as problem:
            refused = re.search(r"GLOBAL (\S+)", str(problem.__cause__))
            what = refused[1] if refused else "objects"
            raise EvenstepError(
                f"optim.name {self.config.optim.name}: its state contains {what}, which cannot be loaded from a "
                "checkpoint, so the run could not be resumed; choose an optimizer whose state_dict() has only tensors "
                "and plain values"
            ) from problem

    # ---- resume ----

    @classmethod
    def resume(
        cls,
        directory: Path | str,
        config: Any = None,
        *,
        world: World | None = None,
        say: Callable[[str], None] = print_line,
        data_progress: Any = None,
    ) -> Trainer:
        """The run of ``directory`` at its newest valid checkpoint. ``config`` (default: that of the run) may change
        options whose resume rule allows it.

        A larger ``train.steps`` continues the training; with a cosine or wsd schedule it also changes the learning
        rates from this step on. EvenstepError for a budget below the steps already done, and for every change that the
        resume rules forbid. Nothing is written before everything has been checked.
        """
        directory = Path(directory)
        saved = config_file(directory)
        config = config or build(read_toml(saved), cls.TASK.config_type)
        config = dataclasses.replace(config, out=str(directory), name=config.name or directory.name)
        world = world or World(pick_device(config.train.device))
        say = say if world.is_main else print_nothing

        run = cls.__new__(cls)

        def lock_and_find() -> str:
            run.lock = hold(directory)
            check_own(directory)
            return str(newest_checkpoint(directory, say))

        checkpoint = Path(world.on_rank_0(lock_and_find))
        task = cls.TASK(world, say)
        config = task.resolve(config, checkpoint)
        check_optimizer(config.optim)  # also registers the classes of its state as safe, before trainer.pt is read
        trainer = read_trainer(checkpoint)
        check_resume(directory, config, trainer)
        run._build(config, task, data_progress, blank=True)
        with world.raise_on_all_ranks():
            run._restore(checkpoint, trainer)
        run.saved = checkpoint
        if world.is_main:
            replace_text(saved, to_toml(config))
            (directory / "summary.json").unlink(missing_ok=True)  # written when the run ended before
        run.metrics = resume_metrics(run.out / "metrics.jsonl", run.step_number, world)
        run.seconds = max(run.seconds, run.metrics.seconds)  # the log may be ahead of the checkpoint
        say(f"resumed from {checkpoint}, {run._left()}")
        if (line := rising_rate(build(trainer["config"], type(config)), config, trainer["step"])) is not None:
            say(line)
        return run

    def _restore(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Load the checkpoint into this run, whose model has the same shape. ``state`` is the content of its
        trainer.pt. EvenstepError when the data or the tokenizer differ from those of the checkpoint."""
        if state["tokenizer"] != self.tokenizer.fingerprint:
            raise EvenstepError(
                f"{checkpoint} was trained with another tokenizer than '{self.config.data.tokenizer}' is now; restore "
                f"the former one, or start a new run with: {self._new_run(weights=False)}"
            )
        if state["data"] != self.task.data_identity():
            raise EvenstepError(
                f"{checkpoint} was trained on other tokens than {self.config.data.source} has now (the text has "
                f"changed); restore the text, or start a new run from its weights with: {self._new_run()}"
            )
        # In place: the parameters of a sharded model keep their layout, whatever number of processes wrote the shards.
        fill(checkpoint, self.tensors())
        load_optimizer(self.model, self.optimizer, checkpoint, state["optimizer"])
        processes = state["processes"]
        own = processes[self.world.rank] if len(processes) == self.world.size else None
        telemetry = state["telemetry"]
        self.load_state_dict(state | {"telemetry": telemetry and telemetry | {"probe": own["probe"] if own else None}})
        self._restore_random_state(processes)

    def _restore_random_state(self, processes: list[dict[str, Any]]) -> None:
        if len(processes) == self.world.size:
            set_rng_state(processes[self.world.rank]["rng"])
        else:  # another number of processes: a new seed, the same in all of them, so that replicas stay equal
            torch.manual_seed(hash((self.config.seed, self.step_number)) % 2**63)

    def _adopt(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Go on from the ``checkpoint`` of another run, whose options may be others. ``state`` is the content of its
        trainer.pt."""
        old = build(state["config"], type(self.config))
        if state["tokenizer"] != self.tokenizer.fingerprint:
            raise EvenstepError(
                f"{checkpoint} was trained with another tokenizer than '{self.config.data.tokenizer}' is now; restore "
                "the former one"
            )
        fill(checkpoint, self.tensors())
        changed = changed_state(old.optim, self.config.optim)
        if changed:
            self.say(f"the optimizer starts with an empty state: {changed}")
        else:
            groups, names = self.optimizer.param_groups, self.optimizer.defaults
            chosen = [{key: group[key] for key in names} for group in groups]
            load_optimizer(self.model, self.optimizer, checkpoint, state["optimizer"])
            # The clocks of the saved groups stay, but the hyperparameters are those of this run.
            for group, hyperparameters in zip(self.optimizer.param_groups, chosen, strict=True):
                group.update(hyperparameters)
        same_rows = state["data"] == self.task.data_identity() and old.train.seq_len == self.config.train.seq_len
        if not same_rows:
            self.say("the data are read from the beginning: they are not those of the other run")
            state |= {"position": 0, "skipped": []}
        self.load_state_dict(state | {"telemetry": None})
        self._restore_random_state(state["processes"])
        self.say(f"goes on from {checkpoint}, {self._left()}")

    def _left(self) -> str:
        left = self.config.total_steps - self.step_number
        return f"{left} steps to go" if left else "nothing left to do"

    def _new_run(self, *, weights: bool = True) -> str:
        return new_run(self.config.COMMAND, self.out, weights=weights)

    # ---- bad steps: guard.* and train.on_nan ----

    def _make_guard(self) -> SpikeGuard | None:
        """The guard that the configuration asks for; None if a loss that is not finite just ends the run."""
        guard, on_nan = self.config.guard, self.config.train.on_nan
        make = functools.partial(
            SpikeGuard, self.model, self.optimizer, rewind=self._rewind, on_event=self._on_bad_step
        )
        if guard.actions:
            return make(
                ladder=guard.actions, sigma=guard.sigma, norm_ratio=guard.norm_ratio, loss_rise=guard.loss_rise,
                budget=guard.budget, check_every=1 if self.device.type == "cpu" else self.config.log.every,
            )  # fmt: skip
        if on_nan == "stop":
            return None
        # No finite step is bad, and `_on_bad_step` limits the number of bad ones.
        return make(ladder=(on_nan,), sigma=math.inf, budget=10**9, check_every=1)

    def _load_guard(self, state: dict[str, Any] | None) -> None:
        assert self.guard is not None
        self.guard.num_steps = self.step_number
        try:
            if state is not None:
                self.guard.load_state_dict(state)
        except ValueError as problem:
            self.say(f"{problem}; the guard starts with no history")
        self.guard.stopped = False  # a run that the guard stopped may be resumed

    def _pass_over_skipped(self) -> int:
        """Move the loader past the rows that are skipped, after a rewind or a resume; returns its position."""
        for start, stop in sorted(self.skipped):
            if start <= self.loader.position < stop:
                self.loader.position = stop
        return self.loader.position

    def _check_loss(self, loss: Tensor, number: int, position: int) -> None:
        """End the run at a loss that is not finite. On a GPU `_log` does it: reading the loss of every step would wait
        for the device. The loss is that of all processes together, so all of them decide the same."""
        if self.device.type == "cpu" and not math.isfinite(loss.item()):
            self.optimizer.zero_grad(set_to_none=True)
            self._stop(number, f"the loss is {loss.item()}", position)

    def _stop(self, number: int, what: str, position: int | None) -> NoReturn:
        """End the run at the bad step ``number``. ``position``: where its rows begin, if its gradients have not been
        applied."""
        self.saver.wait()
        rescued = None
        # The weights have not changed since the last step: save them with the position before the bad batch, so that a
        # resume tries it again.
        if position is not None and self.step_number > 0 and self.weights_are_finite():
            self.loader.position = position
            rescued = self.saved or self.save(keep_all=True)
        raise diverged(self.config, number, what, rescued)

    def _on_bad_step(self, event: Event) -> None:
        """Called by the guard after it has acted: leave the rows out, and write down what was done. All processes have
        the same events."""
        guard = self.guard
        assert guard is not None
        action, number, what, rows = event["action"], event["step"] + 1, event["reason"], event["rows"]
        # Bad batches are counted from the newest checkpoint. A rewind to it repeats its steps, and would repeat them
        # forever if every batch were bad.
        self.bad_batches = self.bad_batches + 1 if self.saver.last == self.bad_since else 1
        self.bad_since = self.saver.last
        if self.bad_batches > (guard.budget if self.config.guard.actions else BAD_BATCH_LIMIT):
            what = f"{what}, for the {self.bad_batches}th time since the last checkpoint"
            action = "stop"
        if action == "stop":
            self._stop(number, what, rows[0] if number == self.step_number + 1 else None)
        applied = number <= self.step_number  # judged late, as on a GPU
        here = f"sequences {rows[0]} to {rows[1] - 1} are {'skipped' if action == 'rewind' or not applied else 'kept'}"
        if action == "rewind":
            excluded: set[Any] = guard.excluded
            self.skipped = sorted({*self.skipped, *excluded})
            self._drop_undone_steps()
            self.say(f"step {number}: {what}; back to {self.saved}, {here} from here")
        else:
            if not applied:
                self.skipped.append(rows)
            slower = f"; the next {guard.lr_steps} steps use {guard.lr_factor:g} of the learning rate"
            self.say(f"step {number}: {what}; {here}{slower if action == 'lower_lr' else ''}")
        facts = {"bad_step": number, "action": action, "reason": what, "rows": list(rows)}
        self.actions.append({"kind": "event", "event": "guard", "step": self.step_number, **facts})
        # A rewind has cut the records of the actions that led to it from the log: they are written again.
        again = self.actions if action == "rewind" else self.actions[-1:]
        for record in again:
            if record["step"] > self.step_number or record is again[-1]:
                record["step"] = self.step_number
                self.telemetry.write(record)

    def _snapshot_is_due(self) -> bool:
        every = self.config.guard.snapshot_every
        if self.guard is None or "rewind" not in self.config.guard.actions or not every:
            return False
        if self.snapshot is None:
            return True
        if not _due(self.step_number, every) or self.snapshot.step == self.step_number:
            return False
        # A snapshot has to be from before the first bad step that the guard remembers. A rewind in this very flush
        # returns to the step of the present snapshot.
        self.guard.flush()
        return self.guard.is_calm and self.snapshot.step != self.step_number

    def _take_snapshot(self) -> None:
        self.snapshot = Snapshot(self.step_number, self.model, self.optimizer, data=[self])
        self.snapshot.complete(())
        self.actions.clear()

    def _rewind(self) -> int:
        """Return to the snapshot in memory or, without one, to the newest valid checkpoint; returns its step."""
        self.saver.wait()
        if self.snapshot is not None:
            self.snapshot.restore()
            self.saved = None
            return self.step_number
        number = self.step_number + 1
        try:
            checkpoint = Path(self.world.on_rank_0(lambda: str(newest_checkpoint(self.out, self.say))))
        except EvenstepError:
            what = "the step is bad, and there is no checkpoint to go back to"
            raise diverged(self.config, number, what) from None
        skipped = self.skipped  # the checkpoint does not know the rows that were skipped since
        with self.world.raise_on_all_ranks():
            self._restore(checkpoint, read_trainer(checkpoint))
        self.skipped = sorted({*skipped, *self.skipped})
        self.saved = checkpoint
        return self.step_number

    def _drop_undone_steps(self) -> None:
        """Make the files of the run those of the present step, after a rewind. A crash at any moment leaves a run that
        resumes either before or after the rewind."""
        if self.saved is None:  # from a snapshot: newer checkpoints are of steps that are undone
            self.save(keep_all=True)
            self.world.on_rank_0(lambda: delete_newer(self.out / "checkpoints", self.step_number))
        self.metrics.close()
        self.metrics = resume_metrics(self.out / "metrics.jsonl", self.step_number, self.world)

    # ---- the end ----

    def _finish(self) -> dict[str, Any]:
        """Write summary.json, curve.png and the files of the task, and print the closing lines; returns the summary."""
        facts = run_facts(
            self.config,
            model=self.model,
            optimizer=self.optimizer,
            device=self.device,
            metrics=self.metrics,
            say=self.say,
            processes=self.world.size,
            steps=self.step_number,
            tokens=self.tokens,
            seconds=self.seconds,
            step_seconds=self.step_seconds,
            skipped=self.skipped,
        )
        facts |= self.task.conclusion(self.model, self.out, self.metrics)
        from evenstep.telemetry.page import report_of_run

        # Process 0 alone cannot run a sharded model, so the sample comes from the checkpoint just written.
        reloaded = self.saved if self.parallel.sharded else None
        return finish(
            self.out,
            facts,
            sample=lambda: self.task.sample(self.model, reloaded),
            curve=f"{self.config.name} on {self.config.data.source}" if self.config.log.curve else None,
            report=report_of_run if self.config.log.report else None,
            closing=self.task.closing,
            say=self.say,
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


Run = Trainer
"""The name of `Trainer` in evenstep 0.1."""


def train(
    config: BaseConfig, start: Path | Parent | None, *, auto: bool = False, trainer: type[Trainer] = Trainer
) -> None:
    """The body of ``evenstep pretrain`` and ``evenstep finetune``, in a single process or in one of several.

    Starts the run of ``config``, continues the run in the directory ``start``, or starts a run that goes on from the
    checkpoint ``start`` of another run. With ``auto``, and in processes that torchrun
    has restarted after a failure, the run in ``config.out`` is continued if it has a checkpoint.
    """
    may_restart = launched() and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") not in ("", "0")
    if start is None and config.out is None and (auto or may_restart):
        why = "--resume auto" if auto else "torchrun --max-restarts"
        raise EvenstepError(f"{why} needs --out DIR, the directory in which the run is continued")
    with open_world(config) as world:
        if not isinstance(start, Path) and (auto or restarts() > 0):
            out = Path(config.out or "")
            start = out if world.on_rank_0(lambda: bool(list_checkpoints(out / "checkpoints"))) else start
        with prepare_display() as show:
            if isinstance(start, Path):
                run = trainer.resume(start, config, world=world, data_progress=show)
            else:
                run = trainer(config, world=world, data_progress=show, parent=start)
        for line in attempt("description of the run", run.header, run.say) or ():
            run.say(line)
        run.fit()
