"""``evenstep stability``: its options, and the work that it does."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Train small models where training breaks - an exploding recurrence, deep Post-LN, a gradient 1000 times too large, bad
data, flipped bits, 4 and 2 bits, high rates - with many remedies, and write a page: what survives, what it costs, and
what to use. Finished cells are not repeated, and a stopped suite continues with the same command.
"""

EXAMPLES = """\
examples:
  evenstep stability --quick                                  about ten minutes on two cores
  evenstep stability --quick --optim my_package.module:MyOptimizer
  evenstep stability --store benchmarks/results/stability     the whole suite at the small scale
  evenstep stability --store benchmarks/results/stability --report    write the page from what is stored
"""


def add_stability(commands: Any, debug: argparse.ArgumentParser) -> None:
    """Add the command ``stability`` to the parser of the program."""
    from evenstep.compare.commands import add_engine

    parser = commands.add_parser(
        "stability", help="where training breaks, and which remedy holds", description=DESCRIPTION, epilog=EXAMPLES,
        allow_abbrev=False, parents=[debug],
    )  # fmt: skip
    add = parser.add_argument
    add("--quick", action="store_true", help="short for --scale quick: one seed, five tasks, rates as they come")
    add("--scale", metavar="NAME", help="small, quick, smoke or gpu (default: small)")
    add(
        "--optim",
        metavar="NAME",
        action="append",
        default=[],
        help="also a row for this optimizer, a name of `evenstep optimizers` or package.module:Class; may be repeated",
    )
    add("--only", metavar="TASK", action="append", default=[], help="only this task; may be repeated")
    add(
        "--remedy",
        metavar="NAME",
        action="append",
        default=[],
        help="only this remedy of the page, such as 'Adam + clip 1'; may be repeated",
    )
    add("--store", metavar="DIR", type=Path, help="keep results in DIR/cells.jsonl, too (default: the directory of "
        "--out)")  # fmt: skip
    add("--out", metavar="DIR", type=Path, help="directory of the files (default: runs/stability-SCALE)")
    add("--page", metavar="FILE", type=Path, help="write the page here (default: DIR/stability.md of --out)")
    add("--jobs", metavar="N", type=int, help="cells at a time; 0: in this process (default: one per core)")
    add("--report", action="store_true", help="write the page of the finished cells, train nothing")
    add_engine(parser)
    parser.set_defaults(run_command=_stability)


def _stability(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from evenstep.baselines.catalog import baseline
    from evenstep.compare.commands import runner_of
    from evenstep.compare.grid import CellList
    from evenstep.errors import EvenstepError, nearest
    from evenstep.stability import page, study
    from evenstep.stability.remedies import remedy_of

    name = args.scale or ("quick" if args.quick else "small")
    if args.quick and name != "quick":
        raise EvenstepError(f"--quick and --scale {name} are two scales; give one of them")
    if name not in study.SCALES:
        raise EvenstepError(f"--scale {name}: give one of {', '.join(study.SCALES)}{nearest(name, [*study.SCALES])}")
    scale = study.SCALES[name]
    for task in args.only:
        if task not in scale.tasks:
            raise EvenstepError(f"--only {task}: give one of {', '.join(scale.tasks)}{nearest(task, scale.tasks)}")
    if args.only:
        scale = replace(scale, tasks=tuple(task for task in scale.tasks if task in args.only))
    known = [remedy.name for remedy in scale.chosen()]
    for remedy in args.remedy:
        if remedy not in known:
            raise EvenstepError(f"--remedy {remedy!r}: give one of {', '.join(known)}{nearest(remedy, known)}")
    scale = replace(scale, remedies=tuple(args.remedy) or scale.remedies)
    for optimizer in args.optim:
        baseline(optimizer).load()  # an optimizer that does not exist is an error before anything is trained
    remedies = scale.chosen([remedy_of(optimizer) for optimizer in args.optim])
    out = args.out or Path("runs") / f"stability-{name}"
    store = args.store or out
    plan = CellList(lambda outcomes: study.wanted(scale, remedies, outcomes))
    runner = runner_of([plan], args, out / "cells", store, print, train=not args.report)
    where = args.page or out / "stability.md"
    try:
        runner.look_up() if args.report else runner.run()
    finally:
        if any("trials" in outcome.summary for outcome in runner.outcomes.values()):
            for path in page.write(runner.outcomes, scale, remedies, where, store):
                print(path)
    runner.check()
