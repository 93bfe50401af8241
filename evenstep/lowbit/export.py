"""A low-bit model on disk: packed codes and scales instead of weights, and back to the same outputs to the bit.

``model.safetensors`` holds every parameter and buffer as ``state_dict`` names it, except that the ``weight`` of each
low-bit layer is replaced by its parts; ``config.json`` says under ``evenstep_lowbit`` how to read them. Formats with a
home in the compressed-tensors layout (layouts.py) are written in it, with its ``quantization_config``. The others, in
particular all with kept outliers, which no such layout knows, use the same names where they mean the same, and some of
our own.

Not packed, but stored whole with the recipe, are weights that others read too (tied ones) or that are computed from
others in each pass (weight_norm, parametrizations), and those of layers that leave weights alone. What several names
share is stored once; extra state (``get_extra_state``) that is no tensor as the bytes of ``torch.save``, and only if
``weights_only=True`` reads them back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from evenstep.errors import EvenstepError
from evenstep.lowbit.fast_paths import close_fast_paths
from evenstep.lowbit.formats import Format
from evenstep.lowbit.layouts import PACKED_INTEGERS, Layout, from_parts, layout_of, to_parts
from evenstep.lowbit.linear import LowBitLinear, make_low, obstacle
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
_STORED = ("weight", *_PARTS.values(), "weight_global_scale", "weight_shape")
"""The names that a part of a packed weight can have, in a layout or not."""


def save_quantized(model: nn.Module, directory: str | Path, config: dict[str, Any] | None = None) -> None:
    """Write ``model``, some of whose layers are low-bit, into ``directory`` (made if missing).

    ``config``: what else ``config.json`` should hold; default: the model's own, where it is transformers'. The
    compressed-tensors layout is used where all low-bit layers have one format with a home there and widths that its
    groups divide. Raises ``EvenstepError`` for a model without low-bit weights of its own, for what cannot be stored
    (tensors on the meta device, sharded or sparse ones, extra state that would need pickle) and without safetensors;
    the files in ``directory`` are then what they were.
    """
    model = _without_ddp(model)
    state, extra = _split_extra(model)
    shared = _shared_names(state)
    places = _low_layers(model)
    packable = {
        names[0]: layer
        for layer, names in places.items()
        if layer.recipe.weight is not None
        and layer.weight.numel()
        and _weight_names(names[0], shared) == {_key(n, "weight") for n in names}
    }
    if not packable:
        raise EvenstepError(
            f"{type(model).__name__} has no low-bit weights to pack: quantize_ it first (tied and computed weights, "
            "and those of a model loaded from packed ones, are not packed)"
        )
    layout = _layout(list(packable.values()))
    stored = {name: t for name, t in state.items() if shared[name] == name}
    described: dict[str, Any] = {}
    for layer, names in places.items():
        name, others = names[0], names[1:]
        facts: dict[str, Any] = {"recipe": dataclasses.asdict(layer.recipe), "also": others}
        if name in packable:
            weight = stored.pop(_key(name, "weight"))
            assert layer.recipe.weight is not None
            q = quantize(weight, layer.recipe.weight)
            parts = {_key(name, key): t for key, t in (to_parts(q, layout) if layout else _own_parts(q)).items()}
            if clash := parts.keys() & stored.keys():
                raise EvenstepError(
                    f"the model's own {min(clash)} has the name of a part of a packed weight: rename it"
                )
            stored |= parts
            facts |= {"shape": list(weight.shape), "dtype": str(weight.dtype).removeprefix("torch.")}
            if layout and q.tensor_scale is not None:
                # compressed-tensors keeps the reciprocal, which does not give every number back.
                facts["tensor_scale"] = float(q.tensor_scale).hex()
        described[name] = facts
    if config is None:
        own: Any = getattr(model, "config", None)
        config = own.to_dict() if hasattr(own, "to_dict") else {}
    saved = {
        "layout": layout.name if layout else None,
        "layers": described,
        "shared": {name: first for name, first in shared.items() if name != first},
        "extra": sorted(extra),
    }
    content = {**config, KEY: saved}
    if layout:
        content["quantization_config"] = _quantization_config(model, layout, packable)
    _write(Path(directory), _own_memory(stored | extra), content)


def load_quantized_(model: M, directory: str | Path) -> M:
    """Fill ``model``, of the architecture that was saved and not low-bit, from ``directory``, in place; returns it.

    Its low-bit layers hold the weights that the codes stand for, as ordinary parameters, and compute the saved model's
    outputs to the bit; their recipe leaves weights alone, since they are rounded already. Parameters and buffers take
    the dtypes that were saved. Raises ``EvenstepError`` for missing or foreign files and for a model of another shape.
    """
    directory, target = Path(directory), _without_ddp(model)
    try:
        saved = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))[KEY]
        tensors: dict[str, Any] = _safetensors().load_file(directory / _WEIGHTS)
        layers = saved["layers"]
        with _safetensors().safe_open(directory / _WEIGHTS, framework="pt") as file:
            digest = (file.metadata() or {}).get(KEY)  # not there in models of version 0.1
        if digest not in (None, _digest(saved)):
            raise ValueError("its two files are of different saves")
    except (OSError, ValueError, KeyError, TypeError, _safetensors_error()) as problem:
        raise EvenstepError(
            f"{directory} holds no model written by save_quantized ({type(problem).__name__}: {problem})"
        ) from None
    recipes: dict[str, Recipe] = {}
    for name, facts in layers.items():
        recipe = _recipe(facts["recipe"])
        if "shape" in facts:  # packed
            prefix = _key(name, "")
            parts = {key: tensors.pop(prefix + key) for key in _STORED if prefix + key in tensors}
            tensors[f"{prefix}weight"] = dequantize(_quantized(parts, recipe, facts, saved["layout"] is not None))
            recipe = dataclasses.replace(recipe, weight=None)
        recipes |= dict.fromkeys([name, *facts.get("also", [])], recipe)
    tensors |= {name: tensors[first] for name, first in saved.get("shared", {}).items()}
    for name in saved.get("extra", []):
        tensors[name] = torch.load(io.BytesIO(tensors[name].numpy().tobytes()), weights_only=True)
    _fill(target, tensors, recipes, directory)
    close_fast_paths(target)
    return model


def _fill(model: nn.Module, tensors: dict[str, Any], recipes: dict[str, Recipe], directory: Path) -> None:
    unfit = f"the model in {directory} does not fit this {type(model).__name__}"
    modules = {_plain_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    for name in recipes:
        if name not in modules:
            raise EvenstepError(f"{unfit}: it has no layer {name}")
        if reason := obstacle(modules[name], nn.Linear):
            raise EvenstepError(f"{unfit}: {name or 'the model itself'} {reason}")
    places = {_plain_name(name): name for name in model.state_dict()}
    for name, own in model.state_dict(keep_vars=True).items():
        given = tensors.get(_plain_name(name))
        if isinstance(own, Tensor) and isinstance(given, Tensor) and not is_lazy(own) and own.shape == given.shape:
            if own.device.type == "meta":
                raise EvenstepError(f"{unfit}: {name} is on the meta device; call model.to_empty(device=...) first")
            if own.dtype != given.dtype:  # the parameter stays the object it is
                own.data = own.data.to(given.dtype)
    try:
        model.load_state_dict({places.get(name, name): value for name, value in tensors.items()})
    except RuntimeError as problem:
        line = (str(problem).splitlines()[1:2] or [str(problem)])[0]
        raise EvenstepError(f"{unfit}: {line.strip()}") from None
    for name, recipe in recipes.items():
        if not isinstance(modules[name], LowBitLinear):  # as it is where one layer has several names
            make_low(modules[name], recipe, None)


def _without_ddp(model: nn.Module) -> nn.Module:
    return _without_ddp(model.module) if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _plain_name(name: str) -> str:
    """Without the parts that torch.compile and checkpoint wrappers put into names of modules and, some, of tensors."""
    parts = name.split(".")
    return ".".join(part for part in parts if part not in ("_orig_mod", "_checkpoint_wrapped_module"))


def _key(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name


def _low_layers(model: nn.Module) -> dict[LowBitLinear, list[str]]:
    """The names of each; several where it is used at several places."""
    places: dict[LowBitLinear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LowBitLinear):
            places.setdefault(module, []).append(_plain_name(name))
    return places


def _split_extra(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What ``state_dict`` holds: tensors, and the bytes of everything else. EvenstepError for what cannot be stored."""
    tensors: dict[str, Tensor] = {}
    extra: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        name = _plain_name(key)
        if not isinstance(value, Tensor):
            extra[name] = _bytes(name, value)
            continue
        kind = type(value)
        plain = kind.__module__.partition(".")[0] == "torch" and not hasattr(value, "full_tensor")
        if not plain or value.layout != torch.strided or value.device.type == "meta":
            where = f"of type {kind.__name__}, layout {value.layout} and on {value.device}"
            raise EvenstepError(f"{name} is {where}: only whole, dense tensors in memory can be saved")
        tensors[name] = value.detach()
    return tensors, extra


def _bytes(name: str, value: Any) -> Tensor:
    file = io.BytesIO()
    try:
        torch.save(value, file)
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    except Exception as problem:  # whatever pickle and the object's own code raise
        line = " ".join(str(problem).split())[:120]
        raise EvenstepError(
            f"{name} is a {type(value).__name__} that torch.load(weights_only=True) would not read ({line}): let "
            "get_extra_state return tensors, numbers, strings, lists and dicts"
        ) from None
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _shared_names(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Of each name the first one that stands for the very same entries of memory."""
    first: dict[tuple[Any, ...], str] = {}
    return {
        name: first.setdefault((*_memory(t), t.dtype, t.shape, t.stride(), t.is_conj(), t.is_neg()), name)
        if t.numel()
        else name
        for name, t in tensors.items()
    }


def _memory(t: Tensor) -> tuple[Any, ...]:
    return t.device, t.untyped_storage().data_ptr(), t.storage_offset()


def _weight_names(layer: str, shared: dict[str, str]) -> set[str]:
    """All names under which the state holds the weight of a layer; none where it is computed from others."""
    first = shared.get(_key(layer, "weight"))
    return {name for name, other in shared.items() if other == first} if first is not None else set()


def _own_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, each in memory of its own, as safetensors wants them: views of a buffer are copied."""
    uses = Counter(t.untyped_storage().data_ptr() for t in tensors.values())
    return {
        name: t.clone(memory_format=torch.contiguous_format)
        if uses[t.untyped_storage().data_ptr()] > 1 or not t.is_contiguous() or t.is_conj() or t.is_neg()
        else t
        for name, t in tensors.items()
    }


def _digest(saved: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(saved, sort_keys=True).encode()).hexdigest()


def _write(directory: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Both files, or neither: each is written beside its place, and they are moved there when both are whole. Between
    the two moves a process can still die: the weights hold a digest of their description, which loading compares."""
    library = _safetensors()
    try:
        text = json.dumps(config, indent=2) + "\n"
    except (TypeError, ValueError) as problem:
        raise EvenstepError(
            f"config cannot be written as JSON ({problem}): give strings, numbers, lists, dicts"
        ) from None
    beside = {name: directory / f".{name}.partial" for name in (_WEIGHTS, _CONFIG)}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        library.save_file(tensors, beside[_WEIGHTS], metadata={"format": "pt", KEY: _digest(config[KEY])})
        beside[_CONFIG].write_text(text, encoding="utf-8")
        for name, path in beside.items():
            os.replace(path, directory / name)
    except (OSError, RuntimeError, ValueError, KeyError, _safetensors_error()) as problem:
        line = " ".join(str(problem).split())
        raise EvenstepError(f"could not save to {directory} ({type(problem).__name__}: {line})") from problem
    finally:
        for path in beside.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


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


def _quantization_config(model: nn.Module, layout: Layout, packed: dict[str, LowBitLinear]) -> dict[str, Any]:
    layer = next(iter(packed.values()))
    # Of inputs it knows a scale per token or group of 32, but no kept outliers, no NVFP4 with a scale per token, and
    # another scale for integers in groups.
    known = layout_of(layer.recipe.input) if layer.recipe.input else None
    inputs = None
    if known and known.name != PACKED_INTEGERS:
        token = {"strategy": "token"} if known.arguments["strategy"] == "channel" else {}
        inputs = {**known.arguments, **token, "dynamic": True}

    kept = [
        _plain_name(name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module not in packed.values()
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


def _safetensors_error() -> type[Exception]:
    _safetensors()
    import safetensors

    error: type[Exception] = safetensors.SafetensorError
    return error
