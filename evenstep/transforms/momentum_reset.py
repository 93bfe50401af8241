"""Moment resets as a unit of a chain."""

from collections.abc import Iterable

from evenstep.transforms.checks import check
from evenstep.transforms.gradients import Gradients
from evenstep.transforms.lockstep import Steps
from evenstep.transforms.transform import Now, Statistics, Transform


class MomentumReset(Transform):
    """Every so many steps the base's moments and step counts start anew before the step: SPAM's momentum reset
    (arXiv:2501.06842, section 4), Stable-SPAM's MoRet (arXiv:2502.17055, section 4), for any optimizer.

    The gradients pass; where it stands in the chain makes no difference. ``stabilize(..., reset_interval=N)`` is short
    for it.

    Args:
        every: default 1000 (Stable-SPAM; SPAM 500); 0 for never.
        moments: names of state entries to reset besides the known ones, for bases with names of their own.

    Raises ValueError when ``every`` is out of range.
    """

    name = "momentum_reset"
    options = ("every", "moments")

    def __init__(self, every: int = 1000, moments: Iterable[str] = ()):
        check(type(self).__name__, every=every)
        self.every, self.moments = every, tuple(moments)

    def __call__(self, grads: Gradients, state: Statistics, now: Now) -> Steps[tuple[Gradients, Statistics]]:
        yield from ()
        return grads, {}
