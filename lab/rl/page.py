"""The page of the stored runs, with tables, verdicts and pictures: ``python -m lab.rl.page``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from evenstep.compare.report import draw_curves, place, table
from evenstep.train.files import replace_text
from lab.common import INTERVAL, Run, direction, grouped, over_seeds, status, stored
from lab.rl.recipe import Recipe, load

RECIPES = Path(__file__).parent / "recipes"
PAGE = Path("docs/results-rl.md")
NOTES = "notes.md"
"""Remarks on the results, in a file beside the stored runs; they come first on the page."""

HEADER = (
    *("optimizer", "final return", "average return", "gradient norm: median, 99 %, largest"),
    *("spike events", "share of spikes", "seconds", "seeds"),
)

HEAD = """\
# Reinforcement learning: results

<!-- Written by `python -m lab.rl.page {store}`. Change the program, not the page. -->

PPO of stable-baselines3 with different optimizers; [how to run it](reinforcement-learning.md).

*Final return*: mean return of the episodes of the last evaluation, which the deterministic policy plays in separate
environments, with the environment's own rewards. *Average return*: the mean over all evaluations after the first, so
that early learning counts. Both are means over seeds ± the sample standard deviation.

*Gradient norm* is that of the whole network. *Spike events* are those of `SpikeMonitor` per run (the largest entry of a
tensor's gradient is above 10 times its recent mean). *Share of spikes* is its spike rate over 1000 steps. All are of
the gradients that the optimizer gets, after PPO's clipping if there is any.

{interval} Both returns get a verdict.
"""


def results(recipe: Recipe, runs: Sequence[Run]) -> str:
    """The table of a recipe's runs and the verdicts on its claims as Markdown."""
    by_line = grouped(runs, "line")
    rows = [_row(line.label, by_line[line.key]) for line in recipe.lines if line.key in by_line]
    parts = [table(HEADER, rows)]
    if recipe.claims:
        parts.append(table(("claim", "papers", "final return", "average return"), _claims(recipe, by_line)))
    return "\n".join(parts)


def _row(label: str, runs: Sequence[Run]) -> list[str]:
    norms = [mean(run["grad_norm"][key] for run in runs) for key in ("median", "p99", "max")]
    return [
        label,
        over_seeds([run["score"] for run in runs]).text(1),
        over_seeds([run["average"] for run in runs]).text(1),
        ", ".join(f"{norm:.3g}" for norm in norms),
        f"{mean(run['events'].get('spike', 0) for run in runs):.1f}",
        f"{mean(run['spike_rate'] or 0.0 for run in runs):.2%}",
        f"{mean(run['seconds'] for run in runs):.0f}",
        str(len(runs)),
    ]


def _claims(recipe: Recipe, by_line: dict[str, list[Run]]) -> list[list[str]]:
    rows = []
    for claim in recipe.claims:
        better, worse = (by_line.get(claim[side], []) for side in ("better", "worse"))
        verdicts = [_verdict(better, worse, key) for key in ("score", "average")]
        rows.append([claim["text"], claim["paper"] or "-", *verdicts])
    return rows


def _verdict(better: Sequence[Run], worse: Sequence[Run], key: str) -> str:
    if not better or not worse:
        return "**open**"
    means = " against ".join(f"{over_seeds([run[key] for run in side]).mean:.1f}" for side in (better, worse))
    return f"**{direction(better, worse, key, higher_is_better=True)}** ({means})"


def write_page(store: Path, page: Path, recipes: Path = RECIPES) -> list[Path]:
    """Write ``page``, and its pictures into a directory of the same name; returns all paths. Raises EvenstepError if no
    run is stored, or if the recipe of a stored run is missing."""
    written, parts = [page], [HEAD.format(store=store, interval=INTERVAL)]
    if (store / NOTES).exists():
        parts.append((store / NOTES).read_text(encoding="utf-8"))
    by_recipe: dict[str, list[Run]] = {}
    for run in stored(store):
        by_recipe.setdefault(run["name"].partition("/")[0], []).append(run)
    for name, runs in by_recipe.items():
        recipe = load(recipes / f"{name}.toml")
        labels = {line.key: line.label for line in recipe.lines}
        lines = {
            labels.get(key, key): [(r["steps"], r["returns"]) for r in group] for key, group in _ordered(recipe, runs)
        }
        counts = sorted({len(group) for _, group in _ordered(recipe, runs)})
        seeds = " or ".join(str(count) for count in counts)
        picture = draw_curves(
            page.with_suffix("") / f"{recipe.name}.png",
            lines,
            title=recipe.title,
            xlabel="steps in the environment",
            ylabel=f"mean return of {recipe.eval_episodes} episodes (mean and range of {seeds} seeds)",
            footer=place(runs).split("; evenstep")[0],
        )
        written.append(picture)
        parts += [_section(recipe, runs, picture.relative_to(page.parent).as_posix())]
    replace_text(page, "\n".join(parts))
    return written


def _ordered(recipe: Recipe, runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    by_line = grouped(runs, "line")
    return [(line.key, by_line[line.key]) for line in recipe.lines if line.key in by_line]


def _section(recipe: Recipe, runs: Sequence[Run], picture: str) -> str:
    ppo = ", ".join(f"{key} {value}" for key, value in recipe.ppo.items())
    steps = ", ".join(f"{n:,}" for n in sorted({run["gradient_steps"] for run in runs}))
    where = (
        f"`python -m lab.rl lab/rl/recipes/{recipe.name}.toml`: {recipe.timesteps:,} steps in "
        f"{recipe.n_envs} copies of {recipe.env}, {steps} gradient steps, lr {recipe.lr:g} ({recipe.lr_schedule}), "
        f"{'normalised' if recipe.normalize else 'plain'} observations and rewards; {ppo}. {place(runs)}."
    )
    return "\n\n".join(
        (
            f"## {recipe.title}",
            recipe.source,
            where,
            f"![{recipe.title}: return by steps]({picture})",
            results(recipe, runs),
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.rl.page", description=__doc__)
    parser.add_argument("store", nargs="?", type=Path, default=Path("benchmarks/results/rl"))
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(arguments)
    return status(lambda: print(*write_page(args.store, args.page), sep="\n"))


if __name__ == "__main__":
    sys.exit(main())
