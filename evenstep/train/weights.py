"""Weights on the disk: finding and loading those of a run, a checkpoint or a directory in Hugging Face layout, and
``evenstep export``, which writes them for other programs.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from evenstep.errors import EvenstepError, first_line
from evenstep.lowbit import lowbit_report, quantize_
from evenstep.models import Llama, LlamaConfig, load_pretrained, save_pretrained
from evenstep.models.hf import missing_in_transformers, own_tensors, read_config, require_safetensors
from evenstep.models.hub import PREFIX, HubLM, HubShape, hushed, load_weights
from evenstep.train.checkpoint import (
    MANIFEST,
    find_fault,
    how_to_continue,
    load_model_state,
    newest_checkpoint,
    shard_metadata,
)
from evenstep.train.config import Config
from evenstep.train.config_io import read_toml
from evenstep.train.files import check_creatable
from evenstep.train.model_card import run_of_checkpoint, write_card
from evenstep.train.saving import model_tensors

if TYPE_CHECKING:
    from torch import nn

M = TypeVar("M", bound="nn.Module")

PRODUCT = "model"
"""The directory inside a fine-tuning run that contains its final model, in Hugging Face layout."""


def find_source(path: Path, say: Callable[[str], None], option: str = "model.init") -> Path:
    """The directory with ``config.json`` and weights that ``path`` stands for: ``path`` itself, the newest valid
    checkpoint of a pretraining run, or the final model of a fine-tuning run.

    ``say`` is called with one line for each damaged checkpoint that is skipped. EvenstepError, which names ``option``,
    when ``path`` is none of these.
    """
    if not path.is_dir():
        raise EvenstepError(
            f"{option}: there is no directory {path}; give a run, a checkpoint, or a model in Hugging Face layout"
        )
    if (path / "config.json").is_file():
        return path
    # A checkpoint without config.json: FineTuning.save_shape writes one only for a complete model of evenstep.
    if (path / MANIFEST).is_file():
        raise EvenstepError(
            f"{path} has no complete model of evenstep (adapters, or a model of transformers); give its run"
        )
    if not (path / "config.toml").is_file() or "tune" not in read_toml(path / "config.toml"):
        return newest_checkpoint(path, say)
    if not (path / PRODUCT / "config.json").is_file():
        raise EvenstepError(f"{path} is a fine-tuning run that is not finished; {how_to_continue(path)}")
    return path / PRODUCT


def load_model(source: Path) -> Llama | HubLM:
    """The model of a checkpoint, or evenstep's LLaMA from a directory in Hugging Face layout, on the CPU, in its saved
    dtype. EvenstepError when it cannot be read."""
    if not _sharded(source):
        return load_pretrained(source)
    weights = load_model_state(source)
    if not any(name.startswith(PREFIX) for name in weights):
        return load_pretrained(source, weights)
    model = HubShape.read(source).build(next(iter(weights.values())).dtype)
    load_weights(model, weights, source)
    return model


def fill_from(model: HubLM, source: Path) -> None:
    """Give ``model`` the weights of a checkpoint of such a model, or of a directory that transformers has saved.
    EvenstepError when they cannot be read or do not fit."""
    if _sharded(source):
        return load_weights(model, load_model_state(source), source)
    from transformers import AutoModelForCausalLM

    with hushed():
        try:
            net: Any = AutoModelForCausalLM.from_pretrained(source, local_files_only=True, dtype=model.net.dtype)
        except Exception as problem:  # whatever its parsers raise
            raise EvenstepError(f"transformers cannot open {source}: {first_line(problem)}") from None
    load_weights(model, {f"{PREFIX}{name}": tensor for name, tensor in net.state_dict().items()}, source)


def shape_in(source: Path, config: Config) -> LlamaConfig | HubShape:
    """The shape of the model in ``source``, a checkpoint or a directory in Hugging Face layout, for ``config``.
    EvenstepError when only one of the two is a model of transformers (``model.hf``), or their types differ."""
    hub = _sharded(source) and any(name.startswith(f"model.{PREFIX}") for name in shard_metadata(source))
    if config.model.hf is None:
        if hub:
            raise EvenstepError(
                f"model.init: {source} has a model of transformers; give --model.hf {source} too, or export it first "
                "and use the directory"
            )
        return read_config(source)
    if _sharded(source) and not hub:
        raise EvenstepError(f"model.init: {source} has evenstep's LLaMA; leave out model.hf {config.model.hf}")
    return HubShape.read(source)


def _sharded(source: Path) -> bool:
    """Whether ``source`` is a checkpoint of the current layout. Earlier checkpoints also have a manifest, but weights
    in Hugging Face layout."""
    try:
        manifest = json.loads((source / MANIFEST).read_text(encoding="utf-8"))
        return "model.safetensors" not in manifest["files"] and "evenstep.safetensors" not in manifest["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def check_positions(seq_len: int, positions: int, source: Path | str | None) -> None:
    """EvenstepError when sequences are longer than the ``positions`` of the model from ``source``."""
    if seq_len > positions:
        raise EvenstepError(
            f"train.seq_len {seq_len} is longer than the {positions} positions of the model of {source}; give at most "
            f"{positions}"
        )


def with_lowbit(model: M, recipe: str | None, say: Callable[[str], None]) -> M:
    """``model`` with its linear layers quantised by ``recipe``, in place; weights and their names do not change."""
    if recipe is None:
        return model
    # An error names the class of the model, which for one of transformers is not that of the wrapper.
    report = lowbit_report(quantize_(getattr(model, "net", model), recipe))
    kernels = f", {', '.join(report.kernels)}" if report.kernels else ""
    say(
        f"low-bit recipe {recipe}: {len(report.swapped)} linear layers at {report.bits_per_weight:.2f} bits per "
        f"weight{kernels}, {len(report.kept)} layers in high precision"
    )
    return model


# ---- export ----

WEIGHTS = "model.safetensors"


def export(source: Path, to: str, out: Path, say: Callable[[str], None]) -> None:
    """Write the weights of a checkpoint, or of the newest valid checkpoint of a run, for other programs.

    Args:
        source: a run or a checkpoint, written by any number of processes.
        to: "hf": a directory that ``transformers.AutoModelForCausalLM.from_pretrained`` loads, with the tokenizer and,
            for a run of `evenstep pretrain`, a model card; "safetensors": one file with parameter names as keys.
            Weights keep their dtype.
        out: a new or empty directory. It is renamed into place when it is complete.
        say: called with lines for the user.

    Raises:
        EvenstepError: a source without weights or with a damaged file, a directory that is not empty, or, for "hf", a
            model that transformers does not have.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise EvenstepError(f"{out} exists and is not an empty directory; give another --out")
    check_creatable(out)
    if not source.is_dir():
        raise EvenstepError(f"{source}: no such directory; give a run or one of its checkpoints")
    found = find_source(source, say)
    fault = find_fault(found) if (found / MANIFEST).exists() else None
    if fault:
        raise EvenstepError(f"{found} is damaged: {fault}; give an earlier checkpoint (evenstep inspect lists them)")
    try:
        model = load_model(found)
    except EvenstepError as problem:
        if (found / MANIFEST).exists():
            raise
        raise EvenstepError(f"{problem} ({found} already is in Hugging Face layout)") from problem
    write = _WRITERS[to]
    # Written beside `out`, on the same file system, and renamed: a killed export leaves no incomplete directory there.
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent, ignore_cleanup_errors=True) as parent:
            partial = Path(parent, "partial")
            partial.mkdir()
            write(model, found, partial)
            run = run_of_checkpoint(found)
            if to == "hf" and run:
                write_card(run, found, model.num_parameters(), partial)
            if out.exists():
                out.rmdir()
            partial.rename(out)
    except OSError as problem:
        raise EvenstepError(f"could not write {out}: {problem.strerror or problem}; make room there") from problem
    size = sum(path.stat().st_size for path in out.iterdir())
    say(f"{out}: {model.num_parameters():,} parameters of {found}, {size / 1e6:,.1f} MB")


def _to_hf(model: Llama | HubLM, source: Path, directory: Path) -> None:
    from evenstep.data import load_tokenizer

    if isinstance(model, HubLM):  # config.json has the end of text already
        model.save_pretrained(directory)
        load_tokenizer(source).save(directory)
        return
    if (part := missing_in_transformers(model.config)) is not None:
        raise EvenstepError(f"transformers has no LLaMA with {part}; give --to safetensors for the weights alone")
    write_hf(model, load_tokenizer(source), directory)


def write_hf(model: Llama, tokenizer: Any, directory: Path) -> None:
    """Write weights, shape and tokenizer in the layout that transformers loads. ``tokenizer`` has ``save`` and
    ``eos_id``."""
    save_pretrained(model, directory)
    tokenizer.save(directory)
    path = directory / "config.json"
    # Without this key transformers' generate() would not stop at the end of a document.
    config = json.loads(path.read_text(encoding="utf-8")) | {"eos_token_id": tokenizer.eos_id}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _to_safetensors(model: Llama | HubLM, source: Path, directory: Path) -> None:
    if isinstance(model, HubLM):
        tensors = {name.removeprefix("model."): x.contiguous() for name, x in model_tensors(model.net).items()}
        require_safetensors().save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        return
    metadata = {"format": "pt", "norm": model.config.norm}
    require_safetensors().save_file(own_tensors(model), directory / WEIGHTS, metadata=metadata)


_WRITERS: dict[str, Callable[[Llama | HubLM, Path, Path], None]] = {"hf": _to_hf, "safetensors": _to_safetensors}
