"""The tasks of the stability suite: faults, batches, one training and its measures."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from train_support import write_corpus

from evenstep.stability import tasks
from evenstep.stability.remedies import REMEDIES
from evenstep.stability.tasks import DATA_FAULTS, FAMILIES, GRADIENT_FAULTS, TASKS, Rows, Variant, build, fault_step
from evenstep.stability.trial import EVERY, episodes, train, watch

BY_NAME = {remedy.name: remedy for remedy in REMEDIES}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return f"text:{write_corpus(tmp_path_factory.mktemp('corpus') / 'corpus.jsonl', documents=600)}"


@pytest.fixture(scope="module")
def family():
    return replace(FAMILIES["llama"], vocab_size=300, batch_size=4, seq_len=16, steps=40, warmup=4)


def model_with_gradients():
    torch.manual_seed(0)
    model = nn.ModuleDict({"mlp": nn.Linear(8, 8), "attention": nn.Linear(8, 8)})
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def changed(name, since):
    """By parameter, the number of entries of its gradient that the fault changes."""
    model = model_with_gradients()
    before = {key: p.grad.clone() for key, p in model.named_parameters()}
    GRADIENT_FAULTS[name](model, since, torch.Generator().manual_seed(0))
    after = {key: p.grad for key, p in model.named_parameters()}
    return {key: int((after[key].view(torch.int32) != before[key].view(torch.int32)).sum()) for key in before}, after


def test_faults_of_gradients_strike_where_and_when_they_say():
    for name in GRADIENT_FAULTS:
        assert not any(changed(name, -1)[0].values()) and not any(changed(name, 1)[0].values()), name
    counts, after = changed("all x 1000", 0)
    assert all(counts.values()) and after["attention.weight"].abs().max() > 1000
    assert {key for key, n in changed("MLPs x 1000", 0)[0].items() if n} == {"mlp.weight", "mlp.bias"}
    assert [n for n in changed("one NaN", 0)[0].values() if n] == [1]
    for since in (0, 5, 10, 15):
        counts, after = changed("flipped bits", since)
        assert all(1 <= n <= 4 for n in counts.values()), counts


def test_faults_of_data_strike_where_and_when_they_say(source, family):
    for name, last in (("10 random batches", 9), ("10 % random rows", 50), ("one token", 9), ("code", 19)):
        good, bad = Rows(family, source, "", 5, seed=1), Rows(family, source, name, 5, seed=1)
        same = [all(map(torch.equal, good.next_batch(), bad.next_batch())) for _ in range(5 + last + 5)]
        assert all(same[:5]) and not all(same[5:]), name
        if name != "10 % random rows":
            assert not any(same[5 : 5 + last + 1]) and all(same[5 + last + 1 :]), name
        tokens, targets = bad.next_batch()
        assert torch.equal(tokens[:, 1:], targets[:, :-1]) and tokens.shape == (4, 16)
    assert {*DATA_FAULTS} | {*GRADIENT_FAULTS} == {v.fault for task in TASKS for v in task.variants if v.fault}


def test_rows_go_back_to_a_saved_place(source, family):
    rows = Rows(family, source, "10 random batches", 2, seed=1)
    rows.next_batch(), rows.next_batch()
    place, expected = rows.state_dict(), [rows.next_batch() for _ in range(3)]
    rows.load_state_dict(place)
    assert rows.position == 2
    for one, other in zip(expected, [rows.next_batch() for _ in range(3)], strict=True):
        assert all(map(torch.equal, one, other))


def test_a_fault_starts_between_a_half_and_three_quarters():
    family = FAMILIES["llama"]
    steps = [fault_step(family, seed) for seed in range(50)]
    assert steps == [fault_step(family, seed) for seed in range(50)] and len({*steps}) > 20
    assert family.steps // 2 <= min(steps) and max(steps) < 3 * family.steps // 4


def test_every_model_has_a_loss_near_that_of_equal_odds():
    for name, vocabulary in (("llama", 300), ("lstm", 257)):
        family = FAMILIES[name]
        torch.manual_seed(0)
        tokens = torch.randint(vocabulary, (2, 8))
        assert build(family, vocabulary, {}).loss(tokens, tokens).item() == pytest.approx(math.log(vocabulary), abs=0.7)
    irnn = build(FAMILIES["irnn"], 257, {})
    assert torch.equal(irnn.body.weight_hh_l0, 1.1 * torch.eye(128))
    wide = build(FAMILIES["llama"], 300, {"embedding_std": 1.0})
    assert wide.model.embed_tokens.weight.std().item() == pytest.approx(1, abs=0.05)


def test_the_same_seed_trains_alike_and_another_does_not(source, family):
    runs = [train(family, Variant("v"), BY_NAME["Adam"], 4e-3, seed, source) for seed in (0, 0, 1)]
    assert runs[0].curve == runs[1].curve != runs[2].curve
    assert len(runs[0].curve) == family.steps // EVERY and runs[0].loss == runs[0].curve[-1]
    assert runs[0].loss < math.log(300) - 1 and runs[0].fault is None and not runs[0].actions


def test_one_nan_kills_adam_and_neither_stable_spam_nor_a_guard(source, family):
    losses = {
        name: train(family, Variant("v", fault="one NaN"), BY_NAME[name], 4e-3, 0, source)
        for name in ("Adam", "Adam + clip 1", "Stable-SPAM .7/.9", "Adam + guard: skip", "Adam + guard: rewind")
    }
    assert losses["Adam"].loss is None and losses["Adam + clip 1"].loss is None
    assert losses["Stable-SPAM .7/.9"].loss < 4
    for name, action in (("Adam + guard: skip", "skip"), ("Adam + guard: rewind", "rewind")):
        trial = losses[name]
        assert trial.loss < 4 and trial.actions == {action: 1} and trial.first == 0 and trial.false == 0


def test_a_rewind_after_a_spike_ends_like_the_run_without_it(source, family):
    guard = BY_NAME["Adam + guard: rewind"]
    calm = train(family, Variant("calm"), guard, 4e-3, 0, source)
    struck = train(family, Variant("struck", fault="all x 1000"), guard, 4e-3, 0, source)
    assert struck.actions == {"rewind": 1} and struck.loss == pytest.approx(calm.loss, abs=0.05)
    harmed = train(family, Variant("struck", fault="all x 1000"), BY_NAME["Adam"], 4e-3, 0, source)
    assert harmed.loss > struck.loss + 0.05


def test_a_monitor_sees_a_fault_at_once(source, family):
    for fault in ("all x 1000", "one NaN"):
        found = watch(family, Variant("v", fault=fault), BY_NAME["Adam"], 4e-3, 0, source)
        assert found == {"seed": 0, "fault": tasks.fault_step(family, 0), "before": 0, "delay": 0}
    assert watch(family, Variant("v"), BY_NAME["Adam"], 4e-3, 0, source) == {
        "seed": 0, "fault": None, "before": 0, "delay": None,
    }  # fmt: skip


def test_a_loss_scale_alone_does_not_change_stable_spam(source, family):
    """Powers of two scale every gradient without rounding; Adam's epsilon does not matter for the large factor."""
    one = train(family, Variant("v", loss_scale=1.0), BY_NAME["Stable-SPAM .7/.9"], 4e-3, 0, source)
    other = train(family, Variant("v", loss_scale=1024.0), BY_NAME["Stable-SPAM .7/.9"], 4e-3, 0, source)
    assert other.loss == pytest.approx(one.loss, abs=2e-3)


def test_the_loss_is_that_of_the_last_step(source, family):
    trial = train(replace(family, steps=EVERY + 5), Variant("v"), BY_NAME["Adam"], 4e-3, 0, source)
    assert len(trial.curve) == 1 and trial.loss < trial.curve[0] - 0.01


def test_episodes_are_counted_once_each():
    calm = [5.0 - 0.01 * i for i in range(100)]
    assert episodes(calm) == 0
    assert episodes([*calm, 9.0, 9.0, *calm[-5:], 9.0, *calm[-5:]]) == 2
    assert episodes([*calm, math.nan, math.nan]) == 1


def test_every_remedy_takes_a_step_on_every_model_it_is_for(source):
    from evenstep.stability.study import fits, with_threshold

    for name in ("llama", "irnn"):
        family = replace(FAMILIES[name], vocab_size=300 if name == "llama" else 257, batch_size=2, seq_len=8, steps=3)
        for remedy in REMEDIES:
            if fits(family, remedy):
                one = with_threshold(remedy, 1.0 if remedy.thresholds else None)
                trial = train(family, Variant("v"), one, 1e-3, 0, source)
                assert trial.loss is not None, (name, remedy.name)
    assert not fits(FAMILIES["irnn"], BY_NAME["Adam + QK-norm"])


def test_the_loss_that_knows_token_frequencies_only(source):
    loss = tasks.baseline(source, 300)
    assert 1 < loss < math.log(300)
