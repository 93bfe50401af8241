"""`quantize_` and `dequantize_` change the linear layers of a model into low-bit ones and back, in place; the report.

The order of the file: which layers are chosen (`_Rules`), the two functions, the report, and the checks that refuse a
model before anything is changed.
"""

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

# Last parts of module names that the default filter leaves in high precision: layers that compute logits, where an
# error goes directly into the loss, and layers that route tokens to experts, where it changes the choice. The filter
# also leaves alone a transformers model's output embeddings, and layers that share their weight with an embedding.
KEPT = {
    "head": ("lm_head", "embed_out", "head", "output", "classifier", "score"),
    "router": ("router", "gate"),
}
# Suffixes that torch.compile, DDP, FSDP, checkpoint wrappers and peft add to the name of the module that they wrap.
_WRAPPED = re.compile(
    r"(\.|^)(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer|original_module"
    r"|modules_to_save\.[^.]+)$"
)


# ---- which layers ----


class _Rules:
    """The default filter: every ``nn.Linear`` except heads and routers. In a LLaMA: q, k, v, o, gate, up and down."""

    def __init__(self, model: nn.Module) -> None:
        self.heads: set[int] = set()
        # A transformers model names its head by itself, whatever the attribute is called; the head may be wrapped.
        for module in model.modules():
            if callable(get := getattr(module, "get_output_embeddings", None)) and isinstance(head := get(), nn.Module):
                self.heads |= {id(part) for part in head.modules()}
        # By identity: a head that is tied to an embedding has the same Parameter object as its weight.
        self.embeddings = {
            id(module.weight): name for name, module in model.named_modules() if isinstance(module, nn.Embedding)
        }

    def __call__(self, module: nn.Module, name: str) -> bool:
        return self.reason(module, name) is None

    def reason(self, module: nn.Module, name: str) -> str | None:
        """The reason why a module stays in high precision; None where it does not."""
        if isinstance(module, nn.Embedding):
            return "embedding"
        # The exact type: a subclass may compute something else than x W^T + b.
        if type(module) is not nn.Linear:
            return f"a {type(module).__name__}"
        # "layers.0.gate._orig_mod" is a router too. Wrappers can be nested: remove one suffix at a time.
        while match := _WRAPPED.search(name):
            name = name[: match.start()]
        leaf = name.rpartition(".")[2]
        if found := next((kind for kind, names in KEPT.items() if leaf in names), None):
            return found
        if id(module) in self.heads:
            return "head"
        embedding = self.embeddings.get(id(_weight(module)))
        return f"tied to {embedding}" if embedding is not None else None


# ---- quantize_ and dequantize_ ----


def quantize_(model: M, recipe: Recipe | str, filter_fn: Filter | None = None, *, backend: str = "auto") -> M:
    """Turn the linear layers of a model into low-bit layers, in place.

    Parameters remain the same objects under the same names, so an optimizer may be built before or after. See
    `lowbit_report` for a table of the result.

    Args:
        model: any module. Its submodules of exact type ``nn.Linear``, the module itself included, can be changed.
        recipe: a ``Recipe``, or a name in ``RECIPES``.
        filter_fn: ``filter_fn(module, name) -> bool`` chooses the linear layers; default: all except heads and routers
            (``KEPT``). The ``keep_last`` of a recipe then removes the last blocks, by the numbers in module names.
        backend: ``auto`` (default) runs the forward product on low-bit hardware where PyTorch has a kernel for it (see
            docs/lowbit.md) and emulates it elsewhere; ``emulate`` always emulates.

    Returns:
        The same model.

    Raises:
        EvenstepError: an unknown recipe or backend; no layer chosen; or a chosen layer that is low-bit already, shares
            its weight with another layer, was quantised by another library, or has a ``forward`` replaced on the
            instance (accelerate's hooks). The model is then unchanged.

    Warns:
        UserWarning: the recipe lets a token see later ones; once per call.

    Example:
        >>> model = quantize_(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), "fp4")
        >>> model[0]
        LowBitLinear(in_features=64, out_features=64, bias=True, recipe=fp4)
        >>> dequantize_(model)[0]
        Linear(in_features=64, out_features=64, bias=True)
    """
    chosen = get_recipe(recipe)
    # Every check comes before the first change, so that a refused model is unchanged.
    layers = _chosen_layers(model, chosen, filter_fn)
    _refuse_replaced(layers)
    _refuse_foreign(layers)
    _refuse_tied(model, layers)
    kernels: list[Kernel | None] = [choose(chosen, module, backend) for _, module in layers]
    if not chosen.causal:
        warnings.warn(
            f"recipe {chosen.name}: groups of the inputs span tokens, so a token can see later ones wherever a width "
            "is not a multiple of the group; the losses of a model trained with it are too low",
            stacklevel=2,
        )
    # The kernel depends on the shape and the device of each layer, so that layers of one model may differ.
    for (_, module), kernel in zip(layers, kernels, strict=True):
        make_low(module, chosen, kernel)
    close_fast_paths(model)
    return model


def _chosen_layers(model: nn.Module, recipe: Recipe, filter_fn: Filter | None) -> list[tuple[str, nn.Linear]]:
    """Name and module of each layer that `quantize_` changes; EvenstepError where there is none or one is low-bit."""
    # All names of each linear layer: a layer that is used at several places of the model has several.
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            found.setdefault(module, []).append(name)
    rules = _Rules(model)

    def chosen_at(module: nn.Module, names: list[str]) -> bool:
        if filter_fn:
            return any(filter_fn(module, name) for name in names)
        # A layer with several names is chosen if the rules accept all of them. Low-bit layers are accepted here, so
        # that a second quantize_ raises below instead of doing nothing.
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
        # Say what the model has instead: its matrices may belong to other classes (Conv1D, fused experts).
        others = Counter(type(module).__name__ for _, module, _ in _matrices(model))
        others.update(type(module).__name__ for module in found if type(module) is not nn.Linear)
        more = "".join(f"; {kind} ({count}) is no nn.Linear and stays as it is" for kind, count in others.items())
        plain = sum(type(module) is nn.Linear for module in found)
        raise EvenstepError(
            f"quantize_ found no layer to change in {type(model).__name__}: linear layers: {plain}, of which "
            f"{'filter_fn accepts' if filter_fn else 'the name rules accept'} none{more}"
        )
    # keep_last counts blocks among the chosen layers, so that a filter that takes half of a model keeps its share.
    last = _last_blocks([name for name, _ in matched], recipe.keep_last)
    matched = [(name, module) for name, module in matched if name not in last]
    if not matched:
        raise EvenstepError(f"recipe {recipe.name} keeps all blocks of {type(model).__name__} in high precision")
    return matched


def dequantize_(model: M) -> M:
    """Turn every low-bit layer back into an ``nn.Linear`` with its high-precision weight, and return the model.

    A model without low-bit layers stays as it is.

    Raises:
        EvenstepError: the ``forward`` or the class of a layer was replaced after ``quantize_`` (accelerate's hooks,
            parametrizations, ``fully_shard`` of the layer itself). The model is then unchanged.
    """
    # isinstance and not the exact type: a parametrized low-bit layer is a subclass, and has to be refused.
    low = [(name, module) for name, module in model.named_modules() if isinstance(module, LowBitLinear)]
    _refuse_replaced(low)
    for _, module in low:
        make_plain(module)
    open_fast_paths(model)
    return model


# ---- the report ----


@dataclass(frozen=True)
class LayerReport:
    """One row of a `LowBitReport`.

    Attributes:
        name: of the linear layer or embedding; of the parameter, for any other one of two dimensions or more.
        shape: of the weight.
        low: whether it is low-bit.
        what: its formats, or the reason why it is in high precision.
        bits: bits per weight.
        kernel: the hardware kernel of the forward product; None for emulation.
    """

    name: str
    shape: tuple[int, ...]
    low: bool
    what: str
    bits: float
    kernel: str | None = None


@dataclass(frozen=True)
class LowBitReport:
    """The low-bit and the high-precision layers of a model; ``print`` shows it as a table."""

    layers: tuple[LayerReport, ...]

    @property
    def swapped(self) -> list[str]:
        """Names of the low-bit layers."""
        return [layer.name for layer in self.layers if layer.low]

    @property
    def kept(self) -> list[str]:
        """Names of the layers in high precision."""
        return [layer.name for layer in self.layers if not layer.low]

    @property
    def kernels(self) -> list[str]:
        """Names of the hardware kernels in use."""
        return sorted({layer.kernel for layer in self.layers if layer.kernel})

    # Weighted by the number of entries: a large layer counts more than a small one.
    @property
    def bits_per_weight(self) -> float:
        """The mean over all low-bit weights."""
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
    """Report which layers of ``model`` are low-bit, and which others with matrices (linear layers, embeddings,
    convolutions, fused experts, ...) are in high precision, and why.

    Example:
        >>> model = nn.ModuleDict({"up": nn.Linear(64, 64), "lm_head": nn.Linear(64, 8)})
        >>> print(lowbit_report(quantize_(model, "int8")))
        up              64x64  low   weights int8, row per FP32 scale; inputs int8, row per FP32 scale
        lm_head          8x64  kept  head
        1 layers low-bit at 8.50 bits per weight, 1 kept
    """
    rows, rules = [], _Rules(model)
    for name, module in model.named_modules():
        if isinstance(module, LowBitLinear):
            fmt = module.recipe.weight
            # A recipe may leave weights in high precision: then their dtype counts.
            bits = fmt.bits_per_value(module.in_features) if fmt else 8.0 * module.weight.element_size()
            kernel, what = module.active_kernel.name if module.active_kernel else None, describe_layer(module)
            what += f"; {kernel}" if kernel else ""
            rows.append(LayerReport(_shown(name), tuple(module.weight.shape), True, what, bits, kernel))
        elif isinstance(module, nn.Linear | nn.Embedding):
            # The rules give a reason where they keep a layer; elsewhere filter_fn or keep_last did.
            what, weight = rules.reason(module, name) or "not chosen", _weight(module)
            shape, size = (tuple(weight.shape), weight.element_size()) if weight is not None else ((), 0)
            rows.append(LayerReport(_shown(name), shape, False, what, 8.0 * size))
    # Then everything else with matrices, so that no large tensor in high precision goes unnoticed.
    for name, module, parameter in _matrices(model):
        kind = rules.reason(module, name) or "not chosen"
        rows.append(LayerReport(name, tuple(parameter.shape), False, kind, 8.0 * parameter.element_size()))
    return LowBitReport(tuple(rows))


# ---- helpers, and the checks before a change ----


def _shown(name: str) -> str:
    return name or "the model itself"


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Name, owner and parameter of all parameters of two dimensions or more outside of linear layers and embeddings."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            for own, parameter in module.named_parameters(recurse=False):
                if not is_lazy(parameter) and parameter.dim() > 1:
                    yield name if own == "weight" and name else f"{name}.{own}".lstrip("."), module, parameter


def _weight(module: nn.Module) -> Tensor | None:
    """The weight; None for lazy layers, and where it exists in the forward pass alone (FSDP's flat parameters)."""
    weight = getattr(module, "weight", None)
    return None if weight is None or is_lazy(weight) else weight


def _recipe_of(model: nn.Module, name: str) -> str:
    layer = model.get_submodule(name)
    assert isinstance(layer, LowBitLinear)
    return layer.recipe.name


def _last_blocks(names: list[str], share: float) -> set[str]:
    """The names in the last ``share`` of the blocks. The first number in a name is its block, as in layers.11.mlp."""
    if not share:
        return set()
    numbered = {name: int(match[1]) for name in names if (match := re.search(r"(?:^|\.)(\d+)(?:\.|$)", name))}
    blocks = sorted(set(numbered.values()))
    # Rounded up, as 15 % of 12 blocks are 2. Names without a number belong to no block and stay chosen.
    last = set(blocks[len(blocks) - math.ceil(share * len(blocks)) :])
    return {name for name, block in numbered.items() if block in last}


def _refuse_replaced(layers: Sequence[tuple[str, nn.Linear]]) -> None:
    # A forward on the instance takes precedence over the class, so that a new class would have no effect.
    for name, module in layers:
        kind = LowBitLinear if isinstance(module, LowBitLinear) else nn.Linear
        if reason := obstacle(module, kind):
            raise EvenstepError(f"{_shown(name)} {reason}")


def _refuse_tied(model: nn.Module, matched: list[tuple[str, nn.Linear]]) -> None:
    # The places that read each parameter. named_modules yields a layer that is used several times once, because it
    # shares nothing with another layer.
    users: dict[int, list[str]] = {}
    for name, owner in model.named_modules():
        for own, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            users.setdefault(id(parameter), []).append(f"{name}.{own}".lstrip("."))
    for name, module in matched:
        names = users.get(id(module.weight), [])  # empty for a weight that hooks compute (weight_norm, pruning)
        if len(names) > 1:
            raise EvenstepError(
                f"{_shown(name)} shares its weight ({' = '.join(names)}), and a low-bit layer needs its own: "
                "untie them, or leave the layer out with filter_fn"
            )


def _refuse_foreign(matched: list[tuple[str, nn.Linear]]) -> None:
    """Refuse weights of torchao, bitsandbytes and similar libraries, which are tensor subclasses from outside torch."""
    for name, module in matched:
        weight = _weight(module)
        if weight is None:
            raise EvenstepError(
                f"{_shown(name)} has no weight outside of the forward pass: quantize_ the model before it is wrapped, "
                "or leave the layer out with filter_fn"
            )
        # torch's own subclasses (Parameter, DTensor) are accepted.
        kind = type(weight)
        if kind.__module__.partition(".")[0] != "torch" or not weight.is_floating_point():
            raise EvenstepError(
                f"{_shown(name)} has a weight of type {kind.__name__} and dtype {weight.dtype}, quantised "
                "already: load the model in high precision, or leave the layer out with filter_fn"
            )
