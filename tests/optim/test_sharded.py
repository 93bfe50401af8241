"""Sharded equals single: two gloo processes against one."""

import copy

import pytest
import torch
import torch.distributed as dist
from process_support import run_processes
from torch import nn

from evenstep import SCALE, SPAM, AdaClip, AdaGC, AdaGN, StableSPAM, scale_groups, stabilize
from evenstep.baselines.muon import ShardedMuon
from evenstep.optim import cautious_decay, hyperball
from evenstep.optim.distributed import is_sharded

WORLD = 2
STEPS = 30


class Small(nn.Module):
    """Odd sizes, so that shards are uneven and some are empty."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 7)
        self.narrow = nn.Linear(7, 1)
        self.wide = nn.Linear(1, 7)
        self.lm_head = nn.Linear(7, 11, bias=False)

    def forward(self, tokens):
        x = torch.tanh(self.hidden(self.embed(tokens)))
        return self.lm_head(x + self.wide(torch.tanh(self.narrow(x))))


MAKERS = {
    "stable_spam": lambda m: StableSPAM(m.parameters(), lr=0.01, reset_interval=7, weight_decay=0.1),
    "spam": lambda m: SPAM(m.parameters(), lr=0.01, reset_interval=9, warmup_steps=5, clip_start=3, threshold=50.0),
    "spam_sparse": lambda m: SPAM(m.parameters(), lr=0.01, reset_interval=9, warmup_steps=5, density=0.5, clip_start=3),
    "scale": lambda m: SCALE(scale_groups(m), lr=0.01),
    "scale_l2": lambda m: SCALE(scale_groups(m), lr=0.01, norm="l2"),
    "stabilized": lambda m: stabilize(torch.optim.AdamW(m.parameters(), lr=0.01), AdaClip(), AdaGN(), reset_interval=7),
}


def with_rule(rule, optimizer, *args):
    rule(optimizer, *args)
    return optimizer


def muon_with_clipping(m):
    matrices = [m.hidden.weight, m.narrow.weight, m.wide.weight]
    kind = ShardedMuon if is_sharded(m.hidden.weight) else torch.optim.Muon
    return stabilize(kind(matrices, lr=0.01), AdaGC())


# Rules around the step of any optimizer; Muon of whole matrices whose spikes are clipped tensor by tensor.
WRAPPED = {
    "cautious": lambda m: with_rule(cautious_decay, StableSPAM(m.parameters(), lr=0.01, weight_decay=5.0)),
    "hyperball": lambda m: with_rule(
        hyperball, SPAM(m.parameters(), lr=0.01, clip_start=3, threshold=50.0), [m.hidden.weight, m.wide.weight], 2.0
    ),
    "muon": muon_with_clipping,
}


def steps_of(name):
    return range(14 if name in WRAPPED else STEPS)


def gradients(step, shapes):
    generator = torch.Generator().manual_seed(step)
    grads = [torch.randn(shape, generator=generator) * 0.1 for shape in shapes]
    if step % 6 == 5:
        grads[2][0] *= 1000  # a spike that one rank alone may hold
    if step == 11:
        grads[1][-1, -1] = torch.nan
    return grads


def train(model, optimizer, place, steps=range(STEPS)):
    """``place(p, whole)`` makes the gradient of ``p`` from the whole tensor. Returns the statistics of each step."""
    params = list(model.parameters())
    shapes = [p.shape for p in Small().parameters()]
    stats = []
    for step in steps:
        for p, whole in zip(params, gradients(step, shapes), strict=True):
            p.grad = place(p, whole)
        optimizer.step()
        stats.append(copy.deepcopy(optimizer.stats))
    return stats


def single(name):
    torch.manual_seed(0)
    model = Small()
    optimizer = (MAKERS | WRAPPED)[name](model)
    stats = train(model, optimizer, lambda p, whole: whole, steps_of(name))
    return model, stats, optimizer


def setup(rank, world, path):
    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{path}")
    torch.set_num_threads(1)


def run(worker, tmp_path, *args, world=WORLD):
    run_processes(worker, world, str(tmp_path / "rendezvous"), *args, count=world)


class Counting:
    """Counts all_reduce calls by operation."""

    def __init__(self):
        self.calls = []
        self.real = dist.all_reduce

    def __enter__(self):
        dist.all_reduce = lambda tensor, op=dist.ReduceOp.SUM, *args, **kwargs: (
            self.calls.append(str(op)),
            self.real(tensor, op, *args, **kwargs),
        )[1]
        return self.calls

    def __exit__(self, *_):
        dist.all_reduce = self.real


def fsdp_worker(rank, world, path, names, mesh_shape):
    setup(rank, world, path)
    mesh = dist.init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    for name in names:
        equals_a_single_process(name, mesh)


def equals_a_single_process(name, mesh):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    torch.manual_seed(0)
    model = Small()
    fully_shard(model, mesh=mesh)
    optimizer = (MAKERS | WRAPPED)[name](model)
    place = lambda p, whole: distribute_tensor(whole, p.device_mesh, p.placements)  # noqa: E731
    with Counting() as calls:
        stats = train(model, optimizer, place, steps_of(name))
    if mesh.ndim == 1 and name in MAKERS:
        # New masks of SPAM ask once per reset whether the gradients are finite.
        resets = STEPS // 9 if name == "spam_sparse" else 0
        assert len(calls) <= 2 * STEPS + resets, f"{len(calls)} all-reduces in {STEPS} steps"
        assert calls.count(str(dist.ReduceOp.MAX)) == STEPS + resets
    alone, expected, other = single(name)
    if name == "hyperball":
        torch.manual_seed(0)
        start = Small()
        for p, q in ((model.hidden.weight, start.hidden.weight), (model.wide.weight, start.wide.weight)):
            torch.testing.assert_close(p.full_tensor().norm(), q.norm(), rtol=1e-6, atol=0)
    if name == "spam_sparse":
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            assert torch.equal(optimizer.get_mask(p).full_tensor(), other.get_mask(q))
    for (parameter, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-5, atol=1e-6, msg=lambda m, n=parameter: f"{n}: {m}")
    for ours, theirs in zip(stats, expected, strict=True):
        for key in ("grad_max", "grad_norm", "gain", "clip_limit", "skipped"):
            if name.startswith("scale") and key == "gain":
                continue
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    "names",
    [
        ("stable_spam", "spam_sparse", "scale", *WRAPPED),
        pytest.param(("spam", "scale_l2", "stabilized"), marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def test_fsdp2_with_uneven_shards_equals_a_single_process(names, tmp_path):
    run(fsdp_worker, tmp_path, names, (WORLD,))


class Pair(nn.Module):
    """Two matrices, for tensor parallelism by columns, then by rows."""

    def __init__(self):
        super().__init__()
        self.column = nn.Linear(6, 8, bias=False)
        self.row = nn.Linear(8, 4, bias=False)


def cut_twice(model, mesh):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    parallelize_module(model, mesh["tensor"], {"column": ColwiseParallel(), "row": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    return model


def cut_twice_worker(rank, world, path):
    setup(rank, world, path)
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    numbered = Pair()
    for p in numbered.parameters():
        p.data = torch.arange(p.numel(), dtype=torch.float32).view(p.shape)
    places = [p.to_local().long() for p in cut_twice(numbered, mesh).parameters()]
    torch.manual_seed(0)
    model, alone = Pair(), Pair()
    alone.load_state_dict(model.state_dict())
    cut_twice(model, mesh)
    ours, theirs = (StableSPAM(m.parameters(), lr=0.01, reset_interval=7) for m in (model, alone))
    sparse = [SPAM(m.parameters(), density=0.4) for m in (model, alone)]
    # strided shards, cut along two dimensions
    for p, q, place in zip(model.parameters(), alone.parameters(), places, strict=True):
        assert torch.equal(sparse[0].get_mask(p).to_local(), sparse[1].get_mask(q).flatten()[place])
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for p, q, place in zip(model.parameters(), alone.parameters(), places, strict=True):
            q.grad = torch.randn(q.shape, generator=generator)
            if step % 6 == 5:
                q.grad[-1, -1] = 100.0  # a spike that one process alone holds
            p.grad = torch.zeros_like(p)
            p.grad.to_local().copy_(q.grad.flatten()[place])
        ours.step()
        theirs.step()
        torch.testing.assert_close(ours.stats["grad_norm"], theirs.stats["grad_norm"], rtol=1e-5, atol=0)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-5, atol=1e-6)


def test_tensor_parallel_under_fsdp2_equals_a_single_process(tmp_path):
    run(cut_twice_worker, tmp_path, world=4)


@pytest.mark.slow
def test_hsdp_equals_a_single_process(tmp_path):
    run(fsdp_worker, tmp_path, ("stable_spam", "spam_sparse"), (2, 2), world=4)


def tensor_parallel_worker(rank, world, path, name):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    setup(rank, world, path)
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = Small()
    layouts = {"embed": [Shard(0), Shard(1)], "hidden": [Shard(0), Shard(0)], "lm_head": [Replicate(), Shard(1)]}
    for module_name, module in model.named_children():
        for key, p in list(module.named_parameters()):
            placements = layouts.get(module_name, [Replicate(), Shard(0)]) if p.dim() == 2 else [Shard(0), Replicate()]
            setattr(module, key, nn.Parameter(distribute_tensor(p.detach(), mesh, placements)))
    optimizer = MAKERS[name](model)
    train(model, optimizer, lambda p, whole: distribute_tensor(whole, p.device_mesh, p.placements))
    alone, *_ = single(name)
    for (parameter, p), q in zip(model.named_parameters(), alone.named_parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q[1], rtol=1e-5, atol=1e-6, msg=lambda m, n=parameter: f"{n}: {m}")


@pytest.mark.parametrize("name", ["stable_spam", pytest.param("scale", marks=pytest.mark.slow)])
def test_two_dimensional_meshes_equal_a_single_process(name, tmp_path):
    run(tensor_parallel_worker, tmp_path, name, world=4)


def ddp_worker(rank, world, path, name):
    """Each rank sees half of each batch; DDP averages, so that all ranks step as one process on whole batches."""
    from torch.nn.parallel import DistributedDataParallel

    setup(rank, world, path)
    torch.manual_seed(0)
    alone, model = Small(), Small()
    model.load_state_dict(alone.state_dict())
    torch.manual_seed(100 + rank)  # masks must not depend on a rank's own random state
    models = [alone, DistributedDataParallel(model)]
    optimizers = [DDP_MAKERS[name](alone), DDP_MAKERS[name](model)]
    for step in range(STEPS):
        tokens = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(step))
        half = tokens[rank * 2 : rank * 2 + 2]
        for m, optimizer, batch in zip(models, optimizers, (tokens, half), strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(m(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            (loss * (1000 if step == 11 else 1)).backward()
            optimizer.step()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-5)
        parts = [torch.empty_like(p) for _ in range(world)]
        dist.all_gather(parts, p.detach())
        assert torch.equal(parts[0], parts[1]), "replicas must stay equal to the bit"
        if name == "spam_sparse" and p.dim() == 2:
            mask = optimizers[1].get_mask(p).to(torch.uint8)
            masks = [torch.empty_like(mask) for _ in range(world)]
            dist.all_gather(masks, mask)
            assert torch.equal(masks[0], masks[1])


DDP_MAKERS = MAKERS | {
    "spam_sparse": lambda m: SPAM(m.parameters(), lr=0.01, reset_interval=9, warmup_steps=5, density=0.5)
}


@pytest.mark.parametrize(
    "name", ["spam_sparse", *(pytest.param(name, marks=pytest.mark.slow) for name in ("stable_spam", "scale"))]
)
def test_ddp_replicas_stay_equal_and_follow_a_single_process(name, tmp_path):
    run(ddp_worker, tmp_path, name)


def test_flat_shards_are_refused_with_an_explanation():
    flat = nn.Parameter(torch.ones(8))
    flat._fsdp_flattened = True  # as FullyShardedDataParallel marks its parameters
    with pytest.raises(ValueError, match=r"flat shard \(FullyShardedDataParallel\).*use FSDP2"):
        StableSPAM([flat])
    optimizer = StableSPAM([nn.Parameter(torch.ones(2, 4))])
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.ones(8))]  # as ZeRO swaps them
    optimizer.param_groups[0]["params"][0].grad = torch.ones(8)
    with pytest.raises(RuntimeError, match=r"without add_param_group.*flat shard"):
        optimizer.step()
