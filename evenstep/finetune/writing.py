"""What a model writes after a prompt, whoever built it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from evenstep.finetune.text import Text
from evenstep.models import Llama, generate


def write(
    model: Any, text: Text, prompts: Sequence[list[int]], most: int, *, temperature: float = 0.0, top_k: int = 0,
    seed: int = 0,
) -> list[list[int]]:  # fmt: skip
    """The new tokens after each prompt, at most ``most``, without the one that ends them. ``temperature`` 0: always the
    likeliest; otherwise one of the ``top_k`` likeliest (0: of all) is drawn. A prompt that leaves no room for an answer
    loses its beginning.

    The same ``seed`` draws the same tokens of one machine; of models of transformers it sets torch's own.
    """
    if isinstance(model, Llama):
        return [
            generate(
                model, prompt, most, temperature=temperature, top_k=top_k or None, stop=text.eos_id,
                generator=torch.Generator().manual_seed(seed), vocab_size=text.vocab_size,
            )
            for prompt in prompts
        ]  # fmt: skip
    net = model.net
    room = getattr(net.config.get_text_config(), "max_position_embeddings", None)
    if room:
        prompts = [prompt[-max(1, room - most) :] for prompt in prompts]
    width = max(map(len, prompts))
    device = net.get_input_embeddings().weight.device
    # Everything that a generation_config.json beside the model may set is given: it would decide otherwise.
    how: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_k": 50}
    if temperature:
        torch.manual_seed(seed)
        how = {"do_sample": True, "temperature": temperature, "top_k": top_k}
    own = net.generation_config.eos_token_id
    ends = text.ends | set(own if isinstance(own, list) else [] if own is None else [own])
    out = net.generate(
        input_ids=torch.tensor([[text.eos_id] * (width - len(p)) + p for p in prompts], device=device),
        attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device),
        max_new_tokens=most, num_beams=1, top_p=1.0, repetition_penalty=1.0, eos_token_id=sorted(ends),
        pad_token_id=text.eos_id, **how,
    )  # fmt: skip
    return [_before(row, ends) for row in out[:, width:].tolist()]


def _before(ids: list[int], ends: set[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]
