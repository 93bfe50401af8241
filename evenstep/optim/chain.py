"""A chain of gradient transforms and its statistics: their storage, and the conditions for keeping new ones.

Each parameter has its own dict of statistics, as in an optimizer's state, so that they fit any checkpoint format.
Statistics of the whole model are in the dict of every parameter, as one tensor per device.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
    """The result of the chain for one bucket: transformed gradients, new statistics by transform, and whether all
    gradients are finite (0-d bool)."""

    bucket: Bucket
    grads: Gradients  # transformed; the raw tensors are shared with p.grad
    new: list[Statistics]  # by transform
    all_finite: Tensor  # 0-d bool, equal in all buckets


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
        for p in bucket.params:
            self._follow(p)
        # Every transform gets the same facts; the clock is that of the step being taken.
        info = StepInfo(bucket.shards, t, self.reset_interval, loss)
        # Each transform changes limits and gains beside the gradients, which are read once, by the base's step.
        grads = yield from Gradients.measure(bucket.grads, bucket.dtype, kernels=bucket.kernels)
        new = []  # new statistics by transform
        for transform in self.transforms:
            # Where a transform needs statistics of whole tensors, it yields requests through this generator.
            grads, statistics = yield from transform(grads, self._read(transform, bucket), info)
            new.append(statistics)
        grads = yield from grads.with_norms()
        # Every bucket issues this request, so that each learns of all: shared statistics are kept only if all gradients
        # of the model are finite.
        [finite] = yield from reduced(Reduction("gather", grads.finite.to(grads.dtype)))
        return Transformed(bucket, grads, new, finite.amin() > 0)

    def _follow(self, p: Tensor) -> None:
        """Move statistics to the device of their parameter, which ``model.to`` may have moved."""
        for key, value in self.statistics[p].items():
            if value.device != p.device:
                # A tensor on the meta device has no values to move: its statistics start at zero.
                moved = torch.zeros_like(value, device=p.device) if value.is_meta else value.to(p.device)
                self.statistics[p][key] = moved

    def _read(self, transform: Transform, bucket: Bucket) -> Statistics:
        """The present statistics of a transform for the ``k`` parameters of a bucket: see `Transform.__call__`."""

        def stored(name: str) -> list[Tensor]:
            return [self.statistics[p][f"{transform.name}.{name}"] for p in bucket.params]

        # scalars: [k] per name; entries: k local shards; shared: one tensor, the same object for all parameters.
        state: Statistics = {name: torch.stack(stored(name)) for name in transform.scalars}
        state |= {name: [local(value) for value in stored(name)] for name in transform.entries}
        return state | {name: stored(name)[0] for name in transform.shared}

    def keep(self, results: list[Transformed]) -> None:
        """Write the new statistics of a step: those of a tensor if its gradient was finite, the shared ones if all
        were.
        """
        for result in results:
            kept = [self.statistics[p] for p in result.bucket.params]
            finite = result.grads.finite  # [k] bool, never read back
            skipped = [state["skipped"] for state in kept]
            torch._foreach_add_(skipped, list((~finite).to(skipped[0].dtype).unbind()))
            for transform, new in zip(self.transforms, result.new, strict=True):
                # Numbers of all tensors at once: a call for each would take longer than the step on a GPU.
                for name in transform.scalars:
                    old = [local(state[f"{transform.name}.{name}"]) for state in kept]
                    values = torch.where(finite, new[name], torch.stack(old))  # [k]
                    torch._foreach_copy_(old, list(values.unbind()))
                for name in transform.entries:
                    for state, flag, value in zip(kept, finite.unbind(), new[name], strict=True):
                        whole = local(state[f"{transform.name}.{name}"])
                        whole.copy_(torch.where(flag, value, whole))
        if results:
            self._keep_shared(results[0])

    def _keep_shared(self, result: Transformed) -> None:
        """Write the shared statistics, which are equal in all buckets, once to each tensor that holds them."""
        for transform, new in zip(self.transforms, result.new, strict=True):
            for name in transform.shared:
                key = f"{transform.name}.{name}"
                old = self.statistics[result.bucket.params[0]][key]
                value = new[name] if transform.sees_skipped_steps else torch.where(result.all_finite, new[name], old)
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
