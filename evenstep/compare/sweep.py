"""``evenstep sweep``: optimizers, learning rates and seeds of one recipe, without a table file.

Every combination is one run of the grid runner, a `Cell` whose name holds a hash of its configuration: the same command
continues where it was, and a command with more rates or seeds trains only the new ones.
"""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from evenstep.compare.cells import FINISHED, QUIET, Cell, Outcome
from evenstep.compare.claims import paired
from evenstep.compare.report import draw_curves, table
from evenstep.compare.table import Group
from evenstep.console import counted, print_table
from evenstep.errors import EvenstepError
from evenstep.train.config import Config
from evenstep.train.config_io import load_config
from evenstep.train.files import replace_text
from evenstep.train.log import short_count

LISTS = {"optim.name": "--optimizers", "optim.lr": "--rates", "seed": "--seeds"}
"""The options that a sweep has lists of."""

HEADS = ("optimizer", "lr", "loss", "spread", "seeds", "state MB")


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep. ``lines``: (optimizer, rate) -> the cell of each seed."""

    title: str
    lines: dict[tuple[str, float], list[Cell]]

    @property
    def cells(self) -> list[Cell]:
        """Every cell, one seed of all lines before the next seed, so that an early stop leaves whole comparisons."""
        return [cell for of_seed in zip(*self.lines.values(), strict=True) for cell in of_seed]


def sweep_of(
    recipe: Path,
    overrides: Sequence[tuple[str, str]],
    optimizers: str | None = None,
    rates: str | None = None,
    seeds: str | None = None,
) -> Sweep:
    """The runs of a sweep.

    Args:
        recipe: a recipe of ``evenstep pretrain``.
        overrides: further options and their texts.
        optimizers: names separated by commas; None: the optimizer of the recipe.
        rates: learning rates; None: that of the recipe.
        seeds: random seeds; None: that of the recipe.

    Raises:
        EvenstepError: a list that is empty or has a wrong value, options that an optimizer does not have, a recipe
            without validation.
    """
    for key, _ in overrides:
        if key in LISTS:
            raise EvenstepError(f"--{key} is an option with a list here; give {LISTS[key]} A,B,...")
    lines: dict[tuple[str, float], list[Cell]] = {}
    for name in _listed("--optimizers", optimizers, str) or [None]:
        chosen = [("optim.name", name)] if name else []
        config = load_config(recipe, [*QUIET, *overrides, *chosen])
        if not config.data.val_fraction:
            raise EvenstepError(
                "data.val_fraction is 0, and a sweep compares validation losses; give 0.02, for example"
            )
        _check(config)
        for rate in _listed("--rates", rates, float) or [config.optim.lr]:
            lines[config.optim.name, rate] = [
                _cell(config, rate, seed) for seed in _listed("--seeds", seeds, int) or [config.seed]
            ]
    what = (counted(len({name for name, _ in lines}), "optimizer"), counted(len({rate for _, rate in lines}), "rate"))
    return Sweep(f"{recipe.stem}: {', '.join(what)}, {counted(len(next(iter(lines.values()))), 'seed')}", lines)


def _listed(option: str, text: str | None, kind: Callable[[str], Any]) -> list[Any]:
    """The values of a list on the command line, each once; empty where the option is not given."""
    if text is None:
        return []
    words = [word.strip() for word in text.split(",")]
    try:
        if not all(words):
            raise ValueError
        return list(dict.fromkeys(map(kind, words)))
    except ValueError:
        form = {"--optimizers": "adamw,stable_spam", "--rates": "1e-3,3e-3", "--seeds": "0,1,2"}[option]
        raise EvenstepError(f"{option} {text}: not a list of this form; give one such as {option} {form}") from None


def _check(config: Config) -> None:
    """EvenstepError for options that the optimizer refuses, before anything is trained."""
    from evenstep.train.optimizers import try_optimizer

    try_optimizer(config.optim)


def _cell(config: Config, rate: float, seed: int) -> Cell:
    config = replace(config, seed=seed, out=None, name=None, optim=replace(config.optim, lr=rate))
    group = Group(config.optim.name, config.lowbit or config.train.dtype, config.model.label)
    return Cell(group, "sweep", config.optim.lr, seed, config.total_steps * config.tokens_per_step, config)


# ---- results ----


@dataclass(frozen=True)
class Row:
    """The outcomes of one optimizer at one rate. ``loss``: the mean over the seeds that have ended; None without any.
    ``lost``: the seeds that diverged."""

    optimizer: str
    rate: float
    outcomes: dict[int, Outcome]

    @property
    def by_seed(self) -> dict[int, float]:
        """Seed -> final loss, of the seeds that have ended with one."""
        ended = {seed: o.loss for seed, o in self.outcomes.items() if o.status == FINISHED}
        return {seed: loss for seed, loss in ended.items() if loss is not None}

    @property
    def losses(self) -> list[float]:
        return list(self.by_seed.values())

    @property
    def lost(self) -> list[int]:
        return [seed for seed, outcome in self.outcomes.items() if outcome.status != FINISHED]

    @property
    def loss(self) -> float | None:
        return mean(self.losses) if self.losses else None

    def cells(self) -> list[str]:
        """The texts of `HEADS`."""
        losses, state = self.losses, [o.summary.get("state_bytes") for o in self.outcomes.values()]
        sizes = [size for size in state if size is not None]
        return [
            self.optimizer,
            f"{self.rate:g}",
            f"{mean(losses):.4f}" if losses else "diverged" if self.lost else "-",
            f"{max(losses) - min(losses):.4f}" if len(losses) > 1 else "-",
            f"{len(losses)}" + (f" ({len(self.lost)} diverged)" if self.lost and losses else ""),
            f"{mean(sizes) / 1e6:.2f}" if sizes else "-",
        ]


def rows_of(sweep: Sweep, outcomes: Mapping[str, Outcome]) -> list[Row]:
    """The rows of the table: the lowest loss first, lines without a loss last."""
    rows = [
        Row(name, rate, {cell.seed: outcomes[cell.name] for cell in cells if cell.name in outcomes})
        for (name, rate), cells in sweep.lines.items()
    ]
    # A line of which a seed diverged comes after those that held.
    return sorted(rows, key=lambda row: (bool(row.lost), row.loss is None, row.loss or 0.0))


def best_rows(rows: Sequence[Row]) -> dict[str, Row]:
    """The best row of each optimizer that has a loss."""
    best: dict[str, Row] = {}
    for row in rows:
        if row.loss is not None:
            best.setdefault(row.optimizer, row)
    return best


def below(rows: Sequence[Row]) -> list[str]:
    """The remarks below the table."""
    lines = []
    rates = sorted({row.rate for row in rows})
    for name, row in best_rows(rows).items():
        if len(rates) > 1 and row.rate in (rates[0], rates[-1]):
            side = "lowest" if row.rate == rates[0] else "highest"
            lines.append(f"the best rate of {name} is the {side} that was tried; a better one may lie beyond it")
    best = list(best_rows(rows).values())
    for row in best[1:]:
        first, difference = best[0], paired(row.by_seed, best[0].by_seed)
        if difference is not None and difference.seeds > 1:
            # A line of which a seed diverged comes last, also where its other seeds have the lower loss.
            side = "below" if difference.mean < 0 else "above"
            lines.append(
                f"{row.optimizer} at its best rate is {abs(difference.mean):.4f} {side} {first.optimizer}, ± "
                f"{difference.within:.4f} (95 %, paired by {difference.seeds} seeds)"
            )
    for row in best:
        if row.lost:
            seeds = f"seed{'s' if len(row.lost) > 1 else ''} {', '.join(map(str, row.lost))}"
            lines.append(f"{row.optimizer} at its best rate diverged with {seeds}; its loss leaves that out")
    counts = [len(row.outcomes) for row in rows]
    if max(counts, default=0) < 2:
        lines.append("one seed: small differences may be chance; --seeds 0,1,2 shows how large that is")
    else:
        lines.append("loss: mean over the seeds; spread: highest minus lowest")
        if len(rates) > 1:
            lines.append(
                "the rates are compared on the seeds that the table shows, which favours each best rate a little"
            )
    return lines


def write(sweep: Sweep, outcomes: Mapping[str, Outcome], out: Path, say: Callable[[str], None]) -> None:
    """Print the table, and write it, all runs as CSV, and a picture into ``out``. Nothing without an outcome."""
    rows = rows_of(sweep, outcomes)
    if not any(row.outcomes for row in rows):
        return
    texts, notes = [row.cells() for row in rows], below(rows)
    wrapped = [textwrap.fill(line, 79, subsequent_indent="  ") for line in notes]
    print_table(sweep.title, HEADS, texts, "\n".join(wrapped))
    replace_text(out / "table.md", table(HEADS, texts) + "\n" + "".join(f"- {line}\n" for line in notes))
    replace_text(out / "runs.csv", _comma_separated(sweep, outcomes))
    try:
        say(f"picture: {_draw(sweep, rows, outcomes, out)}")
    except EvenstepError as problem:  # matplotlib is not installed
        say(str(problem))
    say(f"table:   {out / 'table.md'}, and every run in {out / 'runs.csv'}")


def _comma_separated(sweep: Sweep, outcomes: Mapping[str, Outcome]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["optimizer", "lr", "seed", "status", "loss", "tokens", "state_bytes", "run"])
    for (name, rate), cells in sweep.lines.items():
        for cell in cells:
            if outcome := outcomes.get(cell.name):
                facts = (outcome.status, outcome.loss, outcome.tokens, outcome.summary.get("state_bytes"))
                writer.writerow([name, f"{rate:g}", cell.seed, *facts, f"cells/{cell.name}"])
    return text.getvalue()


def _draw(sweep: Sweep, rows: Sequence[Row], outcomes: Mapping[str, Outcome], out: Path) -> Path:
    """The picture: the loss over the learning rate, or, where there is one rate, over the tokens."""
    first = next(iter(sweep.lines.values()))[0]
    footer = f"{short_count(first.tokens)} tokens per run, {first.group.size}, {first.group.precision}"
    rates = {row.rate for row in rows}
    lines: dict[str, list[tuple[Sequence[float], Sequence[float]]]] = {}
    if len(rates) > 1:
        for name in dict.fromkeys(row.optimizer for row in rows):
            seeds: dict[int, list[tuple[float, float]]] = {}
            for row in sorted((row for row in rows if row.optimizer == name), key=lambda row: row.rate):
                for seed, loss in row.by_seed.items():
                    seeds.setdefault(seed, []).append((row.rate, loss))
            lines[name] = [_columns(points) for points in seeds.values()]
        xlabel, xscale = "learning rate", "log"
    else:
        for name, row in best_rows(rows).items():
            lines[name] = [_columns(outcome.curve) for outcome in row.outcomes.values() if outcome.curve]
        xlabel, xscale = "tokens", "linear"
    return draw_curves(
        out / "sweep.png", lines, title=sweep.title, xlabel=xlabel, ylabel="validation loss (nats per token)",
        footer=footer, xscale=xscale,
    )  # fmt: skip


def _columns(points: Sequence[tuple[float, float]]) -> tuple[Sequence[float], Sequence[float]]:
    x, y = zip(*points, strict=True)
    return x, y
