"""From a configuration to the parts of a run: device, tokens, model, chunk of the loss, directory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from evenstep.data import DataSpec, TokenData, prepare
from evenstep.errors import EvenstepError
from evenstep.models import SIZES, Llama, llama_config
from evenstep.models.hf import read_config
from evenstep.paths import unused
from evenstep.train.checkpoint import list_checkpoints
from evenstep.train.config import Config
from evenstep.train.distributed import World
from evenstep.train.files import LOCK, check_creatable, check_free
from evenstep.train.hardware import memory_limit, total_memory
from evenstep.train.plan import LOGIT_BYTES, chunk_rows, least_memory
from evenstep.train.weights import load_model, with_lowbit

CPU_ROWS = 256
"""Rows of logits alive at once on a CPU: fewer waste matrix products, more leave the cache
(benchmarks/throughput.py).
"""


def default_name(config: Config) -> str:
    return config.name or "-".join(filter(None, (config.model.label, config.optim.name, config.lowbit)))


def fresh_directory(config: Config) -> Path:
    """The run's directory, which must hold nothing yet, or a run that stopped before its first checkpoint; it is not
    created here."""
    new = Path("runs") / f"{datetime.now():%Y-%m-%d-%H%M%S}-{default_name(config)}"
    out = Path(config.out) if config.out else unused(new)
    check_free(out)
    if (out / "config.toml").exists():
        if list_checkpoints(out / "checkpoints"):
            raise EvenstepError(f"{out} holds a run already; continue it with --resume {out}, or give another --out")
        if (out / "summary.json").exists():
            raise EvenstepError(f"{out} holds a finished run without its checkpoints; give another --out")
    elif out.exists() and (not out.is_dir() or any(path.name not in _LEFT_AT_START for path in out.iterdir())):
        raise EvenstepError(f"{out} exists and is not an empty directory; give another --out")
    check_creatable(out)
    return out


_LEFT_AT_START = (LOCK, ".config.toml.partial")
"""What a run leaves behind that was killed before it had written anything."""


def set_up_torch(config: Config) -> None:
    """Process-wide settings of torch: threads and determinism."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when CUDA starts
    if torch.are_deterministic_algorithms_enabled() != config.train.deterministic:  # the call itself loads the compiler
        torch.use_deterministic_algorithms(config.train.deterministic)


def load_data(config: Config, progress: Any = None) -> TokenData:
    data = config.data
    # The split has its own fixed seed: runs of different seeds validate on the same documents.
    spec = DataSpec(
        source=data.source,
        tokenizer=data.tokenizer,
        vocab_size=data.vocab_size,
        val_fraction=data.val_fraction,
        text_field=data.text_field,
        max_tokens=data.max_tokens,
        cache_dir=data.cache_dir,
        exclude=data.exclude or "",
        on_bad=data.on_bad or "stop",
    )
    return prepare(spec, progress)


def with_shape_of(config: Config, source: Path) -> Config:
    """``config`` with the shape of the model in ``source``; EvenstepError when it asks for another one.

    ``model.size`` becomes None for a shape that has no name.
    """
    shape = read_config(source)
    names = (name for name, size in SIZES.items() if all(getattr(shape, key) == value for key, value in size.items()))
    found: dict[str, Any] = {"size": next(names, None), "norm": shape.norm}
    if shape.norm == "mix":
        found["norm_alpha"] = shape.norm_alpha
    for key, value in found.items():
        given = getattr(config.model, key)
        if given not in (None, value):
            raise EvenstepError(
                f"model.{key} {given} contradicts the model in {source}, which has {value or 'a shape of its own'}; "
                "leave it out"
            )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **found))


def build_model(
    config: Config,
    vocab_size: int,
    source: Path | None,
    device: torch.device,
    say: Callable[[str], None],
    *,
    blank: bool,
) -> Llama:
    """The model of the configuration, freshly initialised from ``config.seed``, or loaded from ``source``. ``blank``:
    with the shape of ``source`` alone, and weights that are still to be read."""
    if source is None:
        torch.manual_seed(config.seed)
        shape = {"max_seq_len": config.train.seq_len, "norm": config.model.norm, "norm_alpha": config.model.norm_alpha}
        model = Llama(llama_config(config.model.label, vocab_size, **shape))
    elif blank:
        with torch.device("meta"):
            model = Llama(read_config(source))
        model.to_empty(device="cpu")
        torch.manual_seed(config.seed)
    else:
        model = load_model(source)
        torch.manual_seed(config.seed)
    if vocab_size > model.config.vocab_size:
        raise EvenstepError(
            f"the tokenizer has {vocab_size} entries, the model of {source} only {model.config.vocab_size}; "
            "give the tokenizer that belongs to it (data.tokenizer), or a smaller data.vocab_size"
        )
    if config.train.seq_len > model.config.max_seq_len:
        raise EvenstepError(
            f"train.seq_len {config.train.seq_len} is longer than the {model.config.max_seq_len} positions "
            f"of the model of {source}; give at most that"
        )
    model.activation_checkpointing = config.train.activation_checkpointing
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    return with_lowbit(model.to(device=device, dtype=dtype), config.lowbit, say)


def check_memory(config: Config, vocab_size: int, source: Path | None, world: World) -> None:
    """EvenstepError when a run on CPUs needs more memory than the machine has: the system would kill it without a word.
    Counted is what it needs at the least. A GPU says so itself."""
    if world.device.type != "cpu":
        return
    shape = read_config(source) if source else llama_config(config.model.label, vocab_size)
    needs, limit = least_memory(config, shape, world.size, world.local_size), memory_limit()
    if sum(needs.values()) * world.local_size <= limit:
        return
    found = ", ".join(f"{name} {size / 1e9:,.1f} GB" for name, size in needs.items() if size >= 5e7)
    each = f" in each of {world.local_size} processes" if world.local_size > 1 else ""
    raise EvenstepError(
        f"the run needs at least {sum(needs.values()) / 1e9:,.1f} GB of memory{each} ({found}), the machine has "
        f"{limit / 1e9:,.1f} GB; give a smaller model.size, data.vocab_size, train.micro_batch_size or train.seq_len"
    )


def loss_chunk(config: Config, vocab_size: int, device: torch.device, say: Callable[[str], None]) -> int | None:
    """Rows of logits alive at once, None for all.

    The rule of ``auto``: on a CPU in fp32 always 256 rows, which stay in cache and are the fastest way too. Elsewhere
    the whole logits of one forward pass, their fp32 copy for the softmax and their gradient take about 12 bytes a
    value; while that is below an eighth of the device's memory they stay whole, which is faster, above it they come in
    chunks of 64 MiB. It is decided by total memory, not by what happens to be free, so a resumed run decides the same.
    """
    given = config.train.loss_chunk
    if isinstance(given, int):
        return given or None
    rows = config.micro_batch_size * config.train.seq_len
    if device.type == "cpu" and config.train.dtype == "fp32":
        return CPU_ROWS if rows > CPU_ROWS else None
    chunk = chunk_rows(rows, vocab_size, total_memory(device))
    if chunk is not None:
        whole = rows * vocab_size * LOGIT_BYTES
        say(
            f"loss in chunks of {chunk} rows: whole logits would take {whole / 2**30:.1f} GiB "
            "(train.loss_chunk 0 keeps them whole; a smaller train.micro_batch_size also helps)"
        )
    return chunk
