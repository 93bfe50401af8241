"""A low-bit model on disk: packed codes and scales instead of weights, and back to the same outputs to the bit.

``model.safetensors`` holds every parameter and buffer as ``state_dict`` names it, except that the ``weight`` of each
low-bit layer is replaced by its parts; ``config.json`` says under ``evenstep_lowbit`` how to read them. Formats with a
home in the compressed-tensors layout (layouts.py) are written in it, with its ``quantization_config``. The others, in
particular all with kept outliers, which no such layout knows, use the same names where they mean the same, and some of
our own.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from evenstep.errors import EvenstepError
from evenstep.lowbit.fast_paths import close_fast_paths
from evenstep.lowbit.formats import Format
from evenstep.lowbit.layouts import PACKED_INTEGERS, Layout, from_parts, layout_of, to_parts
from evenstep.lowbit.linear import LowBitLinear, make_low
from evenstep.lowbit.quantized import SCALE_DTYPES, Quantized, dequantize, quantize
from evenstep.lowbit.recipes import Backward, Recipe

M = TypeVar("M", bound=nn.Module)

KEY = "evenstep_lowbit"
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
_PARTS = {
    "codes": "weight_packed",
    "scale": "weight_scale",
    "zero": "weight_zero_point",
    "tensor_scale": "weight_tensor_scale",
    "positions": "weight_outlier_positions",
    "kept": "weight_outliers",
}


def save_quantized(model: nn.Module, directory: str | Path, config: dict[str, Any] | None = None) -> None:
    """Write ``model``, some of whose layers are low-bit, into ``directory`` (made if missing).

    ``config``: what else ``config.json`` should hold; default: the model's own, where it is transformers'. The
    compressed-tensors layout is used where all low-bit layers have one format with a home there and widths that its
    groups divide. Raises ``EvenstepError`` for a model without low-bit weights, and without safetensors.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LowBitLinear) and module.recipe.weight is not None
    }
    if not layers:
        raise EvenstepError(f"{type(model).__name__} has no low-bit weights to pack: quantize_ it first")
    layout = _layout(list(layers.values()))
    tensors = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
    described: dict[str, Any] = {}
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        weight = tensors.pop(f"{prefix}weight")
        assert layer.recipe.weight is not None
        q = quantize(weight, layer.recipe.weight)
        parts = to_parts(q, layout) if layout else _own_parts(q)
        tensors |= {prefix + key: t.contiguous() for key, t in parts.items()}
        described[name] = {
            "shape": list(weight.shape),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "recipe": dataclasses.asdict(layer.recipe),
            # compressed-tensors keeps the reciprocal, which does not give every number back.
            **({"tensor_scale": float(q.tensor_scale).hex()} if layout and q.tensor_scale is not None else {}),
        }
    if config is None:
        own: Any = getattr(model, "config", None)
        config = own.to_dict() if hasattr(own, "to_dict") else {}
    content = {**config, KEY: {"layout": layout.name if layout else None, "layers": described}}
    if layout:
        content["quantization_config"] = _quantization_config(model, layout, next(iter(layers.values())))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _safetensors().save_file(tensors, directory / _WEIGHTS, metadata={"format": "pt"})
    (directory / _CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_quantized_(model: M, directory: str | Path) -> M:
    """Fill ``model``, of the architecture that was saved and not low-bit, from ``directory``, in place; returns it.

    Its low-bit layers hold the weights that the codes stand for, as ordinary parameters, and compute the saved model's
    outputs to the bit; their recipe leaves weights alone, since they are rounded already. Raises ``EvenstepError`` for
    missing or foreign files and for a model of another shape.
    """
    directory = Path(directory)
    try:
        saved = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))[KEY]
        tensors = _safetensors().load_file(directory / _WEIGHTS)
    except (OSError, ValueError, KeyError) as problem:
        raise EvenstepError(
            f"{directory} holds no model written by save_quantized ({type(problem).__name__}: {problem})"
        ) from None
    recipes = {}
    for name, facts in saved["layers"].items():
        prefix = f"{name}." if name else ""
        recipe = _recipe(facts["recipe"])
        keys = {key for key in tensors if key.startswith(f"{prefix}weight") and "." not in key[len(prefix) :]}
        parts = {key[len(prefix) :]: tensors.pop(key) for key in keys}
        tensors[f"{prefix}weight"] = dequantize(_quantized(parts, recipe, facts, saved["layout"] is not None))
        recipes[name] = dataclasses.replace(recipe, weight=None)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as problem:
        reason = str(problem).splitlines()[1:2] or [str(problem)]
        raise EvenstepError(
            f"the model in {directory} does not fit this {type(model).__name__}: {reason[0].strip()}"
        ) from None
    for name, recipe in recipes.items():
        make_low(model.get_submodule(name), recipe, None)
    close_fast_paths(model)
    return model


def _layout(layers: list[LowBitLinear]) -> Layout | None:
    formats = {layer.recipe.weight for layer in layers}
    fmt = formats.pop()
    if fmt is None or formats or (fmt.group and any(layer.in_features % fmt.group for layer in layers)):
        return None
    return layout_of(fmt)


def _own_parts(q: Quantized) -> dict[str, Tensor]:
    """Stored tensors by their name after the layer's, where no layout holds them."""
    stored = {_PARTS[name]: t for name, t in q.pack().tensors().items()}
    if q.format.scale == "e8m0":
        stored["weight_scale"] = q.scale.view(torch.uint8)
    return stored


def _quantized(parts: dict[str, Tensor], recipe: Recipe, facts: dict[str, Any], in_layout: bool) -> Quantized:
    fmt, shape = recipe.weight, torch.Size(facts["shape"])
    assert fmt is not None
    layout = layout_of(fmt) if in_layout else None
    if layout:
        named = from_parts(parts, fmt, layout, shape)
        if "tensor_scale" in facts:
            named["tensor_scale"] = torch.tensor(float.fromhex(facts["tensor_scale"]))
    else:
        named = {attribute: parts[key] for attribute, key in _PARTS.items() if key in parts}
        named["scale"] = named["scale"].view(SCALE_DTYPES[fmt.scale])
    return Quantized(fmt, shape, getattr(torch, facts["dtype"]), packed=layout is None, **named)


def _recipe(fields: dict[str, Any]) -> Recipe:
    """The inverse of ``dataclasses.asdict``."""

    def fmt(given: Any) -> Any:
        return Format(**given) if isinstance(given, dict) else given

    products = {
        key: Backward(**{**fields[key], "grad": fmt(fields[key]["grad"]), "other": fmt(fields[key]["other"])})
        for key in ("input_grad", "weight_grad")
    }
    return Recipe(**{**fields, "weight": fmt(fields["weight"]), "input": fmt(fields["input"]), **products})


def _quantization_config(model: nn.Module, layout: Layout, layer: LowBitLinear) -> dict[str, Any]:
    # Of inputs it knows a scale per token or group of 32, but no kept outliers, no NVFP4 with a scale per token, and
    # another scale for integers in groups.
    known = layout_of(layer.recipe.input) if layer.recipe.input else None
    inputs = None
    if known and known.name != PACKED_INTEGERS:
        token = {"strategy": "token"} if known.arguments["strategy"] == "channel" else {}
        inputs = {**known.arguments, **token, "dynamic": True}

    kept = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, LowBitLinear)
    ]
    group = {
        "targets": ["Linear"],
        "weights": {**layout.arguments, "dynamic": False},
        "input_activations": inputs,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout.name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": kept,
    }


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise EvenstepError("packed models need the package safetensors: pip install 'evenstep[train]'") from None
    return safetensors.torch
