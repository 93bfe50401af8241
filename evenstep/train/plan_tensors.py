"""What a plan counts: the tensors of a LLaMA, how they are cut over processes, and what an optimizer keeps of each.

Plain arithmetic on shapes; needs no torch. `evenstep.train.plan_check` counts the same on torch's meta device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evenstep.errors import EvenstepError

if TYPE_CHECKING:
    from evenstep.models import LlamaConfig

SPLIT = ("fsdp", "hsdp", "tp+fsdp")
"""Modes in which a process holds parts of tensors."""


@dataclass(frozen=True)
class Named:
    """A tensor of the model: ``kind`` as `evenstep.optim.scale_groups` has it (embedding, hidden, last, vector),
    ``cut`` the dimension along which tensor parallelism cuts it, None for not at all."""

    name: str
    shape: tuple[int, ...]
    kind: str
    block: bool
    cut: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Grid:
    """How processes share a model: ``gpus`` in all, ``tensor`` of them for one matrix product, ``replicate`` groups
    that each hold the whole model."""

    mode: str
    gpus: int
    tensor: int = 1
    replicate: int = 1

    @property
    def data(self) -> int:
        """Processes that read different data."""
        return self.gpus // self.tensor

    def shards(self, block: bool) -> int:
        """Into how many parts FSDP cuts a tensor (of a block, or of the rest)."""
        if self.mode not in SPLIT:
            return 1
        if self.mode == "hsdp":
            return self.gpus // self.replicate
        return self.gpus // self.tensor if block else self.gpus

    def cut_shape(self, tensor: Named) -> tuple[int, ...]:
        """What tensor parallelism leaves of a tensor for one process."""
        if tensor.cut is None:
            return tensor.shape
        return tuple(n // self.tensor if i == tensor.cut else n for i, n in enumerate(tensor.shape))

    def part(self, tensor: Named) -> int:
        """Entries that process 0 holds, which has the most: FSDP2 cuts dimension 0 into equal pieces, rounded up."""
        first, *rest = self.cut_shape(tensor)
        return math.ceil(first / self.shards(tensor.block)) * math.prod(rest)

    def parts(self, tensor: Named) -> int:
        """Into how many pieces a tensor is cut altogether."""
        return self.shards(tensor.block) * (self.tensor if tensor.cut is not None else 1)


@functools.cache
def model_tensors(shape: LlamaConfig) -> list[Named]:
    """Every parameter of the model."""
    hidden, middle, words = shape.hidden_size, shape.intermediate_size, shape.vocab_size
    found = [Named("model.embed_tokens.weight", (words, hidden), "embedding", False)]
    for i in range(shape.num_layers):
        block = f"model.layers.{i}."
        for name in ("q", "k", "v"):
            found.append(Named(f"{block}self_attn.{name}_proj.weight", (hidden, hidden), "hidden", True, 0))
        found.append(Named(f"{block}self_attn.o_proj.weight", (hidden, hidden), "hidden", True, 1))
        for name in ("gate", "up"):
            found.append(Named(f"{block}mlp.{name}_proj.weight", (middle, hidden), "hidden", True, 0))
        found.append(Named(f"{block}mlp.down_proj.weight", (hidden, middle), "hidden", True, 1))
        for name in ("input", "post_attention"):
            found.append(Named(f"{block}{name}_layernorm.weight", (hidden,), "vector", True))
    found.append(Named("model.norm.weight", (hidden,), "vector", False))
    return [*found, Named("lm_head.weight", (words, hidden), "last", False)]


# ---- what an optimizer keeps ----

SCALAR = 4
"""Bytes of a scalar of the state, fp32."""


def moment_bytes(entries: int, whole: int, parts: int, stored: str) -> int:
    """Bytes of a moment of ``entries`` here, of a tensor of ``whole`` cut into ``parts``. As `evenstep.optim.state`:
    int8 is one byte an entry, an fp32 scale for each 256 and a map of 256 fp32 numbers, where the parts are even."""
    if stored == "int8" and entries * parts == whole >= 4096 and entries % 256 == 0:
        return entries + entries // 256 * 4 + 256 * 4
    return entries * (2 if stored == "bf16" else 4)


def state_bytes(name: str, options: Mapping[str, Any], tensor: Named, grid: Grid, weight: int) -> int:
    """Bytes that process 0 keeps for ``tensor`` under the optimizer ``name``; ``weight``: bytes of a parameter's
    entry."""
    here, parts = grid.part(tensor), grid.parts(tensor)
    if name in ("adam", "adamw"):  # torch's: moments in the parameter's own format, and a step count
        return here * weight * (3 if options.get("amsgrad") else 2) + SCALAR
    stored = options.get("state", "fp32")
    moment = moment_bytes(here, tensor.numel, parts, stored)
    kahan = here * 2 if options.get("rounding") == "kahan" and weight == 2 else 0
    if name == "stable_spam":
        return 2 * moment + 5 * SCALAR + kahan
    if name == "spam":
        density = options.get("density", 1.0)
        hidden_alone = options.get("density_of", "all") == "hidden"
        if density == 1 or tensor.kind == "vector" or (hidden_alone and tensor.kind != "hidden"):
            return 2 * moment + SCALAR + kahan
        kept = round(density * here)
        return 2 * moment_bytes(kept, kept, 1, stored) + math.ceil(here / 8) + SCALAR + kahan
    if name == "scale":
        moments = {"vector": 2 * moment + SCALAR, "last": moment}
        return moments.get(tensor.kind, 0) + kahan
    known = "adam, adamw, stable_spam, spam, scale"
    raise EvenstepError(f"optim.name {name}: what it keeps is not known before it runs; plans are made for {known}")


@dataclass(frozen=True)
class Messages:
    """All-reduces of fp64 numbers that an optimizer's step sends on top: how many of each operation, and the bytes that
    go into all of them."""

    maximum: int = 0
    sum: int = 0
    bytes: int = 0


def step_messages(name: str, tensors: list[Named], grid: Grid) -> Messages:
    """One MAX (the largest entry of each tensor) and one SUM (three numbers of each; with SCALE also the squared norms
    of the token table's columns) for all tensors that are cut alike. With tensor parallelism there are three ways, and
    matrices that are cut twice send everything along both dimensions
    of the mesh."""
    if grid.mode not in SPLIT or name in ("adam", "adamw"):
        return Messages()
    ways: dict[tuple[bool, bool], int] = {}
    rows = 0  # of matrices cut along what SCALE takes norms over: a sum of their own
    for tensor in tensors:
        twice = tensor.cut is not None and grid.tensor > 1
        columns = tensor.shape[1] if name == "scale" and tensor.kind == "embedding" else 0
        if name == "scale" and twice and tensor.cut == 1:
            rows += math.ceil(tensor.shape[0] / grid.shards(tensor.block))
        way = (tensor.block and grid.tensor > 1, twice)
        ways[way] = ways.get(way, 0) + 1 + 3 + columns
    rounds = sum(2 if twice else 1 for _, twice in ways)
    numbers = rows + sum(n * (2 if twice else 1) for (_, twice), n in ways.items())
    return Messages(rounds, rounds + (rows > 0), 8 * numbers)
