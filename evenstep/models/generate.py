"""Text generation with a cache of keys and values, so that a new token costs the forward pass of one token.

Rotary positions count from the start of the context, so that a full cache cannot slide by one token without being
recomputed. When the context reaches ``max_seq_len`` tokens, generation starts again from its last half in one pass: the
cost stays linear in the number of tokens, and every token is predicted from at least ``max_seq_len // 2`` others once
the text is that long.
"""

from __future__ import annotations

import contextlib
import sys

import torch
from torch import Tensor

from evenstep.errors import EvenstepError
from evenstep.models.hub import HubLM
from evenstep.models.llama import Llama


class _LayerCache:
    """Keys and values of one block, each [1, heads, max_seq_len, head], of which the first ``length`` are filled."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.length = 0
        self.kv: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.kv is None:  # allocated like the first keys, whose dtype depends on autocast
            shape = (*k.shape[:2], self.size, k.shape[3])
            self.kv = k.new_empty(shape), v.new_empty(shape)
        start, self.length = self.length, self.length + k.shape[2]
        for kept, new in zip(self.kv, (k, v), strict=True):
            kept[:, :, start : self.length] = new
        return self.kv[0][:, :, : self.length], self.kv[1][:, :, : self.length]


@torch.no_grad()
def generate(
    model: Llama | HubLM,
    tokens: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = 50,
    generator: torch.Generator | None = None,
    stop: int | None = None,
    vocab_size: int | None = None,
) -> list[int]:
    """Continue a list of tokens.

    Args:
        model: the model, on any device. A model of transformers computes the whole text again for each token, since
            its cache depends on the architecture; the model's own ``generate`` is faster.
        tokens: the prompt; of a longer one, the last ``max_seq_len`` tokens are used.
        max_new_tokens: the largest number of new tokens.
        temperature: 0 always chooses the most probable token; otherwise logits are divided by it. Default 0.8, usual
            for small models.
        top_k: a token is drawn from this many most probable ones, default 50; None: from all.
        generator: a CPU generator; None: torch's global one.
        stop: a token that ends the text; it is not returned.
        vocab_size: entries of the tokenizer, where the model's vocabulary is padded to more; no other is chosen.

    Returns:
        The new tokens, without the prompt.

    Raises:
        EvenstepError: an empty prompt, a token outside the vocabulary, a negative temperature or count, or a ``top_k``
            below 1.

    Example:
        >>> from evenstep.models import llama_config
        >>> model = Llama(llama_config("tiny", vocab_size=64, num_layers=1))
        >>> len(generate(model, [1, 2, 3], max_new_tokens=5))
        5
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

    # `context` has the tokens that the model sees; `pending` those that are not in the caches yet.
    device = next(model.parameters()).device
    context = list(tokens[-limit:])
    new: list[int] = []
    caches: list[_LayerCache] = []
    pending = context
    with _without_compiling():
        while len(new) < max_new_tokens:
            if isinstance(model, Llama):
                if not caches:
                    caches = [_LayerCache(limit) for _ in model.model.layers]
                # [1, pending tokens, hidden]; only the last position predicts a new token: the head computes one row.
                hidden = model.model(torch.tensor([pending], device=device), caches[0].length, caches)
                logits = model.logits(hidden[0, -1])
            else:
                logits = model(torch.tensor([context], device=device))[0, -1]
            # On the CPU, where `generator` is: the same seed draws the same tokens on every device.
            logits = logits[:vocab_size].float().cpu()
            token = _choose(logits, temperature, top_k, generator)
            if token == stop:
                break
            new.append(token)
            context.append(token)
            pending = [token]  # the next pass computes this token alone, from the cached keys and values
            if len(context) > limit:  # rotary positions of cached keys are fixed, so the cache is computed again
                context = context[-max(1, limit // 2) :]
                pending, caches = context, []
    return new


def _choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        # A softmax over the k kept logits equals the renormalised softmax over all.
        best, indices = logits.topk(top_k)
        return int(indices[torch.multinomial((best / temperature).softmax(0), 1, generator=generator)])
    return int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))


def _without_compiling() -> contextlib.AbstractContextManager[object]:
    """Run a compiled model in eager mode: the length of the cache changes with every call, and each would compile."""
    # The import of the compiler takes seconds. Where no code has imported it, nothing is compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
