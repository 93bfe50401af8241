"""The flags ``--section.key`` of a kind of run, made from the fields of its configuration. Needs no torch."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evenstep.console import program
from evenstep.errors import EvenstepError
from evenstep.paths import unused
from evenstep.train.checks import kinds, limits
from evenstep.train.config import BaseConfig, Config, options, sections
from evenstep.train.config_io import build, load_config, override, read_toml, to_toml, without_foreign_options
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
        wanted = dict(given).get("out")
        out = args.resume or wanted
        if out is None:
            raise EvenstepError("--resume: which run? give its directory, --resume RUN (evenstep runs lists runs)")
        directory, saved = Path(out), Path(out, "config.toml")
        if wanted is not None and Path(wanted).resolve() != directory.resolve():
            raise EvenstepError(
                f"--resume {out} goes on in that folder, --out {wanted} is another; leave --out out, or start a new "
                f"run from the weights with: {new_run(kind.COMMAND, directory, out=wanted)}"
            )
        if recipe is None and saved.is_file():
            tables = without_foreign_options(read_toml(saved), overrides, saved)
            return build(override(tables, overrides, kind), kind), directory
    return load_config(recipe, overrides, kind), directory


def print_config(config: Any, directory: Path | None) -> None:
    """The configuration as a recipe. EvenstepError for what a run of it would refuse: hyperparameters that the
    optimizer does not have or take, a model to start from that is not there, changes that a resume does not allow."""
    from evenstep.train.optimizers import try_optimizer
    from evenstep.train.setup import with_shape_of
    from evenstep.train.state import check_changes
    from evenstep.train.weights import find_source

    try_optimizer(config.optim)
    if directory is not None:
        if not (directory / "config.toml").is_file():
            raise EvenstepError(f"{directory} is not a run: it has no config.toml; evenstep runs lists runs")
        check_changes(directory, config, build(read_toml(directory / "config.toml"), type(config)))
    if isinstance(config, Config) and config.model.init:
        with_shape_of(config, find_source(Path(config.model.init), lambda _: None))
    print(to_toml(config), end="")


def new_run(command: str, run: Path, words: Sequence[str] = (), out: str | None = None, *, weights: bool = True) -> str:
    """The command line of a new run as ``run`` with other options, from its ``weights`` where they fit. ``out``: None
    for a folder that does not exist yet, beside that of the run."""
    start = [command, str(run / "config.toml")]
    if weights and command == "pretrain":  # fine-tuning names its model in the configuration
        start += ["--model.init", str(run)]
    return f"{program()} {shlex.join([*start, *words, '--out', out or str(unused(run))])}"


def shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, list):
        return shown(tuple(value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
