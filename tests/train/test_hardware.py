"""Advice about number formats, from what the processor does."""

import pytest
import torch

from evenstep.train import hardware

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "dtype, instructions, speed, line",
    [
        ("fp32", True, 3.1, "matrix products are 3.1 times as fast in bf16 on this CPU; --train.dtype bf16-autocast"),
        ("fp32", True, 1.1, None),
        ("fp32", False, 3.1, None),  # not measured at all
        ("bf16", False, 0.1, "train.dtype bf16: matrix products in bf16 take 10.0 times as long as in fp32"),
        ("bf16-autocast", True, 2.0, None),
    ],
)
def test_the_faster_number_format_is_offered(monkeypatch, dtype, instructions, speed, line):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(hardware, "bf16_speed", lambda: speed)
    found = hardware.bf16_advice(CPU, dtype)
    assert (found is None) == (line is None) and (found or "").startswith(line or "")


def test_the_speed_of_bf16_is_measured_once():
    first = hardware.bf16_speed()
    assert first > 0 and hardware.bf16_speed() == first
    assert hardware.bf16_advice(torch.device("cuda"), "bf16") is None
