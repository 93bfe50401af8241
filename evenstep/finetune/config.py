"""The configuration of a fine-tuning run: the sections that differ from those of pretraining in
`evenstep.train.config`. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from evenstep.errors import EvenstepError
from evenstep.train.config import MOST_SEQUENCES, MOST_STEPS, BaseConfig, OptimConfig, Section, TrainConfig, option

FORMATS = ("instruction", "prompt", "chat", "choices", "classification")
"""docs/finetuning.md lists their fields."""

SCORES = ("exact", "choice", "accuracy", "none")

DEFAULT_EPOCHS = 3.0
"""The value with which LLM-Adapters (arXiv:2304.01933) trains on Commonsense170K."""

RATES = {"full": 5e-5, "lora": 3e-4, "sparse": 1e-3}
"""The default learning rate. All weights: the default of transformers' TrainingArguments, which does not destroy
weights that were pretrained at 1e-3. LoRA: LLM-Adapters'. An optimizer with a ``density`` below 1: the best one
measured (docs/results-finetune.md)."""

SPARSE = {"optim.name": "spam", "optim.density": "0.0025", "optim.density_of": "hidden"}
"""The options that ``--mode sparse`` stands for: SPAM (arXiv:2501.06842) with moments for 0.25 % of the entries of the
hidden matrices, and with dense moments for the embedding, the last layer and vectors, as in the published code."""


@dataclass(frozen=True)
class TuneDataConfig(Section):
    TITLE = "the examples"
    SECTION = "data"
    file: str = option(
        "", "the file of examples: .jsonl, .json, .csv, .tsv or .parquet, also compressed or in an archive"
    )
    format: str = option(
        "auto", "the format of an example; auto: by the fields of the first one", choices=("auto", *FORMATS)
    )
    template: str | None = option(
        None, "a text file with {instruction} and {input}, the template of prompts (none: the built-in template)"
    )
    pack: str = option(
        "auto", "pack several examples into a row, without attention between them; auto: if the model supports it",
        choices=("auto", "yes", "no"),
    )  # fmt: skip
    too_long: str = option(
        "drop",
        "what to do with examples of more than train.seq_len tokens: leave them out, or cut off their end",
        choices=("drop", "cut"),
    )
    on_bad: str = option(
        "stop", "what to do with an invalid example, such as an empty answer: stop and name its line, or skip it",
        choices=("stop", "skip"),
    )  # fmt: skip
    val_fraction: float = option(
        0.02, "fraction of the examples held out for validation, without eval.data", low=0, high=0.5
    )
    max_rows: int | None = option(
        None, "number of examples to use, the first ones (none: all)", low=1, high=MOST_STEPS, count=True
    )

    @property
    def source(self) -> str:
        """The name of the data in titles."""
        return Path(self.file).name

    tokenizer: ClassVar[str] = "the model's own"


@dataclass(frozen=True)
class TuneModelConfig(Section):
    TITLE = "the model"
    SECTION = "model"
    path: str = option("", "a run or checkpoint of evenstep, or a directory that transformers can load")
    library: str = option(
        "auto", "the library that loads the model; auto: evenstep for its runs and checkpoints, else transformers",
        choices=("auto", "evenstep", "transformers"),
    )  # fmt: skip
    kind: str = option(
        "auto", "causal: generates text; classifier: predicts the class of a text; auto: by the data",
        choices=("auto", "causal", "classifier"),
    )  # fmt: skip

    @property
    def label(self) -> str:
        return Path(self.path).name or "model"


@dataclass(frozen=True)
class TuneConfig(Section):
    TITLE = "the weights that are trained"
    SECTION = "tune"
    adapter: str = option("none", "none: all weights; lora: low-rank adapters (peft)", choices=("none", "lora"))
    rank: int = option(32, "rank of LoRA; 32 is the value of LLM-Adapters for LLaMA", low=1, high=2**16)
    alpha: float = option(
        64.0, "scale of LoRA: the product of its matrices is multiplied by alpha / rank", above=0, high=1e38
    )
    dropout: float = option(0.0, "dropout of LoRA", low=0, high=1)
    targets: str = option(
        "all-linear", "layers with an adapter: names separated by commas, or all linear layers except the last one"
    )


@dataclass(frozen=True)
class TuneOptimConfig(OptimConfig):
    lr: float | None = option(  # type: ignore[assignment]
        None,
        "the peak learning rate (none: 5e-5 for all weights, 3e-4 for LoRA, 1e-3 with a density below 1)",
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
        None, "the budget in passes over the rows; this, train.steps or train.tokens (default: 3 epochs)", above=0,
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
        None,
        "rows per forward pass of the validation (none: micro_batch_size)",
        low=1,
        high=MOST_SEQUENCES,
        resume="free",
    )
    data: str | None = option(None, "files of validation examples, separated by commas (none: data.val_fraction)")
    score: str = option(
        "auto", "exact: the generated answer; choice: the most likely choice; accuracy: the class; none: only the loss",
        choices=("auto", *SCORES), resume="free",
    )  # fmt: skip
    normalise: str = option(
        "bytes", "divisor of the log-likelihood of a choice: its number of bytes, its number of tokens, or none",
        choices=("bytes", "tokens", "none"), resume="free",
    )  # fmt: skip
    max_rows: int = option(
        200,
        "number of examples of each file that are scored; 0: all",
        low=0,
        high=MOST_STEPS,
        count=True,
        resume="free",
    )
    max_new_tokens: int = option(32, "largest number of tokens of a generated answer", low=1, high=10**6, resume="free")


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
            raise EvenstepError("model.path is empty; name the model: evenstep finetune MODEL --data FILE.jsonl")
        if not self.data.file:
            raise EvenstepError("data.file is empty; give --data FILE.jsonl with the examples")
        if self.parallel.mode not in ("none", "ddp"):
            raise EvenstepError(f"parallel.mode {self.parallel.mode} cannot be used for fine-tuning; give none or ddp")
        if self.train.z_loss is not None:
            raise EvenstepError(f"train.z_loss {self.train.z_loss:g} cannot be used for fine-tuning; leave it out")
        if self.lowbit and self.tune.adapter != "none":
            raise EvenstepError(
                f"lowbit {self.lowbit} cannot be used with tune.adapter {self.tune.adapter}; leave one of them out"
            )

    def check_budget(self) -> None:
        train = self.train
        given = {name: value for name in ("steps", "tokens", "epochs") if (value := getattr(train, name)) is not None}
        if not given:
            object.__setattr__(self, "train", dataclasses.replace(train, epochs=DEFAULT_EPOCHS))
        if len(given) > 1:
            names = " and ".join(f"train.{name} {value}" for name, value in given.items())
            raise EvenstepError(f"{names} are both given; give the budget by one of them")

    def check_warmup(self) -> None:
        if self.train.epochs is None:
            super().check_warmup()

    def with_steps(self, rows: int) -> FineTuneConfig:
        """The same configuration with a budget in epochs converted to steps, for an epoch of ``rows`` rows."""
        if self.train.epochs is None:
            return self
        steps = max(1, round(self.train.epochs * rows / self.train.batch_size))
        return dataclasses.replace(self, train=dataclasses.replace(self.train, epochs=None, steps=steps))
