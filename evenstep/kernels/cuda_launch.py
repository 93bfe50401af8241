"""The host's side of the Triton kernels: which tensors, in which groups, with which tables. Imports triton.

Functions here take plain tensors (no subclasses), all on one device and contiguous; `evenstep.kernels.cuda` sees to it.
Where a list holds moments, those of torchao's 8 bits are its uint8 codes, and ``scales`` and ``maps`` have an entry for
each of them, in order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from evenstep.kernels import cuda_tables as tables
from evenstep.kernels import triton_flat as flat
from evenstep.kernels import triton_rows as matrices
from evenstep.kernels.cuda_tables import Plan, addresses, aligned, chunks_of, pointers

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


def measure(grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Largest entries and norms of tensors ``[2, k]`` and of their chunks ``[2, chunks]``."""
    with torch.cuda.device_of(grads[0]):
        plan, at, k = _flat_plan(grads)
        found = _numbers(grads[0], 2, plan.chunks)
        for group in plan.groups:
            dtype, fits = group.key
            flat.measure_chunks[(group.chunks,)](
                plan.owners, plan.firsts, plan.facts, at, group.first, k, plan.chunks, found,
                G=TYPES[dtype], ALIGNED=fits, CHUNK=tables.CHUNK, TILE=tables.TILE, **OPTIONS,
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
                G=TYPES[dtype], ALIGNED=fits, CHUNK=tables.CHUNK, TILE=tables.TILE, **OPTIONS,
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
                CAPPED=capped, ZERO_HISTORY=zero_history, CHUNK=tables.CHUNK, TILE=tables.TILE, **OPTIONS,
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
        widths = [min(triton.next_power_of_2(max(length, 1)), tables.TILE) for length in lengths]
        per = [
            max(tables.CHUNK // max(length, 1) * w // tables.TILE, 1) * (tables.TILE // w)
            for length, w in zip(lengths, widths, strict=True)
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
                **_rounding(p, lost, seeds), W=w, TILE=tables.TILE, **OPTIONS,
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
            M=TYPES[m], G=TYPES[g], ALIGNED=fits, CHUNK=tables.CHUNK, TILE=tables.TILE, **OPTIONS,
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
                G=TYPES[dtype], ALIGNED=fits, W=w, ROWS=tables.TILE // w, PER=COLUMN_ROWS, **OPTIONS,
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
                D=TYPES[o], G=TYPES[g], ALIGNED=fits, CHUNK=tables.CHUNK, TILE=tables.TILE, **OPTIONS,
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
        MAXIMA=maxima, NORMS=norms, SUMS=sums, TILE=tables.TILE, **OPTIONS,
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
