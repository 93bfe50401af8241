"""Hooked, computed, shared, tied, wrapped and compiled layers are low-bit in truth, or refused with a true reason."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from lowbit_support import normal
from process_support import run_processes
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from evenstep.errors import EvenstepError
from evenstep.lowbit import LowBitLinear, dequantize_, fake_quantize, lowbit_report, quantize_


def every(module: nn.Module, name: str) -> bool:
    return True


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))


def expected(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """What the layer must compute in low bits, from its parameters alone."""
    fmt = layer.recipe.weight
    return nn.functional.linear(fake_quantize(x, layer.recipe.input), fake_quantize(layer.weight, fmt), layer.bias)


def assert_low(layer: nn.Module, x: torch.Tensor, low: bool = True) -> None:
    assert isinstance(layer, LowBitLinear) == low
    got = layer(x)  # first: what hooks compute is the layer's weight from then on
    assert torch.equal(got, expected(layer, x) if low else nn.functional.linear(x, layer.weight, layer.bias))


# ---- replaced forwards ----


def by_accelerate(layer: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(layer, hooks.ModelHook())


def by_a_function(layer: nn.Module) -> None:
    plain = layer.forward
    layer.forward = lambda x: plain(x)


def by_anothers_method(layer: nn.Module) -> None:
    layer.forward = copy.deepcopy(layer).forward


@pytest.mark.parametrize("replace", [by_accelerate, by_a_function, by_anothers_method])
@pytest.mark.parametrize("filter_fn", [None, every])
def test_a_layer_with_a_forward_of_its_own_is_refused_both_ways(replace, filter_fn):
    model, x = net(), normal(4, 32)
    replace(model[2])
    with pytest.raises(EvenstepError, match=r"^2 has a forward of its own") as caught:
        quantize_(model, "fp4", filter_fn)
    assert "\n" not in str(caught.value) and type(model[0]) is type(model[2]) is nn.Linear
    assert lowbit_report(model).swapped == []
    quantize_(model, "fp4", lambda module, name: name == "0")
    assert_low(model[0], x)

    model = quantize_(net(), "fp4", filter_fn)
    want = model(x)
    replace(model[2])  # afterwards it reaches the low-bit layer
    assert torch.equal(model(x), want) and lowbit_report(model).swapped == ["0", "2"]
    with pytest.raises(EvenstepError, match=r"^2 has a forward of its own"):
        dequantize_(model)
    assert torch.equal(model(x), want)


def test_what_a_removed_hook_leaves_behind_is_no_obstacle():
    hooks = pytest.importorskip("accelerate.hooks")
    model, x = net(), normal(4, 32)
    plain = model(x)
    for change in (lambda: quantize_(model, "fp4"), lambda: dequantize_(model)):
        hooks.add_hook_to_module(model[0], hooks.ModelHook())
        hooks.remove_hook_from_module(model[0])
        change()
        assert_low(model[0], x, low=isinstance(model[0], LowBitLinear))
    assert torch.equal(model(x), plain)


def test_offloading_after_quantising_is_low_bit():
    accelerate = pytest.importorskip("accelerate")
    model, x = quantize_(net(), "fp4"), normal(4, 32)
    want = model(x)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(model(x), want) and lowbit_report(model).swapped == ["0", "2"]


def test_hooks_of_torch_run_as_before():
    model, x, seen = net(), normal(4, 32), []
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model[0].register_forward_hook(lambda module, args, out: seen.append(out) or out + 1)
    model[0].register_full_backward_hook(lambda module, got, given: seen.append(given[0]))
    quantize_(model, "fp4")
    out = model[0](x)
    assert torch.equal(out, expected(model[0], x * 2) + 1)
    out.sum().backward()
    assert len(seen) == 2 and torch.equal(seen[1], torch.ones(4, 32))


# ---- computed weights ----


def old_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer)


COMPUTED = {
    "weight_norm": old_weight_norm,
    "spectral_norm": lambda layer: nn.utils.spectral_norm(layer).eval(),
    "identity": lambda layer: prune.identity(layer, "weight"),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "pruned, bias": lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_weight_that_hooks_compute_is_quantised_and_trained_through(kind):
    model, x = net(), normal(4, 32)
    COMPUTED[kind](model[0])
    quantize_(model, "fp4")
    assert lowbit_report(model).swapped == ["0", "2"]
    for _ in range(2):
        assert_low(model[0], x)
        model(x).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        torch.optim.SGD(model.parameters(), lr=0.5).step()
    plain = copy.deepcopy(net())
    COMPUTED[kind](plain[0])
    plain.load_state_dict(model.state_dict())
    assert torch.equal(dequantize_(model)(x), plain(x))


PARAMETRIZED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer).eval(),
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Tanh()),
}


@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_parametrized_layers_are_kept_before_and_low_bit_after(kind):
    model, x = net(), normal(4, 32)
    PARAMETRIZED[kind](model[0])
    quantize_(model, "fp4", every)
    assert lowbit_report(model).swapped == ["2"] and not isinstance(model[0], LowBitLinear)
    assert lowbit_report(model).layers[0].what == "a ParametrizedLinear"
    with pytest.raises(EvenstepError, match=r"found no layer.*linear layers: 0, .*; ParametrizedLinear \(1\)"):
        quantize_(model[:1], "fp4", every)

    model = quantize_(net(), "fp4")
    PARAMETRIZED[kind](model[0])
    assert_low(model[0], x)
    assert lowbit_report(model).swapped == ["0", "2"]
    with pytest.raises(EvenstepError, match=r"^0 is a ParametrizedLowBitLinear"):
        dequantize_(model)
    assert_low(model[0], x)
    parametrize.remove_parametrizations(model[0], "weight")
    assert_low(dequantize_(model)[0], x, low=False)


# ---- shared and tied ----


@pytest.mark.parametrize(
    "filter_fn", [None, every, lambda m, name: name == "0", lambda m, name: name == "2"], ids=["rules", "all", "0", "2"]
)
def test_a_layer_used_twice_is_low_bit_at_both_places(filter_fn):
    layer = nn.Linear(16, 16)
    model, x = nn.Sequential(layer, nn.Tanh(), layer), normal(4, 16)
    quantize_(model, "fp4", filter_fn)
    assert_low(layer, x)
    assert torch.equal(model(x), expected(layer, expected(layer, x).tanh()))
    model(x).sum().backward()
    with pytest.raises(EvenstepError, match="0 is low-bit already"):
        quantize_(model, "int4")
    assert_low(dequantize_(model)[2], x, low=False)


def test_a_layer_that_is_also_the_head_is_kept():
    model = nn.Module()
    model.proj, model.other = nn.Linear(8, 8), nn.Linear(8, 8)
    model.lm_head = model.proj
    assert lowbit_report(quantize_(model, "fp4")).swapped == ["other"]


class Holder(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.table = weight


@pytest.mark.parametrize("other", ["linear", "own"])
def test_a_weight_that_another_module_reads_is_refused(other):
    model = net()
    model.append(nn.Linear(32, 32) if other == "linear" else Holder(model[0].weight))
    if other == "linear":
        model[3].weight = model[0].weight
    name = "3.weight" if other == "linear" else "3.table"
    with pytest.raises(EvenstepError, match=rf"^0 shares its weight \(0.weight = {name}\).*untie"):
        quantize_(model, "fp4")
    assert lowbit_report(model).swapped == []
    assert lowbit_report(quantize_(model, "fp4", lambda m, n: n == "2")).swapped == ["2"]


def test_a_shared_bias_and_slices_of_one_buffer_are_no_ties():
    model, x, flat = net(), normal(4, 32), torch.cat([p.detach().flatten() for p in net().parameters()])
    at = 0
    for p in model.parameters():
        p.data = flat[at : at + p.numel()].view_as(p)
        at += p.numel()
    model.append(nn.Linear(8, 8))
    model[3].bias = model[2].bias
    quantize_(model, "fp4")
    assert_low(model[0], x)
    assert lowbit_report(model).swapped == ["0", "2", "3"]
    flat.mul_(0.5)
    assert_low(model[0], x)
    model(x).sum().backward()


# ---- what is no plain nn.Linear ----


class Own(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def test_subclasses_and_lazy_layers_are_kept_and_named():
    model = nn.Sequential(nn.Linear(8, 8), Own(8, 8), nn.LazyLinear(8), nn.LazyConv1d(2, 1))
    report = {layer.name: (layer.low, layer.what) for layer in lowbit_report(quantize_(model, "fp4", every)).layers}
    assert report == {
        "0": (True, report["0"][1]),
        "1": (False, "a Own"),
        "2": (False, "a LazyLinear"),
    }
    assert str(lowbit_report(model)) and type(model[1]) is Own
    model[:3](normal(2, 8))
    assert {x.name: x.what for x in lowbit_report(model).layers}["2"] == "not chosen"
    assert quantize_(model[2:3], "fp4", every)[0](normal(2, 8)).shape == (2, 8)


def test_skipped_initialisation_and_the_meta_device():
    layer = nn.utils.skip_init(nn.Linear, 32, 8)
    layer.load_state_dict(nn.Linear(32, 8).state_dict())
    assert_low(quantize_(layer, "fp4"), normal(4, 32))
    with torch.device("meta"):
        model = quantize_(net(), "fp4")
    assert lowbit_report(model).swapped == ["0", "2"]
    model.to_empty(device="cpu").load_state_dict(net().state_dict())
    assert torch.equal(model(normal(4, 32)), quantize_(net(), "fp4")(normal(4, 32)))


@pytest.mark.slow
def test_lora_before_and_after_and_its_head():
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    tokens = torch.arange(12).view(1, 12)

    def made() -> nn.Module:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config)

    def wrapped(model: nn.Module, **more) -> nn.Module:
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **more))

    want = quantize_(made(), "fp4")(input_ids=tokens).logits
    after = wrapped(quantize_(made(), "fp4"))
    before = quantize_(wrapped(made()), "fp4", lambda module, name: "lora_" not in name and "lm_head" not in name)
    for model in (after, before):  # B of an adapter is zero at first
        assert torch.equal(model(input_ids=tokens).logits, want)
        assert len(lowbit_report(model).swapped) == 7
        model(input_ids=tokens, labels=tokens).loss.backward()
        grads = {name for name, p in model.named_parameters() if p.grad is not None}
        assert grads and all("lora_" in name for name in grads)
    for more in ({"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}):
        lora = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **more})
        swapped = lowbit_report(quantize_(peft.get_peft_model(made(), lora), "fp4")).swapped
        assert swapped and not any("lm_head" in name for name in swapped)


@pytest.mark.parametrize(
    "name",
    ["lm_head._orig_mod", "lm_head.module", "head.modules_to_save.default", "x.router._fsdp_wrapped_module", "gate"],
)
def test_wrapped_heads_and_routers_are_kept(name):
    model = nn.Module()
    inner = model
    for part in name.split(".")[:-1]:
        inner.add_module(part, nn.Module())
        inner = inner.get_submodule(part)
    inner.add_module(name.rpartition(".")[2], nn.Linear(8, 8))
    model.proj = nn.Linear(8, 8)
    report = lowbit_report(quantize_(model, "fp4"))
    assert report.swapped == ["proj"] and report.kept == [name]


# ---- compiled and distributed ----


@pytest.mark.parametrize("wrap", ["model", "layer", "method"])
@pytest.mark.parametrize("when", ["before", "after", "used before"])
def test_compiled_models_are_low_bit(wrap, when):
    torch._dynamo.reset()
    model, x = net(), normal(4, 32)
    want = quantize_(net(), "fp4")(x)
    if when == "after":
        quantize_(model, "fp4")
    if wrap == "model":
        model = torch.compile(model, backend="aot_eager")
    elif wrap == "layer":
        model[0] = torch.compile(model[0], backend="aot_eager")
    else:
        model[0].compile(backend="aot_eager")
    if when == "used before":
        model(x).sum().backward()
    if when != "after":
        quantize_(model, "fp4")
    report = lowbit_report(model)
    assert len(report.swapped) == 2 and report.kept == []
    torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(dequantize_(model)(x), net()(x))


def worker(rank: int, place: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=1)
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
    from torch.distributed.fsdp import fully_shard

    x = normal(4, 32)

    def trained(model: nn.Module) -> torch.Tensor:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        for _ in range(3):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model(x).detach()

    want = trained(quantize_(net(), "fp4"))

    def sharded(model: nn.Module, layers: bool) -> nn.Module:
        for layer in (model[0], model[2]) if layers else ():
            fully_shard(layer)
        fully_shard(model)
        return model

    cases = {
        "ddp before": lambda: nn.parallel.DistributedDataParallel(quantize_(net(), "fp4")),
        "ddp after": lambda: quantize_(nn.parallel.DistributedDataParallel(net()), "fp4"),
        "fsdp2 before": lambda: sharded(quantize_(net(), "fp4"), False),
        "fsdp2 of layers before": lambda: sharded(quantize_(net(), "fp4"), True),
        "fsdp2 after": lambda: quantize_(sharded(net(), False), "fp4"),
        "fsdp1 before": lambda: FSDP1(quantize_(net(), "fp4"), device_id=torch.device("cpu")),
        "fsdp1 after": lambda: quantize_(FSDP1(net(), device_id=torch.device("cpu"), use_orig_params=True), "fp4"),
        "fsdp1 flat after": lambda: quantize_(FSDP1(net(), device_id=torch.device("cpu")), "fp4"),
    }
    found = {}
    for name, made in cases.items():
        model = made()
        found[name] = (len(lowbit_report(model).swapped), float((trained(model) - want).abs().max()))
    layers = sharded(net(), True)
    try:
        quantize_(layers, "fp4")
    except EvenstepError as problem:
        found["fsdp2 of layers after"] = str(problem)
    low = sharded(quantize_(net(), "fp4"), True)
    try:
        dequantize_(low)
    except EvenstepError as problem:
        found["undone"] = str(problem)
    found["kept"] = [layer.what for layer in lowbit_report(layers).layers]
    torch.save(found, f"{place}/found.pt")


@pytest.mark.slow
def test_ddp_and_fsdp_wrapped_models_train_as_the_bare_one_does(tmp_path):
    run_processes(worker, str(tmp_path), count=1)
    found = torch.load(tmp_path / "found.pt")
    assert "FSDPLinear (2) is no nn.Linear" in found.pop("fsdp2 of layers after")
    assert found.pop("undone").startswith("0 is a FSDPLowBitLinear")
    assert found.pop("kept") == ["a FSDPLinear", "a FSDPLinear"]
    for name, (swapped, difference) in found.items():
        assert swapped == 2 and difference < 1e-5, name
