"""python -m experiments.forecast RECIPE.toml | prepare weather|electricity | report STORE"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from experiments.common import status

STORE = Path("runs/forecast")


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    commands = {"prepare": _prepare, "report": _report}
    return status(lambda: commands[given[0]](given[1:]) if given and given[0] in commands else _run(given))


def _run(given: list[str]) -> None:
    from experiments.forecast.grid import run_all
    from experiments.forecast.recipe import load

    parser = argparse.ArgumentParser("python -m experiments.forecast", description=__doc__)
    parser.add_argument("recipe", type=Path, help="a TOML file; there are some in experiments/forecast/recipes")
    parser.add_argument("--data", metavar="FILE.csv", help="in place of the recipe's data.csv")
    parser.add_argument("--store", type=Path, default=STORE, help=f"one JSON file a run goes there; default {STORE}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--list", action="store_true", help="say which runs there are and which are done")
    options = parser.parse_args(given)
    recipe = load(options.recipe)
    if options.data:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, csv=options.data))
    cells = list(recipe.cells())
    if options.list:
        for cell in cells:
            path = options.store / recipe.name / cell.file
            print(f"{'done   ' if path.exists() else 'missing'}  {path}")
        return
    for count, (cell, run) in enumerate(run_all(recipe, options.store, torch.device(options.device), cells), 1):
        text = "diverged" if run["diverged"] else f"val {run['val_mse']:.4f}"
        if not run["diverged"] and cell.test:
            text += f"  test mse {run['test_mse']:.4f} mae {run['test_mae']:.4f}"
        name = cell.file.removesuffix(".json")
        print(f"{count}/{len(cells)}  {name:<44}  {text}  epoch {run['best_epoch']}  {run['seconds']} s", flush=True)


def _prepare(given: list[str]) -> None:
    from experiments.forecast.prepare import SOURCES, prepare

    parser = argparse.ArgumentParser("python -m experiments.forecast prepare")
    parser.add_argument(
        "source", choices=SOURCES, help="; ".join(f"{name}: {why}" for name, (_, _, why) in SOURCES.items())
    )
    parser.add_argument("--out", type=Path, help="default runs/data/SOURCE.csv")
    options = parser.parse_args(given)
    path = options.out or Path("runs/data") / f"{options.source}.csv"
    rows, columns = prepare(options.source, path)
    print(f"{path}: {rows} rows, {columns} columns")


def _report(given: list[str]) -> None:
    from experiments.forecast.report import write

    parser = argparse.ArgumentParser("python -m experiments.forecast report")
    parser.add_argument("store", type=Path, help="a directory with the JSON files of runs")
    parser.add_argument("--page", type=Path, default=Path("docs/results-forecast.md"))
    options = parser.parse_args(given)
    print(write(options.store, options.page))


if __name__ == "__main__":
    sys.exit(main())
