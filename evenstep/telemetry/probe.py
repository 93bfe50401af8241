"""Reads one optimizer step into one small row on the device, asking the device for nothing.

What evenstep's optimizers and `stabilize` found out anyway is taken from ``optimizer.stats``. For any other optimizer
norm and largest entry of each gradient are measured just before its step, which is after gradients were accumulated,
averaged over ranks and unscaled, so that nothing is measured twice and nothing half done.

The paper's GSS is a score of single coordinates, |g| over its mean over time, and needs a mean per coordinate. It is
kept for a fixed random sample of coordinates of each tensor. The paper's mean runs over all steps of a run; while a run
goes on, it can only run over those so far (the study computes the paper's).
"""

from __future__ import annotations

import math
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
from evenstep.telemetry.schema import GSS_THRESHOLD

STATS = ("grad_max", "grad_norm", "norm_after", "clip_limit", "clipped", "gain", "update_rms", "skipped")
"""What `stats` of an optimizer may have; the rest of a row is measured here."""

COLUMNS = (*STATS, "gss", "gss_share")


READABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What is measured; parameters of other kinds (quantised ones, masks) are passed over, and have NaN in every row."""


class Probe:
    """``samples``: coordinates of each tensor whose GSS is followed, 0 for none.

    The sampled coordinates are drawn from a generator of their own: the random state of the process stays as it is.
    Parameters may move to another device, change their size or dtype, be exchanged for shards, or leave the optimizer;
    those that join it later are not watched (`strangers`).
    """

    def __init__(self, optimizer: Optimizer, samples: int) -> None:
        self.optimizer = optimizer
        self.params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self.device = self._device()
        self.reports = _is_ours(optimizer) and isinstance(getattr(optimizer, "stats", None), dict)
        self.measured: dict[str, Tensor] = {}
        self.gss: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] | None = None
        self.unread: set[int] = set()
        """Places of parameters whose entries cannot be read, such as those of quantised subclasses of Tensor."""
        self.strangers = 0
        self._odd: set[int] = set()  # ids of parameters whose gradient cannot be measured
        self._order: list[Tensor] = self.params  # what the optimizer held at the last step
        self._places: Tensor | None = None  # where ours stand in it, -1 for those that are gone; None: as they do here
        draw = torch.Generator().manual_seed(0)
        self.sizes = [entries(p) for p in self.params]
        self.where = [torch.randint(max(n, 1), (samples if n else 0,), generator=draw) for n in self.sizes]
        self.where = [where.to(p.device) for where, p in zip(self.where, self.params, strict=True)]
        shape = (len(self.params), samples)
        self.sums = torch.zeros(shape, dtype=torch.float32, device=self.device)
        self.counts = torch.zeros(len(self.params), dtype=torch.float32, device=self.device)
        self.weights: Tensor | None = None

    def _device(self) -> torch.device:
        """That of the first parameter which is trained."""
        first = next((p for p in self.params if p.requires_grad and _is_readable(p)), self.params[0])
        return torch.device("cpu") if first.is_meta else first.device

    # ---- around a step ----

    def follow(self) -> bool:
        """Take note of what has become of the parameters since the last step; True where ``device`` is another now."""
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
        if len(current) == len(self.params):  # exchanged in their places, as accelerate does it for FSDP2
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
        """``vector``, one number for each parameter that the optimizer holds now, in our order."""
        if self._places is None:
            return vector
        places = self._places = self._places.to(vector.device)
        return torch.where(places < 0, math.nan, vector[places.clamp(min=0)])

    def before(self, *, weights: bool) -> None:
        """Look at the gradients; ``weights``: also at the sampled weights, to see how far they move."""
        self.gss, self.measured, self.weights = {}, {}, None
        if self.sums.shape[1]:
            self.gss = self._spike_scores()
            self.weights = self._sampled(self.params) if weights else None
        if not self.reports:
            self.measured = self._measure()

    def after(self) -> Tensor:
        """The row of the step, ``[columns, k]`` in fp32; NaN for what is not known."""
        found = {name: self._ours(vector) for name, vector in self.measured.items()} | self.gss
        stats = self.optimizer.stats if self.reports else self.seen  # type: ignore[attr-defined]
        if stats is not self.seen:
            self.seen, k = stats, len(self._order)
            fits = {name: vector for name, vector in (stats or {}).items() if name in STATS and vector.shape == (k,)}
            found |= {name: self._ours(vector) for name, vector in fits.items()}
        if self.weights is not None:
            found["update_rms"] = self._update_rms(self.weights, found.get("update_rms"))
        self.gss, self.measured, self.weights = {}, {}, None
        unknown = torch.full_like(self.counts, math.nan)
        return torch.stack([found.get(name, unknown).to(self.device, torch.float32) for name in COLUMNS])

    def _measure(self) -> dict[str, Tensor]:
        groups = self.optimizer.param_groups
        dense = [[p for p in group["params"] if self.is_measurable(p)] for group in groups]
        try:
            numbers = self._norms_of(dense)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a kind of tensor that the arithmetic does not know: the others are measured without it
            if any(map(is_sharded, self.params)):  # ranks must ask each other the same
                raise
            odd = {id(p) for params in dense for p in params if not self._can_measure(p)}
            if not odd:
                raise
            self._odd |= odd
            numbers = self._norms_of([[p for p in params if id(p) not in odd] for params in dense])
        scale = getattr(self.optimizer, "grad_scale", None)  # a GradScaler leaves the unscaling to fused optimizers
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

    def is_measurable(self, p: Tensor) -> bool:
        grad = p.grad
        return grad is not None and _is_readable(grad) and id(p) not in self._odd

    # ---- samples ----

    def _sampled(self, tensors: Iterable[Tensor | None]) -> Tensor:
        """The sampled entries ``[k, samples]`` in fp32, NaN for a tensor that is not there."""
        absent = torch.full((self.sums.shape[1],), math.nan, device=self.device)
        taken = [self._taken(i, x) for i, x in enumerate(tensors)]
        return torch.stack([absent if x is None else x.to(absent) for x in taken])

    def _taken(self, i: int, x: Tensor | None) -> Tensor | None:
        if x is None or i in self.unread or not _is_readable(x):
            return None
        try:
            x = local(x)
            if x.numel() != self.sizes[i]:
                self._redraw(i, x.numel())
            if self.where[i].device != x.device:
                self.where[i] = self.where[i].to(x.device)
            return torch.take(x, self.where[i]) if len(self.where[i]) else None
        except torch.OutOfMemoryError:
            raise
        except Exception:
            self.unread.add(i)
            return None

    def _redraw(self, i: int, size: int) -> None:
        """Parameter ``i`` has ``size`` entries now: other coordinates are followed, from here on."""
        draw = torch.Generator().manual_seed(i)
        self.sizes[i], samples = size, self.sums.shape[1]
        self.where[i] = torch.randint(max(size, 1), (samples if size else 0,), generator=draw)
        self.sums[i] = 0.0
        self.counts[i] = 0.0

    def _spike_scores(self) -> dict[str, Tensor]:
        size = self._sampled(p.grad for p in self.params).abs_()
        there = torch.isfinite(size).all(dim=1)
        size = torch.where(there[:, None], size, 0.0)
        self.counts += there
        self.sums += size
        scores = size * self.counts[:, None] / self.sums.clamp(min=torch.finfo(torch.float32).tiny)
        found = {"gss": scores.amax(1), "gss_share": (scores > GSS_THRESHOLD).to(torch.float32).mean(1)}
        return {name: torch.where(there, vector, math.nan) for name, vector in found.items()}

    def _update_rms(self, before: Tensor, known: Tensor | None) -> Tensor:
        """Root mean square of the update of the sampled entries, where the optimizer does not give that of all."""
        moved = (self._sampled(self.params) - before).square().mean(1).sqrt()
        if known is None:
            return moved
        return torch.where(torch.isnan(known), moved, known.to(moved))

    # ---- now and then ----

    def weigh(self) -> Tensor:
        """Of each whole parameter the root mean square, and its largest entry, Inf where one is not finite; ``[2, k]``
        in fp32. Two passes over the weights. NaN for those that are passed over."""
        layouts = [Layout.of(p) for p in self.params]
        found = [self._norm_and_peak(i, p) for i, p in enumerate(self.params)]
        asked: dict[int, tuple[Reduction, ...]] = {
            i: (Reduction("sum", norm.square().reshape(1)), Reduction("max", peak.nan_to_num(nan=math.inf).reshape(1)))
            for i, (norm, peak) in enumerate(found)
        }
        all_reduce(asked, layouts)
        answers = [[one.values if one.answer is None else one.answer for one in both] for both in asked.values()]
        sums, peaks = (torch.cat([both[j].to(self.counts) for both in answers]) for j in (0, 1))
        sizes = self.counts.new_tensor([max(entries(p, whole=True), 1) for p in self.params])
        return torch.stack([(sums / sizes).sqrt(), peaks])

    def _norm_and_peak(self, i: int, p: Tensor) -> tuple[Tensor, Tensor]:
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
        """Whether a parameter is trained, and its entries can be read."""
        return [p.requires_grad and _is_readable(p) and i not in self.unread for i, p in enumerate(self.params)]

    def agree(self, rows: Tensor) -> Tensor:
        """Rows ``[n, columns, k]`` with the scores of sharded tensors taken over all their parts."""
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
        return {"sums": self.sums.clone(), "counts": self.counts.clone()}

    def load(self, state: dict[str, Any]) -> None:
        for name in ("sums", "counts"):
            if state[name].shape == getattr(self, name).shape:  # another sample size starts anew
                getattr(self, name).copy_(state[name])


def _is_ours(optimizer: Optimizer) -> bool:
    """Others may have ``stats`` of their own."""
    return any(cls.__module__.partition(".")[0] == "evenstep" for cls in type(optimizer).__mro__)


def _is_readable(x: Tensor) -> bool:
    return x.dtype in READABLE and x.layout is torch.strided and not x.is_meta and not is_lazy(x)


def entries(p: Tensor, *, whole: bool = False) -> int:
    """Of a parameter, or of what is here of it; 0 where there are none yet, as in a lazy module."""
    if is_lazy(p):
        return 0
    return (p if whole else local(p)).numel()


def _norms(bucket: Bucket) -> Steps[dict[str, Tensor]]:
    """Largest entry and norm of each gradient; Inf for a largest entry that is none."""
    grads = yield Gradients.measure(bucket.grads, bucket.dtype, kernels=bucket.kernels)
    grads = yield grads.with_norms()
    return {"grad_max": grads.peak, "grad_norm": grads.norms.raw}
