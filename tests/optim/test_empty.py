"""Optimizers with nothing to update: no gradients, no parameters, no groups."""

import pytest
import torch

from evenstep import SCALE, SPAM, AdaGN, SpikeMonitor, StableSPAM, scale_groups, stabilize

MAKE = {
    "StableSPAM": lambda model: StableSPAM(model.parameters()),
    "SPAM": lambda model: SPAM(model.parameters()),
    "SCALE": lambda model: SCALE(scale_groups(model, last="0.weight")),
    "stabilize": lambda model: stabilize(torch.optim.AdamW(model.parameters()), AdaGN()),
}


def parameters_removed(optimizer):
    for group in optimizer.param_groups:
        group["params"].clear()


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("emptied", [lambda optimizer: None, parameters_removed], ids=["no gradient", "no parameter"])
@pytest.mark.parametrize("name", MAKE)
def test_a_step_without_work_does_nothing(name, emptied, watched):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    optimizer = MAKE[name](model)
    if watched:
        SpikeMonitor(model, optimizer)
    emptied(optimizer)
    optimizer.step()
    assert optimizer.stats == {}
