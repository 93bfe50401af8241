"""Final validation loss of optimizers in high and low precision at equal tokens: a learning-rate sweep with one seed,
then longer runs with more seeds at the best rate for the cells that carry the claims.

    python benchmarks/compare_lowbit.py --out runs/lowbit --jobs 2
    python benchmarks/compare_lowbit.py --out runs/lowbit --long-tokens 1M     # the second part, after the first

Each cell is one `evenstep pretrain` run in a process of its own with one thread. A finished run (one with a
summary.json) is not repeated and a stopped one is resumed, so the comparison can be stopped and started again. Writes
results.json and prints two tables: losses by rate, and mean and spread over the seeds. benchmarks/lowbit_results.py
makes the page and the pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

OPTIMIZERS = {
    "adamw": ["--optim.name", "adamw"],
    "adamw + clip": ["--optim.name", "adamw", "--train.clip_norm", "1.0"],
    "spam": ["--optim.name", "spam", "--optim.reset_interval", "100", "--optim.warmup_steps", "30"],
    "stable_spam": ["--optim.name", "stable_spam"],
}
# The gammas of the paper: for 16 and more bits, and for 4.
GAMMAS = {
    True: ["--optim.gamma1", "0.85", "--optim.gamma2", "0.99999"],
    False: ["--optim.gamma1", "0.7", "--optim.gamma2", "0.9"],
}
HIGH = ("fp32", "bf16")
PRECISIONS = ("fp32", "bf16", "int4", "fp4", "nvfp4", "fp4-official")
LOW = ("int4", "fp4", "nvfp4")
CLAIMS = (
    *(("adamw", "bf16"), ("adamw", "fp32"), ("adamw + clip", "fp32"), ("stable_spam", "fp32")),
    *((name, low) for low in LOW for name in ("adamw", "stable_spam")),
)
BASE = [
    *["--data.source", "kjv", "--data.vocab_size", "2048", "--model.size", "tiny", "--train.batch_size", "8"],
    *["--train.seq_len", "128", "--eval.every", "0", "--checkpoint.every", "100", "--checkpoint.keep", "1"],
    *["--log.every", "20", "--sample.tokens", "0"],
]


def flags(optimizer: str, precision: str) -> list[str]:
    words = list(OPTIMIZERS[optimizer])
    if optimizer == "stable_spam":
        words += GAMMAS[precision in HIGH]
    if precision == "bf16":
        return [*words, "--train.dtype", "bf16-autocast"]
    return words if precision == "fp32" else [*words, "--lowbit", precision]


def run(out: Path, optimizer: str, precision: str, lr: float, seed: int, tokens: str, extra: list[str]) -> dict:
    """One training run, or what is stored of it; a loss of NaN where it diverged."""
    name = re.sub(r"[^\w.-]+", "-", f"{optimizer}-{precision}-lr{lr:g}-seed{seed}-{tokens}")
    cell = out / name
    summary = cell / "summary.json"
    if not summary.exists():
        out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "evenstep", "pretrain"]
        if (cell / "checkpoints").is_dir():
            command += ["--resume", str(cell)]
        else:
            command += ["--out", str(cell), "--seed", str(seed), "--optim.lr", str(lr), "--train.tokens", tokens]
            command += [*flags(optimizer, precision), *extra]
        with (out / f"{name}.log").open("a") as log:
            subprocess.run(command, stdout=log, stderr=log, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    loss = json.loads(summary.read_text())["val_loss"] if summary.exists() else None
    row = {
        **{"optimizer": optimizer, "precision": precision, "lr": lr, "seed": seed, "tokens": tokens},
        "val_loss": math.nan if loss is None else loss,
    }
    print(f"{optimizer:14}{precision:14} lr {lr:<8g} seed {seed}  {tokens:>6}  loss {row['val_loss']:.4f}", flush=True)
    return row


def best_rate(rows: list[dict], optimizer: str, precision: str) -> float | None:
    cells = [
        r for r in rows if (r["optimizer"], r["precision"]) == (optimizer, precision) and r["val_loss"] == r["val_loss"]
    ]
    return min(cells, key=lambda r: r["val_loss"])["lr"] if cells else None


def print_sweep(rows: list[dict], rates: list[float]) -> None:
    print(
        "\n| optimizer | precision | "
        + " | ".join(f"lr {lr:g}" for lr in rates)
        + " | best |\n|---|---|"
        + "---|" * (len(rates) + 1)
    )
    for optimizer, precision in dict.fromkeys((r["optimizer"], r["precision"]) for r in rows):
        loss = {r["lr"]: r["val_loss"] for r in rows if (r["optimizer"], r["precision"]) == (optimizer, precision)}
        best = best_rate(rows, optimizer, precision)
        cells = " | ".join(f"{loss[lr]:.3f}" for lr in rates)
        print(f"| {optimizer} | {precision} | {cells} | {'-' if best is None else f'{best:g}'} |")


def print_seeds(rows: list[dict]) -> None:
    print("\n| optimizer | precision | lr | mean | least | most | seeds |\n|---|---|---|---|---|---|---|")
    for optimizer, precision in dict.fromkeys((r["optimizer"], r["precision"]) for r in rows):
        cells = [r for r in rows if (r["optimizer"], r["precision"]) == (optimizer, precision)]
        losses = [r["val_loss"] for r in cells]
        numbers = " | ".join(f"{f(losses):.4f}" for f in (statistics.mean, min, max))
        print(f"| {optimizer} | {precision} | {cells[0]['lr']:g} | {numbers} | {len(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/lowbit"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    parser.add_argument("--tokens", default="250K", help="tokens of a cell of the sweep (default 250K)")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3])
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--precisions", nargs="+", default=[p for p in PRECISIONS if p != "bf16"], choices=PRECISIONS)
    parser.add_argument("--long-tokens", help="then train the cells of the claims for so many tokens (such as 1M)")
    parser.add_argument("--seeds", type=int, default=3, help="of the long runs (default 3)")
    args, extra = parser.parse_known_args()
    words = BASE + extra  # the last word on an option counts
    cells = [(o, p) for p in args.precisions for o in args.optimizers if p != "fp4-official" or "adamw" in o]
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(run, args.out, o, p, lr, 0, args.tokens, words) for o, p in cells for lr in args.rates]
        rows = [job.result() for job in jobs]
        long: list[dict] = []
        if args.long_tokens:
            # Training in bf16 autocast takes the rate that was best in fp32.
            rates = {(o, p): best_rate(rows, o, "fp32" if p == "bf16" else p) for o, p in CLAIMS}
            chosen = [(o, p, lr, seed) for (o, p), lr in rates.items() if lr for seed in range(args.seeds)]
            jobs = [pool.submit(run, args.out, o, p, lr, seed, args.long_tokens, words) for o, p, lr, seed in chosen]
            long = [job.result() for job in jobs]
    (args.out / "results.json").write_text(json.dumps({"sweep": rows, "long": long}, indent=1) + "\n")
    print_sweep(rows, args.rates)
    if long:
        print_seeds(long)


if __name__ == "__main__":
    main()
