"""A low-bit model on disk: packed codes and scales instead of weights, loaded with the same outputs to the bit.

``model.safetensors`` holds every parameter and buffer as ``state_dict`` names it, except that the ``weight`` of each
low-bit layer is replaced by its parts. ``config.json`` says under ``evenstep_lowbit`` how to read them. Formats that
the compressed-tensors layout can describe are written in that layout, with its ``quantization_config``, so that vLLM
and transformers read them (second part of the file). The others, in particular all formats with kept outliers, use the
same names where they have the same meaning, and some names of their own.

Stored whole, with the recipe, are weights that other modules read too (tied weights), weights that are computed from
others in each pass (weight_norm, parametrizations), and weights of layers whose recipe leaves weights alone. A tensor
with several names is stored once. Extra state (``get_extra_state``) that is not a tensor is stored as the bytes of
``torch.save``, if ``torch.load(weights_only=True)`` reads it back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from evenstep.errors import EvenstepError
from evenstep.lowbit.formats import FORMATS, Format
from evenstep.lowbit.linear import LowBitLinear, close_fast_paths, make_low, obstacle
from evenstep.lowbit.quantized import SCALE_DTYPES, Quantized, dequantize, pack_bits, quantize, unpack_bits
from evenstep.lowbit.recipes import Backward, Recipe

M = TypeVar("M", bound=nn.Module)

KEY = "evenstep_lowbit"  # in config.json, and in the metadata of the safetensors file
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
# Attributes of `Quantized` -> names of the stored parts, after the name of the layer.
_PARTS = {
    "codes": "weight_packed",
    "scale": "weight_scale",
    "zero": "weight_zero_point",
    "tensor_scale": "weight_tensor_scale",
    "positions": "weight_outlier_positions",
    "kept": "weight_outliers",
}
# The names that a part of a packed weight can have, in either layout.
_STORED = ("weight", *_PARTS.values(), "weight_global_scale", "weight_shape")


def save_quantized(model: nn.Module, directory: str | Path, config: dict[str, Any] | None = None) -> None:
    """Write a model with low-bit layers into a directory, as ``model.safetensors`` and ``config.json``.

    The compressed-tensors layout is used where all low-bit layers have the same format, the layout can describe it, and
    its groups divide the widths of the layers.

    Args:
        model: a model with low-bit layers; wrappers of DDP and torch.compile do not appear in the saved names.
        directory: created if missing. Files that are there are replaced once the new ones are complete.
        config: further content of ``config.json``; default: the model's own ``config`` if it is a transformers model.

    Raises:
        EvenstepError: the model has no low-bit weights of its own; a tensor cannot be stored (on the meta device,
            sharded or sparse, extra state that needs pickle); safetensors is not installed; or the disk refuses. The
            files in ``directory`` are then unchanged.

    Example:
        >>> import tempfile
        >>> from evenstep.lowbit import quantize_
        >>> model = quantize_(nn.Sequential(nn.Linear(64, 32)), "mxfp4")
        >>> fresh = nn.Sequential(nn.Linear(64, 32))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save_quantized(model, directory)
        ...     fresh = load_quantized_(fresh, directory)
        >>> x = torch.randn(2, 64)
        >>> torch.equal(fresh(x), model(x))
        True
    """
    model = _without_ddp(model)  # DDP would put "module." before every name
    state, extra = _split_extra(model)
    shared = _shared_names(state)
    places = _low_layers(model)
    # A weight is packed if the state has it under the names of its layer alone: other readers need the whole tensor,
    # and a computed weight is not part of the state at all.
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
    # Each memory once, under its first name; "shared" in config.json has the other names.
    stored = {name: t for name, t in state.items() if shared[name] == name}
    described: dict[str, Any] = {}
    for layer, names in places.items():
        name, others = names[0], names[1:]  # the parts are stored under the first name of the layer
        facts: dict[str, Any] = {"recipe": dataclasses.asdict(layer.recipe), "also": others}
        if name in packable:
            weight = stored.pop(_key(name, "weight"))
            assert layer.recipe.weight is not None
            # The same codes as in the forward pass, so that the loaded model computes the same outputs.
            q = quantize(weight, layer.recipe.weight)
            parts = {_key(name, key): t for key, t in (_to_parts(q, layout) if layout else _own_parts(q)).items()}
            # A buffer of the model may be called weight_scale, and would be overwritten.
            if clash := parts.keys() & stored.keys():
                raise EvenstepError(
                    f"the model's own {min(clash)} has the name of a part of a packed weight: rename it"
                )
            stored |= parts
            facts |= {"shape": list(weight.shape), "dtype": str(weight.dtype).removeprefix("torch.")}
            if layout and q.tensor_scale is not None:
                # compressed-tensors stores the reciprocal, and 1 / (1 / s) is not s for every fp32 number. The exact
                # value goes into config.json, as a hexadecimal float.
                facts["tensor_scale"] = float(q.tensor_scale).hex()
        described[name] = facts
    # Without an architecture in config.json transformers cannot load the directory.
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
    """Load a model that `save_quantized` wrote, in place, and return it.

    The layers that were low-bit become low-bit layers. Their parameters hold the values that the codes represent, and
    their recipe does not quantise weights, which are rounded already. The outputs equal those of the saved model to the
    bit. Parameters and buffers take the dtypes that were saved.

    Args:
        model: a model of the saved architecture, without low-bit layers, not on the meta device.
        directory: the directory that `save_quantized` wrote.

    Raises:
        EvenstepError: files that are missing or of another kind, or a model of another shape.
    """
    directory, target = Path(directory), _without_ddp(model)
    try:
        saved = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))[KEY]
        tensors: dict[str, Any] = _safetensors().load_file(directory / _WEIGHTS)
        layers = saved["layers"]
        with _safetensors().safe_open(directory / _WEIGHTS, framework="pt") as file:
            digest = (file.metadata() or {}).get(KEY)  # models of version 0.1 have none
        if digest not in (None, _digest(saved)):
            raise ValueError("its two files are of different saves")
    except (OSError, ValueError, KeyError, TypeError, _safetensors_error()) as problem:
        raise EvenstepError(
            f"{directory} holds no model written by save_quantized ({type(problem).__name__}: {problem})"
        ) from None
    recipes: dict[str, Recipe] = {}
    for name, facts in layers.items():
        recipe = _recipe(facts["recipe"])
        if "shape" in facts:  # packed: decode it once, to an ordinary weight whose values are on the grid
            prefix = _key(name, "")
            parts = {key: tensors.pop(prefix + key) for key in _STORED if prefix + key in tensors}
            tensors[f"{prefix}weight"] = dequantize(_quantized(parts, recipe, facts, saved["layout"] is not None))
            # Quantising again could move a value by the last bit for the formats that are not idempotent (nvfp4).
            recipe = dataclasses.replace(recipe, weight=None)
        recipes |= dict.fromkeys([name, *facts.get("also", [])], recipe)
    tensors |= {name: tensors[first] for name, first in saved.get("shared", {}).items()}
    # weights_only=True: a file from somewhere else must not run code.
    for name in saved.get("extra", []):
        tensors[name] = torch.load(io.BytesIO(tensors[name].numpy().tobytes()), weights_only=True)
    _fill(target, tensors, recipes, directory)
    close_fast_paths(target)
    return model


def _fill(model: nn.Module, tensors: dict[str, Any], recipes: dict[str, Recipe], directory: Path) -> None:
    unfit = f"the model in {directory} does not fit this {type(model).__name__}"
    # Find every layer before the first tensor changes.
    modules = {_plain_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    for name in recipes:
        if name not in modules:
            raise EvenstepError(f"{unfit}: it has no layer {name}")
        if reason := obstacle(modules[name], nn.Linear):
            raise EvenstepError(f"{unfit}: {name or 'the model itself'} {reason}")
    # Names in the file are those of the bare model; load_state_dict needs those of this one.
    places = {_plain_name(name): name for name in model.state_dict()}
    for name, own in model.state_dict(keep_vars=True).items():
        given = tensors.get(_plain_name(name))
        if isinstance(own, Tensor) and isinstance(given, Tensor) and not is_lazy(own) and own.shape == given.shape:
            if own.device.type == "meta":
                raise EvenstepError(f"{unfit}: {name} is on the meta device; call model.to_empty(device=...) first")
            if own.dtype != given.dtype:  # through .data, so that the parameter stays the same object
                own.data = own.data.to(given.dtype)
    try:
        model.load_state_dict({places.get(name, name): value for name, value in tensors.items()})
    except RuntimeError as problem:
        line = (str(problem).splitlines()[1:2] or [str(problem)])[0]
        raise EvenstepError(f"{unfit}: {line.strip()}") from None
    for name, recipe in recipes.items():
        if not isinstance(modules[name], LowBitLinear):  # the second name of a layer finds it changed already
            make_low(modules[name], recipe, None)


def _without_ddp(model: nn.Module) -> nn.Module:
    return _without_ddp(model.module) if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _plain_name(name: str) -> str:
    """``name`` without the parts that torch.compile and checkpoint wrappers insert into the names of modules."""
    parts = name.split(".")
    return ".".join(part for part in parts if part not in ("_orig_mod", "_checkpoint_wrapped_module"))


def _key(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name


def _low_layers(model: nn.Module) -> dict[LowBitLinear, list[str]]:
    """The names of each low-bit layer; several where the layer is used at several places of the model."""
    places: dict[LowBitLinear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LowBitLinear):
            places.setdefault(module, []).append(_plain_name(name))
    return places


def _split_extra(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The content of ``state_dict``: tensors, and everything else as bytes. EvenstepError for what cannot be stored."""
    tensors: dict[str, Tensor] = {}
    extra: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        name = _plain_name(key)
        if not isinstance(value, Tensor):
            extra[name] = _bytes(name, value)
            continue
        kind = type(value)
        # DTensor and FSDP's tensors have full_tensor; subclasses of torchao and similar libraries come from elsewhere.
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
    except Exception as problem:  # pickle, and the object's own code, may raise anything
        line = " ".join(str(problem).split())[:120]
        raise EvenstepError(
            f"{name} is a {type(value).__name__} that torch.load(weights_only=True) would not read ({line}): let "
            "get_extra_state return tensors, numbers, strings, lists and dicts"
        ) from None
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _shared_names(tensors: dict[str, Tensor]) -> dict[str, str]:
    """For each name, the first name of the same view of the same memory."""
    # Empty tensors have no memory that could be shared: their pointer is 0 for all of them.
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
    """All names under which the state contains the weight of a layer; none where the weight is computed from others."""
    # weight_norm and parametrizations remove the parameter "weight" from the state and compute it.
    first = shared.get(_key(layer, "weight"))
    return {name for name, other in shared.items() if other == first} if first is not None else set()


def _own_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, each in memory of its own, as safetensors requires; views of a shared buffer are copied."""
    # safetensors refuses tensors that share memory; conjugated and negated views are lazy bits that a file cannot hold.
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
    """Write both files or neither: under temporary names first, and renamed once both are complete."""
    # A process can still die between the two renames, which leaves files of different saves. The metadata of the
    # weights therefore contains a digest of their description in config.json, which loading compares.
    library = _safetensors()
    # Before the first file is touched: a config that JSON cannot represent must not leave half a model.
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
            os.replace(path, directory / name)  # atomic on the same file system
    except (OSError, RuntimeError, ValueError, KeyError, _safetensors_error()) as problem:
        line = " ".join(str(problem).split())
        raise EvenstepError(f"could not save to {directory} ({type(problem).__name__}: {line})") from problem
    finally:
        for path in beside.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)  # what a failed save left under a temporary name


def _layout(layers: list[LowBitLinear]) -> _Layout | None:
    formats = {layer.recipe.weight for layer in layers}
    # config.json can describe one group of layers; a shorter last group of a row has no place in the layout.
    fmt = formats.pop()
    if fmt is None or formats or (fmt.group and any(layer.in_features % fmt.group for layer in layers)):
        return None
    return _layout_of(fmt)


def _own_parts(q: Quantized) -> dict[str, Tensor]:
    """The stored tensors of a weight outside of the compressed-tensors layout, by their name after the layer's."""
    # Packed codes have their width in config.json ("shape"), since a byte may contain unused bits.
    stored = {_PARTS[name]: t for name, t in q.pack().tensors().items()}
    if q.format.scale == "e8m0":  # compressed-tensors stores the bit pattern as uint8, and so do these parts
        stored["weight_scale"] = q.scale.view(torch.uint8)
    return stored


def _quantized(parts: dict[str, Tensor], recipe: Recipe, facts: dict[str, Any], in_layout: bool) -> Quantized:
    fmt, shape = recipe.weight, torch.Size(facts["shape"])
    assert fmt is not None
    layout = _layout_of(fmt) if in_layout else None
    if layout:
        named = _from_parts(parts, fmt, layout, shape)
        if "tensor_scale" in facts:
            named["tensor_scale"] = torch.tensor(float.fromhex(facts["tensor_scale"]))
    else:
        # Names are those of _PARTS; E8M0 and E4M3 scales are read through the bits of their own dtype.
        named = {attribute: parts[key] for attribute, key in _PARTS.items() if key in parts}
        named["scale"] = named["scale"].view(SCALE_DTYPES[fmt.scale])
    return Quantized(fmt, shape, getattr(torch, facts["dtype"]), packed=layout is None, **named)


def _recipe(fields: dict[str, Any]) -> Recipe:
    """The inverse of ``dataclasses.asdict`` for a `Recipe`, whose fields are nested dataclasses."""

    def fmt(given: Any) -> Any:
        return Format(**given) if isinstance(given, dict) else given

    products = {
        key: Backward(**{**fields[key], "grad": fmt(fields[key]["grad"]), "other": fmt(fields[key]["other"])})
        for key in ("input_grad", "weight_grad")
    }
    return Recipe(**{**fields, "weight": fmt(fields["weight"]), "input": fmt(fields["input"]), **products})


def _quantization_config(model: nn.Module, layout: _Layout, packed: dict[str, LowBitLinear]) -> dict[str, Any]:
    layer = next(iter(packed.values()))
    # The layout can describe inputs with a scale per token or per group of 32. It cannot describe kept outliers or an
    # NVFP4 with a second-level scale per token, and its integers in groups have another scale.
    known = _layout_of(layer.recipe.input) if layer.recipe.input else None
    inputs = None
    if known and known.name != _PACKED_INTEGERS:
        token = {"strategy": "token"} if known.arguments["strategy"] == "channel" else {}
        inputs = {**known.arguments, **token, "dynamic": True}

    # vLLM and transformers read the weights of the layers under "ignore" as they are.
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


# ---- the compressed-tensors layout ----
#
# nvfp4-pack-quantized   E2M1 in groups of 16 with E4M3 scales and one FP32 scale; a 16 x 16 block repeats its scale in
#                        each row
# mxfp4-pack-quantized   E2M1 in groups of 32 with E8M0 scales; mxfp6-pack-quantized: E2M3
# mxfp8-quantized        E4M3 in groups of 32 with E8M0 scales
# float-quantized        E4M3 with a scale per row; int-quantized: 8-bit integers
# pack-quantized         integers of 2 to 8 bits in groups with FP32 scales, with or without zero point

_PACKED_INTEGERS = "pack-quantized"


@dataclass(frozen=True)
class _Layout:
    """A layout of compressed-tensors.

    Attributes:
        name: its name there.
        arguments: the description of the weights in ``quantization_config``.
        dtype: the dtype in which codes are stored, one per entry; None where codes are packed.
    """

    name: str
    arguments: dict[str, Any]
    dtype: torch.dtype | None = None


def _floats(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "float", "strategy": strategy, "symmetric": True, **more}


_MX = {"group_size": 32, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
_LAYOUTS = {
    FORMATS["nvfp4"]: _Layout("nvfp4-pack-quantized", _floats(4, "tensor_group", group_size=16)),
    FORMATS["mxfp4"]: _Layout("mxfp4-pack-quantized", _floats(4, "group", **_MX)),
    FORMATS["mxfp6"]: _Layout("mxfp6-pack-quantized", _floats(6, "group", **_MX)),
    FORMATS["mxfp8"]: _Layout("mxfp8-quantized", _floats(8, "group", **_MX), torch.float8_e4m3fn),
    FORMATS["fp8"]: _Layout("float-quantized", _floats(8, "channel"), torch.float8_e4m3fn),
    FORMATS["int8"]: _Layout(
        "int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}, torch.int8
    ),
}


def _layout_of(fmt: Format) -> _Layout | None:
    """The layout for weights in this format; None where there is none, as for kept outliers."""
    same = dataclasses.replace(fmt, rule="floor", rounding="nearest")  # how values were rounded is not stored
    if same == FORMATS["nvfp4-16x16"]:
        same = FORMATS["nvfp4"]
    if same in _LAYOUTS:
        return _LAYOUTS[same]
    integers = Format(fmt.grid, group=fmt.group, symmetric=fmt.symmetric) if fmt.spec.twos_complement else None
    if not fmt.group or same != integers:
        return None
    arguments = {"num_bits": fmt.spec.bits, "type": "int", "strategy": "group", "group_size": fmt.group}
    return _Layout(_PACKED_INTEGERS, {**arguments, "symmetric": fmt.symmetric})


def _to_parts(q: Quantized, layout: _Layout) -> dict[str, Tensor]:
    """The stored tensors of a weight in a layout, by their name after the layer's."""
    fmt, bits, scale = q.format, q.format.spec.bits, q.scale
    if fmt.block_rows > 1:  # [R / block_rows, G] -> [R, G]; through uint8, since repeat_interleave has no float8
        scale = scale.view(torch.uint8).repeat_interleave(fmt.block_rows, 0)[: len(q.codes)].view(scale.dtype)
    if fmt.scale == "e8m0":
        scale = scale.view(torch.uint8)
    if layout.dtype is not None:
        return {"weight": q.codes.view(layout.dtype), "weight_scale": scale}
    if layout.name != _PACKED_INTEGERS:  # two E2M1 codes in a byte, as `pack_bits` writes them
        parts = {"weight_packed": q.pack().codes, "weight_scale": scale}
        if q.tensor_scale is not None:
            parts["weight_global_scale"] = 1.0 / q.tensor_scale.reshape(1)
        return parts
    # Signed codes are stored with an offset, from 0 for the most negative one; those with a zero point already are.
    parts = {"weight_packed": _words(q.codes if q.zero is not None else q.codes ^ _sign(bits), bits)}
    parts |= {"weight_scale": scale, "weight_shape": torch.tensor(q.shape)}
    if q.zero is not None:
        parts["weight_zero_point"] = _words(q.zero.t(), bits).t()  # packed along the rows [R, G] -> [words, G]
    return parts


def _from_parts(parts: dict[str, Tensor], fmt: Format, layout: _Layout, shape: torch.Size) -> dict[str, Tensor]:
    """The inverse of `_to_parts`: attributes of a ``Quantized`` with unpacked codes, without the tensor scale."""
    bits, scale = fmt.spec.bits, parts["weight_scale"].view(SCALE_DTYPES[fmt.scale])
    if layout.dtype is not None:
        return {"codes": parts["weight"].view(torch.uint8), "scale": scale}
    codes = unpack_bits(parts["weight_packed"].view(torch.uint8), bits, shape[-1])
    if layout.name != _PACKED_INTEGERS:
        return {"codes": codes, "scale": scale.view(torch.uint8)[:: fmt.block_rows].view(scale.dtype)}
    if fmt.symmetric:
        return {"codes": codes ^ _sign(bits), "scale": scale}
    # Zero points [words, G] were packed along the rows: transpose, and read the words as bytes.
    packed = parts["weight_zero_point"].t().flatten().view(torch.uint8).view(scale.shape[1], -1)
    return {"codes": codes, "scale": scale, "zero": unpack_bits(packed, bits, shape[0]).t()}


def _sign(bits: int) -> int:
    """The bit whose inversion turns a two's complement code into one that counts from the most negative number."""
    return 1 << bits - 1


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes [R, C] packed without gaps into int32 [R, words]; each row is padded to whole words."""
    packed = pack_bits(codes, bits)
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4))
    return padded.flatten().view(torch.int32).view(len(packed), -1)
