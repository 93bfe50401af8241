"""What a run is made of: one frozen dataclass per section, every option with its help, range and place in a resume.

These classes are the single list of options. The flags of the command line, ``docs/configuration.md``, the checks of
type and range, and the rules of what may change on ``--resume`` are all read from their fields. To add an option, add a
field. Nothing here imports torch, so that ``evenstep --help`` stays fast.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from evenstep.baselines.catalog import BASELINES
from evenstep.baselines.rules import DENSITY_OF
from evenstep.errors import EvenstepError, nearest
from evenstep.optim.options import RANGES, SCALE, SPAM, STABLE_SPAM, Option

# ---- values: types, ranges, choices, counts ----

LARGEST = 10**300
"""Integers beyond it are no floats any more."""


def kinds(hint: Any) -> tuple[type, ...]:
    """The plain types of a hint: ``int | None`` -> (int, NoneType)."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def parse_count(text: str) -> int:
    """``"1.5B"`` -> 1500000000; K, M, B (or G) and T are powers of a thousand. ValueError when it is no whole
    number."""
    scale = {"K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}.get(text[-1:].upper())
    value = float(text[:-1]) * scale if scale else float(text.replace("_", ""))
    if not math.isfinite(value) or round(value) != round(value, 6):
        raise ValueError(text)
    return round(value)


def checked(key: str, value: Any, hint: Any, meta: Mapping[str, Any]) -> Any:
    """``value`` as the option's type, in its range; EvenstepError names the option, what was given and what is
    allowed."""
    allowed, choices = kinds(hint), meta["choices"]
    if meta["count"] and isinstance(value, str):
        try:
            value = parse_count(value)
        except ValueError:
            raise EvenstepError(
                f"{key}: {_short(value)} is no count; give a whole number, or one like 20K, 100M, 1.5B"
            ) from None
    if isinstance(value, int) and not isinstance(value, bool) and float in allowed:
        value = float(min(max(value, -LARGEST), LARGEST))
    if type(value) not in allowed:
        words = {"NoneType": "none", "bool": "true or false"}
        names = " or ".join(words.get(kind.__name__, kind.__name__) for kind in allowed)
        raise EvenstepError(f"{key}: {_short(value)} is {type(value).__name__}, expected {names}")
    if isinstance(value, str) and not _is_unicode(value):
        raise EvenstepError(f"{key}: {_short(value)} is not valid UTF-8, and config.toml has to hold it; rename it")
    form = meta.get("form")
    fits_form = form and isinstance(value, str) and re.fullmatch(form, value)
    if isinstance(value, str) and choices and value not in choices and not fits_form:
        number = "a number or " if int in allowed else ""
        given, hint = _short(value), nearest(value, choices)
        raise EvenstepError(f"{key}: {given} is not {number}one of {', '.join(choices)}{hint}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, above, high = meta["low"], meta["above"], meta["high"]
        fits = (
            (isinstance(value, int) or math.isfinite(value))
            and (low is None or value >= low)
            and (above is None or value > above)
        )
        if not fits or (high is not None and value > high):
            lower = f"at least {low}" if low is not None else f"above {above}"
            upper = f" and at most {high}" if high is not None else ""
            raise EvenstepError(f"{key}: {_short(value)} is out of range; it must be {lower}{upper}")
    return value


def _short(value: Any) -> str:
    """As Python writes it, the middle of what is very long left out."""
    try:
        text = repr(value)
    except ValueError:  # of an integer with thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:40]}...{text[-20:]}"


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes of a path or an argument that are no UTF-8
        return False
    return True


def limits(meta: Mapping[str, Any]) -> str:
    """The range or the choices of an option for help and docs, or nothing: `` (>= 0, <= 1)``."""
    if meta["choices"] and len(meta["choices"]) > 1:
        return f" ({' | '.join(meta['choices'])})"
    bounds = [(">=", meta["low"]), (">", meta["above"]), ("<=", meta["high"])]
    found = [f"{sign} {bound}" for sign, bound in bounds if bound is not None]
    return f" ({', '.join(found)})" if found else ""


# ---- how an option is declared ----

MOST_STEPS = 10**12
MOST_TOKENS = 10**18
MOST_SEQUENCES = 2**20
"""The largest values of options that count steps, tokens, and sequences of a batch (and tokens of a sequence): beyond
what anybody trains, and small enough for every number that is made of them. Whether memory holds them is another
question (`evenstep.train.task.Pretraining.check_memory`)."""

Resume = Literal["fixed", "rounding", "free"]
"""May an option change on resume? fixed: no. rounding: yes, the last bits of the losses change. free: yes, nothing
else moves."""


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    choices: Collection[str] | None = None,
    form: str | None = None,
    count: bool = False,
    joined: bool = False,
    resume: Resume = "fixed",
) -> Any:
    """A dataclass field with its help; ``low``/``high`` are allowed values, ``above`` is not; ``count`` accepts 20K,
    100M, 1.5B. ``form`` is a regular expression of texts that are allowed beside the choices. ``joined``: given several
    times, the texts are joined by commas."""
    metadata = {
        "help": help, "low": low, "above": above, "high": high, "choices": choices, "form": form, "count": count,
        "joined": joined, "resume": resume,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Section:
    """Checks every field's type and range when built, from Python as from a file."""

    TITLE: ClassVar[str] = ""
    SECTION: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            if f.metadata:
                key = f"{self.SECTION}.{f.name}" if self.SECTION else f.name
                object.__setattr__(self, f.name, checked(key, getattr(self, f.name), hints[f.name], f.metadata))


# ---- the sections ----

SIZE_NAMES = (
    "tiny", "9m", "20m", "35m", "40m", "60m", "71m", "100m", "130m", "250m", "350m", "1b", "3b", "7b",
)  # fmt: skip
"""The names in evenstep.models.SIZES, which needs torch."""

LOWBIT_NAMES = (
    "fp4-official", "int4-official", "int8-official", "a4w4", "fp4", "e1m2", "int4", "int3", "int2", "int8", "fp8",
    "mxfp4", "mxfp6", "mxfp8", "nvfp4", "nvfp4-train",
)  # fmt: skip
"""The names in evenstep.lowbit.RECIPES, which needs torch."""


@dataclass(frozen=True)
class DataConfig(Section):
    TITLE = "the text and its tokens"
    SECTION = "data"
    source: str = option("stdlib", "stdlib | kjv | text:GLOB | hf:NAME[:CONFIG] | shards:DIR")
    tokenizer: str = option("bpe", "bpe (trained once on the source), or a tokenizer.json or SentencePiece .model file")
    vocab_size: int | None = option(
        None, "entries of the vocabulary bpe trains (none: 4096), fewer for a short text; of a given tokenizer, the "
        "most it may have", low=1, high=2**20,
    )  # fmt: skip
    val_fraction: float = option(0.02, "share of the documents kept for validation; 0: none", low=0, high=0.5)
    text_field: str = option(
        "text", "the field that holds the text in .jsonl, .json, .csv, .parquet and hf: sources; several by commas: "
        "the first that a row has",
    )  # fmt: skip
    max_tokens: int | None = option(
        None, "stop preparing after this many tokens (none: the whole source)", low=1, high=MOST_TOKENS, count=True
    )
    cache_dir: str | None = option(
        None, "where prepared tokens are kept (none: the user's cache directory)", resume="free"
    )
    # Free on resume, which compares the tokens: a folder may have come by files since, which these leave out.
    exclude: str | None = option(
        None, "files of text: sources to leave out: globs, separated by commas or given several times", resume="free",
        joined=True,
    )  # fmt: skip
    on_bad: str | None = option(
        None, "a file or row that cannot be used: stop, or skip and count it (none: stop)", choices=("stop", "skip"),
        resume="free",
    )  # fmt: skip


@dataclass(frozen=True)
class ModelConfig(Section):
    TITLE = "the model"
    SECTION = "model"
    size: str | None = option(None, "the shape (none: tiny; with model.init, that model's own)", choices=SIZE_NAMES)
    norm: str | None = option(
        None, "where each block normalises (none: pre; with model.init, as that model does)",
        choices=("pre", "post", "mix"),
    )  # fmt: skip
    norm_alpha: float | None = option(
        None, "share of Post-LN blocks, used by norm mix alone (none: 0.25; with model.init, that model's own)",
        low=0, high=1,
    )  # fmt: skip
    init: str | None = option(None, "a directory in Hugging Face layout to start from")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init is None:
            for name, default in (("size", "tiny"), ("norm", "pre"), ("norm_alpha", 0.25)):
                if getattr(self, name) is None:
                    object.__setattr__(self, name, default)

    @property
    def label(self) -> str:
        """The size in names and tables; "custom" for a given model of no named shape."""
        return self.size or "custom"


@dataclass(frozen=True)
class OptimConfig(Section):
    TITLE = "the optimizer (and its other hyperparameters by constructor name: --optim.gamma1 0.85)"
    SECTION = "optim"
    name: str = option(
        "stable_spam", "the optimizer, or package.module:Class (evenstep optimizers tells of each)",
        choices=BASELINES.keys(), form=r"[\w.]+:\w+",
    )  # fmt: skip
    before: str = option("", "gradient transforms in front of it, as 'adaclip + adagn(gamma1=0.7)'")
    lr: float = option(1e-3, "the highest rate", above=0, high=1e38)
    weight_decay: float = option(0.0, "decay of the parameters that optim.decay names", low=0, high=1e38)
    decay: str = option(
        "matrices", "which parameters decay: those of two or more dimensions, or all", choices=("matrices", "all")
    )
    options: Mapping[str, Any] = field(default_factory=dict)
    """Every other hyperparameter, by the name it has in the optimizer's constructor; checked against it by
    train.optimizers."""


@dataclass(frozen=True)
class ScheduleConfig(Section):
    TITLE = "the learning rate over time"
    SECTION = "schedule"
    name: str = option(
        "cosine", "its shape after the warm-up (wsd: stable, then decay)", choices=("cosine", "wsd", "constant")
    )
    warmup_steps: int | None = option(
        None, "steps of linear warm-up (none: a tenth of all steps)", low=0, high=MOST_STEPS, count=True
    )
    min_lr_ratio: float = option(0.1, "the last learning rate as a share of the highest (cosine, wsd)", low=0, high=1)
    decay_fraction: float = option(0.2, "share of the steps that wsd spends decaying", above=0, high=1)


@dataclass(frozen=True)
class TrainConfig(Section):
    TITLE = "the training"
    SECTION = "train"
    steps: int | None = option(
        None,
        "the budget in optimizer steps; give this or train.tokens",
        low=1,
        high=MOST_STEPS,
        count=True,
        resume="free",
    )
    tokens: int | None = option(
        None, "the budget in tokens: 20K, 100M, 1.5B", low=1, high=MOST_TOKENS, count=True, resume="free"
    )
    batch_size: int = option(8, "sequences per optimizer step, over all ranks", low=1, high=MOST_SEQUENCES)
    micro_batch_size: int | None = option(
        None, "sequences in one forward pass (none: batch_size)", low=1, high=MOST_SEQUENCES, resume="rounding"
    )
    seq_len: int = option(256, "tokens per sequence", low=2, high=MOST_SEQUENCES)
    dtype: str = option(
        "fp32", "number format; bf16-autocast keeps fp32 weights, bf16 does not",
        choices=("fp32", "bf16-autocast", "bf16"),
    )  # fmt: skip
    device: str = option(
        "auto", "auto takes the GPU when there is one", choices=("auto", "cpu", "cuda"), resume="rounding"
    )
    compile: bool = option(False, "compile the model: slower to start, faster to run", resume="rounding")
    activation_checkpointing: bool = option(
        False, "recompute activations in backward: less memory, more time", resume="rounding"
    )
    loss_chunk: int | str = option(
        "auto", "rows of logits alive at once; 0: all; auto: 256 on a CPU, else all if they fit an eighth of memory",
        low=0, high=10**12, choices=("auto",), resume="rounding",
    )  # fmt: skip
    clip_norm: float = option(0.0, "clip the norm of all gradients together to this; 0: off", low=0, high=1e30)
    on_nan: str = option(
        "stop", "a loss that is not finite: end the run, leave its batch out, or go back to the last checkpoint and "
        "leave it out then", choices=("stop", "skip", "rewind"), resume="free",
    )  # fmt: skip
    deterministic: bool = option(False, "refuse operations whose result may differ between two runs", resume="rounding")
    threads: int = option(0, "CPU threads; 0: as torch decides (OMP_NUM_THREADS)", low=0, high=1024, resume="rounding")


@dataclass(frozen=True)
class ParallelConfig(Section):
    TITLE = "several processes, started by torchrun"
    SECTION = "parallel"
    mode: str = option(
        "none", "ddp: a copy in every process; fsdp: a part in each; hsdp: parts in a group, copies between groups; "
        "tp+fsdp: each matrix over a few processes, parts over the others",
        choices=("none", "ddp", "fsdp", "hsdp", "tp+fsdp"), resume="rounding",
    )  # fmt: skip
    tensor: int | None = option(
        None, "processes that share each matrix product, tp+fsdp alone (none: those of one machine)", low=1, high=2**20,
        resume="rounding",
    )  # fmt: skip
    replicate: int | None = option(
        None,
        "groups that each hold the whole model, hsdp alone (none: one a machine)",
        low=1,
        high=2**20,
        resume="rounding",
    )
    reshard: bool = option(
        True, "free gathered weights after the forward pass, gather them again in the backward (all but ddp)",
        resume="rounding",
    )  # fmt: skip
    timeout: float = option(
        600.0, "seconds without progress after which the run ends and names the process that is missing", above=0,
        high=30 * 86400, resume="free",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, mode in (("tensor", "tp+fsdp"), ("replicate", "hsdp")):
            if getattr(self, name) is not None and self.mode != mode:
                raise EvenstepError(
                    f"parallel.{name} {getattr(self, name)} has no meaning with parallel.mode {self.mode}; leave it "
                    f"out, or give parallel.mode {mode}"
                )


@dataclass(frozen=True)
class EvalConfig(Section):
    TITLE = "validation"
    SECTION = "eval"
    every: int = option(
        100, "steps between validations; 0: only at the end", low=0, high=MOST_STEPS, count=True, resume="free"
    )
    max_tokens: int = option(
        1_000_000, "validation tokens to use; 0: all", low=0, high=MOST_TOKENS, count=True, resume="free"
    )
    batch_size: int | None = option(
        None, "sequences in one validation pass (none: micro_batch_size)", low=1, high=MOST_SEQUENCES, resume="free"
    )


@dataclass(frozen=True)
class CheckpointConfig(Section):
    TITLE = "checkpoints"
    SECTION = "checkpoint"
    every: int = option(
        500,
        "steps between checkpoints; 0: only at the end and on interruption",
        low=0,
        high=MOST_STEPS,
        count=True,
        resume="free",
    )
    background: bool = option(True, "write them while the training goes on, from a copy in memory", resume="free")
    keep: int = option(2, "how many of the newest checkpoints to keep", low=1, high=10**6, resume="free")


@dataclass(frozen=True)
class LogConfig(Section):
    TITLE = "the log"
    SECTION = "log"
    every: int = option(10, "steps between lines of metrics.jsonl", low=1, high=MOST_STEPS, resume="free")
    curve: bool = option(True, "draw curve.png at the end", resume="free")


@dataclass(frozen=True)
class TelemetryConfig(Section):
    TITLE = "what the optimizer saw (docs/telemetry.md)"
    SECTION = "telemetry"
    enabled: bool = option(True, "measure every step, and tell of spikes", resume="free")
    every: int = option(
        10, "least steps between two lines with the numbers of all parameters", low=1, high=MOST_STEPS, resume="free"
    )
    samples: int = option(
        64, "coordinates of each parameter whose GSS is followed; 0: none", low=0, high=2**16, resume="free"
    )
    ratio: float = option(
        10.0, "an event: a largest entry above this many times its recent mean", above=1, high=1e30, resume="free"
    )
    sigma: float = option(7.0, "spike rate: standard deviations above the mean", above=0, high=1e30, resume="free")
    window: int = option(1000, "spike rate: steps of its mean and of the rate", low=2, high=100_000, resume="free")
    tensorboard: bool = option(False, "also write for TensorBoard, into the run's directory", resume="free")
    wandb: str = option("off", "also Weights & Biases", choices=("off", "offline", "online"), resume="free")
    trackio: bool = option(False, "also trackio's local database", resume="free")


@dataclass(frozen=True)
class SampleConfig(Section):
    TITLE = "the text written at the end"
    SECTION = "sample"
    prompt: str = option("", "how the text starts (empty: as a new document)", resume="free")
    tokens: int = option(120, "tokens to generate; 0: no sample", low=0, high=10**6, resume="free")
    temperature: float = option(0.8, "0: always the likeliest token", low=0, high=1e6, resume="free")
    top_k: int = option(50, "choose among this many likeliest tokens; 0: all", low=0, high=2**20, resume="free")


# ---- the configuration of a run ----

__all__ = [
    "LOWBIT_NAMES", "SIZE_NAMES", "BaseConfig", "CheckpointConfig", "Config", "DataConfig", "EvalConfig", "LogConfig",
    "ModelConfig", "OptimConfig", "ParallelConfig", "SampleConfig", "ScheduleConfig", "TelemetryConfig", "TrainConfig",
    "options", "sections",
]  # fmt: skip


@dataclass(frozen=True)
class BaseConfig(Section):
    """What runs of every kind have. Raises EvenstepError, in one line, for whatever does not fit."""

    TITLE = "the run"
    COMMAND: ClassVar[str] = "pretrain"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=200))
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    seed: int = option(0, "seed of the initial weights and of the order of the data", low=0, high=2**31 - 1)
    lowbit: str | None = option(
        None, "the low-bit recipe of the linear layers (none: high precision)", choices=LOWBIT_NAMES
    )
    out: str | None = option(None, "the run's directory (none: runs/DATE-NAME)", resume="free")
    name: str | None = option(
        None, "the run's name (none: the recipe's file name, or SIZE-OPTIMIZER[-LOWBIT])", resume="free"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        train = self.train
        self.check_budget()
        if train.batch_size % self.micro_batch_size:
            raise EvenstepError(
                f"train.batch_size {train.batch_size} is not divisible by train.micro_batch_size "
                f"{self.micro_batch_size}; each forward pass takes the same number of sequences"
            )
        self.check_warmup()

    def check_budget(self) -> None:
        train = self.train
        if (train.steps is None) == (train.tokens is None):
            given = "neither is given" if train.steps is None else f"both are given ({train.steps} and {train.tokens})"
            raise EvenstepError(f"train.steps and train.tokens: {given}; give the budget as one of them")

    def check_warmup(self) -> None:
        warmup = self.schedule.warmup_steps
        if warmup is not None and warmup >= self.total_steps:
            raise EvenstepError(
                f"schedule.warmup_steps {warmup} leaves nothing of the {self.total_steps} steps; "
                "give fewer, or none for a tenth of them"
            )

    @property
    def micro_batch_size(self) -> int:
        return self.train.micro_batch_size or self.train.batch_size

    @property
    def tokens_per_step(self) -> int:
        return self.train.batch_size * self.train.seq_len

    @property
    def total_steps(self) -> int:
        """The budget in steps; a budget in tokens is rounded up to whole steps."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None
        return math.ceil(self.train.tokens / self.tokens_per_step)

    @property
    def warmup_steps(self) -> int:
        given = self.schedule.warmup_steps
        return self.total_steps // 10 if given is None else given


@dataclass(frozen=True)
class Config(BaseConfig):
    """A pretraining run."""

    sample: SampleConfig = field(default_factory=SampleConfig)


def sections(kind: type[BaseConfig] = Config) -> dict[str, type[Section]]:
    """The sections of a kind of run by name, in the order of help and files."""
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind) if not f.metadata}


def options(kind: type[BaseConfig] = Config) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Every option by its full name (``train.steps``, ``seed``) with its field and resolved type, in the order of
    help and docs."""
    found: dict[str, tuple[dataclasses.Field[Any], Any]] = {}
    classes: tuple[type[Section], ...] = (*sections(kind).values(), kind)
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            if f.metadata:
                found[f"{cls.SECTION}.{f.name}" if cls.SECTION else f.name] = (f, hints[f.name])
    return found


# ---- hyperparameters of the optimizers used most ----

_ADAM = (
    Option("betas", (0.9, 0.999), "decay of the first and second moment"),
    Option("eps", 1e-8, "added to the root of the second moment"),
    Option("amsgrad", False, "divide by the largest second moment so far"),
)

_DECLARED: dict[str, tuple[Option, ...]] = {
    "stable_spam": STABLE_SPAM,
    "spam": (*SPAM, Option("density_of", "all", "parameters that density applies to: all, or the hidden matrices")),
    "scale": SCALE,
    "adamw": _ADAM,
    "adam": (*_ADAM, Option("decoupled_weight_decay", False, "decay as AdamW does")),
    "sgd": (
        Option("momentum", 0.9, "decay of the sum of gradients"),
        Option("dampening", 0, "share of a gradient that the sum leaves out"),
        Option("nesterov", False, "Nesterov's momentum"),
    ),
}

_NOT_OFFERED = ("lr", "weight_decay", "maximize", "capturable")
"""``lr`` and ``weight_decay`` are options of [optim] itself; the other two have no use in a run."""

HYPERPARAMETERS: dict[str, dict[str, Option]] = {
    name: {one.name: one for one in declared if one.name not in _NOT_OFFERED} for name, declared in _DECLARED.items()
}
"""Optimizer -> hyperparameter -> its declaration. Those of evenstep's own optimizers are declared in
`evenstep.optim.options` alone, those of torch's here, for the help of the command line. Any other hyperparameter of a
constructor is accepted too."""


def owners() -> dict[str, dict[str, Option]]:
    """Hyperparameter -> optimizer -> its declaration, in the order of the table."""
    found: dict[str, dict[str, Option]] = {}
    for optimizer, declared in HYPERPARAMETERS.items():
        for name, one in declared.items():
            found.setdefault(name, {})[optimizer] = one
    return found


def _names(option: Option) -> tuple[str, ...]:
    """The values that the shell completes, none where there are too many."""
    if isinstance(option.default, bool):
        return ("true", "false")
    if option.name == "density_of":
        return tuple(DENSITY_OF)
    return RANGES[option.name].choices if option.name in RANGES else ()


CHOICES: dict[str, tuple[str, ...]] = {
    name: names for name, of in owners().items() if (names := _names(next(iter(of.values()))))
}
"""Hyperparameter -> the values it may have, of those that have a few."""
