"""The CPU kernel of fake quantisation is the plain code, only faster: the same bits, whatever comes."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowbit_models import batch, llama
from lowbit_support import ALL, needs_kernel, normal, plain_code

from evenstep.lowbit import RECIPES, Format, fake_quant, fake_quantize, quantize_
from evenstep.lowbit.fake_quant import apply

pytestmark = needs_kernel

MORE = {
    **{f"e8m0 {grid} {rule}": Format(grid, group=7, scale="e8m0", rule=rule)
       for grid, rule in (("int4", "even"), ("e5m2", "rceil"), ("e3m2", "ceil"), ("e4m3", "even"))},
    "kept in e4m3": Format("e2m1", group=16, scale="e4m3", tensor_scale="row", outliers=1),
    "kept in e8m0": Format("e2m3", group=32, scale="e8m0", rule="even", outliers=4),
    "odd group": Format("e2m1", group=19, outliers=2),
    "group of one": Format("int3", group=1, symmetric=False),
    "integers in e4m3": Format("int8", group=16, scale="e4m3"),
}  # fmt: skip
BITS = st.integers(-(2**31), 2**31 - 1)
SPECIAL = st.sampled_from([0, 1, 0x7F800000, -(2**31), 0x7FC00000, 0x7FFFFFFF, -1, 0x00800000, 0x7F7FFFFF, 0x007FFFFF])
LEVELS = st.integers(-64, 64).map(lambda k: int(torch.tensor(k / 8).view(torch.int32)))  # ties, equal magnitudes


def served(dtype: torch.dtype, out: torch.dtype) -> list[str]:
    x = torch.zeros(1, 1, dtype=dtype)
    return [name for name, fmt in {**ALL, **MORE}.items() if fake_quant.kernel_serves(x, fmt, out)]


def bits(x: torch.Tensor) -> torch.Tensor:
    """With one NaN for all."""
    x = x.float()
    return torch.where(x.isnan(), torch.nan, x).view(torch.int32)


def assert_same(x: torch.Tensor, name: str, out: torch.dtype) -> None:
    fmt = {**ALL, **MORE}[name]
    before = x.clone()
    got = apply(x, fmt, dtype=out)
    with plain_code():
        want = apply(x, fmt, dtype=out)
    assert got.dtype == want.dtype == out and got.shape == want.shape
    assert torch.equal(bits(got), bits(want)), name
    assert torch.equal(bits(x), bits(before))


@settings(max_examples=400, deadline=None)
@given(data=st.data(), rows=st.integers(1, 5), width=st.integers(1, 70), scale=st.sampled_from([0, -126, -140, 100]))
def test_any_bits_at_all_give_the_plain_codes_bits(data, rows, width, scale):
    kind = data.draw(st.sampled_from([BITS, LEVELS, SPECIAL | LEVELS, SPECIAL | BITS]))
    words = data.draw(st.lists(kind, min_size=rows * width, max_size=rows * width))
    x = torch.tensor(words, dtype=torch.int32).view(torch.float32).view(rows, width) * 2.0**scale
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    x = x.to(dtype)
    out = torch.bfloat16 if data.draw(st.booleans()) else dtype
    assert_same(x, data.draw(st.sampled_from(served(dtype, out))), out)


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
def test_long_ragged_rows_give_the_plain_codes_bits(out):
    for name in served(torch.float32, out):
        for shape in ((3, 300), (2, 3, 256), (9001,), (2, 4097), (40, 352), (1,)):
            assert_same(normal(*shape, seed=len(shape)) * 3, name, out)
        assert_same(torch.tensor(2.7), name, out)
        assert_same(normal(64, 40).t(), name, out)
        assert_same(normal(6, 5, 33)[:, 1:4], name, out)


def test_threads_do_not_change_a_bit():
    x = normal(700, 1001)
    for name in ("nvfp4", "nvfp4-row", "outliers", "int4-weight-official"):
        one = fake_quantize(x, ALL[name])
        try:
            torch.set_num_threads(3)
            assert torch.equal(fake_quantize(x, ALL[name]), one)
        finally:
            torch.set_num_threads(1)


def test_it_serves_the_recipes_that_are_used_most_and_leaves_the_rest_to_the_plain_code():
    x = torch.zeros(1, 1)
    left = set(ALL) - set(served(torch.float32, torch.float32))
    assert left == {"e3m0", "nvfp4-16x16", "blocks", "bf16 scale", "fp16 scale", "stochastic"}
    for recipe in RECIPES.values():
        assert fake_quant.kernel_serves(x, recipe.input, x.dtype) and (
            recipe.name == "nvfp4-train" or fake_quant.kernel_serves(x, recipe.weight, x.dtype)
        )
    for other in (x.half(), x.double(), x.to("meta")):
        assert not fake_quant.kernel_serves(other, ALL["e2m1"], other.dtype)
    assert not fake_quant.kernel_serves(x.bfloat16(), ALL["e2m1"], torch.float32)


def test_the_operator_is_what_it_says_to_torch():
    x = normal(4, 40)
    with_gradients = fake_quant.kernel_fake_quantize(x, 40, ALL["outliers"], torch.bfloat16, None)
    assert torch.equal(with_gradients, apply(x, ALL["outliers"], dtype=torch.bfloat16))
    plan = [256, 0, 1, 0, 2, 0, 0, 0, 0, 0, 2]
    arguments = (x, 40, plan, 6.0, torch.bfloat16, None)
    torch.library.opcheck(torch.ops.evenstep.cpu_fake_quantize.default, arguments)


def test_without_the_library_the_plain_code_serves():
    code = (
        "import torch; from evenstep.lowbit import fake_quant, fake_quantize, RECIPES; x = torch.ones(2, 8);"
        "print(fake_quant.kernel_serves(x, RECIPES['fp4'].input, x.dtype), fake_quantize(x, 'mxfp4').sum().item())"
    )
    env = {**os.environ, "EVENSTEP_CPU_KERNELS": "none"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "16.0"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp4", "int4", "nvfp4"])
def test_a_compiled_model_calls_it_and_keeps_no_more_than_the_compiled_plain_one(recipe):
    from tests.lowbit.test_layers import kept

    def run(model):
        return model.model(batch()[0])

    found = {}
    for name in (None, recipe):
        model = quantize_(llama(), name) if name else llama()
        for block in model.model.layers:
            block.compile(fullgraph=True, dynamic=False)
        found[name] = kept(model, run)
    assert found[recipe] <= found[None]
