"""``evenstep generate``: text from whatever `evenstep.finetune.source` opens, prompted as the model was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from evenstep.errors import EvenstepError
from evenstep.finetune.note import Note, read_note
from evenstep.finetune.source import find_source, open_to_write
from evenstep.finetune.text import Encoder, HubText, load_text
from evenstep.finetune.writing import write
from evenstep.train import sample as pretrained
from evenstep.train.checkpoint import MANIFEST
from evenstep.train.config import SampleConfig
from evenstep.train.weights import with_lowbit


def generate_from(path: Path, sample: SampleConfig, seed: int, raw: bool, say: Callable[[str], None]) -> str:
    """Text by a run, a checkpoint, or a model in Hugging Face layout.

    A model that was fine-tuned on chats or instructions is asked in that format, one of transformers whose tokenizer
    has a chat template in that, and the text is its answer; any other continues the prompt, and so do all with ``raw``.
    EvenstepError for what cannot be opened or writes no text, and for an empty prompt where an answer is wanted.
    """
    if not path.is_dir():
        raise EvenstepError(f"{path}: no such directory; give a run (evenstep runs lists them), or a folder of a model")
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
        raise EvenstepError(f"{path} answers; ask it something with --prompt TEXT, or give --raw to let it begin")
    asked = note if answers else Note(source.library)
    prompt = Encoder(text, asked.template).prompt(asked.question(sample.prompt)) or [text.eos_id]
    model = with_lowbit(open_to_write(source), note.lowbit, say)
    with torch.inference_mode():
        (new,) = write(
            model, text, [prompt], sample.tokens, temperature=sample.temperature, top_k=sample.top_k, seed=seed
        )
    return text.decode(new) if answers else sample.prompt + text.decode(new)
