"""Adam's update, written once for every optimizer that ends in it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from evenstep.transforms.blocks import blocks
from evenstep.transforms.clock import bias_correction
from evenstep.transforms.gradients import Gradients
from evenstep.transforms.rounding import write


@dataclass(frozen=True, slots=True)
class AdamStep:
    """The numbers of one Adam step for ``k`` tensors: vectors of shape ``[k]`` where tensors differ.

    A tensor whose gradient is not finite keeps its parameters and moments bit for bit: its decays are 1, its step 0,
    its gradient read as 0.
    """

    keep1: Tensor
    """[k] what the first moment is multiplied by: beta1, 0 on a reset, 1 when skipped."""
    keep2: Tensor
    """[k] likewise for the second moment."""
    add1: Tensor
    """0-d: 1 - beta1."""
    add2: float
    step_size: Tensor
    """[k] lr (times any warm-up) over the first bias correction; 0 when skipped."""
    root_bias2: Tensor
    """[k] square root of the second bias correction."""
    shrink: Tensor | None
    """[k] decoupled weight decay: what the parameter is multiplied by before the update; None for no decay."""
    eps: float

    @classmethod
    def plan(
        cls,
        finite: Tensor,
        age: Tensor,
        forget: Tensor,
        *,
        lr: Tensor,
        betas: tuple[float | Tensor, float],
        eps: float,
        weight_decay: float = 0.0,
        warmup: Tensor | float = 1.0,
        eps_before_correction: bool = False,
    ) -> "AdamStep":
        """``age`` [k]: updates since the last reset, this one included; ``forget`` 0-d: 1 clears the moments before the
        gradient enters.

        ``eps_before_correction`` adds ``eps`` to the root of the second moment before its bias is corrected (official
        SPAM), not after.
        """
        beta1, beta2 = betas
        one = torch.ones_like(age)
        keep = one * (1 - forget)
        step_size = lr * warmup / bias_correction(beta1, age)
        root_bias2 = bias_correction(beta2, age).sqrt()
        if eps_before_correction:
            step_size, root_bias2 = step_size * root_bias2, one
        return cls(
            keep1=torch.where(finite, keep * beta1, one),
            keep2=torch.where(finite, keep * beta2, one),
            add1=one.new_tensor(1.0) - beta1,
            add2=1 - beta2,
            step_size=torch.where(finite, step_size, 0 * one),
            root_bias2=root_bias2,
            shrink=torch.where(finite, one - lr * weight_decay, one) if weight_decay else None,
            eps=eps,
        )


@dataclass(slots=True)
class Weights:
    """The parameters of a step (the parts that are here) and how results are written into them."""

    tensors: list[Tensor]
    lost: list[Tensor] | None = None
    """Kahan's compensation, where rounding is ``"kahan"``."""
    noise: list[torch.Generator] = field(default_factory=list)
    """A random generator per tensor, where rounding is ``"stochastic"``."""

    def extras(self, i: int) -> list[Tensor]:
        return [] if self.lost is None else [self.lost[i]]

    def write(self, i: int, p: Tensor, exact: Tensor, extras: list[Tensor]) -> None:
        write(p, exact, extras[0] if extras else None, self.noise[i] if self.noise else None)


Clip = Callable[[int, Tensor, Tensor], Tensor]
"""(number of the tensor, gradient, second moment before this step) -> gradient."""


def opened(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """A stored moment for arithmetic in ``dtype``: itself where it is stored so, else a decoded copy."""
    if type(stored) is not Tensor and hasattr(stored, "dequantize"):
        return stored.dequantize().to(dtype)
    return stored.to(dtype)


def adam_(
    weights: Weights,
    grads: Gradients,
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    how: AdamStep,
    clip: Clip | None = None,
) -> Tensor:
    """Decay, accumulate and step, in place. Returns the 2-norm of each tensor's update (without the decay), shape
    ``[k]``.

    The second moment is capped at the largest finite number, so that a gradient of 1e20 can be forgotten again.
    """
    largest = torch.finfo(grads.dtype).max
    norms = []
    for i, tensors in enumerate(zip(weights.tensors, grads.tensors, exp_avg, exp_avg_sq, strict=True)):
        read, parts = grads.reader(i), []
        keep1, keep2, step_size, root_bias2 = how.keep1[i], how.keep2[i], how.step_size[i], how.root_bias2[i]
        for p, piece, stored_m, stored_v, *extras in blocks(*tensors, *weights.extras(i)):
            g, m, v = read(piece), opened(stored_m, grads.dtype), opened(stored_v, grads.dtype)
            if clip is not None:
                g = clip(i, g, v)
            m.mul_(keep1).addcmul_(g, how.add1)
            v.mul_(keep2).addcmul_(g, g, value=how.add2).clamp_(max=largest)
            update = torch.div(m, v.sqrt().div_(root_bias2).add_(how.eps)).mul_(step_size)
            if m is not stored_m:
                stored_m.copy_(m)
                stored_v.copy_(v)
            parts.append(torch.linalg.vector_norm(update))
            if p.dtype == grads.dtype:
                (p if how.shrink is None else p.mul_(how.shrink[i])).sub_(update)
            else:
                start = p.to(grads.dtype)
                weights.write(i, p, (start if how.shrink is None else start.mul_(how.shrink[i])) - update, extras)
        norms.append(torch.linalg.vector_norm(torch.stack(parts)))
    return torch.stack(norms)
