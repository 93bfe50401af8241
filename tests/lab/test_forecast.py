"""Forecasting: data refused with its line, the literature's splits, noise on training inputs alone, every test window
scored once, and the whole program in small."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from evenstep.compare.cells import Outcome, Store
from evenstep.errors import EvenstepError
from lab.common import stored
from lab.forecast import prepare as preparing
from lab.forecast import training
from lab.forecast.__main__ import main
from lab.forecast.recipe import Cell, Model, Optimizer, Train, load
from lab.forecast.series import MONTH, Series, Windows, corrupted, read_csv, split

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "lab" / "forecast" / "recipes").glob("*.toml"))
ETTH1 = ROOT.parent / "shared" / "data" / "ETTh1.csv"
SMALL = Model(lookback=16, patch=4, stride=4, layers=1, heads=2, width=4, ffn=8, dropout=0.0)
ADAM = Optimizer("adam", "adam")


def csv(folder, text, name="some.csv"):
    path = folder / name
    path.write_text(text)
    return path


def waves(rows=240, columns=3):
    time = np.arange(rows)[:, None]
    values = np.sin(2 * np.pi * time / (8 + 4 * np.arange(columns))) * (1 + np.arange(columns)) + np.arange(columns)
    return Series("waves", tuple(f"c{i}" for i in range(columns)), values, "digest")


def written(folder, series):
    rows = [f"2020-01-{1 + i // 24:02} {i % 24:02}:00,{','.join(map(str, row))}" for i, row in enumerate(series.values)]
    return csv(folder, "\n".join([f"date,{','.join(series.columns)}", *rows]), "waves.csv")


def cell(**changes):
    return Cell(
        **{"optimizer": ADAM, "lr": 1e-3, "horizon": 8, "severity": 0.0, "share": 0.0, "seed": 0, "test": True}
        | changes
    )


# ---- data ----

GOOD = "date,a,b\n2020-01-01,1,2\n2020-01-02,3,4\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: no column 'date'"),
        ("time,a\n2020-01-01,1\n", r"line 1: no column 'date' \(available: time, a\)"),
        ("date\n2020-01-01\n", "line 1: no column besides 'date'"),
        ("date,a,a\n", "line 1: two columns are named 'a'"),
        (GOOD + "2020-01-03,5\n", "line 4: 2 cells, but the header has 3"),
        (GOOD + "2020-01-03,5,high\n", "line 4, column 'b': 'high' is not a finite number"),
        (GOOD + "2020-01-03,,6\n", "line 4, column 'a': the cell is empty"),
        (GOOD + "2020-01-03,5,nan\n", "line 4, column 'b': 'nan' is not a finite number"),
        (GOOD + "03.01.2020,5,6\n", "line 4: '03.01.2020' is not a date"),
        (GOOD + "2020-01-03T00:00:00Z,5,6\n", "line 4: only some dates have a time zone"),
        (GOOD + "2020-01-02,5,6\n", "line 4: .* does not come after"),
        (GOOD + "2019-01-02,5,6\n", "line 4: .* does not come after"),
        (GOOD + "2020-01-04,5,6\n", "line 4: .* is 2 days.* fill the gap"),
        ("date,a\n2020-01-01,1\n", "has 1 rows"),
    ],
)
def test_a_file_that_is_no_even_series_is_refused_in_one_line_that_names_the_place(tmp_path, text, said):
    with pytest.raises(EvenstepError, match=said) as raised:
        read_csv(csv(tmp_path, text))
    assert "\n" not in str(raised.value) and "some.csv" in str(raised.value)


def test_columns_are_chosen_by_name_and_gaps_allowed_on_request(tmp_path):
    path = csv(tmp_path, "b,date,a\n1,2020-01-01,x\n2,2020-01-02,y\n3,2020-01-05,z\n")
    assert read_csv(path, ("b",), gaps="allow").values.tolist() == [[1], [2], [3]]
    with pytest.raises(EvenstepError, match=r"no column 'c' \(available: b, a\)"):
        read_csv(path, ("c",))
    with pytest.raises(EvenstepError, match="cannot be read"):
        read_csv(tmp_path / "none.csv")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvenstepError, match="not UTF-8"):
        read_csv(path)


def numbered(rows, columns=1):
    return Series("numbers", ("a",) * columns, np.arange(rows * columns, dtype=float).reshape(rows, columns), "")


def test_the_parts_are_the_literatures_and_each_row_of_a_part_is_forecast():
    for how, rows, (train, val, test) in (
        ("ett-hourly", 17420, (12 * MONTH, 4 * MONTH, 4 * MONTH)),
        ("70/10/20", 52696, (36887, 5270, 10539)),
    ):
        series = numbered(rows)
        parts = split(series, how, 336, 96)
        assert [len(part) for part in (parts.train, parts.val, parts.test)] == [train - 431, val - 95, test - 95]
        mean, std = series.values[:train].mean(), series.values[:train].std()
        for part, start, size in ((parts.val, train, val), (parts.test, train + val, test)):
            first, last = part.at(torch.tensor([0, len(part) - 1]))[1]
            assert [round(row.item() * std + mean) for row in (first[0], last[-1])] == [start, start + size - 1]


def test_nothing_after_the_training_part_has_a_say_in_the_scaling():
    series = waves()
    changed = series.values.copy()
    changed[168:] *= 100
    before, after = (split(dataclasses.replace(series, values=v), "70/10/20", 16, 8) for v in (series.values, changed))
    assert torch.equal(before.train.rows, after.train.rows) and not torch.equal(before.test.rows, after.test.rows)
    assert torch.allclose(before.train.rows.mean(0), torch.zeros(3), atol=1e-6)
    assert torch.allclose(before.train.rows.std(0, correction=0), torch.ones(3), atol=1e-5)
    flat = np.ones((240, 1))
    assert split(dataclasses.replace(series, values=flat), "70/10/20", 16, 8).train.rows.abs().max() == 0


def test_a_series_too_short_for_a_part_is_refused():
    with pytest.raises(EvenstepError, match=r"validation part of 240 rows .* fewer than 96"):
        split(waves(), "70/10/20", 16, 96)
    with pytest.raises(EvenstepError, match="takes 14400; use 70/10/20"):
        split(waves(), "ett-hourly", 16, 8)


def test_noise_has_the_papers_share_and_scale_and_leaves_its_input_alone():
    inputs = torch.rand(64, 50, 20)
    inputs[0, 0, 0] = 3.0
    before = inputs.clone()
    added = corrupted(inputs, 0.1, 2.0, torch.Generator().manual_seed(0)) - inputs
    assert torch.equal(inputs, before)
    hit = added != 0
    assert abs(hit.float().mean() - 0.1) < 0.005
    assert abs(added[hit].std() - 2.0 * 3.0) < 0.2 and abs(added[hit].mean()) < 0.1


# ---- runs ----


class Recorder(torch.nn.Module):
    """A model of one weight that keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen, self.modes = torch.nn.Parameter(torch.ones(())), [], []

    def forward(self, past_values, future_values=None):
        self.seen.append((past_values, future_values))
        self.modes.append(self.training)
        outputs = self.weight * past_values[:, -8:]
        loss = None if future_values is None else (outputs - future_values).square().mean()
        return type("Output", (), {"prediction_outputs": outputs, "loss": loss})


@pytest.fixture
def recorder(monkeypatch):
    net = Recorder()
    monkeypatch.setattr(training, "patchtst", lambda *arguments: net)
    return net


def test_noise_is_on_training_inputs_and_nowhere_else(recorder):
    parts = split(waves(), "70/10/20", 16, 8)
    training.train(cell(severity=5.0, share=0.5), parts, SMALL, Train(epochs=1, batch_size=200), torch.device("cpu"))
    (inputs, targets), *evaluated = recorder.seen
    assert recorder.modes == [True, False, False]
    clean = {tuple(window.flatten().tolist()) for window in parts.train.at(torch.arange(len(parts.train)))[0]}
    assert not clean & {tuple(window.flatten().tolist()) for window in inputs}
    futures = {tuple(window.flatten().tolist()) for window in parts.train.at(torch.arange(len(parts.train)))[1]}
    assert futures == {tuple(window.flatten().tolist()) for window in targets}
    for part, (seen, _) in zip((parts.val, parts.test), evaluated, strict=True):
        assert torch.equal(seen, part.at(torch.arange(len(part)))[0])


def test_the_score_is_over_every_window(monkeypatch):
    windows = Windows(torch.randn(60, 2), 16, 8)
    monkeypatch.setattr(training, "EVAL_BATCH", 10)  # 37 windows: the last batch has 7
    inputs, targets = windows.at(torch.arange(len(windows)))
    errors = inputs[:, -8:] - targets
    found = training.score(Recorder(), windows)
    assert math.isclose(found["mse"], errors.square().mean().item(), rel_tol=1e-6)
    assert math.isclose(found["mae"], errors.abs().mean().item(), rel_tol=1e-6)


def test_the_epoch_is_chosen_by_validation_and_the_test_part_scored_once(recorder, monkeypatch):
    parts = split(waves(), "70/10/20", 16, 8)
    errors, scored = iter([3.0, 1.0, 2.0, 1.5]), []

    def score(net, windows):
        scored.append((len(windows), net.weight.item()))
        return {"mse": next(errors, 9.0), "mae": 0.5}

    monkeypatch.setattr(training, "score", score)
    options = Train(epochs=9, patience=2, batch_size=50)
    result = training.train(cell(), parts, SMALL, options, torch.device("cpu"))
    assert [size for size, _ in scored] == [len(parts.val)] * 4 + [len(parts.test)]
    assert result["best_epoch"] == 2 and len(result["epochs"]["val"]) == 4 and result["val_mse"] == 1.0
    assert scored[-1][1] == scored[1][1] != scored[3][1]  # weights of the second epoch, not of the last


def test_a_run_repeats_to_the_bit_and_another_seed_does_not():
    parts = split(waves(), "70/10/20", 16, 8)
    model = dataclasses.replace(SMALL, dropout=0.2)
    runs = [
        training.train(cell(seed=seed, severity=2.0, share=0.1), parts, model, Train(epochs=2), torch.device("cpu"))
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] and runs[0]["test_mse"] != runs[2]["test_mse"]


def test_a_diverged_run_is_said_to_be_one():
    parts = split(waves(), "70/10/20", 16, 8)
    wild = Optimizer("sgd", "sgd")
    result = training.train(cell(optimizer=wild, lr=1e30), parts, SMALL, Train(epochs=3), torch.device("cpu"))
    assert result["diverged"] and result["test_mse"] is result["test_mae"] is result["val_mse"] is None


def test_a_channel_is_forecast_from_itself_alone():
    torch.manual_seed(0)
    net = training.patchtst(SMALL, 3, 8).eval()
    inputs = torch.randn(2, 16, 3)
    other = inputs.clone()
    other[..., 1] = torch.randn(2, 16)
    first, second = (net(past_values=x).prediction_outputs for x in (inputs, other))
    assert first.shape == (2, 8, 3)
    assert torch.equal(first[..., [0, 2]], second[..., [0, 2]]) and not torch.equal(first[..., 1], second[..., 1])


def test_what_stands_before_an_optimizer_has_its_say():
    parts, plain = split(waves(), "70/10/20", 16, 8), Optimizer("sgd", "sgd")
    blocked = dataclasses.replace(plain, before="value_clip(limit=1e-12)")
    found = [
        training.train(cell(optimizer=one, lr=0.1), parts, SMALL, Train(epochs=3), torch.device("cpu"))["epochs"]["val"]
        for one in (plain, blocked)
    ]
    assert found[0][-1] < 0.9 * found[1][-1]


def test_the_rate_falls_as_in_patchtst():
    parts = split(waves(), "70/10/20", 16, 8)
    options = Train(lr=1.0, epochs=6, windows_per_epoch=4)
    found = training.train(cell(lr=1e-4), parts, SMALL, options, torch.device("cpu"))["epochs"]["lr"]
    assert found == pytest.approx([1e-4, 1e-4, 1e-4, 1e-4, 0.9e-4, 0.81e-4], rel=1e-4)


# ---- recipes and the program ----

RECIPE = """
[data]
csv = "waves.csv"
[model]
lookback = 16
patch = 4
stride = 4
layers = 1
heads = 2
width = 4
ffn = 8
[train]
epochs = 2
lr = 0.001
batch_size = 32
[[optimizers]]
label = "adam"
name = "adam"
[[optimizers]]
label = "adamw-clip"
name = "adamw"
before = "norm_clip"
weight_decay = 0.01
[[optimizers]]
label = "spam"
name = "spam"
[[optimizers]]
label = "stable-spam"
name = "stable_spam"
options = { gamma1 = 0.85 }
[[optimizers]]
label = "stabilizer"
name = "adam"
before = "gradient_stabilizer"
[[grid]]
horizons = [8]
severities = [0, 5]
seeds = [0, 1]
[[grid]]
horizons = [12]
seeds = [0, 1]
optimizers = ["adam", "stable-spam"]
[[grid]]
horizons = [8]
seeds = [0]
rates = [0.001, 0.01]
test = false
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[model]", "[modle]", "unknown key 'modle'; did you mean 'model'"),
        ("stride = 4", "strid = 4", "unknown key 'model.strid'; did you mean 'stride'"),
        ("stride = 4", "stride = 4.5", "model.stride: 4.5 has the wrong type; give a value of type int"),
        ("stride = 4", "stride = 0", "model.stride=0 is out of range; it must be above 0"),
        ("heads = 2", "heads = 3", "a width that heads divide"),
        ('csv = "waves.csv"', "", "data.csv is missing"),
        ('csv = "waves.csv"', 'csv = "waves.csv"\nsplit = "80/20"', "unknown split '80/20'"),
        ('name = "spam"', 'name = "spamm"', "unknown optimizer 'spamm'"),
        ("gamma1 = 0.85", "gama1 = 0.85", "stable_spam has no such hyperparameter"),
        ('before = "norm_clip"', 'before = "norm_clip(norm=1)"', "norm_clip has no argument 'norm'"),
        ('optimizers = ["adam", "stable-spam"]', 'optimizers = ["adams"]', "no optimizer 'adams'; did you mean 'adam'"),
        (
            "severities = [0, 5]",
            'severities = "0"',
            "grid.severities: '0' has the wrong type; give a value of type list",
        ),
        ("severities = [0, 5]", "severities = [-1]", "severities of at least 0"),
        ("seeds = [0, 1]", "seeds = []", "must not be empty"),
        ("[[grid]]", "[[grid", "not valid TOML"),
    ],
)
def test_a_recipe_that_is_wrong_is_refused_in_one_line(tmp_path, old, new, said):
    path = tmp_path / "r.toml"
    path.write_text(RECIPE.replace(old, new, 1))
    with pytest.raises(EvenstepError, match=said) as raised:
        load(path)
    assert "\n" not in str(raised.value)


def test_a_run_that_two_grids_ask_for_is_one_run(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(RECIPE + "[[grid]]\nhorizons = [8, 12]\nseverities = [0]\nseeds = [0, 1]\nshares = [0.05, 0.1]\n")
    files = [one.name for one in load(path).cells()]
    assert len(files) == len(set(files)) == 34 + 3 * 2


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_ours_is_one_and_compares_the_five_optimizers(path):
    recipe = load(path)
    assert [one.label for one in recipe.optimizers] == ["adam", "adamw-clip", "spam", "stable-spam", "stabilizer"]
    cells = list(recipe.cells())
    assert len({one.name for one in cells}) == len(cells)
    for grid in recipe.grid:
        assert grid.seeds == (0, 1, 2) or not grid.test


def test_the_program_runs_a_recipe_and_reports_it_and_repeats_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, waves())
    recipe = tmp_path / "waves.toml"
    recipe.write_text(RECIPE)
    assert main(["waves.toml", "--store", "runs"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 5 * 2 * 2 + 2 * 2 + 5 * 2 and said[0].startswith("1/34  h8-adam-seed0")
    runs = {run["name"]: run for run in stored(Path("runs"))}
    one = runs["waves/h8-s5-10pc-stable-spam-seed1"]
    assert one["setting"]["optimizer_options"]["options"] == {"gamma1": 0.85} and one["test_mse"] > 0
    assert len(json.dumps(one)) < 4000
    assert "test_mse" not in runs["waves/h8-spam-lr0.01-seed0"]

    monkeypatch.setattr(training, "patchtst", None)  # a run would fail now
    lines = (tmp_path / "runs" / "cells.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs" / "cells.jsonl").write_text("".join(line for line in lines if "h12-adam-seed1" not in line))
    (tmp_path / "runs" / "cells" / "waves" / "h12-adam-seed1" / "result.json").unlink()
    assert main(["waves.toml", "--store", "runs", "--list"]) == 0
    assert sum(line.startswith("missing") for line in capsys.readouterr().out.splitlines()) == 1
    with pytest.raises(TypeError):
        main(["waves.toml", "--store", "runs"])
    assert "24/34" not in capsys.readouterr().out

    assert main(["report", "runs", "--page", "page.md"]) == 0
    page = (tmp_path / "page.md").read_text()
    assert (
        "| waves, 8 | S = 5 on 10% | spam better than adam |" in page
        and "## The rates" in page
        and "by horizon" in page
    )
    assert (tmp_path / "page-waves-h8-s5-10.png").stat().st_size > 1000 and "(page-waves-h8-s5-10.png)" in page


def stored_run(folder, label, severity, seed, mse):
    setting = {
        "experiment": "forecast",
        "recipe": "r",
        "data": {"name": "waves", "rows": 9, "columns": ["a"], "split": "s"},
    }
    setting |= {"model": dataclasses.asdict(SMALL), "train": dataclasses.asdict(Train()), "optimizer": label, "lr": 0.1}
    setting |= {"horizon": 96, "severity": severity, "share": 0.1 if severity else 0.0, "seed": seed, "test": True}
    curves = {"val": [1.0, mse], "grad_max": [9.0, 3.0], "grad_median": [1.0, 1.0]}
    run = {"setting": setting, "parameters": 5000, "epochs": curves, "test_mse": mse, "test_mae": mse}
    run |= {"hardware": {"cpu": "a cpu"}, "commit": "c", "versions": {}, "finished": "2026-01-01"}
    Store(folder).keep(f"r/{label}-{severity}-{seed}", Outcome("finished", summary=run))


def test_the_report_says_which_claims_hold(tmp_path):
    runs = {("adam", 0): [1.0, 1.1, 1.2], ("adam", 5): [2.0, 2.1, 2.2], ("spam", 5): [1.0, 1.1, 1.2]}
    runs |= {("stable-spam", 5): [1.3, 1.4, 1.5], ("stabilizer", 5): [2.1, 2.0, None]}
    (tmp_path / "runs").mkdir()
    for (label, severity), errors in runs.items():
        for seed, mse in enumerate(errors):
            stored_run(tmp_path / "runs", label, severity, seed, mse)
    assert main(["report", str(tmp_path / "runs"), "--page", str(tmp_path / "page.md")]) == 0
    page = (tmp_path / "page.md").read_text()
    for said in (
        "spam better than adam | 1.1000 ± 0.1000 against 2.1000 ± 0.1000 | **confirmed**",
        "stable-spam better than spam | 1.4000 ± 0.1000 against 1.1000 ± 0.1000 | **opposite**",
        "stabilizer better than adam | diverged against 2.1000 ± 0.1000 | **not confirmed**",
        "| adam | 3.0 | 3.0 |",  # spikes of the second epoch
    ):
        assert said in page
    assert "adamw-clip" not in page


def test_a_problem_is_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "waves.toml").write_text(RECIPE)
    assert main(["waves.toml"]) == 2 and main(["none.toml"]) == 2 and main(["report", "none"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all(line.startswith("error: ") for line in said)


# ---- prepared data ----


def stand_in(folder, monkeypatch, name, files):
    package = folder / name
    for path, text in files.items():
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text(text)
    (package / "__init__.py").write_text("raise RuntimeError('is not to be imported')")
    monkeypatch.syspath_prepend(folder)


def test_weather_and_electricity_are_written_as_files_that_can_be_read(tmp_path, monkeypatch, capsys):
    heads = ["Date (MM/DD/YYYY)", *preparing.WEATHER]
    hours = [f"01/01/1988,{','.join(str(i + 10 * hour) for i in range(len(heads) - 1))}" for hour in range(30)]
    weather = "\n\n".join(["723170,GREENSBORO", ",".join(heads), *hours])
    stand_in(tmp_path, monkeypatch, "pvlib", {"data/723170TYA.CSV": weather})
    quarters = [f"27.03.2016 03:00;{i};{2 * i};-1;5" for i in range(12)]  # the clock is not read
    loads = "\n".join(["time;H0-A_pload;H0-A_qload;G1-B_pload;lv_rural1_pload", *quarters])
    path = "networks/1-complete_data-mixed-all-0-sw/LoadProfile.csv"
    stand_in(tmp_path, monkeypatch, "simbench", {path: loads})
    assert main(["prepare", "weather", "--out", str(tmp_path / "out" / "weather.csv")]) == 0
    assert main(["prepare", "electricity", "--out", str(tmp_path / "electricity.csv")]) == 0
    assert "weather.csv: 30 rows, 10 columns" in capsys.readouterr().out
    series = read_csv(tmp_path / "out" / "weather.csv")
    assert series.columns == tuple(preparing.WEATHER.values()) and series.values[2, :3].tolist() == [20, 21, 22]
    series = read_csv(tmp_path / "electricity.csv")
    assert series.columns == ("H0-A", "G1-B") and series.values.tolist() == [[1.5, -1], [5.5, -1], [9.5, -1]]

    (tmp_path / "pvlib" / "data" / "723170TYA.CSV").write_text("one line\n")
    assert main(["prepare", "weather", "--out", str(tmp_path / "no.csv")]) == 2
    assert "files of weather in the installed pvlib have another format" in capsys.readouterr().err


def test_a_package_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(preparing.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EvenstepError, match="pip install --no-deps pvlib"):
        preparing.prepare("weather", tmp_path / "weather.csv")


@pytest.mark.skipif(not ETTH1.exists(), reason="ETTh1.csv is not there")
def test_etth1_has_the_windows_that_the_literature_counts():
    parts = split(read_csv(ETTH1), "ett-hourly", 336, 96)
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == [8209, 2785, 2785]
    # The error of repeating the last value, arXiv:2205.13504, Table 2.
    inputs, targets = parts.test.at(torch.arange(len(parts.test)))
    errors = inputs[:, -1:] - targets
    assert errors.square().mean().item() == pytest.approx(1.295, abs=1e-3)
    assert errors.abs().mean().item() == pytest.approx(0.713, abs=1e-3)
