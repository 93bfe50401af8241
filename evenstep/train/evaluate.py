"""The validation loss of a model, in which every token has the same weight whatever its batch, and text that a model
generates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evenstep.data import Tokenizer, load_tokenizer
from evenstep.errors import EvenstepError
from evenstep.kernels import uploaded
from evenstep.models import Llama, generate
from evenstep.train.checkpoint import MANIFEST, newest_checkpoint, read_trainer
from evenstep.train.config import SampleConfig
from evenstep.train.distributed import Parallel, World
from evenstep.train.weights import load_model, with_lowbit

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Evaluation:
    """The arguments of a validation: the model, and how it runs. ``watch`` wraps the iterable of the validation; it
    publishes progress to the heartbeat, and raises Stopped on a signal."""

    model: Any
    parallel: Parallel
    device: torch.device
    autocast: AbstractContextManager[Any]
    chunk: int | None
    batch_size: int
    watch: Callable[[Iterable[Any]], Iterator[Any]]


@dataclass(frozen=True)
class EvalResult:
    """``loss`` in nats per token; ``perplexity`` = e^loss; ``bits_per_byte`` = loss / ln 2 x tokens / bytes of the
    text."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int

    def fields(self) -> dict[str, Any]:
        """The entries of the record in metrics.jsonl."""
        return {
            "val_loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "val_tokens": self.tokens,
        }


def evaluate(
    model: Any,
    batches: Iterable[Batch],
    bytes_per_token: float,
    *,
    device: torch.device,
    autocast: AbstractContextManager[Any],
    chunk: int | None,
    parallel: Parallel | None = None,
) -> EvalResult:
    """Mean loss over every target token of ``batches`` (pairs of int64 [B, T]), in ``model.eval()`` mode; the previous
    mode is restored afterwards.

    ``bytes_per_token`` is the average of the whole split, so a validation on a part of it has the same unit. Sums are
    float64, and stay on the device until the end. With ``parallel`` the processes share the batches; each one passes
    all of them and gets the same result. EvenstepError when there is no batch.
    """
    world = parallel.world if parallel else None
    # FSDP keeps the tensors that it gathers, and one that was made in inference mode cannot be trained on.
    without_gradients = torch.no_grad() if parallel and parallel.sharded else torch.inference_mode()
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    tokens = 0
    try:
        with without_gradients, autocast:
            for inputs, targets, counted in batches_of_rank(batches, world):
                part = model.loss(uploaded(inputs, device), uploaded(targets, device), reduction="sum", chunk=chunk)
                if counted:
                    total += part.double()
                    tokens += targets.numel()
    finally:
        model.train(was_training)
    if world is not None:
        total, count = world.sum(torch.stack([total, total.new_tensor(tokens)])).unbind()
        tokens = round(count.item())
    if not tokens:
        raise EvenstepError("the validation split holds no tokens; give more text or a larger data.val_fraction")
    loss = total.item() / tokens
    return EvalResult(loss, perplexity(loss), loss / math.log(2) / bytes_per_token, tokens)


def batches_of_rank(batches: Iterable[Batch], world: World | None) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """This process's part of the batches, each with whether it counts. All processes get the same number of batches,
    because sharded models run in lockstep: a process without a batch repeats that of another, marked False."""
    size, rank = (world.data_size, world.data_rank) if world else (1, 0)
    row: list[Batch] = []
    for batch in batches:
        row.append(batch)
        if len(row) == size:
            yield (*row[rank], True)
            row = []
    if row:
        yield (*row[min(rank, len(row) - 1)], rank < len(row))


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


# ---- text ----


def sample_text(model: Llama, tokenizer: Tokenizer, sample: SampleConfig, seed: int) -> str:
    """The prompt and the text with which the model continues it; the same seed gives the same text. Empty for
    ``tokens`` 0.

    The text starts as a document does in training, after an end-of-text token, and ends at the next one.
    """
    if not sample.tokens:
        return ""
    prompt = tokenizer.encode(sample.prompt)
    new = generate(
        model,
        [tokenizer.eos_id, *prompt],
        sample.tokens,
        temperature=sample.temperature,
        top_k=sample.top_k or None,
        generator=torch.Generator().manual_seed(seed),
        stop=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
    )
    return tokenizer.decode([*prompt, *new])


def generate_from(run: Path, sample: SampleConfig, seed: int, say: Callable[[str], None]) -> str:
    """Text from the newest whole checkpoint of a run, or from the checkpoint that ``run`` itself is. EvenstepError when
    it is neither."""
    if not run.is_dir():
        raise EvenstepError(f"{run}: no such directory; give the directory of a run (evenstep runs lists them)")
    checkpoint = run if (run / MANIFEST).is_file() else newest_checkpoint(run, say)
    recipe = read_trainer(checkpoint)["config"].get("lowbit")  # text as it was trained and validated
    model = with_lowbit(load_model(checkpoint).eval(), recipe, say)
    return sample_text(model, load_tokenizer(checkpoint), sample, seed)
