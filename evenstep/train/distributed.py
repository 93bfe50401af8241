"""Training one model in several processes: the processes, the sharding of the model, and the detection of a hang.

`World` describes the processes. ``torchrun`` starts them and sets RANK, WORLD_SIZE and so on; without torchrun there is
one process. Besides the process group for tensors (NCCL on GPUs, gloo on CPUs) there are two gloo groups: ``control``,
in which the training loops exchange small values, and ``saving``, for the threads that write checkpoints and may
communicate at the same time.

`Parallel` applies torch's DDP, FSDP2 and DTensor tensor parallelism to a model that knows nothing of them. A run
starts from the same weights as in a single process. Under fsdp and hsdp, a model that starts from random weights or is
resumed is built on the meta device, and every process makes its shards alone: it draws one whole weight at a time and
keeps its part. In other modes, and for a low-bit, tied or given model, every process builds the whole model on its CPU
from the same seed, which takes the size of the model in host memory per process. Then each block is compiled and
sharded, and the other parameters (token embedding, final norm, head) are sharded with the root module.

* ``ddp``: a replica in every process; gradients are averaged.
* ``fsdp``: parameters, gradients and optimizer state are sharded over all processes. The weights of a block are
  gathered before its forward and its backward pass.
* ``hsdp``: fsdp within each of ``parallel.replicate`` groups; gradients are averaged between the groups.
* ``tp+fsdp``: the matrices of attention and MLP are sharded over ``parallel.tensor`` processes (first by columns, then
  by rows: two all-reduces per block and pass), and over the other processes as in fsdp. fsdp shards embedding, norms
  and head over all processes. Each process of a tensor-parallel group computes the logits of its part of the rows.

Gradients are reduced in fp32 whatever the dtype of the parameters. With gradient accumulation they are reduced once per
step; until then fsdp keeps them unsharded in every process, which trades memory for fewer messages.

`Heartbeat` names the missing process when a collective hangs. A process that waits in a collective is blocked in C++,
and torch's timeouts end it without naming the process that it waits for. Therefore a thread in every process publishes
the progress of its process in torchrun's store. When its process has made no progress for ``parallel.timeout`` seconds,
the thread compares all processes, reports the one that is furthest behind or that no longer publishes, and exits, so
that torchrun can restart all of them.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from evenstep.errors import EvenstepError
from evenstep.models import Llama, LlamaConfig
from evenstep.models.hub import HubModel
from evenstep.optim.distributed import Layout, Reduction, all_reduce, local
from evenstep.telemetry.activations import find_blocks
from evenstep.train.config import BaseConfig, Config
from evenstep.train.hardware import pick_device

# ---- the processes ----

T = TypeVar("T")

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class SharedError(EvenstepError):
    """An error of one process that all processes raise. ``rank`` is the process that prints it."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


@dataclass(frozen=True)
class World:
    """The processes of a run, and the rank of this process among them. ``World(device)`` is a single process.

    This process reads part ``data_rank`` of ``data_size`` of each batch. The ``tensor`` processes that share matrix
    products read the same part.

    >>> world = World(torch.device("cpu"), rank=5, size=8, tensor=2)
    >>> world.data_rank, world.data_size
    (2, 4)
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    control: Any = None
    """The gloo group of the training loops; None for one process."""
    saving: Any = None
    """The gloo group of the threads that write checkpoints."""
    tensor: int = 1
    """Number of processes that share each matrix product."""

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor

    @property
    def data_size(self) -> int:
        return self.size // self.tensor

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    # ---- agreement between processes ----

    def gather(self, work: Callable[[], T], group: Any = None) -> list[T]:
        """The results of ``work`` on all processes, by rank, on every process. SharedError on every process when
        ``work`` raised EvenstepError on one of them."""
        if self.control is None:
            return [work()]
        result: T | None = None
        problem: EvenstepError | None = None
        try:
            result = work()
        except EvenstepError as error:
            problem = error
        # Outside of the try block: a process that failed takes part in the exchange, or the others would wait forever.
        return self._exchange(result, problem, group)

    def _exchange(self, result: Any, problem: EvenstepError | None, group: Any = None) -> list[Any]:
        """Send the result or the error of this process to all processes, and return the results of all of them.
        SharedError with the error of the lowest rank that has one."""
        answers: list[Any] = [None] * self.size
        # One message for the error and the result: the processes cannot disagree about which of the two they wait for.
        dist.all_gather_object(answers, (problem and str(problem), result), group=group or self.control)
        for rank, (message, _) in enumerate(answers):
            if message is not None:
                raise SharedError(message, rank)
        return [answer for _, answer in answers]

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Context that all processes leave in the same way: if one of them raises EvenstepError, all raise SharedError.
        A single process raises its own error."""
        problem: EvenstepError | None = None
        # Only errors that a user can correct are exchanged. Any other exception ends this process, and torchrun or the
        # heartbeat ends the others.
        try:
            yield
        except EvenstepError as error:
            if self.control is None:
                raise
            problem = error
        if self.control is not None:
            self._exchange(None, problem)

    def on_rank_0(self, work: Callable[[], T]) -> T:
        """Run ``work`` on process 0, and return its result on every process."""
        return self.gather(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def rank_0_first(self, work: Callable[[], T]) -> T:
        """Run ``work`` on process 0, then on the first process of each machine, then on all others, so that later
        processes find the files that earlier ones have prepared. It may take days. SharedError when it raises
        EvenstepError."""
        if self.control is None:
            return work()
        result: list[T] = []
        mine = 0 if self.rank == 0 else 1 if self.local_rank == 0 else 2
        for turn in range(3):
            problem: EvenstepError | None = None
            if mine == turn:
                try:
                    result.append(work())
                except EvenstepError as error:
                    problem = error
            # Turn 0 ends with process 0, turns 1 and 2 with the first process of each machine.
            self._wait_for(range(0, self.size, self.local_size) if turn else range(1), turn)
            self._exchange(None, problem)
        return result[0]

    def _wait_for(self, ranks: range, turn: int) -> None:
        """Wait until ``ranks`` have reached this point. Uses the store, since a collective would time out after
        minutes."""
        store: Any = dist.distributed_c10d._get_default_store()
        store.set(f"evenstep/turn/{turn}/{self.rank}", "done")
        store.wait([f"evenstep/turn/{turn}/{rank}" for rank in ranks], timedelta(days=30))

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum ``tensor`` over the parts of the data, in place; unchanged when there is one part."""
        if self.control is not None and self.data_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.SUM)
            if self.tensor > 1:  # the default group counts each part ``tensor`` times
                tensor /= self.tensor
        return tensor


def launched() -> bool:
    """Whether torchrun, or a launcher that sets the same environment, has started this program."""
    return "RANK" in os.environ or "WORLD_SIZE" in os.environ


def restarts() -> int:
    """How many times torchrun has restarted the processes after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") or 0)


def _environment(config: BaseConfig) -> dict[str, int]:
    missing = [name for name in _VARIABLES if name not in os.environ]
    mode = config.parallel.mode
    if missing:
        if not launched():
            raise EvenstepError(
                f"parallel.mode {mode} needs several processes; start them with torchrun --nproc-per-node N "
                "-m evenstep pretrain ..., or give --parallel.mode none for a single process"
            )
        raise EvenstepError(
            f"{missing[0]} is not in the environment, but {'RANK' if 'RANK' in os.environ else 'WORLD_SIZE'} is; start "
            "the processes with torchrun, which sets both"
        )
    try:
        return {name: int(os.environ[name]) for name in _VARIABLES if name != "MASTER_ADDR"}
    except ValueError as problem:
        raise EvenstepError(f"a variable of torchrun's environment is not a number: {problem}") from None


def check_world(config: BaseConfig, size: int, local_size: int) -> int:
    """The number of processes that share each matrix product. EvenstepError when the configuration does not fit
    ``size`` processes."""
    parallel, train = config.parallel, config.train
    if parallel.mode == "none" and size > 1:
        raise EvenstepError(
            f"parallel.mode is none, but there are {size} processes; give --parallel.mode ddp (a replica in each) "
            "or fsdp (a shard in each)"
        )
    # By default the processes of one machine share the products, whose all-reduces need its fast links.
    tensor = (parallel.tensor or local_size) if parallel.mode == "tp+fsdp" else 1
    if size % tensor:
        raise EvenstepError(
            f"parallel.tensor {tensor} does not divide the {size} processes; give a divisor, or another number of "
            "processes"
        )
    replicate = parallel.replicate
    if replicate and size % replicate:
        raise EvenstepError(f"parallel.replicate {replicate} does not divide the {size} processes; give a divisor")
    data = size // tensor  # number of parts of a batch; the processes that share products read the same part
    if train.batch_size % data:
        raise EvenstepError(
            f"train.batch_size {train.batch_size} is not divisible by the {data} processes that read data; give a "
            f"multiple of {data}"
        )
    if (train.batch_size // data) % min(config.micro_batch_size, train.batch_size // data):
        raise EvenstepError(
            f"train.batch_size {train.batch_size} over {data} processes is {train.batch_size // data} sequences each, "
            f"not divisible by train.micro_batch_size {config.micro_batch_size}; give a divisor"
        )
    if tensor > 1 and config.lowbit:
        raise EvenstepError(
            f"lowbit {config.lowbit} cannot be used with parallel.tensor {tensor}: the scales of a part of a matrix "
            "differ from those of the whole; give parallel.mode fsdp"
        )
    if tensor > 1 and config.optim.options.get("state") == "int8":
        raise EvenstepError(
            "optim.state int8 cannot be used with parallel.mode tp+fsdp; give bf16 or parallel.mode fsdp"
        )
    return tensor


def _store(patience: timedelta) -> Any:
    """The store in which the processes find each other, under a prefix for this attempt.

    torchrun's store outlives a restart (torch 2.13 creates one per agent, not one per attempt) and still contains the
    addresses of processes that have ended. A new process that read such an address could not connect.
    """
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        int(os.environ["WORLD_SIZE"]),
        is_master=not agent and os.environ["RANK"] == "0",
        timeout=patience,
        multi_tenant=not agent,
    )
    return dist.PrefixStore(f"evenstep/attempt/{restarts()}", store)


@contextmanager
def open_world(config: BaseConfig) -> Iterator[World]:
    """Context in which the process group exists. EvenstepError, before anything waits for another process, when the
    environment and the configuration do not fit together."""
    if not launched() and config.parallel.mode == "none":
        yield World(pick_device(config.train.device))
        return
    places = _environment(config)
    size, local = places["WORLD_SIZE"], places["LOCAL_RANK"]
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    tensor = check_world(config, size, local_size)
    device = pick_device(config.train.device)
    if size == 1 and config.parallel.mode == "none":
        yield World(device)
        return
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise EvenstepError(
                f"process {local} of this machine has no GPU: torch sees {torch.cuda.device_count()}; give torchrun "
                f"--nproc-per-node {torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    # The heartbeat acts first and names the missing process; the timeout of collectives is the fallback.
    patience = timedelta(seconds=config.parallel.timeout * 1.5 + 10)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=_store(patience), rank=places["RANK"], world_size=size, timeout=patience)
    world = World(device, places["RANK"], size, local, local_size, tensor=tensor)
    world = replace(
        world,
        control=dist.new_group(backend="gloo", timeout=patience),
        # A write to a slow file system is no hang, so this group waits for hours.
        saving=dist.new_group(backend="gloo", timeout=timedelta(hours=2)),
    )
    try:
        yield world
        world._wait_for(range(1), 3)  # process 0 may take long to finish the run
        dist.barrier(group=world.control)
    finally:
        dist.destroy_process_group()


# ---- the model over several processes ----

COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROWS = ("self_attn.o_proj", "mlp.down_proj")


def check_cut(shape: LlamaConfig, tensor: int) -> None:
    """EvenstepError when the matrices of a model of ``shape`` cannot be sharded over ``tensor`` processes."""
    for name in ("num_heads", "intermediate_size"):
        if getattr(shape, name) % tensor:
            raise EvenstepError(
                f"parallel.tensor {tensor} does not divide the model's {name.replace('_', ' ')} "
                f"{getattr(shape, name)}; give a divisor of it"
            )
    if (shape.kv_heads or shape.num_heads) % tensor:
        raise EvenstepError(
            f"parallel.tensor {tensor} does not divide the model's kv heads {shape.kv_heads}; give a divisor of it"
        )
    # Each process of a group has some of the heads, and the gradients of the weights that all heads share would differ.
    if shape.qk_norm and tensor > 1:
        raise EvenstepError(
            f"model.qk_norm true cannot be used with parallel.tensor {tensor}: all heads share its weights; give "
            "parallel.mode fsdp"
        )


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model, which are compiled and sharded one by one: the entries of its outermost lists of
    modules. Blocks that share a parameter with another part of the model are left out, because a parameter is sharded
    with one module only."""

    def uses(module: nn.Module) -> Counter[int]:
        return Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))

    everywhere = uses(model)
    return [
        block
        for block in find_blocks(model).values()
        if all(everywhere[p] == times for p, times in uses(block).items())
    ]


class Parallel:
    """Distributes the model of ``config`` over ``world``. A training step calls `Parallel.loss`, and validation calls
    ``model.loss``, which reduces no gradients."""

    def __init__(self, config: Config, world: World) -> None:
        self.mode = config.parallel.mode if world.control is not None else "none"
        self.config, self.world = config, world
        self.model: Any = None
        self.wrapped: Any = None

    @property
    def sharded(self) -> bool:
        """Whether a process holds shards of the parameters instead of whole ones."""
        return self.mode not in ("none", "ddp")

    def check(self, model: Any) -> None:
        """EvenstepError when tensor parallelism cannot shard the model."""
        if self.world.tensor > 1:  # then it is a LLaMA of evenstep, the only model with `COLUMNS` and `ROWS`
            check_cut(model.config, self.world.tensor)

    def apply(self, model: Any) -> None:
        """Compile, shard and wrap ``model`` in place, before the optimizer is built. Parameters keep their names; those
        that are sharded become DTensors."""
        self.check(model)
        self.model = model
        # The order matters: DTensors first, then the compilation of each block, then the wrapper, whose hooks run
        # around the blocks.
        if self.mode == "tp+fsdp":
            self._shard_matrices(model)
        if self.config.train.compile:
            # Block by block, so that one small graph serves all. The chunked loss compiles its formulas alone.
            model.compile_loss = True
            for block in blocks_of(model):
                block.compile(dynamic=False)
        if self.mode == "ddp":
            self.wrapped = self._ddp(model)
        elif self.sharded:
            self._fsdp(model)

    def materialise(self, *, draw: bool) -> None:
        """Give the shards of a model on the meta device their memory and, with ``draw``, their initial weights. A model
        on another device stays as it is."""
        model = self.model
        if isinstance(model, Llama) and model.lm_head.weight.is_meta:
            model.to_empty(device=self.world.device)
            if draw:
                draw_shards(model, self.config.seed)

    def loss(self, *args: Any, **options: Any) -> Tensor:
        """``model.loss`` for a training step, through the DDP wrapper where there is one."""
        assert self.model is not None
        return (self.wrapped or self.model.loss)(*args, **options)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Context of the forward and backward pass of one micro batch. Gradients are reduced between processes in the
        ``last`` one."""
        if self.wrapped is not None and not last:
            with self.wrapped.no_sync():
                yield
            return
        if self.sharded:
            model: Any = self.model
            # The first keeps gradients unsharded until the last micro batch; at the end of the last backward pass, FSDP
            # waits for its reductions and forgets them.
            model.set_requires_gradient_sync(last)
            model.set_is_last_backward(last)
        yield

    # ---- the modes ----

    def _ddp(self, model: Any) -> nn.Module:
        device = self.world.device
        wrapped = nn.parallel.DistributedDataParallel(
            _Loss(model),
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            # An expert to which no token was sent has no gradient, for which DDP would wait.
            find_unused_parameters=isinstance(model, HubModel),
        )
        wrapped.broadcast_buffers = False  # torch 2.13 deprecates the constructor argument
        if self.config.train.dtype == "bf16":
            # torch checks the annotations of a hook and refuses strings, which `from __future__ import annotations`
            # makes of all annotations in this file. A lambda has none.
            wrapped.register_comm_hook(None, lambda _, bucket: _average_in_fp32(bucket))
        return wrapped

    def _mesh(self) -> Any:
        world, parallel, device = self.world, self.config.parallel, self.world.device.type
        # The last dimension of a mesh has neighbouring ranks, which are on one machine: the dimension that communicates
        # most comes last.
        if self.mode == "tp+fsdp":
            return dist.init_device_mesh(device, (world.data_size, world.tensor), mesh_dim_names=("data", "tensor"))
        if self.mode == "hsdp":
            groups = parallel.replicate or max(1, world.size // world.local_size)
            return dist.init_device_mesh(device, (groups, world.size // groups), mesh_dim_names=("copy", "part"))
        return dist.init_device_mesh(device, (world.size,), mesh_dim_names=("part",))

    def _shard_matrices(self, model: Llama) -> None:
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        self._grid = self._mesh()
        # [out, in] of the first product is cut along out, of the second along in: the activations between the two stay
        # sharded, and one all-reduce of the second product makes them whole.
        plan: dict[str, Any] = {name: ColwiseParallel() for name in COLUMNS} | {
            name: RowwiseParallel() for name in ROWS
        }
        for block in model.model.layers:
            parallelize_module(block, self._grid["tensor"], plan)
        model.tensor_group = self._grid["tensor"].get_group()

    def _fsdp(self, model: Any) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        if self.mode == "tp+fsdp":
            inner, outer = self._grid["data"], self._grid._flatten("all")
        else:
            inner = outer = self._mesh()
        # Weights are gathered in bf16, half the bytes; the shards that the optimizer updates stay in fp32.
        param_dtype = torch.bfloat16 if self.config.train.dtype == "bf16-autocast" else None
        precision = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
        reshard = self.config.parallel.reshard
        for block in blocks_of(model):
            fully_shard(block, mesh=inner, reshard_after_forward=reshard, mp_policy=precision)
        # The backward pass begins with the weights of the root, right after the forward pass: they stay gathered.
        fully_shard(model, mesh=outer, reshard_after_forward=False, mp_policy=precision)
        # FSDP gathers the weights of the root around `forward` alone; the trainer calls `loss`.
        register_fsdp_forward_method(model, "loss")


@torch.no_grad()
def draw_shards(model: Llama, seed: int) -> None:
    """Give the shards of this process their initial weights, those that a single process draws from ``seed``.

    One whole weight exists at a time. Every process draws all of them, since the random numbers of a shard depend on
    how many come before it.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    torch.manual_seed(seed)
    # The layers of torch draw weights of their own when they are constructed, which are thrown away. On the meta device
    # they have drawn nothing, so that the random numbers are consumed here.
    for module in model.modules():
        if isinstance(module, nn.Linear):
            torch.empty(module.weight.shape, dtype=torch.float32, device="cpu").uniform_()
        elif isinstance(module, nn.Embedding):
            torch.empty(module.weight.shape, dtype=torch.float32, device="cpu").normal_()
    for weight, mean, std in model.initial():
        assert isinstance(weight, DTensor)
        # In fp32 and on the CPU, as in a single process, whose weights are cast and moved afterwards.
        whole = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
        whole = (whole.normal_(mean, std) if std else whole.fill_(mean)).to(weight.dtype)
        # Without a source rank nothing is sent: each process cuts its shard out of its own draw.
        shard = distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
        weight.to_local().copy_(shard.to_local())


class _Loss(nn.Module):
    """The loss as ``forward``: DDP reduces gradients for this method alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **options: Any) -> Tensor:
        return self.model.loss(*args, **options)


def _average_in_fp32(bucket: Any) -> Any:
    """Average a bucket of DDP's 16-bit gradients [numel of the bucket] in fp32: a sum in bf16 has 8 bits of precision,
    and loses small gradients of single processes."""
    gradients = bucket.buffer()
    whole = gradients.float().div_(dist.get_world_size())
    pending = dist.all_reduce(whole, async_op=True).get_future()
    return pending.then(lambda done: gradients.copy_(done.value()[0]))


# ---- norms of sharded tensors ----


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all tensors together, 0-d. DTensors count as whole tensors; each layout takes one all-reduce."""
    layouts = [Layout.of(tensor) for tensor in tensors]
    if not any(layout.cuts for layout in layouts):
        return torch.nn.utils.get_total_norm([local(tensor) for tensor in tensors], foreach=True)
    # A norm cannot be summed over shards, its square can: sum of squares per tensor, in fp32, then one root at the end.
    norms = torch._foreach_norm([local(tensor.detach()) for tensor in tensors])
    requests: dict[int, tuple[Reduction, ...]] = {
        i: (Reduction("sum", norm.float().square().reshape(1)),) for i, norm in enumerate(norms)
    }
    all_reduce(requests, layouts)
    squares = [one.values if one.answer is None else one.answer for (one,) in requests.values()]
    return torch.cat(squares).sum().sqrt()


def clip_(gradients: list[Tensor], largest: float) -> Tensor:
    """Scale the gradients so that their norm is at most ``largest``; returns the norm before."""
    norm = total_norm(gradients)
    # No branch on the value, which would wait for the GPU; 1e-6 as in torch's clip_grad_norm_.
    scale = torch.clamp(largest / (norm + 1e-6), max=1.0)
    torch._foreach_mul_([local(gradient) for gradient in gradients], scale)
    return norm


# ---- the heartbeat ----

EXIT_STATUS = 75
"""EX_TEMPFAIL of sysexits.h: another attempt may succeed."""


class Heartbeat:
    """Detects a process that hangs. The run calls `beat` at every stage, inside ``with Heartbeat(...):``. A single
    process does nothing."""

    def __init__(self, world: World, timeout: float) -> None:
        self.world, self.timeout = world, timeout
        self.count, self.step, self.place = 0, 0, "starting"
        self.moved = time.monotonic()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, step: int, place: str) -> None:
        """Record that this process has reached the stage ``place`` of ``step``. All processes pass the same stages in
        the same order, so their counts are comparable."""
        # Without a lock: this thread alone writes the attributes, and the heartbeat's thread reads them.
        self.count += 1
        self.step, self.place = step, place
        self.moved = time.monotonic()

    def alive(self) -> None:
        """Record that this process waits for its own disk and does not hang."""
        self.moved = time.monotonic()

    def __enter__(self) -> Heartbeat:
        if self.world.control is not None:
            import torch.distributed as dist

            own: Any = dist.distributed_c10d._get_default_store()
            # A connection of its own: one that two threads share would block the heartbeat behind a waiting collective.
            store = dist.PrefixStore(f"evenstep/heartbeat/{restarts()}", own.clone())
            self.moved = time.monotonic()
            self._over.clear()
            self._publish(store, 0)  # at once, so that the others know host and pid of a process that hangs early
            self._thread = threading.Thread(target=self._watch, args=(store,), daemon=True, name="heartbeat")
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _publish(self, store: Any, pulse: int) -> None:
        with suppress(Exception):  # at the end of a run the store may be gone already
            store.set(str(self.world.rank), json.dumps([self.count, self.step, self.place, pulse, _name()]))

    # ---- in the thread ----

    def _watch(self, store: Any) -> None:
        period = min(5.0, self.timeout / 4)  # seconds between two signs of life
        stalled_at, earlier, pulse = -1, {}, 0
        while not self._over.wait(period):
            pulse += 1
            self._publish(store, pulse)
            still = time.monotonic() - self.moved
            if still < self.timeout:
                stalled_at = -1
                continue
            if stalled_at != self.count:  # wait one period more, until all have published their stage
                stalled_at, earlier = self.count, self._others(store)
                continue
            message = self._explain(earlier, self._others(store), still)
            if message and not self._over.is_set():
                with suppress(Exception):
                    print(f"evenstep: error: {message}", file=sys.stderr, flush=True)
                # Not sys.exit: the main thread is blocked in C++ and would never see the exception.
                os._exit(EXIT_STATUS)

    def _others(self, store: Any) -> dict[int, list[Any]]:
        found = {}
        for rank in range(self.world.size):
            with suppress(Exception):  # the store may be gone with the process that held it; `get` alone would wait
                if store.check([str(rank)]):
                    found[rank] = json.loads(store.get(str(rank)))
        return found

    def _explain(self, before: dict[int, list[Any]], now: dict[int, list[Any]], still: float) -> str:
        """The report of the missing processes, one line. Processes that leave the report to another one exit here."""
        ranks = range(self.world.size)
        # Silent: no new pulse in a period, so the process is stopped or gone. Behind: it publishes, but has not reached
        # the stage of the others.
        silent = [rank for rank in ranks if rank not in now or (before.get(rank) or [0] * 4)[3] == now[rank][3]]
        counts = {rank: now[rank][0] if rank in now else -1 for rank in ranks}
        behind = [rank for rank in ranks if counts[rank] < max(counts.values())]
        missing = sorted({*silent, *behind} - {self.world.rank}) or [self.world.rank] * bool(behind)
        # The lowest process that is not missing prints, so that there is one line and not one per process.
        reporters = [rank for rank in ranks if rank not in missing]
        if reporters and self.world.rank != reporters[0]:
            time.sleep(1)  # the reporting process prints first
            os._exit(EXIT_STATUS)
        where = f"at step {self.step} ({self.place}) for {still:.0f} s"
        if not missing:
            return f"all {self.world.size} processes make no progress {where}; check the network between them"
        names = [f"process {rank} {self._last(now.get(rank), rank in silent)}" for rank in missing]
        return f"waited {where}; missing: {', '.join(names)} (parallel.timeout {self.timeout:g})"

    @staticmethod
    def _last(fact: list[Any] | None, silent: bool) -> str:
        if fact is None:
            return "(never started)"
        return f"on {fact[4]} (last at step {fact[1]}, {fact[2]}{'; it does not answer' if silent else ''})"


def _name() -> str:
    return f"{socket.gethostname()}, pid {os.getpid()}"
