import pytest
import torch
from torch import nn

from evenstep.baselines.catalog import BASELINES
from evenstep.errors import EvenstepError
from evenstep.models import Llama, llama_config
from evenstep.telemetry.clocks import steps_to_reset
from evenstep.train.config import CHOICES, HYPERPARAMETERS, OptimConfig, owners
from evenstep.train.config_io import literal
from evenstep.train.optimizers import LearningRates, build_optimizer, check_optimizer

AVAILABLE = list(HYPERPARAMETERS)


def model():
    return Llama(llama_config("tiny", 64, num_layers=1, max_seq_len=8))


@pytest.mark.parametrize("name", AVAILABLE)
def test_every_parameter_is_in_exactly_one_group_and_one_step_moves_it(name):
    m = model()
    optimizer = build_optimizer(m, OptimConfig(name=name, lr=0.01, weight_decay=0.1))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(m.parameters()))
    before = [p.detach().clone() for p in m.parameters()]
    for p in m.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, m.parameters(), strict=True))


@pytest.mark.parametrize("name", AVAILABLE)
def test_matrices_decay_and_vectors_do_not(name):
    def decays(rule):
        optimizer = build_optimizer(model(), OptimConfig(name=name, weight_decay=0.1, decay=rule))
        return {(p.ndim >= 2, group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}

    assert decays("matrices") == {(True, 0.1), (False, 0.0)}
    assert decays("all") == {(True, 0.1), (False, 0.1)}


def test_an_unknown_optimizer_names_the_nearest():
    with pytest.raises(EvenstepError, match=r"one of stable_spam, spam, .*did you mean .stable_spam"):
        OptimConfig(name="stablespam")


@pytest.mark.parametrize("name", AVAILABLE)
def test_the_table_for_help_is_the_constructors_signature(name):
    assert BASELINES[name].hyperparameters() == {key: one.default for key, one in HYPERPARAMETERS[name].items()}


@pytest.mark.parametrize("key", CHOICES)
def test_completed_choices_are_taken(key):
    for name in owners()[key]:
        for value in CHOICES[key]:
            build_optimizer(model(), OptimConfig(name=name, options={key: literal(value)}))


def test_options_are_checked_against_the_constructor():
    check_optimizer(OptimConfig(name="adamw", options={"betas": [0.9, 0.95], "eps": 1e-6}))
    with pytest.raises(
        EvenstepError, match=r"optim\.beats: adamw .*did you mean 'betas'.*it has: lr, weight_decay, betas"
    ):
        check_optimizer(OptimConfig(name="adamw", options={"beats": [0.9, 0.95]}))
    with pytest.raises(EvenstepError, match=r"optim\.gamma1: adamw has no"):
        check_optimizer(OptimConfig(name="adamw", options={"gamma1": 0.5}))
    check_optimizer(OptimConfig(name="stable_spam", options={"gamma1": 0.85, "update_proj_gap": 500}))


@pytest.mark.parametrize("option, value", [("betas", [0.9, 1.5]), ("eps", -1.0), ("betas", "high")])
@pytest.mark.parametrize("name", ["adamw", "stable_spam"])
def test_a_value_the_constructor_refuses_is_one_clear_line(name, option, value):
    with pytest.raises(EvenstepError) as caught:
        build_optimizer(model(), OptimConfig(name=name, options={option: value}))
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in AVAILABLE if "betas" in HYPERPARAMETERS[name]])
def test_options_reach_the_optimizer(name):
    optimizer = build_optimizer(model(), OptimConfig(name=name, lr=0.5, options={"betas": [0.8, 0.9]}))
    assert all(tuple(group["betas"]) == (0.8, 0.9) for group in optimizer.param_groups)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_rates_scale_each_groups_own():
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([{"params": [layer.weight], "lr": 0.4}, {"params": [layer.bias]}], lr=0.1)
    rates = LearningRates(optimizer)
    for factor in (0.5, 0.25):  # of the base, not of the last value
        rates.set(optimizer, factor)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.025]


def test_the_schedule_reaches_scales_rate_of_vectors():
    optimizer = build_optimizer(model(), OptimConfig(name="scale", lr=0.4, options={"adam_lr": 0.2}))
    LearningRates(optimizer).set(optimizer, 0.5)
    rates = {(p.ndim, group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    assert rates == {(2, 0.2), (1, 0.1)}


@pytest.mark.parametrize("clock", [7, torch.tensor(7), torch.tensor(7.0, dtype=torch.float64)])
def test_steps_to_reset_reads_int_and_tensor_clocks(clock):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    assert steps_to_reset(optimizer) is None
    optimizer.param_groups[0].update(reset_interval=5, t=clock)
    assert steps_to_reset(optimizer) == 3
    optimizer.param_groups[0].update(reset_interval=0)
    assert steps_to_reset(optimizer) is None


@pytest.mark.parametrize("name", [*AVAILABLE, "muon", "lion", "galore", "lora", "adam_mini", "optimi_adamw"])
def test_the_embedding_and_the_last_layer_have_their_own_rates(name):
    if BASELINES[name].version() is None:
        pytest.skip(f"{BASELINES[name].package} is not installed")
    m, scales = model(), {"lr_scale_embedding": 10.0, "lr_scale_last": 0.5}
    plain = build_optimizer(m, OptimConfig(name=name, lr=0.01, weight_decay=0.1))
    scaled = build_optimizer(m, OptimConfig(name=name, lr=0.01, weight_decay=0.1, **scales))

    def rates(optimizer):
        return {
            id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
        }

    before, after = rates(plain), rates(scaled)
    for path, p in m.named_parameters():
        factor = {"model.embed_tokens.weight": 10.0, "lm_head.weight": 0.5}.get(path, 1.0)
        assert after[id(p)] == (pytest.approx(before[id(p)][0] * factor), before[id(p)][1]), path
    LearningRates(scaled).set(scaled, 0.25)
    assert rates(scaled)[id(m.lm_head.weight)][0] == pytest.approx(0.25 * 0.5 * before[id(m.lm_head.weight)][0])


def test_a_scaled_rate_is_the_step_of_that_rate():
    changes = {}
    for scale in (1.0, 10.0):
        torch.manual_seed(0)
        m = model()
        optimizer = build_optimizer(m, OptimConfig(name="adamw", lr=1e-4, lr_scale_embedding=scale))
        before = [p.detach().clone() for p in m.parameters()]
        for p in m.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        changes[scale] = [(q - p).abs().max().item() for p, q in zip(before, m.parameters(), strict=True)]
    assert changes[10.0][0] == pytest.approx(10 * changes[1.0][0], rel=1e-3)
    assert changes[10.0][1:] == changes[1.0][1:]


def test_a_scale_of_a_layer_that_the_model_does_not_have_is_refused():
    tied = model()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    with pytest.raises(EvenstepError, match=r"optim\.lr_scale\.last 2: .*no trained output layer of its own"):
        build_optimizer(tied, OptimConfig(name="adamw", lr_scale_last=2.0))
    with pytest.raises(EvenstepError, match=r"optim\.lr_scale\.embedding 2: .*no trained embedding"):
        build_optimizer(nn.Sequential(nn.Linear(2, 2)), OptimConfig(name="adamw", lr_scale_embedding=2.0))


@pytest.mark.parametrize("name", ["adamw", "stable_spam", "spam", "scale", "muon", "adafactor"])
def test_the_corrected_decay_is_that_of_adamc(name):
    """In a step without a gradient a hidden matrix shrinks by lr^2 / lr_max * decay, the last layer by lr * decay."""
    m = model()
    config = OptimConfig(name=name, lr=0.1, weight_decay=0.5, decay_correction=True, lr_scale_last=2.0)
    optimizer = build_optimizer(m, config)
    before = {path: p.detach().double() for path, p in m.named_parameters()}
    LearningRates(optimizer, m).set(optimizer, 0.25)
    for p in m.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    q, head = "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"
    after = {path: p.detach().double() for path, p in m.named_parameters()}
    torch.testing.assert_close(after[q], before[q] * (1 - 0.025**2 / 0.1 * 0.5), rtol=1e-6, atol=0)
    torch.testing.assert_close(after[head], before[head] * (1 - 2 * 0.025 * 0.5), rtol=1e-6, atol=0)
    embedding = "model.embed_tokens.weight"
    torch.testing.assert_close(after[embedding], before[embedding] * (1 - 0.025 * 0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_hyperball_is_for_hidden_matrices(name):
    m = model()
    optimizer = build_optimizer(m, OptimConfig(name=name, lr=1e-3, hyperball=20.0))
    before = {path: p.detach().clone() for path, p in m.named_parameters()}
    for p in m.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    after = {path: p.detach() for path, p in m.named_parameters()}
    for path, p in after.items():
        moved = float((p - before[path]).norm() / before[path].norm())
        if "layers" in path and p.dim() == 2:
            torch.testing.assert_close(p.norm(), before[path].norm(), rtol=1e-5, atol=0)
            assert moved == pytest.approx(0.02, rel=0.02), path
        elif path != "lm_head.weight":
            assert moved != pytest.approx(0.02, rel=0.02), path


def test_rules_on_the_weights_that_do_not_fit_are_refused():
    with pytest.raises(EvenstepError, match=r"optim\.cautious_decay true has no effect without optim\.weight_decay"):
        OptimConfig(cautious_decay=True)
    with pytest.raises(EvenstepError, match=r"optim\.cautious_decay true is for decoupled weight decay, which sgd"):
        check_optimizer(OptimConfig(name="sgd", cautious_decay=True, weight_decay=0.1))
    with pytest.raises(
        EvenstepError, match=r"optim\.hyperball keeps the norm of the matrices; leave optim\.weight_decay"
    ):
        OptimConfig(hyperball=20.0, weight_decay=0.1)
    with pytest.raises(EvenstepError, match=r"optim\.hyperball: a parameter has dtype torch\.bfloat16"):
        build_optimizer(model().bfloat16(), OptimConfig(name="adamw", hyperball=20.0))


def test_a_corrected_decay_without_effect_is_refused():
    with pytest.raises(EvenstepError, match=r"optim\.decay_correction true has no effect without optim\.weight_decay"):
        OptimConfig(decay_correction=True)
    config = OptimConfig(name="sgd", decay_correction=True, weight_decay=0.1)
    with pytest.raises(
        EvenstepError, match=r"decoupled weight decay, which sgd does not have; give one of stable_spam"
    ):
        check_optimizer(config)
