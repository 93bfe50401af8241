"""The model and the names of recipes that the tests of low-bit layers share."""

import dataclasses
import warnings

import torch

from evenstep.lowbit import RECIPES, quantize_
from evenstep.models import Llama, LlamaConfig

# Widths that no group divides: a group of the flattened tensor spans tokens everywhere.
SHAPE = LlamaConfig(vocab_size=61, hidden_size=40, intermediate_size=56, num_layers=3, num_heads=4, max_seq_len=16)
OFFICIAL = [name for name, recipe in RECIPES.items() if not recipe.causal]
OURS = [name for name in RECIPES if name not in OFFICIAL]


def llama(seed: int = 0) -> Llama:
    torch.manual_seed(seed)
    return Llama(dataclasses.replace(SHAPE, init_std=0.2))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(61, (2, 13), generator=torch.Generator().manual_seed(7))
    return tokens[:, :-1], tokens[:, 1:]


def quiet(model, recipe, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="recipe .*official")
        return quantize_(model, recipe, **options)
