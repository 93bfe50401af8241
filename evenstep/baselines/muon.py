"""Muon for sharded matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Muon
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from evenstep.optim.distributed import is_sharded, local, region, shard_like


class ShardedMuon(Muon):
    """torch's Muon, also for sharded matrices (DTensors), on which torch's own step fails as of 2.13.

    Each rank keeps the momentum of its shard. Every matrix is gathered and orthogonalised on every rank, which costs
    one all-gather per matrix and the work of a single process; memory is that of one whole matrix at a time. Arguments
    and state are those of `torch.optim.Muon`.

    Example:
        >>> matrix = torch.nn.Parameter(torch.eye(2))
        >>> optimizer = ShardedMuon([matrix], lr=0.1, weight_decay=0.0)
        >>> matrix.grad = torch.eye(2)
        >>> optimizer.step()
        >>> matrix.data[0, 1].item()
        0.0
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_matrix(p, group)
        return loss

    def _step_matrix(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        state, lr, momentum = self.state[p], float(group["lr"]), group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad, memory_format=torch.preserve_format)
        # The operations of torch's step, in its order: equal bits where nothing is sharded.
        shard, grad, buffer = local(p), local(p.grad), local(state["momentum_buffer"])
        buffer.lerp_(grad, 1 - momentum)
        update: Any = grad.lerp(buffer, momentum) if group["nesterov"] else buffer
        if is_sharded(p):
            update = shard_like(p, update, p.shape, p.stride()).full_tensor()  # type: ignore[attr-defined]
        update = _zeropower_via_newtonschulz(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
        shard.mul_(1 - lr * group["weight_decay"])
        shard.add_(update[region(p)], alpha=-_adjust_lr(lr, group["adjust_lr_fn"], p.shape))
