"""SpikeGuard in torchtitan's trainer: a subclass that judges every step and can go back in the data.

Put this file on the Python path and build ``GuardedTrainer`` where your program builds ``torchtitan.trainer.Trainer``.
`SpikeGuard` acts on all ranks together; a rewind restores weights, optimizer, schedule, random states, the position of
the data loader and torchtitan's own step number, and leaves out the batches of the bad steps alone.

Written after torchtitan/trainer.py at commit 003fe28. torchtitan needs other packages than the development
environment of evenstep has, so the file was never run with it: tests/integrations/test_torchtitan.py runs it with a
stand-in for the parts of the interface that it uses. These are ``forward_backward_step``, ``train_step``,
``batch_generator``, ``should_continue_training``, ``state_dict`` and the attributes that the class below names.

Limits: the guard's own state is not in torchtitan's checkpoints, so after a resume the first 20 steps are judged by
Inf and NaN alone. Optimizers that step within the backward pass (``OptimizersInBackwardContainer``) cannot be guarded.
The loss of a rank is its share of the mean over all tokens: ``loss_rise`` is in nats divided by the number of ranks.
"""

import torch
from torch import nn
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from evenstep import SpikeGuard
from evenstep.baselines.chained import ChainedOptimizer

NO_LIMIT = torch.finfo(torch.float32).max


class Position:
    """Where a trainer is: its step, its tokens and its batch. The data loader saves its own position."""

    def __init__(self, trainer):
        self.trainer = trainer

    def state_dict(self):
        return {"trainer": self.trainer.state_dict(), "batch": self.trainer.batch}

    def load_state_dict(self, state):
        self.trainer.load_state_dict(state["trainer"])
        self.trainer.batch = state["batch"]
        self.trainer.restart_data = True


class GuardedTrainer(Trainer):
    guard_options = {"ladder": ("skip", "lower_lr", "rewind", "stop"), "snapshot_every": 100}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.batch = 0  # batches fetched so far
        self.restart_data = False
        self.losses = []  # of the microbatches of this step
        self.took, self.max_norm = True, 0.0
        self.guard = SpikeGuard(
            nn.ModuleList(self.model_parts),
            # The container's own groups are copies, and its state a flattened view: the guard needs the optimizers.
            ChainedOptimizer(*self.optimizers.optimizers),
            data=[self.dataloader, Position(self)],
            schedulers=[self.lr_schedulers],
            on_event=lambda event: logger.warning(f"SpikeGuard: {event}"),
            **self.guard_options,
        )
        # `train_step` calls these two. They become the guard's.
        self.take_step, self.advance_schedule = self.optimizers.step, self.lr_schedulers.step
        self.optimizers.step = self.guarded_step
        self.lr_schedulers.step = lambda: self.advance_schedule() if self.took else None

    def forward_backward_step(self, *args, **kwargs):
        loss = super().forward_backward_step(*args, **kwargs)
        self.losses.append(loss.detach().reshape(()))  # -1 where a pipeline stage has none; the largest rank's counts
        return loss

    def train_step(self, data_iterator):
        # torchtitan clips before the optimizer's step. Gradients are judged first and clipped when the step is taken.
        training = self.config.training
        self.max_norm, training.max_norm = training.max_norm, NO_LIMIT
        try:
            super().train_step(data_iterator)
        finally:
            training.max_norm = self.max_norm

    def guarded_step(self):
        loss = torch.stack(self.losses).sum()
        self.losses.clear()
        self.took = self.guard.step(loss, rows=self.rows_of(self.batch - 1), take=self.clip_and_step)

    def clip_and_step(self):
        dist_utils.clip_grad_norm_(
            [p for part in self.model_parts for p in part.parameters()],
            self.max_norm,
            foreach=True,
            pp_mesh=self.parallel_dims.get_optional_mesh("pp"),
            ep_enabled=self.parallel_dims.ep_enabled,
        )
        self.take_step()

    def rows_of(self, batch):
        """The step's worth of batches that ``batch`` belongs to."""
        return batch // self.gradient_accumulation_steps

    def batch_generator(self, data_iterable):
        while True:
            self.restart_data = False
            for batch in super().batch_generator(data_iterable):
                self.batch += 1
                if self.guard.wanted(self.rows_of(self.batch - 1)):
                    yield batch
                if self.restart_data:  # a new iterator starts at the position that the loader has loaded
                    break

    def should_continue_training(self):
        return not self.guard.stopped and super().should_continue_training()
