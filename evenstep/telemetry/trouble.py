"""Warnings of telemetry: each kind of trouble once, at the line of the program that led to it. Needs no torch."""

from __future__ import annotations

import sys
import warnings

OURS = ("evenstep", "torch", "contextlib", "functools")


def reason(problem: BaseException) -> str:
    """The first line of an exception, or its type where it has no text."""
    return next(iter(str(problem).splitlines()), "") or type(problem).__name__


def warn(text: str) -> None:
    """A UserWarning at the innermost line that is neither of evenstep nor of torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).partition(".")[0] in OURS:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


class Troubles:
    """Tells of each kind of trouble once. ``owner``: the name that warnings begin with."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.told: set[str] = set()

    def tell(self, kind: str, text: str) -> None:
        if kind not in self.told:
            self.told.add(kind)
            warn(f"{self.owner}: {text}")

    def failed(self, what: str, problem: Exception) -> None:
        self.tell(what, f"could not {what} ({type(problem).__name__}: {reason(problem)}); training goes on without it")
