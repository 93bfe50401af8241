"""PyTorch's own transformer layers take a shortcut in eval mode that reads the weights of their linear layers and never
calls them: in high precision, silently. It is closed while such a layer is low-bit.
"""

from __future__ import annotations

from torch import nn

from evenstep.lowbit.linear import LowBitLinear

_SWITCHES = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
"""The attribute that the shortcut (of the encoder: the nested tensors made for it) asks first; false: not taken."""
_KEPT = "_evenstep_fast_path"


def close_fast_paths(model: nn.Module) -> None:
    """Let every low-bit layer in ``model`` be called; undone by ``open_fast_paths``."""
    for module in model.modules():
        for kind, switch in _SWITCHES.items():
            if isinstance(module, kind) and not hasattr(module, _KEPT) and _holds_low(module):
                setattr(module, _KEPT, getattr(module, switch))
                setattr(module, switch, 0)


def open_fast_paths(model: nn.Module) -> None:
    """As it was before ``close_fast_paths``, where no low-bit layer is left."""
    for module in model.modules():
        for kind, switch in _SWITCHES.items():
            if isinstance(module, kind) and hasattr(module, _KEPT) and not _holds_low(module):
                setattr(module, switch, getattr(module, _KEPT))
                delattr(module, _KEPT)


def _holds_low(module: nn.Module) -> bool:
    return any(isinstance(inner, LowBitLinear) for inner in module.modules())
