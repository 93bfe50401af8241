"""A program: accelerate with FSDP2 on one process. Trains, saves, goes on in another optimizer; prints distances."""

import sys
import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    load_fsdp_model,
    load_fsdp_optimizer,
    save_fsdp_model,
    save_fsdp_optimizer,
)
from torch import nn
from torch.distributed.tensor import DTensor

from evenstep import SCALE, SPAM, AdaClip, AdaGN, StableSPAM, scale_groups, stabilize

BUILDS = {
    "StableSPAM": lambda model: StableSPAM(model.parameters(), lr=1e-2, reset_interval=3),
    "SPAM": lambda model: SPAM(model.parameters(), lr=1e-2, reset_interval=3, warmup_steps=2),
    "SCALE": lambda model: SCALE(scale_groups(model, last="2.weight"), lr=1e-2),
    "stabilize": lambda model: stabilize(torch.optim.AdamW(model.parameters(), lr=1e-2), AdaClip(), AdaGN()),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
}


def made(name, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    return model, BUILDS[name](model)


def train(model, optimizer, steps, backward):
    for step in steps:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        backward((model(x) - 1).square().mean())
        optimizer.step()
        optimizer.zero_grad()


def whole(p):
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()


def distance(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((whole(p) - whole(q)).abs().max()) for p, q in pairs)


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")

    def prepared(name, seed):
        # accelerate knows FSDP on accelerators alone; told so, it does on a CPU what it does there.
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
        return accelerator.prepare(*made(name, seed))

    for name in sys.argv[1:]:
        plain, alone = made(name, 0)
        train(plain, alone, range(6), torch.Tensor.backward)
        with tempfile.TemporaryDirectory() as folder:
            model, optimizer = prepared(name, 0)
            train(model, optimizer, range(3), accelerator.backward)
            save_fsdp_model(plugin, accelerator, model, folder)
            save_fsdp_optimizer(plugin, accelerator, optimizer, model, folder)
            train(model, optimizer, range(3, 6), accelerator.backward)
            straight = distance(plain, model)
            accelerator.free_memory()
            model, optimizer = prepared(name, 1)
            load_fsdp_model(plugin, accelerator, model, folder)
            load_fsdp_optimizer(plugin, accelerator, optimizer, model, folder)
            train(model, optimizer, range(3, 6), accelerator.backward)
            print(name, isinstance(next(model.parameters()), DTensor), straight, distance(plain, model))
            accelerator.free_memory()
