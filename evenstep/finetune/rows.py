"""Documents in rows, and rows in batches.

A document of n tokens gives n - 1 inputs, each with the token that follows it as its target where that is learned,
-100 elsewhere. Several may share a row; `positions` count from 0 in each, which keeps them apart (see
`evenstep.models.ops.document_mask`), and -1 is padding. A batch is padded to its longest row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evenstep.data import BatchLoader
from evenstep.errors import EvenstepError

IGNORED = -100


@dataclass(frozen=True)
class Document:
    """``inputs`` int32 [n], ``targets`` int32 [n], or [] with the class of a text."""

    inputs: np.ndarray
    targets: np.ndarray

    @staticmethod
    def of(ids: np.ndarray, learned: np.ndarray) -> Document:
        return Document(ids[:-1], np.where(learned[1:], ids[1:], IGNORED).astype(np.int32))

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def counted(self) -> int:
        """Targets that count."""
        return int((self.targets != IGNORED).sum()) if self.targets.ndim else 1


Row = tuple[Document, ...]


def pack(documents: Sequence[Document], length: int) -> list[Row]:
    """The documents, each no longer than ``length``, in rows of at most that many tokens: the longest first, each into
    the fullest row that has room. The same documents give the same rows."""
    open_rows: list[list[list[Document]]] = [[] for _ in range(length + 1)]  # by the room that is left
    rows: list[list[Document]] = []
    for document in sorted(documents, key=len, reverse=True):
        size = len(document)
        room = next((room for room in range(size, length) if open_rows[room]), None)
        if room is None:
            row: list[Document] = []
            rows.append(row)
            room = length
        else:
            row = open_rows[room].pop()
        row.append(document)
        open_rows[room - size].append(row)
    return [tuple(row) for row in rows]


def collate(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """(inputs, targets): int64 CPU tensors [B, 2, T] (tokens, positions) and [B, T], or [B] of classes."""
    width = max(sum(map(len, row)) for row in rows)
    inputs = np.zeros((len(rows), 2, width), np.int64)
    inputs[:, 1] = -1
    classes = not rows[0][0].targets.ndim
    targets = np.full((len(rows),) if classes else (len(rows), width), IGNORED, np.int64)
    for i, row in enumerate(rows):
        end = 0
        for document in row:
            start, end = end, end + len(document)
            inputs[i, 0, start:end] = document.inputs
            inputs[i, 1, start:end] = np.arange(len(document))
            if classes:
                targets[i] = document.targets
            else:
                targets[i, start:end] = document.targets
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def batches(rows: Sequence[Row], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All rows in their order; the last batch may be smaller."""
    for first in range(0, len(rows), size):
        yield collate(rows[first : first + size])


class RowLoader(BatchLoader):
    """Endless batches of rows, shuffled anew each epoch as `BatchLoader` does it, and as cheap to seek."""

    def __init__(self, rows: Sequence[Row], batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if len(rows) < batch_size:
            raise EvenstepError(
                f"{len(rows)} rows are fewer than one batch of {batch_size}; give more examples, a smaller "
                "train.batch_size, or --data.pack no, which makes a row of each example"
            )
        if batch_size % world_size:
            raise EvenstepError(f"train.batch_size {batch_size} is not divisible by {world_size} processes")
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.rank, self.world_size, self.sequences_per_epoch = rank, world_size, len(rows)
        self.position = 0
        self._counted = np.array([sum(document.counted for document in row) for row in rows])
        self._lengths = np.array([sum(map(len, row)) for row in rows])
        self.counted: list[int] = []
        """Of this process's rows in the last batch: targets that count in each."""
        self.total = self.tokens = 0
        """Of the last batch over all processes: targets that count, and tokens."""

    def next_batch(self) -> tuple[Tensor, Tensor]:
        ids = self.sequence_ids(self.position, self.position + self.batch_size)
        share = self.batch_size // self.world_size
        mine = ids[self.rank * share : (self.rank + 1) * share]
        self.position += self.batch_size
        self.counted, self.total = self._counted[mine].tolist(), int(self._counted[ids].sum())
        self.tokens = int(self._lengths[ids].sum())
        return collate([self.rows[i] for i in mine])
