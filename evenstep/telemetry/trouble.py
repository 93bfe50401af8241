"""Warnings of telemetry: one for each kind of problem, at the line of the user's program that led to it. Needs no
torch."""

from __future__ import annotations

import sys
import warnings

from evenstep.errors import first_line

OURS = ("evenstep", "torch", "contextlib", "functools")
"""Packages whose lines a warning never points at."""


def warn(text: str) -> None:
    """Issue a UserWarning at the innermost line that belongs to none of `OURS`."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).partition(".")[0] in OURS:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


class Troubles:
    """Warns once of each kind of problem. Telemetry never ends a training, so a failure inside a step becomes a
    warning, and the same failure on the next million steps must stay silent.

    Args:
        owner: name of the class that warns, with which every warning begins.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.told: set[str] = set()

    def tell(self, kind: str, text: str) -> None:
        """Warn with ``text``, unless a problem of this ``kind`` has been reported."""
        if kind not in self.told:
            self.told.add(kind)
            warn(f"{self.owner}: {text}")

    def failed(self, what: str, problem: Exception) -> None:
        """Warn that the monitor could not do ``what`` because of ``problem``."""
        self.tell(
            what, f"could not {what} ({type(problem).__name__}: {first_line(problem)}); training goes on without it"
        )
