"""Weights to start from or to write text with: a run's newest checkpoint, one checkpoint, or a model in Hugging Face
layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from evenstep.errors import EvenstepError
from evenstep.models import Llama, load_pretrained
from evenstep.train.checkpoint import MANIFEST, load_model_state, newest_checkpoint


def find_source(path: Path, say: Callable[[str], None]) -> Path:
    """The directory with ``config.json`` and weights that ``path`` stands for: itself, or the newest whole checkpoint
    of the run it is. EvenstepError when it is neither; ``say`` gets a line for each checkpoint that is passed over."""
    if not path.is_dir():
        raise EvenstepError(
            f"model.init: there is no directory {path}; give a run, a checkpoint, or a model in Hugging Face layout"
        )
    if (path / "config.json").is_file():
        return path
    return newest_checkpoint(path, say)


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
