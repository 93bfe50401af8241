"""Preparing: what lands in the shards, and a cache that nothing spoils."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenstep.data import DataSpec, TokenData, load_tokenizer, pipeline, prepare, prepare_display, shards
from evenstep.data.cache import cache_root
from evenstep.data.tokenizer import train_bpe
from evenstep.errors import EvenstepError

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_bpe(iter(["some words to learn from, and more of them; " * 5] * 5), 280).save(directory)
    return str(directory)


def write_jsonl(path, documents):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return f"text:{path}"


def corpus(tmp_path, count=200, name="docs.jsonl"):
    return write_jsonl(
        tmp_path / name, [f"document {i}: " + "words and more words " * (i % 9 + 1) for i in range(count)]
    )


def documents_of(data, split):
    stream, eos = getattr(data, split), data.manifest["tokenizer"]["eos_id"]
    tokens = stream.read(0, len(stream))
    parts = np.split(tokens, np.flatnonzero(tokens == eos) + 1)
    assert len(parts[-1]) == 0, "the stream ends with an end-of-text token"
    return [data.tokenizer.decode(part[:-1].tolist()) for part in parts[:-1]]


def refused(spec, says):
    with pytest.raises(EvenstepError, match=says) as error:
        prepare(spec)
    assert "\n" not in str(error.value)


@given(texts=st.lists(st.text(max_size=60), min_size=1, max_size=12), shard=st.sampled_from([5, 64, 10_000]))
@settings(max_examples=30, deadline=None)
def test_packing_loses_and_invents_nothing(tokenizer, tmp_path_factory, texts, shard):
    directory = tmp_path_factory.mktemp("packing")
    texts = [*texts, "never blank"]
    source = write_jsonl(directory / "docs.jsonl", texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", shard)
        patch.setattr(pipeline, "PIECE_CHARS", 16)  # documents of several pieces, batches that end inside a document
        patch.setattr(pipeline, "BATCH_CHARS", 40)
        data = prepare(DataSpec(source, tokenizer=tokenizer, val_fraction=0, cache_dir=directory / "cache"))
    kept = [text for text in texts if text.strip()]
    assert documents_of(data, "train") == kept
    assert data.train.num_documents == len(kept) and len(data.val) == 0
    assert data.train.num_bytes == sum(len(text.encode()) for text in kept)
    counts = [entry["tokens"] for entry in data.manifest["splits"]["train"]["shards"]]
    assert sum(counts) == len(data.train) and all(count == shard for count in counts[:-1]) and counts[-1] <= shard


def test_lone_surrogates_become_replacement_characters(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "x \\ud83d y \\ud83d\\ude00"}\n')
    data = prepare(DataSpec(f"text:{tmp_path}/a.jsonl", tokenizer=tokenizer, val_fraction=0, cache_dir=tmp_path / "c"))
    assert documents_of(data, "train") == ["x � y 😀"]


def test_documents_that_quote_the_end_token_stay_whole(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", ["one <|endoftext|> one", "two"])
    data = prepare(DataSpec(source, tokenizer=tokenizer, val_fraction=0, cache_dir=tmp_path / "c"))
    assert documents_of(data, "train") == ["one <|endoftext|> one", "two"]


def test_the_split_depends_on_the_text_alone(tmp_path, tokenizer):
    spec = DataSpec(corpus(tmp_path), tokenizer=tokenizer, val_fraction=0.2, cache_dir=tmp_path / "c")
    data = prepare(spec)
    held_out = set(documents_of(data, "val"))
    assert 20 <= len(held_out) <= 60
    assert not held_out & set(documents_of(data, "train"))
    lines = (tmp_path / "docs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "more.jsonl").write_text("".join(reversed(lines)) + "".join(lines[:50]) + '{"text": "new"}\n')
    grown = prepare(replace(spec, source=f"text:{tmp_path}/more.jsonl"))
    assert set(documents_of(grown, "val")) - {"new"} == held_out
    assert not held_out & set(documents_of(grown, "train"))
    assert pipeline.place(b"x" * 999 + b"a") != pipeline.place(b"x" * 999 + b"b"), "all of the text counts"
    larger = prepare(replace(spec, val_fraction=0.5))
    assert held_out < set(documents_of(larger, "val"))


def test_the_bpe_never_sees_the_documents_held_out(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        pipeline, "train_bpe", lambda texts, size, **_: train_bpe(iter(seen.extend(texts) or seen), size)
    )
    data = prepare(DataSpec(corpus(tmp_path), vocab_size=300, val_fraction=0.2, cache_dir=tmp_path / "c"))
    assert sorted(seen) == sorted(documents_of(data, "train"))


def test_the_bpe_of_a_large_source_learns_from_an_even_sample(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(pipeline, "SAMPLE_BYTES", 5_000)
    monkeypatch.setattr(
        pipeline, "train_bpe", lambda texts, size, **_: train_bpe(iter(seen.extend(texts) or seen), size)
    )
    spec = DataSpec(corpus(tmp_path), vocab_size=300, val_fraction=0.2, cache_dir=tmp_path / "c")
    prepare(spec)
    numbers = [int(text.split(":")[0].split()[1]) for text in seen]
    assert 2_000 < sum(map(len, seen)) < 6_000 and max(numbers) > 150
    seen.clear()
    prepare(replace(spec, max_tokens=500))  # only the beginning is read: so is the sample
    assert max(int(text.split(":")[0].split()[1]) for text in seen) < 100


def test_the_cache_answers_the_second_time(tmp_path):
    spec = DataSpec(corpus(tmp_path), vocab_size=300, val_fraction=0.2, cache_dir=tmp_path / "c")
    steps = []
    first = prepare(spec, steps.append)
    assert [step.stage for step in steps] == ["tokenizer", "tokens"] and steps[-1].fraction == 1.0
    assert steps[-1].tokens == len(first.train) + len(first.val) and steps[-1].documents == 200
    steps.clear()
    again = prepare(spec, steps.append)
    assert again.path == first.path and again.manifest == first.manifest and not steps
    assert first.vocab_size == first.tokenizer.vocab_size == 300
    assert (
        first.manifest["dtype"] == "<u2" and first.manifest["tokenizer"]["fingerprint"] == first.tokenizer.fingerprint
    )


def test_whatever_changes_the_tokens_changes_the_entry(tmp_path, tokenizer):
    spec = DataSpec(corpus(tmp_path), vocab_size=300, val_fraction=0.2, cache_dir=tmp_path / "c")
    changes = [
        {"vocab_size": 290},
        {"val_fraction": 0.3},
        {"max_tokens": 900},
        {"tokenizer": tokenizer, "vocab_size": 280},
    ]
    paths = {prepare(spec).path, *(prepare(replace(spec, **change)).path for change in changes)}
    with open(tmp_path / "docs.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    fresh = prepare(spec)
    paths.add(fresh.path)
    os.utime(tmp_path / "docs.jsonl", ns=(1, 1))
    paths.add(prepare(spec).path)
    assert len(paths) == len(changes) + 3
    assert "one more" in documents_of(fresh, "train") + documents_of(fresh, "val")


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest", "version", "tokenizer"])
def test_a_damaged_cache_is_rebuilt_and_damaged_shards_are_refused(tmp_path, tokenizer, damage):
    spec = DataSpec(corpus(tmp_path), tokenizer=tokenizer, val_fraction=0.2, cache_dir=tmp_path / "c")
    data = prepare(spec)
    wanted = data.train.read(0, len(data.train)).copy()
    shard, manifest = data.path / "train-00000.bin", data.path / "manifest.json"
    does = {
        "truncate": lambda: os.truncate(shard, 10),
        "delete": shard.unlink,
        "manifest": lambda: manifest.write_text("{"),
        "version": lambda: manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 99')),
        "tokenizer": lambda: (data.path / "tokenizer.json").write_text("{}"),
    }
    says = {
        "truncate": "train-00000.bin has 10 bytes where the manifest says",
        "delete": "train-00000.bin is missing",
        "manifest": "manifest.json is not readable",
        "version": "has format version 99, this evenstep reads version 1",
        "tokenizer": "is not the tokenizer that made these shards",
    }
    does[damage]()
    refused(DataSpec(f"shards:{data.path}"), says[damage])
    again = prepare(spec)
    assert again.path == data.path and np.array_equal(again.train.read(0, len(again.train)), wanted)
    assert sorted(path.name for path in data.path.parent.iterdir()) == [data.path.name]


def test_prepared_shards_open_from_anywhere(tmp_path, tokenizer):
    made = prepare(DataSpec(corpus(tmp_path), tokenizer=tokenizer, val_fraction=0.2, cache_dir=tmp_path / "c"))
    moved = made.path.rename(tmp_path / "moved")
    data = prepare(DataSpec(f"shards:{moved}", tokenizer=tokenizer))
    assert len(data.train) == len(made.train) and data.train.num_bytes == made.train.num_bytes
    refused(DataSpec(f"shards:{moved}", vocab_size=100), "have 280 tokens, more than data.vocab_size 100")
    other = tmp_path / "other"
    other.mkdir()
    train_bpe(iter(["another text"]), 258).save(other)
    refused(DataSpec(f"shards:{moved}", tokenizer=str(other)), "were not made with the tokenizer")
    refused(DataSpec(f"shards:{tmp_path}/nowhere"), r"no such directory of token shards.*give shards:DIR")
    refused(DataSpec(f"shards:{other}"), "holds no manifest.json")


def test_large_vocabularies_take_four_bytes(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(70_000)} | {"</s>": 70_000}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(["</s>"])
    model.save(str(tmp_path / "tokenizer.json"))
    source = write_jsonl(tmp_path / "a.jsonl", ["w65535 w65536 w69999"])
    spec = DataSpec(source, tokenizer=str(tmp_path), val_fraction=0, cache_dir=tmp_path / "c")
    data = prepare(spec)
    assert data.train.read(0, 4).tolist() == [65535, 65536, 69999, 70000] and data.train.read(0, 4).dtype == np.uint32
    assert shards.token_dtype(65_536) == np.uint16 and shards.token_dtype(65_537) == np.uint32
    refused(replace(spec, vocab_size=32_000), "has 70001 tokens, more than data.vocab_size 32000")


def test_max_tokens_stops_after_the_document_that_reaches_it(tmp_path, tokenizer):
    spec = DataSpec(corpus(tmp_path), tokenizer=tokenizer, val_fraction=0.2, cache_dir=tmp_path / "c")
    whole, data = prepare(spec), prepare(replace(spec, max_tokens=1000))
    assert 1000 <= len(data.train) < 1000 + 200
    assert np.array_equal(data.train.read(0, len(data.train)), whole.train.read(0, len(data.train)))
    assert documents_of(data, "train") == documents_of(whole, "train")[: data.train.num_documents]


BUILD = """
import sys, time
from pathlib import Path
from evenstep.data import DataSpec, prepare
source, tokenizer, cache, signal = sys.argv[1:]
def wait(step):
    print(step.stage, flush=True)
    while not Path(signal).exists():
        time.sleep(0.02)
data = prepare(DataSpec(source, tokenizer=tokenizer, val_fraction=0.2, cache_dir=cache), wait)
print(data.path, len(data.train), flush=True)
"""


def build(*args):
    """A process that prepares, and waits in the middle until the file named last exists."""
    return subprocess.Popen([sys.executable, "-c", BUILD, *map(str, args)], stdout=subprocess.PIPE, text=True)


def test_a_kill_leaves_no_half_cache(tmp_path, tokenizer):
    source = corpus(tmp_path)
    process = build(source, tokenizer, tmp_path / "c", tmp_path / "never")
    assert process.stdout.readline() == "tokens\n"  # in the middle of writing
    process.send_signal(signal.SIGKILL)
    process.communicate()
    entries = list((tmp_path / "c" / "tokens").iterdir())
    assert len(entries) == 1 and entries[0].name.startswith(".partial-")
    data = prepare(DataSpec(source, tokenizer=tokenizer, val_fraction=0.2, cache_dir=tmp_path / "c"))
    assert TokenData(data.path).manifest == data.manifest
    # What the killed process left is swept away once it is a day old.
    for path in [*entries[0].iterdir(), entries[0]]:
        os.utime(path, (time.time() - 90_000,) * 2)
    prepare(DataSpec(source, tokenizer=tokenizer, val_fraction=0.3, cache_dir=tmp_path / "c"))
    assert not entries[0].exists() and data.path.exists()


def test_two_processes_at_once_share_one_entry(tmp_path, tokenizer):
    source = corpus(tmp_path)
    both = [build(source, tokenizer, tmp_path / "c", tmp_path / "go") for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["tokens\n"] * 2  # both are in the middle of building
    (tmp_path / "go").touch()
    last = [process.communicate()[0].splitlines()[-1] for process in both]
    assert last[0] == last[1] and [process.returncode for process in both] == [0, 0]
    assert len(list((tmp_path / "c" / "tokens").iterdir())) == 1


def test_a_failure_in_the_middle_leaves_nothing(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    refused(DataSpec(f"text:{tmp_path}/a.jsonl", tokenizer=tokenizer, cache_dir=tmp_path / "c"), "a.jsonl:2")
    assert list((tmp_path / "c" / "tokens").iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    def full(self, ids):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.ShardWriter, "append", full)
    refused(DataSpec(corpus(tmp_path), tokenizer=tokenizer, cache_dir=tmp_path / "c"), "No space left.*free space")
    assert list((tmp_path / "c" / "tokens").iterdir()) == []
    (tmp_path / "file").write_text("")
    refused(DataSpec(corpus(tmp_path), tokenizer=tokenizer, cache_dir=tmp_path / "file"), "cannot write the data cache")


def test_empty_corpora_and_splits_are_refused_with_advice(tmp_path, tokenizer):
    blank = write_jsonl(tmp_path / "blank.jsonl", ["", " \n"])
    for spec in (
        DataSpec(blank, cache_dir=tmp_path / "c"),
        DataSpec(blank, tokenizer=tokenizer, cache_dir=tmp_path / "c"),
    ):
        refused(spec, r"no text in the corpus 'text': 1 file \(.*jsonl\) held none; give another data\.source")
    one = DataSpec(write_jsonl(tmp_path / "one.jsonl", ["x"]), tokenizer=tokenizer, cache_dir=tmp_path / "c")
    refused(one, r"the text has 1 bytes, too few for training and validation; give more text, or data.val_fraction 0")
    refused(replace(one, tokenizer="bpe", val_fraction=0.9999), "too few for training and validation")
    assert len(prepare(replace(one, val_fraction=0)).train) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"val_fraction": 1.0}, "data.val_fraction is 1.0; it must be at least 0 and below 1"),
        ({"val_fraction": -0.1}, "val_fraction is -0.1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"source": "txt:a"}, "unknown data source 'txt:a'.*did you mean 'text'"),
    ],
)
def test_a_specification_that_cannot_be_is_refused_at_once(change, says):
    with pytest.raises(EvenstepError, match=says):
        DataSpec(**({"source": "stdlib"} | change))


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("EVENSTEP_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root(None) == tmp_path / ".cache" / "evenstep"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(cache_root(None)) == "/xdg/evenstep"
    monkeypatch.setenv("EVENSTEP_CACHE", "~/own")
    assert cache_root(None) == tmp_path / "own"
    assert str(cache_root("/given")) == "/given"


def test_importing_needs_torch_and_numpy_only():
    heavy = ["tokenizers", "pyarrow", "sentencepiece", "datasets", "rich", "huggingface_hub"]
    program = f"import sys, evenstep.data; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"


def test_missing_packages_name_the_pip_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused(DataSpec(corpus(tmp_path), cache_dir=tmp_path / "c"), r"pip install 'evenstep\[train\]'")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "t.model").write_bytes(b"x")
    with pytest.raises(EvenstepError, match=r"pip install 'evenstep\[train\]'"):
        load_tokenizer(tmp_path / "t.model")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_bar_in_a_terminal_and_lines_elsewhere(tmp_path, tokenizer, monkeypatch):
    pytest.importorskip("rich")
    spec = DataSpec(corpus(tmp_path), tokenizer=tokenizer, val_fraction=0.2, cache_dir=tmp_path / "c")
    plain, terminal, cached = io.StringIO(), Terminal(), io.StringIO()
    with prepare_display(plain) as show:
        prepare(spec, show)
    assert plain.getvalue().startswith("tokenising 100%: 200 documents, ") and plain.getvalue().count("\n") == 1
    with prepare_display(cached) as show:
        prepare(spec, show)
    assert cached.getvalue() == ""
    with prepare_display(terminal) as show:
        prepare(replace(spec, val_fraction=0.3), show)
    assert "tokenising" in terminal.getvalue() and "━" in terminal.getvalue()


def test_a_cache_that_cannot_be_written_is_found_before_the_tokenizer_is_trained(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(pipeline, "train_bpe", lambda *_: pytest.fail("too late"))
    refused(
        DataSpec(corpus(tmp_path), cache_dir=tmp_path / "file" / "cache"),
        r"cannot write the data cache.*data\.cache_dir",
    )


def test_the_program_and_the_library_hold_out_the_same_share(tmp_path):
    from evenstep.train.config import DataConfig

    assert DataSpec("stdlib").val_fraction == DataConfig().val_fraction
