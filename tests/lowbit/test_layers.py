"""The layers' promises: nothing seen from outside changes, no token sees a later one, gradients and memory as said."""

import copy

import pytest
import torch
from lowbit_models import OFFICIAL, OURS, batch, llama, quiet
from lowbit_support import operands
from torch import nn

import evenstep
from evenstep.errors import EvenstepError
from evenstep.lowbit import (
    FORMATS,
    RECIPES,
    Backward,
    LowBitLinear,
    Recipe,
    dequantize_,
    fake_quantize,
    lowbit_report,
    quantize_,
)
from evenstep.models import Llama, llama_config, load_pretrained, save_pretrained

# ---- the swap ----


def test_the_package_loads_it_on_first_use():
    assert evenstep.quantize_ is quantize_


@pytest.mark.parametrize("recipe", RECIPES)
def test_parameters_names_and_modules_stay_what_they_are(recipe):
    model = llama()
    before = dict(model.named_parameters())
    layer = model.model.layers[0].mlp.down_proj
    calls = []
    layer.register_forward_hook(lambda *args: calls.append(1))
    assert quiet(model, recipe) is model
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert model.model.layers[0].mlp.down_proj is layer and isinstance(layer, LowBitLinear)
    low = model(batch()[0])
    assert calls == [1] and f"recipe={recipe}" in repr(layer)
    plain = llama(1)
    plain.load_state_dict(model.state_dict())
    assert not torch.equal(plain(batch()[0]), low)
    high = dequantize_(model)
    assert high is model and not any(isinstance(m, LowBitLinear) for m in model.modules())
    assert torch.equal(model(batch()[0]), plain(batch()[0]))


def test_the_report_says_what_was_swapped_and_what_was_kept():
    report = lowbit_report(quantize_(llama(), "nvfp4-train"))
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.rpartition(".")[2] for name in report.swapped} == projections and len(report.swapped) == 14
    assert {name for name in report.kept if ".layers." not in name} == {"model.embed_tokens", "lm_head"}
    assert all(".layers.2." in name for name in report.kept if ".layers." in name)  # the last 15 %: one block of three
    assert "lm_head" in str(report) and "head" in str(report) and "bits per weight" in str(report)
    assert lowbit_report(quantize_(llama(), "mxfp8")).bits_per_weight == pytest.approx(8 + 8 * 2 / 40, rel=0.1)


def test_any_module_a_root_layer_a_bias_and_a_filter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 20), nn.GELU(), nn.Linear(20, 5))
    quantize_(model, "fp4", lambda module, name: name == "0")
    assert [type(m) for m in model] == [LowBitLinear, nn.GELU, nn.Linear]
    root, x = nn.Linear(33, 4), torch.randn(2, 3, 33)
    want = nn.functional.linear(
        fake_quantize(x, RECIPES["fp4"].input), fake_quantize(root.weight, RECIPES["fp4"].weight), root.bias
    )
    assert torch.equal(quantize_(root, "fp4")(x), want)


def test_it_works_on_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    names = list(model.state_dict())
    report = lowbit_report(quantize_(model, "nvfp4"))
    assert len(report.swapped) == 14 and report.kept == ["model.embed_tokens", "lm_head"]
    tokens, targets = batch()
    model(input_ids=tokens, labels=targets).loss.backward()
    assert list(model.state_dict()) == names and all(p.grad is not None for p in model.parameters())
    later = tokens.clone()
    later[:, 8] += 1
    assert torch.equal(model(input_ids=tokens).logits[:, :8], model(input_ids=later % 61).logits[:, :8])


def test_heads_are_kept_whatever_they_are_called_and_the_report_names_all_that_holds_matrices():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, intermediate_size=50))
    report = {layer.name: layer.what for layer in lowbit_report(quantize_(model, "int4")).layers if not layer.low}
    assert report["cls.predictions.decoder"] == "head" and len(report) == 4
    experts = {"num_key_value_heads": 2, "num_local_experts": 2, "intermediate_size": 50}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **experts))
    report = lowbit_report(quantize_(model, "int4"))
    assert len(report.swapped) == 4 and "model.layers.0.mlp.experts.down_proj" in report.kept
    tied = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    tied[2].weight = tied[0].weight
    layers = lowbit_report(quantize_(tied, "fp4")).layers
    assert [layer.what for layer in layers if not layer.low] == ["embedding", "tied to 0"]
    with pytest.raises(EvenstepError, match=r"2 shares its weight"):
        quantize_(dequantize_(tied), "fp4", lambda module, name: True)


@pytest.mark.parametrize("masked", [True, False])
def test_torchs_own_transformer_layers_are_quantised_in_eval_mode_too(masked):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model, x = nn.TransformerEncoder(layer, 2), torch.randn(2, 5, 32)
    mask = {"src_key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])} if masked else {}
    seen = (slice(None), slice(0, 3))  # what is masked is zero in the shortcut
    with torch.no_grad():
        high = model.eval()(x, **mask)
        quantize_(model, "int2")
        low = model.train()(x, **mask)
        torch.testing.assert_close(model.eval()(x, **mask)[seen], low[seen])
        assert (high[seen] - low[seen]).abs().max() > 0.1
        torch.testing.assert_close(dequantize_(model)(x, **mask), high)


def test_what_was_trained_low_is_saved_and_loaded_as_any_model(tmp_path):
    model = quantize_(llama(), "int4")
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert torch.equal(quantize_(loaded, "int4")(batch()[0]), model(batch()[0]))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(batch()[0]), model(batch()[0]))


# ---- causality ----


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("recipe", OURS)
def test_a_later_token_changes_no_earlier_logit(recipe, training):
    model = quantize_(llama(), recipe).train(training)
    tokens = batch()[0]
    for at in (1, 6, 11):
        changed = tokens.clone()
        changed[:, at] = (changed[:, at] + 1) % 61
        before, after = model(tokens), model(changed)
        assert torch.equal(before[:, :at], after[:, :at])
        assert (before[:, at:] != after[:, at:]).any()


@pytest.mark.parametrize("recipe", OFFICIAL)
def test_the_official_recipes_leak_the_next_token_and_say_so_once(recipe):
    model = llama()
    with pytest.warns(UserWarning, match=f"recipe {recipe}.*a token can see later ones") as caught:
        quantize_(model, recipe)
    assert len(caught) == 1
    tokens = batch()[0]
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 61
    assert not torch.equal(model(tokens)[:, :6], model(changed)[:, :6])


def test_a_tensor_wide_input_scale_warns_too():
    with pytest.warns(UserWarning, match="a token can see later ones"):
        quantize_(llama(), Recipe(input=FORMATS["nvfp4"]))


# ---- memory ----


def kept(model: nn.Module, run) -> int:
    own, storages = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run(model)
    del out
    return sum(storages.values())


@pytest.mark.parametrize("recipe", OURS)
def test_nothing_more_is_kept_for_the_backward_pass_than_by_the_plain_model(recipe):
    def tiny() -> Llama:  # its attention keeps its output, which is also o_proj's input
        return Llama(llama_config("tiny", 61))

    def run(model):
        return model(torch.arange(256).view(2, 128) % 61)

    assert kept(quantize_(tiny(), recipe), run) <= kept(tiny(), run)


# ---- dtypes, compilation, checkpointing ----


def test_bf16_parameters_and_autocast_round_the_quantised_operands():
    x, w, _ = operands()
    for recipe in ("fp4", "nvfp4", "int8"):
        formats = RECIPES[recipe]
        layer = nn.Linear(64, 48, bias=True)
        layer.weight = nn.Parameter(w.clone())
        low = quantize_(copy.deepcopy(layer), recipe)
        with torch.autocast("cpu", torch.bfloat16):
            y = low(x)
        want = nn.functional.linear(
            fake_quantize(x, formats.input).bfloat16(),
            fake_quantize(w, formats.weight).bfloat16(),
            layer.bias.bfloat16(),
        )
        assert y.dtype == torch.bfloat16 and torch.equal(y, want)
        y.float().sum().backward()
        assert low.weight.grad.dtype == low.bias.grad.dtype == torch.float32
        half = quantize_(copy.deepcopy(layer).bfloat16(), recipe)
        y = half(x.bfloat16())
        y.sum().backward()
        assert y.dtype == half.weight.grad.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match=r"the input is torch\.float64"):
        quantize_(nn.Linear(8, 8), "fp4")(torch.zeros(1, 8, dtype=torch.float64))


@pytest.mark.parametrize("recipe", ["fp4", "int4", "nvfp4-train"])
def test_activation_checkpointing_gives_the_same_gradients(recipe):
    plain, saving = quantize_(llama(), recipe), quantize_(llama(), recipe)
    saving.activation_checkpointing = True
    for model in (plain, saving):
        torch.manual_seed(2)
        model.loss(*batch()).backward()
    if recipe != "nvfp4-train":  # its draws come in another order
        for p, q in zip(plain.parameters(), saving.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp4", "int4", "nvfp4", "nvfp4-train", "mxfp4", "fp8"])
def test_it_compiles_without_a_graph_break_to_the_same_numbers(recipe):
    eager, compiled = quantize_(llama(), recipe), quantize_(llama(), recipe)
    for block in compiled.model.layers:
        block.compile(fullgraph=True, dynamic=False)
    losses = []
    for model in (eager, compiled):
        loss = model.loss(*batch())
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1])
    if recipe != "nvfp4-train":
        for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
            assert (p.grad - q.grad).norm() <= 1e-4 * p.grad.norm()


# ---- bad input ----


def test_what_cannot_be_quantised_is_refused_and_nothing_is_changed():
    model = llama()
    for call, words in (
        (lambda: quantize_(model, "nvfp"), "unknown low-bit recipe 'nvfp'.*did you mean 'nvfp4'"),
        (lambda: quantize_(model, "fp4", backend="cuda"), "unknown backend 'cuda'"),
        (lambda: quantize_(nn.ReLU(), "fp4"), "found no layer.*ReLU.*linear layers: 0"),
        (lambda: quantize_(model, "fp4", lambda m, n: False), "linear layers: 22, of which filter_fn accepts none"),
        (lambda: quantize_(nn.Conv2d(2, 3, 1), "fp4"), r"the name rules accept none; Conv2d \(1\) is no nn.Linear"),
        (lambda: Recipe(weight="e2m2"), "unknown format 'e2m2'"),
        (lambda: Recipe(keep_last=1.0), "keep_last is 1.0"),
        (lambda: Recipe(input=FORMATS["nvfp4-16x16"]), "would mix tokens"),
        (lambda: Backward(hadamard=True), "needs operands of its own"),
    ):
        with pytest.raises(EvenstepError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not any(isinstance(m, LowBitLinear) for m in model.modules())


def test_a_layer_quantised_by_another_library_is_refused():
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), lambda module, name: name == "1")
    with pytest.raises(EvenstepError, match=r"^1 has a weight of type Int8Tensor.*quantised already"):
        quantize_(model, "fp4")
    quantize_(model, "fp4", lambda module, name: name == "0")


def test_tied_and_already_low_layers_are_refused():
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    with pytest.raises(EvenstepError, match=r"0 shares its weight \(0.weight = 1.weight\)"):
        quantize_(tied, "fp4")
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight  # a tied head is kept anyway
    quantize_(model, "fp4")
    with pytest.raises(EvenstepError, match=r"low-bit already.*recipe fp4.*dequantize_"):
        quantize_(model, "int4")
    quantize_(dequantize_(model), "int4")
