"""``evenstep plan``: what a run needs on a number of GPUs, computed before it starts.

The plan of one process has its memory and the bytes that it sends per step. `evenstep.train.memory` has the parameters
and the optimizer state, which come from a dry run on the meta device, and the activations. This module has the
communication buffers, which follow from how FSDP2 gathers and reduces and are an estimate; the messages of a step; the
search for changes that make a plan fit; and the output as text, Markdown or JSON.

The peak is the larger of two moments: the backward pass begins (activations and logits exist, gradients only between
micro batches), or the optimizer steps (gradients exist, activations do not). Communication buffers and 16-bit copies
are counted at both. Bytes are decimal: 1 GB is 10**9.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from evenstep.errors import EvenstepError
from evenstep.models import LlamaConfig
from evenstep.models.hub import HubShape
from evenstep.train.config import Config, ParallelConfig
from evenstep.train.config_io import load_config
from evenstep.train.distributed import check_cut
from evenstep.train.memory import (
    LOGIT_BYTES,
    SHARDED,
    Grid,
    Named,
    Shape,
    activation_bytes,
    chunk_rows,
    compute_bytes,
    dry_run,
    grid_of,
    held,
    model_shape,
    model_tensors,
    weight_bytes,
)
from evenstep.train.optimizers import try_optimizer
from evenstep.train.weights import find_source, shape_in

# ---- bytes that a process sends in a step ----


@dataclass(frozen=True)
class Messages:
    """The all-reduces of fp64 values in a step of an evenstep optimizer: the number of MAX and of SUM operations, and
    the bytes of all of them together."""

    maximum: int = 0
    sum: int = 0
    bytes: int = 0


def step_messages(name: str, tensors: list[Named], grid: Grid) -> Messages:
    """The messages of a step of the optimizer ``name``.

    All tensors with the same layout share one MAX (the largest entry of each tensor) and one SUM (three values of each
    tensor; with SCALE also the squared norms of the columns of the embedding). Tensor parallelism has three layouts,
    and a matrix that is sharded twice sends its values along both dimensions of the mesh.
    """
    if grid.mode not in SHARDED or name not in ("stable_spam", "spam", "scale"):
        return Messages()
    ways: dict[tuple[bool, bool], int] = {}
    rows = 0  # of matrices that are sharded along the dimension of SCALE's norms, which need a sum of their own
    for tensor in tensors:
        twice = tensor.cut is not None and grid.tensor > 1
        columns = tensor.shape[1] if name == "scale" and tensor.embedding else 0
        if name == "scale" and twice and tensor.cut == 1:
            rows += math.ceil(tensor.shape[0] / grid.shards(tensor.block))
        way = (tensor.block and grid.tensor > 1, twice)
        ways[way] = ways.get(way, 0) + 1 + 3 + columns
    rounds = sum(2 if twice else 1 for _, twice in ways)
    numbers = rows + sum(n * (2 if twice else 1) for (_, twice), n in ways.items())
    return Messages(rounds, rounds + (rows > 0), 8 * numbers)


@dataclass(frozen=True)
class Wire:
    """The messages of one kind in a step: ``times`` messages among ``among`` processes, ``bytes`` in total. The
    messages of all blocks in one pass count as one."""

    what: str
    among: int
    times: int
    bytes: int


def _ring(numbers: int, size: int, among: int, *, both_ways: bool = False) -> int:
    """Bytes that a process sends in a ring algorithm over ``among`` processes, for ``numbers`` values of ``size``
    bytes. ``both_ways``: an all-reduce, which is a reduce-scatter and an all-gather."""
    return round((2 if both_ways else 1) * numbers * size * (among - 1) / among)


def on_the_wire(config: Config, shape: Shape, grid: Grid, tensors: list[Named], passes: int, tokens: int) -> list[Wire]:
    """The messages of a step with ``passes`` micro batches of ``tokens`` tokens, without those of the optimizer."""
    size = compute_bytes(config)
    if grid.mode == "ddp":
        whole = sum(t.numel for t in tensors)
        return [Wire("all-reduce of gradients", grid.gpus, 1, _ring(whole, 4, grid.gpus, both_ways=True))]
    if grid.mode not in SHARDED:
        return []
    sums = {block: sum(t.on(grid) for t in tensors if t.block == block) for block in (True, False)}
    among = grid.shards(True)
    gathered = sum(_ring(sums[block], size, grid.shards(block)) for block in sums)
    reduced = sum(_ring(sums[block], 4, grid.shards(block)) for block in sums)
    found = [Wire("all-gather of weights, forward", among, passes, passes * gathered)]
    if config.parallel.reshard:  # for the blocks alone: the root stays gathered
        again = _ring(sums[True], size, among)
        found.append(Wire("all-gather of weights, backward", among, passes, passes * again))
    found.append(Wire("reduce-scatter of gradients", among, 1, reduced))
    if grid.replicate > 1:
        bytes_ = _ring(held(config, shape, grid).parameters // weight_bytes(config), 4, grid.replicate, both_ways=True)
        found.append(Wire("all-reduce of gradients between groups", grid.replicate, 1, bytes_))
    if grid.tensor > 1 and isinstance(shape, LlamaConfig):
        # In each block and pass: two all-reduces of the outputs of attention and MLP in the forward pass, and two of
        # the gradients of their inputs in the backward pass. Checkpointing repeats the forward pass.
        rounds = 6 if config.train.activation_checkpointing else 4
        each = _ring(tokens * shape.hidden_size, size, grid.tensor, both_ways=True)
        times = passes * rounds * shape.num_layers
        found.append(Wire("all-reduce of activations", grid.tensor, times, times * each))
    return found


# ---- memory ----

USABLE = 0.92
"""Share of a GPU's memory that a plan may use; the rest is for CUDA's context, NCCL and fragmentation."""

DDP_BUCKET = 25 * 2**20
"""Bytes of a bucket in which DDP reduces gradients. A bucket of 16-bit gradients is copied to fp32 first."""


@dataclass(frozen=True)
class Plan:
    """The needs of one process: ``memory`` in bytes by purpose, ``peak`` in bytes, ``wire`` (the messages of a step
    without the optimizer) and ``messages`` (those of the optimizer)."""

    config: Config
    shape: Shape
    grid: Grid
    gpu_memory: float
    passes: int
    """Micro batches of a process in a step."""
    rows: int | None
    """Rows of logits in memory at once; None for all."""
    memory: dict[str, int]
    peak: int
    wire: list[Wire]
    messages: Messages

    @property
    def fits(self) -> bool:
        return self.peak <= USABLE * self.gpu_memory


def make_plan(config: Config, shape: Shape, gpus: int, per_node: int, gpu_memory: float) -> Plan:
    """The plan of a run on ``gpus`` GPUs with ``gpu_memory`` bytes each, ``per_node`` of them in each machine.
    EvenstepError when the model or the batch cannot be divided among them."""
    grid = grid_of(config, gpus, per_node)
    if isinstance(shape, LlamaConfig):
        check_cut(shape, grid.tensor)
    tensors = model_tensors(shape)
    train = config.train
    sequences = train.batch_size // grid.data
    micro = min(config.micro_batch_size, sequences)
    passes, tokens = sequences // micro, micro * train.seq_len
    rows = _rows(config, shape, gpu_memory)
    on_process_0 = held(config, shape, grid)
    memory = {
        "parameters": on_process_0.parameters,
        "gradients": on_process_0.parameters,
        "optimizer state": on_process_0.state,
        "activations": activation_bytes(config, shape, grid, tokens),
        "logits and loss": min(rows or tokens, tokens) * shape.vocab_size * LOGIT_BYTES
        + _early_gradients(config, shape, rows, tokens),
        "communication": _communication(config, shape, grid, tensors),
        "gradients between micro batches": _whole_gradients(grid, tensors) if passes > 1 else 0,
        "16-bit copies of weights": _copies(config, grid, tensors),
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


def _early_gradients(config: Config, shape: Shape, rows: int | None, tokens: int) -> int:
    """Bytes of the gradients that a chunked loss computes in the forward pass: of the head, fp32 [vocabulary, hidden],
    and of the hidden states [tokens, hidden]."""
    if rows is None or isinstance(shape, HubShape):
        return 0
    return shape.hidden_size * (4 * shape.vocab_size + weight_bytes(config) * tokens)


def _rows(config: Config, shape: Shape, gpu_memory: float) -> int | None:
    if isinstance(shape, HubShape):
        return None
    given = config.train.loss_chunk
    if isinstance(given, int):
        return given or None
    return chunk_rows(config.micro_batch_size * config.train.seq_len, shape.vocab_size, gpu_memory)


def _communication(config: Config, shape: Shape, grid: Grid, tensors: list[Named]) -> int:
    """Bytes of gathered weights and of gradients that are being reduced."""
    weight, compute, reduce = weight_bytes(config), compute_bytes(config), 4
    if grid.mode == "ddp":
        return 2 * DDP_BUCKET * 2 if weight == 2 else 0
    if grid.mode not in SHARDED:
        return 0
    root, blocks = (sum(t.on(grid) for t in tensors if t.block == block) for block in (False, True))
    one = blocks // shape.num_layers
    # The block in use, the prefetched next block, and the buffer of its all-gather; the root stays gathered.
    gathered = 3 * one if config.parallel.reshard else blocks + one
    # The gradients of one block and of the root, and the fp32 buffers in which they are reduced.
    return (root + gathered) * compute + (root + one) * (compute + reduce)


def _whole_gradients(grid: Grid, tensors: list[Named]) -> int:
    """Bytes of the gradients that FSDP keeps whole, in fp32, until the last micro batch of a step."""
    return sum(t.on(grid) for t in tensors) * 4 if grid.mode in SHARDED else 0


def _copies(config: Config, grid: Grid, tensors: list[Named]) -> int:
    """Bytes of the 16-bit copies of matrices that autocast caches until the forward pass ends. With FSDP the gathered
    weights are in 16 bits already."""
    if config.train.dtype != "bf16-autocast" or grid.mode in SHARDED:
        return 0
    return 2 * sum(t.numel for t in tensors if len(t.shape) == 2 and not t.embedding)


# ---- changes that make a plan fit ----

MOST_GPUS = 4096

Change = tuple[str, str, Any]
"""Section, option, value."""


def advice(plan: Plan, per_node: int) -> list[str]:
    """Changes of options that make the plan fit, as text; empty when it fits. Only the combinations with the smallest
    number of changes are returned, and more GPUs only when no change of options suffices."""
    if plan.fits:
        return []
    gpus = plan.grid.gpus
    while gpus <= MOST_GPUS:
        found: dict[tuple[str, ...], str] = {}
        for changes in _candidates(plan, gpus):
            options = tuple(option for _, option, _ in changes)
            if options not in found and _fits(plan, changes, gpus, per_node):  # the smallest change first
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
    """Every combination of changes, ordered from small to large changes of each option."""
    config, micro = plan.config, plan.config.micro_batch_size
    whole = config.train.batch_size // max(1, gpus // plan.grid.tensor)  # one pass keeps no whole gradients
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
    """``config`` with another parallel mode and the default options of that mode."""
    if config.parallel.mode == mode:
        return config
    given = config.parallel
    return replace(config, parallel=ParallelConfig(mode=mode, reshard=given.reshard, timeout=given.timeout))


def _fits(plan: Plan, changes: list[Change], gpus: int, per_node: int) -> bool:
    try:
        config = _changed(plan.config, changes)
        more = gpus > plan.grid.gpus and config.parallel.mode not in SHARDED  # replicas do not become smaller
        return not more and make_plan(config, plan.shape, gpus, per_node, plan.gpu_memory).fits
    except EvenstepError:  # the batch or the model cannot be divided like this
        return False


# ---- the command ----

MODES = ("ddp", "fsdp", "hsdp", "tp+fsdp")

STATES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("adamw", {}),
    ("stable_spam", {"state": "fp32"}),
    ("stable_spam", {"state": "bf16"}),
    ("stable_spam", {"state": "int8"}),
    ("spam", {"state": "fp32"}),
    ("spam", {"state": "bf16"}),
    ("spam", {"state": "int8"}),
    ("scale", {"state": "fp32"}),
    ("scale", {"state": "bf16"}),
    ("scale", {"state": "int8"}),
)
"""The optimizers and formats of their moments that ``--optimizers`` lists."""


def plan(
    recipe: Path | None,
    overrides: list[tuple[str, str]],
    *,
    gpus: int,
    per_node: int,
    gpu_memory: float,
    optimizers: bool,
    check: bool,
    as_json: bool,
) -> None:
    """Print the plan; ``gpu_memory`` is in GB. EvenstepError for options that do not fit together, and with ``check``
    when the dry run of the whole model counts other bytes."""
    if not 0 < gpu_memory < 1e6:
        raise EvenstepError(f"--gpu-memory {gpu_memory} is not a size in GB; give the memory of one GPU, such as 80")
    config = load_config(recipe, overrides)
    try_optimizer(config.optim)
    note = ""
    if config.parallel.mode == "none" and gpus > 1:
        config = in_mode(config, "fsdp")
        note = "parallel.mode none is for one process; this plan is for fsdp"
    made = make_plan(config, shape_of(config), gpus, per_node, gpu_memory * 1e9)
    counted = _checked(made) if check else None
    others = [_row(made, config, mode, per_node) for mode in MODES] if gpus > 1 else []
    listed = _optimizers(made, config, per_node) if optimizers else []
    if as_json:
        print(json.dumps(_facts(made, per_node, others, listed, counted), indent=1))
    elif optimizers:
        print(_markdown(listed))
    else:
        head = [_head(made), note] if note else [_head(made)]
        print("\n".join([*head, *_memory(made, per_node), *_wire(made), *_modes(others)]))
        if counted:
            print(f"dry run on the meta device: {counted}")


def shape_of(config: Config) -> Shape:
    """The shape of the model. Its vocabulary size is data.vocab_size, else that of the given tokenizer or shards, else
    4096."""
    if config.model.init:
        return shape_in(find_source(Path(config.model.init), lambda _: None), config)
    return model_shape(config, _words(config))


def _words(config: Config) -> int:
    from evenstep.data import TokenData, load_tokenizer
    from evenstep.data.pipeline import BPE, DEFAULT_VOCAB

    data = config.data
    prefix, _, rest = data.source.partition(":")
    if data.vocab_size is not None:
        return data.vocab_size
    if prefix == "shards":
        return TokenData(Path(rest).expanduser()).vocab_size
    return DEFAULT_VOCAB if data.tokenizer == BPE else load_tokenizer(data.tokenizer).vocab_size


def _row(made: Plan, config: Config, mode: str, per_node: int) -> dict[str, Any]:
    try:
        other = make_plan(in_mode(config, mode), made.shape, made.grid.gpus, per_node, made.gpu_memory)
    except EvenstepError as problem:
        return {"mode": mode, "problem": str(problem)}
    sent = sum(wire.bytes for wire in other.wire)
    return {"mode": mode, "peak": other.peak, "wire": sent, "fits": other.fits}


def _optimizers(made: Plan, config: Config, per_node: int) -> list[dict[str, Any]]:
    rows = []
    for name, options in STATES:
        optim = replace(config.optim, name=name, options=options)
        other = make_plan(replace(config, optim=optim), made.shape, made.grid.gpus, per_node, made.gpu_memory)
        facts = {"optimizer": name, "state": options.get("state", "as parameters"), "memory": other.memory}
        rows.append(facts | {"peak": other.peak, "fits": other.fits, "messages": dataclasses.asdict(other.messages)})
    return rows


def _checked(made: Plan) -> str:
    counted = dry_run(made.config, made.shape, made.grid, blocks=made.shape.num_layers)
    planned = (made.memory["parameters"], made.memory["optimizer state"])
    if planned != (counted.parameters, counted.state):
        raise EvenstepError(
            f"the dry run has {counted.parameters} bytes of parameters and {counted.state} of optimizer state, the "
            f"plan {planned[0]} and {planned[1]}; please report this bug"
        )
    return f"{counted.parameters:,} bytes of parameters and {counted.state:,} of optimizer state, as planned"


def _facts(
    made: Plan, per_node: int, modes: list[dict[str, Any]], listed: list[dict[str, Any]], counted: str | None
) -> dict[str, Any]:
    return {
        "gpus": made.grid.gpus,
        "mode": made.grid.mode,
        "tensor": made.grid.tensor,
        "replicate": made.grid.replicate,
        "micro_batches": made.passes,
        "memory": made.memory,
        "peak": made.peak,
        "usable": round(USABLE * made.gpu_memory),
        "fits": made.fits,
        "advice": advice(made, per_node),
        "wire": [dataclasses.asdict(wire) for wire in made.wire],
        "optimizer_messages": dataclasses.asdict(made.messages),
        "modes": modes,
        **({"optimizers": listed} if listed else {}),
        **({"dry_run": counted} if counted else {}),
    }


# ---- as text ----


def gb(size: float) -> str:
    return f"{size / 1e9:.2f}" if size >= 5e6 or not size else f"{size / 1e9:.5f}"


def _head(made: Plan) -> str:
    grid, config, train = made.grid, made.config, made.config.train
    how = {
        "hsdp": f"hsdp, {grid.replicate} groups of {grid.gpus // grid.replicate}",
        "tp+fsdp": f"tp+fsdp, {grid.tensor} per matrix",
    }.get(grid.mode, grid.mode)
    gpus = f"{grid.gpus} GPU{'s' * (grid.gpus > 1)}"
    tokens = train.batch_size * train.seq_len
    micro = min(config.micro_batch_size, train.batch_size // grid.data)
    scales = config.optim.scales_in_words
    rate = f"lr {config.optim.lr:g}{scales}, " if scales else ""
    return (
        f"{config.model.label} ({sum_of(made)} parameters) on {gpus}, {how}; {config.optim.name}, "
        f"{rate}{train.dtype}; "
        f"{tokens:,} tokens per step, {made.passes} x {micro} sequences of {train.seq_len} per process"
    )


def sum_of(made: Plan) -> str:
    count = sum(t.numel for t in model_tensors(made.shape))
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def _memory(made: Plan, per_node: int) -> list[str]:
    lines = ["", "memory per process, GB"]
    lines += [f"  {name:34} {gb(size):>9}" for name, size in made.memory.items() if size]
    usable = f"{gb(USABLE * made.gpu_memory)} usable of {made.gpu_memory / 1e9:g}"
    lines.append(f"  {'peak':34} {gb(made.peak):>9}  {usable}: {'fits' if made.fits else 'DOES NOT FIT'}")
    changes = advice(made, per_node)
    if changes:
        lines.append("  it would fit with " + ", or ".join(changes))
    return lines


def _wire(made: Plan) -> list[str]:
    if not made.wire:
        return []
    lines = ["", "sent per process and step, GB"]
    for wire in made.wire:
        times = f", {wire.times} times" if wire.times > 1 else ""
        lines.append(f"  {wire.what:34} {gb(wire.bytes):>9}  among {wire.among}{times}")
    messages = made.messages
    if messages.maximum:
        what = f"all-reduces of {made.config.optim.name}: {messages.maximum} MAX, {messages.sum} SUM"
        lines.append(f"  {what}, {messages.bytes:,} bytes in total")
    elif made.grid.mode in SHARDED:
        lines.append(f"  {made.config.optim.name} sends no messages of its own")
    return lines


def _modes(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = ["", f"{'every mode':12} {'peak GB':>9} {'sent GB':>9}"]
    for row in rows:
        if "problem" in row:
            lines.append(f"  {row['mode']:10} {row['problem']}")
        else:
            fits = "fits" if row["fits"] else "does not fit"
            lines.append(f"  {row['mode']:10} {gb(row['peak']):>9} {gb(row['wire']):>9}  {fits}")
    return lines


def _markdown(rows: list[dict[str, Any]]) -> str:
    names = ("parameters", "gradients", "optimizer state")
    lines = [
        "| optimizer | moments | parameters | gradients | state | the rest at the peak | peak | fits | extra bytes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        memory = row["memory"]
        rest = row["peak"] - memory["parameters"] - memory["optimizer state"]
        cells = [row["optimizer"], row["state"], *(gb(memory[name]) for name in names), gb(rest), gb(row["peak"])]
        lines.append(
            "| " + " | ".join([*cells, "yes" if row["fits"] else "no", f"{row['messages']['bytes']:,}"]) + " |"
        )
    return "\n".join(lines)
