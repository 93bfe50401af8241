"""The memory of one process of a run, computed before the run starts.

Parameters and optimizer state come from a dry run: the model and its optimizer are built on torch's meta device, where
tensors have shapes and no memory. The code that trains shards them, and torch's fake backend stands in for the other
processes. All blocks of a model have the same size, so one block is built and counted ``num_layers`` times.

A dry run of a LLaMA does not show the activations, for which there is a formula. It counts those that PyTorch keeps
for the backward pass in eager mode with the fused attention and norm of a GPU; compiled blocks keep less. A model of
transformers is built whole, and a forward pass on the meta device shows the tensors that autograd keeps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from evenstep.baselines.catalog import baseline
from evenstep.errors import EvenstepError, first_line
from evenstep.models import Llama, LlamaConfig, llama_config
from evenstep.models.hf import read_shape
from evenstep.models.hub import HubShape, hushed
from evenstep.optim.distributed import plain_parts
from evenstep.train.config import Config
from evenstep.train.distributed import COLUMNS, ROWS, Parallel, World, blocks_of, check_world
from evenstep.train.optimizers import build_optimizer

# ---- the shape of the model ----


Shape = LlamaConfig | HubShape


def model_shape(config: Config, vocab_size: int) -> Shape:
    """The shape of a new model of ``config``, for a tokenizer of ``vocab_size`` entries."""
    if config.model.hf is not None:
        return HubShape.read(config.model.hf).with_vocabulary(vocab_size)
    return llama_shape(config, vocab_size)


def llama_shape(config: Config, vocab_size: int) -> LlamaConfig:
    """The shape of a new LLaMA, as `model_shape`."""
    if config.model.config is not None:
        shape = replace(read_shape(config.model.config), **config.model.variant)
        if vocab_size > shape.vocab_size:
            raise EvenstepError(
                f"the tokenizer has {vocab_size} entries, but model.config {config.model.config} only "
                f"{shape.vocab_size}; give another data.tokenizer, or data.vocab_size {shape.vocab_size}"
            )
        return shape
    return llama_config(config.model.label, vocab_size, max_seq_len=config.train.seq_len, **config.model.variant)


# ---- the processes, and the tensors that they share ----

SHARDED = ("fsdp", "hsdp", "tp+fsdp")
"""Modes in which a process holds shards of tensors."""

BLOCK = "model.layers."
"""Prefix of the names of the parameters of blocks."""


@dataclass(frozen=True)
class Grid:
    """How processes share a model: ``gpus`` in all, ``tensor`` of them for one matrix product, and ``replicate`` groups
    that each hold the whole model."""

    mode: str
    gpus: int
    tensor: int = 1
    replicate: int = 1

    @property
    def data(self) -> int:
        """Number of processes that read different data."""
        return self.gpus // self.tensor

    def shards(self, block: bool) -> int:
        """Number of parts into which FSDP shards a tensor (of a block, or of the rest)."""
        if self.mode not in SHARDED:
            return 1
        if self.mode == "hsdp":
            return self.gpus // self.replicate
        return self.gpus // self.tensor if block else self.gpus


def grid_of(config: Config, gpus: int, per_node: int) -> Grid:
    """The grid of ``gpus`` processes, ``per_node`` on each machine. EvenstepError when ``config`` does not fit it."""
    if gpus < 1 or per_node < 1:
        raise EvenstepError(f"--gpus is {gpus} and --gpus-per-node {per_node}; give at least 1 for both")
    machine = min(gpus, per_node)
    tensor = check_world(config, gpus, machine)
    parallel = config.parallel
    replicate = (parallel.replicate or max(1, gpus // machine)) if parallel.mode == "hsdp" else 1
    if gpus % replicate:
        raise EvenstepError(
            f"{gpus} GPUs with {machine} per machine cannot be divided into equal groups; give parallel.replicate"
        )
    options = config.optim.options
    if parallel.mode in SHARDED and options.get("density", 1.0) != 1 and options.get("state") == "int8":
        raise EvenstepError(
            f"optim.state int8 with optim.density {options['density']} cannot be used with parallel.mode "
            f"{parallel.mode}; give optim.state bf16"
        )
    return Grid(parallel.mode, gpus, tensor, replicate)


@dataclass(frozen=True)
class Named:
    """A parameter of the model. ``cut`` is the dimension along which tensor parallelism shards it, or None; ``block``
    is whether it is part of a block, ``embedding`` whether it is the token table."""

    name: str
    shape: tuple[int, ...]
    cut: int | None
    block: bool
    embedding: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def on(self, grid: Grid) -> int:
        """Number of entries that one process holds under tensor parallelism alone, without FSDP."""
        return self.numel if self.cut is None else self.numel // grid.tensor


@functools.cache
def model_tensors(shape: Shape) -> list[Named]:
    """Every parameter of the model. The tensors of a block of a LLaMA are repeated once per layer."""
    found = []
    if isinstance(shape, HubShape):
        hub = on_meta(shape)
        inside = {id(p) for block in blocks_of(hub) for p in block.parameters()}
        table = hub.net.get_input_embeddings().weight
        for name, p in hub.named_parameters():
            found.append(Named(name, tuple(p.shape), None, id(p) in inside, p is table))
        return found
    for name, p in on_meta(replace(shape, num_layers=1)).named_parameters():
        inner = name.removeprefix(f"{BLOCK}0.").removesuffix(".weight")
        cut = 0 if inner in COLUMNS else 1 if inner in ROWS else None
        block = name.startswith(BLOCK)
        tensor = Named(name, tuple(p.shape), cut, block, name == "model.embed_tokens.weight")
        found += [tensor] * (shape.num_layers if block else 1)
    return found


def on_meta(shape: Shape, dtype: torch.dtype = torch.float32) -> Any:
    """The model on the meta device."""
    with torch.device("meta"):
        return shape.build(dtype) if isinstance(shape, HubShape) else Llama(shape).to(dtype)


# ---- the dry run ----


@dataclass(frozen=True)
class Held:
    """Bytes in process 0, which has the largest shard of each tensor."""

    parameters: int
    state: int


_known: dict[tuple[Any, ...], Held] = {}


def held(config: Config, shape: Shape, grid: Grid) -> Held:
    """`dry_run` of one block. The result is cached, since a search repeats the same runs."""
    key = (shape, grid, config.train.dtype, repr(config.optim))
    if key not in _known:
        _known[key] = dry_run(config, shape, grid)
    return _known[key]


def dry_run(config: Config, shape: Shape, grid: Grid, *, blocks: int = 1) -> Held:
    """Build the model with ``blocks`` blocks (1, or all of them) and its optimizer on the meta device, and count bytes.
    A model of transformers always has all of its blocks, which may differ from each other.

    EvenstepError for an optimizer whose state is only known once it runs on a real device, and when
    torch.distributed is already initialised.
    """
    with fake_processes(grid) as world:
        part = shape if isinstance(shape, HubShape) else replace(shape, num_layers=blocks)
        model = meta_model(config, part, grid, world)
        optimizer = build_optimizer(model, config.optim)
        try:
            if not optimizer.state:  # torch's optimizers create their state in the first step
                for p in model.parameters():
                    p.grad = torch.zeros_like(p)
                optimizer.step()
        except Exception as problem:  # an optimizer that needs a real device may raise any type
            raise EvenstepError(
                f"optim.name {config.optim.name}: the size of its state is not known before it runs "
                f"({first_line(problem)}); plan with another optimizer"
            ) from problem
        parameters = state = 0
        for name, p in model.named_parameters():
            times = shape.num_layers // part.num_layers if name.startswith(BLOCK) else 1
            parameters += times * _bytes(p)
            state += times * sum(_bytes(x) for x in optimizer.state.get(p, {}).values() if isinstance(x, Tensor))
        return Held(parameters, state)


def meta_model(config: Config, shape: Shape, grid: Grid, world: World) -> Any:
    """The model on the meta device, sharded according to ``config``."""
    model = on_meta(shape, torch.bfloat16 if config.train.dtype == "bf16" else torch.float32)
    if grid.mode in SHARDED:
        Parallel(replace(config, train=replace(config.train, compile=False)), world).apply(model)
    return model


def _bytes(value: Tensor) -> int:
    """Bytes of the shard of a tensor in this process; for 8-bit moments, of the codes and the scales."""
    return sum(part.nbytes for part in plain_parts(value))


@contextmanager
def fake_processes(grid: Grid) -> Iterator[World]:
    """Context in which this process is the first one of the grid. torch's fake backend stands in for the other ones and
    sends nothing."""
    if grid.mode not in SHARDED:
        yield World(torch.device("cpu"))
        return
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise EvenstepError("torch.distributed is already initialised; run the plan in a process of its own")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=grid.gpus)
    try:
        size = grid.gpus // grid.replicate
        yield World(torch.device("cpu"), 0, grid.gpus, 0, size, dist.group.WORLD, None, grid.tensor)
    finally:
        dist.destroy_process_group()


# ---- activations and logits, by formula ----

CHUNK_BYTES = 2**30
"""Bytes of the logits that ``train.loss_chunk auto`` has in memory at once on a GPU, in fp32 (8,384 rows of 32,000
words). With so many rows the products of a chunk fill a large GPU, and their launches take no time."""

LOGIT_BYTES = 12
"""Bytes per logit in memory: its fp32 copy for the softmax, the gradient, and the temporaries of the loss."""


def chunk_rows(rows: int, vocab_size: int, memory: float) -> int:
    """The number of rows of logits that are computed at once under ``train.loss_chunk auto``, on a GPU of ``memory``
    bytes, of which they take at most a sixteenth.

    >>> chunk_rows(8 * 256, 32_000, 80e9)
    2048
    >>> chunk_rows(64 * 1024, 32_000, 80e9), chunk_rows(64 * 1024, 128_000, 80e9), chunk_rows(64 * 1024, 128_000, 8e9)
    (8384, 2048, 320)
    """
    most = min(CHUNK_BYTES // 4, int(memory / 16) // LOGIT_BYTES)
    return min(rows, max(64, most // vocab_size // 64 * 64))


def weight_bytes(config: Config) -> int:
    """Bytes of one entry of a parameter."""
    return 2 if config.train.dtype == "bf16" else 4


def compute_bytes(config: Config) -> int:
    """Bytes of one number in a matrix product."""
    return 4 if config.train.dtype == "fp32" else 2


def activation_bytes(config: Config, shape: Shape, grid: Grid, tokens: int) -> int:
    """Bytes that a forward pass over ``tokens`` tokens keeps for the backward pass."""
    if isinstance(shape, HubShape):
        # Under autocast some activations are in fp32: all of them are counted so.
        low = config.train.dtype == "bf16" or (grid.mode in SHARDED and compute_bytes(config) == 2)
        length = config.train.seq_len
        return kept_bytes(shape, low, tokens // length, length, config.train.activation_checkpointing)
    compute = compute_bytes(config)
    # The residual stream has the dtype of the parameters under autocast, and the compute dtype under FSDP.
    stream = compute if grid.mode in SHARDED else weight_bytes(config)
    # Soft-capped attention repeats grouped keys and values for all heads.
    keys = shape.kv_size if shape.attention_softcap is None else shape.hidden_size
    hidden, cut = shape.hidden_size, (2 * shape.hidden_size + 2 * keys + 4 * shape.intermediate_size) // grid.tensor
    # Bytes per token in a block: the inputs of the two norms (stream dtype); their outputs, which the matrices read;
    # q and the output of attention (2 x hidden), k and v (2 x keys); gate, silu(gate), up and their product (4 x
    # intermediate); and the fp32 statistics of two norms and of the softmax of each head. Tensor parallelism divides
    # what is between the column-parallel and the row-parallel matrices, and the heads.
    block = 2 * hidden * stream + (2 * hidden + cut) * compute + 4 * (2 + shape.num_heads // grid.tensor)
    if shape.attention_softcap is not None:  # no fused attention: 8 bytes for each of the logits of all keys
        block += 8 * config.train.seq_len * shape.num_heads // grid.tensor
    last = hidden * (stream + compute) + 4
    if config.train.activation_checkpointing:  # the inputs of all blocks, and one recomputed block
        return tokens * (shape.num_layers * hidden * stream + block + last)
    return tokens * (shape.num_layers * block + last)


# ---- activations of a model of transformers, by a dry run ----


class _MetaCalls(TorchFunctionMode):
    """Answers what a forward pass of transformers asks on the meta device. Its masks ask whether rows are packed, which
    they are not, and its attention becomes the fused kernel of a GPU, which keeps no logits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__bool__ and args[0].is_meta:
            return True
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            q, k, v = args[:3]
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
        if getattr(func, "__name__", "") in ("grouped_mm", "_grouped_mm") and args[0].is_meta:
            return _GroupedProduct.apply(*args[:2])  # on the meta device torch has it in bf16 alone
        return func(*args, **(kwargs or {}))


class _GroupedProduct(torch.autograd.Function):
    """The shape of the products of experts, and the tensors that their backward pass needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)  # [tokens, inputs] and [experts, inputs, outputs]
        return x.new_empty(x.shape[0], weight.shape[-1])


@functools.cache
def kept_bytes(shape: HubShape, low: bool, rows: int, length: int, checkpointing: bool) -> int:
    """Bytes of the tensors that autograd keeps in a forward pass over ``rows`` sequences, except the parameters; with
    ``low`` in bf16. EvenstepError for a model that does not run on the meta device."""
    model = on_meta(shape, torch.bfloat16 if low else torch.float32)
    model.activation_checkpointing = checkpointing
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    found: dict[int, Tensor] = {}  # the tensors too: a storage that is freed would pass its address on

    def pack(x: Tensor) -> Tensor:
        found[x.untyped_storage()._cdata] = x
        return x

    tokens = torch.zeros(rows, length, dtype=torch.int64, device="meta")
    try:
        with hushed(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), _MetaCalls():
            model(tokens)
    except Exception as problem:  # code of an architecture that reads values: any type
        raise EvenstepError(
            f"model.hf: a {type(model.net).__name__} does not run on the meta device, so that its activations are not "
            f"known ({first_line(problem)}); plan with another model"
        ) from problem
    kept = sum(x.untyped_storage().nbytes() for key, x in found.items() if key not in parameters)
    if not checkpointing:
        return kept
    return kept + kept_bytes(shape, low, rows, length, False) // shape.num_layers  # one recomputed block


# ---- the check before a run ----


def least_memory(config: Config, shape: Shape, processes: int, per_node: int) -> dict[str, int]:
    """A lower bound of the bytes that a process needs, by purpose. It leaves out logits, which are computed in chunks,
    communication, and the state of optimizers that cannot run on the meta device."""
    grid = grid_of(config, processes, per_node)
    sequences = config.train.batch_size // grid.data
    tokens = min(config.micro_batch_size, sequences) * config.train.seq_len
    # torch's fake backend cannot be used beside a real one, so the bytes of a whole model are divided instead.
    parts = grid.gpus // grid.replicate if grid.mode in SHARDED else 1
    parameters = sum(t.numel for t in model_tensors(shape)) * weight_bytes(config) // parts
    state = 0
    if baseline(config.optim.name).package in ("evenstep", "torch"):  # others may need a real device
        with suppress(EvenstepError, TypeError):  # the real optimizer will raise the same error, with advice
            state = held(config, shape, Grid("none", 1)).state // parts
    # Gradients grow while the backward pass frees activations: the peak is at least the larger of the two.
    activations = 0
    with suppress(EvenstepError):  # a model of transformers whose activations are not known
        activations = activation_bytes(config, shape, grid, tokens)
    if isinstance(shape, HubShape) and config.train.dtype == "bf16-autocast":
        activations //= 2
    most = {"activations": activations} if activations > parameters else {"gradients": parameters}
    batch = 2 * 8 * sequences * config.train.seq_len  # int64 inputs and targets
    needs = {"parameters": parameters, **most, "optimizer state": state, "batch": batch}
    if "rewind" in config.guard.actions and config.guard.snapshot_every:
        needs["snapshot of the guard"] = parameters + state
    return needs
