"""The commands ``report``, ``diagnose``, ``watch``, ``rows`` and ``study``: their options and functions.

Every command imports what it needs when it runs, so that ``evenstep --help`` loads neither torch nor NumPy.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

REPORT = """\
Write one HTML file that shows RUN, or several runs side by side: losses, spikes, gradient norms, clipping, moment
resets, and the data rows of each event. The file needs no network; open it in any browser.
"""

REPORT_EXAMPLES = """\
examples:
  evenstep report runs/NAME                                    writes runs/NAME/report.html
  evenstep report runs/a runs/b --out compare.html             two runs side by side
  evenstep report runs/NAME --fail-on 'spike_rate>0.02'        status 1 if the condition holds, for CI
"""

DIAGNOSE = """\
Say in words how a run went: what happened first, where, because of what, what followed from it, and what to try.
Reads a run of evenstep, a metrics.jsonl, the trainer_state.json of transformers, a TensorBoard folder, a W&B offline
run, or a CSV file with a column of steps and one of losses, and says what a log lacks. evenstep report draws the same
logs as a page.
"""

DIAGNOSE_EXAMPLES = """\
examples:
  evenstep diagnose runs/NAME
  evenstep diagnose output/checkpoint-500/trainer_state.json
  evenstep diagnose lightning_logs/version_0/metrics.csv --json
"""

ROWS = """\
Print the text of data rows of RUN. Rows are given as events name them: "data rows 264-272" are rows 264 to 271. The
text is decoded from the run's tokens, which are prepared again if they are no longer in the cache.
"""

ROWS_EXAMPLES = """\
examples:
  evenstep diagnose runs/NAME        names the rows of a spike
  evenstep rows runs/NAME 264-272    prints their text
"""

WATCH_EXAMPLES = """\
examples:
  evenstep watch runs/NAME
  evenstep watch runs/a runs/b --port 0    two runs, on any free port
"""

STUDY_EXAMPLES = """\
examples:
  evenstep study --steps 100 --models llama-9m --out spike-study
"""

STUDY = """\
Train small LLaMA and Pythia-shaped models with Adam and record the gradient spike score (GSS) of the SPAM paper over
layers and time: how often gradients spike, where, how large, and how long one injected spike stays in the moments of
Adam, SPAM and Stable-SPAM. Writes pictures and numbers.
"""


def add_commands(commands: Any, debug: argparse.ArgumentParser) -> None:
    """Add the commands to ``commands``, the program's ``add_subparsers()``."""
    shared: Any = {"parents": [debug], "allow_abbrev": False}
    report = commands.add_parser(
        "report", help="make a page of a run's telemetry", description=REPORT, epilog=REPORT_EXAMPLES, **shared
    )
    report.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="directory of a run, or a log (see diagnose)")
    report.add_argument("--out", metavar="FILE", type=Path, help="default: report.html in the (first) run's directory")
    report.add_argument(
        "--fail-on",
        metavar="CONDITION",
        action="append",
        default=[],
        help="exit with status 1 if it holds for a run, such as 'spike_rate>0.02'; may be repeated",
    )
    report.set_defaults(run_command=_report)

    diagnose = commands.add_parser(
        "diagnose",
        help="say in words what went wrong in a run, and why",
        description=DIAGNOSE,
        epilog=DIAGNOSE_EXAMPLES,
        **shared,
    )
    diagnose.add_argument("run", metavar="RUN|FILE", type=Path, help="directory of a run, or a log of another trainer")
    diagnose.add_argument("--json", action="store_true", help="print the findings as JSON")
    diagnose.set_defaults(run_command=_diagnose)

    watch = commands.add_parser(
        "watch",
        help="show a run's page while it trains",
        description="Serve the page of RUN on this machine alone. It follows the run until Ctrl-C.",
        epilog=WATCH_EXAMPLES,
        **shared,
    )
    watch.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="directory of a run")
    watch.add_argument("--port", type=int, default=8642, help="0 for any free port (default: %(default)s)")
    watch.set_defaults(run_command=_watch)

    rows = commands.add_parser(
        "rows", help="print the text of a run's data rows", description=ROWS, epilog=ROWS_EXAMPLES, **shared
    )
    rows.add_argument("run", metavar="RUN", type=Path, help="directory of a run")
    rows.add_argument("rows", metavar="A-B", help="the first row, and one past the last")
    rows.set_defaults(run_command=_rows)

    study = commands.add_parser(
        "study",
        help="repeat the gradient spike study of the SPAM paper",
        description=STUDY,
        epilog=STUDY_EXAMPLES,
        **shared,
    )
    study.add_argument("--out", metavar="DIR", type=Path, default=Path("spike-study"), help="default: %(default)s")
    study.add_argument(
        "--models", metavar="NAMES", default="llama-9m,pythia-14m", help="comma-separated (default: %(default)s)"
    )
    study.add_argument("--steps", type=int, default=400, help="training steps of each model (default: %(default)s)")
    study.add_argument("--samples", type=int, default=256, help="sampled entries of each tensor (default: %(default)s)")
    study.add_argument("--source", default="stdlib", help="as --data.source of pretrain (default: %(default)s)")
    study.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    study.set_defaults(run_command=_study)


def _report(args: argparse.Namespace) -> None:
    from evenstep.errors import EvenstepError
    from evenstep.paths import leaves
    from evenstep.telemetry.facts import check_conditions, parse_condition
    from evenstep.telemetry.foreign import load_log
    from evenstep.telemetry.page import look_up_texts, write_report

    conditions = [parse_condition(text) for text in args.fail_on]
    runs = [load_log(path) for path in args.runs]
    for run in runs:
        look_up_texts(run)
    first = runs[0].path
    place = first if first.is_dir() else first.parent
    if args.out is None and leaves(place, "report.html"):
        raise EvenstepError(f"{place / 'report.html'} is a link that leads out of the folder; give another --out")
    out = args.out or place / "report.html"
    size = write_report(runs, out)
    print(f"{out} ({size / 2**20:.1f} MB)")
    for run in runs:
        for note in run.notes:
            print(f"{run.name}: {note}")
    check_conditions(conditions, runs)


def _diagnose(args: argparse.Namespace) -> None:
    from evenstep.console import printable
    from evenstep.telemetry.diagnosis import as_json, as_text
    from evenstep.telemetry.foreign import load_log

    run = load_log(args.run)
    print(as_json(run) if args.json else printable(as_text(run)))


def _watch(args: argparse.Namespace) -> None:
    from evenstep.telemetry.watch import watch

    watch(args.runs, args.port)


def _rows(args: argparse.Namespace) -> None:
    from evenstep.console import printable
    from evenstep.train.runs import parse_rows, rows_of

    for head, text in rows_of(args.run, *parse_rows(args.rows)):
        print(f"== {head}\n{printable(text)}")


def _study(args: argparse.Namespace) -> None:
    import importlib
    import sys

    import evenstep
    from evenstep.errors import EvenstepError

    root = Path(evenstep.__file__).parent.parent
    if not (root / "lab" / "spikes.py").exists():
        raise EvenstepError("the study is not in the installed package; run evenstep study from a clone of the sources")
    sys.path.insert(0, str(root))
    importlib.import_module("lab.spikes").study(
        args.out,
        models=args.models.split(","),
        steps=args.steps,
        samples=args.samples,
        source=args.source,
        seed=args.seed,
    )
