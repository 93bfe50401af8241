"""Writes the reference of all options from the dataclasses: ``python -m evenstep.train.reference >
docs/configuration.md``."""

from __future__ import annotations

from typing import Any

from evenstep.train.checks import kinds, limits
from evenstep.train.config import Config, options, sections
from evenstep.train.hyperparameters import HYPERPARAMETERS

_INTRO = """\
# Configuration

A recipe is a TOML file with the sections below; `evenstep pretrain RECIPE.toml --section.key value` replaces what
the recipe says, and `--print-config` shows the result. `config.toml` in a run's directory is the resolved
configuration. An unknown key is an error. Counts may be written as `20K`, `100M`, `1.5B` (in a recipe as a text). On
the command line `none` clears an option that may be none.

The last column says what `--resume` allows. **free**: may change. **rounding**: may change, and the last bits of the
losses change with it. **fixed**: a resumed run keeps it; a change is refused by name. A larger `train.steps` or
`train.tokens` trains on, and one below the steps done is refused; under a cosine or wsd schedule another budget gives
other learning rates from that step on.
"""


def configuration_page() -> str:
    """docs/configuration.md."""
    lines = [_INTRO]
    known = options()
    for section in ("", *sections()):
        title = f"## [{section}] {sections()[section].TITLE}" if section else f"## {Config.TITLE} (top level)"
        lines += [title, "", "| option | type | default | meaning | resume |", "|---|---|---|---|---|"]
        for key, (field, hint) in known.items():
            if key.rpartition(".")[0] != section:
                continue
            meta = field.metadata
            kind = " or ".join("none" if kind is type(None) else kind.__name__ for kind in kinds(hint))
            default = "none" if field.default is None else repr(field.default).replace("'", '"')
            text = (meta["help"] + limits(meta)).replace("|", "\\|")
            lines.append(f"| `{key}` | {kind} | `{_toml(default)}` | {text} | {meta['resume']} |")
        lines.append("")
    lines += ["## Hyperparameters of the optimizers", "", "Each is an option `optim.NAME`; fixed on resume.", ""]
    lines += ["| `optim.name` | hyperparameters and their defaults |", "|---|---|"]
    for name, values in HYPERPARAMETERS.items():
        shown = ", ".join(f"`{key} = {_shown(value)}`" for key, value in values.items())
        lines.append(f"| `{name}` | {shown} |")
    return "\n".join(lines) + "\n"


def _toml(text: str) -> str:
    return {"True": "true", "False": "false"}.get(text, text)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return repr(list(value) if isinstance(value, tuple) else value)


if __name__ == "__main__":
    print(configuration_page(), end="")
