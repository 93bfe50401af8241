"""Input that cannot be used: an error, or left out of the corpus and counted."""

from typing import Any

from evenstep.errors import EvenstepError

ON_BAD = ("stop", "skip")
"""Values of the option ``data.on_bad``."""


def printable(name: object) -> str:
    """The name of a file or a field, made safe for a message of one line."""
    return "".join(c if c.isprintable() else "?" for c in str(name))


class BadInput(EvenstepError):
    """A file, an archive member or a row that cannot be used.

    Args:
        reason: its category in the plural, such as "files that are not text".
        where: the path, with the line for a row.
        message: the text of the error.
        number: its line, or its index in a JSON list.
        found: the message of the parser.
    """

    def __init__(self, reason: str, where: object, message: str, *, number: int = 0, found: str = ""):
        super().__init__(printable(message))
        self.reason, self.where, self.number, self.found = reason, printable(where), number, found
        self.advised = False


class LeftOut:
    """Counts what one pass over a corpus leaves out, by reason.

    Args:
        on_bad: "stop" raises an error for bad input, "skip" counts it.
        advice: appended to errors, where the caller has an option that skips bad input.

    >>> left_out = LeftOut("skip")
    >>> left_out.bad(BadInput("files that are not text", "a.bin", "a.bin is not text"))
    >>> str(left_out)
    '1 files that are not text (a.bin)'
    """

    def __init__(self, on_bad: str = "stop", advice: str = "; --data.on_bad skip leaves it out"):
        self.stops, self._advice = on_bad == "stop", advice
        self._counts: dict[str, tuple[int, str]] = {}

    def bad(self, error: BadInput) -> None:
        """Raise ``error``, or count the input that it describes."""
        if not self.stops:
            self.add(error.reason, error.where)
            return
        if error.advised or not self._advice:
            raise error
        advised = BadInput(error.reason, error.where, f"{error}{self._advice}", number=error.number, found=error.found)
        advised.advised = True
        raise advised from error.__cause__

    def add(self, reason: str, where: object, count: int = 1) -> None:
        """Count input that is left out for either value of ``on_bad``, such as the images in a folder of text."""
        before, first = self._counts.get(reason, (0, ""))
        self._counts[reason] = (before + count, first or printable(where))

    def include(self, other: "LeftOut") -> None:
        """Add the counts of ``other``."""
        for entry in other.entries():
            self.add(entry["what"], entry["first"], entry["count"])

    def entries(self) -> list[dict[str, Any]]:
        """The counts as the manifest lists them: ``{"what": reason, "count": int, "first": path}``."""
        return [{"what": what, "count": count, "first": first} for what, (count, first) in self._counts.items()]

    def __str__(self) -> str:
        return "; ".join(shown(entry) for entry in self.entries())


def shown(entry: dict[str, Any]) -> str:
    """One entry of ``LeftOut.entries()`` as text."""
    place = "first: " if entry["count"] > 1 else ""
    return f"{entry['count']:,} {entry['what']} ({place}{entry['first']})"
