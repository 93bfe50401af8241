"""What a gradient transform is: a unit with hyperparameters, named statistics and one function."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from evenstep.transforms.gradients import Gradients
from evenstep.transforms.lockstep import Steps

Statistics = dict[str, Any]
"""Statistics by name: for ``scalars`` a vector ``[k]``, for ``entries`` a list of ``k`` tensors (the parts that are
here), for ``shared`` one tensor.
"""


@dataclass(frozen=True, slots=True)
class Now:
    """What a unit may know about a step besides its gradients."""

    params: list[Tensor]
    """The ``k`` parameters (the parts that are here)."""
    t: int = 1
    """Number of this step, from 1."""
    reset_interval: int = 0
    """Every so many steps the base's moments start anew; 0 for never."""
    loss: Tensor | None = None
    """What the closure returned, if one was given."""

    def since_reset(self) -> int:
        """Steps since the moments were last reset (0 on the step of the reset), or since the start."""
        return self.t % self.reset_interval if self.reset_interval else self.t


class Transform:
    """A unit that `stabilize` puts before an optimizer. Subclasses name their statistics, all zero at the start, and
    say in ``__call__`` what happens to the gradients.

    The statistics of a tensor whose gradient is not finite stay as they were whatever the call returns for them; so do
    the shared ones when any gradient is not finite, and all of them when the step is skipped.
    """

    name: str
    """Prefix of the statistics in a saved state; a chain holds each name once."""
    scalars: ClassVar[tuple[str, ...]] = ()
    """Statistics with one number per tensor."""
    entries: ClassVar[tuple[str, ...]] = ()
    """Statistics in the shape of each tensor."""
    options: tuple[str, ...] = ()
    """Hyperparameters, for ``repr``."""
    whole_model: ClassVar[bool] = False
    """Whether it needs the gradients of all parameters at once, as everything does that has shared statistics."""
    sees_skipped_steps: ClassVar[bool] = False
    """Whether the shared statistics are kept as returned also of a step that is skipped."""

    @property
    def shared(self) -> Mapping[str, tuple[int, ...]]:
        """Statistics with one value for the whole model: name -> shape."""
        return {}

    def __call__(self, grads: Gradients, state: Statistics, now: Now) -> Steps[tuple[Gradients, Statistics]]:
        """Transform ``k`` gradients. Returned are the gradients and the new values of the statistics."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.options)})"


def shared_dtype(device: torch.device) -> torch.dtype:
    """Dtype of shared statistics: fp64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
