"""SCALE: normalised gradients with momentum for the last layer alone (arXiv:2506.16659)."""

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from evenstep.errors import nearest
from evenstep.kernels import Kernels, RowWork, WholeKernels, constant, table
from evenstep.optim.at_once import whole_step
from evenstep.optim.base import EvenOptimizer, Group, State
from evenstep.optim.groups import KINDS
from evenstep.optim.sharding import Bucket
from evenstep.optim.state import largest_stored, moment, scalar, statistics
from evenstep.transforms import (
    FLOOR,
    AdamStep,
    Combine,
    Gradients,
    Steps,
    adam_,
    blocks,
    close,
    filled,
    floored,
    opened,
    row_blocks,
    row_norms,
    squared_norms,
)


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
        maximize: ascend instead of descend. Default False.
        capturable: keep the clock on the device, so that the step can be captured in a CUDA graph. Default False.
        rounding: how results enter 16-bit parameters: ``"nearest"`` (default), ``"stochastic"`` or ``"kahan"`` (2 more
            bytes per parameter); no difference for fp32 parameters.
        state: how moments are stored: ``"fp32"`` (default), ``"bf16"``, or ``"int8"`` (blocks of 256, needs torchao).
        fused: kernels (C++ on CPU, Triton on CUDA): None (default) where they serve, False for the plain code, True for
            an error where they do not. ``evenstep doctor`` shows what serves. A step compiled by ``torch.compile``
            takes the plain code, which the compiler fuses.
        **official: the official names ``wd`` (weight_decay), ``adamw_betas`` (betas), ``adamw_eps`` (eps).

    State, fp32 (fp64 for fp64 parameters): ``exp_avg`` of the last layer; ``exp_avg``, ``exp_avg_sq`` and ``age``
    (updates) of vectors.

    A tensor whose gradient holds a NaN or Inf (for a vector also: an entry whose square is beyond the range of its
    moments, 1.8e19 in fp32) is skipped on the device, and `stats` says so. Gradients are never modified.

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
        maximize: bool = False,
        capturable: bool = False,
        rounding: str = "nearest",
        state: str = "fp32",
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
            "maximize": maximize,
            "capturable": capturable,
            "rounding": rounding,
            "state": state,
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
            if "lr" in group and group["lr"] != adam_lr and "adam_lr" in group:
                raise ValueError(
                    f"SCALE: the group of vectors gives both lr={group['lr']!r} and adam_lr={adam_lr!r}; give one"
                )
            group.setdefault("lr", adam_lr)
        return group

    def new_state(self, p: Tensor, group: Group, index: int) -> State:
        kind, stored = group["kind"], group["state"]
        if kind == "vector":
            return {"exp_avg": moment(p, stored), "exp_avg_sq": moment(p, stored, signed=False), "age": scalar(p)}
        if p.dim() < 2:
            raise ValueError(
                f"SCALE: parameter {index} of shape {tuple(p.shape)} is in a group of kind {kind!r}; make it 'vector'"
            )
        return {"exp_avg": moment(p, stored)} if kind == "last" else {}

    def update(self, group: Group, bucket: Bucket) -> Steps[dict[str, Tensor]]:
        if group["kind"] == "vector":
            grads = (yield self.gradients(group, bucket)).squares_within(
                largest_stored(bucket.parts("exp_avg_sq"), bucket.dtype)
            )
            update_norm = self._vector_step(group, bucket, grads)
            grads = yield grads.with_norms()
            return statistics(grads, bucket, update_norm)
        if bucket.kernels is not None and not (group["kind"] != "embedding" and bucket.layout.mesh_dims(1)):
            grads, directions = yield self._fused_matrix_step(group, bucket, bucket.kernels)
        else:
            grads = yield self.gradients(group, bucket)
            if group["kind"] == "last":  # of fp64, averaged in a smaller dtype
                grads = grads.kept_if(grads.peak <= largest_stored(bucket.parts("exp_avg"), bucket.dtype))
            grads, directions = yield self._matrix_step(group, bucket, grads)
        found = statistics(grads, bucket, directions * group["lr"] * grads.finite)
        found["norm_after"] = torch.full_like(directions, torch.nan) if bucket.layout.cuts else directions
        return found | {"gain": found["norm_after"] / found["grad_norm"].clamp(min=torch.finfo(bucket.dtype).tiny)}

    def at_once(self, group: Group, bucket: Bucket, kernels: WholeKernels) -> Tensor:
        sign, lr = -1.0 if group["maximize"] else 1.0, group["lr"]
        if group["kind"] != "vector":
            work = whole_step(group, bucket)
            by = "columns" if group["kind"] == "embedding" else "rows"
            return kernels.scale_step_(
                work, sign, lr, group["weight_decay"], group["momentum"], group["norm"], by, FLOOR
            )
        how = {
            "sign": sign,
            "lr": lr,
            "beta1": group["betas"][0],
            "beta2": group["betas"][1],
            "eps": group["eps"],
            "decay": group["weight_decay"],
            "warmup": 1.0,
        }
        return kernels.adam_step_(whole_step(group, bucket, "age"), how)

    def _vector_step(self, group: Group, bucket: Bucket, grads: Gradients) -> Tensor:
        scalars = bucket.stacked("age")
        age = scalars.values[0] + 1
        plan = AdamStep.plan(
            grads.finite,
            age,
            torch.zeros_like(group["t"]),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
        exp_avg, exp_avg_sq = bucket.parts("exp_avg"), bucket.parts("exp_avg_sq")
        update_norm = adam_(self.weights(group, bucket, grads.finite), grads, exp_avg, exp_avg_sq, plan)
        scalars.store(grads.finite, age)
        return update_norm

    def _fused_matrix_step(self, group: Group, bucket: Bucket, kernels: Kernels) -> Steps[tuple[Gradients, Tensor]]:
        """As `_matrix_step`, by kernels; what one row or column is divided by must be here."""
        columns = group["kind"] == "embedding"
        shapes = [p.shape for p in bucket.params]
        counts = [shape[0] if columns else math.prod(shape[1:]) for shape in shapes]
        divisors: list[Tensor] = []
        if columns:
            measured, squares = kernels.columns(bucket.grads)
            grads = yield self.gradients(group, bucket, measured=measured)
            across = Combine("sum", torch.cat([x.flatten() for x in squares]), 0)
            sums, totals = yield grads.squares(), across
            grads = grads.with_sums(sums)
            whole = totals.split([x.numel() for x in squares])
            divisors = [
                floored(part.sqrt().float(), count, group["norm"]) for part, count in zip(whole, counts, strict=True)
            ]
        else:
            grads = yield self.gradients(group, bucket)
        weights = self.weights(group, bucket, grads.finite)
        last, momentum = group["kind"] == "last", group["momentum"]
        roots = [math.sqrt(max(count, 1)) if group["norm"] == "rms" else 1.0 for count in counts]
        numbers = table(
            grads.peak,
            grads.finite,
            grads.numbers()[0],
            momentum,
            1 - momentum,
            group["lr"],
            1 - group["lr"] * group["weight_decay"],
            constant(roots, grads.peak.dtype, grads.peak.device),
        )
        found = kernels.rows_(
            RowWork(
                weights.tensors,
                grads.tensors,
                bucket.parts("exp_avg") if last else [],
                divisors,
                numbers,
                FLOOR,
                lost=filled(weights.lost),
                seeds=filled(weights.seeds),
            )
        )
        grads = yield grads.with_norms()
        return grads, found.direction_norm

    def _matrix_step(self, group: Group, bucket: Bucket, grads: Gradients) -> Steps[tuple[Gradients, Tensor]]:
        """Returns the gradients with their norms, and the norm of each normalised gradient."""
        over = 0 if group["kind"] == "embedding" else 1
        last, decay, norm = group["kind"] == "last", group["weight_decay"], group["norm"]
        one = torch.ones_like(grads.peak)
        rates = torch.where(grads.finite, one * group["lr"], 0 * one)
        readers = [grads.reader(i) for i in range(len(bucket.params))]
        if last:
            averages = bucket.parts("exp_avg")
            keeps = torch.where(grads.finite, one * group["momentum"], one)
            for i, m in enumerate(averages):
                for stored, piece in blocks(m, bucket.grads[i]):
                    average = opened(stored, bucket.dtype)
                    average.mul_(keeps[i]).add_(readers[i](piece), alpha=1 - group["momentum"])
                    close(stored, average, grads.finite[i])
            readers = [lambda piece: opened(piece, bucket.dtype)] * len(averages)
        sources = averages if last else bucket.grads

        # Norms over a dimension of which only a part is here, or over the rows of pieces, come before the update.
        whole: list[Tensor | None] = [None] * len(sources)
        if over == 0 or bucket.layout.mesh_dims(over):
            squares = [
                squared_norms((piece for (piece,) in row_blocks(x)), read, over)
                for x, read in zip(sources, readers, strict=True)
            ]
            across = Combine("sum", torch.cat([x.flatten() for x in squares]), over)
            sums, totals = yield grads.squares(), across
            grads = grads.with_sums(sums)
            parts_of = totals.split([x.numel() for x in squares])
            whole = [part.view_as(x) for part, x in zip(parts_of, squares, strict=True)]
        else:
            grads = yield grads.with_norms()
        weights, norms = self.weights(group, bucket, grads.finite), []
        for i, (p, source) in enumerate(zip(weights.tensors, sources, strict=True)):
            parts, start, done = [], 0, 0
            shape = bucket.params[i].shape
            count = shape[0] if over == 0 else math.prod(shape[1:])
            for x, piece, *extras in row_blocks(p, source, *weights.extras(i)):
                g = readers[i](piece)
                squares_here = whole[i]
                if squares_here is None:
                    size = row_norms(g, count, norm)
                else:
                    rows = squares_here if over == 0 else squares_here[start : start + g.shape[0]]
                    size = floored(rows.sqrt().to(g.dtype), count, norm)
                start += g.shape[0]
                direction = g / size
                parts.append(torch.linalg.vector_norm(direction))
                begin = x.to(g.dtype) * (1 - rates[i] * decay) if decay else x.to(g.dtype)
                weights.write(i, x, begin - direction.mul_(rates[i]), extras, done)
                done += x.numel()
            norms.append(torch.linalg.vector_norm(torch.stack(parts)))
        return grads, torch.stack(norms) * grads.finite
