"""Triton kernels that treat tensors as row-major matrices ``[dimension 0, rest]``: SCALE's step, sums over columns.

SCALE (arXiv:2506.16659): p <- p (1 - lr wd) - lr g / ||g||, with the norm of each row (or of each column, for the
embedding) of the gradient g, or of its average m where the matrix has momentum.

The arguments are those of triton_flat.py, but chunks are groups of rows, and ``dims`` is ``[3, k]``. A tile is
``TILE // W`` rows by ``W`` columns, where ``W`` is the power of two at or above the length of a row, at most ``TILE``:
short rows share a tile, long ones take several.
"""

import triton.language as tl

from evenstep.kernels.triton_flat import RATE, RATE_FINITE, RATE_GAIN, RATE_ROOT, RATE_SHRINK
from evenstep.kernels.triton_math import (
    LARGEST,
    add_squares,
    cleaned,
    device_function,
    kernel,
    norm_of,
    open_moment,
    pointer,
    read,
    write,
)


@device_function
def source(
    p: tl.tensor, scale: tl.tensor, map: tl.tensor, offsets: tl.tensor, inside: tl.tensor, gain: tl.tensor,
    S: tl.constexpr, AVERAGED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The tile that is normalised, in fp32: of the average gradient m, or of the gradient itself."""
    if AVERAGED:
        return open_moment(p, scale, map, offsets, inside, S)
    else:
        return cleaned(read(p, offsets, inside) * gain)


@kernel
def row_chunks(
    tensor_of: tl.tensor, first_chunk: tl.tensor, dims: tl.tensor, addresses: tl.tensor,
    base: tl.tensor, k: tl.tensor, numbers: tl.tensor, seeds: tl.tensor, floor: tl.tensor, out: tl.tensor,
    P: tl.constexpr, S: tl.constexpr, AVERAGED: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
    KAHAN: tl.constexpr, STOCHASTIC: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """SCALE's update of the parameter; ``out [chunks]``: 2-norm of the chunk's normalised entries.

    ``dims``: rows, length of a row, rows per chunk. ``addresses``: parameter (written), source (average or gradient),
    divisors (fp32, one per column; 0 where rows are divided by their own norms), compensation (written), then scales
    and map of a coded source.
    """
    ROWS: tl.constexpr = TILE // W  # rows of a tile
    chunk = base + tl.program_id(0)
    i = tl.load(tensor_of + chunk)
    number = numbers + i
    # A gradient that is not finite leaves the parameter as it is: no rows.
    rows = tl.where(tl.load(number + RATE_FINITE * k) != 0, tl.load(dims + i), 0)
    length, per = tl.load(dims + k + i), tl.load(dims + 2 * k + i)
    length = tl.multiple_of(length, 16) if ALIGNED else length
    p, s = pointer(addresses, 0, k, i, P, ALIGNED), pointer(addresses, 1, k, i, S, ALIGNED)
    divisors = pointer(addresses, 2, k, i, tl.float32, False)
    lost = pointer(addresses, 3, k, i, P, ALIGNED)
    scale, map = pointer(addresses, 4, k, i, tl.float32, False), pointer(addresses, 5, k, i, tl.float32, False)
    gain, rate = tl.load(number + RATE_GAIN * k), tl.load(number + RATE * k)
    shrink, root = tl.load(number + RATE_SHRINK * k), tl.load(number + RATE_ROOT * k)
    seed = tl.load(seeds + i) if STOCHASTIC else 0

    # Tiles are [ROWS, W]; r [ROWS] numbers rows of the matrix, c [W] its columns.
    zero = tl.zeros([ROWS, W], tl.float32)
    total_high, total_middle, total_low = zero, zero, zero
    # The chunk's rows are begin .. begin + per - 1, and no other program writes these.
    begin = (chunk - tl.load(first_chunk + i)) * per
    for row in range(begin, tl.minimum(begin + per, rows), ROWS):
        r = row + tl.arange(0, ROWS)
        r_inside = r < rows
        # First pass over the rows: their norms, size [ROWS, 1]. `length` is int64, and so are products with it.
        if not COLUMNS:
            high, middle, low = zero, zero, zero
            for column in range(0, length, W):
                c = column + tl.arange(0, W)
                inside = r_inside[:, None] & (c < length)[None, :]
                x = source(s, scale, map, r[:, None] * length + c[None, :], inside, gain, S, AVERAGED)
                high, middle, low = add_squares(x, high, middle, low)
            # root = sqrt(length) for the RMS, 1 for the 2-norm. The floor keeps a row of zeros from dividing by 0.
            size = norm_of(tl.sum(high, axis=1), tl.sum(middle, axis=1), tl.sum(low, axis=1))
            size = tl.maximum(tl.div_rn(size, root), floor)[:, None]
        # Second pass: the update. The source comes from cache, except for rows of many MB.
        for column in range(0, length, W):
            c = column + tl.arange(0, W)
            inside = r_inside[:, None] & (c < length)[None, :]
            offsets = r[:, None] * length + c[None, :]
            x = source(s, scale, map, offsets, inside, gain, S, AVERAGED)
            if COLUMNS:  # [1, W]; 1 outside, where 0 / 0 would spoil the norm
                size = tl.load(divisors + c, mask=c < length, other=1.0)[None, :]
            x = tl.div_rn(x, size)
            total_high, total_middle, total_low = add_squares(x, total_high, total_middle, total_low)
            # p <- p (1 - lr wd) - lr x
            exact = read(p, offsets, inside) * shrink - x * rate
            write(p, lost, exact, offsets, offsets, inside, seed, P, KAHAN, STOCHASTIC)
    tl.store(out + chunk, norm_of(tl.sum(total_high), tl.sum(total_middle), tl.sum(total_low)))


@kernel
def column_chunks(
    tensor_of: tl.tensor, first_chunk: tl.tensor, dims: tl.tensor, addresses: tl.tensor,
    base: tl.tensor, k: tl.tensor, width: tl.tensor, out: tl.tensor, sums: tl.tensor,
    G: tl.constexpr, ALIGNED: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, PER: tl.constexpr,
) -> None:  # fmt: skip
    """Measure gradients (``out [2, width]`` as in `measure_chunks`) and sum the squares of their columns.

    A chunk is a group of ``PER`` rows by ``W`` columns. ``sums``, fp64: for each tensor ``[groups, length]``, from
    entry ``dims[2]`` on; `column_norms` adds the groups. ``dims``: rows, length of a row, first entry in ``sums``.
    """
    chunk = base + tl.program_id(0)
    i = tl.load(tensor_of + chunk)
    # int64, and so are all offsets that follow from them.
    rows, length, place = tl.load(dims + i), tl.load(dims + k + i), tl.load(dims + 2 * k + i)
    length = tl.multiple_of(length, 16) if ALIGNED else length
    g = pointer(addresses, 0, k, i, G, ALIGNED)
    # Chunks of a tensor are numbered row-major: the columns of the first group of rows, then those of the second.
    tiles = tl.cdiv(length, W)
    number = chunk - tl.load(first_chunk + i)
    group = number // tiles
    c = (number - group * tiles) * W + tl.arange(0, W)
    peak = tl.zeros([ROWS, W], tl.float32)
    high, middle, low = peak, peak, peak
    # fp64 holds the squares of all fp32 numbers, so columns need no ranges.
    squares = tl.zeros([ROWS, W], tl.float64)
    # Each lane adds every ROWS-th row; `tl.sum` adds the lanes of a column in the end.
    for row in range(group * PER, tl.minimum(group * PER + PER, rows), ROWS):
        r = row + tl.arange(0, ROWS)
        x = read(g, r[:, None] * length + c[None, :], (r < rows)[:, None] & (c < length)[None, :])
        a = tl.abs(x)
        a = tl.where(a <= LARGEST, a, float("inf"))  # NaN too, which `maximum` may drop
        peak = tl.maximum(peak, a)
        high, middle, low = add_squares(a, high, middle, low)
        exact = a.to(tl.float64)
        squares += exact * exact
    tl.store(out + chunk, tl.max(peak))
    tl.store(out + width + chunk, norm_of(tl.sum(high), tl.sum(middle), tl.sum(low)))
    # Each group of rows has entries of its own in `sums`: no two programs write the same one.
    tl.store(sums + place + group * length + c, tl.sum(squares, axis=0), mask=c < length)


@kernel
def column_norms(
    tensor_of: tl.tensor, first_chunk: tl.tensor, dims: tl.tensor, base: tl.tensor, k: tl.tensor,
    sums: tl.tensor, divisors: tl.tensor, floor: tl.tensor,
    RMS: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, PER: tl.constexpr,
) -> None:  # fmt: skip
    """The norms of columns from the ``sums`` of `column_chunks`: ``divisors``, fp32, from entry ``dims[3]`` on for each
    tensor. The programs are those of `column_chunks`; those of the first group of rows add ``W`` columns each.
    """
    chunk = base + tl.program_id(0)
    i = tl.load(tensor_of + chunk)
    rows, length, place = tl.load(dims + i), tl.load(dims + k + i), tl.load(dims + 2 * k + i)
    number = chunk - tl.load(first_chunk + i)
    c = number * W + tl.arange(0, W)
    inside = c < tl.where(number < tl.cdiv(length, W), length, 0)
    groups = tl.where(number < tl.cdiv(length, W), tl.cdiv(rows, PER), 0)
    squares = tl.zeros([ROWS, W], tl.float64)
    for group in range(0, groups, ROWS):
        r = group + tl.arange(0, ROWS)
        at = place + r[:, None] * length + c[None, :]
        squares += tl.load(sums + at, mask=(r < groups)[:, None] & inside[None, :], other=0.0)
    size = tl.sqrt(tl.sum(squares, axis=0)).to(tl.float32)
    if RMS:  # ||x|| / sqrt(rows)
        size = tl.div_rn(size, tl.sqrt_rn(tl.maximum(rows, 1).to(tl.float32)))
    tl.store(divisors + tl.load(dims + 3 * k + i) + c, tl.maximum(size, floor), mask=inside)
