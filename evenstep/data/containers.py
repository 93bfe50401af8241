"""Files as streams of bytes: plain files, compressed files, and the members of a zip archive.

Nothing is unpacked to the disk except Parquet, whose reader starts at the end of the file.
"""

import gzip
import io
import os
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from evenstep.data.left_out import BadInput, LeftOut, printable
from evenstep.errors import EvenstepError, first_line

ARCHIVE = ".zip"
_BUFFER = 1 << 16
_ZSTD_STEP = 1 << 10  # compressed bytes for each call: 4 bytes may expand to 128 KiB, so at most 32 MiB of output

BOMB_BYTES, BOMB_RATIO = 100_000_000, 250
"""A compressed file whose content exceeds both limits, in bytes and as a multiple of its size, is treated as a
decompression bomb: text compresses to a third or a tenth, logs to a hundredth."""

_MAGIC = (
    (0, b"\x1f\x8b\x08", "gzip", ".gz"), (0, b"BZh", "bzip2", ".bz2"), (0, b"\xfd7zXZ\x00", "xz", ".xz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd", ".zst"), (0, b"PK\x03\x04", "a zip archive", ".zip"),
    (0, b"PK\x05\x06", "a zip archive", ".zip"), (0, b"PAR1", "Parquet", ".parquet"),
    (257, b"ustar", "a tar archive", ""), (0, b"%PDF-", "PDF", ""),
    (0, b"\x89PNG", "a PNG picture", ""), (0, b"\xff\xd8\xff", "a JPEG picture", ""),
    (0, b"SQLite format 3\x00", "an SQLite database", ""), (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", ""),
    (0, b"Rar!\x1a\x07", "a rar archive", ""), (0, b"\x7fELF", "a program", ""),
)  # fmt: skip
_BOMS = (
    (b"\xff\xfe\x00\x00", "utf-32"), (b"\x00\x00\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A file, or a member of an archive.

    Attributes:
        name: its path, for messages.
        suffix: the suffix that decides how it is read.
        stream: its bytes, decompressed.
        position: returns the number of bytes of the file on the disk that have been read.
        file: the file on the disk, if its bytes are those of ``stream``.
    """

    name: str
    suffix: str
    stream: io.BufferedReader
    position: Callable[[], int]
    file: Path | None = None

    @cached_property
    def encoding(self) -> str:
        """The encoding that the byte order mark names, else UTF-8. BadInput for content that is not text."""
        head = self.stream.peek(512)[:512]
        for mark, encoding in _BOMS:
            if head.startswith(mark):
                return encoding
        for offset, magic, kind, suffix in _MAGIC:
            if head[offset:].startswith(magic) and (magic != b"BZh" or head[4:10] == b"1AY&SY"):
                do = f"give it the suffix {suffix}" if suffix else "take the text out of it"
                raise BadInput(NOT_TEXT, self.name, f"{self.name} is {kind} by its content, not text; {do}")
        if head.count(0) * 20 > len(head):
            raise not_text(self.name, head.count(0) / len(head))
        return "utf-8-sig"

    def text(self, newline: str | None = None, errors: str = "strict") -> io.TextIOWrapper:
        return io.TextIOWrapper(self.stream, encoding=self.encoding, errors=errors, newline=newline)

    def seekable(self) -> Path | BinaryIO:
        """The bytes for a reader that seeks: the file on the disk, or a temporary copy."""
        if self.file is not None:
            return self.file
        copy: Any = tempfile.TemporaryFile()  # noqa: SIM115  # the reader closes it
        while chunk := self.stream.read(_BUFFER):
            copy.write(chunk)
        copy.seek(0)
        return copy


NOT_TEXT, DAMAGED = "files that are not text", "files that are damaged or cannot be read"


def not_text(name: str, zeros: float) -> BadInput:
    """The error for content that is not text; ``zeros`` is the share of null characters in it."""
    what = "UTF-16 without a byte order mark, or binary data" if zeros > 0.1 else "binary data"
    return BadInput(
        NOT_TEXT, name, f"{name} looks like {what}, not UTF-8 text; convert it (iconv -f utf-16le -t utf-8)"
    )  # fmt: skip


def not_readable(name: object, error: BaseException) -> BadInput:
    """The error for a file that raised ``error`` when it was opened or read."""
    why = getattr(error, "strerror", None)
    do = "check the file" if why else "it is damaged or cut short: get it again"
    return BadInput(DAMAGED, name, f"cannot read {name}: {why or first_line(error)}; {do}")


def suffixes(name: str | os.PathLike[str]) -> tuple[str, list[str]]:
    """The suffix that decides how a file is read, and the suffixes of its compression, the outermost first.

    >>> suffixes("A.JSONL.GZ")
    ('.jsonl', ['.gz'])
    """
    path, around = PurePosixPath(os.fspath(name)), []
    while (suffix := path.suffix.lower()) in COMPRESSION:
        around.append(suffix)
        path = PurePosixPath(path.stem)
    return suffix, around


def parts(path: Path, readable: Callable[[str], bool], left_out: LeftOut) -> Iterator[Part]:
    """The parts of a file: the file itself, or the members of an archive whose names are ``readable``.

    A part must be read before the next one is requested. BadInput or OSError for a file that cannot be opened.
    """
    if path.stat().st_size == 0:
        left_out.add("empty files", path)
        return
    with path.open("rb") as raw:
        suffix, around = suffixes(path)
        if suffix == ARCHIVE and not around:
            yield from _members(path, raw, readable, left_out)
        else:
            stream = _decompressed(raw, around, str(path), raw.tell)
            yield Part(str(path), suffix, stream, raw.tell, None if around else path)


def _members(path: Path, raw: BinaryIO, readable: Callable[[str], bool], left_out: LeftOut) -> Iterator[Part]:
    try:
        archive = zipfile.ZipFile(raw)
    except Exception as error:  # BadZipFile, and others that a damaged directory causes in the parser
        raise not_readable(path, error) from error
    members = archive.infolist()
    size = sum(info.file_size for info in members)
    if size > BOMB_BYTES and size > BOMB_RATIO * path.stat().st_size:
        raise _bomb(str(path), size)
    for info in members:
        if not info.filename:  # of a damaged directory; `is_dir` would fail on it
            left_out.bad(BadInput(DAMAGED, path, f"{path} has a member without a name; pack the archive again"))
            continue
        name = f"{path}/{info.filename}"
        if info.is_dir() or not _is_wanted(info, name, readable, left_out):
            continue
        if problem := _refusal(info, name):
            left_out.bad(problem)
            continue
        suffix, around = suffixes(info.filename)
        try:
            member = archive.open(info)
        except Exception as error:  # a damaged header, or a compression that zipfile does not support
            left_out.bad(not_readable(name, error))
            continue
        with member:
            yield Part(name, suffix, _decompressed(member, around, name, member.tell, True), raw.tell)


def _is_wanted(info: zipfile.ZipInfo, name: str, readable: Callable[[str], bool], left_out: LeftOut) -> bool:
    """Whether a member is to be read. Members with unsafe names are: `_refusal` makes an error of them."""
    pieces = [piece for piece in info.filename.split("/") if piece not in (".", "..")]
    if any(piece.startswith(".") or piece == "__MACOSX" for piece in pieces):
        left_out.add("hidden files and folders", name)
    elif stat.S_ISLNK(info.external_attr >> 16):
        left_out.add("links in archives", name)
    elif not info.file_size:
        left_out.add("empty files", name)
    elif suffixes(info.filename)[0] == ARCHIVE or readable(info.filename):
        return True
    else:
        left_out.add("files of other kinds", name)
    return False


def _refusal(info: zipfile.ZipInfo, name: str) -> BadInput | None:
    """The error for a member of an archive that is not read, None for all others."""
    pieces = info.filename.replace("\\", "/").split("/")
    if ".." in pieces or not pieces[0] or ":" in pieces[0]:
        found = "has a name that leads out of the archive; do not trust the archive, or repack it"
        return BadInput("archive members with unsafe names", name, f"{name} {found}")
    if info.flag_bits & 0x1:
        return BadInput("encrypted archive members", name, f"{name} is encrypted; unpack the archive with its password")
    if suffixes(info.filename)[0] == ARCHIVE:
        return BadInput("archives in archives", name, f"{name} is an archive in an archive; unpack it")
    return None


def _bomb(name: str, size: int) -> BadInput:
    return BadInput(
        "files that grow without measure", name, f"{name} grows from its compressed size to {size / 1e6:,.0f} MB, more "
        f"than {BOMB_RATIO} times: text does not; unpack it yourself if it is to be trusted"
    )  # fmt: skip


def _decompressed(
    raw: Any, around: list[str], name: str, position: Callable[[], int], again: bool = False
) -> io.BufferedReader:
    """``raw`` without the compression of the suffixes ``around``.

    ``again`` says that ``raw`` comes from a decompressor itself (a member of an archive), whose errors must be
    converted too.
    """
    if not around and not again:
        return raw
    stream = raw
    for suffix in around:
        stream = COMPRESSION[suffix](stream, name)
    return io.BufferedReader(_Decompressed(stream, name, position), _BUFFER)


class _Decompressed(io.RawIOBase):
    """Reads from a decompressor. Its errors, of a dozen types, become BadInput, and so does output without bound."""

    def __init__(self, stream: Any, name: str, consumed: Callable[[], int]):
        self._stream, self._name, self._consumed, self._size = stream, name, consumed, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except Exception as error:  # each library raises errors of its own
            raise not_readable(self._name, error) from error
        self._size += len(data)
        if self._size > BOMB_BYTES and self._size > BOMB_RATIO * max(self._consumed(), 1):
            raise _bomb(self._name, self._size)
        buffer[: len(data)] = data
        return len(data)


def _gzip(stream: Any, name: str) -> Any:
    return gzip.GzipFile(fileobj=stream, mode="rb")  # else that of the stream, which another GzipFile has as a number


def _bz2(stream: Any, name: str) -> Any:
    try:
        import bz2
    except ImportError as error:  # Python was built without it
        raise _missing(name, "the bz2 module, which this Python lacks; unpack the file") from error
    return bz2.BZ2File(stream)


def _xz(stream: Any, name: str) -> Any:
    try:
        import lzma
    except ImportError as error:
        raise _missing(name, "the lzma module, which this Python lacks; unpack the file") from error
    return lzma.LZMAFile(stream)


def _zstd(stream: Any, name: str) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise _missing(name, "the zstandard package; pip install 'evenstep[train]' (or zstandard)") from error
    return _Zstd(stream, zstandard.ZstdDecompressor())


def _missing(name: str, what: str) -> EvenstepError:
    return EvenstepError(f"reading {printable(name)} needs {what}")


class _Zstd:
    """Reads the frames of a zstd file. The package's own reader does not detect a truncated file."""

    def __init__(self, stream: Any, decompressor: Any):
        self._stream, self._decompressor = stream, decompressor
        self._frame: Any = None
        self._input, self._output = b"", memoryview(b"")

    def read(self, size: int) -> memoryview:
        while not self._output:
            data, self._input = self._input or self._stream.read(_ZSTD_STEP), b""
            if not data:
                if self._frame is not None:
                    raise EOFError("the compressed file ends in the middle of a frame")
                break
            self._frame = self._frame or self._decompressor.decompressobj()
            self._output = memoryview(self._frame.decompress(data))
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        result, self._output = self._output[:size], self._output[size:]
        return result


COMPRESSION: dict[str, Callable[[Any, str], Any]] = {
    ".gz": _gzip, ".bz2": _bz2, ".xz": _xz, ".lzma": _xz, ".zst": _zstd, ".zstd": _zstd
}  # fmt: skip
