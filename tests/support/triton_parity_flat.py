"""Parity of the Triton kernels with the plain code: measuring and Adam; run by test_kernels_triton.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_support import (
    BF16,
    CLOSE,
    DEVICE,
    FLOAT,
    INTERPRETED,
    KERNELS,
    NUMBERS,
    adam_,
    copies,
    fill,
    randn,
    run,
    same,
    sample,
    seeded,  # noqa: F401 for pytest
    unaligned,
    vector,
)

from evenstep import SCALE, SPAM
from evenstep.kernels import cuda_launch
from evenstep.kernels.interface import ADAM_ROWS, table
from evenstep.optim.functional import AdamPlan, EntryClip, Gradients, Weights, adam_step, close
from evenstep.optim.state import moment


def test_measure_finds_largest_entries_and_norms():
    grads = sample()
    found = KERNELS.measure(grads)
    plain = run(Gradients.measure(grads, FLOAT))
    assert torch.equal(found.peak, plain.peak)
    finite = plain.finite
    assert torch.equal(finite, torch.isfinite(found.norm))
    norms = torch.stack([g.double().norm() for g in grads])
    same(found.norm[finite].double(), norms[finite], rtol=1e-6, atol=0)
    again = KERNELS.measure(grads)
    assert torch.equal(again.norm[finite], found.norm[finite])


@pytest.mark.parametrize("share", [2.0, 0.5, 1e-3])
def test_clip_norms_are_those_after_clipping(share):
    grads = sample()
    plain = run(Gradients.measure(grads, FLOAT)).clipped(
        share * torch.stack([g.float().abs().sum() for g in grads]) / 600
    )
    norm, count = KERNELS.clip_norms(grads, KERNELS.measure(grads), plain.limit, plain.rescale)
    expected, counted = plain._clipped_locally()
    finite = plain.finite
    same(norm[finite], expected[finite], rtol=1e-6, atol=0)
    assert torch.equal(count, counted)
    assert counted.sum() > 0


def test_clip_norms_read_only_chunks_above_the_limit():
    g = randn(4 * cuda_launch.CHUNK).clamp_(-1, 1)
    g[5] = 2
    measured = KERNELS.measure([g])
    before = measured.norm.clone()
    g[2 * cuda_launch.CHUNK :] = 100.0  # unseen: no chunk there was above the limit when it was measured
    norm, count = KERNELS.clip_norms(
        [g], measured, torch.tensor([1.5], device=DEVICE), torch.tensor([0.75], device=DEVICE)
    )
    same(norm, (before.square() - 4 + 1.5**2).sqrt(), rtol=1e-5, atol=0)
    assert count.item() == 1


# ---- Adam ----


def plan(k, finite, shrink):
    return AdamPlan(
        keep1=torch.where(finite, vector(k, 0, 1), 1.0),
        keep2=torch.where(finite, vector(k, 0.5, 1), 1.0),
        add1=torch.tensor(0.1, device=DEVICE),
        add2=0.003,
        step_size=torch.where(finite, vector(k, 1e-3, 1e-2), 0.0),
        root_bias2=vector(k, 0.1, 1),
        shrink=torch.where(finite, vector(k, 0.9, 1), 1.0) if shrink else None,
        eps=1e-8,
    )


def adam_numbers(grads, how, k, capped):
    reduced = grads.rescale * grads.gain if grads.limit is not None else grads.gain
    rows = {
        "finite": grads.finite.float(),
        "gain": grads.gain * grads.sign,
        "limit": torch.inf if grads.limit is None else grads.limit,
        "reduced": reduced * grads.sign,
        "keep1": how.keep1,
        "keep2": how.keep2,
        "add1": how.add1,
        "add2": how.add2,
        "step_size": how.step_size,
        "inverse_root2": 1 / how.root_bias2,
        "eps": how.eps,
        "shrink": 1.0 if how.shrink is None else how.shrink,
        "shrink_after": 1.0,
        "after": 1.0,
        "cap_factor": capped.factor if capped else 0.0,
        "cap_spread": capped.spread if capped else 0.0,
    }
    return table(grads.peak, *(rows[name] for name in ADAM_ROWS))


def adam_parity(params, grads, *, state="fp32", rounding="nearest", capped=None, sign=1.0, clip=True, shrink=True):
    k = len(params)
    measured = run(Gradients.measure(grads, FLOAT, sign))
    if clip:
        measured = measured.clipped(measured.peak * 0.6)
    measured = measured.amplified(vector(k, 0.3, 2))
    how = plan(k, measured.finite, shrink)
    exp_avg = [fill(moment(p, state), randn(*p.shape, scale=0.1)) for p in params]
    exp_avg_sq = [fill(moment(p, state, signed=False), randn(*p.shape, scale=0.1).square()) for p in params]
    lost = [randn(*p.shape, scale=1e-4, dtype=p.dtype) for p in params] if rounding == "kahan" else []
    seeds = (
        [torch.tensor(i * 77 - 3, dtype=torch.int32, device=DEVICE) for i in range(k)]
        if rounding == "stochastic"
        else []
    )
    old = [params, exp_avg, exp_avg_sq, lost]
    mine = [copies(x) for x in old]
    numbers = adam_numbers(measured, how, k, capped)
    found = adam_(mine[0], grads, mine[1], mine[2], numbers, lost=mine[3], seeds=seeds, capped=capped is not None)
    update_norm, clipped_norm, clipped = found
    weights = Weights(params, measured.finite, [*lost] or [None] * k, [*seeds] or [None] * k)
    norms = adam_step(weights, measured, exp_avg, exp_avg_sq, how, capped)
    same(update_norm, norms)
    if capped:
        good = measured.finite
        same(clipped_norm[good], capped.norms()[good])
        assert torch.equal(clipped[good], capped.counts()[good].float())
    for i in range(k):
        if state == "int8" and hasattr(exp_avg[i], "codes"):
            for new, plain in ((mine[1][i], exp_avg[i]), (mine[2][i], exp_avg_sq[i])):
                # a number at the middle between two codes may go either way after another rounding
                difference = (new.codes.int() - plain.codes.int()).abs()
                assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
                same(new.scale, plain.scale)
        else:
            same(mine[1][i], exp_avg[i], **CLOSE[exp_avg[i].dtype] | {"atol": 3e-7})
            same(mine[2][i], exp_avg_sq[i], **CLOSE[exp_avg_sq[i].dtype])
        exact = lambda p, part: p.float() + part.float()  # noqa: E731
        if lost:
            same(exact(mine[0][i], mine[3][i]), exact(params[i], lost[i]), rtol=1e-6, atol=2e-6)
        how_close = CLOSE[params[i].dtype] | {"atol": 3e-7}
        same(mine[0][i], params[i], **how_close)
        if params[i].dtype == BF16 and params[i].numel():  # the same neighbours nearly always
            assert (mine[0][i] != params[i]).float().mean() <= 0.01 + 1.01 / params[i].numel()
    return params, mine[0], measured


def parameters(grads, dtype=None):
    return [
        unaligned(*g.shape, dtype=dtype or g.dtype) if i % 3 else randn(*g.shape, dtype=dtype or FLOAT)
        for i, g in enumerate(grads)
    ]


@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_adam_on_gradients_of_every_kind(state):
    grads = sample()
    params = parameters(grads)
    before = [p.clone() for p in params]
    _, mine, measured = adam_parity(params, grads, state=state, sign=-1.0)
    for p, kept, finite in zip(mine, before, measured.finite.tolist(), strict=True):
        assert finite or torch.equal(p, kept)
    assert measured.finite.sum() == len(grads) - 2


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_adam_into_bf16(rounding):
    adam_parity(
        [randn(1300, dtype=BF16), unaligned(33, 7, dtype=BF16)],
        [randn(1300), randn(33, 7, dtype=BF16)],
        rounding=rounding,
    )


def test_adam_on_8_bit_states():
    pytest.importorskip("torchao")
    grads = [randn(16, 272), randn(40), randn(4096, dtype=BF16), torch.zeros(4096, device=DEVICE)]
    grads[3][7] = torch.inf
    adam_parity(
        [randn(16, 272), randn(40), randn(4096, dtype=BF16), randn(4096)], grads, state="int8", clip=False, shrink=False
    )


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_torchaos(signed):
    """All values of the map, the middles between them, and the neighbours of both."""
    pytest.importorskip("torchao")
    stored = [moment(torch.zeros(4096, device=DEVICE), "int8", signed=sign) for sign in (True, False)]
    values = stored[not signed].qmap.clone()
    values = torch.cat([values, (values[1:] + values[:-1]) / 2])
    top = torch.tensor(2.0, device=DEVICE)
    values = torch.cat([values, values.nextafter(top), values.nextafter(-top), randn(256) * 1e-7]).clamp(-1, 1)
    x = torch.ones(16, 256, device=DEVICE)  # the largest entry of each block is 1, so that the scales are
    x[:, 1:] = torch.cat([values, values.new_zeros(16 * 255 - values.numel())]).view(16, 255)
    x = x.flatten() if signed else x.flatten().abs()
    rows = dict.fromkeys(ADAM_ROWS, 0.0) | {"finite": 1.0, "gain": 1.0, "limit": torch.inf, "keep1": 1.0, "keep2": 1.0}
    rows |= {"after": 1.0, "eps": 1.0, "shrink": 1.0, "shrink_after": 1.0}
    m, v = [torch.zeros(4096, device=DEVICE) for _ in range(2)]
    p, g = torch.zeros(4096, device=DEVICE), x
    if signed:
        rows |= {"add1": 1.0}
        m = stored[0]
    else:
        rows |= {"add2": 1.0}
        v, g = stored[1], x.sqrt()
        x = g * g
    adam_([p], [g], [m], [v], table(torch.zeros(1, device=DEVICE), *rows.values()))
    expected = moment(p, "int8", signed=signed)
    close(expected, x, torch.ones((), dtype=torch.bool, device=DEVICE))  # torchao's, but no 0 for what is not 0
    assert torch.equal(stored[not signed].codes, expected.codes)
    assert expected.codes.unique().numel() == 256


@pytest.mark.parametrize("zero_history", [False, True])
@pytest.mark.parametrize("active", [True, False])
def test_adam_with_spams_clipping(active, zero_history):
    on = torch.ones((), device=DEVICE)
    clip = EntryClip(2.0, on * active, forget=0 * on, zero_history=zero_history)
    grads = [randn(1300), randn(33, 7, dtype=BF16), randn(700, scale=1e25)]
    params = parameters(grads)
    k = len(grads)
    measured = run(Gradients.measure(grads, FLOAT))
    how = plan(k, measured.finite, True)
    exp_avg = [randn(*g.shape) for g in grads]
    exp_avg_sq = [randn(*g.shape).square() * (randn(*g.shape) > 0) for g in grads]
    mine = [copies(x) for x in (params, exp_avg, exp_avg_sq)]
    numbers = adam_numbers(measured, how, k, clip)
    found = adam_(mine[0], grads, mine[1], mine[2], numbers, capped=True, zero_history=zero_history)
    update_norm, clipped_norm, clipped = found
    weights = Weights(params, measured.finite, [None] * k, [None] * k)
    same(update_norm, adam_step(weights, measured, exp_avg, exp_avg_sq, how, clip))
    same(clipped_norm[:2], clip.norms()[:2])
    assert torch.equal(clipped, clip.counts().float())
    for new, plain in zip(mine, (params, exp_avg, exp_avg_sq), strict=True):
        for x, y in zip(new, plain, strict=True):
            same(x, y, **CLOSE[y.dtype] | {"atol": 3e-7})


def test_numbers_of_the_end_of_a_step():
    """What follows the plain update: decay after it, and moments that are cleared."""
    p, g, m, v = randn(300), randn(300), randn(300), randn(300).square()
    rows = dict.fromkeys(ADAM_ROWS, 1.0) | {"limit": torch.inf, "shrink_after": 0.5, "after": 0.0, "eps": 1e-8}
    numbers = table(torch.zeros(1, device=DEVICE), *rows.values())
    expected = (p - (m + g) / ((v + g * g).sqrt() + 1e-8)) * 0.5
    adam_([p], [g], [m], [v], numbers)
    same(p, expected, rtol=1e-5, atol=1e-6)
    assert not m.any() and not v.any()


sizes = st.one_of(st.integers(0, 40), st.integers(200, 1100))
floats = st.sampled_from([FLOAT, BF16])


@settings(max_examples=8 if INTERPRETED else 100, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(sizes, floats, floats, st.sampled_from([1e-30, 1.0, 1e15])), min_size=1, max_size=3), st.data()
)
def test_any_mix_of_tensors(shapes, data):
    NUMBERS.manual_seed(data.draw(st.integers(0, 9)))
    grads = [randn(n, dtype=g, scale=scale) for n, _, g, scale in shapes]
    params = [(unaligned if data.draw(st.booleans()) else randn)(n, dtype=p) for n, p, _, _ in shapes]
    adam_parity(params, grads, state=data.draw(st.sampled_from(["fp32", "bf16"])), clip=data.draw(st.booleans()))


@pytest.mark.parametrize("state", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", ["SPAM", "SCALE"])
def test_squares_beyond_the_range_are_skipped_and_no_moment_becomes_infinite(name, state, monkeypatch):
    results = []
    for kernels in ("no kernels", KERNELS):
        monkeypatch.setattr("evenstep.optim.fused.kernels_for", lambda device, kernels=kernels: kernels)
        p = torch.nn.Parameter(torch.zeros(64, 64, device=DEVICE))
        group = {"params": [p], "kind": "vector"}
        how = {"betas": (0.0, 0.0), "state": state}
        optimizer = SPAM([group], clip_start=0, **how) if name == "SPAM" else SCALE([group], **how)
        skipped = []
        for size in (1.0, 1e30, 1.8446742e19, torch.finfo(torch.float32).max):
            p.grad = torch.full_like(p, size)
            optimizer.step()
            skipped += optimizer.stats["skipped"].tolist()
        results.append((p.detach(), skipped, optimizer.state[p]["exp_avg_sq"]))
    (p, skipped, plain), (q, others, found) = results
    assert skipped == others == [0, 1, 0, 1] and torch.allclose(p, q, rtol=1e-5) and q.isfinite().all()
    found, plain = (x.scale if hasattr(x, "scale") else x.float() for x in (found, plain))
    assert found.isfinite().all() and torch.allclose(found, plain, rtol=1e-2)
