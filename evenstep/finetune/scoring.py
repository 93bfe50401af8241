"""How well a model does its task: answers it writes, choices it finds likelier, classes it names.

* ``exact``: the greedy answer is the expected one, but for spaces. Where the example names its choices (``Answer
  format: true/false``), the first of them in the answer counts, as in LLM-Adapters' evaluation.
* ``choice``: of the texts that may follow the prompt, the right one has the largest log-likelihood, divided by its
  length in UTF-8 bytes (so that longer texts do not lose for their length), in tokens, or by nothing.
* ``accuracy``: the likeliest class.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from evenstep.errors import EvenstepError
from evenstep.finetune.examples import Example
from evenstep.finetune.rows import Document, batches
from evenstep.finetune.writing import write
from evenstep.train.evaluate import perplexity

if TYPE_CHECKING:
    from evenstep.finetune.run import Tuning


@dataclass(frozen=True)
class TuneResult:
    """``loss`` in nats per learned token (or per text that is classified); ``scores`` by name of file, in 0..1."""

    loss: float
    tokens: int
    kind: str
    scores: dict[str, float] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """As metrics.jsonl has it; ``score`` is the mean over the files."""
        found: dict[str, Any] = {"val_loss": self.loss, "perplexity": perplexity(self.loss), "val_tokens": self.tokens}
        if self.scores:
            mean = sum(self.scores.values()) / len(self.scores)
            found |= {"score": mean, "score_kind": self.kind, "scores": self.scores}
        return found


def kind_of(asked: str, examples: Sequence[Example]) -> str:
    """The score that ``auto`` stands for. EvenstepError for one that the examples do not allow."""
    classes, options = examples[0].label is not None, all(example.options for example in examples)
    found = "accuracy" if classes else "choice" if options and not examples[0].names else "exact"
    if asked in ("auto", "none", found):
        return found if asked == "auto" else asked
    if classes or asked == "accuracy" or (asked == "choice" and not options):
        needs = {"choice": "examples with choices", "accuracy": "examples with text and label"}
        raise EvenstepError(f"eval.score {asked} needs {needs.get(asked, 'examples with an answer')}; leave it at auto")
    return asked


def correct(run: Tuning, kind: str, examples: Sequence[Example]) -> int:
    """How many of ``examples`` the model gets right; it is in eval mode, without gradients."""
    return {"exact": _exact, "choice": _choice, "accuracy": _accuracy}[kind](run, examples)


# ---- answers ----


def _exact(run: Tuning, examples: Sequence[Example]) -> int:
    encoder = run.task.encoder
    wanted = [replace(example, answer=encoder.expected(example)) for example in examples]
    return sum(is_right(*pair) for pair in zip(answers(run, examples), wanted, strict=True))


def answers(run: Tuning, examples: Sequence[Example]) -> list[str]:
    """What the model writes, always the likeliest token."""
    text, most = run.task.tokenizer, run.config.eval.max_new_tokens
    prompts = [run.task.encoder.prompt(example) for example in examples]
    return [text.decode(ids) for ids in write(run.model, text, prompts, most)]


def is_right(answer: str, example: Example) -> bool:
    if example.names:
        longest_first = sorted(example.names, key=len, reverse=True)
        named = re.search("|".join(map(re.escape, longest_first)), answer)
        return named is not None and named[0] == example.names[example.correct or 0]
    return " ".join(answer.split()) == " ".join(example.answer.split())


# ---- choices ----


def _choice(run: Tuning, examples: Sequence[Example]) -> int:
    encoder, divide = run.task.encoder, run.config.eval.normalise
    rows, owners, lengths = [], [], []
    for i, example in enumerate(examples):
        prompt = encoder.prompt(example)
        for option in example.options:
            ids = encoder.option(option)
            whole = np.array([*prompt, *ids], np.int32)[-run.config.train.seq_len - 1 :]
            learned = np.arange(len(whole)) >= len(whole) - len(ids)
            rows.append((Document.of(whole, learned),))
            owners.append(i)
            lengths.append({"bytes": len(option.encode()), "tokens": len(ids), "none": 1}[divide])
    found: list[float] = []
    for inputs, targets in batches(rows, run.eval_batch_size):
        found += log_likelihoods(run.model, inputs.to(run.device), targets.to(run.device)).tolist()
    per_example: list[list[float]] = [[] for _ in examples]
    for owner, value, length in zip(owners, found, lengths, strict=True):
        per_example[owner].append(value / length)
    return sum(
        max(range(len(values)), key=values.__getitem__) == example.correct
        for values, example in zip(per_example, examples, strict=True)
    )


def log_likelihoods(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    """Of the targets that count, summed over each row: fp32 [B]."""
    logits = model(inputs[:, 0], inputs[:, 1])
    counts = targets != -100
    each = logits[counts].float().log_softmax(-1).gather(-1, targets[counts][:, None])[:, 0]
    rows = counts.nonzero()[:, 0]
    return torch.zeros(len(targets), device=each.device).index_add_(0, rows, each)


# ---- classes ----


def _accuracy(run: Tuning, examples: Sequence[Example]) -> int:
    right = 0
    made = (run.task.classified(example, cut=True) for example in examples)
    rows = [(document,) for document in made if document is not None]
    for inputs, targets in batches(rows, run.eval_batch_size):
        inputs = inputs.to(run.device)
        right += int((run.model(inputs[:, 0], inputs[:, 1]).argmax(-1).cpu() == targets).sum())
    return right
