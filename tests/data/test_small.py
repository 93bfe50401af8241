"""Texts of a few kilobytes and up train with the default options, and have their share of validation."""

import io
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evenstep.data import BatchLoader, DataSpec, eval_batches, pipeline, prepare, prepare_display
from evenstep.data.split import Draws, Split, place
from evenstep.data.tokenizer import train_bpe
from evenstep.errors import EvenstepError

pytest.importorskip("tokenizers")


def prose(size, seed=0):
    """English-like text: words of the standard library's documentation in lines and paragraphs."""
    source = Path(json.__file__).with_name("__init__.py").read_text().split()
    draw = random.Random(seed)
    words: list[str] = []
    while size > 0:
        words.append(draw.choice(source) + draw.choice([" ", " ", " ", " ", ".\n", ".\n\n"]))
        size -= len(words[-1])
    return "".join(words)


def lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


SHORT = prose(20_480)
TEXTS = {
    "20 KB": {"a.txt": SHORT},
    "100 KB": {"a.txt": prose(100_000, 1)},
    "on one line": {"a.txt": SHORT.replace("\n", " ")},
    "one document": {"a.jsonl": lines([SHORT])},
    "three files": {f"{i}.txt": prose(7_000, i) for i in range(3)},
    "two rows": {"a.jsonl": lines([SHORT[:9000], SHORT[9000:]])},
    "a long row and a short one": {"a.jsonl": lines([SHORT, "short"])},
    "seventy rows": {"a.jsonl": lines(prose(300, i) for i in range(70))},
    "copies": {"a.jsonl": lines([prose(2100)] * 10)},
    "one line again and again": {"a.txt": "the same line again\n" * 1100},
    "no words": {"a.txt": "".join(random.Random(0).choice("ACGT") for _ in range(20_480))},
    "one letter": {"a.txt": "=" * 20_480},
    "Chinese": {"a.txt": "".join(chr(0x4E00 + int(random.Random(i).expovariate(1 / 300))) for i in range(6_900))},
    "numbers": {"a.csv": "text\n" + "".join(f"{i * 7919 % 100_003}\n" for i in range(3_500))},
}


def corpus(tmp_path, files):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return DataSpec(f"text:{folder}", cache_dir=tmp_path / "cache")


def documents_of(data, split):
    stream, eos = getattr(data, split), data.manifest["tokenizer"]["eos_id"]
    tokens = stream.read(0, len(stream))
    return [
        data.tokenizer.decode(part[:-1].tolist()) for part in np.split(tokens, np.flatnonzero(tokens == eos) + 1)[:-1]
    ]


@pytest.mark.parametrize(
    ("name", "vocab_size"), [*((name, None) for name in TEXTS), ("20 KB", 2048), ("one letter", 2048)]
)
def test_any_text_of_20_kb_trains_with_the_default_options(tmp_path, name, vocab_size):
    spec = replace(corpus(tmp_path, TEXTS[name]), vocab_size=vocab_size)
    notes = []
    data = prepare(spec, lambda now: notes.append(now.note) if now.note else None)
    BatchLoader(data.train, seq_len=256, batch_size=8).next_batch()
    assert sum(targets.numel() for _, targets in eval_batches(data.val, 256, 8)) == len(data.val) - 1 > 0
    size = data.train.num_bytes + data.val.num_bytes
    assert size == sum(len(text) for _, text, _ in pipeline_documents(spec))
    assert size / 500 < data.val.num_bytes < size / 2
    wanted = vocab_size or pipeline.DEFAULT_VOCAB
    assert data.vocab_size <= wanted
    assert (data.vocab_size < wanted) == any(
        note.startswith(f"vocabulary: {data.vocab_size:,} tokens") for note in notes
    )
    assert any(note.startswith("validation: ") for note in notes) == ("split" in data.manifest["options"])
    again = prepare(spec)
    assert again.path == data.path
    prepare(replace(spec, cache_dir=tmp_path / "other"))
    assert all(
        (tmp_path / "other" / "tokens" / data.path.name / file.name).read_bytes() == file.read_bytes()
        for file in data.path.iterdir()
    )


def pipeline_documents(spec):
    from evenstep.data.corpora import open_corpus
    from evenstep.data.left_out import LeftOut

    corpus = open_corpus(spec.source)
    return [(text, content, place(content)) for text, content, _ in pipeline._documents(corpus, LeftOut())]


def test_a_corpus_of_69_documents_none_of_which_the_hash_holds_out(tmp_path):
    texts = [text for i in range(120) if place((text := prose(500, i)).encode())[0] >= 0.02][:69]
    data = prepare(replace(corpus(tmp_path, {"a.jsonl": lines(texts)}), vocab_size=300))
    held = documents_of(data, "val")
    assert 1 <= len(held) <= 3 and min(texts, key=lambda text: place(text.encode())) in held
    assert documents_of(data, "train") == [text for text in texts if text not in held]


def test_a_small_split_knows_nothing_of_the_order(tmp_path):
    texts = [prose(1000 + 300 * i, i) for i in range(9)]
    held = []
    for order in (1, -1):
        (tmp_path / str(order)).mkdir()
        spec = replace(corpus(tmp_path / str(order), {"a.jsonl": lines(texts[::order])}), val_fraction=0.1)
        data = prepare(spec)
        held.append(sorted(documents_of(data, "val")))
        both = documents_of(data, "val") + documents_of(data, "train")
        assert sum(map(len, both)) == sum(map(len, texts))
        assert all(any(part in text for text in texts) for part in both)
    assert held[0] == held[1] and 0.04 < sum(map(len, held[0])) / sum(map(len, texts)) < 0.25


def test_the_vocabulary_of_a_small_text_never_sees_what_is_held_out(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        pipeline, "train_bpe", lambda texts, size, **how: train_bpe(iter([*map(note, texts)]), size, **how)
    )

    def note(text):
        seen.append(text)
        return text

    tail = "".join(f"only here {i}\n" for i in range(90))
    spec = corpus(tmp_path, {"a.jsonl": lines([SHORT + tail])})
    data = prepare(spec)
    (held,) = documents_of(data, "val")
    assert held and tail.endswith(held)
    assert documents_of(data, "train") == [(SHORT + tail)[: -len(held)]]
    assert held not in seen[-1] and (SHORT + tail).startswith(seen[-1])


def test_a_corpus_the_hash_leaves_without_training_text(tmp_path):
    texts = [prose(3000, i) for i in range(3)]
    spec = replace(corpus(tmp_path, {"a.jsonl": lines(texts)}), val_fraction=0.5, vocab_size=300)
    while not all(place(text.encode())[0] < 0.5 for text in texts):
        texts = [text + "." if place(text.encode())[0] >= 0.5 else text for text in texts]
    Path(spec.source[5:], "a.jsonl").write_text(lines(texts))
    data = prepare(spec)
    assert 0.25 < data.val.num_bytes / (data.val.num_bytes + data.train.num_bytes) < 0.75


def test_max_tokens_leaves_room_for_validation(tmp_path):
    spec = replace(
        corpus(tmp_path, {"a.jsonl": lines(prose(900, i) for i in range(8))}), vocab_size=300, max_tokens=500
    )
    data = prepare(spec)
    assert len(data.train) >= 500 and len(data.val) > 1
    one = replace(spec, max_tokens=3)
    assert len(prepare(one).val) > 1


def test_a_sane_split_by_hash_is_kept_and_its_cache_entry_is_that_of_0_1_0(tmp_path):
    spec = corpus(tmp_path, {"a.jsonl": lines(prose(400, i) for i in range(300))})
    data = prepare(spec)
    held = {text for text, _, (draw, _) in pipeline_documents(spec) if draw < 0.02}
    assert set(documents_of(data, "val")) == held and len(held) > 1
    assert data.manifest["options"] == {"text_field": "text", "val_fraction": 0.02, "max_tokens": None}
    assert not (tmp_path / "cache" / "splits").exists() and "left_out" not in data.manifest
    corpus_of = pipeline.open_corpus(spec.source)
    key = pipeline._key(corpus_of, data.manifest["options"] | {"tokenizer": data.tokenizer.fingerprint})
    assert data.path.name == key
    options = {"vocab_size": 4096, "val_fraction": 0.02, "sample": 16_000_000, "whole": True, "field": "text"}
    assert [path.name for path in (tmp_path / "cache" / "tokenizers").iterdir()] == [pipeline._key(corpus_of, options)]


def test_a_remembered_split_that_is_damaged_is_made_again(tmp_path):
    spec = corpus(tmp_path, {"a.jsonl": lines([SHORT])})
    data = prepare(spec)
    (entry,) = (tmp_path / "cache" / "splits").iterdir()
    (entry / "split.json").write_text("{")
    assert prepare(spec).path == data.path and Split.load(entry) is not None


def test_a_few_long_documents_still_train_a_tokenizer(tmp_path, monkeypatch):
    """Each is drawn for the sample with a chance of one in twenty."""
    monkeypatch.setattr(pipeline, "SAMPLE_BYTES", 1000)
    assert prepare(replace(corpus(tmp_path, {"a.jsonl": lines([SHORT, prose(900)])}), vocab_size=300)).vocab_size == 300


def test_draws_keep_the_smallest_of_many():
    draws, generator = Draws(), random.Random(0)
    values = [generator.random() for _ in range(9000)]
    for value in values:
        draws.add(value, 10, 0)
    assert len(draws._sizes) <= 2048 and not draws.is_sane(1e-3)
    split = draws.split(1e-3)
    assert sum(value < split.below for value in values) * 10 == pytest.approx(draws.bytes * 1e-3, rel=0.5)


@pytest.mark.parametrize("fraction", [1e-9, 0.02, 0.5, 0.999999])
@pytest.mark.parametrize("sizes", [[2], [1, 1], [5, 90_000], [90_000, 5], [7] * 40])
def test_a_split_leaves_both_sides_something(fraction, sizes):
    texts = [f"{i:x}" * size for i, size in enumerate(sizes)]
    draws = Draws()
    for text in texts:
        draws.add(place(text.encode())[0], len(text), 0)
    split = draws.split(fraction)
    sides = {"train": 0, "val": 0}
    for text in texts:
        parts = list(split.sides(text, text.encode(), place(text.encode())[0]))
        assert "".join(part for _, part in reversed(parts)) == text and all(part for _, part in parts)
        for side, part in parts:
            sides[side] += len(part)
    assert all(sides.values())
    assert abs(sides["val"] - fraction * draws.bytes) <= max(fraction * draws.bytes, 16)


def test_progress_of_both_kinds_tells_the_notes(tmp_path):
    pytest.importorskip("rich")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    spec = corpus(tmp_path, {"a.jsonl": lines([SHORT])})
    for out in (io.StringIO(), terminal, io.StringIO()):
        with prepare_display(out) as show:
            prepare(spec, show)
        assert "vocabulary: " in out.getvalue() and "validation: " in out.getvalue()


def test_too_few_bytes_are_refused(tmp_path):
    with pytest.raises(EvenstepError, match="too few for training and validation"):
        prepare(corpus(tmp_path, {"a.txt": "x"}))
