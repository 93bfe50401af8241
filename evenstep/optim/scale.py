"""SCALE: normalised gradients with momentum for the last layer alone (arXiv:2506.16659)."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from evenstep.errors import nearest
from evenstep.optim.base import EvenOptimizer, Group, State, clock, hyper, moment, scalar, state_dtype
from evenstep.optim.groups import KINDS
from evenstep.transforms import AdamStep, Gradients, adam_, column_norms, row_blocks, row_norms


class SCALE(EvenOptimizer):
    """Gradient descent on column-normalised gradients, with momentum in the last layer and AdamW for vectors.

    The gradient of a matrix is divided by its norm over the input dimension (dimension 1 of a torch weight; dimension
    0, the vocabulary, for an embedding), after momentum in the last layer: ``p <- p (1 - lr wd) - lr * that``. A tensor
    of more than two dimensions counts as (dim 0, rest). Matrices other than the last layer have no state.

    Args:
        params: the groups of `scale_groups` (each names its ``kind``: embedding, hidden, last or vector). Every option
            may differ per group.
        lr: learning rate of the matrices, a float or a 0-d tensor. Default 1e-3.
        momentum: decay of the last layer's average gradient, without bias correction. Default 0.9 (paper).
        weight_decay: decoupled weight decay, multiplied by the group's learning rate. Default 0.
        adam_lr: learning rate of the vectors; None (default) for ``lr``. It becomes ``lr`` of the vectors' group, so
            that schedulers move it.
        betas, eps: AdamW's, for the vectors. Default (0.9, 0.999) and 1e-8.
        norm: ``"rms"`` (default: the official code, to which every published learning rate belongs) or ``"l2"`` (the
            paper's text). A row of ``n`` entries gets a step ``sqrt(n)`` times smaller with ``"l2"``.
        fused: None or False; kernels choose themselves.
        **official: the official names ``wd`` (weight_decay), ``adamw_betas`` (betas), ``adamw_eps`` (eps).

    State, fp32 (fp64 for fp64 parameters): ``exp_avg`` of the last layer; ``exp_avg``, ``exp_avg_sq`` and ``age``
    (updates) of vectors.

    A tensor whose gradient holds a NaN or Inf is skipped on the device, and `stats` says so. Gradients are never
    modified.

    Raises:
        ValueError: a group without a known kind, or an option out of range. TypeError: an unknown argument.
        RuntimeError: a sparse gradient (in ``step``).
    """

    ALIASES: ClassVar[dict[str, str]] = {"wd": "weight_decay", "adamw_betas": "betas", "adamw_eps": "eps"}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        adam_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        norm: str = "rms",
        fused: bool | None = None,
        **official: Any,
    ):
        options = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "adam_lr": adam_lr,
            "betas": betas,
            "eps": eps,
            "norm": norm,
        }
        super().__init__(params, options, official, fused)

    def _prepare_group(self, group: Group) -> Group:
        kind = group.get("kind")
        if kind is None:
            raise ValueError("SCALE: a param group has no 'kind'; build the groups with scale_groups(model)")
        if kind not in KINDS:
            raise ValueError(f"SCALE: kind={kind!r} is not one of {', '.join(KINDS)}{nearest(str(kind), KINDS)}")
        adam_lr = group.get("adam_lr", self.defaults["adam_lr"])
        if kind == "vector" and adam_lr is not None:
            self._check("adam_lr", adam_lr)
            group.setdefault("lr", adam_lr)
        return group

    def new_state(self, p: Tensor, group: Group, index: int) -> State:
        kind = group["kind"]
        if kind == "vector":
            return {"exp_avg": moment(p), "exp_avg_sq": moment(p), "age": scalar(p)}
        if p.dim() < 2:
            raise ValueError(
                f"SCALE: parameter {index} of shape {tuple(p.shape)} is in a group of kind {kind!r}; make it 'vector'"
            )
        return {"exp_avg": moment(p)} if kind == "last" else {}

    def update(self, group: Group, params: list[Tensor]) -> dict[str, Tensor]:
        grads = Gradients.measure([p.grad for p in params if p.grad is not None], state_dtype(params[0]))
        step = self._vector_step if group["kind"] == "vector" else self._matrix_step
        norm_after, update_norm = step(group, params, grads)
        size = grads.peak.new_tensor([max(p.numel(), 1) for p in params])
        return {
            "grad_max": grads.peak,
            "grad_norm": grads.norm,
            "norm_after": norm_after,
            "clip_limit": torch.full_like(size, torch.nan),
            "clipped": torch.zeros_like(size),
            "gain": norm_after / grads.norm.clamp(min=torch.finfo(grads.dtype).tiny),
            "update_rms": update_norm / size.sqrt(),
            "skipped": (~grads.finite).to(grads.dtype),
        }

    def _vector_step(self, group: Group, params: list[Tensor], grads: Gradients) -> tuple[Tensor, Tensor]:
        age = self.stacked(params, "age") + 1
        plan = AdamStep.plan(
            grads.finite,
            age,
            torch.zeros_like(clock(group)),
            lr=hyper(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
        exp_avg, exp_avg_sq = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq"))
        update_norm = adam_(params, grads, exp_avg, exp_avg_sq, plan)
        self.store(params, grads.finite, age=age)
        return grads.norm, update_norm

    def _matrix_step(self, group: Group, params: list[Tensor], grads: Gradients) -> tuple[Tensor, Tensor]:
        """Returns the norm of each normalised gradient and of each update."""
        embedding, beta, decay = group["kind"] == "embedding", group["momentum"], group["weight_decay"]
        one = torch.ones_like(grads.peak)
        rates = torch.where(grads.finite, one * hyper(group["lr"]), 0 * one)
        keeps = torch.where(grads.finite, one * beta, one)
        peaks = torch.where(grads.finite, grads.peak, one)
        norms = []
        for i, p in enumerate(params):
            read, rate, parts = grads.reader(i), rates[i], []
            moments = [self.state[p]["exp_avg"]] if group["kind"] == "last" else []
            if embedding:
                pieces = (piece for (piece,) in row_blocks(grads.tensors[i]))
                size = column_norms(pieces, read, peaks[i], p.shape[0], group["norm"])
            for x, piece, *averages in row_blocks(p, grads.tensors[i], *moments):
                g = read(piece)
                for m in averages:
                    g = m.mul_(keeps[i]).add_(g, alpha=1 - beta)
                direction = g / (size if embedding else row_norms(g, group["norm"]))
                parts.append(torch.linalg.vector_norm(direction))
                start = x.to(g.dtype) * (1 - rate * decay) if decay else x
                x.copy_(start - direction.mul_(rate))
            norms.append(torch.linalg.vector_norm(torch.stack(parts)))
        norm = torch.stack(norms)
        return norm, norm * rates
