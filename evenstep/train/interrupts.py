"""Signals that end a run: after Ctrl-C, SIGTERM or a closed terminal the loop finishes its step and saves."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

from evenstep.train.log import silence

T = TypeVar("T")

_HANGUP = getattr(signal, "SIGHUP", None)  # not on Windows


class Interrupted(Exception):
    """A run has ended early because of a signal. Its state is saved, and the message has the command that continues it.
    The exit status of the program is 128 + ``signal``, as shells expect."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number

    @property
    def exit_status(self) -> int:
        return 128 + self.signal


class Stopped(Exception):
    """A signal has arrived between two items of `Interrupts.watch`."""


def _install(numbers: list[int], handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Install ``handler`` for the signals ``numbers``, and for SIGHUP unless the process ignores it (nohup).

    Returns the former handlers by signal; none outside the main thread, where Python allows no signal handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    if _HANGUP and signal.getsignal(_HANGUP) is not signal.SIG_IGN:
        numbers = [*numbers, _HANGUP]
    return {number: signal.signal(number, handler) for number in numbers}


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextmanager
def raising() -> Iterator[list[int]]:
    """Context in which the first SIGTERM or SIGHUP raises KeyboardInterrupt, as Ctrl-C does. The list then contains the
    number of the signal. An ignored SIGHUP stays ignored. Does nothing outside the main thread."""
    raised: list[int] = []

    def first(number: int, frame: FrameType | None) -> None:
        raised.append(number)
        for wanted in before:  # the kernel and the shell may both send one
            signal.signal(wanted, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = _install([signal.SIGTERM], first)
    try:
        yield raised
    finally:
        _restore(before)


class Votes:
    """A vote among processes, whose result is the largest number that one of them has cast.

    The result is known one vote later: the all-reduce runs while the processes train, and none of them waits for it.
    With one process it is known at once.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self._sent: Any = None

    def cast(self, number: int) -> int:
        """Cast a number of at least 0; returns the largest number of the previous vote. Every process has to cast the
        same number of votes, or the others wait for ever."""
        if self.group is None:
            return number
        import torch
        import torch.distributed as dist

        # int64 on the CPU in a gloo group: the vote neither waits for the GPU nor queues behind its collectives.
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
    """Context of a training loop. The first SIGINT, SIGTERM or SIGHUP only sets ``signal`` to its number; a second
    SIGINT or SIGTERM ends the process at once. An ignored SIGHUP stays ignored.

    Several processes stop at the same step: all of them call `poll` at the same places, and it returns the result of
    ``votes``. With ``quiet`` nothing is printed. Outside the main thread signals are not handled.
    """

    def __init__(self, votes: Votes | None = None, *, quiet: bool = False) -> None:
        self.signal: int | None = None
        self.agreed: int | None = None
        self.votes, self.quiet = votes or Votes(), quiet
        self._before: dict[int, Any] = {}
        # Asked now: after a hangup the descriptors of the terminal are no longer terminals.
        self._terminals = [number for number in (1, 2) if os.isatty(number)]

    def __enter__(self) -> Interrupts:
        self._before = _install([signal.SIGINT, signal.SIGTERM], self._first)
        return self

    def __exit__(self, *problem: object) -> None:
        _restore(self._before)

    def watch(self, items: Iterable[T]) -> Iterator[T]:
        """The items one by one. Raises Stopped once a signal has arrived."""
        for item in items:
            if self.poll() is not None:
                raise Stopped
            yield item

    def poll(self, also: int = 0) -> int | None:
        """The signal on which all processes agree, or None. ``also`` is another number to vote for, larger than the
        number of any signal."""
        if self.agreed is None:
            self.agreed = self.votes.cast(max(self.signal or 0, also)) or None
        return self.agreed

    def _first(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        # From now on Ctrl-C raises KeyboardInterrupt, and SIGTERM ends the process: the user insists.
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
