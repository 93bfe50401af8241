"""The functions of cuda_launch.py as torch operators over plain tensors, with fake functions, so that torch.compile and
fake tensors see shapes and mutations without looking inside.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from evenstep.kernels.cuda_tables import chunks_of


@functools.cache
def register() -> torch.library.Library:
    """Make the operators known to torch, once."""
    known = torch.library.Library("evenstep", "FRAGMENT")
    for schema, fake in _OPERATORS.items():
        name = schema.split("(")[0]
        known.define(f"cuda_{schema}")
        known.impl(f"cuda_{name}", functools.partial(_run, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"evenstep::cuda_{name}", fake, lib=known)
    return known


def _run(name: str, *args: Any) -> Any:
    from evenstep.kernels import cuda_launch  # imports triton

    if name.endswith("_"):  # so that autograd notices a parameter that changed between its use and backward
        torch.autograd.graph.increment_version(args[0])
    return getattr(cuda_launch, name)(*args)


def _table(like: Tensor, rows: int, count: int) -> Tensor:
    return like.new_empty(rows, count, dtype=torch.float32)


def _measure(grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    return _table(grads[0], 2, len(grads)), _table(grads[0], 2, sum(chunks_of(g.numel()) for g in grads))


def _clip_norms(grads: list[Tensor], known: Tensor, limit: Tensor, rescale: Tensor) -> Tensor:
    return _table(grads[0], 2, len(grads))


def _adam(params: list[Tensor], *rest: Any) -> Tensor:
    return _table(params[0], 3, len(params))


def _columns(grads: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    return _table(grads[0], 2, len(grads)), [g.new_empty((1, *g.shape[1:]), dtype=torch.float64) for g in grads]


def _rows(params: list[Tensor], *rest: Any) -> Tensor:
    return _table(params[0], 1, len(params))


def _transformed(out: list[Tensor], grads: list[Tensor], numbers: Tensor) -> None:
    return None


_OPERATORS: dict[str, Callable[..., Any]] = {
    "measure(Tensor[] grads) -> (Tensor, Tensor)": _measure,
    "clip_norms(Tensor[] grads, Tensor known, Tensor limit, Tensor rescale) -> Tensor": _clip_norms,
    "adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor(d!)[] scales, "
    "Tensor(e!)[] scales_sq, Tensor[] maps, Tensor[] maps_sq, Tensor numbers, Tensor(f!)[] lost, Tensor[] seeds, "
    "bool capped, bool zero_history) -> Tensor": _adam,
    "columns(Tensor[] grads) -> (Tensor, Tensor[])": _columns,
    "rows_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] scales, Tensor[] maps, "
    "Tensor[] divisors, Tensor numbers, float floor, Tensor(d!)[] lost, Tensor[] seeds) -> Tensor": _rows,
    "transformed_(Tensor(a!)[] out, Tensor[] grads, Tensor numbers) -> ()": _transformed,
}
"""Schema, without the prefix ``cuda_``, and fake function."""
