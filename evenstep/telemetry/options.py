"""The options of `SpikeMonitor`, checked in the call that gives them: also by callbacks, which make the monitor only
when training starts. Needs no torch."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from evenstep.errors import EvenstepError, nearest

Check = Callable[[Any], Any]


def _whole(low: int) -> Check:
    def check(value: Any) -> int:
        if isinstance(value, bool):
            raise TypeError(f"must be a whole number of at least {low}")
        try:
            number = operator.index(value)
        except TypeError:
            raise TypeError(f"must be a whole number of at least {low}") from None
        if number < low:
            raise EvenstepError(f"must be at least {low}")
        return number

    return check


def _above(low: float) -> Check:
    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"must be a number above {low:g}")
        if not low < float(value) < math.inf:
            raise EvenstepError(f"must be a finite number above {low:g}")
        return float(value)

    return check


def _callable_or_none(what: str) -> Check:
    def check(value: Any) -> Any:
        if value is not None and (not callable(value) or inspect.isclass(value)):
            raise TypeError(f"must be {what}, or None")
        return value

    return check


CHECKS: dict[str, Check] = {
    "every": _whole(1),
    "samples": _whole(0),
    "ratio": _above(1),
    "sigma": _above(0),
    "window": _whole(1),
    "parameters_every": _whole(1),
    "say": _callable_or_none("a function of one line of text, such as print"),
    "lowbit": _callable_or_none("a function that returns {layer: {key: number}}"),
}


def checked_options(owner: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` with numbers as int and float. TypeError for an unknown name or a value of the wrong type,
    EvenstepError (a ValueError) for one out of range; ``owner`` is who was called."""
    found = {}
    for name, value in given.items():
        if name not in CHECKS:
            known = ", ".join(CHECKS)
            raise TypeError(f"{owner}: unknown argument '{name}'{nearest(name, list(CHECKS))}; there are {known}")
        try:
            found[name] = CHECKS[name](value)
        except (TypeError, ValueError) as problem:
            raise type(problem)(f"{owner}: {name}={value!r:.80} {problem}") from None
    return found


def checked_path(owner: str, path: Any) -> Any:
    """``path``, a str or os.PathLike that names a file, or None."""
    if path is None:
        return None
    if not isinstance(path, str) and not hasattr(path, "__fspath__"):
        raise TypeError(f"{owner}: path={path!r:.80} must be the path of a file, or None")
    if not str(path):
        raise EvenstepError(f"{owner}: path='' names no file; leave it out for the default")
    return path
