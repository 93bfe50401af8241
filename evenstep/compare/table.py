"""Table files: the runs of a table, at several scales, and the numbers of a paper beside them.

`EXAMPLE` is a table file with comments, and docs/comparisons.md describes every key of `_KEYS`. The keys of a scale,
[scale.NAME], are merged over those of the file.

Options are merged in the order base, size, row, precision, precision's row, size's row.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evenstep.compare.claims import RULES
from evenstep.errors import EvenstepError, nearest
from evenstep.train.config import Config, parse_count, sections
from evenstep.train.config_io import read_toml

Document = dict[str, Any]

DEFAULT_SCALE, OWN = "small", "own"
"""The scale that is read unless another one is asked for, and the name of that of a file without scales."""

_KEYS = {
    "": "title paper about include reference grid base row precision size sweep final published claim scale",
    "grid": "rows precisions sizes more",
    "more": "rows precisions sizes",
    "sweep": "rates tokens extend all seed",
    "final": "tokens seeds cells",
    "row": "label rates factor budget set",
    "precision": "label set row",
    "size": "rates tokens set row",
    "size's row": "rates set",
    "claim": "text rule better than paper memory untestable",
}


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in kinds  # not isinstance: true is no whole number here


def _is_list(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(type(entry) in kinds for entry in value)


def _is_factor(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _is_rates(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_factor, value))


def _is_count(value: Any) -> bool:
    try:
        return (parse_count(value) if isinstance(value, str) else value if type(value) is int else 0) > 0
    except ValueError:
        return False


_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "title paper about reference label text rule better than untestable": (_is(str), "a text"),
    "include rows precisions sizes cells": (_is_list(str), "a list of texts"),
    "rates": (_is_rates, "a list of numbers above 0"),
    "memory": (_is_list(int, float), "a list of numbers"),
    "seeds": (_is_list(int), "a list of whole numbers"),
    "claim more": (_is_list(dict), "a list of tables"),
    "grid base row precision size sweep final published set": (_is(dict), "a table"),
    "factor budget": (_is_factor, "a number above 0"),
    "tokens": (_is_count, "a count of tokens; give one such as 20000 or 200M"),
    "extend seed": (_is(int), "a whole number"),
    "all": (_is(bool), "true or false"),
}
"""The keys of all sections: the check of their value, and the words for what it has to be."""


@dataclass(frozen=True, order=True)
class Group:
    """The key of a line of the table. Its name is ROW/PRECISION; /SIZE is added if there are several sizes."""

    row: str
    precision: str
    size: str

    @property
    def name(self) -> str:
        return f"{self.row}/{self.precision}"

    def is_called(self, name: str) -> bool:
        return name in (self.name, f"{self.name}/{self.size}")


@dataclass(frozen=True)
class Table:
    """A checked table file at one scale."""

    name: str
    scale: str
    document: Document = field(repr=False)

    @property
    def title(self) -> str:
        return str(self.document["title"])

    @property
    def reference(self) -> str | None:
        return self.document.get("reference")

    @property
    def claims(self) -> list[dict[str, Any]]:
        return list(self.document.get("claim", []))

    def groups(self) -> list[Group]:
        """Every line once; the lines of the grid itself come first."""
        grid = self.document["grid"]
        groups: dict[Group, None] = {}
        for part in (grid, *grid.get("more", [])):
            for size in part.get("sizes", grid["sizes"]):
                for precision in part.get("precisions", grid["precisions"]):
                    for row in part.get("rows", grid["rows"]):
                        groups[Group(row, precision, size)] = None
        return list(groups)

    def label(self, row: str) -> str:
        return str(self.document["row"][row].get("label", row))

    def is_claimed(self, group: Group) -> bool:
        """Whether a claim names this line, or it is the reference."""
        named = [claim[key] for claim in self.claims for key in ("better", "than")]
        return any(group.is_called(name) for name in [*named, self.reference or ""])

    def rates(self, group: Group) -> list[float]:
        """The learning rates to try, ascending: those of the row at this size as they are; else those of the row, the
        size or the sweep, times the row's factor."""
        row, size = self.document["row"][group.row], self.document["size"].get(group.size, {})
        if exact := size.get("row", {}).get(group.row, {}).get("rates"):
            return sorted(float(rate) for rate in exact)
        rates = row.get("rates") or size.get("rates") or self.document["sweep"]["rates"]
        return sorted(float(f"{rate * row.get('factor', 1.0):.6g}") for rate in rates)

    def tokens(self, group: Group, stage: str) -> int:
        """The token budget of a run in ``stage``, "sweep" or "final"."""
        size = self.document["size"].get(group.size, {})
        final = self.document["final"].get("tokens") or size.get("tokens")
        given = (self.document["sweep"].get("tokens") if stage == "sweep" else None) or final
        if given is None:
            raise EvenstepError(f"{self.name}: size {group.size} has no budget; give it tokens, or give final.tokens")
        count = parse_count(given) if isinstance(given, str) else int(given)
        budget: float = self.document["row"][group.row].get("budget", 1.0)
        return round(count * budget)

    def has_final(self, group: Group) -> bool:
        named = self.document["final"].get("cells", ["all"])
        if "claimed" in named and self.is_claimed(group):
            return True
        return "all" in named or any(group.is_called(name) for name in named)

    def options(self, group: Group) -> Document:
        """The options of the line's runs, except learning rate, seed and budget."""
        document = self.document
        precision = document["precision"].get(group.precision, {})
        parts = (
            document.get("base", {}),
            document["size"].get(group.size, {}).get("set", {}),
            document["row"][group.row].get("set", {}),
            precision.get("set", {}),
            precision.get("row", {}).get(group.row, {}),
            document["size"].get(group.size, {}).get("row", {}).get(group.row, {}).get("set", {}),
        )
        options: Document = {}
        for part in parts:
            options = merged(options, part)
        return options

    def published(self, group: Group) -> dict[str, float]:
        """The paper's perplexity of this row and precision, by size."""
        by_size = {}
        for size, precisions in self.document.get("published", {}).items():
            value = precisions.get(group.precision, {}).get(group.row)
            if value is not None:
                by_size[size] = value
        return by_size


def load_table(path: Path, scale: str) -> Table:
    """Read the table at ``path`` for one ``scale``. Raises EvenstepError for a file that is missing or invalid.

    A file without scales has one size, and is read as it is where `DEFAULT_SCALE` is asked for.
    """
    document = _with_includes(path, ())
    scales = document.pop("scale", {})
    if not scales and scale == DEFAULT_SCALE:
        scale, scales = OWN, {OWN: {}}
    if not isinstance(scales, Mapping) or not all(isinstance(part, Mapping) for part in scales.values()):
        raise EvenstepError(f"{path}: scale is not a table of tables; write [scale.NAME] with the keys that differ")
    if scale not in scales:
        raise EvenstepError(
            f"{path}: no scale '{scale}'{nearest(scale, [*scales])} (available: {', '.join(scales) or 'none'})"
        )
    document = merged(document, scales[scale])
    document.setdefault("paper", "")
    for key in ("row", "precision", "size", "sweep", "final", "base"):
        document.setdefault(key, {})
    table = Table(path.stem, scale, document)
    _check(table, path)
    return table


def _with_includes(path: Path, above: tuple[Path, ...]) -> Document:
    """The file ``path`` over the files that it includes; ``above``: the files that include it."""
    if path.resolve() in above:
        raise EvenstepError(f"{path}: the file includes itself; remove it from include")
    document = read_toml(path)
    _check_values(path, "", {key: value for key, value in document.items() if key == "include"})
    included: Document = {}
    for name in document.pop("include", []):
        included = merged(included, _with_includes(path.parent / name, (*above, path.resolve())))
    return merged(included, document)


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> Document:
    """Merge ``second`` over ``first`` into a new table: tables key by key, every other value is replaced."""
    result = dict(first)
    for key, value in second.items():
        old = result.get(key)
        both = isinstance(value, Mapping) and isinstance(old, Mapping)
        result[key] = merged(old, value) if both else copy.deepcopy(value)  # type: ignore[arg-type]
    return result


def _check(table: Table, path: Path) -> None:
    document = table.document
    _check_part(path, "", "", document)
    for key in ("title", "grid"):
        if key not in document:
            raise EvenstepError(f"{path}: '{key}' is missing; 'evenstep compare --example' prints a whole table")
    for section in ("grid", "sweep", "final"):
        _check_part(path, section, section, document[section])
    for further in document["grid"].get("more", []):
        _check_part(path, "more", "grid.more", further)
    for section in ("row", "precision", "size"):
        for name, part in document[section].items():
            _check_part(path, section, f"{section}.{name}", part)
            _check_options(path, f"{section}.{name}.set", part.get("set", {}))
    _check_options(path, "base", document["base"])
    for name, part in document["precision"].items():
        for row, options in part.get("row", {}).items():
            _check_options(path, f"precision.{name}.row.{row}", options)
    for name, part in document["size"].items():
        for row, given in part.get("row", {}).items():
            _check_part(path, "size's row", f"size.{name}.row.{row}", given)
            _check_options(path, f"size.{name}.row.{row}.set", given.get("set", {}))
    for size, precisions in document.get("published", {}).items():
        _check_table(path, f"published.{size}", precisions)
        for precision, by_row in precisions.items():
            _check_table(path, f"published.{size}.{precision}", by_row)
            for row, value in by_row.items():
                if type(value) not in (int, float):
                    raise EvenstepError(f"{path}: published.{size}.{precision}.{row} = {value!r} is not a number")
    for claim in table.claims:
        _check_part(path, "claim", "claim", claim)
    for claim in table.claims:
        _check_claim(claim, path)
    for key in ("rows", "precisions", "sizes"):
        if not document["grid"].get(key):
            raise EvenstepError(f"{path}: grid.{key} is missing or empty; give a list of names")
    for group in table.groups():
        for section, name in (("row", group.row), ("precision", group.precision)):
            if name not in document[section]:
                hint = nearest(name, [*document[section]]) or f"; write [{section}.{name}] with its options"
                raise EvenstepError(f"{path}: grid names the {section} '{name}'{hint}")
        own = document["row"][group.row].get("rates") or document["size"].get(group.size, {}).get("rates")
        if not own and not document["sweep"].setdefault("rates", [1e-3]):
            raise EvenstepError(f"{path}: sweep.rates is empty; give a list of learning rates")
    names = [table.reference] if table.reference else []
    names += [claim[key] for claim in table.claims for key in ("better", "than")] + document["final"].get("cells", [])
    for name in names:
        if name not in ("claimed", "all") and not any(group.is_called(name) for group in table.groups()):
            known = [group.name for group in table.groups()]
            hint = nearest(name, known) or f" (lines: {', '.join(dict.fromkeys(known))})"
            raise EvenstepError(f"{path}: '{name}' is not a line of this table{hint}")


def _check_claim(claim: Document, path: Path) -> None:
    claim.setdefault("paper", "-")
    for key in ("text", "rule", "better", "than"):
        if key not in claim:
            raise EvenstepError(f"{path}: claim {claim.get('text', '')!r} has no '{key}'; give {key} = ...")
    if claim["rule"] not in RULES:
        raise EvenstepError(
            f"{path}: claim {claim['text']!r} has the rule {claim['rule']!r}{nearest(str(claim['rule']), [*RULES])} "
            f"(allowed: {', '.join(RULES)})"
        )
    if claim["rule"] in ("level", "memory") and len(claim.get("memory", ())) != 2:
        raise EvenstepError(
            f"{path}: claim {claim['text']!r} has the rule {claim['rule']}, which needs memory = [least, greatest]"
        )


def _check_part(path: Path, section: str, name: str, given: Any) -> None:
    """Raise EvenstepError unless ``given``, the table [name], has the keys of ``section``, and values that fit them."""
    check_keys(path, name, given, _KEYS[section].split())
    _check_values(path, name, given)


def _check_values(path: Path, name: str, given: Document) -> None:
    for keys, (fits, words) in _VALUES.items():
        for key in keys.split():
            if key in given and not fits(given[key]):
                where = f"{name}.{key}" if name else key
                raise EvenstepError(f"{path}: {where} = {given[key]!r} is not {words}{_form(name, key)}")


def _form(name: str, key: str) -> str:
    """How the tables of a section are written, for the end of a message."""
    if key == "claim":
        return "; write [[claim]]"
    if key in ("row", "precision", "size", "published") or (not name and key == "base"):
        return f"; write [{name}.{key}.NAME]" if name else f"; write [{key}.NAME]"
    return ""


def _check_options(path: Path, name: str, given: Any) -> None:
    """Raise EvenstepError unless ``given`` is a table whose sections are tables. All other mistakes in options are
    found where the configuration is built, but a section that is no table would be lost when options are merged."""
    _check_table(path, name, given)
    for key in given:
        if key in sections(Config):
            _check_table(path, f"{name}.{key}", given[key])


def _check_table(path: Path, name: str, given: Any) -> None:
    if not isinstance(given, Mapping):
        raise EvenstepError(f"{path}: {name} = {given!r} is not a table; write [{name}] with its keys below")


def check_keys(path: Path, section: str, given: Any, allowed: Collection[str]) -> None:
    """Raise EvenstepError unless ``given``, which is [section] of a file, is a table with allowed keys only."""
    _check_table(path, section, given)
    for key in given:
        if key not in allowed:
            name = f"{section}.{key}" if section else key
            raise EvenstepError(
                f"{path}: unknown key '{name}'{nearest(key, list(allowed))} (allowed: {', '.join(sorted(allowed))})"
            )


EXAMPLE = """\
# A comparison of your own: evenstep compare THIS-FILE.toml
# As it is, it takes some minutes of one core: 6 short runs for the learning rates, 4 longer ones at the best rates.
# All keys are in docs/comparisons.md; --dry-run lists the runs.

title = "AdamW against Stable-SPAM on the sources of Python"
reference = "adamw/fp32"  # ROW/PRECISION whose loss the other lines have to reach

# Every row at every precision and size is a line of the result.
[grid]
rows = ["adamw", "stable_spam"]
precisions = ["fp32"]  # add "fp4": its section stands below
sizes = ["tiny"]

# Options of all runs, as in a recipe (evenstep pretrain --help).
[base.data]
source = "stdlib"  # your own text: "text:books/*.txt"
vocab_size = 2048
[base.train]
batch_size = 8
seq_len = 128
threads = 1
[base.eval]
every = 100
max_tokens = "20K"

# The rows: a name for the table, and the options of the optimizer. factor = 0.5 would halve the rates below.
[row.adamw]
label = "AdamW"
set.optim = { name = "adamw", betas = [0.9, 0.95], weight_decay = 0.1 }
[row.stable_spam]
label = "Stable-SPAM"
set.optim = { name = "stable_spam", weight_decay = 0.1, reset_interval = 0 }

[precision.fp32]
[precision.fp4]
label = "FP4"
set.lowbit = "fp4"

[size.tiny]
set.model.size = "tiny"

# First stage: the learning rates, with one seed. If the best rate is the outermost, one more is tried.
[sweep]
rates = [1e-3, 2e-3, 4e-3]
tokens = "60K"
extend = 1

# Second stage: seeds at the best rate.
[final]
tokens = "200K"
seeds = [0, 1]

# A claim is judged by a paired t-test over the seeds; state it before the runs.
[[claim]]
text = "Stable-SPAM beats AdamW"
rule = "lower"
better = "stable_spam/fp32"
than = "adamw/fp32"
"""
"""A table file that runs as it is, for ``evenstep compare --example``."""
