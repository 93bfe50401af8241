"""Forecasting with PatchTST: ``python -m lab.forecast RECIPE.toml | prepare SOURCE | report STORE``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from evenstep.compare.cells import Store, Task
from lab.common import Run, add_options, status, train
from lab.forecast.recipe import Cell, Recipe, load
from lab.forecast.series import Series, read_csv

STORE, OUT = Path("runs/forecast"), Path("runs/forecast/cells")


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    commands = {"prepare": _prepare, "report": _report}
    return status(lambda: commands[given[0]](given[1:]) if given and given[0] in commands else _run(given))


def tasks(recipe: Recipe, series: Series, device: str) -> Iterator[Task]:
    data = {"csv": str(Path(recipe.data.csv).absolute()), "gaps": recipe.data.gaps}
    for cell in recipe.cells():
        facts = setting(recipe, series, device, cell)
        yield Task(f"{recipe.name}/{cell.name}", "lab.forecast.training:work", facts, ("transformers",), data)


def setting(recipe: Recipe, series: Series, device: str, cell: Cell) -> dict[str, Any]:
    """Everything that the results of a run depend on."""
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
        **{"seed": cell.seed, "test": cell.test, "device": device},
    }


def _run(given: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m lab.forecast", description=__doc__)
    parser.add_argument("recipe", type=Path, help="a TOML file, such as those in lab/forecast/recipes")
    parser.add_argument("--data", metavar="FILE.csv", help="replaces data.csv of the recipe")
    add_options(parser, STORE, OUT)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--list", action="store_true", help="list the runs and whether they are stored, train nothing")
    options = parser.parse_args(given)
    store = options.store or STORE
    recipe = load(options.recipe)
    if options.data:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, csv=options.data))
    if options.list:
        known = Store(store).outcomes
        for cell in recipe.cells():
            name = f"{recipe.name}/{cell.name}"
            print(f"{'done   ' if name in known else 'missing'}  {name}")
        return
    series = read_csv(Path(recipe.data.csv), recipe.data.columns, gaps=recipe.data.gaps)
    todo = list(tasks(recipe, series, torch.device(options.device).type))

    def show(number: int, task: Task, run: Run) -> None:
        text = "diverged" if run["diverged"] else f"val {run['val_mse']:.4f}"
        if not run["diverged"] and run["setting"]["test"]:
            text += f"  test mse {run['test_mse']:.4f} mae {run['test_mae']:.4f}"
        name = task.name.partition("/")[2]
        print(f"{number}/{len(todo)}  {name:<44}  {text}  epoch {run['best_epoch']}  {run['seconds']} s", flush=True)

    out = options.out or store / OUT.name
    train(lambda outcomes: todo, store, out, options, show=show)


def _prepare(given: list[str]) -> None:
    from lab.forecast.prepare import SOURCES, prepare

    parser = argparse.ArgumentParser("python -m lab.forecast prepare")
    parser.add_argument(
        "source", choices=SOURCES, help="; ".join(f"{name}: {why}" for name, (_, _, why) in SOURCES.items())
    )
    parser.add_argument("--out", metavar="FILE.csv", type=Path, help="default: runs/data/SOURCE.csv")
    options = parser.parse_args(given)
    path = options.out or Path("runs/data") / f"{options.source}.csv"
    rows, columns = prepare(options.source, path)
    print(f"{path}: {rows} rows, {columns} columns")


def _report(given: list[str]) -> None:
    from lab.forecast.report import write

    parser = argparse.ArgumentParser("python -m lab.forecast report")
    parser.add_argument("store", type=Path, help="a directory with the cells.jsonl of the runs")
    parser.add_argument("--page", type=Path, default=Path("docs/results-forecast.md"))
    options = parser.parse_args(given)
    print(write(options.store, options.page))


if __name__ == "__main__":
    sys.exit(main())
