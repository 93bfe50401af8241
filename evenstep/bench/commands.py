"""``evenstep bench``: its options, and what its commands do with what was measured. Loads torch when it measures."""

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
Time optimizer steps, ours and those of every other package that is installed, on the tensors of a LLaMA.
Each round times one step of each, in random order and from cold caches; numbers are medians over the rounds,
ratios are medians of the ratios to torch's fused AdamW within a round.
"""

EXAMPLES = """\
examples:
  evenstep bench list                                        which optimizers are known, and installed
  evenstep bench step-time --shapes 60m --json bench.json --plot bench.png
  evenstep bench step-time --shapes many-small,one-huge --optimizers ours,torch
  evenstep bench step-time --shapes 1b:6 --device cuda --dtype bf16     six of the layers of the 1b model
  evenstep bench scaling --shapes 9m,60m,130m --threads 1,2  cost per parameter over sizes and threads
"""


def add_bench(commands: Any, debug: argparse.ArgumentParser) -> None:
    """The command ``bench`` with its own commands, added to those of the program."""
    raw: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, "parents": [debug]}
    bench = commands.add_parser(
        "bench", help="time optimizer steps against other packages", description=DESCRIPTION, epilog=EXAMPLES, **raw
    )
    parts = bench.add_subparsers(title="what to do", metavar="WHAT", dest="part", required=True)

    step_time = parts.add_parser("step-time", help="time, memory and bandwidth of a step", **raw)
    _options(step_time, shapes="60m", threads="1", optimizers="all")
    step_time.set_defaults(run_command=_command, leaf=step_time)

    scaling = parts.add_parser("scaling", help="cost per parameter over sizes and threads", **raw)
    _options(
        scaling,
        shapes="9m,60m,130m,350m,1b",
        threads="1,2",
        optimizers="stable_spam,spam,spam_density_25,scale,stabilize_adamw",
    )
    scaling.set_defaults(run_command=_command, leaf=scaling)

    known = parts.add_parser("list", help="the optimizers, and which of them are installed", **raw)
    known.set_defaults(run_command=_list, leaf=known)


def _options(parser: argparse.ArgumentParser, *, shapes: str, threads: str, optimizers: str) -> None:
    add = parser.add_argument
    shown = "(default: %(default)s)"
    add(
        "--shapes",
        metavar="NAME,...",
        default=shapes,
        help=f"sizes of LLaMA with 32000 words (1b:6 is 1b with 6 layers), many-small, one-huge {shown}",
    )
    add("--threads", metavar="N,...", default=threads, help=f"numbers of CPU threads {shown}")
    add(
        "--optimizers",
        metavar="NAME,...",
        default=optimizers,
        help=f"names, or all, ours, peers, torch, ...; fused AdamW is always among them {shown}",
    )
    add("--rounds", metavar="N", type=int, default=25, help=f"timed steps of each {shown}")
    add("--warmup", metavar="N", type=int, default=3, help=f"untimed steps before {shown}")
    add(
        "--budget",
        metavar="SECONDS",
        type=float,
        default=10.0,
        help=f"time for the rounds of one optimizer, 10 times that for ours and torch's: slow ones get fewer rounds, "
        f"at least 3 {shown}",
    )
    add("--device", metavar="NAME", default="cpu", help=f"cpu or cuda {shown}")
    add("--dtype", metavar="NAME", default="fp32", help=f"of parameters and gradients: fp32 or bf16 {shown}")
    add("--seed", metavar="N", type=int, default=0, help=f"of parameters, gradients and the order in a round {shown}")
    add("--json", metavar="FILE", type=Path, help="write all numbers there")
    add("--plot", metavar="FILE", type=Path, help="draw them there (png, svg or pdf; needs matplotlib)")


def _list(args: argparse.Namespace) -> None:
    from evenstep.bench.report import known_optimizers, print_table

    print_table(*known_optimizers())


# ---- what the commands do ----


def _command(args: argparse.Namespace) -> None:
    # Torch's C++ side warns of each profile that misses memory allocated before it; it reads this on import.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from evenstep.bench import report
    from evenstep.bench.measure import compare, plans_from
    from evenstep.train.files import replace_text
    from evenstep.train.interrupts import Interrupted

    plans = plans_from(args)
    for flag, path in (("json", args.json), ("plot", args.plot)):  # before minutes of measuring, not after
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
