"""A run's small files, which are either the old one or the new one, never half of one; and the lock of a run that
trains."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evenstep.errors import EvenstepError

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None  # type: ignore[assignment]


def replace_text(path: Path, text: str) -> None:
    """Write ``text`` beside ``path`` and rename; EvenstepError when the disk refuses, the old file intact."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as problem:
        beside.unlink(missing_ok=True)
        raise EvenstepError(
            f"could not write {path}: {problem.strerror}; make room there or give another --out"
        ) from problem


def check_creatable(directory: Path) -> None:
    """EvenstepError when ``directory`` could not be made and written to; leaves nothing behind. For a run's directory,
    which is made after long work."""
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryDirectory(prefix=".evenstep-", dir=there).cleanup()
    except OSError as problem:
        raise EvenstepError(f"{directory} cannot be created ({problem.strerror}); give another --out") from None


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run's lock; the system lets go of it when the process ends, however that happens.

    EvenstepError when another process holds it: two of them would cut each other's log and checkpoints.
    """
    with open(run / ".lock", "w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise EvenstepError(f"{run} is being trained by another process; wait for it or stop it") from None
        yield


def is_running(run: Path) -> bool:
    """Does some process hold the run's lock now?"""
    if not (run / ".lock").exists():
        return False
    try:
        with locked(run):
            return False
    except EvenstepError:
        return True
    except OSError:  # another user's run, which cannot be opened
        return False
