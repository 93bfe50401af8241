"""The options as flags of the command line, and as the page ``docs/configuration.md``.

Both are generated from the fields of `evenstep.train.config` and from the hyperparameters that
`evenstep.optim.options` declares, so a new option needs no edit here. Nothing here imports torch.
``python -m evenstep.train.flags > docs/configuration.md`` writes the page.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from evenstep.errors import EvenstepError
from evenstep.paths import unused
from evenstep.train.checkpoint import Parent
from evenstep.train.config import HYPERPARAMETERS, BaseConfig, Config, kinds, limits, options, owners, sections
from evenstep.train.config_io import (
    build,
    config_file,
    load_config,
    override,
    read_toml,
    shown,
    without_foreign_options,
)

# ---- flags ----


def add_flags(parser: argparse.ArgumentParser, kind: type[BaseConfig]) -> None:
    """Add the flags of every option of ``kind``, of the hyperparameters of the optimizers, and of the configuration
    itself (``--print-config``, ``--resume``)."""
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument(
        "--resume", metavar="RUN", nargs="?", const="",
        help="continue the run in this directory (without a value: in --out; auto: in --out if it has a checkpoint); "
        "with RUN or RUN@STEP and another --out, a new run goes on from that checkpoint with changed options",
    )  # fmt: skip
    parser.add_argument(
        "--compile", dest="train.compile", action="store_const", const="true", help="same as --train.compile true"
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
        groups[section_of(key)].add_argument(
            f"--{key}", dest=key, metavar=names[0].upper(), help=text.replace("%", "%%"), **optional
        )
    own = parser.add_argument_group("[optim] hyperparameters, with the default of each optimizer that has it")
    for name, of in owners().items():
        meanings = "; ".join(dict.fromkeys(one.help for one in of.values()))
        defaults = ", ".join(f"{optimizer} {shown(one.default)}" for optimizer, one in of.items())
        text = f"{meanings} (default: {defaults})".replace("%", "%%")
        own.add_argument(f"--optim.{name}", dest=f"optim.{name}", metavar="VALUE", help=text)


def add_overrides(
    parser: argparse.ArgumentParser, kind: type[BaseConfig] = Config, without: Collection[str] = ()
) -> None:
    """Add the flags of every option of ``kind`` to the parser of a command whose help does not list them, except those
    ``without``. `given_options` reads them."""
    for key in sorted(declared(kind) - {*without}):
        parser.add_argument(f"--{key}", dest=key, help=argparse.SUPPRESS)


def given_options(args: argparse.Namespace, kind: type[BaseConfig] = Config) -> list[tuple[str, str]]:
    """The options of ``kind`` on the command line and their texts, those that `add_flags` does not know at the end."""
    return [
        *((key, value) for key, value in vars(args).items() if key in declared(kind) and value is not None),
        *args.extra,
    ]


def section_of(key: str) -> str:
    """The section of an option; empty for an option of the top level.

    >>> section_of("optim.lr_scale.last"), section_of("seed")
    ('optim', '')
    """
    return key.partition(".")[0] if "." in key else ""


class Joined(argparse.Action):
    """An option that may be given several times; its values are joined by commas."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, values if before is None else f"{before},{values}")


def declared(kind: type[BaseConfig] = Config) -> set[str]:
    """Names of the flags ``--section.key``: every option of ``kind``, and the optimizers' hyperparameters."""
    return {*options(kind), *(f"optim.{name}" for name in owners())}


def chosen(
    args: argparse.Namespace, kind: type[BaseConfig], recipe: Path | None, short: Mapping[str, str] | None = None
) -> tuple[Any, Path | Parent | None]:
    """The configuration that the command line describes, and the directory of the run to continue, the checkpoint of
    another run to go on from, or None.

    ``short`` has options that other arguments stand for; flags override them. With ``--resume`` and without a recipe
    the configuration of the run takes the place of the recipe. EvenstepError for values that do not fit.
    """
    given = given_options(args, kind)
    overrides = [*(short or {}).items(), *given]
    start: Path | Parent | None = None
    if args.resume is not None and args.resume != "auto":
        wanted = dict(given).get("out")
        out = args.resume or wanted
        if out is None:
            raise EvenstepError("--resume names no run; give its directory, --resume RUN (evenstep runs lists runs)")
        parent = Parent.parse(out)
        start = parent.run
        if wanted is not None and Path(wanted).resolve() != parent.run.resolve():
            start = parent
        elif parent.step is not None:
            raise EvenstepError(
                f"--resume {out} goes back to an earlier step, which would undo the later ones; give a new directory "
                f"for it, --out {unused(parent.run)}"
            )
        saved = parent.run / "config.toml"
        if recipe is None:
            tables = read_toml(config_file(parent.run))  # EvenstepError where there is no run
            if start is parent:
                tables.pop("name", None)  # the name of the parent
            return build(override(without_foreign_options(tables, overrides, saved), overrides, kind), kind), start
    return load_config(recipe, overrides, kind), start


# ---- the reference page ----

_INTRO = """\
# Configuration

A recipe is a TOML file with the sections below. `evenstep pretrain RECIPE.toml --section.key value` overrides a value
of the recipe, and `--print-config` shows the result. `config.toml` in the directory of a run is the resolved
configuration. An unknown key is an error. Counts may be written as `20K`, `100M` or `1.5B` (as a string in a recipe).
On the command line `none` clears an option that may be none.

The last column says whether `--resume` may change the option. **free**: yes. **rounding**: yes, but the last bits of
the losses change with it. **fixed**: no; a change is an error that names the option. A larger `train.steps` or
`train.tokens` continues the training, and a value below the steps already done is an error. With a cosine or wsd
schedule a changed budget also changes the learning rates from that step on.
"""


def configuration_page() -> str:
    """docs/configuration.md."""
    lines = [_INTRO]
    known = options()
    for section in ("", *sections()):
        title = f"## [{section}] {sections()[section].TITLE}" if section else f"## {Config.TITLE} (top level)"
        lines += [title, "", "| option | type | default | meaning | resume |", "|---|---|---|---|---|"]
        for key, (field, hint) in known.items():
            if section_of(key) != section:
                continue
            meta = field.metadata
            kind = " or ".join("none" if kind is type(None) else kind.__name__ for kind in kinds(hint))
            default = _as_default(field.default).replace("'", '"')
            text = (meta["help"] + limits(meta)).replace("|", "\\|")
            lines.append(f"| `{key}` | {kind} | `{default}` | {text} | {meta['resume']} |")
        lines.append("")
    lines += ["## Hyperparameters of the optimizers", "", "Each is an option `optim.NAME`; fixed on resume.", ""]
    for name, declared in HYPERPARAMETERS.items():
        lines += [f"### {name}", "", "| option | default | meaning | source of the default |", "|---|---|---|---|"]
        for key, one in declared.items():
            default = _as_default(one.default).replace("'", '"')
            lines.append(f"| `optim.{key}` | `{default}` | {one.help} | {one.source} |")
        lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


def _as_default(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return repr(list(value) if isinstance(value, tuple) else value)


if __name__ == "__main__":
    print(configuration_page(), end="")
