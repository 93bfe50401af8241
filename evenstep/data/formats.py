"""Readers of single files: whole text, JSON lines, Parquet.

A reader yields ``(document, bytes_read)``: the text of one document, and how far into the file (in bytes) reading has
come, which drives the progress bar and nothing else. All of them read as a stream: none holds more than one document,
or one batch of rows, in memory.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from evenstep.errors import EvenstepError

SECTION_CHARS = 16_384
"""Longest document taken from a plain text file. Text files carry no document boundaries: a book or a log of any size
is cut into sections of at most this many characters (about 4k tokens, many times a training window), so memory stays
bounded and the split into training and validation works even for a corpus of a single file."""

Document = tuple[str, int]
Reader = Callable[[Path, str], Iterator[Document]]


def cut(text: str, limit: int) -> Iterator[str]:
    """Cut ``text`` into pieces of at most ``limit`` characters; joined, they are ``text`` again.

    A cut falls, where the second half of the piece has one, after a blank line, else after a line, else before a space
    (byte-level tokenizers glue a space to the word that follows), else anywhere.
    """
    start = 0
    while len(text) - start > limit:
        half, end = start + limit // 2, start + limit
        for mark, keep in (("\n\n", 2), ("\n", 1), (" ", 0)):
            at = text.rfind(mark, half + 1, end)
            if at >= 0:
                end = at + keep
                break
        yield text[start:end]
        start = end
    yield text[start:]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """(decompressed stream, the raw file whose position measures progress); I/O errors become one line."""
    try:
        with path.open("rb") as raw:
            if path.suffix == ".gz":
                with gzip.open(raw) as stream:
                    yield stream, raw  # type: ignore[misc]  # GzipFile is a BinaryIO in all but name
            else:
                yield raw, raw
    except (OSError, EOFError, zlib.error) as error:  # the last two: a gzip file that was cut short or damaged
        raise EvenstepError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def read_text(path: Path, field: str = "") -> Iterator[Document]:
    """A text file in UTF-8 (with or without a byte order mark; any line ends, read as ``\\n``), in sections; ``field``
    has no meaning here."""
    with _opened(path) as (stream, raw):
        text = io.TextIOWrapper(stream, encoding="utf-8-sig")
        rest = ""
        try:
            while chunk := text.read(SECTION_CHARS):
                *sections, rest = cut(rest + chunk, SECTION_CHARS)
                for section in sections:
                    yield section, raw.tell()
        except UnicodeDecodeError as error:
            raise EvenstepError(
                f"{path} is not UTF-8 text ({error.reason}); convert it (iconv) or leave it out of the glob"
            ) from error
        yield rest, raw.tell()


def text_of(value: object, field: str, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise EvenstepError(
            f"{where}: field '{field}' holds {type(value).__name__}, not text; choose another with data.text_field"
        )
    return value


def no_such_field(field: str, there: list[str], where: str) -> EvenstepError:
    return EvenstepError(
        f"{where} has no field '{field}'; it has {', '.join(map(str, there)) or 'none'}: "
        "choose one with data.text_field"
    )


def read_jsonl(path: Path, field: str) -> Iterator[Document]:
    """One JSON object a line, the document in its string ``field``; null and blank lines are skipped."""
    with _opened(path) as (stream, raw):
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError; nested too deeply
                raise EvenstepError(f"{where} is not a line of JSON ({error}); mend or delete the line") from error
            if not isinstance(row, dict):
                raise EvenstepError(
                    f'{where} is not a JSON object; every line must be one, such as {{"{field}": "..."}}'
                )
            if field not in row:
                raise no_such_field(field, list(row), where)
            yield text_of(row[field], field, where), raw.tell()


def read_parquet(path: Path, field: str) -> Iterator[Document]:
    """A Parquet file, the document in the string column ``field``; nulls are skipped."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise EvenstepError(f"reading {path} needs pyarrow; pip install 'evenstep[train]'") from error
    size = path.stat().st_size if path.exists() else 0
    try:
        # A buffer and no pre-buffering: column chunks are read as a stream instead of whole.
        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            if field not in file.schema_arrow.names:
                raise no_such_field(field, file.schema_arrow.names, str(path))
            total, done = max(file.metadata.num_rows, 1), 0
            for batch in file.iter_batches(batch_size=256, columns=[field], use_threads=False):
                for value in batch.column(0).to_pylist():
                    done += 1
                    yield text_of(value, field, str(path)), size * done // total
    except EvenstepError:
        raise
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: names or texts that are not UTF-8
        raise EvenstepError(f"cannot read {path} as Parquet: {(str(error) or 'damaged').splitlines()[0]}") from error


_TEXT = (".txt", ".text", ".md", ".rst", ".py", ".tex", ".html", ".c", ".h", ".cpp", ".js", ".rs", ".go", ".java")
READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_jsonl,
    ".parquet": read_parquet,
    **dict.fromkeys(_TEXT, read_text),
}
"""Suffix (with or without a further .gz, Parquet excepted) -> reader. A directory gives the files of these suffixes; a
file or glob given by name may have any other suffix too and is then read as text."""


def suffix_of(path: Path) -> str:
    """The suffix that decides, ``.jsonl`` for ``a.jsonl.gz``."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix == ".gz" else suffix


def reader_for(path: Path) -> Reader:
    return READERS.get(suffix_of(path), read_text)
