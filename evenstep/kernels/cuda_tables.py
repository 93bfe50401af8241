"""How kernels find hundreds of tensors in a few launches: tables on the device.

The work is cut into chunks; each program of a launch takes one. A table says to which tensor a chunk belongs and where
in that tensor it lies, another holds the addresses of the tensors, which the kernel turns into pointers. Tensors that
need the same code (dtypes, alignment) form a group, one launch each, with their chunks side by side. What chunks find
is written to arrays and added up in a fixed order by a second kernel: no atomics, the same result on every run.

Tables reach the device by an asynchronous copy from pinned memory and are kept while shapes and addresses stay as they
are.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evenstep.kernels.constants import capturing, stream, uploaded

CHUNK = 1 << 14
"""Entries per program. A 60M model makes 3600 of them, five to nine for each place that an H100 has (132 processors, 3
to 5 programs of Adam resident by their registers), so that the last, unevenly filled round is short; looking a chunk up
(three dependent reads) costs little beside 16 rounds of work.
"""
TILE = 1 << 10
"""Entries in flight per round: with 4 warps 8 per thread, two 16-byte accesses in fp32 or one in bf16. Four streams of
that from four programs are 64 KiB per processor under way, twice what an H100's latency times bandwidth asks for;
consumer GPUs ask for less.
"""
CODED = 256
"""Entries per scale of torchao's 8-bit blocks; `TILE` is a multiple of it."""


@dataclass(frozen=True, slots=True)
class Group:
    """Chunks ``first .. first + chunks - 1`` belong to tensors that need the code of ``key``."""

    key: tuple[Any, ...]
    first: int
    chunks: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How the chunks of ``k`` tensors lie; all tensors int64 on the device."""

    owners: Tensor
    """[chunks] number of the tensor."""
    firsts: Tensor
    """[k] number of the tensor's first chunk."""
    counts: Tensor
    """[k] how many it has."""
    facts: Tensor
    """[facts, k] such as its size."""
    chunks: int
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, counts: list[int], keys: list[tuple[Any, ...]], facts: list[list[int]], device: torch.device) -> "Plan":
        make = _plan.__wrapped__ if capturing(device) else _plan
        return make(tuple(counts), tuple(keys), tuple(map(tuple, facts)), device, stream(device))


@functools.lru_cache(maxsize=64)
def _plan(
    counts: tuple[int, ...],
    keys: tuple[tuple[Any, ...], ...],
    facts: tuple[tuple[int, ...], ...],
    device: torch.device,
    stream: int,
) -> Plan:
    firsts, groups, total = [0] * len(counts), [], 0
    order: dict[tuple[Any, ...], list[int]] = {}
    for i, key in enumerate(keys):
        order.setdefault(key, []).append(i)
    for key, members in order.items():
        begin = total
        for i in members:
            firsts[i] = total
            total += counts[i]
        if total > begin:
            groups.append(Group(key, begin, total - begin))
    in_order = [i for members in order.values() for i in members]
    owners = np.repeat(in_order, [counts[i] for i in in_order]) if in_order else np.zeros(0)
    k = len(counts)
    table = uploaded(torch.from_numpy(np.concatenate([owners, firsts, counts, *facts]).astype(np.int64)), device)
    parts = table.split([total, k, k, k * len(facts)])
    return Plan(parts[0], parts[1], parts[2], parts[3].view(len(facts), k), total, tuple(groups))


def addresses(streams: list[list[int]], device: torch.device) -> Tensor:
    """Addresses of tensors on the device, int64 ``[streams, k]``."""
    make = _addresses.__wrapped__ if capturing(device) else _addresses
    return make(tuple(map(tuple, streams)), device, stream(device))


@functools.lru_cache(maxsize=64)
def _addresses(streams: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> Tensor:
    # Addresses are unsigned, and some machines use the highest bit.
    return uploaded(torch.from_numpy(np.array(streams, dtype=np.uint64).view(np.int64)), device)


def chunks_of(n: int) -> int:
    """Chunks of a tensor of ``n`` entries in the kernels that treat it as flat."""
    return -(-n // CHUNK)


def pointers(tensors: list[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]


def aligned(streams: list[list[int]], multiples: list[int]) -> list[bool]:
    """For each tensor whether all its addresses are multiples of 16 bytes and its size is one of 16 entries: then 16
    bytes are read at a time.
    """
    bits = multiples
    for places in streams:
        bits = [a | b for a, b in zip(bits, places, strict=True)]
    return [b % 16 == 0 for b in bits]
