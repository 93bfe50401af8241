"""The models of the spike study: LLaMA shapes of evenstep's own, Pythia shapes built by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from evenstep.errors import EvenstepError, nearest
from evenstep.models import SIZES, Llama, llama_config, load_pretrained

PYTHIA = {
    "14m": (128, 512, 6, 4),
    "31m": (256, 1024, 6, 8),
    "70m": (512, 2048, 6, 8),
    "160m": (768, 3072, 12, 12),
    "410m": (1024, 4096, 24, 16),
    "1b": (2048, 8192, 16, 8),
}
"""hidden_size, intermediate_size, num_layers, num_heads (arXiv:2304.01373, and EleutherAI's later small ones)."""

Loss = Callable[[Tensor, Tensor], Tensor]

PARTS = ("embedding", "norms", "attention", "mlp", "head")


def check_model(name: str) -> None:
    """EvenstepError unless `build` can make it."""
    known = [*(f"llama-{size}" for size in SIZES), *(f"pythia-{size}" for size in PYTHIA)]
    if name not in known and not (name and Path(name).is_dir()):
        raise EvenstepError(
            f"--models: '{name}' is no model{nearest(name, known)}; give llama-SIZE ({', '.join(SIZES)}), pythia-SIZE "
            f"({', '.join(PYTHIA)}) or a directory with a LLaMA in Hugging Face layout"
        )


def build(name: str, vocab_size: int, seq_len: int) -> tuple[nn.Module, Loss]:
    """A model and its loss (mean over the targets) from tokens and targets, int64 ``[batch, seq_len]``."""
    if Path(name).is_dir():
        loaded = load_pretrained(Path(name))
        return loaded, loaded.loss
    family, _, size = name.partition("-")
    if family == "llama":
        llama = Llama(llama_config(size, vocab_size, max_seq_len=seq_len))
        return llama, llama.loss
    return _pythia(size, vocab_size, seq_len)


def _pythia(size: str, vocab_size: int, seq_len: int) -> tuple[nn.Module, Loss]:
    try:
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    except ImportError:
        raise EvenstepError("Pythia shapes need the package transformers; pip install 'evenstep[hf]'") from None
    hidden, intermediate, layers, heads = PYTHIA[size]
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=seq_len,
            use_cache=False,
        )
    )

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten())

    return model, loss


def part_of(name: str) -> str:
    """Which of `PARTS` a parameter belongs to, by its name."""
    rules = {"lm_head": "head", "embed_out": "head", "norm": "norms", "embed": "embedding", "mlp": "mlp"}
    return next((part for word, part in rules.items() if word in name), "attention")
