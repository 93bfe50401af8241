"""One run: an agent is trained from a seed, with evaluations and gradient telemetry on the way."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, sync_envs_normalization

from evenstep.integrations.stable_baselines3 import SpikeCallback
from evenstep.telemetry.schema import Record
from lab.rl.recipe import Build

EVALUATION_SEED = 10_000
"""Offset from the seed of a run to the seed of its evaluation environments."""


class Evaluation(BaseCallback):
    """Mean return of the deterministic policy, at the first rollout after every ``every`` steps and at the end. It does
    not use the random number generators of the training."""

    def __init__(self, env: VecEnv, every: int, episodes: int, say: Callable[[str], None]) -> None:
        super().__init__()
        self.env, self.every, self.episodes, self.say = env, every, episodes, say
        self.steps: list[int] = []
        self.returns: list[float] = []
        self.spreads: list[float] = []
        self.next = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.num_timesteps >= self.next:
            self.evaluate()
            self.next = self.num_timesteps // self.every * self.every + self.every

    def _on_training_end(self) -> None:
        if self.num_timesteps != self.steps[-1]:
            self.evaluate()

    def evaluate(self) -> None:
        training = self.model.get_env()
        if isinstance(training, VecNormalize):
            sync_envs_normalization(training, self.env)
        returns, _ = evaluate_policy(
            self.model, self.env, self.episodes, deterministic=True, return_episode_rewards=True
        )
        self.steps.append(self.num_timesteps)
        self.returns.append(round(float(np.mean(returns)), 3))
        self.spreads.append(round(float(np.std(returns)), 3))
        self.say(f"{self.num_timesteps} steps: return {self.returns[-1]:.1f}")


class Norms:
    """A telemetry sink that keeps the gradient norm of every step and counts events."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.events: dict[str, int] = {}
        self.rates: list[float] = []

    def write(self, record: Record) -> None:
        if record.get("kind") == "window":
            self.norms += [float(norm) for norm in record["norms"] if norm is not None]  # JSON has no NaN
            self.rates += [record["spike_rate"]] if record["spike_rate"] is not None else []
        elif record.get("kind") == "event":
            self.events[record["event"]] = self.events.get(record["event"], 0) + 1

    def close(self) -> None:
        """Do nothing: the sink holds no resource."""

    def summary(self) -> dict[str, Any]:
        norms = [norm for norm in self.norms if math.isfinite(norm)] or [math.nan]
        sizes = dict(zip(("median", "p99", "max"), np.quantile(norms, (0.5, 0.99, 1.0)).tolist(), strict=True))
        rate = float(np.mean(self.rates)) if self.rates else math.nan
        return {"grad_norm": {key: round(v, 5) for key, v in sizes.items()}, "events": self.events, "spike_rate": rate}


def train(setting: dict[str, Any], directory: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Train the agent of ``Recipe.setting`` and return the results; metrics.jsonl is written to ``directory``.

    ``score`` is the mean return of the last evaluation, ``average`` the mean over all evaluations after the first. Both
    are None if the weights became NaN, where the curve ends.
    """
    torch.set_num_threads(1)  # networks of this size are slower on more threads
    logging.getLogger("gymnasium").setLevel(logging.ERROR)
    seed, normalize = setting["seed"], setting["normalize"]
    env = make_vec_env(setting["env"], setting["n_envs"], seed=seed)
    judge = make_vec_env(setting["env"], setting["eval_episodes"], seed=seed + EVALUATION_SEED)
    ppo: dict[str, Any] = {key: math.inf if value == "inf" else value for key, value in setting["ppo"].items()}
    if normalize:
        env = VecNormalize(env, gamma=ppo.get("gamma", 0.99))
        judge = VecNormalize(judge, training=False, norm_reward=False)
    agent = PPO("MlpPolicy", env, learning_rate=_rate(setting), policy_kwargs=_policy(setting), seed=seed,
                device="cpu", **ppo)  # fmt: skip
    evaluation = Evaluation(judge, setting["eval_every"], setting["eval_episodes"], say)
    norms = Norms()
    telemetry = SpikeCallback(directory, sinks=[norms], say=None, every=100)
    diverged = False
    try:
        agent.learn(setting["timesteps"], callback=[telemetry, evaluation])
    except (ValueError, RuntimeError):  # raised for NaN by torch's distributions, or by its sampling
        diverged = not all(torch.isfinite(p).all() for p in agent.policy.parameters())
        if not diverged:
            raise
        telemetry.on_training_end()
    finally:
        env.close()
        judge.close()
    after = evaluation.returns[1:]
    return {
        "score": None if diverged else evaluation.returns[-1],
        "average": None if diverged or not after else round(float(np.mean(after)), 3),
        "steps": evaluation.steps,
        "returns": evaluation.returns,
        "spreads": evaluation.spreads,
        "gradient_steps": telemetry.monitor.step if telemetry.monitor else 0,
        **norms.summary(),
    }


def _rate(setting: dict[str, Any]) -> float | Callable[[float], float]:
    lr = setting["lr"]
    return lr if setting["lr_schedule"] == "constant" else lambda remaining: lr * remaining


def _policy(setting: dict[str, Any]) -> dict[str, Any]:
    build = Build(setting["optimizer"], setting["before"])
    return {**setting["policy"], "optimizer_class": build, "optimizer_kwargs": dict(setting["options"])}
