"""What every experiment relies on: runs that are stored once, numbers over seeds, and the words for a direction."""

import json
import math

import pytest

from evenstep.errors import EvenstepError
from lab.common import Number, direction, draw_curves, grouped, once, over_seeds, place, read, stored, table

SETTING = {"optimizer": "adam", "lr": 5e-4, "seed": 0}


def test_a_run_is_stored_with_its_setting_and_place_and_not_run_again(tmp_path):
    path, calls = tmp_path / "deep" / "adam-0.json", []

    def work():
        calls.append(1)
        return {"score": 1.5, "curve": [1.0, math.nan]}

    first = once(path, SETTING, work, ["numpy", "no-such-package"])
    assert once(path, SETTING, work) == first and calls == [1]
    assert first["setting"] == SETTING and first["score"] == 1.5 and first["curve"] == [1.0, None]
    assert {"commit", "hardware", "versions", "seconds", "finished"} <= set(first)
    assert first["versions"]["no-such-package"] == "not installed" and first["versions"]["numpy"]
    assert first["hardware"]["cpu"] in place([first])


def test_a_run_that_fails_or_is_of_another_setting_is_not_taken_for_this_one(tmp_path):
    path = tmp_path / "adam-0.json"
    with pytest.raises(ZeroDivisionError):
        once(path, SETTING, lambda: {"score": 1 / 0})
    assert list(tmp_path.iterdir()) == []
    once(path, SETTING, lambda: {"score": 1.0})
    with pytest.raises(EvenstepError, match=r"adam-0\.json is of another setting \(lr, steps\)"):
        once(path, SETTING | {"lr": 1e-3, "steps": 5}, lambda: {"score": 1.0})
    path.write_text('{"setting"')
    with pytest.raises(EvenstepError, match="not a stored run"):
        read(path)
    with pytest.raises(EvenstepError, match="holds no runs"):
        stored(tmp_path / "nothing")


def test_runs_are_found_and_grouped(tmp_path):
    for name in ("adam", "spam"):
        for seed in (0, 1):
            once(tmp_path / f"{name}-{seed}.json", {"optimizer": name, "seed": seed}, lambda: {"score": 0.0})
    groups = grouped(stored(tmp_path), "optimizer")
    assert [(name, [run["setting"]["seed"] for run in runs]) for name, runs in groups.items()] == [
        ("adam", [0, 1]),
        ("spam", [0, 1]),
    ]
    assert next(iter(grouped(stored(tmp_path), "optimizer", "seed"))) == ("adam", 0)


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
