"""Validation with the right mean: every token weighs the same, whatever batch it came in."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evenstep.errors import EvenstepError


@dataclass(frozen=True)
class EvalResult:
    """``loss`` in nats per token; ``perplexity`` = e^loss; ``bits_per_byte`` = loss / ln 2 x tokens / bytes of the
    text."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int


def evaluate(
    model: Any,
    batches: Iterable[tuple[Tensor, Tensor]],
    bytes_per_token: float,
    *,
    device: torch.device,
    autocast: AbstractContextManager[Any],
    chunk: int | None,
) -> EvalResult:
    """Mean loss over every target token of ``batches`` (int64 [B, T] pairs), in ``model.eval()``; the mode is put
    back after.

    ``bytes_per_token`` is the average of the whole split, so a run that validates on a part of it states the same unit.
    Sums are float64, and stay on the device until the end. EvenstepError when there is no batch.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    tokens = 0
    try:
        with torch.inference_mode(), autocast:
            for inputs, targets in batches:
                total += model.loss(inputs.to(device), targets.to(device), reduction="sum", chunk=chunk).double()
                tokens += targets.numel()
    finally:
        model.train(was_training)
    if not tokens:
        raise EvenstepError("the validation split holds no tokens; give more text or a larger data.val_fraction")
    loss = total.item() / tokens
    return EvalResult(loss, perplexity(loss), loss / math.log(2) / bytes_per_token, tokens)


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
