"""The commands ``runs``, ``plan``, ``export`` and ``inspect``: their flags, and the functions that they call."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from evenstep.errors import EvenstepError
from evenstep.train.checkpoint import Parent
from evenstep.train.config import Config
from evenstep.train.config_io import build, check_changes, config_file, read_toml, to_toml

PLAN = """\
Compute what RECIPE.toml needs on a number of GPUs before the run is started: the memory of each process, the bytes sent
per step in each parallel mode, whether the run fits, and what to change if it does not. Accepts --section.key value
like pretrain. Neither a GPU nor the data are needed.
"""

PLAN_EXAMPLES = """\
examples:
  evenstep plan examples/cluster-7b.toml --gpus 64
  evenstep plan examples/cluster-7b.toml --gpus 8 --gpu-memory 40 --optim.state int8
  evenstep plan examples/cluster-7b.toml --gpus 64 --parallel.mode tp+fsdp --parallel.tensor 8
  evenstep plan examples/cluster-7b.toml --gpus 8 --optimizers      all optimizers and state formats
"""

EXPORT = """\
Write the weights of the newest valid checkpoint of RUN. --to hf writes a directory that transformers can load, with
the tokenizer and a model card (data, tokens, losses, spikes, configuration); --to safetensors writes one file with
parameter names as keys. Any number of processes may have written the checkpoint.

--push uploads the directory to the Hugging Face Hub, into a private repository unless --public is given. The files are
listed first. The card names the data source and contains the configuration, so paths of this machine may be in it:
read README.md in DIR before you push, with a first export without --push.
"""

EXPORT_EXAMPLES = """\
examples:
  evenstep export runs/NAME --to hf --out DIR
  evenstep export runs/NAME --to hf --out DIR --push OWNER/NAME
  evenstep export runs/NAME/checkpoints/step-000400 --to safetensors --out DIR
"""

INSPECT = """\
Show the content of a checkpoint: step, tokens, number of processes that wrote it, optimizer, files and tensors. Every
checksum is verified; if one does not match, the exit status is 2 and the error names the file.
"""


def add_commands(commands: Any, debug: argparse.ArgumentParser) -> None:
    """Add the commands to the action that holds those of the program."""
    runs = commands.add_parser("runs", parents=[debug], help="list runs", allow_abbrev=False)
    runs.add_argument("directory", metavar="DIR", nargs="?", type=Path, default=Path("runs"), help="default: runs")
    runs.set_defaults(run_command=_runs)

    shared: Any = {
        "parents": [debug], "allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter
    }  # fmt: skip
    plan = commands.add_parser(
        "plan",
        help="compute the memory and the traffic of a run on a number of GPUs",
        description=PLAN,
        epilog=PLAN_EXAMPLES,
        **shared,
    )
    plan.add_argument("recipe", metavar="RECIPE.toml", nargs="?", type=Path, help="default: as for pretrain")
    plan.add_argument("--gpus", metavar="N", type=int, default=1, help="number of GPUs (default: %(default)s)")
    plan.add_argument(
        "--gpus-per-node", metavar="N", type=int, default=8, help="GPUs per machine (default: %(default)s)"
    )
    plan.add_argument(
        "--gpu-memory",
        metavar="GB",
        type=float,
        default=80.0,
        help="memory of one GPU in 10^9 bytes (default: %(default)s)",
    )
    plan.add_argument("--optimizers", action="store_true", help="print a table of optimizers and state formats")
    plan.add_argument(
        "--check",
        action="store_true",
        help="also build and shard the whole model on the meta device, and compare the bytes",
    )
    plan.add_argument("--json", action="store_true", help="print all numbers as JSON")
    plan.set_defaults(run_command=_plan)

    export = commands.add_parser(
        "export",
        help="write the weights of a run for other programs",
        description=EXPORT,
        epilog=EXPORT_EXAMPLES,
        **shared,
    )
    export.add_argument("run", metavar="RUN", type=Path, help="directory of a run, or one of its checkpoints")
    export.add_argument("--to", choices=("hf", "safetensors"), required=True, help="the format")
    export.add_argument("--out", metavar="DIR", type=Path, required=True, help="a new or empty directory")
    export.add_argument("--push", metavar="OWNER/NAME", help="upload the directory to this repository of the Hub")
    export.add_argument("--public", action="store_true", help="a new repository is public (default: private)")
    export.set_defaults(run_command=_export)

    inspect = commands.add_parser(
        "inspect", help="show the content of a checkpoint and verify it", description=INSPECT, **shared
    )
    inspect.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="the directory of a checkpoint, or a run (its newest checkpoint)",
    )
    inspect.add_argument("--all", action="store_true", help="list every tensor of the optimizer")
    inspect.add_argument("--json", action="store_true", help="print the result as JSON")
    inspect.set_defaults(run_command=_inspect)


def _runs(args: argparse.Namespace) -> None:
    from evenstep.train.runs import list_runs, table

    rows = list_runs(args.directory)
    print(table(rows) if rows else f"no runs in {args.directory}; evenstep pretrain starts one")


def _plan(args: argparse.Namespace) -> None:
    from evenstep.train.plan import plan

    plan(
        args.recipe,
        args.extra,
        gpus=args.gpus,
        per_node=args.gpus_per_node,
        gpu_memory=args.gpu_memory,
        optimizers=args.optimizers,
        check=args.check,
        as_json=args.json,
    )


def _export(args: argparse.Namespace) -> None:
    from evenstep.train.log import print_line
    from evenstep.train.model_card import check_repository, manifest, push
    from evenstep.train.weights import export

    if args.push:
        if args.to != "hf":
            raise EvenstepError(f"--push uploads a model of transformers; give --to hf in place of --to {args.to}")
        check_repository(args.push)
    elif args.public:
        raise EvenstepError("--public needs --push OWNER/NAME")
    export(args.run, args.to, args.out, print_line)
    if args.push:
        print_line(f"to be uploaded to {args.push} ({'public' if args.public else 'private'} if it is new):")
        for line in manifest(args.out):
            print_line(line)
        push(args.out, args.push, args.public, print_line)


def _inspect(args: argparse.Namespace) -> None:
    from evenstep.train.runs import inspect

    inspect(args.checkpoint, everything=args.all, as_json=args.json)


def print_config(config: Any, start: Path | Parent | None) -> None:
    """Print the configuration as a recipe.

    EvenstepError for a configuration that a run would refuse: hyperparameters that the optimizer does not have or
    accept, a missing model to start from, or, for the run in ``start``, changes that a resume does not allow.
    """
    from evenstep.train.optimizers import try_optimizer
    from evenstep.train.task import check_architecture, with_shape_of
    from evenstep.train.weights import find_source

    try_optimizer(config.optim)
    if isinstance(start, Path):
        check_changes(start, config, build(read_toml(config_file(start)), type(config)))
    if isinstance(config, Config) and config.model.init:
        source = find_source(Path(config.model.init), lambda _: None)
        (check_architecture if config.model.hf else with_shape_of)(config, source)
    elif isinstance(config, Config) and config.model.hf:
        check_architecture(config, None)
    print(to_toml(config), end="")
