"""Which parameters fused kernels update, and which the plain code."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from evenstep.kernels import Kernels, is_coded, kernels_for
from evenstep.optim.distributed import local
from evenstep.optim.self_check import failing

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Entries of a parameter's state that kernels write."""


@dataclass(frozen=True)
class Choice:
    """The option ``fused`` of an optimizer of class ``user``: None for kernels where they serve, False for never, True
    for an error where they do not.

    Sharded parameters take the plain code: their step pauses where it needs a number of the whole tensor.
    """

    fused: bool | None
    user: type | None = None
    """Decides what of the kernels is checked before they serve."""

    def check(self, p: Tensor) -> None:
        """ValueError where ``fused=True`` and there are no kernels for the device of ``p``."""
        kernels = kernels_for(p.device.type) if self.fused else None
        if isinstance(kernels, str):
            raise ValueError(f"fused=True: {kernels}; use fused=None or False (evenstep doctor tells more)")

    def for_all(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[Mapping[str, Any]]
    ) -> Kernels | None:
        """The kernels for all of several parameters, where none of them needs a closer look; else None. Much faster
        than asking for one after the other.
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

    def __call__(self, p: Tensor, grad: Tensor, state: Mapping[str, Any], *, sharded: bool) -> Kernels | None:
        """The kernels for a parameter. RuntimeError where ``fused=True`` and there are none."""
        if self.fused is False:
            return None
        kernels = kernels_for(p.device.type)
        reason = kernels if isinstance(kernels, str) else self._refusal(kernels, p, grad, state, sharded)
        if reason is None:
            return kernels  # type: ignore[return-value]
        if self.fused:
            raise RuntimeError(
                f"fused=True: a parameter of shape {tuple(p.shape)} cannot be served: {reason}; use fused=None"
            )
        return None

    def _refusal(
        self, kernels: Kernels, p: Tensor, grad: Tensor, state: Mapping[str, Any], sharded: bool
    ) -> str | None:
        if sharded:
            return "it is sharded, and sharded parameters take the plain code"
        moments = [local(state[name]) for name in MOMENTS if name in state]
        reason = kernels.refusal(p, grad, *moments)
        if "mask" in state and any(map(is_coded, moments)):
            reason = "its 8-bit state is compact"
        elif "compensation" in state and not local(state["compensation"]).is_contiguous():
            reason = "its compensation is not contiguous"
        return reason or failing(kernels, p, self.user)
