"""Optimizers with an update or a statistic of low rank, where no library follows the paper: LoRA, ReLoRA, APOLLO."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from evenstep.optim.state import keep_dtypes

# ---- LoRA and ReLoRA as optimizers of the dense weights ----
#
# A layer with an adapter computes `x (W + s B A)^T`, with W [out, in], B [out, r], A [r, in] and s = alpha / r. The
# gradients of A and B follow from the dense gradient `G = dL/d(W + s B A)`:
#
#     dL/dA = s B^T G        dL/dB = s G A^T
#
# Training adapters is therefore a rule that turns G into an update of rank r, and needs no change of the model. This
# optimizer stores A and B beside each hidden matrix, updates them by AdamW, and adds the change of `s B A` to the
# matrix. Checkpoints, low-bit layers and evaluation see an ordinary model.
#
# The results equal peft's, which a test compares. peft's saving in gradient memory is lost, because G is dense.


class LoRA(Optimizer):
    """Low-rank adapters on the matrices of groups with ``rank`` > 0, AdamW on groups of rank 0 (arXiv:2106.09685).

    A matrix with an adapter is its value at construction plus ``alpha / rank * B A``.

    Args:
        params: parameters or groups; a group with ``rank`` > 0 holds matrices only.
        lr: learning rate of the adapters and of the other parameters, default 1e-3.
        betas: AdamW's, default (0.9, 0.999).
        eps: AdamW's, default 1e-8.
        weight_decay: AdamW's, of the entries of adapters and of the other parameters; default 0.
        rank: for groups without their own; default 0, no adapter.
        alpha: the scale of the adapters, default 32 (the comparison in GaLore, arXiv:2403.03507).

    Raises:
        ValueError: a tensor in a group with ``rank`` > 0 that is not a matrix.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(8, 8))
        >>> optimizer = LoRA([{"params": [weight], "rank": 2}], lr=0.1)
        >>> for _ in range(3):
        ...     weight.grad = torch.randn(8, 8)
        ...     optimizer.step()
        >>> int(torch.linalg.matrix_rank(weight.detach()))
        2
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int | None = None,
        alpha: float = 32.0,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank or 0}
        super().__init__(params, {**options, "alpha": alpha, "t": 0})
        for group in self.param_groups:
            for p in group["params"]:
                self._prepare(p, group)

    def _prepare(self, p: Tensor, group: dict[str, Any]) -> None:
        if not group["rank"]:
            self._moments(p, "", p)
            return
        if p.ndim != 2:
            raise ValueError(f"LoRA: an adapter of rank {group['rank']} needs a matrix, got a tensor of {p.ndim}-D")
        rank = min(group["rank"], *p.shape)
        # B starts at zero, so that the first forward pass sees the matrix as it is; A is random, or no gradient would
        # reach B.
        state = self.state[p]
        state["a"], state["b"] = p.new_empty(rank, p.shape[1]), p.new_zeros(p.shape[0], rank)
        _draw(state["a"])
        for name in ("a", "b"):
            self._moments(p, f"{name}_", state[name])

    def _moments(self, p: Tensor, prefix: str, like: Tensor) -> None:
        state = self.state[p]
        state[f"{prefix}exp_avg"] = torch.zeros_like(like, requires_grad=False)
        state[f"{prefix}exp_avg_sq"] = torch.zeros_like(like, requires_grad=False)
        state[f"{prefix}step"] = torch.zeros((), dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["t"] += 1
            params = [p for p in group["params"] if p.grad is not None]
            if not group["rank"]:
                self._adamw(group, [(p, p.grad, self.state[p], "") for p in params])
                continue
            self._restart(group, params)
            # The gradients of A [r, in] and B [out, r] need the old values of both: collect before any is updated.
            before, work = [], []
            for p in params:
                state = self.state[p]
                a, b, scale = state["a"], state["b"], group["alpha"] / state["a"].shape[0]
                before.append(b @ a)  # [out, in]
                work += [(a, scale * (b.T @ p.grad), state, "a_"), (b, scale * (p.grad @ a.T), state, "b_")]
            self._adamw(group, work)
            for p, old in zip(params, before, strict=True):
                state = self.state[p]
                p.add_(state["b"] @ state["a"] - old, alpha=group["alpha"] / state["a"].shape[0])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, except that step counts keep fp32 where the weights have 16 bits."""
        super().load_state_dict(state_dict)
        keep_dtypes(self, state_dict)

    def _restart(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Called before the step of a group with adapters, for subclasses."""

    def _rate(self, group: dict[str, Any]) -> float:
        return float(group["lr"])

    def _adamw(self, group: dict[str, Any], work: list[tuple[Tensor, Any, dict[str, Any], str]]) -> None:
        if not work:
            return
        beta1, beta2 = group["betas"]
        adamw(
            [x for x, _, _, _ in work],
            [g for _, g, _, _ in work],
            [s[k + "exp_avg"] for _, _, s, k in work],
            [s[k + "exp_avg_sq"] for _, _, s, k in work],
            [],
            [s[k + "step"] for _, _, s, k in work],
            foreach=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=self._rate(group),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


class ReLoRA(LoRA):
    """LoRA with restarts (arXiv:2307.05695), whose updates add up to a change of high rank.

    At a restart the matrix keeps what the adapters have learnt, new adapters are drawn, and only the largest entries of
    the moments are kept.

    Args:
        params: as for `LoRA`, and so are ``lr``, ``betas``, ``eps``, ``weight_decay``, ``rank`` and ``alpha``.
        reset_interval: steps between two restarts, default 5000 (paper); 0 for never.
        pruned: share of the entries of the moments, smallest first, that become zero at a restart; default 0.99
            (paper).
        warmup_steps: number of steps after a restart over which the learning rate of the adapters rises linearly;
            default 100 (paper).

    The full-rank warm-up of the paper is not included; start from a model that had one with ``model.init``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int | None = None,
        alpha: float = 32.0,
        reset_interval: int = 5000,
        pruned: float = 0.99,
        warmup_steps: int = 100,
    ) -> None:
        if not 0 <= pruned <= 1:
            raise ValueError(f"ReLoRA: pruned={pruned} is not in [0, 1]")
        super().__init__(params, lr, betas, eps, weight_decay, rank, alpha)
        for group in self.param_groups:
            group.update(reset_interval=reset_interval, pruned=pruned, warmup_steps=warmup_steps)

    def _restart(self, group: dict[str, Any], params: list[Tensor]) -> None:
        every = group["reset_interval"]
        if not every or group["t"] % every:
            return
        for p in params:
            state = self.state[p]
            _draw(state["a"])
            state["b"].zero_()  # B A is zero again, and the matrix keeps its value
            for name in ("a_", "b_"):
                _prune(state[f"{name}exp_avg"], state[f"{name}exp_avg_sq"], group["pruned"])

    def _rate(self, group: dict[str, Any]) -> float:
        every, t = group["reset_interval"], group["t"]
        rate = float(group["lr"])
        if not group["rank"] or not every or t < every:  # no warm-up before the first restart: the run has its own
            return rate
        return float(rate * min(1.0, (t % every + 1) / max(1, group["warmup_steps"])))


def _draw(a: Tensor) -> None:
    """Draw A as nn.Linear and peft do: uniform, with variance 1 / (3 in)."""
    torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5))


def _prune(first: Tensor, second: Tensor, share: float) -> None:
    """Set both moments to zero for the ``share`` of entries whose first moment is smallest."""
    # The official code prunes the two moments separately. A first moment without its second one would be divided by
    # almost zero in the next step.
    count = round(share * first.numel())
    if count:
        kept = first.abs() > first.abs().flatten().kthvalue(count).values
        first.mul_(kept)
        second.mul_(kept)


# ---- APOLLO and APOLLO-Mini (arXiv:2412.05270): full-rank steps whose scale comes from Adam in a random subspace ----
#
# Adam's moments are kept for a random projection of the gradient to rank r. They tell by how much each channel, or the
# whole matrix, is to be scaled; the step is the full gradient with that scale.
#
# Where the paper leaves details open, this code follows the published code: bias correction multiplies the step after
# the limit of its growth, `eps` is added before bias correction, and a square matrix has one factor per row.
#
# The APOLLO of pytorch_optimizer 4.1 (`peer_apollo` in the catalog) scales the projected gradient and projects it back,
# so that its steps have rank r. With a projection that loses nothing both have the same trajectory, which a test
# checks. Three differences remain there: the factor is `scale` to the power of 3/2, a new projection is drawn at steps
# 200, 400, ... (here and in the paper 201, 401, ...), and bias correction applies to weight decay too.

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
