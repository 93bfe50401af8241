"""Swapping a model's linear layers for low-bit ones and back, in place, with an account of what was done."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from evenstep.errors import EvenstepError
from evenstep.lowbit.backends import Kernel, choose
from evenstep.lowbit.linear import (
    LowBitLinear,
    close_fast_paths,
    describe_layer,
    make_low,
    make_plain,
    obstacle,
    open_fast_paths,
)
from evenstep.lowbit.recipes import Recipe, get_recipe

M = TypeVar("M", bound=nn.Module)
Filter = Callable[[nn.Module, str], bool]

KEPT = {
    "head": ("lm_head", "embed_out", "head", "output", "classifier", "score"),
    "router": ("router", "gate"),
}
"""Last parts of module names that the default filter leaves alone: what makes logits, and what routes experts. It also
leaves alone a transformers model's output embeddings, and what shares its weight with an embedding."""


_WRAPPED = re.compile(
    r"(\.|^)(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer|original_module"
    r"|modules_to_save\.[^.]+)$"
)
"""What torch.compile, DDP, FSDP, checkpoint wrappers and peft append to the name of what they wrap."""


class _Rules:
    """The default filter: every ``nn.Linear`` but heads and routers. In a LLaMA: q, k, v, o, gate, up and down."""

    def __init__(self, model: nn.Module) -> None:
        self.heads: set[int] = set()
        for module in model.modules():  # transformers models say what makes their logits, wrapped or not
            if callable(get := getattr(module, "get_output_embeddings", None)) and isinstance(head := get(), nn.Module):
                self.heads |= {id(part) for part in head.modules()}
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
        while match := _WRAPPED.search(name):
            name = name[: match.start()]
        leaf = name.rpartition(".")[2]
        if found := next((kind for kind, names in KEPT.items() if leaf in names), None):
            return found
        if id(module) in self.heads:
            return "head"
        embedding = self.embeddings.get(id(_weight(module)))
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
        EvenstepError: an unknown recipe or backend, no layer matched, a matched layer that is low-bit already, whose
            weight is shared with another layer or quantised by another library, or whose ``forward`` was replaced on
            the instance (accelerate's hooks). Nothing is changed then.

    Warns (UserWarning, once a call) when the recipe lets a token see later ones.
    """
    chosen = get_recipe(recipe)
    found: dict[nn.Module, list[str]] = {}  # the names of each linear layer: several where it is used several times
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            found.setdefault(module, []).append(name)
    rules = _Rules(model)

    def chosen_at(module: nn.Module, names: list[str]) -> bool:
        if filter_fn:
            return any(filter_fn(module, name) for name in names)
        return isinstance(module, LowBitLinear) or all(rules(module, name) for name in names)

    accepted = [(names[0], module) for module, names in found.items() if chosen_at(module, names)]
    already = [name for name, module in accepted if isinstance(module, LowBitLinear)]
    if already:
        raise EvenstepError(
            f"{_shown(already[0])} is low-bit already (recipe {_recipe_of(model, already[0])}): "
            "dequantize_ the model first"
        )
    matched = [(name, module) for name, module in accepted if type(module) is nn.Linear]
    if not matched:
        others = Counter(type(module).__name__ for _, module, _ in _matrices(model))
        others.update(type(module).__name__ for module in found if type(module) is not nn.Linear)
        more = "".join(f"; {kind} ({count}) is no nn.Linear and stays as it is" for kind, count in others.items())
        plain = sum(type(module) is nn.Linear for module in found)
        raise EvenstepError(
            f"quantize_ found no layer to swap in {type(model).__name__}: linear layers: {plain}, of which "
            f"{'filter_fn accepts' if filter_fn else 'the name rules accept'} none{more}"
        )
    last = _last_blocks([name for name, _ in matched], chosen.keep_last)
    matched = [(name, module) for name, module in matched if name not in last]
    if not matched:
        raise EvenstepError(f"recipe {chosen.name} keeps all blocks of {type(model).__name__} in high precision")
    _refuse_replaced(matched)
    _refuse_foreign(matched)
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
    close_fast_paths(model)
    return model


def dequantize_(model: M) -> M:
    """Turn every low-bit layer back into the ``nn.Linear`` it was, with its high-precision weight; returns the model.

    A model without low-bit layers stays as it is. EvenstepError, and nothing changed, where a layer's ``forward`` or
    class was replaced since ``quantize_`` (accelerate's hooks, parametrizations, ``fully_shard`` of the layer itself).
    """
    low = [(name, module) for name, module in model.named_modules() if isinstance(module, LowBitLinear)]
    _refuse_replaced(low)
    for _, module in low:
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
            kernel, what = module.active_kernel.name if module.active_kernel else None, describe_layer(module)
            what += f"; {kernel}" if kernel else ""
            rows.append(LayerReport(_shown(name), tuple(module.weight.shape), True, what, bits, kernel))
        elif isinstance(module, nn.Linear | nn.Embedding):
            what, weight = rules.reason(module, name) or "not chosen", _weight(module)
            shape, size = (tuple(weight.shape), weight.element_size()) if weight is not None else ((), 0)
            rows.append(LayerReport(_shown(name), shape, False, what, 8.0 * size))
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
                if not is_lazy(parameter) and parameter.dim() > 1:
                    yield name if own == "weight" and name else f"{name}.{own}".lstrip("."), module, parameter


def _weight(module: nn.Module) -> Tensor | None:
    """None where there is none yet (lazy layers), or none outside of the forward pass (FSDP's flat parameters)."""
    weight = getattr(module, "weight", None)
    return None if weight is None or is_lazy(weight) else weight


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


def _refuse_replaced(layers: Sequence[tuple[str, nn.Linear]]) -> None:
    for name, module in layers:
        kind = LowBitLinear if isinstance(module, LowBitLinear) else nn.Linear
        if reason := obstacle(module, kind):
            raise EvenstepError(f"{_shown(name)} {reason}")


def _refuse_tied(model: nn.Module, matched: list[tuple[str, nn.Linear]]) -> None:
    users: dict[int, list[str]] = {}
    for name, owner in model.named_modules():  # a layer that is used at several places shares nothing: it comes once
        for own, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            users.setdefault(id(parameter), []).append(f"{name}.{own}".lstrip("."))
    for name, module in matched:
        names = users.get(id(module.weight), [])  # none: computed from others in each pass (weight_norm, pruning)
        if len(names) > 1:
            raise EvenstepError(
                f"{_shown(name)} shares its weight ({' = '.join(names)}), and a low-bit layer needs one of its own: "
                "untie them, or leave the layer out with filter_fn"
            )


def _refuse_foreign(matched: list[tuple[str, nn.Linear]]) -> None:
    """Weights of torchao, bitsandbytes and their like are tensors of a class of their own."""
    for name, module in matched:
        weight = _weight(module)
        if weight is None:
            raise EvenstepError(
                f"{_shown(name)} has no weight outside of the forward pass: quantize_ the model before it is wrapped, "
                "or leave the layer out with filter_fn"
            )
        kind = type(weight)
        if kind.__module__.partition(".")[0] != "torch" or not weight.is_floating_point():
            raise EvenstepError(
                f"{_shown(name)} has a weight of type {kind.__name__} and dtype {weight.dtype}, quantised "
                "already: load the model in high precision, or leave the layer out with filter_fn"
            )
