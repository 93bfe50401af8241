"""From a configuration to rows: what is trained on, what is validated on, and what was left out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evenstep.errors import EvenstepError, nearest
from evenstep.finetune.config import FineTuneConfig
from evenstep.finetune.examples import SKIP, Bad, Example, read_examples
from evenstep.finetune.note import form_of
from evenstep.finetune.rows import Document, Row, pack
from evenstep.finetune.text import Encoder, Text, read_template

Say = Callable[[str], None]
HELD_OUT = "held out"


@dataclass(frozen=True)
class ValSet:
    """Examples under one name, all of which are scored, and their rows, one document each and cut where it is too
    long, for the loss."""

    name: str
    examples: list[Example]
    rows: list[Row]


class Task:
    """What `evenstep.data.TokenData` is to pretraining. ``labels`` are the classes, none for a model that writes: the
    model's own ``classes`` where it knows all of the data's, else the data's. ``bad``: what reading left out."""

    def __init__(
        self, config: FineTuneConfig, text: Text, train: list[Example], val: dict[str, list[Example]],
        classes: Sequence[str] = (), bad: Bad | None = None,
    ) -> None:  # fmt: skip
        self.config, self.tokenizer = config, text
        self.encoder = Encoder(text, read_template(config.data.template))
        self.form = form_of(train[0])
        self.labels = labels_of([*train, *val.get(HELD_OUT, ())], classes)
        if len(self.labels) == 1:
            raise EvenstepError(f"{config.data.file}: every label is {self.labels[0]!r}; give examples of two or more")
        self.bad: Bad = bad if bad is not None else {}
        self.dropped: dict[str, int] = {}
        _, self.train_documents = self._documents(train, config.data.file, config.data.too_long == "cut")
        if not self.train_documents:
            raise EvenstepError(self._none_left(len(train)))
        self.sets = []
        for name, examples in val.items():
            good, documents = self._documents(examples, name, True)
            if not good:
                raise EvenstepError(f"{name}: none of its {len(examples)} examples can be used: {self.bad[name][0]}")
            self.sets.append(ValSet(name, good, [(document,) for document in documents]))
        self.train: list[Row] = [(document,) for document in self.train_documents]

    @property
    def val(self) -> list[Row]:
        return [row for one in self.sets for row in one.rows]

    def pack(self) -> None:
        """Put the documents of training into as few rows as hold them."""
        self.train = pack(self.train_documents, self.config.train.seq_len)

    def _documents(self, examples: list[Example], name: str, cut: bool) -> tuple[list[Example], list[Document]]:
        """The examples that can be encoded, and the documents of those that fit, or of all, cut. What is left out is
        counted under ``name``."""
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
                f"none of the {count} examples of {file} has a part of its answer in its first {length} tokens "
                "(train.seq_len); give a longer one"
            )
        return (
            f"none of the {count} examples of {file} fits into train.seq_len {length} tokens; give a longer one, or "
            "--data.too_long cut"
        )

    def _written(self, example: Example, cut: bool) -> Document | None:
        document, length = Document.of(*self.encoder.encode(example)), self.config.train.seq_len
        if len(document) > length:
            if not cut:
                return None
            document = Document(document.inputs[:length], document.targets[:length])
        return document if document.counted else None

    def classified(self, example: Example, cut: bool) -> Document | None:
        """The row of a text and its class; None of one that is too long and may not be cut."""
        if example.label not in self.labels:
            hint = nearest(str(example.label), self.labels)
            raise EvenstepError(f"{example.where}: label {example.label!r} is not in {self.config.data.file}{hint}")
        length = self.config.train.seq_len
        ids = self.tokenizer.whole(example.prompt, length + 1)
        if len(ids) > length:
            if not cut:
                return None
            ids = self.tokenizer.whole(example.prompt, length)
        return Document(np.array(ids, np.int32), np.array(self.labels.index(str(example.label)), np.int32))

    def identity(self) -> str:
        """A hash of every document: another for other examples, another template or another way to pack."""
        digest = hashlib.sha256(repr(self.labels).encode())
        for row in self.train:
            for document in row:
                digest.update(document.inputs.tobytes() + document.targets.tobytes())
            digest.update(b"row")
        return digest.hexdigest()

    def told(self) -> list[str]:
        """What is to be known of it before training starts."""
        rows, documents = len(self.train), len(self.train_documents)
        packed = f" in {rows:,} rows" if rows != documents else ""
        lines = [f"{documents:,} examples{packed}, {sum(len(one.rows) for one in self.sets):,} for validation"]
        cut, length = self.config.data.too_long == "cut", self.config.train.seq_len
        for name, count in self.dropped.items():
            if not cut and name == self.config.data.file:
                why = f"with more than {length} tokens (train.seq_len; --data.too_long cut keeps their beginning)"
            else:
                why = f"whose first {length} tokens hold nothing of the answer (a longer train.seq_len keeps them)"
            lines.append(f"left out{self._of_loss(name)}: {count:,} examples of {name} {why}")
        for name, found in self.bad.items():
            if found:
                lines.append(
                    f"left out: {len(found):,} bad examples of {name} (data.on_bad skip), the first: {found[0]}"
                )
        return lines

    def _of_loss(self, name: str) -> str:
        return "" if name == self.config.data.file else " of the validation loss"


def labels_of(examples: Sequence[Example], classes: Sequence[str]) -> list[str]:
    """The classes in the order of the model's outputs: numbers by size, other names by the alphabet."""
    found = {example.label for example in examples if example.label is not None}
    if found and found <= {*classes}:
        return list(classes)
    return sorted(found, key=lambda label: (0, int(label), "") if label.isdecimal() else (1, 0, label))


def open_examples(config: FineTuneConfig, bad: Bad | None = None) -> tuple[list[Example], dict[str, list[Example]]]:
    """The examples to train on, and those to validate on by the name of their file (or `HELD_OUT`). What data.on_bad
    skips is put into ``bad``."""
    data = config.data
    found: Bad = {} if bad is None else bad

    def skipped(name: str) -> list[str] | None:
        return found.setdefault(name, []) if data.on_bad == "skip" else None

    train = read_examples(Path(data.file), data.format, data.max_rows, skipped(data.file))
    if config.eval.data:
        names = [name.strip() for name in config.eval.data.split(",") if name.strip()]
        val = {name: read_examples(Path(name), bad=skipped(name)) for name in names}
    else:
        order = np.random.default_rng(0).permutation(len(train))  # the same for every seed of the training
        held = set(order[: int(data.val_fraction * len(train))].tolist())
        val = {HELD_OUT: [train[i] for i in sorted(held)]} if held else {}
        train = [example for i, example in enumerate(train) if i not in held]
    kinds = {example.label is None for examples in (train, *val.values()) for example in examples}
    if len(kinds) > 1:
        raise EvenstepError("data.file and eval.data: some examples have a label and some an answer; give one kind")
    wanted = config.model.kind
    if wanted != "auto" and (wanted == "classifier") != (train[0].label is not None):
        needs = "text and label" if wanted == "classifier" else "an answer"
        raise EvenstepError(f"model.kind {wanted} needs examples with {needs}; {data.file} has others")
    return train, val


def summary_of(task: Task) -> dict[str, Any]:
    return {
        "examples": len(task.train_documents),
        "rows": len(task.train),
        "left_out": task.dropped.get(task.config.data.file, 0) + len(task.bad.get(task.config.data.file, ())),
        "classes": task.labels or None,
    }
