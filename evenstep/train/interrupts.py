"""Ctrl-C, SIGTERM and a closed terminal as requests: the loop ends after the current step, with everything saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

from evenstep.train.log import silence

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


@contextmanager
def raising() -> Iterator[list[int]]:
    """The first SIGTERM or SIGHUP raises KeyboardInterrupt, as Ctrl-C does; the list then holds its number. A SIGHUP
    that is ignored (nohup) stays so. Outside the main thread this does nothing."""
    raised: list[int] = []

    def first(number: int, frame: FrameType | None) -> None:
        raised.append(number)
        for wanted in before:  # the kernel and the shell may both send one
            signal.signal(wanted, signal.SIG_IGN)
        raise KeyboardInterrupt

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        wanted = [signal.SIGTERM]
        if _HANGUP and signal.getsignal(_HANGUP) is not signal.SIG_IGN:
            wanted.append(_HANGUP)
        before = {number: signal.signal(number, first) for number in wanted}
    try:
        yield raised
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Votes:
    """A vote among processes: the largest number that one of them has cast, known at the next vote, so that no process
    waits for the message. With one process it is known at once."""

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self._sent: Any = None

    def cast(self, number: int) -> int:
        """Cast a number of at least 0; returns the largest number of the previous vote. All processes must cast equally
        often."""
        if self.group is None:
            return number
        import torch
        import torch.distributed as dist

        ballot = torch.tensor([number])
        before, self._sent = (
            self._sent,
            (ballot, dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self.group, async_op=True)),
        )
        if before is None:
            return 0
        before[1].wait()
        return int(before[0])

    def close(self) -> None:
        """Join the pending collective."""
        if self._sent is not None:
            self._sent[1].wait()
            self._sent = None


class Interrupts:
    """``with Interrupts() as stop:`` - ``stop.signal`` becomes the number of the first SIGINT, SIGTERM or SIGHUP; a
    second SIGINT or SIGTERM acts at once. A SIGHUP that is ignored (nohup) stays so.

    Python allows no signal handlers outside the main thread; there this does nothing. Several processes stop at the
    same step: they call `poll` at the same places, and it returns the result of ``votes``. ``quiet`` prints nothing.
    """

    def __init__(self, votes: Votes | None = None, *, quiet: bool = False) -> None:
        self.signal: int | None = None
        self.agreed: int | None = None
        self.votes, self.quiet = votes or Votes(), quiet
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
            if self.poll() is not None:
                raise Stopped
            yield item

    def poll(self, also: int = 0) -> int | None:
        """The signal on which all processes agree, None without one. ``also``: another number to vote for, larger than
        any signal."""
        if self.agreed is None:
            self.agreed = self.votes.cast(max(self.signal or 0, also)) or None
        return self.agreed

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
        if self.quiet:
            return
        # Not print: the handler may have interrupted a print, and buffered files are not reentrant.
        with suppress(OSError):
            os.write(2, b"\nevenstep: finishing this step, then saving; once more to stop at once without saving\n")
