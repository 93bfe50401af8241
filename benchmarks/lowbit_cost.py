"""What simulated low-bit training costs: a training step of a quantised model, relative to the plain model.

    python benchmarks/lowbit_cost.py [--size tiny] [--recipes fp4 int4 nvfp4] [--rounds 9] [--compile]

One step is forward, backward and fused AdamW on 8 x 256 random tokens in fp32, with a vocabulary of 2048 and one
thread. All models live in one process and take turns. The time is the processor time of the process, which does not
count the time in which other work has the core; the ratio is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from evenstep import quantize_
from evenstep.models import Llama, llama_config

BATCH, LENGTH, VOCABULARY = 8, 256, 2048
WARMUP_STEPS = 2


def training_step(size: str, recipe: str | None, compiled: bool) -> Callable[[], None]:
    """A function that does one training step of a model; ``recipe`` None is the plain model."""
    torch.manual_seed(0)
    model = Llama(llama_config(size, VOCABULARY))
    if recipe:
        quantize_(model, recipe)
    if compiled:
        for block in model.model.layers:
            block.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens, targets = torch.randint(VOCABULARY, (2, BATCH, LENGTH))

    def step() -> None:
        model.loss(tokens, targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="tiny", help="a name in evenstep.models.SIZES (default: tiny)")
    parser.add_argument("--recipes", nargs="+", default=["fp4", "int4", "nvfp4"], help="names of low-bit recipes")
    parser.add_argument("--rounds", type=int, default=9, help="default: 9")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of all models")
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps = {name: training_step(args.size, name, args.compile) for name in (None, *args.recipes)}
    for step in list(steps.values()) * WARMUP_STEPS:
        step()
    seconds: dict[str | None, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    print(f"plain: {1e3 * statistics.median(seconds[None]):.0f} ms")
    for name in args.recipes:
        ratios = [low / plain for low, plain in zip(seconds[name], seconds[None], strict=True)]
        print(f"{name}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
