"""Triton kernels that compute the numbers of whole tensors, one program per tensor.

They stand between the kernels that read and write entries: from the results of chunks they compute the limits, gains
and step sizes of a step, write the 0-d scalars of the state, and fill in the statistics. A step of PyTorch operators on
vectors ``[k]`` would do the same with more than a hundred launches, each of which costs the host several microseconds.

The equations are those of `adaclip`, `adagn`, `AdamPlan` and `statistics` in evenstep/optim/functional.py. Arithmetic
is fp64, as in cpu_adam.h, because ``1 - beta**n`` loses its digits in fp32 for a beta near one.

Arguments that the kernels share, besides those of triton_flat.py:

* ``partial [rows, width]``, fp32: the results of chunks.
* ``settings``, fp64: one vector for all tensors, in the order of `STEP_OPTIONS` (Adam) or `SCALE_OPTIONS`.
* ``scalars [rows, k]``, int64: addresses of the fp32 scalars in the state of each tensor. They are read and written in
  place, so that the format of the state does not depend on these kernels.
* ``facts [4, k]``, fp32: largest entry, norm, limit and rescale of each gradient.
* ``stats [8, k]``, fp32: the statistics of the step, a row per name in `STATS`.

A tensor whose gradient is not finite keeps its scalars: ``tl.where`` selects the stored value.
"""

import triton.language as tl

from evenstep.kernels import triton_flat as rows
from evenstep.kernels.interface import ADAM_SCALARS, SCALE_OPTIONS, STATS, STEP_OPTIONS
from evenstep.kernels.triton_math import LARGEST, Constant, add_squares, device_function, kernel, norm_of, pointer

SIGN = Constant(STEP_OPTIONS.index("sign"))
LR = Constant(STEP_OPTIONS.index("lr"))
BETA1 = Constant(STEP_OPTIONS.index("beta1"))
BETA2 = Constant(STEP_OPTIONS.index("beta2"))
EPS = Constant(STEP_OPTIONS.index("eps"))
DECAY = Constant(STEP_OPTIONS.index("decay"))
DECAY_AFTER = Constant(STEP_OPTIONS.index("decay_after"))
WARMUP = Constant(STEP_OPTIONS.index("warmup"))
RESET = Constant(STEP_OPTIONS.index("reset"))
FORGET = Constant(STEP_OPTIONS.index("forget"))
FORGET_AFTER = Constant(STEP_OPTIONS.index("forget_after"))
EPS_FIRST = Constant(STEP_OPTIONS.index("eps_first"))
GAMMA1 = Constant(STEP_OPTIONS.index("gamma1"))
GAMMA2 = Constant(STEP_OPTIONS.index("gamma2"))
GAMMA3 = Constant(STEP_OPTIONS.index("gamma3"))
ROBUST = Constant(STEP_OPTIONS.index("robust"))
ONE_COUNTER = Constant(STEP_OPTIONS.index("one_counter"))
CAP_FACTOR = Constant(STEP_OPTIONS.index("cap_factor"))
CAP_SPREAD = Constant(STEP_OPTIONS.index("cap_spread"))

SCALE_SIGN = Constant(SCALE_OPTIONS.index("sign"))
SCALE_LR = Constant(SCALE_OPTIONS.index("lr"))
SCALE_DECAY = Constant(SCALE_OPTIONS.index("decay"))
MOMENTUM = Constant(SCALE_OPTIONS.index("momentum"))

AGE = Constant(ADAM_SCALARS.index("age"))
PEAK = Constant(ADAM_SCALARS.index("peak"))
NORM = Constant(ADAM_SCALARS.index("norm"))
NORM_RMS = Constant(ADAM_SCALARS.index("norm_rms"))
COUNT = Constant(ADAM_SCALARS.index("n"))

GRAD_MAX = Constant(STATS.index("grad_max"))
GRAD_NORM = Constant(STATS.index("grad_norm"))
NORM_AFTER = Constant(STATS.index("norm_after"))
CLIP_LIMIT = Constant(STATS.index("clip_limit"))
CLIPPED = Constant(STATS.index("clipped"))
STATS_GAIN = Constant(STATS.index("gain"))
UPDATE_RMS = Constant(STATS.index("update_rms"))
SKIPPED = Constant(STATS.index("skipped"))

# Rows of `numbers` (triton_flat.py), under names that Triton accepts as constants of this module.
FINITE_ROW, GAIN_ROW, LIMIT_ROW, REDUCED_ROW = rows.FINITE, rows.GAIN, rows.LIMIT, rows.REDUCED
KEEP1_ROW, KEEP2_ROW, ADD1_ROW, ADD2_ROW = rows.KEEP1, rows.KEEP2, rows.ADD1, rows.ADD2
STEP_SIZE_ROW, INVERSE_ROOT2_ROW, EPS_ROW = rows.STEP_SIZE, rows.INVERSE_ROOT2, rows.EPS
SHRINK_ROW, SHRINK_AFTER_ROW, AFTER_ROW = rows.SHRINK, rows.SHRINK_AFTER, rows.AFTER
CAP_FACTOR_ROW, CAP_SPREAD_ROW = rows.CAP_FACTOR, rows.CAP_SPREAD
RATE_FINITE, RATE_GAIN, RATE_KEEP, RATE_ADD = rows.RATE_FINITE, rows.RATE_GAIN, rows.RATE_KEEP, rows.RATE_ADD
RATE, RATE_SHRINK, RATE_ROOT = rows.RATE, rows.RATE_SHRINK, rows.RATE_ROOT

TINY = Constant(1.1754943508222875e-38)  # the smallest normal number of fp32

# ---- from chunks to tensors ----
#
# A tensor's chunks are neighbours in `partial`. The order of additions depends on their number alone, so results do not
# depend on which program finished first.


@device_function
def largest_of(values: tl.tensor, count: tl.tensor, TILE: tl.constexpr) -> tl.tensor:
    """The largest of ``count`` values that are not negative; 0 of none."""
    most = tl.zeros([TILE], tl.float32)
    for start in range(0, count, TILE):
        offsets = start + tl.arange(0, TILE)
        most = tl.maximum(most, tl.load(values + offsets, mask=offsets < count, other=0.0))
    return tl.max(most)


@device_function
def norm_over(values: tl.tensor, count: tl.tensor, TILE: tl.constexpr) -> tl.tensor:
    """The 2-norm of ``count`` norms."""
    high = tl.zeros([TILE], tl.float32)
    middle, low = high, high
    for start in range(0, count, TILE):
        offsets = start + tl.arange(0, TILE)
        x = tl.load(values + offsets, mask=offsets < count, other=0.0)
        high, middle, low = add_squares(x, high, middle, low)
    return norm_of(tl.sum(high), tl.sum(middle), tl.sum(low))


@device_function
def sum_over(values: tl.tensor, count: tl.tensor, TILE: tl.constexpr) -> tl.tensor:
    """The sum of ``count`` values."""
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, count, TILE):
        offsets = start + tl.arange(0, TILE)
        total += tl.load(values + offsets, mask=offsets < count, other=0.0)
    return tl.sum(total)


@kernel
def totals(
    first_chunk: tl.tensor, chunk_count: tl.tensor, partial: tl.tensor, width: tl.tensor, out: tl.tensor, k: tl.tensor,
    MAXIMA: tl.constexpr, NORMS: tl.constexpr, SUMS: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """``partial [rows, width]`` to ``out [rows, k]``: rows of maxima come first, then rows of norms, then of sums.

    Where a maximum says that an entry is not finite, norms are NaN."""
    i = tl.program_id(0)
    first, count = tl.load(first_chunk + i), tl.load(chunk_count + i)
    most = tl.full([], 0.0, tl.float32)
    # `row` is a constant of the unrolled loop, so each row is compiled with its own branch.
    for row in tl.static_range(MAXIMA + NORMS + SUMS):
        values = partial + row * width + first
        if row < MAXIMA:
            total = largest_of(values, count, TILE)
            most = tl.maximum(most, total)
        elif row < MAXIMA + NORMS:
            total = tl.where(most <= LARGEST, norm_over(values, count, TILE), float("nan"))
        else:
            total = sum_over(values, count, TILE)
        tl.store(out + row * k + i, total)


# ---- Adam, SPAM, Stable-SPAM ----


@device_function
def bias_correction(beta: tl.tensor, count: tl.tensor) -> tl.tensor:
    """``1 - beta**count`` in fp64."""
    return 1 - tl.exp(count * tl.log(beta))


@device_function
def robust_input(x: tl.tensor, ema: tl.tensor, n: tl.tensor, gamma: tl.tensor, robust: tl.tensor) -> tl.tensor:
    """The value that enters a running mean: ``x``, bounded where ``robust`` is not 0 (functional.py)."""
    before = ema / bias_correction(gamma, tl.maximum(n - 1, 1.0))
    ratio = tl.maximum(1 + 0.1 * bias_correction(gamma, n) / (1 - gamma), 2.0)
    known = (robust != 0) & (n > 10) & (before > 0)
    return tl.where(known, tl.minimum(x, ratio * before), x)


@device_function
def clip_limit(
    largest: tl.tensor, ema: tl.tensor, n: tl.tensor, gamma3: tl.tensor, robust: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """AdaClip: the new T = gamma3 T + (1 - gamma3) max|g|, and the limit T / (1 - gamma3^n), both fp64."""
    ema = ema.to(tl.float64)
    ema = gamma3 * ema + (1 - gamma3) * robust_input(largest.to(tl.float64), ema, n, gamma3, robust)
    return ema, ema / bias_correction(gamma3, n)


@device_function
def rescale_of(limit: tl.tensor, peak: tl.tensor) -> tl.tensor:
    """What entries above the limit are multiplied by, limit / max|g|, so that the largest lands on the limit."""
    return tl.where(limit < peak, tl.div_rn(limit, peak), 1.0)


@device_function
def norm_gain(
    norm: tl.tensor, mu: tl.tensor, rms: tl.tensor, n: tl.tensor,
    gamma1: tl.tensor, gamma2: tl.tensor, eps: tl.tensor, robust: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """AdaGN: the gain mu_hat / (sqrt(nu_hat) + eps) / r in fp32, with r the norm after clipping, and in fp64 the new
    mu = gamma1 mu + (1 - gamma1) r and the root of nu = gamma2 nu + (1 - gamma2) r^2.

    The state holds sqrt(nu), since nu overflows before the norm does; fp64 holds the squares of all fp32 numbers.
    """
    mu, rms = mu.to(tl.float64), rms.to(tl.float64)
    r = robust_input(norm.to(tl.float64), mu, n, gamma1, robust)
    mu = gamma1 * mu + (1 - gamma1) * r
    rms = tl.sqrt(gamma2 * rms * rms + (1 - gamma2) * r * r)
    mean = tl.minimum(mu / bias_correction(gamma1, n), LARGEST)
    root = tl.minimum(rms / tl.sqrt(bias_correction(gamma2, n)) + eps, LARGEST)
    # A norm of 0, or below the normal numbers, which no gain could bring back, has the gain 0.
    divisor = tl.where(norm >= TINY, norm, 1.0).to(tl.float64)
    gain = tl.where(norm >= TINY, tl.minimum(mean / root / divisor, LARGEST), 0.0).to(tl.float32)
    return gain, mu, rms


@device_function
def put(values: tl.tensor, row: int, k: tl.tensor, i: tl.tensor, x: tl.tensor) -> None:
    """Store ``x`` in a row of ``values [rows, k]``, fp32."""
    tl.store(values + row * k + i, x.to(tl.float32))


@kernel
def adam_limits(
    first_chunk: tl.tensor, chunk_count: tl.tensor, partial: tl.tensor, width: tl.tensor,
    scalars: tl.tensor, settings: tl.tensor, facts: tl.tensor, k: tl.tensor, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """AdaClip of Stable-SPAM. ``partial``: the result of `measure_chunks`. Writes ``facts`` and T."""
    i = tl.program_id(0)
    first, count = tl.load(first_chunk + i), tl.load(chunk_count + i)
    peak = largest_of(partial + first, count, TILE)
    norm = norm_over(partial + width + first, count, TILE)
    at = pointer(scalars, PEAK, k, i, tl.float32, False)
    before, n = tl.load(at), tl.load(pointer(scalars, COUNT, k, i, tl.float32, False)).to(tl.float64) + 1
    ema, limit = clip_limit(peak, before, n, tl.load(settings + GAMMA3), tl.load(settings + ROBUST))
    limit = limit.to(tl.float32)
    # A norm beyond the range of fp32, though no entry is, is treated as a gradient that is not finite.
    tl.store(at, tl.where((peak <= LARGEST) & (norm <= LARGEST), ema.to(tl.float32), before))
    put(facts, 0, k, i, peak)
    put(facts, 1, k, i, norm)
    put(facts, 2, k, i, tl.where(peak <= LARGEST, limit, float("inf")))
    put(facts, 3, k, i, rescale_of(limit, peak))


@kernel
def adam_numbers(
    first_chunk: tl.tensor, chunk_count: tl.tensor, partial: tl.tensor, width: tl.tensor, facts: tl.tensor,
    scalars: tl.tensor, settings: tl.tensor, sizes: tl.tensor, numbers: tl.tensor, stats: tl.tensor, k: tl.tensor,
    STABLE: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """The factors of Adam's update (``numbers [16, k]``, `ADAM_ROWS`), the new scalars, and most statistics.

    ``partial``: with ``STABLE`` the result of `clip_chunks` (and ``facts`` that of `adam_limits`), else that of
    `measure_chunks`.
    """
    i = tl.program_id(0)
    first, count = tl.load(first_chunk + i), tl.load(chunk_count + i)
    eps = tl.load(settings + EPS)
    if STABLE:
        peak, raw = tl.load(facts + i), tl.load(facts + k + i)
        limit, rescale = tl.load(facts + 2 * k + i), tl.load(facts + 3 * k + i)
        norm = norm_over(partial + first, count, TILE)  # after clipping
        clipped = sum_over(partial + width + first, count, TILE)
        finite = (peak <= LARGEST) & (raw <= LARGEST)
    else:
        peak, raw = largest_of(partial + first, count, TILE), norm_over(partial + width + first, count, TILE)
        # v holds squares of entries, and one that overflows would make it Inf for good.
        finite = peak * peak <= LARGEST
        norm, limit, rescale, clipped = raw, float("inf"), 1.0, 0.0
    # MoRet: the reset step counts as 1.
    at = pointer(scalars, AGE, k, i, tl.float32, False)
    before = tl.load(at)
    age = before.to(tl.float64) * (1 - tl.load(settings + RESET)) + 1
    tl.store(at, tl.where(finite, age.to(tl.float32), before))
    gain = tl.full([], 1.0, tl.float32)
    if STABLE:
        mu_at = pointer(scalars, NORM, k, i, tl.float32, False)
        rms_at = pointer(scalars, NORM_RMS, k, i, tl.float32, False)
        n_at = pointer(scalars, COUNT, k, i, tl.float32, False)
        old_mu, old_rms, old_n = tl.load(mu_at), tl.load(rms_at), tl.load(n_at)
        n, robust = old_n.to(tl.float64) + 1, tl.load(settings + ROBUST)
        gamma1, gamma2 = tl.load(settings + GAMMA1), tl.load(settings + GAMMA2)
        gain, mu, rms = norm_gain(norm, old_mu, old_rms, n, gamma1, gamma2, eps, robust)
        n = tl.where(tl.load(settings + ONE_COUNTER) != 0, age, n)
        tl.store(mu_at, tl.where(finite, mu.to(tl.float32), old_mu))
        tl.store(rms_at, tl.where(finite, rms.to(tl.float32), old_rms))
        tl.store(n_at, tl.where(finite, n.to(tl.float32), old_n))
    gain = tl.where(finite, gain, 0.0)
    # Adam: update = lr w / (1 - beta1^age) * m / (sqrt(v) / sqrt(1 - beta2^age) + eps), w the re-warm-up.
    beta1, beta2, lr = tl.load(settings + BETA1), tl.load(settings + BETA2), tl.load(settings + LR)
    keep = 1 - tl.load(settings + FORGET)
    step = lr * tl.load(settings + WARMUP) / bias_correction(beta1, age)
    root2 = tl.sqrt(bias_correction(beta2, age))
    eps_first = tl.load(settings + EPS_FIRST) != 0  # published SPAM adds eps before it corrects the bias
    step = tl.where(eps_first, step * root2, step)
    signed = gain * tl.load(settings + SIGN).to(tl.float32)
    put(numbers, FINITE_ROW, k, i, finite)
    put(numbers, GAIN_ROW, k, i, signed)
    put(numbers, LIMIT_ROW, k, i, tl.full([], 0.0, tl.float32) + limit)
    put(numbers, REDUCED_ROW, k, i, rescale * signed)
    put(numbers, KEEP1_ROW, k, i, tl.where(finite, keep * beta1, 1.0))
    put(numbers, KEEP2_ROW, k, i, tl.where(finite, keep * beta2, 1.0))
    put(numbers, ADD1_ROW, k, i, 1 - beta1)
    put(numbers, ADD2_ROW, k, i, 1 - beta2)
    put(numbers, STEP_SIZE_ROW, k, i, tl.where(finite, step, 0.0))
    put(numbers, INVERSE_ROOT2_ROW, k, i, tl.where(eps_first, 1.0, 1 / root2))
    put(numbers, EPS_ROW, k, i, eps)
    put(numbers, SHRINK_ROW, k, i, 1 - lr * tl.load(settings + DECAY))
    put(numbers, SHRINK_AFTER_ROW, k, i, 1 - lr * tl.load(settings + DECAY_AFTER))
    put(numbers, AFTER_ROW, k, i, 1 - tl.load(settings + FORGET_AFTER))
    put(numbers, CAP_FACTOR_ROW, k, i, tl.load(settings + CAP_FACTOR))
    put(numbers, CAP_SPREAD_ROW, k, i, tl.load(settings + CAP_SPREAD))
    size = tl.maximum(tl.load(sizes + i), 1).to(tl.float32)
    shown = peak <= LARGEST  # norms of a tensor with a NaN or Inf are NaN
    put(stats, GRAD_MAX, k, i, peak)
    put(stats, GRAD_NORM, k, i, tl.where(shown, raw, float("nan")))
    put(stats, NORM_AFTER, k, i, tl.where(shown, norm, float("nan")) * gain)
    put(stats, CLIPPED, k, i, tl.div_rn(tl.full([], 0.0, tl.float32) + clipped, size))
    if STABLE:
        put(stats, CLIP_LIMIT, k, i, limit)
    else:
        put(stats, CLIP_LIMIT, k, i, tl.full([], float("nan"), tl.float32))
    put(stats, STATS_GAIN, k, i, gain)
    put(stats, SKIPPED, k, i, 1 - finite.to(tl.int32))


@kernel
def adam_report(
    first_chunk: tl.tensor, chunk_count: tl.tensor, partial: tl.tensor, width: tl.tensor,
    sizes: tl.tensor, stats: tl.tensor, k: tl.tensor, CAPPED: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """The statistics that are known only after `adam_chunks`, whose result ``partial`` is. ``sizes [k]``: trained
    entries."""
    i = tl.program_id(0)
    first, count = tl.load(first_chunk + i), tl.load(chunk_count + i)
    size = tl.maximum(tl.load(sizes + i), 1).to(tl.float32)
    update = norm_over(partial + first, count, TILE)
    put(stats, UPDATE_RMS, k, i, tl.div_rn(update, tl.sqrt_rn(size)))
    if CAPPED:  # SPAM clips inside of the kernel, by the history of each entry
        put(stats, NORM_AFTER, k, i, norm_over(partial + width + first, count, TILE))
        put(stats, CLIPPED, k, i, tl.div_rn(sum_over(partial + 2 * width + first, count, TILE), size))


# ---- transforms before another optimizer ----
#
# The same equations for `stabilize`, where limits and gains may come from several transforms, and statistics are kept
# after the step of the other optimizer.


@kernel
def adaclip_limits(
    peaks: tl.tensor, gains: tl.tensor, means: tl.tensor, counts: tl.tensor, settings: tl.tensor, out: tl.tensor,
    k: tl.tensor,
) -> None:  # fmt: skip
    """`adaclip` of functional.py: ``out [3, k]`` is the limit of raw entries, the rescale of those above it, and T.

    ``[k]``: largest entries, gains so far, T before, and the number of updates, this one included. ``settings``: gamma3
    and whether to bound what enters T.
    """
    i = tl.program_id(0)
    peak, gain, n = tl.load(peaks + i), tl.load(gains + i), tl.load(counts + i).to(tl.float64)
    ema, limit = clip_limit(peak * gain, tl.load(means + i), n, tl.load(settings), tl.load(settings + 1))
    # The limit is that of entries with their gain. Without a gain there is nothing to clip, or nothing is finite.
    limit = tl.where(gain > 0, (limit / tl.where(gain > 0, gain, 1.0)).to(tl.float32), float("inf"))
    put(out, 0, k, i, limit)
    put(out, 1, k, i, rescale_of(limit, peak))
    put(out, 2, k, i, ema)


@kernel
def adagn_gains(
    raws: tl.tensor, norms: tl.tensor, gains: tl.tensor, means: tl.tensor, roots: tl.tensor, counts: tl.tensor,
    flags: tl.tensor, settings: tl.tensor, out: tl.tensor, finite: tl.tensor, k: tl.tensor,
) -> None:  # fmt: skip
    """`adagn` of functional.py: ``out [3, k]`` is the gain, mu and sqrt(nu); ``finite [k]``, bool, the tensors that
    count.

    ``[k]``: norms before any transform and after clipping, gains so far, mu and sqrt(nu) before, the number of updates,
    this one included, and flags so far. ``settings``: gamma1, gamma2, eps, and whether to bound what enters mu and nu.
    """
    i = tl.program_id(0)
    # A norm beyond the range of fp32, though no entry is, is treated as a gradient that is not finite.
    usable = tl.load(flags + i) & (tl.load(raws + i) <= LARGEST)
    before = tl.where(usable, tl.load(gains + i), 0.0)
    gain, mu, rms = norm_gain(
        tl.load(norms + i) * before, tl.load(means + i), tl.load(roots + i), tl.load(counts + i).to(tl.float64),
        tl.load(settings), tl.load(settings + 1), tl.load(settings + 2), tl.load(settings + 3),
    )  # fmt: skip
    put(out, 0, k, i, tl.where(usable, before * gain, 0.0))
    put(out, 1, k, i, mu)
    put(out, 2, k, i, rms)
    tl.store(finite + i, usable)


@kernel
def read_scalars(scalars: tl.tensor, out: tl.tensor, n: tl.tensor, TILE: tl.constexpr) -> None:
    """``out [n]``: the fp32 numbers at the addresses ``scalars [n]``."""
    places = tl.program_id(0) * TILE + tl.arange(0, TILE)
    at = tl.load(scalars + places, mask=places < n, other=0).to(tl.pointer_type(tl.float32))
    tl.store(out + places, tl.load(at, mask=places < n, other=0.0), mask=places < n)


@kernel
def keep_scalars(
    scalars: tl.tensor, new: tl.tensor, flags: tl.tensor, n: tl.tensor, k: tl.tensor, TILE: tl.constexpr
) -> None:
    """Write ``new [rows, k]`` to the addresses ``scalars [1 + rows, k]``, ``n`` in all, of tensors whose flag is True.
    The first row are counts of the steps whose flag was False."""
    places = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside, counts = places < n, places < k
    at = tl.load(scalars + places, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    accepted = tl.load(flags + places % k, mask=inside, other=0) != 0
    count = tl.load(at, mask=counts, other=0.0) + 1
    value = tl.where(counts, count, tl.load(new + places - k, mask=inside & (places >= k), other=0.0))
    tl.store(at, value, mask=inside & (accepted != counts))


# ---- SCALE ----


@kernel
def scale_numbers(
    first_chunk: tl.tensor, chunk_count: tl.tensor, partial: tl.tensor, width: tl.tensor, settings: tl.tensor,
    lengths: tl.tensor, numbers: tl.tensor, stats: tl.tensor, k: tl.tensor, RMS: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """The factors of SCALE's update (``numbers [7, k]``, `SCALE_ROWS`) and the statistics of the gradient.

    ``partial``: the result of `measure_chunks` or `column_chunks`. ``lengths [k]``: entries of a row.
    """
    i = tl.program_id(0)
    first, count = tl.load(first_chunk + i), tl.load(chunk_count + i)
    peak, norm = largest_of(partial + first, count, TILE), norm_over(partial + width + first, count, TILE)
    finite = peak <= LARGEST
    gain, lr, momentum = finite.to(tl.float32), tl.load(settings + SCALE_LR), tl.load(settings + MOMENTUM)
    # ||x|| / sqrt(length) is the RMS of a row.
    root = tl.full([], 1.0, tl.float32)
    if RMS:
        root = tl.sqrt_rn(tl.maximum(tl.load(lengths + i), 1).to(tl.float32))
    put(numbers, RATE_FINITE, k, i, finite)
    put(numbers, RATE_GAIN, k, i, gain * tl.load(settings + SCALE_SIGN).to(tl.float32))
    put(numbers, RATE_KEEP, k, i, momentum)
    put(numbers, RATE_ADD, k, i, 1 - momentum)
    put(numbers, RATE, k, i, lr)
    put(numbers, RATE_SHRINK, k, i, 1 - lr * tl.load(settings + SCALE_DECAY))
    put(numbers, RATE_ROOT, k, i, root)
    put(stats, GRAD_MAX, k, i, peak)
    put(stats, GRAD_NORM, k, i, tl.where(finite, norm, float("nan")))
    put(stats, CLIP_LIMIT, k, i, tl.full([], float("nan"), tl.float32))
    put(stats, CLIPPED, k, i, tl.full([], 0.0, tl.float32))
    put(stats, SKIPPED, k, i, 1 - finite.to(tl.int32))


@kernel
def scale_report(
    first_chunk: tl.tensor, chunk_count: tl.tensor, partial: tl.tensor, settings: tl.tensor,
    lengths: tl.tensor, heights: tl.tensor, stats: tl.tensor, k: tl.tensor, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """The statistics that are known only after `row_chunks`, whose result ``partial [chunks]`` is: the normalised
    gradient takes the place of the gradient, so its norm is the norm after, and the ratio of the two the gain."""
    i = tl.program_id(0)
    first, count = tl.load(first_chunk + i), tl.load(chunk_count + i)
    size = tl.maximum(tl.load(lengths + i) * tl.load(heights + i), 1).to(tl.float32)
    direction, before = norm_over(partial + first, count, TILE), tl.load(stats + GRAD_NORM * k + i)
    # The comparison keeps a NaN, which `tl.maximum` may drop.
    put(stats, STATS_GAIN, k, i, tl.div_rn(direction, tl.where(before < TINY, TINY, before)))
    put(stats, NORM_AFTER, k, i, direction)
    lr = tl.load(settings + SCALE_LR).to(tl.float32)
    put(stats, UPDATE_RMS, k, i, tl.div_rn(direction * lr, tl.sqrt_rn(size)))
