"""Handing the forward product to low-bit hardware, where there is a kernel that computes a recipe's numbers.

Each kernel says which formats it multiplies and what GPU it needs; ``choose`` takes the first that fits a layer. Codes
and scales are exactly those of the emulation; the kernels add up products in another order (and round to bf16 at the
end), so results agree to rounding, not to the bit. Backward products stay in high precision.

Only PyTorch's own matrix products are used (``_int_mm``, ``_scaled_mm``, ``scaled_mm``), which are also what torchao
calls for these formats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evenstep.errors import EvenstepError, nearest
from evenstep.lowbit.formats import FORMATS, Format
from evenstep.lowbit.quantized import Quantized, quantize
from evenstep.lowbit.recipes import Recipe

BACKENDS = ("auto", "emulate")


@dataclass(frozen=True)
class Kernel:
    """``product(x, w)`` multiplies quantised x [N, in] and w [out, in] into fp32 or bf16 [N, out]. ``capability``: of
    the CUDA device, at least; ``multiple``: of in_features and out_features."""

    name: str
    weight: Format
    input: Format
    capability: tuple[int, int]
    multiple: int
    dtypes: tuple[torch.dtype, ...]
    product: Callable[[Quantized, Quantized], Tensor]

    def fits(self, recipe: Recipe, layer: nn.Linear) -> bool:
        weight = layer.weight
        if (recipe.weight, recipe.input) != (self.weight, self.input) or not self.runs_on(weight):
            return False
        fit = not any(size % self.multiple for size in weight.shape)
        return fit and torch.version.hip is None and torch.cuda.get_device_capability(weight.device) >= self.capability

    def runs_on(self, weight: Tensor) -> bool:
        """What of ``fits`` can change under a layer: where its weight lies, and its dtype."""
        return weight.device.type == "cuda" and weight.dtype in self.dtypes

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """x [..., in] times weight [out, in], plus bias, in ``dtype``."""
        rows = x.reshape(-1, x.shape[-1])
        out = self.product(quantize(rows, self.input), quantize(weight, self.weight)).to(dtype)
        out = out.view(*x.shape[:-1], weight.shape[0])
        return out if bias is None else out + bias


def int8_product(x: Quantized, w: Quantized) -> Tensor:
    """Exact sums in int32, then the two scales. ``_int_mm`` wants more than 16 rows on CUDA: missing ones are zeros."""
    codes = x.codes.view(torch.int8)
    padded = torch.nn.functional.pad(codes, (0, 0, 0, max(0, 17 - len(codes))))
    sums = torch._int_mm(padded, w.codes.view(torch.int8).t())[: len(codes)]
    return sums * x.scale * w.scale.t()


def fp8_product(x: Quantized, w: Quantized) -> Tensor:
    """Rowwise scaled product of E4M3; torch gives it in bf16."""
    a, b = x.codes.view(torch.float8_e4m3fn), w.codes.view(torch.float8_e4m3fn)
    return torch._scaled_mm(a, b.t(), scale_a=x.scale, scale_b=w.scale.t(), out_dtype=torch.bfloat16)


def mxfp8_product(x: Quantized, w: Quantized) -> Tensor:
    kind = torch.nn.functional.ScalingType.BlockWise1x32
    return _blockwise(x.codes.view(torch.float8_e4m3fn), w.codes.view(torch.float8_e4m3fn), x.scale, w.scale, kind)


def nvfp4_product(x: Quantized, w: Quantized) -> Tensor:
    """The block scales in the product, the second-level scales (a row's of x, the tensor's of w) after it."""
    kind, pair = torch.nn.functional.ScalingType.BlockWise1x16, torch.float4_e2m1fn_x2
    a, b = x.pack().codes.view(pair), w.pack().codes.view(pair)
    assert x.tensor_scale is not None and w.tensor_scale is not None
    return _blockwise(a, b, x.scale, w.scale, kind).float() * (x.tensor_scale * w.tensor_scale)


def _blockwise(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, kind: torch.nn.functional.ScalingType) -> Tensor:
    swizzle = torch.nn.functional.SwizzleType.SWIZZLE_32_4_4
    return torch.nn.functional.scaled_mm(
        a,
        b.t(),
        scale_a=tiled(scale_a),
        scale_recipe_a=kind,
        scale_b=tiled(scale_b),
        scale_recipe_b=kind,
        swizzle_a=swizzle,
        swizzle_b=swizzle,
        output_dtype=torch.bfloat16,
    )


def tiled(scale: Tensor) -> Tensor:
    """Block scales [R, G] in cuBLAS's order: tiles of 128 x 4, padded with zeros, in each of which entry (r, g) comes
    at 16 (r mod 32) + 4 (r div 32) + g."""
    raw = scale.view(torch.uint8)
    raw = torch.nn.functional.pad(raw, (0, -raw.shape[1] % 4, 0, -raw.shape[0] % 128))
    tiles = raw.view(raw.shape[0] // 128, 4, 32, raw.shape[1] // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(scale.dtype)


_16BIT, _ANY = (torch.bfloat16,), (torch.bfloat16, torch.float16, torch.float32)
KERNELS = (
    Kernel("torch._int_mm", FORMATS["int8"], FORMATS["int8"], (8, 0), 8, _ANY, int8_product),
    Kernel("torch._scaled_mm, rowwise", FORMATS["fp8"], FORMATS["fp8"], (8, 9), 16, _16BIT, fp8_product),
    Kernel("scaled_mm, MXFP8", FORMATS["mxfp8"], FORMATS["mxfp8"], (10, 0), 32, _16BIT, mxfp8_product),
    Kernel("scaled_mm, NVFP4", FORMATS["nvfp4"], FORMATS["nvfp4-row"], (10, 0), 32, _16BIT, nvfp4_product),
)


def choose(recipe: Recipe, layer: nn.Linear, backend: str) -> Kernel | None:
    """The kernel for this layer where it lies now, None for emulation."""
    if backend not in BACKENDS:
        raise EvenstepError(
            f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}{nearest(backend, BACKENDS)}"
        )
    if backend == "emulate":
        return None
    return next((kernel for kernel in KERNELS if kernel.fits(recipe, layer)), None)
