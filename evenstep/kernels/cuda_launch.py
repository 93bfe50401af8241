"""Launching the Triton kernels: which tensors, in which groups, with which tables. Imports triton.

Hundreds of tensors are served by a few launches. The work is cut into chunks; each program of a launch takes one. A
table on the device says to which tensor a chunk belongs and where it lies in that tensor; another holds the addresses
of the tensors, which the kernel turns into pointers. Tensors that need the same code (dtypes, alignment) form a group,
one launch each, with neighbouring chunks. Chunks write their results to arrays, which a second kernel adds up in a
fixed order: no atomics, the same result on every run. Tables reach the device by an asynchronous copy from pinned
memory and are cached while shapes and addresses stay as they are.

Functions here take lists of ``k`` plain tensors (no subclasses), all on one device and contiguous; cuda.py checks
that. An 8-bit moment of torchao is given as its uint8 codes, ``scales`` and ``maps`` as `interface.stored_moments`
returns them. Launches go to the current stream, where all tensors are used.
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

# Without fused multiply-adds results are those of the plain code to the bit in nearly all cases, codes of 8-bit moments
# included; the arithmetic hides behind memory either way.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

# Entries per program, a multiple of TILE and of 256 (blocks of 8-bit moments). A 60M model makes 3600 chunks, five to
# nine for each place that an H100 has (132 processors, 3 to 5 programs of Adam resident by their registers), so that
# the last, unevenly filled round is short. Looking a chunk up costs three dependent reads, little beside 16 tiles.
CHUNK = 1 << 14

# Entries in flight per round, a power of two: with 4 warps 8 per thread, two 16-byte accesses in fp32 or one in bf16.
# Four streams of that from four programs are 64 KiB per processor under way, twice what an H100's latency times
# bandwidth asks for; consumer GPUs ask for less.
TILE = 1 << 10

# Columns and rows of a chunk of `columns`: 500 programs for an embedding of 32000 by 512, and sums of 8 bytes per
# column and 256 rows, less than 1 % of the gradient.
COLUMN_TILE = 128
COLUMN_ROWS = 256

# ---- tables on the device ----
#
# Shapes and addresses rarely change from step to step, so tables are cached, and a usual step copies nothing to the
# device. A table made during the capture of a CUDA graph is filled only by a replay; it must not enter the cache, and
# the cache's must not enter the graph, since their memory may be freed before the replay (`__wrapped__` is the function
# without its cache).


@dataclass(frozen=True, slots=True)
class Group:
    """Chunks ``first .. first + chunks - 1`` belong to tensors that need the code of ``key``: one launch."""

    key: tuple[Any, ...]
    first: int
    chunks: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How ``k`` tensors are cut into chunks. Tables are int64 on the device."""

    tensor_of: Tensor
    """``[chunks]``: number of the tensor that a chunk belongs to."""
    first_chunk: Tensor
    """``[k]``: number of a tensor's first chunk; the others follow."""
    chunk_count: Tensor
    """``[k]``: number of chunks of a tensor, 0 for an empty one."""
    dims: Tensor
    """``[rows, k]``: sizes of a tensor, as the kernel needs them."""
    chunks: int
    """Chunks of all tensors."""
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, counts: list[int], keys: list[tuple[Any, ...]], dims: list[list[int]], device: torch.device) -> "Plan":
        """``counts``, ``keys`` and each row of ``dims`` have an entry per tensor."""
        make = _plan.__wrapped__ if capturing(device) else _plan
        return make(tuple(counts), tuple(keys), tuple(map(tuple, dims)), device, stream(device))


@functools.lru_cache(maxsize=64)
def _plan(
    counts: tuple[int, ...],
    keys: tuple[tuple[Any, ...], ...],
    dims: tuple[tuple[int, ...], ...],
    device: torch.device,
    stream: int,  # part of the key of the cache: a table copied on one stream may be read too early on another
) -> Plan:
    # Tensors of one key get neighbouring chunks, whatever their order, so that one launch serves them all.
    first_chunk, groups, total = [0] * len(counts), [], 0
    members_of: dict[tuple[Any, ...], list[int]] = {}
    for i, key in enumerate(keys):
        members_of.setdefault(key, []).append(i)
    for key, members in members_of.items():
        begin = total
        for i in members:
            first_chunk[i] = total
            total += counts[i]
        if total > begin:  # a launch without programs is an error
            groups.append(Group(key, begin, total - begin))
    in_order = [i for members in members_of.values() for i in members]
    tensor_of = np.repeat(in_order, [counts[i] for i in in_order]) if in_order else np.zeros(0)
    k = len(counts)
    # One copy for all tables.
    table = uploaded(torch.from_numpy(np.concatenate([tensor_of, first_chunk, counts, *dims]).astype(np.int64)), device)
    parts = torch.split(table, [total, k, k, k * len(dims)])
    return Plan(parts[0], parts[1], parts[2], parts[3].view(len(dims), k), total, tuple(groups))


def addresses(streams: list[list[int]], device: torch.device) -> Tensor:
    """Addresses of tensors on the device, int64 ``[streams, k]``.

    They are looked up by their values, so a tensor that has moved gets a new table.
    """
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
    """Addresses of the first entries."""
    return [t.data_ptr() for t in tensors]


def aligned(streams: list[list[int]], sizes: list[int]) -> list[bool]:
    """For each tensor whether all its addresses are multiples of 16 bytes and its size is one of 16 entries: then the
    kernel moves 16 bytes at a time.
    """
    # a | b is a multiple of 16 if and only if both are.
    bits = sizes
    for row in streams:
        bits = [a | b for a, b in zip(bits, row, strict=True)]
    return [b % 16 == 0 for b in bits]


# ---- launches ----


def _device_of(x: Tensor) -> torch.cuda.device:
    """Launches go to the current device: make it that of ``x``. Nothing for a CPU tensor (Triton's interpreter)."""
    return torch.cuda.device(x.get_device() if x.is_cuda else -1)


def measure(grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Largest entries and norms of tensors, fp32 ``[2, k]``, and of their chunks ``[2, chunks]``. Reads gradients."""
    with _device_of(grads[0]):
        plan, at, k = _flat_plan(grads)
        partial = _floats(grads[0], 2, plan.chunks)
        for group in plan.groups:
            dtype, fits = group.key
            # Launches of several groups write to their own columns of `partial`.
            flat.measure_chunks[(group.chunks,)](
                plan.tensor_of, plan.first_chunk, plan.dims, at, group.first, k, plan.chunks, partial,
                G=TYPES[dtype], ALIGNED=fits, CHUNK=CHUNK, TILE=TILE, **OPTIONS,
            )  # fmt: skip
        return _totals(plan, partial, maxima=1, norms=1, sums=0), partial


def clip_norms(grads: list[Tensor], known: Tensor, limit: Tensor, rescale: Tensor) -> Tensor:
    """fp32 ``[2, k]``: norms after clipping and numbers of clipped entries. ``known``: the chunks of `measure`;
    ``limit`` and ``rescale``: ``[k]``. Reads the chunks of gradients that have an entry above the limit.
    """
    with _device_of(grads[0]):
        plan, at, k = _flat_plan(grads)
        partial = _floats(grads[0], 2, plan.chunks)
        for group in plan.groups:
            dtype, fits = group.key
            flat.clip_chunks[(group.chunks,)](
                plan.tensor_of, plan.first_chunk, plan.dims, at, group.first, k, plan.chunks, known,
                limit.float().contiguous(), rescale.float().contiguous(), partial,
                G=TYPES[dtype], ALIGNED=fits, CHUNK=CHUNK, TILE=TILE, **OPTIONS,
            )  # fmt: skip
        return _totals(plan, partial, maxima=0, norms=1, sums=1)


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
    """Update parameters and moments in place. ``numbers``: `ADAM_ROWS`, fp32 ``[16, k]``.

    Returns fp32 ``[3, k]``: norm of the update, norm after clipping by history, entries clipped so (the latter two 0
    where not ``capped``). Reads gradients, parameters and moments once, and writes the latter two once: 28 bytes per
    entry in fp32.
    """
    with _device_of(numbers):
        k = len(params)
        # Rows of the table of addresses, in the order that the kernel takes them.
        main = [pointers(params), pointers(grads), pointers(exp_avg), pointers(exp_avg_sq), _pointers(lost, k)]
        # Scales and maps are read entry by entry and need no alignment.
        coded = [*_coded(exp_avg, scales, maps), *_coded(exp_avg_sq, scales_sq, maps_sq)]
        sizes = [p.numel() for p in params]
        keys = [
            (p.dtype, g.dtype, m.dtype, v.dtype, fits)
            for p, g, m, v, fits in zip(params, grads, exp_avg, exp_avg_sq, aligned(main, sizes), strict=True)
        ]
        plan = Plan.of([chunks_of(n) for n in sizes], keys, [sizes], numbers.device)
        at = addresses([*main, *coded], numbers.device)
        # The kernel writes rows 1 and 2 only where it clips, so that other steps do without two more sums.
        partial = _floats(numbers, 3, plan.chunks) if capped else numbers.new_zeros(3, plan.chunks)
        table, noise = numbers.float().contiguous(), _stacked(seeds, numbers)
        for group in plan.groups:
            p, g, m, v, fits = group.key
            flat.adam_chunks[(group.chunks,)](
                plan.tensor_of, plan.first_chunk, plan.dims, at, group.first, k, plan.chunks, table, noise, partial,
                P=TYPES[p], G=TYPES[g], M=TYPES[m], V=TYPES[v], ALIGNED=fits, **_rounding(p, lost, seeds),
                CAPPED=capped, ZERO_HISTORY=zero_history, CHUNK=CHUNK, TILE=TILE, **OPTIONS,
            )  # fmt: skip
        return _totals(plan, partial, maxima=0, norms=2, sums=1)


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
    """SCALE's step of matrices, in place. ``numbers``: `SCALE_ROWS`, fp32 ``[7, k]``. ``exp_avg`` is empty for SCALE
    without momentum. ``divisors``: the norms of columns, fp32 in the shape of one row, or empty to divide rows by their
    own norms. Returns fp32 ``[1, k]``: norm of each normalised tensor.
    """
    with _device_of(numbers):
        k, device, table = len(params), numbers.device, numbers.float().contiguous()
        coded = _coded(exp_avg, scales, maps) if exp_avg else [[0] * k] * 2
        # The average has to be complete before a row of it is measured, hence a launch of its own before, on the same
        # stream.
        if exp_avg:
            _average(exp_avg, grads, coded, table)
        sources = exp_avg or grads
        main = [pointers(params), pointers(sources), _pointers(lost, k)]
        # Matrices [rows, length]; a tensor of more dimensions is [dimension 0, rest], as in the plain code.
        shapes = [(p.shape[0], math.prod(p.shape[1:])) for p in params]
        lengths = [length for _, length in shapes]
        widths = [min(triton.next_power_of_2(max(length, 1)), TILE) for length in lengths]
        # Rows per chunk: about CHUNK entries, in whole tiles of TILE // width rows.
        rows_per_chunk = [
            max(CHUNK // max(length, 1) * w // TILE, 1) * (TILE // w) for length, w in zip(lengths, widths, strict=True)
        ]
        # Rows begin at multiples of their length, so aligned rows need a length, not a size, that is a multiple of 16.
        keys = [
            (p.dtype, s.dtype, w, fits)
            for p, s, w, fits in zip(params, sources, widths, aligned(main, lengths), strict=True)
        ]
        counts = [-(-rows // per) if length else 0 for (rows, length), per in zip(shapes, rows_per_chunk, strict=True)]
        plan = Plan.of(counts, keys, [[rows for rows, _ in shapes], lengths, rows_per_chunk], device)
        at = addresses([main[0], main[1], _pointers(divisors, k), main[2], *coded], device)
        partial, noise = _floats(numbers, 1, plan.chunks), _stacked(seeds, numbers)
        for group in plan.groups:
            p, s, w, fits = group.key
            matrices.row_chunks[(group.chunks,)](
                plan.tensor_of, plan.first_chunk, plan.dims, at, group.first, k, table, noise, floor, partial,
                P=TYPES[p], S=TYPES[s], AVERAGED=bool(exp_avg), COLUMNS=bool(divisors), ALIGNED=fits,
                **_rounding(p, lost, seeds), W=w, TILE=TILE, **OPTIONS,
            )  # fmt: skip
        return _totals(plan, partial, maxima=0, norms=1, sums=0)


def _average(exp_avg: list[Tensor], grads: list[Tensor], coded: list[list[int]], table: Tensor) -> None:
    """m <- b m + (1 - b) g, in place. ``coded``: addresses of scales and maps; ``table``: `SCALE_ROWS`."""
    main, sizes = [pointers(exp_avg), pointers(grads)], [g.numel() for g in grads]
    keys = [(m.dtype, g.dtype, fits) for m, g, fits in zip(exp_avg, grads, aligned(main, sizes), strict=True)]
    plan = Plan.of([chunks_of(n) for n in sizes], keys, [sizes], table.device)
    at = addresses([*main, *coded], table.device)
    for group in plan.groups:
        m, g, fits = group.key
        flat.average_chunks[(group.chunks,)](
            plan.tensor_of, plan.first_chunk, plan.dims, at, group.first, len(grads), table,
            M=TYPES[m], G=TYPES[g], ALIGNED=fits, CHUNK=CHUNK, TILE=TILE, **OPTIONS,
        )  # fmt: skip


def columns(grads: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Largest entries and norms, fp32 ``[2, k]``, and the squared norms of columns, fp64 in the shape of one row. Reads
    gradients.
    """
    with _device_of(grads[0]):
        device, main = grads[0].device, [pointers(grads)]
        shapes = [(g.shape[0], math.prod(g.shape[1:])) for g in grads]
        lengths = [length for _, length in shapes]
        # A chunk is a group of COLUMN_ROWS rows by up to COLUMN_TILE columns.
        groups = [-(-rows // COLUMN_ROWS) for rows, _ in shapes]
        widths = [min(triton.next_power_of_2(max(length, 1)), COLUMN_TILE) for length in lengths]
        counts = [group * -(-length // w) for group, length, w in zip(groups, lengths, widths, strict=True)]
        keys = list(zip([g.dtype for g in grads], widths, aligned(main, lengths), strict=True))
        # `sums` holds [groups, length] of each tensor, one after the other.
        parts = [group * length for group, length in zip(groups, lengths, strict=True)]
        places = [sum(parts[:i]) for i in range(len(parts))]
        plan = Plan.of(counts, keys, [[rows for rows, _ in shapes], lengths, places], device)
        at, k = addresses(main, device), len(grads)
        partial = _floats(grads[0], 2, plan.chunks)
        # fp64, since squares of fp32 numbers leave the range of fp32.
        sums = torch.empty(sum(parts), dtype=torch.float64, device=device)
        for group in plan.groups:
            dtype, w, fits = group.key
            matrices.column_chunks[(group.chunks,)](
                plan.tensor_of, plan.first_chunk, plan.dims, at, group.first, k, plan.chunks, partial, sums,
                G=TYPES[dtype], ALIGNED=fits, W=w, ROWS=TILE // w, PER=COLUMN_ROWS, **OPTIONS,
            )  # fmt: skip
        # Added by torch: a reduction of [groups, length], groups being rows / 256.
        of_columns = [
            (part.view(-1, length).sum(0) if part.numel() else sums.new_zeros(length)).view(1, *g.shape[1:])
            for part, length, g in zip(torch.split(sums, parts), lengths, grads, strict=True)
        ]
        return _totals(plan, partial, maxima=1, norms=1, sums=0), of_columns


def transformed_(out: list[Tensor], grads: list[Tensor], numbers: Tensor) -> None:
    """``out`` <- gradients limited and scaled by ``numbers``, fp32 ``[3, k]``: gain, limit, reduced gain."""
    with _device_of(numbers):
        main, sizes = [pointers(out), pointers(grads)], [g.numel() for g in grads]
        keys = [(o.dtype, g.dtype, fits) for o, g, fits in zip(out, grads, aligned(main, sizes), strict=True)]
        plan = Plan.of([chunks_of(n) for n in sizes], keys, [sizes], numbers.device)
        at, table = addresses(main, numbers.device), numbers.float().contiguous()
        for group in plan.groups:
            o, g, fits = group.key
            flat.transformed_chunks[(group.chunks,)](
                plan.tensor_of, plan.first_chunk, plan.dims, at, group.first, len(out), table,
                D=TYPES[o], G=TYPES[g], ALIGNED=fits, CHUNK=CHUNK, TILE=TILE, **OPTIONS,
            )  # fmt: skip


# ---- what the launches share ----


def _flat_plan(grads: list[Tensor]) -> tuple[Plan, Tensor, int]:
    """The plan of kernels that only read gradients, the addresses ``[1, k]``, and ``k``."""
    device, main, sizes = grads[0].device, [pointers(grads)], [g.numel() for g in grads]
    keys = [(g.dtype, fits) for g, fits in zip(grads, aligned(main, sizes), strict=True)]
    return Plan.of([chunks_of(n) for n in sizes], keys, [sizes], device), addresses(main, device), len(grads)


def _totals(plan: Plan, partial: Tensor, *, maxima: int, norms: int, sums: int) -> Tensor:
    """Results of tensors ``[rows, k]`` from those of chunks ``[rows, chunks]``; maxima come first, then norms, sums."""
    k = plan.first_chunk.numel()
    out = _floats(partial, maxima + norms + sums, k)
    # One program per tensor. A tensor without chunks gets zeros.
    flat.totals[(k,)](
        plan.first_chunk, plan.chunk_count, partial, plan.chunks, out, k,
        MAXIMA=maxima, NORMS=norms, SUMS=sums, TILE=TILE, **OPTIONS,
    )  # fmt: skip
    return out


def _floats(like: Tensor, rows: int, count: int) -> Tensor:
    """Uninitialised; the dtype is explicit, since torch's default may be another."""
    return torch.empty(rows, count, dtype=torch.float32, device=like.device)


def _pointers(tensors: list[Tensor], k: int) -> list[int]:
    """Addresses, or null pointers where the list is empty; 0 is aligned."""
    return pointers(tensors) or [0] * k


def _coded(moments: list[Tensor], scales: list[Tensor], maps: list[Tensor]) -> list[list[int]]:
    """Addresses of each moment's scales and of the map of codes, 0 where it is not coded."""
    if not scales:
        return [[0] * len(moments)] * 2
    # All coded moments of a list share one map. The scales of the others are empty, and the address of an empty tensor
    # is 0.
    shared = maps[0].data_ptr()
    return [pointers(scales), [shared if m.dtype == torch.uint8 else 0 for m in moments]]


def _stacked(seeds: list[Tensor], like: Tensor) -> Tensor:
    """Seeds as int32 ``[k]``; any tensor, which the kernel does not read, where there are none."""
    return torch.stack(seeds).to(torch.int32) if seeds else like


def _rounding(dtype: torch.dtype, lost: list[Tensor], seeds: list[Tensor]) -> dict[str, bool]:
    """Constants of `write`. An fp32 parameter in the same list holds the results exactly, and needs neither."""
    coarse = dtype != torch.float32
    return {"KAHAN": coarse and bool(lost), "STOCHASTIC": coarse and bool(seeds)}
