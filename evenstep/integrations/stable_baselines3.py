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

    Writes metrics.jsonl for ``evenstep report``, and logs ``telemetry/spikes`` (since the last log) and
    ``telemetry/spike_rate`` to the agent's logger. A step is a step of the optimizer, not of the environment.
    Gradients are measured as the optimizer gets them, after the agent's clipping (``max_grad_norm``).

    Args:
        directory: folder of metrics.jsonl. An agent whose optimizer has made no step replaces an older file; an agent
            that continues its training, also after ``PPO.load``, continues the file.
        optimizer: attribute of the agent that holds the optimizer. Default ``"policy.optimizer"``, as in PPO, A2C and
            DQN; SAC, TD3 and DDPG have ``"actor.optimizer"`` and ``"critic.optimizer"``.
        sinks: further destinations of the records, as in `SpikeMonitor`. They stay open from one ``learn`` to the
            next, and are closed when the callback is deleted or the program ends.
        **options: options of `SpikeMonitor`: ``every``, ``say``, ``samples``, ``ratio``, ``sigma``, ``window``,
            ``parameters_every``.

    Attributes:
        monitor: the `SpikeMonitor` of the newest training, None before.

    Raises:
        EvenstepError: when training starts, if the agent does not have that ``optimizer``.
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
        self._logged = 0

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
            before.close()  # still open if the training before was interrupted
        sinks: list[Sink] = [open_log(self.directory / "metrics.jsonl", step, self.locals), self._tally, *self.extra]
        self.monitor = SpikeMonitor(self.model.policy, optimizer, sinks=sinks, **self.options)
        if before is not None and before.step == step and before.names == self.monitor.names:
            go_on(self.monitor, before.state_dict())  # a further call of learn()
        self.monitor.step = self._logged = step

    def _on_step(self) -> bool:
        return True

    @harmless
    def _on_rollout_start(self) -> None:
        self._log()

    @harmless
    def _on_training_end(self) -> None:
        self._log()
        if self.monitor:
            self.monitor.close()

    def _log(self) -> None:
        """Write the loss of the newest update, which the agent's logger still holds, and log the tally."""
        if self.monitor is None or self.monitor.step == self._logged:
            return
        self._logged = self.monitor.step
        self.monitor.drain()
        write_line(self.monitor.sinks, self._logged, self.logger.name_to_value, {"train/loss": "loss"})
        for name, value in self._tally.take().items():
            self.logger.record(f"telemetry/{name}", value)
