"""A chain of gradient transforms and its statistics: their storage, and the conditions for keeping new ones.

Each parameter has its own dict of statistics, as in an optimizer's state, so that they fit any checkpoint format.
Statistics of the whole model are in the dict of every parameter, as one tensor per device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evenstep.kernels.cuda import TritonKernels
from evenstep.optim.distributed import Bucket, Reduction, Steps, local, reduced, state_dtype
from evenstep.optim.functional import Gradients
from evenstep.optim.state import is_trained, scalar, untouched
from evenstep.optim.transforms import Statistics, StepInfo, Transform, shared_dtype

# Prefix of the statistics in a saved state, and key of the step count in a param group. Nested chains (`stabilize` of a
# stabilised optimizer) have names of their own: see `Chain.prefix` and `Chain.clock`.
PREFIX = "stabilize."
CLOCK = "stabilize_t"


@dataclass(frozen=True)
class Transformed:
    """The result of the chain for one bucket: transformed gradients, and new statistics by transform."""

    bucket: Bucket
    grads: Gradients  # transformed; the raw tensors are shared with p.grad
    new: list[Statistics]  # by transform
    scalars: ScalarStatistics  # those of all transforms before the step
    all_finite: Tensor | None  # 0-d bool, equal in all buckets: all gradients are; None where nothing depends on it


@dataclass(frozen=True)
class ScalarStatistics:
    """The statistics of ``k`` parameters that are one number each, by name, before a step."""

    values: dict[str, Tensor]  # [k] each, copies
    tensors: list[Tensor]  # of the parameters: the count of skipped steps, then each name
    kernels: TritonKernels | None  # those that have read them
    at: Tensor | None  # the addresses of `tensors` for the kernels

    @classmethod
    def read(cls, names: list[str], kept: list[dict[str, Tensor]], bucket: Bucket) -> ScalarStatistics:
        """Read the statistics ``names`` of each parameter."""
        tensors, k = [state[name] for name in ("skipped", *names) for state in kept], len(kept)
        if bucket.layout.cuts:
            tensors = list(map(local, tensors))
        kernels = bucket.kernels if isinstance(bucket.kernels, TritonKernels) else None
        at = kernels.scalars(tensors) if kernels else None
        if not names:
            values: Iterable[Tensor] = ()
        elif kernels and at is not None:
            values = kernels.read(at[k:]).view(len(names), k)
        else:
            values = torch.stack(tensors[k:]).view(len(names), k)
        return cls(dict(zip(names, values, strict=True)), tensors, kernels, at)

    def keep(self, new: list[Tensor], finite: Tensor) -> None:
        """Write a vector ``[k]`` for each name, for the parameters where ``finite`` (bool ``[k]``) holds, and count a
        skipped step of the others."""
        rows = [value.expand_as(finite) for value in new]
        if self.kernels and self.at is not None:
            self.kernels.keep(self.at, rows, finite)
            torch.autograd.graph.increment_version(self.tensors)
            return
        k = len(finite)
        skipped, old = self.tensors[:k], self.tensors[k:]
        torch._foreach_add_(skipped, list((~finite).to(skipped[0].dtype).unbind()))
        if rows:
            values = torch.where(finite, torch.stack(rows), torch.stack(list(self.values.values())))  # [names, k]
            torch._foreach_copy_(old, list(values.view(-1).unbind()))


def _present(transform: Transform, scalars: ScalarStatistics, kept: list[dict[str, Tensor]]) -> Statistics:
    """The present statistics of a transform for ``k`` parameters: see `Transform.__call__`."""
    # scalars: [k] per name; entries: k local shards; shared: one tensor, the same object for all parameters.
    state: Statistics = {name: scalars.values[f"{transform.name}.{name}"] for name in transform.scalars}
    state |= {name: [local(state[f"{transform.name}.{name}"]) for state in kept] for name in transform.entries}
    return state | {name: kept[0][f"{transform.name}.{name}"] for name in transform.shared}


class Chain:
    """Transforms in their order, and the statistics of all adopted parameters. ``depth`` is the number of chains
    between this one and the optimizer.
    """

    def __init__(self, transforms: tuple[Transform, ...], reset_interval: int, depth: int = 0):
        # Statistics are stored by the transform's name, which therefore occurs once.
        names = [transform.name for transform in transforms]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"stabilize: {', '.join(twice)} is given more than once; each kind of transform goes once")
        self.transforms = transforms
        self.reset_interval = reset_interval
        self.depth = depth
        self.prefix = PREFIX * (depth + 1)
        self.clock = f"{CLOCK}{depth + 1}" if depth else CLOCK
        self.statistics: dict[Tensor, dict[str, Tensor]] = {}  # parameter -> "transform.statistic" -> value

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Pickles of evenstep 0.1 have no depth.
        self.__dict__.update({"depth": 0, "prefix": PREFIX, "clock": CLOCK} | state)

    def adopt(self, p: Tensor) -> None:
        """Start the statistics of a parameter."""
        self.statistics[p] = self.fresh(p)

    def fresh(self, p: Tensor) -> dict[str, Tensor]:
        """Statistics of a new parameter: zeros, and the present values of the shared ones."""
        entries = {"skipped": scalar(p)}  # number of steps with a gradient that was not finite
        for transform in self.transforms:
            entries |= {f"{transform.name}.{name}": scalar(p) for name in transform.scalars}
            for name in transform.entries:
                entries[f"{transform.name}.{name}"] = torch.zeros_like(p, dtype=state_dtype(p), requires_grad=False)
            for name, shape in transform.shared.items():
                entries[f"{transform.name}.{name}"] = self._shared(f"{transform.name}.{name}", shape, p.device)
        return entries

    def _shared(self, key: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """The tensor of a shared statistic on ``device``. All parameters there hold this same tensor."""
        # Same device: share the tensor. Another device: a copy, which all parameters there will share. None yet: zeros.
        known = [state[key] for state in self.statistics.values() if key in state]
        here = next((value for value in known if value.device == device), None)
        if here is not None:
            return here
        dtype = shared_dtype(device)
        return known[0].to(device, dtype) if known else torch.zeros(shape, dtype=dtype, device=device)

    # ---- one step ----

    def transformed(self, bucket: Bucket, t: int, loss: Tensor | None) -> Steps[Transformed]:
        """Pass the gradients of a bucket through the chain. Nothing is written: `keep` does that after the step."""
        kept = self._followed(bucket)
        # Every transform gets the same facts; the clock is that of the step being taken.
        info = StepInfo(bucket.shards, t, self.reset_interval, loss)
        # Each transform changes limits and gains beside the gradients, which are read once, by the base's step.
        grads = yield from Gradients.measure(bucket.grads, bucket.dtype, kernels=bucket.kernels)
        # The numbers of all tensors at once: a call for each would take longer than the step on a GPU.
        names = [f"{transform.name}.{name}" for transform in self.transforms for name in transform.scalars]
        scalars = ScalarStatistics.read(names, kept, bucket)
        new = []  # new statistics by transform
        for transform in self.transforms:
            # Where a transform needs statistics of whole tensors, it yields requests through this generator.
            grads, statistics = yield from transform(grads, _present(transform, scalars, kept), info)
            new.append(statistics)
        grads = yield from grads.with_norms()
        if not any(transform.shared for transform in self.transforms):
            return Transformed(bucket, grads, new, scalars, None)
        # Every bucket issues this request, so that each learns of all: shared statistics are kept only if all gradients
        # of the model are finite.
        [finite] = yield from reduced(Reduction("gather", grads.finite.to(grads.dtype)))
        return Transformed(bucket, grads, new, scalars, finite.amin() > 0)

    def _followed(self, bucket: Bucket) -> list[dict[str, Tensor]]:
        """The statistics of the parameters of a bucket, on its device: ``model.to`` may have moved the parameters."""
        kept, device = [self.statistics[p] for p in bucket.params], bucket.shards[0].device
        if {value.device for state in kept for value in state.values()} != {device}:
            for state in kept:
                for key, value in state.items():
                    if value.device != device:
                        # A tensor on the meta device has no values to move: its statistics start at zero.
                        moved = torch.zeros_like(value, device=device) if value.is_meta else value.to(device)
                        state[key] = moved
        return kept

    def keep(self, results: list[Transformed]) -> None:
        """Write the new statistics of a step: those of a tensor if its gradient was finite, the shared ones if all
        were.
        """
        for result in results:
            finite = result.grads.finite  # [k] bool, never read back
            pairs = list(zip(self.transforms, result.new, strict=True))
            result.scalars.keep([new[name] for transform, new in pairs for name in transform.scalars], finite)
            for key, values in [
                (f"{transform.name}.{name}", new[name]) for transform, new in pairs for name in transform.entries
            ]:
                for p, flag, value in zip(result.bucket.params, finite.unbind(), values, strict=True):
                    whole = local(self.statistics[p][key])
                    whole.copy_(torch.where(flag, value, whole))
        if results:
            self._keep_shared(results[0])

    def _keep_shared(self, result: Transformed) -> None:
        """Write the shared statistics, which are equal in all buckets, once to each tensor that holds them."""
        for transform, new in zip(self.transforms, result.new, strict=True):
            for name in transform.shared:
                key = f"{transform.name}.{name}"
                old = self.statistics[result.bucket.params[0]][key]
                value = new[name]
                if result.all_finite is not None and not transform.sees_skipped_steps:
                    value = torch.where(result.all_finite, value, old)
                # Parameters on several devices: one tensor per device, each found under many parameters.
                for holder in {id(state[key]): state[key] for state in self.statistics.values()}.values():
                    holder.copy_(value)

    # ---- loading ----

    def check_saved(self, saved: Iterable[tuple[Tensor, dict[str, Any]]]) -> None:
        """ValueError for a saved statistic of another shape than here (another ``window``, another model)."""
        for p, entries in saved:
            known = self.statistics.get(p) or (self.fresh(p) if entries else {})
            for key, value in entries.items():
                mine = known.get(key)
                if mine is not None and mine.shape != value.shape:
                    raise ValueError(
                        f"stabilize: the saved {key} has shape {tuple(value.shape)}, the transform given here keeps "
                        f"{tuple(mine.shape)}; give it the options of the saved run"
                    )

    def load(self, saved: list[tuple[Tensor, dict[str, Any]]]) -> None:
        """Start all statistics anew and fill in the saved ones. A frozen parameter has statistics if it was trained
        before it was saved.
        """
        self.statistics.clear()
        # A frozen parameter that was never trained has zeros in the state, which need not be kept.
        saved = [(p, entries) for p, entries in saved if is_trained(p) or not untouched(entries)]
        for p, _ in saved:
            self.adopt(p)
        for p, entries in saved:
            for key, value in entries.items():
                if key in self.statistics[p]:
                    self.statistics[p][key].copy_(value)
