"""Stable-SPAM: Adam on spike-clipped, norm-stabilised gradients, with periodic moment resets (arXiv:2502.17055).

The equations are in functional.py; `StableSPAM.update` is the step, in the order of the paper's section 4.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from evenstep.kernels.interface import Kernels
from evenstep.optim import functional as F
from evenstep.optim import options
from evenstep.optim.distributed import Bucket, Steps
from evenstep.optim.optimizer import EvenOptimizer
from evenstep.optim.state import Group, State, adam_moments, scalar


class StableSPAM(EvenOptimizer):
    """Adam whose gradients are clipped by AdaClip and rescaled by AdaGN, and whose moments are reset periodically
    (MoRet).

    For each tensor a step does, in this order: decoupled weight decay; AdaClip, which scales entries above a running
    mean of the tensor's largest entry down to that mean; AdaGN, which gives the tensor the norm that the history of its
    norm suggests; every ``reset_interval`` steps MoRet, which sets Adam's moments to zero; Adam. The statistics of
    AdaClip and AdaGN are never reset.

    Args:
        params: floating-point parameters of any shape, named parameters ``(name, tensor)`` or param groups, as in
            torch. Every option below may differ per group.
        lr: learning rate, a float or a 0-d tensor. Default 1e-3 (paper, section 5).
        betas: decay of Adam's moments. Default (0.9, 0.999).
        eps: added to the root of Adam's second moment and of AdaGN's mean square. Default 1e-8 (official code).
        weight_decay: decoupled weight decay, multiplied by ``lr``. Default 0.
        gamma1, gamma2: AdaGN's decay of the norm's mean and mean square. Default 0.7 and 0.9, the paper's values for
            4-bit training; it uses 0.85 and 0.99999 for BF16.
        gamma3: AdaClip's decay of the largest entry. Default 0.999. Official name ``theta``.
        total_steps: length of an optional cosine schedule that multiplies ``beta1`` and ``gamma1`` (official code, not
            in the paper); None for none. Official name ``total_T``.
        eta_min: where that schedule ends, and stays. Default 0.5.
        reset_interval: steps between moment resets, 0 for never. Default 1000. Official names ``update_proj_gap``,
            ``DeltaT``.
        variant: ``"paper"`` (default), or ``"official"`` for the published code's trajectory step by step: one counter
            for statistics and moments, which after a reset inflates AdaClip's limit; the reset step still uses the old
            moments; the schedule is periodic.
        robust: bound the values that enter the running means of AdaClip and AdaGN, so that a spike does not shrink the
            steps after it: from the 11th update on, the bound is twice the bias-corrected mean, or the value that
            raises it by 10 %, whichever is larger. Default False (the paper).
        preset: ``"steady"`` sets ``robust=True``, the best setting in the stability suite (docs/stability.md), in every
            param group that does not set ``robust`` itself. It wins over the argument ``robust``. Default None.
        maximize: ascend instead of descend. Default False.
        capturable: keep the clock on the device, so that the step can be captured in a CUDA graph. Default False.
        rounding: how results enter 16-bit parameters: ``"nearest"`` (default), ``"stochastic"`` or ``"kahan"`` (2 more
            bytes per parameter); no difference for fp32 parameters.
        state: how moments are stored: ``"fp32"`` (default), ``"bf16"``, or ``"int8"`` (blocks of 256, needs torchao).
        fused: a fused step (C++ on CPU, Triton on CUDA): None (default) where it serves, False for the plain code, True
            for an error where it does not. ``evenstep doctor`` shows what serves. Sharded parameters, and a step
            compiled by ``torch.compile``, take the plain code.
        **official: the official names above.

    State per parameter, fp32 (fp64 for fp64 parameters): ``exp_avg`` and ``exp_avg_sq`` in the shape of the parameter,
    and the 0-d ``peak`` (running mean of the largest entry), ``norm`` and ``norm_rms`` (running mean and root mean
    square of the norm), ``n`` (updates), ``age`` (updates since the last reset).

    A tensor whose gradient holds a NaN or Inf, or has a norm beyond the range of fp32, is skipped on the device and
    counted in ``stats["skipped"]``. Gradients are never modified.

    Raises:
        ValueError: an option is out of range, or a parameter is complex, an integer or a flat shard.
        TypeError: an unknown argument.
        RuntimeError: a sparse gradient (in ``step``).

    Example:
        >>> import torch
        >>> from evenstep import StableSPAM
        >>> w = torch.nn.Parameter(torch.zeros(2, 3))
        >>> optimizer = StableSPAM([w], lr=0.1)
        >>> for spike in (1.0, 1000.0):
        ...     w.grad = torch.ones(2, 3)
        ...     w.grad[0, 0] = spike
        ...     optimizer.step()
        >>> optimizer.stats["grad_max"], optimizer.stats["clip_limit"].round()
        (tensor([1000.]), tensor([501.]))
        >>> optimizer.param_groups[0]["t"]
        2
    """

    OPTIONS = options.STABLE_SPAM

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gamma1: float = 0.7,
        gamma2: float = 0.9,
        gamma3: float = 0.999,
        total_steps: int | None = None,
        eta_min: float = 0.5,
        reset_interval: int = 1000,
        *,
        variant: str = "paper",
        robust: bool = False,
        preset: str | None = None,
        maximize: bool = False,
        capturable: bool = False,
        rounding: str = "nearest",
        state: str = "fp32",
        fused: bool | None = None,
        **official: Any,
    ):
        super().__init__(params, locals(), official, fused)

    def _prepare_group(self, group: Group) -> Group:
        if group.get("preset", self.defaults["preset"]) == "steady":
            group = {"robust": True} | group
        return group

    def new_state(self, p: Tensor, group: Group, index: int) -> State:
        # Moments are stored as the option "state" says (fp32, bf16, int8); scalars are always fp32 or fp64.
        scalars = {name: scalar(p) for name in ("peak", "norm", "norm_rms", "n", "age")}
        return adam_moments(p, group["state"]) | scalars

    def update(self, group: Group, bucket: Bucket) -> Steps[dict[str, Tensor]]:
        official = group["variant"] == "official"
        reset, beta1, gamma1 = self._scheduled(group)  # 0-d each

        # k parameters at a time. T, mu and sqrt(nu) of the paper are peak, norm and norm_rms.
        scalars = bucket.stacked("peak", "norm", "norm_rms", "n", "age")
        peak, norm, norm_rms, n, age = scalars.values  # [k] each
        # n corrects the bias of T, mu, nu, which a reset does not touch; age that of Adam's moments.
        n, age = n + 1, age * (1 - reset) + 1

        # AdaClip: T <- gamma3 T + (1 - gamma3) max|g|; entries above T / (1 - gamma3^n) are scaled down to it.
        grads = yield self.gradients(group, bucket)  # all-reduce: the largest entry of each whole tensor
        grads, peak = F.adaclip(grads, peak, n, group["gamma3"], group["robust"])

        # AdaGN: g <- g / ||g|| * mu_hat / (sqrt(nu_hat) + eps), with ||g|| after AdaClip.
        grads = yield grads.with_norms()  # all-reduce: the norm after clipping
        grads, norm, norm_rms = F.adagn(
            grads, norm, norm_rms, n, gamma1, group["gamma2"], group["eps"], group["robust"]
        )

        # MoRet: on a reset step m = v = 0 before this gradient enters. The published code clears them after the update
        # instead: the old moments, this gradient included, take this step with the bias correction of age 1.
        plan = F.AdamPlan.of(
            grads.finite,
            age,
            torch.zeros_like(reset) if official else reset,
            lr=group["lr"],
            betas=(beta1, group["betas"][1]),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            forget_after=reset if official else None,
        )
        # Adam: p <- p (1 - lr wd) - lr m_hat / (sqrt(v_hat) + eps). The limit and the gain are applied as the gradient
        # is read, piece by piece: no transformed copy of it exists.
        weights = self.weights(group, bucket, grads.finite)
        exp_avg, exp_avg_sq = bucket.state_tensors("exp_avg"), bucket.state_tensors("exp_avg_sq")
        # One pass per tensor: read g, update m, v and p in place. update_norm [k] is for the statistics.
        update_norm = F.adam_step(weights, grads, exp_avg, exp_avg_sq, plan)
        # The published code has one counter for statistics and moments: after a reset the statistics are corrected as
        # if they were new, which inflates AdaClip's limit.
        if official:
            n = age
        # Where a gradient is not finite, the old statistics stay.
        scalars.store(grads.finite, peak, norm, norm_rms, n, age)
        return F.statistics(grads, bucket.sizes(), update_norm, sharded=bool(bucket.layout.cuts))

    def fused_step(self, group: Group, bucket: Bucket, kernels: Kernels) -> Tensor:
        # The options are explained in kernels/interface.py; the kernels repeat `update` in the same order.
        official = group["variant"] == "official"
        reset, beta1, gamma1 = self._scheduled(group)
        step_options = self.adam_options(
            group,
            beta1=beta1,
            reset=reset,  # age starts again
            forget=0.0 if official else reset,  # the moments start again before the gradient enters
            forget_after=reset if official else 0.0,  # and after the update
            stable=True,  # AdaClip and AdaGN
            gamma1=gamma1,
            gamma2=group["gamma2"],
            gamma3=group["gamma3"],
            robust=float(group["robust"]),
            one_counter=official,
        )
        tensors = self.step_tensors(group, bucket, "age", "peak", "norm", "norm_rms", "n")
        return kernels.adam_step_(tensors, step_options)

    @classmethod
    def checked_steps(cls) -> dict[str, Callable[..., EvenOptimizer]]:
        return {"Stable-SPAM": lambda params, **how: cls(params, weight_decay=0.1, reset_interval=3, **how)}

    @staticmethod
    def _scheduled(group: Group) -> tuple[Any, Any, Any]:
        """Whether this step resets the moments (1 or 0), and beta1 and gamma1 of this step: 0-d tensors for the plain
        step, numbers for a fused one."""
        # s(t) multiplies beta1 and gamma1; the bias corrections use the product, as 1 - (beta1 s)^age.
        t, beta1, gamma1 = group["t"], group["betas"][0], group["gamma1"]
        if group["total_steps"] is not None:
            hold = group["variant"] != "official"  # the published cosine rises again after total_steps + 1
            factor = F.cosine_factor(t, group["total_steps"], group["eta_min"], hold=hold)
            beta1, gamma1 = beta1 * factor, gamma1 * factor
        return F.reset_due(t, group["reset_interval"]), beta1, gamma1
