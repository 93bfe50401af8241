"""What `stabilize` asks of the optimizer behind it, and of a state that it is to load."""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from evenstep.optim.chain import PREFIX
from evenstep.optim.sharding import is_sharded, refuse_flat_shard

IN_SHAPE = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "exp_inf", "square_avg"})
"""State entries that have the shape of their parameter wherever they are known."""

PARTIAL = frozenset({"mask", "projector"})
"""Entries beside which those hold a part of it: the masked entries, or a projection to fewer."""

WHOLE = frozenset({"step", "exp_avg", "exp_avg_sq"})
"""What Adam and its kin keep; part of it would be found missing in the middle of a step."""


def check_base(base: Any) -> None:
    """Raises TypeError for what is no torch Optimizer or needs its closure, ValueError for a differentiable one."""
    if not isinstance(base, Optimizer):
        raise TypeError(f"stabilize expects a torch Optimizer, got {type(base).__name__}")
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{type(base).__name__} evaluates its closure many times a step, and transforms would not see those "
            "gradients; stabilize takes optimizers whose step() needs no closure"
        )
    if any(group.get("differentiable") for group in base.param_groups):
        raise ValueError("stabilize: differentiable=True is not supported, the transforms are not differentiable")


def check_parameters(params: Iterable[Tensor]) -> None:
    """ValueError for parameters that transforms cannot take: complex ones, and flat shards."""
    for index, p in enumerate(params):
        refuse_flat_shard(p)
        if p.is_complex() and p.requires_grad:
            raise ValueError(f"stabilize does not take complex parameters (parameter {index} of a group is {p.dtype})")


def checked_copy(base: Optimizer, numbered: list[tuple[Any, Tensor]], states: dict[Any, Any]) -> dict[Any, Any]:
    """A copy of ``states`` for ``base`` to load; torch would go on with the very tensors it is given.

    Raises ValueError where an entry lacks or does not fit its parameter, which torch finds in the middle of a later
    step or never.
    """
    copied = dict(states)
    for i, p in numbered:
        saved = states.get(i)
        if not isinstance(saved, dict) or any(isinstance(value, dict) for value in saved.values()):
            continue  # nested by its library (bitsandbytes), which alone knows what belongs there
        # Checkpoint tools leave the transforms' own entries in the base's state; those are checked by their Chain.
        present = {name: x for name, x in base.state.get(p, {}).items() if not str(name).startswith(PREFIX)}
        needed = (
            WHOLE if saved.keys() & WHOLE == saved.keys() and isinstance(base, torch.optim.Adam) else present.keys()
        )
        missing = sorted(str(name) for name in needed if name not in saved)
        if missing and saved:
            raise ValueError(
                f"load_state_dict: the state of parameter {i} lacks {', '.join(missing)}; nothing was loaded"
            )
        for name, value in saved.items():
            if isinstance(value, Tensor):
                _check_shape(p, i, name, value, present.get(name), not saved.keys().isdisjoint(PARTIAL))
        copied[i] = {name: _copy(value) for name, value in saved.items()}
    return copied


def _check_shape(p: Tensor, i: Any, name: str, value: Tensor, present: Any, partial: bool) -> None:
    if partial or (isinstance(present, Tensor) and present.shape == value.shape):
        return
    expected = tuple(present.shape) if isinstance(present, Tensor) else tuple(p.shape) if name in IN_SHAPE else None
    if expected is not None and tuple(value.shape) != expected and not value.numel() == p.numel() == 1:
        raise ValueError(
            f"load_state_dict: {name!r} of parameter {i} has the shape {tuple(value.shape)} where {expected} is "
            "expected; the state belongs to another model, and nothing was loaded"
        )


def _copy(value: Any) -> Any:
    quantised = type(value) is not Tensor and hasattr(value, "dequantize") and not is_sharded(value)
    return value.detach().clone() if isinstance(value, Tensor) and not quantised else value
