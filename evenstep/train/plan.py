"""What a run needs on a number of GPUs, computed before it is started: memory of each process and bytes sent per step.

Parameters, gradients and optimizer state are exact: they follow from shapes and from the rules by which FSDP2 and
tensor parallelism shard them, and the dry run of `evenstep.train.plan_report` counts them again on torch's meta device.
Activations are those that PyTorch keeps for the backward pass in eager mode with a GPU's fused attention and norm;
compiled blocks keep less. Communication buffers follow from how FSDP2 gathers and reduces, and are an estimate.

The peak is the larger of two moments: the backward pass begins (activations and logits exist, gradients only between
micro batches), or the optimizer steps (gradients exist, activations do not). Communication buffers and 16-bit copies
are counted at both. Bytes are decimal: 1 GB is 10**9. Importing this needs no torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from evenstep.errors import EvenstepError
from evenstep.train.config import Config, ParallelConfig

if TYPE_CHECKING:
    from evenstep.models import LlamaConfig

# ---- the tensors of a model, how they are sharded, and what an optimizer keeps of each ----

SPLIT = ("fsdp", "hsdp", "tp+fsdp")
"""Modes in which a process holds parts of tensors."""


@dataclass(frozen=True)
class Named:
    """A tensor of the model: ``kind`` as `evenstep.optim.scale_groups` has it (embedding, hidden, last, vector),
    ``cut`` the dimension along which tensor parallelism cuts it, None for not at all."""

    name: str
    shape: tuple[int, ...]
    kind: str
    block: bool
    cut: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Grid:
    """How processes share a model: ``gpus`` in all, ``tensor`` of them for one matrix product, ``replicate`` groups
    that each hold the whole model."""

    mode: str
    gpus: int
    tensor: int = 1
    replicate: int = 1

    @property
    def data(self) -> int:
        """Processes that read different data."""
        return self.gpus // self.tensor

    def shards(self, block: bool) -> int:
        """Into how many parts FSDP cuts a tensor (of a block, or of the rest)."""
        if self.mode not in SPLIT:
            return 1
        if self.mode == "hsdp":
            return self.gpus // self.replicate
        return self.gpus // self.tensor if block else self.gpus

    def cut_shape(self, tensor: Named) -> tuple[int, ...]:
        """What tensor parallelism leaves of a tensor for one process."""
        if tensor.cut is None:
            return tensor.shape
        return tuple(n // self.tensor if i == tensor.cut else n for i, n in enumerate(tensor.shape))

    def part(self, tensor: Named) -> int:
        """Entries that process 0 holds, which has the most: FSDP2 cuts dimension 0 into equal pieces, rounded up."""
        first, *rest = self.cut_shape(tensor)
        return math.ceil(first / self.shards(tensor.block)) * math.prod(rest)

    def parts(self, tensor: Named) -> int:
        """Into how many pieces a tensor is cut altogether."""
        return self.shards(tensor.block) * (self.tensor if tensor.cut is not None else 1)


@functools.cache
def model_tensors(shape: LlamaConfig) -> list[Named]:
    """Every parameter of the model."""
    hidden, middle, words = shape.hidden_size, shape.intermediate_size, shape.vocab_size
    found = [Named("model.embed_tokens.weight", (words, hidden), "embedding", False)]
    for i in range(shape.num_layers):
        block = f"model.layers.{i}."
        for name in ("q", "k", "v"):
            found.append(Named(f"{block}self_attn.{name}_proj.weight", (hidden, hidden), "hidden", True, 0))
        found.append(Named(f"{block}self_attn.o_proj.weight", (hidden, hidden), "hidden", True, 1))
        for name in ("gate", "up"):
            found.append(Named(f"{block}mlp.{name}_proj.weight", (middle, hidden), "hidden", True, 0))
        found.append(Named(f"{block}mlp.down_proj.weight", (hidden, middle), "hidden", True, 1))
        for name in ("input", "post_attention"):
            found.append(Named(f"{block}{name}_layernorm.weight", (hidden,), "vector", True))
    found.append(Named("model.norm.weight", (hidden,), "vector", False))
    return [*found, Named("lm_head.weight", (words, hidden), "last", False)]


# ---- what an optimizer keeps ----

SCALAR = 4
"""Bytes of a scalar of the state, fp32."""


def moment_bytes(entries: int, whole: int, parts: int, stored: str) -> int:
    """Bytes of a moment of ``entries`` here, of a tensor of ``whole`` cut into ``parts``. As `evenstep.optim.state`:
    int8 is one byte an entry, an fp32 scale for each 256 and a map of 256 fp32 numbers, where the parts are even."""
    if stored == "int8" and entries * parts == whole >= 4096 and entries % 256 == 0:
        return entries + entries // 256 * 4 + 256 * 4
    return entries * (2 if stored == "bf16" else 4)


def state_bytes(name: str, options: Mapping[str, Any], tensor: Named, grid: Grid, weight: int) -> int:
    """Bytes that process 0 keeps for ``tensor`` under the optimizer ``name``; ``weight``: bytes of a parameter's
    entry."""
    here, parts = grid.part(tensor), grid.parts(tensor)
    if name in ("adam", "adamw"):  # torch's: moments in the parameter's own format, and a step count
        return here * weight * (3 if options.get("amsgrad") else 2) + SCALAR
    stored = options.get("state", "fp32")
    moment = moment_bytes(here, tensor.numel, parts, stored)
    kahan = here * 2 if options.get("rounding") == "kahan" and weight == 2 else 0
    if name == "stable_spam":
        return 2 * moment + 5 * SCALAR + kahan
    if name == "spam":
        density = options.get("density", 1.0)
        hidden_alone = options.get("density_of", "all") == "hidden"
        if density == 1 or tensor.kind == "vector" or (hidden_alone and tensor.kind != "hidden"):
            return 2 * moment + SCALAR + kahan
        kept = round(density * here)
        return 2 * moment_bytes(kept, kept, 1, stored) + math.ceil(here / 8) + SCALAR + kahan
    if name == "scale":
        moments = {"vector": 2 * moment + SCALAR, "last": moment}
        return moments.get(tensor.kind, 0) + kahan
    known = "adam, adamw, stable_spam, spam, scale"
    raise EvenstepError(f"optim.name {name}: what it keeps is not known before it runs; plans are made for {known}")


@dataclass(frozen=True)
class Messages:
    """All-reduces of fp64 numbers that an optimizer's step sends on top: how many of each operation, and the bytes that
    go into all of them."""

    maximum: int = 0
    sum: int = 0
    bytes: int = 0


def step_messages(name: str, tensors: list[Named], grid: Grid) -> Messages:
    """One MAX (the largest entry of each tensor) and one SUM (three numbers of each; with SCALE also the squared norms
    of the token table's columns) for all tensors that are cut alike. With tensor parallelism there are three ways, and
    matrices that are cut twice send everything along both dimensions
    of the mesh."""
    if grid.mode not in SPLIT or name in ("adam", "adamw"):
        return Messages()
    ways: dict[tuple[bool, bool], int] = {}
    rows = 0  # of matrices cut along what SCALE takes norms over: a sum of their own
    for tensor in tensors:
        twice = tensor.cut is not None and grid.tensor > 1
        columns = tensor.shape[1] if name == "scale" and tensor.kind == "embedding" else 0
        if name == "scale" and twice and tensor.cut == 1:
            rows += math.ceil(tensor.shape[0] / grid.shards(tensor.block))
        way = (tensor.block and grid.tensor > 1, twice)
        ways[way] = ways.get(way, 0) + 1 + 3 + columns
    rounds = sum(2 if twice else 1 for _, twice in ways)
    numbers = rows + sum(n * (2 if twice else 1) for (_, twice), n in ways.items())
    return Messages(rounds, rounds + (rows > 0), 8 * numbers)


# ---- bytes that a process sends in a step ----


@dataclass(frozen=True)
class Wire:
    """``times`` messages of one kind in a step (one a block where there are blocks, counted as one), among ``among``
    processes: ``bytes`` in all."""

    what: str
    among: int
    times: int
    bytes: int


def _ring(numbers: int, size: int, among: int, *, both_ways: bool = False) -> int:
    return round((2 if both_ways else 1) * numbers * size * (among - 1) / among)


def on_the_wire(
    config: Config, shape: LlamaConfig, grid: Grid, tensors: list[Named], passes: int, tokens: int
) -> list[Wire]:
    """Every message of a step of ``passes`` micro batches of ``tokens`` tokens, those of the optimizer aside."""
    size = 4 if config.train.dtype == "fp32" else 2
    if grid.mode == "ddp":
        whole = sum(t.numel for t in tensors)
        return [Wire("all-reduce of gradients", grid.gpus, 1, _ring(whole, 4, grid.gpus, both_ways=True))]
    if grid.mode not in SPLIT:
        return []
    sums = {block: sum(math.prod(grid.cut_shape(t)) for t in tensors if t.block == block) for block in (True, False)}
    among = grid.shards(True)
    gathered = sum(_ring(sums[block], size, grid.shards(block)) for block in sums)
    reduced = sum(_ring(sums[block], 4, grid.shards(block)) for block in sums)
    found = [Wire("all-gather of weights, forward", among, passes, passes * gathered)]
    if config.parallel.reshard:  # the root stays gathered
        again = _ring(sums[True], size, among)
        found.append(Wire("all-gather of weights, backward", among, passes, passes * again))
    found.append(Wire("reduce-scatter of gradients", among, 1, reduced))
    if grid.replicate > 1:
        part = sum(grid.part(t) for t in tensors)
        bytes_ = _ring(part, 4, grid.replicate, both_ways=True)
        found.append(Wire("all-reduce of gradients between groups", grid.replicate, 1, bytes_))
    if grid.tensor > 1:
        # Two a block and pass: the sums of attention and MLP; those of their inputs' gradients; and with checkpointing
        # the first two once more.
        rounds = 6 if config.train.activation_checkpointing else 4
        each = _ring(tokens * shape.hidden_size, size, grid.tensor, both_ways=True)
        times = passes * rounds * shape.num_layers
        found.append(Wire("all-reduce of activations", grid.tensor, times, times * each))
    return found


# ---- memory ----

CHUNK_BYTES = 64 * 2**20
"""Logits alive at once when the loss is chunked by ``auto``."""

LOGIT_BYTES = 12
"""Bytes for each logit alive at once: its fp32 copy for the softmax, the gradient, and what the loss makes of them."""

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
    from evenstep.train.distributed import check_cut

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
    from evenstep.train.distributed import check_world

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


def chunk_rows(rows: int, vocab_size: int, memory: float) -> int | None:
    """The rule of ``auto`` for a device of ``memory`` bytes: rows of logits alive at once of ``rows``, None for all."""
    if rows * vocab_size * LOGIT_BYTES <= memory / 8:
        return None
    chunk = max(64, CHUNK_BYTES // (4 * vocab_size) // 64 * 64)
    return chunk if chunk < rows else None


def _rows(config: Config, words: int, gpu_memory: float) -> int | None:
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


# ---- changes that make a plan fit ----

MOST_GPUS = 4096

Change = tuple[str, str, Any]
"""Section, option, value."""


def advice(plan: Plan, per_node: int) -> list[str]:
    """Ways to make it fit, each with as few changes as any, in words; none when it fits. More GPUs are the last
    resort."""
    if plan.fits:
        return []
    gpus = plan.grid.gpus
    while gpus <= MOST_GPUS:
        found: dict[tuple[str, ...], str] = {}
        for changes in _candidates(plan, gpus):
            options = tuple(option for _, option, _ in changes)
            if options not in found and _fits(plan, changes, gpus, per_node):  # the mildest value comes first
                words = [f"{section}.{option} {_word(value)}" for section, option, value in changes]
                found[options] = " and ".join([*words, f"{gpus} GPUs"] if gpus > plan.grid.gpus else words)
        if found:
            fewest = min(map(len, found))
            return [words for options, words in found.items() if len(options) == fewest]
        gpus *= 2
    return ["a smaller model.size or train.seq_len, or GPUs with more memory"]


def _word(value: object) -> str:
    return "true" if value is True else str(value)


def _candidates(plan: Plan, gpus: int) -> Iterator[list[Change]]:
    """Every combination of changes, milder values first."""
    config, micro = plan.config, plan.config.micro_batch_size
    whole = config.train.batch_size // max(1, gpus // plan.grid.tensor)  # one pass: FSDP keeps no whole gradients
    sizes = [micro // 2**i for i in range(1, 12) if micro % 2**i == 0] + [whole] * (whole > micro)
    states = [] if config.optim.name in ("adam", "adamw") else ["bf16", "int8"]
    given = config.optim.options.get("state", "fp32")
    states = states[states.index(given) + 1 :] if given in states else states
    modes = [mode for mode in ("fsdp", "tp+fsdp") if mode != config.parallel.mode and gpus > 1]
    several: list[list[Change | None]] = [
        [None, *([] if config.train.activation_checkpointing else [("train", "activation_checkpointing", True)])],
        [None, *(("train", "micro_batch_size", size) for size in sizes)],
        [None, *(("optim", "state", state) for state in states)],
        [None, *(("parallel", "mode", mode) for mode in modes)],
    ]
    for chosen in product(*several):
        yield [change for change in chosen if change is not None]


def _changed(config: Config, changes: list[Change]) -> Config:
    for section, option, value in changes:
        if section == "optim":
            config = replace(config, optim=replace(config.optim, options={**config.optim.options, option: value}))
        elif section == "train":
            config = replace(config, train=replace(config.train, **{option: value}))
        else:
            config = in_mode(config, str(value))
    return config


def in_mode(config: Config, mode: str) -> Config:
    """``config`` with another parallel mode, and that mode's own defaults."""
    if config.parallel.mode == mode:
        return config
    given = config.parallel
    return replace(config, parallel=ParallelConfig(mode=mode, reshard=given.reshard, timeout=given.timeout))


def _fits(plan: Plan, changes: list[Change], gpus: int, per_node: int) -> bool:
    try:
        config = _changed(plan.config, changes)
        more = gpus > plan.grid.gpus and config.parallel.mode not in SPLIT  # copies stay as large
        return not more and make_plan(config, plan.shape, gpus, per_node, plan.gpu_memory).fits
    except EvenstepError:  # the batch or the model does not divide so
        return False
