"""One model over several processes, applied from outside: torch's DDP, FSDP2 and DTensor tensor parallelism.

Every process builds the whole model on its CPU, drawn from the same seed, so that the run starts from the weights it
would have alone; that takes the model's size in host memory per process. Then each block is compiled, cut and wrapped
by itself, and what is left (the token table, the final norm, the head) with the root.

* ``ddp``: a copy in every process, gradients averaged.
* ``fsdp``: parameters, gradients and optimizer state cut over all processes; a block's weights are gathered before its
  forward and its backward pass.
* ``hsdp``: as fsdp within a group, averaged between groups (``parallel.replicate`` of them).
* ``tp+fsdp``: the matrices of attention and MLP are cut over ``parallel.tensor`` processes (columns, then rows: two
  all-reduces a block and pass), and over the others as in fsdp. Token table, norms and head take no part in the
  matrix cut: the table and the head are cut over all processes as fsdp does, and their products are computed by each.

Gradients are reduced in fp32 whatever the parameters are. With gradient accumulation they are reduced once a step;
until then fsdp keeps them whole in every process, which is what saving the messages costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from evenstep.errors import EvenstepError
from evenstep.models import Llama, LlamaConfig
from evenstep.optim.distributed import Layout, local
from evenstep.optim.distributed import Reduction as Combine
from evenstep.optim.distributed import all_reduce as combine
from evenstep.train.config import Config
from evenstep.train.world import World

_COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
_ROWS = ("self_attn.o_proj", "mlp.down_proj")


def check_cut(shape: LlamaConfig, tensor: int) -> None:
    """EvenstepError when the matrices of a model of ``shape`` cannot be cut over ``tensor`` processes."""
    for name in ("num_heads", "intermediate_size"):
        if getattr(shape, name) % tensor:
            raise EvenstepError(
                f"parallel.tensor {tensor} does not divide the model's {name.replace('_', ' ')} "
                f"{getattr(shape, name)}; give a divisor of it"
            )


class Parallel:
    """The model of ``config`` in ``world``. ``loss`` is what to call in a step; validation calls
    ``model.loss``."""

    def __init__(self, config: Config, world: World) -> None:
        self.mode = config.parallel.mode if world.control is not None else "none"
        self.config, self.world = config, world
        self.model: Llama | None = None
        self.wrapped: Any = None

    @property
    def sharded(self) -> bool:
        """Does a process hold parts of tensors?"""
        return self.mode not in ("none", "ddp")

    def check(self, model: Llama) -> None:
        """EvenstepError when the model cannot be cut as asked."""
        if self.world.tensor > 1:
            check_cut(model.config, self.world.tensor)

    def apply(self, model: Llama) -> None:
        """Compile, cut and wrap ``model`` in place: its parameters and their names stay, each a DTensor where it is
        cut. Before the optimizer is made."""
        self.check(model)
        self.model = model
        if self.mode == "tp+fsdp":
            self._cut_matrices(model)
        if self.config.train.compile:  # block by block: one small graph serves all, the chunked loss cannot be compiled
            for block in model.model.layers:
                block.compile(dynamic=False)
        if self.mode == "ddp":
            self.wrapped = self._ddp(model)
        elif self.sharded:
            self._fsdp(model)

    def loss(self, *args: Any, **options: Any) -> Tensor:
        """``model.loss`` for a step, through whatever keeps the processes together."""
        assert self.model is not None
        return (self.wrapped or self.model.loss)(*args, **options)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around the forward and backward pass of one micro batch: gradients are reduced with the ``last``."""
        if self.wrapped is not None and not last:
            with self.wrapped.no_sync():
                yield
            return
        if self.sharded:
            model: Any = self.model
            model.set_requires_gradient_sync(last)
            model.set_is_last_backward(last)
        yield

    # ---- the modes ----

    def _ddp(self, model: Llama) -> nn.Module:
        device = self.world.device
        wrapped = nn.parallel.DistributedDataParallel(
            _Loss(model),
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
        wrapped.broadcast_buffers = False  # as an argument it is deprecated from torch 2.13 on, where it got a new name
        if self.config.train.dtype == "bf16":
            # Annotations that are strings, as all of this file, are refused by torch; a lambda has none.
            wrapped.register_comm_hook(None, lambda _, bucket: _average_in_fp32(bucket))
        return wrapped

    def _mesh(self) -> Any:
        world, parallel, device = self.world, self.config.parallel, self.world.device.type
        if self.mode == "tp+fsdp":
            return dist.init_device_mesh(device, (world.data_size, world.tensor), mesh_dim_names=("data", "tensor"))
        if self.mode == "hsdp":
            groups = parallel.replicate or max(1, world.size // world.local_size)
            return dist.init_device_mesh(device, (groups, world.size // groups), mesh_dim_names=("copy", "part"))
        return dist.init_device_mesh(device, (world.size,), mesh_dim_names=("part",))

    def _cut_matrices(self, model: Llama) -> None:
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        self._grid = self._mesh()
        plan: dict[str, Any] = {name: ColwiseParallel() for name in _COLUMNS} | {
            name: RowwiseParallel() for name in _ROWS
        }
        for block in model.model.layers:
            parallelize_module(block, self._grid["tensor"], plan)

    def _fsdp(self, model: Llama) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        if self.mode == "tp+fsdp":
            inner, outer = self._grid["data"], self._grid._flatten("all")
        else:
            inner = outer = self._mesh()
        param_dtype = torch.bfloat16 if self.config.train.dtype == "bf16-autocast" else None
        precision = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
        reshard = self.config.parallel.reshard
        for block in model.model.layers:
            fully_shard(block, mesh=inner, reshard_after_forward=reshard, mp_policy=precision)
        # The root's weights are needed first in the backward pass, right after the forward: they stay.
        fully_shard(model, mesh=outer, reshard_after_forward=False, mp_policy=precision)
        register_fsdp_forward_method(model, "loss")


class _Loss(nn.Module):
    """DDP looks after ``forward`` alone."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **options: Any) -> Tensor:
        return self.model.loss(*args, **options)


def _average_in_fp32(bucket: Any) -> Any:
    """DDP's bucket of 16-bit gradients, averaged in fp32."""
    gradients = bucket.buffer()
    whole = gradients.float().div_(dist.get_world_size())
    sent = dist.all_reduce(whole, async_op=True).get_future()
    return sent.then(lambda done: gradients.copy_(done.value()[0]))


# ---- norms of what is cut ----


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all tensors together, 0-d; of DTensors, of the whole ones, with one message per layout."""
    layouts = [Layout.of(tensor) for tensor in tensors]
    if not any(layout.cuts for layout in layouts):
        return torch.nn.utils.get_total_norm([local(tensor) for tensor in tensors], foreach=True)
    norms = torch._foreach_norm([local(tensor.detach()) for tensor in tensors])
    asked: dict[int, tuple[Combine, ...]] = {
        i: (Combine("sum", norm.float().square().reshape(1)),) for i, norm in enumerate(norms)
    }
    combine(asked, layouts)
    return torch.cat([one.values if one.answer is None else one.answer for (one,) in asked.values()]).sum().sqrt()


def clip_(gradients: list[Tensor], largest: float) -> Tensor:
    """Scale the gradients so that their norm is at most ``largest``; returns the norm before."""
    norm = total_norm(gradients)
    scale = torch.clamp(largest / (norm + 1e-6), max=1.0)
    torch._foreach_mul_([local(gradient) for gradient in gradients], scale)
    return norm
