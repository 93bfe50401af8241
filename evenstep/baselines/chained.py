"""Several optimizers over disjoint parameters as one torch Optimizer: Muon for matrices with AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


class ChainedOptimizer(Optimizer):
    """Runs the steps of several optimizers one after the other.

    Groups and state belong to these optimizers; `param_groups` and `state` are views of them. A state dict numbers the
    parameters consecutively, in the order of the optimizers.

    Args:
        optimizers: the optimizers, which have no parameter in common.

    Example:
        >>> import torch
        >>> matrix, vector = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4))
        >>> both = ChainedOptimizer(torch.optim.Muon([matrix], lr=0.1), torch.optim.SGD([vector], lr=0.1))
        >>> [group["params"][0].ndim for group in both.param_groups]
        [2, 1]
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers
        self.defaults: dict[str, Any] = {}
        # Optimizer.__init__ would create groups and a state of its own; __setstate__ sets up hooks and profiling alone.
        self.__setstate__({})

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> Any:  # type: ignore[override]
        return {p: entries for optimizer in self.optimizers for p, entries in optimizer.state.items()}

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        # The closure runs once: passed on, each optimizer would compute the gradients again.
        loss = None if closure is None else closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise NotImplementedError("add the group to one of the optimizers that this one consists of")

    def state_dict(self) -> dict[str, Any]:
        # `first` is the number of the optimizer's first parameter, which numbers its own from 0.
        state: dict[Any, Any] = {}
        groups: list[dict[str, Any]] = []
        first = 0
        for optimizer in self.optimizers:
            saved = optimizer.state_dict()
            state |= {i + first: entries for i, entries in saved["state"].items()}
            groups += [{**group, "params": [i + first for i in group["params"]]} for group in saved["param_groups"]]
            first += sum(len(group["params"]) for group in saved["param_groups"])
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups = list(state_dict["param_groups"])
        wanted = [len(group["params"]) for group in self.param_groups]
        if [len(group["params"]) for group in groups] != wanted:
            raise ValueError(
                f"load_state_dict: the saved groups have {[len(g['params']) for g in groups]} parameters, "
                f"those of this optimizer have {wanted}"
            )
        for optimizer in self.optimizers:
            mine = [groups.pop(0) for _ in optimizer.param_groups]
            first = mine[0]["params"][0]
            moved = [{**group, "params": [i - first for i in group["params"]]} for group in mine]
            held = {i for group in mine for i in group["params"]}
            state = {i - first: entries for i, entries in state_dict["state"].items() if i in held}
            optimizer.load_state_dict({"state": state, "param_groups": moved})
