"""Train the agents of recipes, one run after the other, and print a table.

Each run leaves STORE/RECIPE/LINE-SEED.json, and is not run again where that is; its telemetry goes to
OUT/RECIPE/LINE-SEED/metrics.jsonl, of which ``evenstep report`` makes a page.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evenstep.errors import EvenstepError, nearest
from experiments.common import Run, once, status
from experiments.rl.recipe import Recipe, load

STORE = Path("benchmarks/results/rl")
OUT = Path("runs/rl")
PACKAGES = ("stable_baselines3", "gymnasium", "mujoco", "numpy")


def run_recipe(recipe: Recipe, store: Path, out: Path, only: Sequence[str] = (), quiet: bool = False) -> list[Run]:
    """All runs of a recipe, or those of the lines ``only``, seed by seed so that all lines are there early."""
    keys = [line.key for line in recipe.lines]
    for key in only:
        if key not in keys:
            raise EvenstepError(f"--only {key}: no such optimizer{nearest(key, keys)} (there are: {', '.join(keys)})")
    runs = []
    for seed in recipe.seeds:
        for line in recipe.lines:
            if only and line.key not in only:
                continue
            name, setting = f"{line.key}-{seed}", recipe.setting(line, seed)

            def say(text: str, name: str = name) -> None:
                if not quiet:
                    print(f"{recipe.name} {name}: {text}", flush=True)

            directory = out / recipe.name / name
            with_this = functools.partial(_train, setting, directory, say)
            runs.append(once(store / recipe.name / f"{name}.json", setting, with_this, PACKAGES))
    return runs


def _train(setting: dict[str, Any], directory: Path, say: Callable[[str], None]) -> dict[str, Any]:
    from experiments.rl.train import train

    return train(setting, directory, say)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.rl", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="+", type=Path, metavar="RECIPE.toml")
    parser.add_argument("--store", type=Path, help=f"where results go (default: {STORE}; with --smoke runs/rl-smoke)")
    parser.add_argument("--out", type=Path, help=f"where telemetry goes (default: {OUT}; with --smoke runs/rl-smoke)")
    parser.add_argument("--only", action="append", default=[], metavar="LINE", help="this optimizer alone; repeatable")
    parser.add_argument("--smoke", action="store_true", help="a miniature of each run, with one seed")
    parser.add_argument("--quiet", action="store_true", help="the table alone")
    args = parser.parse_args(arguments)
    return status(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from experiments.rl.page import results

    small = Path("runs/rl-smoke")
    store, out = args.store or (small if args.smoke else STORE), args.out or (small if args.smoke else OUT)
    for recipe in [load(path) for path in args.recipes]:
        recipe = recipe.smoke() if args.smoke else recipe
        print(results(recipe, run_recipe(recipe, store, out, args.only, args.quiet)))


if __name__ == "__main__":
    sys.exit(main())
