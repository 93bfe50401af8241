"""Writes the reference of all options from the dataclasses: ``python -m evenstep.train.reference >
docs/configuration.md``."""

from __future__ import annotations

import inspect
from typing import Any

from evenstep.train.checks import kinds
from evenstep.train.config import SECTIONS, Config, options
from evenstep.train.optimizers import OPTIMIZERS, hyperparameters

_INTRO = """\
# Configuration

A recipe is a TOML file with the sections below; `evenstep pretrain RECIPE.toml --section.key value` replaces what
the recipe says, and `--print-config` shows the result. `config.toml` in a run's directory is the resolved
configuration. An unknown key is an error. Counts may be written as `20K`, `100M`, `1.5B` (in a recipe as a text). On
the command line `none` clears an option that may be none.

The last column says what `--resume` allows. **free**: may change. **rounding**: may change, and the last bits of the
losses change with it. **fixed**: a resumed run keeps it; a change is refused by name. A larger `train.steps` or
`train.tokens` trains on; a cosine or wsd schedule then gives other learning rates from that step on.
"""


def configuration_page() -> str:
    """docs/configuration.md."""
    lines = [_INTRO]
    known = options()
    for section in ("", *SECTIONS):
        title = f"## [{section}] {SECTIONS[section].TITLE}" if section else f"## {Config.TITLE} (top level)"
        lines += [title, "", "| option | type | default | meaning | resume |", "|---|---|---|---|---|"]
        for key, (field, hint) in known.items():
            if key.rpartition(".")[0] != section:
                continue
            meta = field.metadata
            kind = " or ".join("none" if kind is type(None) else kind.__name__ for kind in kinds(hint))
            default = "none" if field.default is None else repr(field.default).replace("'", '"')
            text = meta["help"].replace("|", "\\|")
            lines.append(f"| `{key}` | {kind} | `{_toml(default)}` | {text}{_limits(meta)} | {meta['resume']} |")
        lines.append("")
    lines += ["## Hyperparameters of the optimizers", "", "Each is an option `optim.NAME`; fixed on resume.", ""]
    lines += ["| `optim.name` | hyperparameters and their defaults |", "|---|---|"]
    for name in OPTIMIZERS:
        shown = ", ".join(_default(parameter) for parameter in hyperparameters(name).values())
        lines.append(f"| `{name}` | {shown} |")
    return "\n".join(lines) + "\n"


def _limits(meta: Any) -> str:
    bounds = [(">=", meta["low"]), (">", meta["above"]), ("<=", meta["high"])]
    found = [f"{sign} {bound}" for sign, bound in bounds if bound is not None]
    return f" ({', '.join(found)})" if found else ""


def _toml(text: str) -> str:
    return {"True": "true", "False": "false"}.get(text, text)


def _default(parameter: inspect.Parameter) -> str:
    value = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
    text = str(value).lower() if value is None or isinstance(value, bool) else repr(value)
    return f"`{parameter.name} = {text}`"


if __name__ == "__main__":
    print(configuration_page(), end="")
