"""``evenstep plan``: the plan as text or JSON. ``--check`` verifies it by a dry run of the whole model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from evenstep.errors import EvenstepError
from evenstep.models import LlamaConfig, llama_config
from evenstep.models.hf import read_config
from evenstep.train.config import Config
from evenstep.train.config_io import load_config
from evenstep.train.memory import SHARDED, dry_run, model_tensors
from evenstep.train.optimizers import try_optimizer
from evenstep.train.plan import USABLE, Plan, advice, in_mode, make_plan

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
"""The optimizers, with the formats of their moments, that ``--optimizers`` lists."""


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
    """Print the plan; ``gpu_memory`` in GB. EvenstepError for what does not fit together, and for a dry run that counts
    otherwise."""
    if not 0 < gpu_memory < 1e6:
        raise EvenstepError(f"--gpu-memory {gpu_memory}: give the GB of one GPU, such as 80")
    config = load_config(recipe, overrides)
    try_optimizer(config.optim)
    note = ""
    if config.parallel.mode == "none" and gpus > 1:
        config = in_mode(config, "fsdp")
        note = "parallel.mode none is for one process; planned is fsdp"
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


def shape_of(config: Config) -> LlamaConfig:
    """The model's shape. Its vocabulary: data.vocab_size, or that of a tokenizer or shards that are there, or 4096."""
    if config.model.init:
        return read_config(config.model.init)
    changes = {
        "max_seq_len": config.train.seq_len, "norm": config.model.norm, "norm_alpha": config.model.norm_alpha
    }  # fmt: skip
    return llama_config(config.model.label, _words(config), **changes)


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
        optim = dataclasses.replace(config.optim, name=name, options=options)
        other = make_plan(
            dataclasses.replace(config, optim=optim), made.shape, made.grid.gpus, per_node, made.gpu_memory
        )
        facts = {"optimizer": name, "state": options.get("state", "as parameters"), "memory": other.memory}
        rows.append(facts | {"peak": other.peak, "fits": other.fits, "messages": dataclasses.asdict(other.messages)})
    return rows


def _checked(made: Plan) -> str:
    counted = dry_run(made.config, made.shape, made.grid, blocks=made.shape.num_layers)
    planned = (made.memory["parameters"], made.memory["optimizer state"])
    if planned != (counted.parameters, counted.state):
        raise EvenstepError(
            f"the dry run holds {counted.parameters} bytes of parameters and {counted.state} of optimizer state, the "
            f"plan says {planned[0]} and {planned[1]}; please report it"
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
        "tp+fsdp": f"tp+fsdp, {grid.tensor} to a matrix",
    }.get(grid.mode, grid.mode)
    gpus = f"{grid.gpus} GPU{'s' * (grid.gpus > 1)}"
    tokens = train.batch_size * train.seq_len
    micro = min(config.micro_batch_size, train.batch_size // grid.data)
    return (
        f"{config.model.label} ({sum_of(made)} parameters) on {gpus}, {how}; {config.optim.name}, {train.dtype}; "
        f"{tokens:,} tokens a step, {made.passes} x {micro} sequences of {train.seq_len} a process"
    )


def sum_of(made: Plan) -> str:
    count = sum(t.numel for t in model_tensors(made.shape))
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def _memory(made: Plan, per_node: int) -> list[str]:
    lines = ["", "memory of a process, GB"]
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
    lines = ["", "sent by a process in a step, GB"]
    for wire in made.wire:
        times = f", {wire.times} times" if wire.times > 1 else ""
        lines.append(f"  {wire.what:34} {gb(wire.bytes):>9}  among {wire.among}{times}")
    messages = made.messages
    if messages.maximum:
        what = f"all-reduces of {made.config.optim.name}: {messages.maximum} MAX, {messages.sum} SUM"
        lines.append(f"  {what}, {messages.bytes:,} bytes together")
    elif made.grid.mode in SHARDED:
        lines.append(f"  {made.config.optim.name} sends nothing of its own")
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
