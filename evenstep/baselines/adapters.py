"""LoRA and ReLoRA as optimizers of the dense weights.

A layer with an adapter computes ``x (W + s B A)^T``. Its gradients follow from the dense one, ``G = dL/d(W + s B A)``:
``dL/dA = s B^T G`` and ``dL/dB = s G A^T``. So training adapters is a rule that turns G into an update of rank r, and
needs no change of the model: this optimizer keeps A and B beside each hidden matrix, steps them by AdamW and writes
the change of ``s B A`` into the matrix. Checkpoints, low-bit layers and evaluation see an ordinary model. The numbers
are peft's, which a test compares; what is not had is peft's saving in gradients, since G is dense.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from evenstep.optim.state import keep_dtypes


class LoRA(Optimizer):
    """Low-rank adapters on the matrices of groups with ``rank`` > 0, AdamW on those with rank 0 (arXiv:2106.09685).

    Each such matrix stays what it was when this was built, plus ``alpha / rank * B A``.

    Args:
        params: groups with ``rank``; matrices alone where it is above 0.
        lr, betas, eps, weight_decay: AdamW's, of the adapters' entries and of the rest. Defaults 1e-3, (0.9, 0.999),
            1e-8, 0.
        rank: of groups that do not say theirs; 0 for none.
        alpha: default 32 (GaLore's comparison, arXiv:2403.03507).

    Raises ValueError for a tensor with an adapter that is no matrix.
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
            before, work = [], []
            for p in params:
                state = self.state[p]
                a, b, scale = state["a"], state["b"], group["alpha"] / state["a"].shape[0]
                before.append(b @ a)
                work += [(a, scale * (b.T @ p.grad), state, "a_"), (b, scale * (p.grad @ a.T), state, "b_")]
            self._adamw(group, work)
            for p, old in zip(params, before, strict=True):
                state = self.state[p]
                p.add_(state["b"] @ state["a"] - old, alpha=group["alpha"] / state["a"].shape[0])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but step counts stay exact under weights of fewer bits."""
        super().load_state_dict(state_dict)
        keep_dtypes(self, state_dict)

    def _restart(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """What a subclass does before a step."""

    def _rate(self, group: dict[str, Any]) -> float:
        return group["lr"]

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
    """LoRA that starts again and again (arXiv:2307.05695): what the adapters have learnt stays in the matrix, new ones
    are drawn, and of their moments only the largest entries are kept, so that the sum of updates is of high rank.

    Args beside LoRA's:
        reset_interval: steps between two starts, default 5000 (paper); 0 for never.
        pruned: share of the moments' entries, smallest first, that become zero at a start; default 0.99 (paper).
        warmup_steps: after a start the rate of the adapters rises linearly over so many steps; default 100 (paper).

    The paper's full-rank warm-up is not part of it; start from a model that had one with ``model.init``.
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
            state["b"].zero_()
            for name in ("a_", "b_"):
                _prune(state[f"{name}exp_avg"], state[f"{name}exp_avg_sq"], group["pruned"])

    def _rate(self, group: dict[str, Any]) -> float:
        since, t = group["reset_interval"], group["t"]
        if not group["rank"] or not since or t < since:
            return group["lr"]
        return group["lr"] * min(1.0, (t % since + 1) / max(1, group["warmup_steps"]))


def _draw(a: Tensor) -> None:
    """As nn.Linear and peft draw it: uniform, variance 1 / (3 inputs)."""
    torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5))


def _prune(first: Tensor, second: Tensor, share: float) -> None:
    """Zero the moments of the ``share`` of entries whose first moment is smallest. Both go together, unlike in the
    official code: a first moment that has lost its second would be divided by nearly nothing."""
    count = round(share * first.numel())
    if count:
        kept = first.abs() > first.abs().flatten().kthvalue(count).values
        first.mul_(kept)
        second.mul_(kept)
