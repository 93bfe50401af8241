"""APOLLO and APOLLO-Mini (arXiv:2412.05270): full-rank steps whose scale comes from Adam in a random subspace.

Adam's moments are kept for a random projection of the gradient to rank r. They tell by how much each channel, or the
whole matrix, is to be scaled; the step is the full gradient with that scale.

Where the paper leaves details open, this code follows the published code: bias correction multiplies the step after the
limit of its growth, ``eps`` is added before bias correction, and a square matrix has one factor per row.

The APOLLO of pytorch_optimizer 4.1 (``peer_apollo`` in the catalog) scales the projected gradient and projects it back,
so that its steps have rank r. With a projection that loses nothing both have the same trajectory, which a test checks.
Three differences remain there: the factor is ``scale`` to the power of 3/2, a new projection is drawn at steps 200,
400, ... (here and in the paper 201, 401, ...), and bias correction applies to weight decay too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from evenstep.optim.state import keep_dtypes

# The norm of a matrix's step, before bias correction, may grow by this factor from one step to the next (gamma of the
# norm-growth limiter in the paper).
GROWTH = 1.01


class APOLLO(Optimizer):
    """APOLLO on the matrices of groups with ``rank`` > 0, AdamW on the others.

    Args:
        params: parameters or groups; a group with ``rank`` > 0 holds matrices only.
        lr: learning rate, default 1e-2 (paper).
        betas: Adam's, default (0.9, 0.999).
        eps: added to the root of the second moment before bias correction, default 1e-6.
        weight_decay: decoupled, default 0.
        rank: for groups without their own; default 0, AdamW.
        scale_type: ``"channel"`` (default; APOLLO, one factor for each entry of the longer side) or ``"tensor"``
            (APOLLO-Mini).
        scale: the step is multiplied by its square root; 1 for APOLLO, 128 for APOLLO-Mini (paper).
        update_proj_gap: steps between two random projections, default 200 (paper).
        seed: of the projections.

    Raises:
        ValueError: an unknown ``scale_type``, or a tensor in a group with ``rank`` > 0 that is not a matrix.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(8, 16))
        >>> weight.grad = torch.randn(8, 16)
        >>> optimizer = APOLLO([{"params": [weight], "rank": 2}])
        >>> optimizer.step()
        >>> optimizer.state[weight]["exp_avg"].shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        rank: int | None = None,
        scale_type: str = "channel",
        scale: float = 1.0,
        update_proj_gap: int = 200,
        seed: int = 0,
    ) -> None:
        if scale_type not in ("channel", "tensor"):
            raise ValueError(f"APOLLO: scale_type={scale_type!r} is not 'channel' or 'tensor'")
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank or 0}
        own = {"scale_type": scale_type, "scale": scale, "update_proj_gap": update_proj_gap, "seed": seed}
        super().__init__(params, {**options, **own, "t": 0})
        for group in self.param_groups:
            for p in group["params"]:
                self._prepare(p, group)

    def _prepare(self, p: Tensor, group: dict[str, Any]) -> None:
        shape = p.shape
        if group["rank"]:
            if p.ndim != 2:
                raise ValueError(f"APOLLO: rank {group['rank']} needs a matrix, got a tensor of {p.ndim}-D")
            # The shorter side is projected: [m, n] with m <= n has moments [r, n].
            shape = torch.Size((min(group["rank"], min(p.shape)), max(p.shape)))
            self.state[p]["norm"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[p][name] = torch.zeros(shape, dtype=p.dtype, device=p.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["t"] += 1
            (beta1, beta2), t = group["betas"], group["t"]
            # Adam's bias correction, sqrt(1 - beta2^t) / (1 - beta1^t), is part of the rate: it comes after the limit.
            rate = group["lr"] * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
            for index, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                p.mul_(1 - group["lr"] * group["weight_decay"])
                change = self._scaled(p, group, index) if group["rank"] else self._adam(p.grad, self.state[p], group)
                p.add_(change, alpha=-rate)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, except that norms of steps keep fp32 where the weights have 16 bits."""
        super().load_state_dict(state_dict)
        keep_dtypes(self, state_dict)

    def _adam(self, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Adam's direction m / (sqrt(v) + eps), without bias correction."""
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(g, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        direction: Tensor = state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(group["eps"])
        return direction

    def _scaled(self, p: Tensor, group: dict[str, Any], index: int) -> Tensor:
        """The full gradient, with each channel scaled as Adam scales its projection."""
        assert p.grad is not None
        state, wide = self.state[p], p.shape[0] < p.shape[1]
        g = p.grad if wide else p.grad.T  # [m, n] with m <= n
        # R = P G, [r, n] with P [r, m]. Factor of channel j: the norm of column j of Adam's step over that of R.
        low = self._projection(g, state["exp_avg"].shape[0], group, index) @ g
        adam = self._adam(low, state, group)
        dim = 0 if group["scale_type"] == "channel" else None
        factor = _norm(adam, dim) / _norm(low, dim).add_(1e-8)
        change = g * factor * group["scale"] ** 0.5
        # Norm-growth limiter: the norm is at most GROWTH times that of the last step. A norm of zero is no last step.
        norm = torch.linalg.vector_norm(change).float()
        allowed = torch.where(state["norm"] > 0, torch.minimum(norm, GROWTH * state["norm"]), norm)
        state["norm"].copy_(allowed)
        change *= (allowed / norm.clamp_min(1e-30)).to(change.dtype)
        scaled: Tensor = change if wide else change.T
        return scaled

    def _projection(self, g: Tensor, rank: int, group: dict[str, Any], index: int) -> Tensor:
        """The projection P [r, m] with entries of variance 1 / r, the same for ``update_proj_gap`` steps."""
        # Drawn again at each step from a seed: storing it would cost r * m numbers per matrix.
        turn = (group["t"] - 1) // group["update_proj_gap"]
        generator = torch.Generator(device=g.device).manual_seed(hash((group["seed"], turn, index)) % 2**63)
        drawn = torch.randn(rank, g.shape[0], generator=generator, dtype=torch.float32, device=g.device)
        projection: Tensor = drawn.div_(rank**0.5).to(g.dtype)
        return projection


def _norm(x: Tensor, dim: int | None) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=dim)
    return norm
