"""Fine-tuning as a task of the trainer: rows of examples, a given model, validation by loss and scores."""

from __future__ import annotations

import dataclasses
import math
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from evenstep.console import program
from evenstep.errors import EvenstepError
from evenstep.finetune.config import FineTuneConfig
from evenstep.finetune.data import RowLoader, TuningData, batches, open_examples, summary_of
from evenstep.finetune.examples import Bad, Example
from evenstep.finetune.models import (
    HubCausal,
    HubClassifier,
    Note,
    Source,
    classes_of,
    find_source,
    fit_length,
    hushed,
    keeps_documents_apart,
    open_model,
)
from evenstep.finetune.scoring import Scorer, TuneResult, kind_of
from evenstep.finetune.text import load_text
from evenstep.kernels import uploaded
from evenstep.models import Llama
from evenstep.train.evaluate import Evaluation
from evenstep.train.log import Metrics, clock, short_count
from evenstep.train.saving import model_tensors
from evenstep.train.summary import report_line, spike_lines
from evenstep.train.task import Task, loss_chunk
from evenstep.train.weights import PRODUCT, with_lowbit, write_hf

T = TypeVar("T")


class FineTuning(Task):
    """The task of a `FineTuneConfig`. The model is loaded from ``model.path`` on a resume too, because a checkpoint of
    adapters contains only the adapters."""

    config_type = FineTuneConfig
    config: FineTuneConfig
    data: TuningData
    loader: RowLoader
    source: Source
    score_kinds: dict[str, str]
    """How each validation file is scored, by its name."""

    # ---- before the first step ----

    def resolve(self, config: Any, checkpoint: Path | None = None) -> FineTuneConfig:
        """The configuration, completed by the library and the kind of the model and by the number of steps. Reads the
        examples, and loads the model, which decides whether examples are packed."""
        path, library = Path(config.model.path), config.model.library
        self.source = self.world.on_rank_0(lambda: find_source(path, library, self.say))
        folder = self.source.folder
        config = fit_length(config, folder, self.say)
        bad: Bad = {}
        train, val = open_examples(config, bad)
        text = load_text(folder, self.source.library)
        self.data = data = TuningData(config, text, train, val, classes_of(folder), bad)
        self.score_kinds = {one.name: kind_of(config.eval.score, one.examples) for one in data.sets}
        # Moved to the device now: whether the model can pack is tested with the kernels that will train it.
        self.opened = open_model(config, self.source, data.labels, self.say).to(self.world.device)
        self._check_vocabulary()
        if isinstance(self.opened, HubClassifier):
            self.opened.pad_with(data.tokenizer.eos_id)
        if self._may_pack(config):
            data.pack()
        for line in data.describe():
            self.say(line)
        kind = "classifier" if data.labels else "causal"
        model = dataclasses.replace(config.model, library=self.source.library, kind=kind)
        self.config = dataclasses.replace(config, model=model).with_steps(len(data.train))
        return self.config

    def _check_vocabulary(self) -> None:
        words, known = self.data.tokenizer.vocab_size, self.opened.config.vocab_size
        if words > known:
            raise EvenstepError(
                f"the tokenizer has {words} entries, but the model of {self.source.folder} only {known}; put the "
                "tokenizer of the model into its directory"
            )

    def _may_pack(self, config: FineTuneConfig) -> bool:
        asked = config.data.pack
        if self.data.labels and asked == "yes":
            raise EvenstepError(
                "data.pack yes cannot be used for classification, which has one text per row; leave it out"
            )
        if self.data.labels:
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
            raise EvenstepError(f"data.pack yes: {name} cannot separate examples in one row; give --data.pack no")
        self.say(f"{name} cannot separate examples in one row: each has a row of its own")
        return False

    def open_data(self, progress: Any) -> TuningData:
        return self.data

    def make_loader(self) -> RowLoader:
        world, config = self.world, self.config
        self.loader = RowLoader(self.data.train, config.train.batch_size, config.seed, world.data_rank, world.data_size)
        return self.loader

    def check_memory(self) -> None:
        """Checks nothing: the model is in memory already."""

    def build_model(self, device: torch.device, *, blank: bool) -> Any:
        torch.manual_seed(self.config.seed)
        return with_lowbit(self.opened.to(device), self.config.lowbit, self.say)

    def loss_chunk(self, model: Any) -> int | None:
        if not isinstance(model, Llama):
            return None
        return loss_chunk(self.config, model.config.vocab_size, self.world.device)

    def describe_data(self) -> str:
        return f"{self.config.data.file}: {self.data.describe()[0]}"

    # ---- a step ----

    def loss_weights(self, targets: Tensor, micro_batch_size: int) -> list[float]:
        """Proportional to the number of learned targets, so that every learned token has the same weight, independent
        of its row and its process."""
        # loss of the step = sum over micro batches of count / total * mean. DDP divides by data_size, which is undone.
        counted = self.loader.counted
        sums = [sum(counted[i : i + micro_batch_size]) for i in range(0, len(counted), micro_batch_size)]
        return [count * self.world.data_size / self.loader.total for count in sums]

    def loss(self, model_loss: Callable[..., Tensor], inputs: Tensor, targets: Tensor, chunk: int | None) -> Tensor:
        return model_loss(inputs[:, 0], targets, positions=inputs[:, 1], chunk=chunk)

    def step_tokens(self) -> int:
        return self.loader.tokens

    # ---- validation ----

    def evaluate(self, evaluation: Evaluation) -> TuneResult:
        """The loss over all validation rows, and the score of each file over its first ``eval.max_rows`` examples."""
        model = evaluation.model
        was_training = model.training
        model.eval()
        try:
            with torch.inference_mode(), evaluation.autocast:
                total, tokens = self._validation_loss(evaluation)
                scored = {
                    one.name: (kind, *self._score(one.examples, kind, evaluation))
                    for one in self.data.sets
                    if (kind := self.score_kinds[one.name]) != "none"
                }
        finally:
            model.train(was_training)
        kinds = "+".join(dict.fromkeys(kind for kind, _, _ in scored.values()))
        scores = {name: right / count for name, (_, right, count) in scored.items()}
        return TuneResult(total / tokens if tokens else math.nan, tokens, kinds, scores)

    def _passes(self, items: Sequence[T], evaluation: Evaluation) -> Iterator[Sequence[T]]:
        """The share of this process in ``items``, one batch at a time. All processes have the same number of passes,
        because they agree in each pass whether to stop; the last pass may be empty in some of them."""
        size, world = evaluation.batch_size, self.world
        for start in evaluation.watch(range(0, len(items), size * world.data_size)):
            yield items[start + world.data_rank : start + size * world.data_size : world.data_size]

    def _validation_loss(self, evaluation: Evaluation) -> tuple[float, int]:
        total, tokens, device = 0.0, 0, evaluation.device
        for rows in self._passes(self.data.val, evaluation):
            for inputs, targets in batches(rows, evaluation.batch_size):
                x, y = uploaded(inputs, device), uploaded(targets, device)
                loss = evaluation.model.loss(x[:, 0], y, positions=x[:, 1], reduction="sum", chunk=evaluation.chunk)
                total += loss.item()
                tokens += int((targets != -100).sum())
        sums = self.world.sum(torch.tensor([total, tokens], dtype=torch.float64, device=device)).tolist()
        return sums[0], round(sums[1])

    def _score(self, examples: Sequence[Example], kind: str, evaluation: Evaluation) -> tuple[int, int]:
        """The number of correct examples, and the number of examples."""
        scorer = Scorer(evaluation.model, self.data, evaluation.device, evaluation.batch_size)
        chosen = examples[: self.config.eval.max_rows or None]
        right = sum(scorer.correct(kind, batch) for batch in self._passes(chosen, evaluation) if batch)
        return round(self.world.sum(torch.tensor([float(right)], device=evaluation.device)).item()), len(chosen)

    # ---- checkpoints, the end ----

    def tensors(self, model: Any) -> dict[str, Tensor]:
        every = model_tensors(model)
        if self.config.tune.adapter == "none":
            return every
        trained = {f"model.{name}" for name, p in model.named_parameters() if p.requires_grad}
        return {name: tensor for name, tensor in every.items() if name in trained}

    def save_shape(self, model: Any, directory: Path) -> None:
        if isinstance(model, Llama) and self.config.tune.adapter == "none":
            super().save_shape(model, directory)
            self.note().save(directory)

    def note(self) -> Note:
        return Note(self.source.library, self.data.form, self.data.encoder.template, self.config.lowbit)

    def data_identity(self) -> str:
        return self.data.identity()

    def conclusion(self, model: Any, out: Path, metrics: Metrics) -> dict[str, Any]:
        """Write ``model/`` in Hugging Face layout with merged adapters, and the adapters as ``adapter/`` in the format
        of peft. Merging changes the model, which is no longer trained. EvenstepError on a full disk."""
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)  # before the merge
        adapted = getattr(model, "adapted", None)
        if adapted is not None:
            _replace_folder(out / "adapter", lambda folder: adapted.save_pretrained(folder))
            adapted.merge_and_unload()
        _replace_folder(out / PRODUCT, lambda folder: self._write_model(model, folder))
        validation = metrics.last_validation or {}
        return {
            **{key: validation.get(key) for key in ("score", "score_kind", "scores")},
            "adapter": self.config.tune.adapter,
            "trained_parameters": trained,
            **summary_of(self.data),
        }

    def _write_model(self, model: Any, folder: Path) -> None:
        if isinstance(model, Llama):
            write_hf(model, self.data.tokenizer, folder)
        else:
            with hushed():
                model.net.save_pretrained(folder)
            self.data.tokenizer.save(folder)
        self.note().save(folder)

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
            *([f"generate:   {program()} generate {run} --prompt TEXT"] if not summary["classes"] else []),
            *spike_lines(out, summary),
            report_line(out, files),
            f"continue:   {program()} finetune --resume {run} --train.steps {2 * summary['steps']}",
        ]


def _replace_folder(place: Path, write: Callable[[Path], None]) -> None:
    """Replace a directory atomically: a reader finds either the old or the new content."""
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(partial)
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)
    except OSError as problem:
        shutil.rmtree(partial, ignore_errors=True)
        raise EvenstepError(f"could not write {place}: {problem.strerror or problem}; make room there") from problem
