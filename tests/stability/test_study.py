"""The grid of the stability suite, its rules, its page and its command."""

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from train_support import write_corpus

from evenstep.cli import main
from evenstep.compare.cells import FINISHED, Outcome, Store
from evenstep.stability import page, study
from evenstep.stability.remedies import REMEDIES, remedy_of
from evenstep.stability.study import CLAIMS, EXTEND, SCALES, best_rate, wanted
from evenstep.stability.tasks import FAMILIES, TASKS

ROOT = Path(__file__).parents[2]
STORE = ROOT / "benchmarks/results/stability"


# ---- rules ----


@given(st.integers(-EXTEND, EXTEND), st.floats(0.1, 3))
def test_a_tuned_rate_is_never_at_the_edge_of_its_sweep(best, slope):
    tried = []

    def loss(rate):
        tried.append(rate)
        return slope * abs(math.log2(rate / 1e-3) - best)

    chosen = best_rate(loss, 1e-3)
    assert chosen == pytest.approx(1e-3 * 2.0**best) and len(tried) == len({*tried})
    if abs(best) < EXTEND:
        assert min(tried) < chosen < max(tried)


def test_a_rate_at_which_every_run_diverges_is_left():
    assert best_rate(lambda rate: math.inf if rate > 1e-4 else 1 - rate, 1e-3) == pytest.approx(1e-3 / 16)


def test_seeds_of_tuning_are_not_tested():
    for scale in SCALES.values():
        assert not {*study.TUNING_SEEDS} & {seed for block in scale.seeds for seed in block}


def test_claims_name_remedies_and_variants_that_exist():
    names, variants = {r.name for r in REMEDIES}, {task.name: {v.name for v in task.variants} for task in TASKS}
    for claim in CLAIMS:
        assert {claim.better, claim.than} <= names and {*claim.variants} <= variants[claim.task], claim.text
    assert len({task.name for task in TASKS}) == len(TASKS) and len(names) == len(REMEDIES)
    for scale in SCALES.values():
        assert {*scale.remedies} <= names and {*scale.tasks} <= {*variants}


def cell_names(scale, remedies, outcomes):
    return [cell.name for cell in wanted(scale, remedies, outcomes)]


def test_a_rate_is_tuned_before_a_task_needs_it():
    scale = replace(SCALES["small"], tasks=("control", "depth"), seeds=((0,),))
    remedies = [r for r in REMEDIES if r.name in ("Adam", "Adam + tuned clip")]
    costs = ["cost-Adam", "cost-Adam-+-tuned-clip"]
    first = cell_names(scale, remedies, {})
    assert first[:2] == costs
    first = first[2:]
    # Depth has rates of its own and waits for nothing.
    assert first == ["tune-llama-Adam", "tune-llama-Adam-+-tuned-clip", "depth-Adam-0", "depth-Adam-+-tuned-clip-0"]
    known = {
        name: Outcome(FINISHED, summary={"chosen": {"lr": 0.5, "threshold": 0.25}}) for name in first if "tune" in name
    }
    cells = {cell.name: cell for cell in wanted(scale, remedies, known)}
    monitored = ["control-Adam-0", "monitor-control-0"]
    assert [*cells] == [*costs, *monitored, "control-Adam-+-tuned-clip-0", *first[2:]]
    assert cells["control-Adam-0"].setting["lr"] == 0.5
    assert cells["control-Adam-+-tuned-clip-0"].setting["threshold"] == 0.25


def test_scales_cover_what_they_say():
    quick, gpu = SCALES["quick"], SCALES["gpu"]
    assert len([*wanted(quick, quick.chosen(), {})]) == (len(quick.tasks) + 1) * len(quick.remedies)
    runs = sum(len(cell.setting.get("variants", ())) for cell in wanted(gpu, gpu.chosen(), {}))
    assert 35 <= runs <= 60
    gradient = next(cell for cell in wanted(gpu, gpu.chosen(), {}) if cell.setting.get("task") == "gradient")
    assert {variant["dtype"] for variant in gradient.setting["variants"]} == {"bf16"}
    assert gradient.setting["device"] == "cuda" and gradient.setting["family"]["shape"]["hidden_size"] == 512


def test_a_remedy_names_its_options():
    commands = {remedy.name: remedy.command for remedy in REMEDIES}
    assert commands["Adam + clip 1"] == "--optim.name adamw --train.clip_norm 1"
    assert commands["Adam + AdaGC"] == "--optim.name adamw --optim.before 'adagc(warmup_steps=20)'"
    assert commands["Stable-SPAM .7/.9, robust"] == "--optim.name stable_spam --optim.robust true"
    assert commands["Stable-SPAM .7/.9, schedule"] == "--optim.name stable_spam --optim.total_steps run"
    assert commands["Adam + guard: lower rate"] == "--optim.name adamw --guard.ladder skip,lower_lr"
    assert remedy_of("torch.optim:NAdam").command == "--optim.name torch.optim:NAdam"


# ---- the page ----


def trial(seed, loss, fault=None, **more):
    curve = [4.5, 5.5, loss, loss]
    return {
        "seed": seed, "loss": loss, "curve": curve, "fault": fault, "episodes": 0, "actions": {}, "first": None,
        "false": 0, "seconds": 1.0, **more,
    }  # fmt: skip


def outcome(task, remedy, **variants):
    setting = {"task": task, "remedy": {"name": remedy}, "family": {"name": "llama"}}
    trials = {name: [trial(seed, loss, **more) for seed, loss in enumerate(losses)] for name, (losses, more) in (
        (name, value if isinstance(value, tuple) else (value, {})) for name, value in variants.items()
    )}  # fmt: skip
    return Outcome(FINISHED, summary={"setting": setting, "trials": trials, "seconds": 3600, "commit": "abc"})


@pytest.fixture
def results(monkeypatch):
    monkeypatch.setattr(page, "baseline", lambda source, vocabulary: 6.0)
    struck = {"fault": 30}
    outcomes = {
        "a": outcome("control", "Adam", **{"tuned rate": [4.0, 4.2]}),
        "b": outcome("control", "Stable-SPAM .7/.9", **{"tuned rate": [4.3, 4.4]}),
        "c": outcome("gradient", "Adam", **{"all, loss x 1": ([4.5, None], struck)}),
        "d": outcome("gradient", "Stable-SPAM .7/.9", **{"all, loss x 1": ([4.35, 4.45], struck)}),
    }
    return page.results_of(outcomes, SCALES["small"], REMEDIES), outcomes


def test_regret_damage_and_survival_are_of_the_same_seed(results):
    results, _ = results
    control, gradient = ("control", "tuned rate"), ("gradient", "all, loss x 1")
    assert results.regrets(control, "Stable-SPAM .7/.9") == pytest.approx({0: 0.3, 1: 0.2})
    assert (
        results.regrets(gradient, "Adam")[0] == pytest.approx(0.15) and results.regrets(gradient, "Adam")[1] == math.inf
    )
    assert results.damages(gradient, "Stable-SPAM .7/.9") == pytest.approx([0.05, 0.05])
    assert results.survived(gradient, "Adam") == (1, 2) and results.survived(gradient, "Stable-SPAM .7/.9") == (2, 2)
    assert results.near("Adam") == (0.5, 2) and results.near("Stable-SPAM .7/.9") == (0.5, 2)
    assert results.separates(control)


def test_a_fault_undoes_the_time_since_the_undisturbed_run_had_the_same_loss(results):
    results, _ = results
    key = ("gradient", "all, loss x 1")
    calm = results.trials["control", "tuned rate"]["Adam"][0]
    calm["curve"] = [5.5, 5.0, 4.4, 4.0]
    # 4.5 is 5/6 of the way from the second to the third of four points; the other seed died.
    assert results.lost_share(key, "Adam") == pytest.approx([1 - (2 + 5 / 6) / 4, 1.0])
    for last, share in ((4.0, 0.0), (3.9, 0.0), (5.0, 0.5), (6.0, 1.0), (5.25, 1 - 1.5 / 4)):
        results.trials[key]["Adam"][0]["loss"] = last
        assert results.lost_share(key, "Adam")[0] == pytest.approx(share), last
    calm["curve"] = [4.4]
    results.trials[key]["Adam"][0]["loss"] = 4.3
    assert results.lost_share(key, "Adam")[0] == 0


def test_the_page_says_what_died_and_what_is_not_measured(results):
    results, outcomes = results
    text = page.text_of(results, SCALES["small"], REMEDIES, outcomes, Path("store"))
    gradient = text[text.index("## One gradient") :]
    assert "| Adam | dead, 1/2 lost | dead | 2 | 30, 1 never |" in gradient
    assert "| Stable-SPAM .7/.9 | 4.40 (+0.05) | 0.00 | 2 | 30 |" in gradient
    assert "4 runs" not in text and "8 runs, seeds 0, 1, 4.0 hours of one core" in text
    assert "**not measured**" in text and "No remedy is best everywhere" in text
    told = {one["text"]: one for one in page.verdicts(results)}
    assert told["control: Stable-SPAM .7/.9 better than Adam + clip 1"]["verdict"] == "not measured"


def test_the_page_of_a_faulty_task_alone_has_no_damage(results):
    results, outcomes = results
    outcomes = {name: outcome for name, outcome in outcomes.items() if name in "cd"}
    alone = page.results_of(outcomes, SCALES["small"], REMEDIES)
    text = page.text_of(alone, SCALES["small"], REMEDIES, outcomes, Path("store"))
    assert "| Stable-SPAM .7/.9 | 4.40 | 0.00 | 2 | 30 |" in text


def test_remedies_with_fewer_variants_have_a_table_of_their_own(results):
    results, _ = results
    results.trials["control", "tuned rate"]["SPAM"] = {0: trial(0, 4.0), 1: trial(1, 4.0)}
    first, fewer = page.overview(results, REMEDIES).split("fewer than 2 variants")
    assert "| SPAM |" not in first and "| Adam | 25% |" in first
    assert re.search(r"\| SPAM \| 100% .* \| 1 \|", fewer) and "| Adam |" not in fewer


def test_remedies_are_compared_over_the_seeds_that_all_of_them_have(results):
    results, _ = results
    control = ("control", "tuned rate")
    name = "Stable-SPAM .7/.9"
    results.trials[control][name][2] = trial(2, 5.0)  # the best of its seed, being alone
    assert results.near(name)[0] == pytest.approx((1 / 3 + 1) / 2)
    common = results.common()
    assert common.regrets(control, name) == pytest.approx({0: 0.3, 1: 0.2}) and common.near(name) == (0.5, 2)
    assert results.losses(control, name) == [4.3, 4.4, 5.0]


def test_alarms_without_a_fault_and_before_it_are_false(results):
    results, outcomes = results
    setting = outcomes["a"].summary["setting"]
    runs = [("control", "tuned rate", None, 3, None), ("gradient", "MLPs", 30, 1, 2), ("gradient", "MLPs", 30, 0, None)]
    for n, (task, variant, fault, before, delay) in enumerate(runs):
        alarms = {variant: [{"seed": 0, "fault": fault, "before": before, "delay": delay}]}
        outcomes[f"w{n}"] = Outcome(FINISHED, summary={"setting": {**setting, "task": task}, "alarms": alarms})
    outcomes["e"] = outcome("control", "Adam + guard: skip", **{"tuned rate": ([4.0], {"false": 2})})
    outcomes["f"] = outcome(
        "gradient", "Adam + guard: skip", **{"MLPs": ([4.0], {"fault": 30, "first": 4, "false": 1})}
    )
    text = page.alarm_section(page.results_of(outcomes, SCALES["small"], REMEDIES), REMEDIES)
    assert "| SpikeMonitor, Adam | 3 in 1 runs | 1 in 2 runs | 1 of 2 | 2.0 (largest 2) |" in text
    assert "| Adam + guard: skip | 2 in 1 runs | 1 in 1 runs | 1 of 1 | 4.0 (largest 4) |" in text


def test_a_verdict_needs_more_than_chance_over_all_claims(results, monkeypatch):
    results, _ = results
    claim = study.Claim("Adam", "Stable-SPAM .7/.9", "control")
    monkeypatch.setattr(page, "CLAIMS", (claim,))
    [one] = page.verdicts(results)
    assert one["verdict"] == "not confirmed" and one["p"] > 0.05  # two seeds
    for seed, (low, high) in enumerate([(4.0, 4.3), (4.2, 4.51), (4.1, 4.39), (4.3, 4.6)]):
        results.trials["control", "tuned rate"]["Adam"][seed] = trial(seed, low)
        results.trials["control", "tuned rate"]["Stable-SPAM .7/.9"][seed] = trial(seed, high)
    assert page.verdicts(results)[0]["verdict"] == "confirmed"
    monkeypatch.setattr(page, "CLAIMS", (replace(claim, better=claim.than, than=claim.better),))
    assert page.verdicts(results)[0]["verdict"] == "opposite"


@pytest.mark.skipif(not STORE.is_dir(), reason="no stored results")
def test_the_page_in_the_documentation_is_that_of_the_stored_results(tmp_path):
    scale = SCALES["small"]
    outcomes = Store(STORE).outcomes
    results = page.results_of(outcomes, scale, scale.chosen())
    text = page.text_of(results, scale, scale.chosen(), outcomes, Path("benchmarks/results/stability"))
    assert (ROOT / "docs/stability.md").read_text(encoding="utf-8") == text


# ---- the command ----


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--scale", "smal"], "--scale smal: give one of small, quick, smoke, gpu; did you mean 'small'?"),
        (["--quick", "--scale", "small"], "--quick and --scale small are two scales; give one of them"),
        (["--only", "gradints"], "--only gradints: give one of "),
        (["--remedy", "Adam + clip"], "--remedy 'Adam + clip': give one of "),
        (["--optim", "no_such"], "unknown optimizer 'no_such'"),
        (["--optim", "torch.optim:NoSuch"], "torch.optim:NoSuch cannot be loaded"),
    ],
)
def test_a_wrong_word_is_one_line_before_anything_is_trained(tmp_path, capsys, words, problem):
    assert main(["stability", *words, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert problem in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_miniature_of_every_task_with_an_optimizer_of_the_user(tmp_path, capsys, monkeypatch):
    corpus = write_corpus(tmp_path / "corpus.jsonl", documents=600)
    few = {name: replace(one, batch_size=2, seq_len=16) for name, one in FAMILIES.items()}
    for name, changes in (("llama", {}), ("post-ln", {"num_layers": 3})):
        few[name] = replace(few[name], vocab_size=300, shape={**few[name].shape, **changes})
    small = replace(SCALES["smoke"], families=few, source=f"text:{corpus}")
    monkeypatch.setitem(SCALES, "smoke", small)
    monkeypatch.setattr(study.Scale, "chosen", lambda scale, extra=(): [*extra])
    words = ["stability", "--scale", "smoke", "--jobs", "0", "--out", str(tmp_path / "out")]
    assert main([*words, "--optim", "torch.optim:NAdam"]) == 0
    text = (tmp_path / "out" / "stability.md").read_text()
    for task in TASKS:
        assert f"## {task.title}" in text
    assert text.count("| torch.optim:NAdam |") == len(TASKS) + 1 and (tmp_path / "out" / "stability.png").exists()
    stored = (tmp_path / "out" / "cells.jsonl").read_text()
    assert stored.count("\n") == len(TASKS) + 1  # one is the cost of a step
    shutil.rmtree(tmp_path / "out" / "cells")
    capsys.readouterr()
    assert main([*words, "--optim", "torch.optim:NAdam"]) == 0  # nothing is trained again
    assert "done" not in capsys.readouterr().out and (tmp_path / "out" / "cells.jsonl").read_text() == stored
    assert remedy_of("torch.optim:NAdam").optim == {"name": "torch.optim:NAdam"}
