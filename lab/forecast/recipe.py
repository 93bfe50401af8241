"""Recipes: data, model, training, the optimizers to compare, and the grid of runs."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evenstep.baselines.catalog import baseline, check_options
from evenstep.baselines.transforms import build_transforms
from evenstep.compare.table import check_keys
from evenstep.errors import EvenstepError, nearest
from evenstep.train.config_io import read_toml
from lab.forecast.series import SPLITS


@dataclass(frozen=True)
class Data:
    csv: str
    split: str = "70/10/20"
    columns: tuple[str, ...] = ()
    gaps: str = "refuse"


@dataclass(frozen=True)
class Model:
    """PatchTST. The defaults are those of its authors for ETTh1. ``dropout``: of the positions, the output of each
    sublayer and the feed-forward network."""

    lookback: int = 336
    patch: int = 16
    stride: int = 8
    layers: int = 3
    heads: int = 4
    width: int = 16
    ffn: int = 128
    dropout: float = 0.3


@dataclass(frozen=True)
class Train:
    """Training. The defaults are those of PatchTST.

    Args:
        patience: epochs without a better validation loss after which a run stops.
        windows_per_epoch: number of windows, drawn again for each epoch; 0 for all.
        decay: factor on the learning rate after each epoch from ``decay_from`` on.
    """

    lr: float = 1e-4
    batch_size: int = 128
    epochs: int = 100
    patience: int = 100
    windows_per_epoch: int = 0
    decay: float = 0.9
    decay_from: int = 4


@dataclass(frozen=True)
class Optimizer:
    """An optimizer.

    Args:
        name: in the catalog (`evenstep optimizers`).
        before: gradient transforms applied before its step.
        lr: replaces train.lr; 0 keeps it.
        options: its other hyperparameters.
    """

    label: str
    name: str
    before: str = ""
    lr: float = 0.0
    weight_decay: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """Every combination is a run.

    Args:
        optimizers: labels; empty for all.
        rates: learning rates; empty for that of each optimizer.
        test: whether the test part is scored. A grid from which a rate is chosen leaves it unscored.
    """

    horizons: tuple[int, ...] = (96,)
    severities: tuple[float, ...] = (0.0,)
    shares: tuple[float, ...] = (0.1,)
    seeds: tuple[int, ...] = (0, 1, 2)
    optimizers: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()
    test: bool = True


@dataclass(frozen=True)
class Cell:
    """One run."""

    optimizer: Optimizer
    lr: float
    horizon: int
    severity: float
    share: float
    seed: int
    test: bool

    @property
    def name(self) -> str:
        noise = f"-s{self.severity:g}-{self.share * 100:g}pc" if self.severity else ""
        rate = "" if self.test else f"-lr{self.lr:g}"
        return f"h{self.horizon}{noise}-{self.optimizer.label}{rate}-seed{self.seed}"


@dataclass(frozen=True)
class Recipe:
    name: str
    data: Data
    model: Model
    train: Train
    optimizers: tuple[Optimizer, ...]
    grid: tuple[Grid, ...]

    def cells(self) -> Iterator[Cell]:
        """The runs, each once. The optimizers of a seed follow each other, so an unfinished grid compares fairly."""
        seen = set()
        for grid in self.grid:
            labels = grid.optimizers or tuple(one.label for one in self.optimizers)
            chosen = [one for one in self.optimizers if one.label in labels]
            for seed, horizon, severity, share in itertools.product(
                grid.seeds, grid.horizons, grid.severities, grid.shares
            ):
                for one in chosen:
                    for lr in grid.rates or (one.lr or self.train.lr,):
                        cell = Cell(one, lr, horizon, severity, share if severity else 0.0, seed, grid.test)
                        if cell.name not in seen:
                            seen.add(cell.name)
                            yield cell


def load(path: Path) -> Recipe:
    """Read a recipe. Raises EvenstepError for a file that is missing or invalid."""
    given = read_toml(path)
    check_keys(path, "", given, ("data", "model", "train", "optimizers", "grid"))
    if missing := [key for key in ("data", "optimizers", "grid") if key not in given]:
        raise EvenstepError(f"{path}: [{missing[0]}] is missing; see lab/forecast/recipes")
    recipe = Recipe(
        path.stem,
        _section(path, Data, "data", given["data"]),
        _section(path, Model, "model", given.get("model", {})),
        _section(path, Train, "train", given.get("train", {})),
        tuple(_section(path, Optimizer, "optimizers", one) for one in given["optimizers"]),
        tuple(_section(path, Grid, "grid", one) for one in given["grid"]),
    )
    _check(recipe)
    return recipe


def _section(path: Path, cls: type, where: str, given: Any) -> Any:
    """An instance of the dataclass ``cls`` from the section ``where`` of a file."""
    types_ = typing.get_type_hints(cls)
    check_keys(path, where, given, types_)
    for one in dataclasses.fields(cls):
        required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if required and one.name not in given:
            raise EvenstepError(f"{where}.{one.name} is missing")
    return cls(**{key: _typed(f"{where}.{key}", value, types_[key]) for key, value in given.items()})


def _typed(where: str, value: Any, wanted: Any) -> Any:
    if typing.get_origin(wanted) is tuple and isinstance(value, list):
        return tuple(_typed(where, item, typing.get_args(wanted)[0]) for item in value)
    if wanted is float and type(value) is int:
        return float(value)
    kind = typing.get_origin(wanted) or wanted
    if type(value) is not kind:
        name = "list" if kind is tuple else "table" if kind is dict else kind.__name__
        raise EvenstepError(f"{where}: {value!r} has the wrong type; give a value of type {name}")
    return value


def _check(recipe: Recipe) -> None:
    data, model, train = recipe.data, recipe.model, recipe.train
    if data.split not in SPLITS:
        raise EvenstepError(f"data.split: unknown split '{data.split}' (available: {', '.join(SPLITS)})")
    if data.gaps not in ("refuse", "allow"):
        raise EvenstepError(f"data.gaps: '{data.gaps}' is neither 'refuse' nor 'allow'")
    for where, section in (("model", model), ("train", train)):
        for key, value in dataclasses.asdict(section).items():
            low = 0 if key in ("dropout", "windows_per_epoch") else None
            if value < 0 or (low is None and value == 0):
                least = "above 0" if low is None else "at least 0"
                raise EvenstepError(f"{where}.{key}={value} is out of range; it must be {least}")
    if model.dropout >= 1 or model.patch >= model.lookback or model.width % model.heads:
        raise EvenstepError(
            f"model: needs dropout < 1, patch < lookback and a width that heads divide; got dropout={model.dropout}, "
            f"patch={model.patch}, lookback={model.lookback}, width={model.width}, heads={model.heads}"
        )
    labels = [one.label for one in recipe.optimizers]
    if len(set(labels)) < len(labels):
        raise EvenstepError(f"optimizers: two have the same label (labels: {', '.join(labels)}); rename one")
    for one in recipe.optimizers:
        baseline(one.name)
        check_options(one.name, one.options)
        build_transforms(one.before)
    for grid in recipe.grid:
        for label in grid.optimizers:
            if label not in labels:
                raise EvenstepError(
                    f"grid.optimizers: no optimizer '{label}'{nearest(label, labels)} (available: {', '.join(labels)})"
                )
        if not all((grid.horizons, grid.severities, grid.shares, grid.seeds)):
            raise EvenstepError("grid: horizons, severities, shares and seeds must not be empty")
        if min(grid.horizons) < 1 or min(grid.severities) < 0 or not all(0 < share <= 1 for share in grid.shares):
            raise EvenstepError("grid: needs horizons of at least 1, severities of at least 0 and shares in (0, 1]")
