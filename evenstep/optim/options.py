"""The hyperparameters of the optimizers and transforms: name, default, range, help, source and official names.

One declaration drives the check in the constructor and in every param group, the official names that are accepted, the
defaults that ``evenstep pretrain --help`` shows, and the reference page. This module imports no torch, so that the
command line can read it quickly.

To add a hyperparameter to an optimizer: declare it in the tuple of the optimizer below, add it to the signature of the
constructor, and use ``group["name"]`` in the step.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

from evenstep.errors import nearest

# ---- ranges ----


# A predicate of a value, and the words for it. Checks run at construction, for every param group, and before a step
# whose options have changed.


@dataclass(frozen=True)
class Range:
    """The values that an option may have: a predicate, and how an error message describes them."""

    holds: Callable[[Any], bool]
    text: str
    choices: tuple[str, ...] = ()
    """The allowed names, where the option has a few."""


def is_tensor(x: Any) -> bool:
    """Whether ``x`` is a torch tensor, without importing torch."""
    return hasattr(x, "device") and hasattr(x, "numel")


def number(low: float, high: float = math.inf, *, below: bool = False) -> Callable[[Any], bool]:
    """A predicate: ``low <= x <= high``, or ``x < high`` with ``below``. Accepts tensors of one entry."""

    def holds(x: Any) -> bool:
        if is_tensor(x):  # lr may be a 0-d tensor, which a compiled or captured step can change
            if x.numel() != 1 or x.device.type != "cpu":
                return bool(x.numel() == 1)  # a value on a device is not read: that would wait for the device
            x = x.item()
        if not isinstance(x, Real) or isinstance(x, bool):  # bool is a Real: lr=True would pass as 1.0
            return False
        try:
            value = float(x)
        except OverflowError:  # an int beyond fp64
            return False
        return low <= value and (value < high if below else value <= high)

    return holds


# Comparisons with NaN are False, so NaN is out of every range. Decays exclude 1, which would divide by 1 - beta = 0.
_fraction, _at_least_0 = number(0, 1, below=True), number(0, math.inf, below=True)


def _count(x: Any) -> bool:
    # Counts enter the arithmetic of floats and int64 tensors.
    return isinstance(x, Integral) and not isinstance(x, bool) and 0 <= int(x) < 2**63


def _choice(*names: str) -> Range:
    # "'a', 'b' or 'c'"
    quoted = [repr(name) for name in names]
    return Range(lambda x: x in names, " or ".join([", ".join(quoted[:-1]), quoted[-1]]), names)


FRACTION = Range(_fraction, "a number in [0, 1)")
AT_LEAST_0 = Range(_at_least_0, "a number >= 0")
ABOVE_0 = Range(lambda x: _at_least_0(x) and x > 0, "a number > 0")
COUNT = Range(_count, "a whole number >= 0")
COUNT_OR_NEVER = Range(_count, "a whole number >= 0 (0 = never)")
BOOL = Range(lambda x: isinstance(x, bool), "True or False")

# One entry per name: to add a hyperparameter of an optimizer or a transform, add its range here.
RANGES: dict[str, Range] = {
    # Optimizers
    "lr": AT_LEAST_0,
    "adam_lr": Range(lambda x: x is None or _at_least_0(x), "a number >= 0, or None"),
    "betas": Range(
        lambda x: isinstance(x, Sequence) and len(x) == 2 and all(map(_fraction, x)), "two numbers in [0, 1)"
    ),
    "momentum": FRACTION,
    "eps": AT_LEAST_0,
    "weight_decay": AT_LEAST_0,
    "gamma1": FRACTION,
    "gamma2": FRACTION,
    "gamma3": FRACTION,
    "total_steps": Range(lambda x: x is None or (_count(x) and x > 0), "a whole number > 0, or None"),
    "eta_min": Range(number(0, 1), "a number in [0, 1]"),
    "reset_interval": COUNT_OR_NEVER,
    "threshold": Range(_at_least_0, "a number >= 0 (0 = no clipping)"),
    "warmup_steps": COUNT,
    "clip_start": COUNT,
    "density": Range(lambda x: number(0, 1)(x) and x > 0, "a number in (0, 1]"),
    "variant": _choice("paper", "official"),
    "maximize": BOOL,
    "capturable": BOOL,
    "robust": BOOL,
    "preset": Range(lambda x: x in (None, "steady"), "'steady' or None", ("steady",)),
    "rounding": _choice("nearest", "stochastic", "kahan"),
    "state": _choice("fp32", "bf16", "int8"),
    # Transforms
    "beta": FRACTION,
    "beta2": FRACTION,
    "alpha": FRACTION,
    "ratio": ABOVE_0,
    "limit": ABOVE_0,
    "max_norm": ABOVE_0,
    "clipping": ABOVE_0,
    "sigma": AT_LEAST_0,
    "percentile": Range(number(0, 100), "a number in [0, 100]"),
    "window": Range(lambda x: _count(x) and x > 0, "a whole number > 0"),
    "every": COUNT_OR_NEVER,
    "watch": _choice("norm", "loss"),
    "nonfinite": _choice("restore", "skip", "zero"),
    "norm": _choice("rms", "l2"),
    "spikes": _choice("clip", "zero"),
}
"""The range of each option. An option means the same wherever it occurs, so that a name has one range."""


def check(owner: str, /, **options: Any) -> None:
    """ValueError for the first option that is out of range: what was given, and what is allowed."""
    for name, value in options.items():
        allowed = RANGES[name]
        if not allowed.holds(value):
            where = f"{owner}: " if owner else ""
            raise ValueError(f"{where}{name}={value!r:.80} is not {allowed.text}")


TENSOR = object()  # stands for a tensor in `comparable`


def comparable(values: Iterable[Any]) -> tuple[Any, ...]:
    """``values``, with `TENSOR` for tensors and sequences of tensors: comparing those would read a device."""
    return tuple(
        TENSOR if is_tensor(x) or (isinstance(x, list | tuple) and any(map(is_tensor, x))) else x for x in values
    )


# ---- declarations ----


# Read by the constructors (defaults, names), by ``evenstep pretrain --help`` and by the reference page.


@dataclass(frozen=True)
class Option:
    """A hyperparameter of an optimizer. Its range is that of its name in `RANGES`."""

    name: str
    default: Any
    help: str
    source: str = ""  # paper or published code that the default comes from
    aliases: tuple[str, ...] = ()  # names in the published code, which constructors accept too

    @property
    def range(self) -> Range:
        """The allowed values."""
        return RANGES[self.name]


# Options that several optimizers have.
LR = Option("lr", 1e-3, "learning rate, a float or a 0-d tensor")
BETAS = Option("betas", (0.9, 0.999), "decay of the first and second moment")
EPS = Option("eps", 1e-8, "added to the root of the second moment", "published code")
WEIGHT_DECAY = Option("weight_decay", 0.0, "decoupled weight decay, multiplied by lr")
VARIANT = Option("variant", "paper", "'official' follows the published code step by step")
# Options of every optimizer. None of them is in the papers.
COMMON = (
    Option("maximize", False, "ascend instead of descend"),
    Option("capturable", False, "keep the clock on the device, for CUDA graphs"),
    Option("rounding", "nearest", "how results enter 16-bit parameters: nearest, stochastic or kahan"),
    Option("state", "fp32", "how moments are stored: fp32, bf16 or int8 (blocks of 256, needs torchao)"),
)

# The order of each tuple is that of the constructor's arguments. `replace` changes what differs between optimizers.

# arXiv:2502.17055. theta, total_T, update_proj_gap: names of the published class.
STABLE_SPAM = (
    replace(LR, source="paper, section 5"),
    BETAS,
    EPS,
    WEIGHT_DECAY,
    Option("gamma1", 0.7, "AdaGN: decay of the mean of the norm", "paper, 4-bit; 0.85 for BF16"),
    Option("gamma2", 0.9, "AdaGN: decay of the mean square of the norm", "paper, 4-bit; 0.99999 for BF16"),
    Option("gamma3", 0.999, "AdaClip: decay of the mean of the largest entry", "paper", ("theta",)),
    Option("total_steps", None, "length of a cosine schedule of beta1 and gamma1", "published code", ("total_T",)),
    Option("eta_min", 0.5, "where that schedule ends", "published code"),
    Option("reset_interval", 1000, "steps between moment resets, 0 for never", "paper", ("update_proj_gap", "DeltaT")),
    VARIANT,
    Option("robust", False, "running means that one spike cannot move far; not in the paper"),
    Option("preset", None, "'steady' sets robust, as the stability suite advises"),
    *COMMON,
)

# arXiv:2501.06842. grad_accu_steps, warmup_epoch, DeltaT: names of the published class.
SPAM = (
    replace(LR, source="paper: 60M"),
    BETAS,
    replace(EPS, default=1e-6),
    WEIGHT_DECAY,
    Option("threshold", 5000.0, "clip entries with g**2 above this times v; 0 for no clipping", "paper"),
    Option("reset_interval", 500, "steps between moment resets, 0 for never", "paper", ("DeltaT", "update_proj_gap")),
    Option("warmup_steps", 150, "length of the re-warm-up after a reset", "paper", ("warmup_epoch",)),
    Option("clip_start", 20, "steps without clipping, also after a reset", "published code", ("grad_accu_steps",)),
    Option("density", 1.0, "fraction of each matrix that is trained at a time"),
    VARIANT,
    *COMMON,
)

# arXiv:2506.16659.
SCALE = (
    LR,
    Option("momentum", 0.9, "decay of the last layer's average gradient", "paper"),
    replace(WEIGHT_DECAY, aliases=("wd",)),
    Option("adam_lr", None, "learning rate of vectors; None for lr"),
    replace(BETAS, help="AdamW's, for vectors", aliases=("adamw_betas",)),
    replace(EPS, help="AdamW's, for vectors", source="", aliases=("adamw_eps",)),
    Option("norm", "rms", "norm that rows are divided by: rms (published code) or l2 (paper)", "published code"),
    *COMMON,
)


def aliases(options: Iterable[Option]) -> dict[str, str]:
    """Name in the published code -> name here."""
    return {alias: option.name for option in options for alias in option.aliases}


# ---- names that callers give ----

# Trainers pass these to any optimizer.
_INERT = {
    "foreach": "evenstep chooses its own loops and kernels; leave it out",
    "differentiable": "the step is not differentiable; leave it out",
    "amsgrad": "it is not part of the papers' rules; leave it out",
}
"""Arguments that trainers pass to any optimizer; accepted while they ask for nothing."""


def without_inert(given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` without the arguments of `_INERT`; ValueError where one of them asks for something."""
    for name, why in _INERT.items():
        if given.get(name):
            raise ValueError(f"{name}={given[name]!r} is not supported: {why}")
    return {name: value for name, value in given.items() if name not in _INERT}


def renamed(
    given: Mapping[str, Any], aliases: Mapping[str, str], owner: str, known: set[str], *, strict: bool = True
) -> dict[str, Any]:
    """``given`` with names of the published code replaced by those of evenstep, for the class or object ``owner``.

    Raises ValueError for two names of one option. Of unknown names, ``strict`` refuses all (TypeError, for the
    constructor), otherwise only those that look like a mistyped option (ValueError, for param groups).
    """
    import difflib  # takes 5 ms to load, and the command line reads this module for its help

    result: dict[str, Any] = {}
    for name, value in given.items():
        canonical = aliases.get(name, name)
        # Two names of one option may disagree, and no order of precedence would be obvious.
        if canonical in result or (canonical != name and canonical in given):
            raise ValueError(f"{owner}: {name!r} and {canonical!r} are two names of one setting; give one of them")
        if canonical not in known and strict:
            raise TypeError(f"{owner}: unknown argument {name!r}{nearest(name, [*known, *aliases])}")
        # A param group may hold the user's own entries, which are kept, unless a name looks like a mistyped option.
        if canonical not in known and difflib.get_close_matches(name, known, n=1, cutoff=0.85):
            raise ValueError(f"{owner}: unknown option {name!r}{nearest(name, [*known, *aliases])}")
        result[canonical] = value
    return result
