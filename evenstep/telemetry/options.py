"""Checks of the arguments of `SpikeMonitor` and of the callbacks in evenstep.integrations.

A bad argument fails in the call that passes it. The callbacks check the options of `SpikeMonitor` with the same
functions, because they construct the monitor only when training starts.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evenstep.errors import EvenstepError, nearest
from evenstep.optim.distributed import is_sharded

Check = Callable[[Any], Any]

Rows = int | tuple[int, int] | range | slice
"""Data rows of a step: the number of a single row, (first, one past the last), or a range or slice of step 1."""


# ---- options of the constructor ----


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
    "activations": _whole(0),
    "say": _callable_or_none("a function of one line of text, such as print"),
    "lowbit": _callable_or_none("a function that returns {layer: {key: number}}"),
}
"""Name of an option of `SpikeMonitor` -> the function that checks and converts its value."""


def checked_options(owner: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given``, with its numbers converted to int and float.

    Args:
        owner: name of the class that was called, with which error messages begin.
        given: options of `SpikeMonitor` by name.

    Raises:
        TypeError: an unknown name, or a value of the wrong type.
        EvenstepError: (a ValueError) a number out of range.

    >>> checked_options("SpikeMonitor", {"ratio": 5})
    {'ratio': 5.0}
    """
    checked = {}
    for name, value in given.items():
        if name not in CHECKS:
            known = ", ".join(CHECKS)
            raise TypeError(f"{owner}: unknown argument '{name}'{nearest(name, list(CHECKS))}; there are {known}")
        try:
            checked[name] = CHECKS[name](value)
        except (TypeError, ValueError) as problem:
            raise type(problem)(f"{owner}: {name}={value!r:.80} {problem}") from None
    return checked


def checked_path(owner: str, path: Any) -> Any:
    """``path`` if it is the path of a file (str or os.PathLike) or None; else TypeError or EvenstepError."""
    if path is None:
        return None
    if not isinstance(path, str) and not hasattr(path, "__fspath__"):
        raise TypeError(f"{owner}: path={path!r:.80} must be the path of a file, or None")
    if not str(path):
        raise EvenstepError(f"{owner}: path='' names no file; leave it out for the default")
    return path


# ---- arguments of observe ----


def checked_loss(loss: Any) -> Tensor | float | None:
    """``loss`` as a detached 0-d tensor, which stays on its device, or as a float."""
    if loss is None or isinstance(loss, float):
        return loss
    if isinstance(loss, Tensor):
        loss = loss.detach()
        if is_sharded(loss):
            loss = loss.full_tensor()
        if loss.numel() != 1:
            raise EvenstepError(f"SpikeMonitor.observe: loss must be one number, got the shape {list(loss.shape)}")
        if loss.is_complex():
            raise TypeError("SpikeMonitor.observe: loss must be a real number, got a complex one")
        number: Tensor = loss.reshape(())
        return number
    shape = getattr(loss, "shape", ())
    if getattr(loss, "size", 1) != 1:
        raise EvenstepError(f"SpikeMonitor.observe: loss must be one number, got the shape {list(shape)}")
    try:
        if isinstance(loss, str | bytes):
            raise TypeError
        return float(loss.item() if shape else loss)
    except (TypeError, ValueError):
        raise TypeError(
            f"SpikeMonitor.observe: loss must be one number, got {type(loss).__name__}; give loss.item() or None"
        ) from None


def checked_step(step: Any) -> int | None:
    """``step`` as an int of at least 0, or None."""
    return None if step is None else _natural(step, "step numbers")


def checked_rows(rows: Any) -> tuple[int, int] | None:
    """``rows``, see `Rows`, as (first, one past the last), or None."""
    if rows is None:
        return None
    if isinstance(rows, range | slice):
        if rows.step not in (None, 1):
            raise EvenstepError(f"SpikeMonitor.observe: rows={rows!r} leaves rows out; give (first, one past the last)")
        rows = (0 if rows.start is None else rows.start, rows.stop)
    if not hasattr(rows, "__len__") or getattr(rows, "shape", None) in ((), torch.Size([])):
        first = _natural(rows, "rows")
        return first, first + 1
    if isinstance(rows, str | bytes | Mapping | set) or len(rows) != 2:
        raise TypeError(
            f"SpikeMonitor.observe: rows={rows!r:.80} must be (first, one past the last), or a row's number"
        )
    first, past = (_natural(row, "rows") for row in rows)
    if past <= first:
        raise EvenstepError(f"SpikeMonitor.observe: rows={rows!r} holds no row; give (first, one past the last)")
    return first, past


def _natural(value: Any, what: str) -> int:
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"SpikeMonitor.observe: {what} must be whole numbers, got {value!r:.80}") from None
    if number < 0:
        raise EvenstepError(f"SpikeMonitor.observe: {what} must be at least 0, got {number}")
    return number
