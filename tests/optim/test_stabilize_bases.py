"""stabilize over the optimizers people use: each is itself without transforms, trains, resets, resumes, skips."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from evenstep import AdaClip, AdaGN, NormClip, SpikeClip, stabilize


def _pytorch_optimizer_lion(params):
    return pytest.importorskip("pytorch_optimizer").Lion(params, lr=0.01)


def _torchao(params):
    return pytest.importorskip("torchao.optim").AdamW8bit(params, lr=0.01)


def _bitsandbytes(params):
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit(params, lr=0.01)


BASES = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
    "AdamW amsgrad": lambda params: torch.optim.AdamW(params, lr=0.01, amsgrad=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05),
    "SGD momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=0.01),
    "Muon": lambda params: torch.optim.Muon(params, lr=0.01),
    "Lion": _pytorch_optimizer_lion,
    "torchao AdamW8bit": _torchao,
    "bitsandbytes AdamW8bit": _bitsandbytes,
}


@pytest.fixture(autouse=True)
def eager():
    """torchao compiles its step, which is not what is tested here."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def make(name, *transforms, **options):
    """Matrices of 64 x 64, the smallest that are kept in 8 bits; Muon takes matrices alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 64, bias=False))
    return model, stabilize(BASES[name](list(model.parameters())), *transforms, **options)


def train(model, optimizer, steps):
    for i in steps:
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(i))
        loss = (model(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def decoded(value):
    plain = value.dequantize() if hasattr(value, "dequantize") and type(value) is not torch.Tensor else value
    return plain.clone() if isinstance(plain, torch.Tensor) else plain


def state_of(optimizer, p):
    return {key: decoded(value) for key, value in optimizer.state[p].items()}


@pytest.mark.parametrize("name", BASES)
def test_without_transforms_it_is_the_base_to_the_bit(name):
    model, optimizer = make(name)
    bare_model, wrapped = make(name)
    bare = wrapped.base
    assert train(model, optimizer, range(6)) == train(bare_model, bare, range(6))
    assert same(model, bare_model)


@pytest.mark.parametrize("name", BASES)
def test_it_trains_behind_transforms(name):
    model, optimizer = make(name, SpikeClip(), AdaClip(), AdaGN(), NormClip(), reset_interval=15)
    first = train(model, optimizer, range(1))
    assert train(model, optimizer, range(1, 40)) < 0.9 * first


@pytest.mark.parametrize("name", BASES)
def test_a_reset_makes_it_new(name):
    model, optimizer = make(name, reset_interval=4)
    train(model, optimizer, range(3))
    twin = copy.deepcopy(model)
    fresh = BASES[name](list(twin.parameters()))
    train(model, optimizer, [3])
    train(twin, fresh, [3])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7)
        for key, value in state_of(optimizer, p).items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                torch.testing.assert_close(value, decoded(fresh.state[q][key]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", BASES)
def test_it_resumes_to_the_bit(name):
    model, optimizer = make(name, AdaClip(), AdaGN(), reset_interval=5)
    train(model, optimizer, range(7))
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), model.state_dict()), file)
    file.seek(0)
    saved, weights = torch.load(file)
    again, resumed = make(name, AdaClip(), AdaGN(), reset_interval=5)
    resumed.load_state_dict(saved)
    again.load_state_dict(weights)
    assert train(model, optimizer, range(7, 14)) == train(again, resumed, range(7, 14))
    assert same(model, again)


@pytest.fixture
def device(monkeypatch):
    """As if parameters were on an accelerator, whose values are not free to read."""
    monkeypatch.setattr("evenstep.optim.base_optimizer.on_host", lambda x: False)


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("name", BASES)
def test_on_a_device_what_the_base_did_is_undone(device, name, steps_before):
    test_a_bad_gradient_skips_its_tensor_alone(name, "restore", steps_before, on_host=False)


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("nonfinite", ["restore", "skip"])
@pytest.mark.parametrize("name", BASES)
def test_a_bad_gradient_skips_its_tensor_alone(name, nonfinite, steps_before, on_host=True):
    model, optimizer = make(name, nonfinite=nonfinite)
    for i in range(steps_before):
        train(model, optimizer, [i])
    first, second = model.parameters()
    for p in (first, second):
        p.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) * 0.1
    first.grad[3, 4] = math.nan
    weights, other, state = first.detach().clone(), second.detach().clone(), state_of(optimizer, first)
    optimizer.step()
    assert torch.equal(first, weights) and not torch.equal(second, other)
    after = state_of(optimizer, first)
    if steps_before:
        assert [
            key for key in state if isinstance(state[key], torch.Tensor) and not torch.equal(state[key], after[key])
        ] == []
    if on_host or "bitsandbytes" not in name:  # a Python count cannot be put back
        assert after.get("step", 0) == state.get("step", 0)
    assert float(optimizer.statistics[first]["skipped"]) == 1 and float(optimizer.statistics[second]["skipped"]) == 0
    train(model, optimizer, [9])
    assert torch.isfinite(first).all() and not torch.equal(first, weights)


def test_a_bad_gradient_on_the_step_of_a_reset_is_undone_on_a_device(device):
    test_a_bad_gradient_on_the_step_of_a_reset_resets_nothing_of_its_tensor("restore")


@pytest.mark.parametrize("nonfinite", ["restore", "skip"])
def test_a_bad_gradient_on_the_step_of_a_reset_resets_nothing_of_its_tensor(nonfinite):
    model, optimizer = make("AdamW", reset_interval=4, nonfinite=nonfinite)
    train(model, optimizer, range(3))
    first, second = model.parameters()
    first.grad, second.grad = torch.full_like(first, math.inf), torch.ones_like(second)
    state = state_of(optimizer, first)
    optimizer.step()
    assert all(torch.equal(value, optimizer.state[first][key]) for key, value in state.items())
    assert float(optimizer.state[second]["step"]) == 1


def test_zeros_are_what_the_base_sees_on_request():
    model, optimizer = make("AdamW", nonfinite="zero")
    bare_model, wrapped = make("AdamW")
    train(model, optimizer, range(3))
    train(bare_model, wrapped.base, range(3))
    for m, bad in ((model, math.nan), (bare_model, 0.0)):
        for p in m.parameters():
            p.grad = torch.full_like(p, bad)
    optimizer.step()
    wrapped.base.step()
    assert same(model, bare_model)
    with pytest.raises(ValueError, match="nonfinite='drop' is not"):
        make("AdamW", nonfinite="drop")


def test_a_base_that_needs_its_closure_is_refused():
    with pytest.raises(TypeError, match="LBFGS evaluates its closure many times"):
        stabilize(torch.optim.LBFGS([nn.Parameter(torch.ones(2))]))


@pytest.mark.parametrize("name", ["AdamW", "RMSprop", "Adagrad", "Adamax", "NAdam", "Rprop", "Adadelta", "ASGD"])
def test_checkpoint_tools_load_the_state_of_any_base(name):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    torch.manual_seed(0)
    models = [nn.Linear(4, 3), nn.Linear(4, 3)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [stabilize(getattr(torch.optim, name)(m.parameters(), lr=0.01), AdaClip(), AdaGN()) for m in models]

    def step(model, optimizer, seed):
        draw = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=draw)
        optimizer.step()
        optimizer.zero_grad()

    for seed in range(3):
        step(models[0], optimizers[0], seed)
    saved = copy.deepcopy(get_optimizer_state_dict(models[0], optimizers[0]))
    models[1].load_state_dict(models[0].state_dict())
    set_optimizer_state_dict(models[1], optimizers[1], saved)
    for seed in range(3, 6):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, seed)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
