"""One pretraining run: ``step()`` does one optimizer step, ``fit()`` trains to the end (see `evenstep.train.loop`).

What makes a resumed run equal to one that was never stopped, bit for bit on a CPU: the learning rate is a function
of the step, the data a function of the position, and a checkpoint holds everything else that moves (weights,
optimizer, random states, the sums behind the next log line). On a GPU nothing in a step waits for the device but
every ``log.every``-th, which reads the loss.

On several processes each has a Run of its own, and all call the same methods in the same order.
"""

from __future__ import annotations

import dataclasses
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evenstep.data import eval_batches
from evenstep.errors import EvenstepError
from evenstep.kernels import uploaded
from evenstep.train import loop, setup
from evenstep.train.bad_batches import BadBatches
from evenstep.train.checkpoint import newest_checkpoint, read_trainer
from evenstep.train.config_io import build, check_resume, read_toml, to_toml
from evenstep.train.distributed import Heartbeat, Parallel, World, clip_, total_norm
from evenstep.train.evaluate import evaluate
from evenstep.train.files import RunLock, check_own, hold, locked, replace_text
from evenstep.train.hardware import pick_device
from evenstep.train.header import header, rising_rate
from evenstep.train.interrupts import Interrupts
from evenstep.train.log import Metrics, NoMetrics, metrics_of, nothing, tell
from evenstep.train.optimizers import LearningRates, build_optimizer, check_optimizer, lr_factor
from evenstep.train.parts import Parts, Say
from evenstep.train.records import StepResult, Window
from evenstep.train.saving import Saver, optimizer_tensors
from evenstep.train.state import restore_state, trainer_state, write_small
from evenstep.train.summary import attempt, finish
from evenstep.train.telemetry import RunTelemetry


class Run(Parts):
    """A run in its directory. ``Run(config)`` starts one, ``Run.resume(directory)`` takes one up; both build
    everything and train nothing. ``world``: the processes that train together (None: this one alone).

    Raises EvenstepError, one line, for whatever does not fit together: data, model, optimizer, directory, checkpoint.

    From before the first write to the end of `fit` process 0 holds the lock of the directory; without `fit`, for as
    long as the object exists.
    """

    lock: RunLock | None = None

    def __init__(self, config: Any, *, world: World | None = None, say: Say = tell, data_progress: Any = None) -> None:
        world = world or World(pick_device(config.train.device))
        say = say if world.speaks else nothing
        source = self.find_source(config, world, say)
        config = self.settled(config, source, say)
        out = world.from_first(lambda: str(setup.fresh_directory(config)))
        config = dataclasses.replace(config, out=out, name=setup.default_name(config))
        self._build(config, world, source, say, data_progress, blank=False)
        world.from_first(self._create)
        self.metrics = Metrics(self.out / "metrics.jsonl") if world.speaks else NoMetrics()
        self._tell_header()

    def _create(self) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise EvenstepError(f"{self.out} cannot be created ({problem.strerror}); give another --out") from None
        self.lock = hold(self.out)
        setup.fresh_directory(self.config)  # once more: another run may have come and gone since
        check_own(self.out)
        if (self.out / "config.toml").exists():
            self.say(f"{self.out} stopped before its first checkpoint; it starts again")
            (self.out / "metrics.jsonl").unlink(missing_ok=True)
        replace_text(self.out / "config.toml", to_toml(self.config))

    @classmethod
    def resume(
        cls,
        directory: Path | str,
        config: Any = None,
        *,
        world: World | None = None,
        say: Say = tell,
        data_progress: Any = None,
    ) -> Run:
        """The run of ``directory`` at its newest whole checkpoint; ``config`` may change what does not touch exactness.

        A larger ``train.steps`` trains on; under a cosine or wsd schedule it also changes the learning rates from
        here on. One below the steps done is refused. Nothing is written before all of it fits.
        """
        directory = Path(directory)
        if not (directory / "config.toml").is_file():
            raise EvenstepError(f"{directory} is not a run: it has no config.toml; evenstep runs lists runs")
        config = config or build(read_toml(directory / "config.toml"), cls.KIND)
        config = dataclasses.replace(config, out=str(directory), name=config.name or directory.name)
        world = world or World(pick_device(config.train.device))
        say = say if world.speaks else nothing

        run = cls.__new__(cls)

        def newest() -> str:
            run.lock = hold(directory)
            check_own(directory)
            return str(newest_checkpoint(directory, say))

        checkpoint = Path(world.from_first(newest))
        source = run.source_on_resume(config, checkpoint, world, say)
        config = run.settled(config, source, say)
        check_optimizer(config.optim)  # names classes of its state as harmless, which lets trainer.pt be read
        trainer = read_trainer(checkpoint)
        check_resume(directory, config, trainer)
        run._build(config, world, source, say, data_progress, blank=True)
        with world.together():
            restore_state(run, checkpoint, trainer)
        run.saved = checkpoint
        if world.speaks:
            replace_text(directory / "config.toml", to_toml(config))
            (directory / "summary.json").unlink(missing_ok=True)  # it spoke of another end
        run.metrics = metrics_of(run)
        run.seconds = max(run.seconds, run.metrics.seconds)  # what came after the save and is not repeated
        left = config.total_steps - run.step_number
        run._tell_header()
        say(f"resumed from {checkpoint}, {f'{left} steps to go' if left else 'nothing left to do'}")
        if (line := rising_rate(config, trainer)) is not None:
            say(line)
        return run

    def _tell_header(self) -> None:
        for line in attempt(self, "description of the run", lambda: header(self)) or ():
            self.say(line)

    def _build(
        self, config: Any, world: World, source: Path | None, say: Say, data_progress: Any, *, blank: bool
    ) -> None:
        self.config, self.world, self.say = config, world, say
        self.out = Path(config.out or "")
        self.device = world.device
        check_optimizer(config.optim)
        self.saver = Saver(self.out / "checkpoints", world)
        self.heart = Heartbeat(world, config.parallel.timeout)
        self.saver.alive = self.heart.alive
        setup.set_up_torch(config)
        self.data = self.open_data(data_progress if world.speaks else None)
        self.tokenizer = self.data.tokenizer
        train = config.train
        self.parallel = Parallel(config, world)
        with world.together():
            self.loader = self.make_loader()
            self.check_memory(source)
            # FSDP moves each block to its device by itself, after it was cut.
            first = torch.device("cpu") if self.parallel.mode in ("fsdp", "hsdp") else self.device
            self.model = self.make_model(source, first, blank=blank)
            self.parallel.check(self.model)
        self.parallel.apply(self.model)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.rates = LearningRates(self.optimizer)
        self.telemetry = RunTelemetry(self)
        self.micro_batch_size = min(config.micro_batch_size, train.batch_size // world.data_size)
        self.chunk = self.loss_chunk()
        # Under FSDP the weights are bf16 when they are gathered, and nothing is left to cast.
        casts = train.dtype == "bf16-autocast" and not self.parallel.sharded
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=casts)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.step_number = 0
        self.tokens = 0
        self.seconds = 0.0
        self.step_seconds = 0.0
        self.skipped: list[tuple[int, int]] = []  # data whose loss or gradient was not finite, left out
        self.bad = BadBatches(self)
        self.saved: Path | None = None  # the checkpoint of this very moment
        self.window = self.new_window()

    def new_window(self) -> Window:
        return Window(torch.zeros((), dtype=torch.float64, device=self.device))

    # ---- one step ----

    def step(self) -> StepResult:
        """Read a batch, run forward and backward in micro batches, update. The loss is the mean over tokens of all
        processes, however they are split.

        What happens when it is NaN or infinite ``train.on_nan`` says. ``stop``: EvenstepError, on a CPU before the
        weights are touched, and with a checkpoint of them beside the earlier ones, on a GPU at the next log step.
        ``skip`` and ``rewind`` read loss and norm at each step; after a rewind the step done is an earlier one.
        """
        config, began = self.config, time.perf_counter()
        waited = 0.0
        while True:
            number = self.step_number + 1
            factor = lr_factor(config.schedule, number, config.total_steps, config.warmup_steps)
            self.rates.set(self.optimizer, factor)
            position = self.bad.next_position()
            self.heart.beat(number, "reading data")
            asked = time.perf_counter()
            inputs, targets = self.loader.next_batch()
            waited += time.perf_counter() - asked
            self.heart.beat(number, "forward and backward")
            inputs, targets = uploaded(inputs, self.device), uploaded(targets, self.device)
            with self.telemetry.watching(self.is_log_step(number)):
                loss = self._accumulate(inputs, targets)
            norm = self._gradient_norm(number)
            if self.bad.accept(loss, norm, number, position):
                break
        self.telemetry.observe(loss, position)
        self.heart.beat(number, "the optimizer's step")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        self.step_number = number
        self.saved = None
        tokens = self.step_tokens()
        self.tokens += tokens
        elapsed = time.perf_counter() - began
        self.window.add(loss, tokens, elapsed, waited)
        self.step_seconds += elapsed
        return StepResult(number, loss, config.optim.lr * factor, norm)

    def _accumulate(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Backward through all micro batches; returns the mean loss over the tokens of all processes, detached."""
        parts, size, shares = [], self.micro_batch_size, self.shares(targets)
        for i, (x, y, share) in enumerate(zip(inputs.split(size), targets.split(size), shares, strict=True)):
            with self.parallel.accumulating(last=i == len(shares) - 1):
                with self.autocast:
                    part = self.loss(x, y) * share
                part.backward()
            parts.append(part.detach())
        loss = parts[0] if len(parts) == 1 else torch.stack(parts).sum()
        if self.world.data_size > 1:  # each has as many tokens
            loss = self.world.sum(loss / self.world.data_size)
        return loss

    def _gradient_norm(self, number: int) -> Tensor | None:
        """Of all gradients together, before they are clipped, when somebody wants to know."""
        clip = self.config.train.clip_norm
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if clip:
            return clip_(gradients, clip)
        return total_norm(gradients) if self.is_log_step(number) or self.bad.watches else None

    def is_log_step(self, number: int) -> bool:
        return number % self.config.log.every == 0 or number == self.config.total_steps

    # ---- validation, checkpoints ----

    def evaluate(self, stop: Interrupts | None = None) -> Any:
        """Token-weighted loss on the validation split (at most ``eval.max_tokens`` of it); the model is left in
        training mode. A signal to ``stop`` ends it between two batches, with Stopped."""
        config, val = self.config, self.data.val
        batch_size = config.eval.batch_size or self.micro_batch_size
        batches = eval_batches(val, config.train.seq_len, batch_size, config.eval.max_tokens or None)
        batches = stop.watch(batches) if stop else batches
        return evaluate(
            self.model,
            loop.beating(self, batches, "validation"),
            val.num_bytes / max(1, len(val)),
            device=self.device,
            autocast=self.autocast,
            chunk=self.chunk,
            parallel=self.parallel,
        )

    def save(self, *, keep_all: bool = False, wait: bool = True) -> Path:
        """Write a checkpoint of this moment; returns its directory, where it will be without ``wait``. EvenstepError on
        a full disk, earlier checkpoints intact. ``keep_all``: one that may be worthless, so no earlier one is deleted
        for it."""
        self.heart.beat(self.step_number, "saving")
        self.telemetry.settle(last=keep_all or self.step_number == self.config.total_steps)
        state, rest = optimizer_tensors(self.model, self.optimizer)
        trainer = trainer_state(self, rest)
        self.saved = self.saver.save(
            self.step_number,
            self.tensors() | state,
            lambda directory: write_small(self, trainer, directory),
            None if keep_all else self.config.checkpoint.keep,
            wait=wait,
        )
        return self.saved

    def weights_are_finite(self) -> bool:
        return math.isfinite(total_norm(self.parameters).item())

    # ---- the loop ----

    def fit(self) -> dict[str, Any]:
        """Train to the end of the budget with log, validation, checkpoints; returns what summary.json holds (process 0;
        the others an empty one).

        SIGINT, SIGTERM or SIGHUP: the step is finished or the validation given up, a checkpoint saved and Interrupted
        raised with the way to go on.
        """
        with locked(self.out) if self.world.speaks else nullcontext():
            self.lock = None  # it is free again after this, whatever still refers to the run
            with self.heart:
                loop.fit(self)
            return finish(self) if self.world.speaks else {}  # the others wait for that outside the heartbeat
