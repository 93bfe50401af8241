"""The flags ``--section.key`` of a kind of run, made from the fields of its configuration. Needs no torch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evenstep.errors import EvenstepError
from evenstep.train.checks import kinds, limits
from evenstep.train.config import BaseConfig, Config, options, sections
from evenstep.train.config_io import build, load_config, override, read_toml
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
        if field.metadata["joined"]:
            optional = {"action": Joined}
        groups[key.rpartition(".")[0]].add_argument(
            f"--{key}", dest=key, metavar=names[0].upper(), help=text.replace("%", "%%"), **optional
        )
    own = parser.add_argument_group("[optim] hyperparameters, with the default of each optimizer that has it")
    for name, defaults in owners().items():
        text = ", ".join(f"{optimizer} {shown(default)}" for optimizer, default in defaults.items())
        own.add_argument(f"--optim.{name}", dest=f"optim.{name}", metavar="VALUE", help=text)


class Joined(argparse.Action):
    """Of an option that is given several times: the texts, joined by commas."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, values if before is None else f"{before},{values}")


def declared(kind: type[BaseConfig] = Config) -> set[str]:
    """Names of the flags ``--section.key``: every option of ``kind``, and the optimizers' hyperparameters."""
    return {*options(kind), *(f"optim.{name}" for name in owners())}


def chosen(
    args: argparse.Namespace, kind: type[BaseConfig], recipe: Path | None, short: Mapping[str, str] | None = None
) -> tuple[Any, Path | None]:
    """The configuration that the flags ask for, and the run to go on with. ``short``: options that other arguments
    stand for, which the flags override. The run's own configuration is in the recipe's place where none is given.

    EvenstepError for what does not fit.
    """
    given = [(key, value) for key, value in vars(args).items() if key in declared(kind) and value is not None]
    overrides = [*(short or {}).items(), *given, *args.extra]
    directory = None
    if args.resume is not None and args.resume != "auto":
        out = args.resume or dict(given).get("out")
        if out is None:
            raise EvenstepError("--resume: which run? give its directory, --resume RUN (evenstep runs lists runs)")
        directory = Path(out)
        if recipe is None and (directory / "config.toml").is_file():
            return build(override(read_toml(directory / "config.toml"), overrides, kind), kind), directory
    return load_config(recipe, overrides, kind), directory


def shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
