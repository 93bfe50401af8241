"""The validation loss of a model, in which every token has the same weight independent of its batch, and the generation
of text from a trained model.
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
from evenstep.models.hub import HubLM
from evenstep.train.checkpoint import MANIFEST, newest_checkpoint, read_trainer
from evenstep.train.config import SampleConfig
from evenstep.train.distributed import Parallel, World
from evenstep.train.weights import load_model, with_lowbit

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Evaluation:
    """The arguments of a validation: the model and how it runs.

    ``watch`` wraps the iterable over which the validation loops. It reports progress to the heartbeat, and raises
    Stopped when a signal has arrived.
    """

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
    """The mean loss over all target tokens of ``batches``, in ``model.eval()`` mode; the mode is restored afterwards.

    Args:
        model: has ``loss(inputs, targets, reduction="sum", chunk=...)``.
        batches: pairs of int64 tensors [B, T], where B and T may differ between batches.
        bytes_per_token: the average of the whole split, so that a validation on a part of it has the same unit.
        device, autocast, chunk: where and how the loss is computed.
        parallel: the processes that share the batches. Each one passes all batches and gets the same result.

    Raises:
        EvenstepError: there is no batch.
    """
    world = parallel.world if parallel else None
    # FSDP reuses the tensors that it gathers, and autograd refuses tensors that were created in inference mode.
    without_gradients = torch.no_grad() if parallel and parallel.sharded else torch.inference_mode()
    was_training = model.training
    model.eval()
    # The sum stays on the device until the end, so that a GPU need not wait after every batch. In fp32 the sum of a
    # million losses would lose the last digits.
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
    """The batches of this process, each with whether it counts. All processes get the same number of batches, because
    the forward pass of a sharded model has collectives: a process that has no batch left repeats that of another one,
    marked False."""
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
    """e^loss; infinity where it would overflow a float (at 709.8)."""
    return math.exp(loss) if loss < 700 else math.inf


# ---- text ----


def sample_text(model: Llama | HubLM, tokenizer: Tokenizer, sample: SampleConfig, seed: int) -> str:
    """The prompt and its continuation by the model; empty for ``tokens`` 0. The same seed gives the same text.

    The text starts after an end-of-text token, like a document in training, and ends at the next one.
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
    """Text from the newest valid checkpoint of a run, or from a checkpoint. EvenstepError when ``run`` is neither."""
    if not run.is_dir():
        raise EvenstepError(f"{run}: no such directory; give the directory of a run (evenstep runs lists them)")
    checkpoint = run if (run / MANIFEST).is_file() else newest_checkpoint(run, say)
    recipe = read_trainer(checkpoint)["config"].get("lowbit")  # the precision of training and validation
    model = with_lowbit(load_model(checkpoint).eval(), recipe, say)
    return sample_text(model, load_tokenizer(checkpoint), sample, seed)
