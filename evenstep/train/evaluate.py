"""Validation with the right mean: every token weighs the same, whatever batch it came in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evenstep.errors import EvenstepError

if TYPE_CHECKING:
    from evenstep.train.distributed import Parallel, World

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class EvalResult:
    """``loss`` in nats per token; ``perplexity`` = e^loss; ``bits_per_byte`` = loss / ln 2 x tokens / bytes of the
    text."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int

    def fields(self) -> dict[str, Any]:
        """As metrics.jsonl has it."""
        return {
            "val_loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "val_tokens": self.tokens,
        }


def evaluate(
    model: Any,
    batches: Iterable[Batch],
    bytes_per_token: float,
    *,
    device: torch.device,
    autocast: AbstractContextManager[Any],
    chunk: int | None,
    parallel: Parallel | None = None,
) -> EvalResult:
    """Mean loss over every target token of ``batches`` (int64 [B, T] pairs), in ``model.eval()``; the mode is put
    back after.

    ``bytes_per_token`` is the average of the whole split, so a run that validates on a part of it states the same unit.
    Sums are float64, and stay on the device until the end. With ``parallel`` the processes share the batches; each
    gives all of them and gets the same result. EvenstepError when there is no batch.
    """
    world = parallel.world if parallel else None
    # FSDP keeps what it gathers, and a tensor born in inference mode cannot be trained on.
    without_gradients = torch.no_grad() if parallel and parallel.sharded else torch.inference_mode()
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    tokens = 0
    try:
        with without_gradients, autocast:
            for inputs, targets, ours in shares(batches, world):
                part = model.loss(inputs.to(device), targets.to(device), reduction="sum", chunk=chunk)
                if ours:
                    total += part.double()
                    tokens += targets.numel()
    finally:
        model.train(was_training)
    if world is not None:
        total, count = world.sum(torch.stack([total, total.new_tensor(tokens)])).unbind()
        tokens = round(count.item())
    if not tokens:
        raise EvenstepError("the validation split holds no tokens; give more text or a larger data.val_fraction")
    loss = total.item() / tokens
    return EvalResult(loss, perplexity(loss), loss / math.log(2) / bytes_per_token, tokens)


def shares(batches: Iterable[Batch], world: World | None) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """This process's part of the batches. All processes get the same number, since sharded models run in step: whoever
    has no batch left repeats another's, marked False."""
    size, rank = (world.data_size, world.data_rank) if world else (1, 0)
    row: list[Batch] = []
    for batch in batches:
        row.append(batch)
        if len(row) == size:
            yield (*row[rank], True)
            row = []
    if row:
        yield (*row[min(rank, len(row) - 1)], rank < len(row))


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
