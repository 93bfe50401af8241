"""What quantisation does to the numbers of each layer: saturation, underflow, relative error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from evenstep.lowbit.fake_quant import as_rows, check, in_blocks, noise_like, split, spread
from evenstep.lowbit.formats import Format, dequantize_blocks, quantize_blocks, restore_outliers, tensor_scale
from evenstep.lowbit.linear import LowBitLinear

Metrics = dict[str, dict[str, Tensor]]


@torch.no_grad()
def quantization_error(x: Tensor, format: Format | str, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """How well ``format`` holds ``x``, as 0-d fp32 tensors on its device (nothing waits for it); ``generator`` is what
    stochastic rounding draws from (default: torch's global one):

    - ``saturation``: share of entries beyond the ends of their group's grid (kept outliers are not);
    - ``underflow``: share of the nonzero entries that become zero;
    - ``relative_error``: norm of the difference over the norm of x (0 for a tensor of zeros).
    """
    fmt = check(x, format)
    rows = as_rows(x.detach().movedim(fmt.axis, -1) if x.dim() else x.detach(), fmt)
    total = tensor_scale(rows, fmt)
    sums = torch.zeros(4, dtype=torch.float64, device=x.device)
    pieces = (piece for strip in split(rows, -2, fmt.block_rows) for piece in split(strip, -1, fmt.group))
    for piece in pieces if x.numel() else ():
        sums += _sums(piece, fmt, total, generator)
    beyond, vanished, nonzero, error = sums.float()
    energy = rows.double().square().sum().float()
    return {
        "saturation": beyond / max(1, x.numel()),
        "underflow": vanished / nonzero.clamp_min(1.0),
        "relative_error": torch.where(energy > 0, error / energy, 0.0).sqrt(),
    }


def _sums(piece: Tensor, fmt: Format, total: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Of one piece: entries beyond the grid, nonzero ones that vanish, nonzero ones, squared error; fp64 [4]."""
    x, dims = in_blocks(piece, fmt)
    coded = quantize_blocks(x, fmt, dims, spread(total), noise_like(x, fmt, generator))
    if coded.zero is None:
        at_end = coded.values.abs() == fmt.spec.top
    else:
        code = coded.values + coded.zero
        at_end = (code == 0) | (code == 2**fmt.spec.bits - 1)
    out = dequantize_blocks(coded, fmt, spread(total))
    # Half a step is rounding where the grid is asymmetric; a symmetric scale is short of its peak by rounding.
    slack = out.abs() * 1e-4 if coded.zero is None else coded.scale * 0.5001
    out = restore_outliers(out, x, coded)
    lost = (x - out).abs()
    short = x.abs() - out.abs() if coded.zero is None else lost  # rounding up to the top loses nothing
    marks = (at_end & (short > slack), (x != 0) & (out == 0), x != 0)
    return torch.stack([*(mark.sum(dtype=torch.float64) for mark in marks), lost.double().square().sum()])


def lowbit_metrics(model: nn.Module) -> Metrics:
    """``quantization_error`` of the weight of every low-bit layer, by the layer's name."""
    return {
        name: quantization_error(module.weight, module.recipe.weight)
        for name, module in model.named_modules()
        if isinstance(module, LowBitLinear) and module.recipe.weight is not None
    }


@contextmanager
def observe_inputs(model: nn.Module) -> Iterator[Metrics]:
    """Within it every eager forward pass leaves the ``quantization_error`` of each low-bit layer's input in the
    dictionary it gives, by the layer's name; the newest pass counts. Compiled blocks do not see it.
    """
    found: Metrics = {}

    def observer(name: str, fmt: Format) -> Any:
        def observe(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = quantization_error(args[0], fmt)

        return observe

    with _removed(
        [
            module.register_forward_pre_hook(observer(name, module.recipe.input))
            for name, module in model.named_modules()
            if isinstance(module, LowBitLinear) and module.recipe.input is not None
        ]
    ):
        yield found


@contextmanager
def observe_gradients(model: nn.Module, generator: torch.Generator | None = None) -> Iterator[Metrics]:
    """As `observe_inputs`, of the gradient of each layer's output in the format that its recipe has for gradients;
    layers whose recipe leaves gradients in high precision are left out. Forward and backward pass must lie within it.
    """
    found: Metrics = {}

    def observer(name: str, fmt: Format, transposed: bool) -> Any:
        def observe(module: nn.Module, grads: tuple[Tensor, ...]) -> None:
            g = grads[0].reshape(-1, grads[0].shape[-1])
            found[name] = quantization_error(g.t() if transposed else g, fmt, generator)

        return observe

    handles = []
    for name, module in model.named_modules():
        if not isinstance(module, LowBitLinear):
            continue
        # A format groups along the dimension that its product sums over: outputs, or tokens.
        if fmt := module.recipe.input_grad.grad:
            handles.append(module.register_full_backward_pre_hook(observer(name, fmt, False)))
        elif fmt := module.recipe.weight_grad.grad:
            handles.append(module.register_full_backward_pre_hook(observer(name, fmt, True)))
    with _removed(handles):
        yield found


@contextmanager
def _removed(handles: list[RemovableHandle]) -> Iterator[None]:
    """The hooks of ``handles`` are removed in the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
