"""What the experiments share: one small JSON file per run, numbers over the seeds, tables and curves.

run = once(directory / "adam-0.json", {"lr": 5e-4, "seed": 0}, work)   # work() -> dict of results; not run again
runs = stored(directory)
for name, some in grouped(runs, "optimizer").items():
    number = over_seeds([run["score"] for run in some])
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from evenstep.compare.paired import judge
from evenstep.compare.plots import band, picture
from evenstep.errors import EvenstepError
from evenstep.telemetry.schema import finite
from evenstep.train.files import replace_text
from evenstep.train.hardware import commit, describe_hardware, versions

Run = dict[str, Any]


# ---- runs ----


def once(
    path: Path, setting: Mapping[str, Any], work: Callable[[], Mapping[str, Any]], packages: Iterable[str] = ()
) -> Run:
    """The run stored at ``path``; where there is none, that of ``work()``, which is then stored.

    Args:
        path: the run's file. It is whole or not there.
        setting: everything that the results depend on, the seed too, in types that JSON knows. It is stored.
        work: does the run and gives its results, in types that JSON knows; what is not finite becomes null.
        packages: whose versions are stored beside evenstep's, torch's and Python's.

    Raises EvenstepError when ``path`` holds no run, or one with another setting.
    """
    wanted = json.loads(_to_json(setting))
    if path.exists():
        run = read(path)
        different = sorted(key for key in {*wanted, *run["setting"]} if wanted.get(key) != run["setting"].get(key))
        if different:
            raise EvenstepError(
                f"{path} is of another setting ({', '.join(different)}); remove it, or store elsewhere with --store"
            )
        return run
    path.parent.mkdir(parents=True, exist_ok=True)
    where = commit()  # that of the code which runs, whatever is committed meanwhile
    started = time.perf_counter()
    results = dict(work())
    device = torch.device(setting.get("device", "cpu"))
    run = {
        "setting": setting,
        **results,
        "seconds": round(time.perf_counter() - started, 1),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": where,
        "hardware": describe_hardware(device),
        "versions": versions() | {name: _version(name) for name in packages},
    }
    replace_text(path, _to_json(run) + "\n")
    return read(path)


def read(path: Path) -> Run:
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(run["setting"], dict):
            raise TypeError("its setting is no table")
        return {**run, "file": path.name}
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise EvenstepError(f"{path} is not a stored run ({problem}); remove it and run again") from None


def stored(directory: Path) -> list[Run]:
    """All runs under ``directory``, by name of file. EvenstepError when there is none."""
    paths = sorted(directory.rglob("*.json"))
    if not paths:
        raise EvenstepError(f"{directory} holds no runs; run an experiment with --store {directory} first")
    return [read(path) for path in paths]


def grouped(runs: Iterable[Run], *keys: str) -> dict[Any, list[Run]]:
    """Runs by the value of a key of their setting (a tuple of values where there are several keys), in the order of
    their coming."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        values = tuple(run["setting"].get(key) for key in keys)
        groups.setdefault(values if len(keys) > 1 else values[0], []).append(run)
    return groups


def place(runs: Iterable[Run]) -> str:
    """Hardware, commits, versions and dates of runs, for under a table or a picture."""
    runs = list(runs)
    machines = dict.fromkeys(run["hardware"].get("gpu") or run["hardware"]["cpu"] for run in runs)
    commits = dict.fromkeys((run["commit"] or "no commit")[:10] + (run["commit"] or "")[40:] for run in runs)
    packages = dict.fromkeys(f"{name} {number}" for run in runs for name, number in run["versions"].items())
    dates = sorted({run["finished"][:10] for run in runs})
    days = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return f"{', '.join(machines)}; commit {', '.join(commits)}; {', '.join(packages)}; {days}"


# ---- programs ----


def status(work: Callable[[], object]) -> int:
    """The exit status of a program that does ``work()``: 0, or 2 after an EvenstepError or where a package is missing,
    which is said in a line."""
    try:
        work()
    except EvenstepError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as problem:
        print(f"error: the package {problem.name} is not installed", file=sys.stderr)
        return 2
    return 0


# ---- numbers ----


@dataclass(frozen=True)
class Number:
    """Over seeds: mean, sample standard deviation (0 for a single seed), and how many; NaN where a run has none."""

    mean: float
    std: float
    n: int

    def text(self, digits: int = 3) -> str:
        if math.isnan(self.mean):
            return "diverged"
        return f"{self.mean:.{digits}f} ± {self.std:.{digits}f}" if self.n > 1 else f"{self.mean:.{digits}f}"


def over_seeds(values: Sequence[float | None]) -> Number:
    known = [math.nan if value is None else float(value) for value in values]
    if not known or any(math.isnan(value) for value in known):
        return Number(math.nan, math.nan, len(known))
    return Number(mean(known), stdev(known) if len(known) > 1 else 0.0, len(known))


def direction(
    better: Iterable[Run], worse: Iterable[Run], key: str, *, higher_is_better: bool, floor: float = 0.0
) -> str:
    """What our runs say of a claim that ``better`` beats ``worse`` in ``key``: the verdict of
    `evenstep.compare.paired.judge` over the seeds that both have. ``floor``: the least difference that counts."""
    first, second = ({run["setting"]["seed"]: run[key] for run in side} for side in (better, worse))
    return (judge(second, first, floor=floor) if higher_is_better else judge(first, second, floor=floor))[0]


INTERVAL = (
    "*Confirmed* or *opposite*: all of the 95 % interval of the mean difference (Student's t, over the seeds that both "
    "have, which begin alike) is on one side of zero; *not confirmed*: it is not, or some runs diverged; *open*: fewer "
    "than two seeds in common."
)


# ---- tables and pictures ----


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines) + "\n"


def draw_curves(
    path: Path,
    lines: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    footer: str = "",
    log: bool = False,
) -> Path:
    """Each line's mean over its seeds, with a band from the least to the most.

    Args:
        lines: name -> for each seed ``(x, y)``; drawn at the x that all seeds have.
        log: a logarithmic y axis.

    EvenstepError without matplotlib.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with picture(path, title, footer) as axes:
        for name, seeds in lines.items():
            by_x = [dict(zip(*curve, strict=True)) for curve in seeds]
            xs = sorted(set.intersection(*(set(curve) for curve in by_x))) if by_x else []
            values = [[curve[x] for curve in by_x] for x in xs]
            band(axes, xs, [mean(v) for v in values], [min(v) for v in values], [max(v) for v in values], name)
        axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
        axes.legend(fontsize=7, frameon=False)
    return path


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _to_json(value: Any) -> str:
    plain = finite(json.loads(json.dumps(value)))  # tuples become lists on the way
    return json.dumps(plain, indent=1, ensure_ascii=False)
