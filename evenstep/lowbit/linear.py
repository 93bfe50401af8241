"""A linear layer whose matrix products see low-bit numbers, while its weight stays an ordinary parameter.

``LowBitLinear`` is an ``nn.Linear`` with the same parameters under the same names; optimizers, FSDP2, DDP, checkpoints
and exports see nothing else. Quantisation is simulated: operands are rounded to what the format can hold, the products
run in the layer's own precision, and gradients pass straight through the rounding.

Memory: a plain layer keeps its input and its weight for the backward pass. This one keeps the quantised input instead
of the input, and the weight itself, which is quantised once more in the backward pass. Layers that read the same tensor
(q, k, v; gate, up) share one quantised copy of it: it is remembered on the tensor and goes with it. A compiler finds
such repetitions by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from evenstep.lowbit.backends import Kernel
from evenstep.lowbit.fake_quant import apply
from evenstep.lowbit.formats import Format
from evenstep.lowbit.hadamard import rotate
from evenstep.lowbit.recipes import Backward, Recipe, describe

_MEMO = "_evenstep_quantised"


class LowBitLinear(nn.Linear):
    """Made from an ``nn.Linear`` by ``quantize_``, and turned back by ``dequantize_``; x [..., in] -> [..., out].

    ``kernel`` runs the forward product on real low-bit hardware where ``quantize_`` found some; None: emulation.
    """

    recipe: Recipe
    kernel: Kernel | None

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.weight.dtype
        if x.dtype != dtype and not autocast:
            raise RuntimeError(
                f"the input is {x.dtype} and the weight {dtype}: bring one to the other, or use autocast"
            )
        return _Products.apply(x, self.weight, self.bias, self.recipe, dtype, self.kernel)

    def extra_repr(self) -> str:
        kernel = f", kernel={self.kernel.name}" if self.kernel else ""
        return f"{super().extra_repr()}, recipe={self.recipe.name}{kernel}"


def make_low(layer: nn.Module, recipe: Recipe, kernel: Kernel | None) -> None:
    """Turn an ``nn.Linear`` into a LowBitLinear where it stands: its parameters, hooks and identity stay."""
    layer.__class__ = LowBitLinear
    assert isinstance(layer, LowBitLinear)
    layer.recipe, layer.kernel = recipe, kernel


def make_plain(layer: LowBitLinear) -> None:
    """The inverse of ``make_low``."""
    del layer.recipe, layer.kernel
    layer.__class__ = nn.Linear  # type: ignore[assignment]


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        recipe: Recipe,
        dtype: torch.dtype,
        kernel: Kernel | None,
    ) -> Tensor:
        b = bias.to(dtype) if bias is not None else None
        ctx.recipe = recipe
        ctx.dtypes = x.dtype, weight.dtype, bias.dtype if bias is not None else None
        if kernel is not None:  # it makes the numbers itself; the backward pass makes them again
            ctx.save_for_backward(x, weight)
            ctx.input_format, ctx.weight_format = recipe.input, recipe.weight
            return kernel.linear(x, weight, b, dtype)
        xq, wq = _shared(x, recipe.input, dtype), _low(weight, recipe.weight, dtype)
        # What is kept for the backward pass, and whether it is quantised already. Stochastic rounding could not be
        # repeated; of an input that is a view, the whole tensor is likely to be kept by its maker, and a quantised
        # copy would come on top. A compiled graph keeps what the plain one does, and the backward pass quantises it.
        keeps_w = recipe.input_grad.other == "forward" and _random(recipe.weight)
        keeps_x = recipe.weight_grad.other == "forward" and (_random(recipe.input) or not _kept_anyway(x))
        ctx.save_for_backward(xq if keeps_x else x, wq if keeps_w else weight)
        ctx.input_format = None if keeps_x else recipe.input
        ctx.weight_format = None if keeps_w else recipe.weight
        return F.linear(xq, wq, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        recipe: Recipe = ctx.recipe
        x, weight = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        g = grad.reshape(-1, grad.shape[-1])
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            w = _operand(weight, recipe.input_grad, ctx.weight_format, g)
            dx = torch.mm(_low(g, recipe.input_grad.grad, g.dtype), w).view(x.shape).to(x_dtype)
        if ctx.needs_input_grad[1]:
            if recipe.weight_grad.other == "forward":
                x = _low(x, ctx.input_format, g.dtype, after=g)
            dweight = _weight_gradient(g, x.reshape(-1, x.shape[-1]), recipe.weight_grad).to(weight_dtype)
        if ctx.needs_input_grad[2]:
            dbias = g.sum(0).to(bias_dtype)
        return dx, dweight, dbias, None, None, None


def _operand(weight: Tensor, product: Backward, forward: Format | None, g: Tensor) -> Tensor:
    """The weight [out, in] of the input gradient, made for ``g``; a format of its own groups along out."""
    if product.other == "forward":
        return _low(weight, forward, g.dtype, after=g)
    assert not isinstance(product.other, str)
    return _low(weight.t(), product.other, g.dtype, after=g).t()


def _weight_gradient(g: Tensor, x: Tensor, product: Backward) -> Tensor:
    """g^T x for g [N, out] and x [N, in]."""
    dtype, grad, other = g.dtype, g.t(), x.t()
    if product.hadamard:
        grad, other = rotate(grad, other)
    if product.other != "forward":
        assert not isinstance(product.other, str)
        other = _low(other, product.other, dtype)
    return torch.mm(_low(grad, product.grad, dtype), other.t().to(dtype))


def _random(fmt: Format | None) -> bool:
    return fmt is not None and fmt.rounding == "stochastic"


def _kept_anyway(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or x._is_view()


def _low(t: Tensor, fmt: Format | None, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
    return t.to(dtype) if fmt is None else apply(t, fmt, dtype=dtype, after=after)


def _shared(x: Tensor, fmt: Format | None, dtype: torch.dtype) -> Tensor:
    """``_low``, done once for all layers that read this very tensor."""
    if fmt is None or torch.compiler.is_compiling() or x.is_inference() or _random(fmt):
        return _low(x, fmt, dtype)
    key = (fmt, dtype, x._version)
    memo = getattr(x, _MEMO, None)
    if memo is None or memo[0] != key:
        memo = (key, _low(x, fmt, dtype))
        setattr(x, _MEMO, memo)
    return memo[1]


def describe_layer(layer: LowBitLinear) -> str:
    return f"weights {describe(layer.recipe.weight)}; inputs {describe(layer.recipe.input)}"
