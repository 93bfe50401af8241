"""What one spike does to a training: the picture of the README, docs/one-spike.png, and its numbers.

    python benchmarks/one_spike.py            trains (half a minute), writes the numbers and the picture
    python benchmarks/one_spike.py --draw     draws the picture from the stored numbers

A LLaMA of 0.4M parameters reads the King James Bible for 200 steps; at step 145 (144 counted from 0) every gradient is
multiplied by 1000. This is the case "all, loss x 1" of the task "gradient" of the stability suite, seed 0, with the
learning rates that the suite has tuned on undisturbed training (docs/stability.md has all remedies and three seeds).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from evenstep.stability import trial
from evenstep.stability.remedies import REMEDIES
from evenstep.stability.tasks import FAMILIES, TASKS
from evenstep.train.hardware import commit, describe_hardware, versions

ROOT = Path(__file__).parents[1]
RATES = ROOT / "benchmarks" / "results" / "stability" / "cells.jsonl"
NUMBERS = ROOT / "benchmarks" / "results" / "2026-11-29-one-spike-cpu.json"
PICTURE = ROOT / "docs" / "one-spike.png"
SHOWN = {
    "Adam": ("AdamW", "tab:red"),
    "Stable-SPAM .7/.9": ("StableSPAM", "tab:blue"),
    "Adam + guard: skip": ("AdamW with SpikeGuard", "tab:green"),
}
"""Remedy of the suite -> its label and its colour in the picture."""

EVERY = 4  # steps between two validations


def tuned_rate(remedy: str) -> float:
    """The learning rate of a remedy in the stored runs of the task."""
    for line in RATES.read_text(encoding="utf-8").splitlines():
        setting = json.loads(line)["summary"]["setting"]
        if setting.get("task") == "gradient" and setting["remedy"]["name"] == remedy:
            return float(setting["lr"])
    raise SystemExit(f"{RATES} has no run of {remedy}")


def measure() -> dict[str, Any]:
    """Train each remedy with the spike and without it."""
    trial.EVERY = EVERY
    [task] = [task for task in TASKS if task.name == "gradient"]
    [variant] = [variant for variant in task.variants if variant.name == "all, loss x 1"]
    runs = {}
    for remedy in (remedy for remedy in REMEDIES if remedy.name in SHOWN):
        lr = tuned_rate(remedy.name)
        spiked, calm = (
            trial.train(FAMILIES[task.family], each, remedy, lr, seed=0)
            for each in (variant, dataclasses.replace(variant, fault=""))
        )
        runs[remedy.name] = {"lr": lr, "spiked": dataclasses.asdict(spiked), "calm": dataclasses.asdict(calm)}
        print(f"{remedy.name:20} {spiked.loss:.3f} with the spike, {calm.loss:.3f} without, {spiked.actions}")
    hardware = describe_hardware(torch.device("cpu"))
    return {"every": EVERY, "runs": runs, "commit": commit(), "hardware": hardware, "versions": versions()}


def draw(numbers: dict[str, Any], picture: Path) -> None:
    """Validation loss over steps, one line for each remedy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, (label, color) in SHOWN.items():
        run = numbers["runs"][name]["spiked"]
        steps = [numbers["every"] * (i + 1) for i in range(len(run["curve"]))]
        axes.plot(steps, run["curve"], color=color, label=f"{label}, ends at {run['loss']:.2f}", linewidth=1.8)
        at = run["fault"] + 1  # the suite counts steps from 0
    axes.axvline(at, color="gray", linestyle=":", linewidth=1)
    axes.text(at - 1.5, 4.63, f"step {at}:\none gradient x 1000", ha="right", color="dimgray")
    axes.set(xlabel="step", ylabel="validation loss (nats per token)", ylim=(4.6, 5.6), xlim=(60, 200))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="draw the picture from the stored numbers")
    if not parser.parse_args().draw:
        NUMBERS.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    draw(json.loads(NUMBERS.read_text(encoding="utf-8")), PICTURE)
