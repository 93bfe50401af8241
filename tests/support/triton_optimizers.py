"""Whole steps of the optimizers through the Triton kernels, as `evenstep doctor --check` does them."""

import pytest
import torch
from triton_support import DEVICE, KERNELS

from evenstep.optim import SCALE, SPAM, StableSPAM, fused, self_check

CASES = [
    case
    for owner in (None, StableSPAM, SPAM, SCALE)
    for case in (self_check.cases() if owner is None else self_check.cases(owner))
    if "cuda" in case.devices
]
BOTH = torch.float32, torch.bfloat16


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_steps_by_kernels_are_those_of_the_plain_code(case, dtype, monkeypatch):
    if dtype not in case.dtypes:
        pytest.skip("rounding makes no difference in fp32")
    for module in (fused, self_check):
        monkeypatch.setattr(module, "kernels_for", lambda device: KERNELS)
    outcome = self_check.tried(case, self_check.numbers(torch.device(DEVICE), dtype))
    assert outcome.problem is None
