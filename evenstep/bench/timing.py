"""Rounds, clocks and ratios.

On a machine that others use too, one number is no measurement. So all optimizers of a comparison take turns: every
round times one step of each, in an order drawn anew, after a pass over a buffer that is twice the last-level cache (so
that nobody starts with the parameters or gradients that the one before him left there). A ratio is the median over the
rounds of (this step / the reference's step of the same round): what slows the machine for seconds slows both.
Minima are of no use: their ratio swings by a third from run to run.
"""

from __future__ import annotations

import gc
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
    wall: float
    """Seconds: on a CPU of the clock on the wall, on a GPU between two events in its stream."""
    cpu: float
    """Seconds of CPU time of this process, all threads together."""


Timer = Callable[[Step], Sample]


def cpu_timer(step: Step) -> Sample:
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    return Sample(time.perf_counter() - wall, time.process_time() - cpu)


def cuda_timer(step: Step) -> Sample:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
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
    """Bytes of the largest cache; 64 MiB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 2**10, "M": 2**20}
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=64 * 2**20)


class Caches:
    """``Caches(device).empty()``: nothing useful is in the caches afterwards. It only reads, as lines that wait to be
    written back would be paid for by the step that follows."""

    def __init__(self, device: torch.device) -> None:
        self.buffer = torch.zeros(2 * last_level_cache(device) // 8, dtype=torch.int64, device=device)

    def empty(self) -> None:
        self.buffer.sum()


def _ignore(round_: int) -> None:
    pass


@dataclass
class Turns:
    """One that takes part: ``turns`` timed steps, evenly spread over the rounds. ``before`` and ``after`` get the
    number of the round and are not timed."""

    name: str
    step: Step
    turns: int
    before: Callable[[int], object] = _ignore
    after: Callable[[int], object] = _ignore
    samples: dict[int, Sample] = field(default_factory=dict)
    problem: Exception | None = None

    def due(self, round_: int, rounds: int) -> bool:
        done, after = (r * self.turns // rounds for r in (round_, round_ + 1))
        return after > done and self.problem is None


def take_turns(
    players: Sequence[Turns], rounds: int, timer: Timer, *, seed: int = 0, on_round: Callable[[int], object] = _ignore
) -> None:
    """Time the players' steps over ``rounds`` rounds, into their ``samples`` by round. One that raises an Exception is
    out from then on and keeps it as its ``problem``."""
    shuffle = random.Random(seed).shuffle
    with collected_between() as collect:
        for round_ in range(rounds):
            on_round(round_)
            collect()
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
def collected_between() -> Iterator[Callable[[], object]]:
    """Python's garbage collector runs when the value is called, and never in between."""
    enabled = gc.isenabled()
    gc.disable()
    gc.collect()
    gc.freeze()  # what is there stays there: looking through it every round would take longer than most steps
    try:
        yield gc.collect
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


class Spread(NamedTuple):
    q1: float
    median: float
    q3: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; of a single value, that value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


def paired_ratio(samples: Mapping[int, Sample], reference: Mapping[int, Sample]) -> Spread | None:
    """Spread of the ratios to the reference over the rounds in which both were timed; None when there are none."""
    ratios = [sample.wall / reference[r].wall for r, sample in samples.items() if r in reference]
    return spread(ratios) if ratios else None


def machine_state() -> dict[str, Any]:
    """Settings of the machine that move timings, as far as the system tells."""
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    pages = huge.read_text() if huge.exists() else ""
    chosen = pages[pages.find("[") + 1 : pages.find("]")] if "[" in pages else None
    return {"transparent_huge_pages": chosen, "cpu_capability": torch.backends.cpu.get_cpu_capability()}
