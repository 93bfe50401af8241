"""Gradient transforms that look at one tensor at a time."""

import torch
from torch import Tensor

from evenstep.transforms.checks import check
from evenstep.transforms.gradients import Gradients
from evenstep.transforms.lockstep import Combine, Steps, combined
from evenstep.transforms.spike_clip import EntryClip
from evenstep.transforms.stable import adaclip, adagn
from evenstep.transforms.transform import Now, Statistics, Transform, shared_dtype

Result = Steps[tuple[Gradients, Statistics]]


class AdaClip(Transform):
    """Clip entries to a running mean of their tensor's largest entry, by scaling them down to it (arXiv:2502.17055,
    section 4).

    ``gamma3`` is the decay of that mean, default 0.999 (paper). Raises ValueError when it is not in [0, 1).
    """

    name = "adaclip"
    scalars = ("peak", "n")
    options = ("gamma3",)

    def __init__(self, gamma3: float = 0.999):
        check(type(self).__name__, gamma3=gamma3)
        self.gamma3 = gamma3

    def __call__(self, grads: Gradients, state: Statistics, now: Now) -> Result:
        n = state["n"] + 1
        if grads.limit is not None:  # clipped already: this limit speaks of the entries as they are after that
            grads = yield from grads.replaced([grads.read(i) for i in range(len(grads.tensors))])
        grads, peak = adaclip(grads, state["peak"], n, self.gamma3)
        return grads, {"peak": peak, "n": n}


class AdaGN(Transform):
    """Give each tensor the norm that the history of its norm suggests: mean over root mean square (arXiv:2502.17055,
    section 4).

    ``gamma1`` and ``gamma2`` are the decays of the norm's mean and mean square, defaults 0.7 and 0.9 (paper, 4-bit;
    0.85 and 0.99999 for BF16); ``eps`` is added to the root. A gradient that is zero, or whose norm is below
    1.2e-38, becomes zero; one whose norm is above 3.4e38 counts as not finite. Raises ValueError when a value is out of
    range.
    """

    name = "adagn"
    scalars = ("norm", "norm_rms", "n")
    options = ("gamma1", "gamma2", "eps")

    def __init__(self, gamma1: float = 0.7, gamma2: float = 0.9, eps: float = 1e-8):
        check(type(self).__name__, gamma1=gamma1, gamma2=gamma2, eps=eps)
        self.gamma1, self.gamma2, self.eps = gamma1, gamma2, eps

    def __call__(self, grads: Gradients, state: Statistics, now: Now) -> Result:
        n = state["n"] + 1
        grads = (yield from grads.with_norms()).within_range()
        gain, ema, rms = adagn(grads.norm, state["norm"], state["norm_rms"], n, self.gamma1, self.gamma2, self.eps)
        return grads.amplified(gain), {"norm": ema, "norm_rms": rms, "n": n}


class GradientStabilizer(AdaGN):
    """AdaGN alone with the defaults of GradientStabilizer (arXiv:2502.17055 v3): gamma1 0.6, gamma2 0.999, no eps."""

    name = "gradient_stabilizer"

    def __init__(self, gamma1: float = 0.6, gamma2: float = 0.999, eps: float = 0.0):
        super().__init__(gamma1, gamma2, eps)


class SpikeClip(Transform):
    """Clip each entry to ``sqrt(threshold * v)``, v the running mean of its own square before this step: SPAM's rule
    (arXiv:2501.06842, section 4) in front of any optimizer.

    It keeps v itself, one fp32 number per entry, fed with what it lets through. An entry with ``v == 0`` has no history
    and passes. v starts anew when the base's moments are reset (`MomentumReset`). A tensor with an entry whose square
    is beyond the range of v (1.8e19 in fp32) counts as not finite.

    Args:
        threshold: default 5000 (paper); 0 for no clipping.
        beta2: decay of v, default 0.999 (paper: the base's second moment).
        clip_start: no clipping in the first steps and as many after a reset; default 20 (official code).
        spikes: ``"clip"`` (default), or ``"zero"`` to make such an entry 0, which the paper compares with as
            nullifying.

    Raises ValueError when a value is out of range.
    """

    name = "spike_clip"
    entries = ("exp_avg_sq",)
    options = ("threshold", "beta2", "clip_start", "spikes")

    def __init__(self, threshold: float = 5000.0, beta2: float = 0.999, clip_start: int = 20, spikes: str = "clip"):
        check(type(self).__name__, threshold=threshold, beta2=beta2, clip_start=clip_start, spikes=spikes)
        self.threshold, self.beta2, self.clip_start, self.spikes = threshold, beta2, clip_start, spikes

    def __call__(self, grads: Gradients, state: Statistics, now: Now) -> Result:
        grads = grads.squares_within(torch.finfo(grads.dtype).max)
        forget = now.reset_interval > 0 and now.since_reset() == 0
        clips = self.threshold > 0 and min(now.t, now.since_reset()) >= self.clip_start
        flag = grads.peak.new_ones(())
        clip = EntryClip(self.threshold, flag * clips, forget=flag * forget, zero_history=False)
        kept = 0.0 if forget else self.beta2
        largest = torch.finfo(grads.dtype).max
        clipped, second = [], []
        for i, v in enumerate(state["exp_avg_sq"]):
            before = grads.read(i)
            g = clip(i, before, v) if self.threshold else before
            if self.spikes == "zero":
                g = g.mul_(g == before)
            clipped.append(g)
            second.append((v * kept).addcmul_(g, g, value=1 - self.beta2).clamp_(max=largest))
        grads = yield from grads.replaced(clipped)
        return grads, {"exp_avg_sq": second}


class ValueClip(Transform):
    """Clamp every entry to ``[-limit, limit]``.

    ``limit`` defaults to 0.1, as compared with GradientStabilizer (arXiv:2502.17055 v3). Raises ValueError when it is
    not above 0.
    """

    name = "value_clip"
    options = ("limit",)

    def __init__(self, limit: float = 0.1):
        check(type(self).__name__, limit=limit)
        self.limit = limit

    def __call__(self, grads: Gradients, state: Statistics, now: Now) -> Result:
        clamped = [grads.read(i).clamp_(-self.limit, self.limit) for i in range(len(grads.tensors))]
        grads = yield from grads.replaced(clamped)
        return grads, {}


class AGC(Transform):
    """Adaptive gradient clipping: each unit's gradient has at most ``clipping`` times the norm of its weights
    (arXiv:2102.06171, section 4.1).

    A unit is a row of a matrix (what feeds one output: all dimensions but the first), or a whole vector. The paper
    leaves the last linear layer out; give that layer an optimizer of its own to do the same.

    Args:
        clipping: largest ratio of the two norms, default 0.01 (paper, large batches; as compared with
            GradientStabilizer).
        eps: least norm of the weights, so that weights of zero can move; default 1e-3 (paper).

    Raises ValueError when a value is out of range.
    """

    name = "agc"
    options = ("clipping", "eps")

    def __init__(self, clipping: float = 0.01, eps: float = 1e-3):
        check(type(self).__name__, clipping=clipping, eps=eps)
        self.clipping, self.eps = clipping, eps

    def __call__(self, grads: Gradients, state: Statistics, now: Now) -> Result:
        values = [grads.read(i) for i in range(len(grads.tensors))]
        asked = [
            Combine("sum", torch.cat([_unit_squares(p), _unit_squares(g)]), 1 if p.dim() > 1 else None)
            for p, g in zip(now.params, values, strict=True)
        ]
        answers = yield from combined(*asked)
        for g, answer in zip(values, answers, strict=True):
            weight, size = answer.sqrt().chunk(2)
            limit = self.clipping * weight.clamp(min=self.eps)
            factor = torch.where(size > limit, limit / size, torch.ones_like(size)).to(g.dtype)
            g.mul_(factor.view(-1, *[1] * (g.dim() - 1)) if g.dim() > 1 else factor.view(()))
        grads = yield from grads.replaced(values)
        return grads, {}


def _unit_squares(x: Tensor) -> Tensor:
    """Squared norms of the rows of ``x`` in fp64, of all of it for fewer than 2 dimensions; flat."""
    rows = x.flatten(1) if x.dim() > 1 else x.reshape(1, -1)
    return torch.linalg.vector_norm(rows, dim=1, dtype=shared_dtype(x.device)).square()
