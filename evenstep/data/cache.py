"""A cache of directories that stays consistent when a process is killed, the disk is full, or two processes build the
same entry.

An entry is built under a temporary name in the same folder and renamed when it is complete. The rename of a directory
is atomic and never replaces a directory that holds files: of two processes that build the same entry one succeeds, and
the other uses the result.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evenstep.errors import EvenstepError

_PARTIAL = ".partial-"
_FORGOTTEN = 24 * 3600.0  # seconds after which a partial entry is taken to be that of a killed process


def cache_root(cache_dir: str | Path | None) -> Path:
    """``cache_dir``, else $EVENSTEP_CACHE, else $XDG_CACHE_HOME/evenstep, else ~/.cache/evenstep."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if own := os.environ.get("EVENSTEP_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evenstep"


def check_writable(entry: Path) -> None:
    """Raise EvenstepError if ``entry`` could not be built. Called before an expensive computation of its content."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=entry.parent).cleanup()
    except OSError as error:
        raise _not_writable(entry, error) from error


def _not_writable(entry: Path, error: OSError) -> EvenstepError:
    return EvenstepError(
        f"cannot write the data cache {entry.parent}: {error.strerror or error}; free space there or give another "
        "place with data.cache_dir or EVENSTEP_CACHE"
    )


@contextmanager
def building(entry: Path) -> Iterator[Path]:
    """An empty directory in which to build ``entry``. It becomes ``entry`` at the end of the block, or is removed if
    the block raises."""
    partial = None
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        _sweep(entry.parent)
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=entry.parent))
        yield partial
        partial.chmod(0o755)  # mkdtemp makes it private, but users may share a cache
        # The content must be on the disk before the name is: after a power failure a name without content would be a
        # damaged entry.
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        try:
            partial.rename(entry)
        except OSError:
            if not entry.is_dir():  # otherwise another process was first
                raise
        _sync(entry.parent)
    except OSError as error:
        raise _not_writable(entry, error) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def discard(entry: Path) -> None:
    """Remove a damaged entry, with one rename first, so that no other process finds a part of it."""
    try:
        with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=entry.parent, ignore_cleanup_errors=True) as gone:
            entry.rename(Path(gone, "old"))
    except FileNotFoundError:  # another process was first
        pass
    except OSError as error:
        raise EvenstepError(
            f"cannot remove the damaged cache entry {entry}: {error.strerror or error}; remove it by hand"
        ) from error


def _sweep(parent: Path) -> None:
    """Remove partial entries of killed processes."""
    for old in parent.glob(f"{_PARTIAL}*"):
        try:
            age = time.time() - max(path.stat().st_mtime for path in [old, *old.iterdir()])
        except OSError:  # just removed by its owner
            continue
        if age > _FORGOTTEN:
            shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
