"""What ``evenstep bench step-time`` and ``scaling`` do: check the options, compare, show, and write files."""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from evenstep.bench import plot, report
from evenstep.bench.measure import Comparison
from evenstep.bench.registry import KNOWN, chosen
from evenstep.bench.setting import DTYPES, Plan, check_device
from evenstep.bench.shapes import outline
from evenstep.bench.timing import TIMERS, last_level_cache, machine_state
from evenstep.errors import EvenstepError, nearest
from evenstep.train.files import replace_text
from evenstep.train.hardware import commit, describe_hardware, total_memory, versions
from evenstep.train.interrupts import Interrupted

Document = dict[str, Any]


def step_time(args: argparse.Namespace) -> None:
    _command("step-time", args, report.step_time_tables, plot.draw_ratios)


def scaling(args: argparse.Namespace) -> None:
    _command("scaling", args, report.scaling_tables, plot.draw_scaling)


def _command(
    name: str,
    args: argparse.Namespace,
    tables: Callable[[Document], Sequence[report.Table]],
    draw: Callable[[Document, Path], None],
) -> None:
    plans = plans_from(args)
    _check_files(args)
    document = compare(name, plans, say=_say)
    for table in tables(document):
        report.print_table(*table)
    if args.json:
        replace_text(args.json, json.dumps(document, indent=1) + "\n")
    if args.plot and any(row["ms"] for row in document["rows"]):
        draw(document, args.plot)
    if document["interrupted"]:
        where = f"; what was measured is in {args.json}" if args.json else ""
        raise Interrupted(f"stopped early{where}", signal.SIGINT)


def compare(command: str, plans: Sequence[Plan], say: Callable[[str], object] = lambda text: None) -> Document:
    """Run the plans one after the other; the contents of the JSON file. Ctrl-C ends it with ``interrupted`` set and
    what is measured so far. EvenstepError when nothing can be measured at all."""
    device = torch.device(plans[0].device)
    document: Document = {
        "command": command,
        "rows": [],
        "comparisons": [],
        "left_out": [],
        "interrupted": False,
        "hardware": _hardware(device),
        "versions": versions() | {e.package: e.version() for e in KNOWN.values() if e.version() is not None},
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "settings": {key: getattr(plans[0], key) for key in ("device", "dtype", "rounds", "warmup", "budget", "seed")},
    }
    for plan in plans:
        say(f"{plan.shapes} shapes, {plan.threads} thread{'s' if plan.threads > 1 else ''}, {plan.dtype}")
        comparison = Comparison(plan, say)
        try:
            comparison.run()
        except EvenstepError as problem:
            if len(plans) == 1:
                raise
            say(str(problem))
            document["left_out"].append({"shapes": plan.shapes, "threads": plan.threads, "why": str(problem)})
            continue
        except KeyboardInterrupt:
            document["interrupted"] = True
        document["rows"] += comparison.rows.values()
        document["comparisons"].append(comparison.facts)
        if document["interrupted"]:
            break
    if not document["rows"]:
        raise EvenstepError("nothing was measured: " + document["left_out"][0]["why"])
    return document


def plans_from(args: argparse.Namespace) -> list[Plan]:
    """One plan for each shape and number of threads; EvenstepError for values that are not allowed."""
    for flag, value, allowed in (("device", args.device, TIMERS), ("dtype", args.dtype, DTYPES)):
        if value not in allowed:
            raise EvenstepError(f"--{flag}: '{value}' is not one of {', '.join(allowed)}{nearest(value, [*allowed])}")
    for flag, value, least in (("rounds", args.rounds, 1), ("warmup", args.warmup, 1), ("seed", args.seed, 0)):
        if value < least:
            raise EvenstepError(f"--{flag}: {value} is out of range; it must be at least {least}")
    if not (math.isfinite(args.budget) and args.budget >= 0):
        raise EvenstepError(f"--budget: {args.budget} is out of range; give seconds, 0 or more")
    check_device(args.device)
    optimizers = chosen(_words("optimizers", args.optimizers))
    shapes = _words("shapes", args.shapes)
    for name in shapes:
        outline(name)
    common = {key: getattr(args, key) for key in ("device", "dtype", "rounds", "warmup", "budget", "seed")}
    return [
        Plan(name, optimizers, threads, **common)
        for threads in map(_threads, _words("threads", args.threads))
        for name in shapes
    ]


def _words(flag: str, given: str) -> list[str]:
    words = [word.strip() for word in given.split(",") if word.strip()]
    if not words:
        raise EvenstepError(f"--{flag}: nothing was given; give names with commas between them")
    return list(dict.fromkeys(words))


def _threads(word: str) -> int:
    if not (word.isdecimal() and int(word) > 0):
        raise EvenstepError(f"--threads: '{word}' is no number of threads; give whole numbers from 1, such as 1,2")
    return int(word)


def _check_files(args: argparse.Namespace) -> None:
    """Before minutes of measuring, not after."""
    for flag, path in (("json", args.json), ("plot", args.plot)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise EvenstepError(f"--{flag} {path}: give the name of a file in a directory that exists")
    if args.plot is not None:
        plot.check(args.plot)


def _hardware(device: torch.device) -> dict[str, Any]:
    facts = describe_hardware(device) | machine_state()
    del facts["threads"]  # each row has its own
    return facts | {"memory": total_memory(device), "last_level_cache": last_level_cache(device)}


def _say(text: str) -> None:
    with suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)
