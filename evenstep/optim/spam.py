"""SPAM: Adam with spike-aware clipping, momentum reset, and sparse momentum (arXiv:2501.06842, ICLR 2025)."""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from evenstep.kernels.interface import Kernels, constant, uploaded
from evenstep.optim import functional as F
from evenstep.optim import options
from evenstep.optim.distributed import (
    Bucket,
    Layout,
    Reduction,
    Steps,
    all_reduce,
    is_sharded,
    local,
    reduced,
    region,
    run_batched_collectives,
    shard_like,
    state_dtype,
)
from evenstep.optim.optimizer import EvenOptimizer
from evenstep.optim.rounding import GOLDEN, mixed
from evenstep.optim.state import Group, State, adam_moments, largest_stored, pack, scalar, unpack

N = TypeVar("N", Tensor, float)
T = TypeVar("T", Tensor, Tensor | None)


class SPAM(EvenOptimizer):
    """Adam that clips entries far above their own history, resets its moments periodically, and warms up again after
    each reset.

    Spike-aware clipping, per entry: where ``g**2 > threshold * v`` (``v`` is the second moment before this step,
    without bias correction), ``g`` becomes ``sign(g) * sqrt(threshold * v)``. An entry with ``v == 0`` has no history
    and is not a spike. Nothing is clipped while ``t`` or the number of steps since the last reset is below
    ``clip_start``.

    Sparse momentum: with ``density`` d < 1 only a random fraction d of each matrix (2 or more dimensions) has moments
    and is updated, until the next reset draws another fraction. State memory is d of the dense one, plus one bit per
    entry for the mask. Where parameters are sharded (FSDP2, tensor parallelism), every rank draws the mask of the whole
    tensor and keeps the part of its shard, so that the masks are those of a single process.

    Args:
        params: floating-point parameters of any shape, named parameters ``(name, tensor)`` or param groups, as in
            torch. Every option below may differ per group.
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

    State per parameter, fp32 (fp64 for fp64 parameters): ``exp_avg`` and ``exp_avg_sq`` in the shape of the parameter
    (1-D with the masked entries where sparse), the 0-d ``age`` (updates since the last reset; with
    ``variant="official"`` since the start) and, where sparse, ``mask`` (uint8 ``[ceil(n / 8)]``, one bit per entry, in
    the order of the flattened parameter).

    A tensor whose gradient holds a NaN or Inf, or an entry whose square is beyond the range of its moments (above
    1.8e19 in fp32), is skipped on the device and counted in ``stats["skipped"]``. Gradients are never modified.

    Raises:
        ValueError: an option is out of range, or a parameter is complex, an integer or a flat shard.
        TypeError: an unknown argument.
        RuntimeError: a sparse gradient (in ``step``).

    Example:
        >>> import torch
        >>> from evenstep import SPAM
        >>> w = torch.nn.Parameter(torch.zeros(4))
        >>> optimizer = SPAM([w], lr=0.1, threshold=4.0, clip_start=1, betas=(0.9, 0.75))
        >>> for g in ([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 100.0]):
        ...     w.grad = torch.tensor(g)
        ...     optimizer.step()  # the limit is sqrt(4 v) = 1 with v = 0.25
        >>> optimizer.stats["clipped"]
        tensor([0.2500])
        >>> w.data
        tensor([-0.2000, -0.2000, -0.2000, -0.2000])
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

    _constructed = True  # False while the constructor adds groups: it warns once for all of them
    _untrained: tuple[tuple[int, ...], ...] = ()  # shapes of new parameters whose masks hold no entry

    def _start_trained(self, groups: Iterable[Group]) -> None:
        groups = list(groups)  # read twice
        super()._start_trained(groups)
        for group in groups:
            self._check_sizes(group["params"])
        if self._constructed:
            self._warn_untrained()

    def _warn_untrained(self) -> None:
        """One warning for all new parameters of which no entry is trained."""
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
            if mask is not None and mask.numel() != -(-local(p).numel() // 8):
                raise ValueError(
                    f"SPAM: a parameter of shape {tuple(p.shape)} has a mask of {mask.numel()} bytes, made for another "
                    "size; make a new optimizer after changing the size of a parameter"
                )

    def new_state(self, p: Tensor, group: Group, index: int) -> State:
        stored = group["state"]
        if group["density"] == 1 or p.dim() < 2:
            return adam_moments(p, stored) | {"age": scalar(p)}
        if is_sharded(p) and stored == "int8":  # saved states have one number per entry, see `state_dict`
            raise ValueError(
                "SPAM: state='int8' with density < 1 is not supported for sharded parameters; use state='bf16'"
            )
        # mask_set_at: the step after which `set_mask` was called, -1 for a mask that was drawn.
        return {"age": scalar(p), "mask_set_at": -1} | _sparse_moments(p, *self._draw_mask(group, p), stored)

    def _start(self, p: Tensor, group: Group, index: int) -> None:
        super()._start(p, group, index)
        # Of the whole tensor: a small shard may have no trained entry although others have some.
        if "mask" in self.state[p] and p.numel() and not round(group["density"] * p.numel()):
            self._untrained = (*self._untrained, tuple(p.shape))

    def _draw_mask(self, group: Group, p: Tensor) -> tuple[Tensor, int]:
        """A new mask of the local shard of ``p``, in packed bits, and the number of its entries."""
        n, shard = p.numel(), local(p)
        if p.is_meta:  # a dry run asks for the size alone, which for a shard is a mean
            bits = torch.empty(-(-shard.numel() // 8), dtype=torch.uint8, device=p.device)
            return bits, round(group["density"] * shard.numel())
        # The seed is the place of the parameter and the step: equal on all ranks, and the same again after a resume.
        # On a GPU the mask is drawn there, without work of the host per entry.
        device = shard.device if shard.is_cuda else None
        seed = (*self.place(p)[1], int(group["t"]))
        bits, count = draw_mask(n, group["density"], seed, device), round(group["density"] * n)
        if is_sharded(p):
            # Every rank draws the bits of the whole tensor (n / 8 bytes, and on a GPU some working memory, for one
            # tensor at a time), so that the mask does not depend on the number of ranks. Shards have different numbers
            # of trained entries.
            flags = _flags_of_shard(p, bits)
            bits, count = pack(flags), int(flags.sum())
        return bits if device is not None else uploaded(bits, shard.device), count

    def prepare(self, group: Group, params: list[Tensor]) -> None:
        """On a reset the sparse parameters get new masks, unless their gradients are not finite: such a step changes
        nothing, and the mask goes with the moments."""
        self._check_sizes(params)
        # Host numbers: place_clock refuses a clock on the device together with density < 1.
        if group["density"] == 1 or not group["reset_interval"] or group["t"] % group["reset_interval"]:
            return
        # Dense parameters have no such entry; a mask given by hand for this step stays.
        due = [p for p in params if self.state[p].get("mask_set_at") not in (None, group["t"] - 1)]
        for p, accepted in zip(due, self._within_range(due), strict=True):
            state = self.state[p]
            bits, count = self._draw_mask(group, p)
            if not is_sharded(p) and state["exp_avg"].numel() == count:
                # The moments keep their size, and `update` clears them. The flag is not read.
                state["mask"].copy_(torch.where(accepted, bits, state["mask"]))
            elif accepted:  # moments of another size: the one place that must ask the device, once per reset
                state.update(_sparse_moments(p, bits, count, group["state"]))

    def _within_range(self, params: list[Tensor]) -> list[Tensor]:
        """Whether the gradient of each whole tensor is finite and its squares are in the range of the moments, the
        condition of `squares_within` in `update`: 0-d bools on the device."""

        def exceeded(p: Tensor) -> Steps[Tensor]:
            squares = local(p.grad).to(state_dtype(p)).square()  # type: ignore[arg-type]
            most = largest_stored([self.state[p]["exp_avg_sq"]], state_dtype(p))
            within = (squares <= most).all().view(1)  # False for a NaN
            [worst] = yield from reduced(Reduction("max", (~within).to(state_dtype(p))))
            return worst

        layouts = [Layout.of(p) for p in params]
        flags = run_batched_collectives([exceeded(p) for p in params], lambda requests: all_reduce(requests, layouts))
        return [flag.view(()) == 0 for flag in flags]

    def set_mask(self, p: Tensor, mask: Tensor) -> None:
        """Train the entries of ``p`` where ``mask`` (bool, the shape of ``p``) is True, with new moments, until a later
        reset draws another. For a sharded ``p``, ``mask`` is the whole tensor, or a DTensor with the placements of
        ``p``.

        A mask given just before a step whose number is a multiple of ``reset_interval`` is kept at that step.

        Raises:
            ValueError: a mask of another shape or dtype, or a parameter that is dense, frozen or not in this optimizer.

        Example:
            >>> import torch
            >>> from evenstep import SPAM
            >>> w = torch.nn.Parameter(torch.zeros(2, 2))
            >>> optimizer = SPAM([w], lr=0.1, density=0.5)
            >>> optimizer.set_mask(w, torch.tensor([[True, False], [False, True]]))
            >>> w.grad = torch.ones(2, 2)
            >>> optimizer.step()
            >>> w.data
            tensor([[-0.1000,  0.0000],
                    [ 0.0000, -0.1000]])
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
        # int() waits for the device, once per call: the moments get the size of the mask.
        group, _ = self.place(p)
        mask = local(mask) if is_sharded(mask) else mask[region(p)]
        sparse = _sparse_moments(p, pack(mask).to(p.device), int(mask.sum()), group["state"])
        state.update(sparse, mask_set_at=group["t"])
        if group["variant"] == "paper":  # the published code never restarts its count
            state["age"].zero_()

    def get_mask(self, p: Tensor) -> Tensor:
        """The entries of ``p`` that are trained at present, a bool tensor in its shape (a DTensor where ``p`` is
        sharded): all False for a frozen one. ValueError for a parameter that is not in this optimizer.
        """
        self.place(p)  # raises the error
        if p not in self.state:
            return torch.zeros_like(p, dtype=torch.bool)
        if "mask" not in self.state[p]:
            return torch.ones_like(p, dtype=torch.bool)
        return _spread(p, _flags(p, self.state[p]))

    # ---- saving ----

    def state_dict(self) -> dict[str, Any]:
        """As in torch. Parameters that were unfrozen since the last step are included, with fresh state.

        The moments of sparse sharded parameters are saved in the shape of the parameter, with zeros outside of the
        mask, and the mask as a uint8 tensor of 0 and 1: DTensors, which checkpoint tools can shard again for another
        number of processes. While it exists, such a state takes 9 bytes per entry of the shard (fp32 moments).
        """
        saved = super().state_dict()
        params = [p for group in self.param_groups for p in group["params"]]  # torch numbers them in this order
        for i, state in saved["state"].items():
            if "mask" in state and is_sharded(params[i]):
                # A new dict: torch's refers to the optimizer's own state.
                saved["state"][i] = state | _spread_state(params[i], state)
        return saved

    # ---- the step ----

    def update(self, group: Group, bucket: Bucket) -> Steps[dict[str, Tensor]]:
        official = group["variant"] == "official"
        every, threshold, weight_decay = group["reset_interval"], group["threshold"], group["weight_decay"]
        # all-reduce: the largest entry of each whole tensor, which says whether it is finite and in range
        grads = yield self.gradients(group, bucket)
        # v is a mean of squares, and an entry whose square it cannot hold would make it Inf for good.
        grads = grads.squares_within(largest_stored(bucket.state_tensors("exp_avg_sq"), bucket.dtype))
        t, sharded = group["t"], bool(bucket.layout.cuts)
        reset = F.reset_due(t, every)  # 0-d: 1 or 0
        scalars = bucket.stacked("age")
        [age] = scalars.values  # [k]
        # The published code corrects the bias by the number of all steps, also after a reset, where m and v are small:
        # with it the update overshoots up to 1.85 times.
        age = age + 1 if official else age * (1 - reset) + 1

        # Adam: p <- p (1 - lr wd) - lr w(k) m_hat / (sqrt(v_hat) + eps), w(k) the re-warm-up k steps after a reset.
        # Weight decay is not multiplied by w. The published code decays after the update, dense groups alone, and adds
        # eps to sqrt(v) before the bias is corrected.
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
        # Spike-aware clipping: g^2 > theta v becomes sign(g) sqrt(theta v), with v from before this step.
        clip = F.EntryClip(threshold, self._clips(group, t), forget=reset, zero_history=official) if threshold else None

        # Sparse momentum: moments of sparse parameters are 1-D, with the trained entries alone. Those entries of the
        # parameter, of the gradient and of the compensation are taken out, updated as dense tensors, and put back.
        weights = self.weights(group, bucket, grads.finite)
        # [trained entries] of int64 for each sparse parameter, None for a dense one
        where = [_trained_entries(p, state) for p, state in zip(bucket.params, bucket.states, strict=True)]
        lost = weights.lost
        weights.tensors, weights.lost = gather_entries(bucket.shards, where), gather_entries(lost, where)
        trained = grads.of(gather_entries(bucket.grads, where))
        exp_avg, exp_avg_sq = bucket.state_tensors("exp_avg"), bucket.state_tensors("exp_avg_sq")
        update_norm = F.adam_step(weights, trained, exp_avg, exp_avg_sq, plan, clip)
        scatter_entries_(bucket.shards, weights.tensors, where)
        scatter_entries_(lost, weights.lost, where)

        scalars.store(grads.finite, age)
        grads = yield grads.with_norms()  # all-reduce: the norm, for the statistics
        stats = F.statistics(grads, bucket.sizes(), update_norm, sharded=sharded)
        sizes = bucket.sizes()
        if not sharded and any("mask" in state for state in bucket.states):  # relative to the trained entries
            entries = [max(state["exp_avg"].numel(), 1) for state in bucket.states]
            sizes = constant(entries, update_norm.dtype, update_norm.device)
            stats["update_rms"] = update_norm / sizes.sqrt()
        if clip and not sharded:  # instead of the norm before clipping
            stats |= {"norm_after": clip.norms(), "clipped": clip.counts() / sizes}
        elif clip:  # only a shard was clipped here, and its count is not worth an all-reduce of its own
            stats |= {name: torch.full_like(sizes, math.nan) for name in ("norm_after", "clipped")}
        return stats

    def fused_step(self, group: Group, bucket: Bucket, kernels: Kernels) -> Tensor:
        official, threshold, every = group["variant"] == "official", group["threshold"], group["reset_interval"]
        reset = F.reset_due(group["t"], every)
        step_options = self.adam_options(
            group,
            decay=0.0 if official else group["weight_decay"],
            decay_after=group["weight_decay"] if official and group["density"] == 1 else 0.0,
            warmup=F.rewarm_factor(group["t"], every, group["warmup_steps"]),
            reset=0.0 if official else reset,  # age starts again
            forget=reset,  # the moments start again before the gradient enters
            eps_first=official,
            capped=threshold > 0,  # |g| <= sqrt(cap_factor v) + cap_spread
            cap_factor=threshold * (1 - reset),  # on a reset step v counts as 0
            cap_spread=self._spread(group),
            zero_history=official,
        )
        return kernels.adam_step_(self.step_tensors(group, bucket, "age", masks=_masks(bucket)), step_options)

    @classmethod
    def checked_steps(cls) -> dict[str, Callable[..., EvenOptimizer]]:
        def build(params: list[Tensor], **how: Any) -> EvenOptimizer:
            return cls(params, threshold=50.0, clip_start=1, reset_interval=0, weight_decay=0.1, **how)

        return {"SPAM": build, "SPAM, density 0.5": lambda params, **how: build(params, density=0.5, **how)}

    def _spread(self, group: Group) -> Any:
        """The term that is added to all limits: 0, or Inf on a step without clipping. As `EntryClip.spread`."""
        clips = self._clips(group, group["t"])
        return torch.where(clips > 0, 0.0, math.inf) if isinstance(clips, Tensor) else 0.0 if clips else math.inf

    @staticmethod
    def _clips(group: Group, t: N) -> N:
        """Whether entries are clipped on this step: 1 or 0. Right after the start or a reset, v is too young to judge
        an entry by."""
        started: Any = t >= group["clip_start"]
        if group["reset_interval"]:
            started = started & (t % group["reset_interval"] >= group["clip_start"])
        clips: N = started + 0 * t  # a number for a number, a 0-d tensor for a tensor
        return clips


# ---- sparse momentum: masks and the entries that they select ----

# Entries drawn at a time, so that drawing a mask needs a few megabytes for a tensor of any size.
CHUNK = 1 << 20


def draw_mask(n: int, density: float, seed: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """``round(density * n)`` of ``n`` entries, all subsets equally likely, as packed bits (uint8 tensor of ``ceil(n /
    8)``, on the CPU).

    With ``device`` the mask is another one, drawn and kept there by a hash. Equal seeds give equal masks on every
    machine and rank; no global random state is read or changed, and nothing waits for the device.
    """
    # The number of entries in each chunk is drawn first, then the entries within the chunk. With the hypergeometric
    # distribution of the former, all subsets of the whole tensor are equally likely.
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    left, parts = round(density * n), []  # entries still to be drawn, packed chunks
    hashed: list[Tensor] = []  # the same on a device
    for start in range(0, n, CHUNK):
        size = min(CHUNK, n - start)
        after = n - start - size
        # NumPy's hypergeometric takes populations below 1e9; beyond that the draw is a binomial to within 1e-9.
        if n - start < 10**9:
            kept = int(rng.hypergeometric(left, n - start - left, size))
        else:
            kept = int(np.clip(rng.binomial(size, left / (n - start)), left - after, min(left, size)))
        left -= kept
        # The first `kept` entries of a random order of the chunk.
        if device is not None:
            hashed.append(_drawn(size, kept, rng.integers(-(2**31), 2**31, 2).tolist(), device))
            continue
        chunk = np.zeros(size, dtype=bool)
        chunk[rng.permutation(size)[:kept]] = True
        parts.append(np.packbits(chunk, bitorder="little"))
    if device is not None:
        return torch.cat(hashed) if hashed else torch.zeros(0, dtype=torch.uint8, device=device)
    return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint8))


def _drawn(size: int, kept: int, seeds: list[int], device: torch.device) -> Tensor:
    """``kept`` of ``size`` entries, as packed bits on ``device``."""
    # A hash that is one to one gives each entry a key of its own, so that their order is the same everywhere. Two
    # rounds, since one of numbers in a row and a seed would give shifted copies of one mask.
    keys = torch.arange(size, dtype=torch.int32, device=device)
    for seed in seeds:
        keys = mixed(keys.mul_(GOLDEN).add_(seed))
    flags = torch.zeros(-(-size // 8) * 8, dtype=torch.uint8, device=device)
    flags.index_fill_(0, torch.argsort(keys)[:kept], 1)
    return (flags.view(-1, 8) << torch.arange(8, dtype=torch.uint8, device=device)).sum(1, dtype=torch.uint8)


def _masks(bucket: Bucket) -> list[Tensor]:
    """For kernels: the packed mask of each tensor, empty for a dense one; an empty list where all are dense."""
    if not any("mask" in state for state in bucket.states):
        return []
    nothing = torch.empty(0, dtype=torch.uint8, device=bucket.shards[0].device)
    return [state.get("mask", nothing) for state in bucket.states]


def _flags(p: Tensor, state: State) -> Tensor:
    """The mask of the local shard of ``p`` as a flat bool tensor."""
    return unpack(state["mask"], local(p).numel())


def _trained_entries(p: Tensor, state: State) -> Tensor | None:
    """Flat indices of the trained entries of the local shard of ``p``, None for all."""
    if "mask" not in state:
        return None
    # The number of entries is known from the moments; torch.nonzero would wait for the device to learn it.
    return torch.nonzero_static(_flags(p, state), size=state["exp_avg"].numel()).view(-1)


def _sparse_moments(p: Tensor, bits: Tensor, count: int, stored: str) -> State:
    """New compact moments for the ``count`` entries of a packed mask of the local shard of ``p``."""
    return adam_moments(local(p).new_empty(count), stored) | {"mask": bits}


def _flags_of_shard(p: Tensor, bits: Tensor) -> Tensor:
    """The part of the packed mask ``bits`` of the whole tensor that belongs to the local shard of ``p``: bool, in the
    shape of the shard."""
    # The rows of the shard alone are unpacked: bits [first, last) of the flattened tensor.
    rows, *others = region(p)
    width = math.prod(p.shape[1:])
    first, last = rows.start * width, rows.stop * width
    flags = unpack(bits[first // 8 : -(-last // 8)], last - first // 8 * 8)[first % 8 :]
    return flags.view(rows.stop - rows.start, *p.shape[1:])[(slice(None), *others)]


def _spread(p: Tensor, shard: Tensor) -> Tensor:
    """A tensor with one value per entry of the local shard of ``p``, in the shape of ``p``: a DTensor if that is."""
    return shard_like(p, shard.view(local(p).shape), p.shape, p.stride())


def _spread_state(p: Tensor, state: State) -> State:
    """The mask and the compact moments of ``p``, each with one value per entry of ``p``."""
    flags = _flags(p, state)
    dense = {
        name: torch.zeros_like(flags, dtype=state[name].dtype).masked_scatter_(flags, state[name])
        for name in ("exp_avg", "exp_avg_sq")
    }
    return {name: _spread(p, x) for name, x in (dense | {"mask": flags.to(torch.uint8)}).items()}


def gather_entries(tensors: Sequence[T], where: list[Tensor | None]) -> list[T]:
    """The entries at the flat indices ``where`` of each tensor, 1-D; the tensor itself where that is None."""
    return [
        x if x is None or entries is None else torch.take(x, entries) for x, entries in zip(tensors, where, strict=True)
    ]


def scatter_entries_(tensors: Sequence[T], values: Sequence[T], where: list[Tensor | None]) -> None:
    """Write the entries that `gather_entries` returned back into the tensors."""
    for x, compact, entries in zip(tensors, values, where, strict=True):
        if x is not None and compact is not None and entries is not None:
            flat = x.reshape(-1).index_copy_(0, entries, compact)  # put_ has no deterministic form
            if not x.is_contiguous():  # reshape has made a copy
                x.copy_(flat.view(x.shape))
