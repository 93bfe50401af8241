"""Which parameters are updated by fused kernels and which by the plain code."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from evenstep.kernels import Kernels, is_coded, kernels_for
from evenstep.optim.self_check import failing
from evenstep.optim.sharding import local

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Entries of a parameter's state that kernels write."""


@dataclass(frozen=True)
class Choice:
    """What the option ``fused`` means: None for kernels where they serve, False for never, True for an error where they
    do not.
    """

    fused: bool | None
    user: type | None = None
    """The class of the optimizer, which says what of the kernels is checked before they serve."""

    def check(self, p: Tensor) -> None:
        """ValueError where ``fused=True`` and there are no kernels for the device of ``p``."""
        found = kernels_for(p.device.type) if self.fused else None
        if isinstance(found, str):
            raise ValueError(f"fused=True: {found}; use fused=None or False (evenstep doctor tells more)")

    def all_alike(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[Mapping[str, Any]]
    ) -> Kernels | None:
        """The kernels for all of several parameters, where none of them needs a second look; else None. Much quicker
        than to ask for one after the other.
        """
        if self.fused is False or not params:
            return None
        kernels = kernels_for(params[0].device.type)
        if isinstance(kernels, str):
            return None
        kept = [state[name] for name in (*MOMENTS, "compensation") for state in states if name in state]
        if not kernels.serves_all([*params, *grads, *kept]):
            return None
        kinds = {p.dtype: p for p in params}
        return None if any(failing(kernels, p, self.user) for p in kinds.values()) else kernels

    def __call__(self, p: Tensor, grad: Tensor, state: Mapping[str, Any]) -> Kernels | None:
        """The kernels for what is here of a parameter. RuntimeError where ``fused=True`` and there are none."""
        if self.fused is False:
            return None
        kernels = kernels_for(p.device.type)
        if isinstance(kernels, str):
            reason: str | None = kernels
        else:
            moments = [local(state[name]) for name in MOMENTS if name in state]
            reason = kernels.refusal(p, grad, *moments)
            if "mask" in state and any(map(is_coded, moments)):
                reason = "its 8-bit state is compact"
            elif "compensation" in state and not local(state["compensation"]).is_contiguous():
                reason = "its compensation is not contiguous"
            reason = reason or failing(kernels, p, self.user)
        if reason is None:
            return kernels  # type: ignore[return-value]
        if self.fused:
            raise RuntimeError(
                f"fused=True: a parameter of shape {tuple(p.shape)} cannot be served: {reason}; use fused=None"
            )
        return None
