"""Spike telemetry from inside the agents of stable-baselines3."""

import gc

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback, CallbackList

from evenstep import StableSPAM
from evenstep.cli import main
from evenstep.errors import EvenstepError
from evenstep.integrations.stable_baselines3 import SpikeCallback
from evenstep.telemetry.runlog import load_run
from evenstep.telemetry.schema import read_records

QUIET = {"say": None, "every": 2}


class Jumpy(gymnasium.Env):
    """Pays 1 a step, and for a while 10 000."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, jumps=range(0)):
        self.jumps, self.steps = jumps, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        reward = 1e4 if self.steps in self.jumps else 1.0
        return np.full(2, 0.1 * action, np.float32), reward, self.steps % 8 == 0, False, {}


def agent(env, **options):
    policy = {"net_arch": [8], "optimizer_class": StableSPAM, "optimizer_kwargs": {"reset_interval": 5}}
    options = {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "policy_kwargs": policy, "seed": 0} | options
    return PPO("MlpPolicy", env, device="cpu", **options)


def rows(directory):
    return sum(len(record["norms"]) for record in read_records(directory / "metrics.jsonl") if "norms" in record)


def test_every_step_of_the_optimizer_is_logged_with_the_loss_of_its_rollout(tmp_path):
    callback = SpikeCallback(tmp_path, **QUIET)
    trained = agent("CartPole-v1")
    trained.learn(64, callback=callback)
    run = load_run(tmp_path)
    assert callback.monitor.step == 8 and run.per_step("norms")[0] == [*range(1, 9)]
    assert run.series("loss")[0] == [4, 8] and len(run.names) == len(list(trained.policy.parameters()))
    assert [event["step"] for event in run.events if event["event"] == "reset"] == [5]
    assert "telemetry/spike_rate" in trained.logger.name_to_value


def test_the_callback_changes_nothing_of_the_training(tmp_path):
    # Each is made just before it learns: the seed is set then, and both draw from torch's generator.
    watched = agent("CartPole-v1").learn(64, callback=SpikeCallback(tmp_path, **QUIET))
    alone = agent("CartPole-v1").learn(64)
    pairs = zip(watched.policy.parameters(), alone.policy.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_spike_of_the_gradients_is_seen_and_the_report_shows_it(tmp_path, capsys):
    callback = SpikeCallback(tmp_path, **QUIET)
    agent(Jumpy(range(321, 337)), max_grad_norm=float("inf")).learn(384, callback=callback)
    spikes = {event["step"] for event in load_run(tmp_path).events if event["event"] == "spike"}
    assert spikes and spikes <= {*range(41, 45)}  # ten calm rollouts of four steps, then the one with the jump
    assert main(["report", str(tmp_path)]) == 0
    page = next(tmp_path.glob("*.html")).read_text()
    assert "spike" in page and "mlp_extractor" in page and capsys.readouterr().out


def test_a_calm_agent_has_no_spikes(tmp_path):
    agent(Jumpy(), max_grad_norm=float("inf")).learn(384, callback=SpikeCallback(tmp_path, **QUIET))
    assert not [event for event in load_run(tmp_path).events if event["event"] == "spike"]


@pytest.mark.parametrize("optimizer", [StableSPAM, torch.optim.Adam])
def test_a_loaded_agent_goes_on_with_the_file_and_a_new_one_replaces_it(optimizer, tmp_path):
    policy = {"net_arch": [8], "optimizer_class": optimizer}
    first = agent("CartPole-v1", policy_kwargs=policy)
    first.learn(64, callback=SpikeCallback(tmp_path, **QUIET))
    first.save(tmp_path / "agent")
    again = PPO.load(tmp_path / "agent", env=first.get_env(), device="cpu")
    again.learn(32, callback=SpikeCallback(tmp_path, **QUIET), reset_num_timesteps=False)
    assert rows(tmp_path) == 12 and load_run(tmp_path).steps == 12
    agent("CartPole-v1", policy_kwargs=policy).learn(32, callback=SpikeCallback(tmp_path, **QUIET))
    assert rows(tmp_path) == 4


def test_one_callback_serves_learning_in_parts_and_keeps_what_it_knows_of_the_gradients(tmp_path):
    callback, trained = SpikeCallback(tmp_path, **QUIET), agent(Jumpy(range(321, 337)), max_grad_norm=float("inf"))
    trained.learn(320, callback=callback)
    trained.learn(32, callback=callback, reset_num_timesteps=False)
    assert rows(tmp_path) == 44 and callback.monitor.step == 44
    assert [event for event in load_run(tmp_path).events if event["event"] == "spike" and event["step"] > 40]


def test_an_agent_with_several_optimizers_is_asked_which(tmp_path):
    def sac():
        policy = {"net_arch": [8], "optimizer_class": StableSPAM}
        return SAC("MlpPolicy", "Pendulum-v1", learning_starts=4, batch_size=4, policy_kwargs=policy, device="cpu")

    with pytest.raises(
        EvenstepError, match=r"a SAC agent has no 'policy.optimizer'; give optimizer='policy.optimizer'"
    ):
        sac().learn(8, callback=SpikeCallback(tmp_path, **QUIET))
    sac().learn(12, callback=SpikeCallback(tmp_path, optimizer="critic.optimizer", **QUIET))
    assert rows(tmp_path) == 8 and all("qf" in name for name in load_run(tmp_path).names)


class Kept:
    """A sink that keeps what it gets until it is closed."""

    def __init__(self):
        self.records, self.closed = [], 0

    def write(self, record):
        assert not self.closed
        self.records.append(record)

    def close(self):
        self.closed += 1

    def steps(self):
        windows = [record for record in self.records if record.get("kind") == "window"]
        return [window["first"] + i for window in windows for i in range(len(window["norms"]))]


def test_sinks_of_the_callers_stay_open_from_one_part_to_the_next(tmp_path):
    kept, trained = Kept(), agent("CartPole-v1")
    callback = SpikeCallback(tmp_path, sinks=[kept, tmp_path / "own.jsonl"], **QUIET)
    for _ in range(3):
        trained.learn(32, callback=callback, reset_num_timesteps=False)
    assert kept.steps() == [*range(1, 13)] and kept.closed == 0
    own = [record["first"] for record in read_records(tmp_path / "own.jsonl") if record.get("kind") == "window"]
    assert own == [1, 3, 5, 7, 9, 11]
    trained = None
    callback.__dict__.clear()
    del callback
    gc.collect()
    assert kept.closed == 1


def test_an_interrupted_training_leaves_no_second_watcher(tmp_path):
    class Interrupted(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == 40:
                raise KeyboardInterrupt
            return True

    callback, trained = SpikeCallback(tmp_path, **QUIET), agent("CartPole-v1")
    with pytest.raises(KeyboardInterrupt):
        trained.learn(64, callback=CallbackList([callback, Interrupted()]))
    trained.learn(32, callback=callback, reset_num_timesteps=False)
    assert rows(tmp_path) == 8 and len(trained.policy.optimizer._optimizer_step_pre_hooks) == 0


def test_one_callback_for_two_agents_and_two_for_one(tmp_path):
    callback = SpikeCallback(tmp_path, **QUIET)
    agent("CartPole-v1").learn(32, callback=callback)
    agent("CartPole-v1", policy_kwargs={"net_arch": [4], "optimizer_class": StableSPAM}).learn(32, callback=callback)
    assert rows(tmp_path) == 4
    two = [SpikeCallback(tmp_path / "two", **QUIET) for _ in range(2)]
    agent("CartPole-v1").learn(64, callback=two)
    names = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert names == ["metrics-2.jsonl", "metrics.jsonl"] and rows(tmp_path / "two") == 8


BAD = [
    {"directory": None},
    {"directory": 3},
    {"directory": ""},
    {"optimizer": 0},
    {"optimizer": ""},
    {"ratio": 0.5},
    {"window": 0},
    {"windw": 10},
    {"sinks": [3]},
    {"say": "print"},
]


@pytest.mark.parametrize("given", BAD, ids=repr)
def test_a_bad_argument_fails_where_the_callback_is_made(given, tmp_path):
    with pytest.raises((TypeError, ValueError), match="SpikeCallback") as problem:
        SpikeCallback(**({"directory": tmp_path} | given))
    assert len(str(problem.value).splitlines()) == 1
