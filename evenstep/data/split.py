"""The split of a corpus into training and validation text.

The side of a document is a hash of its text: it does not change as the corpus grows, and duplicates are on one side. In
a corpus of few documents the hash may leave one side without its share; `Draws` then derives a `Split` from the sizes
of the documents.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_FILE = "split.json"
_KEPT = 1024  # number of documents whose sizes are kept: those with the smallest draws
_SHORT = 16  # bytes; a shorter document is not cut in two if there are others


def place(content: bytes) -> tuple[float, float]:
    """Two numbers in [0, 1), hashed from the text. A document is held out if the first, its draw, is below
    ``val_fraction``. The second selects the sample on which the BPE is trained.

    >>> place(b"abc") == place(b"abc")
    True
    """
    digest = hashlib.blake2b(content, digest_size=16).digest()
    side, sample = (int.from_bytes(half, "big") >> 11 for half in (digest[:8], digest[8:]))
    return side / 2**53, sample / 2**53


@dataclass(frozen=True)
class Split:
    """Documents with a draw below ``below`` are held out, and about the last ``tail`` bytes of a document whose draw
    equals ``below``."""

    below: float
    tail: int = 0

    def sides(self, text: str, content: bytes, draw: float) -> Iterator[tuple[str, str]]:
        """The one or two parts of a document, as ("train" or "val", text). The held-out part comes first, so that
        reading may stop after the part for training."""
        if draw == self.below and self.tail and len(text) > 1:
            at = self._cut(text, max(1, round(len(text) * self.tail / len(content))))
            yield "val", text[at:]
            yield "train", text[:at]
        else:
            yield ("val" if draw < self.below else "train"), text

    @staticmethod
    def _cut(text: str, tail: int) -> int:
        """The index at which about the last ``tail`` characters begin: the start of a line or, failing that, a space
        nearby. Neither part is blank if that is possible."""
        at = max(1, len(text) - tail)
        nearest = max(1, at - tail)
        line, space = text.rfind("\n", nearest, at), text.rfind(" ", nearest, at)
        for cut in (line + 1, space, at):
            if cut > nearest and text[:cut].strip() and text[cut:].strip():
                return cut
        return at

    def save(self, directory: Path) -> None:
        (directory / _FILE).write_text(json.dumps({"below": self.below, "tail": self.tail}) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> "Split | None":
        """The split that `save` wrote; None if there is none, or a damaged one."""
        try:
            found = json.loads((directory / _FILE).read_text(encoding="utf-8"))
            return cls(float(found["below"]), int(found["tail"]))
        except (OSError, ValueError, TypeError, KeyError):
            return None


@dataclass
class Draws:
    """Sizes of the documents read so far, by their draws, in bounded memory."""

    documents: int = 0
    bytes: int = 0
    held_out: int = 0
    _sizes: dict[float, tuple[int, int]] = field(default_factory=dict)  # draw -> bytes and number of its copies
    _limit: float = math.inf

    def add(self, draw: float, size: int, held_out: int) -> None:
        """Add a document of ``size`` bytes, of which ``held_out`` bytes are for validation."""
        self.documents += 1
        self.bytes += size
        self.held_out += held_out
        if draw <= self._limit:
            total, copies = self._sizes.get(draw, (0, 0))
            self._sizes[draw] = (total + size, copies + 1)
            if len(self._sizes) > 2 * _KEPT:
                self._sizes = dict(sorted(self._sizes.items())[:_KEPT])
                self._limit = max(self._sizes)

    def is_sane(self, fraction: float) -> bool:
        """Whether validation has at least a tenth of its share, and training at least half of its own."""
        wanted, left = fraction * self.bytes, self.bytes - self.held_out
        return self.held_out >= wanted / 10 and left > 0 and left >= (self.bytes - wanted) / 2

    def split(self, fraction: float) -> Split:
        """A split that holds out ``fraction`` of all bytes: documents in the order of their draws, and the tail of one
        that is much longer than the bytes still missing. It does not depend on the order of the corpus, and keeps
        duplicates together."""
        missing = wanted = fraction * self.bytes
        ordered = sorted(self._sizes.items())
        for number, (draw, (size, copies)) in enumerate(ordered, 1):
            if missing <= wanted / 2:  # close enough
                return Split(draw)
            if size > max(2 * missing, _SHORT * copies) or number == len(ordered):
                return Split(draw, max(1, math.ceil(missing / copies)))
            missing -= size
        return Split(fraction)
