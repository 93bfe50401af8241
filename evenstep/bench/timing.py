"""Rounds, clocks and ratios: paired measurements on a machine that is also used by others.

All optimizers of a comparison take turns. Every round times one step of each optimizer, in a new random order, after a
pass over a buffer of twice the last-level cache, so that no optimizer starts with parameters or gradients that the one
before it left in the caches. A ratio is the median over the rounds of (this step / the reference's step of the same
round): a slow phase of the machine slows both. Ratios of minima vary by a third from run to run and are not used.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

Step = Callable[[], object]


class Sample(NamedTuple):
    """Seconds of one step: ``wall`` is elapsed time (on a GPU between two events of its stream), ``cpu`` the CPU time
    of this process over all threads."""

    wall: float
    cpu: float


Timer = Callable[[Step], Sample]


def cpu_timer(step: Step) -> Sample:
    """Time ``step`` by the clocks of the host."""
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    return Sample(time.perf_counter() - wall, time.process_time() - cpu)


def cuda_timer(step: Step) -> Sample:
    """Time ``step`` by two events of the current CUDA stream."""
    event: Any = torch.cuda.Event  # not typed by torch
    start, stop = (event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    cpu = time.process_time()
    start.record()
    step()
    stop.record()
    cpu = time.process_time() - cpu
    stop.synchronize()
    return Sample(start.elapsed_time(stop) / 1e3, cpu)


TIMERS: dict[str, Timer] = {"cpu": cpu_timer, "cuda": cuda_timer}


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache; 64 MiB if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 2**10, "M": 2**20}
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=64 * 2**20)


class Caches:
    """``empty()`` evicts everything useful from the caches. It only reads: dirty cache lines would be written back
    during the step that follows, and count as its time."""

    def __init__(self, device: torch.device) -> None:
        self.buffer = torch.zeros(2 * last_level_cache(device) // 8, dtype=torch.int64, device=device)

    def empty(self) -> None:
        self.buffer.sum()


@dataclass
class Turns:
    """A participant: ``turns`` timed steps, evenly spread over the rounds. ``before`` and ``after`` are called with the
    number of the round and are not timed. ``problem``: the exception that ended its participation."""

    name: str
    step: Step
    turns: int
    before: Callable[[int], object] = lambda round_: None
    after: Callable[[int], object] = lambda round_: None
    samples: dict[int, Sample] = field(default_factory=dict)
    problem: Exception | None = None

    def due(self, round_: int, rounds: int) -> bool:
        done, after = (r * self.turns // rounds for r in (round_, round_ + 1))
        return after > done and self.problem is None


def take_turns(players: Sequence[Turns], rounds: int, timer: Timer, *, seed: int = 0) -> None:
    """Time the players' steps over ``rounds`` rounds, into their ``samples`` by round. A player whose step raises an
    Exception takes no further turn and keeps the exception as its ``problem``."""
    shuffle = random.Random(seed).shuffle
    with no_garbage_collection():
        for round_ in range(rounds):
            gc.collect()
            order = [player for player in players if player.due(round_, rounds)]
            shuffle(order)
            for player in order:
                try:
                    player.before(round_)
                    player.samples[round_] = timer(player.step)
                    player.after(round_)
                except Exception as problem:
                    player.problem = problem


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Disable Python's automatic garbage collection, which would interrupt a timed step."""
    enabled = gc.isenabled()
    gc.disable()
    gc.collect()
    gc.freeze()  # leaves existing objects out of ``gc.collect()``, which would take longer than most steps
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


class Spread(NamedTuple):
    """Median and quartiles."""

    q1: float
    median: float
    q3: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; a single value is all three."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


def paired_ratio(samples: Mapping[int, Sample], reference: Mapping[int, Sample]) -> Spread | None:
    """Spread of the ratios to the reference over the rounds in which both were timed; None if there are none."""
    ratios = [sample.wall / reference[r].wall for r, sample in samples.items() if r in reference]
    return spread(ratios) if ratios else None


def busy_processors(seconds: float = 0.5) -> float | None:
    """Processors' worth of time that other processes use, averaged over ``seconds`` in which this process sleeps; None
    if the system does not tell (no ``/proc/stat``). A load average would still count the benchmark before this one."""
    before = _used_and_total()
    time.sleep(seconds)
    after = _used_and_total()
    if before is None or after is None or after[1] == before[1]:
        return None
    return (os.cpu_count() or 1) * (after[0] - before[0]) / (after[1] - before[1])


def _used_and_total() -> tuple[int, int] | None:
    """Time that all processors together have worked and existed since the start of the system, in clock ticks."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    # cpu user nice system idle iowait irq softirq steal; guests count as users.
    ticks = [int(word) for word in path.read_text().split("\n", 1)[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def machine_state() -> dict[str, Any]:
    """Settings of the machine that affect timings, as far as the system reports them."""
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    pages = huge.read_text() if huge.exists() else ""
    chosen = pages[pages.find("[") + 1 : pages.find("]")] if "[" in pages else None
    return {"transparent_huge_pages": chosen, "cpu_capability": torch.backends.cpu.get_cpu_capability()}
