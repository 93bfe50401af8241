"""Steps that pause where they need a number of the whole tensor.

A sharded parameter is a part here and parts elsewhere; its largest entry is the maximum over the parts, its squared
norm their sum. The steps of this package are therefore written as generators: they ``yield`` what is to be combined
over the parts and find the result in what they yielded. All of them advance together, so that what many parameters ask
for at the same point travels in one message. Without shards the answer is the question, and a step costs what a plain
function would.
(A value sent into a generator would say the same, but torch.compile does not trace it through ``yield from``.)
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

R = TypeVar("R")


@dataclass(slots=True)
class Combine:
    """``values`` are to be combined over the parts of a tensor, elementwise, by ``"max"`` or ``"sum"``; or, by
    ``"gather"``, strung together with those of all other tensors that ask at the same place.

    ``over`` names the dimension of the tensor that the values were taken over, None for all: parts that are cut along
    another dimension hold other values and not parts of these.
    """

    op: str
    values: Tensor
    over: int | None = None
    answer: Tensor | None = None


Steps = Generator[tuple[Combine, ...], None, R]
"""A step that asks for combined values on its way, several at a time if it likes, and returns an ``R``."""


def combined(*requests: Combine) -> Steps[list[Tensor]]:
    """Ask, wait, and return the answers: ``[peak] = yield from combined(Combine("max", peaks))``."""
    yield requests
    return [request.values if request.answer is None else request.answer for request in requests]


def _filed(number: int, step: Steps[R], results: dict[int, R]) -> Steps[None]:
    results[number] = yield from step


def lockstep(steps: Sequence[Steps[R]], combine: Callable[[dict[int, tuple[Combine, ...]]], None]) -> list[R]:
    """Advance all ``steps`` together to their ends and return their results. ``combine`` gets the requests of one round
    by number and writes their answers; a request left without one is answered with its own values.
    """
    results: dict[int, R] = {}
    running = {i: _filed(i, step, results) for i, step in enumerate(steps)}
    while running:
        asked = {i: next(step, None) for i, step in running.items()}
        requests = {i: several for i, several in asked.items() if several is not None}
        running = {i: running[i] for i in requests}
        combine(requests)
    return [results[i] for i in range(len(steps))]
