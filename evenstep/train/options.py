"""How an option is written down: a dataclass field with its help, range and place in a resume, in a section that
checks it.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from evenstep.train.checks import checked

MOST_STEPS = 10**12
MOST_TOKENS = 10**18
MOST_SEQUENCES = 2**20
"""The largest values of options that count steps, tokens, and sequences of a batch (and tokens of a sequence): beyond
what anybody trains, and small enough for every number that is made of them. Whether memory holds them is another
question (`evenstep.train.setup.check_memory`)."""

Resume = Literal["fixed", "rounding", "free"]
"""May an option change on resume? fixed: no. rounding: yes, the last bits of the losses change. free: yes, nothing
else moves."""


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    form: str | None = None,
    count: bool = False,
    joined: bool = False,
    resume: Resume = "fixed",
) -> Any:
    """A dataclass field with its help; ``low``/``high`` are allowed values, ``above`` is not; ``count`` accepts 20K,
    100M, 1.5B. ``form`` is a regular expression of texts that are allowed beside the choices. ``joined``: given several
    times, the texts are joined by commas."""
    metadata = {
        "help": help, "low": low, "above": above, "high": high, "choices": choices, "form": form, "count": count,
        "joined": joined, "resume": resume,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Section:
    """Checks every field's type and range when built, from Python as from a file."""

    TITLE: ClassVar[str] = ""
    SECTION: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            if f.metadata:
                key = f"{self.SECTION}.{f.name}" if self.SECTION else f.name
                object.__setattr__(self, f.name, checked(key, getattr(self, f.name), hints[f.name], f.metadata))
