"""Device functions that the Triton kernels share: norms, and reading and writing of parameters and moments.

Arithmetic is fp32 on tiles: blocks of entries whose size is a power of two known to the compiler. Entries of a tile
beyond the end of a tensor are masked: they are read as 0 and never written. Roots and divisions are the correctly
rounded ones (`sqrt_rn`, `div_rn`), since Triton's ``/`` and `tl.sqrt` are approximations that differ from torch in the
last bit.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import triton
import triton.language as tl

# ---- decorators ----
#
# Triton comes without type information. These two give its decorator types; they change nothing else.

F = TypeVar("F", bound=Callable[..., Any])


class Kernel(Protocol):
    """A Triton kernel: ``kernel[grid](arguments)`` launches ``grid[0]`` programs on the current stream."""

    def __getitem__(self, grid: tuple[int]) -> Callable[..., object]:
        """A function that launches the kernel on ``grid``."""


# Arguments that vary from launch to launch. By default Triton compiles a kernel again where one of them is 1, or a
# multiple of 16, and was not at another launch.
VARYING = ["base", "width", "k", "n"]

# Tables, whose views may begin anywhere. By default Triton compiles a kernel again for addresses that are no multiple
# of 16 bytes. A program reads a few entries of them, so nothing is lost.
TABLES = [
    *("tensor_of", "first_chunk", "chunk_count", "dims", "addresses"),
    *("partial", "known", "out", "numbers", "seeds", "limits", "rescales", "starts", "sums", "divisors", "flags"),
    *("settings", "scalars", "facts", "stats", "sizes", "lengths", "heights"),
    *("peaks", "gains", "means", "counts", "raws", "norms", "roots", "finite", "new", "copies"),
]


def device_function(function: F) -> F:
    """`triton.jit` for functions that kernels call; the compiler inlines them."""
    compiled: F = triton.jit(function)
    return compiled


def kernel(function: Callable[..., None]) -> Kernel:
    """`triton.jit` for functions that the host launches. Names of arguments matter: see `VARYING` and `TABLES`."""
    compiled: Kernel = triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=TABLES)(function)
    return compiled


class Constant(tl.constexpr):  # type: ignore[misc]
    """A number that kernels read by a global name.

    Triton compares every such number with its value at compile time, at each launch. A comparison of two
    `tl.constexpr` makes a third one; in a profile, these took two fifths of the time of all launches.
    """

    def __ne__(self, other: object) -> bool:
        return bool(self.value != getattr(other, "value", other))


# ---- 2-norms that neither overflow nor vanish ----

# Squares of fp32 numbers overflow above 1.8e19 and lose bits below 1e-19. So squares are summed in three ranges: those
# of large entries in units of 2^80, those of small ones in units of 2^-100. Each range holds a sum of 2^23 squares,
# more than a chunk has (2^14), or a row of any usual matrix.
HIGH = Constant(2.0**48)
LOW = Constant(2.0**-48)
LEAST = Constant(2.0**-40)
TO_HIGH = Constant(2.0**-80)
FROM_HIGH = Constant(2.0**80)
TO_LOW = Constant(2.0**100)
FROM_LOW = Constant(2.0**-100)
LARGEST = Constant(3.4028234663852886e38)  # of fp32
LARGEST_BF16 = Constant(3.3895313892515355e38)


@device_function
def add_squares(
    x: tl.tensor, high: tl.tensor, middle: tl.tensor, low: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add the squares of ``x`` to the sums of the three ranges, all in the shape of a tile."""
    a = tl.abs(x)
    is_high = a > HIGH
    is_low = a < LOW
    # Selecting before squaring keeps the squares of other ranges, which may be Inf, out of the sums. Inf itself is
    # high, and stays Inf. A NaN is neither high nor low, and makes the middle sum NaN.
    h = tl.where(is_high, a * TO_HIGH, 0.0)
    m = tl.where(is_high | is_low, 0.0, a)
    s = tl.where(is_low, a * TO_LOW, 0.0)
    return high + h * h, middle + m * m, low + s * s


@device_function
def norm_of(high: tl.tensor, middle: tl.tensor, low: tl.tensor) -> tl.tensor:
    """The 2-norm of entries whose squares were summed by `add_squares`; not finite where an entry was not."""
    # ||x|| = sqrt(high 2^160 + middle + low 2^-200). The largest range that is not empty decides, together with the
    # next one; the rest is below half a unit in the last place. 2^-160 is no fp32 number, hence two factors.
    large = tl.sqrt_rn(high + middle * TO_HIGH * TO_HIGH) * FROM_HIGH
    usual = tl.sqrt_rn(middle + low * FROM_LOW * FROM_LOW)
    small = tl.sqrt_rn(low) * FROM_LOW
    return tl.where(high > 0, large, tl.where(middle == 0, small, usual))


# ---- entries ----


@device_function
def pointer(
    addresses: tl.tensor, stream: int, k: tl.tensor, i: tl.tensor, DTYPE: tl.constexpr, ALIGNED: tl.constexpr
) -> tl.tensor:
    """The address of tensor ``i`` in row ``stream`` of ``addresses``, int64 ``[streams, k]``, as a pointer."""
    p = tl.load(addresses + stream * k + i).to(tl.pointer_type(DTYPE))
    # An address from a table tells the compiler nothing. Without this hint it would move 4 bytes at a time instead of
    # 16. Hazard: a wrong hint makes accesses fault, so `aligned` of cuda_launch.py checks every address.
    # ALIGNED is the number of neighbours that a thread moves at once, the same for all streams of a kernel: with 16
    # bytes each, a bf16 stream would give a thread other entries than an fp32 stream, and the kernel would exchange
    # them through shared memory in every round.
    return tl.multiple_of(p, ALIGNED * (DTYPE.primitive_bitwidth // 8)) if ALIGNED else p


@device_function
def read(p: tl.tensor, offsets: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Entries of an fp32 or bf16 tensor, in fp32; 0 outside."""
    return tl.load(p + offsets, mask=inside, other=0.0).to(tl.float32)


@device_function
def cleaned(g: tl.tensor) -> tl.tensor:
    """``g`` with NaN as 0 and infinities as the largest numbers, as `torch.nan_to_num`."""
    g = tl.where(g == g, g, 0.0)
    return tl.minimum(tl.maximum(g, -LARGEST), LARGEST)


# ---- moments: fp32, bf16, or torchao's 8-bit codes ----

CODED = Constant(256)  # entries that share a scale; entry = map[code] * scale


@device_function
def open_moment(
    p: tl.tensor, scale: tl.tensor, map: tl.tensor, offsets: tl.tensor, inside: tl.tensor, DTYPE: tl.constexpr
) -> tl.tensor:
    """Entries of a moment in fp32; 0 outside. ``scale`` and ``map`` are null pointers where it is not coded."""
    if tl.uint8 == DTYPE:
        code = tl.load(p + offsets, mask=inside, other=0).to(tl.int32)
        # 256 neighbours read the same scale, and all read the same map of 1 KiB: both come from the first-level cache.
        size = tl.load(scale + offsets // CODED, mask=inside, other=0.0)
        return tl.load(map + code) * size
    else:
        return tl.load(p + offsets, mask=inside, other=0.0).to(tl.float32)


@device_function
def close_moment(
    p: tl.tensor, scale: tl.tensor, map: tl.tensor, x: tl.tensor, start: tl.tensor, n: tl.tensor,
    DTYPE: tl.constexpr, SIGNED: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """Store ``x [TILE]`` as entries ``start .. start + TILE - 1`` of a moment of ``n`` entries.

    Hazard: a scale belongs to a whole block of 256 entries. ``start`` and ``TILE`` are multiples of 256, so that no
    other program writes it; entries of ``x`` beyond ``n`` must be 0, since they count for the last block's scale.
    """
    offsets = start + tl.arange(0, TILE)
    if tl.uint8 == DTYPE:
        blocks = tl.reshape(x, [TILE // CODED, CODED])
        # Scale = largest magnitude of the block, so that codes stand for [-1, 1]; 1e-12 for a block of zeros (torchao).
        size = tl.maximum(tl.max(tl.abs(blocks), axis=1), 1e-12)
        codes = tl.reshape(nearest_code(tl.div_rn(blocks, size[:, None]), map, SIGNED), [TILE])
        tl.store(p + offsets, codes.to(tl.uint8), mask=offsets < n)
        number = start // CODED + tl.arange(0, TILE // CODED)
        tl.store(scale + number, size, mask=number * CODED < n)
    else:
        store_moment(p, x, offsets, offsets < n, DTYPE)


@device_function
def store_moment(p: tl.tensor, x: tl.tensor, offsets: tl.tensor, inside: tl.tensor, DTYPE: tl.constexpr) -> None:
    """Store ``x`` as entries ``offsets`` of an fp32 or bf16 moment."""
    if tl.bfloat16 == DTYPE:  # larger numbers would round to Inf, which no later decay brings back
        x = tl.minimum(tl.maximum(x, -LARGEST_BF16), LARGEST_BF16)
    tl.store(p + offsets, x.to(DTYPE), mask=inside)


@device_function
def nearest_code(x: tl.tensor, map: tl.tensor, SIGNED: tl.constexpr) -> tl.tensor:
    """The code of the nearest of torchao's 256 ascending values for |x| <= 1. Ties are broken as in torchao.

    A search through the map would take ten dependent reads at addresses that differ between threads, and these, not
    memory, would set the pace. But the values are known: 2^i of them, twice as many without a sign, lie evenly from
    10^(i - 7) to 10^(i - 6) for i in 0..6, and 0 and 1. So the code is computed, which rounding may miss by one, and
    four values around it decide.
    """
    a = tl.abs(x)
    # The decade i of a, and 10^(6 - i), which scales it to [0.1, 1].
    decade = tl.zeros(x.shape, tl.int32)
    power = tl.full(x.shape, 1e6, tl.float32)
    for i in tl.static_range(1, 7):
        reached = a >= 10.0 ** (i - 7)
        decade = tl.where(reached, i, decade)
        power = tl.where(reached, 10.0 ** (6 - i), power)
    # Value j of a decade is 0.1 + 0.9 (j + 0.5) / count; `place` is j of the value below a, -1 for the decade before.
    count = (1 if SIGNED else 2) << decade
    place = tl.floor((a * power - 0.1) * (count.to(tl.float32) * (1 / 0.9)) - 0.5).to(tl.int32)
    # The decades before hold count - 1 values (count - 2 without a sign), and the code of 0 is 127 (0).
    code = count + tl.minimum(tl.maximum(place, -1), count - 1) + (127 if SIGNED else -1)
    if SIGNED:  # negative values mirror the positive ones; 253 - code is the value below x again
        code = tl.where(x < 0, 253 - code, code)
    # The values before, at, after and two after the code. Where the code is off by one, x lies in an outer interval.
    code = tl.minimum(tl.maximum(code, 1), 254)
    one, two, three = tl.load(map + code - 1), tl.load(map + code), tl.load(map + code + 1)
    four = tl.load(map + tl.minimum(code + 2, 255))
    before, after = x < two, x >= three
    below = tl.where(after, three, tl.where(before, one, two))
    above = tl.where(after, four, tl.where(before, two, three))
    code += after.to(tl.int32) - before.to(tl.int32)
    # Round to the nearer of the two values around x; the upper one of two as near.
    code = tl.minimum(code + (x - below >= (above - below) * 0.5).to(tl.int32), 255)
    if not SIGNED:  # a second moment that is not 0 has no code of 0, as in `close` of optim/functional.py
        code = tl.where((code == 0) & (x > 0), 1, code)
    return code


# ---- parameters ----


@device_function
def mixed(x: tl.tensor) -> tl.tensor:
    """A hash of int32 (Murmur3's finaliser), the twin of `mixed` in evenstep/optim/rounding.py."""
    # Products wrap modulo 2^32, and shifts keep the sign, as in the twin: the noise has to be equal bit for bit.
    x = (x ^ (x >> 16)) * -2048144789
    x = (x ^ (x >> 13)) * -1028477387
    return x ^ (x >> 16)


@device_function
def write(
    p: tl.tensor, lost: tl.tensor, exact: tl.tensor, offsets: tl.tensor, places: tl.tensor, inside: tl.tensor,
    seed: tl.tensor, P: tl.constexpr, KAHAN: tl.constexpr, STOCHASTIC: tl.constexpr,
) -> None:  # fmt: skip
    """Round ``exact`` (fp32) into entries ``offsets`` of a parameter of dtype ``P``, as evenstep/optim/rounding.py.

    ``places``: the number of each entry in the noise of stochastic rounding.
    """
    if KAHAN:
        # p <- round(exact + lost), lost <- what rounding took away.
        exact += read(lost, offsets, inside)
        kept = exact.to(P)
        tl.store(p + offsets, kept, mask=inside)
        tl.store(lost + offsets, (exact - kept.to(tl.float32)).to(P), mask=inside)
    elif STOCHASTIC:
        # Noise of 16 bits below the last bit that bf16 keeps: it carries into that bit with the probability that makes
        # the mean exact. It is a hash of the seed and the entry's number in its tensor, so it depends on neither tiles
        # nor programs. The number enters modulo 2^32.
        noise = mixed(places.to(tl.int32) * -1640531527 + seed) & 0xFFFF
        rounded = ((exact.to(tl.int32, bitcast=True) + noise) & -65536).to(tl.float32, bitcast=True)
        finite = tl.abs(exact) <= LARGEST  # noise could turn the bits of an Inf into those of a NaN
        tl.store(p + offsets, tl.where(finite, rounded, exact).to(P), mask=inside)
    else:
        tl.store(p + offsets, exact.to(P), mask=inside)
