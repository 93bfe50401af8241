"""Cautious weight decay and the hyperball against their equations in NumPy, in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from evenstep import SPAM, AdaClip, StableSPAM, stabilize
from evenstep.optim import cautious_decay, hyperball

LR, DECAY, SCALE = 0.05, 0.7, 3.0


def adamw(params, **more):
    return torch.optim.AdamW(params, lr=LR, betas=(0.8, 0.9), eps=1e-6, **more)


def gradients(step):
    return np.random.default_rng(step).standard_normal((5, 3))


class Adam:
    """The update u_t of Adam without decay."""

    def __init__(self):
        self.m, self.v, self.t = 0.0, 0.0, 0

    def __call__(self, g):
        self.t += 1
        self.m, self.v = 0.8 * self.m + 0.2 * g, 0.9 * self.v + 0.1 * g * g
        return self.m / (1 - 0.8**self.t) / (np.sqrt(self.v / (1 - 0.9**self.t)) + 1e-6)


def test_cautious_decay_follows_the_paper():
    """W - lr (u + decay [u W >= 0] W), equation 2 of arXiv:2510.12402."""
    w = nn.Parameter(torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    optimizer, adam, expected = adamw([w], weight_decay=DECAY), Adam(), w.detach().numpy().copy()
    cautious_decay(optimizer)
    shares = []
    for step in range(12):
        w.grad = torch.from_numpy(gradients(step))
        optimizer.step()
        u = adam(gradients(step))
        shares.append((u * expected >= 0).mean())
        expected = expected - LR * (u + DECAY * (u * expected >= 0) * expected)
        np.testing.assert_allclose(w.detach().numpy(), expected, rtol=1e-12, atol=1e-14)
    assert 0.2 < np.mean(shares) < 0.8
    assert optimizer.param_groups[0]["weight_decay"] == DECAY


def test_the_hyperball_follows_its_publication():
    """Norm(W - eta ||W_0|| Norm(u)) ||W_0|| for the matrix; Adam for the vector."""
    w = nn.Parameter(torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    b, plain = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    optimizer, other, adam = adamw([w, b], weight_decay=0.0), adamw([plain], weight_decay=0.0), Adam()
    expected = w.detach().numpy().copy()
    radius = np.linalg.norm(expected)
    hyperball(optimizer, [w], SCALE)
    for step in range(12):
        w.grad = torch.from_numpy(gradients(step))
        b.grad, plain.grad = (torch.from_numpy(gradients(step)[0]) for _ in range(2))
        optimizer.step()
        other.step()
        u = adam(gradients(step))
        moved = expected - SCALE * LR * radius * u / np.linalg.norm(u)
        expected = moved / np.linalg.norm(moved) * radius
        np.testing.assert_allclose(w.detach().numpy(), expected, rtol=1e-11, atol=1e-14)
    assert torch.equal(b, plain)


@pytest.mark.parametrize("rule", ["cautious", "hyperball"])
def test_skipped_tensors_and_untrained_entries_stay_as_they_are(rule):
    def applied(optimizer, p):
        cautious_decay(optimizer) if rule == "cautious" else hyperball(optimizer, [p])
        return optimizer

    torch.manual_seed(0)
    decay = DECAY if rule == "cautious" else 0.0
    p, q = (nn.Parameter(torch.randn(6, 4)) for _ in range(2))
    skipping = applied(StableSPAM([p], lr=LR, weight_decay=decay), p)
    restoring = applied(stabilize(adamw([q], weight_decay=decay), AdaClip()), q)
    for one, optimizer in ((p, skipping), (q, restoring)):
        before = one.detach().clone()
        one.grad = torch.full((6, 4), torch.nan)
        optimizer.step()
        assert torch.equal(one, before)
        one.grad = torch.randn(6, 4)
        optimizer.step()
        assert not torch.equal(one, before)
    if rule == "cautious":
        sparse = SPAM([p], lr=LR, density=0.5, weight_decay=DECAY)
        cautious_decay(sparse)
        before = p.detach().clone()
        p.grad = torch.randn(6, 4)
        sparse.step()
        assert torch.equal(p == before, ~sparse.get_mask(p))


def test_the_groups_are_whole_after_an_error_and_schedulers_go_on():
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = adamw([p], weight_decay=DECAY)
    cautious_decay(optimizer)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    p.grad = torch.ones(2, 2).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert optimizer.param_groups[0]["weight_decay"] == DECAY
    p.grad = torch.ones(2, 2)
    loss = optimizer.step(lambda: torch.tensor(3.0))
    schedule.step()
    assert (loss, optimizer.param_groups[0]["lr"]) == (3.0, LR / 2)


def test_what_does_not_go_together_is_refused():
    p = nn.Parameter(torch.ones(2, 2))
    half = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"cautious_decay: a parameter has dtype torch\.bfloat16"):
        cautious_decay(adamw([half]))
    with pytest.raises(ValueError, match="hyperball: 1 of the parameters are not in the optimizer"):
        hyperball(adamw([p], weight_decay=0.0), [nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match="weight decay has no use"):
        hyperball(adamw([p], weight_decay=0.1), [p])
