"""Writing an fp32 result into a 16-bit parameter.

A bf16 parameter of 1.0 has a neighbour at 0.996: updates below half of that gap vanish when rounded to nearest.
Stochastic rounding takes the upper or lower neighbour with probabilities that make the mean right (as torchao's
optimizers do); Kahan summation keeps what rounding lost in a second 16-bit tensor and adds it to the next update (as
optimi does).
"""

import torch
from torch import Tensor

ROUNDINGS = ("nearest", "stochastic", "kahan")


def write(p: Tensor, exact: Tensor, lost: Tensor | None, noise: torch.Generator | None) -> None:
    """Round ``exact`` (fp32) into ``p``: with ``lost`` the Kahan way, with ``noise`` stochastically, else to
    nearest.
    """
    if lost is not None:
        exact = exact + lost.to(exact.dtype)
        p.copy_(exact)
        lost.copy_(exact - p.to(exact.dtype))
    elif noise is not None:
        p.copy_(stochastically_rounded(exact, p.dtype, noise))
    else:
        p.copy_(exact)


def stochastically_rounded(x: Tensor, dtype: torch.dtype, noise: torch.Generator) -> Tensor:
    """fp32 ``x`` as ``dtype`` (bf16 or fp16): up or down at random, right in the mean. Not finite stays as it is.

    Random bits are added below the last bit that stays, then all below are cut off. Values below fp16's smallest normal
    number (6e-5) have fewer bits there and are rounded to nearest.
    """
    below = 16 if dtype == torch.bfloat16 else 13
    bits = torch.randint(0, 1 << below, x.shape, dtype=torch.int32, device=x.device, generator=noise)
    rounded = (x.view(torch.int32) + bits).bitwise_and_(-(1 << below)).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x).to(dtype)
