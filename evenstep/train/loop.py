"""The loop around `Run.step`: log, validation, checkpoints, and an orderly end when a signal comes."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from evenstep.train.checkpoint import diverged, way_on
from evenstep.train.interrupts import Interrupted, Interrupts, Stopped, Votes
from evenstep.train.log import LineProgress, make_progress
from evenstep.train.records import StepResult, train_record, validation_record

if TYPE_CHECKING:
    from evenstep.train.run import Run

T = TypeVar("T")

SAVE_FAILED = 1000
"""A vote above all signals: a save in the background went wrong in some process."""


def fit(run: Run) -> None:
    """See `Run.fit`."""
    loop = Loop(run)
    votes = Votes(run.world.control)
    quiet = not run.world.speaks
    with Interrupts(votes, quiet=quiet) as stop:
        try:
            progress = make_progress(run.config.total_steps, run.step_number, quiet=quiet)
            with progress, run.telemetry.live(progress):
                loop.train(progress, stop)
            votes.close()
            run.saver.wait()
        except KeyboardInterrupt:
            message = f"stopped at once, without saving; {way_on(run.out)}"
            raise Interrupted(message, signal.SIGINT) from None
        finally:
            run.saver.close()
    run.seconds = loop.clock()


def beating(run: Run, items: Iterable[T], place: str) -> Iterator[T]:
    """The items, with a sign of life for each."""
    for item in items:
        run.heart.beat(run.step_number, place)
        yield item


class Loop:
    """From where the run is to the end of its budget."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.since = time.perf_counter() - run.seconds

    def train(self, progress: LineProgress, stop: Interrupts) -> None:
        run, config, total = self.run, self.run.config, self.run.config.total_steps
        while True:
            found = stop.poll(SAVE_FAILED if run.saver.failed() else 0)
            at_end = run.step_number >= total
            if found is None and (at_end or _due(run.step_number, config.eval.every)):
                self.validate(progress, stop)
            if stop.agreed == SAVE_FAILED:
                run.saver.wait()  # raises
                stop.agreed = stop.signal  # another process's save, which was mended by the one before
            if stop.agreed is not None:
                saved = run.saved or self.save_finite(wait=True)
                run.saver.wait()
                raise Interrupted(
                    f"stopped after step {run.step_number} of {total}, saved {saved}; {way_on(run.out)}", stop.agreed
                )
            if at_end:
                return
            result = run.step()
            progress.step(result.step, result.loss.item() if run.device.type == "cpu" else None)
            run.seconds = self.clock()
            if run.is_log_step(result.step):
                self.log(result, progress)
            if _due(result.step, config.checkpoint.every) or result.step == total:
                self.save_finite(wait=not config.checkpoint.background)

    def clock(self) -> float:
        """Seconds of training, with those before a resume."""
        return time.perf_counter() - self.since

    def save_finite(self, *, wait: bool) -> Any:
        """Save, but never weights that are lost: the loss is of the weights before the update, so these are looked
        at too."""
        run = self.run
        loss = run.window.loss.item()
        problem = None if math.isfinite(loss) else f"the loss is {loss}"
        if problem is None and not run.weights_are_finite():
            problem = "the norm of the weights is not finite"
        if problem is None:
            return run.save(wait=wait)
        run.saver.wait()
        raise diverged(run.config, run.step_number, problem)

    def log(self, result: StepResult, progress: LineProgress) -> None:
        run = self.run
        window, waiting = run.window, time.perf_counter()
        loss = window.loss.item() / window.steps  # waits for the GPU
        if not math.isfinite(loss):
            run.saver.wait()
            raise diverged(run.config, result.step, f"the loss is {loss}")
        waited = time.perf_counter() - waiting
        run.step_seconds += waited
        seconds = window.seconds + waited
        run.telemetry.settle(last=False)
        record = train_record(run, result, loss, seconds)
        run.telemetry.write(record)
        progress.train(record)
        run.window = run.new_window()

    def validate(self, progress: LineProgress, stop: Interrupts) -> None:
        run = self.run
        if not len(run.data.val) or run.metrics.validated == run.step_number:
            return
        try:
            result = run.evaluate(stop)
        except Stopped:  # it is done again by whoever resumes
            return
        run.seconds = self.clock()
        record = validation_record(run, result)
        run.telemetry.write(record)
        progress.validation(record)


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0
