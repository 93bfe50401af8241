"""The optimizers against the papers' equations in float64, over random gradients, hyperparameters, spikes and gaps."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenstep import SCALE, SPAM, AdaClip, AdaGN, GradientStabilizer, StableSPAM, stabilize
from evenstep.optim.functional import BLOCK

SHAPES = [(5, 7), (11,), (2, 3, 4), ()]


def gradients(seed: int, steps: int, shape: tuple, spikes: bool = True):
    """Gradients over several orders of magnitude, with a few large entries, one zero step, one step without and one
    with a NaN.
    """
    rng = np.random.default_rng(seed)
    for t in range(1, steps + 1):
        g = rng.normal(size=shape) * 10 ** rng.uniform(-3, 1)
        if spikes and t % 4 == 0:
            g = np.where(rng.random(shape) < 0.2, g * 300, g)
        if t == 9:
            g = np.zeros(shape)
        if t == 6:
            g = None
        if t == 13:
            g = np.array(g)
            g[...] = np.where(rng.random(shape) < 0.5, np.nan, np.inf)
        yield g


def compare(make, reference, steps=30, dtype=torch.float64, shapes=SHAPES, seed=0):
    """Run both over the same gradients; returns the largest relative distance of any tensor."""
    rng = np.random.default_rng(seed)
    starts = [rng.normal(size=shape) for shape in shapes]
    params = [torch.nn.Parameter(torch.tensor(start, dtype=dtype)) for start in starts]
    references = [reference(i, p.detach().double().numpy().copy()) for i, p in enumerate(params)]
    optimizer = make(params)
    for grads in zip(*(gradients(seed + i, steps, shape) for i, shape in enumerate(shapes)), strict=True):
        for p, ref, g in zip(params, references, grads, strict=True):
            p.grad = None if g is None else torch.tensor(g, dtype=dtype)
            if g is None:
                ref.skip()
            else:
                ref.step(p.grad.double().numpy())
        optimizer.step()
    return max(
        float(np.linalg.norm(p.detach().double().numpy() - ref.p) / max(np.linalg.norm(ref.p - start), 1e-300))
        for p, ref, start in zip(params, references, starts, strict=True)
    )


STABLE = [
    {},
    {"reset_interval": 7},
    {"reset_interval": 1},
    {"reset_interval": 0, "weight_decay": 0.1},
    {"total_steps": 20, "eta_min": 0.3, "reset_interval": 11},
    {"gamma1": 0.85, "gamma2": 0.99999, "gamma3": 0.9, "betas": (0.0, 0.95), "eps": 1e-5},
    {"robust": True, "reset_interval": 13, "total_steps": 25},
    {"robust": True, "gamma1": 0.85, "gamma2": 0.99999, "gamma3": 0.9},
]


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("options", STABLE, ids=str)
def test_stable_spam_follows_the_paper(options, variant):
    options = {**options, "variant": variant, "lr": 0.01}
    assert compare(lambda ps: StableSPAM(ps, **options), lambda i, p: oracle.StableSPAM(p, **options)) < 1e-10


SPARSE_FREE = [
    {},
    {"reset_interval": 8, "warmup_steps": 3, "clip_start": 2, "threshold": 20.0},
    {"reset_interval": 10, "warmup_steps": 25, "clip_start": 0, "threshold": 5.0, "weight_decay": 0.1},
    {"reset_interval": 0, "clip_start": 3, "threshold": 10.0},
    {"threshold": 0.0, "reset_interval": 5, "warmup_steps": 0, "betas": (0.5, 0.9)},
]


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("options", SPARSE_FREE, ids=str)
def test_spam_follows_the_paper(options, variant):
    options = {**options, "variant": variant, "lr": 0.01}
    assert compare(lambda ps: SPAM(ps, **options), lambda i, p: oracle.SPAM(p, **options)) < 1e-10


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_sparse_spam_trains_the_entries_of_its_masks(variant):
    options = {
        "lr": 0.01,
        "reset_interval": 9,
        "warmup_steps": 4,
        "clip_start": 2,
        "threshold": 20.0,
        "weight_decay": 0.1,
    }
    rng = np.random.default_rng(3)
    p = torch.nn.Parameter(torch.tensor(rng.normal(size=(6, 9))))
    optimizer = SPAM([p], density=0.3, variant=variant, **options)
    reference = oracle.SPAM(p.detach().numpy().copy(), mask=optimizer.get_mask(p).numpy(), variant=variant, **options)
    masks = {optimizer.get_mask(p).numpy().tobytes()}
    for g in gradients(5, 30, (6, 9)):
        p.grad = None if g is None else torch.tensor(g)
        optimizer.step()
        mask = optimizer.get_mask(p).numpy()
        masks.add(mask.tobytes())
        reference.step(g, new_mask=mask) if g is not None else reference.skip()
        assert np.allclose(p.detach().numpy(), reference.p, rtol=1e-10, atol=0)
    assert len(masks) == 4


@pytest.mark.parametrize("norm", ["rms", "l2"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_scale_follows_the_paper(norm, weight_decay):
    options = {"lr": 0.01, "norm": norm, "weight_decay": weight_decay}
    kinds, shapes = ["embedding", "hidden", "last", "vector", "hidden"], [(9, 4), (5, 7), (6, 4), (8,), (2, 3, 4)]
    distance = compare(
        lambda ps: SCALE([{"params": [p], "kind": kind} for p, kind in zip(ps, kinds, strict=True)], **options),
        lambda i, p: oracle.SCALE(p, kinds[i], **options),
        shapes=shapes,
    )
    assert distance < 1e-10


@pytest.mark.parametrize(
    ("ours", "theirs", "tolerance"),
    [
        (lambda ps: StableSPAM(ps, reset_interval=7), lambda i, p: oracle.StableSPAM(p, reset_interval=7), 3e-5),
        (
            lambda ps: SPAM(ps, reset_interval=8, clip_start=2, threshold=20.0),
            lambda i, p: oracle.SPAM(p, reset_interval=8, clip_start=2, threshold=20.0),
            1e-4,
        ),
    ],
)
def test_fp32_stays_near_the_paper(ours, theirs, tolerance):
    assert compare(ours, theirs, dtype=torch.float32) < tolerance


def test_tensors_larger_than_a_block_are_treated_as_one():
    shape = (3, BLOCK // 2 + 5)  # a ragged last piece
    steps, options = 3, {"lr": 0.01, "reset_interval": 2}
    for make, ref in [
        (lambda ps: StableSPAM(ps, **options), lambda i, p: oracle.StableSPAM(p, **options)),
        (lambda ps: SPAM(ps, **options), lambda i, p: oracle.SPAM(p, **options)),
        (
            lambda ps: SCALE([{"params": ps, "kind": "embedding"}], lr=0.01),
            lambda i, p: oracle.SCALE(p, "embedding", lr=0.01),
        ),
        (lambda ps: SCALE([{"params": ps, "kind": "last"}], lr=0.01), lambda i, p: oracle.SCALE(p, "last", lr=0.01)),
    ]:
        assert compare(make, ref, steps=steps, shapes=[shape]) < 1e-9


def test_memory_layout_does_not_matter():
    """Transposed and expanded gradients and parameters give what contiguous ones give."""
    torch.manual_seed(0)
    start, grads = torch.randn(40, 2000, dtype=torch.float64), torch.randn(3, 40, 2000, dtype=torch.float64)
    results = []
    for layout in (lambda x: x.clone(), lambda x: x.t().contiguous().t(), lambda x: torch.stack([x, x], -1)[..., 0]):
        p = torch.nn.Parameter(layout(start))
        optimizer = StableSPAM([p], reset_interval=2)
        for g in grads:
            p.grad = layout(g)
            optimizer.step()
        results.append(p.detach().clone())
    assert torch.allclose(results[0], results[1], rtol=1e-12) and torch.allclose(results[0], results[2], rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    shape=st.sampled_from([(1,), (3, 5), (2, 2, 3), ()]),
    gamma1=st.floats(0, 0.999),
    gamma2=st.floats(0, 0.99999),
    gamma3=st.floats(0, 0.9999),
    reset_interval=st.integers(0, 9),
    total_steps=st.none() | st.integers(1, 30),
    variant=st.sampled_from(["paper", "official"]),
)
def test_stable_spam_equals_the_oracle_for_any_setting(seed, shape, **options):
    distance = compare(
        lambda ps: StableSPAM(ps, **options),
        lambda i, p: oracle.StableSPAM(p, **options),
        20,
        shapes=[shape],
        seed=seed,
    )
    assert distance < 1e-7


def test_statistics_report_what_the_equations_used():
    rng = np.random.default_rng(0)
    p = torch.nn.Parameter(torch.tensor(rng.normal(size=(5, 7))))
    optimizer, reference = StableSPAM([p]), oracle.StableSPAM(p.detach().numpy().copy())
    for g in gradients(1, 5, (5, 7)):
        p.grad = torch.tensor(g)
        before = p.detach().clone()
        optimizer.step()
        reference.step(g)
        for name, value in reference.seen.items():
            assert optimizer.stats[name].item() == pytest.approx(value, rel=1e-9), name
        assert optimizer.stats["grad_norm"].item() == pytest.approx(np.linalg.norm(g))
        assert optimizer.stats["update_rms"].item() == pytest.approx(
            (p.detach() - before).square().mean().sqrt().item()
        )


def base_with(transforms, **options):
    return lambda ps: stabilize(torch.optim.Adam(ps, lr=1e-3, **options), *transforms)


def test_stabilized_adam_is_stable_spam_without_resets():
    """AdaClip, AdaGN and Adam are all there is to Stable-SPAM between resets; a zero or absent gradient is no
    exception.
    """
    steps, shapes = 12, [(5, 7), (11,)]
    distance = compare(
        base_with([AdaClip(), AdaGN()]), lambda i, p: oracle.StableSPAM(p, reset_interval=0), steps, shapes=shapes
    )
    assert distance < 1e-10


def test_stabilized_adam_resets_as_stable_spam_does():
    distance = compare(
        lambda ps: stabilize(torch.optim.Adam(ps, lr=1e-3), AdaClip(), AdaGN(), reset_interval=5),
        lambda i, p: oracle.StableSPAM(p, reset_interval=5),
        12,
        shapes=[(5, 7), (11,)],
    )
    assert distance < 1e-10


def test_gradient_stabilizer_follows_its_paper():
    """g / ||g|| * mu / sqrt(nu) with gamma 0.6 and 0.999, bias-corrected, in front of plain gradient descent."""
    rng = np.random.default_rng(0)
    start = rng.normal(size=(4, 6))
    p = torch.nn.Parameter(torch.tensor(start))
    optimizer = stabilize(torch.optim.SGD([p], lr=0.1), GradientStabilizer())
    mu = nu = 0.0
    for t in range(1, 15):
        g = rng.normal(size=(4, 6)) * 10 ** rng.uniform(-6, 6)
        p.grad = torch.tensor(g)
        optimizer.step()
        r = np.linalg.norm(g)
        mu, nu = 0.6 * mu + 0.4 * r, 0.999 * nu + 0.001 * r * r
        start = start - 0.1 * g / r * (mu / (1 - 0.6**t)) / np.sqrt(nu / (1 - 0.999**t))
        assert np.allclose(p.detach().numpy(), start, rtol=1e-9)


def test_clipping_after_amplifying_judges_the_amplified_gradient():
    """Transforms act in the order given: AdaGN then AdaClip."""
    rng = np.random.default_rng(0)
    start = rng.normal(size=(4, 6))
    p = torch.nn.Parameter(torch.tensor(start))
    optimizer = stabilize(torch.optim.SGD([p], lr=0.1), AdaGN(), AdaClip(gamma3=0.5))
    mu = nu = peak = 0.0
    for t in range(1, 10):
        g = rng.normal(size=(4, 6)) * 10 ** rng.uniform(-2, 2)
        p.grad = torch.tensor(g)
        optimizer.step()
        r = np.linalg.norm(g)
        mu, nu = 0.7 * mu + 0.3 * r, 0.9 * nu + 0.1 * r * r
        g = g / r * (mu / (1 - 0.7**t)) / (np.sqrt(nu / (1 - 0.9**t)) + 1e-8)
        peak = 0.5 * peak + 0.5 * np.abs(g).max()
        limit = peak / (1 - 0.5**t)
        g = np.where(np.abs(g) > limit, g / np.abs(g).max() * limit, g)
        start = start - 0.1 * g
        assert np.allclose(p.detach().numpy(), start, rtol=1e-9)
