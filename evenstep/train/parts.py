"""What a run is made of: data, model, loss, and what its checkpoints and summary hold. `Run` has these for pretraining;
runs of another kind (evenstep.finetune) replace them and keep the rest: step, loop, log, checkpoints, resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from evenstep.data import BatchLoader
from evenstep.models.hf import save_config
from evenstep.train import setup
from evenstep.train.config import BaseConfig, Config
from evenstep.train.distributed import World
from evenstep.train.log import short_count
from evenstep.train.saving import model_tensors
from evenstep.train.state import data_identity
from evenstep.train.summary import closing_lines
from evenstep.train.weights import find_source

Say = Callable[[str], None]


class Parts:
    """The base of `Run`, which sets these attributes."""

    KIND: ClassVar[type[BaseConfig]] = Config
    config: Any
    world: World
    say: Say
    data: Any
    model: Any
    parallel: Any
    device: torch.device
    micro_batch_size: int
    chunk: int | None

    def find_source(self, config: Any, world: World, say: Say) -> Path | None:
        """The directory that a new run takes its weights from."""
        if not config.model.init:
            return None
        given = Path(config.model.init)
        return Path(world.from_first(lambda: str(find_source(given, say))))

    def source_on_resume(self, config: Any, checkpoint: Path, world: World, say: Say) -> Path | None:
        """The directory that the shape of the model is read from."""
        return checkpoint

    def settled(self, config: Any, source: Path | None, say: Say) -> Any:
        """``config`` with what the source decides."""
        return setup.with_shape_of(config, source) if config.model.init and source else config

    def open_data(self, progress: Any) -> Any:
        return self.world.in_turn(lambda: setup.load_data(self.config, progress))

    def describe_data(self) -> str:
        """What is trained on, for people: in words of `evenstep.train.header`."""
        train, val = self.data.train, self.data.val
        held = f"{short_count(len(val))} for validation" if len(val) else "none for validation"
        return (
            f"{self.config.data.source}: {short_count(len(train))} tokens, {held}, vocabulary {self.data.vocab_size:,}"
        )

    def make_loader(self) -> Any:
        train, world = self.config.train, self.world
        return BatchLoader(
            self.data.train, train.seq_len, train.batch_size, self.config.seed, world.data_rank, world.data_size
        )

    def check_memory(self, source: Path | None) -> None:
        """EvenstepError where the machine has too little for the run."""
        setup.check_memory(self.config, self.data.vocab_size, source, self.world)

    def make_model(self, source: Path | None, device: torch.device, *, blank: bool) -> Any:
        return setup.build_model(self.config, self.data.vocab_size, source, device, self.say, blank=blank)

    def loss_chunk(self) -> int | None:
        return setup.loss_chunk(self.config, self.model.config.vocab_size, self.device, self.say)

    def shares(self, targets: Tensor) -> list[float]:
        """What the mean loss of each micro batch weighs in that of the step."""
        return [y.numel() / targets.numel() for y in targets.split(self.micro_batch_size)]

    def step_tokens(self) -> int:
        """Tokens of the step just done, over all processes."""
        return self.config.tokens_per_step

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.parallel.loss(inputs, targets, chunk=self.chunk)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the model."""
        return model_tensors(self.model)

    def save_shape(self, directory: Path) -> None:
        save_config(self.model, directory)

    def data_identity(self) -> str:
        return data_identity(self.data)

    def conclusion(self) -> dict[str, Any]:
        """What the summary says beside numbers that every run has."""
        return {"prompt": self.config.sample.prompt, "sample": None}  # the sample is made when the rest is written

    closing = staticmethod(closing_lines)
