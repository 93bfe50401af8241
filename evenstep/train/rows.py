"""The text of data rows of a run: what an event's ``data rows 264-272`` were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from evenstep.data import BatchLoader
from evenstep.errors import EvenstepError
from evenstep.train import setup
from evenstep.train.checkpoint import list_checkpoints, read_trainer
from evenstep.train.config import Config
from evenstep.train.config_io import build, read_toml
from evenstep.train.progress import nothing
from evenstep.train.state import data_identity


def parse_rows(text: str) -> tuple[int, int]:
    """``"264-272"`` -> (264, 272), the first row and one past the last, as events give them; ``"264"`` is one row."""
    first, dash, past = text.partition("-")
    if not (first.isascii() and first.isdigit() and (not dash or (past.isascii() and past.isdigit()))):
        raise EvenstepError(f"rows '{text}': give A-B, the first row and one past the last, such as 264-272")
    start, stop = int(first), int(past) if dash else int(first) + 1
    if not start < stop < 2**62:
        raise EvenstepError(f"rows '{text}' are none: B of A-B is one past the last row, and must be above A")
    return start, stop


def rows_of(directory: Path, start: int, stop: int) -> Iterator[tuple[str, str]]:
    """A head and the text of each of the rows ``start`` to ``stop - 1`` of the run in ``directory``, which may be one
    of pretraining or of fine-tuning.

    Rows are counted as a run reads them, from 0 and over all epochs. EvenstepError, at once, where there is no run, or
    its data are not what they were.
    """
    if not (directory / "config.toml").is_file():
        raise EvenstepError(f"{directory} is not a run: it has no config.toml; evenstep runs lists runs")
    tables = read_toml(directory / "config.toml")
    model = tables.get("model")
    if isinstance(model, dict) and "path" in model:
        return _tuning_rows(tables, start, stop)
    return _training_rows(directory, build(tables), start, stop)


def _training_rows(directory: Path, config: Config, start: int, stop: int) -> Iterator[tuple[str, str]]:
    data = setup.load_data(config)
    newest = next(iter(list_checkpoints(directory / "checkpoints")), None)
    if newest is not None and read_trainer(newest)["data"] != data_identity(data):
        raise EvenstepError(
            f"{directory} was trained on other tokens than {config.data.source} gives now (the text has changed); "
            "bring back the text"
        )
    length = config.train.seq_len
    loader = BatchLoader(data.train, length, config.train.batch_size, config.seed)
    tokenizer = data.tokenizer

    def rows() -> Iterator[tuple[str, str]]:
        for row in range(start, stop):
            [window] = loader.sequence_ids(row, row + 1).tolist()
            tokens = data.train.read(window * length, (window + 1) * length + 1)
            yield (
                _head(row, loader, f"tokens {window * length:,}-{(window + 1) * length + 1:,}"),
                tokenizer.decode(tokens.tolist()),
            )

    return rows()


def _tuning_rows(tables: dict[str, Any], start: int, stop: int) -> Iterator[tuple[str, str]]:
    from evenstep.finetune.config import FineTuneConfig
    from evenstep.finetune.rows import RowLoader
    from evenstep.finetune.run import Tuning
    from evenstep.train.world import World

    config, world = build(tables, FineTuneConfig), World(torch.device("cpu"))
    run = Tuning.__new__(Tuning)
    run.settled(config, run.find_source(config, world, nothing), nothing)  # the model decides how rows are packed
    task = run.task
    loader = RowLoader(task.train, config.train.batch_size, config.seed)

    def rows() -> Iterator[tuple[str, str]]:
        for row in range(start, stop):
            [place] = loader.sequence_ids(row, row + 1).tolist()
            texts = []
            for document in task.train[place]:
                label = "" if document.targets.ndim else f"\nlabel: {task.labels[int(document.targets)]}"
                last = [int(document.targets[-1])] if document.targets.ndim and document.targets[-1] >= 0 else []
                texts.append(task.tokenizer.decode([*document.inputs.tolist(), *last]) + label)
            count = len(texts)
            yield _head(row, loader, f"{count} example{'s' if count > 1 else ''}"), "\n--\n".join(texts)

    return rows()


def _head(row: int, loader: BatchLoader, what: str) -> str:
    return f"row {row}: epoch {row // loader.sequences_per_epoch + 1}, {what}"
