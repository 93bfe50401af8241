"""Gradients at both ends of what fp32 holds: norms beyond it, and norms that no gain can bring back."""

import pytest
import torch
from torch import nn

from evenstep import AdaGN, AutoClip, GradientStabilizer, NormClip, SkipStep, StableSPAM, ZClip, stabilize
from evenstep.transforms import Gradients, lockstep

HUGE = 3e38  # an entry of fp32, whose norm in a tensor of 16 is not


def trained(make, sizes, fused=None):
    """Two parameters; the first has gradients of ``sizes``, the second of 1."""
    params = [nn.Parameter(torch.zeros(4, 4)) for _ in range(2)]
    optimizer = make(params, fused)
    for size in sizes:
        params[0].grad, params[1].grad = torch.full((4, 4), size), torch.ones(4, 4)
        optimizer.step()
    return params, optimizer


def behind(unit):
    return lambda params, fused: stabilize(torch.optim.SGD(params, lr=1.0), unit(), fused=fused)


MAKES = {
    "stable_spam": lambda params, fused: StableSPAM(params, fused=fused),
    "adagn": behind(AdaGN), "gradient_stabilizer": behind(GradientStabilizer), "norm_clip": behind(NormClip),
    "zclip": behind(ZClip), "autoclip": behind(AutoClip), "skip_step": behind(SkipStep),
}  # fmt: skip


def kept(optimizer, p):
    return {**optimizer.state.get(p, {}), **getattr(optimizer, "statistics", {}).get(p, {})}


@pytest.mark.parametrize("fused", [False, None], ids=["plain", "kernels"])
@pytest.mark.parametrize("name", MAKES)
def test_a_norm_beyond_fp32_is_a_gradient_that_is_not_finite(name, fused):
    params, optimizer = trained(MAKES[name], [1.0, HUGE], fused)
    others, like = trained(MAKES[name], [1.0, float("inf")], fused)
    assert optimizer.stats["skipped"].tolist() == like.stats["skipped"].tolist()
    assert name == "skip_step" or optimizer.stats["skipped"].tolist() == [1, 0]
    assert optimizer.stats["grad_norm"][0] == float("inf")
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q) and p.isfinite().all()
        assert all(torch.equal(x, kept(like, q)[key]) for key, x in kept(optimizer, p).items())


@pytest.mark.parametrize("name", ["stable_spam", "adagn"])
def test_kernels_tell_of_it_what_the_plain_code_tells(name):
    plain, fused = (trained(MAKES[name], [1.0, HUGE], fused)[1].stats for fused in (False, None))
    for key in plain:
        assert torch.allclose(plain[key], fused[key], rtol=1e-6, atol=0, equal_nan=True), key


def test_parts_whose_norms_fit_and_whose_sum_does_not_are_seen_together():
    def step(part):
        grads = yield from Gradients.measure([part], torch.float32)
        return (yield from grads.with_norms()).within_range()

    def combine(requests):
        for several in zip(*requests.values(), strict=True):
            values = torch.stack([one.values for one in several])
            for one in several:
                one.answer = values.amax(0) if one.op == "max" else values.sum(0)

    for size, fits in ((3e38, False), (2e38, True)):  # times the root of 2
        found = lockstep([step(torch.tensor([size])), step(torch.tensor([size]))], combine)
        assert [one.finite.item() for one in found] == [fits, fits] and found[0].peak.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), HUGE])
def test_a_global_norm_leaves_out_what_is_not_finite_and_clips_the_rest(bad):
    (_, second), _ = trained(MAKES["norm_clip"], [bad])
    assert torch.allclose(second, torch.full((4, 4), -0.25))  # its own norm was 4


@pytest.mark.parametrize("fused", [False, None], ids=["plain", "kernels"])
@pytest.mark.parametrize("size, expected", [(1e-36, 0.25), (1e-40, 0.0), (1e-44, 0.0), (0.0, 0.0)])
def test_no_gain_overflows(size, expected, fused):
    (first, second), optimizer = trained(MAKES["gradient_stabilizer"], [size], fused)
    assert torch.allclose(-first, torch.full((4, 4), expected), rtol=1e-5) and torch.allclose(second, first * 0 - 0.25)
    assert optimizer.stats["gain"].isfinite().all() and not optimizer.stats["skipped"].any()
    params, whole = trained(lambda ps, fused: StableSPAM(ps, eps=0.0, fused=fused), [1.0, size, 1.0], fused)
    assert all(p.isfinite().all() for p in params) and whole.stats["gain"].isfinite().all()
