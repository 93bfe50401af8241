"""Triton kernels that see tensors as matrices (dimension 0, rest): SCALE's step and sums over columns.

A program takes some rows, in tiles of ``TILE // W`` rows by ``W`` columns, where ``W`` is the power of two at or above
the length of a row, at most `TILE`: short rows share a tile, long ones take several. A row is read twice, the second
time from cache.
"""

import triton
import triton.language as tl

from evenstep.kernels.interface import SCALE_ROWS
from evenstep.kernels.triton_flat import RATE_FINITE, RATE_GAIN, TABLES, VARYING
from evenstep.kernels.triton_math import LARGEST, add_squares, cleaned, norm_of, opened, pointer, read, write

RATE = tl.constexpr(SCALE_ROWS.index("rate"))
SHRINK = tl.constexpr(SCALE_ROWS.index("shrink"))
ROOT = tl.constexpr(SCALE_ROWS.index("root"))


@triton.jit
def source(p, scale, map, offsets, inside, gain, S: tl.constexpr, AVERAGED: tl.constexpr):
    """What gets normalised: the average gradient, or the gradient itself."""
    if AVERAGED:
        return opened(p, scale, map, offsets, inside, S)
    else:
        return cleaned(read(p, offsets, inside) * gain)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=TABLES)
def row_chunks(
    owners, firsts, facts, at, base, k, numbers, seeds, floor, out,
    P: tl.constexpr, S: tl.constexpr, AVERAGED: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
    KAHAN: tl.constexpr, STOCHASTIC: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``facts``: rows, length of a row, rows per chunk. ``at``: parameter, source, divisors, compensation, then scale
    and map of a coded source. ``out [chunks]``: norm of the normalised entries.
    """
    ROWS: tl.constexpr = TILE // W
    chunk = base + tl.program_id(0)
    i = tl.load(owners + chunk)
    number = numbers + i
    rows = tl.where(tl.load(number + RATE_FINITE * k) != 0, tl.load(facts + i), 0)
    length, per = tl.load(facts + k + i), tl.load(facts + 2 * k + i)
    length = tl.multiple_of(length, 16) if ALIGNED else length
    p, s = pointer(at, 0, k, i, P, ALIGNED), pointer(at, 1, k, i, S, ALIGNED)
    divisors = pointer(at, 2, k, i, tl.float32, False)
    lost = pointer(at, 3, k, i, P, ALIGNED)
    scale, map = pointer(at, 4, k, i, tl.float32, False), pointer(at, 5, k, i, tl.float32, False)
    gain, rate = tl.load(number + RATE_GAIN * k), tl.load(number + RATE * k)
    shrink, root = tl.load(number + SHRINK * k), tl.load(number + ROOT * k)
    seed = tl.load(seeds + i) if STOCHASTIC else 0

    zero = tl.zeros([ROWS, W], tl.float32)
    total_high, total_middle, total_low = zero, zero, zero
    begin = (chunk - tl.load(firsts + i)) * per
    for row in range(begin, tl.minimum(begin + per, rows), ROWS):
        r = row + tl.arange(0, ROWS)
        r_inside = r < rows
        if not COLUMNS:
            high, middle, low = zero, zero, zero
            for column in range(0, length, W):
                c = column + tl.arange(0, W)
                inside = r_inside[:, None] & (c < length)[None, :]
                x = source(s, scale, map, r[:, None] * length + c[None, :], inside, gain, S, AVERAGED)
                high, middle, low = add_squares(x, high, middle, low)
            size = norm_of(tl.sum(high, axis=1), tl.sum(middle, axis=1), tl.sum(low, axis=1))
            size = tl.maximum(tl.div_rn(size, root), floor)[:, None]
        for column in range(0, length, W):
            c = column + tl.arange(0, W)
            inside = r_inside[:, None] & (c < length)[None, :]
            offsets = r[:, None] * length + c[None, :]
            x = source(s, scale, map, offsets, inside, gain, S, AVERAGED)
            if COLUMNS:
                size = tl.load(divisors + c, mask=c < length, other=1.0)[None, :]
            x = tl.div_rn(x, size)
            total_high, total_middle, total_low = add_squares(x, total_high, total_middle, total_low)
            write(p, lost, read(p, offsets, inside) * shrink - x * rate, offsets, inside, seed, P, KAHAN, STOCHASTIC)
    tl.store(out + chunk, norm_of(tl.sum(total_high), tl.sum(total_middle), tl.sum(total_low)))


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=TABLES)
def column_chunks(
    owners, firsts, facts, at, base, k, width, out, sums,
    G: tl.constexpr, ALIGNED: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    """A chunk is ``PER`` rows of ``W`` columns. ``out [2, width]``: largest entry and norm, as `measure_chunks`;
    ``sums``: squares of the chunk's columns in fp64, for each tensor ``[groups of PER rows, length]`` from entry
    ``facts[2]`` on.
    """
    chunk = base + tl.program_id(0)
    i = tl.load(owners + chunk)
    rows, length, place = tl.load(facts + i), tl.load(facts + k + i), tl.load(facts + 2 * k + i)
    length = tl.multiple_of(length, 16) if ALIGNED else length
    g = pointer(at, 0, k, i, G, ALIGNED)
    tiles = tl.cdiv(length, W)
    number = chunk - tl.load(firsts + i)
    group = number // tiles
    c = (number - group * tiles) * W + tl.arange(0, W)
    peak = tl.zeros([ROWS, W], tl.float32)
    high, middle, low = peak, peak, peak
    squares = tl.zeros([ROWS, W], tl.float64)
    for row in range(group * PER, tl.minimum(group * PER + PER, rows), ROWS):
        r = row + tl.arange(0, ROWS)
        x = read(g, r[:, None] * length + c[None, :], (r < rows)[:, None] & (c < length)[None, :])
        a = tl.abs(x)
        a = tl.where(a <= LARGEST, a, float("inf"))
        peak = tl.maximum(peak, a)
        high, middle, low = add_squares(a, high, middle, low)
        exact = a.to(tl.float64)
        squares += exact * exact
    tl.store(out + chunk, tl.max(peak))
    tl.store(out + width + chunk, norm_of(tl.sum(high), tl.sum(middle), tl.sum(low)))
    tl.store(sums + place + group * length + c, tl.sum(squares, axis=0), mask=c < length)
