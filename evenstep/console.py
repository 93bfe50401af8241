"""Output on a terminal: tables (drawn by rich if it is installed and stdout is a terminal), safe text, and the name of
the program in commands for the shell."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

Rows = Sequence[Sequence[str]]


def program() -> str:
    """The words that start this program from a shell in the working directory: ``evenstep`` if PATH finds the one of
    this Python, else its path."""
    script = shutil.which("evenstep", path=str(Path(sys.executable).parent))
    found = shutil.which("evenstep")
    if script is None:
        return "evenstep" if found else f"{shlex.quote(sys.executable)} -m evenstep"
    if found and os.path.samefile(found, script):
        return "evenstep"
    here = Path(script)
    return shlex.quote(str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here))


def printable(text: str) -> str:
    """``text`` with control characters escaped, except newline and tab: a model may generate escape sequences that
    change the terminal."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) != "Cc" else c.encode("unicode_escape").decode() for c in text
    )


def counted(number: int, noun: str) -> str:
    """``1, "thread"`` -> ``1 thread``; ``2, "thread"`` -> ``2 threads``."""
    return f"{number} {noun}{'s' if number != 1 else ''}"


def print_table(
    title: str, heads: Sequence[str], rows: Rows, below: str = "", *, marked: Callable[[str], bool] = lambda name: False
) -> None:
    """Print a table. ``marked`` selects highlighted rows by their first cell. The second cell of a row is written
    across all columns if it starts with ``skipped:``."""
    if not (sys.stdout.isatty() and _rich(title, heads, rows, marked)):
        _plain(title, heads, rows)
    if below:
        print(below)
    print()


def _is_across(row: Sequence[str]) -> bool:
    return len(row) > 1 and row[1].startswith("skipped:")


def _numeric(rows: Rows, column: int) -> bool:
    cells = [row[column] for row in rows if not _is_across(row) and row[column]]
    return column > 0 and bool(cells) and all(cell[0].isdigit() for cell in cells)


def _plain(title: str, heads: Sequence[str], rows: Rows) -> None:
    full = [heads, *(row for row in rows if not _is_across(row))]
    widths = [max(len(row[i]) for row in full) for i in range(len(heads))]
    widths[0] = max(len(row[0]) for row in [heads, *rows])
    right = [_numeric(rows, i) for i in range(len(heads))]
    if title:
        print(title)
    for row in [heads, *rows]:
        cells = zip(row, widths, right, strict=True)
        text = "  ".join(cell.rjust(width) if is_right else cell.ljust(width) for cell, width, is_right in cells)
        print((f"{row[0].ljust(widths[0])}  {row[1]}" if _is_across(row) else text).rstrip())


def _fitting(heads: Sequence[str], rows: Rows, width: int) -> int:
    """The number of columns, from the left, that fit into ``width`` without cutting a number; texts may wrap."""
    room = width - 1
    for i, head in enumerate(heads):
        cells = [row[i] for row in rows if not _is_across(row)]
        if i == 0 or _numeric(rows, i):  # is not wrapped
            needed = max(len(head), *map(len, cells)) if cells else len(head)
        else:
            needed = max((len(word) for cell in [head, *cells] for word in cell.split()), default=1)
        room -= needed + 3
        if room < 0:
            return max(1, i)
    return len(heads)


def _rich(title: str, heads: Sequence[str], rows: Rows, marked: Callable[[str], bool]) -> bool:
    """Print the table with rich; False if rich is not installed."""
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table as RichTable
    except ImportError:
        return False
    console = Console()
    kept = _fitting(heads, rows, console.width)
    table = RichTable(title=title or None, title_justify="left")
    for i, head in enumerate(heads[:kept]):
        table.add_column(head, justify="right" if _numeric(rows, i) else "left", no_wrap=i == 0 or _numeric(rows, i))
    for row in rows:
        if not _is_across(row):
            table.add_row(*map(escape, row[:kept]), style="bold green" if marked(row[0]) else "")
    console.print(table)
    if kept < len(heads):
        console.print(f"not shown, the terminal is too narrow: {', '.join(heads[kept:])}", markup=False)
    for row in rows:
        if _is_across(row):
            console.print(f"[dim]{escape(row[0])}  {escape(row[1])}[/dim]")
    return True
