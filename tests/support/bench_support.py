"""Shapes small enough for tests of the benchmark."""

from evenstep.models import Llama, llama_config


def mini_model():
    """A LLaMA of 68 thousand parameters; some of its tensors are large enough for 8-bit states."""
    return Llama(llama_config("tiny", 256, hidden_size=64, intermediate_size=96, num_layers=1, num_heads=2))
