"""Running means that a spike cannot poison: ``robust=True`` of StableSPAM, AdaClip and AdaGN."""

import pytest
import torch

from evenstep import AdaClip, AdaGN, GradientStabilizer, StableSPAM, stabilize

SPIKE = 1000.0
OPTIMIZERS = {
    "StableSPAM": lambda w, robust: StableSPAM([w], lr=1e-2, robust=robust),
    "StableSPAM, plain": lambda w, robust: StableSPAM([w], lr=1e-2, robust=robust, fused=False),
    "StableSPAM, slow": lambda w, robust: StableSPAM([w], lr=1e-2, gamma1=0.85, gamma2=0.99999, robust=robust),
    "transforms": lambda w, robust: stabilize(
        torch.optim.SGD([w], lr=1e-2), AdaClip(robust=robust), AdaGN(robust=robust)
    ),
    "GradientStabilizer": lambda w, robust: stabilize(torch.optim.SGD([w], lr=1e-2), GradientStabilizer(robust=robust)),
}


def norms(name, robust, sizes, shape=(20, 30)):
    """The norm of the gradient that reaches the update, for gradients of the given sizes."""
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.zeros(shape))
    optimizer = OPTIMIZERS[name](w, robust)
    result = []
    for size in sizes:
        w.grad = size * torch.randn(shape, generator=generator)
        optimizer.step()
        result.append(float(optimizer.stats["norm_after"]))
    return result


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_steps_after_a_spike_are_of_their_usual_size(name):
    sizes = [1.0] * 30 + [SPIKE] + [1.0] * 10
    usual = norms(name, True, [1.0] * 41)
    robust, paper = norms(name, True, sizes), norms(name, False, sizes)
    after = slice(31, 41)
    assert min(robust[after]) > 0.7 * min(usual[after])
    assert min(paper[after]) < 0.5 * min(robust[after])  # the spike's norm is in the mean square of the published rule
    assert robust[30] < 2.5 * usual[30]  # the spike itself is no larger than an ordinary gradient


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_spikes_nothing_changes(name):
    sizes = [1.0 + 0.3 * (-1) ** t for t in range(40)]
    assert norms(name, True, sizes) == norms(name, False, sizes)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("start", [0.0, 1e-12])
def test_a_gradient_that_begins_late_is_followed(name, start):
    """The mean of a gradient that was zero has no scale; that of a tiny one grows by a factor per step."""
    late = norms(name, True, [start] * 20 + [1.0] * 400)
    assert late[-1] > 0.2 * norms(name, True, [1.0] * 420)[-1]


@pytest.mark.parametrize("robust", [1, "yes", None])
def test_only_true_and_false_are_taken(robust):
    w = torch.nn.Parameter(torch.zeros(2))
    for make in (lambda: StableSPAM([w], robust=robust), lambda: AdaClip(robust=robust), lambda: AdaGN(robust=robust)):
        with pytest.raises(ValueError, match=r"robust=.* is not True or False"):
            make()


def test_a_state_of_before_the_option_loads():
    w = torch.nn.Parameter(torch.zeros(3))
    saved = StableSPAM([w]).state_dict()
    del saved["param_groups"][0]["robust"]
    optimizer = StableSPAM([w], robust=True)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["robust"] is True
    w.grad = torch.ones(3)
    optimizer.step()


def test_the_steady_preset_is_robust_unless_a_group_says_otherwise():
    w = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups = [{"params": w[:1]}, {"params": w[1:], "robust": False}]
    optimizer = StableSPAM(groups, preset="steady")
    assert [group["robust"] for group in optimizer.param_groups] == [True, False]
    optimizer = StableSPAM([{"params": w[:1], "preset": "steady"}, {"params": w[1:]}])
    assert [group["robust"] for group in optimizer.param_groups] == [True, False]
    with pytest.raises(ValueError, match="preset='calm' is not 'steady' or None"):
        StableSPAM(w, preset="calm")
