"""A small corpus and quick configurations for the tests of training."""

import json
import random
from pathlib import Path

from evenstep.train.config import Config
from evenstep.train.config_io import load_config

WORDS = "the of and day light earth sea said god man river stone tree house king people hand word water fire".split()  # noqa: SIM905


def write_corpus(path: Path, documents: int = 300, seed: int = 0) -> Path:
    draw = random.Random(seed)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=60)) + f" {i}."}) for i in range(documents)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def quick_overrides(corpus: Path, out: Path, **more: str) -> list[tuple[str, str]]:
    """A run of seconds; ``more`` by option name with ``__`` for the dot."""
    given = {
        "data.source": f"text:{corpus}",
        "data.cache_dir": str(corpus.parent / "cache"),
        "data.vocab_size": "300",
        "data.val_fraction": "0.1",
        "model.size": "tiny",
        "optim.name": "adamw",
        "optim.lr": "0.003",
        "train.steps": "8",
        "train.batch_size": "4",
        "train.seq_len": "16",
        "train.threads": "1",
        "eval.every": "4",
        "eval.max_tokens": "500",
        "checkpoint.every": "4",
        "log.every": "1",
        "log.curve": "false",  # drawing it takes longer than the eight steps
        "sample.tokens": "8",
        "out": str(out),
    }
    if "model__config" in more:  # a file instead of a named size
        del given["model.size"]
    return list((given | {key.replace("__", "."): value for key, value in more.items()}).items())


def quick(corpus: Path, out: Path, **more: str) -> Config:
    return load_config(None, quick_overrides(corpus, out, **more))


def flags(overrides: list[tuple[str, str]]) -> list[str]:
    return [word for key, value in overrides for word in (f"--{key}", value)]
