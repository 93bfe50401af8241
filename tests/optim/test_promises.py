"""What the optimizers promise beside their equations: exact resume, untouched gradients, honest state, early errors."""

import copy
import inspect
import io
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from evenstep import SCALE, SPAM, AdaClip, AdaGN, StableSPAM, scale_groups, stabilize


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 8)
        self.lm_head = nn.Linear(8, 11, bias=False)

    def forward(self, tokens):
        return self.lm_head(torch.tanh(self.hidden(self.embed(tokens))))


MAKERS = {
    "stable_spam": lambda m: StableSPAM(m.named_parameters(), lr=0.01, reset_interval=7, total_steps=25),
    "stable_spam_official": lambda m: StableSPAM(
        m.parameters(), lr=0.01, reset_interval=7, total_steps=9, variant="official"
    ),
    "spam": lambda m: SPAM(m.parameters(), lr=0.01, reset_interval=9, warmup_steps=5, clip_start=3, threshold=50.0),
    "spam_sparse": lambda m: SPAM(
        m.parameters(), lr=0.01, reset_interval=9, warmup_steps=5, density=0.25, clip_start=3
    ),
    "spam_official": lambda m: SPAM(m.parameters(), lr=0.01, reset_interval=9, density=0.5, variant="official"),
    "scale": lambda m: SCALE(scale_groups(m), lr=0.01, adam_lr=0.003),
    "stabilized_adamw": lambda m: stabilize(
        torch.optim.AdamW(m.parameters(), lr=0.01), AdaClip(), AdaGN(), reset_interval=7
    ),
}
every_optimizer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def train(model, optimizer, steps, seed=0, schedule=None, dtype=torch.float32):
    """Gradient steps on random tokens; returns the losses. The data depend on the seed and the step alone."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        tokens = torch.randint(11, (4, 9), generator=generator)
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        if step == 11:
            model.hidden.weight.grad.mul_(1000)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(loss.item())
    return losses


def build(make, dtype=torch.float32):
    torch.manual_seed(0)
    model = Small().to(dtype)
    return model, make(model)


def saved(optimizer):
    """Through torch.save and a weights-only load, as a checkpoint goes."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def state_tensors(optimizer):
    return [
        (key, value)
        for entries in optimizer.state_dict()["state"].values()
        for key, value in entries.items()
        if isinstance(value, torch.Tensor)
    ]


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resume_is_bitwise_exact_at_any_step(make, dtype):
    """Inside a reset period, on a reset, in a re-warm-up, within and past the total_steps schedule; also under bf16
    parameters.
    """
    model, optimizer = build(make, dtype)
    points = {}
    losses = []
    for step in range(30):
        if step in (1, 6, 7, 8, 10, 17, 18, 20, 26):
            points[step] = (copy.deepcopy(model.state_dict()), saved(optimizer))
        losses += train(model, optimizer, [step])
    for step, (weights, state) in points.items():
        resumed, again = build(make, dtype)
        train(resumed, again, range(100, 103))  # whatever it did before must not matter
        resumed.load_state_dict(weights)
        again.load_state_dict(state)
        assert train(resumed, again, range(step, 30)) == losses[step:], f"resumed at {step}"
        for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b)
        for (key, a), (_, b) in zip(state_tensors(optimizer), state_tensors(again), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b), key


@every_optimizer
def test_it_learns(make):
    model, optimizer = build(make)
    losses = train(model, optimizer, [0] * 40)
    assert losses[-1] < losses[0] - 0.05  # the re-warm-ups of a 9-step reset interval leave SPAM little time


@every_optimizer
def test_gradients_are_never_modified(make):
    model, optimizer = build(make)
    for step in range(12):
        train(model, optimizer, [step])
        before = [p.grad.clone() for p in model.parameters()]
        identity = [p.grad for p in model.parameters()]
        optimizer.step()
        for p, grad, same in zip(model.parameters(), before, identity, strict=True):
            assert p.grad is same and torch.equal(p.grad, grad)


@pytest.mark.parametrize("make", [make for name, make in MAKERS.items() if not name.startswith("stabilized")])
def test_a_gradient_that_is_not_finite_changes_nothing_of_its_tensor(make):
    model, optimizer = build(make)
    train(model, optimizer, range(5))
    p = model.hidden.weight
    for bad in (float("nan"), float("inf"), -float("inf")):
        weights, state = p.detach().clone(), copy.deepcopy(optimizer.state[p])
        other = model.lm_head.weight.detach().clone()
        optimizer.zero_grad()
        train_backward(model)
        p.grad[2, 3] = bad
        optimizer.step()
        assert torch.equal(p, weights)
        for key, value in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(state[key])), key
        assert not torch.equal(model.lm_head.weight, other)
        place = [q is p for group in optimizer.param_groups for q in group["params"]].index(True)
        expected = torch.zeros(4)
        expected[place] = 1
        assert torch.equal(optimizer.stats["skipped"], expected)
    losses = train(model, optimizer, range(5, 9))
    assert np.isfinite(losses).all()


def train_backward(model):
    tokens = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(5))
    nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()


@pytest.mark.parametrize(
    "make", [MAKERS["stable_spam"], MAKERS["spam"], MAKERS["scale"]], ids=["stable_spam", "spam", "scale"]
)
@pytest.mark.parametrize("scale", [1e-30, 1e20], ids=str)
def test_tiny_and_huge_gradients_stay_finite_and_are_forgotten(make, scale):
    model, optimizer = build(make)
    for step in range(4):
        optimizer.zero_grad()
        train_backward(model)
        if step == 1:
            for p in model.parameters():
                p.grad.mul_(scale)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        assert all(torch.isfinite(value).all() for _, value in state_tensors(optimizer))
        assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "frozen afterwards"


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_state_is_eager_and_fp32_under_16_bit_parameters(make):
    model, optimizer = build(make, torch.bfloat16)
    if "stabilize" not in repr(optimizer):
        needed = [p for p in model.parameters() if not (isinstance(optimizer, SCALE) and p is model.hidden.weight)]
        assert all(
            optimizer.state[p] for p in needed if p is not model.embed.weight or not isinstance(optimizer, SCALE)
        )
    train(model, optimizer, range(3))
    for key, value in state_tensors(optimizer):
        if value.is_floating_point() and not (key in ("exp_avg", "exp_avg_sq") and "stabilize" in repr(optimizer)):
            assert value.dtype == torch.float32, key


def test_a_parameter_whose_gradient_comes_late_moves_like_a_new_one():
    for make in (lambda ps: SPAM(ps, lr=0.01), lambda ps: StableSPAM(ps, lr=0.01)):
        early, late = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
        optimizer = make([early, late])
        for _ in range(40):
            early.grad = torch.full((3, 4), 0.1)
            optimizer.step()
        assert torch.equal(late, torch.ones(3, 4))
        late.grad = torch.full((3, 4), 0.1)
        optimizer.step()
        assert torch.allclose(late, torch.ones(3, 4) - 0.01, rtol=1e-3)


@pytest.mark.parametrize("density", [0.25, 0.1, 0.0025])
def test_sparse_momentum_takes_its_share_of_memory_and_one_bit_an_entry(density):
    model = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 100))
    optimizer = SPAM(model.parameters(), density=density)
    for p in model.parameters():
        moments = optimizer.state[p]["exp_avg"].numel()
        if p.dim() == 1:
            assert moments == p.numel()
        else:
            assert moments == optimizer.state[p]["exp_avg_sq"].numel() == round(density * p.numel())
            assert optimizer.state[p]["mask"].nbytes <= -(-p.numel() // 8)
            assert int(optimizer.get_mask(p).sum()) == round(density * p.numel())
            extra = sum(v.nbytes for v in optimizer.state[p].values() if torch.is_tensor(v)) - moments * 8
            assert extra <= p.numel() // 8 + 8


def test_masks_are_the_same_on_every_rank_and_differ_between_tensors_and_resets():
    def masks(seed):
        torch.manual_seed(seed)  # ranks may have different global seeds
        params = [nn.Parameter(torch.randn(20, 30)) for _ in range(2)]
        optimizer = SPAM(params, density=0.5, reset_interval=3)
        seen = []
        for _ in range(7):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
            seen.append([optimizer.get_mask(p) for p in params])
        return seen

    first, second = masks(0), masks(1)
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(first[0][0], first[0][1])
    assert torch.equal(first[0][0], first[1][0]) and not torch.equal(first[1][0], first[2][0])


@pytest.mark.parametrize("device", [None, torch.device("cpu")], ids=["by the host", "on a device"])
def test_masks_are_uniform_over_entries(device):
    from evenstep.optim.spam import CHUNK, draw_mask
    from evenstep.optim.state import unpack

    n, draws = 64, 4000 if device is None else 1000
    hits = sum(unpack(draw_mask(n, 0.25, (0, i, 0), device), n).double() for i in range(draws)) / draws
    assert abs(hits - 0.25).max() < 5 * (0.25 * 0.75 / draws) ** 0.5
    big = unpack(draw_mask(2 * CHUNK + 77, 0.1, (1,), device), 2 * CHUNK + 77)
    assert int(big.sum()) == round(0.1 * (2 * CHUNK + 77))
    assert abs(big[:CHUNK].double().mean() - 0.1) < 0.002
    # Masks of two seeds, and two chunks of one mask, agree no more than chance has it.
    other = unpack(draw_mask(2 * CHUNK + 77, 0.1, (2,), device), 2 * CHUNK + 77)
    for both in (big & other, big[:CHUNK] & big[CHUNK : 2 * CHUNK], big[1:] & other[:-1]):
        assert abs(both.double().mean() - 0.01) < 5e-4


@pytest.mark.parametrize("share", [0.2, 0.5], ids=["another size", "the same size"])
def test_a_bad_gradient_on_a_reset_keeps_a_mask_given_by_hand(share):
    p = nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))
    optimizer = SPAM([p], density=0.5, reset_interval=4)
    mask = torch.zeros(36, dtype=torch.bool)
    mask[: round(share * 36)] = True
    optimizer.set_mask(p, mask.view(6, 6))
    for t in range(1, 9):
        p.grad = torch.ones_like(p)
        before = copy.deepcopy(optimizer.state[p])
        if t == 4:
            p.grad[0, 0] = torch.nan
        optimizer.step()
        same = {
            key: torch.equal(torch.as_tensor(value), torch.as_tensor(before[key]))
            for key, value in optimizer.state[p].items()
        }
        assert t != 4 or all(same.values()), same
        assert same.get("mask", False) == (t != 8), t


def test_every_reset_draws_a_mask_even_on_neighbouring_steps():
    p = nn.Parameter(torch.ones(20, 20))
    optimizer = SPAM([p], density=0.5, reset_interval=1)
    masks = [optimizer.get_mask(p)]
    for _ in range(4):
        p.grad = torch.ones_like(p)
        optimizer.step()
        masks.append(optimizer.get_mask(p))
    assert len({mask.numpy().tobytes() for mask in masks}) == 5


def test_scale_takes_adam_lr_for_vectors_and_refuses_two_rates():
    model = Small()
    optimizer = SCALE(scale_groups(model), lr=0.01, adam_lr=0.003)
    assert {group["kind"]: group["lr"] for group in optimizer.param_groups} == {
        "embedding": 0.01,
        "hidden": 0.01,
        "last": 0.01,
        "vector": 0.003,
    }
    with pytest.raises(ValueError, match=r"both lr=0.01 and adam_lr=0.0005; give one"):
        SCALE([{**group, "lr": 0.01, "adam_lr": 5e-4} for group in scale_groups(model)])


def test_numbers_of_any_library_are_numbers_and_tensors_are_looked_at():
    p = nn.Parameter(torch.ones(2))
    optimizer = StableSPAM([p], lr=np.float32(1e-3), reset_interval=np.int64(3), eps=1)
    assert optimizer.param_groups[0]["reset_interval"] == 3
    with pytest.raises(ValueError, match="lr=tensor"):
        StableSPAM([p], lr=torch.tensor(-1.0))


def test_set_mask_is_checked():
    p, v = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(5))
    optimizer = SPAM([p, v], density=0.5)
    with pytest.raises(ValueError, match="bool tensor of shape"):
        optimizer.set_mask(p, torch.ones(5, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="bool tensor of shape"):
        optimizer.set_mask(p, torch.ones(4, 5))
    with pytest.raises(ValueError, match="dense"):
        optimizer.set_mask(v, torch.ones(5, dtype=torch.bool))
    frozen = nn.Parameter(torch.randn(4, 5), requires_grad=False)
    optimizer.add_param_group({"params": [frozen]})
    with pytest.raises(ValueError, match="frozen"):
        optimizer.set_mask(frozen, torch.ones(4, 5, dtype=torch.bool))
    assert not optimizer.get_mask(frozen).any() and frozen not in optimizer.state


@pytest.mark.parametrize("fused", [None, False], ids=["kernels", "plain"])
@pytest.mark.parametrize("shape", [(4, 50), (2, 5)], ids=str)
def test_a_sparse_parameter_of_another_size_is_refused(fused, shape):
    p = nn.Parameter(torch.randn(4, 20))
    optimizer = SPAM([p], density=0.5, fused=fused)
    saved = copy.deepcopy(optimizer.state_dict())
    p.data = torch.randn(shape)
    p.grad = torch.ones(shape)
    before = p.detach().clone()
    for act in (optimizer.step, lambda: optimizer.step_parameter(p)):
        with pytest.raises(ValueError, match=rf"shape \({shape[0]}, {shape[1]}\) has a mask of 10 bytes"):
            act()
    assert torch.equal(p, before)
    with pytest.raises(ValueError, match="bool tensor of shape"):
        optimizer.set_mask(p, torch.ones(4, 20, dtype=torch.bool))
    other = SPAM([nn.Parameter(torch.randn(shape))], density=0.5)
    with pytest.raises(ValueError, match=r"'mask' of parameter 0.*belongs to another model, and nothing was loaded"):
        other.load_state_dict(saved)


def test_a_density_that_keeps_nothing_is_told_once():
    def untrained(density, *shapes):
        return SPAM([{"params": [nn.Parameter(torch.ones(s))]} for s in shapes], density=density)

    with pytest.warns(UserWarning, match=r"rounds to 0 for parameters of shape \(4, 5\), \(2, 3\), which") as told:
        optimizer = untrained(0.01, (4, 5), (40, 50), (2, 3), (7,))
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        untrained(0.1, (4, 5), (0, 3), (7,))
        late = nn.Parameter(torch.ones(3, 3), requires_grad=False)
        optimizer.add_param_group({"params": [late]})
    late.requires_grad_(True)
    late.grad = torch.ones(3, 3)
    with pytest.warns(UserWarning, match=r"shape \(3, 3\)"):
        optimizer.step()
    assert torch.equal(late, torch.ones(3, 3))


def test_official_names_and_per_group_hyperparameters():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    groups = [{"params": [a], "update_proj_gap": 5}, {"params": [b], "total_T": 9, "lr": 0.5, "theta": 0.5}]
    optimizer = StableSPAM(groups, total_T=40, DeltaT=300, theta=0.9)
    first, second = optimizer.param_groups
    assert (first["reset_interval"], first["total_steps"], first["gamma3"]) == (5, 40, 0.9)
    assert (second["reset_interval"], second["total_steps"], second["gamma3"], second["lr"]) == (300, 9, 0.5, 0.5)
    assert SPAM([a], warmup_epoch=7, DeltaT=11).param_groups[0]["warmup_steps"] == 7
    with pytest.raises(ValueError, match="two names of one setting"):
        StableSPAM([{"params": [a], "total_T": 4, "total_steps": 4}])


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (StableSPAM, {"lr": -1.0}, "lr=-1.0 is not a number >= 0"),
        (StableSPAM, {"betas": (0.9, 1.0)}, r"betas=.* is not two numbers in \[0, 1\)"),
        (StableSPAM, {"gamma1": 1.5}, "gamma1=1.5"),
        (StableSPAM, {"reset_interval": 2.5}, "reset_interval=2.5 is not a whole number"),
        (StableSPAM, {"total_steps": 0}, "total_steps=0"),
        (StableSPAM, {"variant": "v2"}, "'paper' or 'official'"),
        (StableSPAM, {"lr": float("nan")}, "lr=nan"),
        (SPAM, {"density": 0.0}, "density=0.0"),
        (SPAM, {"threshold": -5}, "threshold=-5"),
        (SPAM, {"warmup_steps": -1}, "warmup_steps=-1"),
    ],
)
def test_values_out_of_range_are_refused_in_constructor_and_groups(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls([nn.Parameter(torch.ones(2))], **options)
    if "fused" not in options:
        with pytest.raises(ValueError, match=message):
            cls([{"params": [nn.Parameter(torch.ones(2))], **options}])


def test_mistyped_names_are_refused_with_a_hint():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="unknown argument 'gama1'; did you mean 'gamma1'"):
        StableSPAM([p], gama1=0.5)
    with pytest.raises(ValueError, match="unknown option 'weight_deacy'; did you mean 'weight_decay'"):
        StableSPAM([{"params": [p], "weight_deacy": 0.1}])
    StableSPAM([{"params": [p], "layer_name": "ours to keep", "lr_scale": 1.0}])


def test_a_failed_group_leaves_the_optimizer_as_it_was():
    p = nn.Parameter(torch.ones(2))
    optimizer = StableSPAM([p])
    for bad in (
        {"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]},
        {"params": [nn.Parameter(torch.ones(2))], "lr": -1},
    ):
        with pytest.raises(ValueError):
            optimizer.add_param_group(bad)
        assert len(optimizer.param_groups) == 1 and len(optimizer.state) == 1


def test_a_group_added_late_joins_the_clock():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = StableSPAM([a])
    for _ in range(5):
        a.grad = torch.ones(2)
        optimizer.step()
    optimizer.add_param_group({"params": [b]})
    assert optimizer.param_groups[1]["t"] == 5
    assert float(optimizer.state[b]["n"]) == 0


def test_statistics_come_in_parameter_order_with_nan_for_absent_gradients():
    params = [
        nn.Parameter(torch.ones(2)),
        nn.Parameter(torch.ones(3, dtype=torch.float64)),
        nn.Parameter(torch.ones(4)),
    ]
    optimizer = StableSPAM(params)
    params[1].grad = torch.full((3,), 3.0, dtype=torch.float64)
    params[2].grad = torch.full((4,), 5.0)
    optimizer.step()
    peaks = optimizer.stats["grad_max"]
    assert torch.isnan(peaks[0]) and peaks[1:].tolist() == [3.0, 5.0]
    assert set(optimizer.stats) == {
        "grad_max",
        "grad_norm",
        "norm_after",
        "clip_limit",
        "clipped",
        "gain",
        "update_rms",
        "skipped",
    }


def test_a_closure_runs_once_with_gradients_on_and_its_value_comes_back():
    model, optimizer = build(MAKERS["stable_spam"])
    calls = []

    def closure():
        optimizer.zero_grad()
        calls.append(torch.is_grad_enabled())
        loss = model(torch.tensor([[1, 2]])).square().sum()
        loss.backward()
        return loss

    assert torch.is_tensor(optimizer.step(closure)) and calls == [True]


def test_sparse_gradients_are_refused_before_anything_changes():
    model = nn.Embedding(5, 3, sparse=True)
    other = nn.Parameter(torch.ones(2))
    optimizer = StableSPAM([other, *model.parameters()])
    model(torch.tensor([1])).sum().backward()
    other.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="does not take sparse gradients"):
        optimizer.step()
    assert torch.equal(other, torch.ones(2)) and optimizer.param_groups[0]["t"] == 0


def test_odd_tensors_are_taken():
    params = [nn.Parameter(torch.ones(shape)) for shape in [(), (0,), (1,), (3, 0), (2, 3, 4, 5)]]
    for make in (StableSPAM, SPAM, lambda ps: SPAM(ps, density=0.5)):
        optimizer = make(params)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert all(torch.isfinite(p).all() for p in params)


def test_copies_step_alike():
    model, optimizer = build(MAKERS["spam_sparse"])
    train(model, optimizer, range(5))
    twin_model, twin = copy.deepcopy((model, optimizer))
    assert train(model, optimizer, range(5, 15)) == train(twin_model, twin, range(5, 15))


def test_the_global_random_state_is_untouched():
    torch.manual_seed(3)
    np.random.seed(3)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    p = nn.Parameter(torch.ones(30, 40))
    optimizer = SPAM([p], density=0.5, reset_interval=2)
    for _ in range(5):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert torch.equal(before, torch.get_rng_state()) and (numpy_before == np.random.get_state()[1]).all()


def test_importing_is_light_and_silent():
    code = """
import sys, time, torch, numpy
before = set(sys.modules)
start = time.process_time()  # a busy machine makes no import slower
import evenstep
evenstep.StableSPAM, evenstep.SPAM, evenstep.SCALE, evenstep.stabilize
seconds = time.process_time() - start
new = {name.split(".")[0] for name in set(sys.modules) - before}
allowed = {"evenstep", "torch", "numpy", *sys.stdlib_module_names}
foreign = sorted(new - allowed)
assert not foreign, foreign
assert not torch.cuda.is_initialized()
assert seconds < 0.3, seconds
"""
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""


def test_eight_bit_moments_say_nothing_about_libraries_for_gpus():
    """torchao logs several lines on a CPU while it is imported."""
    pytest.importorskip("torchao")
    script = "import torch, evenstep; evenstep.StableSPAM([torch.nn.Parameter(torch.ones(4096))], state='int8')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("cls", [StableSPAM, SPAM, SCALE])
def test_options_are_declared_as_the_constructor_and_its_documentation_have_them(cls):
    signature = inspect.signature(cls).parameters
    own = {name: x.default for name, x in signature.items() if name not in ("params", "fused", "official")}
    assert {option.name: option.default for option in cls.OPTIONS} == own
    for option in cls.OPTIONS:
        assert option.range.holds(option.default) and option.help
        assert option.name in cls.__doc__ and all(alias in cls.__doc__ for alias in option.aliases)


def test_options_are_read_without_torch():
    code = "import sys, evenstep.optim.options as o; assert o.STABLE_SPAM and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
