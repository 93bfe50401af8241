"""The error of StableSPAM's clip limit, with gradients in bf16 and in fp32.

    python benchmarks/peer_bf16_statistics.py

AdaClip's limit is the bias-corrected running mean (theta 0.999) of the largest entry of each gradient. A mean in bf16
stops rising: with 8 bits, an increment of less than about 1/256 of the mean is lost, and an increment of this mean is
at most 1/1000 of the largest entry. Meanwhile the bias correction decays, so the limit falls. Its final value depends
on the gradients: constant, or noise, whose rare large entries still add something. The table has the ratio of the limit
to that in float64 of the same gradients, for pytorch_optimizer's StableSPAM and ours. Nothing is timed; the numbers are
the same on every run.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from itertools import product

import pytorch_optimizer
import torch
from torch import nn

from evenstep import StableSPAM

THETA = 0.999
STEPS = (100, 500, 1000, 3000)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = ("constant", "noise")


def gradients(kind: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """64 x 64 entries from N(0, 0.01), drawn once or for every step; the same numbers in each dtype."""
    draw = torch.Generator().manual_seed(0)
    first = torch.randn(64, 64, generator=draw)
    while True:
        yield ((first if kind == "constant" else torch.randn(64, 64, generator=draw)) * 0.01).to(dtype)


def shares(name: str, kind: str, dtype: torch.dtype) -> dict[int, float]:
    """Step -> ratio of the clip limit to that in float64."""
    p = nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    options = {"lr": 1e-4, "theta": THETA, "update_proj_gap": 10**9}
    optimizer = (StableSPAM if name == "evenstep" else pytorch_optimizer.StableSPAM)([p], **options)
    exact, ratios = 0.0, {}
    for step, g in zip(range(1, max(STEPS) + 1), gradients(kind, dtype), strict=False):
        largest = g.double().abs().max().item()  # before the step: pytorch_optimizer clips p.grad in place
        p.grad = g
        optimizer.step()
        exact = THETA * exact + (1 - THETA) * largest
        if step in STEPS:
            kept = optimizer.state[p]["peak" if name == "evenstep" else "m_max_t"]
            ratios[step] = kept.double().item() / exact
    return ratios


def main() -> None:
    torch.set_num_threads(1)
    version = importlib.metadata.version("pytorch_optimizer")
    print(f"torch {torch.__version__}, pytorch_optimizer {version}; clip limit / that in float64")
    print("| | gradients | | " + " | ".join(f"step {step}" for step in STEPS) + " |")
    print("|---" * (3 + len(STEPS)) + "|")
    for name, kind, (label, dtype) in product(("pytorch_optimizer", "evenstep"), KINDS, DTYPES.items()):
        cells = [f"{share:.2f}" for share in shares(name, kind, dtype).values()]
        print(f"| {name} | {kind} | {label} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
