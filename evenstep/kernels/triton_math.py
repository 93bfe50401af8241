"""Pieces that the Triton kernels are made of."""

import triton
import triton.language as tl

# Squares of fp32 numbers overflow above 1e19 and vanish below 1e-19, so entries are summed in three ranges: large ones
# in units of 2^80, small ones in units of 2^-100. Sums of 2^31 squares fit in each.
HIGH = tl.constexpr(2.0**48)
LOW = tl.constexpr(2.0**-48)
SHRINK = tl.constexpr(2.0**-80)
UNSHRINK = tl.constexpr(2.0**80)
GROW = tl.constexpr(2.0**100)
UNGROW = tl.constexpr(2.0**-100)
LARGEST = tl.constexpr(3.4028234663852886e38)
LARGEST_BF16 = tl.constexpr(3.3895313892515355e38)
CODED = tl.constexpr(256)


@triton.jit
def add_squares(x, high, middle, low):
    """Add the squares of ``x`` to the sums of the three ranges."""
    a = tl.abs(x)
    is_high = a > HIGH
    is_low = a < LOW
    h = tl.where(is_high, a * SHRINK, 0.0)
    m = tl.where(is_high | is_low, 0.0, a)
    s = tl.where(is_low, a * GROW, 0.0)
    return high + h * h, middle + m * m, low + s * s


@triton.jit
def norm_of(high, middle, low):
    """The 2-norm that three sums stand for; not finite where an entry was not."""
    large = tl.sqrt_rn(high + middle * SHRINK * SHRINK) * UNSHRINK
    usual = tl.sqrt_rn(middle + low * UNGROW * UNGROW)
    small = tl.sqrt_rn(low) * UNGROW
    return tl.where(high > 0, large, tl.where(middle == 0, small, usual))


@triton.jit
def pointer(at, stream, k, i, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where tensor ``i`` of a stream lies."""
    p = tl.load(at + stream * k + i).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(p, 16) if ALIGNED else p


@triton.jit
def read(p, offsets, inside):
    return tl.load(p + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def cleaned(g):
    """NaN as 0 and infinities as the largest numbers."""
    g = tl.where(g == g, g, 0.0)
    return tl.minimum(tl.maximum(g, -LARGEST), LARGEST)


@triton.jit
def opened(p, scale, map, offsets, inside, DTYPE: tl.constexpr):
    """A stored moment in fp32."""
    if tl.uint8 == DTYPE:
        code = tl.load(p + offsets, mask=inside, other=0).to(tl.int32)
        size = tl.load(scale + offsets // CODED, mask=inside, other=0.0)
        return tl.load(map + code) * size
    else:
        return tl.load(p + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def close(p, scale, map, x, start, n, DTYPE: tl.constexpr, SIGNED: tl.constexpr, TILE: tl.constexpr):
    """Store entries ``start .. start + TILE - 1`` of a moment, whole blocks where it is coded."""
    offsets = start + tl.arange(0, TILE)
    if tl.uint8 == DTYPE:
        blocks = tl.reshape(x, [TILE // CODED, CODED])
        size = tl.maximum(tl.max(tl.abs(blocks), axis=1), 1e-12)
        codes = tl.reshape(nearest_code(tl.div_rn(blocks, size[:, None]), map, SIGNED), [TILE])
        tl.store(p + offsets, codes.to(tl.uint8), mask=offsets < n)
        number = start // CODED + tl.arange(0, TILE // CODED)
        tl.store(scale + number, size, mask=number * CODED < n)
    else:
        if tl.bfloat16 == DTYPE:  # larger numbers would round to Inf
            x = tl.minimum(tl.maximum(x, -LARGEST_BF16), LARGEST_BF16)
        tl.store(p + offsets, x.to(DTYPE), mask=offsets < n)


@triton.jit
def nearest_code(x, map, SIGNED: tl.constexpr):
    """The place of the nearest of torchao's 256 ascending values (its choice between two as near), for |x| <= 1.

    A search through the map would take ten dependent reads at addresses that differ between threads, and these, not
    memory, would set the pace. But the values are known: 2^i of them, twice as many without a sign, lie evenly from
    10^(i - 7) to 10^(i - 6) for i in 0..6, and 0 and 1. So the place is computed, which rounding may miss by one, and
    four values around it decide.
    """
    a = tl.abs(x)
    decade = tl.zeros(x.shape, tl.int32)
    power = tl.full(x.shape, 1e6, tl.float32)
    for i in tl.static_range(1, 7):
        reached = a >= 10.0 ** (i - 7)
        decade = tl.where(reached, i, decade)
        power = tl.where(reached, 10.0 ** (6 - i), power)
    count = (1 if SIGNED else 2) << decade
    place = tl.floor((a * power - 0.1) * (count.to(tl.float32) * (1 / 0.9)) - 0.5).to(tl.int32)
    code = count + tl.minimum(tl.maximum(place, -1), count - 1) + (127 if SIGNED else -1)
    if SIGNED:
        code = tl.where(x < 0, 253 - code, code)
    code = tl.minimum(tl.maximum(code, 1), 254)
    one, two, three = tl.load(map + code - 1), tl.load(map + code), tl.load(map + code + 1)
    four = tl.load(map + tl.minimum(code + 2, 255))
    before, after = x < two, x >= three
    below = tl.where(after, three, tl.where(before, one, two))
    above = tl.where(after, four, tl.where(before, two, three))
    code += after.to(tl.int32) - before.to(tl.int32)
    code = tl.minimum(code + (x - below >= (above - below) * 0.5).to(tl.int32), 255)
    if not SIGNED:  # a second moment that is not 0 has no code of 0, as in `close` of optim/functional.py
        code = tl.where((code == 0) & (x > 0), 1, code)
    return code


@triton.jit
def mixed(x):
    """`_mixed` of evenstep/optim/rounding.py."""
    x = (x ^ (x >> 16)) * -2048144789
    x = (x ^ (x >> 13)) * -1028477387
    return x ^ (x >> 16)


@triton.jit
def write(p, lost, exact, offsets, inside, seed, P: tl.constexpr, KAHAN: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Round ``exact`` into the parameter (as evenstep/optim/rounding.py); ``offsets`` number its entries."""
    if KAHAN:
        exact += read(lost, offsets, inside)
        kept = exact.to(P)
        tl.store(p + offsets, kept, mask=inside)
        tl.store(lost + offsets, (exact - kept.to(tl.float32)).to(P), mask=inside)
    elif STOCHASTIC:
        noise = mixed(offsets.to(tl.int32) * -1640531527 + seed) & 0xFFFF
        rounded = ((exact.to(tl.int32, bitcast=True) + noise) & -65536).to(tl.float32, bitcast=True)
        finite = tl.abs(exact) <= LARGEST
        tl.store(p + offsets, tl.where(finite, rounded, exact).to(P), mask=inside)
    else:
        tl.store(p + offsets, exact.to(P), mask=inside)
