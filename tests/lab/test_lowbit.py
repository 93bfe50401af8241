"""The page of low-bit results: verdicts follow from the numbers, and nothing is claimed before its runs are there."""

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from evenstep.compare.cells import DIVERGED, Outcome, Pool, Store
from lab import lowbit
from lab.lowbit import CLAIMS, LOW, OPTIMIZERS, Results, Row, compare, compare_single, verdicts

INF = float("inf")
SWEEP = [
    Row(name, precision, lr, 0, 1000, loss - 0.2 * (name == "stable_spam" and lr > 1e-3))
    for precision in ("fp32", *LOW)
    for name in OPTIMIZERS
    for lr, loss in ((1e-3, 4.7), (2e-3, 4.5), (4e-3, 4.9))
]


def long(gap: float, cells=CLAIMS) -> list[Row]:
    """Three seeds of each cell, 0.02 apart in all; Stable-SPAM's lower by ``gap``."""
    return [
        Row(name, precision, 2e-3, seed, 9000, 4.0 + 0.01 * seed - gap * (name == "stable_spam"))
        for name, precision in cells
        for seed in range(3)
    ]


@pytest.mark.parametrize(
    ("lower", "higher", "verdict"),
    [
        ([1.0, 1.1, 1.2], [1.01, 1.11, 1.21], "confirmed"),
        ([1.0, 1.1, 1.2], [1.3, 1.1, 1.5], "not confirmed"),
        ([1.0, 1.1, 1.2], [1.003, 1.103, 1.203], "not confirmed"),
        ([1.3, 1.4, 1.5], [1.0, 1.1, 1.2], "opposite"),
        ([1.6, 1.7, INF], [1.3, 1.4, 1.5], "not confirmed"),
        ([1.0, 1.1, 1.2], [INF, INF, INF], "confirmed"),
        ([INF, INF], [INF, INF], "not confirmed"),
        ([1.0], [1.3, 1.4, 1.5], "open"),
        ([], [], "open"),
    ],
)
def test_seeds_decide_pair_by_pair(lower, higher, verdict):
    assert compare(dict(enumerate(lower)), dict(enumerate(higher))) == verdict


def test_one_seed_decides_beyond_the_range_over_seeds_alone():
    assert compare_single(1.0, 1.1, 0.05) == "confirmed" and compare_single(1.1, 1.0, 0.05) == "opposite"
    assert compare_single(1.0, 1.04, 0.05) == compare_single(INF, INF, 0.05) == "not confirmed"
    assert compare_single(1.0, INF, 0.05) == "confirmed"
    assert compare_single(1.0, 1.1, None) == compare_single(None, 1.1, 0.05) == "open"


@pytest.mark.parametrize(("gap", "verdict"), [(0.1, "confirmed"), (0.004, "not confirmed"), (-0.1, "opposite")])
def test_every_claim_about_losses_follows_from_the_seeds(gap, verdict):
    found = [v for v in verdicts(Results(SWEEP + long(gap))) if "range" not in v.claim and "rise" not in v.claim]
    assert {v.verdict for v in found if "leak" not in v.claim} == {verdict} and len(found) == 9
    assert next(v for v in found if "leak" in v.claim).verdict == "open"  # its runs are missing


def test_range_and_rise_over_rates_are_two_claims():
    found = {v.claim: v.verdict for v in verdicts(Results(SWEEP + long(0.1)))}
    assert (
        found["rise at the highest rate: smaller with stable_spam fp4 than with adamw fp4"] == "not confirmed"
    )  # both 0.4
    assert found["range over rates: smaller with stable_spam fp4 than with adamw fp4"] == "not confirmed"
    worse = [Row(**{**vars(r), "val_loss": None}) if (r.optimizer, r.lr) == ("adamw", 4e-3) else r for r in SWEEP]
    found = {v.claim: (v.verdict, v.here) for v in verdicts(Results(worse + long(0.1)))}
    assert found["rise at the highest rate: smaller with stable_spam fp4 than with adamw fp4"] == (
        "confirmed",
        "0.400 against diverged",
    )


def test_of_several_rates_of_the_long_runs_the_best_counts():
    better = [Row(r.optimizer, r.precision, 1e-3, r.seed, 9000, r.loss - 1) for r in long(0.1)[:3]]
    results, cell = Results(SWEEP + long(0.1) + better), CLAIMS[0]
    assert results.long_rate(*cell) == 1e-3 and list(results.seeds(*cell).values()) == pytest.approx([3.0, 3.01, 3.02])
    assert Results(SWEEP + long(0.1) + better[:2]).long_rate(*cell) == 2e-3  # fewer seeds


def test_nothing_is_said_before_the_runs_are_there():
    assert {v.verdict for v in verdicts(Results(SWEEP))} == {"open"}
    assert Results(SWEEP).missing() == "6 runs of the sweep and 30 long runs are missing"
    assert Results(SWEEP + long(0.1)).missing() == "6 runs of the sweep are missing"


def test_a_cell_is_a_run_of_pretrain_and_the_long_runs_follow_the_sweep(tmp_path):
    sweep = list(lowbit.cells({}, 1000, 9000, 3))
    assert len(sweep) == 18 * len(lowbit.RATES) and len({cell.name for cell in sweep}) == len(sweep)
    stored = Store(Path(__file__).parents[2] / lowbit.STORE).outcomes
    assert {cell.name for cell in lowbit.cells({}, 250_000, None, 3)} <= {*stored}
    clipped = next(cell for cell in sweep if cell.name == "adamw-clip-fp4-lr0.001-seed0-1000")
    assert (clipped.config.train.clip_norm, clipped.config.lowbit, clipped.config.optim.name) == (1.0, "fp4", "adamw")
    known = {
        c.name: Outcome("finished", 4 + c.lr, "", 1000, {"setting": c.setting, "val_loss": 4 + c.lr}) for c in sweep
    }
    long = list(lowbit.cells(known, 1000, 9000, 3))[len(sweep) :]
    assert [(c.setting["optimizer"], c.setting["precision"]) for c in long[::3]] == list(CLAIMS) and len(long) == 30
    assert {c.lr for c in long} == {1e-3} and {c.seed for c in long} == {0, 1, 2}
    assert next(c for c in long if c.setting["precision"] == "bf16").config.train.dtype == "bf16-autocast"


def test_finished_and_diverged_runs_are_stored_and_become_a_page(tmp_path, capsys):
    pool, store = Pool(tmp_path / "runs"), Store(tmp_path / "store")
    good, diverged = (lowbit.cell("adamw + clip", "fp4", lr, 0, 1000) for lr in (1e-3, 8e-3))
    pool.run(good).mkdir(parents=True)
    summary = {"val_loss": 4.5, "tokens": 1000, "tokens_per_second": 9.6, "commit": "0123456789+changes"}
    summary |= {"parameters": 10, "hardware": {"cpu": "some", "threads": 1}, "versions": {"torch": "2"}}
    (pool.run(good) / "summary.json").write_text(json.dumps(summary))
    pool.settle(diverged, "error: the loss is nan at step 7, training stopped; ...")
    for cell in (good, diverged):
        store.keep(cell.name, cell.outcome(pool))
    assert Store(tmp_path / "store").outcomes[diverged.name].status == DIVERGED
    page = tmp_path / "results-lowbit.md"
    assert lowbit.main(["page", "--store", str(tmp_path / "store"), "--page", str(page)]) == 0
    rows = [lowbit.row_of(run) for run in lowbit.stored(tmp_path / "store")]
    assert [(r.optimizer, r.precision, r.lr, r.val_loss) for r in rows] == [
        ("adamw + clip", "fp4", 1e-3, 4.5),
        ("adamw + clip", "fp4", 8e-3, None),
    ]
    page = page.read_text()
    assert "| fp4 | adamw + clip | **4.500** | diverged | 0.001 | diverged |" in page and "0123456+changes" in page
    assert "**Not finished:**" in page and "| **open** |" in page and (tmp_path / "results-lowbit-rates.png").exists()
    assert "seeds at the best rate" not in page


def test_the_page_in_docs_is_that_of_the_stored_runs(tmp_path, monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    assert lowbit.main(["page", "--page", str(tmp_path / "results-lowbit.md")]) == 0
    assert (tmp_path / "results-lowbit.md").read_text() == (root / "docs/results-lowbit.md").read_text()
