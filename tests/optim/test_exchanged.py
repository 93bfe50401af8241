"""Parameters that a tool exchanges for shards after the optimizer was made."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from evenstep import AdaGN, StableSPAM, stabilize

BUILDS = {
    "StableSPAM": lambda params: StableSPAM(params, lr=0.1),
    "stabilize": lambda params: stabilize(torch.optim.AdamW(params, lr=0.1), AdaGN()),
}


@pytest.fixture(scope="module")
def mesh():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def exchange(optimizer, mesh):
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in group["params"]]


def step(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize("name", BUILDS)
def test_state_follows_into_the_shards_before_the_first_step(name, mesh):
    params = [nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(4))]
    optimizer, alone = BUILDS[name](params), BUILDS[name]([nn.Parameter(p.detach().clone()) for p in params])
    exchange(optimizer, mesh)
    saved = optimizer.state_dict()["state"]
    assert sorted(saved) == [0, 1]
    step(optimizer)
    step(alone)
    here, there = (one.param_groups[0]["params"] for one in (optimizer, alone))
    for p, q in zip(here, there, strict=True):  # kernels and, for shards, plain numbers: to rounding
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-6, atol=1e-7)
    assert not any(p in optimizer.state for p in params)


@pytest.mark.parametrize("name", BUILDS)
def test_an_exchange_after_the_first_step_is_refused(name, mesh):
    optimizer = BUILDS[name]([nn.Parameter(torch.ones(4, 2))])
    step(optimizer)
    exchange(optimizer, mesh)
    for act in (lambda: step(optimizer), optimizer.state_dict):
        with pytest.raises(RuntimeError, match=r"exchanged for shards after the first step.*prepare"):
            act()
