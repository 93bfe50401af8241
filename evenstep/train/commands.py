"""The commands ``runs``, ``plan``, ``export``, ``official`` and ``inspect``: flags, and the functions they call."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evenstep.errors import EvenstepError
from evenstep.train.checkpoint import Parent
from evenstep.train.config import Config
from evenstep.train.config_io import (
    build,
    check_changes,
    config_file,
    read_toml,
    to_toml,
)
from evenstep.train.files import fresh_directory
from evenstep.train.flags import add_overrides, given_options

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
the tokenizer and, for a run of pretrain, a model card (data, tokens, losses, spikes, configuration); --to safetensors
writes one file with parameter names as keys. Any number of processes may have written the checkpoint.

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

OFFICIAL = """\
Run a command line of torchrun_main.py (SPAM) or main_pretrain.py
(Stable-SPAM), the papers' published programs, with evenstep. Prints the
recipe that the line stands for, below comments that say for each flag what
the published program does with it: some flags are parsed there and never
used. Then trains the recipe, which has the published code's variant of the
optimizer and its low-bit formats.

--section.key VALUE in front of -- overrides an option of the recipe, as for
pretrain: --data.source for other text, --train.steps for a shorter run.
evenstep pretrain --help lists the options.
"""

OFFICIAL_EXAMPLES = """\
examples:
  evenstep official --print-recipe -- torchrun_main.py --optimizer SPAM \\
      --model_config configs/llama_130m.json --batch_size 128 \\
      --total_batch_size 512 --lr 8e-4 --num_training_steps 20000 > spam.toml
  evenstep official --data.source 'text:books/*.txt' --model.size 9m \\
      --train.steps 200 --schedule.warmup_steps 20 -- main_pretrain.py \\
      --model_config configs/llama_60m.json --batch_size 16 --lr 1e-3 \\
      --optimizer stablespam --fp4
  torchrun --standalone --nproc_per_node 4 -m evenstep official -- \\
      main_pretrain.py ...                    as many processes as there
"""

INSPECT = """\
Show the content of a checkpoint: step, tokens, number of processes that wrote it, optimizer, files and tensors. Every
checksum is verified; if one does not match, the exit status is 2 and the error names the file.
"""


INSPECT_EXAMPLES = """\
examples:
  evenstep inspect runs/NAME                                   the newest checkpoint
  evenstep inspect runs/NAME/checkpoints/step-000400 --all     every tensor of the optimizer
"""

RUNS = """\
List the runs below DIR: size, optimizer, steps, validation loss, and whether each is finished. A run that goes on from
another one stands below it.
"""

RUNS_EXAMPLES = """\
examples:
  evenstep runs
  evenstep runs /shared/runs
"""


def add_commands(commands: Any, debug: argparse.ArgumentParser) -> None:
    """Add the commands to the action that holds those of the program."""
    runs = commands.add_parser(
        "runs", parents=[debug], help="list runs", description=RUNS, epilog=RUNS_EXAMPLES, allow_abbrev=False
    )
    runs.add_argument("directory", metavar="DIR", nargs="?", type=Path, default=Path("runs"), help="default: runs")
    runs.set_defaults(run_command=_runs)

    shared: Any = {"parents": [debug], "allow_abbrev": False}
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

    official = commands.add_parser(
        "official",
        help="run a command line of the papers' published programs",
        usage="evenstep official [--print-recipe] [--as-written] [--section.key VALUE ...] -- PROGRAM FLAGS",
        description=OFFICIAL,
        epilog=OFFICIAL_EXAMPLES,
        **shared,
    )
    official.add_argument(
        "--print-recipe",
        action="store_true",
        help="print the recipe and exit; 'evenstep pretrain' runs the recipe from a file",
    )
    official.add_argument(
        "--as-written",
        action="store_true",
        help="use the values of --update_gap, --warmup_epoch and --grad_accu_steps, which torchrun_main.py parses and "
        "never uses, and read --max_train_tokens as tokens, which both programs divide by the sequences of a step",
    )
    official.add_argument(
        "line",
        metavar="PROGRAM FLAGS",
        nargs=argparse.REMAINDER,
        help="the published command line: torchrun_main.py (SPAM) or main_pretrain.py (Stable-SPAM) and its flags; "
        "torchrun and its options may stand in front of the program",
    )
    add_overrides(official)
    official.set_defaults(run_command=_official)

    inspect = commands.add_parser(
        "inspect",
        help="show the content of a checkpoint and verify it",
        description=INSPECT,
        epilog=INSPECT_EXAMPLES,
        **shared,
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


def _official(args: argparse.Namespace) -> None:
    from evenstep.train.official import parse_line, recipe_text, translated, world_size

    line = parse_line(args.line[1:] if args.line[:1] == ["--"] else args.line)
    overrides = given_options(args)
    if world_size() > 1 and "parallel.mode" not in dict(overrides):
        overrides.append(("parallel.mode", "ddp"))  # as the published programs
    tables, remarks = translated(line, overrides, as_written=args.as_written)
    config = build(tables)

    from evenstep.train.optimizers import try_optimizer

    try_optimizer(config.optim)  # a recipe that is printed into a file is a valid one
    if os.environ.get("RANK", "0") == "0":
        print(recipe_text(line, tables, remarks, overrides, as_written=args.as_written), flush=True)
    if not args.print_recipe:
        from evenstep.train.trainer import train

        train(config, None)


def _inspect(args: argparse.Namespace) -> None:
    from evenstep.train.runs import inspect

    inspect(args.checkpoint, everything=args.all, as_json=args.json)


def print_config(config: Any, start: Path | Parent | None, *, auto: bool = False) -> None:
    """Print the configuration as a recipe. ``auto``: the run would continue in ``out`` if that has a checkpoint.

    EvenstepError for a configuration that a run would refuse: hyperparameters that the optimizer does not have or
    accept, missing files of data, tokenizer or model, a directory that another run has, or, for the run in ``start``,
    changes that a resume does not allow. A recipe may be meant for another machine, so a device, a package or memory
    that this one lacks is a line on stderr.
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
    if isinstance(config, Config):
        _check_files(config)
    if not isinstance(start, Path) and not auto:
        fresh_directory(config)
    print(to_toml(config), end="")
    for problem in _lacks(config):
        print(f"evenstep: the run would be refused on this machine: {problem}", file=sys.stderr)


def _check_files(config: Config) -> None:
    """EvenstepError for a file that the configuration names and that is missing."""
    from evenstep.data.corpora import open_corpus, split_source
    from evenstep.data.tokenizer import load_tokenizer
    from evenstep.models.hf import read_shape
    from evenstep.train.task import data_spec

    spec, (kind, rest) = data_spec(config), split_source(config.data.source)
    if kind == "text":
        open_corpus(spec.source, spec.text_field, spec.excluded, spec.on_bad)
    elif kind == "shards" and not Path(rest).expanduser().is_dir():
        raise EvenstepError(f"data.source: there is no directory {rest}; give that of prepared tokens")
    if spec.tokenizer != "bpe":
        load_tokenizer(spec.tokenizer)
    if config.model.config is not None:
        read_shape(config.model.config)


def _lacks(config: Any) -> Iterator[str]:
    """What this machine lacks for a run: a device, a package, memory."""
    from evenstep.data.corpora import open_corpus, split_source
    from evenstep.models import LlamaConfig
    from evenstep.train.hardware import memory_limit, pick_device
    from evenstep.train.memory import least_memory
    from evenstep.train.plan import shape_of

    try:
        on_cpu = pick_device(config.train.device).type == "cpu"
    except EvenstepError as problem:
        yield str(problem)
        return
    if not isinstance(config, Config):
        return
    if split_source(config.data.source)[0] in ("kjv", "stdlib"):
        try:
            open_corpus(config.data.source)
        except EvenstepError as problem:
            yield str(problem)
    if on_cpu and not config.model.init and config.parallel.mode == "none":
        try:
            shape = shape_of(config)
        except EvenstepError as problem:
            yield str(problem)
            return
        needs, limit = sum(least_memory(config, shape, 1, 1).values()), memory_limit()
        if isinstance(shape, LlamaConfig) and needs > limit:
            yield f"it needs at least {needs / 1e9:,.1f} GB of memory, the machine has {limit / 1e9:,.1f} GB"
