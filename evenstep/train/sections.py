"""The sections of a run's configuration, one frozen dataclass each: see `evenstep.train.config`. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from evenstep.baselines.catalog import BASELINES
from evenstep.errors import EvenstepError
from evenstep.train.options import MOST_SEQUENCES, MOST_STEPS, MOST_TOKENS, Section, option

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
        choices=tuple(BASELINES), form=r"[\w.]+:\w+",
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
