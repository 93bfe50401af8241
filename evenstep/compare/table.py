"""Table files: the runs of a published table, at several scales, and the numbers of the paper.

The format, with every allowed key::

    title = "Stable-SPAM, table 1: 4-bit pretraining"
    paper = "arXiv:2502.17055, table 1"
    about = "what the paper did and found"
    include = ["shared.toml"]            # files beside this one, read first; this file overrides them
    reference = "adam/bf16"              # ROW/PRECISION whose loss the other lines have to reach

    [grid]                               # every row at every precision and size
    rows = ["adam", "stable_spam"]
    precisions = ["fp4"]
    sizes = ["130m"]
    more = [{ rows = ["adam"], precisions = ["bf16"] }]

    [base.train]                         # options of all runs, as in a recipe
    [row.adam]                           # label, rates, factor (of the rates), budget (of the tokens)
    [row.adam.set.optim]                 # its options
    [precision.fp4.set]                  # its options; those of one row in [precision.fp4.row.adam]
    [size.130m]                          # rates, tokens
    [size.130m.set.model]
    [size.1b.row.scale]                  # rates and set of one row at this size, which go before all others

    [sweep]                              # first stage: rates, tokens (default: those of the second), extend, all, seed
    [final]                              # second stage at the best rate: tokens, seeds, cells (lines, "claimed", "all")

    [published.130m.int4]                # the paper's perplexity by row
    [[claim]]                            # a claim of the paper, see evenstep.compare.claims

    [scale.small]                        # the same keys again, for everything that differs at this scale

Options are merged in the order base, size, row, precision, precision's row, size's row.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evenstep.errors import EvenstepError, nearest
from evenstep.train.config import parse_count
from evenstep.train.config_io import read_toml

Document = dict[str, Any]

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
    """Read the table at ``path`` for one ``scale``. Raises EvenstepError for a file that is missing or invalid."""
    document = _with_includes(path)
    scales = document.pop("scale", {})
    if scale not in scales:
        raise EvenstepError(
            f"{path}: no scale '{scale}'{nearest(scale, [*scales])} (available: {', '.join(scales) or 'none'})"
        )
    document = merged(document, scales[scale])
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
    for key in ("title", "paper", "grid"):
        if key not in document:
            raise EvenstepError(f"{path}: '{key}' is missing")
    parts = [(section, section, document[section]) for section in ("grid", "sweep", "final")]
    for size, part in document["size"].items():
        parts += [("size's row", f"size.{size}.row.{name}", given) for name, given in part.get("row", {}).items()]
    for section in ("row", "precision", "size"):
        parts += [(section, f"{section}.{name}", part) for name, part in document[section].items()]
    parts += [("claim", "claim", claim) for claim in table.claims]
    for section, name, part in parts:
        check_keys(path, name, part, _KEYS[section].split())
    for key in ("rows", "precisions", "sizes"):
        if not document["grid"].get(key):
            raise EvenstepError(f"{path}: grid.{key} is missing or empty")
    for group in table.groups():
        if group.row not in document["row"]:
            raise EvenstepError(f"{path}: grid names the row '{group.row}'{nearest(group.row, [*document['row']])}")
        if group.precision not in document["precision"]:
            raise EvenstepError(
                f"{path}: grid names the precision '{group.precision}'"
                f"{nearest(group.precision, [*document['precision']])}"
            )
        if not table.document["row"][group.row].get("rates") and not document["size"].get(group.size, {}).get("rates"):
            document["sweep"].setdefault("rates", [1e-3])
    names = [table.reference] if table.reference else []
    names += [claim[key] for claim in table.claims for key in ("better", "than")] + document["final"].get("cells", [])
    for name in names:
        if name not in ("claimed", "all") and not any(group.is_called(name) for group in table.groups()):
            known = [group.name for group in table.groups()]
            raise EvenstepError(f"{path}: '{name}' is not a line of this table{nearest(name, known)}")


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
