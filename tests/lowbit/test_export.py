"""Packed models: back to the same outputs to the bit, in the layout others read where there is one."""

import json

import pytest
import torch
from torch import nn

from evenstep.errors import EvenstepError
from evenstep.lowbit import RECIPES, LowBitLinear, Recipe, lowbit_report, quantize_
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


# ---- what a state holds besides weights ----


def pair(made, change=lambda model: None, recipe: str = "fp4", filter_fn=lambda module, name: True):
    """A low-bit model, and a plain one of the same architecture with other numbers."""
    torch.manual_seed(0)
    model = made()
    torch.manual_seed(1)
    fresh = made()
    quantize_(model, recipe, filter_fn)
    change(model)
    return model, fresh


def round_trip(model: nn.Module, fresh: nn.Module, x: torch.Tensor, path) -> nn.Module:
    """Saves and loads twice (over what is there), and compares outputs and every other entry of the state."""
    for _ in range(2):
        save_quantized(model, path)
    loaded = load_quantized_(fresh, path)
    assert loaded is fresh and torch.equal(loaded(x), model(x)) and loaded(x).dtype == model(x).dtype
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "model.safetensors"]
    return loaded


class Tied(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed, self.mid, self.lm_head = nn.Embedding(9, 32), nn.Linear(32, 32), nn.Linear(32, 9, bias=False)
        self.lm_head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.mid(self.embed(x)))


@pytest.mark.parametrize("recipe", ["fp4", "nvfp4", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tied_head_is_stored_once_and_comes_back_tied(recipe, dtype, tmp_path):
    import safetensors.torch

    model, fresh = pair(lambda: Tied(dtype), recipe=recipe, filter_fn=None)
    loaded = round_trip(model, fresh, torch.arange(9), tmp_path)
    assert loaded.lm_head.weight is loaded.embed.weight and lowbit_report(loaded).swapped == ["mid"]
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert "embed.weight" in stored and "lm_head.weight" not in stored
    untied = Tied(dtype)
    untied.lm_head.weight = nn.Parameter(torch.zeros(9, 32, dtype=dtype))
    assert torch.equal(load_quantized_(untied, tmp_path)(torch.arange(9)), model(torch.arange(9)))


@pytest.mark.parametrize("through", ["parameter", "data"])
def test_a_low_bit_layer_tied_afterwards_is_stored_whole_and_stays_low_bit(through, tmp_path):
    def tie(model: nn.Module) -> None:
        if through == "parameter":
            model.lm_head.weight = model.embed.weight
        else:
            model.lm_head.weight.data = model.embed.weight.data

    def made() -> nn.Module:
        model = Tied()
        model.lm_head.weight = nn.Parameter(torch.randn(9, 32))
        return model

    model, fresh = pair(made, tie)
    tie(fresh)
    loaded = round_trip(model, fresh, torch.arange(9), tmp_path)
    assert lowbit_report(loaded).swapped == ["mid", "lm_head"] and loaded.lm_head.recipe.weight is not None


def test_layers_used_twice_and_layers_that_share_a_bias(tmp_path):
    def made(shared: bool = True) -> nn.Module:
        layer = nn.Linear(16, 16)
        last = nn.Linear(16, 16)
        model = nn.Sequential(layer, nn.Tanh(), layer if shared else nn.Linear(16, 16), last)
        last.bias = layer.bias
        return model

    model, fresh = pair(made)
    x = torch.randn(3, 16)
    loaded = round_trip(model, fresh, x, tmp_path)
    assert loaded[0] is loaded[2] and loaded[0].bias is loaded[3].bias
    apart = round_trip(model, made(shared=False), x, tmp_path)  # the layers of the loaded model need not be one
    assert lowbit_report(apart).swapped == ["0", "2", "3"] and apart[0] is not apart[2]


class Odd(nn.Module):
    """State of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(16, 16), nn.Linear(16, 4)
        flat = torch.randn(8 * 16)
        self.register_buffer("flat", flat)
        self.register_buffer("part", flat[:16])
        self.register_buffer("overlapping", flat[8:24])
        self.register_buffer("turned", torch.randn(3, 16).t())
        self.register_buffer("every_second", torch.randn(32)[::2])
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("mask", torch.rand(16) > 0.5)
        self.register_buffer("short", torch.randn(16).bfloat16())
        self.register_buffer("none", None)
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("empty_too", torch.zeros(0))
        self.register_buffer("passing", torch.ones(16), persistent=False)
        self.layer.weight.data = torch.randn(16, 16).t()  # not contiguous
        self.slope = nn.Parameter(torch.randn(1, 16).expand(1, 16))
        self.steps: object = 0

    def get_extra_state(self) -> object:
        return self.steps

    def set_extra_state(self, state: object) -> None:
        self.steps = state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.part + self.overlapping + self.turned.sum(1) + self.every_second + self.short.float()
        return self.last(self.layer(x * self.slope) * self.mask * self.passing * self.count)


EXTRA = [None, 7, "text", {"a": [1, 2.5, None], "b": torch.arange(3)}, torch.arange(4), (1, {"c": torch.ones(2)})]


@pytest.mark.parametrize("extra", EXTRA, ids=lambda value: type(value).__name__)
def test_views_dtypes_and_extra_state_come_back(extra, tmp_path):
    model, fresh = pair(Odd)
    model.steps = extra
    fresh.steps = torch.zeros(4, dtype=torch.int64) if isinstance(extra, torch.Tensor) else "nothing"
    loaded = round_trip(model, fresh, torch.randn(3, 16), tmp_path)
    assert repr(loaded.steps) == repr(extra)
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor) and name not in ("layer.weight", "last.weight"):
            other = loaded.state_dict()[name]
            assert torch.equal(other, value) and other.dtype == value.dtype, name
    assert loaded.part.data_ptr() == loaded.flat.data_ptr()


def test_weights_that_are_slices_of_one_buffer(tmp_path):
    def made() -> nn.Module:
        model, flat = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), torch.randn(3, 16, 16)
        model[0].weight.data, model[1].weight.data = flat[0], flat[1]
        model.register_buffer("rest", flat[1:])
        return model

    model, _ = pair(made)
    save_quantized(model, tmp_path)
    loaded = load_quantized_(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), _without(tmp_path, "rest"))
    x = torch.randn(3, 16)
    assert torch.equal(loaded(x), model(x))


def _without(path, name: str):
    import safetensors.torch

    tensors = safetensors.torch.load_file(path / "model.safetensors")
    del tensors[name]  # with the digest of the description
    safetensors.torch.save_file(tensors, path / "model.safetensors")
    return path


def test_a_recipe_for_inputs_alone_comes_back_too(tmp_path):
    model, fresh = pair(lambda: nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)), filter_fn=lambda m, n: n == "0")
    quantize_(model, Recipe(input="mxfp4"), lambda module, name: name == "1")
    loaded = round_trip(model, fresh, torch.randn(3, 16), tmp_path)
    assert lowbit_report(loaded).swapped == ["0", "1"]
    with pytest.raises(EvenstepError, match="no low-bit weights to pack"):  # all of them are rounded already
        save_quantized(loaded, tmp_path / "again")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_computed_weight_is_stored_as_what_it_is_computed_from(tmp_path):
    def made() -> nn.Module:
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(16, 16)), nn.Linear(16, 8))

    loaded = round_trip(*pair(made), torch.randn(3, 16), tmp_path)
    assert "weight_g" in dict(loaded[0].named_parameters())


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_another_dtype_takes_the_one_that_was_saved(saved, tmp_path):
    def made() -> nn.Module:
        return nn.Sequential(nn.Linear(40, 24), nn.LayerNorm(24), nn.Linear(24, 8))

    model, fresh = pair(lambda: made().to(saved))
    fresh = made()
    before = list(fresh.parameters())
    loaded = round_trip(model, fresh, torch.randn(3, 40, dtype=saved), tmp_path)
    assert all(a is b and a.dtype == saved for a, b in zip(before, loaded.parameters(), strict=True))


@pytest.mark.parametrize("wrap", ["compiled", "compiled block", "checkpointed block", "ddp"])
def test_wrapped_models_are_saved_and_loaded_under_the_bare_names(wrap, tmp_path, monkeypatch):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def bare() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))

    def wrapped(model: nn.Module) -> nn.Module:
        if wrap == "compiled":
            return torch.compile(model, backend="eager")
        if wrap == "ddp":
            monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Outer)
            return Outer(model)
        model[0] = (
            torch.compile(model[0], backend="eager") if wrap == "compiled block" else checkpoint_wrapper(model[0])
        )
        return model

    torch._dynamo.reset()
    x, model = torch.randn(3, 16), quantize_(wrapped(bare()), "fp4")
    round_trip(model, bare(), x, tmp_path)
    loaded = load_quantized_(wrapped(bare()), tmp_path)
    assert torch.equal(loaded(x), model(x)) and len(lowbit_report(loaded).swapped) == 2


class Outer(nn.Module):
    """In the place of DDP, which needs a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


# ---- failures ----


class Picky:
    pass


def unreadable(model: nn.Module) -> None:
    model.steps = Picky()


def unpicklable(model: nn.Module) -> None:
    model.steps = lambda: None


def sparse(model: nn.Module) -> None:
    model.flat = torch.eye(3).to_sparse()


def on_meta(model: nn.Module) -> None:
    model.last.to("meta")


def named_like_a_part(model: nn.Module) -> None:
    model.layer.register_buffer("weight_scale", torch.ones(1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (unreadable, r"_extra_state is a Picky that torch.load\(weights_only=True\) would not read"),
        (unpicklable, "_extra_state is a function"),
        (sparse, "flat is of type Tensor, layout torch.sparse_coo"),
        (on_meta, "last.weight is of type .* on meta"),
        (named_like_a_part, "layer.weight_scale has the name of a part"),
    ],
)
def test_what_cannot_be_saved_leaves_the_files_as_they_were(change, words, tmp_path):
    model, fresh = pair(Odd)
    x = torch.randn(3, 16)
    round_trip(model, fresh, x, tmp_path)
    want = model(x)
    change(model)
    with pytest.raises(EvenstepError, match=words) as caught:
        save_quantized(model, tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(EvenstepError):
        save_quantized(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert torch.equal(load_quantized_(Odd(), tmp_path)(x), want)


def test_files_of_two_saves_are_not_mixed(tmp_path):
    for name, recipe in (("a", "nvfp4"), ("b", "mxfp4")):
        save_quantized(quantize_(nn.Linear(32, 16), recipe), tmp_path / name)
    (tmp_path / "a" / "config.json").replace(tmp_path / "b" / "config.json")
    with pytest.raises(EvenstepError, match="its two files are of different saves"):
        load_quantized_(nn.Linear(32, 16), tmp_path / "b")


@pytest.mark.parametrize("failing", ["weights", "config", "rename", "folder"])
def test_a_disk_that_refuses_leaves_the_files_as_they_were(failing, tmp_path, monkeypatch):
    import safetensors.torch

    from evenstep.lowbit import export

    def refuse(*args, **options):
        if failing == "weights":
            (tmp_path / ".model.safetensors.partial").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    model, fresh = pair(lambda: nn.Sequential(nn.Linear(16, 16)))
    x = torch.randn(3, 16)
    want = round_trip(model, fresh, x, tmp_path)(x)
    names = sorted(p.name for p in tmp_path.iterdir())
    with monkeypatch.context() as patch:
        if failing == "weights":
            patch.setattr(safetensors.torch, "save_file", refuse)
        elif failing == "config":
            patch.setattr(export.Path, "write_text", refuse)
        elif failing == "rename":
            patch.setattr(export.os, "replace", refuse)
        model[0].weight.data.mul_(2)
        target = tmp_path / "model.safetensors" if failing == "folder" else tmp_path
        with pytest.raises(EvenstepError, match="could not save to"):
            save_quantized(model, target)
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert torch.equal(load_quantized_(nn.Sequential(nn.Linear(16, 16)), tmp_path)(x), want)
    with pytest.raises(EvenstepError, match="config cannot be written as JSON"):
        save_quantized(model, tmp_path, {"dtype": torch.float32})
    assert torch.equal(load_quantized_(nn.Sequential(nn.Linear(16, 16)), tmp_path)(x), want)


def test_a_model_that_cannot_be_filled_is_refused_before_anything_changes(tmp_path):
    def made() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))

    model, _ = pair(made)
    save_quantized(model, tmp_path)
    low, hooked, meta, short = pair(made)[0], made(), made().to("meta"), nn.Sequential(nn.Linear(16, 16))
    normed = made()
    nn.utils.parametrizations.weight_norm(normed[0])
    hooked[1].forward = lambda x: x
    for target, words in (
        (low, "0 is a LowBitLinear, not a plain Linear"),
        (normed, "0 is a ParametrizedLinear"),
        (hooked, "1 has a forward of its own"),
        (meta, "0.* is on the meta device; call model.to_empty"),
        (short, "it has no layer 1"),
    ):
        before = [p.clone() for p in target.parameters()]
        with pytest.raises(EvenstepError, match=words) as caught:
            load_quantized_(target, tmp_path)
        assert "\n" not in str(caught.value)
        if target is not meta:
            assert all(torch.equal(a, b) for a, b in zip(before, target.parameters(), strict=True))
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(EvenstepError, match="holds no model written by save_quantized"):
        load_quantized_(made(), tmp_path)
