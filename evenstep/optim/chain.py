"""A chain of gradient transforms and its statistics: where they are stored, and when new ones are kept.

Each parameter has its own dict of statistics, as in an optimizer's state, so that they fit any checkpoint format. Those
of the whole model are in the dict of every parameter, as one tensor per device.
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

PREFIX = "stabilize."
CLOCK = "stabilize_t"
"""Where a saved state has the statistics, and a param group the step count. Chains within one another have names of
their own (see `Chain.prefix` and `Chain.clock`).
"""


@dataclass(frozen=True)
class Transformed:
    """The result of the chain for one bucket: transformed gradients, new statistics by transform, and whether all
    gradients are finite (0-d bool)."""

    bucket: Bucket
    grads: Gradients
    new: list[Statistics]
    all_finite: Tensor


class Chain:
    """Transforms in their order, and the statistics of the parameters that were adopted. ``depth``: how many chains are
    behind this one, between it and the optimizer.
    """

    def __init__(self, transforms: tuple[Transform, ...], reset_interval: int, depth: int = 0):
        names = [unit.name for unit in transforms]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"stabilize: {', '.join(twice)} is given more than once; each kind of transform goes once")
        self.transforms = transforms
        self.reset_interval = reset_interval
        self.depth = depth
        self.prefix = PREFIX * (depth + 1)
        self.clock = f"{CLOCK}{depth + 1}" if depth else CLOCK
        self.statistics: dict[Tensor, dict[str, Tensor]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"depth": 0, "prefix": PREFIX, "clock": CLOCK} | state)

    def adopt(self, p: Tensor) -> None:
        self.statistics[p] = self.fresh(p)

    def fresh(self, p: Tensor) -> dict[str, Tensor]:
        """Statistics of a new parameter, zero; the shared ones are those of the others."""
        found = {"skipped": scalar(p)}
        for unit in self.transforms:
            found |= {f"{unit.name}.{name}": scalar(p) for name in unit.scalars}
            for name in unit.entries:
                found[f"{unit.name}.{name}"] = torch.zeros_like(p, dtype=state_dtype(p), requires_grad=False)
            for name, shape in unit.shared.items():
                found[f"{unit.name}.{name}"] = self._shared(f"{unit.name}.{name}", shape, p.device)
        return found

    def _shared(self, key: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        known = [state[key] for state in self.statistics.values() if key in state]
        here = next((value for value in known if value.device == device), None)
        if here is not None:
            return here
        dtype = shared_dtype(device)
        return known[0].to(device, dtype) if known else torch.zeros(shape, dtype=dtype, device=device)

    # ---- one step ----

    def transformed(self, bucket: Bucket, t: int, loss: Tensor | None) -> Steps[Transformed]:
        """Pass the gradients of a bucket through the chain; nothing is written yet."""
        for p in bucket.params:
            self._follow(p)
        info = StepInfo(bucket.shards, t, self.reset_interval, loss)
        grads = yield from Gradients.measure(bucket.grads, bucket.dtype, kernels=bucket.kernels)
        new = []
        for unit in self.transforms:
            grads, found = yield from unit(grads, self._read(unit, bucket), info)
            new.append(found)
        grads = yield from grads.with_norms()
        # Every bucket issues this request: shared statistics are kept if all gradients of the model are finite.
        [finite] = yield from reduced(Reduction("gather", grads.finite.to(grads.dtype)))
        return Transformed(bucket, grads, new, finite.amin() > 0)

    def _follow(self, p: Tensor) -> None:
        """Move statistics to the device of their parameter."""
        for key, value in self.statistics[p].items():
            if value.device != p.device:
                moved = torch.zeros_like(value, device=p.device) if value.is_meta else value.to(p.device)
                self.statistics[p][key] = moved

    def _read(self, unit: Transform, bucket: Bucket) -> Statistics:
        def stored(name: str) -> list[Tensor]:
            return [self.statistics[p][f"{unit.name}.{name}"] for p in bucket.params]

        state: Statistics = {name: torch.stack(stored(name)) for name in unit.scalars}
        state |= {name: [local(value) for value in stored(name)] for name in unit.entries}
        return state | {name: stored(name)[0] for name in unit.shared}

    def keep(self, found: list[Transformed]) -> None:
        """Write what a step found into the statistics: each tensor's where its gradient was finite, the shared ones
        where all were.
        """
        for one in found:
            params, finite = one.bucket.params, one.grads.finite
            for p, flag in zip(params, finite.unbind(), strict=True):
                self.statistics[p]["skipped"].add_(~flag)
            for unit, new in zip(self.transforms, one.new, strict=True):
                for name in (*unit.scalars, *unit.entries):
                    for p, flag, value in zip(params, finite.unbind(), new[name], strict=True):
                        old = local(self.statistics[p][f"{unit.name}.{name}"])
                        old.copy_(torch.where(flag, value, old))
        if found:
            self._keep_shared(found[0])

    def _keep_shared(self, one: Transformed) -> None:
        """All buckets found the same; it is written to each tensor that holds it once."""
        for unit, new in zip(self.transforms, one.new, strict=True):
            for name in unit.shared:
                key = f"{unit.name}.{name}"
                old = self.statistics[one.bucket.params[0]][key]
                value = new[name] if unit.sees_skipped_steps else torch.where(one.all_finite, new[name], old)
                for holder in {id(state[key]): state[key] for state in self.statistics.values()}.values():
                    holder.copy_(value)

    # ---- loading ----

    def check_saved(self, saved: Iterable[tuple[Tensor, dict[str, Any]]]) -> None:
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
        """Start all statistics anew and put in what was saved. Frozen parameters have some where they were trained
        before they were saved.
        """
        self.statistics.clear()
        saved = [(p, entries) for p, entries in saved if is_trained(p) or not untouched(entries)]
        for p, _ in saved:
            self.adopt(p)
        for p, entries in saved:
            for key, value in entries.items():
                if key in self.statistics[p]:
                    self.statistics[p][key].copy_(value)
