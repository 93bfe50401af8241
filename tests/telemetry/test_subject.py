"""Steps that run the backward pass within, by a closure: the monitor looks after it, once."""

import pytest
import torch
from torch import nn

from evenstep import AdaGN, SpikeMonitor, StableSPAM, stabilize


class Kept(list):
    """A sink that keeps what it gets."""

    write = list.append

    def close(self):
        """Nothing is held."""

    def of(self, kind):
        return [record for record in self if record.get("kind") == kind]


BUILDS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
    "lbfgs": lambda params: torch.optim.LBFGS(params, lr=1e-2, max_iter=3),
    "stable_spam": lambda params: StableSPAM(params, lr=1e-2),
    "stabilize": lambda params: stabilize(torch.optim.AdamW(params, lr=1e-2), AdaGN()),
}


@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize("name", BUILDS)
def test_norms_and_losses_are_those_of_the_first_evaluation(name, by_keyword):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer, kept, seen = BUILDS[name](model.parameters()), Kept(), []

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        evaluations.append([float(loss), *(float(p.grad.norm()) for p in model.parameters())])
        return loss

    with SpikeMonitor(model, optimizer, every=1, parameters_every=1, sinks=[kept], say=None):
        for _ in range(4):
            x, evaluations = torch.randn(8, 4), []
            optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
            seen.append(evaluations[0])
    written = [
        [window["losses"][0], *numbers["grad_norm"]]
        for window, numbers in zip(kept.of("window"), kept.of("parameters"), strict=True)
    ]
    torch.testing.assert_close(torch.tensor(written), torch.tensor(seen), rtol=2e-3, atol=1e-6)


def test_a_loss_that_was_told_stays():
    model, kept = nn.Linear(2, 1), Kept()
    optimizer = torch.optim.AdamW(model.parameters())

    def closure():
        model(torch.ones(1, 2)).sum().backward()
        return torch.tensor(5.0)

    with SpikeMonitor(model, optimizer, every=1, sinks=[kept], say=None) as monitor:
        monitor.observe(7.0)
        optimizer.step(closure)
        optimizer.step(closure)
    assert [window["losses"] for window in kept.of("window")] == [[7.0], [5.0]]
