"""Sharded parameters: which part of a tensor is here, and how numbers of its parts become numbers of the whole.

A DTensor is stripped once, at the start of a step; everything after works on plain local tensors. What the parts must
agree on goes through `combine`: one message per mesh dimension and round for all parameters together.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evenstep.transforms import Combine


def is_sharded(x: Any) -> bool:
    """Whether ``x`` is a DTensor (asked without importing torch.distributed)."""
    return hasattr(x, "device_mesh") and hasattr(x, "to_local")


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
    """ValueError for the flattened parameters of FSDP1, of which one holds parts of many tensors: statistics of whole
    tensors are impossible there.
    """
    if getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False):
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
            return cls()
        placements = p.placements  # type: ignore[attr-defined]
        if any(placement.is_partial() for placement in placements):
            raise ValueError(
                "a parameter or gradient is a partial DTensor (its parts are summands); redistribute it first"
            )
        cuts = tuple((i, placement.dim) for i, placement in enumerate(placements) if placement.is_shard())
        return cls(p.device_mesh, cuts) if cuts else cls()  # type: ignore[attr-defined]

    def mesh_dims(self, over: int | None) -> tuple[int, ...]:
        """The mesh dimensions that cut the tensor along what a number was taken over: all, dimension 0, or the others
        (1).
        """
        return tuple(dim for dim, cut in self.cuts if over is None or (cut == 0) == (over == 0))


@dataclass(frozen=True)
class Bucket:
    """Parameters of one group that are updated together: one device, one state dtype, one layout, all with
    gradients.
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

    def parts(self, name: str) -> list[Tensor]:
        """What is here of one entry of the state of each parameter."""
        return [local(state[name]) for state in self.states]

    def stacked(self, name: str) -> Tensor:
        """A scalar of the state of each parameter, as one vector ``[k]``."""
        return torch.stack([state[name] for state in self.states])

    def store(self, where: Tensor, **vectors: Tensor) -> None:
        """Write vectors back into the scalars of the state, for the parameters where ``where`` (bool ``[k]``) holds."""
        for name, vector in vectors.items():
            for state, keep, new in zip(self.states, where.unbind(), vector.unbind(), strict=True):
                state[name].copy_(torch.where(keep, new, state[name]))

    def sizes(self) -> Tensor:
        """Entries of each whole tensor, at least 1, ``[k]``."""
        return torch.tensor([max(p.numel(), 1) for p in self.params], dtype=self.dtype, device=self.here[0].device)


def state_dtype(p: Tensor) -> torch.dtype:
    """fp32, or fp64 for an fp64 parameter."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def buckets(params: Iterable[Tensor], state: Mapping[Tensor, dict[str, Any]] | None = None) -> list[Bucket]:
    """The parameters that have a gradient, with their ``state``, split by device, state dtype and layout."""
    found: dict[tuple[torch.device, torch.dtype, Layout], list[Tensor]] = {}
    for p in params:
        if p.grad is not None:
            layout = Layout.of(p)
            if layout != Layout.of(p.grad):
                raise ValueError(
                    "a gradient is sharded differently from its parameter; redistribute it before the step"
                )
            found.setdefault((p.device, state_dtype(p), layout), []).append(p)
    return [
        Bucket(
            params=some,
            grads=[local(p.grad) for p in some if p.grad is not None],
            here=[local(p) for p in some],
            states=[] if state is None else [state[p] for p in some],
            dtype=dtype,
            layout=layout,
        )
        for (_, dtype, layout), some in found.items()
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
