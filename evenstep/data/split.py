"""Which part of a corpus is held out for validation."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_FILE = "split.json"
_KEPT = 1024  # documents remembered: those of the smallest draws
_SHORT = 16  # bytes of a document that is not cut in two where there are others


def place(content: bytes) -> tuple[float, float]:
    """Two numbers in [0, 1) drawn from the text alone. A document is held out when the first is below ``val_fraction``:
    it never changes sides as the corpus grows, and its duplicates follow it. The second thins the BPE's training
    sample."""
    digest = hashlib.blake2b(content, digest_size=16).digest()
    side, sample = (int.from_bytes(half, "big") >> 11 for half in (digest[:8], digest[8:]))
    return side / 2**53, sample / 2**53


@dataclass(frozen=True)
class Split:
    """Documents whose draw lies under ``below`` are held out, and of one drawn at ``below`` itself the last ``tail``
    bytes, about."""

    below: float
    tail: int = 0

    def sides(self, text: str, content: bytes, draw: float) -> Iterator[tuple[str, str]]:
        """("train" or "val", text) of the one or two parts of a document, the held-out part first, so that reading may
        stop after what is trained on."""
        if draw == self.below and self.tail and len(text) > 1:
            at = self._cut(text, max(1, round(len(text) * self.tail / len(content))))
            yield "val", text[at:]
            yield "train", text[:at]
        else:
            yield ("val" if draw < self.below else "train"), text

    @staticmethod
    def _cut(text: str, tail: int) -> int:
        """Where the last ``tail`` characters begin: at a line, else before a space, if one is near; neither side
        blank, if that can be."""
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
        """None where there is none, or a damaged one."""
        try:
            found = json.loads((directory / _FILE).read_text(encoding="utf-8"))
            return cls(float(found["below"]), int(found["tail"]))
        except (OSError, ValueError, TypeError, KeyError):
            return None


@dataclass
class Draws:
    """The sizes of the documents met, by their draws: from these a split is made where the hash makes a poor one."""

    documents: int = 0
    bytes: int = 0
    held_out: int = 0
    _sizes: dict[float, tuple[int, int]] = field(default_factory=dict)  # draw -> bytes and number of its copies
    _limit: float = math.inf

    def add(self, draw: float, size: int, held_out: int) -> None:
        """A document of ``size`` bytes, of which ``held_out`` are."""
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
        """Does validation have a tenth of its share at least, and training half of its own?"""
        wanted, left = fraction * self.bytes, self.bytes - self.held_out
        return self.held_out >= wanted / 10 and left > 0 and left >= (self.bytes - wanted) / 2

    def split(self, fraction: float) -> Split:
        """Documents in the order of their draws until they are ``fraction`` of all bytes; of one that is much longer
        than what is missing, its tail. The order of the corpus has no part in it, and copies go together."""
        missing = wanted = fraction * self.bytes
        ordered = sorted(self._sizes.items())
        for number, (draw, (size, copies)) in enumerate(ordered, 1):
            if missing <= wanted / 2:  # near enough
                return Split(draw)
            if size > max(2 * missing, _SHORT * copies) or number == len(ordered):
                return Split(draw, max(1, math.ceil(missing / copies)))
            missing -= size
        return Split(fraction)
