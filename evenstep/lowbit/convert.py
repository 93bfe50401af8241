"""Swapping a model's linear layers for low-bit ones and back, in place, with an account of what was done."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from evenstep.errors import EvenstepError
from evenstep.lowbit.backends import Kernel, choose
from evenstep.lowbit.linear import LowBitLinear, describe_layer, make_low, make_plain
from evenstep.lowbit.recipes import Recipe, get_recipe

M = TypeVar("M", bound=nn.Module)
Filter = Callable[[nn.Module, str], bool]

KEPT = {
    "head": ("lm_head", "embed_out", "head", "output", "classifier", "score"),
    "router": ("router", "gate"),
}
"""Last parts of module names that the default filter leaves alone: what makes logits, and what routes experts."""


def default_filter(module: nn.Module, name: str) -> bool:
    """Every ``nn.Linear`` but heads and routers (see ``KEPT``): in a LLaMA q, k, v, o, gate, up and down."""
    return type(module) is nn.Linear and _reason(module, name) is None


def quantize_(model: M, recipe: Recipe | str, filter_fn: Filter | None = None, *, backend: str = "auto") -> M:
    """Turn linear layers of ``model`` into low-bit ones, in place, and return the model. Prints nothing; see
    ``lowbit_report``.

    Parameters stay the objects they are, under their names, so an optimizer made before or after sees the same.

    Args:
        model: any module; what it holds of exact type ``nn.Linear`` can be swapped, itself included.
        recipe: a ``Recipe``, or a name in ``RECIPES``.
        filter_fn: ``filter_fn(module, name) -> bool`` says which linear layers; default: all but heads and routers.
            A recipe's ``keep_last`` then takes away the last blocks (of the modules numbered in the names).
        backend: ``auto`` runs the forward product on low-bit hardware where there is a kernel for it (see
            docs/lowbit.md) and emulates elsewhere; ``emulate`` always emulates.

    Raises:
        EvenstepError: an unknown recipe or backend, no layer matched, a matched layer that is low-bit already or whose
            weight is shared with another module. Nothing is changed then.

    Warns (UserWarning, once a call) when the recipe lets a token see later ones.
    """
    chosen = get_recipe(recipe)
    wanted = filter_fn or default_filter
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    already = [
        name
        for name, module in found
        if isinstance(module, LowBitLinear) and (not filter_fn or filter_fn(module, name))
    ]
    if already:
        raise EvenstepError(
            f"{_shown(already[0])} is low-bit already (recipe {_recipe_of(model, already[0])}): "
            "dequantize_ the model first"
        )
    matched = [(name, module) for name, module in found if type(module) is nn.Linear and wanted(module, name)]
    if not matched:
        raise EvenstepError(
            f"quantize_ found no layer to swap in {type(model).__name__}: it has {len(found)} linear layers, and "
            f"{'filter_fn accepts' if filter_fn else 'the name rules accept'} none of them"
        )
    last = _last_blocks([name for name, _ in matched], chosen.keep_last)
    matched = [(name, module) for name, module in matched if name not in last]
    if not matched:
        raise EvenstepError(f"recipe {chosen.name} keeps all blocks of {type(model).__name__} in high precision")
    _refuse_tied(model, matched)
    kernels: list[Kernel | None] = [choose(chosen, module, backend) for _, module in matched]
    if not chosen.causal:
        warnings.warn(
            f"recipe {chosen.name}: groups of the inputs span tokens, so a token can see later ones wherever a width "
            "is no multiple of the group; losses of a model trained so are too low",
            stacklevel=2,
        )
    for (_, module), kernel in zip(matched, kernels, strict=True):
        make_low(module, chosen, kernel)
    return model


def dequantize_(model: M) -> M:
    """Turn every low-bit layer back into the ``nn.Linear`` it was, with its high-precision weight; returns the model.

    A model without low-bit layers stays as it is.
    """
    for module in model.modules():
        if isinstance(module, LowBitLinear):
            make_plain(module)
    return model


@dataclass(frozen=True)
class LayerReport:
    """One linear layer or embedding: ``low`` says whether it is low-bit, ``what`` how, or why not."""

    name: str
    shape: tuple[int, ...]
    low: bool
    what: str
    bits: float
    kernel: str | None = None


@dataclass(frozen=True)
class LowBitReport:
    """Prints as a table; ``layers`` are the rows, ``bits_per_weight`` the mean over the low-bit weights."""

    layers: tuple[LayerReport, ...]

    @property
    def swapped(self) -> list[str]:
        return [layer.name for layer in self.layers if layer.low]

    @property
    def kept(self) -> list[str]:
        return [layer.name for layer in self.layers if not layer.low]

    @property
    def kernels(self) -> list[str]:
        """Names of the hardware kernels in use."""
        return sorted({layer.kernel for layer in self.layers if layer.kernel})

    @property
    def bits_per_weight(self) -> float:
        low = [layer for layer in self.layers if layer.low]
        return sum(x.bits * math.prod(x.shape) for x in low) / max(1, sum(math.prod(x.shape) for x in low))

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines = []
        for layer in self.layers:
            shape, kind = "x".join(map(str, layer.shape)), "low " if layer.low else "kept"
            lines.append(f"{layer.name:{width}}  {shape:>12}  {kind}  {layer.what}")
        total = (
            f"{len(self.swapped)} layers low-bit at {self.bits_per_weight:.2f} bits per weight, {len(self.kept)} kept"
        )
        return "\n".join([*lines, total])


def lowbit_report(model: nn.Module) -> LowBitReport:
    """What of ``model`` is low-bit and how, and which linear layers and embeddings were kept."""
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, LowBitLinear):
            fmt = module.recipe.weight
            bits = fmt.bits_per_value(module.in_features) if fmt else 8.0 * module.weight.element_size()
            kernel, what = module.kernel.name if module.kernel else None, describe_layer(module)
            what += f"; {kernel}" if kernel else ""
            rows.append(LayerReport(_shown(name), tuple(module.weight.shape), True, what, bits, kernel))
        elif isinstance(module, nn.Linear | nn.Embedding):
            what = _reason(module, name) or "not chosen"
            rows.append(
                LayerReport(_shown(name), tuple(module.weight.shape), False, what, 8.0 * module.weight.element_size())
            )
    return LowBitReport(tuple(rows))


def _shown(name: str) -> str:
    return name or "the model itself"


def _reason(module: nn.Module, name: str) -> str | None:
    """Why the default filter keeps a module, None where it does not."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if type(module) is not nn.Linear:
        return f"a {type(module).__name__}"
    leaf = name.rpartition(".")[2]
    return next((kind for kind, names in KEPT.items() if leaf in names), None)


def _recipe_of(model: nn.Module, name: str) -> str:
    layer = model.get_submodule(name)
    assert isinstance(layer, LowBitLinear)
    return layer.recipe.name


def _last_blocks(names: list[str], share: float) -> set[str]:
    """The names that belong to the last ``share`` of the blocks, a block being the first number in a name."""
    if not share:
        return set()
    numbered = {name: int(match[1]) for name in names if (match := re.search(r"(?:^|\.)(\d+)(?:\.|$)", name))}
    blocks = sorted(set(numbered.values()))
    last = set(blocks[len(blocks) - math.ceil(share * len(blocks)) :])
    return {name for name, block in numbered.items() if block in last}


def _refuse_tied(model: nn.Module, matched: list[tuple[str, nn.Linear]]) -> None:
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for name, module in matched:
        names = users[id(module.weight)]
        if len(names) > 1:
            raise EvenstepError(
                f"{_shown(name)} shares its weight ({' = '.join(names)}): quantising one use would not quantise the "
                "other; untie them, or leave the layer out with filter_fn"
            )
