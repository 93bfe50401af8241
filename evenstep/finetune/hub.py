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


MASKS = ("own", "layers", "one")
"""Ways to keep documents apart, all with positions that restart. own: the model finds them by these positions, as
transformers' own masks do (4.53 and later), each layer with its window or chunk. layers: the same masks made here, for
models that do not pass their positions on to them. one: a mask for all layers, which knows no window."""


class HubCausal(HubModel):
    packs = True
    """Whether several documents may share a row. False: each row is one text, padded at its end."""

    masks = "own"
    """How documents that share a row are kept apart, one of `MASKS`."""

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocab], as `evenstep.models.Llama.forward` gives them."""
        if positions is None:
            return self.net(input_ids=tokens, use_cache=False).logits
        if not self.packs:
            # The model's own positions and masks: a causal model does not look at the padding, which comes last. A
            # padding token would make transformers warn of a mask that is missing; the first token stands there.
            return self.net(input_ids=torch.where(positions < 0, tokens[:, :1], tokens), use_cache=False).logits
        return self.net(
            input_ids=tokens, attention_mask=self._mask(positions), position_ids=positions.clamp(min=0), use_cache=False
        ).logits

    def _mask(self, positions: Tensor) -> Any:
        if self.masks == "own":
            return None
        dtype = self.net.dtype
        if self.masks == "layers":
            from transformers.masking_utils import create_masks_for_generate

            like = torch.empty(*positions.shape, 1, dtype=dtype, device=positions.device)
            return create_masks_for_generate(
                config=self.net.config, inputs_embeds=like, attention_mask=None, cache=None,
                position_ids=positions.clamp(min=0),
            )  # fmt: skip
        mask = document_mask(positions)
        if self.net.config._attn_implementation == "sdpa":
            return mask
        lowest = torch.finfo(dtype).min  # eager attention adds its mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, lowest)

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


# ---- what a model can do, found by trying it ----


@torch.no_grad()
def keeps_documents_apart(model: HubCausal, longest: int | None = None) -> bool:
    """Whether documents that share a row get the logits that each has alone; sets ``model.packs`` and how it is done.

    Not every architecture takes positions or a mask of documents, and some look only at a window or chunk, or carry a
    state along the row. So rows of ``longest`` tokens, the longest that training will see, are compared with the same
    documents alone, at every position. None: rows of up to 512 tokens.
    """
    was_training = model.training
    model.eval()
    try:
        for model.masks in MASKS:
            model.packs = True
            try:
                model.packs = _same_as_alone(model, longest or min(512, positions_of(model.net) or 512))
            except Exception:  # whatever a model raises for an argument that it does not have
                model.packs = False
            if model.packs:
                break
    finally:
        model.train(was_training)
    return model.packs


def _same_as_alone(model: HubCausal, longest: int) -> bool:
    """The trial of `keeps_documents_apart`. Differences are measured by what they would be if documents saw each other,
    which is small where attention changes logits little (in a model whose weights are still small, for one)."""
    few = max(1, min(5, longest // 6))
    layouts = [[longest], [few, longest - 3 * few, 2 * few], [longest // 3, longest // 2]]
    # Rounding: 16-bit logits differ by some percent between two ways to compute the same attention.
    share, floor = (1e-3, 1e-5) if model.net.dtype == torch.float32 else (0.2, 0.0)
    ids = ordinary_tokens(model.net, len(layouts) * longest).view(len(layouts), longest)
    positions = torch.full_like(ids, -1)
    for row, lengths in zip(positions, layouts, strict=True):
        row[: sum(lengths)] = torch.cat([torch.arange(n, device=row.device) for n in lengths])
    worst, seen, sizes = [], [], []
    for rows in ([0], [1, 2]):
        packed, mixed = model(ids[rows], positions[rows]), model(ids[rows])
        for i, row in enumerate(rows):
            start = 0
            for length in layouts[row]:
                part = slice(start, start + length)
                alone = model(ids[row : row + 1, part])[0].float()
                off = (packed[i, part].float() - alone).norm(dim=-1)
                # One position may stand out, where rounding sends its token to another expert; a leak is wider.
                worst.append(torch.minimum(off[:-1], off[1:]).max() if length > 1 else off.max())
                sizes.append(alone.norm(dim=-1).median())
                if start:
                    seen.append((mixed[i, part].float() - alone).norm(dim=-1).median())
                start += length
    allowed = share * torch.stack(seen).median() + floor * torch.stack(sizes).median()
    return bool(torch.stack(worst).max() <= allowed)


@torch.no_grad()
def sees_later_tokens(net: Any) -> bool:
    """Whether logits depend on the tokens after them: so do those of an encoder. It is tried: what another second half
    of a row changes in the first is compared with what another first half changes in the second."""
    half = max(1, min(32, (positions_of(net) or 32) // 2) // 2)
    share = 1e-3 if net.dtype == torch.float32 else 0.1
    for seed in range(3):  # rounding may send a token to another expert, but not each time
        drawn = ordinary_tokens(net, 4 * half, seed).view(4, half)
        rows = torch.stack([torch.cat((drawn[a], drawn[b])) for a, b in ((0, 1), (0, 2), (3, 1))])
        logits = net(input_ids=rows, use_cache=False).logits.float()
        backward = (logits[1, :half] - logits[0, :half]).norm(dim=-1).max()
        forward = (logits[2, half:] - logits[0, half:]).norm(dim=-1).max()
        if not backward > share * forward:
            return False
    return True


def positions_of(net: Any) -> int | None:
    """How many positions the model has; None where there is no limit."""
    own = net.config.get_text_config()
    return next((n for n in (getattr(own, name, None) for name in _POSITIONS) if isinstance(n, int) and n > 0), None)


_POSITIONS = ("max_position_embeddings", "max_target_positions")


def ordinary_tokens(net: Any, count: int, seed: int = 0) -> Tensor:
    """Tokens int64 [count] drawn from the vocabulary without those that the configuration names: padding, the end of a
    text or the place of an image may be treated in a way of their own."""
    own, table = net.config.get_text_config(), net.get_input_embeddings()
    named = [{**config.to_dict()} for config in (net.config, own)]
    special = {v for facts in named for k, v in facts.items() if k.endswith(("_token_id", "_token_index"))
               and isinstance(v, int)}  # fmt: skip
    known = torch.tensor([i for i in range(own.vocab_size) if i not in special])
    draw = known[torch.randint(len(known), (count,), generator=torch.Generator().manual_seed(seed))]
    return draw.to(table.weight.device)
