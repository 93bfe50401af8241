"""The command lines of the papers' published programs as recipes: ``evenstep official``.

`PROGRAMS` lists every flag of the two programs: its type and default there, what the program does with the value, and
the option of evenstep that takes its place. Some flags are parsed and never used by the published program; the recipe
follows the program, and `recipe_text` says so above it. Nothing here imports torch.

The page docs/official.md contains `flag_table` of each program.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evenstep.errors import EvenstepError, nearest
from evenstep.train.config import SIZE_NAMES, parse_count
from evenstep.train.config_io import Tables, build, override, tables_to_toml, to_tables, without_foreign_options

# ---- the flags of the published programs ----


@dataclass(frozen=True)
class Flag:
    """A flag of a published program.

    Attributes:
        kind: the type of its value; bool: a switch without a value; None: a value that may be left out.
        default: of the published program.
        meaning: what the program does with it, a clause without a subject.
        option: the option of evenstep that has the same meaning; empty: there is none, or it follows from several
            flags (`_Translation` sets it).
        ignored: the program parses the flag and never uses it.
        of: the optimizers that read the flag; empty: it does not depend on the optimizer.
    """

    kind: type | None
    default: Any
    meaning: str
    option: str = ""
    ignored: bool = False
    of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """A published program: its paper, its flags, and its names of optimizers with those of evenstep."""

    name: str
    paper: str
    optimizers: dict[str, str]
    flags: dict[str, Flag]


_GALORE = ("galore_adamw",)
_MOMENTUM = ("sgd", "adafactor", *_GALORE)

_TRAINING = {
    "model_config": Flag(str, None, "reads the shape of the model from this file", "model.size"),
    "use_hf_model": Flag(bool, False, "takes the LLaMA of transformers, which computes the same"),
    "batch_size": Flag(int, None, "sequences per forward pass of one process", "train.micro_batch_size"),
    "total_batch_size": Flag(int, None, "sequences per step, over all processes", "train.batch_size"),
    "gradient_accumulation": Flag(int, None, "forward passes per step; by default it follows from the batch sizes"),
    "max_length": Flag(int, 256, "cuts a document to this number of tokens, or pads it", "train.seq_len"),
    "num_training_steps": Flag(int, 10_000, "optimizer steps", "train.steps"),
    "max_train_tokens": Flag(
        str, None, "divided by the sequences of a step, not by its tokens, to get the number of steps"
    ),
    "lr": Flag(float, 1e-4, "peak learning rate", "optim.lr"),
    "scheduler": Flag(str, "cosine", "shape of the learning rate after the warm-up", "schedule.name"),
    "min_lr_ratio": Flag(float, 0.1, "final learning rate as a fraction of the peak", "schedule.min_lr_ratio"),
    "warmup_steps": Flag(int, 1000, "steps of linear warm-up", "schedule.warmup_steps"),
    "weight_decay": Flag(float, 0.0, "weight decay of all parameters", "optim.weight_decay"),
    "grad_clipping": Flag(float, 0.0, "largest norm of all gradients together; 0: off", "train.clip_norm"),
    "activation_checkpointing": Flag(
        bool, False, "recomputes activations in the backward pass", "train.activation_checkpointing"
    ),
    "dtype": Flag(str, "bfloat16", "number format of the weights", "train.dtype"),
    "seed": Flag(int, 0, "seed of the initial weights", "seed"),
    "eval_every": Flag(int, 5000, "steps between validations on 10M tokens", "eval.every"),
    "save_dir": Flag(str, None, "directory of the checkpoints", "out"),
    "continue_from": Flag(str, None, "loads weights, step and optimizer from this directory", "model.init"),
    "single_gpu": Flag(bool, False, "trains without DDP, in one process"),
}

_SPAM_PROGRAM = Program(
    "torchrun_main.py",
    "SPAM, arXiv:2501.06842",
    {"adam": "adam", "spam": "spam", "sgd": "sgd", "adafactor": "adafactor"},
    {
        **_TRAINING,
        "optimizer": Flag(str, None, "the optimizer, in any case of letters", "optim.name"),
        "density": Flag(
            float, 1.0, "trained fraction of the matrices of attention and MLP; all others are dense",
            "optim.density", of=("spam",),
        ),
        "threshold": Flag(float, 5000.0, "limit of g^2 / v", "optim.threshold", of=("spam",)),
        "DeltaT": Flag(int, 500, "steps between moment resets", "optim.reset_interval", of=("spam",)),
        "update_gap": Flag(int, 500, "moments are reset every --DeltaT steps", ignored=True),
        "warmup_epoch": Flag(
            int, 150, "the warm-up after a reset has --warmup_steps steps, as many as the schedule's", ignored=True
        ),
        "grad_accu_steps": Flag(int, 20, "nothing is clipped in the 20 steps after a reset, whatever it says",
            ignored=True),
        "beta1": Flag(float, 0.0, "momentum, or decay of the first moment", of=("sgd", "adafactor")),
        "save_every": Flag(int, 2000, "steps between checkpoints", "checkpoint.every"),
        "workers": Flag(int, 8, "processes that read the data"),
        "load_local": Flag(None, False, "reads a copy of C4 on this machine"),
        "tags": Flag(str, None, "no log uses them", ignored=True),
        "name": Flag(str, "test", "no log uses it", ignored=True),
        "galore_scale": Flag(float, 1.0, "there is no GaLore in this program", ignored=True),
    },
)  # fmt: skip

_STABLE_SPAM_PROGRAM = Program(
    "main_pretrain.py",
    "Stable-SPAM, arXiv:2502.17055",
    {
        "adam": "adam", "stablespam": "stable_spam", "spam": "spam", "sgd": "sgd", "adafactor": "adafactor",
        "galore_adamw": "galore",
    },
    {
        **_TRAINING,
        "optimizer": Flag(str, "adam", "the optimizer, in any case of letters", "optim.name"),
        "gamma1": Flag(float, 0.85, "AdaGN: decay of the mean of the norm", "optim.gamma1", of=("stablespam",)),
        "gamma2": Flag(float, 0.999, "AdaGN: decay of its mean square", "optim.gamma2", of=("stablespam",)),
        "gamma3": Flag(
            float, 0.999, "AdaClip: decay of the mean of the largest entry", "optim.gamma3", of=("stablespam",)
        ),
        "total_T": Flag(
            int, 20_000, "length of a cosine schedule of beta1 and gamma1, which is always on, whatever "
            "--num_training_steps says", "optim.total_steps", of=("stablespam",),
        ),
        "eta": Flag(float, 0.5, "where this schedule ends", "optim.eta_min", of=("stablespam",)),
        "update_proj_gap": Flag(
            int, 500, "steps between moment resets, or between projections",
            "optim.reset_interval", of=("stablespam", *_GALORE),
        ),
        "density": Flag(
            float, 1.0, "trained fraction of the matrices of attention and MLP", "optim.density", of=("spam",)
        ),
        "real_fp4": Flag(bool, False, "another FP4 layer, of a later version of the program"),
        "fp4": Flag(
            bool, False, "nine even levels for weights and inputs of q, k, v, o, gate, up and down", "lowbit"
        ),
        "act_quant": Flag(bool, False, "integers for weights and inputs of the same layers", "lowbit"),
        "weight_bits": Flag(int, 8, "bits of the integers, of weights and inputs alike"),
        "weight_group_size": Flag(int, 256, "entries of a weight that share a scale"),
        "weight_quant": Flag(bool, False, "quantises nothing by itself; changes what is saved", ignored=True),
        "simulation": Flag(bool, False, "quantises nothing by itself; changes what is saved", ignored=True),
        "act_bits": Flag(int, 8, "inputs have the bits of --weight_bits", ignored=True),
        "act_group_size": Flag(int, 64, "the layer has its own constant, 256", ignored=True),
        "act_topk": Flag(int, 2, "the layer has its own constant, 2", ignored=True),
        "act_stochastic": Flag(bool, False, "the layer rounds to the nearest value", ignored=True),
        "beta1": Flag(
            float, 0.9, "momentum, or decay of the first moment", of=_MOMENTUM
        ),
        "beta2": Flag(float, 0.999, "decay of the second moment", of=_GALORE),
        "rank": Flag(int, 128, "rank of the projection", "optim.rank", of=_GALORE),
        "galore_scale": Flag(float, 1.0, "factor of the update", "optim.scale", of=_GALORE),
        "proj_type": Flag(str, "std", "kind of the projection", "optim.projection_type", of=_GALORE),
        "proj_quant": Flag(bool, False, "quantised projection", of=("q_galore_adamw8bit",)),
        "proj_bits": Flag(int, 8, "bits of the projection", of=("q_galore_adamw8bit",)),
        "proj_group_size": Flag(int, 256, "group of the projection", of=("q_galore_adamw8bit",)),
        "stochastic_round": Flag(bool, False, "stochastic rounding", of=("q_galore_adamw8bit",)),
        "cos_threshold": Flag(float, 1.0, "when a projection is kept", of=("q_galore_adamw8bit",)),
        "gamma_proj": Flag(int, 2, "how long it is kept", of=("q_galore_adamw8bit",)),
        "queue_size": Flag(int, 5, "projections that are compared", of=("q_galore_adamw8bit",)),
        "save_every": Flag(int, 10_000, "steps between checkpoints", "checkpoint.every"),
        "resume_step": Flag(int, None, "the checkpoint of --continue_from to load; by default the newest"),
        "restore_optimizer": Flag(bool, False, "loads the optimizer, too, where there is --continue_from"),
        "workers": Flag(int, 16, "processes that read the data"),
        "name": Flag(str, "test", "name of the run in Weights & Biases", "name"),
        "project": Flag(str, "test", "project in Weights & Biases"),
        "entity": Flag(str, None, "owner of the project in Weights & Biases"),
        "tags": Flag(str, None, "tags in Weights & Biases"),
        "unset_wandb": Flag(bool, False, "does not log to Weights & Biases"),
    },
)  # fmt: skip

PROGRAMS = {program.name: program for program in (_SPAM_PROGRAM, _STABLE_SPAM_PROGRAM)}

_HERE = {
    "use_hf_model": "evenstep's LLaMA computes the same as well",
    "workers": "the loader of evenstep needs no processes",
    "single_gpu": "as here without torchrun",
    "load_local": "give --data.source for data of your own",
    **dict.fromkeys(("project", "entity", "tags"), "--telemetry.wandb online logs to Weights & Biases"),
    "unset_wandb": "as here without --telemetry.wandb online",
    "restore_optimizer": "evenstep continues its own runs: evenstep pretrain --resume RUN",
    "resume_step": "evenstep continues its own runs: evenstep pretrain --resume RUN",
    "gradient_accumulation": "train.batch_size / train.micro_batch_size",
    "max_train_tokens": "train.steps",
    "weight_bits": "lowbit",
    "real_fp4": "refused; --lowbit fp4 and nvfp4 are the FP4 of hardware",
    "weight_group_size": "lowbit; 256 only",
    "beta1": "optim.momentum, or optim.betas",
    "beta2": "optim.betas",
    "model_config": "model.size, or model.config where the file exists",
    "dtype": "train.dtype: bf16 or fp32",
    "scheduler": "schedule.name: cosine; linear: wsd that decays to 0; cosine_restarts is refused",
    "warmup_steps": "schedule.warmup_steps",
    "fp4": "lowbit fp4-official",
    "act_quant": "lowbit int4-official or int8-official",
    "update_proj_gap": "optim.reset_interval, or optim.update_proj_gap",
    "continue_from": "model.init: the weights alone",
}
"""What takes the place of a flag in evenstep, where it is not simply its option."""

_AT_ITS_WORD = {
    "update_gap": "optim.reset_interval",
    "warmup_epoch": "optim.warmup_steps",
    "grad_accu_steps": "optim.clip_start",
}
"""Flags of torchrun_main.py that are ignored there, and the options that ``--as-written`` sets from them."""


_TITLES = {
    "spam": "SPAM", "stablespam": "Stable-SPAM", "sgd": "SGD", "adafactor": "Adafactor", "galore_adamw": "GaLore",
    "q_galore_adamw8bit": "Q-GaLore",
}  # fmt: skip


def flag_table(program: Program) -> str:
    """The flags of a program as a table in Markdown, for docs/official.md."""
    lines = ["| flag | default | the published program | evenstep |", "|---|---|---|---|"]
    for name, flag in program.flags.items():
        default = "" if flag.default is None or flag.default is False else f"`{_written(flag.default)}`"
        owners = ", ".join(_TITLES[name] for name in flag.of)
        meaning = f"**ignored**: {flag.meaning}" if flag.ignored else ": ".join(filter(None, (owners, flag.meaning)))
        here = _HERE.get(name) or (f"`{flag.option}`" if flag.option else "")
        if flag.ignored:
            here = f"`{_AT_ITS_WORD[name]}` with `--as-written`" if name in _AT_ITS_WORD else "-"
        if flag.of == ("q_galore_adamw8bit",):
            here = "Q-GaLore is refused"
        lines.append(f"| `--{name}` | {default} | {meaning} | {here} |")
    return "\n".join(lines) + "\n"


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---- a command line ----


@dataclass
class Line:
    """A published command line.

    Attributes:
        launcher: the words before the program, such as torchrun and its options.
        program: the published program.
        words: the words after the program.
        given: flag -> value, for the flags of the line, in their order.
        texts: flag -> the text of its value in the line.
        processes: the number of processes that the launcher starts.
    """

    launcher: list[str]
    program: Program
    words: list[str]
    given: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    processes: int = 1

    def value(self, name: str) -> Any:
        """The value of a flag, or the default of the published program."""
        return self.given.get(name, self.program.flags[name].default)

    @property
    def optimizer(self) -> str:
        """The value of --optimizer in lower case, as the program compares it; empty where there is none."""
        return (self.value("optimizer") or "").lower()


def parse_line(words: Sequence[str]) -> Line:
    """The published command line that ``words`` are. EvenstepError, one line, for a program that is not known, an
    unknown flag, and a value that is missing or of the wrong type."""
    at = next((i for i, word in enumerate(words) if Path(word).name in PROGRAMS), None)
    if at is None:
        scripts = [Path(word).name for word in words if word.endswith(".py")]
        named = f"'{scripts[0]}' is not a published program" if scripts else "the line names no published program"
        hint = nearest(scripts[0], [*PROGRAMS]) if scripts else ""
        raise EvenstepError(f"{named}{hint}; give evenstep official -- {' or '.join(PROGRAMS)}, and its flags")
    line = Line([*words[:at]], PROGRAMS[Path(words[at]).name], [*words[at + 1 :]])
    line.processes = _count(line.launcher, "nproc_per_node") * _count(line.launcher, "nnodes")
    rest = iter(line.words)
    following = next(rest, None)
    while following is not None:
        name, equals, text = following.removeprefix("--").partition("=")
        flag = line.program.flags.get(name) if following.startswith("--") else None
        if flag is None:
            raise _unknown(line.program, following)
        following = next(rest, None)
        if flag.kind is bool:
            if equals:
                raise EvenstepError(f"{line.program.name}: --{name} takes no value; leave out '={text}'")
            line.given[name] = True
            continue
        if not equals and following is not None and not following.startswith("--"):
            text, equals, following = following, "=", next(rest, None)
        if not equals and flag.kind is not None:
            raise EvenstepError(
                f"{line.program.name}: --{name} has no value; give --{name} {flag.kind.__name__.upper()}"
            )
        line.given[name] = _converted(line.program, name, flag, text) if equals else True
        line.texts[name] = text
    return line


def _count(launcher: Sequence[str], name: str) -> int:
    """The number of processes or machines that torchrun gets; 1 for one that is not a number, such as "gpu"."""
    text = " ".join(launcher).replace("-", "_")
    found = re.search(rf"__{name}[= ](\d+)(?: |$)", text)
    return int(found[1]) if found else 1


def _unknown(program: Program, word: str) -> EvenstepError:
    if not word.startswith("--"):
        return EvenstepError(f"{program.name}: '{word}' belongs to no flag; give --FLAG VALUE")
    if "." in word:
        return EvenstepError(f"{program.name}: {word} is an option of evenstep; give it in front of --")
    name = word.removeprefix("--").partition("=")[0]
    hint = nearest(f"--{name}", [f"--{known}" for known in program.flags])
    return EvenstepError(f"{program.name} has no flag --{name}{hint}; docs/official.md lists its flags")


def _converted(program: Program, name: str, flag: Flag, text: str) -> Any:
    if flag.kind not in (int, float):
        return text
    try:
        return flag.kind(text)
    except ValueError:
        what = "a whole number" if flag.kind is int else "a number"
        raise EvenstepError(f"{program.name}: --{name} {text} is not {what}") from None


# ---- its recipe ----


def translated(
    line: Line, overrides: Sequence[tuple[str, str]] = (), *, as_written: bool = False
) -> tuple[Tables, dict[str, str]]:
    """The recipe of a command line: its options as tables, and a remark on each flag that is more than the value of
    one option.

    Args:
        line: the command line.
        overrides: options of evenstep and their texts, which replace those of the line. Where optim.name is one of
            them, the line may name an optimizer that has no translation.
        as_written: use the values of the flags in `_AT_ITS_WORD`, which the published program ignores.

    Raises:
        EvenstepError: what the published program refuses too, what evenstep cannot do, and an override that is no
            option or does not fit.
    """
    given = dict(overrides)
    work = _Translation(line, as_written, given.get("optim.name"))
    work.run()
    tables = override(without_foreign_options(work.tables, overrides, Path(line.program.name)), overrides)
    config = build(tables)
    checked = to_tables(config)
    for key in given:  # a count from the command line is a text
        section, _, name = key.partition(".") if "." in key else ("", "", key)
        own, of_config = (tables.get(section, {}), checked[section]) if section else (tables, checked)
        if name in own:
            own[name] = of_config[name]
    if "data.max_tokens" not in given:
        tables["data"]["max_tokens"] = _rounded_up(config.total_steps * config.tokens_per_step)
    return tables, work.remarks


class _Translation:
    """The work of `translated`."""

    def __init__(self, line: Line, as_written: bool, replacement: str | None) -> None:
        self.line, self.as_written, self.replacement = line, as_written, replacement
        self.tables: Tables = {}
        self.remarks: dict[str, str] = {}
        self.optimizer = line.optimizer

    def run(self) -> None:
        self._data()
        self._model()
        self._optimizer()
        for name, flag in self.line.program.flags.items():
            own = not flag.of or self.optimizer in flag.of
            plain = flag.kind in (int, float) or (flag.kind is bool and name in self.line.given)
            if flag.option and own and plain and flag.option != "lowbit" and self.line.value(name) is not None:
                self._set(flag.option, self.line.value(name))
        if self.optimizer == "galore_adamw":
            self.tables["optim"]["update_proj_gap"] = self.tables["optim"].pop("reset_interval")
            self.remarks["update_proj_gap"] = "optim.update_proj_gap: steps between projections"
        self._batch_and_budget()
        self._schedule()
        self._number_formats()
        self._names()
        if self.optimizer in ("spam", "stablespam"):
            self._spam()

    def _set(self, option: str, value: Any) -> None:
        section, _, name = option.rpartition(".")
        (self.tables.setdefault(section, {}) if section else self.tables)[name] = value

    def _refuse(self, problem: str) -> EvenstepError:
        return EvenstepError(f"{self.line.program.name}: {problem}")

    def _data(self) -> None:
        self.tables["data"] = {"source": "hf:allenai/c4:en", "vocab_size": 32000, "val_fraction": 0.005}

    def _model(self) -> None:
        given, start = self.line.value("model_config"), self.line.value("continue_from")
        if given is None:
            raise self._refuse("--model_config is missing; give the shape, such as configs/llama_130m.json")
        path = Path(given)
        size = path.name.removeprefix("llama_").removesuffix(".json")
        if start is not None:
            self._set("model.init", start)
            self.remarks["model_config"] = "the weights of --continue_from have their shape"
            self.remarks["continue_from"] = (
                f'model.init = "{start}": the weights alone; step, optimizer and place in the data start anew'
            )
        elif path.is_file():
            self._set("model.config", given)
        elif path.name == f"llama_{size}.json" and size in SIZE_NAMES:
            self._set("model.size", size)
        else:
            known = ", ".join(f"llama_{name}.json" for name in SIZE_NAMES if name != "tiny")
            raise self._refuse(f"--model_config {given}: no such file, and evenstep has only the shapes {known}")
        for name in ("restore_optimizer", "resume_step"):
            if name in self.line.given and start is None:
                self.remarks[name] = "no effect without --continue_from"

    def _optimizer(self) -> None:
        known = self.line.program.optimizers
        given = self.line.value("optimizer")
        if self.optimizer in known:
            self._set("optim.name", known[self.optimizer])
        elif self.replacement is not None:
            self._replace()
        elif given is None:
            raise self._refuse(f"--optimizer is missing; give {', '.join(known)}")
        else:
            raise self._refuse(
                f"--optimizer {given} has no translation{nearest(self.optimizer, [*known])}; give one of "
                f"{', '.join(known)}; --optim.name NAME in front of -- replaces it"
            )
        if self.line.value("weight_decay"):
            self._set("optim.decay", "all")
        first = self.line.program.flags.get("beta1") and self.line.value("beta1")
        if self.optimizer == "sgd":
            self._set("optim.momentum", first)
            self.remarks["beta1"] = f"optim.momentum = {first:g}"
        elif self.optimizer == "galore_adamw":
            self._set("optim.betas", [first, self.line.value("beta2")])
            self._set("optim.projection_type", self.line.value("proj_type"))
            self.remarks |= dict.fromkeys(("beta1", "beta2"), f"optim.betas = {self.tables['optim']['betas']}")
        elif self.optimizer == "adafactor":
            if self.replacement not in (None, "adafactor"):
                self._replace()
                return
            if first:
                raise self._refuse(
                    f"adafactor with --beta1 {first:g} has a first moment, and evenstep's has none; give --beta1 0"
                )
            self.remarks["beta1"] = "no first moment, as in evenstep's Adafactor: there is no option for it"
            self.remarks["optimizer"] = (
                'optim.name = "adafactor": torch\'s, which multiplies the rate by the RMS of each parameter and bounds '
                "it by 1 / sqrt(step); the program's does neither"
            )

    def _replace(self) -> None:
        """Take the optimizer of the overrides for one that is missing in the line, or has no translation."""
        self._set("optim.name", self.replacement)
        of_optimizers = [name for name, flag in self.line.program.flags.items() if flag.of]
        text = f"no effect: --optim.name {self.replacement} replaces the optimizer of the line"
        self.remarks |= dict.fromkeys(["optimizer", *of_optimizers], text)

    def _batch_and_budget(self) -> None:
        micro, total = self.line.value("batch_size"), self.line.value("total_batch_size")
        passes, processes = self.line.value("gradient_accumulation"), self.line.processes
        if micro is None or micro < 1:
            raise self._refuse("--batch_size is missing or below 1; give the sequences of a forward pass")
        if total is None:
            total = micro * (passes or 1)
            if processes > 1:
                raise self._refuse(
                    f"{processes} processes need --total_batch_size; give --total_batch_size {total * processes}"
                )
        at_once = micro * processes
        wrong = total % at_once or total < at_once or (passes and passes * at_once != total)
        if wrong:
            times = f"--gradient_accumulation {passes}" if passes else "a whole number"
            raise self._refuse(
                f"--total_batch_size {total} is not --batch_size {micro} x {processes} processes x {times}; the "
                "published program refuses this, too"
            )
        self._set("train.batch_size", total)
        self._set("train.micro_batch_size", micro)
        if tokens := self.line.value("max_train_tokens"):
            self._tokens(tokens, total)
        self._set("eval.max_tokens", "10M")

    def _tokens(self, text: str, sequences: int) -> None:
        try:
            tokens = parse_count(text)
        except ValueError:
            raise self._refuse(f"--max_train_tokens {text} is not a count; give one such as 100M or 1B") from None
        per_step = sequences * self.tables["train"]["seq_len"]
        steps = tokens // (per_step if self.as_written else sequences)
        self._set("train.steps", steps)
        self.remarks["num_training_steps"] = "no effect beside --max_train_tokens"
        self.remarks["max_train_tokens"] = f"train.steps = {steps}: " + (
            f"{tokens:,} tokens / {per_step:,} tokens of a step"
            if self.as_written
            else f"the program divides by the {sequences} sequences of a step, not by its {per_step:,} tokens, and so "
            f"trains {self.tables['train']['seq_len']} times as long; --as-written gives the tokens of the flag"
        )

    def _schedule(self) -> None:
        name = self.line.value("scheduler")
        if name == "linear":
            self.tables["schedule"] |= {"name": "wsd", "decay_fraction": 1.0, "min_lr_ratio": 0.0}
            self.remarks["scheduler"] = 'schedule.name = "wsd" that decays from the warm-up on: linear to 0'
            self.remarks["min_lr_ratio"] = "no effect: a linear schedule ends at 0"
        elif name == "cosine":
            self._set("schedule.name", name)
        else:
            raise self._refuse(f"--scheduler {name} has no translation; give cosine or linear")

    def _number_formats(self) -> None:
        dtypes = {"bfloat16": "bf16", "bf16": "bf16", "float32": "fp32", "fp32": "fp32"}
        dtype = self.line.value("dtype")
        if dtype not in dtypes:
            raise self._refuse(f"--dtype {dtype} has no translation; give bfloat16 or float32")
        self._set("train.dtype", dtypes[dtype])
        if "fp4" not in self.line.program.flags:
            return
        four, integers, bits = (self.line.value(name) for name in ("fp4", "act_quant", "weight_bits"))
        if self.line.value("real_fp4"):
            raise self._refuse("--real_fp4 has no translation; leave it out, and give --lowbit fp4 or nvfp4 before --")
        if not (four or integers):
            self.remarks |= dict.fromkeys(
                ("weight_bits", "weight_group_size"), "no effect: neither --fp4 nor --act_quant is given"
            )
            return
        if four and integers:
            raise self._refuse("--fp4 and --act_quant both choose the layers; give one of them")
        group = self.line.value("weight_group_size")
        if group != 256:
            raise self._refuse(f"--weight_group_size {group} has no translation; evenstep has groups of 256")
        if integers and bits not in (4, 8):
            raise self._refuse(f"--weight_bits {bits} has no translation; give 4 or 8")
        name = "fp4-official" if four else f"int{bits}-official"
        self._set("lowbit", name)
        text = f'lowbit = "{name}"'
        if four:
            self.remarks["weight_bits"] = "no effect beside --fp4"
            self.remarks["fp4"] = f"{text}: nine even levels. The FP4 of hardware is E2M1: --lowbit fp4"
        else:
            self.remarks["weight_bits"] = self.remarks["act_quant"] = text
        self.remarks["weight_group_size"] = (
            "256, over the flattened tensor: with widths that are not multiples of 256 (60M, 350M, 1B) a model can "
            f"read ahead. Groups that end with their token: --lowbit {name.removesuffix('-official')}"
        )

    def _names(self) -> None:
        size = Path(self.line.value("model_config")).stem.removeprefix("llama_")
        of_line = self.optimizer in self.line.program.optimizers
        self._set("name", f"official-{size}-{self.optimizer if of_line else self.replacement}")
        if (out := self.line.value("save_dir")) is not None:
            self._set("out", out)
        if "name" in self.line.given and not self.line.program.flags["name"].ignored:
            self._set("name", self.line.given["name"])

    def _spam(self) -> None:
        """The settings that make SPAM and Stable-SPAM those of the published code."""
        optim = self.tables["optim"]
        optim["variant"] = "official"
        if self.optimizer == "stablespam":
            if self.tables["train"]["steps"] > optim["total_steps"]:
                self.remarks["total_T"] = (
                    f"optim.total_steps = {optim['total_steps']}: the schedule of beta1 and gamma1 is shorter than the "
                    f"{self.tables['train']['steps']} steps of the run and rises again after its end"
                )
            return
        if optim["density"] < 1:
            optim["density_of"] = "hidden"
        if "DeltaT" not in self.line.program.flags:
            return
        optim["warmup_steps"], optim["clip_start"] = self.line.value("warmup_steps"), 20
        if self.as_written:
            for flag, option in _AT_ITS_WORD.items():
                if flag != "update_gap" or flag in self.line.given:
                    self._set(option, self.line.value(flag))
                self.remarks[flag] = (
                    f"{option} = {self.line.value(flag)}, at its word; the published program ignores it"
                )
            return
        self.remarks["warmup_steps"] = (
            f"schedule.warmup_steps and, after each reset, optim.warmup_steps: {_rewarm(optim)}"
        )


def _rewarm(optim: Tables) -> str:
    """What the length of the warm-up after a reset means for the rate."""
    length, every = optim["warmup_steps"], optim["reset_interval"]
    if not every or length <= every:
        return f"a reset is followed by {length} steps of warm-up"
    # The factor of the last step before the next reset, k = every - 1.
    most = 1 - 0.99 * (1 + math.cos(math.pi * (every - 1) / (length + 1))) / 2
    return (
        f"{length} steps, and the next reset comes after {every}. From the first reset on the rate never exceeds "
        f"{math.floor(most * 1000 + 0.5) / 1000:g} of the stated one; --as-written warms up over --warmup_epoch"
    )


def _rounded_up(tokens: int) -> str:
    """``tokens`` and 2 % more, so that packing loses none, as a count with two digits."""
    needed = max(1000, tokens * 1.02)
    scale, letter = next((s, x) for s, x in ((10**9, "B"), (10**6, "M"), (10**3, "K")) if needed >= s)
    digits = math.ceil(needed / scale * 10) / 10 if needed < 10 * scale else math.ceil(needed / scale)
    return f"{digits:g}{letter}"


# ---- its text ----

_READ_WITH_CARE = (
    "The text is packed here, and padded to --max_length there (about 76 % of those tokens are text).",
    "The tokenizer is trained on the text; the program's is that of T5-base: --data.tokenizer FILE.",
    "A loss that the program prints is N / (N + 1) of the true one, about 1 % too low (its batches count from 1).",
)


def recipe_text(
    line: Line,
    tables: Tables,
    remarks: dict[str, str],
    overrides: Sequence[tuple[str, str]] = (),
    *,
    as_written: bool = False,
) -> str:
    """The recipe as TOML, below comments that say what the published program does with each flag of the line.

    ``tables`` and ``remarks`` are those of `translated` with the same ``overrides`` and ``as_written``, which the
    comments name.
    """
    program = line.program
    ignored = [f"--{name}" for name in line.given if program.flags[name].ignored]
    out = [
        f"A command line of {program.name} ({program.paper}) as a recipe.",
        f"{len(ignored)} of its {len(line.given)} flags are ignored by the published program{': ' if ignored else ''}"
        f"{', '.join(ignored)}.",
        "For each flag: the option here, and what the published program does with the flag.",
    ]
    out = [part for text in out for part in textwrap.wrap(text, 77)]
    out.append("")
    for name in line.given:
        out += _entry(f"--{name} {line.texts.get(name, '')}".rstrip(), _explained(line, name, remarks))
    acts = line.optimizer in program.optimizers  # otherwise the optimizer of the overrides takes its place
    implied = [
        name for name, flag in program.flags.items() if acts and name not in line.given and _acts(line, name, flag)
    ]
    if implied:
        out += ["", "not given, so the default of the program holds:"]
        for name in implied:
            out += _entry(f"--{name} {_written(line.value(name))}", _explained(line, name, remarks))
    if overrides:
        out += ["", "given in front of -- for evenstep:"]
        out += [f"  --{key} {value}" for key, value in overrides]
    out += ["", "Read with care:"]
    for text in _READ_WITH_CARE:
        out += textwrap.wrap(f"- {text}", 77, subsequent_indent="  ")
    out += _about_processes(line, ["--as-written"] * as_written + [f"--{key}={value}" for key, value in overrides])
    return "\n".join(f"# {text}".rstrip() for text in out) + "\n\n" + tables_to_toml(_in_order(tables))


def _acts(line: Line, name: str, flag: Flag) -> bool:
    """Whether the default of a flag decides something that the reader of the line may not expect."""
    return bool(flag.of) and line.optimizer in flag.of and flag.default is not None


def _explained(line: Line, name: str, remarks: dict[str, str]) -> str:
    flag = line.program.flags[name]
    if name in remarks:
        return remarks[name]
    if flag.ignored:
        return f"IGNORED by the program: {flag.meaning}"
    if flag.of and line.optimizer not in flag.of:
        return f"no effect with {line.value('optimizer')}: {flag.meaning}"
    here = flag.option or _HERE.get(name, "")
    return f"{here}: {flag.meaning}" if flag.option else f"{flag.meaning}; {here}"


def _entry(flag: str, text: str) -> list[str]:
    """A flag and its explanation, which stands beside it or, where the flag is long, below it."""
    indent = " " * 28
    lines = textwrap.wrap(text, 77, initial_indent=indent, subsequent_indent=indent)
    if len(flag) <= 24:
        return [f"  {flag:<26}{lines[0].lstrip()}", *lines[1:]]
    return [f"  {flag}", *lines]


def _about_processes(line: Line, own: list[str]) -> list[str]:
    """How to run with as many processes as the published line, unless this is one of them. ``own``: the options of
    evenstep, which stand in front of the line."""
    here = world_size()
    if line.processes <= 1 or here == line.processes:
        return []
    text = (
        f"The line starts {line.processes} processes, and this run has {here}, which takes the same steps alone. For "
        f"{line.processes} processes, whose gradients are averaged by DDP as there:"
    )
    words = shlex.join([*own, "--", line.program.name, *line.words])
    return ["", *textwrap.wrap(text, 77), f"  {shlex.join(line.launcher)} -m evenstep official {words}"]


def world_size() -> int:
    """The number of processes that torchrun has started, of which this is one; 1 without torchrun."""
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdigit() else 1


def _in_order(tables: Tables) -> Tables:
    """The options outside of sections first, as TOML wants them, then the sections."""
    order = ("data", "model", "optim", "schedule", "train")
    top = {key: value for key, value in tables.items() if not isinstance(value, dict)}
    sections = {key: value for key, value in tables.items() if isinstance(value, dict)}
    return top | {key: sections[key] for key in order if key in sections} | sections


if __name__ == "__main__":
    for each in PROGRAMS.values():
        print(f"{each.name}\n\n{flag_table(each)}")
