"""The stored results of the studies, from one JSON file a run to the one store, DIR/cells.jsonl. Done once, in 2026.

python tools/convert_results.py REV convert     write the stores from the old files of git revision REV
python tools/convert_results.py REV check       is every number of REV in the stores, and on the pages?
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
STORES = ("rl", "forecast", "finetune")
LOWBIT = "benchmarks/results/2026-11-25-lowbit.json"
PAGES = ("results-rl", "results-forecast", "results-finetune", "results-lowbit", "results")


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def old(revision: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Lines by store and name, with the old content of each file as their summary."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for store in STORES:
        folder = f"benchmarks/results/{store}/"
        lines = found.setdefault(store, {})
        for path in git("ls-tree", "-r", "--name-only", revision, folder).splitlines():
            if path.endswith(".json"):
                name = path.removeprefix(folder).removesuffix(".json")
                lines[name] = line(name, json.loads(git("show", f"{revision}:{path}")))
    document = json.loads(git("show", f"{revision}:{LOWBIT}"))
    shared = {key: document[key] for key in ("parameters", "hardware", "versions")}
    shared["commit"] = ", ".join(document["commits"])
    found["lowbit"] = {}
    for row in document["rows"]:
        measured = {key: row.pop(key) for key in ("val_loss", "tokens_per_second")}
        setting = row | {"model": document["model"]} | document["setting"]
        words = (row["optimizer"], row["precision"], f"lr{row['lr']:g}", f"seed{row['seed']}", str(row["tokens"]))
        name = re.sub(r"[^\w.-]+", "-", "-".join(words))
        found["lowbit"][name] = line(name, {"setting": setting, **measured, **shared})
    return found


def line(name: str, run: dict[str, Any]) -> dict[str, Any]:
    loss = run.get("val_loss")
    facts = {"name": name, "status": "finished", "loss": loss, "why": "", "tokens": run.get("tokens", 1)}
    return {**facts, "summary": run, "curve": []}


def convert(revision: str) -> None:
    for store, lines in old(revision).items():
        path = ROOT / "benchmarks" / "results" / store / "cells.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in lines.values()), encoding="utf-8")
        print(f"{len(lines)} runs -> {path.relative_to(ROOT)}")


def check(revision: str) -> bool:
    same = True
    for store, lines in old(revision).items():
        text = (ROOT / "benchmarks" / "results" / store / "cells.jsonl").read_text(encoding="utf-8")
        now = {one["name"]: one for one in map(json.loads, text.splitlines())}
        same &= now == lines
        print(f"{store}: {len(lines)} runs before, {len(now)} after, {'equal' if now == lines else 'DIFFERENT'}")
    for page in PAGES:
        before, after = (numbers(text) for text in (git("show", f"{revision}:docs/{page}.md"), new(page)))
        same &= before == after
        print(f"docs/{page}.md: {len(before)} numbers and verdicts, {'equal' if before == after else 'DIFFERENT'}")
        if before != after:
            print(f"  lost {[x for x in before if x not in after]}, new {[x for x in after if x not in before]}")
    return same


def new(page: str) -> str:
    return (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")


def numbers(text: str) -> list[str]:
    """Every number and verdict in the order of the page, but for the lines that name the program and its files."""
    kept = [one for one in text.splitlines() if "<!--" not in one and "benchmarks/results" not in one]
    return re.findall(r"\*\*[a-z ]+\*\*|[-+]?\d[\d,]*\.?\d*(?:e-?\d+)?%?", "\n".join(kept))


if __name__ == "__main__":
    revision, what = sys.argv[1:]
    sys.exit(0 if (convert(revision) if what == "convert" else check(revision)) is not False else 1)
