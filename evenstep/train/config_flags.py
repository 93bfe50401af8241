"""The flags ``--section.key`` of a kind of run, made from the fields of its configuration. Needs no torch."""

from __future__ import annotations

import argparse
from typing import Any

from evenstep.train.checks import kinds, limits
from evenstep.train.config import BaseConfig, options, sections
from evenstep.train.hyperparameters import owners


def add_flags(parser: argparse.ArgumentParser, kind: type[BaseConfig]) -> None:
    """Every option of ``kind``, the hyperparameters of the optimizers, and what every such command has."""
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument(
        "--resume", metavar="RUN", nargs="?", const="",
        help="go on with the run in this directory (none: --out; auto: --out where it was saved, else start)",
    )  # fmt: skip
    parser.add_argument(
        "--compile", dest="train.compile", action="store_const", const="true", help="short for --train.compile true"
    )
    groups = {name: parser.add_argument_group(f"[{name}] {cls.TITLE}") for name, cls in sections(kind).items()}
    groups[""] = parser.add_argument_group(kind.TITLE)
    for key, (field, hint) in options(kind).items():
        text = field.metadata["help"] + limits(field.metadata)
        if field.default is not None and field.default != "":
            text += f" (default: {shown(field.default)})"
        names = [one.__name__ for one in kinds(hint) if one is not type(None)]
        optional: Any = {"nargs": "?", "const": "true"} if bool in kinds(hint) else {}
        groups[key.rpartition(".")[0]].add_argument(
            f"--{key}", dest=key, metavar=names[0].upper(), help=text.replace("%", "%%"), **optional
        )
    own = parser.add_argument_group("[optim] hyperparameters, with the default of each optimizer that has it")
    for name, defaults in owners().items():
        text = ", ".join(f"{optimizer} {shown(default)}" for optimizer, default in defaults.items())
        own.add_argument(f"--optim.{name}", dest=f"optim.{name}", metavar="VALUE", help=text)


def shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
