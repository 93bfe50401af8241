"""Adam's update, written once for every optimizer that ends in it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from evenstep.kernels import AdamWork, is_coded, table
from evenstep.transforms.blocks import blocks
from evenstep.transforms.clock import bias_correction
from evenstep.transforms.gradients import Gradients
from evenstep.transforms.rounding import stochastically_rounded, write_kahan
from evenstep.transforms.spike_clip import EntryClip


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
    after: Tensor | None = None
    """[k] what the moments are multiplied by once the step is taken; None for 1."""
    shrink_after: Tensor | None = None
    """[k] likewise for the parameter."""

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
        forget_after: Tensor | None = None,
        weight_decay_after: float = 0.0,
    ) -> "AdamStep":
        """``age`` [k]: updates since the last reset, this one included; ``forget`` 0-d: 1 clears the moments before the
        gradient enters.

        ``eps_before_correction`` adds ``eps`` to the root of the second moment before its bias is corrected (official
        SPAM), not after. ``forget_after`` (0-d, 1 or 0) and ``weight_decay_after`` are as ``forget`` and
        ``weight_decay``, once the step is taken (the published codes' order).
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
            add1=one.new_ones(()) - beta1,
            add2=1 - beta2,
            step_size=torch.where(finite, step_size, 0 * one),
            root_bias2=root_bias2,
            shrink=torch.where(finite, one - lr * weight_decay, one) if weight_decay else None,
            eps=eps,
            after=None if forget_after is None else torch.where(finite, one * (1 - forget_after), one),
            shrink_after=torch.where(finite, one - lr * weight_decay_after, one) if weight_decay_after else None,
        )


@dataclass(slots=True)
class Weights:
    """The parameters of a step (the parts that are here) and how results are written into them."""

    tensors: list[Tensor]
    finite: Tensor
    """[k] bool: the others are to stay as they are."""
    lost: list[Tensor | None]
    """Kahan's compensation, where rounding is ``"kahan"``."""
    seeds: list[Tensor | None]
    """0-d int32, where rounding is ``"stochastic"``."""
    masks: list[Tensor] = field(default_factory=list)
    """For kernels: packed bits of the entries that are trained (no bits for all), or an empty list for all of all."""

    def extras(self, i: int) -> list[Tensor]:
        lost = self.lost[i]
        return [] if lost is None else [lost]

    def write(self, i: int, p: Tensor, exact: Tensor, extras: list[Tensor], start: int) -> None:
        """Round ``exact`` into ``p``, a piece of tensor ``i`` that begins at its entry ``start``."""
        seed = self.seeds[i]
        if p.dtype == exact.dtype:
            p.copy_(exact)
        elif extras:
            write_kahan(p, exact, extras[0], self.finite[i].to(exact.dtype))
        elif seed is not None:
            p.copy_(stochastically_rounded(exact, p.dtype, seed, start))
        else:
            p.copy_(exact)


def filled(tensors: list[Tensor | None]) -> list[Tensor]:
    """For kernels, which take lists of tensors: no list where there is none, empty tensors for those that miss."""
    given = [x for x in tensors if x is not None]
    return [given[0].new_empty(0) if x is None else x for x in tensors] if given else []


def opened(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """A stored moment for arithmetic in ``dtype``: itself where it is stored so, else a decoded copy."""
    return stored.dequantize().to(dtype) if is_coded(stored) else stored.to(dtype)


def close(stored: Tensor, moment: Tensor, accepted: Tensor) -> None:
    """Store what `opened` gave, after the arithmetic, if ``accepted`` (0-d bool)."""
    if is_coded(stored):
        # Coding again what was decoded may give other codes (a block's largest entry is coded exactly only if it is
        # positive), so a moment that should stay needs its old ones.
        before = stored.codes.clone(), stored.scale.clone()  # type: ignore[attr-defined]
        stored.copy_(moment)
        if not stored.signed:  # type: ignore[attr-defined]
            # Beside a spike whose square is 4e6 times larger, the code of a second moment would be 0, and its entry's
            # next update m / eps. The smallest code that is not 0 keeps such an update small instead.
            codes = stored.codes  # type: ignore[attr-defined]
            codes.copy_(codes + ((codes == 0) & (moment.view(codes.shape) > 0)).to(codes.dtype))
        for part, old in zip((stored.codes, stored.scale), before, strict=True):  # type: ignore[attr-defined]
            part.copy_(torch.where(accepted, part, old))
    elif stored.dtype != moment.dtype:  # the largest numbers of fp32 would round to Inf in bf16, and stay there
        most = min(torch.finfo(stored.dtype).max, torch.finfo(moment.dtype).max)
        stored.copy_(moment.clamp(-most, most))


def adam_(
    weights: Weights,
    grads: Gradients,
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    how: AdamStep,
    clip: EntryClip | None = None,
) -> Tensor:
    """Decay, accumulate and step, in place. Returns the 2-norm of each tensor's update (without the decay), shape
    ``[k]``.

    The second moment is capped at the largest finite number, so that rounding cannot make it infinite for good.
    """
    if grads.kernels is not None:
        return _fused_adam_(weights, grads, exp_avg, exp_avg_sq, how, clip)
    largest = torch.finfo(grads.dtype).max
    norms = []
    for i, tensors in enumerate(zip(weights.tensors, grads.tensors, exp_avg, exp_avg_sq, strict=True)):
        read, parts, start = grads.reader(i), [], 0
        keep1, keep2, step_size, root_bias2 = how.keep1[i], how.keep2[i], how.step_size[i], how.root_bias2[i]
        for p, piece, stored_m, stored_v, *extras in blocks(*tensors, *weights.extras(i)):
            g, m, v = read(piece), opened(stored_m, grads.dtype), opened(stored_v, grads.dtype)
            if clip is not None:
                g = clip(i, g, v)
            m.mul_(keep1).addcmul_(g, how.add1)
            v.mul_(keep2).addcmul_(g, g, value=how.add2).clamp_(max=largest)
            update = torch.div(m, v.sqrt().div_(root_bias2).add_(how.eps)).mul_(step_size)
            if how.after is not None:
                m.mul_(how.after[i])
                v.mul_(how.after[i])
            close(stored_m, m, weights.finite[i])
            close(stored_v, v, weights.finite[i])
            parts.append(torch.linalg.vector_norm(update))
            exact = p if p.dtype == grads.dtype else p.to(grads.dtype)
            if how.shrink is not None:
                exact.mul_(how.shrink[i])
            exact.sub_(update)
            if how.shrink_after is not None:
                exact.mul_(how.shrink_after[i])
            if exact is not p:
                weights.write(i, p, exact, extras, start)
                start += p.numel()
        norms.append(torch.linalg.vector_norm(torch.stack(parts)))
    return torch.stack(norms)


def _fused_adam_(
    weights: Weights,
    grads: Gradients,
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    how: AdamStep,
    clip: EntryClip | None,
) -> Tensor:
    assert grads.kernels is not None
    numbers = table(
        grads.peak,
        weights.finite,
        *grads.numbers(),
        how.keep1,
        how.keep2,
        how.add1,
        how.add2,
        how.step_size,
        1 / how.root_bias2,
        how.eps,
        1.0 if how.shrink is None else how.shrink,
        1.0 if how.shrink_after is None else how.shrink_after,
        1.0 if how.after is None else how.after,
        0.0 if clip is None else clip.factor,
        0.0 if clip is None else clip.spread,
    )
    found = grads.kernels.adam_(
        AdamWork(
            weights.tensors,
            grads.tensors,
            exp_avg,
            exp_avg_sq,
            numbers,
            masks=weights.masks,
            lost=filled(weights.lost),
            seeds=filled(weights.seeds),
            capped=clip is not None,
            zero_history=clip is not None and clip.zero_history,
            measured=grads.measured,
        )
    )
    if clip is not None:
        clip.found(found.clipped_norm, found.clipped)
    return found.update_norm
