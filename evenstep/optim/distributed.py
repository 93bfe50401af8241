"""Sharded parameters: which shard of a tensor is local, and how statistics of shards become those of whole tensors.

A sharded parameter is a part here and parts elsewhere: its largest entry is the maximum over the shards, its squared
norm their sum. Steps are therefore generators. Where a step needs such a number it yields `Reduction` requests and
receives the results. `run_batched_collectives` advances the steps of all groups together and hands the requests of each
round to `all_reduce`, which sends one message per mesh dimension and operation for all parameters. For tensors that are
not sharded, each request is its own answer, and a step costs what a plain function would.

A DTensor is stripped once, at the start of a step; everything after works on plain local tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from evenstep.kernels.interface import Kernels, constant

R = TypeVar("R")

# ---- shards ----

PLAIN = frozenset({Tensor, Parameter})
"""Types that are never sharded, looked at first: a step asks for every tensor."""


def is_sharded(x: Any) -> bool:
    """Whether ``x`` is a DTensor (asked without importing torch.distributed)."""
    return type(x) not in PLAIN and hasattr(x, "device_mesh") and hasattr(x, "to_local")


def local(x: Tensor) -> Tensor:
    """The local shard of ``x``, sharing its memory; ``x`` itself when it is not sharded."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def num_shards(x: Tensor) -> int:
    """Number of shards that ``x`` is split into."""
    return math.prod(x.device_mesh.size(dim) for dim, _ in Layout.of(x).cuts) if is_sharded(x) else 1  # type: ignore[attr-defined]


def shard_like(x: Tensor, shard: Tensor) -> Tensor:
    """``shard`` as the local shard of a DTensor with the placements of ``x``, evenly sharded; ``shard`` itself when
    ``x`` is not sharded."""
    if not is_sharded(x):
        return shard
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(shard, x.device_mesh, x.placements, run_check=False)  # type: ignore[attr-defined]


def refuse_flat_shard(p: Tensor) -> None:
    """ValueError for flattened parameters (FSDP1 with and without ``use_orig_params``, fairscale, DeepSpeed ZeRO 3),
    which hold parts of many tensors, or an unknown part of one: per-tensor statistics are impossible there.
    """
    if type(p) in PLAIN and not p.__dict__:  # no mark was set on it
        return
    if hasattr(p, "ds_tensor"):
        raise ValueError(
            "a parameter is partitioned by DeepSpeed ZeRO stage 3: the largest entry and norm of each tensor cannot be "
            "known from its part; use FSDP2 (torch.distributed.fsdp.fully_shard) or DDP"
        )
    if any(getattr(p, mark, False) for mark in ("_is_flat_param", "_fsdp_flattened", "_param_numels")):
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} is a flat shard (FullyShardedDataParallel): the largest entry and "
            "norm of each tensor cannot be known from it; use FSDP2 (torch.distributed.fsdp.fully_shard) or DDP"
        )


@dataclass(frozen=True)
class Layout:
    """How a tensor is sharded: over which dimensions of which mesh, along which of its own dimensions."""

    mesh: Any = None
    cuts: tuple[tuple[int, int], ...] = ()
    """(mesh dimension, tensor dimension) pairs; empty when it is not sharded."""

    @classmethod
    def of(cls, p: Tensor) -> Layout:
        """Raises ValueError for a partial DTensor, whose parts are summands and not slices."""
        if not is_sharded(p):
            return UNSHARDED
        placements = p.placements  # type: ignore[attr-defined]
        if any(placement.is_partial() for placement in placements):
            raise ValueError(
                "a parameter or gradient is a partial DTensor (its parts are summands); redistribute it first"
            )
        # Not is_shard(): FSDP2 over tensor parallelism makes strided shards, which say no to it.
        cuts = tuple((i, placement.dim) for i, placement in enumerate(placements) if not placement.is_replicate())
        return cls(p.device_mesh, cuts) if cuts else UNSHARDED  # type: ignore[attr-defined]

    def mesh_dims(self, over: int | None) -> tuple[int, ...]:
        """The mesh dimensions to reduce over for a number that was taken over all dimensions of the tensor (None),
        over dimension 0, or over the others (1)."""
        return tuple(dim for dim, cut in self.cuts if over is None or (cut == 0) == (over == 0))


UNSHARDED = Layout()


def rebind_sharded_params(groups: list[dict[str, Any]], known: set[Tensor], clock: str) -> bool:
    """Whether parameters of ``groups`` were replaced by their shards, so that all state has to start anew. accelerate,
    and so transformers' Trainer, does that: it makes the optimizer of whole parameters, shards the model with FSDP2
    afterwards, and puts the shards into the param groups.

    ``known`` are the parameters that were there before; it is updated. ``clock`` is the name of the groups' step count.
    Raises RuntimeError for shards that come after the first step, and for flat ones (which hold parts of many tensors);
    ValueError for parameters that were flattened where they are.
    """
    params = [p for group in groups for p in group["params"]]
    for p in params:
        refuse_flat_shard(p)
    new = [p for p in params if p not in known]
    for p in new:
        if not is_sharded(p) and p.dim() == 1:
            raise RuntimeError(
                f"a parameter of shape {tuple(p.shape)} was put into a group without add_param_group. If it is a "
                "flat shard (ZeRO): per-tensor statistics are impossible there; use FSDP2 (fully_shard) or DDP"
            )
    sharded = any(is_sharded(p) for p in new)
    if sharded and any(int(group.get(clock, 0)) for group in groups):
        raise RuntimeError(
            "parameters were exchanged for shards after the first step, and their state would be lost; shard the model "
            "(or call accelerator.prepare) before the first step and before load_state_dict"
        )
    if new:
        known.clear()
        known.update(params)
    return sharded


# ---- batched collectives ----


@dataclass(slots=True)
class Reduction:
    """A request to combine ``values`` over the shards of a tensor, elementwise, by ``"max"`` or ``"sum"``; or, by
    ``"gather"``, to concatenate them with those that all other steps request in the same round.

    ``over`` is the dimension of the tensor that the values were reduced over (0, 1 for all but the first, None for
    all): shards along another dimension hold other values, not parts of these.
    """

    op: str
    values: Tensor
    over: int | None = None
    answer: Tensor | None = None


Steps = Generator[Any, Any, R]
"""A step that returns an ``R``. It yields tuples of `Reduction`, for which it receives a list of results, or other
steps, for which it receives what they return."""


def reduced(*requests: Reduction) -> Steps[list[Tensor]]:
    """Yield requests and return their results: ``[peak] = yield from reduced(Reduction("max", peaks))``."""
    return (yield requests)


def run_batched_collectives(
    steps: Sequence[Steps[R]], reduce: Callable[[dict[int, tuple[Reduction, ...]]], None]
) -> list[R]:
    """Advance all ``steps`` together to their ends and return their results. ``reduce`` receives the requests of one
    round by number of the step and sets their answers; a request without an answer is its own.

    A step may yield another step and receives what that one returns; ``yield from`` does the same, but torch.compile
    (2.13) loses the value that it returns.
    """
    results: dict[int, R] = {}
    running: dict[int, list[Steps[Any]]] = {i: [step] for i, step in enumerate(steps)}
    received: dict[int, list[Tensor]] = {}
    while running:
        requests: dict[int, tuple[Reduction, ...]] = {}
        for i, stack in running.items():
            requested, result = _advanced(stack, received.get(i))
            if requested is None:
                results[i] = result
            else:
                requests[i] = requested
        running = {i: running[i] for i in requests}
        # Every step has issued its requests before any result is awaited, so that they share messages.
        reduce(requests)
        received = {i: [_result(request) for request in several] for i, several in requests.items()}
    return [results[i] for i in range(len(steps))]


def _result(request: Reduction) -> Tensor:
    return request.values if request.answer is None else request.answer


def _advanced(stack: list[Steps[Any]], value: Any) -> tuple[tuple[Reduction, ...] | None, Any]:
    """Resume the last of a stack of steps, each waiting for the one after it, until one yields requests (which are
    returned) or all have ended (None and the result are returned)."""
    while stack:
        try:
            yielded = stack[-1].send(value)
        except StopIteration as stop:
            stack.pop()
            value = stop.args[0] if stop.args else None  # torch.compile knows args but not value
        else:
            if isinstance(yielded, tuple):
                return yielded, None
            stack.append(yielded)
            value = None
    return None, value


def all_reduce(requests: dict[int, tuple[Reduction, ...]], layouts: list[Layout]) -> None:
    """Set the answers of one round of requests, with one all-reduce per operation and mesh dimension for all together,
    in fp64, so that the values of all dtypes fit one message. Tensors that are not sharded need none.

    The values of a ``"gather"`` are on every rank already: each tensor counts once, however it is sharded, and no
    message is sent.
    """
    _gather(requests)
    batches: dict[tuple[Any, ...], list[Reduction]] = {}
    for i, several in requests.items():
        for request in several:
            dims = layouts[i].mesh_dims(request.over)
            if dims and request.op != "gather":
                key = (layouts[i].mesh, dims, request.op, request.values.device)
                batches.setdefault(key, []).append(request)
    for (mesh, dims, op, _), batch in batches.items():
        import torch.distributed as dist

        message = torch.cat([request.values.to(torch.float64) for request in batch])
        for dim in dims:
            dist.all_reduce(message, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, mesh.get_group(dim))
        results = message.split([request.values.numel() for request in batch])
        for request, result in zip(batch, results, strict=True):
            request.answer = result.to(request.values.dtype)


def _gather(requests: dict[int, tuple[Reduction, ...]]) -> None:
    """Set the answers of ``"gather"`` requests: the concatenated values of all steps that made one in this place.
    Tensors on the meta device have no values to give to others."""
    for several in zip(*requests.values(), strict=False):
        if several[0].op == "gather":
            for request in several:
                meta = request.values.is_meta
                values = [other.values for other in several if meta or not other.values.is_meta]
                request.answer = torch.cat([x.to(request.values) for x in values])


# ---- groups of parameters ----


def state_dtype(p: Tensor) -> torch.dtype:
    """Dtype of statistics and moments: fp32, or fp64 for an fp64 parameter."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Bucket:
    """Parameters of one group that are updated together: one device, one state dtype, one layout, one set of kernels,
    all with gradients."""

    params: list[Tensor]
    """As the optimizer holds them: DTensors where sharded."""
    grads: list[Tensor]
    """Local shards of the gradients."""
    shards: list[Tensor]
    """Local shards of the parameters; the parameters themselves where they are not sharded."""
    states: list[dict[str, Any]]
    """The state of each parameter, where one was given."""
    dtype: torch.dtype
    layout: Layout
    kernels: Kernels | None = None
    """What serves the fused step; None for the plain code."""

    def state_tensors(self, name: str) -> list[Tensor]:
        """One entry of the state of each parameter, as local shards."""
        tensors = [state[name] for state in self.states]
        return [local(x) for x in tensors] if self.layout.cuts or not PLAIN.issuperset(map(type, tensors)) else tensors

    def stacked(self, *names: str) -> Scalars:
        """Scalars of the state of each parameter, one vector ``[k]`` per name."""
        scalars = [state[name] for name in names for state in self.states]
        return Scalars(torch.stack(scalars).view(len(names), -1), scalars)

    def sizes(self) -> Tensor:
        """Entries of each whole tensor, at least 1, ``[k]``."""
        return constant([max(p.numel(), 1) for p in self.params], self.dtype, self.shards[0].device)


@dataclass(frozen=True)
class Scalars:
    """Scalars of the state of ``k`` parameters: ``values`` has a row for each name."""

    values: Tensor
    tensors: list[Tensor]

    def store(self, where: Tensor, *vectors: Tensor) -> None:
        """Write back a vector ``[k]`` per name, for the parameters where ``where`` (bool ``[k]``) holds."""
        new = torch.where(where, torch.stack(vectors), self.values).view(-1)
        torch._foreach_copy_(self.tensors, new.unbind())


class Choose(Protocol):
    """Which kernels serve a parameter, given its gradient and state."""

    def __call__(self, p: Tensor, grad: Tensor, state: Mapping[str, Any], *, sharded: bool) -> Kernels | None: ...

    def for_all(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[Mapping[str, Any]]
    ) -> Kernels | None:
        """The kernels that serve all of several parameters; None where each has to be looked at."""


def buckets(
    params: Iterable[Tensor],
    state: Mapping[Tensor, dict[str, Any]] | None = None,
    choose: Choose | None = None,
) -> list[Bucket]:
    """The parameters that have a gradient, with their ``state``, split by device, state dtype, layout and kernels
    (none, where ``choose`` is not given)."""
    pairs = [(p, grad) for p in params if (grad := p.grad) is not None]
    params, grads = [p for p, _ in pairs], [grad for _, grad in pairs]
    states = [] if state is None else [state[p] for p in params]
    kernels = choose.for_all(params, grads, states) if choose else None
    if kernels is not None:
        return [Bucket(params, grads, params, states, torch.float32, UNSHARDED, kernels)]
    members: dict[tuple[torch.device, torch.dtype, Layout, Kernels | None], list[int]] = {}
    shards = []
    for i, (p, grad) in enumerate(pairs):
        layout = UNSHARDED
        if not (type(p) in PLAIN and type(grad) in PLAIN):
            layout, theirs = Layout.of(p), Layout.of(grad)
            if layout != theirs:
                raise ValueError(
                    "a gradient is sharded differently from its parameter; redistribute it before the step"
                )
            p, grads[i] = local(p), local(grad)
        shards.append(p)
        kernels = choose(p, grads[i], states[i] if states else {}, sharded=bool(layout.cuts)) if choose else None
        members.setdefault((p.device, state_dtype(p), layout, kernels), []).append(i)
    return [
        Bucket(
            params=[params[i] for i in indices],
            grads=[grads[i] for i in indices],
            shards=[shards[i] for i in indices],
            states=[states[i] for i in indices] if states else [],
            dtype=dtype,
            layout=layout,
            kernels=kernels,
        )
        for (_, dtype, layout, kernels), indices in members.items()
    ]
