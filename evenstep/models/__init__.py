"""The language model: a LLaMA, its named sizes, Hugging Face import and export, text generation. Needs torch alone."""

from evenstep.models.generate import generate
from evenstep.models.hf import load_pretrained, save_pretrained
from evenstep.models.llama import SIZES, Llama, LlamaConfig, llama_config
from evenstep.models.qk_clip import max_attention_logits, qk_clip

__all__ = [
    "SIZES",
    "Llama",
    "LlamaConfig",
    "generate",
    "llama_config",
    "load_pretrained",
    "max_attention_logits",
    "qk_clip",
    "save_pretrained",
]
