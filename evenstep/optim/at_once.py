"""Steps that kernels make in one call, the numbers of whole tensors included."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from evenstep.kernels import STATS, WholeKernels, WholeStep
from evenstep.optim.fused import MOMENTS
from evenstep.optim.sharding import Bucket
from evenstep.optim.state import rounding
from evenstep.transforms import filled

if TYPE_CHECKING:
    from evenstep.optim.base import EvenOptimizer


def at_once(optimizer: EvenOptimizer, group: dict[str, Any], bucket: Bucket) -> dict[str, Tensor] | None:
    """The step of a bucket and its statistics, where its kernels can do that and nothing is to be heard from other
    parts of its tensors; else None.
    """
    kernels = bucket.kernels
    if kernels is None or not kernels.makes_numbers or bucket.layout.cuts:
        return None
    t, lr = group["given"]
    now = group if group["capturable"] else group | {"t": t}  # a tensor only where the clock is one
    if not isinstance(lr, Tensor):
        now = now | {"lr": lr}
    return dict(zip(STATS, optimizer.at_once(now, bucket, cast(WholeKernels, kernels)).unbind(), strict=True))


def whole_step(group: dict[str, Any], bucket: Bucket, *kept: str, masks: Iterable[Tensor] = ()) -> WholeStep:
    """What such kernels work on; ``kept`` are the scalars of the state."""
    lost, seeds = rounding(group, bucket)
    first, second = (bucket.parts(name) if name in bucket.states[0] else [] for name in MOMENTS)
    scalars = [state[name] for name in kept for state in bucket.states]
    return WholeStep(
        bucket.here, bucket.grads, first, second, scalars, list(masks), lost=filled(lost), seeds=filled(seeds)
    )
