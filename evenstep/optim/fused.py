"""Which parameters are updated together, and whether a fused kernel or the plain code updates them.

`buckets` splits the parameters of a step into lists that one call can update. `Choice` decides for each of them whether
fused kernels serve it. The decision is made anew at every step and is no part of a saved state.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evenstep.kernels import Kernels, is_coded, kernels_for
from evenstep.kernels.interface import PLAIN
from evenstep.optim.distributed import UNSHARDED, Bucket, Layout, local, state_dtype
from evenstep.optim.self_check import failing

# Entries of a parameter's state that kernels write.
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Choice:
    """The option ``fused`` of an optimizer: None for kernels where they serve, False for the plain code, True for an
    error where kernels do not serve.

    Sharded parameters take the plain code: their step pauses for an all-reduce wherever it needs a statistic of the
    whole tensor, which a fused call cannot do.
    """

    fused: bool | None
    user: type | None = None  # the optimizer class, which determines the kernels that are checked before they serve

    def check(self, p: Tensor) -> None:
        """ValueError where ``fused=True`` and there are no kernels for the device of ``p``."""
        # At construction, so that a missing compiler is reported before the first batch.
        kernels = kernels_for(p.device.type) if self.fused else None
        if isinstance(kernels, str):
            raise ValueError(f"fused=True: {kernels}; use fused=None or False (evenstep doctor tells more)")

    def for_all(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[Mapping[str, Any]]
    ) -> Kernels | None:
        """The kernels that serve all of these parameters, or None where each has to be asked about.

        This is the fast path: a model of 300 plain tensors is decided by one call instead of 300.
        """
        if self.fused is False or not params:
            return None
        kernels = kernels_for(params[0].device.type)
        if isinstance(kernels, str):
            return None
        # The optional "compensation" (Kahan summation) is read and written by kernels like a moment.
        kept = [state[name] for name in (*MOMENTS, "compensation") for state in states if name in state]
        if not kernels.serves_all([*params, *grads, *kept]):
            return None
        # The self-check depends on device and dtype only, so one parameter stands for all of its dtype.
        kinds = {p.dtype: p for p in params}
        return None if any(failing(kernels, p, self.user) for p in kinds.values()) else kernels

    def __call__(self, p: Tensor, grad: Tensor, state: Mapping[str, Any], *, sharded: bool) -> Kernels | None:
        """The kernels that serve one parameter, None for the plain code. RuntimeError where ``fused=True`` and no
        kernel serves it."""
        if self.fused is False:
            return None
        kernels = kernels_for(p.device.type)
        reason = kernels if isinstance(kernels, str) else self._refusal(kernels, p, grad, state, sharded)
        if reason is None:  # then it is no str
            return kernels  # type: ignore[return-value]
        if self.fused:
            raise RuntimeError(
                f"fused=True: a parameter of shape {tuple(p.shape)} cannot be served: {reason}; use fused=None"
            )
        return None

    # A string instead of an exception: refusals are common, and only fused=True turns one into an error.
    def _refusal(
        self, kernels: Kernels, p: Tensor, grad: Tensor, state: Mapping[str, Any], sharded: bool
    ) -> str | None:
        """Why ``kernels`` cannot update ``p``, None if they can."""
        if sharded:
            return "it is sharded, and sharded parameters take the plain code"
        moments = [local(state[name]) for name in MOMENTS if name in state]
        # The kernels judge dtypes, devices and memory layout; compact moments are known to the optimizer alone.
        reason = kernels.refusal(p, grad, *moments)
        # Blocks of 256 codes do not match the entries that a mask selects.
        if "mask" in state and any(map(is_coded, moments)):
            reason = "its 8-bit state is compact"
        elif "compensation" in state and not local(state["compensation"]).is_contiguous():
            reason = "its compensation is not contiguous"
        return reason or failing(kernels, p, self.user)


def buckets(
    params: Iterable[Tensor],
    state: Mapping[Tensor, dict[str, Any]] | None = None,
    choose: Choice | None = None,
) -> list[Bucket]:
    """The parameters that have a gradient, split by device, state dtype, layout and kernels.

    ``state`` is the optimizer's, where the step needs it. Without ``choose`` all take the plain code. The order within
    a bucket is that of ``params``. ValueError where a gradient is sharded differently from its parameter.
    """
    pairs = [(p, grad) for p in params if (grad := p.grad) is not None]
    params, grads = [p for p, _ in pairs], [grad for _, grad in pairs]
    states = [] if state is None else [state[p] for p in params]
    kernels = choose.for_all(params, grads, states) if choose else None
    if kernels is not None:
        # Kernels take fp32 and bf16 parameters, whose statistics are fp32.
        return [Bucket(params, grads, params, states, torch.float32, UNSHARDED, kernels)]
    # Indices into `params`, by the properties that one call needs to have in common.
    members: dict[tuple[torch.device, torch.dtype, Layout, Kernels | None], list[int]] = {}
    shards = []  # of all parameters, in the order of `params`
    for i, (p, grad) in enumerate(pairs):
        layout = UNSHARDED
        # A DTensor is replaced by its local shard here, once; all later code works on plain tensors.
        if not (type(p) in PLAIN and type(grad) in PLAIN):
            layout, layout_of_grad = Layout.of(p), Layout.of(grad)
            if layout != layout_of_grad:
                raise ValueError(
                    "a gradient is sharded differently from its parameter; redistribute it before the step"
                )
            p, grads[i] = local(p), local(grad)
        shards.append(p)
        kernels = choose(p, grads[i], states[i] if states else {}, sharded=bool(layout.cuts)) if choose else None
        members.setdefault((p.device, state_dtype(p), layout, kernels), []).append(i)
    return [
        Bucket(
            params=[params[i] for i in indices],
            grads=[grads[i] for i in indices],
            shards=[shards[i] for i in indices],
            states=[states[i] for i in indices] if states else [],
            dtype=dtype,
            layout=layout,
            kernels=kernels,
        )
        for (_, dtype, layout, kernels), indices in members.items()
    ]
