"""Sharded parameters: which part of a tensor is here, and how numbers of its parts become numbers of the whole.

A DTensor is stripped once, at the start of a step; everything after works on plain local tensors. What the parts must
agree on goes through `combine`: one message per mesh dimension and round for all parameters together.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from evenstep.kernels import Kernels, constant
from evenstep.transforms import Combine

PLAIN = frozenset({Tensor, Parameter})
"""Types that are never sharded; asked first, since a step asks often."""


def is_sharded(x: Any) -> bool:
    """Whether ``x`` is a DTensor (asked without importing torch.distributed)."""
    return type(x) not in PLAIN and hasattr(x, "device_mesh") and hasattr(x, "to_local")


def local(x: Tensor) -> Tensor:
    """The part of ``x`` that is here, sharing its memory; ``x`` itself when it is whole."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def parts(x: Tensor) -> int:
    """Into how many parts ``x`` is cut."""
    return math.prod(x.device_mesh.size(dim) for dim, _ in Layout.of(x).cuts) if is_sharded(x) else 1  # type: ignore[attr-defined]


def like(x: Tensor, part: Tensor) -> Tensor:
    """``part`` as what is here of a tensor that is laid out as ``x`` is, evenly cut."""
    if not is_sharded(x):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, x.device_mesh, x.placements, run_check=False)  # type: ignore[attr-defined]


def refuse_flat_shard(p: Tensor) -> None:
    """ValueError for flattened parameters (FSDP1 with and without ``use_orig_params``, fairscale, DeepSpeed ZeRO 3),
    which hold parts of many tensors, or an unknown part of one: statistics of whole tensors are impossible there.
    """
    if type(p) in PLAIN and not p.__dict__:  # nothing was noted on it; a step asks often
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
    """Over which dimensions of which mesh a tensor is cut, and along which of its own dimensions; empty when whole."""

    mesh: Any = None
    cuts: tuple[tuple[int, int], ...] = ()
    """(mesh dimension, tensor dimension) pairs."""

    @classmethod
    def of(cls, p: Tensor) -> "Layout":
        """Raises ValueError for a partial DTensor, whose parts are summands and not slices."""
        if not is_sharded(p):
            return WHOLE
        placements = p.placements  # type: ignore[attr-defined]
        if any(placement.is_partial() for placement in placements):
            raise ValueError(
                "a parameter or gradient is a partial DTensor (its parts are summands); redistribute it first"
            )
        # Not is_shard(): FSDP2 over tensor parallelism makes strided shards, which say no to it.
        cuts = tuple((i, placement.dim) for i, placement in enumerate(placements) if not placement.is_replicate())
        return cls(p.device_mesh, cuts) if cuts else WHOLE  # type: ignore[attr-defined]

    def mesh_dims(self, over: int | None) -> tuple[int, ...]:
        """The mesh dimensions that cut the tensor along what a number was taken over: all, dimension 0, or the others
        (1).
        """
        return tuple(dim for dim, cut in self.cuts if over is None or (cut == 0) == (over == 0))


WHOLE = Layout()


@dataclass(frozen=True)
class Bucket:
    """Parameters of one group that are updated together: one device, one state dtype, one layout, one set of kernels,
    all with gradients.
    """

    params: list[Tensor]
    grads: list[Tensor]
    """What is here of the gradients."""
    here: list[Tensor]
    """What is here of the parameters."""
    states: list[dict[str, Any]]
    """The state of each parameter, where one was given."""
    dtype: torch.dtype
    layout: Layout
    kernels: Kernels | None = None
    """What does the work; None for the plain code."""

    def parts(self, name: str) -> list[Tensor]:
        """What is here of one entry of the state of each parameter."""
        found = [state[name] for state in self.states]
        return [local(x) for x in found] if self.layout.cuts or not PLAIN.issuperset(map(type, found)) else found

    def stacked(self, *names: str) -> "Scalars":
        """Scalars of the state of each parameter, as one vector ``[k]`` per name."""
        scalars = [state[name] for name in names for state in self.states]
        return Scalars(torch.stack(scalars).view(len(names), -1), scalars)

    def sizes(self) -> Tensor:
        """Entries of each whole tensor, at least 1, ``[k]``."""
        return constant([max(p.numel(), 1) for p in self.params], self.dtype, self.here[0].device)


@dataclass(frozen=True)
class Scalars:
    """Some scalars of the state of ``k`` parameters, a row of ``values`` for each name."""

    values: Tensor
    tensors: list[Tensor]

    def store(self, where: Tensor, *vectors: Tensor) -> None:
        """Write a vector per name back, for the parameters where ``where`` (bool ``[k]``) holds."""
        new = torch.where(where, torch.stack(vectors), self.values).view(-1)
        torch._foreach_copy_(self.tensors, new.unbind())


def state_dtype(p: Tensor) -> torch.dtype:
    """fp32, or fp64 for an fp64 parameter."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


Choose = Callable[[Tensor, Tensor, Mapping[str, Any]], Kernels | None]
ChooseForAll = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Mapping[str, Any]]], Kernels | None]


def buckets(
    params: Iterable[Tensor],
    state: Mapping[Tensor, dict[str, Any]] | None = None,
    choose: Choose = lambda p, g, state: None,
    choose_for_all: ChooseForAll = lambda params, grads, states: None,
) -> list[Bucket]:
    """The parameters that have a gradient, with their ``state``, split by device, state dtype, layout and kernels.

    ``choose`` gets what is here of a parameter and its gradient, and its state. ``choose_for_all`` may give the kernels
    for all of them together.
    """
    given = [(p, grad) for p in params if (grad := p.grad) is not None]
    params, grads = [p for p, _ in given], [grad for _, grad in given]
    states = [] if state is None else [state[p] for p in params]
    kernels = choose_for_all(params, grads, states)
    if kernels is not None:
        return [Bucket(params, grads, params, states, torch.float32, WHOLE, kernels)]
    found: dict[tuple[torch.device, torch.dtype, Layout, Kernels | None], list[int]] = {}
    here = []
    for i, (p, grad) in enumerate(given):
        layout = WHOLE
        if not (type(p) in PLAIN and type(grad) in PLAIN):
            layout, theirs = Layout.of(p), Layout.of(grad)
            if layout != theirs:
                raise ValueError(
                    "a gradient is sharded differently from its parameter; redistribute it before the step"
                )
            p, grads[i] = local(p), local(grad)
        here.append(p)
        kernels = choose(p, grads[i], states[i] if states else {})
        found.setdefault((p.device, state_dtype(p), layout, kernels), []).append(i)
    return [
        Bucket(
            params=[params[i] for i in some],
            grads=[grads[i] for i in some],
            here=[here[i] for i in some],
            states=[states[i] for i in some] if states else [],
            dtype=dtype,
            layout=layout,
            kernels=kernels,
        )
        for (_, dtype, layout, kernels), some in found.items()
    ]


def combine(requests: dict[int, tuple[Combine, ...]], layouts: list[Layout]) -> None:
    """Answer the requests of one round: those of whole tensors with themselves, the others with one all-reduce per
    operation and mesh dimension for all together (in fp64, so that the values of all dtypes fit one message).

    What is asked of all tensors (``"gather"``) is here already, in the values of the others: each tensor counts once,
    however it is cut, and no message is sent.
    """
    _gather(requests)
    together: dict[tuple[Any, ...], list[Combine]] = {}
    for i, several in requests.items():
        for request in several:
            dims = layouts[i].mesh_dims(request.over)
            if dims and request.op != "gather":
                key = (layouts[i].mesh, dims, request.op, request.values.device)
                together.setdefault(key, []).append(request)
    for (mesh, dims, op, _), members in together.items():
        import torch.distributed as dist

        message = torch.cat([request.values.to(torch.float64) for request in members])
        for dim in dims:
            dist.all_reduce(message, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, mesh.get_group(dim))
        parts = message.split([request.values.numel() for request in members])
        for request, part in zip(members, parts, strict=True):
            request.answer = part.to(request.values.dtype)


def _gather(requests: dict[int, tuple[Combine, ...]]) -> None:
    """Answer the ``"gather"`` requests of each place with the values of all of them, one after the other. Tensors on
    the meta device have no values to give to others.
    """
    for several in zip(*requests.values(), strict=False):
        if several[0].op == "gather":
            for request in several:
                meta = request.values.is_meta
                heard = [other.values for other in several if meta or not other.values.is_meta]
                request.answer = torch.cat([values.to(request.values) for values in heard])
