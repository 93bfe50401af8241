"""The formats' promises: codes and back, idempotence, symmetry, groups."""

import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lowbit_support import ALL, OURS, generator, normal

from evenstep.lowbit import FORMATS, Format, dequantize, fake_quantize, quantize
from evenstep.lowbit.fake_quant import CACHE_ENTRIES
from evenstep.lowbit.formats import FLOAT8, GRIDS

pytestmark = pytest.mark.usefixtures("either_lowbit_code")


@pytest.mark.parametrize("name", ALL)
def test_codes_packed_or_not_give_the_fake_quantised_tensor_to_the_bit(name):
    fmt = ALL[name]
    for shape in ((4, 512), (7, 300), (3, 5, 33), (20,)):
        if fmt.block_rows > 1 and len(shape) < 2:
            continue
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = normal(*shape, dtype=dtype) * 3
            fake = fake_quantize(x, fmt, generator())
            q = quantize(x, fmt, generator())
            assert fake.dtype == dtype and fake.shape == x.shape
            assert torch.equal(dequantize(q), fake) and torch.equal(dequantize(q.pack()), fake)
            assert torch.equal(q.pack().unpack().codes, q.codes)
    assert quantize(normal(4, 512), fmt).pack().codes.numel() == 4 * 512 * fmt.spec.bits // 8


@pytest.mark.parametrize("name", [*OURS, "outliers", "fp16 scale", "bf16 scale"])
def test_quantising_twice_is_quantising_once(name):
    fmt = ALL[name]
    for shape in ((64, 512), (7, 300), (33, 47)):
        once = fake_quantize(normal(*shape, seed=5) * 3, fmt)
        twice = fake_quantize(once, fmt)
        if fmt.tensor_scale == "tensor":  # torchao's: its scale may move in its last bit
            torch.testing.assert_close(twice, once, rtol=3e-7, atol=0)
        else:
            assert torch.equal(twice, once)


FINITE = st.floats(-(2.0**99), 2.0**99, width=32)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(FINITE, min_size=1, max_size=80),
    name=st.sampled_from([name for name in ALL if ALL[name].block_rows == 1 and ALL[name].axis == -1]),
)
def test_any_numbers_stay_finite_signed_and_zero_where_they_were_zero(values, name):
    fmt, x = ALL[name], torch.tensor(values)
    out = fake_quantize(x, fmt, generator())
    assert out.isfinite().all() and (out[x == 0] == 0).all()
    if fmt.symmetric:
        assert ((out == 0) | (out.sign() == x.sign())).all()
        if fmt.rounding == "nearest":
            assert torch.equal(fake_quantize(-x, fmt), -out)
            assert out.abs().max() <= 2 * x.abs().max()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=200), power=st.integers(-20, 20))
def test_a_power_of_two_passes_through(values, power):
    x = torch.tensor(values)
    x = torch.where(x.abs() < 1e-3, 0.0, x)
    for name in ("e2m1", "int4", "mxfp4", "mxfp8", "nvfp4-row", "outliers"):
        assert torch.equal(fake_quantize(x * 2.0**power, ALL[name]), fake_quantize(x, ALL[name]) * 2.0**power)


def test_the_error_is_within_half_a_step_of_each_group():
    x = normal(64, 512)
    for name, levels in (("int4", 7), ("e1m2", 7), ("int8", 127), ("int2", 1)):
        fmt = FORMATS[name]
        groups = x.unflatten(-1, (-1, fmt.group or 512))
        error = (fake_quantize(x, fmt) - x).unflatten(-1, (-1, fmt.group or 512)).abs()
        assert (error <= groups.abs().amax(-1, keepdim=True) / levels / 2 * 1.0001).all()


def test_e1m2_has_fifteen_levels_and_the_official_fp4_nine():
    x = torch.linspace(-1, 1, 256)
    assert len(fake_quantize(x, "e1m2").unique()) == 15
    assert len(fake_quantize(x, dataclasses.replace(FORMATS["fp4-official"], outliers=0)).unique()) == 9
    assert len(fake_quantize(x, "e2m1").unique()) == 15  # +-{.5, 1, 1.5, 2, 3, 4, 6} and 0


def test_so_many_largest_magnitudes_are_kept_and_do_not_count_for_the_scale():
    x = normal(8, 256)
    x[:, 3], x[:, 77] = 1000.1, -333.3
    out = fake_quantize(x, ALL["outliers"])
    assert torch.equal(out[:, [3, 77]], x[:, [3, 77]])
    rest = x.clone()
    rest[:, [3, 77]] = 0
    assert torch.equal(torch.where(rest == 0, 0, out), fake_quantize(rest, "e2m1"))


@pytest.mark.parametrize("values", [[5.0] * 4, [5.0, -5.0, 5.0, 1.0], [9.0, 5.0, -5.0, 5.0], [9.0, 9.0, 5.0, 4.0]])
def test_equal_magnitudes_count_one_by_one_as_in_topk(values):
    x = torch.tensor(values + [0.3] * 12)
    limit = x.abs().topk(3).values[-1]
    kept = x.abs() > limit
    out = fake_quantize(x, Format("int4", group=16, outliers=2))
    assert torch.equal(out[kept], x[kept])
    assert torch.equal(out[~kept], fake_quantize(torch.where(kept, 0.0, x), Format("int4", group=16))[~kept])


def test_groups_end_with_their_row_and_the_last_one_may_be_shorter():
    x = normal(6, 300)
    for name in (*OURS, "outliers"):
        if not ALL[name].token_local:
            continue
        out = fake_quantize(x, ALL[name])
        changed = x.clone()
        changed[3] *= 7.7
        again = fake_quantize(changed, ALL[name])
        rows = [0, 1, 2, 4, 5]
        assert torch.equal(again[rows], out[rows]), name
    assert torch.equal(fake_quantize(x, "e2m1")[:, 256:], fake_quantize(x[:, 256:].contiguous(), "e2m1"))


def test_two_dimensional_blocks_share_a_scale_and_transpose():
    fmt, x = FORMATS["nvfp4-16x16"], normal(48, 64)
    assert quantize(x, fmt).scale.shape == (3, 4)
    assert torch.equal(fake_quantize(x.t().contiguous(), fmt).t(), fake_quantize(x, fmt))


def test_an_axis_is_a_transposition():
    x = normal(5, 48, 7)
    fmt = Format("e2m1", group=16, axis=1)
    want = fake_quantize(x.transpose(1, 2).contiguous(), Format("e2m1", group=16)).transpose(1, 2)
    assert torch.equal(fake_quantize(x, fmt), want) and torch.equal(dequantize(quantize(x, fmt)), want)


@pytest.mark.parametrize("name", ["e2m1", "int8", "nvfp4-row", "fp4-official", "int4-weight-official", "outliers"])
def test_a_large_tensor_done_in_parts_is_the_same(name, monkeypatch):
    x = normal(CACHE_ENTRIES // 256 * 3 + 5, 256)
    parts = fake_quantize(x, ALL[name])
    monkeypatch.setattr("evenstep.lowbit.fake_quant.CACHE_ENTRIES", 2**40)
    assert torch.equal(parts, fake_quantize(x, ALL[name]))


def test_numbers_that_are_not_contiguous_are_read_right():
    x = normal(64, 40)
    for name in ("e2m1", "nvfp4-row", "outliers", "int4-weight-official"):
        assert torch.equal(fake_quantize(x.t(), ALL[name]), fake_quantize(x.t().contiguous(), ALL[name]))


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_a_cast_of_torch_rounds_as_the_grid(name):
    """On a GPU the cast takes the place of `Grid.round`: every value, its neighbours and the points between values."""
    grid, kind = GRIDS[name], FLOAT8[name]
    values = grid.values()[: 2 ** (grid.bits - 1)]
    values = values[~values.isnan()]
    middles = (values[1:] + values[:-1]) / 2
    points = torch.cat([values, middles, torch.tensor([1e-30, 3e38, math.inf])])
    points = torch.cat([points, points.nextafter(torch.tensor(0.0)), points.nextafter(torch.tensor(math.inf))])
    points = torch.cat([points, -points])
    cast = points.clamp(-grid.top, grid.top).to(kind).float()
    assert torch.equal(cast, grid.round(points.clone()))
    assert grid.round(torch.tensor([math.nan])).isnan() and torch.tensor([math.nan]).to(kind).float().isnan()


@pytest.mark.parametrize("name", [name for name, grid in GRIDS.items() if not grid.twos_complement])
def test_codes_are_ranks_and_no_nan_spills_into_another_code(name):
    grid = GRIDS[name]
    values = grid.values()
    codes = torch.arange(len(values), dtype=torch.uint8)
    known = ~values.isnan()
    negative = codes >= len(values) // 2
    assert torch.equal(grid.encode(values, negative)[known], codes[known])
    nan = grid.encode(torch.full((2,), math.nan), torch.tensor([False, True]))
    assert (nan.int() < 2**grid.bits).all()
