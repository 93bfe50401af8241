"""Gradient transforms that look at the whole model: the 2-norm of all gradients together.

The norms of single tensors are known on every rank once they are combined, and the global norm follows from them
without another message. "All" means the tensors this optimizer holds on this process: with pipeline stages that is the
stage. Their few numbers are the same for all tensors and are kept, in fp64, under each parameter.

A gradient with a NaN or Inf, or with a norm beyond the range of its statistics (fp32; 1e150 for fp64), is left out of
the global norm and of the step; such a step leaves the statistics as they were.
"""

import torch
from torch import Tensor

from evenstep.transforms.checks import check
from evenstep.transforms.gradients import Gradients, peak_and_norm
from evenstep.transforms.lockstep import Combine, Steps, combined
from evenstep.transforms.transform import Now, Statistics, Transform, shared_dtype

SQUARABLE = 1e150
"""Norms beyond it, which fp64 parameters may have, have squares that fp64 cannot hold."""

Result = Steps[tuple[Gradients, Statistics]]


def global_norm(grads: Gradients) -> Steps[tuple[Gradients, Tensor, Tensor]]:
    """The 2-norm of all finite gradients as they stand (0-d, fp64), and whether all are finite (0-d bool)."""
    grads = (yield from grads.with_norms()).within_range()
    grads = grads.kept_if(grads.norm <= SQUARABLE)
    dtype = shared_dtype(grads.peak.device)
    norms, finite = yield from combined(
        Combine("gather", torch.where(grads.finite, grads.norm, 0.0).to(dtype)),
        Combine("gather", grads.finite.to(dtype)),
    )
    return grads, peak_and_norm(norms)[1], finite.amin() > 0


def limited(grads: Gradients, norm: Tensor, limit: Tensor | float) -> Gradients:
    """All gradients scaled so that their global norm is at most ``limit``."""
    gain = torch.where(norm > limit, limit / norm, torch.ones_like(norm)).to(grads.dtype)
    return grads.amplified(gain.expand_as(grads.peak))


class NormClip(Transform):
    """Scale all gradients together so that their global 2-norm is at most ``max_norm`` (arXiv:1211.5063), as
    ``torch.nn.utils.clip_grad_norm_`` does, without its 1e-6.

    ``max_norm`` defaults to 1.0 (the common choice, and as compared with GradientStabilizer). Raises ValueError when it
    is not above 0.
    """

    name = "norm_clip"
    whole_model = True
    options = ("max_norm",)

    def __init__(self, max_norm: float = 1.0):
        check(type(self).__name__, max_norm=max_norm)
        self.max_norm = max_norm

    def __call__(self, grads: Gradients, state: Statistics, now: Now) -> Result:
        grads, norm, _ = yield from global_norm(grads)
        return limited(grads, norm, self.max_norm), {}


class ZClip(Transform):
    """Clip global norms that are outliers by their z-score (arXiv:2504.02507, section 3).

    With the running mean and variance of the norm, ``z = (norm - mean) / std``; a norm with z above the threshold is
    scaled to ``mean + threshold**2 / z * std``: the further out, the closer to the mean. The statistics see what is
    left. They start from the plain mean and variance of the first ``warmup_steps`` norms, which are not clipped.

    Args:
        alpha: decay of mean and variance, default 0.97 (paper).
        threshold: z-score from which a norm is an outlier, default 2.5 (paper).
        warmup_steps: default 25 (paper).
        eps: added to the standard deviation, default 1e-6 (official code).

    Raises ValueError when a value is out of range.
    """

    name = "zclip"
    options = ("alpha", "threshold", "warmup_steps", "eps")
    shared = {"mean": (), "var": (), "n": ()}  # noqa: RUF012

    def __init__(self, alpha: float = 0.97, threshold: float = 2.5, warmup_steps: int = 25, eps: float = 1e-6):
        check(type(self).__name__, alpha=alpha, threshold=threshold, warmup_steps=warmup_steps, eps=eps)
        self.alpha, self.threshold, self.warmup_steps, self.eps = alpha, threshold, warmup_steps, eps

    def __call__(self, grads: Gradients, state: Statistics, now: Now) -> Result:
        grads, norm, _ = yield from global_norm(grads)
        mean, var, n = state["mean"], state["var"], state["n"]
        warm = n >= max(self.warmup_steps, 1)
        std = var.sqrt()
        z = (norm - mean) / (std + self.eps)
        outlier = warm & (z > self.threshold)
        kept = torch.where(outlier, mean + self.threshold**2 / z * std, norm)
        # While warming up: the mean and variance of the n + 1 norms so far (Welford).
        first_mean = mean + (norm - mean) / (n + 1)
        first_var = (n * var + (norm - mean) * (norm - first_mean)) / (n + 1)
        later_mean = self.alpha * mean + (1 - self.alpha) * kept
        later_var = self.alpha * var + (1 - self.alpha) * (kept - later_mean).square()
        new = {
            "mean": torch.where(warm, later_mean, first_mean),
            "var": torch.where(warm, later_var, first_var),
            "n": n + 1,
        }
        return limited(grads, norm, kept), new


class AutoClip(Transform):
    """Clip the global norm to a percentile of its own history, this step included (arXiv:2007.14469).

    Args:
        percentile: between 0 and 100, default 10 (paper).
        window: how many norms back the history goes, default 1000. (The paper's goes back to the start; kept here is a
            fixed number, 8 bytes each.)

    Raises ValueError when a value is out of range.
    """

    name = "autoclip"
    options = ("percentile", "window")

    def __init__(self, percentile: float = 10.0, window: int = 1000):
        check(type(self).__name__, percentile=percentile, window=window)
        self.percentile, self.window = percentile, window

    @property
    def shared(self) -> dict[str, tuple[int, ...]]:
        return {"history": (self.window,), "n": ()}

    def __call__(self, grads: Gradients, state: Statistics, now: Now) -> Result:
        grads, norm, finite = yield from global_norm(grads)
        history, n = appended(state["history"], state["n"], norm)
        limit = percentile(history, n.clamp(max=self.window), self.percentile)
        # A norm that is not the whole model's is not compared with those that are.
        return limited(grads, norm, torch.where(finite, limit, norm)), {"history": history, "n": n}


class SkipStep(Transform):
    """Skip the whole step when the global norm, or the loss, is an outlier over the last steps, as OLMo 2 was trained
    (arXiv:2501.00656; the rule is OLMo-core's).

    The step is skipped when the value is more than ``sigma`` standard deviations above the mean of the ``window``
    values before it; the value itself joins the window either way. Nothing is skipped before half a window of steps. A
    step with a gradient (or watched loss) that is not finite is skipped too and does not join. A skipped step changes
    no parameter, moment or other statistic.

    Args:
        window: default 128 (OLMo-core).
        sigma: default 6 (OLMo-core).
        watch: ``"norm"`` or ``"loss"``. The loss is what the closure returned, or what was put into ``unit.loss`` (a
            0-d tensor) before the step; training on several ranks, give all the same mean. OLMo watches both: put two
            units in the chain.

    Raises ValueError when a value is out of range, or at the step when a watched loss is not given.
    """

    options = ("window", "sigma", "watch")
    sees_skipped_steps = True

    def __init__(self, window: int = 128, sigma: float = 6.0, watch: str = "norm"):
        check(type(self).__name__, window=window, sigma=sigma, watch=watch)
        self.window, self.sigma, self.watch = window, sigma, watch
        self.name = "skip_step" if watch == "norm" else "skip_step_loss"
        self.loss: Tensor | None = None

    @property
    def shared(self) -> dict[str, tuple[int, ...]]:
        return {"history": (self.window,), "n": ()}

    def __call__(self, grads: Gradients, state: Statistics, now: Now) -> Result:
        history, n = state["history"], state["n"]
        if self.watch == "norm":
            grads, value, usable = yield from global_norm(grads)
        else:
            loss = now.loss if self.loss is None else self.loss
            if loss is None:
                raise ValueError(
                    "SkipStep(watch='loss') was given no loss: step with a closure, or set unit.loss before"
                )
            value = loss.detach().to(history)
            usable = torch.isfinite(value)
            value = torch.where(usable, value, torch.zeros_like(value))
        past = torch.arange(self.window, device=history.device) < n
        count = past.sum()
        mean = (history * past).sum() / count.clamp(min=1)
        variance = ((history - mean).square() * past).sum() / (count - 1).clamp(min=1)
        judged = n + 1 >= max(3, self.window // 2)
        keep = usable & ~(judged & (value - mean > self.sigma * variance.sqrt()))
        longer, more = appended(history, n, value)
        new = {"history": torch.where(usable, longer, history), "n": torch.where(usable, more, n)}
        return grads.kept_if(keep), new


def appended(history: Tensor, n: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """A ring of the last values with one more; ``n`` counts all there have been."""
    place = torch.arange(len(history), device=history.device) == torch.remainder(n, len(history))
    return torch.where(place, value, history), n + 1


def percentile(history: Tensor, count: Tensor, percent: float) -> Tensor:
    """That percentile of the first ``count`` values (0-d tensor), between neighbours linearly."""
    used = torch.arange(len(history), device=history.device) < count
    ordered = torch.where(used, history, torch.inf).sort().values
    place = (count - 1) * (percent / 100)
    below = place.floor()
    low, high = ordered[torch.stack([below, torch.minimum(below + 1, count - 1)]).long()].unbind()
    return low + (place - below) * (high - low)
