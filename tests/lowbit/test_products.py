"""Each of the three products sees the operands it should; metrics; products on hardware."""

import copy
import dataclasses

import pytest
import torch
from lowbit_models import batch, llama
from lowbit_support import operands
from torch import nn

from evenstep.lowbit import (
    FORMATS,
    RECIPES,
    Backward,
    Format,
    LowBitLinear,
    Recipe,
    backends,
    fake_quantize,
    linear,
    lowbit_metrics,
    lowbit_report,
    observe_inputs,
    quantization_error,
    quantize_,
)

# ---- the three products ----


def products(
    recipe: Recipe, x: torch.Tensor, w: torch.Tensor, g: torch.Tensor, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight = nn.Parameter(w.clone())
    quantize_(layer, recipe)
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = layer(x)
    y.backward(g)
    return y.detach(), x.grad, layer.weight.grad


def test_each_product_has_its_own_switch():
    x, w, g = operands()
    low, four = FORMATS["e2m1"], FORMATS["nvfp4-row"]
    xq, wq, gq = fake_quantize(x, low), fake_quantize(w, low), fake_quantize(g, four)
    high, straight = Backward(other=None), Backward()
    own = Backward(grad=four, other=four)
    for recipe, want in (
        (Recipe(weight=low, input=low), (xq @ wq.t(), g @ wq, g.t() @ xq)),
        (Recipe(weight=low), (x @ wq.t(), g @ wq, g.t() @ x)),
        (Recipe(input=low), (xq @ w.t(), g @ w, g.t() @ xq)),
        (Recipe(weight=low, input=low, input_grad=high, weight_grad=straight), (xq @ wq.t(), g @ w, g.t() @ xq)),
        (Recipe(weight=low, input=low, input_grad=straight, weight_grad=high), (xq @ wq.t(), g @ wq, g.t() @ x)),
        (Recipe(input_grad=Backward(grad=four)), (x @ w.t(), gq @ w, g.t() @ x)),
        (
            Recipe(input_grad=own, weight_grad=own),
            (
                x @ w.t(),
                gq @ fake_quantize(w.t().contiguous(), four).t(),
                fake_quantize(g.t().contiguous(), four) @ fake_quantize(x.t().contiguous(), four).t(),
            ),
        ),
    ):
        for got, expected in zip(products(recipe, x, w, g), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_hadamard_rotation_cancels_in_the_product_and_spreads_outliers():
    x, w, g = operands()
    eight = Format("int8")
    rotated = products(Recipe(weight_grad=Backward(grad=None, other=eight, hadamard=True)), x, w, g)[2]
    assert ((rotated - g.t() @ x).norm() / (g.t() @ x).norm()).item() < 0.01  # 50 tokens: padded to 64
    h = linear.hadamard(16, torch.device("cpu"))
    torch.testing.assert_close(h @ h.t(), torch.eye(16))
    spike = torch.zeros(3, 16)
    spike[1, 4] = 16.0
    a, b = linear.rotate(spike, spike)
    assert torch.equal(a.abs()[1], torch.full((16,), 4.0)) and torch.equal(a, b)


def test_nvfp4_train_has_unbiased_gradients_that_differ_from_step_to_step():
    x, w, g = operands()
    recipe = dataclasses.replace(RECIPES["nvfp4-train"], keep_last=0.0)
    wq = fake_quantize(w, recipe.weight)
    draws = [products(recipe, x, w, g, seed) for seed in range(200)]
    assert not torch.equal(draws[0][1], draws[1][1])
    mean = torch.stack([d[1] for d in draws]).mean(0)
    single = ((draws[0][1] - g @ wq).norm() / (g @ wq).norm()).item()
    assert single > 0.05 and ((mean - g @ wq).norm() / (g @ wq).norm()).item() < single / 5
    assert torch.equal(products(recipe, x, w, g, seed=0)[2], draws[0][2])


def test_a_stochastic_weight_is_the_same_in_both_passes():
    x, w, g = operands()
    fmt = dataclasses.replace(FORMATS["e2m1"], rounding="stochastic")
    torch.manual_seed(1)
    wq = fake_quantize(w, fmt)
    y, dx, _ = products(Recipe(weight=fmt), x, w, g, seed=1)
    torch.testing.assert_close(y, x @ wq.t())
    torch.testing.assert_close(dx, g @ wq)


def test_an_input_changed_in_place_is_quantised_anew():
    layer = quantize_(nn.Linear(64, 8, bias=False), "fp4")
    x = torch.randn(4, 64)
    first = layer(x)
    x.mul_(2)
    torch.testing.assert_close(layer(x), 2 * first)


# ---- metrics ----


def test_metrics_count_what_saturates_what_vanishes_and_how_much_is_lost():
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([7.9, -3.0, 0.2, 0.1])  # the floor rule's scale is 1: 7.9 becomes 6, 0.2 and 0.1 vanish
    found = quantization_error(x, "mxfp4")
    assert found["saturation"].item() == pytest.approx(1 / 32) and found["underflow"].item() == pytest.approx(0.5)
    error = (fake_quantize(x, "mxfp4") - x).norm() / x.norm()
    assert found["relative_error"].item() == pytest.approx(error.item())
    for name in ("e2m1", "int4", "nvfp4-row", "int4-weight-official"):
        wide = torch.randn(64, 300, generator=torch.Generator().manual_seed(0))
        found = quantization_error(wide, name)
        error = (fake_quantize(wide, name) - wide).norm() / wide.norm()
        assert found["relative_error"].item() == pytest.approx(error.item(), rel=1e-5)
        assert found["saturation"].item() <= 0.04
    assert quantization_error(torch.zeros(3, 64), "nvfp4")["relative_error"] == 0


def test_metrics_of_a_model_name_every_low_bit_layer():
    model = quantize_(llama(), "fp4")
    names = set(lowbit_report(model).swapped)
    assert set(lowbit_metrics(model)) == names
    with observe_inputs(model) as seen:
        model(batch()[0])
    assert set(seen) == names and all(0 < m["relative_error"] < 0.3 for m in seen.values())
    before = copy.deepcopy(seen)
    model(batch()[0] + 1)
    assert seen == before  # watching has ended


# ---- hardware products ----


def int_mm_is_exact() -> bool:
    """Evenstep uses the product on CUDA only. On a CPU without VNNI, oneDNN adds pairs of products in 16 bits."""
    a = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(a, -a.t().contiguous()) == -64 * 127 * 127).all())


@pytest.mark.parametrize("kernel", backends.KERNELS[:2], ids=lambda k: k.name)
@pytest.mark.parametrize("rows", [5, 40])
def test_the_products_that_run_on_a_cpu_too_agree_with_the_emulation(kernel, rows):
    x, w, _ = operands()
    x = x[:rows]
    if kernel.name == "torch._int_mm" and not int_mm_is_exact():
        pytest.skip("torch._int_mm saturates on this processor, which has no 8-bit dot products (VNNI)")
    want = fake_quantize(x, kernel.input) @ fake_quantize(w, kernel.weight).t()
    try:
        got = kernel.linear(x, w, None, torch.float32)
    except (RuntimeError, NotImplementedError) as problem:
        pytest.skip(str(problem))
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2 * want.abs().max().item())


def test_without_such_hardware_layers_are_emulated():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    model = quantize_(llama(), "int8")
    assert all(m.kernel is None for m in model.modules() if isinstance(m, LowBitLinear))


def test_block_scales_are_tiled_as_cublas_wants_them():
    scale = torch.arange(130 * 5, dtype=torch.int32).remainder(251).to(torch.uint8).view(130, 5)
    tiles = backends.tiled(scale).view(2, 2, 512)
    for r, g in ((0, 0), (31, 3), (37, 2), (127, 4), (129, 1)):
        assert tiles[r // 128, g // 4, 16 * (r % 32) + 4 * (r % 128 // 32) + g % 4] == scale[r, g]
    assert tiles[1, 1].count_nonzero() <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", backends.KERNELS, ids=lambda k: k.name)
def test_hardware_products_agree_with_the_emulation(kernel):
    if torch.cuda.get_device_capability() < kernel.capability:
        pytest.skip(f"needs compute capability {kernel.capability}")
    x, w = (torch.randn(64, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    want = fake_quantize(x.float(), kernel.input) @ fake_quantize(w.float(), kernel.weight).t()
    got = kernel.linear(x, w, None, torch.float32)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * want.abs().max().item())
