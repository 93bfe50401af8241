"""How the time of a training step is spent, and what a second process costs.

    python benchmarks/breakdown.py [--sizes tiny 9m 60m 130m] [--only one|two] [--mode ddp|fsdp] [--json FILE]

One step is 8 x 256 tokens a process in fp32, one thread each, AdamW (fused), vocabularies of 32000 (tiny: 2048).

``one``: one process alternates between `Run.step` of a real run with ``train.compile`` (including data and telemetry)
and the bare step that is its lower bound: forward, backward and fused AdamW of the same compiled model on tokens in
memory. MFU is the model's FLOPs (6 N and attention) over the best rate of this core for a product of two 1024 x 1024
fp32 matrices, measured between the steps.

``two``: two processes alternate between separate runs, one each, and one run of both over gloo. The share of
communication is the additional time of the common step.

Large sizes take minutes. ``--only``, ``--rounds`` and ``--steps`` measure parts; ``--json`` adds each row to the file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from throughput import BATCH, LENGTH, VOCABULARY, surroundings

from evenstep.models import Llama, llama_config
from evenstep.train.config_io import load_config
from evenstep.train.distributed import open_world
from evenstep.train.log import print_nothing
from evenstep.train.trainer import Run


def configured(size: str, out: Path, batch: int, compiled: bool, **more: str) -> Any:
    given = {
        "data.source": "stdlib",
        "data.vocab_size": str(VOCABULARY.get(size, 32000)),
        "model.size": size,
        "optim.name": "adamw",
        "train.steps": "100000",
        "train.batch_size": str(batch),
        "train.seq_len": str(LENGTH),
        "train.compile": str(compiled).lower(),
        "train.threads": "1",
        "out": str(out),
        **more,
    }
    return load_config(None, list(given.items()))


def bare(run: Run, compiled: bool) -> Any:
    """The lower bound of ``run``'s step: the same shapes and kernels, and nothing else."""
    config = run.model.config
    model = Llama(llama_config(run.config.model.size, config.vocab_size, max_seq_len=LENGTH))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    if compiled:
        for block in model.model.layers:
            block.compile(dynamic=False)
    tokens = torch.randint(config.vocab_size, (BATCH, LENGTH + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        model.loss(inputs, targets, chunk=run.chunk).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def gemm_peak() -> float:
    """FLOP/s of the fastest of 30 products of two 1024 x 1024 fp32 matrices."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = min(timed(lambda: torch.mm(a, b)) for _ in range(30))
    return 2 * 1024**3 / best


def timed(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def one(size: str, place: Path, args: argparse.Namespace) -> dict[str, Any]:
    run = Run(configured(size, place / f"one-{size}", BATCH, args.compile), say=print_nothing)
    floor = bare(run, args.compile)
    spent = {"optimizer": 0.0}
    real = run.optimizer.step

    def optimizer_step(*given: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = real(*given, **options)
        spent["optimizer"] += time.perf_counter() - began
        return result

    for _ in range(args.warmup):
        run.step()
        floor()
    run.optimizer.step = optimizer_step  # type: ignore[method-assign]
    run.window = run.new_window()
    ours, theirs, peaks = [], [], []
    for _ in range(args.rounds):
        ours.append(timed(run.step))
        theirs.append(timed(floor))
        peaks.append(gemm_peak())
    step, peak = statistics.median(ours), max(peaks)
    return {
        "size": size,
        "tokens_per_second": round(BATCH * LENGTH / step),
        "ratio_to_bare_step": round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3),
        "mfu": round(run.model.flops_per_token(LENGTH) * BATCH * LENGTH / step / peak, 3),
        "gemm_peak_gflops": round(peak / 1e9, 1),
        "seconds_per_step": round(step, 4),
        "data_share": round(run.window.data_seconds / sum(ours), 4),
        "optimizer_share": round(spent["optimizer"] / sum(ours), 4),
    }


def worker(rank: int, size: str, place: str, args: argparse.Namespace, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    config = configured(size, Path(place) / f"two-{size}", 2 * BATCH, args.compile, **{"parallel.mode": args.mode})
    alone = Run(configured(size, Path(place) / f"alone-{size}-{rank}", BATCH, args.compile), say=print_nothing)
    with open_world(config) as world:
        both = Run(config, world=world, say=print_nothing)
        for run in (alone, both) * args.warmup:
            run.step()
        found: dict[str, list[float]] = {"alone": [], "both": []}
        for _ in range(args.rounds):
            for name, run in (("alone", alone), ("both", both)):
                dist.barrier()
                found[name].append(timed(lambda run=run: [run.step() for _ in range(args.steps)]) / args.steps)
        every: list[Any] = [None, None]
        dist.all_gather_object(every, found)
        if rank == 0:
            summed, together = [], []
            for mine, other in zip(*(each["alone"] for each in every), strict=True):
                summed.append(BATCH * LENGTH / mine + BATCH * LENGTH / other)
            for mine, other in zip(*(each["both"] for each in every), strict=True):
                together.append(2 * BATCH * LENGTH / max(mine, other))
            ratio = statistics.median(b / a for a, b in zip(summed, together, strict=True))
            result = {
                "size": size,
                "mode": args.mode,
                "two_alone_tokens_per_second": round(statistics.median(summed)),
                "two_together_tokens_per_second": round(statistics.median(together)),
                "together_over_alone": round(ratio, 3),
                "communication_share": round(1 - ratio, 3),
            }
            (Path(place) / f"two-{size}.json").write_text(json.dumps(result))


def two(size: str, place: Path, args: argparse.Namespace) -> dict[str, Any]:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(worker, (size, str(place), args, port), nprocs=2)
    return json.loads((place / f"two-{size}.json").read_text())


def add(rows: list[dict[str, Any]], part: str, row: dict[str, Any], args: argparse.Namespace) -> None:
    """Add ``row``, in place of an earlier row of the same kind."""
    kind = {"part": part, "size": row["size"], "compiled": args.compile}
    kind |= {"mode": args.mode} if part == "two" else {}
    rows[:] = [other for other in rows if any(other.get(key) != value for key, value in kind.items())]
    steps = {"rounds": args.rounds} | ({"steps_per_round": args.steps} if part == "two" else {})
    rows.append({**kind, **row, **steps, **surroundings(1)})
    print(json.dumps(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["tiny", "9m"], help="named sizes (default: tiny 9m)")
    parser.add_argument("--rounds", type=int, default=12, help="timed rounds of each part (default: 12)")
    parser.add_argument("--steps", type=int, default=4, help="two: steps of a round (default: 4)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before timing (default: 2)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave the blocks uncompiled")
    parser.add_argument("--only", choices=("one", "two"), help="measure one of the two parts only")
    parser.add_argument("--mode", choices=("ddp", "fsdp"), default="ddp", help="two: parallel.mode (default: ddp)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the rows to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(args.json.read_text())["rows"] if args.json and args.json.exists() else []
    with tempfile.TemporaryDirectory() as place:
        for size in args.sizes:
            for name, part in (("one", one), ("two", two)):
                if args.only in (None, name):
                    add(rows, name, part(size, Path(place), args), args)


if __name__ == "__main__":
    sys.exit(main())
