"""The table of docs/conformance.md: what each check says of each optimizer."""

from collections.abc import Sequence
from pathlib import Path

import conformance_groups  # noqa: F401  (entering the checks into the table)
import conformance_numbers  # noqa: F401
import conformance_saving  # noqa: F401
import conformance_steps  # noqa: F401
from conformance_subjects import CHECKS, OTHERS, OURS, Check, Subject, outcome

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
SIGNS = {"passes": "yes", "refuses": "says no", "base": "as AdamW", "fails": "**fails**"}
HEADING = "| Check |"

INTRODUCTION = """# Conformance

What PyTorch, its trainers and its users do to an optimizer, and how optimizers take it. Every row is a function in
`tests/support/conformance_*.py`, run on each optimizer with resets every 7 steps (where it has any); ours are
tests of the suite besides. Written by

    python benchmarks/conformance.py --write docs/conformance.md

* **yes**: the promise of the row holds.
* **says no**: what is asked for is refused with an error that explains, before anything changes.
* **fails**: it crashes, is wrong, or is accepted and ignored.
* **as AdamW**: `stabilize` leaves state and arithmetic to the optimizer behind it, here torch's AdamW, which fails
  this row by itself.
"""


def verdict(entry: Check, subject: Subject) -> tuple[str, str]:
    """As `outcome`, and "base" where a wrapper fails at what the optimizer behind it fails at alone."""
    found, said = outcome(entry, subject)
    if found == "fails" and subject.base is not None and outcome(entry, subject.base)[0] == "fails":
        return "base", said
    return found, said


def titles() -> list[str]:
    return [entry.title for entry in CHECKS]


def cells(page: str) -> dict[str, dict[str, str]]:
    """Title of a check -> name of an optimizer -> cell, as the page has them."""
    names: list[str] = []
    found: dict[str, dict[str, str]] = {}
    for line in page.splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith(HEADING):
            names = row[1:]
        elif names and line.startswith("|") and len(row) == len(names) + 1 and not row[0].startswith(("---", "**")):
            found[row[0]] = dict(zip(names, row[1:], strict=True))
    return found


def page(versions: str, subjects: Sequence[Subject] = OTHERS + OURS) -> str:
    """The whole page. ``versions`` says what was measured, and when."""
    verdicts = {s.name: [verdict(entry, s)[0] for entry in CHECKS] for s in subjects}
    lines = [INTRODUCTION, versions, ""]
    head = HEADING + "".join(f" {s.name} |" for s in subjects)
    rule = "|---|" + "---|" * len(subjects)
    for area in dict.fromkeys(entry.area for entry in CHECKS):
        lines += [f"## {area}", "", head, rule]
        for i, entry in enumerate(CHECKS):
            if entry.area == area:
                lines.append(f"| {entry.title} |" + "".join(f" {SIGNS[verdicts[s.name][i]]} |" for s in subjects))
        lines.append("")
    reference = verdicts[OTHERS[0].name]
    lines += [f"## Counts, of {len(CHECKS)}", "", head, rule]
    for name, sign in SIGNS.items():
        lines.append(f"| **{sign.strip('*')}** |" + "".join(f" {verdicts[s.name].count(name)} |" for s in subjects))
    worse = {
        s.name: sum(a == "fails" and b != "fails" for a, b in zip(verdicts[s.name], reference, strict=True))
        for s in subjects
    }
    lines.append("| **fails where torch's AdamW does not** |" + "".join(f" {worse[s.name]} |" for s in subjects))
    return "\n".join(lines) + "\n"
