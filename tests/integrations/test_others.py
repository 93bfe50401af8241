"""accelerate, stable-baselines3, and programs that are given an optimizer by its dotted path."""

import ast
import collections
import copy
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from integration_support import equal, weights
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import evenstep
from evenstep import SPAM, AdaGN, SpikeMonitor, StableSPAM, stabilize

OPTIMIZERS = ("StableSPAM", "SPAM")


def test_importing_evenstep_or_its_integrations_loads_no_trainer():
    program = "import sys, evenstep, evenstep.integrations; print([m for m in sys.modules if m in %r])"
    names = ("torch", "transformers", "accelerate", "lightning", "stable_baselines3")
    found = subprocess.run([sys.executable, "-c", program % (names,)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# ---- accelerate ----


@pytest.fixture
def accelerator():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, gradient_accumulation_steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)


BUILDS = {
    "StableSPAM": lambda params: StableSPAM(params, lr=1e-2, reset_interval=3),
    "SPAM sparse": lambda params: SPAM(params, lr=1e-2, density=0.25, reset_interval=3),
    "stabilize": lambda params: stabilize(torch.optim.AdamW(params, lr=1e-2), AdaGN(), reset_interval=3),
}


@pytest.mark.parametrize("name", BUILDS)
def test_accelerate_accumulates_saves_and_goes_on(name, accelerator, tmp_path):
    def prepared(seed):
        torch.manual_seed(seed)
        model = nn.Linear(4, 4)
        return accelerator.prepare(model, BUILDS[name](model.parameters()))

    def train(model, optimizer, batches):
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch).square().mean())
                optimizer.step()
                optimizer.zero_grad()

    draw = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 4, generator=draw) for _ in range(12)]
    model, optimizer = prepared(0)
    train(model, optimizer, batches[:6])
    accelerator.save_state(tmp_path / "saved")
    train(model, optimizer, batches[6:])
    whole, steps = weights(model), clock(optimizer)
    accelerator.free_memory()
    model, optimizer = prepared(1)
    accelerator.load_state(tmp_path / "saved")
    train(model, optimizer, batches[6:])
    assert equal(whole, weights(model))
    assert steps == clock(optimizer) == 6  # two batches a step


def test_accelerate_carries_autocast_clipping_and_a_schedule_over_a_resume(tmp_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")

    def prepared(seed):
        torch.manual_seed(seed)
        model = nn.Linear(4, 4)
        optimizer = StableSPAM(model.parameters(), lr=1e-2, reset_interval=3)
        return accelerator.prepare(model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10))

    def train(model, optimizer, schedule):
        for _ in range(4):
            accelerator.backward(model(torch.ones(2, 4)).square().mean())
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return weights(model), optimizer.param_groups[0]["lr"]

    parts = prepared(0)
    train(*parts)
    accelerator.save_state(tmp_path / "saved")
    whole = train(*parts)
    accelerator.free_memory()
    parts = prepared(1)
    accelerator.load_state(tmp_path / "saved")
    again = train(*parts)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert equal(whole[0], again[0]) and whole[1] == again[1] < 1e-2


def clock(optimizer):
    group = optimizer.param_groups[0]
    return int(group.get("t", group.get("stabilize_t")))


def test_accelerate_exchanges_parameters_for_shards_and_nothing_is_lost():
    # accelerate_fsdp2.py: how far a sharded run is from one without accelerate, straight and through a checkpoint.
    names = ["StableSPAM", "SPAM", "SCALE", "stabilize"]
    program = [sys.executable, str(Path(__file__).parents[1] / "support/accelerate_fsdp2.py"), *names]
    said = subprocess.run(program, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-2000:]
    found = [line.split() for line in said.stdout.splitlines()]
    assert [line[:2] for line in found] == [[name, "True"] for name in names]
    assert all(float(distance) <= 1e-6 for line in found for distance in line[2:])


@pytest.mark.parametrize("build", [BUILDS["StableSPAM"], lambda params: torch.optim.SGD(params, lr=0.1)])
def test_a_monitor_looks_through_accelerates_wrapper(build, accelerator):
    model = nn.Linear(4, 4)
    model, optimizer = accelerator.prepare(model, build(model.parameters()))
    with SpikeMonitor(model, optimizer, say=None) as monitor:
        for _ in range(4):
            with accelerator.accumulate(model):
                accelerator.backward(model(torch.ones(1, 4)).sum())
                optimizer.step()
                optimizer.zero_grad()
        assert monitor.step == 2


# ---- stable-baselines3 ----


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_agent_trains_is_saved_and_goes_on(name, tmp_path):
    from stable_baselines3 import PPO

    def agent(seed):
        policy = {
            "net_arch": [8],
            "optimizer_class": getattr(evenstep, name),
            "optimizer_kwargs": {"reset_interval": 3},
        }
        return PPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=16, n_epochs=2, policy_kwargs=policy, seed=seed)

    first = agent(0)
    before = weights(first.policy)
    with SpikeMonitor(first.policy, first.policy.optimizer, say=None) as monitor:
        first.learn(64)
        assert monitor.step == 8
    first.save(tmp_path / "agent")
    again = PPO.load(tmp_path / "agent", env=first.get_env())
    assert type(again.policy.optimizer).__name__ == name
    assert not equal(before, weights(first.policy)) and equal(weights(first.policy), weights(again.policy))
    saved, loaded = (x.policy.optimizer.state_dict() for x in (first, again))
    assert saved["param_groups"] == loaded["param_groups"]
    moments = [[entry["exp_avg"] for entry in x["state"].values()] for x in (saved, loaded)]
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))
    again.learn(32)


# ---- dotted paths ----


def from_dotted_path(params, name, lr, arguments):
    """As kohya's sd-scripts make the optimizer of --optimizer_type and --optimizer_args."""
    module, _, cls = name.rpartition(".")
    given = dict(argument.split("=") for argument in arguments)
    options = {key: ast.literal_eval(value) for key, value in given.items()}
    return getattr(importlib.import_module(module), cls)(params, lr=lr, **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_dotted_path_and_written_arguments_make_an_optimizer(name):
    groups = [{"params": list(nn.Linear(2, 2).parameters()), "lr": 3e-4}]
    arguments = ["betas=(0.9, 0.95)", "weight_decay=0.01", "update_proj_gap=200"]
    optimizer = from_dotted_path(groups, f"evenstep.{name}", 1e-4, arguments)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["reset_interval"]) == (
        3e-4,
        (0.9, 0.95),
        0.01,
        200,
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_sequence_of_a_configurations_own_type_does_not_get_into_a_saved_state(name, tmp_path):
    betas = collections.UserList([0.9, 0.95])  # such as OmegaConf's, which torch.load refuses
    for given in ({"betas": betas}, {}):
        groups = [{"params": list(nn.Linear(2, 2).parameters())} | ({} if given else {"betas": betas})]
        torch.save(getattr(evenstep, name)(groups, **given).state_dict(), tmp_path / "state.pt")
        assert torch.load(tmp_path / "state.pt", weights_only=True)["param_groups"][0]["betas"] == (0.9, 0.95)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torchtitans_container_makes_steps_saves_and_loads_it(name):
    """One optimizer per part of the model, from a list of parameters and keywords; flattened states, merged."""
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "fused": None, "foreach": False}
    flat = StateDictOptions(flatten_optimizer_state_dict=True)

    def made(seed):
        torch.manual_seed(seed)
        parts = [nn.ModuleDict({"a": nn.Linear(3, 3)}), nn.ModuleDict({"b": nn.Linear(3, 3)})]
        return parts, [getattr(evenstep, name)(list(part.parameters()), **options) for part in parts]

    def step(parts, optimizers):
        for part, optimizer in zip(parts, optimizers, strict=True):
            sum(p.square().sum() for p in part.parameters()).backward()
            optimizer.step()
            optimizer.zero_grad()

    parts, optimizers = made(0)
    step(parts, optimizers)
    saved = {}
    for part, optimizer in zip(parts, optimizers, strict=True):
        saved |= copy.deepcopy(get_optimizer_state_dict(part, optimizer, options=flat))
    models = [{name: p.clone() for name, p in part.state_dict().items()} for part in parts]
    step(parts, optimizers)

    others, their_optimizers = made(1)
    for part, optimizer, model in zip(others, their_optimizers, models, strict=True):
        part.load_state_dict(model)
        set_optimizer_state_dict(part, optimizer, saved, options=flat)
    step(others, their_optimizers)
    assert all(equal(weights(one), weights(other)) for one, other in zip(parts, others, strict=True))
