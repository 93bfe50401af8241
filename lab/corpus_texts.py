"""The text files of an unpacked Debian package, and the text of an HTML page."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

Document = tuple[str, str]

PAGES = (".html", ".htm", ".xhtml")
PLAIN = (".txt", ".md", ".rst", ".text", ".org", ".adoc", ".pod", ".el", ".lisp", ".py", ".c", ".h", ".dict", ".dz", "")
LEFT_OUT = ("changelog", "copyright", "genindex", "search", "index-all", "allclasses", "changes", "news", "license")
"""Prefixes of file names that are lists and not prose."""


def texts(directory: Path) -> Iterator[Document]:
    """Name and text of every text file in ``directory``, sorted by name. Of a file in several languages, only the
    English one; of a text that exists as a page and as its source, the page, unless it is a stub."""
    files = {path.relative_to(directory): path for path in directory.rglob("*") if _is_wanted(path)}
    known = {*files, *(above for name in files for above in name.parents)}
    files = {name: path for name, path in files.items() if not _is_translation(name, known)}
    pages: dict[str, list[Path]] = {}
    plain: dict[str, list[Path]] = {}
    for path in files.values():
        (pages if _kind(path) in PAGES else plain).setdefault(_stem(path), []).append(path)
    for name, path in sorted(files.items()):
        is_page = _kind(path) in PAGES
        twins = pages.get(_stem(path), []), plain.get(_stem(path), [])
        stub = len(twins[0]) == len(twins[1]) == 1 and twins[0][0].stat().st_size < twins[1][0].stat().st_size / 2
        if all(twins) and is_page == stub:
            continue
        text = _read(path)
        if text is not None:
            yield name.as_posix(), page_text(text) if is_page else text


def _is_translation(name: Path, known: set[Path]) -> bool:
    """Whether an English file or directory is next to the file or to one of its parents: de/ next to en/, zh_TW/ next
    to en-US/, name.fr.html next to name.html or name.en.html."""
    for place in (name, *name.parents):
        is_language = _LANGUAGE.fullmatch(place.name) and not place.name.startswith("en")
        if is_language and any(place.with_name(english) in known for english in ENGLISH):
            return True
    stem, _, rest = name.name.partition(".")
    language, _, suffix = rest.partition(".")
    others = (f"{stem}.{suffix}", *(f"{stem}.{english}.{suffix}" for english in ENGLISH))
    is_named = bool(suffix and _LANGUAGE.fullmatch(language)) and not language.startswith("en")
    return is_named and any(name.with_name(other) in known for other in others)


ENGLISH = ("en", "en-US", "en_US", "en-GB", "en_GB", "en-us", "en-gb")
_LANGUAGE = re.compile("[a-z]{2}([-_][A-Za-z]{2})?")


def _is_wanted(path: Path) -> bool:
    if path.is_symlink() or not path.is_file() or "_sources" in path.parts:
        return False
    return not path.name.lower().startswith(LEFT_OUT) and _kind(path) in (*PAGES, *PLAIN)


def _stem(path: Path) -> str:
    return path.name.partition(".")[0]


def _kind(path: Path) -> str:
    """The suffix, ignoring .gz."""
    return Path(path.stem).suffix.lower() if path.suffix == ".gz" else path.suffix.lower()


def _read(path: Path) -> str | None:
    """The text of a file; None if it is not UTF-8, apart from a few bytes."""
    data = path.read_bytes()
    try:
        if data[:2] == b"\x1f\x8b":  # .gz, and dictzip's .dz
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        return None
    text = data.decode(errors="replace")
    if "\0" in text or text.count("\ufffd") * 1000 > len(text):
        return None
    return text.replace("\r\n", "\n").replace("\ufffd", "")


def page_text(page: str) -> str:
    """The text of an HTML page without scripts and navigation, its paragraphs separated by empty lines."""
    parser = _Page()
    parser.feed(page)
    parser.close()
    return parser.text()


class _Page(HTMLParser):
    SILENT = frozenset(("script", "style", "nav", "head", "footer", "svg", "form", "button"))
    BLOCKS = frozenset(
        (
            "p",
            "div",
            "pre",
            "table",
            "ul",
            "ol",
            "dl",
            "blockquote",
            "section",
            "hr",
            "h1",
            "h2",
            "h3",
            "h4",
            "h5",
            "h6",
        )
    )
    LINES = frozenset(("br", "li", "tr", "dt", "dd"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.silent: list[str] = []
        self.pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.SILENT:
            self.silent.append(tag)
        self._breaks(tag)
        self.pre += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag in self.silent:  # with the tags that were left open inside it
            del self.silent[self.silent.index(tag) :]
        self._breaks(tag)
        self.pre -= tag == "pre" and self.pre > 0

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(data if self.pre else _narrow(data))

    def _breaks(self, tag: str) -> None:
        if not self.silent and (tag in self.BLOCKS or tag in self.LINES):
            self.parts.append("\n\n" if tag in self.BLOCKS else "\n")

    def text(self) -> str:
        lines: list[str] = []
        for line in "".join(self.parts).split("\n"):
            line = line.rstrip()
            if line or (lines and lines[-1]):  # at most one empty line in succession
                lines.append(line)
        return "\n".join(lines).strip() + "\n"


def _narrow(data: str) -> str:
    """``data`` with every run of white space, also at its ends, as one space."""
    words = " ".join(data.split())
    if not words:
        return " " if data else ""
    return f"{' ' if data[0].isspace() else ''}{words}{' ' if data[-1].isspace() else ''}"
