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

import collections
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from evenstep.kernels import triton_flat as flat
from evenstep.kernels import triton_numbers as numbers
from evenstep.kernels import triton_rows as matrices
from evenstep.kernels.interface import (
    ADAM_ROWS,
    SCALE_ROWS,
    STATS,
    StepTensors,
    capturing,
    stored_moments,
    stream,
    uploaded,
)

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

# Chunks that the kernels of whole tensors (triton_numbers.py) read at a time.
TOTALS_TILE = 1 << 10

# Scalars of the state that a program reads or writes, one for each of its threads.
SCALARS_TILE = 1 << 7

# Columns and rows of a chunk of `column_chunks`: 500 programs for an embedding of 32000 by 512, and sums of 8 bytes per
# column and 256 rows, less than 1 % of the gradient.
COLUMN_TILE = 128
COLUMN_ROWS = 256

# Tables of each kind that are kept.
TABLES = 512

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


@functools.lru_cache(maxsize=TABLES)
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


@functools.lru_cache(maxsize=TABLES)
def _addresses(streams: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> Tensor:
    # Addresses are unsigned, and some machines use the highest bit.
    return uploaded(torch.from_numpy(np.array(streams, dtype=np.uint64).view(np.int64)), device)


def chunks_of(n: int) -> int:
    """Chunks of a tensor of ``n`` entries in the kernels that treat it as flat."""
    return -(-n // CHUNK)


def pointers(tensors: list[Tensor]) -> list[int]:
    """Addresses of the first entries."""
    return list(map(Tensor.data_ptr, tensors))


def aligned(streams: list[list[int]], sizes: list[int]) -> list[bool]:
    """For each tensor whether all its addresses are multiples of 16 bytes and its size is one of 16 entries: then the
    kernel moves 16 bytes at a time.
    """
    # a | b is a multiple of 16 if and only if both are.
    bits = sizes
    for row in streams:
        bits = [a | b for a, b in zip(bits, row, strict=True)]
    return [b % 16 == 0 for b in bits]


# ---- jobs ----
#
# A job is what all steps on the same tensors have in common: plans, addresses, and memory for results that do not leave
# the step. Looking a job up costs the host one pass over the addresses; making it costs several over all tensors.


ADAM_STREAMS = 10  # parameter, gradient, moments, compensation, scales and maps of both moments, mask


@dataclass(frozen=True, slots=True)
class AdamJob:
    """A job of Adam, SPAM or Stable-SPAM for ``k`` tensors."""

    plan: Plan
    """``dims [2, k]``: entries of a tensor, and those that are trained."""
    at: Tensor
    """Addresses ``[streams, k]``, in the order that `adam_chunks` takes them, then those of the scalars."""
    partial: Tensor
    """fp32 ``[4, chunks]``, and ``facts [4, k]``, ``numbers [16, k]``: see triton_numbers.py."""
    facts: Tensor
    numbers: Tensor
    starts: Tensor | None
    """int64 ``[chunks]``: trained entries of the tensor before a chunk; None where no tensor has a mask."""

    @property
    def gradients(self) -> Tensor:
        """Addresses, with the gradients in row 0."""
        return self.at[1:]

    @property
    def scalars(self) -> Tensor:
        """Addresses of the scalars of the state, a row each."""
        return self.at[ADAM_STREAMS:]


def adam_job(tensors: StepTensors) -> AdamJob:
    """The job of these tensors, remembered while they stay where they are. ValueError where a moment has another size
    than its parameter and there is no mask."""
    m, scales, maps = stored_moments(tensors.exp_avg)
    v, scales_sq, maps_sq = stored_moments(tensors.exp_avg_sq)
    params, grads = tensors.params, tensors.grads
    lists = (params, grads, m, v, tensors.lost, scales, maps, scales_sq, maps_sq, tensors.masks, tensors.scalars)
    others = tuple(map(Tensor.data_ptr, itertools.chain.from_iterable(lists[4:])))
    key = (tuple(map(len, lists)), *_identity([*params, *grads, *m, *v]), others)

    def make() -> AdamJob:
        k, device = len(params), params[0].device
        sizes, trained = [p.numel() for p in params], [x.numel() for x in m]
        masked = [bool(mask.numel()) for mask in tensors.masks] or [False] * k
        for n, count, other, has_mask in zip(sizes, trained, map(Tensor.numel, v), masked, strict=True):
            # A kernel takes the size of the parameter for all: a smaller tensor would be read beyond its end.
            if count != other or (count != n and not has_mask):
                raise ValueError(f"a parameter has {n} entries, its moments {count} and {other}")
        main = [*map(pointers, (params, grads, m, v)), _pointers(tensors.lost, k)]
        # Scales, maps and masks are read entry by entry and need no alignment.
        coded = [*_coded(m, scales, maps), *_coded(v, scales_sq, maps_sq), _pointers(tensors.masks, k)]
        keys = [
            (p.dtype, g.dtype, x.dtype, y.dtype, fits, has_mask)
            for p, g, x, y, fits, has_mask in zip(params, grads, m, v, aligned(main, sizes), masked, strict=True)
        ]
        plan = Plan.of([chunks_of(n) for n in sizes], keys, [sizes, trained], device)
        scalars = pointers(tensors.scalars)
        rows = [scalars[i : i + k] for i in range(0, len(scalars), k)]
        partial, facts = _floats(params[0], 4, plan.chunks), _floats(params[0], 4, k)
        factors = _floats(params[0], len(ADAM_ROWS), k)
        starts = torch.empty(plan.chunks, dtype=torch.int64, device=device) if any(masked) else None
        return AdamJob(plan, addresses([*main, *coded, *rows], device), partial, facts, factors, starts)

    return _remembered(key, params[0].device, make)


@dataclass(frozen=True, slots=True)
class ScaleJob:
    """A job of SCALE's matrices ``[rows, length]``; a tensor of more dimensions is [dimension 0, rest], as in the plain
    code."""

    measuring: Plan
    """``dims``: rows, length, then for sums over columns the first entry in ``sums`` and in ``divisors``."""
    gradients: Tensor
    updating: Plan
    """``dims``: rows, length, rows per chunk."""
    at: Tensor
    """Addresses as `row_chunks` takes them."""
    averaging: Plan | None
    averages: Tensor | None
    """Addresses as `average_chunks` takes them; None without momentum."""
    partial: Tensor
    directions: Tensor
    numbers: Tensor
    sums: Tensor | None
    """fp64 ``[groups, length]`` of each tensor, one after the other; None where rows are divided."""
    divisors: Tensor | None
    """fp32, ``[length]`` of each tensor."""


def scale_job(tensors: StepTensors, columns: bool, given: list[Tensor] | None = None) -> ScaleJob:
    """The job of these matrices, remembered while they stay where they are. ``given``: divisors, instead of those of
    the job."""
    params, grads, device = tensors.params, tensors.grads, tensors.params[0].device
    exp_avg, scales, maps = stored_moments(tensors.exp_avg)
    lists = (params, grads, exp_avg, tensors.lost, scales, maps, given or [])
    key = (
        columns,
        tuple(map(len, lists)),
        tuple(map(Tensor.data_ptr, itertools.chain.from_iterable(lists))),
        tuple([x.shape for x in itertools.chain(params, grads)]),
        tuple([x.dtype for x in itertools.chain(params, grads, exp_avg)]),
    )

    def make() -> ScaleJob:
        k = len(params)
        shapes = [(p.shape[0], math.prod(p.shape[1:])) for p in params]
        heights, lengths = [rows for rows, _ in shapes], [length for _, length in shapes]
        sums = divisors = averaging = averages = None
        divisor_pointers = pointers(given) if given else [0] * k
        if columns:
            measuring, parts = _column_plan(grads)
            sums = torch.empty(parts, dtype=torch.float64, device=device)
            divisors = _floats(params[0], 1, sum(lengths))[0]
            places = itertools.accumulate([0, *lengths[:-1]])
            divisor_pointers = [divisors.data_ptr() + 4 * place for place in places]
        else:
            measuring, _ = _flat_plan(grads)
        coded = _coded(exp_avg, scales, maps) if exp_avg else [[0] * k] * 2
        if exp_avg:
            main, sizes = [pointers(exp_avg), pointers(grads)], [g.numel() for g in grads]
            alike = [(m.dtype, g.dtype, fits) for m, g, fits in zip(exp_avg, grads, aligned(main, sizes), strict=True)]
            averaging = Plan.of([chunks_of(n) for n in sizes], alike, [sizes], device)
            averages = addresses([*main, *coded], device)
        sources = exp_avg or grads
        main = [pointers(params), pointers(sources), _pointers(tensors.lost, k)]
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
        updating = Plan.of(counts, keys, [heights, lengths, rows_per_chunk], device)
        at = addresses([main[0], main[1], divisor_pointers, main[2], *coded], device)
        partial, numbers = _floats(params[0], 2, measuring.chunks), _floats(params[0], len(SCALE_ROWS), k)
        directions, gradients = _floats(params[0], 1, updating.chunks), addresses([pointers(grads)], device)
        return ScaleJob(
            measuring, gradients, updating, at, averaging, averages, partial, directions, numbers, sums, divisors
        )

    return _remembered(key, device, make)


J = TypeVar("J")
_jobs: collections.OrderedDict[Any, Any] = collections.OrderedDict()
_tables: collections.OrderedDict[Any, Any] = collections.OrderedDict()


def _remembered(key: tuple[Any, ...], device: torch.device, make: Callable[[], J]) -> J:
    """The job of ``key``, made where there is none. The last 64 are kept, for as many buckets. A job of SCALE has
    memory of its own (0.8 % of the gradients), and gradients at other addresses make another job."""
    return _looked_up(_jobs, 64, key, device, make)


def _known(key: tuple[Any, ...], device: torch.device, make: Callable[[], J]) -> J:
    """The same for jobs that are tables alone, some KB each: `stabilize` steps a large model in many turns, of which
    each has two."""
    return _looked_up(_tables, TABLES, key, device, make)


def _looked_up(
    cache: collections.OrderedDict[Any, Any],
    most: int,
    key: tuple[Any, ...],
    device: torch.device,
    make: Callable[[], J],
) -> J:
    # As for tables: a captured graph has jobs of its own, which stay alive as long as its memory.
    if capturing(device):
        return make()
    key = (device, stream(device), *key)
    try:
        job: J = cache[key]
        cache.move_to_end(key)
    except KeyError:
        job = cache[key] = make()
        if len(cache) > most:
            cache.popitem(last=False)
    return job


def _identity(tensors: list[Tensor]) -> tuple[tuple[Any, ...], ...]:
    """What tables of these tensors depend on. `p.data` may be replaced by another tensor at the same address, so sizes
    and dtypes belong to it."""
    sizes, dtypes = tuple(map(Tensor.numel, tensors)), tuple([x.dtype for x in tensors])
    return tuple(map(Tensor.data_ptr, tensors)), sizes, dtypes


# ---- whole steps ----


def _device_of(x: Tensor) -> torch.cuda.device:
    """Launches go to the current device: make it that of ``x``. Nothing for a CPU tensor (Triton's interpreter)."""
    return torch.cuda.device(x.get_device() if x.is_cuda else -1)


def adam_step_(tensors: StepTensors, options: Tensor, stable: bool, capped: bool, zero_history: bool) -> Tensor:
    """A whole step of Adam, SPAM or Stable-SPAM, in place: four launches, or six with ``stable``, for tensors that are
    alike. ``options``: values of `STEP_OPTIONS`, fp64 on the device. Returns `STATS`, fp32 ``[8, k]``.

    Moves 32 bytes per entry in fp32: 4 to measure the gradient and 28 to update.
    """
    with _device_of(options):
        job, k = adam_job(tensors), len(tensors.params)
        plan, stats = job.plan, _floats(options, len(STATS), k)
        chunks, width, sizes = (plan.first_chunk, plan.chunk_count, job.partial), plan.chunks, plan.dims[0]
        _measure(plan, job.gradients, k, job.partial)
        if stable:
            numbers.adam_limits[(k,)](
                *chunks, width, job.scalars, options, job.facts, k, TILE=TOTALS_TILE, **OPTIONS
            )  # fmt: skip
            after = job.partial[2:]
            _clip_norms(plan, job.gradients, k, job.partial, job.facts[2], job.facts[3], after)
        numbers.adam_numbers[(k,)](
            plan.first_chunk, plan.chunk_count, after if stable else job.partial, width, job.facts, job.scalars,
            options, sizes, job.numbers, stats, k,
            STABLE=stable, TILE=TOTALS_TILE, **OPTIONS,
        )  # fmt: skip
        adam_update_(job, tensors, job.numbers, capped, zero_history)
        numbers.adam_report[(k,)](
            *chunks, width, plan.dims[1], stats, k, CAPPED=capped, TILE=TOTALS_TILE, **OPTIONS
        )  # fmt: skip
        return stats


def adam_update_(job: AdamJob, tensors: StepTensors, table: Tensor, capped: bool, zero_history: bool) -> None:
    """Update parameters and moments in place by ``table``, `ADAM_ROWS`, fp32 ``[16, k]``. Writes rows of
    ``job.partial``: the norm of the update, and where ``capped`` the norm after clipping by history and the number of
    entries clipped so. Reads gradients, parameters and moments once, and writes the latter two once.
    """
    plan, k, noise = job.plan, len(tensors.params), _stacked(tensors.seeds, table)
    starts = plan.tensor_of if job.starts is None else job.starts
    if job.starts is not None:
        for group in plan.groups:
            if group.key[-1]:
                flat.mask_counts[(group.chunks,)](
                    plan.tensor_of, plan.first_chunk, plan.dims, job.at, group.first, k, starts, CHUNK=CHUNK, **OPTIONS
                )
        flat.mask_starts[(k,)](plan.first_chunk, plan.chunk_count, starts, TILE=TOTALS_TILE, **OPTIONS)
    for group in plan.groups:
        p, g, m, v, fits, masked = group.key
        flat.adam_chunks[(group.chunks,)](
            plan.tensor_of, plan.first_chunk, plan.dims, job.at, group.first, k, plan.chunks, table, noise,
            starts, job.partial,
            P=TYPES[p], G=TYPES[g], M=TYPES[m], V=TYPES[v], ALIGNED=_neighbours(fits, p, g, m, v), MASKED=masked,
            **_rounding(p, tensors.lost, tensors.seeds),
            CAPPED=capped, ZERO_HISTORY=zero_history, CHUNK=CHUNK, TILE=_adam_tile(capped), **OPTIONS,
        )  # fmt: skip


def _adam_tile(capped: bool) -> int:
    """Entries in flight: half as many where SPAM clips, whose sums would take the registers of another program. A block
    of 256 codes is not divided."""
    return max(TILE // 2, 256) if capped else TILE


def scale_step_(tensors: StepTensors, options: Tensor, rms: bool, columns: bool, floor: float) -> Tensor:
    """A whole step of SCALE's matrices, in place: four to six launches for matrices that are alike. ``options``:
    values of `SCALE_OPTIONS`, fp64 on the device. Returns `STATS`, fp32 ``[8, k]``.
    """
    with _device_of(options):
        job, k = scale_job(tensors, columns), len(tensors.params)
        stats, measuring, updating = _floats(options, len(STATS), k), job.measuring, job.updating
        # A row's norm is taken by the program that updates the row. A column's is known only once all rows are read,
        # so columns are summed in the pass that measures.
        if columns:
            scale_columns(job, k, rms, floor)
        else:
            _measure(measuring, job.gradients, k, job.partial)
        numbers.scale_numbers[(k,)](
            measuring.first_chunk, measuring.chunk_count, job.partial, measuring.chunks, options, updating.dims[1],
            job.numbers, stats, k, RMS=rms and not columns, TILE=TOTALS_TILE, **OPTIONS,
        )  # fmt: skip
        scale_update_(job, tensors, job.numbers, columns, floor)
        numbers.scale_report[(k,)](
            updating.first_chunk, updating.chunk_count, job.directions, options, updating.dims[1], updating.dims[0],
            stats, k, TILE=TOTALS_TILE, **OPTIONS,
        )  # fmt: skip
        return stats


def scale_columns(job: ScaleJob, k: int, rms: bool, floor: float) -> None:
    """Measure gradients and take the norms of their columns: ``job.partial``, ``job.sums``, ``job.divisors``."""
    plan = job.measuring
    for group in plan.groups:
        dtype, w, fits = group.key
        matrices.column_chunks[(group.chunks,)](
            plan.tensor_of, plan.first_chunk, plan.dims, job.gradients, group.first, k, plan.chunks,
            job.partial, job.sums,
            G=TYPES[dtype], ALIGNED=_neighbours(fits, dtype), W=w, ROWS=TILE // w, PER=COLUMN_ROWS, **OPTIONS,
        )  # fmt: skip
    for group in plan.groups:
        _, w, _ = group.key
        matrices.column_norms[(group.chunks,)](
            plan.tensor_of, plan.first_chunk, plan.dims, group.first, k, job.sums, job.divisors, floor,
            RMS=rms, W=w, ROWS=TILE // w, PER=COLUMN_ROWS, **OPTIONS,
        )  # fmt: skip


def scale_update_(job: ScaleJob, tensors: StepTensors, table: Tensor, columns: bool, floor: float) -> None:
    """Update averages and parameters in place by ``table``, `SCALE_ROWS`, fp32 ``[7, k]``. Writes ``job.directions``:
    the norm of the normalised entries of each chunk.
    """
    k, noise = len(tensors.params), _stacked(tensors.seeds, table)
    # The average has to be complete before a row of it is measured, hence a launch of its own before, on the same
    # stream.
    if (plan := job.averaging) is not None:
        for group in plan.groups:
            m, g, fits = group.key
            flat.average_chunks[(group.chunks,)](
                plan.tensor_of, plan.first_chunk, plan.dims, job.averages, group.first, k, table,
                M=TYPES[m], G=TYPES[g], ALIGNED=_neighbours(fits, m, g), CHUNK=CHUNK, TILE=TILE, **OPTIONS,
            )  # fmt: skip
    plan = job.updating
    for group in plan.groups:
        p, s, w, fits = group.key
        matrices.row_chunks[(group.chunks,)](
            plan.tensor_of, plan.first_chunk, plan.dims, job.at, group.first, k, table, noise, floor, job.directions,
            P=TYPES[p], S=TYPES[s], AVERAGED=job.averaging is not None, COLUMNS=columns,
            ALIGNED=_neighbours(fits, p, s),
            **_rounding(p, tensors.lost, tensors.seeds), W=w, TILE=TILE, **OPTIONS,
        )  # fmt: skip


# ---- reading gradients outside of a step ----


def measure(grads: list[Tensor]) -> tuple[Tensor, tuple[Any, ...]]:
    """Largest entries and norms of tensors, fp32 ``[2, k]``, and what `clip_norms` takes. Reads gradients."""
    with _device_of(grads[0]):
        plan, at = _flat_plan(grads)
        partial = _floats(grads[0], 2, plan.chunks)
        _measure(plan, at, len(grads), partial)
        return _totals(plan, partial, maxima=1, norms=1, sums=0), (partial, plan, at)


def clip_norms(grads: list[Tensor], known: tuple[Any, ...], limit: Tensor, rescale: Tensor) -> Tensor:
    """fp32 ``[2, k]``: norms after clipping and numbers of clipped entries. ``known``: from `measure` of the same
    gradients; ``limit`` and ``rescale``: ``[k]``. Reads the chunks of gradients that have an entry above the limit.
    """
    with _device_of(grads[0]):
        measured, plan, at = known  # of chunks [2, chunks]
        partial = _floats(grads[0], 2, plan.chunks)
        limits, rescales = limit.float().contiguous(), rescale.float().contiguous()
        _clip_norms(plan, at, len(grads), measured, limits, rescales, partial)
        return _totals(plan, partial, maxima=0, norms=1, sums=1)


def transformed_(out: list[Tensor], grads: list[Tensor], numbers: Tensor, columns: Sequence[int]) -> None:
    """``out`` <- gradients limited and scaled by ``numbers``, fp32 ``[3, width]``: gain, limit, reduced gain.
    ``columns``: the column of each gradient there."""
    device = numbers.device

    def make() -> tuple[Plan, Tensor]:
        main, sizes = [pointers(out), pointers(grads)], [g.numel() for g in grads]
        keys = [(o.dtype, g.dtype, fits) for o, g, fits in zip(out, grads, aligned(main, sizes), strict=True)]
        return Plan.of([chunks_of(n) for n in sizes], keys, [sizes, list(columns)], device), addresses(main, device)

    with _device_of(numbers):
        plan, at = _known((transformed_, tuple(columns), *_identity([*out, *grads])), device, make)
        table, width = numbers.float().contiguous(), numbers.shape[1]
        for group in plan.groups:
            o, g, fits = group.key
            flat.transformed_chunks[(group.chunks,)](
                plan.tensor_of, plan.first_chunk, plan.dims, at, group.first, len(out), table, width,
                D=TYPES[o], G=TYPES[g], ALIGNED=_neighbours(fits, o, g), CHUNK=CHUNK, TILE=TILE, **OPTIONS,
            )  # fmt: skip


# ---- numbers of transforms before another optimizer ----


def adaclip(peak: Tensor, gain: Tensor, ema: Tensor, n: Tensor, settings: Tensor) -> Tensor:
    """See `TritonKernels.adaclip`. Vectors are fp32 ``[k]`` and contiguous, ``settings`` fp64."""
    with _device_of(peak):
        k, out = len(peak), _floats(peak, 3, len(peak))
        numbers.adaclip_limits[(k,)](peak, gain, ema, n, settings, out, k, **OPTIONS)
        return out


def adagn(
    raw: Tensor, norm: Tensor, gain: Tensor, ema: Tensor, rms: Tensor, n: Tensor, flags: Tensor, settings: Tensor
) -> tuple[Tensor, Tensor]:
    """See `TritonKernels.adagn`. Vectors are fp32 ``[k]`` and contiguous, ``flags`` bool, ``settings`` fp64."""
    with _device_of(gain):
        k, out, finite = len(gain), _floats(gain, 3, len(gain)), torch.empty_like(flags)
        numbers.adagn_gains[(k,)](raw, norm, gain, ema, rms, n, flags, settings, out, finite, k, **OPTIONS)
        return out, finite


def scalars(tensors: list[Tensor]) -> Tensor:
    """Addresses of tensors, int64 ``[n]``."""
    return addresses([pointers(tensors)], tensors[0].device)[0]


def read_scalars(at: Tensor) -> Tensor:
    """See `TritonKernels.read`."""
    with _device_of(at):
        n, out = at.numel(), torch.empty(at.shape, dtype=torch.float32, device=at.device)
        numbers.read_scalars[(-(-n // SCALARS_TILE),)](at, out, n, TILE=SCALARS_TILE, **OPTIONS)
        return out


def keep_scalars(at: Tensor, new: Tensor, finite: Tensor) -> None:
    """See `TritonKernels.keep`."""
    with _device_of(at):
        n = at.numel()
        numbers.keep_scalars[(-(-n // SCALARS_TILE),)](
            at, new, finite, n, len(finite), TILE=SCALARS_TILE, **OPTIONS
        )  # fmt: skip


# ---- undoing a step of another optimizer ----


@dataclass(frozen=True, slots=True)
class Saved:
    """Copies of some tensors, made where their flag was False, and all that is needed to write them back."""

    flags: Tensor
    plan: Plan
    """``dims [2, tensors]``: bytes, and number of the flag."""
    at: Tensor
    """Where the copies begin in ``copies``, and addresses of the tensors."""
    copies: Tensor
    """uint8: room for all copies, one after the other. Other entries are never written."""
    pointers: list[int]
    """Addresses of all tensors that were given."""
    left_out: list[int]
    """Numbers of the tensors among them that are not served: on another device, or not contiguous."""


def save_unless(flags: Tensor, places: list[int], tensors: list[Tensor]) -> Saved:
    """See `TritonKernels.save_unless`."""
    sizes, at_now, device = [x.nbytes for x in tensors], pointers(tensors), flags.device

    def make() -> tuple[Plan, Tensor, int, list[int]]:
        mine = [i for i, x in enumerate(tensors) if x.device == device and x.is_contiguous()]
        counts, of_flags = [sizes[i] for i in mine], [places[i] for i in mine]
        # Copies begin at multiples of 64 bytes.
        begins = list(itertools.accumulate([-(-n // 64) * 64 for n in counts], initial=0))
        # Chunks of as many bytes as a chunk of fp32 entries has. One launch serves all, byte by byte: it is rare that
        # anything is copied.
        plan = Plan.of([-(-n // (4 * CHUNK)) for n in counts], [()] * len(mine), [counts, of_flags], device)
        at = addresses([begins[:-1], [at_now[i] for i in mine]], device)
        return plan, at, begins[-1], sorted(set(range(len(tensors))) - set(mine))

    with _device_of(flags):
        # A tensor that has become another view of the same bytes is served as before: they are copied in their order.
        key = save_unless, tuple(places), tuple(sizes), tuple(at_now)
        plan, at, size, left_out = _known(key, device, make)
        copies = torch.empty(size, dtype=torch.uint8, device=device)
        saved = Saved(flags, plan, at, copies, at_now, left_out)
        _copy(saved, back=False)
        return saved


def restore_unless(saved: Saved) -> None:
    """See `TritonKernels.restore_unless`."""
    with _device_of(saved.flags):
        _copy(saved, back=True)


def _copy(saved: Saved, back: bool) -> None:
    plan = saved.plan
    for group in plan.groups:
        flat.copy_chunks[(group.chunks,)](
            plan.tensor_of, plan.first_chunk, plan.dims, saved.at, group.first, plan.first_chunk.numel(), saved.flags,
            saved.copies, BACK=back, CHUNK=4 * CHUNK, TILE=4 * TILE, **OPTIONS,
        )  # fmt: skip


# ---- what the launches share ----


def _measure(plan: Plan, gradients: Tensor, k: int, partial: Tensor) -> None:
    """Rows 0 and 1 of ``partial``: largest entry and norm of each chunk. ``gradients``: addresses in row 0."""
    for group in plan.groups:
        dtype, fits = _read_key(group)
        flat.measure_chunks[(group.chunks,)](
            plan.tensor_of, plan.first_chunk, plan.dims, gradients, group.first, k, plan.chunks, partial,
            G=TYPES[dtype], ALIGNED=_neighbours(fits, dtype), CHUNK=CHUNK, TILE=TILE, **OPTIONS,
        )  # fmt: skip


def _clip_norms(
    plan: Plan, gradients: Tensor, k: int, known: Tensor, limits: Tensor, rescales: Tensor, partial: Tensor
) -> None:
    for group in plan.groups:
        dtype, fits = _read_key(group)
        flat.clip_chunks[(group.chunks,)](
            plan.tensor_of, plan.first_chunk, plan.dims, gradients, group.first, k, plan.chunks, known,
            limits, rescales, partial,
            G=TYPES[dtype], ALIGNED=_neighbours(fits, dtype), CHUNK=CHUNK, TILE=TILE, **OPTIONS,
        )  # fmt: skip


def _neighbours(fits: bool, *dtypes: torch.dtype) -> int:
    """The number of neighbouring entries that a thread moves at once, 16 bytes of the widest dtype; 0 where addresses
    or sizes do not allow it."""
    return 16 // max(dtype.itemsize for dtype in dtypes) if fits else 0


def _read_key(group: Group) -> tuple[torch.dtype, bool]:
    """Dtype and alignment of the gradients of a group, by the plan of an `AdamJob` or of `_flat_plan`."""
    return (group.key[1], group.key[4]) if len(group.key) > 2 else group.key


def _flat_plan(grads: list[Tensor]) -> tuple[Plan, Tensor]:
    """The plan of kernels that only read gradients, and the addresses ``[1, k]``."""
    device = grads[0].device

    def make() -> tuple[Plan, Tensor]:
        main, sizes = [pointers(grads)], [g.numel() for g in grads]
        keys = [(g.dtype, fits) for g, fits in zip(grads, aligned(main, sizes), strict=True)]
        return Plan.of([chunks_of(n) for n in sizes], keys, [sizes], device), addresses(main, device)

    return _known((_flat_plan, *_identity(grads)), device, make)


def _column_plan(grads: list[Tensor]) -> tuple[Plan, int]:
    """The plan of `column_chunks`, and the number of entries of its ``sums``."""
    shapes = [(g.shape[0], math.prod(g.shape[1:])) for g in grads]
    lengths = [length for _, length in shapes]
    # A chunk is a group of COLUMN_ROWS rows by up to COLUMN_TILE columns.
    groups = [-(-rows // COLUMN_ROWS) for rows, _ in shapes]
    widths = [min(triton.next_power_of_2(max(length, 1)), COLUMN_TILE) for length in lengths]
    counts = [group * -(-length // w) for group, length, w in zip(groups, lengths, widths, strict=True)]
    keys = list(zip([g.dtype for g in grads], widths, aligned([pointers(grads)], lengths), strict=True))
    # `sums` holds [groups, length] of each tensor, one after the other; `divisors` holds [length] of each.
    parts = [group * length for group, length in zip(groups, lengths, strict=True)]
    places, divisors = (list(itertools.accumulate([0, *x[:-1]])) for x in (parts, lengths))
    heights = [rows for rows, _ in shapes]
    return Plan.of(counts, keys, [heights, lengths, places, divisors], grads[0].device), sum(parts)


def _totals(plan: Plan, partial: Tensor, *, maxima: int, norms: int, sums: int) -> Tensor:
    """Results of tensors ``[rows, k]`` from those of chunks ``[rows, chunks]``; maxima come first, then norms, sums."""
    k = plan.first_chunk.numel()
    out = _floats(partial, maxima + norms + sums, k)
    # One program per tensor. A tensor without chunks gets zeros.
    numbers.totals[(k,)](
        plan.first_chunk, plan.chunk_count, partial, plan.chunks, out, k,
        MAXIMA=maxima, NORMS=norms, SUMS=sums, TILE=TOTALS_TILE, **OPTIONS,
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
