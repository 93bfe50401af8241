"""A linear layer whose matrix products see low-bit numbers, while its weight stays an ordinary parameter.

`LowBitLinear` is an ``nn.Linear`` with the same parameters under the same names, so optimizers, FSDP2, DDP, checkpoints
and exports need no change. Quantisation is simulated: the operands of a product are rounded to a low-bit format, the
product runs in the layer's own precision, and gradients pass straight through the rounding. `_Products` has the three
products of a layer and their operands; recipes.py says which formats they use.

Memory: as a plain layer does, this layer saves its input and its weight for the backward pass, which quantises them
again; layers that read the same tensor (q, k, v; gate, up) save it once. No quantised copy outlives a call. It could
not be known to be current, because memory shared with NumPy or another process, ``p.data`` and fused optimizers change
a tensor without a trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evenstep.errors import EvenstepError
from evenstep.lowbit.backends import Kernel
from evenstep.lowbit.fake_quant import apply
from evenstep.lowbit.formats import Format
from evenstep.lowbit.recipes import Backward, Recipe, describe


class LowBitLinear(nn.Linear):
    """An ``nn.Linear`` with low-bit products, x [..., in] -> [..., out]. `quantize_` makes it, `dequantize_` undoes it.

    Attributes:
        recipe: the formats of the operands.
        kernel: runs the forward product on low-bit hardware; None where ``quantize_`` found no kernel: emulation.
    """

    recipe: Recipe
    kernel: Kernel | None

    def forward(self, x: Tensor) -> Tensor:
        weight, device = self.weight, x.device.type
        dtype = weight.dtype
        # Autocast leaves float64 and integers alone, so that a plain layer computes or refuses them as they are.
        castable = all(t.is_floating_point() and t.dtype != torch.float64 for t in (x, weight))
        if castable and device != "meta" and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        elif x.dtype != dtype:
            raise RuntimeError(f"the input is {x.dtype} and the weight {dtype}: cast one of them, or use autocast")
        return _products(x, weight, self.bias, self.recipe, dtype, self.active_kernel)

    @property
    def active_kernel(self) -> Kernel | None:
        """``kernel``, or None if the layer was moved or cast since ``quantize_`` so that the kernel cannot run."""
        return self.kernel if self.kernel is not None and self.kernel.runs_on(self.weight) else None

    def extra_repr(self) -> str:
        kernel = f", kernel={self.active_kernel.name}" if self.active_kernel else ""
        return f"{super().extra_repr()}, recipe={self.recipe.name}{kernel}"


def make_low(layer: nn.Module, recipe: Recipe, kernel: Kernel | None) -> None:
    """Turn an ``nn.Linear`` into a `LowBitLinear` in place.

    Raises ``EvenstepError``, with nothing changed, where that would not change what the layer computes; see `obstacle`.
    """
    # The class of the object changes and the object stays: its parameters, hooks, buffers and identity are kept, which
    # a new module in its place would lose.
    _change_class(layer, nn.Linear, LowBitLinear)
    assert isinstance(layer, LowBitLinear)
    layer.recipe, layer.kernel = recipe, kernel


def make_plain(layer: LowBitLinear) -> None:
    """The inverse of `make_low`, with the same ``EvenstepError``."""
    _change_class(layer, LowBitLinear, nn.Linear)
    del layer.recipe, layer.kernel


def _change_class(layer: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    if reason := obstacle(layer, old):
        raise EvenstepError(f"this layer {reason}")
    vars(layer).pop("forward", None)  # the bound method of the old class, left on the instance by a removed hook
    layer.__class__ = new


def obstacle(layer: nn.Module, kind: type[nn.Module]) -> str | None:
    """The reason why the class of ``layer``, expected to be exactly ``kind``, cannot be changed; None where it can.

    A changed class would have no effect, or break the layer, where the layer has another class already or a
    ``forward`` of its own.
    """
    if type(layer) is not kind:
        return f"is a {type(layer).__name__}, not a plain {kind.__name__}: undo what changed its class first"
    own = vars(layer).get("forward")
    if own is None or (getattr(own, "__self__", None) is layer and getattr(own, "__func__", None) is kind.forward):
        return None
    return (
        "has a forward of its own, which a new class would not replace (hooks of accelerate: call "
        "remove_hook_from_submodules first, add_hook_to_module or dispatch_model afterwards)"
    )


# ---- the three matrix products ----
#
#     forward           y  = x W^T     x [..., in],  W [out, in],  y [..., out]
#     input gradient    dx = g W       g [N, out], where N is the number of tokens (all leading dimensions)
#     weight gradient   dW = g^T x     sums over the tokens


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
        # The backward pass quantises the saved operands again, with two exceptions that are saved quantised: operands
        # rounded stochastically, since a second rounding would draw other numbers; and, under autocast, the cast copy
        # of the input, which a plain layer saves too (a compiler decides that by itself).
        copied = x.dtype != dtype and not torch.compiler.is_compiling()
        keeps_xq = recipe.weight_grad.other == "forward" and (_random(recipe.input) or copied)
        keeps_wq = recipe.input_grad.other == "forward" and _random(recipe.weight)
        if kernel is not None and x.numel() and weight.numel():  # the kernel quantises both operands itself
            keeps_xq = keeps_wq = False
            out = kernel.linear(x, weight, b, dtype)
        else:
            # The strides of an operand decide the order in which a product adds up. A quantised weight is contiguous,
            # and a weight that was loaded already rounded has to give the same bits.
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
        # once_differentiable is not enough: it raises nothing when the second derivative is requested with respect to
        # the inputs, or when only a part of the loss has one, and the result would silently be zero.
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


_products: Callable[..., Tensor] = _Products.apply


def _operand(weight: Tensor, product: Backward, forward: Format | None, g: Tensor) -> Tensor:
    """The weight [out, in] of the input gradient, in the dtype of ``g``."""
    if product.other == "forward":
        return _low(weight, forward, g.dtype, after=g)
    assert not isinstance(product.other, str)
    # The product sums over the outputs, and groups run along the summed dimension: quantise the transpose [in, out].
    return _low(weight.t(), product.other, g.dtype, after=g).t()


def _weight_gradient(g: Tensor, x: Tensor, product: Backward) -> Tensor:
    """g^T x [out, in] for g [N, out] and x [N, in], in the dtype of g."""
    # Both transposed, [out, N] and [in, N]: the product sums over the tokens, so groups and rotation run along N.
    dtype, grad, other = g.dtype, g.t(), x.t()
    if product.hadamard:
        grad, other = rotate(grad, other)
    if product.other != "forward":
        assert not isinstance(product.other, str)
        other = _low(other, product.other, dtype)
    return torch.mm(_low(grad, product.grad, dtype), other.t().to(dtype))


def _as_rows(t: Tensor) -> Tensor:
    """[..., n] -> [N, n]."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])  # -1 is ambiguous for a tensor without entries


def _random(fmt: Format | None) -> bool:
    return fmt is not None and fmt.rounding == "stochastic"


def _low(t: Tensor, fmt: Format | None, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
    return t.to(dtype) if fmt is None else apply(t, fmt, dtype=dtype, after=after)


def describe_layer(layer: LowBitLinear) -> str:
    """The formats of a layer's weights and inputs in words."""
    return f"weights {describe(layer.recipe.weight)}; inputs {describe(layer.recipe.input)}"


# ---- the random Hadamard rotation ----

_ROTATION = 16  # the block size of arXiv:2509.25149


def rotate(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate ``a`` [M, N] and ``b`` [K, N] in the same way along N, in blocks of 16; fp32.

    N is padded with zeros to a multiple of 16. The signs come from torch's global random generator of the device.
    """
    # With the Hadamard matrix H (orthogonal, 16 x 16) and a diagonal D of random signs, D H is orthogonal, so that
    # (A D H) (B D H)^T = A B^T: the product stays. An outlier of A is spread over the 16 entries of its block, which
    # four bits can hold better. The random signs prevent entries that happen to have the pattern of a row of H from
    # adding up to a new outlier.
    signs = torch.randint(0, 2, (_ROTATION,), device=a.device, dtype=torch.float32).mul_(2).sub_(1)
    matrix = signs[:, None] * hadamard(_ROTATION, a.device)
    return _rotated(a, matrix), _rotated(b, matrix)


def _rotated(a: Tensor, matrix: Tensor) -> Tensor:
    a = F.pad(a.float(), (0, -a.shape[1] % _ROTATION))
    return (a.reshape(-1, _ROTATION) @ matrix).view(a.shape)


def hadamard(size: int, device: torch.device) -> Tensor:
    """The orthogonal Sylvester-Hadamard matrix, fp32 [size, size], for a power of two."""
    # Entry (i, j) has the sign (-1) ** popcount(i & j).
    i = torch.arange(size, device=device)
    both, parity = i[:, None] & i[None, :], torch.zeros(size, size, dtype=torch.int64, device=device)
    for bit in range(size.bit_length() - 1):
        parity = parity ^ (both >> bit & 1)
    matrix: Tensor = (1.0 - 2.0 * parity) / size**0.5
    return matrix


# ---- the fast path of PyTorch's transformer layers ----
#
# In eval mode nn.TransformerEncoder and its layers take a fast path that reads the weights of their linear layers
# without calling the layers: a low-bit layer would silently compute in high precision. The path stays closed while a
# module contains low-bit layers.

# The attribute that the fast path (in the encoder: its nested tensors) tests first; a false value closes it.
_SWITCHES = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
_KEPT = "_evenstep_fast_path"  # where the old value of the attribute is kept


def close_fast_paths(model: nn.Module) -> None:
    """Close the fast path of every transformer layer in ``model`` that contains a low-bit layer."""
    for module in model.modules():
        for kind, switch in _SWITCHES.items():
            if isinstance(module, kind) and not hasattr(module, _KEPT) and _holds_low(module):
                setattr(module, _KEPT, getattr(module, switch))
                setattr(module, switch, 0)


def open_fast_paths(model: nn.Module) -> None:
    """Undo `close_fast_paths` wherever no low-bit layer is left."""
    for module in model.modules():
        for kind, switch in _SWITCHES.items():
            if isinstance(module, kind) and hasattr(module, _KEPT) and not _holds_low(module):
                setattr(module, switch, getattr(module, _KEPT))
                delattr(module, _KEPT)


def _holds_low(module: nn.Module) -> bool:
    return any(isinstance(inner, LowBitLinear) for inner in module.modules())
