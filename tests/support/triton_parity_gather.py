"""The kernel that gathers samples of many tensors, against torch.take."""

import torch
from triton_support import DEVICE, randn

from evenstep.telemetry.gather import can_gather, gathered


def test_samples_of_many_tensors_are_those_of_take():
    tensors = [randn(50), None, randn(7, 300, dtype=torch.bfloat16), randn(0), randn(3, 5), randn(40).half()]
    where = torch.stack([torch.randint(max(1, 0 if x is None else x.numel()), (200,)) for x in tensors]).to(DEVICE)
    for _ in range(2):  # the second time from the cached table, after the values have changed
        found = gathered(tensors, where)
        for row, at, x in zip(found, where, tensors, strict=True):
            if x is None or not x.numel():
                assert row.isnan().all()
            else:
                assert torch.equal(row, torch.take(x, at).float())
                x.mul_(2.0)


def test_what_a_kernel_cannot_read_is_left_to_torch():
    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)
    assert can_gather([randn(4), None], device)
    assert not can_gather([randn(4, 3).t()], device)
    assert not can_gather([randn(4).double()], device)
    assert not can_gather([randn(4)], torch.device("meta"))
