"""The optimizer that is watched: the object below its wrappers, the names of its parameters, and its closure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

PRIVATE = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module")
"""Attributes in which wrappers keep their module: torch.compile, activation checkpointing, FSDP1, Lightning Fabric."""

WRAPPERS = ("DistributedDataParallel", "DataParallel")
"""Classes that keep it as ``module``. Models use this name for parts of their own too, so it is removed only below an
instance of these classes."""


def bare(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose ``step`` updates the parameters. accelerate's wrapper, which accepts no hooks, keeps it as
    ``optimizer``."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def watched(closure: Callable[[], Any], evaluated: Callable[[Any], None]) -> Callable[[], Any]:
    """A closure that also passes its value to ``evaluated``, the first time that it is called."""
    first = True

    def run() -> Any:
        nonlocal first
        loss = closure()
        if first:
            first = False
            evaluated(loss)
        return loss

    return run


def plain_name(name: str) -> str:
    """``name`` without the components that wrappers add.

    >>> plain_name("_orig_mod.layers.0._checkpoint_wrapped_module.weight")
    'layers.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in PRIVATE)


def plain_names(names: Sequence[str]) -> list[str]:
    """`plain_name` of each of ``names``, without the ``module.`` with which all of them begin, if they do."""
    plain = [plain_name(name) for name in names]
    while plain and all(name.startswith("module.") for name in plain):
        plain = [name.removeprefix("module.") for name in plain]
    return plain


def model_names(model: nn.Module) -> dict[int, str]:
    """Id of a parameter of ``model`` -> its name in the model without wrappers. Names are unique: where two parameters
    would have the same one, both keep their full names."""
    wrapping = {
        f"{path}.module" if path else "module"
        for path, module in model.named_modules(remove_duplicate=False)
        if any(cls.__name__ in WRAPPERS for cls in type(module).__mro__)
    }

    def unwrapped(name: str) -> str:
        parts = name.split(".")
        return ".".join(part for i, part in enumerate(parts) if ".".join(parts[: i + 1]) not in wrapping)

    named = [(p, name) for name, p in model.named_parameters()]
    plain = plain_names([unwrapped(name) for _, name in named])
    count = Counter(plain)
    return {id(p): short if count[short] == 1 else name for (p, name), short in zip(named, plain, strict=True)}


def parameter_names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """The name of each parameter of the optimizer, in the order of its groups. A parameter that ``model`` does not
    have is called ``group{i}.parameter{j}``.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> parameter_names(model, torch.optim.SGD(model.parameters(), lr=0.1))
    ['weight', 'bias']
    """
    names = model_names(model)
    return [
        names.get(id(p), f"group{i}.parameter{j}")
        for i, group in enumerate(optimizer.param_groups)
        for j, p in enumerate(group["params"])
    ]
