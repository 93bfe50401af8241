"""What a fine-tuning run is made of: see `evenstep.train.config`, whose optimizer, schedule, log, checkpoints and
telemetry it has. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from evenstep.errors import EvenstepError
from evenstep.train.config import MOST_SEQUENCES, MOST_STEPS, BaseConfig, OptimConfig, Section, TrainConfig, option

FORMATS = ("instruction", "prompt", "chat", "choices", "classification")
"""docs/finetuning.md tells of their fields."""

SCORES = ("exact", "choice", "accuracy", "none")

DEFAULT_EPOCHS = 3.0
"""As LLM-Adapters (arXiv:2304.01933) trains on Commonsense170K."""

RATES = {"full": 5e-5, "lora": 3e-4, "sparse": 1e-3}
"""The learning rate where none is given: of all weights as transformers' TrainingArguments, which weights pretrained at
1e-3 survive; LoRA as LLM-Adapters; an optimizer with a ``density`` below 1 as measured (docs/results-finetune.md)."""

SPARSE = {"optim.name": "spam", "optim.density": "0.0025", "optim.density_of": "hidden"}
"""What ``--mode sparse`` stands for: SPAM whose moments are kept for 0.25 % of the entries of the inner matrices, and
whole for the embedding, the last layer and vectors, as its authors' code has it (arXiv:2501.06842)."""


@dataclass(frozen=True)
class TuneDataConfig(Section):
    TITLE = "the examples"
    SECTION = "data"
    file: str = option("", "a file of examples: .jsonl, .json, .csv, .tsv, .parquet, also compressed or in an archive")
    format: str = option(
        "auto", "how an example is written; auto: by the fields of the first", choices=("auto", *FORMATS)
    )
    template: str | None = option(
        None, "a text file with {instruction} and {input}, the prompt of instructions (none: the plain one)"
    )
    pack: str = option(
        "auto", "several examples in a row, which do not see each other; auto: where the model keeps them apart",
        choices=("auto", "yes", "no"),
    )  # fmt: skip
    too_long: str = option(
        "drop", "examples of more than train.seq_len tokens: leave them out, or cut their end", choices=("drop", "cut")
    )
    on_bad: str = option(
        "stop", "an example that lacks something, as an empty answer: stop with its line, or skip it and count",
        choices=("stop", "skip"),
    )  # fmt: skip
    val_fraction: float = option(0.02, "share of the examples kept for validation, without eval.data", low=0, high=0.5)
    max_rows: int | None = option(
        None, "use the first so many examples (none: all)", low=1, high=MOST_STEPS, count=True
    )

    @property
    def source(self) -> str:
        """What the run was trained on, for titles."""
        return Path(self.file).name

    tokenizer: ClassVar[str] = "the model's own"


@dataclass(frozen=True)
class TuneModelConfig(Section):
    TITLE = "the model"
    SECTION = "model"
    path: str = option("", "a run or checkpoint of ours, or a folder that transformers opens")
    library: str = option(
        "auto", "who builds it; auto: evenstep for its own runs and checkpoints, else transformers",
        choices=("auto", "evenstep", "transformers"),
    )  # fmt: skip
    kind: str = option(
        "auto", "causal: writes text; classifier: puts a text into a class; auto: by the data",
        choices=("auto", "causal", "classifier"),
    )  # fmt: skip

    @property
    def label(self) -> str:
        return Path(self.path).name or "model"


@dataclass(frozen=True)
class TuneConfig(Section):
    TITLE = "what is trained of it"
    SECTION = "tune"
    adapter: str = option("none", "none: all weights; lora: low-rank adapters (peft)", choices=("none", "lora"))
    rank: int = option(32, "LoRA's rank; 32 is LLM-Adapters' for LLaMA", low=1, high=2**16)
    alpha: float = option(64.0, "LoRA's scale: its product is multiplied by alpha / rank", above=0, high=1e38)
    dropout: float = option(0.0, "LoRA's dropout", low=0, high=1)
    targets: str = option(
        "all-linear", "layers with an adapter: names separated by commas, or all linear ones but the last"
    )


@dataclass(frozen=True)
class TuneOptimConfig(OptimConfig):
    lr: float | None = option(  # type: ignore[assignment]
        None,
        "the highest learning rate (none: 5e-5 for all weights, 3e-4 for LoRA, 1e-3 with a density below 1)",
        above=0,
        high=1e38,
    )

    @property
    def is_sparse(self) -> bool:
        density = self.options.get("density", 1.0)
        return isinstance(density, int | float) and density < 1


@dataclass(frozen=True)
class TuneTrainConfig(TrainConfig):
    epochs: float | None = option(
        None, "the budget in passes over the rows; give this, train.steps or train.tokens (none of them: 3)", above=0,
        high=1e6, resume="free",
    )  # fmt: skip


@dataclass(frozen=True)
class TuneEvalConfig(Section):
    TITLE = "validation"
    SECTION = "eval"
    every: int = option(
        100, "steps between validations; 0: only at the end", low=0, high=MOST_STEPS, count=True, resume="free"
    )
    batch_size: int | None = option(
        None, "rows in one validation pass (none: micro_batch_size)", low=1, high=MOST_SEQUENCES, resume="free"
    )
    data: str | None = option(None, "one or more files, separated by commas (none: data.val_fraction)")
    score: str = option(
        "auto", "exact: the generated answer; choice: the likeliest choice; accuracy: the class; none: the loss alone",
        choices=("auto", *SCORES), resume="free",
    )  # fmt: skip
    normalise: str = option(
        "bytes", "what a choice's log-likelihood is divided by: its bytes, its tokens, or nothing",
        choices=("bytes", "tokens", "none"), resume="free",
    )  # fmt: skip
    max_rows: int = option(
        200, "examples of each file that are scored; 0: all", low=0, high=MOST_STEPS, count=True, resume="free"
    )
    max_new_tokens: int = option(
        32, "tokens that an answer may take when it is generated", low=1, high=10**6, resume="free"
    )


@dataclass(frozen=True)
class FineTuneConfig(BaseConfig):
    """A fine-tuning run."""

    COMMAND = "finetune"
    data: TuneDataConfig = field(default_factory=TuneDataConfig)  # type: ignore[assignment]
    model: TuneModelConfig = field(default_factory=TuneModelConfig)  # type: ignore[assignment]
    optim: TuneOptimConfig = field(default_factory=TuneOptimConfig)
    train: TuneTrainConfig = field(default_factory=TuneTrainConfig)
    eval: TuneEvalConfig = field(default_factory=TuneEvalConfig)  # type: ignore[assignment]
    tune: TuneConfig = field(default_factory=TuneConfig)

    def __post_init__(self) -> None:
        if self.optim.lr is None:
            trained = "lora" if self.tune.adapter == "lora" else "sparse" if self.optim.is_sparse else "full"
            object.__setattr__(self, "optim", dataclasses.replace(self.optim, lr=RATES[trained]))
        super().__post_init__()
        if not self.model.path:
            raise EvenstepError("model.path: which model? evenstep finetune MODEL --data FILE.jsonl")
        if not self.data.file:
            raise EvenstepError("data.file: which examples? give --data FILE.jsonl")
        if self.parallel.mode not in ("none", "ddp"):
            raise EvenstepError(f"parallel.mode {self.parallel.mode}: fine-tuning has none and ddp")
        if self.lowbit and self.tune.adapter != "none":
            raise EvenstepError(f"lowbit {self.lowbit} with tune.adapter {self.tune.adapter}: give one of them")

    def check_budget(self) -> None:
        train = self.train
        given = {name: value for name in ("steps", "tokens", "epochs") if (value := getattr(train, name)) is not None}
        if not given:
            object.__setattr__(self, "train", dataclasses.replace(train, epochs=DEFAULT_EPOCHS))
        if len(given) > 1:
            names = " and ".join(f"train.{name} {value}" for name, value in given.items())
            raise EvenstepError(f"{names}: give the budget as one of them")

    def check_warmup(self) -> None:
        if self.train.epochs is None:
            super().check_warmup()

    def with_steps(self, rows: int) -> FineTuneConfig:
        """With a budget in epochs over so many ``rows`` as one in steps."""
        if self.train.epochs is None:
            return self
        steps = max(1, round(self.train.epochs * rows / self.train.batch_size))
        return dataclasses.replace(self, train=dataclasses.replace(self.train, epochs=None, steps=steps))
