"""A table file small enough for tests, and outcomes that nobody had to train."""

from pathlib import Path

from evenstep.compare.cells import FINISHED, Outcome
from evenstep.compare.grid import Plan
from evenstep.compare.table import load_table

TABLE = """
title = "a test"
paper = "none"
reference = "adam/high"

[grid]
rows = ["adam", "spam"]
precisions = ["high"]
sizes = ["tiny"]

[row.adam]
label = "Adam"
set.optim.name = "adam"

[row.spam]
factor = 0.5
set.optim = { name = "spam", reset_interval = 100 }

[precision.high]

[published.60m.high]
adam = 34.09

[sweep]
rates = [1e-3, 2e-3, 4e-3, 8e-3]
tokens = 1000
extend = 1

[final]
tokens = 4000
seeds = [0, 1]

[[claim]]
text = "SPAM beats Adam"
rule = "lower"
better = "spam/high"
than = "adam/high"
paper = "30.46 against 34.09"

[scale.small]
[scale.other.final]
seeds = [7]
"""


def write_table(directory: Path, text: str = TABLE, name: str = "mine.toml") -> Path:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path


def plan_of(directory: Path, text: str = TABLE, scale: str = "small") -> Plan:
    return Plan(load_table(write_table(directory, text), scale))


def summary(loss: float, **more) -> dict:
    facts = {"val_loss": loss, "tokens": 4000, "seconds": 2.0, "tokens_per_second": 2000.0, "peak_memory": 2**20}
    facts |= {"state_bytes": 800, "model_bytes": 400, "parameters": 100, "commit": "c" * 40, "versions": {"torch": "2"}}
    return facts | {"hardware": {"device": "cpu", "cpu": "a CPU"}} | more


def ended(loss: float, **more) -> Outcome:
    curve = [(1000, loss + 1.0), (2000, loss + 0.5), (4000, loss)]
    return Outcome(FINISHED, loss, "", 4000, summary(loss, **more), curve)


def settled(plan: Plan, loss, **more) -> dict[str, Outcome]:
    """Outcomes of everything that a plan comes to want, where ``loss(cell)`` is what a run ends with."""
    outcomes: dict[str, Outcome] = {}
    while True:
        waiting = [cell for _, cell in plan.wanted(outcomes) if cell.name not in outcomes]
        if not waiting:
            return outcomes
        outcomes |= {cell.name: ended(loss(cell), **more) for cell in waiting}
