"""What is done about a loss that is not finite: ``train.on_nan``.

Every process sees the same loss, the mean over all of them, and so decides the same.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from evenstep.errors import EvenstepError
from evenstep.train.checkpoint import diverged, newest_checkpoint, read_trainer
from evenstep.train.log import metrics_of
from evenstep.train.state import restore_state

if TYPE_CHECKING:
    from evenstep.train.run import Run

LIMIT = 10
"""Bad batches without a checkpoint between them, after which the run ends: its weights or its rate are the fault."""


class BadBatches:
    """Of one run, which remembers the data it left out in ``run.skipped``."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.policy = run.config.train.on_nan
        self.count = 0
        self.since: int | None = None

    @property
    def watches(self) -> bool:
        """Are loss and gradients looked at in each step?"""
        return self.policy != "stop"

    def next_position(self) -> int:
        """Where the next batch is read: past what was left out before a rewind or a resume."""
        loader = self.run.loader
        for start, stop in sorted(self.run.skipped):
            if start <= loader.position < stop:
                loader.position = stop
        return loader.position

    def accept(self, loss: Tensor, norm: Tensor | None, number: int, position: int) -> bool:
        """May the step of this loss be done? False: another batch has to be read. EvenstepError: the run ends."""
        run = self.run
        if not self.watches and run.device.type != "cpu":
            return True  # looked at when it is logged
        value = loss.item()
        gradients = norm.item() if self.watches and norm is not None else 0.0
        if math.isfinite(value) and math.isfinite(gradients):
            return True
        what = f"the loss is {value}" if not math.isfinite(value) else f"the norm of the gradients is {gradients}"
        run.optimizer.zero_grad(set_to_none=True)
        if self.policy == "stop":
            run.loader.position = position
            run.saver.wait()
            rescue = run.step_number > 0 and run.weights_are_finite()
            rescued = (run.saved or run.save(keep_all=True)) if rescue else None
            raise diverged(run.config, number, what, rescued)
        rows = (position, position + run.config.train.batch_size)
        self._count(number, what)
        if self.policy == "skip":
            run.skipped.append(rows)
            run.say(f"step {number}: {what}; sequences {rows[0]} to {rows[1] - 1} are left out")
        else:
            self.rewind(number, what, rows)
        return False

    def _count(self, number: int, what: str) -> None:
        saved = self.run.saver.last
        self.count = self.count + 1 if saved == self.since else 1
        self.since = saved
        if self.count > LIMIT:
            raise diverged(self.run.config, number, f"{what}, for the {self.count}th time since the last checkpoint")

    def rewind(self, number: int, what: str, rows: tuple[int, int]) -> None:
        """Go back to the newest whole checkpoint; ``rows`` of the data are left out from there on."""
        run = self.run
        run.saver.wait()
        try:
            checkpoint = Path(run.world.from_first(lambda: str(newest_checkpoint(run.out, run.say))))
        except EvenstepError:
            raise diverged(run.config, number, f"{what}, and there is no checkpoint to go back to") from None
        skipped = [*run.skipped, rows]
        with run.world.together():
            restore_state(run, checkpoint, read_trainer(checkpoint))
        run.skipped = sorted(set(skipped) | set(run.skipped))
        run.saved = checkpoint
        run.metrics.close()
        run.metrics = metrics_of(run)
        run.say(
            f"step {number}: {what}; back to {checkpoint}, sequences {rows[0]} to {rows[1] - 1} are left out from here"
        )
