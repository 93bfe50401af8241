"""What a recipe says: data, model, training, the optimizers compared, and the grid of runs."""

from __future__ import annotations

import dataclasses
import itertools
import tomllib
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evenstep.baselines.catalog import baseline, check_options
from evenstep.baselines.transforms import build_transforms
from evenstep.errors import EvenstepError, nearest
from lab.forecast.series import SPLITS


@dataclass(frozen=True)
class Data:
    csv: str
    split: str = "70/10/20"
    columns: tuple[str, ...] = ()
    gaps: str = "refuse"


@dataclass(frozen=True)
class Model:
    """PatchTST; defaults are its authors' for ETTh1. ``dropout`` is on positions, attention's output and the ffn."""

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
    """Defaults are PatchTST's. ``patience``: epochs without a better validation loss before a run stops.
    ``windows_per_epoch``: so many are drawn anew each epoch; 0 for all. The rate is multiplied by ``decay`` after each
    epoch from the ``decay_from``-th on."""

    lr: float = 1e-4
    batch_size: int = 128
    epochs: int = 100
    patience: int = 100
    windows_per_epoch: int = 0
    decay: float = 0.9
    decay_from: int = 4


@dataclass(frozen=True)
class Optimizer:
    """``name`` in the catalog (`evenstep optimizers`), ``before`` the transforms in front, ``lr`` in place of
    train.lr, ``options`` the optimizer's other hyperparameters."""

    label: str
    name: str
    before: str = ""
    lr: float = 0.0
    weight_decay: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """Every combination is a run. Empty ``optimizers``: all; empty ``rates``: the optimizer's. ``test``: score the test
    part; a grid from which something is chosen does not."""

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
        """The runs, each once, all optimizers of a seed one after the other: what is cut off is a fair comparison."""
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
    """EvenstepError, one line, for a file that is no recipe."""
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise EvenstepError(f"{path} cannot be read ({problem.strerror}); give a recipe (a TOML file)") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise EvenstepError(f"{path} is no TOML: {problem}") from None
    _known(f"{path}", given, ["data", "model", "train", "optimizers", "grid"])
    if missing := [key for key in ("data", "optimizers", "grid") if key not in given]:
        raise EvenstepError(f"{path}: [{missing[0]}] is missing; see lab/forecast/recipes")
    recipe = Recipe(
        path.stem,
        _made(Data, "data", given["data"]),
        _made(Model, "model", given.get("model", {})),
        _made(Train, "train", given.get("train", {})),
        tuple(_made(Optimizer, "optimizers", one) for one in given["optimizers"]),
        tuple(_made(Grid, "grid", one) for one in given["grid"]),
    )
    _check(recipe)
    return recipe


def _known(where: str, given: dict[str, Any], allowed: list[str]) -> None:
    for key in given:
        if key not in allowed:
            raise EvenstepError(
                f"{where}: unknown key '{key}'{nearest(key, allowed)} (there are: {', '.join(allowed)})"
            )


def _made(cls: type, where: str, given: Any) -> Any:
    if not isinstance(given, dict):
        raise EvenstepError(f"{where}: {given!r} is no table; write [{where}], or [[{where}]] where there are several")
    types_ = typing.get_type_hints(cls)
    _known(where, given, [*types_])
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
        raise EvenstepError(f"{where}: {value!r} is no {name}")
    return value


def _check(recipe: Recipe) -> None:
    data, model, train = recipe.data, recipe.model, recipe.train
    if data.split not in SPLITS:
        raise EvenstepError(f"data.split: unknown split '{data.split}' (there are: {', '.join(SPLITS)})")
    if data.gaps not in ("refuse", "allow"):
        raise EvenstepError(f"data.gaps: '{data.gaps}' is neither 'refuse' nor 'allow'")
    for where, section in (("model", model), ("train", train)):
        for key, value in dataclasses.asdict(section).items():
            low = 0 if key in ("dropout", "windows_per_epoch") else None
            if value < 0 or (low is None and value == 0):
                raise EvenstepError(f"{where}.{key}={value} is not {'above' if low is None else 'at least'} 0")
    if model.dropout >= 1 or model.patch >= model.lookback or model.width % model.heads:
        raise EvenstepError(
            f"model: needs dropout < 1, patch < lookback and a width that heads divide; got dropout={model.dropout}, "
            f"patch={model.patch}, lookback={model.lookback}, width={model.width}, heads={model.heads}"
        )
    labels = [one.label for one in recipe.optimizers]
    if len(set(labels)) < len(labels):
        raise EvenstepError(f"optimizers: two have one label (labels: {', '.join(labels)})")
    for one in recipe.optimizers:
        baseline(one.name)
        check_options(one.name, one.options)
        build_transforms(one.before)
    for grid in recipe.grid:
        for label in grid.optimizers:
            if label not in labels:
                raise EvenstepError(
                    f"grid.optimizers: no optimizer '{label}'{nearest(label, labels)} (there are: {', '.join(labels)})"
                )
        if not all((grid.horizons, grid.severities, grid.shares, grid.seeds)):
            raise EvenstepError("grid: horizons, severities, shares and seeds may not be empty")
        if min(grid.horizons) < 1 or min(grid.severities) < 0 or not all(0 < share <= 1 for share in grid.shares):
            raise EvenstepError("grid: needs horizons of at least 1, severities of at least 0 and shares in (0, 1]")
