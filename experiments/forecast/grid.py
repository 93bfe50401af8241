"""A recipe's runs: which there are, doing those that are missing."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from experiments.common import Run, once
from experiments.forecast.recipe import Cell, Recipe
from experiments.forecast.series import Series, read_csv, split
from experiments.forecast.training import train


def run_all(recipe: Recipe, store: Path, device: torch.device, cells: list[Cell]) -> Iterator[tuple[Cell, Run]]:
    """Each run with its result, as it is done or read: one whose file is in ``store`` is not run again."""
    series = read_csv(Path(recipe.data.csv), recipe.data.columns, gaps=recipe.data.gaps)
    for cell in cells:
        yield cell, run_one(recipe, series, store, device, cell)


def run_one(recipe: Recipe, series: Series, store: Path, device: torch.device, cell: Cell) -> Run:
    def work() -> dict[str, Any]:
        parts = split(series, recipe.data.split, recipe.model.lookback, cell.horizon)
        started = time.process_time()
        return train(cell, parts, recipe.model, recipe.train, device) | {
            "core_seconds": round(time.process_time() - started, 1)
        }

    return once(store / recipe.name / cell.file, setting(recipe, series, device, cell), work, ["transformers"])


def setting(recipe: Recipe, series: Series, device: torch.device, cell: Cell) -> dict[str, Any]:
    """All that a run's numbers depend on."""
    return {
        "experiment": "forecast",
        "recipe": recipe.name,
        "data": {
            **{"name": series.name, "digest": series.digest, "rows": len(series.values), "columns": series.columns},
            "split": recipe.data.split,
        },
        "model": dataclasses.asdict(recipe.model),
        "train": {k: v for k, v in dataclasses.asdict(recipe.train).items() if k != "lr"},
        "optimizer": cell.optimizer.label,
        "optimizer_options": {k: v for k, v in dataclasses.asdict(cell.optimizer).items() if k not in ("label", "lr")},
        **{"lr": cell.lr, "horizon": cell.horizon, "severity": cell.severity, "share": cell.share},
        **{"seed": cell.seed, "test": cell.test, "device": device.type},
    }
