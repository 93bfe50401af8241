"""What a run is made of: one frozen dataclass per section, every option with its help, range and place in a resume.

These classes are the single list of options. The command line's flags, ``docs/configuration.md``, the checks of type
and range and the rules of what may change on ``--resume`` are all read from the fields below, so none of them can
drift from the others. Nothing here imports torch: ``evenstep --help`` has to be quick.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from evenstep.baselines.catalog import BASELINES
from evenstep.errors import EvenstepError
from evenstep.train.options import Section, option

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
        None, "entries of the vocabulary bpe trains (none: 4096); of a given tokenizer, the most it may have", low=1
    )
    val_fraction: float = option(0.02, "share of the documents kept for validation; 0: none", low=0, high=0.5)
    text_field: str = option("text", "the field that holds the text in .jsonl, .parquet and hf: sources")
    max_tokens: int | None = option(
        None, "stop preparing after this many tokens (none: the whole source)", low=1, count=True
    )
    cache_dir: str | None = option(
        None, "where prepared tokens are kept (none: the user's cache directory)", resume="free"
    )


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
        choices=tuple(BASELINES), form=r"[\w.]+:\w+",
    )  # fmt: skip
    before: str = option("", "gradient transforms in front of it, as 'adaclip + adagn(gamma1=0.7)'")
    lr: float = option(1e-3, "the highest learning rate", above=0)
    weight_decay: float = option(0.0, "decay of the parameters that optim.decay names", low=0)
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
    warmup_steps: int | None = option(None, "steps of linear warm-up (none: a tenth of all steps)", low=0, count=True)
    min_lr_ratio: float = option(0.1, "the last learning rate as a share of the highest (cosine, wsd)", low=0, high=1)
    decay_fraction: float = option(0.2, "share of the steps that wsd spends decaying", above=0, high=1)


@dataclass(frozen=True)
class TrainConfig(Section):
    TITLE = "the training"
    SECTION = "train"
    steps: int | None = option(
        None, "the budget in optimizer steps; give this or train.tokens", low=1, count=True, resume="free"
    )
    tokens: int | None = option(None, "the budget in tokens: 20K, 100M, 1.5B", low=1, count=True, resume="free")
    batch_size: int = option(8, "sequences per optimizer step, over all ranks", low=1)
    micro_batch_size: int | None = option(
        None, "sequences in one forward pass (none: batch_size)", low=1, resume="rounding"
    )
    seq_len: int = option(256, "tokens per sequence", low=2)
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
        low=0, choices=("auto",), resume="rounding",
    )  # fmt: skip
    clip_norm: float = option(0.0, "clip the norm of all gradients together to this; 0: off", low=0)
    deterministic: bool = option(False, "refuse operations whose result may differ between two runs", resume="rounding")
    threads: int = option(0, "CPU threads; 0: as torch decides (OMP_NUM_THREADS)", low=0, resume="rounding")


@dataclass(frozen=True)
class EvalConfig(Section):
    TITLE = "validation"
    SECTION = "eval"
    every: int = option(100, "steps between validations; 0: only at the end", low=0, count=True, resume="free")
    max_tokens: int = option(1_000_000, "validation tokens to use; 0: all", low=0, count=True, resume="free")
    batch_size: int | None = option(
        None, "sequences in one validation pass (none: micro_batch_size)", low=1, resume="free"
    )


@dataclass(frozen=True)
class CheckpointConfig(Section):
    TITLE = "checkpoints"
    SECTION = "checkpoint"
    every: int = option(
        500, "steps between checkpoints; 0: only at the end and on interruption", low=0, count=True, resume="free"
    )
    keep: int = option(2, "how many of the newest checkpoints to keep", low=1, resume="free")


@dataclass(frozen=True)
class LogConfig(Section):
    TITLE = "the log"
    SECTION = "log"
    every: int = option(10, "steps between lines of metrics.jsonl", low=1, resume="free")
    curve: bool = option(True, "draw curve.png at the end", resume="free")


@dataclass(frozen=True)
class TelemetryConfig(Section):
    TITLE = "what the optimizer saw (docs/telemetry.md)"
    SECTION = "telemetry"
    enabled: bool = option(True, "measure every step, and tell of spikes", resume="free")
    every: int = option(10, "least steps between two lines with the numbers of all parameters", low=1, resume="free")
    samples: int = option(64, "coordinates of each parameter whose GSS is followed; 0: none", low=0, resume="free")
    ratio: float = option(
        10.0, "an event: a largest entry above this many times its recent mean", above=1, resume="free"
    )
    sigma: float = option(7.0, "spike rate: standard deviations above the mean", above=0, resume="free")
    window: int = option(1000, "spike rate: steps of its mean and of the rate", low=2, resume="free")
    tensorboard: bool = option(False, "also write for TensorBoard, into the run's directory", resume="free")
    wandb: str = option("off", "also Weights & Biases", choices=("off", "offline", "online"), resume="free")
    trackio: bool = option(False, "also trackio's local database", resume="free")


@dataclass(frozen=True)
class SampleConfig(Section):
    TITLE = "the text written at the end"
    SECTION = "sample"
    prompt: str = option("", "how the text starts (empty: as a new document)", resume="free")
    tokens: int = option(120, "tokens to generate; 0: no sample", low=0, resume="free")
    temperature: float = option(0.8, "0: always the likeliest token", low=0, resume="free")
    top_k: int = option(50, "choose among this many likeliest tokens; 0: all", low=0, resume="free")


@dataclass(frozen=True)
class Config(Section):
    """One run, resolved and checked. Raises EvenstepError, in one line, for whatever does not fit."""

    TITLE = "the run"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=200))
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
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
        if (train.steps is None) == (train.tokens is None):
            given = "neither is given" if train.steps is None else f"both are given ({train.steps} and {train.tokens})"
            raise EvenstepError(f"train.steps and train.tokens: {given}; give the budget as one of them")
        if train.batch_size % self.micro_batch_size:
            raise EvenstepError(
                f"train.batch_size {train.batch_size} is not divisible by train.micro_batch_size "
                f"{self.micro_batch_size}; each forward pass takes the same number of sequences"
            )
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


SECTIONS: dict[str, type[Section]] = {
    "data": DataConfig,
    "model": ModelConfig,
    "optim": OptimConfig,
    "schedule": ScheduleConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "checkpoint": CheckpointConfig,
    "log": LogConfig,
    "telemetry": TelemetryConfig,
    "sample": SampleConfig,
}


def options() -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Every option by its full name (``train.steps``, ``seed``) with its field and resolved type, in the order of
    help and docs."""
    found: dict[str, tuple[dataclasses.Field[Any], Any]] = {}
    classes: tuple[type[Section], ...] = (*SECTIONS.values(), Config)
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            if f.metadata:
                found[f"{cls.SECTION}.{f.name}" if cls.SECTION else f.name] = (f, hints[f.name])
    return found
