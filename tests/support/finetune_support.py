"""What tests of fine-tuning start from."""

from pathlib import Path

import torch

from evenstep.data.tokenizer import train_bpe


def write_hub(folder: Path) -> Path:
    """A LLaMA in a folder that transformers opens, with a tokenizer of bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    train_bpe(iter(["a"]), 257).save(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=64, **shape)).save_pretrained(folder)
    return folder
