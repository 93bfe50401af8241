"""``evenstep bench``: its options and commands. torch is loaded only when something is measured."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from evenstep.errors import EvenstepError

DESCRIPTION = """\
Time the steps of evenstep's optimizers and of every other installed package, on the tensors of a LLaMA. Each round
times one step of each optimizer, in random order and from cold caches. Numbers are medians over the rounds; ratios are
medians of the ratios to torch's fused AdamW within a round.
"""

EXAMPLES = """\
examples:
  evenstep bench list                                        the known optimizers, and which are installed
  evenstep bench step-time --shapes 60m --json bench.json --plot bench.png
  evenstep bench step-time --shapes many-small,one-huge --optimizers ours,torch
  evenstep bench step-time --shapes 1b:6 --device cuda --dtype bf16     six layers of the 1b model
  evenstep bench scaling --shapes 9m,60m,130m --threads 1,2  cost per parameter over sizes and threads
"""


def add_bench(commands: Any, debug: argparse.ArgumentParser) -> None:
    """Add the command ``bench``, with its subcommands, to the parser of the program."""
    raw: Any = {"allow_abbrev": False, "parents": [debug]}
    bench = commands.add_parser(
        "bench", help="time optimizer steps against other packages", description=DESCRIPTION, epilog=EXAMPLES, **raw
    )
    parts = bench.add_subparsers(title="commands", metavar="WHAT", dest="part", required=True)

    step_time = parts.add_parser(
        "step-time", help="time, memory and bandwidth of a step", description=DESCRIPTION, **raw
    )
    _options(step_time, shapes="60m", threads="1", optimizers="all")
    step_time.set_defaults(run_command=_measure, leaf=step_time)

    scaling = parts.add_parser(
        "scaling", help="cost per parameter over sizes and threads", description=DESCRIPTION, **raw
    )
    optimizers = "stable_spam,spam,spam_density_25,scale,stabilize_adamw"
    _options(scaling, shapes="9m,60m,130m,350m,1b", threads="1,2", optimizers=optimizers)
    scaling.set_defaults(run_command=_measure, leaf=scaling)

    known = parts.add_parser("list", help="the optimizers, and which of them are installed", **raw)
    known.set_defaults(run_command=_list, leaf=known)


def _options(parser: argparse.ArgumentParser, **defaults: str) -> None:
    def add(flag: str, metavar: str, text: str, **how: Any) -> None:
        default = "" if how.get("type") is Path else " (default: %(default)s)"
        parser.add_argument(flag, metavar=metavar, help=text + default, **how)

    add("--shapes", "NAME,...", "LLaMA sizes with a vocabulary of 32000 (1b:6: 1b with 6 layers), many-small, one-huge",
        default=defaults["shapes"])  # fmt: skip
    add("--threads", "N,...", "numbers of CPU threads", default=defaults["threads"])
    add("--optimizers", "NAME,...", "names, or all, ours, peers, torch, ...; fused AdamW is always included",
        default=defaults["optimizers"])  # fmt: skip
    add("--rounds", "N", "timed steps of each optimizer", type=int, default=25)
    add("--warmup", "N", "untimed steps before the first round", type=int, default=3)
    add("--budget", "SECONDS", "time for the rounds of one optimizer, ten times as long for ours and torch's; slow "
        "optimizers make fewer rounds, at least 3", type=float, default=10.0)  # fmt: skip
    add("--device", "NAME", "cpu or cuda", default="cpu")
    add("--dtype", "NAME", "of parameters and gradients: fp32 or bf16", default="fp32")
    add("--seed", "N", "of parameters, gradients and the order in a round", type=int, default=0)
    add("--json", "FILE", "write all numbers to this file", type=Path)
    add("--plot", "FILE", "draw the numbers to this file (png, svg or pdf; needs matplotlib)", type=Path)


def _list(args: argparse.Namespace) -> None:
    from evenstep.bench.report import known_optimizers, print_table

    print_table(*known_optimizers())


def _measure(args: argparse.Namespace) -> None:
    # torch warns for each profile of memory that was allocated before it; torch reads this variable on import.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from evenstep.bench import report
    from evenstep.bench.measure import compare, plans_from
    from evenstep.train.files import replace_text
    from evenstep.train.interrupts import Interrupted

    plans = plans_from(args)
    for flag, path in (("json", args.json), ("plot", args.plot)):  # checked before minutes of measurement
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise EvenstepError(f"--{flag} {path}: give the name of a file in a directory that exists")
    if args.plot is not None:
        report.check_picture(args.plot)
    document = compare(args.part, plans, say=_say)
    scaling = args.part == "scaling"
    for table in (report.scaling_tables if scaling else report.step_time_tables)(document):
        report.print_table(*table)
    if args.json:
        replace_text(args.json, json.dumps(document, indent=1) + "\n")
    if args.plot and any(row["ms"] for row in document["rows"]):
        (report.draw_scaling if scaling else report.draw_ratios)(document, args.plot)
    if document["interrupted"]:
        where = f"; what was measured is in {args.json}" if args.json else ""
        raise Interrupted(f"stopped early{where}", signal.SIGINT)


def _say(text: str) -> None:
    with suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)
