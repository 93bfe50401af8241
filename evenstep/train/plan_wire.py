"""Bytes that a process sends in one step, by what they are for.

Of a ring: an all-reduce of n bytes among k processes sends 2 n (k - 1) / k from each, an all-gather to n bytes or a
reduce-scatter of them n (k - 1) / k. Other algorithms send the same or less. Gradients are reduced in fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evenstep.train.config import Config
from evenstep.train.plan_tensors import SPLIT, Grid, Named

if TYPE_CHECKING:
    from evenstep.models import LlamaConfig


@dataclass(frozen=True)
class Wire:
    """``times`` messages of one kind in a step (one a block where there are blocks, counted as one), among ``among``
    processes: ``bytes`` in all."""

    what: str
    among: int
    times: int
    bytes: int


def _ring(numbers: int, size: int, among: int, *, both_ways: bool = False) -> int:
    return round((2 if both_ways else 1) * numbers * size * (among - 1) / among)


def on_the_wire(
    config: Config, shape: LlamaConfig, grid: Grid, tensors: list[Named], passes: int, tokens: int
) -> list[Wire]:
    """Every message of a step of ``passes`` micro batches of ``tokens`` tokens, those of the optimizer aside."""
    size = 4 if config.train.dtype == "fp32" else 2
    if grid.mode == "ddp":
        whole = sum(t.numel for t in tensors)
        return [Wire("all-reduce of gradients", grid.gpus, 1, _ring(whole, 4, grid.gpus, both_ways=True))]
    if grid.mode not in SPLIT:
        return []
    sums = {block: sum(math.prod(grid.cut_shape(t)) for t in tensors if t.block == block) for block in (True, False)}
    among = grid.shards(True)
    gathered = sum(_ring(sums[block], size, grid.shards(block)) for block in sums)
    reduced = sum(_ring(sums[block], 4, grid.shards(block)) for block in sums)
    found = [Wire("all-gather of weights, forward", among, passes, passes * gathered)]
    if config.parallel.reshard:  # the root stays gathered
        again = _ring(sums[True], size, among)
        found.append(Wire("all-gather of weights, backward", among, passes, passes * again))
    found.append(Wire("reduce-scatter of gradients", among, 1, reduced))
    if grid.replicate > 1:
        part = sum(grid.part(t) for t in tensors)
        bytes_ = _ring(part, 4, grid.replicate, both_ways=True)
        found.append(Wire("all-reduce of gradients between groups", grid.replicate, 1, bytes_))
    if grid.tensor > 1:
        # Two a block and pass: the sums of attention and MLP; those of their inputs' gradients; and with checkpointing
        # the first two once more.
        rounds = 6 if config.train.activation_checkpointing else 4
        each = _ring(tokens * shape.hidden_size, size, grid.tensor, both_ways=True)
        times = passes * rounds * shape.num_layers
        found.append(Wire("all-reduce of activations", grid.tensor, times, times * each))
    return found
