"""The CPU kernels are the plain code, only faster: same parameters, state and statistics, whatever comes."""

import functools
import importlib.util
import math
import os
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evenstep import SCALE, SPAM, AdaClip, AdaGN, GradientStabilizer, StableSPAM, stabilize
from evenstep.kernels import Unavailable, kernels_for
from evenstep.kernels import cpu as cpu_library

pytestmark = pytest.mark.skipif(isinstance(kernels_for("cpu"), str), reason=str(kernels_for("cpu")))
KERNELS = kernels_for("cpu")

SHAPES = [(1,), (3,), (33,), (0,), (1025,), (2, 3), (7, 129), (5, 4, 3), (64, 64), (130, 130), (300, 60)]


def gradient(shape, dtype, scale, generator):
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def scale_roles(params):
    matrices = [p for p in params if p.dim() > 1]
    groups = [
        {"kind": "vector", "params": [p for p in params if p.dim() < 2]},
        {"kind": "embedding", "params": matrices[:1]},
        {"kind": "hidden", "params": matrices[1:-1]},
        {"kind": "last", "params": matrices[1:][-1:]},
    ]
    return [group for group in groups if group["params"]]


OPTIMIZERS = {
    "stable_spam": lambda params, fused, **how: StableSPAM(params, reset_interval=3, fused=fused, **how),
    "stable_spam official": lambda params, fused, **how: StableSPAM(
        params, reset_interval=3, variant="official", fused=fused, **how
    ),
    "stable_spam robust": lambda params, fused, **how: StableSPAM(params, robust=True, fused=fused, **how),
    "stable_spam cosine": lambda params, fused, **how: StableSPAM(params, total_steps=5, fused=fused, **how),
    "spam": lambda params, fused, **how: SPAM(
        params, reset_interval=3, clip_start=0, threshold=2.0, warmup_steps=1, fused=fused, **how
    ),
    "spam official": lambda params, fused, **how: SPAM(
        params, reset_interval=3, clip_start=0, threshold=2.0, variant="official", fused=fused, **how
    ),
    "spam unclipped": lambda params, fused, **how: SPAM(params, threshold=0, fused=fused, **how),
    "spam sparse": lambda params, fused, **how: SPAM(
        params, reset_interval=3, clip_start=0, threshold=2.0, density=0.3, fused=fused, **how
    ),
    "scale": lambda params, fused, **how: SCALE(scale_roles(params), fused=fused, **how),
    "scale l2": lambda params, fused, **how: SCALE(scale_roles(params), norm="l2", fused=fused, **how),
}


def trained(name, fused, shapes, dtype, scales, broken, steps=None, seed=0, **how):
    """Parameters, and the optimizer, after some steps; ``broken`` is (step, tensor, value) of one bad entry."""
    if steps is None:  # robust statistics bound what enters them from the 11th update on
        steps = 14 if "robust" in name else 5
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(gradient(shape, dtype, 0.5, generator)) for shape in shapes]
    optimizer = OPTIMIZERS[name](params, fused, lr=1e-2, **how)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = gradient(p.shape, dtype, scales[(step + i) % len(scales)], generator)
            if broken and p.numel() and (step, i % 3) == broken[:2]:
                p.grad.view(-1)[p.numel() // 2] = broken[2]
        optimizer.step()
    return params, optimizer


def close(a, b, tolerance, size=0.0):
    """To ``tolerance`` of the largest entry, or of ``size``: what numbers were that all but cancel out."""
    if not a.numel():
        return True
    a, b = a.double(), b.double()
    largest = max(float(b.abs().max()), size, torch.finfo(torch.float32).tiny)
    return bool(((a - b).abs() <= tolerance * largest).all())


def assert_same(plain, fused, dtype, tolerance=1e-6):
    """Parameters to ``tolerance`` of a tensor's largest entry, state to twice that: the plain code makes a tensor's
    gain in fp32, the kernels in fp64, and it enters the second moment squared.
    """
    (params, optimizer), (others, other) = plain, fused
    sizes = {}
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
                sizes[key] = max(sizes.get(key, 0.0), float(value.abs().max()))
    for p, q in zip(params, others, strict=True):
        if dtype == torch.float32:
            assert close(q, p, tolerance, 0.05)  # what five steps of 1e-2 may have brought near zero
        else:  # a difference of 1e-7 may round the other way
            assert close(q, p, 2**-7)
            assert (p != q).float().mean() < 0.01 if p.numel() > 100 else True
        for key, value in optimizer.state[p].items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                most = 2 * tolerance if value.dtype == torch.float32 else 2**-7
                assert close(other.state[q][key], value, most, sizes.get(key, 0.0)), key
            elif isinstance(value, torch.Tensor):
                assert torch.equal(other.state[q][key], value), key
    for key, value in optimizer.stats.items():
        found = other.stats[key]
        assert torch.equal(found.isfinite(), value.isfinite()), key
        assert close(found.nan_to_num(posinf=0), value.nan_to_num(posinf=0), 3e-5), key


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(sorted(OPTIMIZERS)),
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    scales=st.lists(st.sampled_from([1.0, 1e-3, 30.0, 0.0, 1e-12, 1e12]), min_size=1, max_size=4),
    broken=st.none() | st.tuples(st.integers(0, 4), st.integers(0, 2), st.sampled_from([float("nan"), float("inf")])),
    weight_decay=st.sampled_from([0.0, 0.1]),
    maximize=st.booleans(),
    seed=st.integers(0, 99),
)
def test_kernels_are_the_plain_code(name, shapes, dtype, scales, broken, weight_decay, maximize, seed):
    how = {"weight_decay": weight_decay, "maximize": maximize, "seed": seed}
    plain = trained(name, False, shapes, dtype, scales, broken, **how)
    assert_same(plain, trained(name, True, shapes, dtype, scales, broken, **how), dtype)


LARGE = [(300, 300), (33,), (90, 1000), (1000, 40), (17, 7000), (70_001,)]
"""Of several blocks each, and rows shorter and longer than what is read at a time."""


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_large_tensors(name):
    how = {"weight_decay": 0.1}
    arguments = (LARGE, torch.float32, [1.0, 1e-3, 30.0], (2, 2, float("inf")), 4)
    plain, fused = (trained(name, choice, *arguments, **how) for choice in (False, True))
    assert_same(plain, fused, torch.float32)


@pytest.mark.parametrize("growth, clipped", [(1.3, 1), (2.0, 50), (30.0, 3000)])
@pytest.mark.parametrize("spike", [0.0, 1e6])
def test_the_norm_after_clipping_is_right_however_many_entries_are_clipped(growth, clipped, spike):
    """Those set apart while measuring, blocks that have too many of them, and one that hides all others."""
    n, generator = 50_003, torch.Generator().manual_seed(5)
    p = torch.nn.Parameter(torch.zeros(n))
    optimizer = StableSPAM([p], fused=True)
    for factor, top in ((1.0, 0.0), (1.0, 0.0), (growth, spike)):
        p.grad = torch.randn(n, generator=generator) * factor
        p.grad[31_000] += top
        optimizer.step()
    found = {key: float(value) for key, value in optimizer.stats.items()}
    exact = p.grad.double()
    over = exact.abs() > found["clip_limit"]
    left = torch.where(over, exact * (found["clip_limit"] / exact.abs().max()), exact)
    assert found["grad_norm"] == pytest.approx(float(exact.norm()), rel=1e-6)
    assert found["norm_after"] / found["gain"] == pytest.approx(float(left.norm()), rel=1e-6)
    assert found["clipped"] * n == pytest.approx(int(over.sum()))
    assert over.sum() >= (1 if spike else clipped)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_tensor_with_a_bad_entry_stays_as_it_was_to_the_bit(name, bad, threads):
    """The bad entry is the last of many blocks, and everything else moves on."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        params, optimizer = trained(name, True, LARGE, torch.float32, [1.0], None, steps=3)
        kept = [p.detach().clone() for p in params]
        states = [{k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)} for p in params]
        for p in params:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(8))
        for i in (0, 2, 4):
            params[i].grad.view(-1)[-1] = bad
        optimizer.step()
    finally:
        torch.set_num_threads(before)
    assert optimizer.stats["skipped"].sum() == 3
    for i, (p, old) in enumerate(zip(params, kept, strict=True)):
        if name != "spam official":  # there entries without history are clipped to 0, which all are from the start
            assert torch.equal(p, old) == (i in (0, 2, 4))
        if i in (0, 2, 4):
            assert torch.equal(p, old)
            assert all(torch.equal(optimizer.state[p][k], v) for k, v in states[i].items())


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_whole_steps_are_the_same_to_the_bit_for_any_number_of_threads_and_every_time(name):
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            params, optimizer = trained(name, True, LARGE, torch.float32, [1.0, 3.0], None, steps=3)
            states = [v for p in params for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
            results.append([*params, *states, *optimizer.stats.values()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(results[0], other, strict=True))


@contextmanager
def reading_in_turn(on):
    """The processor's vendor decides otherwise whether loops read several places in turn."""
    library = cpu_library.library()
    found = library.evenstep_in_turn(on)
    try:
        yield
    finally:
        library.evenstep_in_turn(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*sorted(OPTIMIZERS), "stabilize"])
def test_reading_in_turn_changes_no_result(name, dtype):
    def stabilized(params, fused, **how):
        return stabilize(torch.optim.SGD(params, **how), AdaClip(), AdaGN(), fused=fused)

    results = []
    for on in (0, 1):
        with reading_in_turn(on), pytest.MonkeyPatch.context() as patch:
            patch.setitem(OPTIMIZERS, "stabilize", stabilized)
            params, optimizer = trained(name, True, LARGE, dtype, [1.0, 5.0], (1, 1, math.nan))
        state = [x for p in params for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)]
        results.append([*params, *state, *optimizer.stats.values()])
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("on", [0, 1])
def test_large_tensors_both_ways(on):
    for name in ("stable_spam", "spam", "spam sparse", "scale"):
        with reading_in_turn(on):
            plain, fused = (trained(name, choice, LARGE, torch.float32, [1.0, 30.0], None) for choice in (False, True))
        assert_same(plain, fused, torch.float32)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e15])
def test_the_norm_after_clipping_is_right_for_entries_of_any_size(size):
    # Squares of entries below 1e-19 underflow in fp32, and those above 1e19 overflow.
    p = torch.nn.Parameter(torch.zeros(150, 200))
    optimizer = SPAM([p], clip_start=0, fused=True)  # a first step clips nothing
    p.grad = torch.randn(150, 200, generator=torch.Generator().manual_seed(0)) * size
    p.grad[3, 5] = 100 * size
    optimizer.step()
    assert float(optimizer.stats["norm_after"]) == pytest.approx(float(p.grad.double().norm()), rel=1e-6, abs=0)


@pytest.mark.slow  # a measurement of time
def test_clipping_does_not_slow_the_loop_down():
    # Measured where memory plays no part. A loop that the compiler leaves scalar takes more than twice as long.
    size, before = 1 << 17, torch.get_num_threads()
    p = torch.nn.Parameter(torch.zeros(size))
    optimizer = StableSPAM([p], lr=1e-3)
    gradients = {"below": torch.full((size,), 1e-3), "above": torch.full((size,), 1e-3)}
    gradients["above"][::4096] = 1.0
    best = dict.fromkeys(gradients, float("inf"))
    torch.set_num_threads(1)
    try:
        for _ in range(200):
            for name, p.grad in gradients.items():
                start = time.perf_counter()
                optimizer.step()
                best[name] = min(best[name], time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    assert optimizer.stats["clipped"] > 0
    assert best["above"] < 1.5 * best["below"], best


def test_only_trained_entries_of_a_sparse_parameter_change():
    params, optimizer = trained("spam sparse", True, [(300, 301)], torch.float32, [1.0], None, steps=2)
    before, mask = params[0].detach().clone(), optimizer.get_mask(params[0])
    params[0].grad = torch.ones_like(params[0])
    optimizer.state[params[0]]["age"].fill_(5)
    optimizer.param_groups[0]["reset_interval"] = 0
    optimizer.step()
    assert torch.equal(params[0] != before, mask)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
@pytest.mark.parametrize("name", ["stable_spam", "spam sparse", "scale"])
def test_every_way_of_rounding_is_the_plain_one(name, rounding):
    how = {"rounding": rounding}
    plain = trained(name, False, SHAPES, torch.bfloat16, [1.0, 0.1], None, **how)
    assert_same(plain, trained(name, True, SHAPES, torch.bfloat16, [1.0, 0.1], None, **how), torch.bfloat16)


@pytest.mark.parametrize("name", ["stable_spam", "stable_spam official", "spam", "spam sparse", "scale"])
def test_bf16_moments(name):
    plain = trained(name, False, SHAPES, torch.float32, [1.0, 0.1], (2, 1, float("nan")), state="bf16", steps=3)
    fused = trained(name, True, SHAPES, torch.float32, [1.0, 0.1], (2, 1, float("nan")), state="bf16", steps=3)
    assert_same(plain, fused, torch.float32, tolerance=2e-4)


def test_eight_bit_moments_get_the_same_codes():
    coded = pytest.importorskip("torchao.optim.subclass_8bit").OptimState8bit
    for signed in (True, False):
        state = coded.zeros((4096,), signed, 256)
        low, high = state.qmap[:-1], state.qmap[1:]
        every = torch.cat([state.qmap, low + (high - low) * 0.499, low + (high - low) * 0.501])
        values = torch.cat([every, torch.randn(4096 - len(every), generator=torch.Generator().manual_seed(0)) / 4])
        values = values if signed else values.abs()
        values = values.clamp(-1, 1)
        values[::256] = 1.0  # the scale of each block
        plain = coded.zeros((4096,), signed, 256)
        plain.copy_(values)
        p = torch.nn.Parameter(torch.zeros(4096))
        # With these betas the moments become the gradient and its square.
        optimizer = SPAM([p], lr=0.0, betas=(0.0, 0.0), threshold=0, state="int8", fused=True)
        p.grad = values if signed else values.sqrt()
        optimizer.step()
        found = optimizer.state[p]["exp_avg" if signed else "exp_avg_sq"]
        if signed:
            assert torch.equal(found.codes, plain.codes)
        else:  # squares of roots are not quite the numbers
            assert (found.codes != plain.codes).sum() <= 2
        assert torch.equal(found.dequantize() == 0, plain.dequantize() == 0)


def test_eight_bit_moments_in_training():
    pytest.importorskip("torchao")
    shapes = [(64, 64), (128, 96), (33,)]
    plain = trained("stable_spam", False, shapes, torch.float32, [1.0, 0.1], (2, 1, float("nan")), state="int8")
    fused = trained("stable_spam", True, shapes, torch.float32, [1.0, 0.1], (2, 1, float("nan")), state="int8")
    for p, q in zip(plain[0], fused[0], strict=True):
        assert close(q, p, 2e-3)
    for p, q in zip(plain[0][:2], fused[0][:2], strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            codes = plain[1].state[p][name].codes.int(), fused[1].state[q][name].codes.int()
            assert (codes[0] - codes[1]).abs().max() <= 1
            assert (codes[0] != codes[1]).float().mean() < 1e-2


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-18, 1.0, 1e18, 3e37])
@pytest.mark.parametrize("n", [1, 31, 1024, 40_000])
def test_norms_neither_overflow_nor_vanish(scale, n):
    g = torch.randn(n, generator=torch.Generator().manual_seed(1)) * scale
    found = KERNELS.measure([g, torch.zeros(5), torch.zeros(0), g.bfloat16()])
    exact = g.double().norm()
    assert found.peak[0] == g.abs().max()
    if exact < torch.finfo(torch.float32).max:
        assert abs(found.norm[0] - exact) <= 1e-6 * exact + 1e-45
        assert abs(found.norm[3] - g.bfloat16().double().norm()) <= 1e-6 * exact + 1e-45
    assert found.peak[1:3].tolist() == found.norm[1:3].tolist() == [0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_entry_anywhere_is_seen(bad):
    for n in (1, 17, 1024, 20_000):
        for place in {0, n // 2, n - 1}:
            g = torch.ones(n)
            g[place] = bad
            found = KERNELS.measure([g])
            assert torch.isinf(found.peak[0]) and not found.norm[0].isfinite()


def test_clipped_norms_are_exact():
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(n, generator=generator) for n in (50_000, 1, 0, 16_384, 777)]
    grads[0][49_999] = 1000.0
    limit = torch.tensor([3.0, torch.inf, 1.0, 0.5, 0.0])
    rescale = torch.tensor([0.003, 1.0, 1.0, 0.2, 0.5])
    norm, count = KERNELS.clip_norms(grads, KERNELS.measure(grads), limit, rescale)
    for g, most, factor, found, number in zip(grads, limit, rescale, norm, count, strict=True):
        over = g.abs() > most
        exact = torch.where(over, g.double() * factor, g.double()).norm()
        assert abs(found - exact) <= 1e-6 * exact and number == over.sum()


def test_views_that_start_anywhere_and_tensors_that_are_not_contiguous():
    """Unaligned views are served; what lies otherwise takes the plain way, in the same step."""
    store = torch.randn(3 * 1000 + 7)
    results = []
    for fused in (None, False):
        torch.manual_seed(0)
        params = [
            torch.nn.Parameter(store.clone()[1:1001]),
            torch.nn.Parameter(torch.randn(40, 30).t()),
            torch.nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)),
            torch.nn.Parameter(torch.randn(30, 20)),
        ]
        optimizer = StableSPAM(params, lr=1e-2, fused=fused)
        for _ in range(3):
            for i, p in enumerate(params):
                p.grad = torch.empty_like(p).normal_()
                if i == 3:
                    p.grad = torch.randn(1, 20).expand(30, 20)
                if i == 0:
                    p.grad = torch.randn(1003)[3:]
            optimizer.step()
        results.append(params)
    for p, q in zip(*results, strict=True):
        assert close(p, q, 1e-6)


def test_forcing_kernels_on_what_they_cannot_serve_is_an_error_that_says_why():
    p = torch.nn.Parameter(torch.randn(4, 3).t())
    optimizer = StableSPAM([p], fused=True)
    p.grad = torch.randn_like(p)
    before = p.detach().clone()
    with pytest.raises(
        RuntimeError, match=r"fused=True: a parameter of shape \(3, 4\).*not contiguous; use fused=None"
    ):
        optimizer.step()
    assert torch.equal(p, before)
    with pytest.raises(ValueError, match="fused=True: there are no kernels for meta"):
        StableSPAM([torch.nn.Parameter(torch.empty(3, device="meta"))], fused=True)


@pytest.mark.parametrize("transforms", [[AdaClip(), AdaGN()], [GradientStabilizer()]], ids=["clip+gn", "gn"])
@pytest.mark.parametrize("nonfinite", ["restore", "zero"])
def test_stabilize_gives_the_base_the_same_gradients(transforms, nonfinite):
    def run(fused):
        generator = torch.Generator().manual_seed(3)
        params = [torch.nn.Parameter(gradient(shape, torch.float32, 1.0, generator)) for shape in SHAPES]
        base = torch.optim.AdamW(params, lr=1e-2, fused=True)
        optimizer = stabilize(base, *transforms, nonfinite=nonfinite, fused=fused)
        for step in range(4):
            for i, p in enumerate(params):
                p.grad = gradient(p.shape, torch.float32, 10.0 if step == 2 else 0.1, generator)
                if (step, i) == (1, 4):
                    p.grad[7] = torch.nan
            given = [p.grad.clone() for p in params]
            optimizer.step()
            assert all(torch.equal(p.grad, g) or p.grad.isnan().any() for p, g in zip(params, given, strict=True))
        return params, optimizer

    (params, plain), (others, fused) = run(False), run(True)
    for p, q in zip(params, others, strict=True):
        assert close(q, p, 1e-6)
    assert all(torch.allclose(plain.stats[k], fused.stats[k], rtol=1e-5, equal_nan=True) for k in plain.stats)


def test_a_spike_does_not_hide_the_norm_of_the_rest():
    """SPAM clips it, and what is left is of another size altogether."""
    results = []
    for fused in (True, False):
        p = torch.nn.Parameter(torch.zeros(2000))
        optimizer = SPAM([p], clip_start=0, threshold=5000.0, fused=fused)
        for step in range(3):
            p.grad = torch.ones(2000)
            if step == 2:
                p.grad[7] = 1e19
            optimizer.step()
        results.append(optimizer.stats["norm_after"])
    assert 40 < results[0] < 50 and torch.allclose(*results, rtol=1e-5)


def program(text, **env):
    """Runs a program of its own; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


BUILD = """
    import torch
    from evenstep import SCALE, SPAM, StableSPAM
    from evenstep.kernels import kernels_for
    print(kernels_for("cpu").name)
    def run(make, fused):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s)) for s in ((150, 160), (33,), (64, 64))]
        optimizer = make(params, fused)
        for _ in range(4):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        return params
    for make in (lambda ps, fused: StableSPAM(ps, lr=1e-2, reset_interval=3, fused=fused),
                 lambda ps, fused: SPAM(ps, lr=1e-2, threshold=1, clip_start=0, density=.5, fused=fused),
                 lambda ps, fused: SCALE([{"kind": "last", "params": ps[::2]}], lr=1e-2, fused=fused)):
        for a, b in zip(run(make, True), run(make, False)):
            assert (a - b).abs().max() <= 1e-6 * b.abs().max(), (a - b).abs().max()
"""


CODES = """
    import torch
    from evenstep import SPAM
    found = []
    for scale in (1.0, 1e-6, 1e-33, 1e18, 3.7):
        p = torch.nn.Parameter(torch.zeros(8192))
        optimizer = SPAM([p], lr=0.0, betas=(0.0, 0.0), threshold=0, state="int8", fused=True)
        for _ in range(2):  # the second reads what the first wrote
            p.grad = torch.randn(8192, generator=torch.Generator().manual_seed(0)).pow(3) * scale
            optimizer.step()
            optimizer.param_groups[0]["betas"] = (0.5, 0.5)
        m, v = optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]
        found += [m.codes, v.codes, m.scale.view(torch.uint8), v.scale.view(torch.uint8)]
    print(hash(tuple(torch.cat(found).tolist())))
"""


@pytest.fixture(scope="module")
def said_by():
    """What the two programs print with a build, in one process."""
    codes = CODES if importlib.util.find_spec("torchao") else ""
    return functools.cache(lambda build: program(BUILD + codes, EVENSTEP_CPU_KERNELS=build).split("\n"))


@pytest.mark.parametrize("build", ["default", "avx2", "avx512"])
def test_every_build_that_this_processor_runs(build, said_by):
    if build not in cpu_library.usable():
        pytest.skip(f"this processor does not run {build}, or it is not built")
    assert said_by(build)[0] == f"cpu {build}"


def test_every_build_writes_the_same_eight_bit_codes(said_by):
    pytest.importorskip("torchao")
    said = {build: said_by(build)[1] for build in cpu_library.usable()}
    assert len(set(said.values())) == 1 and all(said.values()), said


def test_a_broken_build_is_told_and_the_plain_code_serves(monkeypatch, tmp_path):
    broken = tmp_path / "_cpu_default.so"
    broken.write_text("no library")
    monkeypatch.setattr(cpu_library, "_file", lambda name: broken)
    with pytest.raises(Unavailable, match=r"does not load .*; reinstall evenstep"):
        cpu_library.library.__wrapped__()


def test_an_old_processor_gets_the_default_build(monkeypatch):
    monkeypatch.delenv(cpu_library.FORCE, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert cpu_library.usable() == ["default"] and cpu_library.chosen() == "default"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SOMETHING NEW")
    assert cpu_library.usable() == ["default"]


def test_without_kernels_the_plain_code_serves_and_says_so():
    said = program(
        """
        import torch
        from evenstep import StableSPAM
        from evenstep.kernels import kernels_for
        p = torch.nn.Parameter(torch.ones(5))
        optimizer = StableSPAM([p])
        p.grad = torch.ones(5)
        optimizer.step()
        print(kernels_for("cpu"))
        try:
            StableSPAM([p], fused=True)
        except ValueError as problem:
            print(problem)
        from evenstep.bench.doctor import print_diagnosis
        print_diagnosis()
        """,
        EVENSTEP_CPU_KERNELS="none",
    )
    assert said.startswith("EVENSTEP_CPU_KERNELS=none is set\n")
    assert "fused=True: EVENSTEP_CPU_KERNELS=none is set; use fused=None or False" in said
    assert "cpu kernels        not used: EVENSTEP_CPU_KERNELS=none is set" in said


def test_a_forked_worker_can_step_after_its_parent_has():
    said = program(
        """
        import os, torch
        torch.set_num_threads(2)
        from evenstep import StableSPAM
        p = torch.nn.Parameter(torch.ones(400, 400))
        optimizer = StableSPAM([p])
        p.grad = torch.ones_like(p)
        optimizer.step()
        child = os.fork()
        if not child:
            from evenstep.kernels import kernels_for, cpu as cpu_library
            found = kernels_for("cpu").measure([p.grad])  # the kernel itself: torch's own pool does not survive a fork
            os._exit(0 if cpu_library.threads() == 1 and found.norm[0] == 400 else 1)
        print(os.waitpid(child, 0)[1])
        """
    )
    assert said.strip() == "0"


def test_doctor_says_what_serves():
    from evenstep.bench.doctor import diagnosis

    found = dict(diagnosis())
    assert found["cpu kernels"] == f"used ({KERNELS.name})"
    assert "gcc" in found["compiled by"] or "clang" in found["compiled by"]
    assert str(torch.get_num_threads()) in found["threads"]


@pytest.mark.slow
def test_the_install_succeeds_without_a_compiler(tmp_path):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "t")],
        cwd=root,
        env={**os.environ, "CC": "/bin/false", "CXX": "/bin/false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))
