"""The formats give the recorded outputs of torchao and of the official code, to the bit."""

import dataclasses

import pytest
import torch
from lowbit_support import normal, recorded

from evenstep.lowbit import FORMATS, fake_quantize, quantize
from evenstep.lowbit.formats import GRIDS, get_grid

pytestmark = pytest.mark.usefixtures("either_lowbit_code")


def test_e2m1_codes_and_values_are_ocps():
    z, grid = recorded("e2m1"), GRIDS["e2m1"]
    values = grid.round(z["sweep"].clone())
    assert torch.equal(values, z["values"])
    assert torch.equal(grid.encode(values, z["sweep"].signbit()), z["codes"])
    assert torch.equal(grid.values(), z["table"])


@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "rceil"])
def test_mxfp4_is_torchaos_to_the_bit(rule):
    z = recorded("mxfp4_normal_fp32")
    q = quantize(z["x"], f"mxfp4-{rule}")
    assert torch.equal(q.codes, z[f"{rule}_codes"])
    assert torch.equal(q.scale.view(torch.uint8), z[f"{rule}_scale_e8m0"])
    assert torch.equal(fake_quantize(z["x"], f"mxfp4-{rule}"), z[f"{rule}_dq"])


@pytest.mark.parametrize(("name", "key"), [("nvfp4-block", "single"), ("nvfp4", "two")])
def test_nvfp4_is_torchaos_to_the_bit(name, key):
    z = recorded("nvfp4_normal_fp32")
    q = quantize(z["x"], name)
    assert torch.equal(q.codes, z[f"{key}_codes"])
    assert torch.equal(q.scale.float(), z[f"{key}_scale_e4m3_as_f32"])
    assert torch.equal(fake_quantize(z["x"], name), z[f"{key}_dq"])
    if key == "two":
        assert torch.equal(q.tensor_scale, z["tensor_scale"])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [256, 64])
def test_integer_weights_are_the_official_ones(bits, group):
    z, key = recorded("intw_normal_fp32"), f"int{bits}_g{group}"
    fmt = dataclasses.replace(FORMATS[f"int{bits}-weight-official"], group=group)
    q = quantize(z["x"], fmt)
    assert torch.equal(q.codes.view(32, 256), z[f"{key}_q"])
    assert torch.equal(q.scale, z[f"{key}_scale"]) and torch.equal(q.zero.float(), z[f"{key}_zero"])
    assert torch.equal(fake_quantize(z["x"], fmt), z[f"{key}_dq"])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kept", [0, 1, 2])
def test_integer_inputs_are_the_official_ones(bits, kept):
    z = recorded("inta_normal_fp32")
    fmt = dataclasses.replace(FORMATS[f"int{bits}-input-official"], group=64, outliers=kept)
    assert torch.equal(fake_quantize(z["x"], fmt), z[f"int{bits}_top{kept}_dq"])


@pytest.mark.parametrize("kept", [1, 2])
def test_the_official_fp4_is_the_official_one(kept):
    z = recorded("fp4off_normal_fp32")
    fmt = dataclasses.replace(FORMATS["fp4-official"], outliers=kept)
    assert torch.equal(fake_quantize(z["x"], fmt), z[f"e1m2b1_top{kept}_dq"])


@pytest.mark.parametrize("grid", ["e4m3", "e5m2"])
def test_eight_bit_floats_are_torchs(grid):
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[grid]
    top = get_grid(grid).top
    x = torch.cat([normal(20000) * scale for scale in (1e-5, 0.01, 1, 100, top)]).clamp(-top, top)
    assert torch.equal(get_grid(grid).round(x.clone()), x.to(dtype).float())
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    finite = values.isfinite()
    assert torch.equal(get_grid(grid).values()[finite], values[finite])


@pytest.mark.parametrize("grid", list(GRIDS))
def test_rounding_is_to_the_nearest_and_ties_go_to_the_even_code(grid):
    spec = get_grid(grid)
    table = spec.values()
    points = table[: 2 ** (spec.bits - 1)]
    points = points[(points <= spec.top)]
    assert torch.equal(spec.round(points.clone()), points)
    lower, upper = points[:-1], points[1:]
    middle = (lower + upper) / 2
    even = torch.where(torch.arange(len(middle)) % 2 == 0, lower, upper)
    assert torch.equal(spec.round(middle.clone()), even)
    assert torch.equal(spec.round(torch.nextafter(middle, lower)), lower)
    assert torch.equal(spec.round(torch.nextafter(middle, upper)), upper)
    assert torch.equal(spec.round(-middle), -even)
