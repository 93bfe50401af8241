"""The loss: in fp32, token-weighted, and the same whether the logits exist whole or in chunks."""

import pytest
import torch
from torch import nn

from evenstep.errors import EvenstepError
from evenstep.models import ops
from tests.models.test_llama import batch, grads, small


@pytest.fixture(params=["linear_cross_entropy", "checkpointed"])
def path(request, monkeypatch):
    """Both ways of chunking: PyTorch's own where it exists, and ours for PyTorch before 2.13."""
    if request.param == "checkpointed":
        monkeypatch.delattr(nn, "LinearCrossEntropyOptions", raising=False)
    elif not hasattr(nn, "LinearCrossEntropyOptions"):
        pytest.skip("this PyTorch has no linear_cross_entropy with options")
    return request.param


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk", [1, 5, 24, 1000])
def test_chunks_change_neither_loss_nor_gradients(path, reduction, chunk):
    model = small()
    tokens, targets = batch()
    targets = targets.clone()
    targets[0, :3] = -100  # left out, of the mean's count too
    plain = model.loss(tokens, targets, reduction=reduction)
    want = grads(model, plain)
    chunked = model.loss(tokens, targets, reduction=reduction, chunk=chunk)
    assert chunked.shape == () and chunked.dtype == torch.float32
    torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=1e-6)
    for name, g in grads(model, chunked).items():
        torch.testing.assert_close(g, want[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_the_two_ways_are_really_two(path, monkeypatch):
    calls = []
    inner = ops._checkpointed_cross_entropy
    monkeypatch.setattr(ops, "_checkpointed_cross_entropy", lambda *a: calls.append(1) or inner(*a))
    small().loss(*batch(), chunk=5)
    assert bool(calls) == (path == "checkpointed")


def test_a_head_that_was_swapped_is_still_used():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = small()
    head = Doubled(32, 61, bias=False)
    head.load_state_dict(model.lm_head.state_dict())
    model.lm_head = head
    torch.testing.assert_close(model.loss(*batch(), chunk=5), model.loss(*batch()))


def test_mean_is_over_tokens_and_sum_is_the_sum():
    model = small()
    tokens, targets = batch()
    logp = model(tokens).double().log_softmax(-1).gather(2, targets[..., None])
    torch.testing.assert_close(model.loss(tokens, targets).double(), -logp.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(model.loss(tokens, targets, reduction="sum").double(), -logp.sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_in_bf16_the_loss_is_taken_in_fp32(path, chunk, reduction):
    model = small().bfloat16()
    tokens, targets = batch()
    want = torch.nn.functional.cross_entropy(
        model(tokens).double().flatten(0, 1), targets.flatten(), reduction=reduction
    )
    got = model.loss(tokens, targets, reduction=reduction, chunk=chunk)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    want_grads = grads(model, model.loss(tokens, targets, reduction=reduction))
    for name, g in grads(model, got).items():
        torch.testing.assert_close(g, want_grads[name], rtol=0.05, atol=0.02 * want_grads[name].abs().max().item())


def test_evaluation_makes_no_gradients(path):
    model = small()
    with torch.no_grad():
        loss = model.loss(*batch(), chunk=5)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, model.loss(*batch()).detach())


def test_whole_logits_never_exist_in_a_chunked_loss(path):
    from torch.utils._python_dispatch import TorchDispatchMode

    rows = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == 61 and out.shape[0] != 32:
                rows.append(out.shape[0])  # not the head's weight transposed, [32, 61]
            return out

    model = small()
    with Watch():
        model.loss(*batch(), chunk=None).backward()
    assert max(rows) == 24
    if path == "linear_cross_entropy":
        return  # one opaque operator; its memory is measured in benchmarks/throughput.py
    rows.clear()
    with Watch():
        model.loss(*batch(), chunk=6).backward()
    assert max(rows) == 6


def test_wrong_options_are_one_clear_line():
    with pytest.raises(EvenstepError, match="reduction is 'none': choose 'mean' or 'sum'"):
        small().loss(*batch(), reduction="none")
    with pytest.raises(EvenstepError, match="chunk is 0: it is a number of rows of at least 1"):
        small().loss(*batch(), chunk=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_the_z_loss_is_that_of_palm(path, reduction, chunk):
    """Values and gradients equal those of autograd on the plain formula in float64."""
    model = small()
    tokens, targets = batch()
    targets = targets.clone()
    targets[0, :3] = -100
    cross_entropy, z_loss = got = model.loss(tokens, targets, reduction=reduction, chunk=chunk, z_loss=0.3)
    gradients = grads(model, got.sum())

    exact = small().double()
    rows, counts = exact(tokens).flatten(0, 1), targets.flatten() != -100
    lse = rows.logsumexp(1)[counts].square()
    want = torch.nn.functional.cross_entropy(rows, targets.flatten(), reduction=reduction)
    want_z = 0.3 * (lse.mean() if reduction == "mean" else lse.sum())
    torch.testing.assert_close(cross_entropy.double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(z_loss.double(), want_z, rtol=1e-6, atol=0)
    for name, g in grads(exact, want + want_z).items():
        torch.testing.assert_close(gradients[name].double(), g, rtol=1e-4, atol=1e-5)
