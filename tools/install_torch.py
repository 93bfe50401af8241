"""Install torch into the Python that runs this file: `python tools/install_torch.py torch==2.13.0`.

PyPI's torch for Linux brings CUDA, which is gigabytes of no use on a machine without an NVIDIA driver. There the CPU
build is taken from PyTorch's own index. If that index does not answer within seconds, or its download fails, pip's
default index serves, which is also the one for machines with a driver and for other systems. The Makefile calls this
file; it needs no package besides pip.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"

PATIENCE = 8.0
"""Seconds in which the CPU index has to answer."""


def has_nvidia_driver(proc: Path = Path("/proc/driver/nvidia")) -> bool:
    """Whether this machine has an NVIDIA driver."""
    return proc.exists() or shutil.which("nvidia-smi") is not None


def pip(*words: str) -> bool:
    """Run pip; returns whether it succeeded."""
    return subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *words]).returncode == 0


def answers(index: str, patience: float = PATIENCE) -> bool:
    """Whether ``index`` lists torch within ``patience`` seconds. In a process of its own, which can be ended: a name
    that no server resolves may block for minutes. Not through pip, which would be content with its other indexes."""
    ask = f"import urllib.request; urllib.request.urlopen({index + '/torch/'!r}, timeout={patience}).read(1)"
    try:
        done = subprocess.run([sys.executable, "-c", ask], stderr=subprocess.DEVNULL, timeout=patience)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def install(requirement: str, index: str = CPU_INDEX) -> int:
    """Install ``requirement``, and say what is downloaded and from where; returns the exit status."""
    why, size = "", "about 100 MB"
    if platform.system() == "Linux" and has_nvidia_driver():
        why, size = ", for the NVIDIA driver", "gigabytes, with CUDA"
    elif platform.system() == "Linux":
        if answers(index):
            print(f"Downloading {requirement} for CPUs from {index}: about 200 MB.", flush=True)
            if pip("install", "--index-url", index, "--timeout", "15", "--retries", "1", requirement):
                return 0
        why, size = f", because {index} does not serve it", "200 MB, or gigabytes if it brings CUDA"
    print(f"Downloading {requirement} from pip's default index{why}: {size}.", flush=True)
    return 0 if pip("install", requirement) else 1


if __name__ == "__main__":
    sys.exit(install(*sys.argv[1:]))
