"""A linear layer whose matrix products see low-bit numbers, while its weight stays an ordinary parameter.

``LowBitLinear`` is an ``nn.Linear`` with the same parameters under the same names; optimizers, FSDP2, DDP, checkpoints
and exports see nothing else. Quantisation is simulated: operands are rounded to what the format can hold, the products
run in the layer's own precision, and gradients pass straight through the rounding.

Memory: as a plain layer, this one keeps its input and its weight for the backward pass, which quantises them once more;
layers that read the same tensor (q, k, v; gate, up) keep it once. Each call quantises what its input holds at that
moment, and nothing outlives the call: memory shared with NumPy or another process, ``p.data`` and fused optimizers
change a tensor without a trace, so that a quantised copy of an earlier call could not be known to be current.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evenstep.errors import EvenstepError
from evenstep.lowbit.backends import Kernel
from evenstep.lowbit.fake_quant import apply
from evenstep.lowbit.formats import Format
from evenstep.lowbit.hadamard import rotate
from evenstep.lowbit.recipes import Backward, Recipe, describe


class LowBitLinear(nn.Linear):
    """Made from an ``nn.Linear`` by ``quantize_``, and turned back by ``dequantize_``; x [..., in] -> [..., out].

    ``kernel`` runs the forward product on real low-bit hardware where ``quantize_`` found some; None: emulation.
    """

    recipe: Recipe
    kernel: Kernel | None

    def forward(self, x: Tensor) -> Tensor:
        weight, device = self.weight, x.device.type
        dtype = weight.dtype
        # Autocast leaves float64 and integers alone, so a plain layer computes or refuses them as they are.
        castable = all(t.is_floating_point() and t.dtype != torch.float64 for t in (x, weight))
        if castable and device != "meta" and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        elif x.dtype != dtype:
            raise RuntimeError(
                f"the input is {x.dtype} and the weight {dtype}: bring one to the other, or use autocast"
            )
        return _Products.apply(x, weight, self.bias, self.recipe, dtype, self.active_kernel)

    @property
    def active_kernel(self) -> Kernel | None:
        """``kernel``, unless the layer was moved or cast since ``quantize_`` to where it cannot run."""
        return self.kernel if self.kernel is not None and self.kernel.runs_on(self.weight) else None

    def extra_repr(self) -> str:
        kernel = f", kernel={self.active_kernel.name}" if self.active_kernel else ""
        return f"{super().extra_repr()}, recipe={self.recipe.name}{kernel}"


def make_low(layer: nn.Module, recipe: Recipe, kernel: Kernel | None) -> None:
    """Turn an ``nn.Linear`` into a LowBitLinear where it stands: its parameters, hooks and identity stay.

    EvenstepError, and nothing changed, where that would not reach what the layer computes; see ``obstacle``.
    """
    _change_class(layer, nn.Linear, LowBitLinear)
    assert isinstance(layer, LowBitLinear)
    layer.recipe, layer.kernel = recipe, kernel


def make_plain(layer: LowBitLinear) -> None:
    """The inverse of ``make_low``, with the same EvenstepError."""
    _change_class(layer, LowBitLinear, nn.Linear)
    del layer.recipe, layer.kernel


def _change_class(layer: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    if reason := obstacle(layer, old):
        raise EvenstepError(f"this layer {reason}")
    vars(layer).pop("forward", None)  # the old class's own method, left behind where a hook was removed
    layer.__class__ = new


def obstacle(layer: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why giving a layer, supposedly of exact type ``kind``, another class would not change what it computes, or would
    break it; None where it can be done."""
    if type(layer) is not kind:
        return f"is a {type(layer).__name__}, not a plain {kind.__name__}: undo what changed its class first"
    own = vars(layer).get("forward")
    if own is None or (getattr(own, "__self__", None) is layer and getattr(own, "__func__", None) is kind.forward):
        return None
    return (
        "has a forward of its own, which a new class would not replace (hooks of accelerate: call "
        "remove_hook_from_submodules first, add_hook_to_module or dispatch_model afterwards)"
    )


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
        needs_x, needs_weight, _ = ctx.needs_input_grad[:3]
        # What the backward pass will need, as it is, for it to quantise again; and what it could not make again, as it
        # was quantised: stochastic rounding, and the copy in another dtype that autocast makes a plain layer keep too
        # (a compiler chooses between the two itself).
        copied = x.dtype != dtype and not torch.compiler.is_compiling()
        keeps_xq = recipe.weight_grad.other == "forward" and (_random(recipe.input) or copied)
        keeps_wq = recipe.input_grad.other == "forward" and _random(recipe.weight)
        if kernel is not None and x.numel() and weight.numel():  # it makes the numbers itself
            keeps_xq = keeps_wq = False
            out = kernel.linear(x, weight, b, dtype)
        else:
            # Strides decide in which order a product adds up. A quantised weight is contiguous; one that was loaded
            # already rounded must give the same bits.
            xq, wq = _low(x, recipe.input, dtype), _low(weight, recipe.weight, dtype).contiguous()
            out = F.linear(xq, wq, b)
        kept_x = (xq if keeps_xq else x) if needs_weight else None
        kept_weight = (wq if keeps_wq else weight) if needs_x else None
        ctx.save_for_backward(kept_x, kept_weight)
        ctx.input_format = None if keeps_xq else recipe.input
        ctx.weight_format = None if keeps_wq else recipe.weight
        ctx.input_shape = x.shape
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable would not do: it says nothing where a second derivative is asked for by its inputs, or
        # where only a part of the loss has one, and the result is zero.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("a low-bit layer has no second derivative (create_graph=True): dequantize_ the model")
        recipe: Recipe = ctx.recipe
        x, weight = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        g = _as_rows(grad)
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            w = _operand(weight, recipe.input_grad, ctx.weight_format, g)
            dx = torch.mm(_low(g, recipe.input_grad.grad, g.dtype), w).view(ctx.input_shape).to(x_dtype)
        if ctx.needs_input_grad[1]:
            if recipe.weight_grad.other == "forward":
                x = _low(x, ctx.input_format, g.dtype, after=g)
            dweight = _weight_gradient(g, _as_rows(x), recipe.weight_grad).to(weight_dtype)
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


def _as_rows(t: Tensor) -> Tensor:
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])  # -1 would be ambiguous without entries


def _random(fmt: Format | None) -> bool:
    return fmt is not None and fmt.rounding == "stochastic"


def _low(t: Tensor, fmt: Format | None, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
    return t.to(dtype) if fmt is None else apply(t, fmt, dtype=dtype, after=after)


def describe_layer(layer: LowBitLinear) -> str:
    return f"weights {describe(layer.recipe.weight)}; inputs {describe(layer.recipe.input)}"
