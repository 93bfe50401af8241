"""Reads one optimizer step into one row of numbers on the device, without any host synchronisation, but for one at
first use, when a kernel is compared with plain code (gather.py).

Statistics that evenstep's optimizers and `stabilize` compute anyway are taken from ``optimizer.stats``. For any other
optimizer the norm and the largest entry of each gradient are measured just before its step: after gradients have been
accumulated, averaged over ranks and unscaled. Each gradient is therefore measured once, and as the optimizer sees it.

The GSS of the SPAM paper is a score of single coordinates, |g| over its mean over time, and needs one mean for each
coordinate. It is computed for a fixed random sample of coordinates of each tensor. The paper's mean is over all steps
of a run; during a run only the steps so far are known (``evenstep study`` computes the paper's score).

Shapes: ``k`` is the number of watched parameters; a vector ``[k]`` is in the order of the optimizer's groups when the
probe was made. Nothing here calls ``.item()``, ``.cpu()`` or a bool of a device tensor.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from evenstep.optim.distributed import (
    Bucket,
    Layout,
    Reduction,
    Steps,
    all_reduce,
    is_sharded,
    local,
    num_shards,
    run_batched_collectives,
    state_dtype,
)
from evenstep.optim.functional import Gradients
from evenstep.optim.fused import Choice, buckets
from evenstep.optim.state import in_param_order
from evenstep.telemetry.schema import COLUMNS, GSS_THRESHOLD, STATS

READABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes that are measured. Parameters of other dtypes (quantised ones, masks) are skipped: their numbers are NaN."""


class Probe:
    """Measures the steps of ``optimizer``: call `before` and `after` around each step.

    Parameters may move to another device, change their size or dtype, be replaced by shards, or leave the optimizer.
    Parameters that join the optimizer later are not watched; ``strangers`` is their number.

    Args:
        optimizer: any torch optimizer.
        samples: number of coordinates of each tensor whose GSS is computed, 0 for none. They are drawn from a generator
            of their own, so the random state of the process does not change.

    >>> p = torch.nn.Parameter(torch.tensor([0.0, 0.0]))
    >>> optimizer = torch.optim.SGD([p], lr=0.1)
    >>> probe = Probe(optimizer, samples=0)
    >>> p.grad = torch.tensor([3.0, 4.0])
    >>> probe.before(weights=False); optimizer.step()
    >>> row = probe.after()  # [columns, k]
    >>> row[COLUMNS.index("grad_norm")], row[COLUMNS.index("grad_max")]
    (tensor([5.]), tensor([4.]))
    """

    def __init__(self, optimizer: Optimizer, samples: int) -> None:
        self.optimizer = optimizer
        self.params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self.device = self._device()
        self.reports = _is_ours(optimizer) and isinstance(getattr(optimizer, "stats", None), dict)
        # What `before` measured, for the row that `after` makes.
        self.measured: dict[str, Tensor] = {}
        self.gss: dict[str, Tensor] = {}
        self.weights: Tensor | None = None  # sampled weights before the step, [k, samples]
        self.seen: dict[str, Tensor] | None = None  # the ``stats`` of the last step, so that old ones are not reused
        self.unread: set[int] = set()
        """Indices of parameters whose entries cannot be read, such as quantised subclasses of Tensor."""
        self.strangers = 0
        self._odd: set[int] = set()  # ids of parameters whose gradient cannot be measured
        self._order: list[Tensor] = self.params  # the optimizer's parameters at the last step
        # Index of each watched parameter in ``_order``, -1 if it has left the optimizer; None: the identity.
        self._places: Tensor | None = None
        # GSS: sampled indices of each (local) tensor, sums of |g| over time [k, samples], and numbers of steps [k].
        draw = torch.Generator().manual_seed(0)
        self.sizes = [entries(p) for p in self.params]
        self.where = [torch.randint(max(n, 1), (samples if n else 0,), generator=draw) for n in self.sizes]
        self.where = [where.to(p.device) for where, p in zip(self.where, self.params, strict=True)]
        self.table: Tensor | None = None
        """The sampled positions as one tensor [k, samples]."""
        self.gathers: bool | None = None
        """Whether the kernel of gather.py reads the samples on a GPU; None before its first use."""
        shape = (len(self.params), samples)
        self.sums = torch.zeros(shape, dtype=torch.float32, device=self.device)
        self.counts = torch.zeros(len(self.params), dtype=torch.float32, device=self.device)

    def _device(self) -> torch.device:
        """The device of the first parameter that is trained. Rows are on this device."""
        first = next((p for p in self.params if p.requires_grad and _is_readable(p)), self.params[0])
        return torch.device("cpu") if first.is_meta else first.device

    # ---- around a step ----

    def follow(self) -> bool:
        """Notice parameters that were replaced, removed or moved since the last step; True if ``device`` changed."""
        current = [p for group in self.optimizer.param_groups for p in group["params"]]
        if len(current) != len(self._order) or any(p is not q for p, q in zip(current, self._order, strict=True)):
            self._reorder(current)
        device = self._device()
        if device == self.device:
            return False
        self.device = device
        self.sums, self.counts = self.sums.to(device), self.counts.to(device)
        self.weights = None
        return True

    def _reorder(self, current: list[Tensor]) -> None:
        known = {id(p): i for i, p in enumerate(current)}
        ours = {id(p) for p in self.params}
        if len(current) == len(self.params):  # replaced one for one, as accelerate does for FSDP2
            self.params = [
                p if id(p) in known or id(q) in ours else q for p, q in zip(self.params, current, strict=True)
            ]
        places = [known.get(id(p), -1) for p in self.params]
        self._order = current
        self._places = None
        if places != [*range(len(current))]:
            self._places = torch.tensor(places)
        self.strangers = len(current) - sum(place >= 0 for place in places)

    def _ours(self, vector: Tensor) -> Tensor:
        """``vector``, one number for each parameter that the optimizer holds now, as a vector ``[k]``."""
        if self._places is None:
            return vector
        places = self._places = self._places.to(vector.device)
        return torch.where(places < 0, math.nan, vector[places.clamp(min=0)])

    def before(self, *, weights: bool) -> None:
        """Measure the gradients. ``weights``: also keep the sampled weights, to measure the update in `after`."""
        self.gss, self.measured, self.weights = {}, {}, None
        if self.sums.shape[1]:
            self.gss = self._spike_scores()
            self.weights = self._sampled(self.params) if weights else None
        if not self.reports:
            self.measured = self._measure()

    def after(self) -> Tensor:
        """The row of the step, ``[columns, k]`` in fp32, with NaN for unknown numbers."""
        found = {name: self._ours(vector) for name, vector in self.measured.items()} | self.gss
        stats = self.optimizer.stats if self.reports else self.seen  # type: ignore[attr-defined]
        if stats is not self.seen:  # an optimizer that did not step keeps the dict of its last step
            self.seen, k = stats, len(self._order)
            fits = {name: vector for name, vector in (stats or {}).items() if name in STATS and vector.shape == (k,)}
            found |= {name: self._ours(vector) for name, vector in fits.items()}
        if self.weights is not None:
            found["update_rms"] = self._update_rms(self.weights, found.get("update_rms"))
        self.gss, self.measured, self.weights = {}, {}, None
        unknown = torch.full_like(self.counts, math.nan)
        return torch.stack([found.get(name, unknown).to(self.device, torch.float32) for name in COLUMNS])

    def _measure(self) -> dict[str, Tensor]:
        """``grad_max`` and ``grad_norm`` of each parameter that the optimizer holds, for the whole tensors."""
        groups = self.optimizer.param_groups
        dense = [[p for p in group["params"] if self._is_measurable(p)] for group in groups]
        try:
            numbers = self._norms_of(dense)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a tensor subclass without this arithmetic: measure the others without it
            if any(map(is_sharded, self.params)):  # every rank must take part in the same collectives
                raise
            odd = {id(p) for params in dense for p in params if not self._can_measure(p)}
            if not odd:
                raise
            self._odd |= odd
            numbers = self._norms_of([[p for p in params if id(p) not in odd] for params in dense])
        # For fused optimizers a GradScaler does not unscale gradients but passes them its scale.
        scale = getattr(self.optimizer, "grad_scale", None)
        return numbers if scale is None else {name: vector / scale for name, vector in numbers.items()}

    def _norms_of(self, dense: list[list[Tensor]]) -> dict[str, Tensor]:
        work = [bucket for params in dense for bucket in buckets(params, choose=Choice(None))]
        if not work:
            return {}
        layouts = [bucket.layout for bucket in work]
        found = run_batched_collectives(
            [_norms(bucket) for bucket in work], lambda requests: all_reduce(requests, layouts)
        )
        groups = self.optimizer.param_groups
        return in_param_order(groups, [(bucket.params, one) for bucket, one in zip(work, found, strict=True)])

    def _can_measure(self, p: Tensor) -> bool:
        try:
            self._norms_of([[p]])
        except Exception:
            return False
        return True

    def _is_measurable(self, p: Tensor) -> bool:
        grad = p.grad
        return grad is not None and _is_readable(grad) and id(p) not in self._odd

    # ---- samples ----

    def _sampled(self, tensors: Iterable[Tensor | None]) -> Tensor:
        """The sampled entries ``[k, samples]`` in fp32, NaN for a missing tensor."""
        tensors = list(tensors)
        if self.device.type == "cuda" and self.gathers is not False and self._places_fit(tensors):
            return self._gathered(tensors)
        return self._each_sampled(tensors)

    def _places_fit(self, tensors: list[Tensor | None]) -> bool:
        """Whether all sampled positions are on the device and within the tensors, which `_taken` sees to."""
        return not self.unread and all(
            where.device == self.device and (x is None or (_is_readable(x) and local(x).numel() == size))
            for x, where, size in zip(tensors, self.where, self.sizes, strict=True)
        )

    def _gathered(self, tensors: list[Tensor | None]) -> Tensor:
        """`_each_sampled` by one kernel for each dtype instead of one for each tensor; checked once against it."""
        try:
            from evenstep.telemetry.gather import can_gather, gathered

            parts = [None if x is None else local(x) for x in tensors]
            if not can_gather(parts, self.device):
                return self._each_sampled(tensors)
            if self.table is None:
                # Empty tensors have no positions; their row is never read.
                none = torch.zeros(self.sums.shape[1], dtype=torch.int64, device=self.device)
                self.table = torch.stack([where if len(where) else none for where in self.where])
            found = gathered(parts, self.table)
            if self.gathers is None:
                self.gathers = torch.equal(found.nan_to_num(), self._each_sampled(tensors).nan_to_num())
                if not self.gathers:
                    raise ValueError("it differs from torch.take")
            return found
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:
            self.gathers = False
            warnings.warn(
                f"telemetry reads its samples tensor by tensor, since the kernel failed ({problem})", stacklevel=2
            )
            return self._each_sampled(tensors)

    def _each_sampled(self, tensors: list[Tensor | None]) -> Tensor:
        absent = torch.full((self.sums.shape[1],), math.nan, device=self.device)
        taken = [self._taken(i, x) for i, x in enumerate(tensors)]
        return torch.stack([absent if x is None else x.to(absent) for x in taken])

    def _taken(self, i: int, x: Tensor | None) -> Tensor | None:
        """The sampled entries ``[samples]`` of ``x``, parameter ``i`` or its gradient; None if they cannot be read."""
        if x is None or i in self.unread or not _is_readable(x):
            return None
        try:
            x = local(x)
            if x.numel() != self.sizes[i]:
                self._redraw(i, x.numel())
            if self.where[i].device != x.device:
                self.where[i], self.table = self.where[i].to(x.device), None
            return torch.take(x, self.where[i]) if len(self.where[i]) else None
        except torch.OutOfMemoryError:
            raise
        except Exception:
            self.unread.add(i)
            return None

    def _redraw(self, i: int, size: int) -> None:
        """Sample other coordinates of parameter ``i``, which has ``size`` entries now, and forget their means."""
        draw = torch.Generator().manual_seed(i)
        self.sizes[i], samples, self.table = size, self.sums.shape[1], None
        self.where[i] = torch.randint(max(size, 1), (samples if size else 0,), generator=draw)
        self.sums[i] = 0.0
        self.counts[i] = 0.0

    def _spike_scores(self) -> dict[str, Tensor]:
        """GSS of the sampled coordinates: the largest of each tensor, and the share above the threshold, both [k]."""
        size = self._sampled(p.grad for p in self.params).abs_()  # |g|, [k, samples]
        # A tensor with a sample that is not finite (or without a gradient, NaN) has no score and leaves its means as
        # they are. A mask instead of an if: a branch on a device value would synchronise.
        known = torch.isfinite(size).all(dim=1)
        size = torch.where(known[:, None], size, 0.0)
        self.counts += known
        self.sums += size
        # GSS(g_i) = |g_i| / (1/T sum_t |g_t,i|) (SPAM, Definition 2.1), with the current step in the sum. The clamp
        # keeps a coordinate that was always zero at the score 0.
        scores = size * self.counts[:, None] / self.sums.clamp(min=torch.finfo(torch.float32).tiny)
        found = {"gss": scores.amax(1), "gss_share": (scores > GSS_THRESHOLD).to(torch.float32).mean(1)}
        return {name: torch.where(known, vector, math.nan) for name, vector in found.items()}

    def _update_rms(self, before: Tensor, known: Tensor | None) -> Tensor:
        """RMS of the update of the sampled entries ``[k]``; that of all entries where the optimizer provides it."""
        moved = (self._sampled(self.params) - before).square().mean(1).sqrt()
        if known is None:
            return moved
        return torch.where(torch.isnan(known), moved, known.to(moved))

    # ---- at a transfer to the host ----

    def weigh(self) -> Tensor:
        """RMS and largest absolute entry of each whole parameter, ``[2, k]`` in fp32. The largest entry is Inf if any
        entry is not finite; parameters that are skipped have NaN and Inf. Costs two passes over the weights and, if
        parameters are sharded, an all-reduce."""
        layouts = [Layout.of(p) for p in self.params]
        norms, peaks = self._norms_and_peaks()
        sums, peaks = norms.square(), peaks.nan_to_num(nan=math.inf)
        asked: dict[int, tuple[Reduction, ...]] = {
            i: (Reduction("sum", sums[i : i + 1]), Reduction("max", peaks[i : i + 1]))
            for i, layout in enumerate(layouts)
            if layout.cuts
        }
        all_reduce(asked, layouts)
        for i, (summed, largest) in asked.items():
            assert summed.answer is not None and largest.answer is not None
            sums[i], peaks[i] = summed.answer[0], largest.answer[0]
        sums, peaks = sums.to(self.counts), peaks.to(self.counts)
        sizes = self.counts.new_tensor([max(entries(p, whole=True), 1) for p in self.params])
        return torch.stack([(sums / sizes).sqrt(), peaks])

    def _norms_and_peaks(self) -> tuple[Tensor, Tensor]:
        """2-norms and largest absolute entries of the local parts of all parameters, [k] each, NaN where unknown."""
        if not self.unread and all(map(_is_readable, self.params)):
            # A few launches for all tensors instead of two for each, where they are alike.
            parts = [local(p.detach()) for p in self.params]
            if all(x.dtype == torch.float32 and x.device == self.device and x.numel() for x in parts):
                both = [torch.stack(torch._foreach_norm(parts, order)) for order in (2, math.inf)]
                return both[0], both[1]
        found = [self._norm_and_peak(i, p) for i, p in enumerate(self.params)]
        wide = torch.float64 if any(norm.dtype == torch.float64 for norm, _ in found) else torch.float32
        norms, peaks = (torch.stack([one[j].to(self.device, wide) for one in found]) for j in (0, 1))
        return norms, peaks

    def _norm_and_peak(self, i: int, p: Tensor) -> tuple[Tensor, Tensor]:
        """2-norm and largest absolute entry of the local part of parameter ``i``, as 0-d tensors."""
        unknown = self.counts.new_full((), math.nan)
        if i in self.unread or not (_is_readable(p) or p.is_complex()):
            return unknown, unknown
        try:
            x = local(p.detach())
            x = torch.view_as_real(x) if x.is_complex() else x
            norm = torch.linalg.vector_norm(x, dtype=state_dtype(x))
            return norm, torch.linalg.vector_norm(x, math.inf).to(norm.dtype) if x.numel() else norm
        except torch.OutOfMemoryError:
            raise
        except Exception:
            self.unread.add(i)
            return unknown, unknown

    def trained(self) -> list[bool]:
        """Whether each parameter is trained and its entries can be read."""
        return [p.requires_grad and _is_readable(p) and i not in self.unread for i, p in enumerate(self.params)]

    def agree(self, rows: Tensor) -> Tensor:
        """``rows`` ``[n, columns, k]`` with the GSS of sharded tensors taken over all shards, in place. Once per
        transfer instead of once per step, so that steps need no communication."""
        layouts = [Layout.of(p) for p in self.params]
        cut = [i for i, layout in enumerate(layouts) if layout.cuts]
        gss, share = rows[:, COLUMNS.index("gss")], rows[:, COLUMNS.index("gss_share")]
        asked: dict[int, tuple[Reduction, ...]] = {
            i: (Reduction("max", gss[:, i].nan_to_num(nan=-1.0)), Reduction("sum", share[:, i].nan_to_num(nan=0.0)))
            for i in cut
        }
        all_reduce(asked, layouts)
        for i, (largest, summed) in asked.items():
            assert largest.answer is not None and summed.answer is not None
            gss[:, i] = torch.where(largest.answer < 0, math.nan, largest.answer)
            share[:, i] = torch.where(largest.answer < 0, math.nan, summed.answer / num_shards(self.params[i]))
        return rows

    def state(self) -> dict[str, Any]:
        """The means of the GSS, which belong to the samples of this rank."""
        return {"sums": self.sums.clone(), "counts": self.counts.clone()}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned; the state of another number of samples is ignored."""
        for name in ("sums", "counts"):
            if state[name].shape == getattr(self, name).shape:
                getattr(self, name).copy_(state[name])


def _is_ours(optimizer: Optimizer) -> bool:
    """Whether the optimizer is of evenstep: other optimizers may have ``stats`` of another meaning."""
    return any(cls.__module__.partition(".")[0] == "evenstep" for cls in type(optimizer).__mro__)


def _is_readable(x: Tensor) -> bool:
    return x.dtype in READABLE and x.layout is torch.strided and not x.is_meta and not is_lazy(x)


def entries(p: Tensor, *, whole: bool = False) -> int:
    """Number of entries of the local part of a parameter, or of the ``whole`` one; 0 before a lazy module is built."""
    if is_lazy(p):
        return 0
    return (p if whole else local(p)).numel()


def _norms(bucket: Bucket) -> Steps[dict[str, Tensor]]:
    """Largest absolute entry (Inf if any entry is not finite) and 2-norm of each gradient of a bucket."""
    grads = yield Gradients.measure(bucket.grads, bucket.dtype, kernels=bucket.kernels)
    grads = yield grads.with_norms()
    return {"grad_max": grads.peak, "grad_norm": grads.norms.raw}
