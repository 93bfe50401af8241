"""Matrix products on low-bit hardware: the forward product, where PyTorch has a kernel for the formats of a recipe.

Each `Kernel` states the formats that it multiplies and the GPU that it needs; `choose` takes the first one that fits a
layer. Codes and scales are those of the emulation. The kernels add up products in another order, and round to bf16 at
the end, so that results agree to rounding and not to the bit. Backward products stay in high precision.

Only PyTorch's own products are used (``_int_mm``, ``_scaled_mm``, ``scaled_mm``), which torchao calls for these formats
too.
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
    """A product on low-bit hardware.

    Attributes:
        name: shown in reports.
        weight: the format of the weight.
        input: the format of the input.
        capability: the CUDA compute capability that the product needs at least.
        multiple: in_features and out_features have to be multiples of this number.
        dtypes: the dtypes of weights for which the product serves.
        product: multiplies quantised x [N, in] and w [out, in] into x w^T, fp32 or bf16 [N, out].
    """

    name: str
    weight: Format
    input: Format
    capability: tuple[int, int]
    multiple: int
    dtypes: tuple[torch.dtype, ...]
    product: Callable[[Quantized, Quantized], Tensor]

    def fits(self, recipe: Recipe, layer: nn.Linear) -> bool:
        """Whether the kernel computes the forward product of this recipe for this layer, where the layer is now."""
        weight = layer.weight
        if (recipe.weight, recipe.input) != (self.weight, self.input) or not self.runs_on(weight):
            return False
        fit = not any(size % self.multiple for size in weight.shape)
        # ROCm presents itself as CUDA, with compute capabilities that mean something else.
        return fit and torch.version.hip is None and torch.cuda.get_device_capability(weight.device) >= self.capability

    def runs_on(self, weight: Tensor) -> bool:
        """The conditions of `fits` that can change later: the device of the weight, and its dtype."""
        return weight.device.type == "cuda" and weight.dtype in self.dtypes

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The product x W^T + bias for x [..., in] and weight [out, in], in ``dtype``."""
        # The weight is quantised in each call, as in the emulation: it changes with every step.
        rows = x.reshape(-1, x.shape[-1])  # [N, in]
        out = self.product(quantize(rows, self.input), quantize(weight, self.weight)).to(dtype)
        out = out.view(*x.shape[:-1], weight.shape[0])
        return out if bias is None else out + bias


def int8_product(x: Quantized, w: Quantized) -> Tensor:
    """Exact sums in int32, times the scale of the row [N, 1] and of the output channel [1, out]."""
    # Symmetric int8 codes sum to at most 127 * 127 * in, which fits int32 for widths up to 133,000.
    # _int_mm needs more than 16 rows on CUDA: missing rows are filled with zeros and cut off again.
    codes = x.codes.view(torch.int8)
    padded = torch.nn.functional.pad(codes, (0, 0, 0, max(0, 17 - len(codes))))
    sums = torch._int_mm(padded, w.codes.view(torch.int8).t())[: len(codes)]
    return sums * x.scale * w.scale.t()  # [N, out] * [N, 1] * [1, out], in fp32


def fp8_product(x: Quantized, w: Quantized) -> Tensor:
    """The product of E4M3 codes with a scale per row and per output channel; torch returns bf16."""
    # The codes are the bit patterns of torch's own dtype, so that a view is enough.
    a, b = x.codes.view(torch.float8_e4m3fn), w.codes.view(torch.float8_e4m3fn)
    return torch._scaled_mm(a, b.t(), scale_a=x.scale, scale_b=w.scale.t(), out_dtype=torch.bfloat16)


def mxfp8_product(x: Quantized, w: Quantized) -> Tensor:
    """The product of E4M3 codes with an E8M0 scale per block of 32."""
    # x.scale [N, in / 32] and w.scale [out, in / 32] are torch.float8_e8m0fnu, one for each block of 32 along `in`.
    kind = torch.nn.functional.ScalingType.BlockWise1x32
    return _blockwise(x.codes.view(torch.float8_e4m3fn), w.codes.view(torch.float8_e4m3fn), x.scale, w.scale, kind)


def nvfp4_product(x: Quantized, w: Quantized) -> Tensor:
    """The product of E2M1 codes with an E4M3 scale per block of 16, times both second-level scales in fp32."""
    # float4_e2m1fn_x2 holds two codes in a byte, the first in the low half: the order of `pack_bits`.
    # The second-level scales are x's per row [N, 1] and w's of the tensor (0-d). They are constant along the summed
    # dimension, so that they can be multiplied after the product.
    kind, pair = torch.nn.functional.ScalingType.BlockWise1x16, torch.float4_e2m1fn_x2
    a, b = x.pack().codes.view(pair), w.pack().codes.view(pair)
    assert x.tensor_scale is not None and w.tensor_scale is not None
    return _blockwise(a, b, x.scale, w.scale, kind).float() * (x.tensor_scale * w.tensor_scale)


def _blockwise(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, kind: torch.nn.functional.ScalingType) -> Tensor:
    # cuBLAS reads the scales in its own order (`tiled`); the product needs the second operand column-major, which b.t()
    # is without a copy.
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
    """Block scales [R, G] in the order that cuBLAS expects, flattened.

    The scales are divided into tiles of 128 rows and 4 groups, padded with zeros. Within a tile, entry (r, g) has the
    position 16 * (r mod 32) + 4 * (r div 32) + g.
    """
    raw = scale.view(torch.uint8)
    raw = torch.nn.functional.pad(raw, (0, -raw.shape[1] % 4, 0, -raw.shape[0] % 128))
    # [row tile, r div 32, r mod 32, group tile, g] -> [row tile, group tile, r mod 32, r div 32, g]
    tiles = raw.view(raw.shape[0] // 128, 4, 32, raw.shape[1] // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(scale.dtype)


_16BIT, _ANY = (torch.bfloat16,), (torch.bfloat16, torch.float16, torch.float32)
# Name, weight, input, least capability (8.0 Ampere, 8.9 Ada, 10.0 Blackwell), multiple, dtypes, product. A product that
# returns bf16 serves bf16 layers alone: fp32 layers would lose precision without a sign.
KERNELS = (
    Kernel("torch._int_mm", FORMATS["int8"], FORMATS["int8"], (8, 0), 8, _ANY, int8_product),
    Kernel("torch._scaled_mm, rowwise", FORMATS["fp8"], FORMATS["fp8"], (8, 9), 16, _16BIT, fp8_product),
    Kernel("scaled_mm, MXFP8", FORMATS["mxfp8"], FORMATS["mxfp8"], (10, 0), 32, _16BIT, mxfp8_product),
    Kernel("scaled_mm, NVFP4", FORMATS["nvfp4"], FORMATS["nvfp4-row"], (10, 0), 32, _16BIT, nvfp4_product),
)


def choose(recipe: Recipe, layer: nn.Linear, backend: str) -> Kernel | None:
    """The kernel for this layer on its present device; None for emulation. EvenstepError for an unknown backend."""
    if backend not in BACKENDS:
        raise EvenstepError(
            f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}{nearest(backend, BACKENDS)}"
        )
    if backend == "emulate":  # on every device, for comparisons of runs on different hardware
        return None
    return next((kernel for kernel in KERNELS if kernel.fits(recipe, layer)), None)
