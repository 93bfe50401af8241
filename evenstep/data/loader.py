"""The order of training: the tokens of batch number k, computed without the batches before it.

A stream of N tokens has n = (N - 1) // seq_len windows of seq_len + 1 tokens. Neighbours share one token: the last
target of one window is the first input of the next. An epoch visits every window once, in an order that depends on
(seed, epoch).

The order is a keyed permutation instead of a shuffled list. A Feistel network maps an index of b bits to another index
of b bits: it divides the bits into two halves and repeatedly mixes a hash of one half into the other. Every such step
is invertible for any hash function, so the result is a permutation by construction. n is rarely a power of two, so b is
the smallest width that can represent n, and an index outside of 0..n-1 is mapped again until it is inside ("cycle
walking", fewer than two rounds on average), which gives a permutation of 0..n-1. Hence window k of an epoch costs a few
dozen integer operations and no memory for any n, and the position, one integer, is the whole state in a checkpoint. The
position counts sequences over all ranks, so a run may be resumed with another world size.
"""

import hashlib
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

from evenstep.data.shards import TokenStream
from evenstep.errors import EvenstepError

_ROUNDS = 6  # four rounds already shuffle well; two more because the halves of small corpora have few bits
_MULTIPLIERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93))
_HIGH = np.uint64(32)

Batch = tuple[torch.Tensor, torch.Tensor]


class Permutation:
    """A bijection of 0..n-1 chosen by (seed, epoch), the same on every machine and in every version of numpy."""

    def __init__(self, n: int, seed: int, epoch: int):
        self.n = n
        bits = max(2, (n - 1).bit_length())
        low = bits // 2
        self._low = np.uint64(low)
        self._low_mask, self._high_mask = np.uint64((1 << low) - 1), np.uint64((1 << (bits - low)) - 1)
        digest = hashlib.blake2b(f"evenstep order {seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """int64[k] in 0..n-1 -> int64[k] in 0..n-1."""
        values = self._shuffle(indices.astype(np.uint64))
        while len(outside := np.flatnonzero(values >= self.n)):
            values[outside] = self._shuffle(values[outside])
        return values.astype(np.int64)

    def _shuffle(self, values: np.ndarray) -> np.ndarray:
        # Each line changes one half by a hash of the other half, which is unchanged: XOR with the same hash undoes it.
        high, low = values >> self._low, values & self._low_mask
        for first, second in zip(self._keys[::2], self._keys[1::2], strict=True):
            high = high ^ (_mix(low ^ first) & self._high_mask)
            low = low ^ (_mix(high ^ second) & self._low_mask)
        return (high << self._low) | low


def _mix(x: np.ndarray) -> np.ndarray:
    """A hash of 64-bit integers, uint64 [k] -> uint64 [k]: multiplications that wrap, and shifts of the high half."""
    x = x * _MULTIPLIERS[0]
    x = (x ^ (x >> _HIGH)) * _MULTIPLIERS[1]
    return x >> _HIGH


_permutation = lru_cache(maxsize=4)(Permutation)


class BatchLoader:
    """Endless batches of training windows, reshuffled in each epoch.

    Args:
        stream: the tokens.
        seq_len: tokens per sequence.
        batch_size: sequences per batch, over all ranks.
        seed: any integer; another seed gives another order.
        rank, world_size: this process gets rows ``rank * b`` to ``(rank + 1) * b - 1`` of each batch, where b =
            batch_size / world_size, so the batch over all ranks is the same for every world_size.
        position: number of sequences consumed over all ranks. Setting it seeks in O(1).

    Raises:
        EvenstepError: ``batch_size`` is not divisible by ``world_size``, or the stream is smaller than one batch.
    """

    def __init__(
        self,
        stream: TokenStream,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        position: int = 0,
    ):
        _check_positive(seq_len=seq_len, batch_size=batch_size, world_size=world_size)
        if not 0 <= rank < world_size:
            raise EvenstepError(f"rank is {rank}; allowed is 0 to {world_size - 1} with world_size {world_size}")
        if batch_size % world_size:
            raise EvenstepError(
                f"batch_size {batch_size} is not divisible by world_size {world_size}; choose a multiple of "
                f"{world_size}"
            )
        self.sequences_per_epoch = max(len(stream) - 1, 0) // seq_len
        if self.sequences_per_epoch < batch_size:
            raise EvenstepError(
                f"the {stream.name} split has {len(stream):,} tokens; one batch of {batch_size} x {seq_len} needs "
                f"{batch_size * seq_len + 1:,}; give more text, or a smaller batch_size or seq_len"
            )
        self.stream, self.seq_len, self.batch_size, self.seed = stream, seq_len, batch_size, seed
        self.rank, self.world_size, self.position = rank, world_size, position
        self.random_rows, self.vocab_size = range(0), 0

    def randomise(self, batch: int, vocab_size: int) -> None:
        """Replace the tokens of one batch by random ones, to try out what reacts to a bad batch.

        Args:
            batch: the number of the batch, from 1.
            vocab_size: the tokens are drawn uniformly from 0 to ``vocab_size - 1``.
        """
        # Rows and not a step: after a guard has left the rows out, the repeated step reads good ones.
        self.random_rows = range((batch - 1) * self.batch_size, batch * self.batch_size)
        self.vocab_size = vocab_size

    @property
    def position(self) -> int:
        return self._position

    @position.setter
    def position(self, value: int) -> None:
        if value < 0:
            raise EvenstepError(f"position is {value}; it counts consumed sequences and cannot be negative")
        self._position = int(value)

    def sequence_ids(self, start: int, stop: int) -> np.ndarray:
        """The windows at positions ``start`` to ``stop - 1``, int64 [stop - start]. Window w has the tokens ``w *
        seq_len`` to ``(w + 1) * seq_len``, both included. Does not change the position, so any part of a run can be
        looked up."""
        positions = np.arange(start, stop, dtype=np.int64)
        epochs, within = np.divmod(positions, self.sequences_per_epoch)
        ids = np.empty_like(positions)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1) if len(positions) else ():
            here = slice(np.searchsorted(epochs, epoch), np.searchsorted(epochs, epoch, side="right"))
            ids[here] = _permutation(self.sequences_per_epoch, self.seed, epoch)(within[here])
        return ids

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """The tokens of the rows at positions ``start`` to ``stop - 1``, int64 [stop - start, seq_len + 1]. Does not
        change the position."""
        tokens = np.empty((stop - start, self.seq_len + 1), dtype=np.int64)
        for i, window in enumerate(self.sequence_ids(start, stop).tolist()):
            if start + i in self.random_rows:
                # Drawn from the seed and the row, so that every number of ranks and a resumed run read the same.
                draw = np.random.default_rng((self.seed, start + i))
                tokens[i] = draw.integers(self.vocab_size, size=self.seq_len + 1)
            else:
                tokens[i] = self.stream.read(window * self.seq_len, (window + 1) * self.seq_len + 1)
        return tokens

    def next_batch(self) -> Batch:
        """(inputs, targets): int64 CPU tensors [batch_size / world_size, seq_len], the targets one token ahead of the
        inputs."""
        rows = self.batch_size // self.world_size
        start = self._position + self.rank * rows
        tokens = self.read_rows(start, start + rows)
        self._position += self.batch_size
        return _inputs_and_targets(tokens)


def eval_batches(stream: TokenStream, seq_len: int, batch_size: int, max_tokens: int | None = None) -> Iterator[Batch]:
    """Batches in which every token after the first is a target exactly once, in order: (inputs, targets), int64 CPU
    tensors [<= batch_size, <= seq_len].

    Full windows come first; their last batch may have fewer rows. The remaining tokens are a batch of one shorter row.
    Batches differ in size, so a mean over them has to be weighted by the number of targets.

    Args:
        stream: the tokens.
        seq_len: tokens per row.
        batch_size: largest number of rows.
        max_tokens: number of targets, the first ones; None: all.

    Raises:
        EvenstepError: at once, for a stream of fewer than two tokens.
    """
    _check_positive(seq_len=seq_len, batch_size=batch_size)
    if max_tokens is not None:
        _check_positive(max_tokens=max_tokens)
    if len(stream) < 2:
        raise EvenstepError(
            f"the {stream.name} split has {len(stream)} tokens, too few to evaluate; give a larger val_fraction or "
            "more text"
        )
    targets = len(stream) - 1 if max_tokens is None else min(max_tokens, len(stream) - 1)
    return _eval_batches(stream, seq_len, batch_size, targets)


def _eval_batches(stream: TokenStream, seq_len: int, batch_size: int, targets: int) -> Iterator[Batch]:
    full = targets // seq_len
    for first in range(0, full, batch_size):
        rows = min(batch_size, full - first)
        flat = stream.read(first * seq_len, (first + rows) * seq_len + 1).astype(np.int64)
        yield (
            torch.from_numpy(flat[:-1].reshape(rows, seq_len)),
            torch.from_numpy(flat[1:].reshape(rows, seq_len).copy()),
        )
    if full * seq_len < targets:
        yield _inputs_and_targets(stream.read(full * seq_len, targets + 1).astype(np.int64)[None])


def _inputs_and_targets(tokens: np.ndarray) -> Batch:
    both = torch.from_numpy(tokens)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def _check_positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise EvenstepError(f"{name} is {value}; it must be at least 1")
