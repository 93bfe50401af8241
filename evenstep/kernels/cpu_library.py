"""The builds of cpu.cpp: the package carries one for each instruction set, and the best one that this processor has is
loaded on first use.
"""

import ctypes
import functools
import importlib.machinery
import os
from pathlib import Path

import torch

from evenstep.kernels.interface import Unavailable

BUILDS = ("avx512", "avx2", "default")
"""Instruction sets, best first."""

FORCE = "EVENSTEP_CPU_KERNELS"
"""Environment variable that names a build, or ``none``."""

FIELDS = 18
"""Of cpu.cpp's struct Job."""


def built() -> list[str]:
    """The builds that this installation carries, best first."""
    return [name for name in BUILDS if _file(name)]


def _file(name: str) -> Path | None:
    home = Path(__file__).parent
    found = (home / f"_cpu_{name}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in found if path.exists()), None)


def usable() -> list[str]:
    """The builds among them that this processor can run, best first."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    level = next((i for i, name in enumerate(BUILDS) if name == capability), len(BUILDS) - 1)
    return [name for name in built() if BUILDS.index(name) >= level]


def forced() -> str | None:
    """What the environment asks for, if anything."""
    return os.environ.get(FORCE) or None


def chosen() -> str:
    """The build that serves. Raises `Unavailable`."""
    wanted = forced()
    if wanted == "none":
        raise Unavailable(f"{FORCE}=none is set")
    if not built():
        raise Unavailable("this installation was built without a C++ compiler; install one and reinstall evenstep")
    candidates = usable()
    if wanted:
        if wanted not in candidates:
            raise Unavailable(f"{FORCE}={wanted} is set; here are {', '.join(candidates) or 'none'} (and 'none')")
        return wanted
    if not candidates:
        raise Unavailable(f"this processor runs none of the builds here ({', '.join(built())})")
    return candidates[0]


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded build. Raises `Unavailable`."""
    path = _file(chosen())
    try:
        loaded = ctypes.CDLL(str(path))
        loaded.evenstep_block.restype = loaded.evenstep_job_fields.restype = ctypes.c_int64
        loaded.evenstep_threaded.restype = ctypes.c_int64
        loaded.evenstep_compiler.restype = ctypes.c_char_p
    except (OSError, AttributeError) as problem:
        raise Unavailable(f"{path} does not load ({problem}); reinstall evenstep") from None
    if loaded.evenstep_job_fields() != FIELDS:
        raise Unavailable(f"{path} is of another version; reinstall evenstep")
    os.register_at_fork(after_in_child=_after_fork)
    return loaded


_forked = False


def _after_fork() -> None:
    # The pool of OpenMP's threads stays with the parent, and waiting for it would never end.
    global _forked
    _forked = True


def threads() -> int:
    """As many as torch uses; one in a forked process."""
    return 1 if _forked or not threaded() else torch.get_num_threads()


def threaded() -> bool:
    """Whether the build shares work among threads."""
    return bool(library().evenstep_threaded())


def compiler() -> str:
    """What built the library."""
    return library().evenstep_compiler().decode()
