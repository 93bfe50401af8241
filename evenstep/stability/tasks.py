"""The tasks: small trainings that break, each with its source.

A `Family` is a model, its data and its schedule; the learning rate of a remedy is tuned once for each family, on
undisturbed training. A `Task` is a list of `Variant`, each of which changes one thing about the training of its family:
the scale of the loss, the learning rate, the number format, the initialisation, or a `fault` at one step. All models
are language models on the King James Bible, so a loss is in nats per token.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evenstep.data.loader import BatchLoader, eval_batches
from evenstep.data.pipeline import DataSpec, TokenData, prepare
from evenstep.models.llama import Llama, LlamaConfig

if TYPE_CHECKING:
    pass

Batch = tuple[Tensor, Tensor]
"""Tokens and targets, int64 [batch, seq_len]."""


@dataclass(frozen=True)
class Family:
    """A model with its data and its schedule.

    Attributes:
        model: "llama", "irnn" or "lstm".
        shape: fields of `LlamaConfig`, or ``hidden_size`` and ``gain`` of a recurrent network.
        vocab_size: of the byte-level BPE; 257 has no merges, so that a token is a byte.
        lr: the learning rate at which the tuning of Adam starts.
    """

    name: str
    model: str
    shape: dict[str, Any]
    vocab_size: int
    batch_size: int
    seq_len: int
    steps: int
    warmup: int
    schedule: str
    lr: float


@dataclass(frozen=True)
class Variant:
    """One change of the training of a family.

    Attributes:
        loss_scale: factor of the loss, and so of every gradient.
        fault: a name in `GRADIENT_FAULTS` or `DATA_FAULTS`.
        lr: a fixed learning rate instead of the tuned one.
        shape: other fields of the model's shape.
        lowbit: a recipe of `evenstep.lowbit`, such as "fp4".
        dtype: of the weights, "fp32" or "bf16".
        steps: another length.
    """

    name: str
    loss_scale: float = 1.0
    fault: str = ""
    lr: float | None = None
    shape: dict[str, Any] = field(default_factory=dict)
    lowbit: str = ""
    dtype: str = "fp32"
    steps: int | None = None


@dataclass(frozen=True)
class Task:
    """A list of variants. ``question``: what the task asks; ``source``: where it comes from."""

    name: str
    title: str
    family: str
    question: str
    source: str
    variants: tuple[Variant, ...]


_LLAMA = {"hidden_size": 64, "intermediate_size": 192, "num_layers": 2, "num_heads": 2}

FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "llama", _LLAMA, 2048, 8, 64, 200, 20, "cosine", 8e-3),
        Family(
            "post-ln", "llama", {**_LLAMA, "num_layers": 24, "norm": "post"}, 2048, 4, 64, 150, 15, "constant", 1e-3
        ),
        Family("irnn", "irnn", {"hidden_size": 128, "gain": 1.1}, 257, 16, 100, 300, 0, "constant", 2e-3),
        Family("lstm", "lstm", {"hidden_size": 128}, 257, 16, 100, 200, 0, "constant", 4e-3),
    )
}

_60M = {"hidden_size": 512, "intermediate_size": 1376, "num_layers": 8, "num_heads": 8}

GPU_FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "llama", _60M, 8192, 64, 256, 1220, 120, "cosine", 2e-3),
        Family(
            "post-ln", "llama", {**_60M, "num_layers": 24, "norm": "post"}, 8192, 64, 256, 600, 60, "constant", 1e-3
        ),
    )
}
"""60M parameters, 20M tokens a run."""

_SCALES = (1e-3, 1.0, 1e3)


def _scaled(name: str, **what: Any) -> tuple[Variant, ...]:
    return tuple(Variant(f"{name}loss x {scale:g}", scale, **what) for scale in _SCALES)


TASKS = (
    Task(
        "control", "Undisturbed training", "llama", "What does a remedy cost where nothing breaks?", "control",
        (Variant("tuned rate"),),
    ),
    Task(
        "gradient", "One gradient 1000 times too large", "llama", "In all tensors, or in those of the MLPs.",
        "the spikes that SPAM describes, arXiv:2501.06842",
        (*_scaled("all, ", fault="all x 1000"), Variant("MLPs", fault="MLPs x 1000")),
    ),
    Task(
        "bits", "Flipped bits and NaN", "llama",
        "Four flipped bits in the gradient of each tensor on four steps; one NaN.",
        "Dixit et al., arXiv:2102.11245", tuple(Variant(name, fault=name) for name in ("flipped bits", "one NaN")),
    ),
    Task(
        "data", "Bad data", "llama", "Batches of random tokens, of one repeated token, of program code; bad documents.",
        "PaLM, arXiv:2204.02311, section 5.1",
        tuple(Variant(name, fault=name) for name in ("10 random batches", "10 % random rows", "one token", "code")),
    ),
    Task(
        "depth", "Post-LN, 24 blocks", "post-ln", "A depth at which Post-LN rarely trains.",
        "Xiong et al., arXiv:2002.04745; Liu et al., arXiv:2004.08249",
        tuple(Variant(f"lr {lr:g}", lr=lr) for lr in (1e-3, 3e-3)),
    ),
    Task(
        "recurrence", "An exploding recurrence", "irnn",
        "A ReLU network whose recurrent matrix starts at 1.1 times the identity, over 100 steps of time.",
        "Le et al., arXiv:1504.00941; Pascanu et al., arXiv:1211.5063", _scaled(""),
    ),
    Task(
        "initial", "Initialisation and memory", "llama",
        "A residual stream that starts small or large, and a small epsilon of Adam.",
        "Takase et al., arXiv:2312.16903; Molybog et al., arXiv:2304.09871",
        (
            Variant("embedding std 0.002", shape={"embedding_std": 0.002}),
            Variant("embedding std 1", shape={"embedding_std": 1.0}),
            Variant("weights std 0.1", shape={"init_std": 0.1}),
        ),
    ),
    Task(
        "rates", "A ladder of learning rates", "llama", "How wide is the range of rates that train?",
        "Wortsman et al., arXiv:2309.14322",
        tuple(Variant(f"lr {lr:g}", lr=lr) for lr in (2e-3, 1.6e-2, 6.4e-2, 0.256)),
    ),
    Task(
        "lowbit", "4 and 2 bits at high rates", "llama", "Weights and activations of 4 or 2 bits at high rates.",
        "Stable-SPAM, arXiv:2502.17055",
        tuple(
            Variant(f"{name} lr {lr:g}", lowbit=name, lr=lr)
            for name, lr in (("fp4", 1.6e-2), ("fp4", 3.2e-2), ("int4", 1.6e-2), ("int2", 1.6e-2))
        ),
    ),
    Task(
        "logits", "Growing logits", "llama", "A high rate over twice as many steps.",
        "Wortsman et al., arXiv:2309.14322; Dehghani et al., arXiv:2302.05442",
        tuple(Variant(f"lr {lr:g}", lr=lr, steps=400) for lr in (3.2e-2, 0.128)),
    ),
    Task(
        "lstm", "An LSTM", "lstm", "The recurrence for which norm clipping is the usual remedy.",
        "Pascanu et al., arXiv:1211.5063", _scaled(""),
    ),
)  # fmt: skip


# ---- models ----


class Recurrent(nn.Module):
    """A recurrent language model: an embedding, one layer of ReLU or LSTM units, an output layer.

    The ReLU network starts with a recurrent matrix of ``gain`` times the identity (IRNN, arXiv:1504.00941), so that a
    gradient grows by about ``gain`` for each step of time.
    """

    def __init__(self, kind: str, vocab_size: int, hidden_size: int, gain: float = 1.0) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        if kind == "lstm":
            self.body: nn.RNNBase = nn.LSTM(hidden_size, hidden_size, batch_first=True)
        else:
            self.body = nn.RNN(hidden_size, hidden_size, nonlinearity="relu", batch_first=True)
        self.lm_head = nn.Linear(hidden_size, vocab_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.1)
        if kind == "irnn":
            parts = dict(self.body.named_parameters())
            with torch.no_grad():
                parts["weight_hh_l0"].copy_(gain * torch.eye(hidden_size))
                nn.init.normal_(parts["weight_ih_l0"], std=hidden_size**-0.5)
                parts["bias_hh_l0"].zero_()
                parts["bias_ih_l0"].zero_()

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        states, _ = self.body(self.embed_tokens(tokens))  # [batch, seq_len, hidden]
        logits = self.lm_head(states).flatten(0, 1)  # [batch * seq_len, vocab]
        return F.cross_entropy(logits, targets.flatten())


def build(family: Family, vocab_size: int, changes: dict[str, Any], lowbit: str = "") -> Llama | Recurrent:
    """The model of a family. ``changes``: other fields of its shape."""
    shape = {**family.shape, **changes}
    if family.model != "llama":
        return Recurrent(family.model, vocab_size, **shape)
    embedding_std = shape.pop("embedding_std", None)
    model = Llama(LlamaConfig(vocab_size, **shape))
    if embedding_std is not None:
        nn.init.normal_(model.model.embed_tokens.weight, std=embedding_std)
    if lowbit:
        from evenstep.lowbit import quantize_

        quantize_(model, lowbit)
    return model


# ---- data ----

VAL_TOKENS = 4096


@functools.cache
def data_of(source: str, vocab_size: int) -> TokenData:
    return prepare(DataSpec(source=source, vocab_size=vocab_size))


def validation(data: TokenData, family: Family) -> list[Batch]:
    batch = 4 * family.batch_size
    return list(eval_batches(data.val, family.seq_len, batch, VAL_TOKENS))


@functools.cache
def baseline(source: str, vocab_size: int) -> float:
    """The loss of a model that has only learnt how often each token occurs: the cross entropy of the validation targets
    under the frequencies of a million training tokens, each count raised by one."""
    import numpy as np

    data = data_of(source, vocab_size)
    train = data.train.read(0, min(len(data.train), 1_000_000))
    val = data.val.read(1, min(len(data.val), VAL_TOKENS + 1))
    counts = np.bincount(train, minlength=data.vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[val].mean())


class Rows:
    """The batches of a run in an order that depends on the seed, with the faults of the data.

    ``position`` is the number of batches read; it is the state that a rewind restores.
    """

    def __init__(self, family: Family, source: str, fault: str, at: int, seed: int) -> None:
        data = data_of(source, family.vocab_size)
        self.loader = BatchLoader(data.train, family.seq_len, family.batch_size, seed)
        self.spoil, self.at, self.data, self.seed = DATA_FAULTS.get(fault), at, data, seed

    @property
    def position(self) -> int:
        return self.loader.position // self.loader.batch_size

    def next_batch(self) -> Batch:
        number = self.position
        tokens, targets = self.loader.next_batch()
        if self.spoil is None:
            return tokens, targets
        draw = torch.Generator().manual_seed(self.seed * 10007 + number)
        # [batch, seq_len + 1]: inputs and targets overlap by all but one token.
        rows = torch.cat([tokens, targets[:, -1:]], dim=1)
        rows = self.spoil(rows, number - self.at, self.data, draw)
        return rows[:, :-1], rows[:, 1:]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.loader.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.loader.position = state["position"]


# ---- faults ----

DataFault = Callable[[Tensor, int, TokenData, torch.Generator], Tensor]
"""From the rows of a batch, int64 [batch, seq_len + 1], and the number of batches since the start of the fault, below 0
before it."""


def _random_batches(rows: Tensor, since: int, data: TokenData, draw: torch.Generator) -> Tensor:
    return torch.randint(data.vocab_size, rows.shape, generator=draw) if 0 <= since < 10 else rows


def _random_rows(rows: Tensor, since: int, data: TokenData, draw: torch.Generator) -> Tensor:
    bad = torch.rand(len(rows), 1, generator=draw) < 0.1
    return torch.where(bad & (since >= 0), torch.randint(data.vocab_size, rows.shape, generator=draw), rows)


def _one_token(rows: Tensor, since: int, data: TokenData, draw: torch.Generator) -> Tensor:
    return torch.full_like(rows, min(300, data.vocab_size - 1)) if 0 <= since < 10 else rows


def _code(rows: Tensor, since: int, data: TokenData, draw: torch.Generator) -> Tensor:
    if not 0 <= since < 20:
        return rows
    text = _program_text()
    characters = 16 * rows.numel()  # a token has fewer
    start = int(torch.randint(len(text) - characters, (), generator=draw))
    tokens = data.tokenizer.encode(text[start : start + characters])
    return torch.tensor(tokens[: rows.numel()]).reshape(rows.shape)


@functools.cache
def _program_text() -> str:
    import argparse
    import inspect
    import typing

    return "".join(inspect.getsource(module) for module in (argparse, typing))


DATA_FAULTS: dict[str, DataFault] = {
    "10 random batches": _random_batches,
    "10 % random rows": _random_rows,
    "one token": _one_token,
    "code": _code,
}

GradientFault = Callable[[nn.Module, int, torch.Generator], None]
"""Changes the gradients of a model, given the number of steps since the start of the fault."""


def _gradients(model: nn.Module, kind: str = "") -> Iterator[Tensor]:
    for name, p in model.named_parameters():
        if p.grad is not None and kind in name:
            yield p.grad


def _all_larger(model: nn.Module, since: int, draw: torch.Generator) -> None:
    if since == 0:
        for grad in _gradients(model):
            grad.mul_(1000)


def _mlps_larger(model: nn.Module, since: int, draw: torch.Generator) -> None:
    if since == 0:
        for grad in _gradients(model, "mlp"):
            grad.mul_(1000)


def _flipped(model: nn.Module, since: int, draw: torch.Generator) -> None:
    if since in (0, 5, 10, 15):
        for grad in _gradients(model):
            flat = grad.view(-1).view(torch.int32)
            where = torch.randint(flat.numel(), (4,), generator=draw)
            # Bits 0 to 30: mantissa and exponent of an fp32 number.
            flat[where] ^= 1 << torch.randint(31, (4,), generator=draw, dtype=torch.int32)


def _one_nan(model: nn.Module, since: int, draw: torch.Generator) -> None:
    if since == 0:
        next(_gradients(model)).view(-1)[0] = math.nan


GRADIENT_FAULTS: dict[str, GradientFault] = {
    "all x 1000": _all_larger,
    "MLPs x 1000": _mlps_larger,
    "flipped bits": _flipped,
    "one NaN": _one_nan,
}


def fault_step(family: Family, seed: int) -> int:
    """The step (0-based) at which a fault starts: between a half and three quarters of the run."""
    draw = torch.Generator().manual_seed(seed)
    return int(torch.randint(family.steps // 2, 3 * family.steps // 4, (), generator=draw))
