"""Table files: the runs of a table, at several scales, and the numbers of a paper beside them.

`EXAMPLE` is a table file with comments, and docs/comparisons.md describes every key of `_KEYS`. The keys of a scale,
[scale.NAME], are merged over those of the file.

Options are merged in the order base, size, row, precision, precision's row, size's row.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evenstep.compare.claims import RULES
from evenstep.errors import EvenstepError, nearest
from evenstep.train.config import parse_count
from evenstep.train.config_io import read_toml

Document = dict[str, Any]

DEFAULT_SCALE, OWN = "small", "own"
"""The scale that is read unless another one is asked for, and the name of that of a file without scales."""

_KEYS = {
    "": "title paper about include reference grid base row precision size sweep final published claim scale",
    "grid": "rows precisions sizes more",
    "sweep": "rates tokens extend all seed",
    "final": "tokens seeds cells",
    "row": "label rates factor budget set",
    "precision": "label set row",
    "size": "rates tokens set row",
    "size's row": "rates set",
    "claim": "text rule better than paper memory untestable",
}


_NUMBERS: tuple[set[type], str] = ({int, float}, "numbers")
_NAMES: tuple[set[type], str] = ({str}, "texts")
_LISTS: dict[str, tuple[set[type], str]] = {
    "rates": _NUMBERS, "seeds": ({int}, "whole numbers"), "rows": _NAMES, "precisions": _NAMES, "sizes": _NAMES,
    "cells": _NAMES, "memory": _NUMBERS,
}  # fmt: skip
"""The keys whose value is a list, the types of its entries, and the words for them."""


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
    document = _with_includes(path)
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


def _with_includes(path: Path) -> Document:
    document = read_toml(path)
    included: Document = {}
    for name in document.pop("include", []):
        included = merged(included, _with_includes(path.parent / name))
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
    check_keys(path, "", document, _KEYS[""].split())
    for section in ("row", "precision", "size", "base", "published"):
        if not isinstance(part := document.get(section, {}), Mapping):
            raise EvenstepError(f"{path}: {section} = {part!r} is not a table; write [{section}.NAME]")
    if not isinstance(claims := document.get("claim", []), list):
        raise EvenstepError(f"{path}: claim = {claims!r} is not a list of tables; write [[claim]]")
    for key in ("title", "grid"):
        if key not in document:
            raise EvenstepError(f"{path}: '{key}' is missing; 'evenstep compare --example' prints a whole table")
    parts = [(section, section, document[section]) for section in ("grid", "sweep", "final")]
    for size, part in document["size"].items():
        parts += [("size's row", f"size.{size}.row.{name}", given) for name, given in part.get("row", {}).items()]
    for section in ("row", "precision", "size"):
        parts += [(section, f"{section}.{name}", part) for name, part in document[section].items()]
    parts += [("claim", "claim", claim) for claim in table.claims]
    for section, name, part in parts:
        check_keys(path, name, part, _KEYS[section].split())
        for key, (kind, words) in _LISTS.items():
            if key in part and not (isinstance(part[key], list) and all(type(x) in kind for x in part[key])):
                where = f"{name}.{key}" if name else key
                raise EvenstepError(f"{path}: {where} = {part[key]!r} is not a list of {words}")
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
        if not table.document["row"][group.row].get("rates") and not document["size"].get(group.size, {}).get("rates"):
            document["sweep"].setdefault("rates", [1e-3])
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


def check_keys(path: Path, section: str, given: Any, allowed: Collection[str]) -> None:
    """Raise EvenstepError unless ``given``, which is [section] of a file, is a table with allowed keys only."""
    if not isinstance(given, Mapping):
        raise EvenstepError(f"{path}: {section} = {given!r} is not a table; write [{section}] with its keys below")
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
