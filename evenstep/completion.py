"""Completion for shells, from the parser and the list of options."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from evenstep.errors import EvenstepError, nearest
from evenstep.finetune.commands import MODES
from evenstep.finetune.config import FineTuneConfig
from evenstep.train.config import CHOICES, kinds, options


def script(parser: argparse.ArgumentParser, commands: Any, shell: str) -> str:
    """The completion of ``parser`` for ``shell``, with the values of its options; ``commands`` is the action that holds
    the parsers of its commands. EvenstepError without shtab, and for a shell it does not know.

    It changes the parser, which must not parse after that: argparse would check the choices itself, without the
    suggestion of what was meant.
    """
    try:
        import shtab
    except ImportError:
        raise EvenstepError("completion needs the package shtab; pip install 'evenstep[train]'") from None
    if shell not in shtab.SUPPORTED_SHELLS:
        names = ", ".join(shtab.SUPPORTED_SHELLS)
        raise EvenstepError(f"no completion for '{shell}'{nearest(shell, shtab.SUPPORTED_SHELLS)}; give {names}")
    directories = (
        "run", "runs", "directory", "resume", "out", "store", "stored", "data.cache_dir", "model.init", "model.path",
        "tuned",
    )  # fmt: skip
    files = ("recipe", "tables", "data.tokenizer", "json", "plot", "data", "data.file", "data.template")
    paths = dict.fromkeys(directories, shtab.DIRECTORY) | dict.fromkeys(files, shtab.FILE)
    known = options(FineTuneConfig) | options()
    choices = {key: field.metadata["choices"] for key, (field, _) in known.items()} | {"mode": tuple(MODES)}
    choices |= {key: ("true", "false") for key, (_, hint) in known.items() if bool in kinds(hint)}
    choices |= {f"optim.{name}": values for name, values in CHOICES.items()} | {"shell": shtab.SUPPORTED_SHELLS}
    for action in _actions(commands):
        if action.dest in paths:
            action.complete = paths[action.dest]
        elif choices.get(action.dest) and action.nargs != 0:
            action.choices = choices[action.dest]
    return shtab.complete(parser, shell)


def _actions(commands: Any) -> Iterator[Any]:
    """The options of every command, and of the commands that a command has."""
    for command in commands.choices.values():
        for action in command._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from _actions(action)
            else:
                yield action
