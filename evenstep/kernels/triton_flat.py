"""Triton kernels that treat tensors as flat: measuring, Adam, an average, and the sums over chunks.

Arguments that all share: a plan's tables (`Plan` in cuda_launch.py), ``at`` the addresses ``[streams, k]``,
``base`` the group's first chunk, ``width`` the number of all chunks.
"""

import triton
import triton.language as tl

from evenstep.kernels.interface import ADAM_ROWS, SCALE_ROWS
from evenstep.kernels.triton_math import LARGEST, add_squares, cleaned, close, norm_of, opened, pointer, read, write

FINITE = tl.constexpr(ADAM_ROWS.index("finite"))
GAIN = tl.constexpr(ADAM_ROWS.index("gain"))
LIMIT = tl.constexpr(ADAM_ROWS.index("limit"))
REDUCED = tl.constexpr(ADAM_ROWS.index("reduced"))
KEEP1 = tl.constexpr(ADAM_ROWS.index("keep1"))
KEEP2 = tl.constexpr(ADAM_ROWS.index("keep2"))
ADD1 = tl.constexpr(ADAM_ROWS.index("add1"))
ADD2 = tl.constexpr(ADAM_ROWS.index("add2"))
STEP_SIZE = tl.constexpr(ADAM_ROWS.index("step_size"))
INVERSE_ROOT2 = tl.constexpr(ADAM_ROWS.index("inverse_root2"))
EPS = tl.constexpr(ADAM_ROWS.index("eps"))
SHRINK = tl.constexpr(ADAM_ROWS.index("shrink"))
SHRINK_AFTER = tl.constexpr(ADAM_ROWS.index("shrink_after"))
AFTER = tl.constexpr(ADAM_ROWS.index("after"))
CAP_FACTOR = tl.constexpr(ADAM_ROWS.index("cap_factor"))
CAP_SPREAD = tl.constexpr(ADAM_ROWS.index("cap_spread"))

RATE_FINITE = tl.constexpr(SCALE_ROWS.index("finite"))
RATE_GAIN = tl.constexpr(SCALE_ROWS.index("gain"))
RATE_KEEP = tl.constexpr(SCALE_ROWS.index("keep"))
RATE_ADD = tl.constexpr(SCALE_ROWS.index("add"))

# Numbers that are not to be compiled in, and tables of int64 whose views begin anywhere.
VARYING = ["base", "width", "k", "n"]
TABLES = [
    "owners",
    "firsts",
    "counts",
    "facts",
    "at",
    "partial",
    "numbers",
    "seeds",
    "out",
    "limits",
    "rescales",
    "known",
]


@triton.jit
def whereabouts(owners, firsts, sizes, base, CHUNK: tl.constexpr, ALIGNED: tl.constexpr):
    """This program's chunk, the tensor that it belongs to, the chunk's place in it, and the tensor's size."""
    chunk = base + tl.program_id(0)
    i = tl.load(owners + chunk)
    n = tl.load(sizes + i)
    n = tl.multiple_of(n, 16) if ALIGNED else n
    return chunk, i, (chunk - tl.load(firsts + i)) * CHUNK, n


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=TABLES)
def measure_chunks(
    owners, firsts, facts, at, base, k, width, out,
    G: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``out [2, width]``: largest absolute entry (Inf where one is not finite) and 2-norm of each chunk."""
    chunk, i, begin, n = whereabouts(owners, firsts, facts, base, CHUNK, ALIGNED)
    g = pointer(at, 0, k, i, G, ALIGNED)
    peak = tl.zeros([TILE], tl.float32)
    high, middle, low = peak, peak, peak
    for start in range(begin, tl.minimum(begin + CHUNK, n), TILE):
        offsets = start + tl.arange(0, TILE)
        a = tl.abs(read(g, offsets, offsets < n))
        a = tl.where(a <= LARGEST, a, float("inf"))
        peak = tl.maximum(peak, a)
        high, middle, low = add_squares(a, high, middle, low)
    tl.store(out + chunk, tl.max(peak))
    tl.store(out + width + chunk, norm_of(tl.sum(high), tl.sum(middle), tl.sum(low)))


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=TABLES)
def clip_chunks(
    owners, firsts, facts, at, base, k, width, known, limits, rescales, out,
    G: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``out [2, width]``: 2-norm of each chunk after clipping, and entries clipped. ``known`` is what `measure_chunks`
    found: a chunk without an entry above the limit is not read.
    """
    chunk, i, begin, n = whereabouts(owners, firsts, facts, base, CHUNK, ALIGNED)
    g = pointer(at, 0, k, i, G, ALIGNED)
    limit, rescale = tl.load(limits + i), tl.load(rescales + i)
    above = tl.load(known + chunk) > limit
    high = tl.zeros([TILE], tl.float32)
    middle, low, count = high, high, high
    for start in range(begin, tl.where(above, tl.minimum(begin + CHUNK, n), begin), TILE):
        offsets = start + tl.arange(0, TILE)
        x = read(g, offsets, offsets < n)
        over = tl.abs(x) > limit
        count += over.to(tl.float32)
        high, middle, low = add_squares(tl.where(over, x * rescale, x), high, middle, low)
    norm = norm_of(tl.sum(high), tl.sum(middle), tl.sum(low))
    tl.store(out + chunk, tl.where(above, norm, tl.load(known + width + chunk)))
    tl.store(out + width + chunk, tl.sum(count))


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=TABLES)
def totals(
    firsts, counts, partial, width, out, k,
    MAXIMA: tl.constexpr, NORMS: tl.constexpr, SUMS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """From chunks to tensors, one program each: ``partial [rows, width]`` -> ``out [rows, k]``; rows of maxima come
    first, then norms, then sums.
    """
    i = tl.program_id(0)
    first, count = tl.load(firsts + i), tl.load(counts + i)
    for row in tl.static_range(MAXIMA + NORMS + SUMS):
        found = partial + row * width + first
        one = tl.zeros([TILE], tl.float32)
        two, three = one, one
        for start in range(0, count, TILE):
            offsets = start + tl.arange(0, TILE)
            x = tl.load(found + offsets, mask=offsets < count, other=0.0)
            if row < MAXIMA:
                one = tl.maximum(one, x)
            elif row < MAXIMA + NORMS:
                one, two, three = add_squares(x, one, two, three)
            else:
                one += x
        if row < MAXIMA:
            total = tl.max(one)
        elif row < MAXIMA + NORMS:
            total = norm_of(tl.sum(one), tl.sum(two), tl.sum(three))
        else:
            total = tl.sum(one)
        tl.store(out + row * k + i, total)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=TABLES)
def adam_chunks(
    owners, firsts, facts, at, base, k, width, numbers, seeds, out,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr, ALIGNED: tl.constexpr,
    KAHAN: tl.constexpr, STOCHASTIC: tl.constexpr, CAPPED: tl.constexpr, ZERO_HISTORY: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`evenstep.optim.functional.adam_step`. ``at``: parameter, gradient, moments, compensation, then scale and map of
    each moment that is coded. ``out [3, width]``: norm of the update, norm after clipping by history, entries clipped
    so.
    """
    chunk, i, begin, n = whereabouts(owners, firsts, facts, base, CHUNK, ALIGNED)
    p, g = pointer(at, 0, k, i, P, ALIGNED), pointer(at, 1, k, i, G, ALIGNED)
    m, v = pointer(at, 2, k, i, M, ALIGNED), pointer(at, 3, k, i, V, ALIGNED)
    lost = pointer(at, 4, k, i, P, ALIGNED)
    m_scale, m_map = pointer(at, 5, k, i, tl.float32, False), pointer(at, 6, k, i, tl.float32, False)
    v_scale, v_map = pointer(at, 7, k, i, tl.float32, False), pointer(at, 8, k, i, tl.float32, False)
    number = numbers + i
    gain, limit, reduced = tl.load(number + GAIN * k), tl.load(number + LIMIT * k), tl.load(number + REDUCED * k)
    keep1, add1 = tl.load(number + KEEP1 * k), tl.load(number + ADD1 * k)
    keep2, add2 = tl.load(number + KEEP2 * k), tl.load(number + ADD2 * k)
    step_size, eps = tl.load(number + STEP_SIZE * k), tl.load(number + EPS * k)
    inverse_root2, after = tl.load(number + INVERSE_ROOT2 * k), tl.load(number + AFTER * k)
    shrink, shrink_after = tl.load(number + SHRINK * k), tl.load(number + SHRINK_AFTER * k)
    cap_factor, cap_spread = tl.load(number + CAP_FACTOR * k), tl.load(number + CAP_SPREAD * k)
    seed = tl.load(seeds + i) if STOCHASTIC else 0

    zero = tl.zeros([TILE], tl.float32)
    high, middle, low = zero, zero, zero
    clipped_high, clipped_middle, clipped_low, count = zero, zero, zero, zero
    end = tl.where(tl.load(number + FINITE * k) != 0, tl.minimum(begin + CHUNK, n), begin)
    for start in range(begin, end, TILE):
        start = tl.multiple_of(start, TILE)
        offsets = start + tl.arange(0, TILE)
        inside = offsets < n
        x, before = read(g, offsets, inside), read(p, offsets, inside)
        x = cleaned(x * tl.where(tl.abs(x) > limit, reduced, gain))
        first = opened(m, m_scale, m_map, offsets, inside, M)
        second = opened(v, v_scale, v_map, offsets, inside, V)
        if CAPPED:
            cap = tl.sqrt_rn(second * cap_factor) + cap_spread
            if not ZERO_HISTORY:
                cap = tl.where(cap == 0, LARGEST, cap)
            clipped = tl.minimum(tl.maximum(x, -cap), cap)
            count += (clipped != x).to(tl.float32)
            x = clipped
            clipped_high, clipped_middle, clipped_low = add_squares(x, clipped_high, clipped_middle, clipped_low)
        first = first * keep1 + x * add1
        second = tl.minimum(second * keep2 + (x * add2) * x, LARGEST)
        update = tl.div_rn(first, tl.sqrt_rn(second) * inverse_root2 + eps) * step_size
        high, middle, low = add_squares(tl.where(inside, update, 0.0), high, middle, low)
        close(m, m_scale, m_map, first * after, start, n, M, True, TILE)
        close(v, v_scale, v_map, second * after, start, n, V, False, TILE)
        write(p, lost, (before * shrink - update) * shrink_after, offsets, inside, seed, P, KAHAN, STOCHASTIC)
    tl.store(out + chunk, norm_of(tl.sum(high), tl.sum(middle), tl.sum(low)))
    if CAPPED:
        norm = norm_of(tl.sum(clipped_high), tl.sum(clipped_middle), tl.sum(clipped_low))
        tl.store(out + width + chunk, norm)
        tl.store(out + 2 * width + chunk, tl.sum(count))


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=TABLES)
def average_chunks(
    owners, firsts, facts, at, base, k, numbers,
    M: tl.constexpr, G: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """SCALE's average gradient. ``at``: average, gradient, scale and map where it is coded."""
    _, i, begin, n = whereabouts(owners, firsts, facts, base, CHUNK, ALIGNED)
    m, g = pointer(at, 0, k, i, M, ALIGNED), pointer(at, 1, k, i, G, ALIGNED)
    scale, map = pointer(at, 2, k, i, tl.float32, False), pointer(at, 3, k, i, tl.float32, False)
    number = numbers + i
    gain, keep, add = tl.load(number + RATE_GAIN * k), tl.load(number + RATE_KEEP * k), tl.load(number + RATE_ADD * k)
    end = tl.where(tl.load(number + RATE_FINITE * k) != 0, tl.minimum(begin + CHUNK, n), begin)
    for start in range(begin, end, TILE):
        start = tl.multiple_of(start, TILE)
        offsets = start + tl.arange(0, TILE)
        inside = offsets < n
        x = opened(m, scale, map, offsets, inside, M) * keep + cleaned(read(g, offsets, inside) * gain) * add
        close(m, scale, map, x, start, n, M, True, TILE)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=TABLES)
def transformed_chunks(
    owners, firsts, facts, at, base, k, numbers,
    D: tl.constexpr, G: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients limited and scaled into other tensors, by ``numbers [3, k]``: gain, limit, reduced."""
    _, i, begin, n = whereabouts(owners, firsts, facts, base, CHUNK, ALIGNED)
    out, g = pointer(at, 0, k, i, D, ALIGNED), pointer(at, 1, k, i, G, ALIGNED)
    gain, limit, reduced = tl.load(numbers + i), tl.load(numbers + k + i), tl.load(numbers + 2 * k + i)
    for start in range(begin, tl.minimum(begin + CHUNK, n), TILE):
        offsets = tl.multiple_of(start, TILE) + tl.arange(0, TILE)
        inside = offsets < n
        x = read(g, offsets, inside)
        x = cleaned(x * tl.where(tl.abs(x) > limit, reduced, gain))
        tl.store(out + offsets, x.to(D), mask=inside)
