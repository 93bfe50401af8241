"""SCALE: normalised gradients with momentum for the last layer alone (arXiv:2506.16659).

Embedding and hidden matrices have no state at all, which is the point of the method. Parameters come in groups that
name their ``kind``; `evenstep.optim.groups.scale_groups` makes them.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from evenstep.errors import nearest
from evenstep.kernels.interface import Kernels
from evenstep.optim import functional as F
from evenstep.optim import options
from evenstep.optim.distributed import Bucket, Reduction, Steps
from evenstep.optim.groups import KINDS
from evenstep.optim.optimizer import EvenOptimizer
from evenstep.optim.state import Group, State, adam_moments, largest_stored, moment, scalar


class SCALE(EvenOptimizer):
    """Gradient descent on column-normalised gradients, with momentum in the last layer and AdamW for vectors.

    A matrix moves by ``p <- p (1 - lr wd) - lr g / norm(g)``. The norm is taken over the input dimension: dimension 1
    of a torch weight ``[out, in]``, dimension 0 (the vocabulary) of an embedding ``[vocabulary, width]``. In the last
    layer ``g`` is the running average of the gradient. A tensor of more than two dimensions counts as the matrix
    (dim 0, rest). Matrices other than the last layer have no state.

    Args:
        params: the groups of `scale_groups`, each with its ``kind``: ``"embedding"``, ``"hidden"``, ``"last"`` or
            ``"vector"``. Every option may differ per group.
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
        fused: a fused step (C++ on CPU, Triton on CUDA): None (default) where it serves, False for the plain code, True
            for an error where it does not. ``evenstep doctor`` shows what serves. Sharded parameters, and a step
            compiled by ``torch.compile``, take the plain code.
        **official: the official names ``wd`` (weight_decay), ``adamw_betas`` (betas), ``adamw_eps`` (eps).

    State, fp32 (fp64 for fp64 parameters): ``exp_avg`` of the last layer; ``exp_avg``, ``exp_avg_sq`` and the 0-d
    ``age`` (updates) of vectors.

    A tensor whose gradient holds a NaN or Inf (for a vector also an entry whose square is beyond the range of its
    moments, above 1.8e19 in fp32) is skipped on the device and counted in ``stats["skipped"]``. Gradients are never
    modified.

    Raises:
        ValueError: a group without a known kind, a matrix kind for a vector, or an option out of range.
        TypeError: an unknown argument.
        RuntimeError: a sparse gradient (in ``step``).

    Example:
        >>> import torch
        >>> from evenstep import SCALE
        >>> w = torch.nn.Parameter(torch.zeros(1, 2))
        >>> optimizer = SCALE([{"params": [w], "kind": "hidden"}], lr=0.1)
        >>> w.grad = torch.tensor([[3.0, 4.0]])  # RMS sqrt(12.5) = 3.54
        >>> optimizer.step()
        >>> w.data
        tensor([[-0.0849, -0.1131]])
        >>> optimizer.state[w]
        {}
    """

    OPTIONS = options.SCALE

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
        super().__init__(params, locals(), official, fused)

    def _prepare_group(self, group: Group) -> Group:
        kind = group.get("kind")
        if kind is None:
            raise ValueError("SCALE: a param group has no 'kind'; build the groups with scale_groups(model)")
        if kind not in KINDS:
            raise ValueError(f"SCALE: kind={kind!r} is not one of {', '.join(KINDS)}{nearest(str(kind), KINDS)}")
        # adam_lr becomes lr of the vectors' group, so that schedulers, which multiply lr, move it too.
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
            return adam_moments(p, stored) | {"age": scalar(p)}
        if p.dim() < 2:
            raise ValueError(
                f"SCALE: parameter {index} of shape {tuple(p.shape)} is in a group of kind {kind!r}; make it 'vector'"
            )
        return {"exp_avg": moment(p, stored)} if kind == "last" else {}  # no state is the point of SCALE

    def update(self, group: Group, bucket: Bucket) -> Steps[dict[str, Tensor]]:
        sharded = bool(bucket.layout.cuts)
        grads = yield self.gradients(group, bucket)  # all-reduce: the largest entry of each whole tensor
        if group["kind"] == "vector":  # AdamW
            grads = grads.squares_within(largest_stored(bucket.state_tensors("exp_avg_sq"), bucket.dtype))
            update_norm = self._vector_step(group, bucket, grads)
            grads = yield grads.with_norms()  # all-reduce: the norm, for the statistics
            return F.statistics(grads, bucket.sizes(), update_norm, sharded=sharded)
        if group["kind"] == "last":  # an fp64 gradient may not fit an average that is stored in a smaller dtype
            grads = grads.kept_if(grads.peak <= largest_stored(bucket.state_tensors("exp_avg"), bucket.dtype))
        grads, directions = yield self._matrix_step(group, bucket, grads)
        return F.scale_statistics(grads, bucket.sizes(), directions, group["lr"], sharded=sharded)

    def fused_step(self, group: Group, bucket: Bucket, kernels: Kernels) -> Tensor:
        sign, lr = -1.0 if group["maximize"] else 1.0, group["lr"]
        if group["kind"] != "vector":
            tensors = self.step_tensors(group, bucket)
            by = "columns" if group["kind"] == "embedding" else "rows"  # a column is the vocabulary of one feature
            decay, momentum = group["weight_decay"], group["momentum"]
            return kernels.scale_step_(tensors, sign, lr, decay, momentum, group["norm"], by, F.FLOOR)
        return kernels.adam_step_(self.step_tensors(group, bucket, "age"), self.adam_options(group))

    @classmethod
    def checked_steps(cls) -> dict[str, Callable[..., EvenOptimizer]]:
        def build(params: list[Tensor], kinds: tuple[str, ...], **how: Any) -> EvenOptimizer:
            groups = [{"params": [p], "kind": kind} for p, kind in zip(params, kinds, strict=True)]
            return cls(groups, weight_decay=0.1, **how)

        return {
            "SCALE by rows and columns": lambda params, **how: build(params, ("hidden", "embedding", "vector"), **how),
            "SCALE with momentum": lambda params, **how: build(params, ("hidden", "last", "vector"), **how),
        }

    def _vector_step(self, group: Group, bucket: Bucket, grads: F.Gradients) -> Tensor:
        """AdamW. Returns the norm of each update ``[k]``."""
        scalars = bucket.stacked("age")
        age = scalars.values[0] + 1
        plan = F.AdamPlan.of(
            grads.finite,
            age,
            torch.zeros_like(group["t"]),  # the moments are never reset
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
        exp_avg, exp_avg_sq = bucket.state_tensors("exp_avg"), bucket.state_tensors("exp_avg_sq")
        weights = self.weights(group, bucket, grads.finite)
        update_norm = F.adam_step(weights, grads, exp_avg, exp_avg_sq, plan)
        scalars.store(grads.finite, age)
        return update_norm

    def _matrix_step(self, group: Group, bucket: Bucket, grads: F.Gradients) -> Steps[tuple[F.Gradients, Tensor]]:
        """``p <- p (1 - lr wd) - lr g / ||g||``, the norm by row or by column. Returns the gradients with their norms,
        and the norm of each normalised gradient ``[k]``."""
        # 1. In the last layer, update the average m, which takes the place of g.
        # 2. Take the norms ||g|| over dimension ``over``: rows [m, 1], columns [1, n].
        # 3. Read g again in groups of rows, divide by the norms and update p.
        over = 0 if group["kind"] == "embedding" else 1  # the dimension that norms are taken over
        # k matrices of any shapes; the readers make transformed pieces of each (maximize changes the sign).
        decay, norm = group["weight_decay"], group["norm"]
        one = torch.ones_like(grads.peak)  # [k]
        rates = torch.where(grads.finite, one * group["lr"], 0 * one)  # [k], 0 for a tensor that is skipped
        sources, readers = bucket.grads, [grads.reader(i) for i in range(len(bucket.params))]
        if group["kind"] == "last":  # m <- b m + (1 - b) g, b = momentum; a bias correction would cancel
            sources = averages = bucket.state_tensors("exp_avg")
            keeps = torch.where(grads.finite, one * group["momentum"], one)  # [k], 1 for a tensor that is skipped
            for i, m in enumerate(averages):
                for stored, piece in F.blocks(m, bucket.grads[i]):
                    average = F.opened(stored, bucket.dtype)  # the stored tensor itself in fp32
                    average.mul_(keeps[i]).add_(readers[i](piece), alpha=1 - group["momentum"])
                    F.close(stored, average, grads.finite[i])
            # From here on the averages take the place of the gradients.
            readers = [lambda piece: F.opened(piece, bucket.dtype)] * len(averages)

        # Norms of columns, which run through all pieces of rows, and norms over a sharded dimension, which need an
        # all-reduce, take a pass of their own before the update. Norms of rows are taken in the pass of the update.
        squares: list[Tensor | None] = [None] * len(sources)
        if over == 0 or bucket.layout.mesh_dims(over):
            local = [
                F.squared_norms((piece for (piece,) in F.row_blocks(x)), read, over)
                for x, read in zip(sources, readers, strict=True)
            ]
            # One message for the norms of whole tensors (statistics) and one for those of all rows or columns.
            across = Reduction("sum", torch.cat([x.flatten() for x in local]), over)
            sums, totals = yield grads.squares(), across  # both all-reduces in one round
            grads = grads.with_sums(sums)
            split = torch.split(totals, [x.numel() for x in local])
            squares = [total.view_as(x) for total, x in zip(split, local, strict=True)]
        else:
            grads = yield grads.with_norms()
        weights, norms = self.weights(group, bucket, grads.finite), []
        for i, (p, source) in enumerate(zip(weights.tensors, sources, strict=True)):
            norms_of_pieces, row, written = [], 0, 0  # row and written: the first row and entry of the piece
            shape = bucket.params[i].shape  # of the whole tensor
            count = shape[0] if over == 0 else math.prod(shape[1:])  # entries that a norm is taken over
            for x, piece, *extras in F.row_blocks(p, source, *weights.extras(i)):
                # Read a second time: a copy of all transformed gradients would cost as much memory as the model.
                g, known = readers[i](piece), squares[i]
                if known is None:  # the rows of this piece are complete here
                    size = F.row_norms(g, count, norm)
                else:
                    rows = known if over == 0 else known[row : row + g.shape[0]]
                    size = F.floored(rows.sqrt().to(g.dtype), count, norm)
                row += g.shape[0]
                direction = g / size  # [rows of the piece, ...]
                norms_of_pieces.append(torch.linalg.vector_norm(direction))
                # In the dtype of the statistics, rounded once by `write`.
                begin = x.to(g.dtype) * (1 - rates[i] * decay) if decay else x.to(g.dtype)
                weights.write(i, x, begin - direction.mul_(rates[i]), extras, written)
                written += x.numel()
            norms.append(torch.linalg.vector_norm(torch.stack(norms_of_pieces)))
        return grads, torch.stack(norms) * grads.finite
