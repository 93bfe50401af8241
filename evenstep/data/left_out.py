"""Input that cannot be used: an error, or left out and counted."""

from typing import Any

from evenstep.errors import EvenstepError

ON_BAD = ("stop", "skip")


def printable(name: object) -> str:
    """A file's or a field's name as part of one line of a message."""
    return "".join(c if c.isprintable() else "?" for c in str(name))


class BadInput(EvenstepError):
    """A file, an archive member or a row that cannot be used. ``reason`` is the kind of things it belongs to, such as
    "files that are not text", ``where`` its place, ``number`` its line (or its number in a JSON list), ``found`` what
    the parser said."""

    def __init__(self, reason: str, where: object, message: str, *, number: int = 0, found: str = ""):
        super().__init__(printable(message))
        self.reason, self.where, self.number, self.found = reason, printable(where), number, found
        self.advised = False


class LeftOut:
    """What one pass over a corpus left out, by reason. ``on_bad`` "stop" raises for bad input, "skip" counts it.

    ``advice`` is appended to the errors, where the caller has an option that skips.
    """

    def __init__(self, on_bad: str = "stop", advice: str = "; data.on_bad skip leaves it out"):
        self.stops, self._advice = on_bad == "stop", advice
        self._counts: dict[str, tuple[int, str]] = {}

    def bad(self, error: BadInput) -> None:
        """Raise ``error``, or count what it tells of."""
        if not self.stops:
            self.add(error.reason, error.where)
            return
        if error.advised or not self._advice:
            raise error
        told = BadInput(error.reason, error.where, f"{error}{self._advice}", number=error.number, found=error.found)
        told.advised = True
        raise told from error.__cause__

    def add(self, reason: str, where: object, count: int = 1) -> None:
        """Count what is left out whatever ``on_bad`` says, such as the pictures of a folder of text."""
        before, first = self._counts.get(reason, (0, ""))
        self._counts[reason] = (before + count, first or printable(where))

    def include(self, other: "LeftOut") -> None:
        for entry in other.entries():
            self.add(entry["what"], entry["first"], entry["count"])

    def entries(self) -> list[dict[str, Any]]:
        """As the manifest has it: ``{"what", "count", "first"}`` each."""
        return [{"what": what, "count": count, "first": first} for what, (count, first) in self._counts.items()]

    def __str__(self) -> str:
        return "; ".join(shown(entry) for entry in self.entries())


def shown(entry: dict[str, Any]) -> str:
    """One entry of ``LeftOut.entries()`` for people."""
    place = "first: " if entry["count"] > 1 else ""
    return f"{entry['count']:,} {entry['what']} ({place}{entry['first']})"
