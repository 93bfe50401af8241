"""Reading and writing configurations as TOML, and the rules of what a resume may change.

A recipe is a TOML file with the sections of `evenstep.train.config`; the command line overrides it. The resolved
configuration is written into the directory of the run, and reading that file gives the same configuration again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evenstep.console import program
from evenstep.errors import EvenstepError, nearest
from evenstep.paths import unused
from evenstep.toml import parse_toml
from evenstep.train.config import (
    BaseConfig,
    Config,
    OptimConfig,
    key_of,
    kinds,
    options,
    parse_count,
    sections,
)

Tables = dict[str, Any]

_WORDS = {"none": None, "true": True, "false": False}

_PACKAGE = Path(__file__).parents[1]
_RECIPES = (_PACKAGE / "recipes", _PACKAGE.parent / "recipes")
"""The directories of the recipes that come with evenstep: inside the package (a wheel), or beside it (a clone)."""

_BUDGETS = ("train.steps", "train.tokens", "train.epochs")
"""The options that state the budget. One on the command line replaces the one of the recipe."""


def load_config(
    recipe: Path | None,
    overrides: Sequence[tuple[str, str]] = (),
    kind: type[BaseConfig] = Config,
) -> Any:
    """The configuration of a run of that ``kind``.

    Args:
        recipe: a TOML file; None: the defaults, which are a quick run.
        overrides: options and their texts on the command line, such as ``("train.steps", "500")``.

    Raises:
        EvenstepError: a file that is missing or not TOML, an unknown key (the error names the nearest one), a wrong
            type, or a value out of range.
    """
    tables = read_toml(recipe) if recipe is not None else {}
    if recipe is not None:
        tables.setdefault("name", recipe.stem)
        tables = without_foreign_options(tables, overrides, recipe)
    return build(override(tables, overrides, kind), kind, quick_budget=recipe is None and kind is Config)


def without_foreign_options(tables: Tables, overrides: Sequence[tuple[str, str]], where: Path) -> Tables:
    """``tables`` of the file ``where``, without hyperparameters of its optimizer that do not exist in the optimizer
    that the overrides choose instead. A line on stderr names the hyperparameters that are left out."""
    tables = dotted(tables, Config)
    optim, name = tables.get("optim"), dict(overrides).get("optim.name")
    if not isinstance(optim, dict) or name in (None, optim.get("name", OptimConfig().name)):
        return tables
    own = {f"optim.{key}" for key in optim} - {*options()}
    if not own:
        return tables
    from evenstep.baselines.catalog import names_of_options

    try:
        foreign = sorted({key.removeprefix("optim.") for key in own} - {*names_of_options(str(name))})
    except EvenstepError:  # the error of an unknown or missing optimizer is raised where the optimizer is built
        return tables
    if foreign and os.environ.get("RANK", "0") == "0":
        former = optim.get("name", OptimConfig().name)
        print(
            f"evenstep: left out options of {former} in {where} that {name} does not have: {', '.join(foreign)}",
            file=sys.stderr,
        )
    return {**tables, "optim": {key: value for key, value in optim.items() if key not in foreign}}


def dotted(tables: Tables, kind: type[BaseConfig]) -> Tables:
    """A copy of ``tables`` in which options with a dot in their name are one key. TOML reads the line
    ``lr_scale.last = 2.0`` of the section [optim] as ``{"optim": {"lr_scale": {"last": 2.0}}}``."""
    inner = {key.rpartition(".")[0] for key in options(kind) if key.count(".") > 1}
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in tables.items()}
    for section, _, name in (key.partition(".") for key in inner):
        table = result.get(section)
        if isinstance(table, dict) and isinstance(table.get(name), Mapping):
            table.update({f"{name}.{key}": value for key, value in table.pop(name).items()})
    return result


def read_toml(path: Path) -> Tables:
    """The content of a TOML file. A path ``recipes/NAME.toml`` that does not exist in the working directory is the
    recipe of that name that comes with evenstep. EvenstepError for a file that is missing or not TOML."""
    try:
        return parse_toml((path if path.exists() else shipped(path) or path).read_bytes())
    except FileNotFoundError:
        own = [f"recipes/{one.relative_to(at).as_posix()}" for at in _RECIPES for one in at.rglob("*.toml")]
        hint = nearest(path.as_posix(), own) or "; evenstep's own are recipes/demo.toml, recipes/start.toml, ..."
        raise EvenstepError(f"{path}: no such file; a recipe is a .toml file{hint}") from None
    except OSError as problem:
        raise EvenstepError(f"{path}: cannot be read ({problem.strerror})") from None
    except UnicodeDecodeError as problem:
        raise EvenstepError(f"{path}: cannot be read ({problem}); save it in UTF-8") from None
    except (ValueError, RecursionError) as problem:  # ValueError also for a number with thousands of digits
        raise EvenstepError(f"{path}: not valid TOML: {problem}") from None


def config_file(directory: Path) -> Path:
    """The file with the configuration of the run in ``directory``. EvenstepError when ``directory`` is not a run."""
    path = directory / "config.toml"
    if not path.is_file():
        raise EvenstepError(f"{directory} is not a run: it has no config.toml; 'evenstep runs' lists runs")
    return path


def is_tuned(tables: Tables) -> bool:
    """Whether a config.toml is one of `evenstep finetune`."""
    model = tables.get("model")
    return isinstance(model, dict) and "path" in model


def shipped(path: Path) -> Path | None:
    """The recipe that comes with evenstep under this name, ``recipes/NAME.toml`` or ``recipes/tables/NAME.toml``."""
    if path.parts[:1] != ("recipes",):
        return None
    return next((found for directory in _RECIPES if (found := directory.joinpath(*path.parts[1:])).is_file()), None)


def expanded(path: Path) -> list[Path]:
    """The recipes of evenstep that match a glob such as recipes/tables/*.toml, which the shell did not expand because
    the files are not in the working directory; any other path unchanged."""
    if "*" not in path.name or path.parts[:1] != ("recipes",):
        return [path]
    pattern = "/".join(path.parts[1:])
    own = ([Path("recipes", one.relative_to(at)) for one in sorted(at.glob(pattern))] for at in _RECIPES)
    return next(filter(None, own), [path])


def override(tables: Tables, overrides: Sequence[tuple[str, str]], kind: type[BaseConfig] = Config) -> Tables:
    """``tables`` with the values of the command line, each parsed as the type of its option."""
    known = options(kind)
    result = dotted(tables, kind)
    named = {key for key, _ in overrides}
    for key, text in overrides:
        section, _, name = key.partition(".") if "." in key else ("", "", key)
        if key in known:
            field, hint = known[key]
            value = from_text(text, kinds(hint), count=field.metadata["count"])
            for rival in _BUDGETS if key in _BUDGETS else ():
                if rival not in named:
                    result.get("train", {}).pop(rival.split(".")[1], None)
        elif section == "optim":
            value = literal(text)
        else:
            raise unknown(key, kind)
        table = result.setdefault(section, {}) if section else result
        if not isinstance(table, dict):
            raise EvenstepError(f"{section}: expected a section [{section}], got {table!r}")
        table.pop(name, None)
        if value is not None:
            table[name] = value
    return result


def build(tables: Tables, kind: type[BaseConfig] = Config, *, quick_budget: bool = False) -> Any:
    """The checked configuration of nested tables; unknown sections and keys are errors that suggest the nearest
    known one.

    ``quick_budget`` gives a configuration without a budget the one of a quick run, as the program does when no
    recipe is given.
    """
    known, of = options(kind), sections(kind)
    parts: dict[str, Any] = {}
    for key, value in dotted(tables, kind).items():
        if key in of:
            if not isinstance(value, Mapping):
                raise EvenstepError(f"{key}: expected a section [{key}], got {value!r}")
            parts[key] = value
        elif key in known:
            parts[key] = value
        else:
            raise unknown(key, kind)
    for section, cls in of.items():
        given: Tables = dict(parts.get(section, {}))
        if section == "optim":
            extra = {name: given.pop(name) for name in list(given) if f"optim.{name}" not in known and "." not in name}
            given["options"] = extra
        for name in given:
            if f"{section}.{name}" not in known and name != "options":
                raise unknown(f"{section}.{name}", kind)
        if section == "train" and quick_budget and not given.keys() & {"steps", "tokens"}:
            given["steps"] = Config().train.steps
        fields = {key_of(f): f.name for f in dataclasses.fields(cls) if f.metadata}
        parts[section] = cls(**{fields.get(name, name): value for name, value in given.items()})
    return kind(**parts)


def unknown(key: str, kind: type[BaseConfig] = Config) -> EvenstepError:
    known, of = list(options(kind)), sections(kind)
    if key in of:
        names = ", ".join(name for name in known if name.startswith(f"{key}."))
        return EvenstepError(f"'{key}' is a section, not an option; it has {names}")
    alike = known if "." in key else [*(name for name in known if "." not in name), *of, *known]
    hint = nearest(key, alike)
    return EvenstepError(f"unknown option '{key}'{hint or f'; evenstep {kind.COMMAND} --help lists all options'}")


def from_text(text: str, allowed: tuple[type, ...], *, count: bool = False) -> Any:
    """The ``text`` of the command line as the first of the ``allowed`` types that it fits, else the text itself, which
    the check of the option refuses. ``none`` is None if None is allowed; a ``count`` stays a text such as 20K.

    >>> from_text("3e-4", (float,)), from_text("none", (int, type(None))), from_text("auto", (int, str))
    (0.0003, None, 'auto')
    """
    if type(None) in allowed and text.lower() == "none":
        return None
    if bool in allowed and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if count:
        return text
    for kind in (int, float):
        if kind in allowed:
            try:
                return kind(text)
            except ValueError:
                pass
    return text


def literal(text: str) -> Any:
    """The value of a hyperparameter, whose type is not declared: a number (``.3``, ``1e-8``), a count (``5K``),
    ``true``, ``false`` or ``none``, a list of these (with or without brackets), or else the text.

    >>> literal("0.9,0.95"), literal("5K"), literal("none"), literal("bf16")
    ([0.9, 0.95], 5000, None, 'bf16')
    """
    if text.startswith("[") and text.endswith("]"):
        return [literal(part.strip()) for part in text[1:-1].split(",") if part.strip()]
    if "," in text:
        return literal(f"[{text}]")
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for read in (int, float, parse_count):
        try:
            return read(text)
        except ValueError:
            pass
    return text


def to_tables(config: BaseConfig) -> Tables:
    """The configuration as nested tables with the types of TOML. Options that are None are left out, as TOML has no
    null."""
    tables: Tables = {}
    top = [f.name for f in dataclasses.fields(config) if f.metadata]
    for key in ("name", "out", *(name for name in top if name not in ("name", "out"))):
        if getattr(config, key) is not None:
            tables[key] = getattr(config, key)
    for section, cls in sections(type(config)).items():
        part = getattr(config, section)
        values = {key_of(f): getattr(part, f.name) for f in dataclasses.fields(cls) if f.metadata}
        options = dict(getattr(part, "options", {}))
        values |= {key: list(item) if isinstance(item, tuple) else item for key, item in options.items()}
        tables[section] = {name: value for name, value in values.items() if value is not None}
    return tables


def to_toml(config: BaseConfig) -> str:
    """The configuration as TOML text. ``build(tomllib.loads(text))`` returns an equal configuration."""
    return tables_to_toml(to_tables(config))


def tables_to_toml(tables: Mapping[str, Any]) -> str:
    """Tables of options as TOML text, each option on one line."""
    lines: list[str] = []
    for key, value in tables.items():
        if isinstance(value, dict):
            lines += ["", f"[{key}]", *(f"{name} = {_toml(item, f'{key}.{name}')}" for name, item in value.items())]
        else:
            lines.append(f"{key} = {_toml(value, key)}")
    return "\n".join(lines).lstrip("\n") + "\n"


def _toml(value: Any, key: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item, key) for item in value) + "]"
    if isinstance(value, str):  # JSON and TOML have the same escapes, except that JSON leaves DEL as it is
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    raise EvenstepError(
        f"{key}: {value!r} cannot be written to config.toml; give a number, a text, true, false or a list of them"
    )


def config_hash(config: BaseConfig) -> str:
    """A hash of all options except name and directory, 16 hex digits.

    Stored results refer to this hash. An option that is newer than they are must therefore not be in the text while it
    has its first default: declare it with a default of None, or add it to `_NEWER`.
    """
    tables = to_tables(dataclasses.replace(config, name=None, out=None))
    for section, values in _NEWER.items():
        left = {key: value for key, value in tables.get(section, {}).items() if values.get(key, ...) != value}
        tables = {**tables, section: left} if left else {key: x for key, x in tables.items() if key != section}
    return hashlib.sha256(tables_to_toml(tables).encode()).hexdigest()[:16]


_NEWER: Tables = {
    "model": {"qk_norm": False},
    "log": {"report": False},
    "telemetry": {"activations": 20, "mlflow": False},
    "guard": {
        "ladder": "off", "sigma": 8.0, "norm_ratio": 3.0, "loss_rise": 0.5, "budget": 20, "snapshot_every": 100,
    },
}  # fmt: skip
"""Options that were added after results had been stored, with the values that change nothing in those runs."""


def changed_options(old: BaseConfig, new: BaseConfig) -> dict[str, tuple[Any, Any]]:
    """The changed options that a resume must not change, with both values."""
    known = options(type(new))
    before, after = flat(old), flat(new)
    return {
        key: (before.get(key), after.get(key))
        for key in {**before, **after}
        if before.get(key) != after.get(key) and (key not in known or known[key][0].metadata["resume"] == "fixed")
    }


def flat(config: BaseConfig) -> dict[str, Any]:
    """The options by their full names, such as ``{"train.steps": 300, ...}``, without those that are None."""
    result: dict[str, Any] = {}
    for key, value in to_tables(config).items():
        if isinstance(value, dict):
            result |= {f"{key}.{name}": item for name, item in value.items()}
        else:
            result[key] = value
    return result


# ---- what a resume may change ----


def check_resume(directory: Path, config: BaseConfig, trainer: dict[str, Any]) -> None:
    """EvenstepError when the run in ``directory`` cannot continue with ``config``. ``trainer`` is the content of the
    trainer.pt of its checkpoint."""
    check_changes(directory, config, build(trainer["config"], type(config)))
    check_steps_left(directory, config, trainer["step"])


def check_steps_left(directory: Path, config: BaseConfig, done: int) -> None:
    """EvenstepError when the budget of ``config`` ends before step ``done``, which ``directory`` has reached."""
    if config.total_steps < done:
        budget = "steps" if config.train.steps is not None else "tokens"
        raise EvenstepError(
            f"train.{budget} {getattr(config.train, budget)} ends at step {config.total_steps}, but {directory} has "
            f"already done {done}; give a larger budget, or leave it out"
        )


def check_parent(directory: Path, config: BaseConfig, trainer: dict[str, Any]) -> None:
    """EvenstepError when a run with ``config`` cannot go on from a checkpoint of the run in ``directory``: the weights
    fit neither another shape nor other tokens. ``trainer`` is the content of the trainer.pt of the checkpoint."""
    changed = changed_options(build(trainer["config"], type(config)), config)
    for key, (was, now) in changed.items():
        if key.startswith("model.") or key in ("data.tokenizer", "data.vocab_size"):
            again = new_run(config.COMMAND, directory, [f"--{key}", shown(now)], weights=False)
            raise EvenstepError(
                f"{directory} was trained with {key} {shown(was)}, and its weights do not fit {shown(now)}; leave it "
                f"out, or start a new run with: {again}"
            )
    check_steps_left(directory, config, trainer["step"])


def check_changes(directory: Path, config: BaseConfig, old: BaseConfig) -> None:
    """EvenstepError when an option with the resume rule "fixed" differs between ``config`` and ``old``."""
    if changed := changed_options(old, config):
        values = ", ".join(f"{key} (it was {shown(was)}, given is {shown(now)})" for key, (was, now) in changed.items())
        words = [word for key, (_, now) in changed.items() for word in (f"--{key}", shown(now))]
        # The weights fit neither another shape nor other tokens: the advice is a run without them.
        fit = not any(key.startswith("model.") or key in ("data.tokenizer", "data.vocab_size") for key in changed)
        command = new_run(config.COMMAND, directory, words, weights=fit)
        start = " from its weights" if fit and config.COMMAND == "pretrain" else ""
        raise EvenstepError(
            f"{directory} was trained with another {values}; a resume cannot change this: leave "
            f"{'it' if len(changed) == 1 else 'them'} out, or start a new run{start} with: {command}"
        )


def new_run(command: str, run: Path, words: Sequence[str] = (), out: str | None = None, *, weights: bool = True) -> str:
    """The command of a new run with the configuration of ``run`` and further arguments ``words``, with its ``weights``
    if they fit, in ``out`` (None: a new directory beside that of the run)."""
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
