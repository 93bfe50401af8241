"""python -m lab.calm: does a guard leave calm runs alone?

Twenty small LLaMAs are trained for 400 steps on the King James Bible with a guard on the whole ladder: four optimizers
at five settings of learning rate, batch size, clipping and schedule. None of these runs diverges, so each action of the
guard is a false alarm. The numbers that the guard judges (the loss and the gradient norms of every step) are written to
a file, so that a test can judge them again without training.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from evenstep.train.config_io import load_config
from evenstep.train.log import print_nothing
from evenstep.train.trainer import Trainer
from lab.common import status

OPTIMIZERS = {"adamw": 1e-3, "stable_spam": 2e-3, "spam": 1e-3, "scale": 5e-4}
"""Name -> learning rate."""

SETTINGS: list[dict[str, str]] = [
    {},
    {"train.clip_norm": "1.0", "train.batch_size": "4"},
    {"schedule.name": "constant", "train.seq_len": "32"},
    {"model.qk_norm": "true", "optim.weight_decay": "0.1"},
    {"schedule.warmup_steps": "0", "train.dtype": "fp32", "train.batch_size": "16"},
]
"""Options of a run, besides those of all runs."""

STEPS = 400


def calm_run(name: str, options: dict[str, str], seed: int, out: Path) -> tuple[np.ndarray[Any, Any], list[Any], float]:
    """The numbers that the guard judged in each step, ``[STEPS, 2 + k]`` for ``k`` parameters; its events; and the last
    loss."""
    given = {
        "data.source": "kjv", "data.vocab_size": "1024", "model.size": "tiny", "optim.name": name,
        "optim.lr": str(OPTIMIZERS[name]), "train.steps": str(STEPS), "train.batch_size": "8", "train.seq_len": "64",
        "train.threads": "1", "eval.every": "0", "checkpoint.every": "0", "log.every": "100", "log.curve": "false",
        "sample.tokens": "0", "telemetry.enabled": "false", "guard.ladder": "all", "seed": str(seed), "out": str(out),
    } | options  # fmt: skip
    run = Trainer(load_config(None, list(given.items())), say=print_nothing)
    assert run.guard is not None
    judged, measure = [], run.guard._numbers

    def recorded(loss: Any) -> Any:
        judged.append(measure(loss))
        return judged[-1]

    run.guard._numbers = recorded  # type: ignore[method-assign]
    loss = float("nan")
    while run.step_number < STEPS:
        loss = run.step().loss.item()
    return np.stack([numbers.numpy() for numbers in judged]), list(run.guard.events), loss


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m lab.calm", description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, help="write the numbers to this .npz file")
    args = parser.parse_args(arguments)
    alarms = 0

    def work() -> None:
        nonlocal alarms
        found = {}
        for place, options in enumerate(SETTINGS):
            for name in OPTIMIZERS:
                with tempfile.TemporaryDirectory() as out:
                    numbers, events, loss = calm_run(name, options, place, Path(out) / "run")
                found[f"{name}-{place}"] = numbers.astype(np.float16)
                alarms += len(events)
                said = "; ".join(f"step {event['step']}: {event['reason']}" for event in events[:3]) or "no action"
                print(f"{name} {options or 'defaults'}: last loss {loss:.3f}, {said}", flush=True)
        if args.write:
            np.savez_compressed(args.write, **found)  # type: ignore[arg-type]

    return status(work) or (1 if alarms else 0)


if __name__ == "__main__":
    sys.exit(main())
