"""The two floors of an optimizer step on a CPU, in ns per fp32 parameter, by ``python benchmarks/roofline.py``.

* Memory: the bytes that the step moves, over the bandwidth measured here. Passes that only read (measuring the
  gradient) and passes that also write (the update) have different bandwidths. Caches between passes are ignored.
* Instructions: the time of the same step when everything is in the second-level cache, as the difference of two
  sizes, so that the cost of a call cancels out. It holds divisions, roots, conversions and reductions.

A step cannot be faster than the larger of the two. Both are measured with one thread and are minima over many rounds,
so other processes disturb them less than they disturb medians.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from evenstep import SCALE, SPAM, AdaClip, AdaGN, StableSPAM, stabilize
from evenstep.bench.timing import busy_processors, last_level_cache
from evenstep.train.hardware import describe_hardware, versions

ROW = 256  # entries of a row, which is also a block of 8-bit moments


def adamw(p: Parameter) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p], lr=1e-3, fused=True)


# Name -> (the optimizer, bytes per parameter of passes that only read, bytes of passes that read and write).
STEPS: dict[str, tuple[Callable[[Parameter], Any], int, int]] = {
    "adamw_fused": (adamw, 0, 28),
    "stable_spam": (lambda p: StableSPAM([p]), 4, 28),
    "spam": (lambda p: SPAM([p], clip_start=0), 4, 28),
    "spam_density_25": (lambda p: SPAM([p], clip_start=0, density=0.25), 4, 16),
    "scale": (lambda p: SCALE([{"params": [p], "kind": "hidden"}]), 4, 12),
    "stable_spam_bf16": (lambda p: StableSPAM([p], state="bf16"), 4, 20),
    "stable_spam_int8": (lambda p: StableSPAM([p], state="int8"), 4, 16),
    "stabilize_adamw": (lambda p: stabilize(adamw(p), AdaClip(), AdaGN()), 4, 36),
}


def fastest(step: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of ``rounds`` calls."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - start)
    return best


def bandwidths(rounds: int) -> tuple[float, float]:
    """Bytes per second of a pass that reads, and of one that reads and writes in place (both directions counted)."""
    buffer = torch.ones(4 * last_level_cache(torch.device("cpu")) // 4)
    read = buffer.nbytes / fastest(buffer.sum, rounds)
    return read, 2 * buffer.nbytes / fastest(lambda: buffer.mul_(1.0), rounds)


def in_cache(make: Callable[[Parameter], Any], rounds: int) -> float:
    """Seconds per parameter of a step whose tensors stay in the second-level cache."""
    sizes = (1 << 14, 3 << 14)
    few, many = (_prepared(make, size) for size in sizes)
    best = {few: float("inf"), many: float("inf")}
    for _ in range(rounds):  # in turn, so that a slow phase of the machine meets both
        for step in (few, many):
            best[step] = min(best[step], fastest(step, 3))
    return (best[many] - best[few]) / (sizes[1] - sizes[0])


def _prepared(make: Callable[[Parameter], Any], size: int) -> Callable[[], object]:
    """The step of an optimizer over one parameter of ``size`` entries, after some steps."""
    p = Parameter(torch.randn(size // ROW, ROW))
    optimizer = make(p)
    p.grad = torch.randn_like(p) * 1e-3
    fastest(optimizer.step, 10)

    def step() -> None:
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=500, help="rounds of each measurement (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    gc.disable()
    busy = busy_processors()
    read, both = bandwidths(max(args.rounds // 10, 3))
    print(f"reads {read / 1e9:.1f} GB/s, reads and writes in place {both / 1e9:.1f} GB/s, one thread")
    if busy:
        print(f"other processes use {busy:.1f} processors")
    print(f"{'ns per parameter':<18} {'memory':>8} {'instructions':>13}  binds")
    rows = []
    for name, (make, bytes_read, bytes_both) in STEPS.items():
        memory, instructions = (bytes_read / read + bytes_both / both) * 1e9, in_cache(make, args.rounds) * 1e9
        binds = "memory" if memory > instructions else "instructions"
        print(f"{name:<18} {memory:8.2f} {instructions:13.2f}  {binds}")
        rows.append({"optimizer": name, "memory_ns": round(memory, 4), "instructions_ns": round(instructions, 4)})
    if args.json:
        facts = {"read_gb_per_s": round(read / 1e9, 2), "read_write_gb_per_s": round(both / 1e9, 2), "rows": rows}
        facts |= {"busy_processors": busy, "hardware": describe_hardware(torch.device("cpu")), "versions": versions()}
        args.json.write_text(json.dumps(facts | {"date": time.strftime("%Y-%m-%d %H:%M:%S%z")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
