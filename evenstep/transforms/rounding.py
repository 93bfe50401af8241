"""Writing an fp32 result into a 16-bit parameter.

A bf16 parameter of 1.0 has a neighbour at 0.996: updates below half of that gap vanish when rounded to nearest.
Stochastic rounding takes the upper or lower neighbour with probabilities that make the mean right (as torchao's
optimizers do); Kahan summation keeps what rounding lost in a second 16-bit tensor and adds it to the next update (as
optimi does).
"""

import torch
from torch import Tensor

from evenstep.kernels import constant

_GOLDEN, _MIX1, _MIX2 = -1640531527, -2048144789, -1028477387  # odd 32-bit constants of the usual mixers


def write_kahan(p: Tensor, exact: Tensor, lost: Tensor, accepted: Tensor) -> None:
    """Round ``exact`` (fp32) plus what was ``lost`` into ``p``, and keep what is lost now. With ``accepted`` (0-d, 1 or
    0) 0 nothing changes, provided that ``exact`` is ``p``.
    """
    exact = torch.addcmul(exact, lost.to(exact.dtype), accepted)
    p.copy_(exact)
    lost.copy_((exact - p.to(exact.dtype)).addcmul_(lost.to(exact.dtype), 1 - accepted))


def noise_seeds(t: Tensor, places: list[tuple[int, int]], device: torch.device | None = None) -> list[Tensor]:
    """A 0-d int32 seed per tensor for step ``t`` (0-d) and the tensor's place (numbers of its group and in it): the
    same after a resume and on all replicas, other than any generator's, and known on ``device`` (that of ``t``).
    """
    now = _mixed(t.to(torch.int32) * _GOLDEN)
    whose = constant([(place * 1_000_003 + index) % 2**31 for place, index in places], torch.int32, device or t.device)
    return list((whose ^ now).unbind())


def _mixed(x: Tensor) -> Tensor:
    """32 bits, changed in place, of which each depends on all (Murmur's finaliser)."""
    x.bitwise_xor_(x >> 16).mul_(_MIX1)
    x.bitwise_xor_(x >> 13).mul_(_MIX2)
    return x.bitwise_xor_(x >> 16)


def stochastically_rounded(x: Tensor, dtype: torch.dtype, seed: Tensor, start: int = 0) -> Tensor:
    """fp32 ``x`` as ``dtype`` (bf16 or fp16): up or down at random, right in the mean. Not finite stays as it is.

    Random bits are added below the last bit that stays, then all below are cut off. They are a hash of ``seed`` and the
    number of the entry (``start`` is that of the first), thrice as fast as a generator on CPUs. Values below fp16's
    smallest normal number (6e-5) have fewer bits there and are rounded to nearest.
    """
    below = 16 if dtype == torch.bfloat16 else 13
    number = torch.arange(start, start + x.numel(), dtype=torch.int32, device=x.device)
    noise = _mixed(number.mul_(_GOLDEN).add_(seed)).bitwise_and_((1 << below) - 1).view(x.shape)
    rounded = noise.add_(x.contiguous().view(torch.int32)).bitwise_and_(-(1 << below)).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x).to(dtype)
