"""The optimizers by name: where each class lives and how a model's parameters become its groups.

Hyperparameters are checked against the constructor itself, so an optimizer's options are written down once, in its
own signature.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from evenstep.errors import EvenstepError, nearest

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from evenstep.train.config import OptimConfig

Groups = list[dict[str, Any]]

# Arguments that this module sets itself, or that choose an implementation and not a hyperparameter.
_OURS = {"self", "params", "lr", "weight_decay", "foreach", "fused", "capturable", "differentiable", "maximize"}


def one_group(model: nn.Module) -> Groups:
    return [{"params": list(model.named_parameters())}]


def scale_roles(model: nn.Module) -> Groups:
    from evenstep.optim import scale_groups

    return scale_groups(model)


@dataclass(frozen=True)
class Entry:
    """``home`` is ``module:class``; ``fixed`` are constructor arguments that the user does not choose."""

    home: str
    groups: Callable[[nn.Module], Groups] = one_group
    fixed: dict[str, Any] = field(default_factory=dict)

    def load(self) -> type[Optimizer]:
        module, _, name = self.home.partition(":")
        return getattr(importlib.import_module(module), name)


OPTIMIZERS: dict[str, Entry] = {
    "stable_spam": Entry("evenstep.optim:StableSPAM"),
    "spam": Entry("evenstep.optim:SPAM"),
    "scale": Entry("evenstep.optim:SCALE", groups=scale_roles),
    "adamw": Entry("torch.optim:AdamW", fixed={"fused": True}),
    "adam": Entry("torch.optim:Adam", fixed={"fused": True}),
}


def hyperparameters(name: str) -> dict[str, inspect.Parameter]:
    """What ``optim.KEY`` may be for this optimizer, beside lr and weight_decay: name -> parameter of the
    constructor."""
    signature = inspect.signature(OPTIMIZERS[name].load())
    return {
        key: parameter
        for key, parameter in signature.parameters.items()
        if key not in _OURS and parameter.kind is not parameter.VAR_KEYWORD
    }


def check_optimizer(config: OptimConfig) -> None:
    """EvenstepError for an option that the optimizer's constructor does not have; imports torch, builds nothing."""
    official = getattr(OPTIMIZERS[config.name].load(), "ALIASES", {})
    allowed = ["lr", "weight_decay", *hyperparameters(config.name)]
    for key in config.options:
        if key not in allowed and key not in official:
            raise EvenstepError(
                f"optim.{key}: {config.name} has no such hyperparameter{nearest(key, allowed)} "
                f"(it has: {', '.join(allowed)})"
            )


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """The optimizer of ``config`` over every trainable parameter of ``model``.

    ``decay = "matrices"``: parameters of fewer than two dimensions go to a group of their own with weight_decay 0,
    as norms and biases are scales and offsets that have no reason to be small. EvenstepError for options or values
    the constructor refuses.
    """
    check_optimizer(config)
    chosen = OPTIMIZERS[config.name]
    groups = chosen.groups(model)
    if config.weight_decay and config.decay == "matrices":
        groups = [part for group in groups for part in split_by_decay(group)]
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in config.options.items()}
    constructor: Any = chosen.load()
    # On the meta device, where plans are checked, torch's fused kernels are refused.
    fixed = {} if next(model.parameters()).device.type == "meta" else chosen.fixed
    try:
        return constructor(groups, lr=config.lr, weight_decay=config.weight_decay, **values, **fixed)
    except EvenstepError:
        raise
    except (ValueError, TypeError) as problem:
        raise EvenstepError(f"optim: {config.name} refuses its options: {problem}") from problem


def split_by_decay(group: dict[str, Any]) -> Groups:
    """The group's matrices with its decay, then its vectors without."""
    rest = {key: value for key, value in group.items() if key != "params"}
    matrices = [item for item in group["params"] if _tensor(item).ndim >= 2]
    vectors = [item for item in group["params"] if _tensor(item).ndim < 2]
    parts: Groups = [{**rest, "params": matrices}] if matrices else []
    return [*parts, {**rest, "params": vectors, "weight_decay": 0.0}] if vectors else parts


def _tensor(item: Any) -> Any:
    return item[1] if isinstance(item, tuple) else item


class LearningRates:
    """Scales every group's own rate by the schedule's factor."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.base = [group["lr"] for group in optimizer.param_groups]

    def set(self, optimizer: Optimizer, factor: float) -> None:
        for group, rate in zip(optimizer.param_groups, self.base, strict=True):
            group["lr"] = rate * factor
