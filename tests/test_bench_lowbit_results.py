"""The page of low-bit results: verdicts follow from the numbers, and nothing is claimed before its runs are there."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import lowbit_results
from compare_lowbit import CLAIMS, LOW, OPTIMIZERS
from lowbit_claims import Results, Row, compare, compare_single, verdicts

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
    assert found["rise at the highest rate: stable_spam fp4 below adamw fp4"] == "not confirmed"  # both 0.4
    assert found["range over rates: stable_spam fp4 below adamw fp4"] == "not confirmed"
    worse = [Row(**{**vars(r), "val_loss": None}) if (r.optimizer, r.lr) == ("adamw", 4e-3) else r for r in SWEEP]
    found = {v.claim: (v.verdict, v.here) for v in verdicts(Results(worse + long(0.1)))}
    assert found["rise at the highest rate: stable_spam fp4 below adamw fp4"] == ("confirmed", "0.400 against diverged")


def test_of_several_rates_of_the_long_runs_the_best_counts():
    better = [Row(r.optimizer, r.precision, 1e-3, r.seed, 9000, r.loss - 1) for r in long(0.1)[:3]]
    results, cell = Results(SWEEP + long(0.1) + better), CLAIMS[0]
    assert results.long_rate(*cell) == 1e-3 and list(results.seeds(*cell).values()) == pytest.approx([3.0, 3.01, 3.02])
    assert Results(SWEEP + long(0.1) + better[:2]).long_rate(*cell) == 2e-3  # fewer seeds


def test_nothing_is_said_before_the_runs_are_there():
    assert {v.verdict for v in verdicts(Results(SWEEP))} == {"open"}
    assert Results(SWEEP).missing() == "6 runs of the sweep and 30 long runs are missing"
    assert Results(SWEEP + long(0.1)).missing() == "6 runs of the sweep are missing"


def cell(out: Path, name: str, lr: float, loss: float | None, tokens: int = 1000) -> None:
    (out / name).mkdir(parents=True)
    (out / name / "config.toml").write_text(
        f'seed = 0\nlowbit = "fp4"\n[optim]\nname = "adamw"\nlr = {lr}\n[data]\nsource = "kjv"\nvocab_size = 64\n'
        f'[train]\ntokens = {tokens}\nclip_norm = 1.0\ndtype = "fp32"\nbatch_size = 8\nseq_len = 16\n'
        '[schedule]\nname = "cosine"\n'
    )
    if loss is not None:
        summary = {"val_loss": loss, "tokens_per_second": 9.6, "commit": "0123456789+changes", "model": "tiny"}
        summary |= {"parameters": 10, "hardware": {"cpu": "some", "threads": 1}, "versions": {"torch": "2"}}
        (out / name / "summary.json").write_text(json.dumps(summary))


def test_finished_and_diverged_runs_become_a_file_and_a_page(tmp_path, monkeypatch, capsys):
    out, file = tmp_path / "runs", tmp_path / "results.json"
    cell(out, "good", 1e-3, 4.5)
    cell(out, "diverged", 8e-3, None)
    (out / "diverged.log").write_text("error: the loss is nan at step 7, training stopped; ...\n")
    cell(out, "running", 4e-3, None)
    for words in (["collect", str(out), "--json", str(file)], ["page", str(file), "--docs", str(tmp_path)]):
        monkeypatch.setattr(sys, "argv", ["lowbit_results.py", *words])
        lowbit_results.main()
    assert "not finished, left out: running" in capsys.readouterr().out
    document = json.loads(file.read_text())
    assert document["commits"] == ["0123456+changes"]
    assert [(r["optimizer"], r["precision"], r["lr"], r["val_loss"]) for r in document["rows"]] == [
        ("adamw + clip", "fp4", 1e-3, 4.5),
        ("adamw + clip", "fp4", 8e-3, None),
    ]
    page = (tmp_path / "results-lowbit.md").read_text()
    assert "| fp4 | adamw + clip | **4.500** | diverged | 0.001 | diverged |" in page and "0123456+changes" in page
    assert "**Not finished:**" in page and "| **open** |" in page and (tmp_path / "results-lowbit-rates.png").exists()
    assert "seeds at the best rate" not in page
