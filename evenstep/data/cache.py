"""A cache of directories that a kill, a full disk or a second process cannot spoil.

An entry is built under another name beside its place and renamed into it when whole. A rename of a directory either
happens or does not, and never replaces a directory that holds files: of two processes that build the same entry one
wins, and the other uses what is there.
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
_FORGOTTEN = 24 * 3600.0  # seconds after which a partial entry must be the rest of a killed process


def cache_root(cache_dir: str | Path | None) -> Path:
    """``cache_dir``, else $EVENSTEP_CACHE, else $XDG_CACHE_HOME/evenstep, else ~/.cache/evenstep."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if own := os.environ.get("EVENSTEP_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evenstep"


def check_writable(entry: Path) -> None:
    """EvenstepError when ``entry`` could not be built; for what has to be worked out before it is."""
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
    """An empty directory to build ``entry`` in; becomes ``entry`` when the block ends well, else disappears."""
    partial = None
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        _sweep(entry.parent)
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=entry.parent))
        yield partial
        partial.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
        for path in [*partial.iterdir(), partial]:  # on the disk before it has its name: power may fail, too
            _sync(path)
        try:
            partial.rename(entry)
        except OSError:
            if not entry.is_dir():  # else another process was first
                raise
        _sync(entry.parent)
    except OSError as error:
        raise _not_writable(entry, error) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def discard(entry: Path) -> None:
    """Take a damaged entry away, in one rename, so that nobody finds half of it."""
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
