"""A fine-tuning run, which is the trainer with the task `FineTuning`, and ``evenstep finetune --evaluate``."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evenstep.finetune.config import FineTuneConfig, TuneOptimConfig
from evenstep.finetune.scoring import TuneResult
from evenstep.finetune.task import FineTuning
from evenstep.train.distributed import open_world
from evenstep.train.log import print_line
from evenstep.train.trainer import Trainer


class Tuning(Trainer):
    """The run of a `FineTuneConfig`. ``data`` is a `evenstep.finetune.data.TuningData`."""

    TASK = FineTuning
    task: FineTuning


class _Scoring(FineTuning):
    """Only scores the model. There is no loader of batches, so there may be fewer rows than a batch has."""

    def make_loader(self) -> Any:
        return None


class _Scored(Tuning):
    TASK = _Scoring


def evaluate_only(config: FineTuneConfig, say: Callable[[str], None] = print_line) -> TuneResult:
    """Score the model without training, on ``eval.data`` or on all of ``data.file``, and print the scores."""
    scored = dataclasses.replace(config.eval, data=config.eval.data or config.data.file)
    config = dataclasses.replace(config, eval=scored, optim=TuneOptimConfig(name="sgd"))  # the optimizer without state
    with tempfile.TemporaryDirectory(prefix="evenstep-score-") as folder, open_world(config) as world:
        run = _Scored(dataclasses.replace(config, out=str(Path(folder, "run"))), world=world, say=say)
        result: TuneResult = run.evaluate()
        run.metrics.close()
        what = "texts" if run.data.labels else "learned tokens"
        run.say(f"loss {result.loss:.4f} over {result.tokens:,} {what}")
        for name, score in result.scores.items():
            run.say(f"{name}: {score:.2%} ({run.task.score_kinds[name]})")
        if len(result.scores) > 1:
            run.say(f"mean: {sum(result.scores.values()) / len(result.scores):.2%}")
    return result
