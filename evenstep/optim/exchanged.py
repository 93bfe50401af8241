"""Parameters that were exchanged after the optimizer was made.

accelerate, and so transformers' Trainer, makes the optimizer of whole parameters, shards the model with FSDP2
afterwards, and puts the shards into the param groups. Before the first step nothing is lost by starting anew what is
kept per parameter.
"""

from collections.abc import Callable, MutableMapping
from typing import Any

from torch import Tensor

from evenstep.optim.sharding import is_sharded
from evenstep.optim.state import Group


def follow_exchange(
    groups: list[Group], kept: MutableMapping[Tensor, Any], clock: str, start: Callable[[Tensor, Group, int], Any]
) -> bool:
    """Where shards came into ``groups``: ``start(p, group, index)`` for each parameter, and forget those that left.
    Returns whether that was so. ``clock``: the name of the groups' step count.

    Raises RuntimeError for shards that come after the first step, and for flat ones (which hold parts of many tensors).
    """
    new = [p for group in groups for p in group["params"] if p not in kept]
    for p in new:
        if not is_sharded(p) and p.dim() == 1:
            raise RuntimeError(
                f"a parameter of shape {tuple(p.shape)} was put into a group without add_param_group. If it is a "
                "flat shard (ZeRO): per-tensor statistics are impossible there; use FSDP2 (fully_shard) or DDP"
            )
    if not any(is_sharded(p) for p in new):
        return False
    if any(int(group.get(clock, 0)) for group in groups):
        raise RuntimeError(
            "parameters were exchanged for shards after the first step, and their state would be lost; shard the model "
            "(or call accelerator.prepare) before the first step and before load_state_dict"
        )
    kept.clear()
    for group in groups:
        for index, p in enumerate(group["params"]):
            start(p, group, index)
    return True
