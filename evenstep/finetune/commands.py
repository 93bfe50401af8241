"""The command ``finetune``: its flags, derived from `FineTuneConfig`, and the functions that it calls."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evenstep.errors import EvenstepError
from evenstep.finetune.config import SPARSE, FineTuneConfig
from evenstep.train.commands import print_config
from evenstep.train.config_io import shipped
from evenstep.train.flags import add_flags, chosen

FINETUNE = """\
Fine-tune MODEL on examples, one JSON object per line: instructions, prompts with responses, chats, choices, or texts
with a label. MODEL is a run or checkpoint of evenstep, or a directory that transformers can load. A RECIPE.toml may
contain all options; --section.key value overrides an option of the recipe.
"""

FINETUNE_EXAMPLES = """\
examples:
  evenstep finetune runs/NAME --data examples.jsonl
  evenstep finetune ./Llama-2-7b-hf --data commonsense_170k.json --mode lora --train.dtype bf16
  evenstep finetune ./Llama-2-7b-hf --data commonsense_170k.json --mode sparse    SPAM, moments of 0.25 %
  evenstep finetune ./bert --data mails.jsonl --eval.data held_out.jsonl
  evenstep finetune recipes/finetune-llama2-7b-commonsense.toml ./Llama-2-7b-hf
  evenstep finetune runs/NAME --eval.data boolq.jsonl,piqa.jsonl --evaluate    score without training
"""

MODES: dict[str, dict[str, str]] = {
    "full": {"tune.adapter": "none"},
    "lora": {"tune.adapter": "lora"},
    "sparse": {"tune.adapter": "none", **SPARSE},
}


def add_commands(commands: Any, debug: argparse.ArgumentParser) -> None:
    """Add the command to the action that holds those of the program."""
    finetune = commands.add_parser(
        "finetune",
        parents=[debug],
        help="train a model on examples of a task",
        usage="evenstep finetune [RECIPE.toml] MODEL --data FILE.jsonl [--section.key VALUE ...] [--resume [RUN]]",
        description=FINETUNE,
        epilog=FINETUNE_EXAMPLES,
        allow_abbrev=False,
    )
    finetune.add_argument("tuned", metavar="MODEL", nargs="*", help="the model, optionally preceded by a recipe")
    finetune.add_argument("--data", metavar="FILE", help="same as --data.file FILE")
    finetune.add_argument(
        "--mode", metavar="MODE", help="full: all weights; lora: adapters; sparse: SPAM with moments of 0.25 %%"
    )
    finetune.add_argument(
        "--evaluate", action="store_true", help="score MODEL on eval.data, or on FILE, without training"
    )
    add_flags(finetune, FineTuneConfig)
    finetune.set_defaults(run_command=_finetune)


def _split(words: Sequence[str]) -> tuple[Path | None, str | None]:
    """The recipe and the model among the positional arguments."""
    recipes: list[str] = []
    models: list[str] = []
    for word in words:
        path = Path(word)
        (recipes if path.suffix == ".toml" and (path.is_file() or shipped(path)) else models).append(word)
    if len(recipes) > 1 or len(models) > 1:
        raise EvenstepError(f"{' '.join(words)}: give at most one recipe and one model; see evenstep finetune --help")
    return (Path(recipes[0]) if recipes else None), (models[0] if models else None)


def _finetune(args: argparse.Namespace) -> None:
    recipe, model = _split(args.tuned)
    if args.mode is not None and args.mode not in MODES:
        raise EvenstepError(f"--mode {args.mode} is unknown; give one of {', '.join(MODES)}")
    short = dict(MODES[args.mode]) if args.mode else {}
    short |= {key: value for key, value in (("model.path", model), ("data.file", args.data)) if value is not None}
    if args.evaluate and args.data is None and vars(args)["eval.data"]:
        short["data.file"] = vars(args)["eval.data"].split(",")[0].strip()
    config, start = chosen(args, FineTuneConfig, recipe, short)
    if args.print_config:
        return print_config(config, start, auto=args.resume == "auto")

    from evenstep.finetune.run import Tuning, evaluate_only
    from evenstep.train.trainer import train

    if args.evaluate:
        evaluate_only(config)
    else:
        train(config, start, auto=args.resume == "auto", trainer=Tuning)
