"""The program ``evenstep``: the parser, its dispatch to the commands, errors as one line, and shell completion.

The packages contain the commands themselves. The flags of ``pretrain`` are derived from the dataclasses of
``train/config.py``. Only commands that need torch import it, so that ``--help``, ``runs`` and ``completion`` are fast.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from evenstep.baselines.commands import add_optimizers
from evenstep.bench.commands import add_bench
from evenstep.compare.commands import add_compare
from evenstep.errors import EvenstepError, nearest
from evenstep.finetune import commands as finetune_commands
from evenstep.finetune.config import FineTuneConfig
from evenstep.help import finish_help
from evenstep.stability.commands import add_stability
from evenstep.telemetry.commands import add_commands as add_telemetry
from evenstep.train import commands as train_commands
from evenstep.train.checkpoint import reason_of
from evenstep.train.commands import print_config
from evenstep.train.config import CHOICES, Config, SampleConfig, checked, kinds, options
from evenstep.train.flags import add_flags, chosen, declared
from evenstep.train.log import COLUMNS
from evenstep.version import __version__

DESCRIPTION = "Pretrain language models steadily: spike-aware optimizers, real text, one command."

EXAMPLES = """\
examples:
  evenstep pretrain                                  a small model on Python's own sources, a few minutes
  evenstep pretrain recipes/demo.toml                a recipe: one file describes one run
  evenstep pretrain --data.source 'text:books/*.txt' --model.size 9m --train.tokens 20M
  evenstep pretrain --resume runs/NAME               continue a run that stopped
  evenstep generate runs/NAME --prompt 'Once'        text from a trained model
  evenstep finetune runs/NAME --data examples.jsonl  fine-tune it on a task
  evenstep bench step-time --shapes 9m               optimizers side by side: time, memory, bandwidth
  evenstep sweep recipes/start.toml --optimizers adamw,stable_spam --rates 1e-3,3e-3 --seeds 0,1
  evenstep official -- torchrun_main.py FLAGS        a command line of the papers' programs
  evenstep runs                                      list runs and their validation losses
  evenstep plan examples/cluster-7b.toml --gpus 64   memory and traffic of a run, before it is started
  evenstep report runs/NAME                          one page: losses, spikes, clipped entries, resets
  eval "$(evenstep completion bash)"                 completion for this shell
"""

PRETRAIN = """\
Train a model as described by RECIPE.toml; --section.key value overrides an option of the recipe.
Ctrl-C finishes the current step, saves a checkpoint, and prints the command that continues the run.
"""

PRETRAIN_EXAMPLES = """\
examples:
  evenstep pretrain recipes/demo.toml --train.steps 200 --out runs/short
  evenstep pretrain --optim.name adamw --optim.betas 0.9,0.95 --optim.weight_decay 0.1 --train.clip_norm 1
  evenstep pretrain recipes/demo.toml --print-config    print the configuration without training
  evenstep pretrain --resume runs/short --train.steps 400

columns of the log lines:
""" + "".join(f"  {name:<9} {meaning}\n" for name, meaning in COLUMNS.items())


GENERATE = """\
Continue a prompt with the model of RUN. A model that was fine-tuned on instructions or chats gets the prompt in that
form, and only its answer is printed. The same seed draws the same text.
"""

GENERATE_EXAMPLES = """\
examples:
  evenstep generate runs/NAME --prompt 'In the beginning'
  evenstep generate runs/NAME/checkpoints/step-000400 --temperature 0    always the most likely token
"""

COMPLETION = """\
Print the completion script of a shell: commands, options, and the values of options. Needs the package shtab, which
evenstep[train] installs.
"""

COMPLETION_EXAMPLES = """\
examples:
  eval "$(evenstep completion bash)"                                   in this shell; in ~/.bashrc for all
  evenstep completion zsh > ~/.zfunc/_evenstep                         for zsh, with ~/.zfunc in fpath
  evenstep completion fish > ~/.config/fish/completions/evenstep.fish
"""

DOCTOR_EXAMPLES = """\
examples:
  evenstep doctor
  evenstep doctor --check    after an update of torch or a driver
"""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises EvenstepError instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise EvenstepError(f"{message}; see {self.prog} --help")


def build_parser() -> tuple[argparse.ArgumentParser, Any]:
    """The parser, and its action with the parsers of the commands."""
    parser = Parser(
        prog="evenstep",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"evenstep {__version__}")
    debug = Parser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    parser.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")

    pretrain = commands.add_parser(
        "pretrain",
        parents=[debug],
        help="train a language model",
        usage="evenstep pretrain [RECIPE.toml] [--section.key VALUE ...] [--resume [RUN]]",
        description=PRETRAIN,
        epilog=PRETRAIN_EXAMPLES,
        allow_abbrev=False,
    )
    _pretrain_arguments(pretrain)

    default = SampleConfig()
    generate = commands.add_parser(
        "generate",
        parents=[debug],
        help="generate text with a trained model",
        description=GENERATE,
        epilog=GENERATE_EXAMPLES,
        allow_abbrev=False,
    )
    generate.add_argument(
        "run", metavar="RUN", type=Path, help="a run, one of its checkpoints, or a directory that transformers can load"
    )
    generate.add_argument("--prompt", default=default.prompt, help="beginning of the text (default: a new document)")
    generate.add_argument("--tokens", type=int, default=default.tokens, help="number of tokens (default: %(default)s)")
    generate.add_argument(
        "--temperature",
        type=float,
        default=default.temperature,
        help="0: always the most likely token (default: %(default)s)",
    )
    generate.add_argument(
        "--top-k",
        type=int,
        default=default.top_k,
        help="sample from this number of most likely tokens, 0: all (default: %(default)s)",
    )
    generate.add_argument("--seed", type=int, default=0, help="random seed of the sampling (default: %(default)s)")
    generate.add_argument(
        "--raw", action="store_true", help="continue the prompt, even if the model was trained to answer prompts"
    )
    generate.set_defaults(run_command=_generate)

    add_optimizers(commands, debug)
    add_compare(commands, debug)
    add_stability(commands, debug)
    add_bench(commands, debug)
    add_telemetry(commands, debug)
    finetune_commands.add_commands(commands, debug)
    train_commands.add_commands(commands, debug)

    shells = commands.add_parser(
        "completion",
        parents=[debug],
        help="print shell completion",
        description=COMPLETION,
        epilog=COMPLETION_EXAMPLES,
        allow_abbrev=False,
    )
    shells.add_argument("shell", metavar="SHELL", help="bash, zsh, tcsh, fish or powershell")
    shells.set_defaults(run_command=_completion)

    doctor = commands.add_parser(
        "doctor",
        parents=[debug],
        help="show which kernels are available on which device, and why others are not",
        description="Print versions, devices and the kernels that run on them, with the reason for each that does not.",
        epilog=DOCTOR_EXAMPLES,
        allow_abbrev=False,
    )
    doctor.add_argument(
        "--check",
        action="store_true",
        help="compare every kernel with the plain code; exit status 2 if one differs",
    )
    doctor.set_defaults(run_command=_doctor)
    finish_help(parser)
    return parser, commands


def _pretrain_arguments(pretrain: argparse.ArgumentParser) -> None:
    pretrain.add_argument(
        "recipe", metavar="RECIPE.toml", nargs="?", type=Path, help="default: a quick run on the sources of Python"
    )
    add_flags(pretrain, Config)
    pretrain.set_defaults(run_command=_pretrain)


def _pretrain(args: argparse.Namespace) -> None:
    config, start = chosen(args, Config, args.recipe)
    if args.print_config:
        return print_config(config, start, auto=args.resume == "auto")

    from evenstep.train.trainer import train

    train(config, start, auto=args.resume == "auto")


def _generate(args: argparse.Namespace) -> None:
    known = options()
    checked("--seed", args.seed, int, known["seed"][0].metadata)
    checked("--tokens", args.tokens, int, {**known["sample.tokens"][0].metadata, "low": 1})
    sample = SampleConfig(prompt=args.prompt, tokens=args.tokens, temperature=args.temperature, top_k=args.top_k)

    from evenstep.console import printable
    from evenstep.finetune.scoring import generate_from

    print(printable(generate_from(args.run, sample, args.seed, args.raw, _complain)))


def _completion(args: argparse.Namespace) -> None:
    print(completion(*build_parser(), args.shell))


def completion(parser: argparse.ArgumentParser, commands: Any, shell: str) -> str:
    """The completion script of ``parser`` for ``shell``, with the values of options. ``commands`` is the action with
    the parsers of the commands. EvenstepError without shtab, and for an unknown shell.

    Adds choices to the options of the parser, which must not parse afterwards: argparse would check the choices itself,
    with an error that does not name the nearest one.
    """
    try:
        import shtab
    except ImportError:
        raise EvenstepError("completion needs the package shtab; pip install 'evenstep[train]'") from None
    if shell not in shtab.SUPPORTED_SHELLS:
        names = ", ".join(shtab.SUPPORTED_SHELLS)
        raise EvenstepError(f"no completion for '{shell}'{nearest(shell, shtab.SUPPORTED_SHELLS)}; give {names}")
    directories = (
        "run", "runs", "directory", "resume", "out", "store", "stored", "data.cache_dir", "model.init", "model.path",
        "tuned",
    )  # fmt: skip
    files = (
        "recipe",
        "tables",
        "data.tokenizer",
        "json",
        "plot",
        "data",
        "data.file",
        "data.template",
        "model.config",
        "model.hf",
    )
    paths = dict.fromkeys(directories, shtab.DIRECTORY) | dict.fromkeys(files, shtab.FILE)
    known = options(FineTuneConfig) | options()
    choices = {key: field.metadata["choices"] for key, (field, _) in known.items()} | {
        "mode": tuple(finetune_commands.MODES)
    }
    choices |= {key: ("true", "false") for key, (_, hint) in known.items() if bool in kinds(hint)}
    choices |= {f"optim.{name}": values for name, values in CHOICES.items()} | {"shell": shtab.SUPPORTED_SHELLS}
    for action in _actions(commands):
        if action.dest in paths:
            action.complete = paths[action.dest]
        elif choices.get(action.dest) and action.nargs != 0:
            action.choices = choices[action.dest]
    return shtab.complete(parser, shell)


def _actions(commands: Any) -> Iterator[Any]:
    """The options of every command and of its subcommands."""
    for command in commands.choices.values():
        for action in command._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from _actions(action)
            else:
                yield action


def _doctor(args: argparse.Namespace) -> None:
    from evenstep.bench.doctor import print_checks, print_diagnosis

    print_diagnosis()
    if args.check:
        print_checks()


def split_options(argv: Sequence[str], known: set[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The arguments without the ``--section.key value`` pairs that are not ``known`` flags, and these pairs. They are
    other hyperparameters of an optimizer, or mistakes.

    argparse would treat the value of an unknown flag as a positional argument, that is, as the recipe.
    """
    rest: list[str] = []
    extra: list[tuple[str, str]] = []
    words = iter(argv)
    for word in words:
        if word == "--":  # no option of ours comes after it
            return [*rest, word, *words], extra
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in key or key in known:
            rest.append(word)
            continue
        if not equals:
            value = next(words, "")
            if not value or value.startswith("--"):  # a negative number has one dash
                raise EvenstepError(f"--{key} has no value; give --{key} VALUE")
        extra.append((key, value))
    return rest, extra


def run_program(argv: Sequence[str]) -> None:
    parser, commands = build_parser()
    command = next((word for word in argv if not word.startswith("-")), "")
    takes_options = {
        "finetune": declared(FineTuneConfig),
        "plan": set[str](),
        **dict.fromkeys(("pretrain", "official", "sweep"), declared()),
    }
    rest, extra = split_options(argv, takes_options[command]) if command in takes_options else (list(argv), [])
    args, unknown = parser.parse_known_args(rest)
    if unknown:
        leaf = getattr(args, "leaf", commands.choices.get(args.command, parser))
        flags = list(leaf._option_string_actions)
        raise EvenstepError(f"unknown argument '{unknown[0]}'{nearest(unknown[0], flags)}; see {leaf.prog} --help")
    if args.command is None:
        parser.print_help()
        return
    args.extra = extra
    args.run_command(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status. An error is one line on stderr, with ``--debug`` a stack trace."""
    argv = sys.argv[1:] if argv is None else argv
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream.closed:  # None when the shell closed it (>&-)
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - lives as long as the program
    if isinstance(sys.stdout, io.TextIOWrapper):  # characters that the encoding does not have are escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        run_program(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # evenstep runs | head
        _silence_stdout()
        return 141
    except KeyboardInterrupt:
        _complain("stopped at once")
        return 130
    except Exception as problem:
        if _is_of_stdout(problem):
            _silence_stdout()  # or Python would fail again when it flushes at exit
            problem = OutputError(f"error: the output cannot be written ({reason_of(problem)})")
        if "--debug" in argv:
            raise problem
        message, status = explain(problem)
        rank = os.environ.get("RANK", "")
        if status == 1 or not rank.isdigit() or int(rank) == getattr(problem, "rank", 0):
            _complain(message)  # only one of several processes prints an error that all have
        return status
    return 0


class OutputError(Exception):
    """Standard output cannot be written."""

    exit_status = 1


def _silence_stdout() -> None:
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_of_stdout(problem: Exception) -> bool:
    """Whether stdout cannot be written, for example on a full disk."""
    if not isinstance(problem, OSError):
        return False
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        return True
    return False


def explain(problem: Exception) -> tuple[str, int]:
    """The message of an exception, one line, and the exit status of the program."""
    status = getattr(problem, "exit_status", 2 if isinstance(problem, EvenstepError) else 1)
    if isinstance(problem, EvenstepError) or hasattr(problem, "exit_status"):
        return f"error: {problem}" if isinstance(problem, EvenstepError) else str(problem), status
    if isinstance(problem, ModuleNotFoundError):
        return f"error: the package {problem.name} is not installed; pip install 'evenstep[train]'", status
    first = next(iter(str(problem).splitlines()), "")
    full = "the GPU's" if type(problem).__name__ == "OutOfMemoryError" else "the"
    if full != "the" or isinstance(problem, MemoryError) or "can't allocate memory" in first:
        advice = "give a smaller --train.micro_batch_size, or --train.activation_checkpointing true"
        return f"error: {full} memory is full; {advice}", status
    return f"error: {type(problem).__name__}: {first} (--debug shows where)", status


def _complain(text: str) -> None:
    with suppress(OSError, ValueError):
        print(f"evenstep: {text}", file=sys.stderr, flush=True)
