"""How results enter 16-bit parameters: nearest stalls, stochastic and Kahan rounding follow fp32."""

import copy
import io

import pytest
import torch
from torch import nn

from evenstep import SCALE, SPAM, StableSPAM
from evenstep.optim.rounding import noise_seeds, stochastically_rounded, write_kahan

SHAPE = (40, 30)
MAKERS = {
    "spam": lambda p, **o: SPAM([p], lr=1e-4, threshold=0, reset_interval=0, **o),
    "spam_sparse": lambda p, **o: SPAM([p], lr=1e-4, threshold=0, reset_interval=0, density=0.5, **o),
    "stable_spam": lambda p, **o: StableSPAM([p], lr=1e-4, reset_interval=0, **o),
    "scale": lambda p, **o: SCALE([{"params": [p], "kind": "hidden"}], lr=1e-4, **o),
    "scale_embedding": lambda p, **o: SCALE([{"params": [p], "kind": "embedding"}], lr=1e-4, **o),
    "scale_last": lambda p, **o: SCALE([{"params": [p], "kind": "last"}], lr=1e-4, **o),
}
every_optimizer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def gradient(step):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(step)).abs() + 0.5  # always down


def train(make, dtype, steps, rounding="nearest", start=0, objects=None):
    if objects is None:
        p = nn.Parameter(torch.ones(SHAPE, dtype=dtype))
        objects = p, make(p, rounding=rounding)
    p, optimizer = objects
    for step in range(start, start + steps):
        p.grad = gradient(step).to(dtype)
        optimizer.step()
    return p, optimizer


@every_optimizer
def test_under_bf16_nearest_stalls_where_the_others_follow_fp32(make):
    """200 updates of about 1e-4 on ones, of which bf16's next neighbour is 4e-3 away."""

    def walked(dtype, rounding):
        p, optimizer = train(make, dtype, 200, rounding)
        lost = optimizer.state[p].get("compensation", torch.zeros(()))
        return (1 - p.detach().float() - lost.float()).mean().item()

    way = {
        name: walked(dtype, rounding)
        for name, dtype, rounding in [
            ("fp32", torch.float32, "nearest"),
            ("nearest", torch.bfloat16, "nearest"),
            ("stochastic", torch.bfloat16, "stochastic"),
            ("kahan", torch.bfloat16, "kahan"),
        ]
    }
    assert way["fp32"] > 0.009
    assert way["nearest"] == 0
    assert way["stochastic"] == pytest.approx(way["fp32"], rel=0.05)
    assert way["kahan"] == pytest.approx(way["fp32"], rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.0012, -1.0012, 3.3e4, 7e-5, -0.3333, 0.0])
def test_stochastic_rounding_takes_a_neighbour_and_is_right_in_the_mean(dtype, value):
    x = torch.full((200_000,), value)
    [seed] = noise_seeds(torch.tensor(5.0, dtype=torch.float64), [(0, 3)])
    y = stochastically_rounded(x, dtype, seed).double()
    exact = x.double()
    nearest = x.to(dtype)
    gap = (torch.nextafter(nearest, nearest * 2).double() - nearest.double()).abs()
    assert ((y - exact).abs() <= gap).all()
    assert y.unique().numel() == (1 if (nearest.double() == exact).all() else 2)
    # The error of a mean of n draws from {down, up} is at most gap / 2 / sqrt(n); five of those.
    assert (y.mean() - exact.mean()).abs() <= 5 * gap[0] / 2 / 200_000**0.5 + 1e-12


def test_noise_differs_between_entries_steps_and_tensors():
    x = torch.full((100_000,), 1 + 2**-8)  # halfway between two bf16 numbers
    t = torch.tensor(7.0, dtype=torch.float64)
    first, second = noise_seeds(t, [(0, 0), (0, 1)])
    [later] = noise_seeds(t + 1, [(0, 0)])
    up = [stochastically_rounded(x, torch.bfloat16, seed) > 1 for seed in (first, second, later)]
    up.append(up[0].roll(1))
    for i, one in enumerate(up):
        for other in up[i + 1 :]:
            assert (one == other).double().mean().item() == pytest.approx(0.5, abs=0.01)


def test_noise_does_not_depend_on_the_pieces():
    x = torch.randn(1000)
    [seed] = noise_seeds(torch.tensor(3.0), [(1, 2)])
    whole = stochastically_rounded(x, torch.bfloat16, seed)
    parts = [stochastically_rounded(x[i : i + 300], torch.bfloat16, seed, i) for i in range(0, 1000, 300)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("start", [0, 7, 2**31 - 5, 2**33 + 1])
def test_a_shard_has_the_noise_of_its_entries_in_the_whole_tensor(start):
    x = torch.randn(1000)
    [whole], [shard] = (noise_seeds(torch.tensor(3.0), [(1, 2)], starts=starts) for starts in ([start], [start + 300]))
    expected = stochastically_rounded(x, torch.bfloat16, whole)[300:]
    assert torch.equal(stochastically_rounded(x[300:], torch.bfloat16, shard), expected)


def test_not_finite_stays_as_it_is():
    [seed] = noise_seeds(torch.tensor(3.0), [(0, 0)])
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    assert torch.equal(stochastically_rounded(x, torch.bfloat16, seed).isnan(), x.isnan())
    assert torch.equal(stochastically_rounded(x, torch.bfloat16, seed)[1:], x[1:].bfloat16())


def test_kahan_keeps_what_rounding_lost():
    """As optimi describes it: what was lost is added to the next result, and what is lost then is kept."""
    p, lost, exact = torch.ones(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16), torch.ones(1).double()
    for _ in range(1000):
        write_kahan(p, p.float() - 1e-4, lost, torch.ones(()))
        exact -= 1e-4
        assert (p.double() + lost.double() - exact).abs() < 3e-3
    assert p.item() == pytest.approx(0.9, abs=4e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kahan_compiled_by_inductor_keeps_what_rounding_lost(dtype):
    """Inductor drops conversions to 16 bits inside of a kernel, and with them the rounding error."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(100, generator=generator).to(dtype)
    lost = torch.zeros_like(p)
    expected, expected_lost = p.clone(), lost.clone()

    def subtract(p, update, lost):
        write_kahan(p, p.float() - update, lost, torch.ones(()))

    compiled = torch.compile(subtract, backend="inductor")
    for _ in range(3):
        update = torch.randn(100, generator=generator) * 0.01
        compiled(p, update, lost)
        subtract(expected, update, expected_lost)
        assert torch.equal(p, expected) and torch.equal(lost, expected_lost)
    assert lost.abs().max() > 0


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
@every_optimizer
def test_resume_is_bitwise_exact(make, rounding):
    p, optimizer = train(make, torch.bfloat16, 6, rounding)
    saved = io.BytesIO()
    torch.save((p.detach().clone(), optimizer.state_dict()), saved)
    saved.seek(0)
    value, state = torch.load(saved, weights_only=True)
    q = nn.Parameter(value)
    other = make(q, rounding=rounding)
    other.load_state_dict(state)
    train(make, torch.bfloat16, 6, start=6, objects=(p, optimizer))
    train(make, torch.bfloat16, 6, start=6, objects=(q, other))
    assert torch.equal(p, q)
    for name, value in optimizer.state[p].items():
        same = torch.equal(value, other.state[q][name]) if torch.is_tensor(value) else value == other.state[q][name]
        assert same, name


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@every_optimizer
def test_replicas_stay_equal_and_the_global_generator_is_untouched(make, rounding):
    torch.manual_seed(1)
    p, _ = train(make, torch.bfloat16, 5, rounding)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    q, _ = train(make, torch.bfloat16, 5, rounding)
    assert torch.equal(p, q)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@every_optimizer
def test_a_gradient_that_is_not_finite_changes_no_bit(make, rounding):
    p, optimizer = train(make, torch.bfloat16, 50, rounding)
    before = p.detach().clone(), copy.deepcopy(optimizer.state[p])
    p.grad = gradient(0).bfloat16()
    p.grad[3, 4] = torch.nan
    optimizer.step()
    assert torch.equal(p, before[0])
    for name, value in before[1].items():
        assert torch.equal(optimizer.state[p][name], value) if torch.is_tensor(value) else True, name


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_fp32_parameters_are_the_same_under_every_rounding(rounding):
    for make in MAKERS.values():
        p, optimizer = train(make, torch.float32, 4, rounding)
        q, _ = train(make, torch.float32, 4)
        assert torch.equal(p, q)
        assert "compensation" not in optimizer.state[p]
