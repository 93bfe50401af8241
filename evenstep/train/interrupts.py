"""Ctrl-C, SIGTERM and a closed terminal as requests: the loop ends after the current step, with everything saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import FrameType
from typing import Any, TypeVar

from evenstep.train.progress import silence

T = TypeVar("T")

_HANGUP = getattr(signal, "SIGHUP", None)  # not on Windows


class Interrupted(Exception):
    """A run ended early on request, its state saved; the message says how to go on. Exit status: 128 + ``signal``."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number

    @property
    def exit_status(self) -> int:
        return 128 + self.signal


class Stopped(Exception):
    """A signal came between two items of ``Interrupts.watch``."""


class Interrupts:
    """``with Interrupts() as stop:`` - ``stop.signal`` becomes the number of the first SIGINT, SIGTERM or SIGHUP; a
    second SIGINT or SIGTERM acts at once. A SIGHUP that is ignored (nohup) stays so.

    Outside the main thread Python allows no signal handlers; there this does nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}
        self._terminals = [number for number in (1, 2) if os.isatty(number)]

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            wanted = [signal.SIGINT, signal.SIGTERM]
            if _HANGUP and signal.getsignal(_HANGUP) is not signal.SIG_IGN:
                wanted.append(_HANGUP)
            for number in wanted:
                self._before[number] = signal.signal(number, self._first)
        return self

    def __exit__(self, *problem: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def watch(self, items: Iterable[T]) -> Iterator[T]:
        """The items, until a signal comes; then Stopped."""
        for item in items:
            if self.signal is not None:
                raise Stopped
            yield item

    def _first(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if _HANGUP in self._before:
            signal.signal(_HANGUP, signal.SIG_IGN)  # the kernel and the shell may both send it
        if number == _HANGUP:  # the terminal is gone, and writing to it would be an error
            for terminal in self._terminals:
                silence(terminal)
            return
        # Not print: the handler may have interrupted a print, and buffered files are not reentrant.
        with suppress(OSError):
            os.write(2, b"\nevenstep: finishing this step, then saving; once more to stop at once without saving\n")
