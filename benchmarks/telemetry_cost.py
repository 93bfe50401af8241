"""The cost of telemetry: the time in the monitor's hooks, relative to the time of a training step.

    python benchmarks/telemetry_cost.py [--size 60m] [--steps 60] [--json FILE]

A difference of one per cent between two trainings is below the noise of a machine. So the hooks themselves are timed,
including every drain, around steps of the optimizer alone, whose pass over gradients, weights and moments leaves the
caches as training does. The training step (8 x 256 random tokens, fp32, forward, backward and fused AdamW) is timed
without telemetry; its forward and backward pass dominate, whatever the optimizer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from evenstep import SPAM, SpikeMonitor, StableSPAM
from evenstep.models import Llama, llama_config
from evenstep.telemetry.sinks import JsonlSink
from evenstep.train.hardware import commit, describe_hardware

OPTIMIZERS: dict[str, Callable[[Llama], torch.optim.Optimizer]] = {
    "StableSPAM": lambda model: StableSPAM(model.parameters(), lr=1e-3),
    "SPAM": lambda model: SPAM(model.parameters(), lr=1e-3),
    "AdamW(fused=True)": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
}
WARMUP = 10  # up to the first drain, which reads all weights


class Timed(SpikeMonitor):
    """Measures the seconds that each step spends in the monitor."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.seconds: list[float] = []
        super().__init__(*args, **options)

    def _before(self, *rest: Any) -> None:
        start = time.perf_counter()
        super()._before(*rest)
        self.seconds.append(time.perf_counter() - start)

    def _after(self, *rest: Any) -> None:
        start = time.perf_counter()
        super()._after(*rest)
        self.seconds[-1] += time.perf_counter() - start


def training_step(model: Llama, steps: int) -> float:
    """Median seconds of a step over ``steps``; the gradients are kept."""
    optimizer = OPTIMIZERS["AdamW(fused=True)"](model)
    seconds = []
    for _ in range(steps + 1):
        tokens = torch.randint(model.config.vocab_size, (8, 257))
        start = time.perf_counter()
        optimizer.zero_grad()
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def monitor_cost(model: Llama, name: str, steps: int) -> tuple[float, float]:
    """Seconds that a step spends in the monitor: mean over ``steps`` (with drains and files), and median."""
    optimizer = OPTIMIZERS[name](model)
    with tempfile.TemporaryDirectory() as place:
        sink = JsonlSink(Path(place) / "metrics.jsonl")
        with Timed(model, optimizer, sinks=[sink], say=None) as monitor:
            for _ in range(WARMUP + steps):
                monitor.observe(3.0)
                optimizer.step()
    seconds = monitor.seconds[WARMUP:]
    return statistics.mean(seconds), statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="60m")
    parser.add_argument("--steps", type=int, default=60, help="of each optimizer (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = Llama(llama_config(args.size, vocab_size=32000))
    whole = training_step(model, 3)
    rows = []
    for name in OPTIMIZERS:
        mean, median = monitor_cost(model, name, args.steps)
        rows.append({"optimizer": name, "ms": 1e3 * mean, "median_ms": 1e3 * median, "share": mean / whole})
        print(f"{name:18} {1e3 * mean:6.1f} ms a step (median {1e3 * median:.1f}), {mean / whole:.2%} of {whole:.2f} s")
    if args.json:
        device = torch.device("cpu")
        facts = {"size": args.size, "step_seconds": whole, "hardware": describe_hardware(device), "commit": commit()}
        args.json.write_text(json.dumps({"rows": rows, **facts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
