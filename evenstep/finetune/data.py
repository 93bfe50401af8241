"""From examples to batches: the selection of examples, their tokens, the packing into rows, and the loader of rows.

A document of n tokens has n - 1 inputs. The target of an input is the next token if that token is learned, else -100.
Several documents may share a row. Their ``positions`` count from 0 in each document, which separates them (see
`evenstep.models.ops.document_mask`), and are -1 for padding. A batch is padded to its longest row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evenstep.data import BatchLoader
from evenstep.errors import EvenstepError, nearest
from evenstep.finetune.config import FineTuneConfig
from evenstep.finetune.examples import SKIP, Bad, Example, read_examples
from evenstep.finetune.models import form_of
from evenstep.finetune.text import Encoder, Text, read_template

# ---- rows ----

IGNORED = -100  # the default `ignore_index` of torch's cross-entropy


@dataclass(frozen=True)
class Document:
    """The tokens of one example: ``inputs`` int32 [n] and ``targets`` int32 [n]. In classification ``targets`` is 0-d,
    the number of the class."""

    inputs: np.ndarray
    targets: np.ndarray

    @staticmethod
    def of(ids: np.ndarray, learned: np.ndarray) -> Document:
        # Shifted by one: the target of input i is token i + 1. `learned` belongs to the token that is predicted.
        return Document(ids[:-1], np.where(learned[1:], ids[1:], IGNORED).astype(np.int32))

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def counted(self) -> int:
        """The number of learned targets."""
        return int((self.targets != IGNORED).sum()) if self.targets.ndim else 1


Row = tuple[Document, ...]


def pack(documents: Sequence[Document], length: int) -> list[Row]:
    """Pack documents of at most ``length`` tokens into rows of at most ``length`` tokens, by best-fit decreasing: the
    longest documents first, each into the fullest row with enough room. Deterministic."""
    # open_rows[r] has the rows with room for r more tokens, so a search takes at most `length` steps, not all rows.
    open_rows: list[list[list[Document]]] = [[] for _ in range(length + 1)]
    rows: list[list[Document]] = []
    for document in sorted(documents, key=len, reverse=True):
        size = len(document)
        room = next((room for room in range(size, length) if open_rows[room]), None)
        if room is None:  # no open row has room: a new one
            row: list[Document] = []
            rows.append(row)
            room = length
        else:
            row = open_rows[room].pop()
        row.append(document)
        open_rows[room - size].append(row)  # under the room that is left; 0 is never searched
    return [tuple(row) for row in rows]


def collate(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """The batch of ``rows``: inputs int64 [B, 2, T], where [:, 0] are tokens and [:, 1] positions, and targets int64
    [B, T], or [B] in classification. CPU tensors."""
    width = max(sum(map(len, row)) for row in rows)  # T, the longest row of this batch
    inputs = np.zeros((len(rows), 2, width), np.int64)
    inputs[:, 1] = -1  # padding
    classes = not rows[0][0].targets.ndim
    targets = np.full((len(rows),) if classes else (len(rows), width), IGNORED, np.int64)
    for i, row in enumerate(rows):
        end = 0
        for document in row:
            start, end = end, end + len(document)
            inputs[i, 0, start:end] = document.inputs
            inputs[i, 1, start:end] = np.arange(len(document))  # restarts: this separates the documents of a row
            if classes:
                targets[i] = document.targets
            else:
                targets[i, start:end] = document.targets
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def batches(rows: Sequence[Row], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of all rows in order. The last batch may be smaller."""
    for first in range(0, len(rows), size):
        yield collate(rows[first : first + size])


class RowLoader(BatchLoader):
    """Endless batches of rows, reshuffled in each epoch as in `BatchLoader`, with the same O(1) seek."""

    def __init__(self, rows: Sequence[Row], batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if len(rows) < batch_size:
            raise EvenstepError(
                f"{len(rows)} rows are fewer than one batch of {batch_size}; give more examples, a smaller "
                "train.batch_size, or --data.pack no (one row per example)"
            )
        if batch_size % world_size:
            raise EvenstepError(f"train.batch_size {batch_size} is not divisible by {world_size} processes")
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.rank, self.world_size, self.sequences_per_epoch = rank, world_size, len(rows)
        self.position = 0
        # Counts of all rows, int64 [number of rows], so that a batch is counted without reading its tokens.
        self._counted = np.array([sum(document.counted for document in row) for row in rows])
        self._lengths = np.array([sum(map(len, row)) for row in rows])
        self.counted: list[int] = []
        """The number of learned targets in each row of this process, in the last batch."""
        self.total = self.tokens = 0
        """The numbers of learned targets and of tokens of the last batch, over all processes."""

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """The next batch of this process, see `collate`."""
        # Every process computes the ids of the whole batch, so that it knows the number of learned targets of the
        # others without a message.
        ids = self.sequence_ids(self.position, self.position + self.batch_size)
        share = self.batch_size // self.world_size
        mine = ids[self.rank * share : (self.rank + 1) * share]
        self.position += self.batch_size
        self.counted, self.total = self._counted[mine].tolist(), int(self._counted[ids].sum())
        self.tokens = int(self._lengths[ids].sum())
        return collate([self.rows[i] for i in mine])


# ---- the examples of a run ----

HELD_OUT = "held out"


@dataclass(frozen=True)
class ValSet:
    """Examples under one name, all of which are scored, and their rows, one document each and cut where it is too
    long, for the loss."""

    name: str
    examples: list[Example]
    rows: list[Row]


class TuningData:
    """The data of a fine-tuning run, the counterpart of `evenstep.data.TokenData`.

    ``labels`` are the classes, empty for a model that generates text: the ``classes`` of the model if they include all
    classes of the data, else those of the data. ``bad`` lists the examples that were left out during reading.
    """

    def __init__(
        self, config: FineTuneConfig, text: Text, train: list[Example], val: dict[str, list[Example]],
        classes: Sequence[str] = (), bad: Bad | None = None,
    ) -> None:  # fmt: skip
        self.config, self.tokenizer = config, text
        self.encoder = Encoder(text, read_template(config.data.template))
        self.form = form_of(train[0])
        self.labels = labels_of([*train, *val.get(HELD_OUT, ())], classes)
        if len(self.labels) == 1:
            raise EvenstepError(
                f"{config.data.file}: every label is {self.labels[0]!r}; give examples of at least two classes"
            )
        # Invalid examples (`bad`) and valid ones that do not fit (`dropped`) are reported apart: one is a mistake in
        # the file, the other a choice of train.seq_len.
        self.bad: Bad = bad if bad is not None else {}
        self.dropped: dict[str, int] = {}
        _, self.train_documents = self._documents(train, config.data.file, config.data.too_long == "cut")
        if not self.train_documents:
            raise EvenstepError(self._none_left(len(train)))
        self.sets = []
        for name, examples in val.items():
            # Validation cuts long examples whatever data.too_long says: a score leaves no example out.
            good, documents = self._documents(examples, name, True)
            if not good:
                raise EvenstepError(f"{name}: none of its {len(examples)} examples can be used: {self.bad[name][0]}")
            self.sets.append(ValSet(name, good, [(document,) for document in documents]))
        self.train: list[Row] = [(document,) for document in self.train_documents]

    @property
    def val(self) -> list[Row]:
        return [row for one in self.sets for row in one.rows]

    def pack(self) -> None:
        """Pack the documents of training into as few rows as possible."""
        self.train = pack(self.train_documents, self.config.train.seq_len)

    def _documents(self, examples: list[Example], name: str, cut: bool) -> tuple[list[Example], list[Document]]:
        """The examples that can be encoded, and their documents: with ``cut`` of all of them, shortened to fit, else of
        those that fit. Examples that are left out are counted under ``name``."""
        make = self.classified if self.labels else self._written
        good, found = [], []
        for example in examples:
            try:
                document = make(example, cut)
            except EvenstepError as problem:
                if self.config.data.on_bad == "stop":
                    raise EvenstepError(f"{problem}{SKIP}") from None
                self.bad.setdefault(name, []).append(str(problem))
                continue
            good.append(example)
            if document is not None:
                found.append(document)
        if len(found) < len(good):
            self.dropped[name] = len(good) - len(found)
        return good, found

    def _none_left(self, count: int) -> str:
        file, length = self.config.data.file, self.config.train.seq_len
        bad = self.bad.get(file)
        if bad and file not in self.dropped:
            return f"none of the examples of {file} can be used: {bad[0]}"
        if self.config.data.too_long == "cut":
            return (
                f"none of the {count} examples of {file} has a part of its answer in its first {length} tokens; give a "
                "larger train.seq_len"
            )
        return (
            f"none of the {count} examples of {file} fits into train.seq_len {length} tokens; give a larger "
            "train.seq_len, or --data.too_long cut"
        )

    def _written(self, example: Example, cut: bool) -> Document | None:
        document, length = Document.of(*self.encoder.encode(example)), self.config.train.seq_len
        if len(document) > length:
            if not cut:
                return None
            document = Document(document.inputs[:length], document.targets[:length])
        # A cut may remove the whole answer. Such a document would add nothing to the loss.
        return document if document.counted else None

    def classified(self, example: Example, cut: bool) -> Document | None:
        """The document of a text and its class; None if the text is too long and may not be cut."""
        if example.label not in self.labels:
            hint = nearest(str(example.label), self.labels)
            raise EvenstepError(f"{example.where}: label {example.label!r} is not in {self.config.data.file}{hint}")
        length = self.config.train.seq_len
        # One token more than fits tells whether the text is too long, without encoding all of it.
        ids = self.tokenizer.whole(example.prompt, length + 1)
        if len(ids) > length:
            if not cut:
                return None
            ids = self.tokenizer.whole(example.prompt, length)
        return Document(np.array(ids, np.int32), np.array(self.labels.index(str(example.label)), np.int32))

    def identity(self) -> str:
        """A hash of all documents, which changes with the examples, the template and the packing."""
        digest = hashlib.sha256(repr(self.labels).encode())
        for row in self.train:
            for document in row:
                digest.update(document.inputs.tobytes() + document.targets.tobytes())
            digest.update(b"row")  # the same documents in other rows are other data: batches would differ
        return digest.hexdigest()

    def describe(self) -> list[str]:
        """Lines for the user: the number of examples, and the number left out with the reasons."""
        rows, documents = len(self.train), len(self.train_documents)
        packed = f" in {rows:,} rows" if rows != documents else ""
        lines = [f"{documents:,} examples{packed}, {sum(len(one.rows) for one in self.sets):,} for validation"]
        cut, length = self.config.data.too_long == "cut", self.config.train.seq_len
        for name, count in self.dropped.items():
            if not cut and name == self.config.data.file:
                why = f"with more than {length} tokens (train.seq_len; --data.too_long cut keeps their beginning)"
            else:
                why = f"without a part of the answer in their first {length} tokens (a larger train.seq_len keeps them)"
            lines.append(f"left out{self._of_loss(name)}: {count:,} examples of {name} {why}")
        for name, found in self.bad.items():
            if found:
                lines.append(
                    f"left out: {len(found):,} invalid examples of {name} (data.on_bad skip), the first: {found[0]}"
                )
        return lines

    def _of_loss(self, name: str) -> str:
        return "" if name == self.config.data.file else " of the validation loss"


def labels_of(examples: Sequence[Example], classes: Sequence[str]) -> list[str]:
    """The classes in the order of the model's outputs: numbers by value, then other names alphabetically."""
    found = {example.label for example in examples if example.label is not None}
    # A classifier that knows all classes keeps its order, which its output layer was trained with.
    if found and found <= {*classes}:
        return list(classes)
    return sorted(found, key=lambda label: (0, int(label), "") if label.isdecimal() else (1, 0, label))


def open_examples(config: FineTuneConfig, bad: Bad | None = None) -> tuple[list[Example], dict[str, list[Example]]]:
    """The examples for training, and those for validation by the name of their file (or `HELD_OUT`). Examples that
    ``data.on_bad skip`` leaves out are listed in ``bad``."""
    data = config.data
    found: Bad = {} if bad is None else bad

    def skipped(name: str) -> list[str] | None:
        return found.setdefault(name, []) if data.on_bad == "skip" else None

    train = read_examples(Path(data.file), data.format, data.max_rows, skipped(data.file))
    if config.eval.data:
        names = [name.strip() for name in config.eval.data.split(",") if name.strip()]
        val = {name: read_examples(Path(name), bad=skipped(name)) for name in names}
    else:
        # Independent of the seed of the run, so that runs with several seeds are scored on the same examples.
        order = np.random.default_rng(0).permutation(len(train))
        held = set(order[: int(data.val_fraction * len(train))].tolist())
        val = {HELD_OUT: [train[i] for i in sorted(held)]} if held else {}
        train = [example for i, example in enumerate(train) if i not in held]
    kinds = {example.label is None for examples in (train, *val.values()) for example in examples}
    if len(kinds) > 1:
        raise EvenstepError(
            "data.file and eval.data: some examples have a label and others an answer; give examples of one kind"
        )
    wanted = config.model.kind
    if wanted != "auto" and (wanted == "classifier") != (train[0].label is not None):
        needs = "text and label" if wanted == "classifier" else "an answer"
        raise EvenstepError(
            f"model.kind {wanted} needs examples with {needs}, which {data.file} does not have; leave it at auto"
        )
    return train, val


def summary_of(data: TuningData) -> dict[str, Any]:
    """The entries of summary.json about the examples."""
    file = data.config.data.file
    return {
        "examples": len(data.train_documents),
        "rows": len(data.train),
        "left_out": data.dropped.get(file, 0) + len(data.bad.get(file, ())),
        "classes": data.labels or None,
    }
