"""Steps that pause where they need a number of the whole tensor.

A sharded parameter is a part here and parts elsewhere; its largest entry is the maximum over the parts, its squared
norm their sum. The steps of this package are therefore written as generators: they ``yield`` what is to be combined
over the parts and find the result in what they yielded. All of them advance together, so that what many parameters ask
for at the same point travels in one message. Without shards the answer is the question, and a step costs what a plain
function would.

A step that needs another one's result says ``found = yield other_step`` and `lockstep` runs that one first. ``yield
from`` does the same, but torch.compile (2.13) loses the value that it returns.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

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


Steps = Generator[Any, Any, R]
"""A step that returns an ``R``. It yields tuples of `Combine`, for which it gets a list of answers, or other steps, for
which it gets their results.
"""


def combined(*requests: Combine) -> Steps[list[Tensor]]:
    """Ask, wait, and return the answers: ``[peak] = yield from combined(Combine("max", peaks))``."""
    return (yield requests)


def lockstep(steps: Sequence[Steps[R]], combine: Callable[[dict[int, tuple[Combine, ...]]], None]) -> list[R]:
    """Advance all ``steps`` together to their ends and return their results. ``combine`` gets the requests of one round
    by number and writes their answers; a request left without one is answered with its own values.
    """
    results: dict[int, R] = {}
    running: dict[int, list[Steps[Any]]] = {i: [step] for i, step in enumerate(steps)}
    answers: dict[int, list[Tensor]] = {}
    while running:
        requests: dict[int, tuple[Combine, ...]] = {}
        for i, stack in running.items():
            asked, result = _advanced(stack, answers.get(i))
            if asked is None:
                results[i] = result
            else:
                requests[i] = asked
        running = {i: running[i] for i in requests}
        combine(requests)
        answers = {i: [_answer(request) for request in several] for i, several in requests.items()}
    return [results[i] for i in range(len(steps))]


def _answer(request: Combine) -> Tensor:
    return request.values if request.answer is None else request.answer


def _advanced(stack: list[Steps[Any]], value: Any) -> tuple[tuple[Combine, ...] | None, Any]:
    """Go on with the last of a stack of steps, each waiting for the one after it, until one asks (then what it asks) or
    all have ended (then None and the result).
    """
    while stack:
        try:
            yielded = stack[-1].send(value)
        except StopIteration as stop:
            stack.pop()
            value = stop.args[0] if stop.args else None  # torch.compile knows args but not value
        else:
            if isinstance(yielded, tuple):
                return yielded, None
            stack.append(yielded)
            value = None
    return None, value
