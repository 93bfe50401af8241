"""The cost of telemetry: the time in the monitor's hooks, relative to the time of a training step.

    python benchmarks/telemetry_cost.py [--size 60m] [--steps 60] [--json FILE]
    python benchmarks/telemetry_cost.py --size 9m --activations 25

A difference of one per cent between two trainings is below the noise of a machine. So the hooks themselves are timed,
including every drain, around steps of the optimizer alone, whose pass over gradients, weights and moments leaves the
caches as training does. The training step (8 x 256 random tokens, fp32, forward, backward and fused AdamW) is timed
without telemetry; its forward and backward pass dominate, whatever the optimizer.

``--activations ROUNDS`` measures instead the early warnings: whole training steps, in turn with and without the
measurements of the forward pass, and the median of the ratio of the two steps of a round.
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
from evenstep.telemetry.activations import ActivationProbe
from evenstep.telemetry.sinks import JsonlSink
from evenstep.telemetry.trouble import Troubles
from evenstep.train.config import TelemetryConfig
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


def activations_cost(model: Llama, rounds: int, every: int) -> dict[str, float]:
    """Medians over ``rounds`` of a measured step relative to a step of a model without hooks, and of the seconds of
    processor time of the latter; ``share`` is the cost of a step where one in ``every`` is measured."""
    optimizer = OPTIMIZERS["AdamW(fused=True)"](model)
    ratios, seconds = [], []

    def step(tokens: torch.Tensor, probe: ActivationProbe | None) -> float:
        start = time.process_time()  # other programs on the machine do not count
        if probe is not None:
            probe.arm()
        model.loss(tokens[:, :-1], tokens[:, 1:], chunk=256).backward()
        optimizer.step()
        optimizer.zero_grad()
        if probe is not None and probe.take() is None:
            raise RuntimeError("nothing was measured")
        return time.process_time() - start

    for i in range(rounds + 1):
        tokens = torch.randint(model.config.vocab_size, (8, model.config.max_seq_len + 1))
        pair = {}
        for measured in (i % 2 == 0, i % 2 == 1):  # the order alternates
            probe = ActivationProbe(model, Troubles("benchmark")) if measured else None
            pair[measured] = step(tokens, probe)
            if probe is not None:
                probe.close()
        if i:  # the first round warms up
            ratios.append(pair[True] / pair[False])
            seconds.append(pair[False])
    ratio = statistics.median(ratios)
    return {"ratio": ratio, "share": (ratio - 1) / every, "seconds": statistics.median(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="60m")
    parser.add_argument("--steps", type=int, default=60, help="of each optimizer (default: %(default)s)")
    parser.add_argument("--activations", metavar="ROUNDS", type=int, help="measure the early warnings instead")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.activations:
        every = TelemetryConfig().activations
        cost = activations_cost(Llama(llama_config(args.size, vocab_size=4096)), args.activations, every)
        print(
            f"{args.size}: a measured step takes {cost['ratio']:.3f} times as long as one of {cost['seconds']:.3f} s, "
            f"one in {every}: {cost['share']:.2%} a step"
        )
        return
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
