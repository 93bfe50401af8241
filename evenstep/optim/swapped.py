"""Transformed gradients for optimizers that read ``p.grad``.

A second copy of all gradients would be a quarter of what training holds. Where the base allows it, it is therefore
stepped on some parameters at a time, and the copies of each turn use the memory of those before: as much as the largest
gradient takes. It is kept from step to step, since memory that is new to a process takes long to get.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from evenstep.kernels import constant, table
from evenstep.optim.sharding import is_sharded
from evenstep.transforms import Gradients, blocks

LEAST = 1 << 20
"""Bytes of the gradients of a turn at least: a step of a base costs some 0.1 ms however small."""

PARAMETER_BY_PARAMETER = frozenset(
    getattr(torch.optim, name)
    for name in (
        "ASGD Adadelta Adafactor Adagrad Adam AdamW Adamax Muon NAdam RAdam RMSprop Rprop SGD".split()  # noqa: SIM905
    )
    if hasattr(torch.optim, name)
)
"""Optimizers that update each parameter from its own gradient and state alone, so that several steps on some parameters
each are one step on all. Subclasses may do otherwise."""

Work = tuple[Gradients, int, Tensor]
"""Gradients, the number of a tensor among them, and its parameter."""


def goes_in_turns(base: Optimizer) -> bool:
    """Whether ``base`` may be stepped on some parameters at a time without anyone noticing."""
    hooks = base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks
    return type(base) in PARAMETER_BY_PARAMETER and not any(hooks)


class Swap:
    """Puts transformed gradients into ``p.grad`` and steps a base on them."""

    def __init__(self) -> None:
        self.scratch: dict[torch.device, Tensor] = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Swap, ()  # the scratch memory is nobody's state

    def step(
        self,
        base: Optimizer,
        work: Sequence[Work],
        step: Callable[[], Any] | None = None,
        bad: Tensor | None = None,
    ) -> None:
        """Step ``base`` on ``work`` (by ``step``, if given). All gradients must be None, and are again afterwards. With
        ``bad`` (0-d bool) True they are NaN, for a base that leaves such tensors alone.
        """
        for turn in (turns := _turns(work) if goes_in_turns(base) else [list(work)] if work else []):
            outs = self._room_for(turn) if len(turns) > 1 else [torch.empty_like(_given(g, i)) for g, i, _ in turn]
            for several, parts in _by_bucket(turn, outs):
                _write(several, parts)
            if bad is not None:
                for out in outs:
                    out.masked_fill_(bad, math.nan)
            for (_, _, p), out in zip(turn, outs, strict=True):
                p.grad = _like(p, out)
            try:
                (step or base.step)()
            finally:
                for _, _, p in turn:
                    p.grad = None

    def _room_for(self, turn: list[Work]) -> list[Tensor]:
        given = [_given(grads, i) for grads, i, _ in turn]
        size, device = sum(map(_room, given)), given[0].device
        if device not in self.scratch or self.scratch[device].numel() < size:
            self.scratch[device] = torch.empty(size, dtype=torch.uint8, device=device)
        outs, start = [], 0
        for g in given:
            room = self.scratch[device][start : start + g.numel() * g.element_size()]
            outs.append(room.view(g.dtype).view(g.shape) if g.is_contiguous() else torch.empty_like(g))
            start += _room(g)
        return outs


def _given(grads: Gradients, i: int) -> Tensor:
    """What is here of a gradient as it came, which says what its stand-in has to look like."""
    return (grads.origin or grads).tensors[i]


def _room(g: Tensor) -> int:
    """Bytes of a tensor, in whole cache lines."""
    return -(-g.numel() * g.element_size() // 64) * 64


def _turns(work: Sequence[Work]) -> list[list[Work]]:
    """Runs of parameters on one device whose gradients take no more room than the largest of all does."""
    most = max([_room(_given(grads, i)) for grads, i, _ in work], default=0)
    turns: list[list[Work]] = []
    used, device = 0, None
    for grads, i, p in work:
        g = _given(grads, i)
        if not turns or g.device != device or used + _room(g) > max(most, LEAST):
            turns.append([])
            used, device = 0, g.device
        turns[-1].append((grads, i, p))
        used += _room(g)
    return turns


def _by_bucket(turn: list[Work], outs: list[Tensor]) -> Iterator[tuple[list[Work], list[Tensor]]]:
    """What belongs to the same gradients, one after the other."""
    for _, pairs in itertools.groupby(zip(turn, outs, strict=True), key=lambda pair: id(pair[0][0])):
        several = list(pairs)
        yield [item for item, _ in several], [out for _, out in several]


def _write(turn: list[Work], outs: list[Tensor]) -> None:
    """Transformed gradients of one bucket into ``outs``."""
    grads = turn[0][0]
    sources = [grads.tensors[i] for _, i, _ in turn]
    if grads.kernels is not None and all(out.is_contiguous() for out in outs):
        numbers = table(grads.peak, *grads.numbers())
        if len(turn) < len(grads.tensors):
            numbers = numbers.index_select(1, constant([i for _, i, _ in turn], torch.int64, numbers.device))
        grads.kernels.transformed(outs, sources, numbers)
        return
    for (_, i, _), source, out in zip(turn, sources, outs, strict=True):
        read = grads.reader(i)
        for piece, part in blocks(source, out):
            part.copy_(read(piece))


def _like(p: Tensor, part: Tensor) -> Tensor:
    """``part`` as what is here of a tensor that is laid out as ``p`` is."""
    if not is_sharded(p):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        p.device_mesh,  # type: ignore[attr-defined]
        p.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=p.shape,
        stride=p.stride(),
    )
