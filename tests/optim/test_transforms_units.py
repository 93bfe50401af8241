"""Each transform against its paper's rule in float64, and its promises."""

import copy
import math

import numpy as np
import oracle_units
import pytest
import torch
from unit_support import Recorder, gradients, parameters

import evenstep
from evenstep import (
    AGC,
    AdaClip,
    AdaGC,
    AdaGN,
    AutoClip,
    GradientStabilizer,
    MomentumReset,
    NormClip,
    SkipStep,
    SpikeClip,
    ValueClip,
    ZClip,
    stabilize,
)

PAIRS = {
    "adaclip": (AdaClip, oracle_units.AdaClip, {}),
    "adaclip_fast": (AdaClip, oracle_units.AdaClip, {"gamma3": 0.5}),
    "adagn": (AdaGN, oracle_units.AdaGN, {}),
    "gradient_stabilizer": (GradientStabilizer, lambda: oracle_units.AdaGN(0.6, 0.999, 0.0, skips_zeros=True), {}),
    "spike_clip": (SpikeClip, oracle_units.SpikeClip, {"threshold": 3.0, "clip_start": 4}),
    "value_clip": (ValueClip, oracle_units.ValueClip, {}),
    "agc": (AGC, oracle_units.AGC, {}),
    "norm_clip": (NormClip, oracle_units.NormClip, {}),
    "zclip": (ZClip, oracle_units.ZClip, {"warmup_steps": 6}),
    "adagc": (AdaGC, oracle_units.AdaGC, {"warmup_steps": 5, "max_norm": 3.0}),
    "adagc_only": (AdaGC, oracle_units.AdaGC, {"warmup_steps": 0, "ratio": 1.5, "beta": 0.5}),
    "autoclip": (AutoClip, oracle_units.AutoClip, {"window": 15}),
    "autoclip_median": (AutoClip, oracle_units.AutoClip, {"percentile": 50.0}),
    "skip_step": (SkipStep, oracle_units.SkipStep, {"window": 12, "sigma": 3.0}),
}


def compare(units, rules, steps=40, dtype=torch.float64, rtol=1e-9):
    """The gradients that reach the base equal those of the rules; returns how many steps changed anything."""
    params = parameters(dtype)
    base = Recorder(params)
    optimizer = stabilize(base, *units, nonfinite="skip")
    changed = 0
    for t, raw in enumerate(gradients(steps), start=1):
        weights = [p.detach().double().numpy().copy() for p in params]
        expected = raw = [np.asarray(g) for g in raw]
        earlier = copy.deepcopy(rules)
        for rule in rules:
            expected = None if expected is None else rule(expected, weights, t)
        for p, g in zip(params, raw, strict=True):
            p.grad = torch.tensor(g, dtype=dtype)
        before = len(base.seen)
        optimizer.step()
        if expected is None:  # a skipped step is as if it had not been, but for the unit that skips
            assert len(base.seen) == before
            rules = [r if isinstance(r, oracle_units.SkipStep) else e for r, e in zip(rules, earlier, strict=True)]
        else:
            for ours, theirs in zip(base.seen[-1], expected, strict=True):
                np.testing.assert_allclose(ours.double().numpy(), theirs, rtol=rtol, atol=1e-12)
        changed += expected is None or any(not np.allclose(a, b, rtol=1e-6) for a, b in zip(expected, raw, strict=True))
    return changed


@pytest.mark.parametrize("name", PAIRS)
def test_a_unit_follows_its_paper(name):
    unit, rule, options = PAIRS[name]
    assert compare([unit(**options)], [rule(**options)]) > 2


@pytest.mark.parametrize("name", PAIRS)
def test_and_in_fp32(name):
    unit, rule, options = PAIRS[name]
    compare([unit(**options)], [rule(**options)], dtype=torch.float32, rtol=2e-4)


@pytest.mark.parametrize("unit, norm", [(GradientStabilizer, 1.0), (lambda: AdaGN(0.6, 0.999, 0.0), 0.75)])
def test_gradient_stabilizer_does_not_count_a_gradient_of_zeros_and_adagn_does(unit, norm):
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    base = Recorder([p])
    optimizer = stabilize(base, unit())
    for g in (*[[3.0, 4.0]] * 3, *[[0.0, 0.0]] * 10, [3.0, 4.0]):
        p.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
    assert float(base.seen[-1][0].norm()) == pytest.approx(norm, abs=1e-9 if norm == 1 else 0.05)
    assert [float(seen[0].norm()) for seen in base.seen[3:13]] == [0.0] * 10


def test_norm_clip_is_torchs():
    params = parameters(torch.float32)
    base = Recorder(params)
    optimizer = stabilize(base, NormClip(0.5))
    for raw in gradients(5):
        for p, g in zip(params, raw, strict=True):
            p.grad = torch.tensor(g, dtype=torch.float32)
        optimizer.step()
        torch.nn.utils.clip_grad_norm_(params, 0.5)
        for ours, p in zip(base.seen[-1], params, strict=True):
            torch.testing.assert_close(ours, p.grad, rtol=1e-5, atol=1e-8)


def test_spike_clip_with_a_reset_before_adam_is_spam():
    """Adam behind SPAM's rule, with moments reset together, is SPAM without its warm-up."""
    ours, theirs = parameters(), parameters()
    chain = stabilize(
        torch.optim.Adam(ours, lr=0.01, eps=1e-6), SpikeClip(threshold=20.0, clip_start=3), reset_interval=11
    )
    spam = evenstep.SPAM(theirs, lr=0.01, threshold=20.0, clip_start=3, reset_interval=11, warmup_steps=0)
    for raw in gradients(40):
        for side, optimizer in ((ours, chain), (theirs, spam)):
            for p, g in zip(side, raw, strict=True):
                p.grad = torch.tensor(g)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("robust", [False, True])
def test_adaclip_and_adagn_before_adam_are_stable_spam(robust):
    ours, theirs = parameters(), parameters()
    chain = stabilize(torch.optim.Adam(ours, lr=0.01), AdaClip(robust=robust), AdaGN(robust=robust), MomentumReset(9))
    stable = evenstep.StableSPAM(theirs, lr=0.01, reset_interval=9, robust=robust)
    for raw in gradients(40):
        for side, optimizer in ((ours, chain), (theirs, stable)):
            for p, g in zip(side, raw, strict=True):
                p.grad = torch.tensor(g)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_momentum_reset_is_the_option_and_stands_anywhere():
    def run(*units, **options):
        params = parameters()
        optimizer = stabilize(torch.optim.AdamW(params, lr=0.01), *units, **options)
        for raw in gradients(12):
            for p, g in zip(params, raw, strict=True):
                p.grad = torch.tensor(g)
            optimizer.step()
        return params

    expected = run(AdaGN(), reset_interval=5)
    for same in (run(AdaGN(), MomentumReset(5)), run(MomentumReset(5), AdaGN())):
        assert all(torch.equal(a, b) for a, b in zip(expected, same, strict=True))
    assert not torch.equal(expected[0], run(AdaGN())[0])
    with pytest.raises(ValueError, match="not both"):
        run(MomentumReset(5), reset_interval=5)


def test_skip_step_leaves_everything_but_its_window():
    params = parameters()
    before, behind = SpikeClip(threshold=1e12), (AdaGN(), ZClip(warmup_steps=2))
    optimizer = stabilize(torch.optim.AdamW(params, lr=0.1), before, SkipStep(window=6), *behind)
    rng = np.random.default_rng(0)

    def step(scale):
        for p in params:
            p.grad = torch.tensor(rng.normal(size=p.shape)) * scale
        optimizer.step()

    def facts():
        state = optimizer.state_dict()["state"]
        kept = {(i, k): v.clone() for i, s in state.items() for k, v in s.items() if "skip" not in k}
        return [p.detach().clone() for p in params], kept

    for _ in range(6):
        step(1.0)
    weights, state = facts()
    history = optimizer.statistics[params[0]]["skip_step.history"].clone()
    step(1e4)
    after, later = facts()
    assert all(torch.equal(a, b) for a, b in zip(weights, after, strict=True))
    assert all(torch.equal(value, later[key]) for key, value in state.items())
    assert not torch.equal(history, optimizer.statistics[params[0]]["skip_step.history"])
    assert (optimizer.stats["skipped"] == 1).all()
    step(1.0)
    assert not torch.equal(params[0], weights[0]) and (optimizer.stats["skipped"] == 0).all()


def test_skip_step_can_watch_the_loss():
    p = torch.nn.Parameter(torch.ones(3))
    unit = SkipStep(window=6, watch="loss")
    optimizer = stabilize(torch.optim.SGD([p], lr=0.1), unit)
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match="was given no loss"):
        optimizer.step()
    for loss in (1.0, 1.1, 0.9, 1.0, 1.1):
        optimizer.step(lambda loss=loss: torch.tensor(loss))
    before = p.detach().clone()
    assert float(optimizer.step(lambda: torch.tensor(50.0))) == 50.0
    assert torch.equal(p, before)
    unit.loss = torch.tensor(math.nan)
    optimizer.step()
    assert torch.equal(p, before)
    unit.loss = torch.tensor(1.0)
    optimizer.step()
    assert not torch.equal(p, before)


def test_spike_clip_keeps_one_number_per_entry_in_fp32():
    p = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16))
    optimizer = stabilize(torch.optim.SGD([p], lr=0.1), SpikeClip())
    kept = optimizer.statistics[p]["spike_clip.exp_avg_sq"]
    assert kept.shape == p.shape and kept.dtype == torch.float32 and not kept.requires_grad


def test_a_parameter_without_history_is_not_frozen():
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = stabilize(torch.optim.SGD([p], lr=1.0), SpikeClip(clip_start=0))
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(p, -torch.ones(3))


@pytest.mark.parametrize(
    "unit", [AdaClip, AdaGN, SpikeClip, ValueClip, AGC, NormClip, ZClip, AdaGC, AutoClip, SkipStep]
)
def test_extreme_and_zero_gradients_stay_finite(unit):
    params = [torch.nn.Parameter(torch.ones(5, 4)), torch.nn.Parameter(torch.zeros(0, 3))]
    optimizer = stabilize(torch.optim.AdamW(params, lr=0.01), unit())
    for scale in (1e-30, 1e20, 0.0, 1.0, 1e-38, 1e37, 1.0):
        for p in params:
            p.grad = torch.full_like(p, scale)
        optimizer.step()
        assert all(torch.isfinite(p).all() for p in params)
        for state in optimizer.statistics.values():
            assert all(torch.isfinite(value).all() for value in state.values())


def test_wrong_options_are_refused():
    for make in (
        lambda: SpikeClip(threshold=-1),
        lambda: SpikeClip(beta2=1.0),
        lambda: ValueClip(0),
        lambda: AGC(clipping=0),
        lambda: NormClip(-1),
        lambda: ZClip(alpha=1),
        lambda: AdaGC(ratio=0),
        lambda: AdaGC(beta=1),
        lambda: AutoClip(percentile=101),
        lambda: AutoClip(window=0),
        lambda: SkipStep(watch="gradient"),
        lambda: MomentumReset(-1),
    ):
        with pytest.raises(ValueError, match=r"=.* is not "):
            make()


def test_units_say_what_they_are():
    assert repr(NormClip()) == "NormClip(max_norm=1.0)"
    assert repr(SkipStep()) == "SkipStep(window=128, sigma=6.0, watch='norm')"
    assert repr(GradientStabilizer()) == "GradientStabilizer(gamma1=0.6, gamma2=0.999, eps=0.0, robust=False)"
