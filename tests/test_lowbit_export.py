"""Packed models: back to the same outputs to the bit, in the layout others read where there is one."""

import json

import pytest
import torch
from torch import nn

from evenstep.errors import EvenstepError
from evenstep.lowbit import RECIPES, LowBitLinear, lowbit_report, quantize_
from evenstep.lowbit.export import load_quantized_, save_quantized
from evenstep.models import Llama, LlamaConfig

pytest.importorskip("safetensors")
OURS = [name for name, recipe in RECIPES.items() if recipe.causal]
LAYOUTS = {
    "nvfp4": "nvfp4-pack-quantized",
    "nvfp4-train": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp6": "mxfp6-pack-quantized",
    "mxfp8": "mxfp8-quantized",
    **dict.fromkeys(("a4w4", "int4", "int3", "int2"), "pack-quantized"),
    "fp8": "float-quantized",
    "int8": "int-quantized",
}


WIDE = {recipe for recipe, layout in LAYOUTS.items() if layout == "pack-quantized"}
"""Their groups are wider than the small model."""


def llama(hidden: int = 64, seed: int = 0) -> Llama:
    torch.manual_seed(seed)
    shape = {"hidden_size": hidden, "intermediate_size": 512 if hidden == 256 else 96, "num_layers": 2, "num_heads": 4}
    return Llama(LlamaConfig(vocab_size=61, init_std=0.2, **shape))


TOKENS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize(
    ("recipe", "hidden"), [(r, h) for r in OURS for h in (64, 40)] + [(r, 256) for r in sorted(WIDE)]
)
def test_a_packed_model_loads_back_to_the_same_outputs_to_the_bit(recipe, hidden, tmp_path):
    model = quantize_(llama(hidden), recipe)
    save_quantized(model, tmp_path)
    loaded = load_quantized_(llama(hidden, seed=1), tmp_path)
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert lowbit_report(loaded).swapped == lowbit_report(model).swapped
    assert all(type(p) is nn.Parameter for p in loaded.parameters())
    saved = json.loads((tmp_path / "config.json").read_text())
    fits = recipe in ("fp8", "int8") or hidden == (256 if recipe in WIDE else 64)  # the groups divide every width
    assert saved["evenstep_lowbit"]["layout"] == (LAYOUTS.get(recipe) if fits else None)
    loaded.loss(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    assert all(p.grad is not None for p in loaded.parameters())


@pytest.mark.parametrize(("recipe", "bits"), [("mxfp4", 4.25), ("mxfp6", 6.25), ("int3", 3 + 35 / 256)])
def test_four_bits_take_four_bits_and_six_take_six(recipe, bits, tmp_path):
    model = quantize_(llama(256), recipe)
    save_quantized(model, tmp_path)
    stored = (tmp_path / "model.safetensors").stat().st_size
    low = sum(m.weight.numel() for m in model.modules() if isinstance(m, LowBitLinear))
    high = sum(p.numel() for p in model.parameters()) - low
    assert stored - 4 * high == pytest.approx(low * bits / 8, abs=10000)  # and the file's header


@pytest.mark.parametrize("recipe", LAYOUTS)
def test_the_compressed_tensors_layout_is_read_by_its_own_library(recipe, tmp_path):
    pytest.importorskip("compressed_tensors")
    import safetensors.torch
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    from evenstep.lowbit import fake_quantize

    model = quantize_(llama(256 if recipe in WIDE else 64), recipe)
    save_quantized(model, tmp_path)
    config = QuantizationConfig.model_validate(
        json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    )
    assert config.format == LAYOUTS[recipe] and "lm_head" in config.ignore
    name = "model.layers.0.mlp.down_proj"
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    parts = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
    reader = BaseCompressor.get_value_from_registry(config.format)
    weight = reader.decompress(parts, config.config_groups["group_0"])["weight"]
    layer = model.get_submodule(name)
    want = fake_quantize(layer.weight, layer.recipe.weight).detach()
    if recipe in WIDE:
        assert torch.equal(weight, want)
    else:  # the library multiplies in bf16, or keeps the reciprocal of a scale
        torch.testing.assert_close(weight.float(), want, rtol=1e-2, atol=1e-6)


def test_bf16_weights_and_a_bias_come_back(tmp_path):
    torch.manual_seed(0)
    model = quantize_(nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 8)).bfloat16(), "int4")
    x = torch.randn(3, 40, dtype=torch.bfloat16)
    save_quantized(model, tmp_path, {"note": "kept"})
    loaded = load_quantized_(nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 8)).bfloat16(), tmp_path)
    assert torch.equal(loaded(x), model(x)) and json.loads((tmp_path / "config.json").read_text())["note"] == "kept"


def test_what_is_missing_or_does_not_fit_is_one_clear_line(tmp_path):
    with pytest.raises(EvenstepError, match="no low-bit weights to pack"):
        save_quantized(llama(), tmp_path)
    with pytest.raises(EvenstepError, match="holds no model written by save_quantized"):
        load_quantized_(llama(), tmp_path)
    save_quantized(quantize_(llama(), "fp4"), tmp_path)
    with pytest.raises(EvenstepError, match="does not fit this Llama: size mismatch") as caught:
        load_quantized_(llama(40), tmp_path)
    assert "\n" not in str(caught.value)
