"""Parity of the Triton kernels with the plain code: SCALE, whole optimizers; run by test_kernels_triton.py."""

import pytest
import torch
from triton_support import (
    BF16,
    CLOSE,
    DEVICE,
    FLOAT,
    KERNELS,
    columns,
    copies,
    fill,
    randn,
    rows_,
    run,
    same,
    sample,
    seeded,  # noqa: F401 for pytest
    unaligned,
    vector,
)

from evenstep import SCALE, SPAM, AdaClip, AdaGN, StableSPAM, stabilize
from evenstep.kernels import cuda_launch
from evenstep.kernels.interface import SCALE_ROWS, table
from evenstep.optim import base_optimizer, fused
from evenstep.optim.functional import Gradients, Weights, opened, row_norms
from evenstep.optim.state import moment

ADAM_STEP = cuda_launch.adam_step_


# ---- SCALE, and the rest ----


def rates(k):
    rows = {"finite": 1.0, "gain": vector(k, 0.5, 2), "keep": 0.9, "add": 0.1, "rate": 0.01, "shrink": 0.99}
    return rows


@pytest.mark.parametrize("state", [None, "fp32", "bf16", "int8"])
@pytest.mark.parametrize("norm", ["rms", "l2"])
def test_rows_are_divided_by_their_norms(norm, state):
    if state == "int8":
        pytest.importorskip("torchao")
    grads = [
        randn(16, 272),
        unaligned(9, 700),
        randn(0, 4),
        randn(70, 3, dtype=BF16),
        randn(5, 2, 3, 2),
        randn(20, 16, scale=1e-30),
    ]
    grads.append(torch.full((3, 4), torch.nan, device=DEVICE))
    params = [randn(*g.shape, dtype=g.dtype) for g in grads]
    k = len(grads)
    finite = torch.tensor([1.0] * (k - 1) + [0.0], device=DEVICE)
    counts = [max(g[0].numel() if len(g) else 1, 1) for g in grads]
    root = torch.tensor(counts, device=DEVICE).sqrt() if norm == "rms" else torch.ones(k, device=DEVICE)
    rows = rates(k) | {"finite": finite, "root": root}
    averages = [fill(moment(p, state), randn(*p.shape)) for p in params] if state else []
    mine = copies(params)
    own = copies(averages)
    before = [g.clone() for g in grads]
    direction_norm = rows_(mine, grads, own, [], table(finite, *(rows[name] for name in SCALE_ROWS)))
    for i in range(k - 1):
        g = grads[i].float() * rows["gain"][i]
        if state:
            average = opened(averages[i], FLOAT) * 0.9 + g * 0.1
            averages[i].copy_(average)
            if not hasattr(own[i], "codes"):
                same(own[i], average.to(own[i].dtype), **CLOSE[own[i].dtype] | {"atol": 3e-7})
            g = opened(own[i], FLOAT)  # of what the kernel stored, whose last bit may be another
            same(g, opened(averages[i], FLOAT), rtol=0.02, atol=0.02)
        direction = g / row_norms(g, counts[i], norm) if g.numel() else g
        same(direction_norm[i], direction.norm(), rtol=1e-5, atol=0 if i != 5 else 1e-20)
        same(mine[i], params[i].float() * 0.99 - 0.01 * direction, **CLOSE[params[i].dtype] | {"atol": 3e-7})
    assert torch.equal(mine[-1], params[-1]) and direction_norm[-1] == 0
    assert all(torch.equal(g, old) for g, old in zip(grads[:-1], before[:-1], strict=True))


def test_columns_are_divided_by_what_is_given():
    grads = [randn(40, 33), randn(300, 5, dtype=BF16), unaligned(7, 2, 3)]
    params = [randn(*g.shape, dtype=g.dtype) for g in grads]
    divisors = [vector(g[0].numel(), 0.5, 2).view(1, *g.shape[1:]) for g in grads]
    rows = rates(3) | {"root": 1.0}
    mine = copies(params)
    numbers = table(torch.zeros(3, device=DEVICE), *(rows[name] for name in SCALE_ROWS))
    direction_norm = rows_(mine, grads, [], divisors, numbers)
    for i, g in enumerate(grads):
        direction = g.float() * rows["gain"][i] / divisors[i]
        same(direction_norm[i], direction.norm(), rtol=1e-6, atol=0)
        same(mine[i], params[i].float() * 0.99 - 0.01 * direction, **CLOSE[params[i].dtype] | {"atol": 3e-7})


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_rows_into_bf16(rounding):
    g, p = randn(20, 300), randn(20, 300, dtype=BF16)
    lost = [randn(20, 300, scale=1e-3, dtype=BF16)] if rounding == "kahan" else []
    seeds = [torch.tensor(5, dtype=torch.int32, device=DEVICE)] if rounding == "stochastic" else []
    rows = rates(1) | {"root": 300**0.5, "gain": 1.0}
    numbers = table(torch.zeros(1, device=DEVICE), *(rows[name] for name in SCALE_ROWS))
    [mine], own = copies([p]), copies(lost)
    rows_([mine], [g], [], [], numbers, lost=own, seeds=seeds)
    weights = Weights([p], torch.tensor([True], device=DEVICE), [*lost] or [None], [*seeds] or [None])
    weights.write(0, p, p.float() * 0.99 - g / row_norms(g, 300, "rms") * 0.01, lost, 0)
    assert (mine != p).float().mean() <= 0.01
    if lost:
        same(mine.float() + own[0].float(), p.float() + lost[0].float(), rtol=1e-6, atol=2e-6)


def test_sums_over_columns():
    grads = [
        randn(70, 33),
        randn(34, 130, dtype=BF16),
        unaligned(7, 2, 3),
        torch.zeros(0, 4, device=DEVICE),
        randn(3, 4, scale=1e30),
    ]
    measured, sums, norms = columns(grads)
    same(measured.norm.double(), torch.stack([g.double().norm() for g in grads]), rtol=1e-6, atol=0)
    assert torch.equal(measured.peak, run(Gradients.measure(grads, FLOAT)).peak)
    seen = []
    for found, g in zip(sums, grads, strict=True):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, g.double().square().sum(0, keepdim=True), rtol=1e-12, atol=0)
        if len(g):
            rms = g.double().square().mean(0).sqrt().clamp(min=1e-8).flatten()
            torch.testing.assert_close(norms[len(seen)].double(), rms, rtol=1e-6, atol=0)
        seen.append(g)
    _, [bad], _ = columns([torch.tensor([[1.0, torch.nan], [2.0, 3.0]], device=DEVICE)])
    assert torch.isfinite(bad).tolist() == [[True, False]]


def test_transformed_gradients():
    grads = sample()
    plain = run(Gradients.measure(grads, FLOAT))
    plain = plain.clipped(plain.peak * 0.5).amplified(vector(len(grads), 0.5, 2))
    out = [torch.full_like(g, 7, dtype=FLOAT if i % 2 else g.dtype) for i, g in enumerate(grads)]
    KERNELS.transform(out, grads, torch.stack([plain.gain, plain.limit, plain.rescale * plain.gain]))
    for i, x in enumerate(out):
        same(x, plain.read(i), **CLOSE[x.dtype] | {"atol": 0})


# ---- whole optimizers ----

MAKERS = {
    "stable_spam": lambda ps, **o: StableSPAM(ps, weight_decay=0.1, gamma3=0.5, reset_interval=3, **o),
    "spam": lambda ps, **o: SPAM(ps, weight_decay=0.1, threshold=2, clip_start=1, reset_interval=3, **o),
    "spam_official": lambda ps, **o: SPAM(ps, weight_decay=0.1, threshold=2, clip_start=1, variant="official", **o),
    "spam_sparse": lambda ps, **o: SPAM(ps, density=0.5, **o),
    "scale": lambda ps, **o: SCALE(
        [{"params": [p], "kind": kind} for p, kind in zip(ps, ("embedding", "hidden", "last", "vector"), strict=True)],
        **o,
    ),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_optimizers_take_the_same_way_with_kernels(make, monkeypatch):
    monkeypatch.setattr(fused, "kernels_for", lambda device_type: KERNELS)
    served = []
    monkeypatch.setattr(cuda_launch, "adam_step_", lambda *a: served.append(a) or ADAM_STEP(*a))
    start = [randn(40, 9), randn(5, 300), randn(30, 7), randn(33)]
    ways = []
    for option in (None, False):
        params = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = make(params, fused=option)
        stream = torch.Generator().manual_seed(1)
        for step in range(4):
            for p in params:
                p.grad = (torch.randn(p.shape, generator=stream) * (30 if step == 2 else 1)).to(DEVICE)
            if step == 1:
                params[1].grad[0, 0] = torch.nan
            version = params[0]._version
            optimizer.step()
            assert params[0]._version > version
        ways.append((params, optimizer.stats))
        assert bool(served) == (option is None)
        served.clear()
    (mine, stats), (plain, expected) = ways
    for p, q in zip(mine, plain, strict=True):
        same(p, q, rtol=1e-5, atol=1e-6)
    for name, values in expected.items():
        torch.testing.assert_close(stats[name], values.to(stats[name]), rtol=1e-5, atol=1e-7, equal_nan=True, msg=name)


@pytest.mark.parametrize("option", [None, False])
def test_the_step_of_a_base_is_undone_where_a_gradient_is_not_finite(option, monkeypatch):
    monkeypatch.setattr(fused, "kernels_for", lambda device_type: KERNELS)
    monkeypatch.setattr(base_optimizer, "on_host", lambda x: False)  # as on a GPU, where no flag may be read
    saved = []
    save = cuda_launch.save_unless
    monkeypatch.setattr(cuda_launch, "save_unless", lambda *given: saved.append(given) or save(*given))
    params = [torch.nn.Parameter(randn(*shape)) for shape in ((40, 9), (5, 300), (33,))]
    base = torch.optim.AdamW(params, lr=0.1, weight_decay=0.1)
    optimizer = stabilize(base, AdaClip(), AdaGN(), reset_interval=3, fused=option)
    for step in range(4):
        for p in params:
            p.grad = randn(*p.shape)
        if step in (1, 2):  # the second of them is the step of a reset
            params[1].grad[0, 0] = torch.nan
        before = [[p.clone(), *(x.clone() for x in base.state.get(p, {}).values())] for p in params]
        optimizer.step()
        for i, (p, old) in enumerate(zip(params, before, strict=True)):
            if step:
                equal = [torch.equal(x, y) for x, y in zip((p, *base.state[p].values()), old, strict=True)]
                assert all(equal) if step < 3 and i == 1 else not any(equal[1:3]), (step, i, equal)
    assert bool(saved) == (option is None)
