"""NaN, infinities, tiny and empty tensors, what does not fit, and stochastic rounding."""

import math

import pytest
import torch
from lowbit_support import ALL, EXTRA, generator, normal

from evenstep.errors import EvenstepError
from evenstep.lowbit import FORMATS, Format, fake_quantize, quantize
from evenstep.lowbit.formats import LARGEST, get_grid

pytestmark = pytest.mark.usefixtures("either_lowbit_code")


@pytest.mark.parametrize("name", [name for name in ALL if ALL[name].block_rows == 1 and ALL[name].axis == -1])
def test_nan_spoils_its_group_and_no_other_row(name):
    fmt = ALL[name]
    x = normal(4, 512)
    x[1, 5] = math.nan
    out = fake_quantize(x, fmt, generator())
    assert out[1, 5].isnan()
    if fmt.tensor_scale == "tensor":
        assert out.isnan().all()
    else:
        assert out[[0, 2, 3]].isfinite().all()
        # Among the kept outliers it leaves its group alone.
        assert out[1, 4].isnan() == (fmt.outliers == 0)


def test_infinity_is_kept_as_an_outlier_saturates_an_mx_block_and_spoils_other_groups():
    x = torch.ones(512)
    x[5] = -math.inf
    assert fake_quantize(x, ALL["outliers"])[5] == -math.inf and fake_quantize(x, ALL["outliers"])[4] == pytest.approx(
        1, rel=1e-6
    )
    assert fake_quantize(x, "mxfp4")[5] == -6 * 2.0**126
    assert fake_quantize(x, "e2m1")[:256].isnan().all() and fake_quantize(x, "e2m1")[256:].isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_zeros_and_subnormal_numbers_stay_finite(name):
    if ALL[name].block_rows == 1:
        assert torch.equal(fake_quantize(torch.zeros(512), ALL[name], generator()), torch.zeros(512))
    for scale in (1e-45, 1e-40, 1e-37, 1e-20):
        x = normal(32, 64) * scale
        x[::2] = 0
        out = fake_quantize(x, ALL[name], generator())
        assert out.isfinite().all() and (out[::2] == 0).all()
        assert name == "stochastic" or (out.abs() <= 8 * x.abs().max()).all()  # it may round up from far below


def test_a_scale_that_fp16_cannot_hold_saturates_and_so_does_a_result():
    x = torch.full((1, 32), 1e9)
    out = fake_quantize(x, Format("e2m1", group=32, scale="fp16"))
    assert (out == 6 * LARGEST["fp16"]).all()
    half = fake_quantize(torch.full((32,), 65504.0, dtype=torch.float16), "mxfp4-rceil")
    assert (half == 65504).all()


def test_an_empty_tensor_stays_empty_and_has_no_codes():
    assert fake_quantize(torch.zeros(0, 64), "nvfp4").shape == (0, 64)
    with pytest.raises(EvenstepError, match=r"\[0, 64\] holds nothing"):
        quantize(torch.zeros(0, 64), "nvfp4")
    assert fake_quantize(torch.tensor(2.0), "e2m1").item() == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fake_quantize(torch.ones(4), "nvfp5"), "unknown format 'nvfp5'.*did you mean 'nvfp4'"),
        (lambda: fake_quantize(torch.ones(4, dtype=torch.int32), "int4"), "dtype torch.int32"),
        (lambda: fake_quantize(torch.ones(4), "nvfp4-16x16"), r"need a matrix.*\[4\]"),
        (lambda: Format("e2m2"), "unknown grid 'e2m2'"),
        (lambda: Format("e2m1", scale="e8m1"), "Format.scale is 'e8m1'.*did you mean 'e8m0'"),
        (lambda: Format("e2m1", group=-1), "Format.group is -1"),
        (lambda: Format("e2m1", symmetric=False), "needs an integer grid"),
        (lambda: Format("e2m1", tensor_scale="row"), "needs scale='e4m3'"),
        (lambda: Format("e2m1", flatten=True), "flatten needs a group"),
        (lambda: Format("int4", symmetric=False, outliers=1), "outliers need a symmetric format"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(call, words):
    with pytest.raises(EvenstepError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


# ---- stochastic rounding, gradients, sizes ----


@pytest.mark.parametrize("grid", ["e2m1", "int4", "e4m3", "e3m0", "e1m2"])
def test_stochastic_rounding_is_unbiased_and_only_ever_takes_a_neighbour(grid):
    spec, draws = get_grid(grid), 40000
    points = torch.linspace(-1, 1, 41) * spec.top * 0.97
    noise = torch.rand(draws, 41, generator=generator())
    out = spec.round(points.repeat(draws, 1), noise)
    table = spec.values()
    table = table[~table.isnan()].unique()
    below = table[torch.searchsorted(table, points, right=True) - 1]
    above = table[torch.searchsorted(table, points)]
    assert ((out == below) | (out == above)).all()
    step = (above - below).clamp_min(1e-9)
    assert ((out.double().mean(0) - points).abs() <= 5 * 0.5 * step / math.sqrt(draws) + 1e-6).all()


def test_stochastic_rounding_is_drawn_from_the_generator():
    fmt, x = EXTRA["stochastic"], normal(16, 64)
    a, b = fake_quantize(x, fmt, generator()), fake_quantize(x, fmt, generator())
    assert torch.equal(a, b) and not torch.equal(a, fake_quantize(x, fmt, torch.Generator().manual_seed(4)))
    torch.manual_seed(3)
    c = fake_quantize(x, fmt)
    torch.manual_seed(3)
    assert torch.equal(c, fake_quantize(x, fmt))


def test_the_gradient_passes_straight_through():
    x = normal(3, 32).requires_grad_()
    weights = normal(3, 32, seed=1)
    (fake_quantize(x, "nvfp4") * weights).sum().backward()
    assert torch.equal(x.grad, weights)


def test_storage_is_what_bits_per_value_says():
    for name in ("e2m1", "int4-weight-official", "mxfp4", "nvfp4-block", "nvfp4-row", "int8", "blocks", "nvfp4-16x16"):
        q = quantize(normal(480, 512), ALL[name]).pack()
        zero = 0 if q.zero is None else q.zero.numel() * (8 - q.format.spec.bits) / 8  # kept a byte each
        tensor = 4 if q.format.tensor_scale == "tensor" else 0
        width = 510 if name == "blocks" else 512
        if name != "blocks":
            assert (q.nbytes - zero - tensor) * 8 / (480 * 512) == pytest.approx(ALL[name].bits_per_value(width)), name
    assert FORMATS["nvfp4"].bits_per_value() == 4.5 and FORMATS["mxfp4"].bits_per_value() == 4.25
    assert FORMATS["e2m1"].bits_per_value(128) == 4 + 32 / 128
