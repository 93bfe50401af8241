"""The machine of a run: device, memory, versions and commit, for the log and summary.json."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from evenstep.errors import EvenstepError
from evenstep.version import __version__

# Peaks of a GPU in FLOP/s for products in plain fp32, TF32 and bf16, dense (half of the figures "with sparsity"), from
# NVIDIA's data sheets. H20, without a sheet in public: as sellers list it. A GPU that is not listed gets no MFU.
_PEAKS = {
    "B300": (75e12, 1125e12, 2250e12),  # HGX B300, a GPU's share
    "B200": (75e12, 1125e12, 2250e12),  # HGX B200
    "GH200": (67e12, 494e12, 989e12),
    "H200 NVL": (60e12, 418e12, 835e12),
    "H200": (67e12, 494e12, 989e12),
    "H100 NVL": (60e12, 418e12, 835e12),
    "H100 PCIe": (51e12, 378e12, 756e12),
    "H100": (67e12, 494e12, 989e12),
    "H20": (44e12, 74e12, 148e12),
    "A100": (19.5e12, 156e12, 312e12),
    "L40S": (91.6e12, 183e12, 362e12),
    "L40": (90.5e12, 90.5e12, 181e12),
    "L4": (30.3e12, 60e12, 121e12),
    "RTX 4090": (82.6e12, 82.6e12, 165.2e12),
    "RTX 3090": (35.6e12, 35.6e12, 71e12),
    "V100": (15.7e12, 15.7e12, 125e12),  # it has no TF32
}


def pick_device(name: str) -> torch.device:
    """The device by name; ``auto`` is the GPU when torch sees one. EvenstepError for ``cuda`` without a GPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise EvenstepError("train.device: 'cuda' was asked for, but torch sees no GPU; use cpu or auto")
    return torch.device(name)


def set_up_torch(threads: int, deterministic: bool, device: torch.device) -> None:
    """Settings of torch for the whole process. ``threads``: 0 leaves their number to torch.

    On a GPU, fp32 products are computed in TF32: inputs rounded to 10 bits of mantissa, sums in fp32. An H100 has seven
    times the rate of plain fp32 then. The environment variable ``NVIDIA_TF32_OVERRIDE=0`` forbids TF32.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if threads:
        torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when CUDA starts
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # the call itself loads the compiler
        torch.use_deterministic_algorithms(deterministic)


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """The GPU's peak for the run's dtype in FLOP/s, or None on a CPU and on GPUs that are not in the table."""
    if device.type != "cuda":
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest" and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"
    fp32 = 1 if tf32 else 0
    return _peak(torch.cuda.get_device_name(device), 2 if dtype != "fp32" else fp32)


def _peak(name: str, kind: int) -> float | None:
    # Whole words: a "GB300" is no "B300", whose peak differs. The first key found wins, so longer names precede their
    # beginnings: "H100 PCIe" before "H100".
    return next((peaks[kind] for key, peaks in _PEAKS.items() if re.search(rf"\b{key}\b", name)), None)


_CONTROL_GROUPS = (  # limit and usage, versions 2 and 1 of Linux's control groups, as seen from inside a container
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def total_memory(device: torch.device) -> int:
    """Bytes of the device's memory, used or not: the same number when the run is resumed."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 16 * 2**30


def memory_limit() -> int:
    """Bytes of memory that the processes of this machine may use: those of the machine, or a container's limit."""
    limits = [total_memory(torch.device("cpu"))]
    for limit, _ in _CONTROL_GROUPS:
        with suppress(OSError, ValueError):  # no container; "max"
            limits.append(int(Path(limit).read_text()))
    return min(limits)


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated: those free on the GPU, or those that Linux reports as available, within the
    limit of the process's container. On other systems, the memory of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        rooms = [next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))]
    except (OSError, StopIteration):
        return total_memory(device)
    for limit, usage in _CONTROL_GROUPS:
        with suppress(OSError, ValueError):
            rooms.append(int(Path(limit).read_text()) - int(Path(usage).read_text()))
    return min(rooms)


def peak_memory(device: torch.device) -> int | None:
    """Peak bytes: of torch's allocations on a GPU, of the whole process on a CPU (None where the system does not
    tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    # ru_maxrss is in bytes on macOS and in KiB on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe_hardware(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "device": device.type,
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "gpu_memory": total_memory(device)}
    return facts


@functools.cache
def bf16_speed() -> float:
    """How many times as many products this CPU computes in bf16 as in fp32 in the same time, by a measurement of some
    milliseconds: 0.03 to 0.2 on a CPU without instructions for bf16."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(128, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(5):  # the first one prepares the kernel
            start = time.perf_counter()
            x @ weight
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def bf16_advice(device: torch.device, dtype: str) -> str | None:
    """A line about ``train.dtype`` where the other number format would be faster on this CPU, else None."""
    if device.type != "cpu":
        return None
    if dtype != "fp32":
        speed = bf16_speed()
        slow = f"train.dtype {dtype}: matrix products in bf16 take {1 / speed:.1f} times as long as in fp32 on this CPU"
        return slow if speed < 1 else None
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return None  # there is nothing to measure
    if (speed := bf16_speed()) < 1.5:
        return None
    return f"matrix products are {speed:.1f} times as fast in bf16 on this CPU; --train.dtype bf16-autocast uses them"


def versions(*packages: str) -> dict[str, str]:
    """The versions of evenstep, torch, Python and ``packages``; "not installed" for a missing package."""
    found = {"evenstep": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str | None:
    """The git commit of evenstep's own source tree, ``+`` appended when it has changes; None outside a clone."""
    source = Path(__file__).resolve().parents[2]
    if not (source / ".git").exists():
        return None
    try:
        head = _git(source, "rev-parse", "HEAD")
        dirty = _git(source, "status", "--porcelain", "--untracked-files=no")
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return head + ("+" if dirty else "")


def short_commit(commit: str | None, digits: int = 10) -> str:
    """The first digits of a commit, with its ``+`` for local changes; ``no commit`` for None."""
    name, plus, changes = (commit or "").partition("+")
    return name[:digits] + plus + changes if commit else "no commit"


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
