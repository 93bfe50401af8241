"""File names that a file of someone else's gives: they may name files of its own directory and nothing else."""

from __future__ import annotations

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
    """Does the file ``name`` of ``directory`` lie elsewhere, through a symbolic link?"""
    return (directory / name).resolve().parent != directory.resolve()
