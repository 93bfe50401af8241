"""Checkpoints without a model, for the tests of names, manifests and broken files."""

import shutil
from collections.abc import Callable
from pathlib import Path

from evenstep.train.checkpoint import begin, commit, could_not_save, facts_of


def write(directory: Path) -> None:
    (directory / "weights.safetensors").write_bytes(bytes(range(256)) * 8)
    (directory / "config.json").write_text("{}")
    (directory / "trainer.pt").write_text("state")


def save_checkpoint(directory: Path, step: int, write: Callable[[Path], None], keep: int | None) -> Path:
    """Let ``write`` fill a checkpoint, in the order that a run keeps."""
    partial = begin(directory, step)
    try:
        write(partial)
        files = {path.name: facts_of(path) for path in partial.iterdir()}
        return commit(partial, step, 1, files, keep)
    except Exception as problem:
        raise could_not_save(directory, step, problem) from problem
    finally:
        shutil.rmtree(partial, ignore_errors=True)
