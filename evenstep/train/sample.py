"""Text from a trained model: at the end of a run, and for ``evenstep generate``."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

import torch

from evenstep.data import Tokenizer, load_tokenizer
from evenstep.errors import EvenstepError
from evenstep.models import Llama, generate
from evenstep.train.checkpoint import MANIFEST, newest_checkpoint, read_trainer
from evenstep.train.config import SampleConfig
from evenstep.train.weights import load_model, with_lowbit


def sample_text(model: Llama, tokenizer: Tokenizer, sample: SampleConfig, seed: int) -> str:
    """The prompt and what the model makes of it; the same seed gives the same text. Empty for ``tokens`` 0.

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


def printable(text: str) -> str:
    """``text`` with its control characters, newline and tab apart, as escapes: a model may write what a terminal
    obeys."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) != "Cc" else c.encode("unicode_escape").decode() for c in text
    )


def generate_from(run: Path, sample: SampleConfig, seed: int, say: Callable[[str], None]) -> str:
    """Text from the newest whole checkpoint of a run, or from the checkpoint that ``run`` itself is. EvenstepError when
    it is neither."""
    if not run.is_dir():
        raise EvenstepError(f"{run}: no such directory; give the directory of a run (evenstep runs lists them)")
    checkpoint = run if (run / MANIFEST).is_file() else newest_checkpoint(run, say)
    recipe = read_trainer(checkpoint)["config"].get("lowbit")  # text as it was trained and validated
    model = with_lowbit(load_model(checkpoint).eval(), recipe, say)
    return sample_text(model, load_tokenizer(checkpoint), sample, seed)
