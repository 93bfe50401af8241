"""Checkpoints of sharded runs: torch.distributed.checkpoint, saved by two processes, loaded by two, one and three."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from process_support import leave_groups
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from evenstep import SPAM
from evenstep.train import saving
from tests.optim.test_sharded import MAKERS, Small, run, setup, train

BEFORE, AFTER = range(10), range(10, 18)
STYLES = {
    "names": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
}


def place(p, whole):
    return distribute_tensor(whole, p.device_mesh, p.placements)


def sharded(name, seed=0):
    torch.manual_seed(seed)
    model = Small()
    fully_shard(model)
    return model, MAKERS[name](model)


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def outcome(model, optimizer):
    """Every parameter and every entry of the state, whole."""
    found = {}
    saved = optimizer.state_dict()["state"] if isinstance(optimizer, SPAM) else {}  # masks and moments made whole
    for i, (name, p) in enumerate(model.named_parameters()):
        found[name] = whole(p.detach()).clone()
        for key, value in (saved.get(i) or optimizer.state.get(p, {})).items():  # reading a defaultdict would fill it
            found[f"{name} {key}"] = whole(value).clone() if torch.is_tensor(value) else value
    return found


def saver(rank, world, path, directory, names):
    setup(rank, world, path)
    for name in names:
        model, optimizer = sharded(name)
        train(model, optimizer, place, BEFORE)
        for style, options in STYLES.items():
            state = {
                "model": get_model_state_dict(model, options=options),
                "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
            }
            dcp.save(state, checkpoint_id=f"{directory}/{name}-{style}")
        full = StateDictOptions(full_state_dict=True, cpu_offload=True)
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=full))  # some of it is the live state
        weights = copy.deepcopy(get_model_state_dict(model, options=full))
        train(model, optimizer, place, AFTER)
        after = outcome(model, optimizer)
        if rank == 0:
            torch.save(({"model": weights, "optimizer": saved}, after), f"{directory}/{name}.pt")
    dist.barrier()


def loader(rank, world, path, directory, names):
    setup(rank, world, path)
    for name in names:
        full, expected = torch.load(f"{directory}/{name}.pt", weights_only=True)
        for style in [*STYLES, "full"]:
            options = STYLES.get(style, STYLES["names"])
            model, optimizer = sharded(name, seed=1)
            state = {
                "model": get_model_state_dict(model, options=options),
                "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
            }
            dcp.load(state, checkpoint_id=f"{directory}/{name}-{'names' if style == 'full' else style}")
            set_model_state_dict(model, state["model"], options=options)
            if style == "full":
                set_optimizer_state_dict(
                    model, optimizer, copy.deepcopy(full["optimizer"]), options=StateDictOptions(full_state_dict=True)
                )
            else:
                set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
            train(model, optimizer, place, AFTER)
            found = outcome(model, optimizer)
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                if not torch.is_tensor(value) or world == 2:
                    assert torch.equal(torch.as_tensor(found[key]), torch.as_tensor(value)), f"{name} {style}: {key}"
                else:  # sums over other parts round differently
                    torch.testing.assert_close(
                        found[key],
                        value,
                        rtol=1e-5,
                        atol=1e-6,
                        msg=lambda m, k=key, n=name, s=style: f"{n} {s} {k} {m}",
                    )
            if name == "spam_sparse" and style == "full" and world == 1:
                resumes_unsharded(full, expected)
    if "spam_sparse" in names and world == 2:
        resumes_from_one_process(rank, directory)
    dist.barrier()


def resumes_unsharded(full, expected):
    """The state of shards, loaded by an optimizer of whole parameters."""
    model = Small()
    model.load_state_dict(full["model"])
    optimizer = MAKERS["spam_sparse"](model)
    set_optimizer_state_dict(model, optimizer, full["optimizer"])
    assert optimizer.state[model.hidden.weight]["exp_avg"].shape == (21,)  # half of 7 x 6
    train(model, optimizer, lambda p, grad: grad, AFTER)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-5, atol=1e-6)


def resumes_from_one_process(rank, directory):
    """The trainer's checkpoint of one process, loaded by shards."""
    model, optimizer = trained("spam_sparse")
    tensors, rest = saving.optimizer_tensors(model, optimizer)
    path = Path(directory) / "one-process"
    if rank == 0:
        saving.write(path, tensors, None)
    dist.barrier()
    shards, resumed = sharded("spam_sparse")
    set_model_state_dict(shards, model.state_dict(), options=StateDictOptions(full_state_dict=True))
    saving.load_optimizer(shards, resumed, path, rest)
    train(model, optimizer, lambda p, grad: grad, AFTER)
    train(shards, resumed, place, AFTER)
    for p, q in zip(shards.parameters(), model.parameters(), strict=True):
        assert torch.equal(resumed.get_mask(p).full_tensor(), optimizer.get_mask(q))
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "names, worlds",
    [
        (["stable_spam", "spam_sparse"], (2, 1)),
        pytest.param(["stable_spam", "spam", "spam_sparse", "scale", "stabilized"], (2, 1, 3), marks=pytest.mark.slow),
    ],
    ids=["quick", "all"],
)
def test_saved_by_two_processes_goes_on_in_two_one_and_three(names, worlds, tmp_path):
    """Bit for bit in two; in one and three to 1e-6, since norms are summed over other parts."""
    for world in worlds:
        where = tmp_path / str(world)
        where.mkdir()
        run(saver_and_loader if world == 2 else loader, where, str(tmp_path), names, world=world)


def saver_and_loader(rank, world, path, directory, names):
    """Both in the same processes, which have a new group for the second."""
    saver(rank, world, f"{path}-save", directory, names)
    leave_groups()
    loader(rank, world, path, directory, names)


MORE = MAKERS | {"spam_sparse": lambda m: SPAM(m.parameters(), lr=0.01, reset_interval=7, density=0.25)}


def trained(name):
    torch.manual_seed(0)
    model = Small()
    optimizer = MORE[name](model)
    train(model, optimizer, lambda p, grad: grad, BEFORE)
    return model, optimizer


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", MORE)
def test_state_dicts_of_checkpoint_tools_go_on_bit_for_bit(name, style, tmp_path):
    model, optimizer = trained(name)
    options = STYLES[style]
    state = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.save(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    torch.manual_seed(0)
    other = Small()
    resumed = MORE[name](other)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    state = {"optimizer": get_optimizer_state_dict(other, resumed, options=options)}
    dcp.load(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    set_optimizer_state_dict(other, resumed, state["optimizer"], options=options)
    if name == "spam_sparse":
        assert [type(s.get("mask_set_at")) for s in resumed.state.values()] == [
            type(s.get("mask_set_at")) for s in optimizer.state.values()
        ]
    for one, o in ((model, optimizer), (other, resumed)):
        train(one, o, lambda p, grad: grad, AFTER)
    expected = outcome(model, optimizer)
    for key, value in outcome(other, resumed).items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected[key])), key
    assert [g.get("t") for g in resumed.param_groups] == [g.get("t") for g in optimizer.param_groups]


@pytest.mark.parametrize("fresh", [False, True], ids=["trained", "fresh"])
@pytest.mark.parametrize("name", MORE)
def test_the_fake_step_of_checkpoint_tools_changes_nothing(name, fresh):
    """They step with zero gradients and lr 0 to make a lazy optimizer create its state."""
    torch.manual_seed(0)
    model = Small()
    optimizer = MORE[name](model)
    if not fresh:
        train(model, optimizer, lambda p, grad: grad, BEFORE)
    optimizer.zero_grad()
    before = outcome(model, optimizer)
    clocks = [{k: v for k, v in g.items() if k != "params"} for g in copy.deepcopy(optimizer.param_groups)]
    get_optimizer_state_dict(model, optimizer)
    after = outcome(model, optimizer)
    for key, value in before.items():
        assert torch.equal(torch.as_tensor(after[key]), torch.as_tensor(value)), key
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == clocks
    assert all(p.grad is None for p in model.parameters())
    if name == "stabilized":
        assert all((value == 0).all() for s in optimizer.statistics.values() for value in s.values()) == fresh
