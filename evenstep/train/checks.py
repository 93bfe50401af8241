"""Is a value what an option takes? Types, ranges, choices and counts, with errors that say what is allowed."""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from evenstep.errors import EvenstepError, nearest

LARGEST = 10**300
"""Integers beyond it are no floats any more."""


def kinds(hint: Any) -> tuple[type, ...]:
    """The plain types of a hint: ``int | None`` -> (int, NoneType)."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def parse_count(text: str) -> int:
    """``"1.5B"`` -> 1500000000; K, M, B (or G) and T are powers of a thousand. ValueError when it is no whole
    number."""
    scale = {"K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}.get(text[-1:].upper())
    value = float(text[:-1]) * scale if scale else float(text.replace("_", ""))
    if not math.isfinite(value) or round(value) != round(value, 6):
        raise ValueError(text)
    return round(value)


def checked(key: str, value: Any, hint: Any, meta: Mapping[str, Any]) -> Any:
    """``value`` as the option's type, in its range; EvenstepError names the option, what was given and what is
    allowed."""
    allowed, choices = kinds(hint), meta["choices"]
    if meta["count"] and isinstance(value, str):
        try:
            value = parse_count(value)
        except ValueError:
            raise EvenstepError(
                f"{key}: {_short(value)} is no count; give a whole number, or one like 20K, 100M, 1.5B"
            ) from None
    if isinstance(value, int) and not isinstance(value, bool) and float in allowed:
        value = float(min(max(value, -LARGEST), LARGEST))
    if type(value) not in allowed:
        words = {"NoneType": "none", "bool": "true or false"}
        names = " or ".join(words.get(kind.__name__, kind.__name__) for kind in allowed)
        raise EvenstepError(f"{key}: {_short(value)} is {type(value).__name__}, expected {names}")
    if isinstance(value, str) and not _is_unicode(value):
        raise EvenstepError(f"{key}: {_short(value)} is not valid UTF-8, and config.toml has to hold it; rename it")
    form = meta.get("form")
    fits_form = form and isinstance(value, str) and re.fullmatch(form, value)
    if isinstance(value, str) and choices and value not in choices and not fits_form:
        number = "a number or " if int in allowed else ""
        given, hint = _short(value), nearest(value, choices)
        raise EvenstepError(f"{key}: {given} is not {number}one of {', '.join(choices)}{hint}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, above, high = meta["low"], meta["above"], meta["high"]
        fits = (
            (isinstance(value, int) or math.isfinite(value))
            and (low is None or value >= low)
            and (above is None or value > above)
        )
        if not fits or (high is not None and value > high):
            lower = f"at least {low}" if low is not None else f"above {above}"
            upper = f" and at most {high}" if high is not None else ""
            raise EvenstepError(f"{key}: {_short(value)} is out of range; it must be {lower}{upper}")
    return value


def _short(value: Any) -> str:
    """As Python writes it, the middle of what is very long left out."""
    try:
        text = repr(value)
    except ValueError:  # of an integer with thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:40]}...{text[-20:]}"


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes of a path or an argument that are no UTF-8
        return False
    return True


def limits(meta: Mapping[str, Any]) -> str:
    """The range or the choices of an option for help and docs, or nothing: `` (>= 0, <= 1)``."""
    if meta["choices"] and len(meta["choices"]) > 1:
        return f" ({' | '.join(meta['choices'])})"
    bounds = [(">=", meta["low"]), (">", meta["above"]), ("<=", meta["high"])]
    found = [f"{sign} {bound}" for sign, bound in bounds if bound is not None]
    return f" ({', '.join(found)})" if found else ""
