"""The log of a run: metrics.jsonl, and the output on the terminal.

metrics.jsonl has one JSON object per line. A line is written as soon as its record exists, and a resume removes the
lines after its checkpoint, so no step appears twice. A terminal shows a live progress bar with the newest values; files
and pipes get one plain line per log step. Nothing here imports torch.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from evenstep.errors import EvenstepError
from evenstep.telemetry.schema import read_records, to_line
from evenstep.train.checkpoint import how_to_continue, reason_of
from evenstep.train.files import replace_text

if TYPE_CHECKING:
    from evenstep.train.distributed import World

# ---- metrics.jsonl ----


class Metrics:
    """Appends records to a file. With ``last_step``, on a resume, the records of later steps and an incomplete last
    line are removed first.

    The file has records of training, of validation, and of telemetry, which have a ``kind``. ``last_train`` and
    ``last_validation`` are the newest training and validation records, None before the first.
    """

    def __init__(self, path: Path, last_step: int | None = None) -> None:
        self.path = path
        self.seconds = 0.0  # of training, from the newest record
        self.last_train: dict[str, Any] | None = None
        self.last_validation: dict[str, Any] | None = None
        # The whole file is replaced by one rename, so that a kill during the resume cannot lose records.
        if last_step is not None and path.exists():
            kept = up_to(last_step, read_records(path))
            for record in kept:
                self._remember(record)
            replace_text(path, "".join(to_line(record) for record in kept))
        try:
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run
        except OSError as problem:
            raise EvenstepError(f"could not write {path}: {problem.strerror}; give another --out") from problem

    @property
    def validated(self) -> int | None:
        """The step of the newest validation."""
        return self.last_validation["step"] if self.last_validation else None

    def _remember(self, record: dict[str, Any]) -> None:
        if "kind" in record:
            return
        self.seconds = record.get("seconds", self.seconds)
        if "val_loss" in record:
            self.last_validation = record
        else:
            self.last_train = record

    def write(self, record: dict[str, Any]) -> None:
        try:
            # Flushed per record, so that `evenstep watch` and a killed run have every line. No fsync: after a power
            # failure the resumed run writes the missing lines again.
            self._file.write(to_line(record))
            self._file.flush()
        except OSError as problem:
            raise EvenstepError(
                f"could not write {self.path}: {problem.strerror}; make room and {how_to_continue(self.path.parent)}"
            ) from problem
        self._remember(record)

    def close(self) -> None:
        self._file.close()


class NoMetrics(Metrics):
    """The log of a process other than process 0, which writes no file but remembers the newest records."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.last_train = self.last_validation = None

    def write(self, record: dict[str, Any]) -> None:
        self._remember(record)

    def close(self) -> None:
        pass


def resume_metrics(path: Path, step: int, world: World) -> Metrics:
    """The log of a run that is resumed at ``step``, truncated to that step. Every process gets its newest records,
    which decide whether the next validation is due."""
    metrics = Metrics(path, last_step=step) if world.is_main else NoMetrics()
    metrics.seconds, metrics.last_train, metrics.last_validation = world.on_rank_0(
        lambda: (metrics.seconds, metrics.last_train, metrics.last_validation)
    )
    return metrics


def up_to(last_step: int, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records that a run resumed at ``last_step`` keeps. Telemetry writes the record of a step some steps later.
    Its records that follow a record of a later step are removed too, because the resumed run writes them again."""
    kept, past = [], False
    for record in records:
        later = record["step"] > last_step
        past = past or later
        if not later and not (past and "kind" in record):
            kept.append(record)
    return kept


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The training and validation records of the file in order, without those of telemetry. Lines that are not a JSON
    object with a step, such as the last line of a killed process, are left out."""
    return [record for record in read_records(path, telemetry=False) if "kind" not in record]


# ---- the terminal ----


def silence(descriptor: int) -> None:
    """Redirect a file descriptor to the null device."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def print_line(text: str, out: TextIO | None = None) -> None:
    """Print a line and flush it. Characters that the encoding does not have are escaped.

    When the reader of a pipe has gone (``| head``) or the disk is full, all further output is discarded and the run
    continues: hours of training must not end because of the terminal.
    """
    out = out or sys.stdout
    try:
        try:
            print(text, file=out, flush=True)
        except UnicodeEncodeError as problem:
            print(text.encode(problem.encoding, "backslashreplace").decode(problem.encoding), file=out, flush=True)
    except (OSError, ValueError) as problem:  # ValueError: it was closed
        fall_silent(out, problem)


def fall_silent(out: TextIO, problem: Exception) -> None:
    """Discard the output from now on, and say so on stderr, if stderr can be written."""
    why = "the reader of the output has gone"
    if not isinstance(problem, BrokenPipeError):
        why = f"the output cannot be written ({reason_of(problem)})"
    with suppress(OSError, ValueError):
        silence(out.fileno())
        print(f"evenstep: {why}; the training continues without output", file=sys.stderr, flush=True)


def print_nothing(text: str) -> None:
    """Print nothing: the ``say`` of every process except process 0."""


def clock(seconds: float) -> str:
    """Seconds as hours, minutes and seconds.

    >>> clock(3725)
    '1:02:05'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def short_count(value: float) -> str:
    """A count with a suffix.

    >>> short_count(1_500_000)
    '1.5M'
    """
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"


COLUMNS = {
    "loss": "mean over the steps since the last line, nats per token",
    "lr": "learning rate",
    "grad": "norm of all gradients together, before clipping",
    "tok/s": "tokens per second",
    "eta": "time left, from that speed, without validations",
    "reset in": "steps until the optimizer resets its moments",
}
"""The columns of a training line, and their meaning."""


def columns_help(*, resets: bool) -> str:
    """The meaning of the columns in one text; that of the last one only if the run ``resets`` moments."""
    return "; ".join(f"{name}: {meaning}" for name, meaning in COLUMNS.items() if resets or name != "reset in")


def line_width(out: TextIO) -> int:
    """Characters of a line of ``out``: those of the terminal, and no limit for a file."""
    return shutil.get_terminal_size().columns if out.isatty() else 10**6


def wrapped(text: str, width: int, indent: int) -> str:
    """``text`` broken between words into lines of at most ``width`` characters, indented from the second line on. A
    word that is longer than a line, such as a path, stays whole."""
    return textwrap.fill(
        text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )  # fmt: skip


def fitting(parts: list[str], width: int) -> str:
    """As many of the parts as fit into ``width`` characters, from the left, at least the first."""
    while len(parts) > 1 and len("  ".join(parts)) > width:
        parts = parts[:-1]
    return "  ".join(parts)


def train_parts(record: dict[str, Any], total: int) -> list[str]:
    """A training record of metrics.jsonl as columns; ``total`` is the number of steps of the run."""
    speed = record["tokens_per_second"]
    left = (total - record["step"]) * record["tokens"] / record["step"] / speed if speed else 0.0
    parts = [
        f"step {record['step']:>{len(str(total))}}/{total}",
        f"loss {record['loss']:.4f}",
        f"lr {record['lr']:.2e}",
        f"grad {record['grad_norm']:.3f}",
        f"{speed:,.0f} tok/s",
        f"eta {clock(left)}",
    ]
    if record.get("steps_to_reset", math.inf) <= total - record["step"]:  # otherwise the run ends before the reset
        parts.append(f"reset in {record['steps_to_reset']}")
    return parts


def validation_parts(record: dict[str, Any]) -> list[str]:
    """A validation record as columns."""
    parts = [f"step {record['step']}", f"validation loss {record['val_loss']:.4f}"]
    shown = {"perplexity": ".2f", "bits_per_byte": ".4f", "score": ".4f"}
    parts += [
        f"{key.replace('_', ' ')} {record[key]:{form}}" for key, form in shown.items() if record.get(key) is not None
    ]
    return parts


class LineProgress:
    """Progress as plain lines, for files and pipes, and for terminals without rich, where lines keep to the width. A
    context manager around the training loop."""

    def __init__(self, total: int, out: TextIO | None = None) -> None:
        self.total = total
        self.out = out or sys.stdout

    def __enter__(self) -> LineProgress:
        return self

    def __exit__(self, *problem: object) -> None:
        return None

    def step(self, step: int, loss: float | None) -> None:
        """Called after every optimizer step. ``loss`` is None where reading it would wait for the GPU."""

    @property
    def width(self) -> int:
        return line_width(self.out)

    def train(self, record: dict[str, Any]) -> None:
        self.say(fitting(train_parts(record, self.total), self.width))

    def validation(self, record: dict[str, Any]) -> None:
        self.say(fitting(validation_parts(record), self.width))

    def event(self, text: str) -> None:
        """Called with the line of an event of telemetry."""
        self.say(wrapped(text, self.width, EVENT_INDENT))

    def parameters(self, names: list[str], record: dict[str, Any]) -> None:
        """Called with telemetry's record of the values of all parameters."""

    def say(self, text: str) -> None:
        print_line(text, self.out)


class NoProgress(LineProgress):
    """No output: for every process except process 0."""

    def say(self, text: str) -> None:
        print_nothing(text)


class LiveProgress(LineProgress):
    """A progress bar (rich) that moves with every step and shows the newest values. Validations and messages are
    printed above it."""

    def __init__(self, total: int, out: TextIO | None = None, start: int = 0) -> None:
        super().__init__(total, out)
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        class Bar(Progress):
            summary: Any = None

            def get_renderables(self) -> Iterator[Any]:
                yield self.make_tasks_table(self.tasks)
                if self.summary is not None:
                    yield self.summary

        # Few refreshes: the bar's thread shares the interpreter with the training loop.
        self._console = Console(file=self.out, highlight=False)
        columns = (
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
        )
        self._bar = Bar(*columns, console=self._console, refresh_per_second=4, expand=True)
        self._task = self._bar.add_task("starting", total=total, completed=start)
        self._tail: list[str] = []

    def __enter__(self) -> LiveProgress:
        self._bar.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._shown(self._bar.stop)

    def _shown(self, act: Callable[[], None]) -> None:
        """Call ``act``, which writes to the terminal. A closed terminal or an unsupported character is not an error."""
        try:
            act()
        except (OSError, ValueError) as problem:
            fall_silent(self.out, problem)

    def _update(self, completed: int, loss: float | None) -> None:
        """Move the bar, and show beside it the loss and as many of the other values as fit."""
        if loss is None:
            return self._bar.update(self._task, completed=completed)
        text = f"loss {loss:.4f}"
        room = self._console.width - len(f"step {completed}/{self.total}  ") - _BAR_WIDTH
        for i in range(len(self._tail), -1, -1):
            text = "  ".join([f"loss {loss:.4f}", *self._tail[:i]])
            if len(text) <= room:
                break
        self._bar.update(self._task, completed=completed, description=text)

    def step(self, step: int, loss: float | None) -> None:
        self._update(step, loss)

    @property
    def width(self) -> int:
        return self._console.width

    def train(self, record: dict[str, Any]) -> None:
        line = train_parts(record, self.total)
        found = {key: part for part in line for key in _BESIDE if key in part.split(" ")}
        self._tail = [found[key] for key in _BESIDE if key in found]
        self._update(record["step"], record["loss"])

    def parameters(self, names: list[str], record: dict[str, Any]) -> None:
        from evenstep.telemetry.lines import worst_table

        self._bar.summary = worst_table(names, record, width=self._console.width)

    def event(self, text: str) -> None:
        style = next((style for words, style in EVENT_STYLES.items() if words in text), "yellow")
        lines = wrapped(text, self.width, EVENT_INDENT)
        self._shown(lambda: self._console.print(lines, markup=False, soft_wrap=True, style=style))

    def say(self, text: str) -> None:
        # Not wrapped: the terminal does it, so that a command can be copied.
        self._shown(lambda: self._console.print(text, markup=False, soft_wrap=True))


EVENT_INDENT = 4
"""Spaces before the second line of an event."""

EVENT_STYLES = {"has recovered": "green", "loss spike": "red", "not finite": "red", "weights are": "red"}
"""Words of an event's line -> its colour on a terminal. All other events are yellow."""

_BESIDE = ("eta", "tok/s", "lr", "reset")
"""The values beside the bar, by a word of their text, in order of importance: the last ones are left out first."""

_BAR_WIDTH = 8
"""Number of columns that are reserved for the bar itself."""


def make_progress(total: int, start: int = 0, *, quiet: bool = False) -> LineProgress:
    """A live bar if stdout is a terminal and rich is installed, otherwise plain lines; no output if ``quiet``."""
    if quiet:
        return NoProgress(total)
    if sys.stdout.isatty():
        try:
            return LiveProgress(total, start=start)
        except ImportError:
            pass
    return LineProgress(total)
