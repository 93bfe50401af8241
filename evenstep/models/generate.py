"""Text generation: keys and values of past tokens are kept, so that a new token costs one token's work.

Rotary positions count from the start of the context, so a full cache cannot slide token by token without being
recomputed. When the context reaches ``max_seq_len`` tokens it starts again from its last half, in one pass: the cost
stays linear in the number of tokens, and every token is predicted from at least ``max_seq_len // 2`` others once the
text is that long.
"""

from __future__ import annotations

import contextlib
import sys

import torch
from torch import Tensor

from evenstep.errors import EvenstepError
from evenstep.models.llama import Llama


class _LayerCache:
    """One block's keys and values, [1, heads, max_seq_len, head] with the first ``length`` filled."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.length = 0
        self.kv: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.kv is None:  # shape, dtype (autocast!) and device are those of the first keys
            shape = (*k.shape[:2], self.size, k.shape[3])
            self.kv = k.new_empty(shape), v.new_empty(shape)
        start, self.length = self.length, self.length + k.shape[2]
        for kept, new in zip(self.kv, (k, v), strict=True):
            kept[:, :, start : self.length] = new
        return self.kv[0][:, :, : self.length], self.kv[1][:, :, : self.length]


@torch.no_grad()
def generate(
    model: Llama,
    tokens: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = 50,
    generator: torch.Generator | None = None,
    stop: int | None = None,
    vocab_size: int | None = None,
) -> list[int]:
    """Continue ``tokens``; returns the new tokens alone, at most ``max_new_tokens`` of them.

    ``temperature`` 0 takes the likeliest token every time; otherwise logits are divided by it and a token is drawn from
    the ``top_k`` likeliest (None: from all) with ``generator``, a CPU generator (None: torch's global one). ``stop`` is
    a token that ends the text and is not returned. A prompt longer than ``max_seq_len`` is cut to its last
    ``max_seq_len`` tokens. ``vocab_size``: entries of the tokenizer, where the model's vocabulary is padded to more: no
    other is chosen. The defaults 0.8 and 50 are ours, usual for small models.

    Raises ``EvenstepError`` for an empty prompt, a token outside the vocabulary, a negative temperature or count, a
    ``top_k`` below 1.
    """
    rows, limit = model.config.vocab_size, model.config.max_seq_len
    if not tokens:
        raise EvenstepError("the prompt has no tokens: give at least one (an end-of-text token starts a new document)")
    if outside := [t for t in tokens if not 0 <= t < rows]:
        raise EvenstepError(
            f"prompt token {outside[0]} is outside the model's vocabulary of {rows}: "
            f"use the tokenizer it was trained with"
        )
    if max_new_tokens < 0:
        raise EvenstepError(f"max_new_tokens is {max_new_tokens}: it must be 0 or more")
    if not temperature >= 0:
        raise EvenstepError(f"temperature is {temperature}: it must be 0 (always the likeliest token) or more")
    if top_k is not None and top_k < 1:
        raise EvenstepError(f"top_k is {top_k}: it must be at least 1, or None for the whole vocabulary")

    device = model.lm_head.weight.device
    context = list(tokens[-limit:])
    new: list[int] = []
    caches: list[_LayerCache] = []
    pending = context
    with _without_compiling():
        while len(new) < max_new_tokens:
            if not caches:
                caches = [_LayerCache(limit) for _ in model.model.layers]
            hidden = model.model(torch.tensor([pending], device=device), caches[0].length, caches)
            logits = model.lm_head(hidden[0, -1])[:vocab_size].float().cpu()
            token = _choose(logits, temperature, top_k, generator)
            if token == stop:
                break
            new.append(token)
            context.append(token)
            pending = [token]
            if len(context) > limit:
                context = context[-max(1, limit // 2) :]
                pending, caches = context, []
    return new


def _choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        best, indices = logits.topk(top_k)
        return int(indices[torch.multinomial((best / temperature).softmax(0), 1, generator=generator)])
    return int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))


def _without_compiling() -> contextlib.AbstractContextManager[object]:
    """Run a compiled model uncompiled: the cache changes its length on every call, and each length would compile
    anew."""
    # Importing the compiler takes seconds; where nobody has, there is nothing compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
