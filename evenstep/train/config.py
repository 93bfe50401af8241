"""What a run is made of: one frozen dataclass per section, every option with its help, range and place in a resume.

These classes are the single list of options. The command line's flags, ``docs/configuration.md``, the checks of type
and range and the rules of what may change on ``--resume`` are all read from these fields, so none of them can
drift from the others. Nothing here imports torch: ``evenstep --help`` has to be quick.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar

from evenstep.errors import EvenstepError
from evenstep.train.options import Section, option
from evenstep.train.sections import (
    LOWBIT_NAMES,
    SIZE_NAMES,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    SampleConfig,
    ScheduleConfig,
    TelemetryConfig,
    TrainConfig,
)

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
