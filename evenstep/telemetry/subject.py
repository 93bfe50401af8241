"""What is watched: the optimizer under its wrappers, the names of its parameters, and its closure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer


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


def parameter_names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """A name for each parameter of the optimizer, in its order: the model's, without the prefixes of wrappers."""
    known = {id(p): name for name, p in model.named_parameters()}
    names = []
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            name = known.get(id(p), f"group{i}.parameter{j}")
            names.append(name.removeprefix("module.").replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", ""))
    return names
