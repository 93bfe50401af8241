"""Weights to start from or to write text with: a run's newest checkpoint, one checkpoint, or a model in Hugging Face
layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from evenstep.errors import EvenstepError
from evenstep.models import Llama, load_pretrained
from evenstep.train.checkpoint import MANIFEST, load_model_state, newest_checkpoint, way_on
from evenstep.train.config_io import read_toml

PRODUCT = "model"
"""Where a fine-tuning run leaves its model, in Hugging Face layout."""


def find_source(path: Path, say: Callable[[str], None], option: str = "model.init") -> Path:
    """The directory with ``config.json`` and weights that ``path`` stands for: itself, the newest whole checkpoint of
    the pretraining run it is, or the model that the fine-tuning run it is has left. EvenstepError when it is none of
    them, which names ``option``; ``say`` gets a line for each checkpoint that is passed over."""
    if not path.is_dir():
        raise EvenstepError(
            f"{option}: there is no directory {path}; give a run, a checkpoint, or a model in Hugging Face layout"
        )
    if (path / "config.json").is_file():
        return path
    if (path / MANIFEST).is_file():
        raise EvenstepError(f"{path} holds a part of a model alone (adapters, or one of transformers); give its run")
    if not (path / "config.toml").is_file() or "tune" not in read_toml(path / "config.toml"):
        return newest_checkpoint(path, say)
    if not (path / PRODUCT / "config.json").is_file():
        raise EvenstepError(f"{path} is a fine-tuning run that has not ended; {way_on(path)}")
    return path / PRODUCT


def load_model(source: Path) -> Llama:
    """The model of a checkpoint, or in Hugging Face layout, on the CPU, in the dtype it was saved in. EvenstepError for
    what cannot be read."""
    return load_pretrained(source, load_model_state(source) if _sharded(source) else None)


def _sharded(source: Path) -> bool:
    """A checkpoint of today's layout? Those before it had a manifest too, beside weights in Hugging Face layout."""
    try:
        manifest = json.loads((source / MANIFEST).read_text(encoding="utf-8"))
        return "model.safetensors" not in manifest["files"] and "evenstep.safetensors" not in manifest["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
