"""The layout of ``--help``: texts fill the width of the terminal, an example that is too wide takes two lines, and each
command ends with its exit status.

argparse keeps either all line ends of a text or none. Here a paragraph is filled, and indented lines stay as they are.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterator
from typing import Any

STATUS = """\
exit status:
  0    success
  1    a failure while running, such as a full disk, or a --fail-on that holds
  2    wrong usage or input: one line on stderr says what to do
  75   a process of a distributed run hung
  130  stopped by Ctrl-C; 143 by SIGTERM
"""

ENVIRONMENT = """\
environment:
  EVENSTEP_CACHE        prepared data (default: ~/.cache/evenstep)
  EVENSTEP_CPU_KERNELS  avx512, avx2, default, or none for the plain code
                        (default: the best that this processor runs)
  OMP_NUM_THREADS       threads of a process that has no train.threads
"""

TRAINS = ("pretrain", "finetune", "sweep", "compare", "official", "stability")
"""Commands that train, which name the environment variables too."""


class HelpFormatter(argparse.HelpFormatter):
    """Fills paragraphs, and keeps indented lines, except those that are wider than the terminal."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        blocks = text.strip("\n").split("\n\n")
        return "\n\n".join(textwrap.indent(_block(block, width), indent) for block in blocks) + "\n"

    def start_section(self, heading: str | None) -> None:
        super().start_section(heading and "\n".join(textwrap.wrap(heading, self._width - 1)))

    def _format_usage(self, usage: str | None, *given: Any) -> str:
        text = super()._format_usage(usage, *given)
        if usage is None:  # argparse has wrapped its own
            return text
        hanging = " " * (len("usage: ") + len(self._prog) + 1)
        return textwrap.fill(text.strip(), self._width, subsequent_indent=hanging, break_on_hyphens=False) + "\n\n"


def _block(block: str, width: int) -> str:
    if not any(line.startswith(" ") for line in block.splitlines()):
        return textwrap.fill(" ".join(block.split()), width)
    return "\n".join(line for each in block.splitlines() for line in _example(each, width))


def _example(line: str, width: int) -> Iterator[str]:
    """The line of an example. If it is too wide, its comment goes below, and a command is continued as in a shell."""
    if len(line) <= width or not line.startswith(" "):
        yield line
        return
    command, _, comment = re.sub(r"(?<=\S) {2,}", "\0", line, count=1).partition("\0")
    # An option and its value stay on one line
    joined = re.sub(r"(--[\w.-]+) (?=[^-\s])", "\\1\0", command)
    lines = textwrap.wrap(joined, width - 2, subsequent_indent="      ", break_long_words=False, break_on_hyphens=False)
    lines = [each.replace("\0", " ") for each in lines]
    yield from [f"{each} \\" for each in lines[:-1]]
    yield lines[-1]
    if comment:
        yield from textwrap.wrap(comment, width, initial_indent="      # ", subsequent_indent="      # ")


def finish_help(parser: argparse.ArgumentParser, name: str = "") -> None:
    """Give this layout and the last sections to a program and to all of its commands, once they are complete.

    Args:
        parser: of the program, or of the command whose words are ``name``.
        name: "" for the program.
    """
    parser.formatter_class = HelpFormatter
    sections = [parser.epilog, STATUS, ENVIRONMENT if not name or name in TRAINS else None]
    parser.epilog = "\n".join(section for section in sections if section)
    for action in parser._actions:
        for command, each in action.choices.items() if isinstance(action, argparse._SubParsersAction) else ():
            finish_help(each, f"{name} {command}".strip())
