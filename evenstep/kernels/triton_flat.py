"""Triton kernels that treat tensors as flat: measuring, clipped norms, masks, Adam, and an average.

One launch serves all tensors of a group. Each program takes one chunk: ``CHUNK`` neighbouring entries of one tensor, in
a loop over tiles of ``TILE`` entries. Arguments that the kernels share:

* ``tensor_of [chunks]``, ``first_chunk [k]``, ``chunk_count [k]``, ``dims [rows, k]`` (sizes first): the tables of
  `Plan` in cuda_launch.py, int64.
* ``addresses [streams, k]``, int64: where the tensors lie, a row for each of parameter, gradient, moments, ...
* ``base``: the first chunk of the launch; ``width``: the number of chunks of all launches; ``k``: of tensors.
* ``numbers [rows, k]``, fp32: the numbers of whole tensors; `ADAM_ROWS` and `SCALE_ROWS` in interface.py name the rows.
* ``out [rows, width]``, fp32: results of chunks, from which triton_numbers.py computes those of tensors.

Memory: entries that a program writes are read by no other program of the launch, and each program has its own column of
``out``. So there are no races and no atomics, and results are the same on every run. Launches on one stream run in
order, so each kernel sees the results of its predecessor.

Overflow: tables are int64, so a position within a tensor (``start``, ``offsets``) is int64, and tensors may have more
than 2^31 entries. Numbers of chunks and of tensors are int32.
"""

import triton.language as tl

from evenstep.kernels.interface import ADAM_ROWS, SCALE_ROWS
from evenstep.kernels.triton_math import (
    HIGH,
    LARGEST,
    LEAST,
    Constant,
    add_squares,
    cleaned,
    close_moment,
    device_function,
    kernel,
    norm_of,
    open_moment,
    pointer,
    read,
    store_moment,
    write,
)

# Rows of `numbers`. Kernels read global names only where they are constants of the compiler.
FINITE = Constant(ADAM_ROWS.index("finite"))
GAIN = Constant(ADAM_ROWS.index("gain"))
LIMIT = Constant(ADAM_ROWS.index("limit"))
REDUCED = Constant(ADAM_ROWS.index("reduced"))
KEEP1 = Constant(ADAM_ROWS.index("keep1"))
KEEP2 = Constant(ADAM_ROWS.index("keep2"))
ADD1 = Constant(ADAM_ROWS.index("add1"))
ADD2 = Constant(ADAM_ROWS.index("add2"))
STEP_SIZE = Constant(ADAM_ROWS.index("step_size"))
INVERSE_ROOT2 = Constant(ADAM_ROWS.index("inverse_root2"))
EPS = Constant(ADAM_ROWS.index("eps"))
SHRINK = Constant(ADAM_ROWS.index("shrink"))
SHRINK_AFTER = Constant(ADAM_ROWS.index("shrink_after"))
AFTER = Constant(ADAM_ROWS.index("after"))
CAP_FACTOR = Constant(ADAM_ROWS.index("cap_factor"))
CAP_SPREAD = Constant(ADAM_ROWS.index("cap_spread"))

RATE_FINITE = Constant(SCALE_ROWS.index("finite"))
RATE_GAIN = Constant(SCALE_ROWS.index("gain"))
RATE_KEEP = Constant(SCALE_ROWS.index("keep"))
RATE_ADD = Constant(SCALE_ROWS.index("add"))
RATE = Constant(SCALE_ROWS.index("rate"))
RATE_SHRINK = Constant(SCALE_ROWS.index("shrink"))
RATE_ROOT = Constant(SCALE_ROWS.index("root"))


@device_function
def locate(
    tensor_of: tl.tensor, first_chunk: tl.tensor, sizes: tl.tensor, base: tl.tensor,
    CHUNK: tl.constexpr, ALIGNED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """This program's chunk, the number of its tensor, the chunk's first entry in the tensor, the tensor's size."""
    chunk = base + tl.program_id(0)
    i = tl.load(tensor_of + chunk)
    n = tl.load(sizes + i)
    # With a size that is a multiple of 16, the mask `offsets < n` is the same for 16 neighbours, which the compiler has
    # to know before it moves 16 bytes at a time under a mask.
    n = tl.multiple_of(n, 16) if ALIGNED else n
    return chunk, i, (chunk - tl.load(first_chunk + i)) * CHUNK, n


@kernel
def measure_chunks(
    tensor_of: tl.tensor, first_chunk: tl.tensor, dims: tl.tensor, addresses: tl.tensor,
    base: tl.tensor, k: tl.tensor, width: tl.tensor, out: tl.tensor,
    G: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """``out [2, width]``: largest absolute entry (Inf where one is not finite) and 2-norm of each chunk.

    ``addresses``: gradient, which is read once.
    """
    chunk, i, begin, n = locate(tensor_of, first_chunk, dims, base, CHUNK, ALIGNED)
    g, end = pointer(addresses, 0, k, i, G, ALIGNED), tl.minimum(begin + CHUNK, n)
    # Sums are kept per lane of the tile and added once, after the loop. For bf16 gradients instructions set the pace of
    # this loop, so it has two per entry: squares are those of the entries themselves.
    peak = tl.zeros([TILE], tl.float32)
    total = peak
    for start in range(begin, end, TILE):
        offsets = start + tl.arange(0, TILE)
        x = read(g, offsets, offsets < n)
        peak = tl.maximum(peak, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
        total = tl.fma(x, x, total)
    most = tl.max(tl.where(peak <= LARGEST, peak, float("inf")))  # a NaN becomes Inf, which `tl.max` does not drop
    norm = tl.sqrt_rn(tl.sum(total))
    # With a largest entry in [2^-40, 2^48] the sum of a chunk's squares neither overflows, nor do squares that vanish
    # matter. Other chunks are read again, in three ranges; the norm of zeros, as in rows that are not used, is known.
    usual = (most <= HIGH) & ((most >= LEAST) | (most == 0))
    high = tl.zeros([TILE], tl.float32)
    middle, low = high, high
    for start in range(begin, tl.where(usual, begin, end), TILE):
        offsets = start + tl.arange(0, TILE)
        high, middle, low = add_squares(read(g, offsets, offsets < n), high, middle, low)
    tl.store(out + chunk, most)
    tl.store(out + width + chunk, tl.where(usual, norm, norm_of(tl.sum(high), tl.sum(middle), tl.sum(low))))


@kernel
def clip_chunks(
    tensor_of: tl.tensor, first_chunk: tl.tensor, dims: tl.tensor, addresses: tl.tensor,
    base: tl.tensor, k: tl.tensor, width: tl.tensor,
    known: tl.tensor, limits: tl.tensor, rescales: tl.tensor, out: tl.tensor,
    G: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """``out [2, width]``: 2-norm of each chunk after AdaClip, and number of clipped entries.

    AdaClip (Stable-SPAM, step 2): entries with |g| > ``limits[i]`` (T_hat) are multiplied by ``rescales[i]``, which is
    T_hat / max|g|. ``known [2, width]`` holds the results of `measure_chunks`. ``addresses``: gradient.
    """
    chunk, i, begin, n = locate(tensor_of, first_chunk, dims, base, CHUNK, ALIGNED)
    g = pointer(addresses, 0, k, i, G, ALIGNED)
    limit, rescale = tl.load(limits + i), tl.load(rescales + i)
    # Few chunks have an entry above the limit. Those without are not read again: their loop is empty, and their norm is
    # the one that is known.
    above = tl.load(known + chunk) > limit
    high = tl.zeros([TILE], tl.float32)
    middle, low, count = high, high, high
    for start in range(begin, tl.where(above, tl.minimum(begin + CHUNK, n), begin), TILE):
        offsets = start + tl.arange(0, TILE)
        x = read(g, offsets, offsets < n)
        over = tl.abs(x) > limit
        # Counts in fp32 are exact up to 2^24, far above the entries of a chunk.
        count += over.to(tl.float32)
        high, middle, low = add_squares(tl.where(over, x * rescale, x), high, middle, low)
    # Chunks that were not read write too: `out` is uninitialised before.
    norm = norm_of(tl.sum(high), tl.sum(middle), tl.sum(low))
    tl.store(out + chunk, tl.where(above, norm, tl.load(known + width + chunk)))
    tl.store(out + width + chunk, tl.sum(count))


@kernel
def mask_counts(
    tensor_of: tl.tensor, first_chunk: tl.tensor, dims: tl.tensor, addresses: tl.tensor,
    base: tl.tensor, k: tl.tensor, starts: tl.tensor, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """``starts [width]``, int64: the number of trained entries of each chunk. ``addresses``: those of `adam_chunks`."""
    chunk, i, begin, n = locate(tensor_of, first_chunk, dims, base, CHUNK, False)
    mask = pointer(addresses, 9, k, i, tl.uint8, False)
    # CHUNK is a multiple of 8, so a chunk begins with a whole byte. The bits after the last entry are 0.
    bytes = begin // 8 + tl.arange(0, CHUNK // 8)
    bits = tl.load(mask + bytes, mask=bytes * 8 < n, other=0).to(tl.int32)
    # The number of ones of each byte: sums of neighbours of 1, 2 and 4 bits.
    bits = bits - ((bits >> 1) & 0x55)
    bits = (bits & 0x33) + ((bits >> 2) & 0x33)
    tl.store(starts + chunk, tl.sum((bits + (bits >> 4)) & 0x0F).to(tl.int64))


@kernel
def mask_starts(first_chunk: tl.tensor, chunk_count: tl.tensor, starts: tl.tensor, TILE: tl.constexpr) -> None:
    """Counts of chunks become the number of trained entries before each chunk of a tensor, in place. One program per
    tensor."""
    i = tl.program_id(0)
    first, count = tl.load(first_chunk + i), tl.load(chunk_count + i)
    before = tl.zeros([], tl.int64)
    for start in range(0, count, TILE):
        offsets = start + tl.arange(0, TILE)
        counts = tl.load(starts + first + offsets, mask=offsets < count, other=0)
        tl.store(starts + first + offsets, before + tl.cumsum(counts, 0) - counts, mask=offsets < count)
        before += tl.sum(counts)


@kernel
def adam_chunks(
    tensor_of: tl.tensor, first_chunk: tl.tensor, dims: tl.tensor, addresses: tl.tensor,
    base: tl.tensor, k: tl.tensor, width: tl.tensor, numbers: tl.tensor, seeds: tl.tensor, starts: tl.tensor,
    out: tl.tensor,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr,
    KAHAN: tl.constexpr, STOCHASTIC: tl.constexpr, CAPPED: tl.constexpr, ZERO_HISTORY: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """The step of Adam, SPAM and Stable-SPAM: the twin of `adam_step` in evenstep/optim/functional.py.

    ``addresses``: parameter, gradient, first and second moment, compensation, then scales and map of the first moment
    and of the second where they are coded, else 0, and the mask. Reads all of them once; writes parameter, moments,
    compensation and scales. ``seeds [k]``, int32, where rounding is stochastic.

    With ``MASKED`` the moments hold the trained entries alone, in their order; ``starts [width]`` has the number of
    trained entries before each chunk (`mask_starts`). Bit i of byte j of the mask stands for entry 8 j + i.

    ``out [3, width]``: norm of the update; for SPAM (``CAPPED``) also the norm after clipping and the number of clipped
    entries.
    """
    chunk, i, begin, n = locate(tensor_of, first_chunk, dims, base, CHUNK, ALIGNED)
    p, g = pointer(addresses, 0, k, i, P, ALIGNED), pointer(addresses, 1, k, i, G, ALIGNED)
    m, v = pointer(addresses, 2, k, i, M, ALIGNED), pointer(addresses, 3, k, i, V, ALIGNED)
    lost = pointer(addresses, 4, k, i, P, ALIGNED)
    # A pointer of 0 is never read: its use is cut out by a constant (M, V, KAHAN).
    m_scale, m_map = pointer(addresses, 5, k, i, tl.float32, False), pointer(addresses, 6, k, i, tl.float32, False)
    v_scale, v_map = pointer(addresses, 7, k, i, tl.float32, False), pointer(addresses, 8, k, i, tl.float32, False)
    mask = pointer(addresses, 9, k, i, tl.uint8, False)
    # Numbers of the whole tensor: column i of `numbers`, read once per chunk.
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
    before_tile = tl.load(starts + chunk) if MASKED else begin
    # A tensor whose gradient is not finite keeps parameter and moments bit for bit: the loop is empty.
    end = tl.where(tl.load(number + FINITE * k) != 0, tl.minimum(begin + CHUNK, n), begin)
    for start in range(begin, end, TILE):
        start = tl.multiple_of(start, TILE)
        offsets = start + tl.arange(0, TILE)
        inside = offsets < n
        # `places`: where the moments of an entry are, and its number in the noise of stochastic rounding.
        places = offsets
        if MASKED:
            bits = tl.load(mask + offsets // 8, mask=inside, other=0).to(tl.int32)
            trained = ((bits >> (offsets % 8).to(tl.int32)) & 1) * inside.to(tl.int32)
            places = before_tile + tl.cumsum(trained, 0) - trained
            before_tile += tl.sum(trained)
            inside = trained != 0
        x, before = read(g, offsets, inside), read(p, offsets, inside)
        # AdaClip and AdaGN: gain = mu_hat / (sqrt(nu_hat) + eps) / ||g||, reduced = gain * T_hat / max|g|, each times
        # the sign of the step.
        x = cleaned(x * tl.where(tl.abs(x) > limit, reduced, gain))
        first = open_moment(m, m_scale, m_map, places, inside, M)
        second = open_moment(v, v_scale, v_map, places, inside, V)
        if CAPPED:
            # SPAM: g^2 > theta v becomes sign(g) sqrt(theta v), with v from before this step. On a step without
            # clipping cap_spread is Inf; on a reset step cap_factor is 0.
            cap = tl.sqrt_rn(second * cap_factor) + cap_spread
            if not ZERO_HISTORY:  # an entry with v = 0 has no history, and is no spike
                cap = tl.where(cap == 0, LARGEST, cap)
            clipped = tl.minimum(tl.maximum(x, -cap), cap)
            count += (clipped != x).to(tl.float32)
            x = clipped
            clipped_high, clipped_middle, clipped_low = add_squares(x, clipped_high, clipped_middle, clipped_low)
        # m <- beta1 m + (1 - beta1) g, v <- beta2 v + (1 - beta2) g^2; keep1 = keep2 = 0 on a reset (MoRet). v is
        # capped at the largest finite number, so that rounding cannot make it infinite for good.
        first = first * keep1 + x * add1
        second = tl.minimum(second * keep2 + (x * add2) * x, LARGEST)
        # update = lr / (1 - beta1^age) * m / (sqrt(v) / sqrt(1 - beta2^age) + eps)
        update = tl.div_rn(first, tl.sqrt_rn(second) * inverse_root2 + eps) * step_size
        # With eps = 0 the update of a masked entry is 0 / 0.
        high, middle, low = add_squares(tl.where(inside, update, 0.0), high, middle, low)
        # The published code clears moments after the update: after = 0 on its reset steps.
        if MASKED:
            store_moment(m, first * after, places, inside, M)
            store_moment(v, second * after, places, inside, V)
        else:  # entries beyond the end are 0 in first and second, as `close_moment` asks
            close_moment(m, m_scale, m_map, first * after, start, n, M, True, TILE)
            close_moment(v, v_scale, v_map, second * after, start, n, V, False, TILE)
        # Decoupled weight decay: shrink = 1 - lr wd before the update, or shrink_after (published SPAM) after it.
        exact = (before * shrink - update) * shrink_after
        write(p, lost, exact, offsets, places, inside, seed, P, KAHAN, STOCHASTIC)
    tl.store(out + chunk, norm_of(tl.sum(high), tl.sum(middle), tl.sum(low)))
    if CAPPED:
        norm = norm_of(tl.sum(clipped_high), tl.sum(clipped_middle), tl.sum(clipped_low))
        tl.store(out + width + chunk, norm)
        tl.store(out + 2 * width + chunk, tl.sum(count))


@kernel
def average_chunks(
    tensor_of: tl.tensor, first_chunk: tl.tensor, dims: tl.tensor, addresses: tl.tensor,
    base: tl.tensor, k: tl.tensor, numbers: tl.tensor,
    M: tl.constexpr, G: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """SCALE's average gradient: m <- b m + (1 - b) g, without bias correction.

    ``addresses``: average (written), gradient, then scales and map of the average where it is coded.
    """
    # This is not part of `row_chunks` because a row may share a block of 256 codes, and so a scale, with the next one,
    # which is another program's.
    _, i, begin, n = locate(tensor_of, first_chunk, dims, base, CHUNK, ALIGNED)
    m, g = pointer(addresses, 0, k, i, M, ALIGNED), pointer(addresses, 1, k, i, G, ALIGNED)
    scale, map = pointer(addresses, 2, k, i, tl.float32, False), pointer(addresses, 3, k, i, tl.float32, False)
    number = numbers + i
    gain, keep, add = tl.load(number + RATE_GAIN * k), tl.load(number + RATE_KEEP * k), tl.load(number + RATE_ADD * k)
    end = tl.where(tl.load(number + RATE_FINITE * k) != 0, tl.minimum(begin + CHUNK, n), begin)
    for start in range(begin, end, TILE):
        start = tl.multiple_of(start, TILE)
        offsets = start + tl.arange(0, TILE)
        inside = offsets < n
        x = open_moment(m, scale, map, offsets, inside, M) * keep + cleaned(read(g, offsets, inside) * gain) * add
        close_moment(m, scale, map, x, start, n, M, True, TILE)


@kernel
def transformed_chunks(
    tensor_of: tl.tensor, first_chunk: tl.tensor, dims: tl.tensor, addresses: tl.tensor,
    base: tl.tensor, k: tl.tensor, numbers: tl.tensor, width: tl.tensor,
    D: tl.constexpr, G: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients, limited and scaled, into other tensors. ``addresses``: output, gradient; ``dims``: size, column in
    ``numbers [3, width]`` (gain, limit, reduced gain).
    """
    _, i, begin, n = locate(tensor_of, first_chunk, dims, base, CHUNK, ALIGNED)
    out, g = pointer(addresses, 0, k, i, D, ALIGNED), pointer(addresses, 1, k, i, G, ALIGNED)
    number = numbers + tl.load(dims + k + i)
    gain, limit, reduced = tl.load(number), tl.load(number + width), tl.load(number + 2 * width)
    for start in range(begin, tl.minimum(begin + CHUNK, n), TILE):
        offsets = tl.multiple_of(start, TILE) + tl.arange(0, TILE)
        inside = offsets < n
        x = read(g, offsets, inside)
        # A gain of 0 stands for a gradient that is not finite: 0 * Inf is NaN, which `cleaned` makes 0.
        x = cleaned(x * tl.where(tl.abs(x) > limit, reduced, gain))
        tl.store(out + offsets, x.to(D), mask=inside)


@kernel
def copy_chunks(
    tensor_of: tl.tensor, first_chunk: tl.tensor, dims: tl.tensor, addresses: tl.tensor,
    base: tl.tensor, k: tl.tensor, flags: tl.tensor, copies: tl.tensor,
    BACK: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """Copy the bytes of tensors whose flag is False, or with ``BACK`` their copies into them. ``addresses``:
    places in ``copies`` (uint8), tensors; ``dims``: bytes, number of the flag."""
    _, i, begin, n = locate(tensor_of, first_chunk, dims, base, CHUNK, False)
    copy, x = copies + tl.load(addresses + i), pointer(addresses, 1, k, i, tl.uint8, False)
    accepted = tl.load(flags + tl.load(dims + k + i))
    for start in range(begin, tl.where(accepted, begin, tl.minimum(begin + CHUNK, n)), TILE):
        offsets = start + tl.arange(0, TILE)
        if BACK:
            tl.store(x + offsets, tl.load(copy + offsets, mask=offsets < n, other=0), mask=offsets < n)
        else:
            tl.store(copy + offsets, tl.load(x + offsets, mask=offsets < n, other=0), mask=offsets < n)
