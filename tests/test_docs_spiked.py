"""The numbers of docs/spiked.md are the stored ones of the stability suite."""

import json
import re
from collections import defaultdict
from statistics import mean

from docs_support import ROOT

from evenstep.stability.tasks import TASKS

PAGE = ROOT / "docs" / "spiked.md"
STORE = ROOT / "benchmarks" / "results" / "stability" / "cells.jsonl"
TABLE = re.compile(r"^\[All remedies\]\(stability\.md#(?P<anchor>[\w-]+)\)\.\n\n(?P<rows>(?:\|.*\n)+)", re.M)
NUMBER = re.compile(r"^(?P<loss>\d\.\d\d|dead)(?: \((?P<damage>[+-]\d\.\d\d)\))?(?P<lost>, \d/\d lost)?$")


def stored():
    """(task, variant) -> remedy -> seed -> final loss, None for weights that are not finite."""
    losses = defaultdict(lambda: defaultdict(dict))
    for line in STORE.read_text().splitlines():
        summary = json.loads(line)["summary"]
        for variant, trials in summary.get("trials", {}).items():
            key = (summary["setting"]["task"], variant)
            losses[key][summary["setting"]["remedy"]["name"]].update({one["seed"]: one["loss"] for one in trials})
    return losses


def anchor(title):
    return re.sub(r"[^\w]+", "-", title.lower()).strip("-")


def test_every_number_is_the_stored_one():
    losses, tasks = stored(), {anchor(task.title): task.name for task in TASKS}
    generated = (ROOT / "docs" / "stability.md").read_text()
    checked = 0
    for found in TABLE.finditer(PAGE.read_text()):
        task = tasks[found["anchor"]]
        head, _, *rows = ([cell.strip() for cell in row.strip("|\n ").split("|")] for row in found["rows"].splitlines())
        assert head[-1] == "seeds"
        for remedy, *cells, seeds in rows:
            for variant, cell in zip(head[1:-1], cells, strict=True):
                by_seed = losses[task, variant][remedy]
                where = (task, variant, remedy, cell)
                assert len(by_seed) == int(seeds), where
                shown = NUMBER.match(cell)
                dead = None in by_seed.values()
                assert shown["loss"] == ("dead" if dead else f"{mean(by_seed.values()):.2f}"), where
                if shown["damage"]:
                    calm = losses["control", "tuned rate"][remedy]
                    assert shown["damage"] == f"{mean(by_seed[s] - calm[s] for s in by_seed):+.2f}", where
                # The generated page computes which runs are lost
                assert re.search(rf"^\| {re.escape(remedy)} \|.* {re.escape(cell)} \|", generated, re.M), where
                checked += 1
    assert checked == sum(len(NUMBER.findall(cell.strip())) for cell in re.split(r"[|\n]", PAGE.read_text()))
