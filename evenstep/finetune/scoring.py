"""Generation with a fine-tuned model, and the scores of its task. An example is correct by the score

* ``exact`` if the greedy answer equals the expected one, up to whitespace. If the example names its choices (``Answer
  format: true/false``), the first of these names in the answer counts, as in the evaluation of LLM-Adapters;
* ``choice`` if the correct option has the largest log-likelihood, divided by its length in UTF-8 bytes (so that longer
  options are not at a disadvantage), by its length in tokens, or not divided;
* ``accuracy`` if the most likely class is the correct one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evenstep.errors import EvenstepError
from evenstep.finetune.data import Document, TuningData, batches
from evenstep.finetune.examples import Example
from evenstep.finetune.models import Note, find_source, open_to_write, read_note
from evenstep.finetune.text import Encoder, HubText, Text, load_text
from evenstep.kernels import uploaded
from evenstep.models import Llama, generate
from evenstep.train import evaluate as pretrained
from evenstep.train.checkpoint import MANIFEST
from evenstep.train.config import SampleConfig
from evenstep.train.evaluate import perplexity
from evenstep.train.weights import with_lowbit

# ---- generated text ----


def write(
    model: Any, text: Text, prompts: Sequence[list[int]], most: int, *, temperature: float = 0.0, top_k: int = 0,
    seed: int = 0,
) -> list[list[int]]:  # fmt: skip
    """Generate at most ``most`` tokens after each prompt; returns them without the token that ended the text.

    With ``temperature`` 0 the most likely token is chosen, otherwise one of the ``top_k`` most likely tokens (0: of
    all) is drawn. Prompt and answer have to fit into the model's positions: the answer is shortened first, to half of
    them at least, and then the prompt loses its beginning. The same ``seed`` draws the same tokens on the same machine;
    for models of transformers it seeds torch's global generator.
    """
    if isinstance(model, Llama):
        return [
            generate(
                model, prompt, most, temperature=temperature, top_k=top_k or None, stop=text.eos_id,
                generator=torch.Generator().manual_seed(seed), vocab_size=text.vocab_size,
            )
            for prompt in prompts
        ]  # fmt: skip
    net = model.net
    room = getattr(net.config.get_text_config(), "max_position_embeddings", None)
    if room:
        # A limit above the positions, such as the default of `evenstep generate`, must not cost a short prompt anything
        most = min(most, max(room - max(map(len, prompts)), room // 2))
        prompts = [prompt[-max(1, room - most) :] for prompt in prompts]
    width = max(map(len, prompts))
    device = net.get_input_embeddings().weight.device
    # Every setting is given explicitly, because a generation_config.json of the model would override the defaults.
    how: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_k": 50}
    if temperature:
        torch.manual_seed(seed)
        how = {"do_sample": True, "temperature": temperature, "top_k": top_k}
    own = net.generation_config.eos_token_id
    ends = text.ends | set(own if isinstance(own, list) else [] if own is None else [own])
    out = net.generate(
        # Padding on the left: generation continues at the end of every row.
        input_ids=torch.tensor([[text.eos_id] * (width - len(p)) + p for p in prompts], device=device),
        attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device),
        max_new_tokens=most, num_beams=1, top_p=1.0, repetition_penalty=1.0, eos_token_id=sorted(ends),
        pad_token_id=text.eos_id, **how,
    )  # fmt: skip
    return [_before(row, ends) for row in out[:, width:].tolist()]


def _before(ids: list[int], ends: set[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def generate_from(path: Path, sample: SampleConfig, seed: int, raw: bool, say: Callable[[str], None]) -> str:
    """Text of a run, a checkpoint, or a model in Hugging Face layout.

    A model that was fine-tuned on chats or instructions gets the prompt in that format, and a model of transformers
    whose tokenizer has a chat template in the format of that template; the text is its answer. All other models, and
    with ``raw`` every model, continue the prompt. EvenstepError for a model that cannot be loaded or generates no text,
    and for an empty prompt if the model answers.
    """
    if not path.is_dir():
        raise EvenstepError(
            f"{path}: no such directory; give a run (evenstep runs lists them) or the directory of a model"
        )
    source = find_source(path, "auto", say)
    note = read_note(source.folder)
    if note is None and (source.folder / MANIFEST).is_file():
        return pretrained.generate_from(source.folder, sample, seed, say)
    text = load_text(source.folder, source.library)
    if note is None:
        chats = isinstance(text, HubText) and text.tokenizer.chat_template
        note = Note(source.library, "chat" if chats else "plain")
    answers = note.form != "plain" and not raw
    if answers and not sample.prompt.strip():
        raise EvenstepError(f"{path} answers prompts; give --prompt TEXT, or --raw to generate without a prompt")
    asked = note if answers else Note(source.library)
    prompt = Encoder(text, asked.template).prompt(asked.question(sample.prompt)) or [text.eos_id]
    model = with_lowbit(open_to_write(source), note.lowbit, say)
    with torch.inference_mode():
        (new,) = write(
            model, text, [prompt], sample.tokens, temperature=sample.temperature, top_k=sample.top_k, seed=seed
        )
    return text.decode(new) if answers else sample.prompt + text.decode(new)


# ---- scores ----


@dataclass(frozen=True)
class TuneResult:
    """The result of a validation: ``loss`` in nats per learned token (per text in classification), and ``scores`` in
    [0, 1] by the name of the file."""

    loss: float
    tokens: int
    kind: str
    scores: dict[str, float] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """The entries of the record in metrics.jsonl; ``score`` is the mean over the files."""
        found: dict[str, Any] = {"val_loss": self.loss, "perplexity": perplexity(self.loss), "val_tokens": self.tokens}
        if self.scores:
            mean = sum(self.scores.values()) / len(self.scores)
            found |= {"score": mean, "score_kind": self.kind, "scores": self.scores}
        return found


def kind_of(asked: str, examples: Sequence[Example]) -> str:
    """The score to compute: ``asked``, or for ``auto`` the one that fits the examples. EvenstepError if the examples do
    not allow it."""
    classes, options = examples[0].label is not None, all(example.options for example in examples)
    found = "accuracy" if classes else "choice" if options and not examples[0].names else "exact"
    if asked in ("auto", "none", found):
        return found if asked == "auto" else asked
    if classes or asked == "accuracy" or (asked == "choice" and not options):
        needs = {"choice": "examples with choices", "accuracy": "examples with text and label"}
        raise EvenstepError(f"eval.score {asked} needs {needs.get(asked, 'examples with an answer')}; leave it at auto")
    return asked


@dataclass(frozen=True)
class Scorer:
    """Scores ``model`` on examples, one batch at a time. The caller sets eval mode and disables gradients."""

    model: Any
    data: TuningData
    device: torch.device
    batch_size: int

    def correct(self, kind: str, examples: Sequence[Example]) -> int:
        """The number of ``examples`` that are correct by the score ``kind``."""
        return {"exact": self._exact, "choice": self._choice, "accuracy": self._accuracy}[kind](examples)

    def _exact(self, examples: Sequence[Example]) -> int:
        encoder = self.data.encoder
        wanted = [replace(example, answer=encoder.expected(example)) for example in examples]
        return sum(is_right(*pair) for pair in zip(answers(self.model, self.data, examples), wanted, strict=True))

    def _choice(self, examples: Sequence[Example]) -> int:
        encoder, config = self.data.encoder, self.data.config
        rows, owners, lengths = [], [], []
        for i, example in enumerate(examples):
            prompt = encoder.prompt(example)
            for option in example.options:
                ids = encoder.option(option)
                # A long prompt loses its beginning. n + 1 tokens are n inputs with n targets.
                whole = np.array([*prompt, *ids], np.int32)[-config.train.seq_len - 1 :]
                learned = np.arange(len(whole)) >= len(whole) - len(ids)
                rows.append((Document.of(whole, learned),))
                owners.append(i)
                lengths.append({"bytes": len(option.encode()), "tokens": len(ids), "none": 1}[config.eval.normalise])
        values: list[float] = []
        for inputs, targets in batches(rows, self.batch_size):
            values += log_likelihoods(
                self.model, uploaded(inputs, self.device), uploaded(targets, self.device)
            ).tolist()
        per_example: list[list[float]] = [[] for _ in examples]
        for owner, value, length in zip(owners, values, lengths, strict=True):
            per_example[owner].append(value / length)
        return sum(
            max(range(len(scores)), key=scores.__getitem__) == example.correct
            for scores, example in zip(per_example, examples, strict=True)
        )

    def _accuracy(self, examples: Sequence[Example]) -> int:
        right = 0
        documents = (self.data.classified(example, cut=True) for example in examples)
        rows = [(document,) for document in documents if document is not None]
        for inputs, targets in batches(rows, self.batch_size):
            inputs = uploaded(inputs, self.device)
            right += int((self.model(inputs[:, 0], inputs[:, 1]).argmax(-1).cpu() == targets).sum())
        return right


def answers(model: Any, data: TuningData, examples: Sequence[Example]) -> list[str]:
    """The greedy answer of the model to the prompt of each example."""
    prompts = [data.encoder.prompt(example) for example in examples]
    written = write(model, data.tokenizer, prompts, data.config.eval.max_new_tokens)
    return [data.tokenizer.decode(ids) for ids in written]


def is_right(answer: str, example: Example) -> bool:
    if example.names:
        longest_first = sorted(example.names, key=len, reverse=True)
        named = re.search("|".join(map(re.escape, longest_first)), answer)
        return named is not None and named[0] == example.names[example.correct or 0]
    return " ".join(answer.split()) == " ".join(example.answer.split())


def log_likelihoods(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    """Log-likelihoods of the learned targets, summed over each row, fp32 [B]. ``inputs`` is int64 [B, 2, T],
    ``targets`` int64 [B, T]."""
    logits = model(inputs[:, 0], inputs[:, 1])  # [B, T, vocab]
    # Softmax over the learned rows alone, [N, vocab] in fp32: the whole logits in fp32 would take twice their memory.
    counts = targets != -100
    each = logits[counts].float().log_softmax(-1).gather(-1, targets[counts][:, None])[:, 0]
    rows = counts.nonzero()[:, 0]
    return torch.zeros(len(targets), device=each.device).index_add_(0, rows, each)
