"""``evenstep compare``, ``sweep`` and ``results``: their options, and the work that they do."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evenstep.train.flags import add_overrides, given_options

if TYPE_CHECKING:
    from evenstep.compare.grid import Runner

DESCRIPTION = """\
Train the runs of table files and tabulate the results: tables of the papers
(recipes/tables), beside the published numbers, or your own. A table file is a
grid of optimizers, precisions, sizes, learning rates and seeds. Finished runs
are not repeated, stopped runs resume, and runs that two tables share are
trained once. Writes the table as text, Markdown and CSV, pictures, and
results.json. docs/comparisons.md describes the keys of a table file.
"""

EXAMPLES = """\
examples:
  evenstep compare --example > my.toml                           a comparison of your own, to edit
  evenstep compare recipes/tables/stable-spam-1.toml             a model of 1.4M parameters on a CPU
  evenstep compare recipes/tables/*.toml --jobs 2 --store benchmarks/results/tables
  evenstep compare recipes/tables/stable-spam-1.toml --scale paper     as published: C4, GPUs
  evenstep compare recipes/tables/*.toml --smoke                 a miniature of everything, in minutes
  evenstep compare recipes/tables/*.toml --dry-run               list the runs, train nothing
  evenstep compare TABLE.toml --engine slurm --engine-option slurm_partition=gpu --engine-option gpus=1
  evenstep compare TABLE.toml --engine ray --engine-option address=auto --processes 4    four GPUs a run
"""

SWEEP = """\
Train RECIPE.toml with every combination of optimizers, learning rates and
seeds, and print a table of validation losses, the lowest first. Without one
of the lists, the recipe's own value is taken. Options of the recipe's
optimizer that another one does not have are left out, and named.
--section.key VALUE changes an option of all runs, as for pretrain (evenstep
pretrain --help lists them).

Ctrl-C saves the active runs. The same command continues from there, and
finished runs are never repeated, also when rates, seeds or optimizers are
added.
"""

SWEEP_EXAMPLES = """\
examples:
  evenstep sweep recipes/start.toml --optimizers adamw,stable_spam \\
      --rates 1e-3,3e-3 --seeds 0,1
  evenstep sweep recipes/start.toml --rates 5e-4,1e-3,2e-3 --train.steps 100
  evenstep sweep recipes/start.toml --optimizers spam,muon --dry-run

The directory --out has table.md, runs.csv, sweep.png, and cells/ with the
directory of each run, which 'evenstep report' and 'evenstep runs' read.
'evenstep compare' trains tables with options of their own for each line,
several sizes and precisions, and a rate that is chosen on a seed of its own.
"""

RESULTS = """\
Write a page of results from the JSON files of compare --store: for each claim
our number, the paper's number and the direction, and a ranking of all lines.
Each table has a page of its own, with its pictures.
"""


JOBS: Any = {
    "metavar": "N",
    "type": int,
    "help": "number of runs at a time; 0: one after the other in this process (default: one per GPU, or per core where "
    "there is no GPU; 64 on a cluster)",
}


RESULTS_EXAMPLES = """\
examples:
  evenstep results benchmarks/results/tables --out docs/results.md
"""


def add_compare(commands: Any, debug: argparse.ArgumentParser) -> None:
    """Add the commands ``compare``, ``sweep`` and ``results`` to the parser of the program."""
    raw: Any = {"allow_abbrev": False, "parents": [debug]}
    compare = commands.add_parser(
        "compare",
        help="train a table of optimizers: one of the papers' or your own",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        **raw,
    )
    add = compare.add_argument
    add("tables", metavar="TABLE.toml", nargs="*", type=Path, help="table files: those of recipes/tables, or your own")
    add(
        "--example",
        action="store_true",
        help="print a table file of a comparison of your own, which runs as it is, and exit",
    )
    add(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("runs/compare"),
        help="directory of the results, tables/NAME, and of all runs, cells (default: %(default)s)",
    )
    add("--jobs", **JOBS)
    add_engine(compare)
    add(
        "--scale",
        metavar="NAME",
        default="small",
        help="size of the runs, a section [scale.NAME] of the table file: small (minutes to hours of a CPU), gpu "
        "(hours of a GPU), paper and slimpajama (as published: GPUs, days), smoke (seconds); a table without such "
        "sections has no other scale (default: %(default)s)",
    )
    add(
        "--smoke",
        action="store_true",
        help="check that tables run: short for --scale smoke --jobs 0 --out runs/compare-smoke",
    )
    add(
        "--store",
        metavar="DIR",
        type=Path,
        help="also write DIR/TABLE.json, which 'evenstep results' reads, and DIR/cells.jsonl, whose runs are not "
        "repeated, on this machine or another one",
    )
    add("--dry-run", action="store_true", help="list the runs that are missing and their cost, and train nothing")
    add("--report", action="store_true", help="write the tables of the runs that have finished, and train nothing")
    compare.set_defaults(run_command=_compare)

    sweep = commands.add_parser(
        "sweep",
        help="train one recipe with several optimizers, learning rates and seeds",
        usage="evenstep sweep RECIPE.toml [--optimizers A,B] [--rates X,Y] [--seeds M,N] [--section.key VALUE ...]",
        description=SWEEP,
        epilog=SWEEP_EXAMPLES,
        **raw,
    )
    add = sweep.add_argument
    add("recipe", metavar="RECIPE.toml", type=Path, help="the recipe of all runs")
    add(
        "--optimizers",
        metavar="A,B,...",
        help="names of optimizers, separated by commas; 'evenstep optimizers' lists them (default: that of the recipe)",
    )
    add(
        "--rates",
        metavar="X,Y,...",
        help="peak learning rates (optim.lr), separated by commas; every optimizer is trained at each (default: that "
        "of the recipe)",
    )
    add(
        "--seeds",
        metavar="M,N,...",
        help="random seeds, separated by commas; runs with the same seed start from the same weights and see the same "
        "data (default: that of the recipe)",
    )
    add(
        "--out",
        dest="directory",
        metavar="DIR",
        type=Path,
        help="directory of the results and of all runs (default: runs/sweep-RECIPE)",
    )
    add("--dry-run", action="store_true", help="list the runs and their tokens, and train nothing")
    add("--jobs", **JOBS)
    add_engine(sweep)
    add_overrides(sweep, without={"out", "name"})
    sweep.set_defaults(run_command=_sweep)

    results = commands.add_parser(
        "results", help="write the page of results", description=RESULTS, epilog=RESULTS_EXAMPLES, **raw
    )
    add = results.add_argument
    add(
        "stored",
        metavar="DIR",
        nargs="?",
        type=Path,
        default=Path("benchmarks/results/tables"),
        help="directory that was given to compare --store (default: %(default)s)",
    )
    add(
        "--out",
        metavar="FILE",
        type=Path,
        default=Path("docs/results.md"),
        help="the page, in Markdown; its pictures go into a directory of the same name (default: %(default)s)",
    )
    results.set_defaults(run_command=_results)


def _compare(args: argparse.Namespace) -> None:
    from evenstep.compare.cells import Store
    from evenstep.compare.grid import Plan
    from evenstep.compare.table import EXAMPLE, load_table
    from evenstep.errors import EvenstepError
    from evenstep.train.config_io import expanded

    if args.example:
        print(EXAMPLE, end="")
        return
    if not args.tables:
        raise EvenstepError("compare needs a TABLE.toml; 'evenstep compare --example > my.toml' writes one")
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
        _list_cells(plans, stored, args.out / "cells")
        return
    runner = runner_of(plans, args, args.out / "cells", args.store, train=not args.report)
    try:
        runner.look_up() if args.report else runner.run()
    finally:
        for plan in plans:
            write(plan, runner.outcomes, args.out, args.store, print)
    runner.check()


def _sweep(args: argparse.Namespace) -> None:
    from evenstep.compare.grid import CellList
    from evenstep.compare.sweep import sweep_of, write
    from evenstep.console import counted
    from evenstep.train.log import short_count

    sweep = sweep_of(args.recipe, given_options(args), args.optimizers, args.rates, args.seeds)
    cells, out = sweep.cells, args.directory or Path("runs") / f"sweep-{args.recipe.stem}"
    if args.dry_run:
        for cell in cells:
            print(cell.label)
        print(f"{counted(len(cells), 'run')}, {short_count(sum(cell.tokens for cell in cells))} tokens")
        return
    runner = runner_of([CellList(lambda outcomes: cells)], args, out / "cells", None)
    each = f"{counted(len(cells), 'run')} of {short_count(cells[0].tokens)} tokens"
    print(f"{each}, {runner.engine.slots} at a time, in {out}", flush=True)
    try:
        runner.run()
    finally:
        write(sweep, runner.outcomes, out, print)
    runner.check()


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add the options that decide where cells are trained."""
    add = parser.add_argument
    add(
        "--engine",
        metavar="NAME",
        default="local",
        help="where runs are trained: local (processes of this machine), slurm (through submitit) or ray (default: "
        "%(default)s)",
    )
    add(
        "--engine-option",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="an option of submitit (slurm_partition, timeout_min, ...) or of ray.init (address, ...); gpus=1: each "
        "process needs a GPU; may be repeated",
    )
    add(
        "--processes",
        metavar="N",
        type=int,
        default=1,
        help="number of processes, and of GPUs, that train one run together, started by torchrun (default: "
        "%(default)s)",
    )


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
    say(f"table:   {where / 'table.md'}, its pictures beside it, and every run in {where / 'cells.csv'}")
    return document


def _list_cells(plans: list[Any], stored: Any, directory: Path) -> None:
    """Print the cells that would be trained, each run once: those without an outcome in the store or in ``directory``.
    Nothing is written."""
    from evenstep.compare.cells import Pool
    from evenstep.compare.engines import Inline
    from evenstep.compare.grid import Runner, estimate

    runner = Runner(plans, Pool(directory), Inline(), print, outcomes=dict(stored))
    runner.look_up()
    cells, lines = estimate(plans, runner.outcomes)
    for cell in cells:
        print(f"{cell.group.row}/{cell.group.precision}/{cell.group.size} lr {cell.lr:g} {cell.stage} {cell.tokens:,}")
    for line in lines:
        print(line)


def _results(args: argparse.Namespace) -> None:
    from evenstep.compare.report import write_page

    for path in write_page(args.stored, args.out):
        print(path)
