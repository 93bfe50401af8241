"""Spike telemetry in stable-baselines3."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from evenstep.errors import EvenstepError
from evenstep.integrations.log import Tally, go_on, harmless, lent_sinks, open_log, write_line
from evenstep.telemetry.clocks import steps_done
from evenstep.telemetry.monitor import SpikeMonitor
from evenstep.telemetry.options import checked_options, checked_path
from evenstep.telemetry.sinks import Sink


class SpikeCallback(BaseCallback):
    """Watches an optimizer of an agent with a `SpikeMonitor`: ``agent.learn(10_000, callback=SpikeCallback("out"))``.

    Writes metrics.jsonl for ``evenstep report``, and ``telemetry/spikes`` (since the last time) and
    ``telemetry/spike_rate`` to the agent's logger. A step is one of the optimizer, not one in the environment.
    Gradients are seen as the optimizer gets them: after the agent's own clipping (``max_grad_norm``).

    Args:
        directory: where metrics.jsonl goes. An agent whose optimizer has made no step replaces an older file; one that
            goes on, also after ``PPO.load``, goes on with it.
        optimizer: its place in the agent. Default ``"policy.optimizer"``, where PPO, A2C and DQN have it; SAC, TD3 and
            DDPG have ``"actor.optimizer"`` and ``"critic.optimizer"``.
        sinks: further places for the records, as `SpikeMonitor` takes them. They stay open from one ``learn`` to the
            next, and are closed when the callback goes or the program ends.
        **options: those of `SpikeMonitor`: ``every``, ``say``, ``samples``, ``ratio``, ``sigma``, ``window``,
            ``parameters_every``.

    ``monitor`` is the `SpikeMonitor` of the newest training, None before. EvenstepError, when training starts, for an
    ``optimizer`` that the agent does not have.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        optimizer: str = "policy.optimizer",
        sinks: Iterable[Sink | Path | str] | Sink | Path | str = (),
        **options: Any,
    ) -> None:
        super().__init__()
        if checked_path("SpikeCallback", directory) is None:
            raise TypeError("SpikeCallback: directory must be a path, got None")
        if not isinstance(optimizer, str) or not optimizer:
            raise TypeError(f"SpikeCallback: optimizer={optimizer!r:.80} must be its place, such as 'policy.optimizer'")
        self.directory, self.which = Path(directory), optimizer
        self.options = checked_options("SpikeCallback", options)
        self.extra = lent_sinks(self, sinks)
        self.monitor: SpikeMonitor | None = None
        self._tally = Tally()
        self._told = 0

    def _on_training_start(self) -> None:
        try:
            optimizer = attrgetter(self.which)(self.model)
        except AttributeError:
            raise EvenstepError(
                f"SpikeCallback: a {type(self.model).__name__} agent has no '{self.which}'; give optimizer="
                "'policy.optimizer', 'actor.optimizer' or 'critic.optimizer'"
            ) from None
        step, before = steps_done(optimizer), self.monitor
        if before is not None:
            before.close()  # of a training that was interrupted
        sinks: list[Sink] = [open_log(self.directory / "metrics.jsonl", step, self.locals), self._tally, *self.extra]
        self.monitor = SpikeMonitor(self.model.policy, optimizer, sinks=sinks, **self.options)
        if before is not None and before.step == step and before.names == self.monitor.names:
            go_on(self.monitor, before.state_dict())  # learn() called again
        self.monitor.step = self._told = step

    def _on_step(self) -> bool:
        return True

    @harmless
    def _on_rollout_start(self) -> None:
        self._tell()

    @harmless
    def _on_training_end(self) -> None:
        self._tell()
        if self.monitor:
            self.monitor.close()

    def _tell(self) -> None:
        """The loss of the newest update, which the agent's logger still holds, and what was seen meanwhile."""
        if self.monitor is None or self.monitor.step == self._told:
            return
        self._told = self.monitor.step
        self.monitor.drain()
        write_line(self.monitor.sinks, self._told, self.logger.name_to_value, {"train/loss": "loss"})
        for name, value in self._tally.take().items():
            self.logger.record(f"telemetry/{name}", value)
