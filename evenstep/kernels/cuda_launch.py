"""Launching the Triton kernels: which tensors, in which groups, with which tables. Imports triton.

Hundreds of tensors are served by a few launches. The work is cut into chunks; each program of a launch takes one. A
table on the device says to which tensor a chunk belongs and where in that tensor it lies; another holds the addresses
of the tensors, which the kernel turns into pointers. Tensors that need the same code (dtypes, alignment) form a group,
one launch each, with their chunks side by side. The results of chunks are written to arrays and added up in a fixed
order by a second kernel: no atomics, the same result on every run. Tables reach the device by an asynchronous copy
from pinned memory and are kept while shapes and addresses stay as they are.

Functions here take plain tensors (no subclasses), all on one device and contiguous; cuda.py checks that. Where a list
holds moments, those of torchao's 8 bits are its uint8 codes, and ``scales`` and ``maps`` have an entry for each of
them, in order.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from evenstep.kernels import triton_flat as flat
from evenstep.kernels import triton_rows as matrices
from evenstep.kernels.interface import capturing, stream, uploaded

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.uint8: tl.uint8}
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""Without fused multiply-adds results are those of the plain code to the bit in nearly all cases, codes of 8-bit states
included; the arithmetic hides behind memory either way.
"""
COLUMN_TILE = 128
COLUMN_ROWS = 256
"""Columns and rows of a chunk of `columns`: 500 programs for an embedding of 32000 by 512, and sums of 8 bytes per
column and 256 rows, less than 1 % of the gradient.
"""

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


# ---- launches ----


def measure(grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Largest entries and norms of tensors ``[2, k]`` and of their chunks ``[2, chunks]``."""
    with torch.cuda.device_of(grads[0]):
        plan, at, k = _flat_plan(grads)
        found = _numbers(grads[0], 2, plan.chunks)
        for group in plan.groups:
            dtype, fits = group.key
            flat.measure_chunks[(group.chunks,)](
                plan.owners, plan.firsts, plan.facts, at, group.first, k, plan.chunks, found,
                G=TYPES[dtype], ALIGNED=fits, CHUNK=CHUNK, TILE=TILE, **OPTIONS,
            )  # fmt: skip
        return _totals(plan, found, maxima=1, norms=1, sums=0), found


def clip_norms(grads: list[Tensor], known: Tensor, limit: Tensor, rescale: Tensor) -> Tensor:
    """``[2, k]``: norms after clipping and numbers of clipped entries. ``known``: the chunks of `measure`."""
    with torch.cuda.device_of(grads[0]):
        plan, at, k = _flat_plan(grads)
        found = _numbers(grads[0], 2, plan.chunks)
        for group in plan.groups:
            dtype, fits = group.key
            flat.clip_chunks[(group.chunks,)](
                plan.owners, plan.firsts, plan.facts, at, group.first, k, plan.chunks, known,
                limit.float().contiguous(), rescale.float().contiguous(), found,
                G=TYPES[dtype], ALIGNED=fits, CHUNK=CHUNK, TILE=TILE, **OPTIONS,
            )  # fmt: skip
        return _totals(plan, found, maxima=0, norms=1, sums=1)


def adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    scales: list[Tensor],
    scales_sq: list[Tensor],
    maps: list[Tensor],
    maps_sq: list[Tensor],
    numbers: Tensor,
    lost: list[Tensor],
    seeds: list[Tensor],
    capped: bool,
    zero_history: bool,
) -> Tensor:
    """``[3, k]``: norm of the update, norm after clipping by history, entries clipped so (0 where not ``capped``)."""
    with torch.cuda.device_of(numbers):
        k = len(params)
        main = [pointers(params), pointers(grads), pointers(exp_avg), pointers(exp_avg_sq), _pointers(lost, k)]
        coded = [*_coded(exp_avg, scales, maps), *_coded(exp_avg_sq, scales_sq, maps_sq)]
        sizes = [p.numel() for p in params]
        keys = [
            (p.dtype, g.dtype, m.dtype, v.dtype, fits)
            for p, g, m, v, fits in zip(params, grads, exp_avg, exp_avg_sq, aligned(main, sizes), strict=True)
        ]
        plan = Plan.of([chunks_of(n) for n in sizes], keys, [sizes], numbers.device)
        at = addresses([*main, *coded], numbers.device)
        found = _numbers(numbers, 3, plan.chunks) if capped else numbers.new_zeros(3, plan.chunks)
        table, noise = numbers.float().contiguous(), _stacked(seeds, numbers)
        for group in plan.groups:
            p, g, m, v, fits = group.key
            flat.adam_chunks[(group.chunks,)](
                plan.owners, plan.firsts, plan.facts, at, group.first, k, plan.chunks, table, noise, found,
                P=TYPES[p], G=TYPES[g], M=TYPES[m], V=TYPES[v], ALIGNED=fits, **_rounding(p, lost, seeds),
                CAPPED=capped, ZERO_HISTORY=zero_history, CHUNK=CHUNK, TILE=TILE, **OPTIONS,
            )  # fmt: skip
        return _totals(plan, found, maxima=0, norms=2, sums=1)


def rows_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    scales: list[Tensor],
    maps: list[Tensor],
    divisors: list[Tensor],
    numbers: Tensor,
    floor: float,
    lost: list[Tensor],
    seeds: list[Tensor],
) -> Tensor:
    """``[1, k]``: norm of each normalised tensor."""
    with torch.cuda.device_of(numbers):
        k, device, table = len(params), numbers.device, numbers.float().contiguous()
        coded = _coded(exp_avg, scales, maps) if exp_avg else [[0] * k] * 2
        if exp_avg:
            _average(exp_avg, grads, coded, table)
        sources = exp_avg or grads
        main = [pointers(params), pointers(sources), _pointers(lost, k)]
        shapes = [(p.shape[0], math.prod(p.shape[1:])) for p in params]
        lengths = [length for _, length in shapes]
        widths = [min(triton.next_power_of_2(max(length, 1)), TILE) for length in lengths]
        per = [
            max(CHUNK // max(length, 1) * w // TILE, 1) * (TILE // w) for length, w in zip(lengths, widths, strict=True)
        ]
        keys = [
            (p.dtype, s.dtype, w, fits)
            for p, s, w, fits in zip(params, sources, widths, aligned(main, lengths), strict=True)
        ]
        counts = [-(-rows // some) if length else 0 for (rows, length), some in zip(shapes, per, strict=True)]
        plan = Plan.of(counts, keys, [[rows for rows, _ in shapes], lengths, per], device)
        at = addresses([main[0], main[1], _pointers(divisors, k), main[2], *coded], device)
        found, noise = _numbers(numbers, 1, plan.chunks), _stacked(seeds, numbers)
        for group in plan.groups:
            p, s, w, fits = group.key
            matrices.row_chunks[(group.chunks,)](
                plan.owners, plan.firsts, plan.facts, at, group.first, k, table, noise, floor, found,
                P=TYPES[p], S=TYPES[s], AVERAGED=bool(exp_avg), COLUMNS=bool(divisors), ALIGNED=fits,
                **_rounding(p, lost, seeds), W=w, TILE=TILE, **OPTIONS,
            )  # fmt: skip
        return _totals(plan, found, maxima=0, norms=1, sums=0)


def _average(exp_avg: list[Tensor], grads: list[Tensor], coded: list[list[int]], table: Tensor) -> None:
    main, sizes = [pointers(exp_avg), pointers(grads)], [g.numel() for g in grads]
    keys = [(m.dtype, g.dtype, fits) for m, g, fits in zip(exp_avg, grads, aligned(main, sizes), strict=True)]
    plan = Plan.of([chunks_of(n) for n in sizes], keys, [sizes], table.device)
    at = addresses([*main, *coded], table.device)
    for group in plan.groups:
        m, g, fits = group.key
        flat.average_chunks[(group.chunks,)](
            plan.owners, plan.firsts, plan.facts, at, group.first, len(grads), table,
            M=TYPES[m], G=TYPES[g], ALIGNED=fits, CHUNK=CHUNK, TILE=TILE, **OPTIONS,
        )  # fmt: skip


def columns(grads: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Largest entries and norms ``[2, k]``, and the squared norms of columns, fp64, in the shape of one row."""
    with torch.cuda.device_of(grads[0]):
        device, main = grads[0].device, [pointers(grads)]
        shapes = [(g.shape[0], math.prod(g.shape[1:])) for g in grads]
        lengths = [length for _, length in shapes]
        groups = [-(-rows // COLUMN_ROWS) for rows, _ in shapes]
        widths = [min(triton.next_power_of_2(max(length, 1)), COLUMN_TILE) for length in lengths]
        counts = [group * -(-length // w) for group, length, w in zip(groups, lengths, widths, strict=True)]
        keys = list(zip([g.dtype for g in grads], widths, aligned(main, lengths), strict=True))
        parts = [group * length for group, length in zip(groups, lengths, strict=True)]
        places = [sum(parts[:i]) for i in range(len(parts))]
        plan = Plan.of(counts, keys, [[rows for rows, _ in shapes], lengths, places], device)
        at, k = addresses(main, device), len(grads)
        found = _numbers(grads[0], 2, plan.chunks)
        sums = torch.empty(sum(parts), dtype=torch.float64, device=device)
        for group in plan.groups:
            dtype, w, fits = group.key
            matrices.column_chunks[(group.chunks,)](
                plan.owners, plan.firsts, plan.facts, at, group.first, k, plan.chunks, found, sums,
                G=TYPES[dtype], ALIGNED=fits, W=w, ROWS=TILE // w, PER=COLUMN_ROWS, **OPTIONS,
            )  # fmt: skip
        of_columns = [
            (part.view(-1, length).sum(0) if part.numel() else sums.new_zeros(length)).view(1, *g.shape[1:])
            for part, length, g in zip(sums.split(parts), lengths, grads, strict=True)
        ]
        return _totals(plan, found, maxima=1, norms=1, sums=0), of_columns


def transformed_(out: list[Tensor], grads: list[Tensor], numbers: Tensor) -> None:
    with torch.cuda.device_of(numbers):
        main, sizes = [pointers(out), pointers(grads)], [g.numel() for g in grads]
        keys = [(o.dtype, g.dtype, fits) for o, g, fits in zip(out, grads, aligned(main, sizes), strict=True)]
        plan = Plan.of([chunks_of(n) for n in sizes], keys, [sizes], numbers.device)
        at, table = addresses(main, numbers.device), numbers.float().contiguous()
        for group in plan.groups:
            o, g, fits = group.key
            flat.transformed_chunks[(group.chunks,)](
                plan.owners, plan.firsts, plan.facts, at, group.first, len(out), table,
                D=TYPES[o], G=TYPES[g], ALIGNED=fits, CHUNK=CHUNK, TILE=TILE, **OPTIONS,
            )  # fmt: skip


def _flat_plan(grads: list[Tensor]) -> tuple[Plan, Tensor, int]:
    device, main, sizes = grads[0].device, [pointers(grads)], [g.numel() for g in grads]
    keys = [(g.dtype, fits) for g, fits in zip(grads, aligned(main, sizes), strict=True)]
    return Plan.of([chunks_of(n) for n in sizes], keys, [sizes], device), addresses(main, device), len(grads)


def _totals(plan: Plan, found: Tensor, *, maxima: int, norms: int, sums: int) -> Tensor:
    k = plan.firsts.numel()
    out = _numbers(found, maxima + norms + sums, k)
    flat.totals[(k,)](
        plan.firsts, plan.counts, found, plan.chunks, out, k,
        MAXIMA=maxima, NORMS=norms, SUMS=sums, TILE=TILE, **OPTIONS,
    )  # fmt: skip
    return out


def _numbers(like: Tensor, rows: int, count: int) -> Tensor:
    return torch.empty(rows, count, dtype=torch.float32, device=like.device)


def _pointers(tensors: list[Tensor], k: int) -> list[int]:
    return pointers(tensors) or [0] * k


def _coded(moments: list[Tensor], scales: list[Tensor], maps: list[Tensor]) -> list[list[int]]:
    """Addresses of each moment's scales and map, 0 where it is not coded."""
    found = []
    for parts in (scales, maps):
        left = iter(parts)
        found.append([next(left).data_ptr() if m.dtype == torch.uint8 else 0 for m in moments])
    return found


def _stacked(seeds: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(seeds).to(torch.int32) if seeds else like


def _rounding(dtype: torch.dtype, lost: list[Tensor], seeds: list[Tensor]) -> dict[str, bool]:
    coarse = dtype != torch.float32
    return {"KAHAN": coarse and bool(lost), "STOCHASTIC": coarse and bool(seeds)}
