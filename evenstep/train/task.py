"""The interface `Task` between a trainer and the data, model, loss and validation of a run, and `Pretraining`, the task
of training a language model on a stream of tokens. `evenstep.finetune.task` has the other task.
"""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from evenstep.data import BatchLoader, DataSpec, TokenData, eval_batches, prepare
from evenstep.data.left_out import shown
from evenstep.errors import EvenstepError
from evenstep.models import SIZES, Llama, LlamaConfig
from evenstep.models.hf import read_config, save_config
from evenstep.models.hub import HubLM, HubShape, check_causal
from evenstep.train.config import VARIANTS, BaseConfig, Config
from evenstep.train.distributed import World
from evenstep.train.evaluate import EvalResult, Evaluation, evaluate, sample_text
from evenstep.train.hardware import memory_limit, total_memory
from evenstep.train.log import Metrics, short_count
from evenstep.train.memory import chunk_rows, least_memory, llama_shape, model_shape
from evenstep.train.saving import model_tensors
from evenstep.train.summary import closing_lines
from evenstep.train.weights import check_positions, fill_from, find_source, load_model, shape_in, with_lowbit

CPU_ROWS = 256
"""Rows of logits in memory at once on a CPU: with fewer rows the matrix products are slow, with more the logits do not
stay in the cache (measured by benchmarks/throughput.py)."""


class Task(ABC):
    """Data, model, loss and validation of a run. A `Trainer` calls the methods in the order of this class.

    `resolve` sets ``config``, and `open_data` sets ``data``. Every process has its own task, and all processes call the
    same methods in the same order.
    """

    config_type: ClassVar[type[BaseConfig]]
    config: Any
    data: Any
    """Has ``tokenizer`` and ``val``, the validation data, which may be empty."""
    loader: Any
    """Has ``position`` and ``next_batch()``."""

    def __init__(self, world: World, say: Callable[[str], None]) -> None:
        self.world, self.say = world, say

    # ---- before the first step ----

    @abstractmethod
    def resolve(self, config: Any, checkpoint: Path | None = None) -> Any:
        """The configuration, completed by values that depend on the data or the model, such as the shape of a given
        model. ``checkpoint`` is the one that is resumed, or None."""

    @abstractmethod
    def open_data(self, progress: Any) -> Any:
        """Prepare the data, and set ``data``."""

    @abstractmethod
    def make_loader(self) -> Any:
        """Create the loader of the batches of this process, and set ``loader``."""

    @abstractmethod
    def check_memory(self) -> None:
        """EvenstepError when the machine has too little memory for the run."""

    @abstractmethod
    def build_model(self, device: torch.device, *, blank: bool) -> Any:
        """Build the model on ``device``. ``blank``: a checkpoint will provide its weights."""

    @abstractmethod
    def loss_chunk(self, model: Any) -> int | None:
        """The number of rows of logits in memory at once; None for all rows."""

    @abstractmethod
    def describe_data(self) -> str:
        """A description of the data for the lines printed before the first step."""

    # ---- a step ----

    @abstractmethod
    def loss_weights(self, targets: Tensor, micro_batch_size: int) -> list[float]:
        """The weight of each micro batch's mean loss in the loss of the step. The weights of all micro batches of a
        process add up to 1 on average over the processes. Called once per step, before the first `loss`."""

    @abstractmethod
    def loss(self, model_loss: Callable[..., Tensor], inputs: Tensor, targets: Tensor, chunk: int | None) -> Tensor:
        """The mean loss of a micro batch, 0-d. ``model_loss`` is ``model.loss`` or its DDP wrapper; ``inputs`` and
        ``targets`` are rows of what the loader returned, int64 [b, T] in pretraining."""

    def step_record(self) -> dict[str, float]:
        """Further entries of the training record of the last step. All processes call it."""
        return {}

    @abstractmethod
    def step_tokens(self) -> int:
        """Number of tokens of the last batch, over all processes."""

    # ---- validation, checkpoints, the end ----

    @abstractmethod
    def evaluate(self, evaluation: Evaluation) -> Any:
        """Validate the model. The method ``fields()`` of the result returns the entries of metrics.jsonl."""

    def tensors(self, model: Any) -> dict[str, Tensor]:
        """The tensors of the model in a checkpoint, by key."""
        return model_tensors(model)

    def save_shape(self, model: Any, directory: Path) -> None:
        """Write the shape of the model (config.json) into a checkpoint."""
        save_config(model, directory)

    @abstractmethod
    def data_identity(self) -> str:
        """A hash of the data; a run is not resumed on data with another hash."""

    @abstractmethod
    def conclusion(self, model: Any, out: Path, metrics: Metrics) -> dict[str, Any]:
        """Write the files for other programs; returns the entries of summary.json that are specific to the task. If the
        entry ``sample`` is None, `sample` provides its value afterwards."""

    def sample(self, model: Any, checkpoint: Path | None) -> str:
        """Text that the model generates, or the model saved in ``checkpoint`` if one is given."""
        return ""

    @staticmethod
    @abstractmethod
    def closing(out: Path, summary: dict[str, Any], files: list[str]) -> list[str]:
        """The lines printed after the last step."""


class Pretraining(Task):
    """A language model on a stream of tokens, cut into sequences of ``train.seq_len``."""

    config_type = Config
    data: TokenData
    loader: BatchLoader
    source: Path | None = None
    """The directory of the weights to start from, or of the checkpoint that is resumed."""
    z_losses: list[Tensor]
    """The z-loss of each micro batch of the step, times its share of the rows of this process."""

    def resolve(self, config: Any, checkpoint: Path | None = None) -> Any:
        self.source = checkpoint
        if checkpoint is None and config.model.init:
            given = Path(config.model.init)
            self.source = Path(self.world.on_rank_0(lambda: str(find_source(given, self.say))))
        if config.model.hf and checkpoint is None:  # before the data are prepared, which may take long
            self.world.on_rank_0(lambda: check_architecture(config, self.source))
        elif config.model.init and self.source and not config.model.hf:
            config = with_shape_of(config, self.source)
        self.config = config
        return config

    def open_data(self, progress: Any) -> TokenData:
        self.data = self.world.rank_0_first(lambda: load_data(self.config, progress))
        return self.data

    def make_loader(self) -> BatchLoader:
        train, world = self.config.train, self.world
        self.loader = BatchLoader(
            self.data.train, train.seq_len, train.batch_size, self.config.seed, world.data_rank, world.data_size
        )
        if self.config.data.bad_batch:
            self.loader.randomise(self.config.data.bad_batch, self.data.vocab_size)
        return self.loader

    def check_memory(self) -> None:
        """EvenstepError if a lower bound of the memory of the run exceeds that of the machine. Checked on CPUs only,
        where the system would kill the process without a message; a GPU raises an error."""
        config, world, words = self.config, self.world, self.data.vocab_size
        if world.device.type != "cpu":
            return
        shape = shape_in(self.source, config) if self.source else model_shape(config, words)
        needs, limit = least_memory(config, shape, world.size, world.local_size), memory_limit()
        if sum(needs.values()) * world.local_size <= limit:
            return
        listed = ", ".join(f"{name} {size / 1e9:,.1f} GB" for name, size in needs.items() if size >= 5e7)
        each = f" in each of {world.local_size} processes" if world.local_size > 1 else ""
        raise EvenstepError(
            f"the run needs at least {sum(needs.values()) / 1e9:,.1f} GB of memory{each} ({listed}), the machine has "
            f"{limit / 1e9:,.1f} GB; give a smaller model.size, data.vocab_size, train.micro_batch_size or "
            "train.seq_len"
        )

    def build_model(self, device: torch.device, *, blank: bool) -> Llama | HubLM:
        config, words = self.config, self.data.vocab_size
        # bf16-autocast keeps fp32 weights, and casts them in each matrix product.
        dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
        if (shape := self._shape_of_shards(blank)) is not None:
            with torch.device("meta"):
                empty = Llama(shape).to(dtype=dtype)
            check_positions(config.train.seq_len, shape.max_seq_len, self.source)
            empty.activation_checkpointing = config.train.activation_checkpointing
            return empty
        # All processes draw the same weights; parallel modes shard them afterwards.
        torch.manual_seed(config.seed)
        model = self._llama(blank).to(dtype=dtype) if config.model.hf is None else self._hub(blank, dtype)
        source = self.source or config.model.hf or config.model.config
        if words > model.config.vocab_size:
            raise EvenstepError(
                f"the tokenizer has {words} entries, but the model of {source} only {model.config.vocab_size}; "
                "give the tokenizer of the model (data.tokenizer), or a smaller data.vocab_size"
            )
        check_positions(config.train.seq_len, model.config.max_seq_len, source)
        model.activation_checkpointing = config.train.activation_checkpointing
        return with_lowbit(model.to(device=device), config.lowbit, self.say)

    def _shape_of_shards(self, blank: bool) -> LlamaConfig | None:
        """The shape of a model that is built without entries, whose shards `Parallel.materialise` makes: under FSDP,
        unless weights are read from another model, rounded to few bits, or shared by two layers. None otherwise."""
        config = self.config
        if config.parallel.mode not in ("fsdp", "hsdp") or self.world.control is None:
            return None
        if config.model.hf is not None or config.lowbit is not None or not (blank or self.source is None):
            return None
        shape = llama_shape(config, self.data.vocab_size) if self.source is None else read_config(self.source)
        return None if shape.tie_embeddings else shape

    def _llama(self, blank: bool) -> Llama:
        config, source = self.config, self.source
        if source is None:
            return Llama(llama_shape(config, self.data.vocab_size))
        if not blank:
            model = load_model(source)
            assert isinstance(model, Llama)  # as `shape_in` has checked
        else:
            # The checkpoint overwrites every weight, so drawing them would be wasted time.
            with torch.device("meta"):
                model = Llama(read_config(source))
            model.to_empty(device="cpu")
            model.tie()
        torch.manual_seed(config.seed)  # for what is drawn in training
        return model

    def _hub(self, blank: bool, dtype: torch.dtype) -> HubLM:
        source, words = self.source, self.data.vocab_size
        shape = HubShape.read(source or self.config.model.hf or "")
        if source is None:
            if shape.vocab_size != words:
                self.say(
                    f"model.hf: the model has a vocabulary of {words:,} entries, that of the tokenizer, instead of "
                    f"{shape.vocab_size:,}"
                )
            shape = shape.with_vocabulary(words)
        # Drawn also if a checkpoint overwrites the weights, because it does not contain all buffers.
        model = shape.build(dtype)
        model.net.config.eos_token_id = self.data.tokenizer.eos_id
        if source is None:
            check_causal(model, shape.source)
        elif not blank:
            fill_from(model, source)
        torch.manual_seed(self.config.seed)  # the same draws in training whether or not weights were drawn
        return model

    def save_shape(self, model: Any, directory: Path) -> None:
        if isinstance(model, HubLM):
            model.save_config(directory)
        else:
            super().save_shape(model, directory)

    def loss_chunk(self, model: Any) -> int | None:
        if isinstance(model, HubLM):
            return None
        return loss_chunk(self.config, model.config.vocab_size, self.world.device)

    def describe_data(self) -> str:
        train, val, data = self.data.train, self.data.val, self.config.data
        held = f"{short_count(len(val))} for validation" if len(val) else "none for validation"
        missing = [shown(entry) for entry in self.data.manifest.get("left_out", [])]
        parts = [
            f"{data.source}: {train.num_documents + val.num_documents:,} documents, {short_count(len(train))} tokens",
            held,
            f"vocabulary {self.data.vocab_size:,}",
            f"left out: {'; '.join(missing)}" if missing else "nothing left out",
        ]
        if data.bad_batch:
            parts.append(f"the batch of step {data.bad_batch} is random tokens (data.bad_batch)")
        return ", ".join(parts)

    def loss_weights(self, targets: Tensor, micro_batch_size: int) -> list[float]:
        self.z_losses = []
        return [y.numel() / targets.numel() for y in targets.split(micro_batch_size)]

    def loss(self, model_loss: Callable[..., Tensor], inputs: Tensor, targets: Tensor, chunk: int | None) -> Tensor:
        coefficient = self.config.train.z_loss
        if coefficient is None:
            return model_loss(inputs, targets, chunk=chunk)
        loss, z_loss = model_loss(inputs, targets, chunk=chunk, z_loss=coefficient)
        self.z_losses.append(z_loss.detach() * (len(inputs) * self.world.data_size / self.config.train.batch_size))
        # The value is the cross entropy alone, which the log, the guard and comparisons use; the gradient is of both.
        return loss + (z_loss - z_loss.detach())

    def step_record(self) -> dict[str, float]:
        if not self.z_losses:
            return {}
        return {"z_loss": self.world.sum(torch.stack(self.z_losses).sum() / self.world.data_size).item()}

    def step_tokens(self) -> int:
        return self.config.tokens_per_step

    def evaluate(self, evaluation: Evaluation) -> EvalResult:
        """The token-weighted loss on the validation split, or on its first ``eval.max_tokens`` tokens."""
        config, val = self.config, self.data.val
        batches = eval_batches(val, config.train.seq_len, evaluation.batch_size, config.eval.max_tokens or None)
        return evaluate(
            evaluation.model,
            evaluation.watch(batches),
            val.num_bytes / max(1, len(val)),
            device=evaluation.device,
            autocast=evaluation.autocast,
            chunk=evaluation.chunk,
            parallel=evaluation.parallel,
        )

    def data_identity(self) -> str:
        return data_identity(self.data)

    def conclusion(self, model: Any, out: Path, metrics: Metrics) -> dict[str, Any]:
        return {"prompt": self.config.sample.prompt, "sample": None}

    def sample(self, model: Any, checkpoint: Path | None) -> str:
        # Only the checkpoint of a sharded model is given: it is loaded whole, in the precision of training.
        if self.config.sample.tokens and checkpoint is not None:
            model = with_lowbit(load_model(checkpoint).eval(), self.config.lowbit, lambda _: None)
        return sample_text(model, self.data.tokenizer, self.config.sample, self.config.seed)

    closing = staticmethod(closing_lines)


def load_data(config: Config, progress: Any = None) -> TokenData:
    """The tokens of the corpus of ``[data]``, prepared now if they are not in the cache."""
    return prepare(data_spec(config), progress)


def data_spec(config: Config) -> DataSpec:
    """The corpus of ``[data]``, its tokenizer and its split."""
    data = config.data
    # The split does not depend on the seed of the run: runs with different seeds validate on the same documents.
    return DataSpec(
        source=data.source,
        tokenizer=data.tokenizer,
        vocab_size=data.vocab_size,
        val_fraction=data.val_fraction,
        text_field=data.text_field,
        max_tokens=data.max_tokens,
        cache_dir=data.cache_dir,
        exclude=data.exclude or "",
        on_bad=data.on_bad or "stop",
    )


def data_identity(data: TokenData) -> str:
    """A hash of the counts and of both ends of the token stream: fast for a corpus of any size, and sensitive to almost
    every change of the text."""
    train, val = data.train, data.val
    digest = hashlib.sha256(repr((len(train), len(val), train.num_bytes, val.num_bytes)).encode())
    # Little-endian uint32 on every machine, for uint16 and uint32 shards alike: the hash is stored in checkpoints.
    for start in (0, max(0, len(train) - 65536)):
        digest.update(train.read(start, min(start + 65536, len(train))).astype("<u4").tobytes())
    return digest.hexdigest()


def check_architecture(config: Config, source: Path | None) -> None:
    """EvenstepError when ``model.hf`` is not a causal language model of transformers, or the weights in ``source`` are
    those of another type of model."""
    shape = HubShape.read(config.model.hf or "")
    found = shape_in(source, config) if source else shape
    if isinstance(found, HubShape) and found.kind != shape.kind:
        raise EvenstepError(
            f"model.init: {source} has a model of type {found.kind}, but model.hf {config.model.hf} is a {shape.kind}; "
            "give the configuration of the same model"
        )


def with_shape_of(config: Config, source: Path) -> Config:
    """``config`` with the shape of the model in ``source``. EvenstepError when ``config`` states another shape.

    ``model.size`` is None for a shape that has no name.
    """
    shape = shape_in(source, config)
    assert isinstance(shape, LlamaConfig)
    names = (name for name, size in SIZES.items() if all(getattr(shape, key) == value for key, value in size.items()))
    options: dict[str, Any] = {"size": next(names, None), "norm": shape.norm}
    if shape.norm == "mix":
        options["norm_alpha"] = shape.norm_alpha
    for name in VARIANTS:
        default = LlamaConfig.__dataclass_fields__[name].default
        if getattr(shape, name) != default or getattr(config.model, name):
            options[name] = getattr(shape, name)
    for key, value in options.items():
        given = getattr(config.model, key)
        if given not in (None, value):
            has = ("an unnamed shape" if key == "size" else "none") if value is None else value
            raise EvenstepError(f"model.{key} {given} contradicts the model in {source}, which has {has}; leave it out")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **options))


def loss_chunk(config: Any, vocab_size: int, device: torch.device) -> int | None:
    """The number of rows of logits in memory at once; None for all.

    The rule of ``auto``: 256 rows on a CPU, where they stay in the cache, and on a GPU as many as `chunk_rows` says, by
    the total memory instead of the free memory, so that a resumed run decides the same.
    """
    given = config.train.loss_chunk
    if isinstance(given, int):
        return given or None
    rows = config.micro_batch_size * config.train.seq_len
    if device.type == "cpu":
        return CPU_ROWS if rows > CPU_ROWS else None
    return chunk_rows(rows, vocab_size, total_memory(device))
