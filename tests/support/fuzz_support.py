"""What is read from outside, each kind of file with a good example and the reader that meets it.

`tests/test_fuzz.py` breaks the examples a little each time; `tests/support/fuzz_by_hand.py` does for as long as one
likes, and with atheris where it is installed (pip install atheris).
"""

import gzip
import io
import json
import lzma
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from evenstep.data import TokenData, load_tokenizer
from evenstep.data.formats import read_documents
from evenstep.data.left_out import LeftOut
from evenstep.data.shards import TokenStream
from evenstep.data.tokenizer import train_bpe
from evenstep.errors import EvenstepError
from evenstep.models.hf import load_pretrained, read_config
from evenstep.telemetry.diagnosis import as_json
from evenstep.telemetry.foreign import load_log
from evenstep.telemetry.page import page, payload
from evenstep.telemetry.runlog import load_run
from evenstep.train.checkpoint import find_fault, read_manifest, read_trainer, write_tensors
from evenstep.train.config_io import load_config
from evenstep.train.runs import facts_of_checkpoint, list_runs

ROOT = Path(__file__).parents[2]
TEXTS = [f"The quick brown fox {i} jumps over the lazy dog.\n" for i in range(60)]


@dataclass(frozen=True)
class Target:
    """``file`` is what is broken, in a directory that ``prepare`` fills; ``read`` gets the directory."""

    file: str
    prepare: Callable[[Path], None]
    read: Callable[[Path], object]


def _recipe(place: Path) -> None:
    (place / "r.toml").write_bytes((ROOT / "recipes/demo.toml").read_bytes())


def _jsonl(place: Path) -> None:
    (place / "a.jsonl").write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)))


def _text(place: Path) -> None:
    (place / "a.txt").write_text("\n".join(TEXTS))


def _json(place: Path) -> None:
    (place / "a.json").write_text(json.dumps([{"text": text, "id": i} for i, text in enumerate(TEXTS[:9])]))


def _csv(place: Path) -> None:
    (place / "a.csv").write_text('id,text\n1,one\n2,"two, and\n""three"""\n' * 5)


def _gzip(place: Path) -> None:
    (place / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n' * 20))


def _xz(place: Path) -> None:
    (place / "a.csv.xz").write_bytes(lzma.compress(b"id,text\n1,one\n" * 20, preset=0))


def _zstd(place: Path) -> None:
    import zstandard

    (place / "a.txt.zst").write_bytes(zstandard.ZstdCompressor().compress("\n".join(TEXTS).encode()))


def _zip(place: Path) -> None:
    with zipfile.ZipFile(place / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a.jsonl", "b/c.txt"):
            archive.writestr(name, json.dumps({"text": TEXTS[0]}))


def _documents(file: str, prepare: Callable[[Path], None]) -> "Target":
    """Read twice: to stop at what is bad, and to skip it, which never fails."""

    def read(place: Path) -> None:
        try:
            list(read_documents(place / file, ("text",), LeftOut("skip")))
        except EvenstepError as error:
            raise AssertionError(f"not skipped: {error}") from error
        list(read_documents(place / file, ("text",), LeftOut()))

    return Target(file, prepare, read)


def _parquet(place: Path) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    table = pyarrow.table({"text": TEXTS, "id": list(range(len(TEXTS)))})
    parquet.write_table(table, place / "a.parquet", compression="snappy")


@cache
def _bpe():
    return train_bpe(iter(TEXTS), 280)


def _tokenizer_json(place: Path) -> None:
    _bpe().save(place)


def _unigram_json(place: Path) -> None:
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.Unigram([("</s>", 0.0), ("a", -1.0), ("fox", -2.0)], 0, False))
    model.add_special_tokens(["</s>"])
    model.normalizer = tokenizers.normalizers.NFKC()
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    model.decoder = tokenizers.decoders.Metaspace()
    model.save(str(place / "tokenizer.json"))


@cache
def _pieces() -> bytes:
    import sentencepiece

    found = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=found, vocab_size=45, minloglevel=9, num_threads=1
    )
    return found.getvalue()


def _sentencepiece(place: Path) -> None:
    (place / "tokenizer.model").write_bytes(_pieces())


def _encode(place: Path) -> None:
    tokenizer = load_tokenizer(place)
    ids = tokenizer.encode("The quick fox </s> <|endoftext|> é\0\n")
    tokenizer.decode(ids)
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


_RECORDS = [
    {
        "kind": "start", "step": 0, "version": 1, "names": ["a", "b"], "optimizer": "StableSPAM",
        "rules": {"reset_interval": 5},
    },
    {"step": 1, "tokens": 64, "loss": 5.5, "lr": 0.001, "grad_norm": 1.5, "tokens_per_second": 100},
    {
        "kind": "window", "step": 2, "first": 1, "losses": [5.5, 5.4], "norms": [1, 2], "norms_after": [1, 1],
        "spikes": 1,
    },
    {
        "kind": "parameters", "step": 2, "first": 1, "grad_max": [1, 2], "grad_norm": [3, None], "update_rms": [1, 1],
        "weight_rms": [1, 1],
    },
    {
        "kind": "event", "step": 2, "event": "spike", "tensors": [{"name": "a", "grad_max": 3.0}], "rows": [1, 2],
        "position": 3,
    },
    {"kind": "lowbit", "step": 2, "layers": {"a": {"weight_error": 0.1}}},
    {"step": 2, "val_loss": 5.0, "perplexity": 148.4, "bits_per_byte": 2.0},
]  # fmt: skip
METRICS = "".join(json.dumps(record) + "\n" for record in _RECORDS)


def _run(place: Path) -> None:
    (place / "run").mkdir(exist_ok=True)
    (place / "run/metrics.jsonl").write_text(METRICS)
    (place / "run/config.toml").write_bytes((ROOT / "recipes/demo.toml").read_bytes())
    (place / "run/summary.json").write_text('{"val_loss": 5.0, "steps": 2, "seconds": 1.5, "hardware": {"cpu": "x"}}')


def _read_run(place: Path) -> None:
    data = payload([load_run(place / "run")])
    page(data, "title")
    list_runs(place)


def _shards(place: Path) -> None:
    tokenizer = _bpe()
    from evenstep.data.shards import ShardWriter, token_dtype, write_manifest

    splits = {}
    for name in ("train", "val"):
        writer = ShardWriter(place, name, token_dtype(300), 500)
        for text in TEXTS:
            writer.append(tokenizer.encode(text))
            writer.end_document(tokenizer.eos_id, len(text))
        splits[name] = writer.close()
    write_manifest(place, source="text:x", options={}, tokenizer=tokenizer, splits=splits)


def _read_shards(place: Path) -> None:
    data = TokenData(place)
    stream: TokenStream
    for stream in (data.train, data.val):
        stream.read(0, min(len(stream), 100))
    data.tokenizer.encode("fox")


@cache
def _model() -> dict[str, bytes]:
    import tempfile

    from evenstep.models import Llama, llama_config, save_pretrained

    with tempfile.TemporaryDirectory() as place:
        save_pretrained(Llama(llama_config("tiny", 20, num_layers=1, hidden_size=8, intermediate_size=8)), place)
        return {path.name: path.read_bytes() for path in Path(place).iterdir()}


def _pretrained(place: Path) -> None:
    for name, content in _model().items():
        (place / name).write_bytes(content)


def _checkpoint(place: Path) -> None:
    import hashlib

    import torch
    from safetensors.torch import save_file

    weights = {"model.lm_head.weight": torch.ones(3, 4), "optimizer.lm_head.weight.exp_avg": torch.zeros(3, 4)}
    offsets = {name: {"saved_offsets": [0, 0]} for name in weights}
    metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    save_file(weights, place / "shard-00001-model-00001-of-00001.safetensors", metadata)
    trainer = {
        "step": 3, "tokens": 9, "position": 4, "seconds": 1.0, "step_seconds": 0.5, "window_steps": 1, "skipped": [],
        "tokenizer": "x", "data": "y", "config": {"model": {"size": "tiny"}, "optim": {"name": "adamw"}},
        "optimizer": {}, "processes": [],
    }  # fmt: skip
    write_tensors(place / "trainer.pt", trainer)
    (place / "config.json").write_bytes(_model()["config.json"])
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(place.iterdir())
    }
    (place / "manifest.json").write_text(json.dumps({"format": 2, "step": 3, "world_size": 1, "files": files}))


def _read_checkpoint(place: Path) -> None:
    find_fault(place)
    read_manifest(place)
    facts_of_checkpoint(place)


def _history(place: Path) -> None:
    entries = [{"step": 10 * i, "loss": 3.0 - 0.01 * i, "grad_norm": 1.0, "learning_rate": 0.001} for i in range(1, 40)]
    (place / "trainer_state.json").write_text(json.dumps({"log_history": entries[:3], "max_steps": 400}))
    lines = [f"{entry['step']},{entry['loss']},{entry['learning_rate']}" for entry in entries]
    (place / "losses.csv").write_text("step,loss,lr\n" + "\n".join(lines))


def _diagnosed(name: str) -> Callable[[Path], object]:
    return lambda place: as_json(load_log(place / name))


TARGETS = {
    "recipe": Target("r.toml", _recipe, lambda place: load_config(place / "r.toml")),
    "jsonl": _documents("a.jsonl", _jsonl),
    "gzip": _documents("a.jsonl.gz", _gzip),
    "text": _documents("a.txt", _text),
    "parquet": _documents("a.parquet", _parquet),
    "json": _documents("a.json", _json),
    "csv": _documents("a.csv", _csv),
    "xz": _documents("a.csv.xz", _xz),
    "zstd": _documents("a.txt.zst", _zstd),
    "zip": _documents("a.zip", _zip),
    "tokenizer.json": Target("tokenizer.json", _tokenizer_json, _encode),
    "unigram.json": Target("tokenizer.json", _unigram_json, _encode),
    "tokenizer_config.json": Target("tokenizer_config.json", _tokenizer_json, _encode),
    "sentencepiece": Target("tokenizer.model", _sentencepiece, _encode),
    "metrics": Target("run/metrics.jsonl", _run, _read_run),
    "summary": Target("run/summary.json", _run, _read_run),
    "run config": Target("run/config.toml", _run, _read_run),
    "trainer state": Target("trainer_state.json", _history, _diagnosed("trainer_state.json")),
    "csv log": Target("losses.csv", _history, _diagnosed("losses.csv")),
    "shards": Target("manifest.json", _shards, _read_shards),
    "config.json": Target("config.json", _pretrained, lambda place: (read_config(place), load_pretrained(place))),
    "weights": Target("model.safetensors", _pretrained, load_pretrained),
    "checkpoint": Target("manifest.json", _checkpoint, _read_checkpoint),
    "trainer": Target("trainer.pt", _checkpoint, read_trainer),
    "shard": Target("shard-00001-model-00001-of-00001.safetensors", _checkpoint, _read_checkpoint),
}

VALUES = [
    b"null", b"-1", b"0", b"1e999", b"1e30", b"9" * 40, b'""', b"[]", b"{}", b"true", b"NaN", b'"../x"',
    b'"/etc/passwd"', b"\xff\xfe", b"\0", b"[" * 3000, b'"\\ud800"', b'{"a":' * 2000,
]  # fmt: skip
"""Of JSON and TOML, and what is neither."""


def broken(content: bytes, draw: random.Random) -> bytes:
    """``content`` with a few changes: bytes, pieces moved or left out, JSON and TOML values put in others' place."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        kind = draw.randrange(7)
        at = draw.randrange(len(data) + 1)
        end = min(len(data), at + draw.choice((1, 2, 8, 64)))
        if kind == 0 and data:
            data[at % len(data)] = draw.randrange(256)
        elif kind == 1:
            del data[at:end]
        elif kind == 2:
            data[at:at] = data[end : end + draw.choice((1, 8, 200))]
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            data[at:end] = draw.choice(VALUES)
        else:  # a whole value
            starts = [i for i, byte in enumerate(data) if byte in b":="]
            if starts:
                start = draw.choice(starts) + 1
                stops = [i for i in range(start, min(len(data), start + 200)) if data[i] in b",\n}]"]
                data[start : stops[0] if stops else start] = b" " + draw.choice(VALUES)
    return bytes(data)
