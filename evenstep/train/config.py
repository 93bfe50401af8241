"""The configuration of a run: one frozen dataclass per section, one field per option.

These classes are the only list of options. Each field has the help, the range and the resume rule of its option. The
flags of the command line, ``docs/configuration.md``, the checks of type and range, and the rules of what may change on
``--resume`` are derived from the fields. To add an option, add a field. Nothing here imports torch, so that
``evenstep --help`` stays fast.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from evenstep.baselines.catalog import BASELINES
from evenstep.baselines.rules import DENSITY_OF
from evenstep.errors import EvenstepError, nearest
from evenstep.optim.options import RANGES, SCALE, SPAM, STABLE_SPAM, Option

# ---- values: types, ranges, choices, counts ----

LARGEST = 10**300
"""Larger integers are clamped to this value where an option is a float: conversion to float overflows at 1.8e308."""


def kinds(hint: Any) -> tuple[type, ...]:
    """The plain types of a type hint.

    >>> kinds(int | None)
    (<class 'int'>, <class 'NoneType'>)
    """
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def parse_count(text: str) -> int:
    """The number that ``text`` stands for; K, M, B (or G) and T are powers of a thousand. ValueError unless it is a
    whole number.

    >>> parse_count("1.5B")
    1500000000
    """
    scale = {"K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}.get(text[-1:].upper())
    value = float(text[:-1]) * scale if scale else float(text.replace("_", ""))
    if not math.isfinite(value) or round(value) != round(value, 6):
        raise ValueError(text)
    return round(value)


def checked(key: str, value: Any, hint: Any, meta: Mapping[str, Any]) -> Any:
    """``value`` converted to the type of the option ``key``. EvenstepError when the type or the range does not fit;
    the error names the option, the given value and the allowed values."""
    allowed, choices = kinds(hint), meta["choices"]
    if meta["count"] and isinstance(value, str):
        try:
            value = parse_count(value)
        except ValueError:
            raise EvenstepError(
                f"{key}: {_short(value)} is not a count; give a whole number, such as 300, 20K, 100M or 1.5B"
            ) from None
    if isinstance(value, int) and not isinstance(value, bool) and float in allowed:
        value = float(min(max(value, -LARGEST), LARGEST))
    if type(value) not in allowed:
        words = {"NoneType": "none", "bool": "true or false"}
        names = " or ".join(words.get(kind.__name__, kind.__name__) for kind in allowed)
        raise EvenstepError(f"{key}: {_short(value)} is {type(value).__name__}, expected {names}")
    if isinstance(value, str) and not _is_unicode(value):
        raise EvenstepError(
            f"{key}: {_short(value)} is not valid UTF-8 and cannot be written to config.toml; rename it"
        )
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
    """``repr(value)``, without the middle of a very long text."""
    try:
        text = repr(value)
    except ValueError:  # of an integer with thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:40]}...{text[-20:]}"


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # Python decodes other bytes of an argument to lone surrogates
        return False
    return True


def limits(meta: Mapping[str, Any]) -> str:
    """The range or the choices of an option, as text for the help and the docs; empty where there are none.

    >>> limits({"choices": None, "low": 0, "above": None, "high": 1})
    ' (>= 0, <= 1)'
    """
    if meta["choices"] and len(meta["choices"]) > 1:
        return f" ({' | '.join(meta['choices'])})"
    bounds = [(">=", meta["low"]), (">", meta["above"]), ("<=", meta["high"])]
    found = [f"{sign} {bound}" for sign, bound in bounds if bound is not None]
    return f" ({', '.join(found)})" if found else ""


# ---- how an option is declared ----

MOST_STEPS = 10**12
MOST_TOKENS = 10**18
MOST_SEQUENCES = 2**20
"""The largest values of options that count steps, tokens, and sequences of a batch (or tokens of a sequence). They are
far beyond any training, and small enough that no number derived from them overflows.
`evenstep.train.task.Pretraining.check_memory` checks whether the memory suffices."""

Resume = Literal["fixed", "rounding", "free"]
"""Whether an option may change on resume. fixed: no. rounding: yes, but the last bits of the losses change with it.
free: yes, without an effect on the steps that follow, or with the effect that the user asks for."""


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
    key: str | None = None,
    resume: Resume = "fixed",
) -> Any:
    """A dataclass field with the metadata of an option.

    Args:
        default: the default.
        help: one line for ``--help`` and docs/configuration.md.
        low, high: the smallest and the largest allowed value.
        above: an exclusive lower bound.
        choices: the allowed texts.
        form: a regular expression of further allowed texts.
        count: whether texts such as 20K, 100M and 1.5B are accepted.
        joined: whether the flag may be given several times; its values are then joined by commas.
        key: the name of the option in its section, for a name with a dot; None: the name of the field.
        resume: whether the option may change on resume.
    """
    metadata = {
        "help": help, "low": low, "above": above, "high": high, "choices": choices, "form": form, "count": count,
        "joined": joined, "key": key, "resume": resume,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


def key_of(field: dataclasses.Field[Any]) -> str:
    """The name of an option in its section: ``lr_scale.embedding`` for the field ``lr_scale_embedding``."""
    return field.metadata["key"] or field.name


_HINTS: dict[type, dict[str, Any]] = {}


def type_hints(cls: type) -> dict[str, Any]:
    """The type of each field. Annotations are texts here, which take milliseconds to evaluate, so that is done once for
    each class."""
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    return _HINTS[cls]


@dataclass(frozen=True)
class Section:
    """The base class of all sections. Construction checks the type and the range of every field, so that a
    configuration from Python code is checked like one from a file."""

    TITLE: ClassVar[str] = ""
    SECTION: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = type_hints(type(self))
        for f in dataclasses.fields(self):
            if f.metadata:
                key = f"{self.SECTION}.{key_of(f)}" if self.SECTION else key_of(f)
                object.__setattr__(self, f.name, checked(key, getattr(self, f.name), hints[f.name], f.metadata))


# ---- the sections ----

SIZE_NAMES = (
    "tiny", "9m", "20m", "35m", "40m", "60m", "71m", "100m", "130m", "250m", "350m", "1b", "3b", "7b",
)  # fmt: skip
"""The names in `evenstep.models.SIZES`, repeated here because importing it needs torch."""

LOWBIT_NAMES = (
    "fp4-official", "int4-official", "int8-official", "a4w4", "fp4", "e1m2", "int4", "int3", "int2", "int8", "fp8",
    "mxfp4", "mxfp6", "mxfp8", "nvfp4", "nvfp4-train",
)  # fmt: skip
"""The names in `evenstep.lowbit.RECIPES`, repeated here because importing it needs torch."""


@dataclass(frozen=True)
class DataConfig(Section):
    TITLE = "the text and its tokens"
    SECTION = "data"
    source: str = option("stdlib", "the corpus: stdlib, kjv, text:GLOB, hf:NAME[:CONFIG] or shards:DIR")
    tokenizer: str = option(
        "bpe", "the tokenizer: bpe (trained once on the source), a tokenizer.json or a SentencePiece .model file"
    )
    vocab_size: int | None = option(
        None, "size of the bpe vocabulary (none: 4096; smaller if the text is short); for a given tokenizer, the "
        "largest size allowed", low=1, high=2**20,
    )  # fmt: skip
    val_fraction: float = option(0.02, "fraction of the documents held out for validation; 0: none", low=0, high=0.5)
    text_field: str = option(
        "text", "the field with the text of a row in .jsonl, .json, .csv, .parquet and hf: sources; of several names, "
        "separated by commas, the first that the row has",
    )  # fmt: skip
    max_tokens: int | None = option(
        None, "number of training tokens to prepare (none: the whole source)", low=1, high=MOST_TOKENS, count=True
    )
    cache_dir: str | None = option(
        None, "the directory of prepared tokens (none: the user's cache directory)", resume="free"
    )
    # Free on resume: files may have been added to the folder since, and these options leave them out. The resume
    # compares the tokens themselves.
    exclude: str | None = option(
        None, "globs of files that a text: source leaves out; separated by commas, or the option given several times",
        resume="free", joined=True,
    )  # fmt: skip
    on_bad: str | None = option(
        None, "what to do with a file or row that cannot be used: stop, or skip it and count it (none: stop)",
        choices=("stop", "skip"), resume="free",
    )  # fmt: skip
    bad_batch: int | None = option(
        None, "a step whose batch is replaced by random tokens, to try out monitor, guard and optimizer (none: off)",
        low=1, high=MOST_STEPS,
    )  # fmt: skip


VARIANTS = ("qk_norm", "attention_softcap", "logit_softcap", "kv_heads", "tie_embeddings")
"""Options of the model that early configurations do not have. A run that starts from a given model records them only
where they are not the default."""


def model_label(model: Mapping[str, Any]) -> str:
    """The size of a model in names and tables, from the options of its section: the name of the size or of the
    configuration file; "custom" for the shape of a given model that has no name.

    >>> model_label({"config": "llama_130m.json"}), model_label({"hf": "gpt2/config.json"})
    ('llama_130m', 'gpt2')
    """
    given = model.get("hf") or model.get("config")
    if model.get("size") or not given:
        return model.get("size") or "custom"
    path = Path(given)
    return (path.parent if path.name == "config.json" else path).name.removesuffix(".json") or "custom"


@dataclass(frozen=True)
class ModelConfig(Section):
    TITLE = "the model"
    SECTION = "model"
    size: str | None = option(None, "the named size (none: tiny, or the size of model.init)", choices=SIZE_NAMES)
    config: str | None = option(
        None, "a LLaMA configuration of transformers (JSON) whose shape the model has, in place of model.size"
    )
    hf: str | None = option(
        None, "the config.json of a causal language model of transformers, or a directory that has one: this "
        "architecture is trained from random weights, in place of evenstep's LLaMA",
    )  # fmt: skip
    norm: str | None = option(
        None, "placement of the norms in each block (none: pre, or the placement in model.init)",
        choices=("pre", "post", "mix"),
    )  # fmt: skip
    norm_alpha: float | None = option(
        None, "fraction of Post-LN blocks, only for model.norm mix (none: 0.25, or that of model.init)",
        low=0, high=1,
    )  # fmt: skip
    qk_norm: bool | None = option(
        None, "normalise queries and keys of each head before attention, against growing attention logits "
        "(none: false, or as in model.init)",
    )  # fmt: skip
    attention_softcap: float | None = option(
        None, "bound c of attention logits, c tanh(logit / c); Gemma 2: 50; takes more memory and time (none: off, or "
        "as in model.init)", above=0, high=1e6,
    )  # fmt: skip
    logit_softcap: float | None = option(
        None, "bound c of the output logits, c tanh(logit / c); Gemma 2: 30 (none: off, or as in model.init)", above=0,
        high=1e6,
    )  # fmt: skip
    kv_heads: int | None = option(
        None, "number of heads of keys and values, a divisor of the number of heads: grouped-query attention (none: as "
        "many as heads, or as in model.init)", low=1, high=2**16,
    )  # fmt: skip
    tie_embeddings: bool | None = option(
        None, "give the output layer the weight of the embedding (none: false, or as in model.init)"
    )
    init: str | None = option(
        None, "a run, a checkpoint or a model in Hugging Face layout whose weights the run starts from"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hf is not None:
            self._check_foreign()
            return
        for name in ("size", "init"):
            if self.config is not None and getattr(self, name) is not None:
                raise EvenstepError(f"model.config and model.{name} both state the shape of the model; leave one out")
        if self.init is None and self.config is None:
            for name, default in (("size", "tiny"), ("norm", "pre"), ("norm_alpha", 0.25), ("qk_norm", False)):
                if getattr(self, name) is None:
                    object.__setattr__(self, name, default)

    def _check_foreign(self) -> None:
        """EvenstepError for options of evenstep's LLaMA beside ``hf``."""
        for name in ("size", "config", "norm", "norm_alpha", *VARIANTS):
            if (value := getattr(self, name)) is not None:
                given = str(value).lower() if isinstance(value, bool) else value
                raise EvenstepError(
                    f"model.{name} {given} is an option of evenstep's LLaMA and has no effect on model.hf {self.hf}; "
                    "leave it out, or change the configuration file"
                )

    @property
    def variant(self) -> dict[str, Any]:
        """The fields of `evenstep.models.LlamaConfig` that these options set, beside those of the size."""
        given = {"norm": self.norm, "norm_alpha": self.norm_alpha, **{name: getattr(self, name) for name in VARIANTS}}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def label(self) -> str:
        """The size in names and tables, see `model_label`."""
        return model_label({"size": self.size, "config": self.config, "hf": self.hf})


@dataclass(frozen=True)
class OptimConfig(Section):
    TITLE = "the optimizer (its other hyperparameters by the name of the constructor argument: --optim.gamma1 0.85)"
    SECTION = "optim"
    name: str = option(
        "stable_spam", "the optimizer by name, or package.module:Class ('evenstep optimizers' describes each)",
        choices=BASELINES.keys(), form=r"[\w.]+:\w+",
    )  # fmt: skip
    before: str = option("", "gradient transforms before the optimizer, such as 'adaclip + adagn(gamma1=0.7)'")
    lr: float = option(1e-3, "peak learning rate", above=0, high=1e38)
    lr_scale_embedding: float | None = option(
        None, "multiplier of the learning rate of the embedding (none: 1)", above=0, high=1e6, key="lr_scale.embedding"
    )
    lr_scale_last: float | None = option(
        None, "multiplier of the learning rate of the output layer (none: 1)", above=0, high=1e6, key="lr_scale.last"
    )
    weight_decay: float = option(0.0, "weight decay of the parameters that optim.decay selects", low=0, high=1e38)
    decay: str = option(
        "matrices",
        "the parameters with weight decay: those of two or more dimensions, or all",
        choices=("matrices", "all"),
    )
    decay_correction: bool | None = option(
        None, "multiply the weight decay by lr / peak lr, except in the embedding and the output layer: AdamC "
        "(none: false)",
    )  # fmt: skip
    cautious_decay: bool | None = option(
        None, "weight decay only of the entries that an update moves towards 0: Cautious Weight Decay (none: false)"
    )
    hyperball: float | None = option(
        None, "keep the norm of each hidden matrix and move it by this times the learning rate times the norm: AdamH "
        "with adamw, MuonH with muon (none: off)", above=0, high=1e6,
    )  # fmt: skip
    options: Mapping[str, Any] = field(default_factory=dict)
    """Every other hyperparameter, by the name of the constructor argument. `evenstep.train.optimizers` checks the names
    against the signature of the constructor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("decay_correction", "cautious_decay"):
            if getattr(self, name) and not self.weight_decay:
                raise EvenstepError(f"optim.{name} true has no effect without optim.weight_decay; give both")
        if self.hyperball is not None and self.weight_decay:
            raise EvenstepError("optim.hyperball keeps the norm of the matrices; leave optim.weight_decay out")

    @property
    def lr_scales(self) -> dict[str, float]:
        """The kinds of layers ("embedding", "last") with another learning rate, and its multiplier."""
        given = {"embedding": self.lr_scale_embedding, "last": self.lr_scale_last}
        return {kind: scale for kind, scale in given.items() if scale is not None and scale != 1}

    @property
    def scales_in_words(self) -> str:
        """`lr_scales` for the lines before a run and of a plan, such as " (embedding x 10)"; empty without any."""
        words = ", ".join(f"{kind} x {scale:g}" for kind, scale in self.lr_scales.items())
        return f" ({words})" if words else ""


@dataclass(frozen=True)
class ScheduleConfig(Section):
    TITLE = "the learning rate over time"
    SECTION = "schedule"
    name: str = option(
        "cosine", "shape after the warm-up; wsd: constant, then linear decay", choices=("cosine", "wsd", "constant")
    )
    warmup_steps: int | None = option(
        None, "number of steps of linear warm-up (none: a tenth of all steps)", low=0, high=MOST_STEPS, count=True
    )
    min_lr_ratio: float = option(0.1, "final learning rate as a fraction of the peak (cosine, wsd)", low=0, high=1)
    decay_fraction: float = option(0.2, "fraction of all steps in which wsd decays", above=0, high=1)


@dataclass(frozen=True)
class TrainConfig(Section):
    TITLE = "the training"
    SECTION = "train"
    steps: int | None = option(
        None, "the budget in optimizer steps; either this or train.tokens", low=1, high=MOST_STEPS, count=True,
        resume="free",
    )  # fmt: skip
    tokens: int | None = option(
        None, "the budget in tokens, such as 20K, 100M or 1.5B", low=1, high=MOST_TOKENS, count=True, resume="free"
    )
    batch_size: int = option(8, "sequences per optimizer step, over all processes", low=1, high=MOST_SEQUENCES)
    micro_batch_size: int | None = option(
        None, "sequences per forward pass (none: batch_size)", low=1, high=MOST_SEQUENCES, resume="rounding"
    )
    seq_len: int = option(256, "tokens per sequence", low=2, high=MOST_SEQUENCES)
    dtype: str = option(
        "fp32", "number format: fp32 (on a GPU with products in TF32); bf16-autocast computes in bf16 with fp32 "
        "weights, bf16 also has bf16 weights",
        choices=("fp32", "bf16-autocast", "bf16"),
    )  # fmt: skip
    device: str = option(
        "auto", "the device; auto: the GPU if there is one, else the CPU", choices=("auto", "cpu", "cuda"),
        resume="rounding",
    )  # fmt: skip
    compile: bool = option(False, "compile the model: a slower start, faster steps", resume="rounding")
    activation_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, more time", resume="rounding"
    )
    loss_chunk: int | str = option(
        "auto", "rows of logits in memory at once; 0: all; auto: 256 on a CPU, and on a GPU as many as take 1 GiB in "
        "fp32, or a sixteenth of its memory if that is less",
        low=0, high=10**12, choices=("auto",), resume="rounding",
    )  # fmt: skip
    clip_norm: float = option(
        0.0, "largest norm of all gradients together, which are scaled down to it; 0: off", low=0, high=1e30
    )
    z_loss: float | None = option(
        None, "coefficient of the z-loss, the mean of logsumexp(logits)^2, which keeps logits near zero; PaLM: 1e-4 "
        "(none: off)", above=0, high=1e6,
    )  # fmt: skip
    on_nan: str = option(
        "stop", "what to do at a loss that is not finite: end the run, skip the batch, or rewind to the last "
        "checkpoint and skip the batch from there; guard.ladder also reacts to finite spikes",
        choices=("stop", "skip", "rewind"), resume="free",
    )  # fmt: skip
    deterministic: bool = option(False, "refuse operations whose result may differ between runs", resume="rounding")
    threads: int = option(
        0, "number of CPU threads; 0: torch's default (OMP_NUM_THREADS)", low=0, high=1024, resume="rounding"
    )


@dataclass(frozen=True)
class ParallelConfig(Section):
    TITLE = "several processes, started by torchrun"
    SECTION = "parallel"
    mode: str = option(
        "none", "ddp: a replica in every process; fsdp: sharded over all processes; hsdp: sharded within a group, "
        "replicated between groups; tp+fsdp: each matrix split over a few processes, and sharded over the others",
        choices=("none", "ddp", "fsdp", "hsdp", "tp+fsdp"), resume="rounding",
    )  # fmt: skip
    tensor: int | None = option(
        None, "number of processes that share a matrix product, only for tp+fsdp (none: those of one machine)", low=1,
        high=2**20, resume="rounding",
    )  # fmt: skip
    replicate: int | None = option(
        None, "number of groups that each hold the whole model, only for hsdp (none: one per machine)", low=1,
        high=2**20, resume="rounding",
    )  # fmt: skip
    reshard: bool = option(
        True, "free the gathered weights after the forward pass and gather them again in the backward pass (not ddp)",
        resume="rounding",
    )  # fmt: skip
    timeout: float = option(
        600.0, "seconds without progress after which the run ends with an error that names the missing process",
        above=0, high=30 * 86400, resume="free",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, mode in (("tensor", "tp+fsdp"), ("replicate", "hsdp")):
            if getattr(self, name) is not None and self.mode != mode:
                raise EvenstepError(
                    f"parallel.{name} {getattr(self, name)} has no effect with parallel.mode {self.mode}; leave it "
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
        1_000_000, "number of validation tokens; 0: all", low=0, high=MOST_TOKENS, count=True, resume="free"
    )
    batch_size: int | None = option(
        None, "sequences per forward pass of the validation (none: micro_batch_size)", low=1, high=MOST_SEQUENCES,
        resume="free",
    )  # fmt: skip


@dataclass(frozen=True)
class CheckpointConfig(Section):
    TITLE = "checkpoints"
    SECTION = "checkpoint"
    every: int = option(
        500, "steps between checkpoints; 0: only at the end and on interruption", low=0, high=MOST_STEPS, count=True,
        resume="free",
    )  # fmt: skip
    background: bool = option(True, "write checkpoints in the background, from a copy in memory", resume="free")
    keep: int = option(2, "number of checkpoints to keep, the newest ones", low=1, high=10**6, resume="free")


@dataclass(frozen=True)
class LogConfig(Section):
    TITLE = "the log"
    SECTION = "log"
    every: int = option(10, "steps between training records in metrics.jsonl", low=1, high=MOST_STEPS, resume="free")
    curve: bool = option(True, "plot the losses as curve.png at the end", resume="free")
    report: bool = option(False, "write the page of the run, report.html, at the end (evenstep report)", resume="free")


@dataclass(frozen=True)
class TelemetryConfig(Section):
    TITLE = "statistics of gradients, updates and spikes (docs/telemetry.md)"
    SECTION = "telemetry"
    enabled: bool = option(True, "measure every step and report spikes", resume="free")
    every: int = option(
        10, "smallest number of steps between records with the values of all parameters", low=1, high=MOST_STEPS,
        resume="free",
    )  # fmt: skip
    samples: int = option(
        64, "entries of each parameter for which the gradient spike score (GSS) is computed; 0: none", low=0,
        high=2**16, resume="free",
    )  # fmt: skip
    ratio: float = option(
        10.0, "spike event: a largest gradient entry above this multiple of its recent mean", above=1, high=1e30,
        resume="free",
    )  # fmt: skip
    sigma: float = option(
        7.0, "spike rate: number of standard deviations above the mean", above=0, high=1e30, resume="free"
    )
    window: int = option(
        1000, "spike rate: number of steps over which mean and rate are computed", low=2, high=100_000, resume="free"
    )
    activations: int = option(
        20, "steps between two measurements of attention, activations and output logits, for early warnings; 0: none",
        low=0, high=MOST_STEPS, resume="free",
    )  # fmt: skip
    tensorboard: bool = option(False, "also write TensorBoard files into the directory of the run", resume="free")
    wandb: str = option("off", "also log to Weights & Biases", choices=("off", "offline", "online"), resume="free")
    trackio: bool = option(False, "also log to the local database of trackio", resume="free")
    mlflow: bool = option(False, "also log to MLflow, at MLFLOW_TRACKING_URI", resume="free")


@dataclass(frozen=True)
class GuardConfig(Section):
    TITLE = "the reaction to spikes (docs/guard.md)"
    SECTION = "guard"
    ladder: str = option(
        "off", "actions in the order in which they are tried, separated by commas: skip the batch, lower_lr, rewind to "
        "a snapshot, stop; all: skip,lower_lr,rewind,stop",
        choices=("off", "all"), form="(skip)?(,?lower_lr)?(,?rewind)?(,?stop)?", resume="free",
    )  # fmt: skip
    sigma: float = option(
        8.0, "spike: deviations above the median from which the loss or a gradient norm is bad", above=0, high=1e30,
        resume="free",
    )  # fmt: skip
    norm_ratio: float = option(
        3.0, "spike: smallest factor between a gradient norm and its median", above=1, high=1e30, resume="free"
    )
    loss_rise: float = option(
        0.5, "spike: smallest difference between a loss and its median, in nats", low=0, high=1e30, resume="free"
    )
    budget: int = option(20, "number of actions in the whole run", low=1, high=10**6, resume="free")
    snapshot_every: int = option(
        100, "steps between snapshots in host memory for rewind; 0: rewind to the last checkpoint", low=0,
        high=MOST_STEPS, count=True, resume="free",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ladder.startswith(",") or not self.ladder:
            raise EvenstepError(f"guard.ladder: {self.ladder!r} is not a list of actions; give skip,rewind,stop or off")

    @property
    def actions(self) -> tuple[str, ...]:
        """The actions of the ladder in their order; empty if it is off."""
        if self.ladder == "off":
            return ()
        return tuple(("skip,lower_lr,rewind,stop" if self.ladder == "all" else self.ladder).split(","))


@dataclass(frozen=True)
class SampleConfig(Section):
    TITLE = "the text that the model generates at the end"
    SECTION = "sample"
    prompt: str = option("", "the beginning of the text (empty: a new document)", resume="free")
    tokens: int = option(120, "number of tokens to generate; 0: no sample", low=0, high=10**6, resume="free")
    temperature: float = option(
        0.8, "temperature of the sampling; 0: always the most likely token", low=0, high=1e6, resume="free"
    )
    top_k: int = option(
        50, "sample from this number of most likely tokens; 0: from all", low=0, high=2**20, resume="free"
    )


# ---- the configuration of a run ----


@dataclass(frozen=True)
class BaseConfig(Section):
    """The options of runs of every kind. Construction raises EvenstepError, with one line, for values that do not fit
    together."""

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
    guard: GuardConfig = field(default_factory=GuardConfig)
    seed: int = option(0, "random seed of the initial weights and of the order of the data", low=0, high=2**31 - 1)
    lowbit: str | None = option(
        None, "low-bit recipe of the linear layers (none: high precision)", choices=LOWBIT_NAMES
    )
    out: str | None = option(None, "directory of the run (none: runs/DATE-NAME)", resume="free")
    name: str | None = option(
        None, "name of the run (none: the file name of the recipe, or SIZE-OPTIMIZER[-LOWBIT])", resume="free"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        train = self.train
        self.check_budget()
        if self.optim.options.get("total_steps") == "run":  # Stable-SPAM's schedule, as long as the run
            given = {**self.optim.options, "total_steps": self.total_steps}
            object.__setattr__(self, "optim", replace(self.optim, options=given))
        if train.batch_size % self.micro_batch_size:
            raise EvenstepError(
                f"train.batch_size {train.batch_size} is not divisible by train.micro_batch_size "
                f"{self.micro_batch_size}; give a divisor, as all forward passes have the same number of sequences"
            )
        self.check_warmup()
        if self.guard.actions and train.on_nan != "stop":
            raise EvenstepError(
                f"train.on_nan {train.on_nan} has no effect with guard.ladder {self.guard.ladder}, which also decides "
                "about a loss that is not finite; leave one of them out"
            )

    def check_budget(self) -> None:
        train = self.train
        if (train.steps is None) == (train.tokens is None):
            given = "neither is given" if train.steps is None else f"both are given ({train.steps} and {train.tokens})"
            raise EvenstepError(f"train.steps and train.tokens: {given}; give the budget by exactly one of them")

    def check_warmup(self) -> None:
        warmup = self.schedule.warmup_steps
        if warmup is not None and warmup >= self.total_steps:
            raise EvenstepError(
                f"schedule.warmup_steps {warmup} is not below the {self.total_steps} steps of the run; give a smaller "
                "number, or none for a tenth of the steps"
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.hf is None:
            return
        if self.parallel.mode == "tp+fsdp":
            raise EvenstepError(
                "parallel.mode tp+fsdp divides the matrices of evenstep's LLaMA and cannot be used with model.hf; give "
                "parallel.mode fsdp"
            )
        if isinstance(self.train.loss_chunk, int) and self.train.loss_chunk:
            raise EvenstepError(
                f"train.loss_chunk {self.train.loss_chunk} cannot be used with model.hf, which computes all logits at "
                "once; leave it out, or give a smaller train.micro_batch_size"
            )


def sections(kind: type[BaseConfig] = Config) -> dict[str, type[Section]]:
    """The sections of a kind of run by name, in the order of the help and of config.toml."""
    hints = type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind) if not f.metadata}


def options(kind: type[BaseConfig] = Config) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Every option by its full name (``train.steps``, ``seed``) with its field and its type hint, in the order of the
    help and the docs."""
    found: dict[str, tuple[dataclasses.Field[Any], Any]] = {}
    classes: tuple[type[Section], ...] = (*sections(kind).values(), kind)
    for cls in classes:
        hints = type_hints(cls)
        for f in dataclasses.fields(cls):
            if f.metadata:
                found[f"{cls.SECTION}.{key_of(f)}" if cls.SECTION else key_of(f)] = (f, hints[f.name])
    return found


# ---- hyperparameters of the optimizers used most ----

_ADAM = (
    Option("betas", (0.9, 0.999), "decay rates of the first and second moment"),
    Option("eps", 1e-8, "added to the square root of the second moment"),
    Option("amsgrad", False, "use the largest second moment so far (AMSGrad)"),
)

_DECLARED: dict[str, tuple[Option, ...]] = {
    "stable_spam": STABLE_SPAM,
    "spam": (*SPAM, Option("density_of", "all", "the matrices to which density applies: all, or the hidden ones")),
    "scale": SCALE,
    "adamw": _ADAM,
    "adam": (*_ADAM, Option("decoupled_weight_decay", False, "decoupled weight decay, as in AdamW")),
    "sgd": (
        Option("momentum", 0.9, "decay rate of the momentum buffer"),
        Option("dampening", 0, "fraction of the gradient that is not added to the momentum buffer"),
        Option("nesterov", False, "Nesterov momentum"),
    ),
}

_NOT_OFFERED = ("lr", "weight_decay", "maximize", "capturable")
"""``lr`` and ``weight_decay`` are fields of `OptimConfig`; the other two have no use in a run."""

HYPERPARAMETERS: dict[str, dict[str, Option]] = {
    name: {one.name: one for one in declared if one.name not in _NOT_OFFERED} for name, declared in _DECLARED.items()
}
"""Optimizer -> hyperparameter -> its declaration, for the help of the command line. `evenstep.optim.options` declares
the hyperparameters of evenstep's own optimizers; those of torch's optimizers are declared above. Every other argument
of a constructor is accepted too."""


def owners() -> dict[str, dict[str, Option]]:
    """Hyperparameter -> optimizer -> its declaration, in the order of the table."""
    found: dict[str, dict[str, Option]] = {}
    for optimizer, declared in HYPERPARAMETERS.items():
        for name, one in declared.items():
            found.setdefault(name, {})[optimizer] = one
    return found


def _names(option: Option) -> tuple[str, ...]:
    """The values that the shell completes; empty where the values cannot be listed."""
    if isinstance(option.default, bool):
        return ("true", "false")
    if option.name == "density_of":
        return tuple(DENSITY_OF)
    return RANGES[option.name].choices if option.name in RANGES else ()


CHOICES: dict[str, tuple[str, ...]] = {
    name: names for name, of in owners().items() if (names := _names(next(iter(of.values()))))
}
"""Hyperparameter -> its allowed values, for the hyperparameters that have only a few."""
