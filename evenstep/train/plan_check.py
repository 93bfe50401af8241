"""The dry run that a plan is checked against: the model and its optimizer are really built, on the meta device, where
tensors have shapes and no memory, and really cut, by the code that trains, among processes that do not exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from evenstep.errors import EvenstepError
from evenstep.models import Llama
from evenstep.optim.distributed import local
from evenstep.train.optimizers import build_optimizer
from evenstep.train.parallel import Parallel
from evenstep.train.plan import Plan
from evenstep.train.world import World


@dataclass(frozen=True)
class Counted:
    """Bytes that process 0 holds."""

    parameters: int
    state: int


def count(plan: Plan) -> Counted:
    """Build what ``plan`` is of, and count. EvenstepError when torch.distributed is in use already."""
    with _processes(plan) as world:
        model = built(plan, world)
        optimizer = build_optimizer(model, plan.config.optim)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if not optimizer.state:  # torch's make their state in the first step
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step()
        held = sum(local(p).nbytes for p in params)
        kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        return Counted(held, sum(map(_bytes, kept)))


def built(plan: Plan, world: World) -> Llama:
    """The model on meta, cut as the plan says."""
    with torch.device("meta"):
        model = Llama(plan.shape)
    if plan.config.train.dtype == "bf16":
        model = model.bfloat16()
    if plan.grid.mode != "ddp":  # which only wraps a copy
        Parallel(replace(plan.config, train=replace(plan.config.train, compile=False)), world).apply(model)
    return model


def _bytes(value: Tensor) -> int:
    """Of what is here of a tensor of the state, 8-bit blocks included."""
    here: Any = local(value)
    names = here.__tensor_flatten__()[0] if is_traceable_wrapper_subclass(here) else []
    return sum(getattr(here, name).nbytes for name in names) if names else here.nbytes


@contextmanager
def _processes(plan: Plan) -> Iterator[World]:
    """This process as the first of the plan's, the others played by torch's fake backend."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    grid = plan.grid
    if grid.mode == "none":
        yield World(torch.device("cpu"))
        return
    if dist.is_initialized():
        raise EvenstepError("the dry run needs torch.distributed for itself; run it in a process of its own")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=grid.gpus)
    try:
        size = grid.gpus // grid.replicate
        yield World(torch.device("cpu"), 0, grid.gpus, 0, size, dist.group.WORLD, None, grid.tensor)
    finally:
        dist.destroy_process_group()
