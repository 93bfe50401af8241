"""Swapping a model's linear layers for low-bit ones and back, in place, with an account of what was done."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from evenstep.errors import EvenstepError
from evenstep.lowbit.backends import Kernel, choose
from evenstep.lowbit.fast_paths import close_fast_paths, open_fast_paths
from evenstep.lowbit.linear import LowBitLinear, describe_layer, make_low, make_plain
from evenstep.lowbit.recipes import Recipe, get_recipe

M = TypeVar("M", bound=nn.Module)
Filter = Callable[[nn.Module, str], bool]

KEPT = {
    "head": ("lm_head", "embed_out", "head", "output", "classifier", "score"),
    "router": ("router", "gate"),
}
"""Last parts of module names that the default filter leaves alone: what makes logits, and what routes experts. It also
leaves alone a transformers model's output embeddings, and what shares its weight with an embedding."""


class _Rules:
    """The default filter: every ``nn.Linear`` but heads and routers. In a LLaMA: q, k, v, o, gate, up and down."""

    def __init__(self, model: nn.Module) -> None:
        head = getattr(model, "get_output_embeddings", None)  # transformers models say what makes their logits
        self.head = head() if callable(head) else None
        self.embeddings = {
            id(module.weight): name for name, module in model.named_modules() if isinstance(module, nn.Embedding)
        }

    def __call__(self, module: nn.Module, name: str) -> bool:
        return self.reason(module, name) is None

    def reason(self, module: nn.Module, name: str) -> str | None:
        """Why a module is kept, None where it is not."""
        if isinstance(module, nn.Embedding):
            return "embedding"
        if type(module) is not nn.Linear:
            return f"a {type(module).__name__}"
        leaf = name.rpartition(".")[2]
        if found := next((kind for kind, names in KEPT.items() if leaf in names), None):
            return found
        if module is self.head:
            return "head"
        embedding = self.embeddings.get(id(module.weight))
        return f"tied to {embedding}" if embedding is not None else None


def quantize_(model: M, recipe: Recipe | str, filter_fn: Filter | None = None, *, backend: str = "auto") -> M:
    """Turn linear layers of ``model`` into low-bit ones, in place, and return the model. Prints nothing; see
    ``lowbit_report``.

    Parameters stay the objects they are, under their names, so an optimizer made before or after sees the same.

    Args:
        model: any module; what it holds of exact type ``nn.Linear`` can be swapped, itself included.
        recipe: a ``Recipe``, or a name in ``RECIPES``.
        filter_fn: ``filter_fn(module, name) -> bool`` says which linear layers; default: all but heads and routers
            (``KEPT``).
            A recipe's ``keep_last`` then takes away the last blocks (of the modules numbered in the names).
        backend: ``auto`` runs the forward product on low-bit hardware where there is a kernel for it (see
            docs/lowbit.md) and emulates elsewhere; ``emulate`` always emulates.

    Raises:
        EvenstepError: an unknown recipe or backend, no layer matched, a matched layer that is low-bit already, or whose
            weight is shared with another module or quantised by another library. Nothing is changed then.

    Warns (UserWarning, once a call) when the recipe lets a token see later ones.
    """
    chosen = get_recipe(recipe)
    wanted = filter_fn or _Rules(model)
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
        others = Counter(type(module).__name__ for _, module, _ in _matrices(model))
        more = "".join(f"; {kind} ({count}) is no nn.Linear and stays as it is" for kind, count in others.items())
        raise EvenstepError(
            f"quantize_ found no layer to swap in {type(model).__name__}: linear layers: {len(found)}, of which "
            f"{'filter_fn accepts' if filter_fn else 'the name rules accept'} none{more}"
        )
    last = _last_blocks([name for name, _ in matched], chosen.keep_last)
    matched = [(name, module) for name, module in matched if name not in last]
    if not matched:
        raise EvenstepError(f"recipe {chosen.name} keeps all blocks of {type(model).__name__} in high precision")
    _refuse_tied(model, matched)
    _refuse_foreign(matched)
    kernels: list[Kernel | None] = [choose(chosen, module, backend) for _, module in matched]
    if not chosen.causal:
        warnings.warn(
            f"recipe {chosen.name}: groups of the inputs span tokens, so a token can see later ones wherever a width "
            "is no multiple of the group; losses of a model trained so are too low",
            stacklevel=2,
        )
    for (_, module), kernel in zip(matched, kernels, strict=True):
        make_low(module, chosen, kernel)
    close_fast_paths(model)
    return model


def dequantize_(model: M) -> M:
    """Turn every low-bit layer back into the ``nn.Linear`` it was, with its high-precision weight; returns the model.

    A model without low-bit layers stays as it is.
    """
    for module in model.modules():
        if isinstance(module, LowBitLinear):
            make_plain(module)
    open_fast_paths(model)
    return model


@dataclass(frozen=True)
class LayerReport:
    """One linear layer, embedding, or other parameter of two dimensions or more (then by the parameter's name):
    ``low`` says whether it is low-bit, ``what`` how, or why not."""

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
    """What of ``model`` is low-bit and how, and what else holds matrices (linear layers, embeddings, convolutions,
    fused experts, ...) and was kept."""
    rows, rules = [], _Rules(model)
    for name, module in model.named_modules():
        if isinstance(module, LowBitLinear):
            fmt = module.recipe.weight
            bits = fmt.bits_per_value(module.in_features) if fmt else 8.0 * module.weight.element_size()
            kernel, what = module.kernel.name if module.kernel else None, describe_layer(module)
            what += f"; {kernel}" if kernel else ""
            rows.append(LayerReport(_shown(name), tuple(module.weight.shape), True, what, bits, kernel))
        elif isinstance(module, nn.Linear | nn.Embedding):
            what = rules.reason(module, name) or "not chosen"
            rows.append(
                LayerReport(_shown(name), tuple(module.weight.shape), False, what, 8.0 * module.weight.element_size())
            )
    for name, module, parameter in _matrices(model):
        kind = rules.reason(module, name) or "not chosen"
        rows.append(LayerReport(name, tuple(parameter.shape), False, kind, 8.0 * parameter.element_size()))
    return LowBitReport(tuple(rows))


def _shown(name: str) -> str:
    return name or "the model itself"


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Name, owner and parameter of what has two dimensions or more and belongs to no linear layer or embedding."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 1:
                    yield name if own == "weight" and name else f"{name}.{own}".lstrip("."), module, parameter


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


def _refuse_foreign(matched: list[tuple[str, nn.Linear]]) -> None:
    """Weights of torchao, bitsandbytes and their like are tensors of a class of their own."""
    for name, module in matched:
        kind = type(module.weight)
        if kind.__module__.partition(".")[0] != "torch" or not module.weight.is_floating_point():
            raise EvenstepError(
                f"{_shown(name)} has a weight of type {kind.__name__} and dtype {module.weight.dtype}, quantised "
                "already: load the model in high precision, or leave the layer out with filter_fn"
            )
