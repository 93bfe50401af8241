"""Models of transformers with the face that a run wants: ``loss(tokens, targets, positions=...)`` as our Llama has it.

Their parameters have ``net.`` before their names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evenstep.models.ops import document_mask


@contextmanager
def hushed() -> Iterator[None]:
    """Around transformers' reading and writing of models, without its bars and warnings."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


class HubModel(nn.Module):
    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    @property
    def config(self) -> Any:
        """The numbers of the shape that a run and the rules of optimizers ask for."""
        own = self.net.config.get_text_config()
        heads = getattr(own, "num_attention_heads", None)
        return SimpleNamespace(
            vocab_size=own.vocab_size, hidden_size=getattr(own, "hidden_size", None), num_heads=heads
        )  # fmt: skip

    def num_parameters(self, embeddings: bool = True) -> int:
        table = self.net.get_input_embeddings()
        without = 0 if embeddings or table is None else table.weight.numel()
        return sum(p.numel() for p in self.parameters()) - without

    def flops_per_token(self, seq_len: int) -> int:
        """6 a parameter that multiplies; attention's own part is not counted."""
        return 6 * self.num_parameters(embeddings=False)


class HubCausal(HubModel):
    packs = True
    """May several documents share a row? False: positions and attention are left to the model."""

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocab], as `evenstep.models.Llama.forward` gives them."""
        if positions is None:
            return self.net(input_ids=tokens, use_cache=False).logits
        if not self.packs:
            return self.net(input_ids=tokens, attention_mask=(positions >= 0).long(), use_cache=False).logits
        mask: Tensor = document_mask(positions)
        if self.net.config._attn_implementation != "sdpa":  # adds its mask
            mask = torch.zeros_like(mask, dtype=self.net.dtype).masked_fill_(~mask, torch.finfo(self.net.dtype).min)
        return self.net(
            input_ids=tokens, attention_mask=mask, position_ids=positions.clamp(min=0), use_cache=False
        ).logits

    def loss(
        self, tokens: Tensor, targets: Tensor, *, positions: Tensor, reduction: str = "mean", chunk: int | None = None
    ) -> Tensor:
        """As `evenstep.models.Llama.loss`; ``chunk`` must be None."""
        counts = targets != -100
        return F.cross_entropy(self(tokens, positions)[counts].float(), targets[counts], reduction=reduction)


class HubClassifier(HubModel):
    def pad_with(self, token: int) -> None:
        """Pad with ``token`` where the model has no token of its own for it: a decoder looks for the last token before
        the padding."""
        own = self.net.config.get_text_config()
        if getattr(own, "pad_token_id", None) is None:
            own.pad_token_id = token

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, classes] of one text a row."""
        here = positions >= 0
        padded = tokens.masked_fill(~here, self.net.config.get_text_config().pad_token_id or 0)
        return self.net(input_ids=padded, attention_mask=here.long()).logits

    def loss(
        self, tokens: Tensor, targets: Tensor, *, positions: Tensor, reduction: str = "mean", chunk: int | None = None
    ) -> Tensor:
        """Cross entropy of the classes int64 [B]."""
        return F.cross_entropy(self(tokens, positions).float(), targets, reduction=reduction)


@torch.no_grad()
def keeps_documents_apart(model: HubCausal) -> bool:
    """Does the model give two documents in a row the logits that each has alone? Not every architecture takes
    positions and a mask of attention; so it is tried."""
    was_training = model.training
    model.eval()
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randint(model.config.vocab_size, (2, 6), generator=draw)
    row = torch.cat((first, second[:4]))[None]
    positions = torch.tensor([[*range(6), *range(4)]])
    try:
        packed = model(row, positions)[0].float()
    except Exception:  # of an argument that it does not have
        return False
    finally:
        model.train(was_training)
    model.eval()
    alone = torch.cat((model(first[None])[0], model(second[None, :4])[0])).float()
    model.train(was_training)
    allowed = 1e-3 if model.net.dtype == torch.float32 else 5e-2
    return bool((packed - alone).norm() <= allowed * alone.norm())
