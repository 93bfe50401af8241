"""A low-bit layer computes with what its input and weight hold now, however they were changed, keeps nothing of them
beyond the backward pass, and takes every input that a plain layer takes."""

import copy
import gc
import io
import pickle
import weakref

import numpy as np
import pytest
import torch
from lowbit_models import llama
from lowbit_support import normal
from torch import nn
from torch.utils.checkpoint import checkpoint

from evenstep.lowbit import RECIPES, LowBitLinear, Recipe, dequantize_, fake_quant, fake_quantize, quantize_


def low(recipe: str = "fp4", width: int = 64, out: int = 8, bias: bool = True) -> LowBitLinear:
    torch.manual_seed(0)
    return quantize_(nn.Linear(width, out, bias=bias), recipe, lambda module, name: True)


def expected(layer: LowBitLinear, x: torch.Tensor) -> torch.Tensor:
    """Computed without the layer."""
    wq = fake_quantize(layer.weight, layer.recipe.weight)
    return nn.functional.linear(fake_quantize(x.clone(), layer.recipe.input), wq, layer.bias)


# ---- nothing is remembered ----


def through_numpy(x: torch.Tensor) -> None:
    np.copyto(x.detach().numpy(), normal(*x.shape, seed=2).numpy())


def through_data(x: torch.Tensor) -> None:
    x.data.copy_(normal(*x.shape, seed=2))


def through_new_data(x: torch.Tensor) -> None:
    x.data = normal(*x.shape, seed=2)


def through_a_view_of_the_storage(x: torch.Tensor) -> None:
    torch.empty(0).set_(x.untyped_storage(), 0, x.shape).copy_(normal(*x.shape, seed=2))


def through_vector_to_parameters(x: torch.Tensor) -> None:
    if not isinstance(x, nn.Parameter):
        pytest.skip("for parameters")
    nn.utils.vector_to_parameters(normal(x.numel(), seed=2), [x])


def through_fused_adamw(x: torch.Tensor) -> None:
    if not isinstance(x, nn.Parameter):
        pytest.skip("for parameters")
    x.grad = torch.ones_like(x)
    torch.optim.AdamW([x], lr=0.1, fused=True).step()


CHANGES = [
    through_numpy, through_data, through_new_data, through_a_view_of_the_storage, through_vector_to_parameters,
    through_fused_adamw,
]  # fmt: skip


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["input", "parameter", "intermediate"])
@pytest.mark.parametrize("change", CHANGES)
def test_an_input_changed_behind_torchs_back_is_seen(change, kind, mode):
    layer = low()
    with mode():
        x = normal(4, 64)
        if kind == "parameter":
            x = nn.Parameter(x)
        elif kind == "intermediate":
            x = x.requires_grad_(not x.is_inference()) * 1.5
        first = layer(x)
        with torch.no_grad():
            change(x)
        assert torch.equal(layer(x), expected(layer, x)) and not torch.equal(layer(x), first)


@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_changed_behind_torchs_back_is_seen(change):
    layer, x = low(), normal(4, 64)
    first = layer(x)
    change(layer.weight)
    assert torch.equal(layer(x), expected(layer, x)) and not torch.equal(layer(x), first)


def test_inputs_in_memory_shared_with_another_process_are_seen():
    layer, x = low(), normal(4, 64).share_memory_()
    layer(x)
    other = torch.empty(0).set_(x.untyped_storage(), 0, x.shape)
    other.numpy()[:] = 3.0
    assert torch.equal(layer(x), expected(layer, x))


def test_an_input_stays_what_it_was_and_is_saved_as_that():
    x = normal(4, 64)
    sizes = []
    for _ in range(2):
        file = io.BytesIO()
        torch.save(x, file)
        sizes.append(file.tell())
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=True), x)
        assert not vars(x) and len(pickle.dumps(copy.deepcopy(x))) == len(pickle.dumps(normal(4, 64)))
        low()(x)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_nothing_of_a_kept_input_is_kept_after_the_pass(mode, monkeypatch):
    made, real = [], fake_quant.kernel_fake_quantize

    def watched(*args):
        made.append(weakref.ref(out := real(*args)))
        return out

    monkeypatch.setattr(fake_quant, "kernel_fake_quantize", watched)
    layer, x = low(), normal(4, 64)
    with mode():
        y = layer(x)
    if y.requires_grad:
        y.sum().backward()
    del y
    gc.collect()
    assert not any(ref() is not None for ref in made)


@pytest.mark.parametrize(("frozen", "kept"), [((), {"x", "weight"}), (("weight",), {"weight"}), (("x",), {"x"})])
def test_what_no_gradient_needs_is_not_kept(frozen, kept):
    layer, x = low(bias=False), normal(4, 64).requires_grad_()
    layer.weight.requires_grad_("weight" not in frozen)
    x.requires_grad_("x" not in frozen)
    names, found = {x.data_ptr(): "x", layer.weight.data_ptr(): "weight"}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(names.get(t.data_ptr())) or t, lambda t: t):
        y = layer(x)
    assert set(found) - {None} == kept and None not in found
    y.sum().backward()
    assert (layer.weight.grad is None) == ("weight" in frozen) and (x.grad is None) == ("x" in frozen)


def test_under_autocast_no_more_is_kept_than_by_the_plain_layer():
    def run(layer):
        sizes = {}

        def pack(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            y = layer(normal(16, 64).requires_grad_())
        sizes.pop(layer.weight.untyped_storage().data_ptr(), None)
        del y
        return sum(sizes.values())

    assert run(low(out=1)) <= run(nn.Linear(64, 1))


# ---- every input of a plain layer ----


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 0, 64), (1, 64), (2, 3, 64)], ids=str)
@pytest.mark.filterwarnings("ignore:recipe .*official")
def test_inputs_of_any_shape_give_outputs_and_gradients_of_the_plain_shapes(recipe, shape):
    layer, x = low(recipe), normal(*shape).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    assert y.shape == (*shape[:-1], 8) and x.grad.shape == x.shape and layer.weight.grad.shape == layer.weight.shape
    assert torch.equal(y, expected(layer, x))
    assert all(t.isfinite().all() for t in (x.grad, layer.weight.grad, layer.bias.grad))
    if not x.numel():
        assert not layer.weight.grad.any() and not layer.bias.grad.any()


@pytest.mark.parametrize(
    "made",
    [
        lambda: normal(64, 6).t(),
        lambda: normal(6, 128)[:, ::2],
        lambda: normal(1, 64).expand(6, 64),
        lambda: normal(2, 3, 128)[..., 64:],
        lambda: normal(6 * 64 + 1)[1:].view(6, 64),
    ],
    ids=["transposed", "strided", "expanded", "sliced", "unaligned"],
)
@pytest.mark.parametrize("recipe", ["fp4", "int4-official", "nvfp4-train"])
@pytest.mark.filterwarnings("ignore:recipe .*official")
def test_views_are_their_copies(made, recipe):
    results = []
    for x in (made(), made().clone(memory_format=torch.contiguous_format)):
        layer, x = low(recipe), x.requires_grad_()
        torch.manual_seed(1)
        layer(x).square().sum().backward()
        results.append((layer(x), x.grad, layer.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("recipe", ["fp4", "int4", "nvfp4-train"])
def test_models_of_other_dtypes_before_or_after(dtype, recipe):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 8))
    before, after = quantize_(copy.deepcopy(plain).to(dtype), Recipe(**_fields(recipe))), copy.deepcopy(plain)
    quantize_(after, Recipe(**_fields(recipe))).to(dtype)
    x = normal(5, 40).to(dtype)
    assert torch.equal(before(x), after(x)) and before(x).dtype == dtype
    before(x).sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in before.parameters())
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
        assert before(x).dtype == plain.to(dtype)(x).dtype
        with pytest.raises(RuntimeError, match=r"the input is torch\.int64"):
            before(torch.ones(5, 40, dtype=torch.int64))


def _fields(recipe: str) -> dict:
    found = RECIPES[recipe]
    return {name: getattr(found, name) for name in ("weight", "input", "input_grad", "weight_grad")}


# ---- what surrounds a layer ----


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant):
    net = quantize_(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)), "fp4")
    found = []
    for run in (net, lambda x: checkpoint(net, x, use_reentrant=reentrant)):
        x = normal(4, 64).requires_grad_()
        net.zero_grad()
        run(x).square().sum().backward()
        found.append([x.grad, *(p.grad.clone() for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("linear", [True, False])
def test_a_second_derivative_is_a_clear_error_and_never_zero(linear):
    layer, x = low(), normal(4, 64).requires_grad_()
    calls = (
        lambda: torch.autograd.grad(layer(x).sum() if linear else layer(x).square().sum(), x, create_graph=True),
        lambda: torch.autograd.functional.hessian(lambda t: layer(t).square().sum(), x.detach()),
        lambda: torch.autograd.functional.jvp(layer, x.detach(), x.detach()),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="a low-bit layer has no second derivative"):
            call()
    assert torch.autograd.functional.jacobian(layer, x.detach()).abs().sum() > 0


@pytest.mark.parametrize(("width", "out"), [(0, 8), (64, 0)])
@pytest.mark.parametrize("recipe", ["fp4", "int8", "nvfp4-train"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_entries(width, out, recipe):
    layer, x = low(recipe, width, out), torch.ones(4, width, requires_grad=True)
    layer(x).sum().backward()
    assert layer(x).shape == (4, out) and layer.weight.grad.shape == (out, width) and not x.grad.any()


def test_an_input_changed_between_the_passes_is_found_by_autograd():
    layer, x = low(), normal(4, 64)
    y = layer(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("grads", ["input", "both", "none"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_layer_sees_new_values_and_takes_no_grad(backend, grads):
    torch._dynamo.reset()
    layer = low()
    layer.requires_grad_(grads == "both")
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x = normal(4, 64).requires_grad_(grads != "none")
    for _ in range(2):
        found = []
        for run in (layer, compiled):
            x.grad = layer.weight.grad = None
            y = run(x)
            if y.requires_grad:
                y.square().sum().backward()
            found.append((y.detach(), x.grad, layer.weight.grad))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
        through_data(x)
        with torch.no_grad(), torch.inference_mode():
            torch.testing.assert_close(compiled(x), expected(layer, x))


def test_copies_pickles_and_round_trips_are_the_layer():
    model, x = quantize_(llama(), "fp4"), torch.arange(12).view(1, 12)
    want = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    fresh = quantize_(llama(1), "fp4")
    fresh.load_state_dict(model.state_dict())
    for twin in [*twins, fresh, model.eval(), model.train()]:
        assert torch.equal(twin(x), want)
    for module in twins[0].modules():
        if isinstance(module, LowBitLinear):
            module.recipe = RECIPES["int2"]
    assert torch.equal(twins[0](x), quantize_(dequantize_(twins[1]), "int2")(x)) and torch.equal(model(x), want)
    assert not torch.equal(twins[0](x), want)


def test_the_meta_device_gives_shapes():
    with torch.device("meta"):
        layer = quantize_(nn.Linear(64, 8), "nvfp4")
    assert layer(torch.empty(3, 64, device="meta")).shape == (3, 8)
    layer.to_empty(device="cpu").load_state_dict(low().state_dict())
    assert torch.equal(layer(normal(3, 64)), low("nvfp4")(normal(3, 64)))


def test_a_kernel_is_left_where_the_layer_was_moved_or_cast_away_from_it():
    from evenstep.lowbit import lowbit_report
    from evenstep.lowbit.backends import KERNELS

    layer, x = low("int8"), normal(3, 64)
    layer.kernel = KERNELS[0]  # as if it had been quantised on a GPU
    assert torch.equal(layer(x), expected(layer, x))
    assert lowbit_report(layer).kernels == [] and "kernel=" not in repr(layer)
