"""What every experiment relies on: runs that are stored once, numbers over seeds, and the words for a direction."""

import json
import math
import shutil

import pytest

from evenstep.compare.cells import Task
from evenstep.compare.report import draw_curves, place, table
from evenstep.errors import EvenstepError
from lab.common import Number, direction, grouped, over_seeds, stored, train

SETTING = {"optimizer": "adam", "lr": 5e-4, "seed": 0}


def work(setting, directory, say):
    (directory / "calls").open("a").write("1")
    if setting.get("fails"):
        raise ZeroDivisionError
    return {"score": 1.5, "curve": [1.0, math.nan]}


def once(folder, setting=SETTING, name="deep/adam-0", show=lambda *_: None):
    cell = Task(name, "tests.lab.test_common:work", setting, ("numpy", "no-such-package"))
    [run] = train(lambda outcomes: [cell], folder / "store", folder / "out", show=show)
    return run


def test_a_run_is_stored_with_its_setting_and_place_and_not_run_again(tmp_path):
    shown = []
    first = once(tmp_path, show=lambda number, cell, run: shown.append((number, cell.name, run["score"])))
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")  # as on another machine
    assert once(tmp_path) == first and (tmp_path / "elsewhere/deep/adam-0/calls").read_text() == "1"
    assert not (tmp_path / "out/deep").exists() and shown == [(1, "deep/adam-0", 1.5)]
    assert first["setting"] == SETTING and first["score"] == 1.5 and first["curve"] == [1.0, None]
    assert {"commit", "hardware", "versions", "seconds", "finished"} <= set(first)
    assert first["versions"]["no-such-package"] == "not installed" and first["versions"]["numpy"]
    assert first["hardware"]["cpu"] in place([first])


def test_a_run_that_fails_or_is_of_another_setting_is_not_taken_for_this_one(tmp_path):
    with pytest.raises(ZeroDivisionError):
        once(tmp_path, SETTING | {"fails": True}, "adam-0")
    assert not (tmp_path / "store").exists()
    once(tmp_path, SETTING, "adam-0")
    with pytest.raises(EvenstepError, match=r"adam-0 has another setting \(lr, steps\)"):
        once(tmp_path, SETTING | {"lr": 1e-3, "steps": 5}, "adam-0")
    shutil.rmtree(tmp_path / "store")  # what is left of the other setting's run is not taken either
    assert once(tmp_path, SETTING | {"lr": 1e-3}, "adam-0")["setting"]["lr"] == 1e-3
    (tmp_path / "store" / "cells.jsonl").write_text('{"setting"')
    with pytest.raises(EvenstepError, match="not the outcome of a run"):
        stored(tmp_path / "store")
    with pytest.raises(EvenstepError, match="holds no runs"):
        stored(tmp_path / "nothing")


def test_runs_are_found_and_grouped(tmp_path):
    for name in ("adam", "spam"):
        for seed in (0, 1):
            once(tmp_path, {"optimizer": name, "seed": seed}, f"{name}-{seed}")
    groups = grouped(stored(tmp_path / "store"), "optimizer")
    assert [(name, [run["setting"]["seed"] for run in runs]) for name, runs in groups.items()] == [
        ("adam", [0, 1]),
        ("spam", [0, 1]),
    ]
    assert next(iter(grouped(stored(tmp_path / "store"), "optimizer", "seed"))) == ("adam", 0)


def test_numbers_over_seeds():
    assert over_seeds([1.0, 2.0, 3.0]) == Number(2.0, 1.0, 3)
    assert over_seeds([2.0]).text(1) == "2.0" and over_seeds([1.0, 3.0]).text(1) == "2.0 ± 1.4"
    assert over_seeds([1.0, None]).text() == "diverged"


def by_seed(*scores):
    return [{"setting": {"seed": seed}, "score": score} for seed, score in enumerate(scores)]


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [
        (by_seed(3.0, 4.0, 5.0), by_seed(2.0, 3.1, 3.9), "confirmed"),
        (by_seed(2.0, 3.1, 3.9), by_seed(3.0, 4.0, 5.0), "opposite"),
        (by_seed(2.0, 3.0, 6.0), by_seed(3.0, 4.0, 5.0), "not confirmed"),
        (by_seed(1.0, 1.0, 1.0), by_seed(1.0, 1.0, 1.0), "not confirmed"),
        (by_seed(None, 2.0, 1.0), by_seed(3.0, 4.0, 5.0), "not confirmed"),
        (by_seed(1.05, 1.06, 1.05), by_seed(1.0, 1.01, 1.0), "not confirmed"),  # within the floor
        (by_seed(3.0), by_seed(2.0, 1.9, 2.1), "open"),
        ([], by_seed(2.0, 1.9, 2.1), "open"),
    ],
)
def test_a_direction_is_found_where_the_whole_interval_is_on_one_side(better, worse, expected):
    assert direction(better, worse, "score", higher_is_better=True, floor=0.06) == expected
    mirrored = {"confirmed": "opposite", "opposite": "confirmed"}.get(expected, expected)
    assert direction(better, worse, "score", higher_is_better=False, floor=0.06) == mirrored


def test_tables_and_curves_are_made(tmp_path):
    assert table(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |\n"
    lines = {"Adam": [([0, 1, 2], [0.0, 1.0, 2.0]), ([0, 2], [1.0, 3.0])]}
    path = draw_curves(tmp_path / "p" / "curves.png", lines, title="t", xlabel="x", ylabel="y", footer="f")
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert json.dumps(lines)  # untouched
