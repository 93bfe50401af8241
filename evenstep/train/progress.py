"""What the user sees while a run goes on: a live bar in a terminal, one plain line per log step anywhere else."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, TextIO


def silence(descriptor: int) -> None:
    """Let whatever is written there from now on vanish."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def tell(text: str, out: TextIO | None = None) -> None:
    """Print a line at once. When its reader has gone (``| head``) the output falls silent and the run goes on: hours
    of training must not end for that."""
    out = out or sys.stdout
    try:
        print(text, file=out, flush=True)
    except BrokenPipeError:
        silence(out.fileno())
        with suppress(OSError):
            print("evenstep: nobody reads the output any more; training goes on without it", file=sys.stderr)


def nothing(text: str) -> None:
    """Say nothing: for all processes but the first."""


def clock(seconds: float) -> str:
    """``3725`` -> ``1:02:05``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def train_line(record: dict[str, Any], total: int) -> str:
    """The one line of a training record of metrics.jsonl."""
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
    if "steps_to_reset" in record:
        parts.append(f"reset in {record['steps_to_reset']}")
    return "  ".join(parts)


def validation_line(record: dict[str, Any]) -> str:
    parts = [f"step {record['step']}", f"validation loss {record['val_loss']:.4f}"]
    shown = {"perplexity": ".2f", "bits_per_byte": ".4f", "score": ".4f"}
    parts += [
        f"{key.replace('_', ' ')} {record[key]:{form}}" for key, form in shown.items() if record.get(key) is not None
    ]
    return "  ".join(parts)


class LineProgress:
    """Plain lines, flushed one by one: for files, pipes and logs. Use as a context manager around the loop."""

    def __init__(self, total: int, out: TextIO | None = None) -> None:
        self.total = total
        self.out = out or sys.stdout

    def __enter__(self) -> LineProgress:
        return self

    def __exit__(self, *problem: object) -> None:
        return None

    def step(self, step: int, loss: float | None) -> None:
        """Called after every optimizer step; ``loss`` is None where reading it would wait for the GPU."""

    def train(self, record: dict[str, Any]) -> None:
        self.say(train_line(record, self.total))

    def validation(self, record: dict[str, Any]) -> None:
        self.say(validation_line(record))

    def parameters(self, names: list[str], record: dict[str, Any]) -> None:
        """Called when the numbers of all parameters are there (telemetry's record of them)."""

    def say(self, text: str) -> None:
        tell(text, self.out)


class NoProgress(LineProgress):
    """For all processes but the first."""

    def say(self, text: str) -> None:
        nothing(text)


class LiveProgress(LineProgress):
    """A bar that moves every step (rich), with the newest numbers beside it; validations and messages scroll above
    it."""

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
        self._tail = ""

    def __enter__(self) -> LiveProgress:
        self._bar.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._bar.stop()

    def step(self, step: int, loss: float | None) -> None:
        text = f"loss {loss:.4f}  {self._tail}" if loss is not None else None
        self._bar.update(self._task, completed=step, description=text)

    def train(self, record: dict[str, Any]) -> None:
        line = train_line(record, self.total).split("  ")
        self._tail = "  ".join(
            part for part in line if part.startswith(("lr", "eta", "reset")) or part.endswith("tok/s")
        )
        self._bar.update(self._task, completed=record["step"], description=f"loss {record['loss']:.4f}  {self._tail}")

    def parameters(self, names: list[str], record: dict[str, Any]) -> None:
        from evenstep.telemetry.live import worst_table

        self._bar.summary = worst_table(names, record)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


def make_progress(total: int, start: int = 0, *, quiet: bool = False) -> LineProgress:
    """The live bar when stdout is a terminal and rich is installed, plain lines otherwise; nothing when ``quiet``."""
    if quiet:
        return NoProgress(total)
    if sys.stdout.isatty():
        try:
            return LiveProgress(total, start=start)
        except ImportError:
            pass
    return LineProgress(total)
