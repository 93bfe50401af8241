"""QK-clip, the rule of MuonClip (Kimi K2, arXiv:2507.20534, section 2.1): after an optimizer step, the query and key
weights of each head whose largest attention logit exceeds a threshold are scaled down, so that it would have been the
threshold. The logits of other heads do not change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evenstep.errors import EvenstepError
from evenstep.models.llama import Llama
from evenstep.models.ops import largest_logits, rotate


@torch.no_grad()
def max_attention_logits(model: Llama, tokens: Tensor, queries: int = 16) -> Tensor:
    """The largest attention logit q k / sqrt(D) of each head, before a soft-cap.

    One forward pass without gradients. Only ``queries`` evenly spaced positions of each sequence are compared with the
    keys that they see, so the result is a lower bound of the largest logit of all positions.

    Args:
        model: the model; its weights are whole, not sharded.
        tokens: int64 [B, T], such as one sequence of the last batch.
        queries: number of positions, default 16; at least T for all.

    Returns:
        fp32 [layers, heads].

    Example:
        >>> from evenstep.models import llama_config
        >>> model = Llama(llama_config("tiny", vocab_size=64, num_layers=2))
        >>> max_attention_logits(model, torch.randint(64, (1, 32))).shape
        torch.Size([2, 4])
    """
    cos, sin = model.model._rotation(torch.arange(tokens.shape[1], device=tokens.device))
    found: list[Tensor] = []
    pending: list[Tensor] = []  # the rotated queries of a block, until its keys are known

    def observe(_: Any, __: Any, out: Tensor) -> None:
        heads = out.view(*tokens.shape, -1, cos.shape[-1])  # [B, T, heads, D]
        pending.append(rotate(heads, cos, sin).transpose(1, 2))
        if len(pending) == 2:
            q, k = pending
            found.append(largest_logits(q, k, queries))
            pending.clear()

    handles = []
    block: Any
    for block in model.model.layers:
        attention = block.self_attn
        for norm, projection in ((attention.q_norm, attention.q_proj), (attention.k_norm, attention.k_proj)):
            handles.append((projection if norm is None else norm).register_forward_hook(observe))
    try:
        model.model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found)


@torch.no_grad()
def qk_clip(model: Llama, max_logits: Tensor, tau: float = 100.0) -> Tensor:
    """Scale the query and key weights of the heads with too large attention logits, in place.

    With gamma = min(1, tau / max_logit), the weights W_q and W_k of a head are multiplied by sqrt(gamma). Where several
    heads share keys (``kv_heads``), W_q is multiplied by gamma and W_k stays, as in the paper for the shared part of
    keys. Call it after ``optimizer.step()``. It does not wait for the device.

    Args:
        model: the model; its weights are whole, not sharded.
        max_logits: [layers, heads], as `max_attention_logits` returns.
        tau: the threshold, default 100 (Kimi K2's).

    Returns:
        gamma, fp32 [layers, heads]; 1 where nothing changed.

    Raises:
        EvenstepError: a ``tau`` of 0 or less, another shape of ``max_logits``, sharded weights, or a model with
            QK-norm, whose logits do not depend on the scale of these weights.

    Example:
        >>> from evenstep.models import llama_config
        >>> model = Llama(llama_config("tiny", vocab_size=64, num_layers=1))
        >>> qk_clip(model, torch.tensor([[50.0, 100.0, 200.0, 400.0]]))
        tensor([[1.0000, 1.0000, 0.5000, 0.2500]])
    """
    config = model.config
    if not tau > 0:
        raise EvenstepError(f"tau is {tau}: it must be a positive number")
    if max_logits.shape != (config.num_layers, config.num_heads):
        raise EvenstepError(
            f"max_logits has shape {list(max_logits.shape)}: it must be [layers, heads], "
            f"[{config.num_layers}, {config.num_heads}]"
        )
    if config.qk_norm:
        raise EvenstepError("QK-clip has no effect on a model with QK-norm, which bounds its logits: leave it out")
    gamma = (tau / max_logits.float()).where(max_logits > tau, 1.0)
    shared = config.kv_heads not in (None, config.num_heads)
    head = config.hidden_size // config.num_heads
    block: Any
    for block, factor in zip(model.model.layers, gamma, strict=True):
        attention = block.self_attn
        if hasattr(attention.q_proj.weight, "device_mesh"):
            raise EvenstepError("QK-clip needs whole weights, and those of this model are sharded: train it with DDP")
        # The rows of a projection [heads * D, hidden] are its heads, one after the other.
        rows = factor.repeat_interleave(head)[:, None]
        if shared:
            attention.q_proj.weight.mul_(rows)
        else:
            attention.q_proj.weight.mul_(rows.sqrt())
            attention.k_proj.weight.mul_(rows.sqrt())
    return gamma
