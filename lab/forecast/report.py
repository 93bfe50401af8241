"""The page of the stored runs, with tables, pictures and verdicts: ``python -m lab.forecast report STORE``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from evenstep.compare.report import draw_curves, place, table
from evenstep.train.files import replace_text
from lab.common import INTERVAL, Number, Run, direction, grouped, over_seeds, stored

Runs = list[Run]

# ---- published numbers ----

PATCHTST_ETTH1 = {96: (0.375, 0.399), 192: (0.414, 0.421), 336: (0.431, 0.436), 720: (0.449, 0.466)}
"""Horizon -> MSE, MAE of PatchTST/42 on ETTh1 (arXiv:2211.14730, Table 3: lookback 336, one seed, without the last
batch of the test part)."""

NLINEAR_ETTH1 = {96: (0.374, 0.394), 192: (0.408, 0.415), 336: (0.429, 0.427), 720: (0.440, 0.453)}
"""The same of NLinear, one linear layer on inputs from which the last value is subtracted (arXiv:2205.13504)."""


@dataclass(frozen=True)
class Claim:
    """``better`` has a lower test error than ``worse`` after training on corrupted inputs, according to ``paper``."""

    better: str
    worse: str
    paper: str


CLAIMS: tuple[Claim, ...] = (
    Claim("spam", "adam", "SPAM, arXiv:2501.06842"),
    Claim("stable-spam", "adam", "Stable-SPAM, arXiv:2502.17055 v1, Figure 9"),
    Claim("stable-spam", "spam", "Stable-SPAM, arXiv:2502.17055 v1, Figure 9"),
    Claim("stabilizer", "adam", "GradientStabilizer, arXiv:2502.17055 v3"),
    Claim("stabilizer", "adamw-clip", "GradientStabilizer, arXiv:2502.17055 v3"),
)

# ---- the page ----


def write(store: Path, page: Path) -> Path:
    """Write the page of the runs in ``store``, complete or not, with its pictures beside it; returns its path."""
    runs = [run for run in stored(store) if run["setting"].get("experiment") == "forecast"]
    scored, chosen = [r for r in runs if r["setting"]["test"]], [r for r in runs if not r["setting"]["test"]]
    parts = [_head(store, page, scored or runs)]
    if scored:
        parts += [_claims(scored), *(_recipe(name, group, page) for name, group in grouped(scored, "recipe").items())]
    parts += [_rates(chosen)] if chosen else []
    parts += [LIMITS]
    page.parent.mkdir(parents=True, exist_ok=True)
    replace_text(page, "\n".join(parts))
    return page


LIMITS = """## What this does not show

- The papers show curves of the test loss on the literature's Weather data, which is not among ours, and give no table.
  The direction of a difference can be compared, its size cannot.
- The papers do not say whether the noise is drawn once or for every batch, over which values the maximum is taken,
  whether these are scaled, or which hyperparameters SPAM and Stable-SPAM had. [forecasting.md](forecasting.md) has
  ours.
- Noise that is drawn for every batch makes the gradients of every step noisy and does not make spikes of some (see
  Spikes), so the clipping of spikes has little to do.
- Models, batches and runs are smaller than PatchTST's, and the rate of each optimizer was chosen with one seed, on
  clean data. If the best rate is the highest one tried, a higher rate may be better.
"""


# ---- parts of the page ----


def _head(store: Path, page: Path, runs: Runs) -> str:
    seconds = sum(run.get("core_seconds", 0) for run in runs)
    return f"""# Forecasting: results

<!-- Written by `python -m lab.forecast report {store} --page {page}`. Change the program, not the page. -->

Test errors of PatchTST by recipe, optimizer and noise. Errors are of standardised values, over every window of the
test part, which is scored once, at the epoch with the lowest validation error. Numbers are means ± standard deviations
over seeds; only training inputs have noise. Definitions, data and commands: [forecasting.md](forecasting.md).

{place(runs)}. {len(runs)} runs, {seconds / 60:.0f} minutes of one core.
"""


def _setting(runs: Runs) -> str:
    setting = runs[0]["setting"]
    data, model, train = setting["data"], setting["model"], setting["train"]
    return " ".join(
        [
            f"{data['name']}: {data['rows']} rows of {len(data['columns'])} columns, split {data['split']}.",
            f"PatchTST of {_range(run['parameters'] for run in runs)} parameters ({model['layers']} layers of width",
            f"{model['width']}, patches of {model['patch']} every {model['stride']} steps, lookback",
            f"{model['lookback']}),",
            f"{train['epochs']} epochs of {train['windows_per_epoch'] or 'all'} windows, {train['batch_size']} a step.",
            f"{len(runs)} runs, seeds {', '.join(map(str, _sorted(runs, 'seed')))}.",
        ]
    )


def _range(values: Iterable[int]) -> str:
    sizes = sorted({f"{value / 1000:.0f}K" for value in values}, key=lambda text: int(text[:-1]))
    return sizes[0] if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"


def _claims(runs: Runs) -> str:
    """The verdicts on every claim, at each place of the grid."""
    rows = []
    for (name, horizon, severity, share), group in _places(r for r in runs if r["setting"]["severity"]).items():
        by_label = grouped(group, "optimizer")
        for claim in CLAIMS:
            if claim.better in by_label and claim.worse in by_label:
                pair = by_label[claim.better], by_label[claim.worse]
                sides = [_mse(side) for side in pair]
                verdict = direction(*pair, "test_mse", higher_is_better=False)
                place_ = [
                    f"{name}, {horizon}",
                    _noise_name((severity, share)),
                    f"{claim.better} better than {claim.worse}",
                ]
                rows.append([*place_, f"{sides[0].text(4)} against {sides[1].text(4)}", f"**{verdict}**", claim.paper])
    return f"""## The papers' claims

Test MSE after training on corrupted inputs. {INTERVAL}

{table(["recipe, horizon", "noise", "claim", "here", "verdict", "paper"], rows)}"""


def _places(runs: Iterable[Run]) -> dict[tuple[Any, ...], Runs]:
    return dict(sorted(grouped(runs, "recipe", "horizon", "severity", "share").items()))


def _recipe(name: str, runs: Runs, page: Path) -> str:
    lines = [f"## {name}", "", _setting(runs), ""]
    for horizon in _sorted(runs, "horizon"):
        of_horizon = [run for run in runs if run["setting"]["horizon"] == horizon]
        if len(_noises(of_horizon)) > 1:
            lines += [_noise(horizon, of_horizon), _gradients(of_horizon)]
            for noise in _noises(of_horizon):
                picture = page.parent / f"{page.stem}-{name}-h{horizon}-s{noise[0]:g}-{noise[1] * 100:g}.png"
                _draw(picture, f"{name}, horizon {horizon}, {_noise_name(noise)}", _at(of_horizon, noise))
                lines += [f"![Validation error by epoch, {_noise_name(noise)}]({picture.name})", ""]
    known = runs[0]["setting"]["data"]["name"] == "ETTh1"
    lines += [_horizons(runs, known)] if known or len(_sorted(runs, "horizon")) > 1 else []
    return "\n".join(lines)


def _noises(runs: Runs) -> list[tuple[float, float]]:
    return sorted({(run["setting"]["severity"], run["setting"]["share"]) for run in runs})


def _noise_name(noise: tuple[float, float]) -> str:
    return f"S = {noise[0]:g} on {noise[1]:.0%}" if noise[0] else "clean"


def _at(runs: Iterable[Run], noise: tuple[float, float]) -> Runs:
    return [run for run in runs if (run["setting"]["severity"], run["setting"]["share"]) == noise]


def _noise(horizon: int, runs: Runs) -> str:
    noises = _noises(runs)
    rows = []
    for label, group in grouped(runs, "optimizer").items():
        errors = [_cell(_over(_at(group, noise), key)) for key in ("test_mse", "test_mae") for noise in noises]
        rows.append([label, f"{group[0]['setting']['lr']:g}", *errors])
    heads = [f"{what}, {_noise_name(noise)}" for what in ("MSE", "MAE") for noise in noises]
    return f"Horizon {horizon}:\n\n{table(['optimizer', 'rate', *heads], rows)}"


def _gradients(runs: Runs) -> str:
    """A table that shows whether there are spikes at all."""
    rows = []
    for label, group in grouped(runs, "optimizer").items():
        ratios = [[_peak(run) for run in _at(group, noise)] for noise in _noises(runs)]
        rows.append([label, *(f"{median(values):.1f}" if values else "" for values in ratios)])
    return f"""Spikes: the ratio of the largest gradient norm of an epoch to its median, in the worst epoch after the
first; median over seeds, before any clipping.

{table(["optimizer", *map(_noise_name, _noises(runs))], rows)}"""


def _peak(run: Run) -> float:
    pairs = list(zip(run["epochs"]["grad_max"], run["epochs"]["grad_median"], strict=True))
    return max((top / mid for top, mid in pairs[1:] or pairs if top is not None and mid), default=float("nan"))


def _horizons(runs: Runs, known: bool) -> str:
    clean = [run for run in runs if not run["setting"]["severity"]]
    rows = []
    for horizon in _sorted(clean, "horizon"):
        for label, group in grouped((r for r in clean if r["setting"]["horizon"] == horizon), "optimizer").items():
            row = [horizon, label, _cell(_mse(group)), _cell(_over(group, "test_mae"))]
            if known and horizon in PATCHTST_ETTH1:
                away = _mse(group).mean / PATCHTST_ETTH1[horizon][0] - 1
                row += [_pair(PATCHTST_ETTH1[horizon]), f"{away:+.1%}", _pair(NLINEAR_ETTH1[horizon])]
            rows.append(row)
    heads = ["horizon", "optimizer", "MSE", "MAE"]
    if known:
        heads += ["PatchTST/42, published", "ours against it, MSE", "NLinear, published"]
    why = "Theirs has PatchTST's own settings and leaves out the last batch of the test part; ours are given above.\n"
    return f"### Clean, by horizon\n\n{table(heads, rows)}" + (f"\n{why}" if known else "")


def _rates(runs: Runs) -> str:
    rates = _sorted(runs, "lr")
    rows = []
    for label, group in grouped(runs, "optimizer").items():
        by_rate = {run["setting"]["lr"]: run["val_mse"] for run in group}
        known = [value for value in by_rate.values() if value is not None]
        texts = ["" if r not in by_rate else "diverged" if by_rate[r] is None else f"{by_rate[r]:.4f}" for r in rates]
        best = [
            f"**{t}**" if r in by_rate and by_rate[r] == min(known, default=None) else t
            for r, t in zip(rates, texts, strict=True)
        ]
        rows.append([label, *best])
    first = runs[0]["setting"]
    return f"""## The rates

Validation MSE by rate ({first["data"]["name"]}, clean, horizon {first["horizon"]}, seed {first["seed"]}; the test part
is not scored), the best in bold.

{table(["optimizer", *(f"{rate:g}" for rate in rates)], rows)}"""


def _draw(path: Path, title: str, runs: Runs) -> None:
    lines = {label: [_curve(run) for run in group] for label, group in grouped(runs, "optimizer").items()}
    ylabel = "validation MSE (mean and range of the seeds)"
    draw_curves(path, lines, title=title, xlabel="epoch", ylabel=ylabel, footer=place(runs))


def _curve(run: Run) -> tuple[list[int], list[float]]:
    points = [(epoch, value) for epoch, value in enumerate(run["epochs"]["val"], 1) if value is not None]
    return [epoch for epoch, _ in points], [value for _, value in points]


# ---- helpers ----


def _sorted(runs: Runs, key: str) -> list[Any]:
    return sorted({run["setting"][key] for run in runs})


def _over(runs: Iterable[Run], key: str) -> Number:
    return over_seeds([run[key] for run in runs])


def _mse(runs: Iterable[Run]) -> Number:
    return _over(runs, "test_mse")


def _cell(number: Number) -> str:
    return number.text(4) if number.n else ""


def _pair(numbers: tuple[float, float]) -> str:
    return f"{numbers[0]:.3f} / {numbers[1]:.3f}"
