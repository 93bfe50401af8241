"""Gradients at both ends of what fp32 holds: norms beyond it, and norms that no gain can bring back."""

import itertools

import pytest
import torch
from torch import nn

from evenstep import (
    AGC,
    SCALE,
    SPAM,
    AdaClip,
    AdaGC,
    AdaGN,
    AutoClip,
    GradientStabilizer,
    NormClip,
    SkipStep,
    SpikeClip,
    StableSPAM,
    ValueClip,
    ZClip,
    stabilize,
)
from evenstep.optim.distributed import run_batched_collectives
from evenstep.optim.functional import Gradients

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
    "zclip": behind(ZClip), "adagc": behind(AdaGC), "autoclip": behind(AutoClip), "skip_step": behind(SkipStep),
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
        found = run_batched_collectives([step(torch.tensor([size])), step(torch.tensor([size]))], combine)
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


# ---- entries whose squares are beyond the range ----

ROOT = 2.0**64  # its square is the first power of two that fp32 cannot hold
SQUARES = {
    "spam": lambda p, **o: SPAM([p], clip_start=0, **o),
    "spam_official": lambda p, **o: SPAM([p], variant="official", **o),
    "spam_sparse": lambda p, **o: SPAM([p], clip_start=0, density=0.5, reset_interval=3, **o),
    "scale_vector": lambda p, **o: SCALE([{"kind": "vector", "params": [p]}], **o),
}


def kept_bits(optimizer, p):
    tensors = [x for x in optimizer.state[p].values() if torch.is_tensor(x)]
    return [part.clone() for x in tensors for part in ((x.codes, x.scale) if hasattr(x, "codes") else (x,))]


@pytest.mark.parametrize("state", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("fused", [False, None], ids=["plain", "kernels"])
@pytest.mark.parametrize("name", SQUARES)
def test_squares_beyond_fp32_are_a_gradient_that_is_not_finite(name, fused, state):
    p = nn.Parameter(torch.zeros(64, 64))
    optimizer = SQUARES[name](p, fused=fused, state=state)
    for step, size in enumerate([1.0, ROOT, 1.0, 1e30, torch.finfo(torch.float32).max, 1.0]):
        p.grad = torch.ones(64, 64)
        p.grad[3, 4] = size
        before, bits = p.detach().clone(), kept_bits(optimizer, p)
        optimizer.step()
        assert optimizer.stats["skipped"].tolist() == [float(size >= ROOT)] and optimizer.stats["grad_max"] == size
        assert optimizer.stats["norm_after"].isfinite()
        if size >= ROOT:  # on a reset (step 3 of a sparse one), too
            assert torch.equal(p, before)
            assert all(torch.equal(x, y) for x, y in zip(bits, kept_bits(optimizer, p), strict=True)), step
        else:
            assert not torch.equal(p, before) and (p - before).abs().max() < 1.5e-3


@pytest.mark.parametrize("fused", [False, None], ids=["plain", "kernels"])
@pytest.mark.parametrize("name", SQUARES)
def test_squares_that_just_fit_are_taken(name, fused):
    p = nn.Parameter(torch.zeros(64, 64))
    optimizer = SQUARES[name](p, fused=fused, state="bf16")
    for _ in range(4):
        p.grad = torch.full((64, 64), ROOT * (1 - 2**-24))
        optimizer.step()
        assert optimizer.stats["skipped"].tolist() == [0] and p.isfinite().all()
    assert all(x.isfinite().all() for x in kept_bits(optimizer, p))


@pytest.mark.parametrize("state", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", SQUARES)
def test_fp64_parameters_have_the_range_of_what_is_stored(name, state):
    for size in (1e30, 1e140, 1e160):
        p = nn.Parameter(torch.zeros(128, 64, dtype=torch.float64))  # half of it is enough for 8 bits
        optimizer = SQUARES[name](p, state=state)
        for _ in range(2):
            p.grad = torch.full_like(p, size)
            optimizer.step()
        assert optimizer.stats["skipped"].tolist() == [float(size > (1e150 if state == "fp32" else 1e19))]
        assert p.isfinite().all() and p.abs().max() < 2.5e-3


UNITS = {
    "adaclip": AdaClip, "adagn": AdaGN, "gradient_stabilizer": GradientStabilizer, "norm_clip": NormClip,
    "spike_clip": lambda: SpikeClip(clip_start=0), "spike_zero": lambda: SpikeClip(clip_start=0, spikes="zero"),
    "zclip": lambda: ZClip(warmup_steps=2), "adagc": lambda: AdaGC(warmup_steps=2),
    "autoclip": AutoClip, "skip_step": lambda: SkipStep(window=4),
    "value_clip": ValueClip, "agc": AGC,
}  # fmt: skip
LARGEST = torch.finfo(torch.float32).max
SERIES = [[1.0, LARGEST, 1.0, 1.0, 1.0], [LARGEST] * 5, [1.8e19] * 5, [1.0, 1e30, 1.0, 1e25, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", UNITS)
def test_no_statistic_of_a_transform_overflows(name, dtype):
    largest = torch.finfo(dtype).max
    for fused, series in itertools.product((None, False), SERIES):
        params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((1,), (4, 4))]
        optimizer = stabilize(torch.optim.SGD(params, lr=0.0), UNITS[name](), fused=fused)
        for size in series:
            size = min(size**8 if dtype == torch.float64 and size < LARGEST else size, largest)
            size = largest if size == LARGEST else size
            for p in params:
                p.grad = torch.full_like(p, size)
            optimizer.step()
        for p in params:
            assert all(x.isfinite().all() for x in optimizer.statistics[p].values()), (fused, series)
        assert optimizer.stats["gain"].isfinite().all()


@pytest.mark.parametrize("state", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_no_finite_gradient_breaks_weights_or_state(dtype, state):
    """Of matrices that are normalised, and of all in one step; nothing moves further than a step may."""
    makers = {
        "stable_spam": lambda ps, **o: StableSPAM(ps, **o),
        "stable_spam_official": lambda ps, **o: StableSPAM(ps, variant="official", reset_interval=3, **o),
        "spam": lambda ps, **o: SPAM(ps, clip_start=0, betas=(0.0, 0.0), **o),
        "hidden": lambda ps, **o: SCALE([{"kind": "hidden", "params": ps}], **o),
        "last": lambda ps, **o: SCALE([{"kind": "last", "params": ps}], **o),
        "last_without_momentum": lambda ps, **o: SCALE([{"kind": "last", "params": ps}], momentum=0.0, norm="l2", **o),
        "embedding": lambda ps, **o: SCALE([{"kind": "embedding", "params": ps}], **o),
    }
    for make, fused, series in itertools.product(makers.values(), (None, False), SERIES):
        params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((64, 64), (1, 1))]
        optimizer = make(params, lr=0.01, state=state, fused=fused)
        for size in series:
            size = torch.finfo(dtype).max if size == LARGEST else size
            before = [p.detach().clone() for p in params]
            for p in params:
                p.grad = torch.full_like(p, size)
            optimizer.step()
            assert all((p - q).abs().max() < 0.5 for p, q in zip(params, before, strict=True)), size
        for p in params:
            assert p.isfinite().all() and all(x.isfinite().all() for x in kept_bits(optimizer, p))
