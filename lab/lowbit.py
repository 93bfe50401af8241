"""Low-bit training: validation loss of optimizers in high and low precision at equal tokens.

    python -m lab.lowbit run --jobs 2                       the sweep: 250K tokens, one seed, every rate
    python -m lab.lowbit run --jobs 2 --long-tokens 1M      then longer runs with more seeds at the best rates
    python -m lab.lowbit page                               write docs/results-lowbit.md from the stored runs

Each cell is one run of `evenstep pretrain` with one thread. The verdicts on the papers' claims follow from the numbers
by rule (`verdicts`). A page can be written before all runs have finished.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from evenstep.compare.cells import Cell
from evenstep.compare.claims import ALPHA, FLOOR, judge, settled
from evenstep.compare.grid import Outcomes
from evenstep.compare.report import table
from evenstep.compare.table import Group, merged
from evenstep.errors import EvenstepError
from evenstep.train.config import parse_count
from evenstep.train.config_io import build
from evenstep.train.files import replace_text
from evenstep.train.hardware import short_commit
from lab.common import Run, add_options, status, stored, train

STORE, OUT = Path("benchmarks/results/lowbit"), Path("runs/lowbit")
PAGE = Path("docs/results-lowbit.md")

# ---- the grid ----

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optim": {"name": "adamw"}},
    "adamw + clip": {"optim": {"name": "adamw"}, "train": {"clip_norm": 1.0}},
    "spam": {"optim": {"name": "spam", "reset_interval": 100, "warmup_steps": 30}},
    "stable_spam": {"optim": {"name": "stable_spam"}},
}
GAMMAS = {True: {"gamma1": 0.85, "gamma2": 0.99999}, False: {"gamma1": 0.7, "gamma2": 0.9}}
"""Gammas of the paper by precision: True for 16 and more bits, False for 4 bits."""
HIGH = ("fp32", "bf16")
PRECISIONS = ("fp32", "bf16", "int4", "fp4", "nvfp4", "fp4-official")
LOW = ("int4", "fp4", "nvfp4")
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
CLAIMS = (
    *(("adamw", "bf16"), ("adamw", "fp32"), ("adamw + clip", "fp32"), ("stable_spam", "fp32")),
    *((name, low) for low in LOW for name in ("adamw", "stable_spam")),
)
"""The lines that the papers' claims compare."""
SWEPT = [(o, p) for p in PRECISIONS if p != "bf16" for o in OPTIMIZERS if p != "fp4-official" or "adamw" in o]
SETTING = {"model": "tiny", "source": "kjv", "vocab_size": 2048, "batch_size": 8, "seq_len": 128, "schedule": "cosine"}
BASE: dict[str, Any] = {
    "data": {key: SETTING[key] for key in ("source", "vocab_size")},
    "model": {"size": SETTING["model"]},
    "train": {key: SETTING[key] for key in ("batch_size", "seq_len")},
    "schedule": {"name": SETTING["schedule"]},
    "eval": {"every": 0},
    "checkpoint": {"every": 100, "keep": 1},
    "log": {"every": 20},
    "sample": {"tokens": 0},
}


def cell(optimizer: str, precision: str, lr: float, seed: int, tokens: int) -> Cell:
    gammas = {"optim": GAMMAS[precision in HIGH]} if optimizer == "stable_spam" else {}
    own: dict[str, Any] = {"optim": {"lr": lr}, "train": {"tokens": tokens}, "seed": seed}
    if precision == "bf16":
        own["train"]["dtype"] = "bf16-autocast"
    elif precision != "fp32":
        own["lowbit"] = precision
    options = merged(merged(merged(BASE, OPTIMIZERS[optimizer]), gammas), own)
    setting = {"optimizer": optimizer, "precision": precision, "lr": lr, "seed": seed, "tokens": tokens, **SETTING}
    stage, group = "final" if seed else "sweep", Group(optimizer, precision, "tiny")
    return Cell(group, stage, lr, seed, tokens, build(options), name_of(setting), setting)


def name_of(setting: Run) -> str:
    words = [str(setting[key]) for key in ("optimizer", "precision")]
    numbers = [f"lr{setting['lr']:g}", f"seed{setting['seed']}", str(setting["tokens"])]
    return re.sub(r"[^\w.-]+", "-", "-".join(words + numbers))


def cells(outcomes: Outcomes, tokens: int, long_tokens: int | None, seeds: int) -> Iterator[Cell]:
    """The sweep; once it has finished, the long runs of the claims at its best rates."""
    sweep = [cell(optimizer, precision, lr, 0, tokens) for optimizer, precision in SWEPT for lr in RATES]
    yield from sweep
    if not long_tokens or not all(one.name in outcomes for one in sweep):
        return
    results = Results([row_of(outcomes[one.name].summary) for one in sweep])
    for optimizer, precision in CLAIMS:
        # Training in bf16 autocast takes the rate that was best in fp32.
        lr = results.best_rate(optimizer, "fp32" if precision == "bf16" else precision)
        yield from (cell(optimizer, precision, lr, seed, long_tokens) for seed in range(seeds) if lr)


# ---- results ----


@dataclass(frozen=True)
class Row:
    """One run. ``val_loss`` is None if it diverged."""

    optimizer: str
    precision: str
    lr: float
    seed: int
    tokens: int
    val_loss: float | None
    tokens_per_second: int | None = None

    @property
    def loss(self) -> float:
        return math.inf if self.val_loss is None else self.val_loss


class Results:
    """The runs of the ``sweep`` (fewest tokens, seed 0) and the ``long`` runs (most tokens)."""

    def __init__(self, rows: list[Row]) -> None:
        known = {name: place for place, name in enumerate((*OPTIMIZERS, *PRECISIONS))}
        rows = sorted(rows, key=lambda r: (r.tokens, known[r.precision], known[r.optimizer], r.lr, r.seed))
        fewest = min(row.tokens for row in rows)
        self.sweep = [row for row in rows if row.tokens == fewest]
        most = max(row.tokens for row in rows)
        self.long = [row for row in rows if row.tokens == most and most > fewest]

    @staticmethod
    def cells(rows: list[Row]) -> list[Line]:
        return list(dict.fromkeys((row.optimizer, row.precision) for row in rows))

    def by_rate(self, optimizer: str, precision: str) -> dict[float, float]:
        return {r.lr: r.loss for r in self.sweep if (r.optimizer, r.precision) == (optimizer, precision)}

    def best_rate(self, optimizer: str, precision: str) -> float | None:
        loss = {lr: x for lr, x in self.by_rate(optimizer, precision).items() if x < math.inf}
        return min(loss, key=lambda lr: loss[lr]) if loss else None

    def rate_range(self, optimizer: str, precision: str) -> float | None:
        """Largest minus smallest loss over all rates of the sweep; None if some are missing."""
        loss = self.whole(optimizer, precision)
        return _minus(max(loss.values()), min(loss.values())) if loss else None

    def rise(self, optimizer: str, precision: str) -> float | None:
        """Loss at the highest rate minus loss at the best rate; None if some are missing."""
        loss = self.whole(optimizer, precision)
        return _minus(loss[max(loss)], min(loss.values())) if loss else None

    def whole(self, optimizer: str, precision: str) -> dict[float, float]:
        """``by_rate`` if no rate of the sweep is missing, else an empty dict."""
        loss = self.by_rate(optimizer, precision)
        return loss if len(loss) == len({row.lr for row in self.sweep}) else {}

    def seeds(self, optimizer: str, precision: str) -> dict[int, float]:
        """Seed -> loss of the long runs at ``long_rate``."""
        rate = self.long_rate(optimizer, precision)
        return {r.seed: r.loss for r in self._long(optimizer, precision) if r.lr == rate}

    def long_rate(self, optimizer: str, precision: str) -> float | None:
        """The rate of a cell's long runs; of several rates, the one with the most seeds, then the lowest mean."""
        by_rate = self.long_by_rate(optimizer, precision)
        return min(by_rate, key=lambda lr: (-len(by_rate[lr]), mean(by_rate[lr])), default=None)

    def long_by_rate(self, optimizer: str, precision: str) -> dict[float, list[float]]:
        """Rate -> losses of a cell's long runs."""
        by_rate: dict[float, list[float]] = {}
        for row in self._long(optimizer, precision):
            by_rate.setdefault(row.lr, []).append(row.loss)
        return by_rate

    def _long(self, optimizer: str, precision: str) -> list[Row]:
        return [r for r in self.long if (r.optimizer, r.precision) == (optimizer, precision)]

    def seed_range(self) -> float | None:
        """The largest range over the seeds of a long cell, among cells with several seeds of which none diverged."""
        ranges = []
        for cell in self.cells(self.long):
            losses = list(self.seeds(*cell).values())
            if len(losses) > 1 and max(losses) < math.inf:
                ranges.append(max(losses) - min(losses))
        return max(ranges, default=None)

    def missing(self) -> str:
        rates = {row.lr for row in self.sweep}
        short = sum(len(rates - set(self.by_rate(*cell))) for cell in SWEPT)
        seeds = {row.seed for row in self.long} | set(range(3))
        long = sum(len(seeds - set(self.seeds(*cell))) for cell in CLAIMS)
        parts = [f"{short} runs of the sweep"] * bool(short) + [f"{long} long runs"] * bool(long)
        return " and ".join(parts) + " are missing" if parts else ""


def row_of(run: Run) -> Row:
    setting, speed = run["setting"], run.get("tokens_per_second")
    facts = {key: setting[key] for key in ("optimizer", "precision", "lr", "seed", "tokens")}
    return Row(**facts, val_loss=run.get("val_loss"), tokens_per_second=round(speed) if speed else None)


# ---- the papers' claims ----

Line = tuple[str, str]
"""Optimizer and precision."""

# Perplexity on C4 (arXiv:2502.17055); "bf16, 4-bit budget" is Adam trained for as many tokens as the 4-bit runs.
_4BIT = ("130M", "350M", "1B")
_BF16 = ("60M", "130M", "350M", "1B")
BUDGET = "bf16, 4-bit budget"
PUBLISHED: dict[Line, dict[str, float]] = {
    ("adamw", "bf16"): dict(zip(_BF16, (34.09, 24.91, 18.77, 16.13), strict=True)),
    ("adamw + clip", "bf16"): dict(zip(_BF16, (33.33, 24.88, 18.51, 15.22), strict=True)),
    ("spam", "bf16"): dict(zip(_BF16, (30.46, 23.36, 17.42, 14.66), strict=True)),
    ("stable_spam", "bf16"): dict(zip(_BF16, (28.84, 22.21, 16.85, 13.90), strict=True)),
    ("adamw", BUDGET): dict(zip(_4BIT, (24.53, 21.38, 19.73), strict=True)),
    ("adamw", "int4"): dict(zip(_4BIT, (26.4, 24.14, 21.59), strict=True)),
    ("adamw + clip", "int4"): dict(zip(_4BIT, (26.30, 21.64, 19.74), strict=True)),
    ("spam", "int4"): dict(zip(_4BIT, (25.03, 20.19, 19.98), strict=True)),
    ("stable_spam", "int4"): dict(zip(_4BIT, (24.33, 17.76, 17.42), strict=True)),
    ("adamw", "fp4"): dict(zip(_4BIT, (28.9, 24.59, 22.01), strict=True)),
    ("adamw + clip", "fp4"): dict(zip(_4BIT, (28.27, 20.84, 20.25), strict=True)),
    ("spam", "fp4"): dict(zip(_4BIT, (26.78, 20.35, 19.74), strict=True)),
    ("stable_spam", "fp4"): dict(zip(_4BIT, (26.31, 19.49, 18.48), strict=True)),
}


@dataclass(frozen=True)
class Verdict:
    claim: str
    papers: str
    here: str
    verdict: str


def compare(lower: dict[int, float], higher: dict[int, float]) -> str:
    """The verdict on the claim that ``lower`` is below ``higher`` by itself, from the losses of common seeds."""
    return judge(lower, higher, floor=FLOOR)[0]


def compare_single(lower: float | None, higher: float | None, margin: float | None) -> str:
    """The same verdict for two numbers, which have to differ by more than ``margin``."""
    if lower is None or higher is None or margin is None:
        return "open"
    if lower == higher:  # both may be infinite
        return "not confirmed"
    return "not confirmed" if abs(lower - higher) <= margin else "confirmed" if lower < higher else "opposite"


def verdicts(results: Results) -> list[Verdict]:
    """All verdicts; those on several seeds are corrected by Holm's method over all of them."""
    pairs = [(("stable_spam", low), ("adamw", "bf16"), BUDGET) for low in LOW]
    pairs += [(("stable_spam", low), ("adamw", low), low) for low in LOW]
    pairs += [(("stable_spam", "fp32"), (name, "fp32"), "bf16") for name in ("adamw", "adamw + clip")]
    claims: list[dict[str, Any]] = []
    for lower, higher, _ in pairs:
        verdict, gap = judge(results.seeds(*lower), results.seeds(*higher), floor=FLOOR)
        decided = gap is None and verdict in ("confirmed", "opposite")  # one side diverged: there is no test
        claims.append({"verdict": verdict, "p": None if decided else 1.0 if gap is None else gap.p})
    rows = [_below(results, *pair, found["verdict"]) for pair, found in zip(pairs, settled(claims), strict=True)]
    margin = results.seed_range()
    for what, measured in (("range over rates", results.rate_range), ("rise at the highest rate", results.rise)):
        for precision in ("fp32", *LOW):
            ours, theirs = measured("stable_spam", precision), measured("adamw", precision)
            here = f"{_number(ours)} against {_number(theirs)}"
            claim = f"{what}: smaller with stable_spam {precision} than with adamw {precision}"
            rows.append(Verdict(claim, "", here, compare_single(ours, theirs, margin)))
    leaky, honest = (_best(results, "adamw", name) for name in ("fp4-official", "fp4"))
    claim = "the official FP4's groups leak: adamw fp4-official better than adamw fp4 (narrower grid, yet lower loss)"
    here = f"{_number(leaky)} against {_number(honest)}"
    return [*rows, Verdict(claim, "", here, compare_single(leaky, honest, margin))]


def _best(results: Results, optimizer: str, precision: str) -> float | None:
    return min(results.whole(optimizer, precision).values(), default=None)


def _minus(a: float, b: float) -> float:
    return math.inf if a == math.inf else a - b


def _number(x: float | None) -> str:
    return "-" if x is None else "diverged" if x == math.inf else f"{x:.3f}"


def _below(results: Results, lower: Line, higher: Line, published: str, verdict: str) -> Verdict:
    """One claim with its numbers. ``published``: the precision of the papers' row for the higher cell."""
    a, b = (results.seeds(*cell) for cell in (lower, higher))
    means = [mean(x.values()) if x else None for x in (a, b)]
    here = f"{_number(means[0])} against {_number(means[1])}"
    their = PUBLISHED.get((lower[0], "bf16" if lower[1] == "fp32" else lower[1]), {})
    other = PUBLISHED.get((higher[0], published), {})
    both = [size for size in other if size in their]
    papers = ", ".join(f"{their[size]:g} against {other[size]:g} ({size})" for size in both)
    return Verdict(f"{' '.join(lower)} better than {' '.join(higher)}", papers, here, verdict)


# ---- the page ----


def page(runs: list[Run], results: Results, store: Path) -> str:
    facts = next((run for run in runs if "hardware" in run), None)
    if facts is None:
        raise EvenstepError(f"{store} has no finished run; train some with `python -m lab.lowbit run` first")
    setting, hardware = facts["setting"], facts["hardware"]
    seeds = sorted({row.seed for row in results.long})
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    commits = sorted({short_commit(one, 7) for run in runs if run.get("commit") for one in run["commit"].split(", ")})
    steps = (results.long or results.sweep)[0].tokens // (setting["batch_size"] * setting["seq_len"])
    long = f" Long runs: {_tokens(results.long)} tokens, seeds {', '.join(map(str, seeds))}." if seeds else ""
    missing = results.missing()
    parts = [
        f"""\
# Low-bit training: results

<!-- Written by `python -m lab.lowbit page --store {store}`. Change the program, not the page. -->

A LLaMA of {facts["parameters"] / 1e6:.2f}M parameters (`{setting["model"]}`, vocabulary {setting["vocab_size"]}) on
`{setting["source"]}`, {setting["batch_size"]} x {setting["seq_len"]} tokens a step, {setting["schedule"]} schedule, no
weight decay. Losses are in nats per token on the validation split, of the quantised model if training was quantised.
fp32 is full precision and bf16 is autocast; `int4`, `fp4`, `nvfp4` and `fp4-official` are the recipes of
[lowbit.md](lowbit.md). Stable-SPAM uses the paper's gammas for the precision, SPAM resets every 100 steps, and clip is
clipping of the gradient norm at 1.0.

Hardware: {hardware["cpu"]}, {hardware["threads"]} thread a run. {versions}. Code of commit {", ".join(commits)}. Sweep:
{_tokens(results.sweep)} tokens a run, seed 0.{long}
""",
        f"**Not finished:** {missing}.\n" if missing else "",
        "## The claims\n",
        RULE,
        table(
            ("claim", "papers", "here", "verdict"),
            [(v.claim, v.papers, v.here, f"**{v.verdict}**") for v in verdicts(results)],
        ),
        "## Loss by learning rate\n",
        f"![Loss by learning rate]({PAGE.stem}-rates.png)\n",
        _sweep(results),
        _seeds(results) if results.long else "",
        PUBLISHED_HEAD,
        table(
            ("precision", "optimizer", *_BF16),
            [
                (precision, optimizer, *(f"{numbers[size]:g}" if size in numbers else "" for size in _BF16))
                for (optimizer, precision), numbers in PUBLISHED.items()
            ],
        ),
        LIMITS.format(steps=steps),
    ]
    return "\n".join(filter(None, parts))


RULE = f"""\
Two cells with several seeds are compared by their differences over the seeds that both have, which start from the same
weights (paired t-test; half-width of the 95 % interval at least {FLOOR}). Their p-values are corrected by Holm's method
over the claims of several seeds. The verdict is *confirmed* if p < {ALPHA:g} and the difference is on the claim's side,
*opposite* if it is on the other side, and *not confirmed* otherwise. Numbers of the
sweep, which has one seed, must differ by more than the largest range over seeds of any long cell. *Open*: runs are
missing. A side of which all runs diverged has lost; if only some did, nothing is confirmed. "Rise at the highest rate"
was added after "range over rates" was known. The rates were chosen on seed 0, which is also tested, and Stable-SPAM in
fp32 lacks the schedule of beta1 and gamma1 that the published runs have.
"""

SEEDS = """\
The rate is the best one of the sweep (for bf16, of fp32); if several were tried, the best of them. The sweep is a
quarter as long as these runs, and neighbouring rates may differ as much as two optimizers do: compare cells at
different rates with care.
"""

PUBLISHED_HEAD = """\
## The papers' numbers

Perplexity on C4 (arXiv:2502.17055). Their evaluation makes each loss N / (N + 1) of the true one. Their FP4 is a grid
of nine evenly spaced levels. Their groups span several tokens if a width is not a multiple of 256 (350M, 1B), so those
4-bit numbers are too low ([lowbit.md](lowbit.md), Causality).
"""

LIMITS = """\
## What this does not show

Models of this size and runs of this length have few spikes, for which Stable-SPAM is made. Its moments are reset every
1000 steps, and the longest run here has {steps}. The rate is chosen with one seed, in shorter runs than those for which
it is used, and the best rate of a longer run may be lower. The papers measure perplexity on C4 with models 40 to 700
times as large and far longer runs; the direction of a difference can be compared, its size cannot. All low-bit
arithmetic is simulated.
"""


def _tokens(rows: list[Row]) -> str:
    return f"{rows[0].tokens / 1e6:g}M" if rows else "-"


def _loss(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if value < math.inf else "diverged"


def _sweep(results: Results) -> str:
    rates = sorted({row.lr for row in results.sweep})
    rows = []
    for optimizer, precision in results.cells(results.sweep):
        loss, best = results.by_rate(optimizer, precision), results.best_rate(optimizer, precision)
        texts = {lr: f"**{_loss(x, 3)}**" if lr == best else _loss(x, 3) for lr, x in loss.items()}
        span = results.rate_range(optimizer, precision)
        shown = (best or "", "" if span is None else _loss(span, 3))
        rows.append((precision, optimizer, *(texts.get(lr, "") for lr in rates), *shown))
    return table(("precision", "optimizer", *(f"{lr:g}" for lr in rates), "best rate", "range over rates"), rows)


def _seeds(results: Results) -> str:
    rows = []
    for optimizer, precision in results.cells(results.long):
        losses, base = results.seeds(optimizer, precision), results.seeds(optimizer, "fp32")
        values, mine, theirs = list(losses.values()), mean(losses.values()), mean(base.values() or [math.inf])
        cost = "" if precision == "fp32" or max(mine, theirs) == math.inf else f"{mine - theirs:+.4f}"
        spread = f"{max(values) - min(values):.4f}" if max(values) < math.inf else ""
        rate, tried = results.long_rate(optimizer, precision), results.long_by_rate(optimizer, precision)
        others = ", ".join(f"{_loss(mean(tried[lr]), 4)} at {lr:g}" for lr in sorted(tried) if lr != rate)
        rows.append((precision, optimizer, f"{rate:g}", _loss(mine, 4), spread, len(values), cost, others))
    heads = ("precision", "optimizer", "rate", "mean loss", "range over seeds", "seeds", "against fp32", "also tried")
    most = max(len(results.seeds(*line)) for line in results.cells(results.long))
    picture = f"![Loss of the long runs]({PAGE.stem}-seeds.png)"
    return "\n".join([f"## {most} seeds at the best rate\n\n{picture}\n", SEEDS, table(heads, rows)])


# ---- pictures ----

COLOURS = {"adamw": "#8d99ae", "adamw + clip": "#264653", "spam": "#e9a23b", "stable_spam": "#2a9d8f"}


def draw_rates(results: Results, path: Path) -> None:
    """Draw the loss over the rate: a panel for each precision, a line for each optimizer, a cross for a divergence."""
    from matplotlib.figure import Figure

    cells = results.cells(results.sweep)
    precisions = list(dict.fromkeys(precision for _, precision in cells))
    rates = sorted({row.lr for row in results.sweep})
    finite = [row.loss for row in results.sweep if row.loss < math.inf]
    roof = max(finite) + 0.05 * (max(finite) - min(finite))
    figure = Figure(figsize=(2.5 * len(precisions) + 0.8, 3.2), layout="constrained")
    panels = figure.subplots(1, len(precisions), sharey=True, squeeze=False)[0]
    for axes, precision in zip(panels, precisions, strict=True):
        for optimizer, colour in COLOURS.items():
            loss = results.by_rate(optimizer, precision)
            if not loss:
                continue
            there = [(lr, x) for lr, x in sorted(loss.items()) if x < math.inf]
            axes.plot(*zip(*there, strict=True), marker="o", markersize=4, color=colour, label=optimizer)
            gone = [lr for lr, x in loss.items() if x == math.inf]
            axes.plot(gone, [roof] * len(gone), "x", color=colour)
        axes.set_xscale("log")
        axes.set_xticks(rates, [f"{lr * 1000:g}" for lr in rates])
        axes.minorticks_off()
        axes.set_title(precision, fontsize=10)
        axes.grid(axis="y", color="#e5e7eb")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("validation loss (nats per token)")
    figure.supxlabel("learning rate / 1e-3", fontsize=10)
    panels[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def draw_seeds(results: Results, path: Path) -> None:
    """Draw a row for each cell, lowest loss first: seeds as dots, their mean as a stroke, their range as a line."""
    from matplotlib.figure import Figure

    cells = {cell: list(results.seeds(*cell).values()) for cell in results.cells(results.long)}
    shown = {cell: [x for x in losses if x < math.inf] for cell, losses in cells.items()}
    order = sorted((cell for cell in cells if shown[cell]), key=lambda cell: mean(cells[cell]))
    figure = Figure(figsize=(7, 0.36 * len(order) + 1.1), layout="constrained")
    axes = figure.subplots()
    for place, cell in enumerate(order):
        losses, colour = shown[cell], COLOURS[cell[0]]
        axes.plot([min(losses), max(losses)], [place, place], color=colour, linewidth=2, alpha=0.5)
        axes.plot(losses, [place] * len(losses), "o", color=colour, markersize=5)
        if len(losses) == len(cells[cell]):
            axes.plot(mean(losses), place, "|", color=colour, markersize=16, markeredgewidth=2)
    labels = [f"{optimizer}, {precision}" for optimizer, precision in order]
    for place, cell in enumerate(order):
        if gone := len(cells[cell]) - len(shown[cell]):
            labels[place] += f" ({gone} diverged)"
    axes.set_yticks(range(len(order)), labels)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xlabel("validation loss (nats per token); each dot a seed, the stroke their mean")
    axes.grid(axis="x", color="#e5e7eb")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


# ---- the program ----


def write(store: Path, where: Path) -> Results:
    """Write the page and its pictures."""
    runs = stored(store)
    results = Results([row_of(run) for run in runs])
    draw_rates(results, where.with_name(f"{PAGE.stem}-rates.png"))
    if results.long:
        draw_seeds(results, where.with_name(f"{PAGE.stem}-seeds.png"))
    replace_text(where, page(runs, results, store))
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m lab.lowbit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("--tokens", default="250K", help="of a run of the sweep (default: 250K)")
    parser.add_argument("--long-tokens", help="of the long runs of the claims, which follow the sweep (such as 1M)")
    parser.add_argument("--seeds", type=int, default=3, help="of the long runs (default: 3)")
    parser.add_argument("--page", type=Path, default=PAGE, help=f"default: {PAGE}")
    add_options(parser, STORE, OUT)
    args = parser.parse_args(arguments)
    args.store, args.out = args.store or STORE, args.out or OUT
    return status(lambda: _run(args) if args.what == "run" else _page(args))


def _run(args: argparse.Namespace) -> None:
    tokens, long = parse_count(args.tokens), parse_count(args.long_tokens) if args.long_tokens else None
    train(lambda outcomes: cells(outcomes, tokens, long, args.seeds), args.store, args.out, args, say=print)


def _page(args: argparse.Namespace) -> None:
    for verdict in verdicts(write(args.store, args.page)):
        print(f"{verdict.verdict:14} {verdict.claim}")


if __name__ == "__main__":
    sys.exit(main())
