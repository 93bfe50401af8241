"""What the optimizers step over: the parameters of a LLaMA by name, or one of two extremes, with prepared gradients.

Names and shapes come from the model itself, built on the meta device, so the tensors are exactly those of a training;
nothing is ever run forward. All optimizers of a comparison share the parameters and the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from evenstep.errors import EvenstepError, nearest
from evenstep.models import SIZES, Llama, llama_config

VOCABULARY = 32000
SPIKE = 1000.0  # times the entry it hits
SPIKY = 4  # one tensor in so many has spikes in a given set of gradients

EXTREMES: dict[str, Callable[[], nn.Module]] = {
    "many-small": lambda: _matrices(2000, 64, 48),
    "one-huge": lambda: _matrices(1, 8192, 8192),
}


def _matrices(count: int, rows: int, columns: int) -> nn.Module:
    """``count`` matrices of which the last one is called ``lm_head``, as SCALE wants to know the last layer."""
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(columns, rows, bias=False) for _ in range(count - 1))
    model.lm_head = nn.Linear(columns, rows, bias=False)
    return model


def outline(name: str) -> nn.Module:
    """The module of shapes ``name`` on the meta device: a LLaMA size (``60m``), one with so many of its layers only
    (``1b:6``), ``many-small`` (2000 matrices of 3072 entries) or ``one-huge`` (one of 67 million). EvenstepError for
    another name.
    """
    size, colon, layers = name.partition(":")
    known = [*SIZES, *EXTREMES]
    if size not in known or (colon and size in EXTREMES):
        raise EvenstepError(f"--shapes: unknown shapes '{name}'{nearest(size, known)}; choose from {', '.join(known)}")
    if colon and not (layers.isdecimal() and 1 <= int(layers) <= SIZES[size]["num_layers"]):
        most = SIZES[size]["num_layers"]
        raise EvenstepError(f"--shapes: '{name}' wants '{layers}' layers of {size}; give {size}:1 to {size}:{most}")
    with torch.device("meta"):
        if size in EXTREMES:
            return EXTREMES[size]()
        changes = {"num_layers": int(layers)} if colon else {}
        return Llama(llama_config(size, VOCABULARY, **changes))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def fill_parameters(model: nn.Module, seed: int) -> None:
    """Matrices from N(0, 0.02), vectors (norms) at 1."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for p in model.parameters():
        _ = p.normal_(0.0, 0.02, generator=generator) if p.ndim > 1 else p.fill_(1.0)


class PreparedGradients:
    """Sets of gradients, given to the parameters in turn.

    Normal noise; each tensor has a scale of its own, from 1e-5 to 1e-3, which is up to twice larger or smaller from set
    to set, as norms go up and down in a training. In each set a quarter of the tensors has spikes: one entry in a
    million, and at least one, is 1000 times larger. So paths for clipping run in some tensors of each step, and not in
    all.
    """

    def __init__(self, model: nn.Module, sets: int, seed: int) -> None:
        self.params = list(model.parameters())
        self.seed = seed
        self.sets = [[torch.empty_like(p, requires_grad=False) for p in self.params] for _ in range(sets)]
        for index in range(sets):
            self.fill(index)
        self.give(0)

    @torch.no_grad()
    def fill(self, index: int) -> None:
        """Draw set ``index``, modulo their number, anew: the same numbers each time."""
        index %= len(self.sets)
        of_tensor = torch.Generator().manual_seed(self.seed)
        of_set = torch.Generator().manual_seed(self.seed + 1 + index)
        entries = torch.Generator(self.params[0].device).manual_seed(self.seed + 1 + index)
        for grad in self.sets[index]:
            drawn, moved = (torch.rand((), generator=g).item() for g in (of_tensor, of_set))
            grad.normal_(0.0, 10 ** (2 * drawn - 5) * 4 ** (moved - 0.5), generator=entries)
            if torch.randint(SPIKY, (), generator=of_set) == 0:
                where = torch.randint(grad.numel(), (math.ceil(grad.numel() / 1e6),), generator=of_set)
                grad.view(-1)[where.to(grad.device)] *= SPIKE

    def give(self, turn: int) -> None:
        for p, grad in zip(self.params, self.sets[turn % len(self.sets)], strict=True):
            p.grad = grad

    def sums(self) -> list[float]:
        """The sum of each tensor of each set: a number that tells whether somebody has changed the tensor."""
        return torch.stack([grad.sum() for grads in self.sets for grad in grads]).tolist()
