"""Progress of `prepare`: the argument of its callback, and a display of it."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TextIO

_LABELS = {"tokenizer": "training the tokenizer", "tokens": "tokenising"}
_EVERY = 5.0  # seconds between two plain lines


@dataclass(frozen=True)
class PrepareProgress:
    """The state of `prepare`.

    Args:
        stage: "tokenizer" (training the BPE) or "tokens".
        documents, bytes, tokens: processed in this stage; bytes of UTF-8.
        fraction: share of the stage that is done, 0 to 1; None if the size of the source is unknown.
        note: a fact about the result that the user should know, or "".
    """

    stage: str
    documents: int
    bytes: int
    tokens: int
    fraction: float | None
    note: str = ""

    def __str__(self) -> str:
        if self.note:
            return self.note
        share = "" if self.fraction is None else f" {self.fraction:4.0%}"
        tokens = f", {self.tokens:,} tokens" if self.tokens else ""
        return f"{_LABELS[self.stage]}{share}: {self.documents:,} documents, {self.bytes / 1e6:,.1f} MB{tokens}"


@contextmanager
def prepare_display(out: TextIO | None = None) -> Iterator[Callable[[PrepareProgress], None]]:
    """A display of `prepare`: ``with prepare_display() as show: prepare(spec, show)``.

    In a terminal it is a live bar (needs rich); otherwise a line every five seconds, and one at the end of each stage.
    When the result comes from the cache, only notes are written.

    Args:
        out: destination, stderr by default.
    """
    out = out or sys.stderr
    with ExitStack() as stack:
        show = _bars(out, stack) if out.isatty() else None
        yield show or _lines(out)


def _lines(out: TextIO) -> Callable[[PrepareProgress], None]:
    next_line = time.monotonic() + _EVERY

    def show(now: PrepareProgress) -> None:
        nonlocal next_line
        if now.note or now.fraction == 1.0 or time.monotonic() >= next_line:
            next_line = time.monotonic() + _EVERY
            print(now, file=out, flush=True)

    return show


def _bars(out: TextIO, stack: ExitStack) -> Callable[[PrepareProgress], None] | None:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(),
    )
    bars = Progress(*columns, console=Console(file=out), transient=False)
    tasks: dict[str, TaskID] = {}

    def show(now: PrepareProgress) -> None:
        if now.note:
            bars.console.print(now.note, markup=False, highlight=False)
            return
        if not tasks:
            stack.enter_context(bars)
        if now.stage not in tasks:
            tasks[now.stage] = bars.add_task(_LABELS[now.stage], total=None, detail="")
        detail = f"{now.bytes / 1e6:,.1f} MB" + (f", {now.tokens:,} tokens" if now.tokens else "")
        total = None if now.fraction is None else 1.0
        bars.update(tasks[now.stage], total=total, completed=now.fraction or 0.0, detail=detail)

    return show
