"""Memory on demand: stored moments in 16 and 8 bits, and gradients that are freed while the backward pass goes on."""

import copy
import inspect
import io
import subprocess
import sys

import pytest
import torch
from torch import nn

from evenstep import SCALE, SPAM, StableSPAM
from evenstep.models import Llama, LlamaConfig

SHAPE = (64, 256)
MAKERS = {
    "stable_spam": lambda ps, **o: StableSPAM(ps, lr=0.01, reset_interval=4, **o),
    "stable_spam_official": lambda ps, **o: StableSPAM(ps, lr=0.01, reset_interval=4, variant="official", **o),
    "spam": lambda ps, **o: SPAM(ps, lr=0.01, reset_interval=4, warmup_steps=2, clip_start=1, **o),
    "spam_sparse": lambda ps, **o: SPAM(ps, lr=0.01, reset_interval=4, clip_start=1, density=0.5, **o),
    "scale_last": lambda ps, **o: SCALE([{"params": list(ps), "kind": "last"}], lr=0.01, **o),
}
every_optimizer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def parameters(*shapes):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in shapes or (SHAPE,)]


def fill(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def raw(value):
    """A state entry as plain tensors."""
    return [value.codes, value.scale, value.qmap] if hasattr(value, "codes") else [value]


def assert_same_state(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if not torch.is_tensor(value):
            assert ours[name] == value, name
            continue
        assert type(ours[name]) is type(value), name
        for a, b in zip(raw(ours[name]), raw(value), strict=True):
            assert torch.equal(a, b), name


# ---- stored moments ----


@pytest.mark.parametrize("stored", ["bf16", "int8"])
@every_optimizer
def test_resume_is_bitwise_exact_with_stored_moments(make, stored):
    if stored == "int8":
        pytest.importorskip("torchao")
    params = parameters()
    optimizer = make(params, state=stored)
    for step in range(6):
        fill(params, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save((params[0].detach(), optimizer.state_dict()), file)
    file.seek(0)
    value, saved = torch.load(file, weights_only=True)
    others = [nn.Parameter(value)]
    other = make(others, state=stored)
    other.load_state_dict(saved)
    assert_same_state(other.state[others[0]], optimizer.state[params[0]])
    for step in range(6, 11):
        for ps, o in ((params, optimizer), (others, other)):
            fill(ps, step)
            o.step()
    assert torch.equal(params[0], others[0])
    assert_same_state(other.state[others[0]], optimizer.state[params[0]])


@pytest.mark.parametrize("stored", ["bf16", "int8"])
@every_optimizer
def test_a_skipped_tensor_keeps_its_stored_moments_bit_for_bit(make, stored):
    if stored == "int8":
        pytest.importorskip("torchao")
    params = parameters()
    optimizer = make(params, state=stored)
    for step in range(3):
        fill(params, step)
        optimizer.step()
    before, value = copy.deepcopy(optimizer.state[params[0]]), params[0].detach().clone()
    for _ in range(2):  # the first of them is a reset
        fill(params, 9)
        params[0].grad[1, 2] = torch.nan
        optimizer.step()
    assert torch.equal(params[0], value)
    assert_same_state(optimizer.state[params[0]], before)


@pytest.mark.parametrize(("stored", "expected"), [("fp32", 8.0), ("bf16", 4.0), ("int8", 2 + 2 * 4 / 256)])
def test_bytes_per_entry(stored, expected):
    if stored == "int8":
        pytest.importorskip("torchao")
    [p] = parameters((512, 1024))
    state = StableSPAM([p], state=stored).state[p]
    size = sum(part.numel() * part.element_size() for value in state.values() for part in raw(value))
    assert size / p.numel() == pytest.approx(expected, rel=0.01)


def test_int8_without_torchao_is_one_clear_error_at_construction():
    code = """
import sys, torch
sys.modules["torchao"] = None
from evenstep import StableSPAM
try:
    StableSPAM([torch.nn.Parameter(torch.zeros(3))], state="int8")
except ImportError as error:
    assert "pip install torchao" in str(error) and "bf16" in str(error), error
else:
    raise SystemExit("no error")
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def train_llama(make, seed, steps=300):
    """Mean loss of the last 50 steps on the bytes of Python's own library."""
    text = "".join(inspect.getsource(sys.modules[name]) for name in ("argparse", "inspect", "subprocess", "copy"))
    data = torch.tensor(list(text.encode()))
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, max_seq_len=64
    )
    model, generator, losses = Llama(config), torch.Generator().manual_seed(seed), []
    optimizer = make(model.parameters())
    for _ in range(steps):
        starts = torch.randint(len(data) - 65, (8,), generator=generator)
        batch = torch.stack([data[i : i + 65] for i in starts])
        loss = model.loss(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-50:]) / 50


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda ps, **o: StableSPAM(ps, lr=2e-3, reset_interval=100, **o),
        lambda ps, **o: SPAM(ps, lr=2e-3, reset_interval=100, warmup_steps=20, **o),
    ],
    ids=["stable_spam", "spam"],
)
def test_stored_moments_train_as_well_as_fp32(make):
    """In the mean over seeds: the loss of one seed moves by up to 1.7 % either way with int8, and by 0.7 % with bf16.

    Measured against fp32 (2 cores, seeds 0 to 7, mean and its standard error): SPAM with int8 -0.28 % +- 0.29 %, with
    bf16 -0.09 % +- 0.14 %.
    """
    pytest.importorskip("torchao")
    allowed = {"bf16": 1.005, "int8": 1.01}  # more than two standard errors of a mean over four seeds
    ratios = {stored: [] for stored in allowed}
    for seed in range(4):
        fp32 = train_llama(lambda ps: make(ps, state="fp32"), seed)
        assert fp32 < 2.6
        for stored, of_seeds in ratios.items():
            of_seeds.append(train_llama(lambda ps, s=stored: make(ps, state=s), seed) / fp32)
    print(ratios)
    for stored, of_seeds in ratios.items():
        assert sum(of_seeds) / 4 < allowed[stored], ratios


# ---- gradient release ----

RELEASED = MAKERS | {
    "scale": lambda ps, **o: SCALE([{"params": list(ps), "kind": "hidden"}], lr=0.01, **o),
    "two_groups": lambda ps, **o: StableSPAM(
        [{"params": ps[:1], "reset_interval": 3}, {"params": ps[1:], "weight_decay": 0.1}], lr=0.01, **o
    ),
}
del RELEASED["stable_spam_official"]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("make", RELEASED.values(), ids=RELEASED)
def test_step_parameter_is_step_bit_for_bit(make, rounding):
    """Sweeps by parameter, in changing order, with regular steps in between and a gradient missing now and then."""
    results = []
    for released in (False, True):
        params = [nn.Parameter(p.detach().bfloat16()) for p in parameters((8, 16), (5, 8), (4, 3))]
        optimizer = make(params, rounding=rounding)
        for step in range(12):
            for p in params:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
            if step % 5 == 2:
                params[0].grad = None
            if not released or step in (4, 5, 9):
                optimizer.step()
                continue
            late = params[step % 3]  # not released, left to step()
            for p in params[step % 3 :] + params[: step % 3]:
                if step % 4 or p is not late:
                    optimizer.step_parameter(p)
                    p.grad = None
            optimizer.step()
        results.append((params, optimizer))
    (params, optimizer), (others, other) = results
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        ours = {name: value for name, value in other.state[q].items() if name != "released_at"}
        assert_same_state(ours, optimizer.state[p])
    assert (
        [g["t"] for g in optimizer.param_groups]
        == [g["t"] for g in other.param_groups]
        == [12] * len(optimizer.param_groups)
    )


def test_released_sweeps_resume():
    def sweep(params, optimizer, steps):
        for step in steps:
            fill(params, step)
            for p in params:
                optimizer.step_parameter(p)

    params = parameters((4, 3), (3, 2))
    optimizer = MAKERS["stable_spam"](params)
    sweep(params, optimizer, range(5))
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = MAKERS["stable_spam"](others)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    sweep(params, optimizer, range(5, 10))
    sweep(others, other, range(5, 10))
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


def test_step_parameter_refuses_what_it_cannot_do():
    params = parameters()
    optimizer = MAKERS["spam"](params)
    with pytest.raises(ValueError, match="not in this optimizer"):
        optimizer.step_parameter(nn.Parameter(torch.zeros(2)))
    optimizer.step_parameter(params[0])  # no gradient: nothing to do
    assert optimizer.param_groups[0]["t"] == 0
    capturable = MAKERS["spam"](params, capturable=True)
    fill(params, 0)
    with pytest.raises(ValueError, match="capturable"):
        capturable.step_parameter(params[0])


def peak_gradient_bytes(released):
    """Largest sum of the sizes of the parameters' gradients that are alive at once, and the parameters afterwards."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    optimizer = StableSPAM(model.parameters(), lr=0.01)
    peak = 0

    def release(p):
        nonlocal peak
        peak = max(peak, sum(q.grad.numel() * q.element_size() for q in model.parameters() if q.grad is not None))
        if released:
            optimizer.step_parameter(p)
            p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(release)
    for step in range(3):
        model(torch.randn(4, 64, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        if not released:
            optimizer.step()
            optimizer.zero_grad()
    return peak, [p.detach() for p in model.parameters()], sum(p.numel() * 4 for p in model.parameters())


def test_gradient_release_keeps_one_gradient_at_a_time():
    peak, params, size = peak_gradient_bytes(released=True)
    before, expected, _ = peak_gradient_bytes(released=False)
    for p, q in zip(params, expected, strict=True):
        assert torch.equal(p, q)
    assert before == size
    assert peak <= 64 * 64 * 4 + 64 * 4


@pytest.mark.parametrize("fused", [None, False])
def test_an_8_bit_second_moment_beside_a_spike_is_not_lost(fused):
    """Its code would be 0, and the next update of that entry m / eps: hundreds of times the learning rate."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(16, 256)) for _ in range(2)]
    coded = SPAM(params[:1], state="int8", fused=fused, reset_interval=3)
    exact = SPAM(params[1:], fused=False, reset_interval=3)
    for step in range(6):
        grad = torch.randn(16, 256) * 0.1
        if step == 2:  # a reset, after which nothing is clipped
            grad[0, 5] = 2000.0
        for p, optimizer in zip(params, (coded, exact), strict=True):
            p.grad = grad.clone()
            optimizer.step()
    assert (params[0] - params[1]).abs().max() < 2e-4  # a fifth of the learning rate
    codes = coded.state[params[0]]["exp_avg_sq"].codes
    assert (codes > 0).all()
