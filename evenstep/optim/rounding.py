"""Rounding of results into 16-bit parameters: stochastic rounding and Kahan summation.

A bf16 parameter of 1.0 has a neighbour at 0.996: an update below half of that gap vanishes when the result is rounded
to nearest. Stochastic rounding takes the upper or the lower neighbour with probabilities that make the mean exact (as
torchao's optimizers do). Kahan summation keeps what rounding lost in a second 16-bit tensor and adds it to the next
update (as optimi does).
"""

import torch
from torch import Tensor

from evenstep.kernels.interface import constant

# Odd 32-bit constants, written as signed numbers because torch has no uint32 arithmetic: the golden ratio of Weyl
# sequences and the two multipliers of Murmur3's finaliser.
GOLDEN, _MIX1, _MIX2 = -1640531527, -2048144789, -1028477387


def write_kahan(p: Tensor, exact: Tensor, lost: Tensor, accepted: Tensor) -> None:
    """Round ``exact`` (fp32) plus the compensation ``lost`` into ``p``, and store the new rounding error in ``lost``.

    ``p`` and ``lost`` have the same shape and 16-bit dtype. Where ``accepted`` (0-d, 1 or 0) is 0, nothing changes,
    provided that ``exact`` equals ``p``.
    """
    exact = torch.addcmul(exact, lost.to(exact.dtype), accepted)
    p.copy_(exact)
    # Inductor computes in fp32 and drops a conversion to 16 bits whose result is converted back, so that the rounding
    # error of a compiled step would be 0. An operation on the bits, here one that changes none, keeps the conversion.
    rounded = p.view(torch.int16).bitwise_and(-1).view(p.dtype).to(exact.dtype)
    # accepted = 1: lost <- exact - round(exact). accepted = 0: exact equals p, so lost <- 0 + lost.
    lost.copy_((exact - rounded).addcmul_(lost.to(exact.dtype), 1 - accepted))


def noise_seeds(
    t: Tensor,
    places: list[tuple[int, int]],
    device: torch.device | None = None,
    starts: list[int] | None = None,
) -> list[Tensor]:
    """A 0-d int32 seed for each tensor on ``device`` (default: that of ``t``), from the step ``t`` (0-d) and the place
    of the tensor (number of its group, number in the group).

    ``starts`` are the numbers of the first entries of shards in their whole tensors. An entry of a shard of whole rows
    then has the noise that it has in the whole tensor, on any number of processes.

    The seeds are the same after a resume and on all replicas, and no random state is read or changed.
    """
    step = mixed(t.to(torch.int32) * GOLDEN)
    # A prime above any usual group size keeps the numbers of (group, index) apart.
    tensor = constant([(place * 1_000_003 + index) % 2**31 for place, index in places], torch.int32, device or t.device)
    seeds = tensor ^ step
    if starts is not None:  # the noise of entry i is a hash of i * GOLDEN + seed
        shifts = [(start * GOLDEN + 2**31) % 2**32 - 2**31 for start in starts]  # as int32 arithmetic wraps around
        seeds = seeds + constant(shifts, torch.int32, seeds.device)
    return list(seeds.unbind())


def mixed(x: Tensor) -> Tensor:
    """32 bits, changed in place, each of which depends on all input bits (Murmur3's finaliser)."""
    # ``>>`` on int32 keeps the sign; the kernels' twins do the same, since their noise has to be equal bit for bit.
    x.bitwise_xor_(x >> 16).mul_(_MIX1)
    x.bitwise_xor_(x >> 13).mul_(_MIX2)
    return x.bitwise_xor_(x >> 16)


def stochastically_rounded(x: Tensor, dtype: torch.dtype, seed: Tensor, start: int = 0) -> Tensor:
    """fp32 ``x`` as ``dtype`` (bf16 or fp16), rounded up or down at random, unbiased. Inf and NaN stay as they are.

    The noise is a hash of ``seed`` and the number of the entry (``start`` is the number of the first), three times as
    fast as a generator on CPUs. Values below fp16's smallest normal number (6e-5) have fewer bits there and are rounded
    to nearest.
    """
    # fp32 has 23 bits of fraction, bf16 7 and fp16 10: the difference is cut off.
    below = 16 if dtype == torch.bfloat16 else 13
    number = torch.arange(start, start + x.numel(), dtype=torch.int32, device=x.device)
    # Uniform noise is added below the last bit that stays, then all bits below are cut off. A value that lies a
    # fraction f of the gap above its lower neighbour carries over into that bit with probability f.
    noise = mixed(number.mul_(GOLDEN).add_(seed)).bitwise_and_((1 << below) - 1).view(x.shape)
    rounded = noise.add_(x.contiguous().view(torch.int32)).bitwise_and_(-(1 << below)).view(torch.float32)
    # Noise could turn the bits of an Inf into those of a NaN.
    return torch.where(torch.isfinite(x), rounded, x).to(dtype)
