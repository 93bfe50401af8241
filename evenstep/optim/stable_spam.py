"""Stable-SPAM: Adam on spike-clipped, norm-stabilised gradients, with periodic momentum resets (arXiv:2502.17055)."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from evenstep.kernels import WholeKernels
from evenstep.optim.at_once import whole_step
from evenstep.optim.base import EvenOptimizer, Group, State
from evenstep.optim.sharding import Bucket
from evenstep.optim.state import moment, scalar, statistics
from evenstep.transforms import AdamStep, Steps, adaclip, adagn, adam_, cosine_factor, reset_due


class StableSPAM(EvenOptimizer):
    """Adam whose gradients are clipped by AdaClip and rescaled by AdaGN, and whose moments are reset now and then
    (MoRet).

    Per tensor and step: decoupled weight decay; entries above a running mean of the tensor's largest entry are scaled
    down to it (AdaClip); the tensor gets the norm that its own norm's history suggests (AdaGN); every
    ``reset_interval`` steps Adam's moments start anew; Adam. The statistics of AdaClip and AdaGN are never reset.

    Args:
        params: parameters, named parameters ``(name, tensor)`` or param groups, as in torch. Every option below may
            differ per group.
        lr: learning rate, a float or a 0-d tensor. Default 1e-3 (paper, section 5).
        betas: decay of Adam's moments. Default (0.9, 0.999).
        eps: added to the root of the second moment, and to AdaGN's. Default 1e-8 (official code).
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
        maximize: ascend instead of descend. Default False.
        capturable: keep the clock on the device, so that the step can be captured in a CUDA graph. Default False.
        rounding: how results enter 16-bit parameters: ``"nearest"`` (default), ``"stochastic"`` or ``"kahan"`` (2 more
            bytes per parameter); no difference for fp32 parameters.
        state: how moments are stored: ``"fp32"`` (default), ``"bf16"``, or ``"int8"`` (blocks of 256, needs torchao).
        fused: kernels (C++ on CPU, Triton on CUDA): None (default) where they serve, False for the plain code, True for
            an error where they do not. ``evenstep doctor`` shows what serves. A step compiled by ``torch.compile``
            takes the plain code, which the compiler fuses.
        **official: the official names above.

    State per parameter, fp32 (fp64 for fp64 parameters): ``exp_avg``, ``exp_avg_sq`` and the scalars ``peak`` (mean of
    the largest entry), ``norm``, ``norm_rms`` (mean and root mean square of the norm), ``n`` (updates), ``age``
    (updates since the last reset).

    A tensor whose gradient holds a NaN or Inf, or has a norm beyond the range of fp32, is skipped on the device, and
    `stats` says so. Gradients are never modified.

    Raises:
        ValueError: an option is out of range. TypeError: an unknown argument. RuntimeError: a sparse gradient (in
            ``step``).
    """

    ALIASES: ClassVar[dict[str, str]] = {
        "theta": "gamma3",
        "total_T": "total_steps",
        "update_proj_gap": "reset_interval",
        "DeltaT": "reset_interval",
    }

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
        maximize: bool = False,
        capturable: bool = False,
        rounding: str = "nearest",
        state: str = "fp32",
        fused: bool | None = None,
        **official: Any,
    ):
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "gamma1": gamma1,
            "gamma2": gamma2,
            "gamma3": gamma3,
            "total_steps": total_steps,
            "eta_min": eta_min,
            "reset_interval": reset_interval,
            "variant": variant,
            "maximize": maximize,
            "capturable": capturable,
            "rounding": rounding,
            "state": state,
        }
        super().__init__(params, options, official, fused)

    def new_state(self, p: Tensor, group: Group, index: int) -> State:
        scalars = {name: scalar(p) for name in ("peak", "norm", "norm_rms", "n", "age")}
        stored = group["state"]
        return {"exp_avg": moment(p, stored), "exp_avg_sq": moment(p, stored, signed=False), **scalars}

    def update(self, group: Group, bucket: Bucket) -> Steps[dict[str, Tensor]]:
        official = group["variant"] == "official"
        lr, (reset, beta1, gamma1) = group["lr"], self._scheduled(group)

        scalars = bucket.stacked("peak", "norm", "norm_rms", "n", "age")
        peak, norm, norm_rms, n, age = scalars.values
        n, age = n + 1, age * (1 - reset) + 1
        grads = yield self.gradients(group, bucket)
        grads, peak = adaclip(grads, peak, n, group["gamma3"])
        grads = (yield grads.with_norms()).within_range()
        gain, norm, norm_rms = adagn(grads.norm, norm, norm_rms, n, gamma1, group["gamma2"], group["eps"])
        grads = grads.amplified(gain)

        # The official code resets after the update instead of before: the old moments take this step, with the bias
        # correction of age 1.
        plan = AdamStep.plan(
            grads.finite,
            age,
            torch.zeros_like(reset) if official else reset,
            lr=lr,
            betas=(beta1, group["betas"][1]),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            forget_after=reset if official else None,
        )
        weights = self.weights(group, bucket, grads.finite)
        update_norm = adam_(weights, grads, bucket.parts("exp_avg"), bucket.parts("exp_avg_sq"), plan)
        if official:
            n = age  # one counter for both: after a reset the statistics are corrected as if they were new
        scalars.store(grads.finite, peak, norm, norm_rms, n, age)
        return statistics(grads, bucket, update_norm)

    def at_once(self, group: Group, bucket: Bucket, kernels: WholeKernels) -> Tensor:
        official = group["variant"] == "official"
        reset, beta1, gamma1 = self._scheduled(group)
        how = {
            "sign": -1.0 if group["maximize"] else 1.0,
            "lr": group["lr"],
            "beta1": beta1,
            "beta2": group["betas"][1],
            "eps": group["eps"],
            "decay": group["weight_decay"],
            "warmup": 1.0,
            "reset": reset,
            "forget": 0.0 if official else reset,
            "forget_after": reset if official else 0.0,
            "stable": True,
            "gamma1": gamma1,
            "gamma2": group["gamma2"],
            "gamma3": group["gamma3"],
            "one_counter": official,
        }
        return kernels.adam_step_(whole_step(group, bucket, "age", "peak", "norm", "norm_rms", "n"), how)

    @staticmethod
    def _scheduled(group: Group) -> tuple[Any, Any, Any]:
        """Whether this step resets the moments (1 or 0), beta1 and gamma1."""
        t, beta1, gamma1 = group["t"], group["betas"][0], group["gamma1"]
        if group["total_steps"] is not None:
            hold = group["variant"] != "official"
            factor = cosine_factor(t, group["total_steps"], group["eta_min"], hold=hold)
            beta1, gamma1 = beta1 * factor, gamma1 * factor
        return reset_due(t, group["reset_interval"]), beta1, gamma1
