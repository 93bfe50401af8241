"""The error of quantisation in each layer: saturation, underflow, relative error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    """Measure the error of quantising ``x``.

    Args:
        x: a tensor of any floating dtype.
        format: a ``Format``, or a name in ``FORMATS``.
        generator: the random generator of stochastic rounding; default: torch's global one.

    Returns:
        0-d fp32 tensors on the device of ``x``, computed without synchronising with it:

        - ``saturation``: share of the entries beyond the ends of their group's grid; kept outliers do not count.
        - ``underflow``: share of the nonzero entries that become zero.
        - ``relative_error``: norm of the difference divided by the norm of ``x`` (0 for a tensor of zeros).

    Raises:
        EvenstepError: as ``fake_quantize``.

    Example:
        >>> error = quantization_error(torch.tensor([0.0, 0.1, 3.0, 6.0]), Format("e2m1"))  # 0.1 becomes 0
        >>> round(float(error["underflow"]), 3), float(error["saturation"])
        (0.333, 0.0)
    """
    fmt = check(x, format)
    rows = as_rows(x.detach().movedim(fmt.axis, -1) if x.dim() else x.detach(), fmt)
    # The same pieces as in `fake_quantize`, whose intermediate values tell what saturated.
    total = tensor_scale(rows, fmt)
    # Counts and squares in fp64: fp32 counts exactly to 2 ** 24 entries only.
    sums = torch.zeros(4, dtype=torch.float64, device=x.device)
    pieces = (piece for strip in split(rows, -2, fmt.block_rows) for piece in split(strip, -1, fmt.group))
    for piece in pieces if x.numel() else ():
        sums += _sums(piece, fmt, total, generator)
    # Nothing here reads a value on the host, so that measuring does not stall a GPU.
    beyond, vanished, nonzero, error = sums.float()
    energy = rows.double().square().sum().float()
    return {
        "saturation": beyond / max(1, x.numel()),
        "underflow": vanished / nonzero.clamp_min(1.0),
        "relative_error": torch.where(energy > 0, error / energy, 0.0).sqrt(),
    }


def _sums(piece: Tensor, fmt: Format, total: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """fp64 [4] of one piece: entries beyond the grid, nonzero ones that become zero, nonzero ones, squared error."""
    x, dims = in_blocks(piece, fmt)  # [R, G, group]
    coded = quantize_blocks(x, fmt, dims, spread(total), noise_like(x, fmt, generator))
    # An entry is beyond the grid if it is at an end and lost more than rounding explains.
    if coded.zero is None:
        at_end = coded.values.abs() == fmt.spec.top  # compared before dequantising, which overwrites the values
    else:
        code = coded.values + coded.zero
        at_end = (code == 0) | (code == 2**fmt.spec.bits - 1)
    out = dequantize_blocks(coded, fmt, spread(total))
    # An asymmetric grid is evenly spaced, so that up to half a step is rounding. The scale of a symmetric grid may be
    # smaller than peak / top by its own rounding, about 1e-7.
    slack = out.abs() * 1e-4 if coded.zero is None else coded.scale * 0.5001
    out = restore_outliers(out, x, coded)
    lost = (x - out).abs()
    short = x.abs() - out.abs() if coded.zero is None else lost  # negative where x was rounded up to the top
    marks = (at_end & (short > slack), (x != 0) & (out == 0), x != 0)
    return torch.stack([*(mark.sum(dtype=torch.float64) for mark in marks), lost.double().square().sum()])


def lowbit_metrics(model: nn.Module) -> Metrics:
    """`quantization_error` of the weight of every low-bit layer, by the name of the layer.

    Example:
        >>> from evenstep.lowbit import quantize_
        >>> model = quantize_(nn.Sequential(nn.Linear(64, 64)), "fp4")
        >>> sorted(lowbit_metrics(model)["0"])
        ['relative_error', 'saturation', 'underflow']
    """
    return {
        name: quantization_error(module.weight, module.recipe.weight)
        for name, module in model.named_modules()
        if isinstance(module, LowBitLinear) and module.recipe.weight is not None
    }


@contextmanager
def observe_inputs(model: nn.Module) -> Iterator[Metrics]:
    """A context in which eager forward passes measure the `quantization_error` of the input of each low-bit layer.

    It yields a dictionary by the name of the layer, which holds the result of the latest pass. Compiled blocks do not
    run the hooks.

    Example:
        >>> from evenstep.lowbit import quantize_
        >>> model = quantize_(nn.Sequential(nn.Linear(64, 64)), "fp4")
        >>> with observe_inputs(model) as found:
        ...     _ = model(torch.randn(2, 64))
        >>> list(found)
        ['0']
    """
    with _observed(model, "input", lambda module, args: args[0]) as found:  # x [..., in]
        yield found


@contextmanager
def observe_weights(model: nn.Module) -> Iterator[Metrics]:
    """As `observe_inputs`, for the weight of each low-bit layer as the forward pass uses it: under FSDP2 the whole
    matrix, of which a process holds a shard between the passes. `lowbit_metrics` takes the weights as they are."""
    with _observed(model, "weight", lambda module, args: module.weight.detach()) as found:
        yield found


@contextmanager
def _observed(
    model: nn.Module, what: str, of: Callable[[LowBitLinear, tuple[Tensor, ...]], Tensor]
) -> Iterator[Metrics]:
    """Measure the tensor that ``of`` takes from each forward pass of a layer, in the format of its recipe's field
    ``what``; layers without such a format are left out."""
    found: Metrics = {}

    def observer(name: str, fmt: Format) -> Any:
        def observe(module: LowBitLinear, args: tuple[Tensor, ...]) -> None:
            found[name] = quantization_error(of(module, args), fmt)

        return observe

    with _removed(
        [
            module.register_forward_pre_hook(observer(name, fmt))
            for name, module in model.named_modules()
            if isinstance(module, LowBitLinear) and (fmt := getattr(module.recipe, what)) is not None
        ]
    ):
        yield found


@contextmanager
def observe_gradients(model: nn.Module, generator: torch.Generator | None = None) -> Iterator[Metrics]:
    """As `observe_inputs`, for the gradient of each layer's output, in the format that the recipe has for gradients.

    Layers whose recipe leaves gradients in high precision are left out. Both the forward and the backward pass have to
    run within the context.
    """
    found: Metrics = {}

    def observer(name: str, fmt: Format, transposed: bool) -> Any:
        def observe(module: nn.Module, grads: tuple[Tensor, ...]) -> None:
            g = grads[0].reshape(-1, grads[0].shape[-1])  # [..., out] -> [N, out]
            found[name] = quantization_error(g.t() if transposed else g, fmt, generator)

        return observe

    handles = []
    for name, module in model.named_modules():
        if not isinstance(module, LowBitLinear):
            continue
        # A recipe that quantises gradients for both products is measured for the first one alone.
        # Groups run along the dimension that the product sums over: the outputs in dx = g W (g [N, out] as it is), the
        # tokens in dW = g^T x (transposed).
        if fmt := module.recipe.input_grad.grad:
            handles.append(module.register_full_backward_pre_hook(observer(name, fmt, False)))
        elif fmt := module.recipe.weight_grad.grad:
            handles.append(module.register_full_backward_pre_hook(observer(name, fmt, True)))
    with _removed(handles):
        yield found


@contextmanager
def _removed(handles: list[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks on exit, after an exception too."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
