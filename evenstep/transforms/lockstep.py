"""Steps that pause where they need a number of the whole tensor.

A sharded parameter is a part here and parts elsewhere; its largest entry is the maximum over the parts, its squared
norm their sum. The steps of this package are therefore written as generators: they ``yield`` what is to be combined
over the parts and receive the result. All of them advance together, so that what many parameters ask for at the same
point travels in one message. Without shards the answer is the question, and a step costs what a plain function would.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Combine:
    """``values`` are to be combined over the parts of a tensor, elementwise, by ``"max"`` or ``"sum"``.

    ``over`` names the dimension of the tensor that the values were taken over, None for all: parts that are cut along
    another dimension hold other values and not parts of these.
    """

    op: str
    values: Tensor
    over: int | None = None


Steps = Generator[tuple[Combine, ...], list[Tensor], R]
"""A step that asks for combined values on its way, several at a time if it likes, and returns an ``R``."""


def lockstep(
    steps: Sequence[Steps[R]], combine: Callable[[dict[int, tuple[Combine, ...]]], dict[int, list[Tensor]]]
) -> list[R]:
    """Advance all ``steps`` together to their ends and return their results. ``combine`` gets the requests of one round
    by number.
    """
    results: dict[int, R] = {}
    answers: dict[int, list[Tensor]] = {}
    waiting = list(range(len(steps)))
    while waiting:
        requests: dict[int, tuple[Combine, ...]] = {}
        for i in waiting:
            try:
                requests[i] = steps[i].send(answers[i]) if i in answers else next(steps[i])
            except StopIteration as stop:
                results[i] = stop.value
        waiting = list(requests)
        answers = combine(requests) if requests else {}
    return [results[i] for i in range(len(steps))]
