"""What low-bit training costs: a training step with each recipe against the plain fp32 model of the same shape.

    python benchmarks/lowbit_overhead.py [--compile] [--sizes tiny 9m] [--recipes fp4 int4 nvfp4] [--json FILE]

One step is forward, backward and fused AdamW on 8 x 256 tokens, vocabulary 2048 (a larger head would hide the cost),
fp32. All contestants live in one process and take turns, so that a busy machine slows all of them alike; a ratio is the
median over rounds of low-bit time by plain time of the same round. "kept" is what autograd saves for the backward pass
besides the parameters, each storage counted once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from throughput import surroundings

from evenstep import quantize_
from evenstep.lowbit import RECIPES
from evenstep.models import Llama, llama_config

BATCH, LENGTH, VOCABULARY = 8, 256, 2048


def build(size: str, recipe: str | None, compiled: bool) -> tuple[Llama, Callable[[], None]]:
    torch.manual_seed(0)
    model = Llama(llama_config(size, VOCABULARY, max_seq_len=LENGTH))
    if recipe:
        quantize_(model, recipe)
    if compiled:
        for block in model.model.layers:
            block.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    batch = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model.loss(batch[:, :-1], batch[:, 1:], chunk=256).backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def kept_bytes(model: Llama) -> int:
    """Bytes that autograd keeps between forward and backward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model.model(tokens).sum()
    del loss
    return sum(storages.values())


def measure(size: str, recipes: list[str], compiled: bool, rounds: int) -> list[dict[str, object]]:
    built = {name or "plain": build(size, name, compiled) for name in (None, *recipes)}
    for _, step in built.values():
        for _ in range(2):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in built}
    for turn in range(rounds):
        order = list(built) if turn % 2 else list(built)[::-1]
        for name in order:
            start = time.perf_counter()
            built[name][1]()
            seconds[name].append(time.perf_counter() - start)
    rows = []
    plain_kept = kept_bytes(built["plain"][0])
    for name, (model, _) in built.items():
        ratios = [a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)]
        rows.append(
            {
                "size": size,
                "recipe": name,
                "compiled": compiled,
                "ms": round(1000 * statistics.median(seconds[name]), 1),
                "ratio": round(statistics.median(ratios), 3),
                "kept_ratio": round(kept_bytes(model) / plain_kept, 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["tiny", "9m"], help="named sizes (default: tiny 9m)")
    parser.add_argument("--recipes", nargs="+", default=["fp4", "int4", "nvfp4"], choices=list(RECIPES))
    parser.add_argument("--compile", action="store_true", help="compile both models, block by block")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each contestant (default: 15)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="recipe .* groups of the inputs span tokens")
    facts = surroundings(args.threads)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"{'size':6}{'recipe':16}{'ms':>8}{'ratio':>8}{'kept':>8}", flush=True)
    rows = []
    for size in args.sizes:
        for row in measure(size, args.recipes, args.compile, args.rounds):
            rows.append(row)
            print(f"{row['size']:6}{row['recipe']:16}{row['ms']:>8}{row['ratio']:>8}{row['kept_ratio']:>8}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
