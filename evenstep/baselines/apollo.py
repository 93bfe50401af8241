"""APOLLO and APOLLO-Mini (arXiv:2412.05270): Adam's moments of a random projection of the gradient tell how much each
channel (or the whole matrix) is to be scaled; the step itself is the full gradient, scaled.

What the paper leaves open is as in the published code: bias correction multiplies the step once its growth is limited,
``eps`` is added before bias correction, and a square matrix has one factor for each row.

pytorch_optimizer 4.1's APOLLO (``peer_apollo`` in the catalog) scales the projected gradient and projects it back, so
that its steps are of rank r. Under a projection that loses nothing its trajectory is ours, which a test checks; what
remains is that it multiplies by ``scale`` to the power of 3/2, draws a new projection at steps 200, 400, ... (here and
in the paper 201, 401, ...) and applies bias correction to the weight decay too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from evenstep.optim.state import keep_dtypes

GROWTH = 1.01
"""How much the norm of a matrix's step, before bias correction, may grow from one step to the next (paper)."""


class APOLLO(Optimizer):
    """Matrices in groups with ``rank`` > 0 by APOLLO, all else by AdamW.

    Args:
        params: groups with ``rank``; matrices alone where it is above 0.
        lr, betas, weight_decay: as AdamW's. Defaults 1e-2 (paper), (0.9, 0.999), 0.
        eps: added to the root of the second moment before bias correction. Default 1e-6.
        rank: of groups that do not say theirs; 0 for none.
        scale_type: ``"channel"`` (APOLLO: one factor for each entry of the longer side) or ``"tensor"`` (APOLLO-Mini).
        scale: the step is multiplied by its root; 1 for APOLLO, 128 for APOLLO-Mini (paper).
        update_proj_gap: steps between two random projections, default 200 (paper).
        seed: of the projections, which are drawn anew at each step instead of being kept.

    Raises ValueError for an unknown ``scale_type``, and for a tensor that is no matrix in a group with a rank.
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
            rate = group["lr"] * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
            for index, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                p.mul_(1 - group["lr"] * group["weight_decay"])
                change = self._scaled(p, group, index) if group["rank"] else self._adam(p.grad, self.state[p], group)
                p.add_(change, alpha=-rate)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but norms of steps stay exact under weights of fewer bits."""
        super().load_state_dict(state_dict)
        keep_dtypes(self, state_dict)

    def _adam(self, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Adam's step without bias correction, which is in the rate."""
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(g, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        return state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(group["eps"])

    def _scaled(self, p: Tensor, group: dict[str, Any], index: int) -> Tensor:
        """The full gradient, each channel scaled as Adam scales its projection."""
        assert p.grad is not None
        state, wide = self.state[p], p.shape[0] < p.shape[1]
        g = p.grad if wide else p.grad.T  # the longer side last
        low = self._projection(g, state["exp_avg"].shape[0], group, index) @ g
        adam = self._adam(low, state, group)
        dim = 0 if group["scale_type"] == "channel" else None
        factor = _norm(adam, dim) / _norm(low, dim).add_(1e-8)
        change = g * factor * group["scale"] ** 0.5
        norm = torch.linalg.vector_norm(change).float()
        allowed = torch.where(state["norm"] > 0, torch.minimum(norm, GROWTH * state["norm"]), norm)
        state["norm"].copy_(allowed)
        change *= (allowed / norm.clamp_min(1e-30)).to(change.dtype)
        return change if wide else change.T

    def _projection(self, g: Tensor, rank: int, group: dict[str, Any], index: int) -> Tensor:
        """Entries of variance 1 / rank, the same for ``update_proj_gap`` steps."""
        turn = (group["t"] - 1) // group["update_proj_gap"]
        generator = torch.Generator(device=g.device).manual_seed(hash((group["seed"], turn, index)) % 2**63)
        drawn = torch.randn(rank, g.shape[0], generator=generator, dtype=torch.float32, device=g.device)
        return drawn.div_(rank**0.5).to(g.dtype)


def _norm(x: Tensor, dim: int | None) -> Tensor:
    return torch.linalg.vector_norm(x, dim=dim)
