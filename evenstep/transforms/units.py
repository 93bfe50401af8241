"""Gradient transforms as units: each wraps one function of this package with its hyperparameters and names its
statistics.
"""

from typing import Protocol

from torch import Tensor

from evenstep.transforms.checks import check
from evenstep.transforms.gradients import Gradients
from evenstep.transforms.lockstep import Steps
from evenstep.transforms.stable import adaclip, adagn


class Transform(Protocol):
    """A unit that `stabilize` can put before an optimizer. ``scalars`` names its statistics, one number per tensor
    each, starting at 0.
    """

    name: str
    scalars: tuple[str, ...]

    def __call__(self, grads: Gradients, state: dict[str, Tensor]) -> Steps[tuple[Gradients, dict[str, Tensor]]]:
        """Transform ``k`` gradients. ``state`` holds a vector ``[k]`` per statistic; returned is its new value."""


class AdaClip:
    """Clip entries to a running mean of their tensor's largest entry, by scaling them down to it (arXiv:2502.17055,
    section 4).

    ``gamma3`` is the decay of that mean, default 0.999 (paper). Raises ValueError when it is not in [0, 1).
    """

    name = "adaclip"
    scalars = ("peak", "n")

    def __init__(self, gamma3: float = 0.999):
        check(type(self).__name__, gamma3=gamma3)
        self.gamma3 = gamma3

    def __call__(self, grads: Gradients, state: dict[str, Tensor]) -> Steps[tuple[Gradients, dict[str, Tensor]]]:
        n = state["n"] + 1
        grads, peak = adaclip(grads, state["peak"], n, self.gamma3)
        yield from ()
        return grads, {"peak": peak, "n": n}

    def __repr__(self) -> str:
        return f"AdaClip(gamma3={self.gamma3})"


class AdaGN:
    """Give each tensor the norm that the history of its norm suggests: mean over root mean square (arXiv:2502.17055,
    section 4).

    ``gamma1`` and ``gamma2`` are the decays of the norm's mean and mean square, defaults 0.7 and 0.9 (paper, 4-bit;
    0.85 and 0.99999 for BF16); ``eps`` is added to the root. A zero gradient stays zero. Raises ValueError when a value
    is out of range.
    """

    name = "adagn"
    scalars = ("norm", "norm_rms", "n")

    def __init__(self, gamma1: float = 0.7, gamma2: float = 0.9, eps: float = 1e-8):
        check(type(self).__name__, gamma1=gamma1, gamma2=gamma2, eps=eps)
        self.gamma1, self.gamma2, self.eps = gamma1, gamma2, eps

    def __call__(self, grads: Gradients, state: dict[str, Tensor]) -> Steps[tuple[Gradients, dict[str, Tensor]]]:
        n = state["n"] + 1
        grads = yield from grads.with_norms()
        gain, ema, rms = adagn(grads.norm, state["norm"], state["norm_rms"], n, self.gamma1, self.gamma2, self.eps)
        return grads.amplified(gain), {"norm": ema, "norm_rms": rms, "n": n}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(gamma1={self.gamma1}, gamma2={self.gamma2}, eps={self.eps})"


class GradientStabilizer(AdaGN):
    """AdaGN alone with the defaults of GradientStabilizer (arXiv:2502.17055 v3): gamma1 0.6, gamma2 0.999, no eps."""

    name = "gradient_stabilizer"

    def __init__(self, gamma1: float = 0.6, gamma2: float = 0.999, eps: float = 0.0):
        super().__init__(gamma1, gamma2, eps)
