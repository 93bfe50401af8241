"""Sharded parameters: which shard of a tensor is local, and how statistics of shards become those of whole tensors.

Each rank holds one shard of a sharded parameter. The largest entry of the whole tensor is the maximum over the shards,
its squared norm is the sum over them. Steps are therefore generators: where a step needs such a statistic, it yields
`Reduction` requests and receives the results. `run_batched_collectives` advances the steps of all groups together and
hands the requests of each round to `all_reduce`, which sends one message per mesh dimension and operation for all
parameters. For tensors that are not sharded, each request is its own answer, and a step costs as much as a plain
function.

A DTensor is replaced by its local shard once, at the start of a step (`evenstep.optim.fused.buckets`); all later code
works on plain local tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from evenstep.kernels.interface import PLAIN, Kernels, constant

R = TypeVar("R")

# ---- shards ----


def is_sharded(x: Any) -> bool:
    """Whether ``x`` is a DTensor, tested without importing torch.distributed, which takes long to load."""
    # The plain types are compared first, because a step asks about every tensor.
    return type(x) not in PLAIN and hasattr(x, "device_mesh") and hasattr(x, "to_local")


def local(x: Tensor) -> Tensor:
    """The local shard of ``x``, sharing its memory; ``x`` itself when it is not sharded."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def plain_parts(x: Tensor) -> Iterator[Tensor]:
    """The plain tensors of which ``x`` consists: the local shard of a DTensor; codes and scales of 8-bit blocks."""
    x = local(x)
    if hasattr(type(x), "__tensor_flatten__"):
        # torch's protocol of wrapper subclasses: the names of the inner tensors.
        for part in (getattr(x, name) for name in x.__tensor_flatten__()[0]):  # type: ignore[attr-defined]
            yield from plain_parts(part)
    else:
        yield x.detach()


def num_shards(x: Tensor) -> int:
    """Number of shards that ``x`` is split into, without replicas: the product of the sizes of the mesh dimensions that
    cut it."""
    return math.prod(x.device_mesh.size(dim) for dim, _ in Layout.of(x).cuts) if is_sharded(x) else 1  # type: ignore[attr-defined]


def region(x: Tensor) -> tuple[slice, ...]:
    """The part of the whole tensor that the local shard of ``x`` holds: one slice per dimension."""
    if not is_sharded(x):
        return tuple(slice(0, size) for size in x.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)  # type: ignore[attr-defined]
    return tuple(slice(start, start + size) for start, size in zip(offset, local(x).shape, strict=True))


def first_entry(x: Tensor) -> int:
    """The number, in the flattened whole tensor, of the first entry of the local shard; 0 where ``x`` is whole."""
    # Horner's rule over the dimensions of a contiguous tensor.
    dims = zip(x.shape, region(x), strict=True)
    return functools.reduce(lambda number, dim: number * dim[0] + dim[1].start, dims, 0)


def shard_like(
    x: Tensor, shard: Tensor, shape: torch.Size | None = None, stride: tuple[int, ...] | None = None
) -> Tensor:
    """``shard`` as the local shard of a DTensor with the placements of ``x``; ``shard`` itself where ``x`` is whole.

    ``shape`` and ``stride`` are those of the whole tensor; without them it is taken to be sharded evenly.
    """
    if not is_sharded(x):
        return shard
    from torch.distributed.tensor import DTensor  # only where there are DTensors: it takes long to load

    mesh, placements = x.device_mesh, x.placements  # type: ignore[attr-defined]
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=shape, stride=stride)


def refuse_flat_shard(p: Tensor) -> None:
    """ValueError for flattened parameters (FSDP1 with and without ``use_orig_params``, fairscale, DeepSpeed ZeRO 3),
    which hold parts of many tensors, or an unknown part of one: per-tensor statistics are impossible there.
    """
    if type(p) in PLAIN and not p.__dict__:  # these libraries set an attribute on each of their parameters
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
    """How a tensor is sharded: over which dimensions of which mesh, along which of its own dimensions. Parameters of
    equal layout share messages."""

    mesh: Any = None  # torch's DeviceMesh
    cuts: tuple[tuple[int, int], ...] = ()  # (mesh dimension, tensor dimension) pairs; empty when it is not sharded

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
        # Not is_shard(): FSDP2 over tensor parallelism makes strided shards, for which is_shard() is False. A dimension
        # that replicates (HSDP) needs no reduction, since all of its ranks hold the same shard.
        cuts = tuple((i, placement.dim) for i, placement in enumerate(placements) if not placement.is_replicate())
        return cls(p.device_mesh, cuts) if cuts else UNSHARDED  # type: ignore[attr-defined]

    def mesh_dims(self, over: int | None) -> tuple[int, ...]:
        """The mesh dimensions to reduce over for a number that was taken over all dimensions of the tensor (None),
        over dimension 0, or over the others (1)."""
        # A row's norm (over=1) is complete on each rank of a tensor that is cut along dimension 0, and the other way
        # round: these mesh dimensions are left out.
        return tuple(dim for dim, cut in self.cuts if over is None or (cut == 0) == (over == 0))


UNSHARDED = Layout()  # one object for all tensors that are not sharded


def rebind_sharded_params(groups: list[dict[str, Any]], known: set[Tensor], clock: str) -> bool:
    """Whether parameters of ``groups`` were replaced by their shards, so that all state has to start anew.

    accelerate, and with it transformers' Trainer, replaces them: it builds the optimizer on whole parameters, shards
    the model with FSDP2 afterwards, and puts the shards into the param groups.

    ``known`` holds the parameters of the last call and is updated. ``clock`` is the key of the groups' step count.
    Raises RuntimeError for shards that come after the first step, and for flat ones (which hold parts of many tensors);
    ValueError for parameters that were flattened in place.
    """
    params = [p for group in groups for p in group["params"]]
    for p in params:
        refuse_flat_shard(p)
    new = [p for p in params if p not in known]
    # ZeRO (DeepSpeed, fairscale) puts one-dimensional flat shards without any mark into the groups.
    for p in new:
        if not is_sharded(p) and p.dim() == 1:
            raise RuntimeError(
                f"a parameter of shape {tuple(p.shape)} was put into a group without add_param_group. If it is a "
                "flat shard (ZeRO): per-tensor statistics are impossible there; use FSDP2 (fully_shard) or DDP"
            )
    sharded = any(is_sharded(p) for p in new)
    # The state is keyed by the old parameters and has their full shapes: it cannot be moved to the shards.
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
    """A request to combine ``values`` (1-D) over the shards of a tensor, elementwise, by ``"max"`` or ``"sum"``; or, by
    ``"gather"``, to concatenate them with the values that all other steps request in the same round.

    ``over`` is the dimension of the tensor that the values were reduced over: 0, 1 for all but the first, None for all.
    Shards along another dimension hold other values, not parts of these, and are not combined.
    """

    op: str
    values: Tensor
    over: int | None = None
    answer: Tensor | None = None


# A step that returns an R. It yields tuples of `Reduction`, for which it receives a list of results, or other steps,
# for which it receives their result.
Steps = Generator[Any, Any, R]


def reduced(*requests: Reduction) -> Steps[list[Tensor]]:
    """Yield requests and return their results.

    In a generator of `Steps`: ``[peak] = yield from reduced(Reduction("max", peaks))``.
    """
    answers: list[Tensor] = yield requests
    return answers


def run_batched_collectives(
    steps: Sequence[Steps[R]], reduce: Callable[[dict[int, tuple[Reduction, ...]]], None]
) -> list[R]:
    """Advance all ``steps`` together to their ends and return their results.

    ``reduce`` receives the requests of one round by number of the step and sets their answers. A request without an
    answer is answered by its own values. All ranks must hold the same steps in the same order, or their messages do not
    match.

    A step may yield another step and receives its result; ``yield from`` does the same, but torch.compile (2.13) loses
    the value that it returns.
    """
    results: dict[int, R] = {}
    # For each step that has not ended: a stack of generators, each of which waits for the result of the next.
    running: dict[int, list[Steps[Any]]] = {i: [step] for i, step in enumerate(steps)}
    received: dict[int, list[Tensor]] = {}
    while running:  # one round per pass
        requests: dict[int, tuple[Reduction, ...]] = {}
        for i, stack in running.items():
            requested, result = _advanced(stack, received.get(i))
            if requested is None:
                results[i] = result
            else:
                requests[i] = requested
        # Steps end after different numbers of rounds; those that have ended take no part in the next.
        running = {i: running[i] for i in requests}
        # Every step issues its requests before any result is awaited, so that they share messages.
        reduce(requests)
        received = {i: [_result(request) for request in several] for i, several in requests.items()}
    return [results[i] for i in range(len(steps))]


def _result(request: Reduction) -> Tensor:
    return request.values if request.answer is None else request.answer


def _advanced(stack: list[Steps[Any]], value: Any) -> tuple[tuple[Reduction, ...] | None, Any]:
    """Resume the top of a stack of steps with ``value`` until one yields requests, which are returned with None, or
    all have ended: then None and the result of the first are returned."""
    while stack:
        try:
            yielded = stack[-1].send(value)
        except StopIteration as stop:
            stack.pop()  # its result is what the step below it has been waiting for
            value = stop.args[0] if stop.args else None  # torch.compile knows args but not value
        else:
            if isinstance(yielded, tuple):
                return yielded, None
            stack.append(yielded)
            value = None
    return None, value


def all_reduce(requests: dict[int, tuple[Reduction, ...]], layouts: list[Layout]) -> None:
    """Set the answers of one round of requests, with one all-reduce per operation and mesh dimension for all steps.

    ``layouts`` has the layout of each step's tensors. Messages are fp64, so that values of all dtypes fit one message.
    Tensors that are not sharded need none. The values of a ``"gather"`` are on every rank already: each tensor counts
    once, however it is sharded, and no message is sent.
    """
    _gather(requests)
    # Dicts keep the order of insertion, which is that of the steps: all ranks send the same messages in the same order.
    batches: dict[tuple[Any, ...], list[Reduction]] = {}
    for i, several in requests.items():
        for request in several:
            dims = layouts[i].mesh_dims(request.over)
            if dims and request.op != "gather":
                # One message for all requests with this key, whatever group or dtype they come from.
                key = (layouts[i].mesh, dims, request.op, request.values.device)
                batches.setdefault(key, []).append(request)
    for (mesh, dims, op, _), batch in batches.items():
        import torch.distributed as dist

        message = torch.cat([request.values.to(torch.float64) for request in batch])
        # A tensor that two mesh dimensions cut (FSDP over tensor parallelism) is reduced over one after the other.
        for dim in dims:
            dist.all_reduce(message, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, mesh.get_group(dim))
        results = torch.split(message, [request.values.numel() for request in batch])
        for request, result in zip(batch, results, strict=True):
            # Rounded to the statistics' dtype on every rank alike, so that all ranks go on with equal numbers.
            request.answer = result.to(request.values.dtype)


def _gather(requests: dict[int, tuple[Reduction, ...]]) -> None:
    """Set the answers of ``"gather"`` requests: the concatenated values of all steps that request one in this round, in
    the same place of their requests. Tensors on the meta device have no values to contribute."""
    for several in zip(*requests.values(), strict=False):
        if several[0].op == "gather":
            for request in several:
                meta = request.values.is_meta
                values = [other.values for other in several if meta or not other.values.is_meta]
                request.answer = torch.cat([x.to(request.values) for x in values])


# ---- buckets: parameters that are updated together ----


def state_dtype(p: Tensor) -> torch.dtype:
    """Dtype of statistics and moments: fp32, or fp64 for an fp64 parameter."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Bucket:
    """``k`` parameters of one group that are updated together: all on one device, with one state dtype, one layout and
    one set of kernels, and all with gradients."""

    params: list[Tensor]  # as the optimizer holds them: DTensors where sharded
    grads: list[Tensor]  # local shards of the gradients
    shards: list[Tensor]  # local shards of the parameters; the parameters themselves where they are not sharded
    states: list[dict[str, Any]]  # the optimizer's state of each parameter; empty for a step that has none
    dtype: torch.dtype  # of the statistics and of all arithmetic: fp32 or fp64
    layout: Layout
    kernels: Kernels | None = None  # the kernels of the fused step; None for the plain code

    def state_tensors(self, name: str) -> list[Tensor]:
        """One entry of the state of each parameter, as ``k`` local shards."""
        # The common case, plain tensors, is decided by their types alone.
        tensors = [state[name] for state in self.states]
        return [local(x) for x in tensors] if self.layout.cuts or not PLAIN.issuperset(map(type, tensors)) else tensors

    def stacked(self, *names: str) -> Scalars:
        """Scalars of the state of each parameter, one vector ``[k]`` per name."""
        # torch.stack copies: the state itself changes in `Scalars.store` alone, after all statistics are known.
        scalars = [state[name] for name in names for state in self.states]
        return Scalars(torch.stack(scalars).view(len(names), -1), scalars)

    def sizes(self) -> Tensor:
        """Number of entries of each whole tensor, ``[k]``; at least 1, because statistics are divided by it."""
        return constant([max(p.numel(), 1) for p in self.params], self.dtype, self.shards[0].device)


@dataclass(frozen=True)
class Scalars:
    """Scalars of the state of ``k`` parameters, for example their ages, read as vectors and written back at once."""

    values: Tensor  # [number of names, k], a copy
    tensors: list[Tensor]  # the 0-d tensors of the state, in the order of ``values`` flattened

    def store(self, where: Tensor, *vectors: Tensor) -> None:
        """Write back a vector ``[k]`` per name, for the parameters where ``where`` (bool ``[k]``) holds."""
        # One launch for all scalars of all parameters, instead of one each.
        new = torch.where(where, torch.stack(vectors), self.values).view(-1)
        torch._foreach_copy_(self.tensors, new.unbind())
