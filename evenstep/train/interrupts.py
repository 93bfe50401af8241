"""Ctrl-C and SIGTERM as requests: the loop ends after the current step, with everything saved."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A run ended early on request, its state saved; the message says how to go on. Exit status: 128 + ``signal``."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number

    @property
    def exit_status(self) -> int:
        return 128 + self.signal


class Interrupts:
    """``with Interrupts() as stop:`` - ``stop.signal`` becomes the number of the first SIGINT or SIGTERM; the second
    one acts at once.

    Outside the main thread Python allows no signal handlers; there this does nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._first)
        return self

    def __exit__(self, *problem: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _first(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # Not print: the handler may have interrupted a print, and buffered files are not reentrant.
        os.write(2, b"\nevenstep: finishing this step, then saving; once more to stop at once without saving\n")
