"""What each hyperparameter may be: one table for constructors, param groups and transforms."""

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor

Check = tuple[Callable[[Any], bool], str]


def _number(low: float, high: float = math.inf, *, below: bool = False) -> Callable[[Any], bool]:
    def holds(x: Any) -> bool:
        if isinstance(x, Tensor):
            if x.numel() != 1 or x.device.type != "cpu":
                return x.numel() == 1  # a value on a device is not fetched to be looked at
            x = x.item()
        if not isinstance(x, Real) or isinstance(x, bool):
            return False
        return low <= float(x) and (float(x) < high if below else float(x) <= high)

    return holds


def _betas(x: Any) -> bool:
    return isinstance(x, Sequence) and len(x) == 2 and all(_fraction(b) for b in x)


_fraction = _number(0, 1, below=True)
_positive = _number(0, math.inf, below=True)


def _above_zero(x: Any) -> bool:
    return _positive(x) and x > 0


def _count(x: Any) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool) and int(x) >= 0


CHECKS: dict[str, Check] = {
    "lr": (_positive, "a number >= 0"),
    "adam_lr": (lambda x: x is None or _positive(x), "a number >= 0, or None"),
    "betas": (_betas, "two numbers in [0, 1)"),
    "momentum": (_fraction, "a number in [0, 1)"),
    "eps": (_positive, "a number >= 0"),
    "weight_decay": (_positive, "a number >= 0"),
    "gamma1": (_fraction, "a number in [0, 1)"),
    "gamma2": (_fraction, "a number in [0, 1)"),
    "gamma3": (_fraction, "a number in [0, 1)"),
    "total_steps": (lambda x: x is None or (_count(x) and x > 0), "a whole number > 0, or None"),
    "eta_min": (_number(0, 1), "a number in [0, 1]"),
    "reset_interval": (_count, "a whole number >= 0 (0 = never)"),
    "threshold": (_positive, "a number >= 0 (0 = no clipping)"),
    "warmup_steps": (_count, "a whole number >= 0"),
    "clip_start": (_count, "a whole number >= 0"),
    "density": (lambda x: _number(0, 1)(x) and x > 0, "a number in (0, 1]"),
    "variant": (lambda x: x in ("paper", "official"), "'paper' or 'official'"),
    "maximize": (lambda x: isinstance(x, bool), "True or False"),
    "capturable": (lambda x: isinstance(x, bool), "True or False"),
    "rounding": (lambda x: x in ("nearest", "stochastic", "kahan"), "'nearest', 'stochastic' or 'kahan'"),
    "state": (lambda x: x in ("fp32", "bf16", "int8"), "'fp32', 'bf16' or 'int8'"),
    "beta2": (_fraction, "a number in [0, 1)"),
    "alpha": (_fraction, "a number in [0, 1)"),
    "limit": (_above_zero, "a number > 0"),
    "max_norm": (_above_zero, "a number > 0"),
    "clipping": (_above_zero, "a number > 0"),
    "sigma": (_positive, "a number >= 0"),
    "percentile": (_number(0, 100), "a number in [0, 100]"),
    "window": (lambda x: _count(x) and x > 0, "a whole number > 0"),
    "every": (_count, "a whole number >= 0 (0 = never)"),
    "watch": (lambda x: x in ("norm", "loss"), "'norm' or 'loss'"),
    "nonfinite": (lambda x: x in ("restore", "skip", "zero"), "'restore', 'skip' or 'zero'"),
    "norm": (lambda x: x in ("rms", "l2"), "'rms' or 'l2'"),
    "spikes": (lambda x: x in ("clip", "zero"), "'clip' or 'zero'"),
}
"""What each hyperparameter may be; the same for the constructor and for every param group."""


def host_values(values: Iterable[Any]) -> tuple[Any, ...]:
    """``values``, with the class `Tensor` for those that are tensors or hold some: to compare these would read a
    device.
    """
    return tuple(
        Tensor
        if isinstance(x, Tensor) or (isinstance(x, list | tuple) and any(isinstance(y, Tensor) for y in x))
        else x
        for x in values
    )


def check(owner: str, /, **options: Any) -> None:
    """Raise ValueError for the first option that is out of range, saying what was given and what is allowed."""
    for name, value in options.items():
        holds, allowed = CHECKS[name]
        if not holds(value):
            raise ValueError(
                f"{owner}: {name}={value!r} is not {allowed}" if owner else f"{name}={value!r} is not {allowed}"
            )
