"""What the CPU kernels must leave to the plain code: where raw pointers would lead astray, whatever the user did."""

import pytest
import torch
from torch import nn

from evenstep import SCALE, SPAM, AdaGN, StableSPAM, stabilize


def stepped(make, shapes, steps=4, between=lambda optimizer, params, step: None):
    """Two sets of parameters, trained with kernels where they serve and without."""
    results = []
    for fused in (None, False):
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        optimizer = make(params, fused)
        for step in range(steps):
            between(optimizer, params, step)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        results.append(params)
    return results


def assert_same(results, tolerance=1e-6):
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(64, 100), (48, 128), (16, 640), (8, 256), (7, 3)])
def test_rows_that_share_blocks_of_eight_bit_momentum(shape):
    pytest.importorskip("torchao")
    assert_same(
        stepped(
            lambda params, fused: SCALE([{"kind": "last", "params": params}], state="int8", lr=1e-2, fused=fused),
            [shape],
        ),
        1e-4,  # a number on the border of two codes may fall either way
    )


@pytest.mark.parametrize("by_hand", [False, True])
def test_eight_bit_moments_of_a_mask_that_keeps_every_entry(by_hand):
    pytest.importorskip("torchao")

    def everything(optimizer, params, step):
        if by_hand and step == 0:
            optimizer.set_mask(params[0], torch.ones(64, 64, dtype=torch.bool))

    density = 0.5 if by_hand else 0.9999
    assert_same(
        stepped(
            lambda params, fused: SPAM(params, density=density, state="int8", fused=fused),
            [(64, 64)],
            between=everything,
        ),
        1e-4,
    )


def test_moments_that_a_reset_makes_anew_are_looked_at_again():
    pytest.importorskip("torchao")

    def few(optimizer, params, step):
        if step == 0:
            mask = torch.zeros(128 * 64, dtype=torch.bool)
            mask[:192] = True
            optimizer.set_mask(params[0], mask.view(128, 64))

    make = lambda params, fused: SPAM(params, density=0.5, state="int8", reset_interval=3, fused=fused)  # noqa: E731
    assert_same(stepped(make, [(128, 64)], between=few), 1e-4)


def test_a_parameter_of_another_size_than_its_state_is_refused():
    p = nn.Parameter(torch.randn(10))
    optimizer = StableSPAM([p])
    p.grad = torch.randn(10)
    optimizer.step()
    p.grad = None
    p.data = torch.randn(100_000)
    p.grad = torch.randn(100_000)
    with pytest.raises(ValueError, match="100000 entries, a moment 10"):
        optimizer.step()


@pytest.mark.parametrize("what", ["moved", "reversed", "dropped"])
def test_groups_that_are_changed_by_hand_keep_their_own_rates(what):
    def change(optimizer, params, step):
        groups = optimizer.param_groups
        if step == 1 and what == "moved":
            groups[1]["params"].append(groups[0]["params"].pop())
        elif step == 1 and what == "reversed":
            groups.reverse()
        elif step == 1:
            del groups[0]

    def make(params, fused):
        return StableSPAM([{"params": params[:1], "lr": 1.0}, {"params": params[1:], "lr": 1e-3}], fused=fused)

    assert_same(stepped(make, [(5, 4), (6,)], between=change), 2e-6)


def test_a_state_elsewhere_is_an_error_and_no_crash():
    p = nn.Parameter(torch.randn(8, 8))
    optimizer = StableSPAM([p])
    optimizer.state[p]["exp_avg"] = torch.empty(8, 8, device="meta")
    p.grad = torch.randn(8, 8)
    with pytest.raises(RuntimeError, match="device"):
        optimizer.step()


def test_a_rate_in_a_tensor_of_one_entry():
    make = lambda params, fused: StableSPAM(params, lr=torch.tensor([1e-2]), fused=fused)  # noqa: E731
    assert_same(stepped(make, [(5, 4), (6,)]), 2e-6)


@pytest.mark.parametrize("fused", [None, False])
def test_a_norm_beyond_fp32_moves_nothing_to_the_end_of_the_numbers(fused):
    for make in (
        lambda p: StableSPAM([p], fused=fused),
        lambda p: stabilize(torch.optim.SGD([p], lr=1e-3), AdaGN(), fused=fused),
    ):
        p = nn.Parameter(torch.zeros(100))
        optimizer = make(p)
        for size in (1.0, 3e38):
            p.grad = torch.full_like(p, size)
            optimizer.step()
        assert p.abs().max() < 1
