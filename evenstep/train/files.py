"""Atomic replacement of the small files of a run, the lock of a run that trains, and the directory of a new run.

The directory of a run may come from an untrusted source and contain links. Nothing here writes through a link, and a
directory that is only listed (``evenstep runs``) is opened read-only.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from weakref import WeakValueDictionary

from evenstep.errors import EvenstepError
from evenstep.paths import leaves, unused
from evenstep.train.checkpoint import list_checkpoints
from evenstep.train.config import BaseConfig

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"

_NOT_THROUGH_LINKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
"""Flags of ``os.open``: refuse a symbolic link at the end of the path, and do not wait for the other end of a pipe."""

_TRIES = 4
"""Attempts to take a lock, 50 ms apart: a process that lists runs holds it for a moment."""


def replace_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to a file beside ``path`` and rename it. If ``path`` is a link, the link is replaced and its
    target does not change. EvenstepError when the disk refuses; the old file stays intact."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        beside.unlink(missing_ok=True)  # of a process that was killed, or a link
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before the rename, which could otherwise survive a power failure alone
        os.replace(beside, path)
    except OSError as problem:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise EvenstepError(
            f"could not write {path}: {problem.strerror}; make room there or give another --out"
        ) from problem


def replace_text(path: Path, text: str) -> None:
    """`replace_bytes` of the text in UTF-8."""
    replace_bytes(path, text.encode("utf-8"))


def check_creatable(directory: Path) -> None:
    """EvenstepError when ``directory`` cannot be created or written to. Creates nothing. Checked early, because the
    directory of a run is created after long work."""
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryDirectory(prefix=".evenstep-", dir=there).cleanup()
    except OSError as problem:
        raise EvenstepError(f"{directory} cannot be created ({problem.strerror}); give another --out") from None


FILES = ("config.toml", "metrics.jsonl", "summary.json", "curve.png", "checkpoints", "tensorboard", "wandb")
"""The files and folders that a run writes repeatedly."""


def check_own(run: Path) -> None:
    """EvenstepError when a file that a run writes is a link that leads out of its directory: the run would change or
    delete files elsewhere."""
    for name in FILES:
        if (run / name).is_symlink() and leaves(run, name):
            raise EvenstepError(
                f"{run / name} is a link that leads out of the run's folder, where a run does not write; replace the "
                "link by its target (the folder of the run itself may be a link)"
            )


# ---- the lock ----


class RunLock:
    """The lock of the directory of a run. The operating system releases it when this object is deleted or when the
    process ends for any reason.

    ``busy``: a run of this process trains under the lock, so no other run of this process may use it.
    """

    def __init__(self, run: Path) -> None:
        self.busy = False
        self._descriptor, self.key = _take(run)

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            os.close(self._descriptor)


_held: WeakValueDictionary[tuple[int, int], RunLock] = WeakValueDictionary()
"""Locks that this process holds, by device and inode of their files."""


def hold(run: Path) -> RunLock:
    """The lock of the run, held as long as the returned object exists. A lock that this process already holds is
    returned again, unless a run trains under it.

    EvenstepError, before anything is written, when another process holds the lock: two processes would truncate each
    other's log and checkpoints. On a file system without locks a warning is issued instead.
    """
    ours = _ours(run)
    if ours is not None:
        if ours.busy:
            raise _refusal(run, _me())
        return ours
    lock = RunLock(run)
    _held[lock.key] = lock
    return lock


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Train under the run's lock. EvenstepError as for `hold`."""
    lock = hold(run)
    lock.busy = True
    try:
        yield
    finally:
        lock.busy = False


def is_running(run: Path) -> bool:
    """Whether a process trains this run. Opens the lock read-only, and not through a link."""
    return _trainer(run) is not None


def check_free(run: Path) -> None:
    """EvenstepError, which names the process, when a process trains this run."""
    who = _trainer(run)
    if who is not None:
        raise _refusal(run, who)


def _trainer(run: Path) -> str | None:
    """The process that trains the run, from the content of the lock (may be empty); None if there is none."""
    ours = _ours(run)
    if ours is not None:
        return _me() if ours.busy else None
    try:
        descriptor = os.open(run / LOCK, os.O_RDONLY | _NOT_THROUGH_LINKS)
    except OSError:  # no lock, a link, or the file of another user
        return None
    try:
        if fcntl is not None and stat.S_ISREG(os.fstat(descriptor).st_mode):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except OSError as problem:
        return _holder(descriptor) if _is_taken(problem) else None
    finally:
        os.close(descriptor)


def _ours(run: Path) -> RunLock | None:
    try:
        return _held.get(_key(os.lstat(run / LOCK)))
    except OSError:
        return None


def _key(facts: os.stat_result) -> tuple[int, int]:
    return facts.st_dev, facts.st_ino


def _is_taken(problem: OSError) -> bool:
    """Whether another process holds the lock. Any other error comes from a file system without locks."""
    return problem.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


def _take(run: Path) -> tuple[int, tuple[int, int]]:
    """Take the lock. Returns the descriptor that holds it, and the key of its file."""
    path = run / LOCK
    for attempt in range(_TRIES):
        if path.is_symlink():  # where the system has no O_NOFOLLOW
            raise EvenstepError(f"{path} is a link, but a lock has to be a file in the run's folder; delete the link")
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NOT_THROUGH_LINKS, 0o666)
        except OSError as problem:
            raise EvenstepError(
                f"{path} cannot be opened for writing ({problem.strerror}); make {run} writable, or give another --out"
            ) from None
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise EvenstepError(f"{path} is not a regular file; delete it")
            if _locked(descriptor, run):
                # Another process may have deleted and recreated the directory since the file was opened. The lock of
                # a deleted file excludes nobody.
                with suppress(OSError):
                    if _key(os.lstat(path)) == _key(facts):
                        _sign(descriptor, facts)
                        return descriptor, _key(facts)
            holder = _holder(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if attempt < _TRIES - 1:
            time.sleep(0.05)
    raise _refusal(run, holder)


def _locked(descriptor: int, run: Path) -> bool:
    """Take the lock, if it is free."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        if _is_taken(problem):
            return False
        warnings.warn(
            f"{run}: the file system has no locks ({problem.strerror}); make sure that only one process trains there",
            stacklevel=2,
        )
    return True


def _me() -> str:
    return f"{os.getpid()} on {socket.gethostname()}"


def _sign(descriptor: int, facts: os.stat_result) -> None:
    """Write the holder into the lock file, for the error message of other processes. Does not write into a file with
    other content or with a second name (a hard link), which may be any file of the user."""
    if not hasattr(os, "pwrite") or facts.st_nlink != 1 or (facts.st_size and not _holder(descriptor)):
        return
    with suppress(OSError):  # a full disk: the lock is held without a signature
        os.ftruncate(descriptor, os.pwrite(descriptor, f"{_me()}\n".encode(), 0))


def _holder(descriptor: int) -> str:
    """The process that last signed the lock; empty if none did."""
    found = os.pread(descriptor, 300, 0).decode("utf-8", "replace") if hasattr(os, "pread") else ""
    return found.strip() if re.fullmatch(r"\d+ on [!-~]*\n", found) else ""


def _refusal(run: Path, holder: str) -> EvenstepError:
    who = f" (process {holder})" if holder else ""
    return EvenstepError(f"{run} is being trained by another process{who}; wait for it or stop it")


# ---- the directory of a new run ----


def default_name(config: BaseConfig) -> str:
    return config.name or "-".join(filter(None, (config.model.label, config.optim.name, config.lowbit)))


def fresh_directory(config: BaseConfig) -> Path:
    """The directory of a new run; does not create it. EvenstepError unless it is missing, empty, or that of a run that
    stopped before its first checkpoint."""
    new = Path("runs") / f"{datetime.now():%Y-%m-%d-%H%M%S}-{default_name(config)}"
    out = Path(config.out) if config.out else unused(new)
    check_free(out)
    if (out / "config.toml").exists():
        if list_checkpoints(out / "checkpoints"):
            raise EvenstepError(f"{out} already has a run; continue it with --resume {out}, or give another --out")
        if (out / "summary.json").exists():
            raise EvenstepError(f"{out} has a finished run without checkpoints; give another --out")
    elif out.exists() and (not out.is_dir() or any(path.name not in _LEFT_AT_START for path in out.iterdir())):
        raise EvenstepError(f"{out} exists and is not an empty directory; give another --out")
    check_creatable(out)
    return out


_LEFT_AT_START = (LOCK, ".config.toml.partial")
"""Files of a run that was killed before it had written anything else."""
