"""What is watched: the optimizer under its wrappers, the names of its parameters, and its closure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

PRIVATE = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module")
"""Under these names wrappers keep their module (torch.compile, activation checkpointing, FSDP1, Lightning Fabric)."""

WRAPPERS = ("DistributedDataParallel", "DataParallel")
"""Classes that keep theirs as ``module``, a name that models give to parts of their own as well."""


def bare(optimizer: Optimizer) -> Optimizer:
    """The optimizer that steps: accelerate's wrapper, which takes no hooks, keeps it as ``optimizer``."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def watched(closure: Callable[[], Any], evaluated: Callable[[Any], None]) -> Callable[[], Any]:
    """``closure``, which hands its value to ``evaluated`` when it has run for the first time."""
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
    """``name`` without the parts that only wrappers have."""
    return ".".join(part for part in name.split(".") if part not in PRIVATE)


def plain_names(names: Sequence[str]) -> list[str]:
    """`plain_name` of each, and without a ``module.`` that all of them begin with."""
    found = [plain_name(name) for name in names]
    while found and all(name.startswith("module.") for name in found):
        found = [name.removeprefix("module.") for name in found]
    return found


def model_names(model: nn.Module) -> dict[int, str]:
    """The name of each parameter of ``model`` by its id: as in the model without wrappers, and unique."""
    wrapping = {
        f"{path}.module" if path else "module"
        for path, module in model.named_modules(remove_duplicate=False)
        if any(cls.__name__ in WRAPPERS for cls in type(module).__mro__)
    }

    def unwrapped(name: str) -> str:
        parts = name.split(".")
        return ".".join(part for i, part in enumerate(parts) if ".".join(parts[: i + 1]) not in wrapping)

    known = [(p, name) for name, p in model.named_parameters()]
    short = plain_names([unwrapped(name) for _, name in known])
    count = Counter(short)
    return {id(p): brief if count[brief] == 1 else name for (p, name), brief in zip(known, short, strict=True)}


def parameter_names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """A name for each parameter of the optimizer, in its order: the model's, without the parts of wrappers."""
    known = model_names(model)
    return [
        known.get(id(p), f"group{i}.parameter{j}")
        for i, group in enumerate(optimizer.param_groups)
        for j, p in enumerate(group["params"])
    ]
