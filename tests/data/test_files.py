"""Files of all kinds: read as people mean them, or refused in one line, or left out and counted."""

import argparse
import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import sys
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from evenstep.data import DataSpec, containers, prepare
from evenstep.data.corpora import open_corpus
from evenstep.data.left_out import LeftOut
from evenstep.errors import EvenstepError
from evenstep.finetune.examples import read_examples

ROWS = [{"text": "one é", "n": 1}, {"text": 'two, "quoted"\nand a line', "n": 2}]
TEXTS = [row["text"] for row in ROWS]


def table(delimiter=",", rows=ROWS):
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([["n", "text"], *([row["n"], row["text"]] for row in rows)])
    return out.getvalue().encode()


def parquet(rows=ROWS):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    out = io.BytesIO()
    write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def zstd(content):
    return pytest.importorskip("zstandard").ZstdCompressor().compress(content)


def zipped(members, **how):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
PLAIN = {
    ".jsonl": lambda: LINES,
    ".ndjson": lambda: b"\n" + LINES + b"\n",
    ".json": lambda: json.dumps(ROWS).encode(),
    "_pretty.json": lambda: json.dumps(ROWS, indent=2).encode(),
    "_lines.json": lambda: LINES,
    "_objects.json": lambda: "\n".join(json.dumps(row, indent=1, ensure_ascii=False) for row in ROWS).encode(),
    "_list.jsonl": lambda: json.dumps(ROWS).encode(),
    "_pretty.jsonl": lambda: "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    ".csv": table,
    "_semicolons.csv": lambda: table(";"),
    ".tsv": lambda: table("\t"),
    ".parquet": parquet,
}
AROUND = {
    "": lambda content: content, ".gz": gzip.compress, ".bz2": bz2.compress,
    ".xz": lambda content: lzma.compress(content, preset=0), ".zst": zstd,
}  # fmt: skip


def texts(source, field="text", **how):
    return [text for text, _ in open_corpus(f"text:{source}", field, **how).read()]


def refused(source, says, **how):
    with pytest.raises(EvenstepError, match=says) as error:
        texts(source, **how)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


def skipped(source, field="text", **how):
    """The texts of a pass that skips, and what it left out: {kind: count}."""
    left_out = LeftOut("skip")
    corpus = open_corpus(f"text:{source}", field, on_bad="skip", **how)
    found = [text for text, _ in corpus.read(left_out)]
    left_out.include(corpus.left_out)
    return found, {entry["what"]: entry["count"] for entry in left_out.entries()}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("kind", PLAIN)
def test_every_kind_is_read_in_every_compression_by_pretraining_and_fine_tuning(tmp_path, kind, around):
    path = tmp_path / f"A{kind}{around}".upper()
    path.write_bytes(AROUND[around](PLAIN[kind]()))
    assert texts(path) == texts(tmp_path) == TEXTS
    examples = [{"prompt": text, "response": "x"} for text in TEXTS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "ROWS", examples)
        if kind in (".jsonl", ".json"):
            path.write_bytes(AROUND[around](json.dumps(examples).encode()))
        elif kind == ".parquet":
            path.write_bytes(AROUND[around](parquet(examples)))
        elif kind == ".csv":
            path.write_bytes(AROUND[around](b'prompt,response\n"one \xc3\xa9",x\n"two, ""quoted""\nand a line",x\n'))
        else:
            return
    assert [example.prompt for example in read_examples(path)] == TEXTS


@pytest.mark.parametrize("outer", [name for name in AROUND if name])
@pytest.mark.parametrize("inner", [name for name in AROUND if name])
def test_a_file_may_be_compressed_twice(tmp_path, inner, outer):
    (tmp_path / f"a.jsonl{inner}{outer}").write_bytes(AROUND[outer](AROUND[inner](LINES)))
    assert texts(tmp_path) == TEXTS


def test_a_zip_archive_is_its_members(tmp_path):
    members = {"b.txt": "text", "folder/a.jsonl": LINES, "c.csv.gz": gzip.compress(table()), "d.parquet": parquet()}
    others = {"e.png": b"\x89PNG", "__MACOSX/._b.txt": b"x", ".hidden.txt": b"x", "empty.txt": b"", "folder/": b""}
    (tmp_path / "A.ZIP").write_bytes(zipped(members | others))
    assert texts(tmp_path) == texts(tmp_path / "A.ZIP") == ["text", *TEXTS, *TEXTS, *TEXTS]
    _, out = skipped(tmp_path / "A.ZIP")
    assert out == {"files of other kinds": 1, "hidden files and folders": 2, "empty files": 1}
    assert texts(tmp_path, exclude=["folder", "*.csv*", "*.parquet"]) == ["text"]
    assert len(read_examples(written(tmp_path / "x.zip", zipped({"a.jsonl": '{"prompt": "p", "response": "r"}'})))) == 1


def written(path, content):
    path.write_bytes(content)
    return path


def with_link(archive):
    info = zipfile.ZipInfo("link.txt")
    info.external_attr = 0o120777 << 16
    archive.writestr(info, "/etc/passwd")


def encrypted():
    content = bytearray(zipped({"a.txt": "secret"}))
    content[6] |= 1  # the flag in the local header, and in the directory
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


BAD_ZIPS = {
    "no archive": (lambda: b"hello", "cannot read .*damaged"),
    "cut short": (lambda: zipped({"a.txt": random.Random(0).randbytes(9000)})[:-3000], "cannot read .*damaged"),
    "damaged": (lambda: damaged(zipped({"a.txt": "".join(map(str, range(9000)))})), "cannot read .*a.txt"),
    "outside": (lambda: zipped({"../a.txt": "x"}), "a name that leads out of the archive"),
    "absolute": (lambda: zipped({"/etc/a.txt": "x"}), "a name that leads out of the archive"),
    "drive": (lambda: zipped({"C:\\a.txt": "x"}), "a name that leads out of the archive"),
    "encrypted": (encrypted, "is encrypted; unpack"),
    "nested": (lambda: zipped({"a.zip": zipped({"b.txt": "x"})}), "an archive in an archive"),
}


def damaged(content):
    middle = len(content) // 3
    return content[:middle] + b"\0" * 64 + content[middle + 64 :]


@pytest.mark.parametrize("name", BAD_ZIPS)
def test_archives_that_cannot_be_read_are_refused_or_left_out(tmp_path, name):
    make, says = BAD_ZIPS[name]
    (tmp_path / "a.zip").write_bytes(make())
    (tmp_path / "good.txt").write_text("good")
    assert "a.zip" in refused(tmp_path, says)
    found, out = skipped(tmp_path)
    assert found[-1] == "good" and sum(out.values()) == 1


def test_links_in_an_archive_are_not_text(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        with_link(archive)
        archive.writestr("a.txt", "text")
    assert skipped(tmp_path / "a.zip") == (["text"], {"links in archives": 1})


@pytest.mark.parametrize("around", [".zip", ".gz", ".bz2", ".xz", ".zst"])
def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch, around):
    monkeypatch.setattr(containers, "BOMB_BYTES", 1_000_000)
    content = b"a" * 3_000_000
    path = tmp_path / f"a.txt{around}"
    path.write_bytes(zipped({"a.txt": content}) if around == ".zip" else AROUND[around](content))
    refused(path, "grows from its compressed size")
    assert sum(map(len, skipped(path)[0])) < 1_200_000


@pytest.mark.parametrize("around", [name for name in AROUND if name])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_compressed_files_that_are_cut_short_are_refused_and_keep_what_comes_before(tmp_path, around, kind):
    lines = "".join(json.dumps({"text": f"{i} {random.Random(i).random()}"}) + "\n" for i in range(26_000))
    content = AROUND[around](lines.encode())
    path = tmp_path / f"a{kind}{around}"
    path.write_bytes(content[: len(content) - 300])
    assert str(path) in refused(path, "cannot read .*damaged or cut short.*get it again.*data.on_bad skip")
    found, out = skipped(path)
    assert found and sum(out.values()) == 1
    path.write_bytes(b"hello")
    refused(path, "cannot read")


def test_zstd_without_its_package_names_the_pip_line(tmp_path, monkeypatch):
    path = written(tmp_path / "a.txt.zst", zstd(b"x"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    refused(path, r"needs the zstandard package; pip install 'evenstep\[train\]'")
    with pytest.raises(EvenstepError, match="zstandard"):
        skipped(path)  # a missing package is no bad file


def test_zstd_reads_all_frames(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(zstd(b"one ") + zstd(b"") + zstd(b"two"))
    assert texts(tmp_path) == ["one two"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".csv", ".tsv"])
def test_byte_order_marks_are_understood(tmp_path, encoding, kind):
    content = "one é, ✓ 😀\n" if kind == ".txt" else PLAIN[kind]().decode()
    mark = "" if encoding in ("utf-8-sig", "utf-16", "utf-32") else "\ufeff"
    (tmp_path / f"a{kind}").write_bytes((mark + content).encode(encoding))
    assert texts(tmp_path) == (["one é, ✓ 😀\n"] if kind == ".txt" else TEXTS)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".csv"])
@pytest.mark.parametrize(
    "content", ["Call me Ishmael, some years ago. ", "Зовите меня Измаил, друзья. ", "叫我以实玛利。"]
)
def test_utf16_without_a_mark_is_never_taken_silently(tmp_path, encoding, kind, content):
    row = {".txt": content, ".csv": f"text\n{content}\n"}.get(kind, json.dumps({"text": content}, ensure_ascii=False))
    (tmp_path / f"a{kind}").write_bytes((row * (20 if kind == ".txt" else 1)).encode(encoding))
    refused(tmp_path, f"a{kind}")
    assert skipped(tmp_path)[0] in ([], [""])


BINARY = {
    "zip": lambda: zipped({"a": "x"}), "gzip": lambda: gzip.compress(b"x"), "bzip2": lambda: bz2.compress(b"x"),
    "xz": lambda: lzma.compress(b"x"), "zstd": lambda: zstd(b"x"), "Parquet": parquet, "PDF": lambda: b"%PDF-1.7 x",
    "PNG": lambda: b"\x89PNG\r\n", "binary data": lambda: bytes(range(32)) * 50, "not UTF-8": lambda: b"d\xe9j\xe0 vu",
}  # fmt: skip


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv"])
@pytest.mark.parametrize("what", BINARY)
def test_binary_files_among_texts(tmp_path, what, kind):
    (tmp_path / f"a{kind}").write_bytes(BINARY[what]())
    (tmp_path / "z.txt").write_text("good")
    if kind == ".txt":
        refused(tmp_path, f"{what}.*data.on_bad skip leaves it out")
    else:
        refused(tmp_path, f"a{kind}")
    found, out = skipped(tmp_path)
    assert found == ["good"] and sum(out.values()) >= 1
    assert texts(tmp_path, exclude=["a.*"]) == ["good"]


def test_bad_rows_are_refused_with_their_place_or_counted(tmp_path):
    rows = ['{"text": "a"}', "{broken", '{"body": "b"}', '{"text": 3}', "[1]", '{"text": null}', '{"text": "z"}']
    (tmp_path / "a.jsonl").write_bytes("\n".join(rows).encode() + b'\n{"text": "\xe9"}\n')
    refused(tmp_path, r"a\.jsonl:2 is not a line of JSON.*data.on_bad skip")
    assert skipped(tmp_path) == (
        ["a", "", "z"],
        {
            "rows that are not JSON": 2,
            "files or rows without a field 'text'": 1,
            "rows whose field holds no text": 1,
            "rows that are not JSON objects": 1,
        },
    )
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "b.csv").write_text('id,text\n1,"a"\n2,b,c\n3,"x"y\n\n4\n5,z\n')
    refused(tmp_path, r"b\.csv:3 has 3 columns where the first line names 2")
    assert skipped(tmp_path) == (["a", "", "z"], {"rows with too many columns": 1, "rows that are not CSV": 1})
    (tmp_path / "b.csv").write_text('id,text\n1,a\n2,"never closed\n3,c\n')
    refused(tmp_path, r"b\.csv:4 is not a row of CSV \(unexpected end of data\)")
    assert skipped(tmp_path) == (["a"], {"rows that are not CSV": 1})


BAD_JSON = {
    "cut short": ('[{"text": "a"}, {"text": "b', 1),
    "without an end": ('[{"text": "a"}', 1),
    "no comma": ('[{"text": "a"} {"text": "b"}]', 1),
    "a word": ('[{"text": "a"}, nonsense]', 1),
    "too deep": ('[{"text": "a"}, ' + "[" * 100_000, 1),
    "an item": ('[{"text": "a"}, "b", 3]', 2),
    "one object": ('{"text": "a"}\n{"text": \n{"body": "c"}', 2),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_json_that_is_not_whole(tmp_path, name):
    content, count = BAD_JSON[name]
    (tmp_path / "a.json").write_text(content)
    refused(tmp_path, r"a\.json:[12] (is not JSON|is not a JSON object|has no field)")
    found, out = skipped(tmp_path)
    assert found == ["a"] and sum(out.values()) == count


def test_json_values_of_any_length_are_found_whole(tmp_path):
    rows = [
        {"text": "x" * size + '\\"}]{[,', "n": [1.5e-7, None, True, {"a": "\u2028"}]} for size in (1, 16_300, 90_000)
    ]
    for content in (
        json.dumps(rows),
        json.dumps(rows, indent=3),
        "\n\n".join(map(json.dumps, rows)),
        "\n".join(json.dumps([row]) for row in rows),
        "".join(map(json.dumps, rows)),
    ):
        (tmp_path / "a.json").write_text(content)
        assert texts(tmp_path) == [row["text"] for row in rows]


def test_the_first_of_several_fields_that_a_row_has(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"content": "1"}\n{"text": "2", "content": "no"}\n{"text": null, "content": "3"}\n'
    )
    (tmp_path / "b.csv").write_text("content\n4\n")
    (tmp_path / "c.parquet").write_bytes(parquet([{"content": "5", "text": None}]))
    assert texts(tmp_path, "text, content") == ["1", "2", "3", "4", "5"]
    refused(tmp_path, r"a\.jsonl:1 has no field 'body' or 'story'; it has content", field="body,story")
    refused(tmp_path, r"has no field 'text'")
    (tmp_path / "d.jsonl").write_text('{"a,b": "6"}\n')
    assert texts(tmp_path / "d.jsonl", "a,b") == ["6"]


def test_a_folder_says_what_it_leaves_out(tmp_path):
    for name in ("a.txt", "b.png", "c.pdf", ".hidden.txt", ".git/x.txt", "README", "sub/d.md", "sub/e.tar.gz", "f.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text\n" + name)
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "nowhere.txt").symlink_to(tmp_path / "gone")
    found, out = skipped(tmp_path)
    assert found == ["text\na.txt", "f.csv", "text\nsub/d.md"]  # a table is never left out silently
    assert out == {
        "files of other kinds": 4,
        "hidden files and folders": 2,
        "empty files": 1,
        "links to nothing and other things that are no files": 1,
    }
    for pattern in ("sub", "sub/*", "*.md", "d.md", "**/d.md", "sub/"):
        assert len(texts(tmp_path, exclude=["*.csv", pattern])) == 1, pattern
    refused(tmp_path, "data.exclude .* leaves out all 8 files", exclude=["*"])
    (tmp_path / "pictures").mkdir()
    refused(tmp_path / "pictures", "no file below .*there are: no files")
    (tmp_path / "pictures" / "a.png").write_bytes(b"x")
    refused(tmp_path / "pictures", "no file below .*there are: 1 .png")


def test_links_are_followed_once(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.txt").write_text("x")
    (tmp_path / "a" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "b" / "top").symlink_to(tmp_path)
    (tmp_path / "a" / "y.txt").symlink_to(tmp_path / "a" / "b" / "x.txt")
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "z.md").write_text("z")
    (tmp_path / "linked").symlink_to(outside)
    assert sorted(texts(tmp_path)) == ["x", "z"]
    assert texts(f"{tmp_path}/**/*.txt") == ["x"]
    assert texts(f"{tmp_path}/**/linked/*.md") == texts(f"{tmp_path}/linked/**") == ["z"]
    assert texts(f"{tmp_path}/*/*.md") == ["z"]


def test_names_that_do_not_fit_on_a_line(tmp_path):
    (tmp_path / "a\nb\x1b[31m.jsonl").write_text("{")
    assert "\x1b" not in refused(tmp_path, r"a\?b\?\[31m.jsonl:1 is not a line")
    (tmp_path / os.fsdecode(b"a\xff.txt")).write_bytes(b"\xff")
    refused(tmp_path / os.fsdecode(b"a\xff.txt"), "not UTF-8").encode()
    refused("x" * 5000, "cannot look for|no such file")
    refused("~nobody-of-this-name/x", "cannot look for")


def test_what_cannot_be_opened(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "shut").mkdir()
    (tmp_path / "shut.txt").write_text("b")

    def guarded(function):
        def opened(path, *args, **how):
            if "shut" in os.path.basename(path):
                raise PermissionError(13, "Permission denied", path)
            return function(path, *args, **how)

        return opened

    monkeypatch.setattr(os, "scandir", guarded(os.scandir))  # root may read everything
    monkeypatch.setattr(Path, "open", guarded(Path.open))
    refused(tmp_path, "cannot read the folder .*shut: Permission denied")
    refused(tmp_path / "shut.txt", "cannot read .*shut.txt: Permission denied; check the file")
    found, out = skipped(tmp_path)
    assert found == ["a"] and sum(out.values()) == 2


def test_what_was_left_out_is_told_and_kept(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(
        "".join(f'{{"text": "{i} words to read"}}\n{{"body": 1}}\n' for i in range(300))
    )
    (tmp_path / "in" / "b.png").write_bytes(b"x")
    spec = DataSpec(
        f"text:{tmp_path}/in", vocab_size=300, cache_dir=tmp_path / "c", on_bad="skip", exclude="*.md, *.rst"
    )
    (tmp_path / "in" / "c.md").write_text("excluded")
    notes = []
    for _ in range(2):  # also when the cache answers
        notes.clear()
        data = prepare(spec, lambda now: notes.append(now.note) if now.note else None)
        assert [note.split(" (")[0] for note in notes] == [
            "left out: 300 files or rows without a field 'text'",
            "left out: 1 files by data.exclude",
            "left out: 1 files of other kinds",
        ]
    assert data.manifest["left_out"][0] == {
        "what": "files or rows without a field 'text'", "count": 300, "first": f"{tmp_path}/in/a.jsonl:2"
    }  # fmt: skip
    (tmp_path / "in" / "a.jsonl").write_text('{"body": 1}\n')
    with pytest.raises(EvenstepError, match=r"no text in the corpus.*left out: 1 files or rows without a field"):
        prepare(spec)
    with pytest.raises(EvenstepError, match=r"data\.exclude applies to text: sources only"):
        DataSpec("kjv", exclude="*.md")
    with pytest.raises(EvenstepError, match=r"data\.on_bad is 'ignore'; allowed are stop and skip"):
        DataSpec("kjv", on_bad="ignore")


@pytest.mark.parametrize(
    "kind", [".jsonl", ".json", ".csv", ".txt", ".jsonl.gz", ".csv.xz", ".json.zst", ".txt.bz2", ".zip"]
)
def test_large_files_are_read_as_a_stream(tmp_path, kind):
    rows = [{"text": f"{i} " + f"{random.Random(i).random()} " * 20, "n": i} for i in range(15_000)]
    plain, around = (".jsonl", kind) if kind == ".zip" else (f".{kind.split('.')[1]}", kind[1:].partition(".")[2])
    lines = {
        ".json": lambda: json.dumps(rows), ".csv": lambda: table(rows=rows).decode(),
    }.get(plain, lambda: "".join(json.dumps(row) + "\n" for row in rows))().encode()  # fmt: skip
    content = zipped({"a.jsonl": lines}) if kind == ".zip" else AROUND[f".{around}" if around else ""](lines)
    (tmp_path / f"a{kind}").write_bytes(content)
    size = len(lines)
    tracemalloc.start()
    count = sum(1 for _ in open_corpus(f"text:{tmp_path}").read())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 300 and size > 5_000_000 and peak < size / 2


def test_endless_rows_do_not_fill_the_memory(tmp_path, monkeypatch):
    from evenstep.data import formats

    monkeypatch.setattr(formats, "LONGEST", 50_000)
    before = csv.field_size_limit(50_000)
    try:
        for name, content in {
            "a.jsonl": '{"text": "' + "x" * 200_000 + '"}\n',
            "b.json": '[{"text": "' + "x" * 200_000,
            "c.csv": 'text\n"' + "x y\n" * 100_000,
        }.items():
            written(tmp_path / name, content.encode())
            refused(tmp_path / name, "more than 0 MiB|field larger than field limit")
    finally:
        csv.field_size_limit(before)


def test_the_command_line_takes_several_globs(tmp_path):
    from evenstep.train.config import Config
    from evenstep.train.flags import add_flags, chosen
    from evenstep.train.task import load_data

    parser = argparse.ArgumentParser()
    add_flags(parser, Config)
    for name in ("a.txt", "b.md", "c.rst", "d.txt"):
        (tmp_path / name).write_text(f"the file {name} " * 200)
    (tmp_path / "d.txt").write_bytes(b"\xff")
    flags = [
        "--data.exclude",
        "*.md",
        "--data.exclude",
        "c.*,*.py",
        "--data.on_bad",
        "skip",
        "--data.vocab_size",
        "260",
    ]
    args = parser.parse_args([*flags, "--data.source", f"text:{tmp_path}", "--data.cache_dir", f"{tmp_path}/cache"])
    args.extra = []
    config, _ = chosen(args, Config, None)
    assert config.data.exclude == "*.md,c.*,*.py"
    data = load_data(config)
    assert data.train.num_documents == 1 and data.manifest["options"]["exclude"] == ["*.md", "c.*", "*.py"]


def test_paths_are_found_from_the_working_directory(tmp_path):
    old = Path.cwd()
    os.chdir(written(tmp_path / "a.md", b"text").parent)
    try:
        assert texts("*.md") == texts("**/*.md") == texts(".") == ["text"]
    finally:
        os.chdir(old)


def test_fine_tuning_skips_what_the_reader_cannot_use(tmp_path):
    good = '{"prompt": "p", "response": "r"}'
    path = written(tmp_path / "a.jsonl.gz", gzip.compress(f"{good}\n{{broken\n[1]\n{good}\n".encode()))
    with pytest.raises(EvenstepError, match=r"a\.jsonl\.gz line 2: not JSON.*data\.on_bad skip"):
        read_examples(path)
    bad = []
    assert len(read_examples(path, bad=bad)) == 2 and len(bad) == 2
    cut = gzip.compress(
        "".join(f'{{"prompt": "{random.Random(i).random()}", "response": "r"}}\n' for i in range(9000)).encode()
    )
    written(path, cut[:-200])
    with pytest.raises(EvenstepError, match="damaged or cut short"):
        read_examples(path)
    assert len(read_examples(path, bad=bad)) > 100 and len(bad) == 3


def test_a_member_without_a_name_is_one_line(tmp_path):
    with zipfile.ZipFile(tmp_path / "texts.zip", "w") as archive:
        archive.writestr("a", "text " * 100)
    content = (tmp_path / "texts.zip").read_bytes()
    # The central directory says that the name has no letters; the letter becomes a part of the extra field.
    start = content.index(b"PK\x01\x02")
    damaged = bytearray(content)
    damaged[start + 28 : start + 32] = b"\x00\x00\x01\x00"
    (tmp_path / "texts.zip").write_bytes(damaged)
    with pytest.raises(EvenstepError, match=r"has a member without a name; pack the archive again"):
        prepare(DataSpec(source=f"text:{tmp_path}/texts.zip", cache_dir=str(tmp_path / "cache")))
