"""A LLaMA in one file: RMSNorm, rotary positions, SwiGLU, causal attention, an untied head.

The parameter names and the rotary convention (the two halves of a head are the two coordinates) are those of Hugging
Face's ``LlamaForCausalLM``, so weights go back and forth unchanged. Every matrix is its own ``nn.Linear`` without a
bias and every block is in ``model.model.layers``, so that other code can exchange layers, compile or shard block by
block from outside.

The option ``norm`` is the place of the normalisation: ``pre`` is x + f(N(x)), ``post`` is N(x + f(x)), and ``mix``
(Mix-LN, arXiv:2412.13795) makes the first floor(norm_alpha * num_layers) blocks post and the others pre. All three have
a final norm.

Initialisation: every matrix, both vocabulary tables included, is normal with standard deviation 0.02, without scaling
by depth, and every norm weight is one. That is ``initializer_range`` of Hugging Face's LLaMA and of the configurations
published with GaLore (arXiv:2403.03507), from which the pretraining experiments of SPAM and Stable-SPAM descend.
GPT-2's further division of the residual projections by sqrt(2 * layers) is not used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from evenstep.errors import EvenstepError, nearest
from evenstep.models.ops import (
    chunked_cross_entropy,
    cross_entropy_and_z_loss,
    document_mask,
    own_rows,
    rms_norm,
    rotate,
    softcap,
    softcapped_attention,
    sum_over,
)

# ---- the shape ----

NORMS = ("pre", "post", "mix")


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model.

    Args:
        vocab_size: rows of the token table and of the head.
        hidden_size: width of the residual stream, a multiple of twice ``num_heads``.
        intermediate_size: width of the MLP.
        num_layers: number of blocks.
        num_heads: number of attention heads.
        max_seq_len: length of the context in tokens, default 256 (the papers'). Generation keeps to it; ``forward``
            accepts any length.
        norm_eps: added to the mean square in RMSNorm, default 1e-6 (LLaMA's).
        rope_theta: base of the rotary angles, default 10000 (LLaMA's).
        norm: ``pre`` (default), ``post`` or ``mix``.
        norm_alpha: share of Post-LN blocks with ``mix``, default 0.25 (Mix-LN's).
        init_std: standard deviation of the initial weights, default 0.02 (LLaMA's).
        qk_norm: apply RMSNorm to the query and the key of each head before the rotation (QK-norm, arXiv:2010.04245), so
            that attention logits cannot grow with the weights. Default False (LLaMA's).
        attention_softcap: bound of the attention logits, c * tanh(logit / c) (Gemma 2, arXiv:2408.00118: 50). Default
            None: no bound (LLaMA's).
        logit_softcap: the same bound for the logits of the head (Gemma 2: 30). Default None.
        kv_heads: number of heads of keys and values, a divisor of ``num_heads``; each serves num_heads / kv_heads heads
            of queries (grouped-query attention, arXiv:2305.13245). Default None: ``num_heads``.
        tie_embeddings: the head has the weight of the token table. Default False (LLaMA's).

    Raises:
        EvenstepError: a value out of range, or values that do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_seq_len: int = 256
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    norm: str = "pre"
    norm_alpha: float = 0.25
    init_std: float = 0.02
    qk_norm: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    kv_heads: int | None = None
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "max_seq_len"]
        for name in [*sizes, "kv_heads"] if self.kv_heads is not None else sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise EvenstepError(f"{name} is {value!r}: it must be a whole number of at least 1")
        optional = [name for name in ("attention_softcap", "logit_softcap") if getattr(self, name) is not None]
        for name in ("norm_eps", "rope_theta", "init_std", *optional):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise EvenstepError(f"{name} is {value!r}: it must be a positive number")
        if self.hidden_size % (2 * self.num_heads):
            raise EvenstepError(
                f"hidden_size {self.hidden_size} does not split into {self.num_heads} heads of even width: "
                f"make it a multiple of {2 * self.num_heads}"
            )
        if self.kv_heads is not None and self.num_heads % self.kv_heads:
            raise EvenstepError(f"kv_heads {self.kv_heads} does not divide the {self.num_heads} heads: give a divisor")
        if self.norm not in NORMS:
            raise EvenstepError(
                f"norm is {self.norm!r}: choose one of {', '.join(NORMS)}{nearest(str(self.norm), NORMS)}"
            )
        if not isinstance(self.norm_alpha, int | float) or not 0 <= self.norm_alpha <= 1:
            raise EvenstepError(f"norm_alpha is {self.norm_alpha!r}: it must be between 0 and 1")
        for name in ("qk_norm", "tie_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise EvenstepError(f"{name} is {getattr(self, name)!r}: it must be True or False")

    @property
    def kv_size(self) -> int:
        """The width of all keys, and of all values, of a token."""
        return self.hidden_size // self.num_heads * (self.kv_heads or self.num_heads)

    @property
    def num_post_norm(self) -> int:
        """The number of Post-LN blocks, which are the first ones."""
        # 1e-9 corrects products such as 0.29 * 100 = 28.999999999999996, which mean 29.
        return {"pre": 0, "post": self.num_layers, "mix": math.floor(self.norm_alpha * self.num_layers + 1e-9)}[
            self.norm
        ]


# ---- the named sizes ----
#
# The shapes of the papers that evenstep follows. A name is roughly the number of parameters with a vocabulary of 32000
# and an untied head (100m: 32100). ``tiny`` is evenstep's own, for a laptop: 1.4 million parameters with a vocabulary
# of 2048, which learn something in three minutes on one core.

_SHAPES = {  # hidden, intermediate, layers, heads
    "tiny": (128, 384, 4, 4),
    "9m": (128, 352, 4, 4),
    "20m": (256, 688, 4, 4),
    "35m": (384, 1024, 6, 8),
    "40m": (416, 1024, 8, 8),
    "60m": (512, 1376, 8, 8),
    "71m": (512, 1368, 12, 8),
    "100m": (640, 1708, 12, 10),
    "130m": (768, 2048, 12, 12),
    "250m": (768, 2560, 24, 16),
    "350m": (1024, 2736, 24, 16),
    "1b": (2048, 5461, 24, 32),
    "3b": (2560, 6848, 32, 32),
    "7b": (4096, 11008, 32, 32),
}
_FIELDS = ("hidden_size", "intermediate_size", "num_layers", "num_heads")

SIZES: dict[str, dict[str, int]] = {name: dict(zip(_FIELDS, shape, strict=True)) for name, shape in _SHAPES.items()}


def llama_config(size: str, vocab_size: int, **changes: Any) -> LlamaConfig:
    """The configuration of a named size.

    Args:
        size: a name in ``SIZES``.
        vocab_size: rows of the token table and of the head.
        changes: other fields of `LlamaConfig`, by keyword.

    Raises:
        EvenstepError: a size or a field that does not exist, with the nearest name, or values that do not fit together.

    Example:
        >>> llama_config("60m", vocab_size=32000, num_layers=4).num_layers
        4
    """
    if size not in SIZES:
        raise EvenstepError(
            f"unknown model size {size!r}: choose one of {', '.join(SIZES)}{nearest(size, list(SIZES))}"
        )
    allowed = [name for name in LlamaConfig.__dataclass_fields__ if name != "vocab_size"]
    for name in changes:
        if name not in allowed:
            raise EvenstepError(
                f"unknown model field {name!r}: choose from {', '.join(allowed)}{nearest(name, allowed)}"
            )
    return LlamaConfig(**{"vocab_size": vocab_size, **SIZES[size], **changes})


# ---- the model ----


class LayerCache(Protocol):
    """A cache of past keys and values: ``append`` adds the new ones [B, heads, T, head] and returns all of them."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; statistics in fp32, the result in x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal multi-head or grouped-query attention with rotary positions, x [B, T, hidden] -> [B, T, hidden].

    ``mask``, bool [B, 1, T, T], replaces the causal mask.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_size = config.hidden_size // config.num_heads
        self.softcap = config.attention_softcap
        sizes = (config.hidden_size, config.kv_size, config.kv_size, config.hidden_size)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.hidden_size, size, bias=False) for size in sizes
        )
        # One weight per coordinate of a head, shared by all heads, as in Qwen3 and Gemma 3.
        norms = (RMSNorm(self.head_size, config.norm_eps) if config.qk_norm else None for _ in range(2))
        self.q_norm, self.k_norm = norms

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        # [B, T, hidden] -> [B, T, heads, head] for the rotation -> [B, heads, T, head] for attention. k and v have a
        # head for each group of query heads.
        heads = (*x.shape[:2], -1, self.head_size)
        q, k = self.q_proj(x).view(heads), self.k_proj(x).view(heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        # A cache is filled by one causal pass and then extended one token at a time. A single query sees every key:
        # is_causal would align it with the first key instead of the last one.
        causal = mask is None and x.shape[1] > 1
        if self.softcap is None:
            grouped = k.shape[1] < q.shape[1]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        else:
            if causal:
                mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            y = softcapped_attention(q, k, v, self.softcap, mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202): down(silu(gate(x)) * up(x)), x [B, T, hidden]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # The products of gate and up are [B, T, intermediate].
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then the MLP, each with a residual; the norm is before each, or after the sum (``post_norm``)."""

    def __init__(self, config: LlamaConfig, post_norm: bool) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        # The names of the norms are those of Hugging Face's Pre-LN block, also where the norm follows the sum.
        if self.post_norm:
            x = self.input_layernorm(x + self.self_attn(x, cos, sin, cache, mask))
            return self.post_attention_layernorm(x + self.mlp(x))
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaBody(nn.Module):
    """The model without its head: tokens [B, T] -> hidden states [B, T, hidden] after the final norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i < config.num_post_norm) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self,
        tokens: Tensor,
        start: int = 0,
        caches: list[LayerCache] | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        # `positions` [B, T] is for packed rows of several documents; `start` is the number of tokens in the caches.
        x = self.embed_tokens(tokens)  # [B, T, hidden]
        mask = None if positions is None else document_mask(positions)
        if positions is None:
            positions = torch.arange(start, start + tokens.shape[1], device=x.device)
        cos, sin = self._rotation(positions)
        for i, block in enumerate(self.layers):
            if caches is not None:
                x = block(x, cos, sin, caches[i])
            elif self.activation_checkpointing and torch.is_grad_enabled():
                # Only x [B, T, hidden] is kept per block. The non-reentrant form works with DDP, FSDP and frozen
                # weights.
                x = checkpoint(block, x, cos, sin, None, mask, use_reentrant=False)
            else:
                x = block(x, cos, sin, None, mask)
        return self.norm(x)

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the rotary angles at ``positions`` [..., T], fp32 [..., T, 1, head].

        The first half of sin is negated, as ``rotate`` expects.
        """
        # Angle of coordinate pair i at position t: t * theta ** (-2i / head). Computed in each pass, in microseconds,
        # because a buffer would be lost on the meta device and rounded by model.bfloat16().
        width = self.config.hidden_size // self.config.num_heads
        powers = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
        angles = (positions.float()[..., None] * (1.0 / self.config.rope_theta**powers))[..., None, :]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


class Llama(nn.Module):
    """The language model. Construction draws the parameters from torch's global random generator.

    To compile it, use ``model.model.compile()``, or ``block.compile()`` for each block of ``model.model.layers``: both
    keep the parameter names.

    Example:
        >>> model = Llama(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2))
        >>> tokens = torch.randint(64, (3, 8))
        >>> model(tokens).shape
        torch.Size([3, 8, 64])
        >>> model.loss(tokens[:, :-1], tokens[:, 1:]).shape
        torch.Size([])
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.compile_loss = False
        """Whether a chunked loss on a GPU compiles its formulas between the products; `Trainer` sets it to
        ``train.compile``."""
        self.tensor_group: dist.ProcessGroup | None = None
        """The processes that have the same tokens as this one and share out the rows of the loss; `Trainer` sets it
        under tensor parallelism."""
        self.model = LlamaBody(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()
        if not self.lm_head.weight.is_meta:  # there is nothing to draw, and drawing on meta imports torch's compiler
            self.init_weights()

    def tie(self) -> None:
        """Give the head the weight of the token table, if the configuration says so: again after ``to_empty()`` or an
        assigned state, which replace the parameters of each layer."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw every parameter again from torch's global generator, as after ``to_empty()`` of a model on meta."""
        for weight, mean, std in self.initial():
            weight.normal_(mean, std) if std else weight.fill_(mean)

    def initial(self) -> Iterator[tuple[Tensor, float, float]]:
        """Each weight with the mean and the standard deviation of its initial entries, in the order of the draws; with
        the deviation 0 nothing is drawn."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                yield module.weight, 0.0, self.config.init_std
            elif isinstance(module, RMSNorm):
                yield module.weight, 1.0, 0.0

    @property
    def activation_checkpointing(self) -> bool:
        """Whether the forward pass keeps only the input of each block and the backward pass recomputes the rest.

        Default False. A third more arithmetic for a fraction of the activation memory, and the same gradients to the
        last bit.
        """
        return self.model.activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        self.model.activation_checkpointing = on

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Next-token logits [B, T, vocab] in the parameters' dtype (or autocast's) for int64 ``tokens`` [B, T].

        ``positions``, int64 [B, T], is for rows that contain several documents: it counts from 0 in each document, and
        is -1 for padding. No document sees another. None: one document per row.
        """
        return self.logits(self.model(tokens, positions=positions))

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits [..., vocab] of hidden states [..., hidden] after the final norm."""
        logits: Tensor = self.lm_head(hidden)
        return logits if self.config.logit_softcap is None else softcap(logits, self.config.logit_softcap)

    def loss(
        self, tokens: Tensor, targets: Tensor, *, reduction: str = "mean", chunk: int | None = None,
        positions: Tensor | None = None, z_loss: float | None = None,
    ) -> Tensor:  # fmt: skip
        """Cross entropy in nats, a 0-d fp32 tensor; the logits are cast to fp32 first.

        Args:
            tokens: int64 [B, T].
            targets: int64 [B, T], shifted already: ``targets[b, t]`` is the token after ``tokens[b, :t + 1]``. -100
                does not count.
            reduction: the "mean" (default) or the "sum" over the targets that count.
            chunk: number of rows (token positions) of logits in memory at once; None (default): all B * T. Value and
                gradients are the same up to rounding. A row of logits of 32000 words takes 125 KiB, and several copies
                of it exist. Chunks are faster too: on a CPU a few hundred rows, which stay in the cache (8 x 256 tokens
                of the 9m model: 1.4 times the speed of a whole step), on a GPU some thousands. A chunked loss computes
                its gradients in the forward pass. It therefore allows one ``backward()`` and no second derivatives, and
                its cross entropy and z-loss must have the same gradient, as in a loss that adds them: other gradients
                are an error on a CPU, and become NaN on a GPU.
            positions: for packed rows, as in `forward`. The head then computes only the rows whose target counts.
            z_loss: coefficient of the z-loss, mean or sum of logsumexp(logits)^2, which keeps the logits near zero;
                PaLM's is 1e-4. If given, the result is a tensor [2], cross entropy and z-loss. None (default): without.

        Raises:
            EvenstepError: another ``reduction``, or a ``chunk`` below 1.
        """
        if reduction not in ("mean", "sum"):
            raise EvenstepError(f"reduction is {reduction!r}: choose 'mean' or 'sum'")
        if chunk is not None and chunk < 1:
            raise EvenstepError(f"chunk is {chunk}: it is a number of rows of at least 1, or None for all at once")
        # [B, T, hidden] -> [B * T, hidden] and [B * T]: a chunk is a number of rows, whatever their sequence.
        hidden, targets = self.model(tokens, positions=positions).flatten(0, 1), targets.flatten()
        if positions is not None:  # in fine-tuning most targets are -100; their logits would be wasted work
            counts = targets != -100
            hidden, targets = hidden[counts], targets[counts]
        if self.tensor_group is None:
            return self._loss_of(hidden, targets, reduction, chunk, z_loss)
        rows = own_rows(hidden, targets, self.tensor_group)
        total = sum_over(self._loss_of(*rows, "sum", chunk, z_loss), self.tensor_group)
        return total if reduction == "sum" else total / (targets != -100).sum()

    def _loss_of(
        self, hidden: Tensor, targets: Tensor, reduction: str, chunk: int | None, z_loss: float | None
    ) -> Tensor:
        """The loss of hidden states [N, hidden] after the last norm, with targets [N]."""
        if chunk is not None:
            cap = self.config.logit_softcap
            return chunked_cross_entropy(
                hidden, self.lm_head, targets, reduction, chunk, z_loss, cap, self.compile_loss
            )
        logits = self.logits(hidden)
        if z_loss is not None:
            return cross_entropy_and_z_loss(logits, targets, z_loss, reduction)
        return F.cross_entropy(logits.float(), targets, reduction=reduction)

    def num_parameters(self, embeddings: bool = True) -> int:
        """The number of parameters; with ``embeddings=False``, without the token table and the head."""
        vocabulary = {self.model.embed_tokens.weight, self.lm_head.weight} if not embeddings else set()
        return sum(p.numel() for p in self.parameters()) - sum(p.numel() for p in vocabulary)

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of a forward and backward pass per token, as in PaLM (arXiv:2204.02311).

        6 N + 12 * layers * hidden * seq_len. N is the number of parameters in matrix products: all linear layers and
        the head, but not the token table and the norms. Each takes two operations, and the backward pass is twice the
        forward pass. The attention term does not discount the causal mask. Recomputation by activation checkpointing
        does not count.
        """
        c = self.config
        matrices = (
            c.num_layers * c.hidden_size * (2 * c.hidden_size + 2 * c.kv_size + 3 * c.intermediate_size)
            + c.vocab_size * c.hidden_size
        )
        return 6 * matrices + 12 * c.num_layers * c.hidden_size * seq_len
