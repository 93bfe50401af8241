"""Parameters that were exchanged after the optimizer was made.

accelerate, and so transformers' Trainer, makes the optimizer of whole parameters, shards the model with FSDP2
afterwards, and puts the shards into the param groups. Before the first step nothing is lost by starting anew what is
kept per parameter.
"""

from torch import Tensor

from evenstep.optim.sharding import is_sharded, refuse_flat_shard
from evenstep.optim.state import Group


def follow_exchange(groups: list[Group], known: set[Tensor], clock: str) -> bool:
    """Whether shards came into ``groups``, so that everything that is kept per parameter has to start anew. ``known``:
    the parameters that were there before, which is brought up to date. ``clock``: the name of the groups' step count.

    Raises RuntimeError for shards that come after the first step, and for flat ones (which hold parts of many tensors);
    ValueError for parameters that were flattened where they are.
    """
    params = [p for group in groups for p in group["params"]]
    for p in params:
        refuse_flat_shard(p)
    new = [p for p in params if p not in known]
    for p in new:
        if not is_sharded(p) and p.dim() == 1:
            raise RuntimeError(
                f"a parameter of shape {tuple(p.shape)} was put into a group without add_param_group. If it is a "
                "flat shard (ZeRO): per-tensor statistics are impossible there; use FSDP2 (fully_shard) or DDP"
            )
    sharded = any(is_sharded(p) for p in new)
    if sharded and any(int(group.get(clock, 0)) for group in groups):
        raise RuntimeError(
            "parameters were exchanged for shards after the first step, and their state would be lost; shard the model "
            "(or call accelerator.prepare) before the first step and before load_state_dict"
        )
    if new:
        known.clear()
        known.update(params)
    return sharded
