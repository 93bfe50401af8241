"""``evenstep compare`` and ``evenstep results``: their options, and the work that they do."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evenstep.compare.grid import Runner

DESCRIPTION = """\
Train the runs of published tables and compare the results with the papers'. Each table file of recipes/tables is a
grid of optimizers, precisions, sizes, learning rates and seeds. Finished runs are not repeated, stopped runs resume,
and runs that two tables share are trained once. Writes the table as text, Markdown and CSV, pictures, and results.json.
"""

EXAMPLES = """\
examples:
  evenstep compare recipes/tables/stable-spam-1.toml             a model of 1.4M parameters on a CPU
  evenstep compare recipes/tables/*.toml --jobs 2 --store benchmarks/results/tables
  evenstep compare recipes/tables/stable-spam-1.toml --scale paper     as published: C4, GPUs
  evenstep compare recipes/tables/*.toml --smoke                 a miniature of everything, in minutes
  evenstep compare recipes/tables/*.toml --dry-run               list the runs, train nothing
  evenstep compare TABLE.toml --engine slurm --engine-option slurm_partition=gpu --engine-option gpus=1
  evenstep compare TABLE.toml --engine ray --engine-option address=auto --processes 4    four GPUs a run
"""

RESULTS = """\
Write a page of results from the JSON files of compare --store: for each claim our number, the paper's number and the
direction, and a ranking of all lines. Each table has a page of its own, with its pictures.
"""


def add_compare(commands: Any, debug: argparse.ArgumentParser) -> None:
    """Add the commands ``compare`` and ``results`` to the parser of the program."""
    raw: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, "parents": [debug]}
    compare = commands.add_parser(
        "compare", help="re-run a table of the papers", description=DESCRIPTION, epilog=EXAMPLES, **raw
    )
    add = compare.add_argument
    add("tables", metavar="TABLE.toml", nargs="+", type=Path, help="a table file, such as those in recipes/tables")
    add("--out", metavar="DIR", type=Path, default=Path("runs/compare"), help="default: %(default)s")
    add("--jobs", metavar="N", type=int, help="runs at a time; 0: in this process (default: one per core or GPU)")
    add_engine(compare)
    add("--scale", default="small", help="small, gpu, paper, slimpajama or smoke (default: %(default)s)")
    add("--smoke", action="store_true", help="short for --scale smoke --jobs 0 --out runs/compare-smoke")
    add("--store", metavar="DIR", type=Path, help="also write DIR/TABLE.json, for evenstep results, and "
        "DIR/cells.jsonl: the runs in it are not repeated, on any machine")  # fmt: skip
    add("--dry-run", action="store_true", help="list the runs of the first round and their cost, train nothing")
    add("--report", action="store_true", help="write the tables of the finished runs, train nothing")
    compare.set_defaults(run_command=_compare)

    results = commands.add_parser("results", help="write the page of results", description=RESULTS, **raw)
    how: Any = {"type": Path, "help": "default: %(default)s"}
    results.add_argument("stored", metavar="DIR", nargs="?", default=Path("benchmarks/results/tables"), **how)
    results.add_argument("--out", metavar="FILE", default=Path("docs/results.md"), **how)
    results.set_defaults(run_command=_results)


def _compare(args: argparse.Namespace) -> None:
    from evenstep.compare.cells import Store
    from evenstep.compare.grid import Plan
    from evenstep.compare.table import load_table
    from evenstep.errors import EvenstepError
    from evenstep.train.config_io import expanded

    if args.smoke:
        args.scale, args.jobs = "smoke", 0 if args.jobs is None else args.jobs
        args.out = Path("runs/compare-smoke") if args.out == Path("runs/compare") else args.out
    args.tables = [path for given in args.tables for path in expanded(given)]
    names = [path.stem for path in args.tables]
    if len(set(names)) < len(names):
        raise EvenstepError("two tables have the same name, by which results are stored; rename one of the files")
    stored = Store(args.store).outcomes if args.store else {}
    plans = [Plan(load_table(path, args.scale), stored) for path in args.tables]
    if args.dry_run:
        _list_cells(plans)
        return
    runner = runner_of(plans, args, args.out / "cells", args.store, train=not args.report)
    try:
        runner.look_up() if args.report else runner.run()
    finally:
        for plan in plans:
            write(plan, runner.outcomes, args.out, args.store, print)
    runner.check()


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add the options that decide where cells are trained."""
    add = parser.add_argument
    add("--engine", metavar="NAME", default="local", help="local, slurm or ray (default: %(default)s)")
    add("--engine-option", metavar="KEY=VALUE", action="append", default=[],
        help="an option of submitit (slurm_partition, timeout_min, ...) or of ray.init (address, ...); gpus=1: each "
        "process needs a GPU; may be repeated")  # fmt: skip
    add("--processes", metavar="N", type=int, default=1, help="processes (torchrun) and GPUs of one run (default: 1)")


def runner_of(
    plans: Sequence[Any],
    args: argparse.Namespace,
    cells: Path,
    store: Path | None,
    say: Any = print,
    train: bool = True,
) -> Runner:
    """A runner on the engine that ``args`` selects. Without ``train`` it only looks up outcomes."""
    from evenstep.compare.cells import Pool, Store
    from evenstep.compare.engines import Inline, engine_for
    from evenstep.compare.grid import Runner
    from evenstep.errors import EvenstepError
    from evenstep.train.config_io import literal

    options = {}
    for text in args.engine_option:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise EvenstepError(f"--engine-option {text}: not of the form KEY=VALUE; give one such as address=auto")
        options[key] = value if "," in value else literal(value)
    how: Any = {"processes": args.processes, "options": options}
    engine = engine_for(args.engine, args.jobs, cells.parent, **how) if train else Inline()
    return Runner(plans, Pool(cells), engine, say, Store(store) if store else None, args.processes)


def write(plan: Any, outcomes: Any, out: Path, store: Path | None, say: Any) -> Any:
    """Write the table to files in ``out``/tables/NAME, and to the terminal; returns its document."""
    from evenstep import console
    from evenstep.compare import report
    from evenstep.compare.results import document_of, is_measured
    from evenstep.errors import EvenstepError
    from evenstep.train.files import replace_text

    document = document_of(plan, outcomes)
    stale = store is not None and (store / f"{plan.table.name}.json").exists()  # of a setting that has changed since
    if not is_measured(document) and not stale:
        return document
    where = out / "tables" / plan.table.name
    where.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1) + "\n"
    replace_text(where / "results.json", text)
    replace_text(where / "table.md", report.markdown(document) + "\n" + report.below(document) + "\n")
    replace_text(where / "cells.csv", report.comma_separated(document))
    if store is not None:
        store.mkdir(parents=True, exist_ok=True)
        replace_text(store / f"{plan.table.name}.json", text)
    try:
        report.draw(document, where)
    except EvenstepError as problem:
        say(str(problem))
    console.print_table(document["title"], report.HEADS, report.rows(document), report.below(document))
    return document


def _list_cells(plans: list[Any]) -> None:
    """Print the cells that are wanted before any outcome is known, each run once."""
    from evenstep.compare.grid import estimate

    cells, lines = estimate(plans)
    for cell in cells:
        print(f"{cell.group.row}/{cell.group.precision}/{cell.group.size} lr {cell.lr:g} {cell.stage} {cell.tokens:,}")
    for line in lines:
        print(line)


def _results(args: argparse.Namespace) -> None:
    from evenstep.compare.report import write_page

    for path in write_page(args.stored, args.out):
        print(path)
