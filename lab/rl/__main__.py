"""Train the agents of recipes and print a table: ``python -m lab.rl RECIPE.toml``.

A run that is stored in STORE/cells.jsonl is not repeated. Its telemetry is in OUT/RECIPE/LINE-SEED/metrics.jsonl, which
``evenstep report`` turns into a page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from evenstep.compare.cells import Task
from evenstep.errors import EvenstepError, nearest
from lab.common import HERE, Run, add_options, status, train
from lab.rl.recipe import Recipe, load

STORE, OUT, SMALL = Path("benchmarks/results/rl"), Path("runs/rl"), Path("runs/rl-smoke")
PACKAGES = ("stable_baselines3", "gymnasium", "mujoco", "numpy")


def cells(recipe: Recipe, only: Sequence[str] = ()) -> Iterator[Task]:
    """The runs of a recipe, or of its lines ``only``. Seed by seed, so that every line has a result early."""
    keys = [line.key for line in recipe.lines]
    for key in only:
        if key not in keys:
            raise EvenstepError(f"--only {key}: no such optimizer{nearest(key, keys)} (available: {', '.join(keys)})")
    for seed in recipe.seeds:
        for line in recipe.lines:
            if not only or line.key in only:
                name = f"{recipe.name}/{line.key}-{seed}"
                yield Task(name, "lab.rl.train:train", recipe.setting(line, seed), PACKAGES)


def run_recipe(
    recipe: Recipe,
    store: Path,
    out: Path,
    only: Sequence[str] = (),
    quiet: bool = False,
    args: argparse.Namespace = HERE,
) -> list[Run]:
    def say(text: str) -> None:
        if not quiet:
            print(text, flush=True)

    return train(lambda outcomes: cells(recipe, only), store, out, args, say=say)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.rl", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="+", type=Path, metavar="RECIPE.toml")
    add_options(parser, STORE, OUT, f"; with --smoke {SMALL}")
    parser.add_argument("--only", action="append", default=[], metavar="LINE", help="this optimizer; may be repeated")
    parser.add_argument("--smoke", action="store_true", help="a miniature of each run, with one seed")
    parser.add_argument("--quiet", action="store_true", help="print the table only")
    args = parser.parse_args(arguments)
    return status(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from lab.rl.page import results

    store, out = args.store or (SMALL if args.smoke else STORE), args.out or (SMALL if args.smoke else OUT)
    for recipe in [load(path) for path in args.recipes]:
        recipe = recipe.smoke() if args.smoke else recipe
        print(results(recipe, run_recipe(recipe, store, out, args.only, args.quiet, args)))


if __name__ == "__main__":
    sys.exit(main())
