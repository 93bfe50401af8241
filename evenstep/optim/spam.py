"""SPAM: Adam with spike-aware clipping, momentum reset, and sparse momentum (arXiv:2501.06842, ICLR 2025)."""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from evenstep.kernels.interface import Kernels, constant, uploaded
from evenstep.optim import functional as F
from evenstep.optim import options
from evenstep.optim.distributed import Bucket, Steps, is_sharded, state_dtype
from evenstep.optim.masks import draw_mask, pack, put_back, taken, unpack
from evenstep.optim.optimizer import EvenOptimizer
from evenstep.optim.state import Group, State, largest_stored, moment, scalar

N = TypeVar("N", Tensor, float)


class SPAM(EvenOptimizer):
    """Adam that clips entries far above their own history, resets its moments now and then, and warms up again after
    each reset.

    Per entry: where ``g**2 > threshold * v`` (``v``: the second moment before this step, without bias correction),
    ``g`` becomes ``sign(g) * sqrt(threshold * v)``. An entry with ``v == 0`` has no history and is not a spike. No
    clipping happens while ``t`` or the number of steps since the last reset is below ``clip_start``.

    With ``density`` d < 1 only a random fraction d of each matrix (2 or more dimensions) has moments and is updated,
    until the next reset draws another: state memory is d of the dense one, plus one bit per entry for the mask.

    Args:
        params: parameters, named parameters ``(name, tensor)`` or param groups, as in torch. Every option below may
            differ per group.
        lr: learning rate, a float or a 0-d tensor. Default 1e-3 (paper: 60M).
        betas: decay of the moments. Default (0.9, 0.999).
        eps: added to the root of the second moment. Default 1e-6 (official code).
        weight_decay: decoupled weight decay, multiplied by ``lr`` and not by the re-warm-up. Default 0.
        threshold: the spike threshold, theta in the paper. Default 5000; 0 for no clipping.
        reset_interval: steps between resets, 0 for never. Default 500. Official names ``DeltaT``, ``update_proj_gap``.
        warmup_steps: length of the re-warm-up after a reset. Default 150. Official name ``warmup_epoch``.
        clip_start: steps without clipping at the start and after a reset. Default 20 (official code,
            ``grad_accu_steps`` there).
        density: fraction of each matrix that is trained at a time, in (0, 1]. Default 1.0. Each mask holds
            ``round(density * n)`` entries.
        variant: ``"paper"`` (default), or ``"official"`` for the published code's trajectory step by step: bias
            correction that is not restarted by a reset, ``eps`` added before bias correction, decay after the update
            (none with ``density`` < 1), and entries without history clipped to zero.
        maximize: ascend instead of descend. Default False.
        capturable: keep the clock on the device, so that the step can be captured in a CUDA graph. Default False.
        rounding: how results enter 16-bit parameters: ``"nearest"`` (default), ``"stochastic"`` or ``"kahan"`` (2 more
            bytes per parameter); no difference for fp32 parameters.
        state: how moments are stored: ``"fp32"`` (default), ``"bf16"``, or ``"int8"`` (blocks of 256, needs torchao).
        fused: a fused step (C++ on CPU, Triton on CUDA): None (default) where it serves, False for the plain code, True
            for an error where it does not. ``evenstep doctor`` shows what serves. Sharded parameters, and a step
            compiled by ``torch.compile``, take the plain code.
        **official: the official names above.

    State per parameter, fp32 (fp64 for fp64 parameters): ``exp_avg``, ``exp_avg_sq``, the scalar ``age`` (updates since
    the last reset; with ``variant="official"`` since the start) and, where sparse, ``mask`` (uint8, one bit per entry,
    in the order of a flattened tensor).

    A tensor whose gradient holds a NaN or Inf, or an entry whose square is beyond the range of its moments (1.8e19 in
    fp32), is skipped on the device, and `stats` says so. Gradients are never modified.

    Raises:
        ValueError: an option is out of range. TypeError: an unknown argument. RuntimeError: a sparse gradient (in
            ``step``).
    """

    OPTIONS = options.SPAM

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        threshold: float = 5000.0,
        reset_interval: int = 500,
        warmup_steps: int = 150,
        clip_start: int = 20,
        density: float = 1.0,
        *,
        variant: str = "paper",
        maximize: bool = False,
        capturable: bool = False,
        rounding: str = "nearest",
        state: str = "fp32",
        fused: bool | None = None,
        **official: Any,
    ):
        self._constructed = False
        super().__init__(params, locals(), official, fused)
        self._constructed = True
        self._warn_untrained()

    # ---- masks ----

    _constructed = True
    _untrained: tuple[tuple[int, ...], ...] = ()
    """Shapes of new parameters whose masks hold no entry."""

    def _start_trained(self, groups: Iterable[Group]) -> None:
        groups = list(groups)
        super()._start_trained(groups)
        for group in groups:
            self._check_sizes(group["params"])
        if self._constructed:
            self._warn_untrained()

    def _warn_untrained(self) -> None:
        shapes, self._untrained = self._untrained, ()
        if shapes:
            named = ", ".join(map(str, shapes[:8])) + (f" and {len(shapes) - 8} more" if len(shapes) > 8 else "")
            warnings.warn(
                f"SPAM: density times the number of entries rounds to 0 for parameters of shape {named}, which will "
                "not be updated; raise density, or put them into a group with density=1",
                stacklevel=3,
            )

    def _check_sizes(self, params: Iterable[Tensor]) -> None:
        """ValueError for a sparse parameter that has another size than when its mask was made."""
        for p in params:
            mask = self.state[p].get("mask") if p in self.state else None
            if mask is not None and mask.numel() != -(-p.numel() // 8):
                raise ValueError(
                    f"SPAM: a parameter of shape {tuple(p.shape)} has a mask of {mask.numel()} bytes, made for another "
                    "size; make a new optimizer after changing the size of a parameter"
                )

    def new_state(self, p: Tensor, group: Group, index: int) -> State:
        stored = group["state"]
        if group["density"] == 1 or p.dim() < 2:
            return {"exp_avg": moment(p, stored), "exp_avg_sq": moment(p, stored, signed=False), "age": scalar(p)}
        if is_sharded(p):
            raise ValueError("SPAM: density < 1 is not supported for sharded parameters; use density=1, or DDP")
        count = round(group["density"] * p.numel())
        sparse = _sparse_moments(p, self._draw_mask(group, p), count, stored)
        return {"age": scalar(p), "mask_set_at": -1} | sparse

    def _start(self, p: Tensor, group: Group, index: int) -> None:
        super()._start(p, group, index)
        if "mask" in self.state[p] and p.numel() and not self.state[p]["exp_avg"].numel():
            self._untrained = (*self._untrained, tuple(p.shape))

    def _draw_mask(self, group: Group, p: Tensor) -> Tensor:
        if p.is_meta:  # a dry run asks for the size alone
            return torch.empty(-(-p.numel() // 8), dtype=torch.uint8, device=p.device)
        # The seed says whose mask this is and when it is drawn: equal on all ranks, and the same again after a resume.
        drawn = draw_mask(p.numel(), group["density"], (*self.place(p)[1], int(group["t"])))
        return uploaded(drawn, p.device)

    def prepare(self, group: Group, params: list[Tensor]) -> None:
        """On a reset the sparse parameters get new masks, where their gradients count as finite."""
        self._check_sizes(params)
        if group["density"] == 1 or not group["reset_interval"] or group["t"] % group["reset_interval"]:
            return
        for p in params:
            state = self.state[p]
            if state.get("mask_set_at") in (None, group["t"] - 1):  # dense, or given by hand for this step
                continue
            bits, count = self._draw_mask(group, p), round(group["density"] * p.numel())
            squares = p.grad.to(state_dtype(p)).square()  # type: ignore[union-attr]
            accepted = (squares <= largest_stored([state["exp_avg_sq"]], state_dtype(p))).all()
            if state["exp_avg"].numel() == count:
                state["mask"].copy_(torch.where(accepted, bits, state["mask"]))
            elif accepted:  # a mask of another size was given by hand: the one place that must ask the device
                state.update(_sparse_moments(p, bits, count, group["state"]))

    def set_mask(self, p: Tensor, mask: Tensor) -> None:
        """Train the entries of ``p`` where ``mask`` (bool, the shape of ``p``) is True, with new moments, until a later
        reset draws another.

        A mask given just before a step whose number is a multiple of ``reset_interval`` is the one in force from that
        step on.

        Raises ValueError for a mask of another shape or dtype, or a parameter that is dense.
        """
        state = self.state.get(p, {})
        if "mask" not in state:
            raise ValueError(
                "set_mask: the parameter is dense (density 1 or fewer than 2 dimensions), frozen, or not in this "
                "optimizer"
            )
        if mask.dtype != torch.bool or mask.shape != p.shape:
            raise ValueError(
                f"set_mask: expected a bool tensor of shape {tuple(p.shape)}, got {mask.dtype} of {tuple(mask.shape)}"
            )
        group, _ = self.place(p)
        sparse = _sparse_moments(p, pack(mask).to(p.device), int(mask.sum()), group["state"])
        state.update(sparse, mask_set_at=group["t"])
        if group["variant"] == "paper":
            state["age"].zero_()

    def get_mask(self, p: Tensor) -> Tensor:
        """The entries of ``p`` that are trained at present: a bool tensor in its shape, without a True where ``p`` is
        frozen.
        """
        self.place(p)
        if p not in self.state:
            return torch.zeros_like(p, dtype=torch.bool)
        state = self.state[p]
        return (
            unpack(state["mask"], p.numel()).view(p.shape) if "mask" in state else torch.ones_like(p, dtype=torch.bool)
        )

    # ---- the step ----

    def update(self, group: Group, bucket: Bucket) -> Steps[dict[str, Tensor]]:
        official = group["variant"] == "official"
        every, threshold, weight_decay = group["reset_interval"], group["threshold"], group["weight_decay"]
        grads = yield self.gradients(group, bucket)
        grads = grads.squares_within(largest_stored(bucket.state_tensors("exp_avg_sq"), bucket.dtype))
        t, sharded = group["t"], bool(bucket.layout.cuts)
        reset = F.reset_due(t, every)
        scalars = bucket.stacked("age")
        [age] = scalars.values  # [k]
        age = age + 1 if official else age * (1 - reset) + 1
        plan = F.AdamPlan.of(
            grads.finite,
            age,
            reset,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=0.0 if official else weight_decay,
            warmup=F.rewarm_factor(t, every, group["warmup_steps"]),
            eps_before_correction=official,
            weight_decay_after=weight_decay if official and group["density"] == 1 else 0.0,
        )
        clip = F.EntryClip(threshold, self._clips(group, t), forget=reset, zero_history=official) if threshold else None

        # Moments of sparse parameters are compact. The trained entries are taken out, updated and put back.
        weights = self.weights(group, bucket, grads.finite)
        where = [_trained_entries(state, p.numel()) for p, state in zip(bucket.params, bucket.states, strict=True)]
        lost = weights.lost
        weights.tensors, weights.lost = taken(bucket.shards, where), taken(lost, where)
        trained = grads.of(taken(bucket.grads, where))
        exp_avg, exp_avg_sq = bucket.state_tensors("exp_avg"), bucket.state_tensors("exp_avg_sq")
        update_norm = F.adam_step(weights, trained, exp_avg, exp_avg_sq, plan, clip)
        put_back(bucket.shards, weights.tensors, where)
        put_back(lost, weights.lost, where)

        scalars.store(grads.finite, age)
        grads = yield grads.with_norms()
        stats = F.statistics(grads, bucket.sizes(), update_norm, sharded=sharded)
        sizes = bucket.sizes()
        if any("mask" in state for state in bucket.states):
            entries = [max(state["exp_avg"].numel(), 1) for state in bucket.states]
            sizes = constant(entries, update_norm.dtype, update_norm.device)
            stats["update_rms"] = update_norm / sizes.sqrt()
        if clip and not sharded:
            stats |= {"norm_after": clip.norms(), "clipped": clip.counts() / sizes}
        elif clip:  # only a shard was clipped here, and its count is not worth an all-reduce of its own
            stats |= {name: torch.full_like(sizes, math.nan) for name in ("norm_after", "clipped")}
        return stats

    def fused_step(self, group: Group, bucket: Bucket, kernels: Kernels) -> Tensor:
        official, threshold, every = group["variant"] == "official", group["threshold"], group["reset_interval"]
        reset = F.reset_due(group["t"], every)
        step_options = {
            "sign": -1.0 if group["maximize"] else 1.0,
            "lr": group["lr"],
            "beta1": group["betas"][0],
            "beta2": group["betas"][1],
            "eps": group["eps"],
            "decay": 0.0 if official else group["weight_decay"],
            "decay_after": group["weight_decay"] if official and group["density"] == 1 else 0.0,
            "warmup": F.rewarm_factor(group["t"], every, group["warmup_steps"]),
            "reset": 0.0 if official else reset,
            "forget": reset,
            "eps_first": official,
            "capped": threshold > 0,
            "cap_factor": threshold * (1 - reset),
            "cap_spread": self._spread(group),
            "zero_history": official,
        }
        return kernels.adam_step_(self.step_tensors(group, bucket, "age", masks=_masks(bucket)), step_options)

    @classmethod
    def checked_steps(cls) -> dict[str, Callable[..., EvenOptimizer]]:
        def build(params: list[Tensor], **how: Any) -> EvenOptimizer:
            return cls(params, threshold=50.0, clip_start=1, reset_interval=0, weight_decay=0.1, **how)

        def sparse(params: list[Tensor], *, fused: bool | None, **how: Any) -> EvenOptimizer:
            return build(params, density=0.5, fused=None if fused else False, **how)  # not all kernels know masks

        return {"SPAM": build, "SPAM, density 0.5": sparse}

    def _spread(self, group: Group) -> Any:
        """What is added to the limits: 0, or Inf on a step without clipping."""
        clips = self._clips(group, group["t"])
        return torch.where(clips > 0, 0.0, math.inf) if isinstance(clips, Tensor) else 0.0 if clips else math.inf

    @staticmethod
    def _clips(group: Group, t: N) -> N:
        """Whether entries are clipped on this step: 1 or 0."""
        started = t >= group["clip_start"]
        if group["reset_interval"]:
            started = started & (t % group["reset_interval"] >= group["clip_start"])
        return started + 0 * t


def _masks(bucket: Bucket) -> list[Tensor]:
    """Packed bits of each tensor, none for a dense one; no list where all are dense."""
    if not any("mask" in state for state in bucket.states):
        return []
    nothing = torch.empty(0, dtype=torch.uint8, device=bucket.shards[0].device)
    return [state.get("mask", nothing) for state in bucket.states]


def _trained_entries(state: State, n: int) -> Tensor | None:
    """Flat indices of the entries of a tensor of ``n`` that are trained, None for all."""
    if "mask" not in state:
        return None
    return torch.nonzero_static(unpack(state["mask"], n), size=state["exp_avg"].numel()).view(-1)


def _sparse_moments(p: Tensor, bits: Tensor, count: int, stored: str) -> State:
    """New compact moments for the ``count`` entries of a packed mask."""
    compact = p.new_empty(count)
    return {"exp_avg": moment(compact, stored), "exp_avg_sq": moment(compact, stored, signed=False), "mask": bits}
