"""The compressed-tensors layout of a quantised weight, which vLLM and transformers read: names, packing, description.

======================== ==============================================================================================
nvfp4-pack-quantized     E2M1 in groups of 16 with E4M3 scales and one FP32 scale; 16 x 16 blocks repeat their scale
mxfp4-, mxfp6-pack-...   E2M1 and E2M3 in groups of 32 with E8M0 scales
mxfp8-quantized          E4M3 in groups of 32 with E8M0 scales
float-, int-quantized    8 bits with a scale per row
pack-quantized           integers of 2 to 8 bits in groups with FP32 scales, with or without zero point
======================== ==============================================================================================
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evenstep.lowbit.formats import FORMATS, Format
from evenstep.lowbit.quantized import SCALE_DTYPES, Quantized, pack_bits, unpack_bits

PACKED_INTEGERS = "pack-quantized"


@dataclass(frozen=True)
class Layout:
    """``name`` in compressed-tensors, and ``arguments``: how it describes the weights. ``dtype``: codes are stored as
    they are, one an entry, in this dtype; None: packed."""

    name: str
    arguments: dict[str, Any]
    dtype: torch.dtype | None = None


def _floats(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "float", "strategy": strategy, "symmetric": True, **more}


_MX = {"group_size": 32, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
_LAYOUTS = {
    FORMATS["nvfp4"]: Layout("nvfp4-pack-quantized", _floats(4, "tensor_group", group_size=16)),
    FORMATS["mxfp4"]: Layout("mxfp4-pack-quantized", _floats(4, "group", **_MX)),
    FORMATS["mxfp6"]: Layout("mxfp6-pack-quantized", _floats(6, "group", **_MX)),
    FORMATS["mxfp8"]: Layout("mxfp8-quantized", _floats(8, "group", **_MX), torch.float8_e4m3fn),
    FORMATS["fp8"]: Layout("float-quantized", _floats(8, "channel"), torch.float8_e4m3fn),
    FORMATS["int8"]: Layout(
        "int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}, torch.int8
    ),
}


def layout_of(fmt: Format) -> Layout | None:
    """Where weights in this format are at home; None where no layout holds them, as with kept outliers."""
    same = dataclasses.replace(fmt, rule="floor", rounding="nearest")  # what was rounded how is not stored
    if same == FORMATS["nvfp4-16x16"]:
        same = FORMATS["nvfp4"]
    if same in _LAYOUTS:
        return _LAYOUTS[same]
    integers = Format(fmt.grid, group=fmt.group, symmetric=fmt.symmetric) if fmt.spec.twos_complement else None
    if not fmt.group or same != integers:
        return None
    arguments = {"num_bits": fmt.spec.bits, "type": "int", "strategy": "group", "group_size": fmt.group}
    return Layout(PACKED_INTEGERS, {**arguments, "symmetric": fmt.symmetric})


def to_parts(q: Quantized, layout: Layout) -> dict[str, Tensor]:
    """What is stored of a weight, by its name after the layer's."""
    fmt, bits, scale = q.format, q.format.spec.bits, q.scale
    if fmt.block_rows > 1:
        scale = scale.view(torch.uint8).repeat_interleave(fmt.block_rows, 0)[: len(q.codes)].view(scale.dtype)
    if fmt.scale == "e8m0":
        scale = scale.view(torch.uint8)
    if layout.dtype is not None:
        return {"weight": q.codes.view(layout.dtype), "weight_scale": scale}
    if layout.name != PACKED_INTEGERS:
        parts = {"weight_packed": q.pack().codes, "weight_scale": scale}
        if q.tensor_scale is not None:
            parts["weight_global_scale"] = 1.0 / q.tensor_scale.reshape(1)
        return parts
    parts = {"weight_packed": _words(q.codes if q.zero is not None else q.codes ^ _sign(bits), bits)}
    parts |= {"weight_scale": scale, "weight_shape": torch.tensor(q.shape)}
    if q.zero is not None:
        parts["weight_zero_point"] = _words(q.zero.t(), bits).t()
    return parts


def from_parts(parts: dict[str, Tensor], fmt: Format, layout: Layout, shape: torch.Size) -> dict[str, Tensor]:
    """The inverse of ``to_parts``: attributes of a ``Quantized`` with unpacked codes, all but the tensor scale."""
    bits, scale = fmt.spec.bits, parts["weight_scale"].view(SCALE_DTYPES[fmt.scale])
    if layout.dtype is not None:
        return {"codes": parts["weight"].view(torch.uint8), "scale": scale}
    codes = unpack_bits(parts["weight_packed"].view(torch.uint8), bits, shape[-1])
    if layout.name != PACKED_INTEGERS:
        return {"codes": codes, "scale": scale.view(torch.uint8)[:: fmt.block_rows].view(scale.dtype)}
    if fmt.symmetric:
        return {"codes": codes ^ _sign(bits), "scale": scale}
    packed = parts["weight_zero_point"].t().flatten().view(torch.uint8).view(scale.shape[1], -1)
    return {"codes": codes, "scale": scale, "zero": unpack_bits(packed, bits, shape[0]).t()}


def _sign(bits: int) -> int:
    """What turns a two's complement code into one that counts from the lowest number."""
    return 1 << bits - 1


def _words(codes: Tensor, bits: int) -> Tensor:
    """[R, C] codes without gaps in int32."""
    packed = pack_bits(codes, bits)
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4))
    return padded.flatten().view(torch.int32).view(len(packed), -1)
