"""Checks of file names from untrusted files, which may name files of their own directory only."""

from __future__ import annotations

import errno
import itertools
import os
import stat
from pathlib import Path
from typing import Any


def is_plain_name(name: Any) -> bool:
    """A printable file name without a path, on any system: no separators, no drive, not ``.`` or ``..``."""
    return (
        isinstance(name, str)
        and 0 < len(name) < 256
        and name not in (".", "..")
        and name.isprintable()
        and not any(character in "/\\:" for character in name)
    )


def leaves(directory: Path, name: str) -> bool:
    """Whether the file ``name`` of ``directory`` leads out of it through a symbolic link."""
    return os.path.dirname(os.path.realpath(directory / name)) != os.path.realpath(directory)


def read_own(directory: Path, name: str) -> bytes:
    """Read the file ``name`` of an untrusted directory. OSError when there is none, when it is a link out of the
    directory, and when it is not a regular file: a pipe would block."""
    check_own_file(directory, name)
    return (directory / name).read_bytes()


def check_own_file(directory: Path, name: str) -> None:
    """OSError unless ``name`` is a regular file of the directory."""
    if leaves(directory, name):
        raise OSError(errno.ELOOP, "it is a link that leads out of the folder", str(directory / name))
    if not stat.S_ISREG(os.stat(directory / name).st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(directory / name))


def unused(path: Path) -> Path:
    """``path``, or the first of ``path-2``, ``path-3``, ... that does not exist."""
    others = (path.with_name(f"{path.name}-{i}") for i in itertools.count(2))
    return next(one for one in itertools.chain([path], others) if not os.path.lexists(one))
