"""A fine-tuning run: `evenstep.train.Run` on rows of examples, validated by its task."""

from __future__ import annotations

import dataclasses
import math
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from evenstep.console import program
from evenstep.errors import EvenstepError
from evenstep.finetune import scoring, source
from evenstep.finetune.config import FineTuneConfig, TuneOptimConfig
from evenstep.finetune.examples import Bad, Example
from evenstep.finetune.hub import HubCausal, HubClassifier, keeps_documents_apart
from evenstep.finetune.note import Note
from evenstep.finetune.products import write_products
from evenstep.finetune.rows import RowLoader, batches
from evenstep.finetune.scoring import TuneResult
from evenstep.finetune.task import Task, open_examples, summary_of
from evenstep.finetune.text import load_text
from evenstep.models import Llama
from evenstep.train import setup
from evenstep.train.distributed import World, open_world
from evenstep.train.interrupts import Interrupts
from evenstep.train.log import clock, short_count, tell
from evenstep.train.run import Run, Say
from evenstep.train.saving import model_tensors

T = TypeVar("T")


class Tuning(Run):
    """A run of `FineTuneConfig`. ``task`` holds its examples. The model comes from ``model.path`` on a resume too: of
    adapters a checkpoint holds the adapters alone."""

    KIND = FineTuneConfig
    task: Task
    loader: RowLoader

    # ---- what it is made of ----

    def find_source(self, config: Any, world: World, say: Say) -> Path:
        path, library = Path(config.model.path), config.model.library
        self.device = world.device
        self.source = world.from_first(lambda: source.find_source(path, library, say))
        return self.source.folder

    def source_on_resume(self, config: Any, checkpoint: Path, world: World, say: Say) -> Path:
        return self.find_source(config, world, say)

    def settled(self, config: Any, found: Path | None, say: Say) -> FineTuneConfig:
        """With the library and the kind of the model, and a budget in steps; opens the examples and the model, which
        decides whether they are packed."""
        bad: Bad = {}
        train, val = open_examples(config, bad)
        folder = self.source.folder
        text = load_text(folder, self.source.library)
        self.task = task = Task(config, text, train, val, source.classes_of(folder), bad)
        self.kinds = {one.name: scoring.kind_of(config.eval.score, one.examples) for one in task.sets}
        # On the device already: how a model packs is tried with the kernels that will train it.
        self.opened = source.open_model(config, self.source, task.labels, say).to(self.device)
        self._check_vocabulary()
        if isinstance(self.opened, HubClassifier):
            self.opened.pad_with(task.tokenizer.eos_id)
        if self._may_pack(config, say):
            task.pack()
        for line in task.told():
            say(line)
        kind = "classifier" if task.labels else "causal"
        model = dataclasses.replace(config.model, library=self.source.library, kind=kind)
        return dataclasses.replace(config, model=model).with_steps(len(task.train))

    def _check_vocabulary(self) -> None:
        words, known = self.task.tokenizer.vocab_size, self.opened.config.vocab_size
        if words > known:
            raise EvenstepError(
                f"the tokenizer has {words} entries, the model of {self.source.folder} only {known}; "
                "put the tokenizer that belongs to it beside it"
            )

    def _may_pack(self, config: FineTuneConfig, say: Say) -> bool:
        asked = config.data.pack
        if self.task.labels and asked == "yes":
            raise EvenstepError("data.pack yes: texts that are classified have a row each; leave it out")
        if self.task.labels:
            return False
        if not isinstance(self.opened, HubCausal):
            return asked != "no"
        if asked == "no":
            self.opened.packs = False
            return False
        if keeps_documents_apart(self.opened, config.train.seq_len):
            return True
        name = type(self.opened.net).__name__
        if asked == "yes":
            raise EvenstepError(f"data.pack yes: {name} does not keep examples in one row apart; give --data.pack no")
        say(f"{name} does not keep examples in one row apart: each has a row of its own")
        return False

    def open_data(self, progress: Any) -> Task:
        return self.task

    def describe_data(self) -> str:
        return f"{self.config.data.file}: {self.task.told()[0]}"

    def make_loader(self) -> RowLoader:
        world, config = self.world, self.config
        return RowLoader(self.task.train, config.train.batch_size, config.seed, world.data_rank, world.data_size)

    def check_memory(self, source: Path | None) -> None:
        """The model is in memory already."""

    def make_model(self, source: Path | None, device: torch.device, *, blank: bool) -> Any:
        torch.manual_seed(self.config.seed)
        return setup.with_lowbit(self.opened.to(device), self.config.lowbit, self.say)

    def loss_chunk(self) -> int | None:
        return super().loss_chunk() if isinstance(self.model, Llama) else None

    # ---- a step ----

    def shares(self, targets: Tensor) -> list[float]:
        """By what is learned: an answer's tokens weigh the same wherever they stand."""
        size, loader = self.micro_batch_size, self.loader
        parts = [sum(loader.counted[i : i + size]) for i in range(0, len(loader.counted), size)]
        return [part * self.world.data_size / loader.total for part in parts]

    def step_tokens(self) -> int:
        return self.loader.tokens

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.parallel.loss(inputs[:, 0], targets, positions=inputs[:, 1], chunk=self.chunk)

    # ---- validation ----

    def evaluate(self, stop: Interrupts | None = None) -> TuneResult:
        """The loss over all validation rows, and the score of each file over ``eval.max_rows`` of its examples."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode(), self.autocast:
                total, tokens = self._validation_loss(stop)
                found = {
                    one.name: (kind, *self._score(one.examples, kind, stop))
                    for one in self.task.sets
                    if (kind := self.kinds[one.name]) != "none"
                }
        finally:
            self.model.train(was_training)
        kinds = "+".join(dict.fromkeys(kind for kind, _, _ in found.values()))
        scores = {name: right / count for name, (_, right, count) in found.items()}
        return TuneResult(total / tokens if tokens else math.nan, tokens, kinds, scores)

    @property
    def eval_batch_size(self) -> int:
        return self.config.eval.batch_size or self.micro_batch_size

    def passes(self, items: Sequence[T], stop: Interrupts | None) -> Iterator[Sequence[T]]:
        """This process's share of ``items``, ``eval_batch_size`` at a time. All processes have as many passes, as they
        ask each other in each whether to stop: the last may be empty on some."""
        size, world = self.eval_batch_size, self.world
        starts = range(0, len(items), size * world.data_size)
        for start in stop.watch(starts) if stop else starts:
            self.heart.beat(self.step_number, "validation")
            yield items[start + world.data_rank : start + size * world.data_size : world.data_size]

    def _validation_loss(self, stop: Interrupts | None) -> tuple[float, int]:
        total, tokens = 0.0, 0
        for rows in self.passes(self.task.val, stop):
            for inputs, targets in batches(rows, self.eval_batch_size):
                x, y = inputs.to(self.device), targets.to(self.device)
                total += self.model.loss(x[:, 0], y, positions=x[:, 1], reduction="sum", chunk=self.chunk).item()
                tokens += int((targets != -100).sum())
        both = self.world.sum(torch.tensor([total, tokens], dtype=torch.float64, device=self.device)).tolist()
        return both[0], round(both[1])

    def _score(self, examples: Sequence[Example], kind: str, stop: Interrupts | None) -> tuple[int, int]:
        some = examples[: self.config.eval.max_rows or None]
        right = sum(scoring.correct(self, kind, part) for part in self.passes(some, stop) if part)
        return round(self.world.sum(torch.tensor([float(right)], device=self.device)).item()), len(some)

    # ---- what it leaves behind ----

    def tensors(self) -> dict[str, Tensor]:
        every = model_tensors(self.model)
        if self.config.tune.adapter == "none":
            return every
        trained = {f"model.{name}" for name, p in self.model.named_parameters() if p.requires_grad}
        return {name: tensor for name, tensor in every.items() if name in trained}

    def save_shape(self, directory: Path) -> None:
        if isinstance(self.model, Llama) and self.config.tune.adapter == "none":
            super().save_shape(directory)
            self.note().save(directory)

    def note(self) -> Note:
        task = self.task
        return Note(self.source.library, task.form, task.encoder.template, self.config.lowbit)

    def data_identity(self) -> str:
        return self.task.identity()

    def conclusion(self) -> dict[str, Any]:
        trained = sum(p.numel() for p in self.parameters)  # before adapters are merged
        write_products(self)
        found = {key: (self.metrics.last_validation or {}).get(key) for key in ("score", "score_kind", "scores")}
        return {**found, "adapter": self.config.tune.adapter, "trained_parameters": trained, **summary_of(self.task)}

    @staticmethod
    def closing(out: Path, summary: dict[str, Any], files: list[str]) -> list[str]:
        run, lines = shlex.quote(str(out)), [""]
        if summary["val_loss"] is not None:
            lines.append(f"validation loss {summary['val_loss']:.4f}")
        for name, score in (summary["scores"] or {}).items():
            lines.append(f"{name}: {score:.2%} ({summary['score_kind']})")
        products = ["model/", *(["adapter/"] if summary["adapter"] != "none" else [])]
        return [
            *lines,
            f"{short_count(summary['tokens'])} tokens in {clock(summary['seconds'])}",
            "",
            f"written to {out}: {', '.join([*files, *products])}",
            *([f"ask it:     {program()} generate {run} --prompt TEXT"] if not summary["classes"] else []),
            f"report:     {program()} report {run}",
            f"go on:      {program()} finetune --resume {run} --train.steps {2 * summary['steps']}",
        ]


class _Scored(Tuning):
    """A run that is not trained."""

    def make_loader(self) -> Any:
        return None


def evaluate_only(config: FineTuneConfig, say: Say = tell) -> TuneResult:
    """Score the model as it is on ``eval.data``, or on all of ``data.file``; prints the scores."""
    scored = dataclasses.replace(config.eval, data=config.eval.data or config.data.file)
    config = dataclasses.replace(config, eval=scored, optim=TuneOptimConfig(name="sgd"))  # which keeps nothing
    with tempfile.TemporaryDirectory(prefix="evenstep-score-") as folder, open_world(config) as world:
        run = _Scored(dataclasses.replace(config, out=str(Path(folder, "run"))), world=world, say=say)
        result = run.evaluate()
        run.metrics.close()
        run.say(f"loss {result.loss:.4f} over {result.tokens:,} {'texts' if run.task.labels else 'learned tokens'}")
        for name, score in result.scores.items():
            run.say(f"{name}: {score:.2%} ({run.kinds[name]})")
        if len(result.scores) > 1:
            run.say(f"mean: {sum(result.scores.values()) / len(result.scores):.2%}")
    return result
