"""The loss: in fp32, token-weighted, and the same whether the logits exist whole or in chunks."""

import pytest
import torch
from torch import nn

from evenstep.errors import EvenstepError
from evenstep.models import ops
from tests.models.test_llama import batch, grads, small


@pytest.fixture(params=["own_backward", "kernel", "compiled", "checkpointed"])
def path(request, monkeypatch):
    """The ways of chunking: with a plain head, by a CPU's kernel, as a GPU compiles the formulas, and with any other
    head."""
    if request.param != "kernel":
        monkeypatch.setattr(ops, "_kernel_serves", lambda: False)
    elif not ops._kernel_serves():
        pytest.skip("no CPU kernels here")
    if request.param == "checkpointed":
        monkeypatch.setattr(ops, "_is_plain", lambda hidden, head: False)
    if request.param == "compiled":  # the formulas alone: compiling takes seconds
        monkeypatch.setattr(torch, "compile", lambda function: function)
        monkeypatch.setattr(ops, "_terms", ops._compiled_terms.__wrapped__())
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


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("z_loss", [None, 0.05])
def test_the_gradients_of_the_forward_pass_are_the_derivatives(path, z_loss, cap):
    """In float64: finite differences confirm the chunked loss, with targets left out and a chunk that is not full."""
    if path == "checkpointed":
        pytest.skip("its gradients are autograd's, and its loss is in fp32")
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    head = nn.Linear(3, 5, bias=False, dtype=torch.float64)
    targets = torch.tensor([1, -100, 4, 0, 2, -100, 3])

    def loss():
        return ops.chunked_cross_entropy(hidden, head, targets, "mean", 3, z_loss, cap).sum()

    loss().backward()
    for x in (hidden, head.weight):
        for entry, slope in zip(x.detach().view(-1), x.grad.view(-1), strict=True):
            values = []
            for change in (1e-5, -2e-5):
                entry += change
                with torch.no_grad():
                    values.append(loss())
            entry += 1e-5
            torch.testing.assert_close((values[0] - values[1]) / 2e-5, slope, rtol=1e-6, atol=1e-9)


def test_a_chunk_of_bf16_rounds_as_the_whole(path):
    """The weight's gradient is summed over chunks in fp32: many chunks are as exact as one."""
    model = small().bfloat16()
    exact = small().bfloat16().double()
    want = grads(exact, exact.loss(*batch()))["lm_head.weight"]

    def error(chunk):
        return (grads(model, model.loss(*batch(), chunk=chunk))["lm_head.weight"].double() - want).norm() / want.norm()

    assert error(2) < (0.02 if path == "checkpointed" else 1.2 * error(24)) and error(24) < 0.01


def test_a_frozen_half_gets_no_gradient():
    for frozen in ("lm_head", "model"):
        model, whole = small(), small()
        getattr(model, frozen).requires_grad_(False)
        model.loss(*batch(), chunk=5).backward()
        want = grads(whole, whole.loss(*batch()))
        for name, p in model.named_parameters():
            assert (p.grad is None) == name.startswith(frozen)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, want[name], rtol=1e-4, atol=1e-5)


def test_what_a_chunked_loss_cannot_do_is_refused_not_wrong():
    model = small()
    loss = model.loss(*batch(), chunk=5)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"a chunked loss allows one backward\(\)"):
        loss.backward()
    with pytest.raises(RuntimeError, match="the gradients of cross entropy and z-loss differ"):
        model.loss(*batch(), chunk=5, z_loss=0.1)[0].backward()


def test_no_targets_at_all_are_no_error(path):
    model = small()
    tokens, targets = batch()
    loss = model.loss(tokens, torch.full_like(targets, -100), reduction="sum", chunk=5)
    assert loss.item() == 0 and all(g.abs().max() == 0 for g in grads(model, loss).values())
    positions = torch.arange(12).expand(2, 12)
    assert model.loss(tokens, torch.full_like(targets, -100), reduction="sum", chunk=5, positions=positions) == 0
