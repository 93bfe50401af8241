"""Final validation loss of the optimizers at equal tokens: a learning-rate sweep with one seed, then more seeds at the
best rate.

    python benchmarks/compare_optimizers.py --out runs/compare --jobs 2

Each cell is one `evenstep pretrain` run in a process of its own with one thread. A finished run (one with a
summary.json) is not repeated, so the comparison can be stopped and started again. Writes results.json and prints a
table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

OPTIMIZERS = {
    "stable_spam": ["--optim.name", "stable_spam", "--optim.gamma1", "0.85", "--optim.gamma2", "0.99999"],
    "stable_spam, reset 100": [
        *["--optim.name", "stable_spam", "--optim.gamma1", "0.85", "--optim.gamma2", "0.99999"],
        *["--optim.reset_interval", "100"],
    ],
    "spam": ["--optim.name", "spam", "--optim.reset_interval", "100", "--optim.warmup_steps", "30"],
    "scale": ["--optim.name", "scale"],
    "adamw + norm clip 1.0": ["--optim.name", "adamw", "--train.clip_norm", "1.0"],
}


def run(out: Path, name: str, lr: float, seed: int, steps: int, extra: list[str]) -> dict:
    """One training run (or its stored summary)."""
    cell = out / f"{name.replace(' ', '').replace(',', '-')}-lr{lr:g}-seed{seed}-{steps}"
    summary = cell / "summary.json"
    if not summary.exists():
        cell.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "evenstep", "pretrain", "--out", str(cell), "--seed", str(seed)]
        if cell.exists():
            command = [*command[:4], "--resume", str(cell)]
        else:
            command += ["--optim.lr", str(lr), "--train.steps", str(steps), *OPTIMIZERS[name], *extra]
        with (cell.parent / f"{cell.name}.log").open("a") as log:
            subprocess.run(command, stdout=log, stderr=log, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    loss = json.loads(summary.read_text())["val_loss"] if summary.exists() else float("nan")
    print(f"{name:24} lr {lr:g}  seed {seed}  validation loss {loss:.4f}", flush=True)
    return {"optimizer": name, "lr": lr, "seed": seed, "steps": steps, "val_loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of 8 x 256 tokens (default 400)")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3])
    parser.add_argument("--seeds", type=int, default=3)
    args, extra = parser.parse_known_args()
    extra = extra or [
        *["--data.source", "kjv", "--data.vocab_size", "2048", "--model.size", "tiny", "--train.batch_size", "8"],
        *["--train.seq_len", "256", "--eval.every", "100", "--checkpoint.every", "100000", "--log.every", "50"],
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        sweep = [pool.submit(run, args.out, name, lr, 0, args.steps, extra) for lr in args.rates for name in OPTIMIZERS]
        rows = [job.result() for job in sweep]
        best = {
            name: min((row for row in rows if row["optimizer"] == name), key=lambda row: row["val_loss"])["lr"]
            for name in OPTIMIZERS
        }
        more = [
            pool.submit(run, args.out, name, best[name], seed, args.steps, extra)
            for seed in range(1, args.seeds)
            for name in OPTIMIZERS
        ]
        rows += [job.result() for job in more]
    (args.out / "results.json").write_text(json.dumps(rows, indent=1))
    print("\n| optimizer | best lr | " + " | ".join(f"lr {lr:g}" for lr in args.rates) + " | mean at best | spread |")
    print("|---|---|" + "---|" * (len(args.rates) + 2))
    for name in OPTIMIZERS:
        cells = {row["lr"]: row["val_loss"] for row in rows if row["optimizer"] == name and row["seed"] == 0}
        seeds = [row["val_loss"] for row in rows if row["optimizer"] == name and row["lr"] == best[name]]
        swept = " | ".join(f"{cells[lr]:.3f}" for lr in args.rates)
        print(f"| {name} | {best[name]:g} | {swept} | {statistics.mean(seeds):.4f} | {max(seeds) - min(seeds):.4f} |")


if __name__ == "__main__":
    main()
