"""What a run needs on so many GPUs, worked out before it is started: memory of each process, bytes on the wire.

Parameters, gradients and optimizer state are exact: they follow from shapes and from the rules by which FSDP2 and
tensor parallelism cut them, and `evenstep.train.plan_check` counts them again on torch's meta device. Activations are
those that PyTorch keeps for the backward pass in eager mode with a GPU's fused attention and norm; compiled blocks keep
less. What communication needs on top follows from how FSDP2 gathers and reduces, and is an estimate.

The peak is the larger of two moments: the backward pass begins (activations and logits are there, gradients only
between micro batches), or the optimizer steps (gradients are there, activations are not). Communication buffers and
16-bit copies are counted at both. Bytes are decimal: 1 GB is 10**9.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evenstep.errors import EvenstepError
from evenstep.train.config import Config
from evenstep.train.plan_tensors import SPLIT, Grid, Messages, Named, model_tensors, state_bytes, step_messages
from evenstep.train.plan_wire import Wire, on_the_wire

if TYPE_CHECKING:
    from evenstep.models import LlamaConfig

USABLE = 0.92
"""Share of a GPU's memory that a plan may use; the rest is for CUDA's context, NCCL and fragmentation."""

DDP_BUCKET = 25 * 2**20
"""DDP reduces gradients in buckets of so many bytes; 16-bit ones are copied to fp32 for it."""


@dataclass(frozen=True)
class Plan:
    """The needs of one process: ``memory`` by what it is for (bytes), ``peak`` (bytes), ``wire`` (what a process sends
    in a step), ``messages`` (of the optimizer, on top of that)."""

    config: Config
    shape: LlamaConfig
    grid: Grid
    gpu_memory: float
    passes: int
    """Micro batches of a process in a step."""
    rows: int | None
    """Rows of logits alive at once; None for all."""
    memory: dict[str, int]
    peak: int
    wire: list[Wire]
    messages: Messages

    @property
    def fits(self) -> bool:
        return self.peak <= USABLE * self.gpu_memory


def make_plan(config: Config, shape: LlamaConfig, gpus: int, per_node: int, gpu_memory: float) -> Plan:
    """The plan of ``config`` for a model of ``shape`` on ``gpus`` GPUs, ``per_node`` in each machine, of ``gpu_memory``
    bytes. EvenstepError when they cannot share the model or the batch so."""
    from evenstep.train.parallel import check_cut
    from evenstep.train.setup import LOGIT_BYTES

    grid = _grid(config, gpus, per_node)
    check_cut(shape, grid.tensor)
    tensors = model_tensors(shape)
    train = config.train
    sequences = train.batch_size // grid.data
    micro = min(config.micro_batch_size, sequences)
    passes, tokens = sequences // micro, micro * train.seq_len
    rows = _rows(config, shape.vocab_size, gpu_memory)
    needs = _Needs(config, shape, grid, tensors)

    memory = {
        "parameters": needs.held * needs.weight,
        "gradients": needs.held * needs.weight,
        "optimizer state": sum(
            state_bytes(config.optim.name, config.optim.options, t, grid, needs.weight) for t in tensors
        ),
        "activations": needs.activations(tokens),
        "logits and loss": min(rows or tokens, tokens) * shape.vocab_size * LOGIT_BYTES,
        "communication": needs.communication(),
        "gradients between micro batches": needs.whole_gradients() if passes > 1 else 0,
        "16-bit copies of weights": needs.copies(),
    }
    standing = sum(
        memory[name]
        for name in (
            "parameters", "optimizer state", "communication", "gradients between micro batches",
            "16-bit copies of weights",
        )
    )  # fmt: skip
    early = memory["activations"] + memory["logits and loss"] + (memory["gradients"] if passes > 1 else 0)
    wire = on_the_wire(config, shape, grid, tensors, passes, tokens)
    messages = step_messages(config.optim.name, tensors, grid)
    peak = standing + max(early, memory["gradients"])
    return Plan(config, shape, grid, gpu_memory, passes, rows, memory, peak, wire, messages)


def least_memory(config: Config, shape: LlamaConfig, processes: int, per_node: int) -> dict[str, int]:
    """Bytes that a process needs at the least, by what they are for: what optimizers keep that plans know nothing of is
    left out, and so are logits, which come in chunks, and communication."""
    grid = _grid(config, processes, per_node)
    tensors, train = model_tensors(shape), config.train
    needs = _Needs(config, shape, grid, tensors)
    sequences = train.batch_size // grid.data
    tokens = min(config.micro_batch_size, sequences) * train.seq_len
    optim, held = config.optim, needs.held * needs.weight
    try:
        state = sum(state_bytes(optim.name, optim.options, t, grid, needs.weight) for t in tensors)
    except (EvenstepError, TypeError):  # an optimizer that plans do not know, a value that its constructor will refuse
        state = 0
    # Gradients and activations do not all exist at once: the larger of the two.
    gradients, activations = held, needs.activations(tokens)
    most = {"activations": activations} if activations > gradients else {"gradients": gradients}
    batch = 2 * 8 * sequences * train.seq_len  # inputs and targets
    return {"parameters": held, **most, "optimizer state": state, "batch": batch}


def _grid(config: Config, gpus: int, per_node: int) -> Grid:
    from evenstep.train.world import check_world

    if gpus < 1 or per_node < 1:
        raise EvenstepError(f"--gpus {gpus}, --gpus-per-node {per_node}: both must be at least 1")
    local = min(gpus, per_node)
    tensor = check_world(config, gpus, local)
    parallel = config.parallel
    replicate = (parallel.replicate or max(1, gpus // local)) if parallel.mode == "hsdp" else 1
    if gpus % replicate:
        raise EvenstepError(f"{gpus} GPUs with {local} in a machine do not make equal groups; give parallel.replicate")
    grid = Grid(parallel.mode, gpus, tensor, replicate)
    if grid.mode in SPLIT and config.optim.name == "spam" and config.optim.options.get("density", 1.0) != 1:
        raise EvenstepError(
            f"optim.density {config.optim.options['density']} does not go with parallel.mode {grid.mode}; give density "
            "1, or parallel.mode ddp"
        )
    return grid


def _rows(config: Config, words: int, gpu_memory: float) -> int | None:
    from evenstep.train.setup import chunk_rows

    given = config.train.loss_chunk
    if isinstance(given, int):
        return given or None
    return chunk_rows(config.micro_batch_size * config.train.seq_len, words, gpu_memory)


@dataclass(frozen=True)
class _Needs:
    """The arithmetic of one process."""

    config: Config
    shape: LlamaConfig
    grid: Grid
    tensors: list[Named]

    @property
    def weight(self) -> int:
        """Bytes of a parameter."""
        return 2 if self.config.train.dtype == "bf16" else 4

    @property
    def compute(self) -> int:
        """Bytes of a number in matrix products."""
        return 4 if self.config.train.dtype == "fp32" else 2

    @property
    def stream(self) -> int:
        """Bytes of a number of the residual stream: autocast leaves it in the parameters' format, FSDP casts them."""
        return self.compute if self.grid.mode in SPLIT else self.weight

    @property
    def held(self) -> int:
        """Parameters that this process holds."""
        return sum(self.grid.part(t) for t in self.tensors)

    def _gathered(self, block: bool | None = None) -> int:
        """Entries of the tensors (of all blocks, of the rest, of both) when gathered."""
        chosen = [t for t in self.tensors if block is None or t.block == block]
        return sum(math.prod(self.grid.cut_shape(t)) for t in chosen)

    def activations(self, tokens: int) -> int:
        """What a forward pass over so many tokens keeps for the backward pass."""
        shape, tensor = self.shape, self.grid.tensor
        hidden, cut = shape.hidden_size, (4 * shape.hidden_size + 4 * shape.intermediate_size) // tensor
        # Inputs of two norms; their outputs, which the matrices read; queries, keys, values and what attention makes of
        # them; gate, silu(gate), up and their product; and fp32 numbers of norms and softmax.
        block = 2 * hidden * self.stream + (2 * hidden + cut) * self.compute + 4 * (2 + shape.num_heads // tensor)
        last = hidden * (self.stream + self.compute) + 4
        if self.config.train.activation_checkpointing:  # inputs of blocks, and one block being computed again
            return tokens * (shape.num_layers * hidden * self.stream + block + last)
        return tokens * (shape.num_layers * block + last)

    def communication(self) -> int:
        """Gathered weights, and gradients on their way."""
        if self.grid.mode == "ddp":
            return 2 * DDP_BUCKET * 2 if self.weight == 2 else 0
        if self.grid.mode not in SPLIT:
            return 0
        root, blocks = self._gathered(False), self._gathered(True)
        one, reduce = blocks // self.shape.num_layers, 4
        # One block in use, the next one coming, and the message it comes in; the root stays gathered.
        here = 3 * one if self.config.parallel.reshard else blocks + one
        # Gradients of a block and of the root, and the fp32 message in which each is reduced.
        return (root + here) * self.compute + (root + one) * (self.compute + reduce)

    def whole_gradients(self) -> int:
        """FSDP keeps gradients whole, in fp32, until the last micro batch of a step."""
        return self._gathered() * 4 if self.grid.mode in SPLIT else 0

    def copies(self) -> int:
        """Autocast's 16-bit copies of matrices, kept until the forward pass ends; with FSDP the gathered weights are
        these copies."""
        if self.config.train.dtype != "bf16-autocast" or self.grid.mode in SPLIT:
            return 0
        return 2 * sum(t.numel for t in self.tensors if t.kind in ("hidden", "last"))
