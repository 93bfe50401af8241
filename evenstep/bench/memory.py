"""Bytes: what one optimizer step allocates, and what the machine has left."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from evenstep.train.hardware import total_memory


def transient_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Peak bytes that torch had allocated during a step above what it had before: on a GPU from the allocator's own
    count, on a CPU from the profiler's record of every allocation, of the second of two steps (a release is recorded
    only of what was allocated under the profiler: in the second step those are all that the first one made). Memory
    that code takes without torch, such as a kernel's scratch from malloc, is not seen."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else every use prints two lines; read once, at the first use
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
        with torch.profiler.record_function(_MEASURED):
            step()
    return _peak(profile.profiler.kineto_results.events())


_MEASURED = "evenstep.bench: measured step"


def _peak(events: Sequence[Any]) -> int:
    """The highest running sum of allocations (positive) and releases (negative) since the measured step began."""
    began = next(event.start_ns() for event in events if event.name() == _MEASURED)
    records = [event for event in events if event.name() == "[memory]" and event.start_ns() >= began]
    now = peak = 0
    for event in sorted(records, key=lambda event: event.start_ns()):  # stable: events of one instant keep their order
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated: free on the GPU, or what Linux says is available, less when the process is
    confined to a control group. Elsewhere the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return total_memory(device)
    return min(free, _group_room())


_GROUPS = (  # limit, use: version 2 and version 1 of Linux's control groups, as seen from inside a container
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def _group_room() -> int:
    for limit, use in _GROUPS:
        try:
            return int(Path(limit).read_text()) - int(Path(use).read_text())
        except (OSError, ValueError):  # no such group, or the limit is "max"
            continue
    return 2**63
