"""Transforms stacked: any order, gradients that are not finite, saving, sharding."""

import copy
import itertools

import numpy as np
import pytest
import torch
from unit_support import Recorder, gradients, parameters

import tests.optim.test_sharded as sharded
from evenstep import (
    AGC,
    AdaClip,
    AdaGC,
    AdaGN,
    AutoClip,
    GradientStabilizer,
    MomentumReset,
    NormClip,
    SkipStep,
    SpikeClip,
    ValueClip,
    ZClip,
    stabilize,
)
from tests.optim.test_transforms_units import PAIRS, compare


def all_units():
    return [
        AdaClip(0.9),
        AdaGN(),
        GradientStabilizer(),
        SpikeClip(threshold=5.0, clip_start=3),
        ValueClip(0.2),
        AGC(0.1),
        NormClip(0.7),
        ZClip(warmup_steps=4),
        AdaGC(warmup_steps=3),
        AutoClip(30.0, window=9),
        SkipStep(window=8, sigma=3.0),
        MomentumReset(6),
    ]


QUICK = {
    "zclip": {"warmup_steps": 3},
    "skip_step": {"window": 6, "sigma": 3.0},
    "spike_clip": {"threshold": 3.0, "clip_start": 3},
    "adagc": {"warmup_steps": 3, "max_norm": 3.0},
}
KINDS = [name for name in PAIRS if not name.endswith(("_fast", "_median", "_only"))]


@pytest.mark.parametrize("first, second", list(itertools.permutations(KINDS, 2)))
def test_any_two_units_stack_in_any_order(first, second):
    """Behind one another they do what the two rules do behind one another."""
    made = [(*PAIRS[name][:2], QUICK.get(name, PAIRS[name][2])) for name in (first, second)]
    compare([unit(**o) for unit, _, o in made], [rule(**o) for _, rule, o in made], steps=8, rtol=1e-7)


@pytest.mark.parametrize("seed", range(6))
def test_all_of_them_stack_in_any_order(seed):
    order = np.random.default_rng(seed).permutation(len(all_units()))
    params = parameters(torch.float32)
    start = [p.detach().clone() for p in params]
    optimizer = stabilize(torch.optim.AdamW(params, lr=0.01), *[all_units()[i] for i in order])
    for raw in gradients(20):
        for p, g in zip(params, raw, strict=True):
            p.grad = torch.tensor(g, dtype=torch.float32)
        optimizer.step()
    assert all(torch.isfinite(p).all() and not torch.equal(p, q) for p, q in zip(params, start, strict=True))


def test_the_same_kind_twice_is_refused():
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="norm_clip is given more than once"):
        stabilize(torch.optim.SGD([p]), NormClip(), AdaGN(), NormClip(2.0))


def run(optimizer, params, steps, start=0):
    for raw in itertools.islice(gradients(start + steps), start, None):
        for p, g in zip(params, raw, strict=True):
            p.grad = torch.tensor(g, dtype=p.dtype)
        optimizer.step()


def make(dtype=torch.float32, **options):
    params = parameters(dtype)
    return params, stabilize(torch.optim.AdamW(params, lr=0.01), *all_units(), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_chain_continues_to_the_bit(dtype, tmp_path):
    params, optimizer = make(dtype)
    run(optimizer, params, 13)
    torch.save((optimizer.state_dict(), [p.detach() for p in params]), tmp_path / "state.pt")
    again, resumed = make(dtype)
    saved, weights = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(saved)
    with torch.no_grad():
        for p, q in zip(again, weights, strict=True):
            p.copy_(q)
    run(optimizer, params, 12, start=13)
    run(resumed, again, 12, start=13)
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))
    assert all(
        torch.equal(value, resumed.statistics[q][key])
        for p, q in zip(params, again, strict=True)
        for key, value in optimizer.statistics[p].items()
    )


def test_a_copy_goes_its_own_way():
    params, optimizer = make()
    run(optimizer, params, 3)
    kept = {key: value.clone() for key, value in optimizer.statistics[params[0]].items()}
    params2, optimizer2 = copy.deepcopy((params, optimizer))
    run(optimizer2, params2, 3)
    assert all(torch.equal(value, optimizer.statistics[params[0]][key]) for key, value in kept.items())
    first, last = optimizer2.statistics[params2[0]], optimizer2.statistics[params2[-1]]
    assert first["zclip.mean"] is last["zclip.mean"] and float(first["zclip.n"]) == 6


def test_another_shape_of_statistics_is_refused_before_anything_changes():
    params = parameters()
    optimizer = stabilize(Recorder(params), AutoClip(window=5))
    saved = stabilize(Recorder(parameters()), AutoClip(window=7)).state_dict()
    saved["param_groups"][0]["lr"] = 7.0
    with pytest.raises(ValueError, match=r"autoclip.history has shape \(7,\), the transform given here keeps \(5,\)"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_groups_added_later_share_the_statistics_of_the_model():
    params = parameters()
    optimizer = stabilize(Recorder(params), ZClip(), AutoClip())
    run(optimizer, params, 3)
    late = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer.add_param_group({"params": [late]})
    assert optimizer.statistics[late]["zclip.mean"] is optimizer.statistics[params[0]]["zclip.mean"]
    late.grad = torch.ones_like(late)
    run(optimizer, params, 2)
    assert float(optimizer.statistics[late]["autoclip.n"]) == 5


@pytest.mark.parametrize("nonfinite", ["restore", "skip"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_leaves_all_statistics_as_they_were(bad, nonfinite):
    params, optimizer = make(nonfinite=nonfinite)
    units = [unit for unit in all_units() if unit.name != "skip_step"]
    optimizer = stabilize(torch.optim.AdamW(params, lr=0.01), *units, nonfinite=nonfinite)
    run(optimizer, params, 5)
    before = copy.deepcopy([optimizer.statistics[p] for p in params])
    states = copy.deepcopy([optimizer.state[p] for p in params])
    weights = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.full_like(p, 0.1)
    params[0].grad[0, 0] = bad
    optimizer.step()
    after = [optimizer.statistics[p] for p in params]
    assert torch.equal(weights[0], params[0]) and not torch.equal(weights[1], params[1])
    assert all(torch.equal(value, optimizer.state[params[0]][key]) for key, value in states[0].items())
    assert not torch.equal(states[1]["exp_avg"], optimizer.state[params[1]]["exp_avg"])
    assert {key for key in after[0] if not torch.equal(after[0][key], before[0][key])} == {"skipped"}
    assert float(after[0]["skipped"]) == 1 and float(after[1]["skipped"]) == 0
    shared = {f"{unit.name}.{name}" for unit in units for name in unit.shared}
    changed = {key for key in after[1] if not torch.equal(after[1][key], before[1][key])}
    assert shared and not shared & changed and "adagn.norm" in changed
    assert optimizer.stats["skipped"].tolist() == [1, 0, 0, 0, 0]
    run(optimizer, params, 3)
    assert not torch.equal(weights[0], params[0])


CHAINS = {
    "everything": lambda: all_units(),
    "clips": lambda: [ValueClip(0.2), AdaClip(), SpikeClip(threshold=5.0, clip_start=3), AGC(0.1)],
    "wide": lambda: [NormClip(0.5), ZClip(warmup_steps=4), AutoClip(30.0, window=9), AdaGN()],
}
sharded.MAKERS |= {
    f"chain_{name}": lambda m, make=make: stabilize(torch.optim.AdamW(m.parameters(), lr=0.01), *make())
    for name, make in CHAINS.items()
}


def sharded_worker(rank, world, path, mesh_shape):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    sharded.setup(rank, world, path)
    mesh = sharded.dist.init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    for name in CHAINS:
        torch.manual_seed(0)
        model, alone = sharded.Small(), sharded.Small()
        alone.load_state_dict(model.state_dict())
        fully_shard(model, mesh=mesh)
        steps = range(14)
        with sharded.Counting() as calls:
            place = lambda p, whole: distribute_tensor(whole, p.device_mesh, p.placements)  # noqa: E731
            sharded.train(model, sharded.MAKERS[f"chain_{name}"](model), place, steps)
        if name == "wide":
            assert len(calls) == 2 * len(steps), f"{len(calls)} messages"  # a global norm sends none of its own
        sharded.train(alone, sharded.MAKERS[f"chain_{name}"](alone), lambda p, whole: whole, steps)
        for (parameter, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p.full_tensor(), q, rtol=1e-5, atol=1e-6, msg=lambda m, n=parameter: f"{n}: {m}")


def test_sharded_chains_equal_a_single_process(tmp_path):
    sharded.run(sharded_worker, tmp_path, (2,))
