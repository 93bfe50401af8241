"""Readers of files: plain text in sections, and rows of JSON lines, JSON, CSV and Parquet.

A reader yields ``(document, bytes_read)``: the text of one document, and the number of bytes of the file that have been
read, which only drives the progress bar. All readers are streams: none holds more than one document, or one batch of
rows, in memory.
"""

import csv
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from evenstep.data.containers import DAMAGED, NOT_TEXT, Part, not_readable, not_text, parts, suffixes
from evenstep.data.left_out import BadInput, LeftOut, printable
from evenstep.errors import EvenstepError, first_line

SECTION_CHARS = 16_384
"""Longest document of a plain text file. Text files have no document boundaries: a book or a log of any size is cut
into sections of at most this many characters (about 4k tokens, many times a training window). Memory is then bounded,
and a corpus of a single file can be split into training and validation."""

LONGEST = 1 << 27
"""Longest line, value or field, in bytes or characters: a file without line ends must not fill the memory."""

Document = tuple[str, int]
T = TypeVar("T")


def cut(text: str, limit: int) -> Iterator[str]:
    """Cut ``text`` into pieces of at most ``limit`` characters, whose concatenation is ``text``.

    A piece ends in its second half: after a blank line, or else after a line, or else before a space (byte-level
    tokenizers join a space to the word after it), or else anywhere.

    >>> list(cut("one two three", 8))
    ['one two', ' three']
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


def read_text(part: Part, left_out: LeftOut) -> Iterator[Document]:
    """The sections of a text file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark. All line ends are read as
    ``\n``."""
    text = part.text()
    rest = ""
    while chunk := text.read(SECTION_CHARS):
        controls = len(_CONTROLS.findall(chunk))
        if controls * 50 > len(chunk):
            raise not_text(part.name, chunk.count("\0") / len(chunk))
        *sections, rest = cut(rest + chunk, SECTION_CHARS)
        for section in sections:
            yield section, part.position()
    yield rest, part.position()


_CONTROLS = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f]")
"""Control characters that text does not contain. The escapes of terminal logs and form feeds are not among them."""


# -- rows --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One JSON object, or one row of a table. ``number`` is its line, or its index, counted from 1, in a JSON list
    (``in_list``) or in a Parquet file."""

    name: str
    number: int
    value: dict[str, Any]
    position: int
    in_list: bool = False

    @property
    def where(self) -> str:
        return f"{self.name}:{self.number}"


RowReader = Callable[[Part, tuple[str, ...], LeftOut], Iterator[Row]]


def _object(part: Part, number: int, value: Any, left_out: LeftOut, in_list: bool = False) -> Iterator[Row]:
    if isinstance(value, dict):
        yield Row(part.name, number, value, part.position(), in_list)
        return
    where = f"{part.name}:{number}"
    left_out.bad(
        BadInput(
            "rows that are not JSON objects", where, f"{where} is not a JSON object; every line, or every item of a "
            'list, must be one, such as {"text": "..."}', number=number, found=str(value)[:40],
        )
    )  # fmt: skip


def _not_json(where: str, number: int, what: str, error: Exception, do: str) -> BadInput:
    found = getattr(error, "msg", None) or str(error) or type(error).__name__
    return BadInput(
        "rows that are not JSON", where, f"{where} is not {what} ({found}); {do}", number=number, found=found
    )


def read_jsonl(part: Part, fields: tuple[str, ...], left_out: LeftOut) -> Iterator[Row]:
    """One JSON object on each line; blank lines are skipped. A file that begins with a list, or with a brace alone on
    its line, is read by `read_json`."""
    start = part.stream.peek(_PEEK)[:_PEEK].removeprefix(b"\xef\xbb\xbf").lstrip()
    if part.encoding != "utf-8-sig" or start.startswith(b"[") or _OPEN.match(start):
        yield from read_json(part, fields, left_out)
        return
    number = 0
    while line := part.stream.readline(LONGEST + 1):
        number += 1
        where = f"{part.name}:{number}"
        if len(line) > LONGEST:
            raise _too_long(where, "a line")
        if not line.strip():
            continue
        try:
            # Halves of surrogate pairs are accepted, since JSON can contain them as escapes too.
            text = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").decode("utf-8", "surrogatepass")
            value = json.loads(text)
        except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError; nested too deeply
            do = "mend or delete the line (objects over several lines are read from files named .json)"
            left_out.bad(_not_json(where, number, "a line of JSON", error, do))
            continue
        yield from _object(part, number, value, left_out)


_PEEK = 4096
_OPEN = re.compile(rb"\{[ \t]*\r?\n")
_BLANK = re.compile(r"[ \t\r\n]*")
_LONGEST_WORD = 16  # characters at the end of the buffer that may be a part of true, null, \u0041 or -Infinity


def read_json(part: Part, fields: tuple[str, ...], left_out: LeftOut) -> Iterator[Row]:
    """JSON objects one after the other, of any number of lines, or a list of them; one value is in memory at a
    time."""
    text = part.text(errors="surrogatepass")
    decode = json.JSONDecoder().raw_decode
    # ``at`` is the position in ``buffer``, ``lines`` the number of the line of ``buffer[counted]``. ``item`` is the
    # number of the last item of the list, -1 outside a list; ``separated`` says that a comma has been read after it.
    buffer, at, lines, counted = "", 0, 1, 0
    item, separated = -1, True

    def more() -> bool:
        nonlocal buffer, at, lines, counted
        lines += buffer.count("\n", counted, at)
        buffer, at, counted = buffer[at:], 0, 0
        # The buffer doubles each time: a long value is parsed from its beginning again, in linear time altogether.
        chunk = text.read(max(SECTION_CHARS, len(buffer)))
        buffer += chunk
        return bool(chunk)

    while True:
        at = _BLANK.match(buffer, at).end()  # type: ignore[union-attr]  # the pattern matches everywhere
        if at == len(buffer):
            if more():
                continue
            if item >= 0:
                where = f"{part.name}:{lines}"
                left_out.bad(_not_json(where, lines, "JSON", EOFError("the list has no end"), "get the file again"))
            return
        lines, counted = lines + buffer.count("\n", counted, at), at
        here = buffer[at]
        if item < 0 and here == "[":
            item, separated, at = 0, True, at + 1
            continue
        if item >= 0 and here == "]":
            item, separated, at = -1, True, at + 1
            continue
        if item >= 0 and here == "," and not separated:
            separated, at = True, at + 1
            continue
        number = item + 1 if item >= 0 else lines
        where = f"{part.name}:{lines}"
        try:
            if not separated:
                raise json.JSONDecodeError("Expecting ',' delimiter", buffer, at)
            value, end = decode(buffer, at)
        except (ValueError, RecursionError) as error:
            stopped = getattr(error, "pos", at)
            if str(error).startswith("Unterminated string") or stopped >= len(buffer) - _LONGEST_WORD:
                if len(buffer) - at > LONGEST:
                    raise _too_long(where, "a value") from error
                if more():
                    continue
            problem = _not_json(where, number, "JSON", error, "mend the file")
            if item >= 0:  # the beginning of the next item is unknown
                raise problem from error
            left_out.bad(problem)
            while (end := buffer.find("\n", at)) < 0:
                at = len(buffer)
                if not more():
                    return
            at = end
            continue
        if end == len(buffer) and not isinstance(value, dict | list | str) and more():
            continue  # a number may continue in the next chunk
        at = end
        if item >= 0:
            item, separated = number, False
        yield from _object(part, number, value, left_out, item >= 0)


def _too_long(where: str, what: str) -> BadInput:
    return BadInput(
        "files with endless rows", where, f"{where} begins {what} of more than {LONGEST >> 20} MiB; cut it into "
        "documents (is a quote left open, or a line end missing?)"
    )  # fmt: skip


def read_csv(part: Part, fields: tuple[str, ...], left_out: LeftOut) -> Iterator[Row]:
    """A table whose first line names the columns. They are separated by commas (tabs in ``.tsv``), unless one of
    ``fields`` is a column only with another separator."""
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
    text = part.text(newline="")
    first = text.readline(LONGEST)
    lines = itertools.chain([first], iter(lambda: text.readline(LONGEST), ""))
    usual = "\t" if part.suffix == ".tsv" else ","
    candidates = {mark: _cells(first, mark) for mark in (usual, ",", ";", "\t", "|")}
    wanted = {*fields}
    fitting = (mark for mark, cells in candidates.items() if wanted & {*cells})
    widest = max(candidates, key=lambda mark: len(candidates[mark])) if not fields else usual
    rows = csv.reader(lines, delimiter=next(fitting, widest), strict=True)
    columns: list[str] | None = None
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            where = f"{part.name}:{rows.line_num}"
            message = f"{where} is not a row of CSV ({error}); put texts in quotes and double the quotes in them"
            left_out.bad(BadInput("rows that are not CSV", where, message, number=rows.line_num, found=str(error)))
            continue
        if row is None:
            return
        if not row:  # a blank line
            continue
        if columns is None:
            columns = [name.strip() for name in row]
            if fields and not wanted & {*columns}:
                raise no_such_field(fields, columns, part.name)
            continue
        where = f"{part.name}:{rows.line_num}"
        if any(cell.strip() for cell in row[len(columns) :]):
            message = f"{where} has {len(row)} columns where the first line names {len(columns)}; put texts in quotes"
            left_out.bad(BadInput("rows with too many columns", where, message, number=rows.line_num))
            continue
        value = dict(itertools.zip_longest(columns, row[: len(columns)]))
        yield Row(part.name, rows.line_num, value, part.position())


def _cells(line: str, mark: str) -> list[str]:
    return [cell.strip() for row in csv.reader([line], delimiter=mark) for cell in row]


def read_parquet(part: Part, fields: tuple[str, ...], left_out: LeftOut) -> Iterator[Row]:
    """The rows of a Parquet file, with only the columns ``fields``, or all columns without ``fields``."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise EvenstepError(f"reading {printable(part.name)} needs pyarrow; pip install 'evenstep[train]'") from error
    try:
        # With a buffer and without pre-buffering column chunks are streamed instead of loaded whole.
        with parquet.ParquetFile(part.seekable(), buffer_size=1 << 20, pre_buffer=False) as file:
            names = file.schema_arrow.names
            columns = [name for name in dict.fromkeys(fields or names) if name in names]
            if fields and not columns:
                raise no_such_field(fields, names, part.name)
            total, done = max(file.metadata.num_rows, 1), 0
            size = part.file.stat().st_size if part.file else part.position()
            for batch in file.iter_batches(batch_size=256, columns=columns, use_threads=False):
                for value in batch.to_pylist():
                    done += 1
                    yield Row(part.name, done, value, size * done // total)
    except EvenstepError:
        raise
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: names or texts that are not UTF-8
        message = f"cannot read {part.name} as Parquet: {first_line(error)}; get the file again"
        raise BadInput(DAMAGED, part.name, message) from error


# -- fields ------------------------------------------------------------------------------------------------------------


def fields_of(text_field: str) -> tuple[str, ...]:
    """The names of an option ``text_field``, in their order; the first is the whole option, in case it is the name of
    a field with a comma.

    >>> fields_of("text,content")
    ('text,content', 'text', 'content')
    """
    names = [name.strip() for name in text_field.split(",")]
    return tuple(dict.fromkeys([text_field, *(name for name in names if name)]))


def text_of(row: dict[str, Any], fields: tuple[str, ...], where: str) -> str:
    """The text of the first of ``fields`` that ``row`` has; "" if all that it has are null. BadInput if it has none of
    them, or one that is not text."""
    there = [name for name in fields if name in row]
    if not there:
        raise no_such_field(fields, list(row), where)
    for name in there:
        if isinstance(row[name], str):
            return row[name]
        if row[name] is not None:
            raise BadInput(
                "rows whose field holds no text", where, f"{where}: field '{name}' holds {type(row[name]).__name__}, "
                "not text; choose another with data.text_field"
            )  # fmt: skip
    return ""


def no_such_field(fields: tuple[str, ...], there: list[str], where: str) -> BadInput:
    wanted = " or ".join(f"'{name}'" for name in (fields[1:] if "," in fields[0] else fields))
    names = ", ".join(str(name)[:40] for name in there[:20]) + (", ..." if len(there) > 20 else "")
    return BadInput(
        f"files or rows without a field {wanted}", where, f"{where} has no field {wanted}; it has {names or 'none'}: "
        "choose one with data.text_field"
    )  # fmt: skip


# -- files -------------------------------------------------------------------------------------------------------------

_TEXT = (".txt", ".text", ".md", ".rst", ".py", ".tex", ".html", ".c", ".h", ".cpp", ".js", ".rs", ".go", ".java")
ROWS: dict[str, RowReader] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}
KINDS = (*ROWS, *_TEXT)
"""Suffixes, in upper or lower case, of the files that are read from a directory or an archive, with or without a suffix
of compression. A directory is also searched for archives. A file that is named by a path or a glob may have any other
suffix and is then read as text."""


def is_known(name: str | os.PathLike[str]) -> bool:
    return suffixes(name)[0] in KINDS


def _guarded(items: Iterator[T], name: str, left_out: LeftOut) -> Iterator[T]:
    """``items`` up to the first error of the file from which they come, which ``left_out`` raises or counts."""
    try:
        yield from items
    except BadInput as error:
        left_out.bad(error)
    except UnicodeDecodeError as error:
        encoding = "UTF-8" if error.encoding.startswith("utf-8") else error.encoding.upper()
        zeros = error.object.count(0) / max(len(error.object), 1)
        guess = " (UTF-16 without a byte order mark?)" if zeros > 0.05 and encoding == "UTF-8" else ""
        message = f"{name} is not {encoding} text ({error.reason}){guess}; convert it to UTF-8 (iconv)"
        left_out.bad(BadInput(NOT_TEXT, name, message))
    except OSError as error:
        left_out.bad(not_readable(name, error))


def _any(name: str) -> bool:
    return True


def read_documents(
    path: Path, fields: tuple[str, ...], left_out: LeftOut, readable: Callable[[str], bool] = _any
) -> Iterator[Document]:
    """The documents of a file.

    Args:
        path: the file, of any kind that this module reads.
        fields: names of the field that holds the text of a row, see `fields_of`.
        left_out: decides what happens to bad input. If it skips, the documents before a damaged place are kept.
        readable: whether a member of an archive is to be read, by its name.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.jsonl"
    >>> _ = path.write_text('{"text": "one"}\\n{"text": "two"}\\n')
    >>> [text for text, _ in read_documents(path, ("text",), LeftOut())]
    ['one', 'two']
    """
    for part in _guarded(parts(path, lambda name: is_known(name) and readable(name), left_out), str(path), left_out):
        reader = ROWS.get(part.suffix)
        if reader is None:
            yield from _guarded(read_text(part, left_out), part.name, left_out)
            continue
        for row in _guarded(reader(part, fields, left_out), part.name, left_out):
            try:
                text = text_of(row.value, fields, row.where)
            except BadInput as error:
                left_out.bad(error)
            else:
                yield text, row.position


def read_rows(path: Path, left_out: LeftOut) -> Iterator[Row]:
    """The rows of a file of any kind except plain text. A file with an unknown suffix is read as JSON lines."""
    for part in _guarded(parts(path, lambda name: suffixes(name)[0] in ROWS, left_out), str(path), left_out):
        yield from _guarded(ROWS.get(part.suffix, read_jsonl)(part, (), left_out), part.name, left_out)
