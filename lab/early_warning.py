"""python -m lab.early_warning: how long before the loss moves does a warning come?

For each seed a small LLaMA is trained twice on the King James Bible with AdamW: once calmly, and once with a learning
rate that is raised from some step on, a little in each step, until attention logits grow. Both runs have the telemetry
of `evenstep pretrain` with its defaults. Printed are the step of the first warning and the steps at which the loss
moves, by three measures:

* rise: the mean loss of the last 50 steps is 0.2 nats above its lowest value so far;
* blip: the same with a mean of 20 steps, whose own noise is near 0.05 nats;
* twin: the mean loss of the last 20 steps is 0.2 nats above that of the calm run at the same step;
* event: the event ``loss_spike`` of the telemetry, 7 standard deviations above the mean of the last 1000 steps.

The rate alone makes the loss of the raised run worse than that of its twin, long before anything is unstable; the rise
is the measure of an instability. The calm run must have no warning. The exit status is 1 if it has one, or if the first
warning of the other comes later than 50 steps before the rise.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from evenstep import SpikeMonitor
from evenstep.data import BatchLoader, DataSpec, prepare
from evenstep.models import Llama, llama_config
from evenstep.telemetry.lines import event_line
from lab.common import status

AHEAD = 50
"""Steps by which a warning must precede the rise of the loss."""

MOVED = 0.2
"""Nats by which a loss has moved."""

SLOW, QUICK = 50, 20
"""Steps over which a loss is averaged: batches of 512 tokens are noisy."""


@dataclass
class Setting:
    """A run: the learning rate is ``lr`` after ``warmup`` steps and, with a ``factor`` above 1, grows from step
    ``start`` on, by this factor in every ``ramp`` steps."""

    steps: int = 650
    lr: float = 1e-3
    warmup: int = 20
    start: int = 150
    ramp: int = 500
    factor: float = 1.0
    batch_size: int = 8
    seq_len: int = 64
    size: str = "tiny"
    activations: int = 20

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""
        return self.lr * min(1.0, step / self.warmup) * self.factor ** max(0.0, (step - self.start) / self.ramp)


@dataclass
class Result:
    """Losses of every step, and the records of the telemetry."""

    losses: list[float] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def close(self) -> None:
        """Required of a sink."""

    def first(self, event: str) -> dict[str, Any] | None:
        """The first event of a kind."""
        return next((record for record in self.records if record.get("event") == event), None)

    def warnings(self) -> list[dict[str, Any]]:
        return [record for record in self.records if record.get("event") == "warning"]

    def smooth(self, n: int) -> list[float]:
        """Mean loss of the last ``n`` steps, for each step; infinity before there are so many."""
        means = [math.inf] * min(n - 1, len(self.losses))
        return means + [sum(self.losses[i - n : i]) / n for i in range(n, len(self.losses) + 1)]


def train(setting: Setting, seed: int, corpus: DataSpec) -> Result:
    """Train one model; ends early when the loss is no longer finite."""
    data = prepare(corpus)
    torch.manual_seed(seed)
    model = Llama(llama_config(setting.size, data.tokenizer.vocab_size, max_seq_len=setting.seq_len))
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, betas=(0.9, 0.95), weight_decay=0.0)
    loader = BatchLoader(data.train, batch_size=setting.batch_size, seq_len=setting.seq_len, seed=seed)
    result = Result()
    with SpikeMonitor(model, optimizer, sinks=result, say=None, activations=setting.activations) as monitor:
        for step in range(1, setting.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = setting.rate(step)
            inputs, targets = loader.next_batch()
            loss = model.loss(inputs, targets)
            loss.backward()
            monitor.observe(loss, step=step)
            optimizer.step()
            optimizer.zero_grad()
            result.losses.append(loss.item())
            if not math.isfinite(result.losses[-1]):
                break
    return result


def rise(result: Result, n: int) -> int | None:
    """The first step at which the mean loss of ``n`` steps is `MOVED` above its lowest value so far."""
    lowest = math.inf
    for step, loss in enumerate(result.smooth(n), 1):
        if loss > lowest + MOVED and math.isfinite(lowest):
            return step
        lowest = min(lowest, loss)
    return None


def above(result: Result, calm: Result) -> int | None:
    """The first step at which the smooth loss is `MOVED` above that of the calm run."""
    both = zip(result.smooth(QUICK), calm.smooth(QUICK), strict=False)
    return next((step for step, (loss, other) in enumerate(both, 1) if loss > other + MOVED), None)


def study(seeds: list[int], calm: Setting, raised: Setting, corpus: DataSpec) -> list[dict[str, Any]]:
    """One row of numbers for each seed."""
    rows = []
    for seed in seeds:
        twin, result = (train(setting, seed, corpus) for setting in (calm, raised))
        warning, event = result.first("warning"), result.first("loss_spike")
        rows.append(
            {
                "seed": seed,
                "calm_warnings": [event_line(one) for one in twin.warnings()],
                "warning": warning and warning["step"],
                "warnings": [event_line(one) for one in result.warnings()],
                "rise": rise(result, SLOW),
                "blip": rise(result, QUICK),
                "twin": above(result, twin),
                "event": event and event["step"],
                "calm_loss": twin.smooth(QUICK)[-1],
                "losses": result.losses,
            }
        )
    return rows


def passed(row: dict[str, Any]) -> bool:
    """Whether a row keeps the promise: no warning in the calm run, and one in time in the other."""
    moved = row["rise"] is None or (row["warning"] is not None and row["rise"] - row["warning"] >= AHEAD)
    return not row["calm_warnings"] and row["warning"] is not None and moved


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m lab.early_warning", description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=650, help="of the raised run (default: %(default)s)")
    parser.add_argument("--calm", type=int, default=400, help="steps of the calm run (default: %(default)s)")
    parser.add_argument("--factor", type=float, default=1000.0, help="of the learning rate (default: %(default)s)")
    parser.add_argument("--ramp", type=int, default=500, help="in this number of steps (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(arguments)
    kept = True

    def work() -> None:
        nonlocal kept
        raised = Setting(steps=args.steps, factor=args.factor, ramp=args.ramp)
        corpus, rows = DataSpec(source="kjv", vocab_size=2048), []
        for seed in range(args.seeds):
            (row,) = study([seed], Setting(steps=args.calm), raised, corpus)
            rows.append(row)
            kept = kept and passed(row)
            numbers = ", ".join(f"{key} {row[key] or 'never'}" for key in ("warning", "rise", "blip", "twin", "event"))
            calm = "; ".join(row["calm_warnings"]) or "no warning"
            print(f"seed {seed}: {numbers}; calm run: {calm}, loss {row['calm_loss']:.3f}", flush=True)
            print("\n".join(f"  {line}" for line in row["warnings"][:6]), flush=True)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1) + "\n")

    return status(work) or (0 if kept else 1)


if __name__ == "__main__":
    sys.exit(main())
