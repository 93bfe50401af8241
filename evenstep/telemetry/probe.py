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
from torch.optim import Optimizer

from evenstep.optim.fused import Choice
from evenstep.optim.sharding import Bucket, Layout, buckets, combine, local, parts, state_dtype
from evenstep.optim.state import in_param_order
from evenstep.telemetry.schema import GSS_THRESHOLD
from evenstep.transforms import Combine, Gradients, Steps, lockstep

STATS = ("grad_max", "grad_norm", "norm_after", "clip_limit", "clipped", "gain", "update_rms", "skipped")
"""What `stats` of an optimizer may have; the rest of a row is measured here."""

COLUMNS = (*STATS, "gss", "gss_share")


class Probe:
    """``samples``: coordinates of each tensor whose GSS is followed, 0 for none.

    The sampled coordinates are drawn from a generator of their own: the random state of the process stays as it is.
    """

    def __init__(self, optimizer: Optimizer, samples: int) -> None:
        self.optimizer = optimizer
        self.params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self.device = self.params[0].device
        self.reports = isinstance(getattr(optimizer, "stats", None), dict)
        self.measured: dict[str, Tensor] = {}
        self.gss: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] | None = None
        draw = torch.Generator().manual_seed(0)
        sizes = [local(p).numel() for p in self.params]
        self.where = [torch.randint(max(n, 1), (samples if n else 0,), generator=draw) for n in sizes]
        self.where = [where.to(p.device) for where, p in zip(self.where, self.params, strict=True)]
        shape = (len(self.params), samples)
        self.sums = torch.zeros(shape, dtype=torch.float32, device=self.device)
        self.counts = torch.zeros(len(self.params), dtype=torch.float32, device=self.device)
        self.weights: Tensor | None = None

    # ---- around a step ----

    def before(self, *, weights: bool) -> None:
        """Look at the gradients; ``weights``: also at the sampled weights, to see how far they move."""
        if self.sums.shape[1]:
            self.gss = self._spike_scores()
            self.weights = self._sampled(self.params) if weights else None
        if not self.reports:
            self.measured = self._measure()

    def after(self) -> Tensor:
        """The row of the step, ``[columns, k]`` in fp32; NaN for what is not known."""
        found = {**self.measured, **self.gss}
        if self.reports and self.optimizer.stats is not self.seen:  # type: ignore[attr-defined]
            self.seen = self.optimizer.stats  # type: ignore[attr-defined]
            found |= self.seen or {}
        found = {name: vector[: len(self.params)] for name, vector in found.items()}  # groups added later: unwatched
        if self.weights is not None:
            found["update_rms"] = self._update_rms(self.weights, found.get("update_rms"))
            self.weights = None
        unknown = torch.full_like(self.counts, math.nan)
        return torch.stack([found.get(name, unknown).to(self.device, torch.float32) for name in COLUMNS])

    def _measure(self) -> dict[str, Tensor]:
        groups = self.optimizer.param_groups
        dense = [[p for p in group["params"] if _dense(p)] for group in groups]
        work = [bucket for params in dense for bucket in buckets(params, choose=Choice(None))]
        layouts = [bucket.layout for bucket in work]
        found = lockstep([_norms(bucket) for bucket in work], lambda requests: combine(requests, layouts))
        numbers = in_param_order(groups, [(bucket.params, one) for bucket, one in zip(work, found, strict=True)])
        scale = getattr(self.optimizer, "grad_scale", None)  # a GradScaler leaves the unscaling to fused optimizers
        return numbers if scale is None else {name: vector / scale for name, vector in numbers.items()}

    # ---- samples ----

    def _sampled(self, tensors: Iterable[Tensor | None]) -> Tensor:
        """The sampled entries ``[k, samples]`` in fp32, NaN for a tensor that is not there."""
        absent = torch.full((self.sums.shape[1],), math.nan, device=self.device)
        taken = [
            absent if x is None or x.is_sparse or x.is_complex() or not len(where) else torch.take(local(x), where)
            for x, where in zip(tensors, self.where, strict=True)
        ]
        return torch.stack([x.to(absent) for x in taken])

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

    def weight_rms(self) -> Tensor:
        """Root mean square of each whole parameter, ``[k]`` in fp32: one pass over the weights."""
        layouts = [Layout.of(p) for p in self.params]
        weights = [local(p.detach()) for p in self.params]
        weights = [torch.view_as_real(w) if w.is_complex() else w for w in weights]
        norms = [torch.linalg.vector_norm(w, dtype=state_dtype(w)) for w in weights]
        asked: dict[int, tuple[Combine, ...]] = {
            i: (Combine("sum", norm.square().reshape(1)),) for i, norm in enumerate(norms)
        }
        combine(asked, layouts)
        sums = [one.values if one.answer is None else one.answer for (one,) in asked.values()]
        sizes = self.counts.new_tensor([max(p.numel(), 1) for p in self.params])
        return (torch.cat([x.to(self.counts) for x in sums]) / sizes).sqrt()

    def agree(self, rows: Tensor) -> Tensor:
        """Rows ``[n, columns, k]`` with the scores of sharded tensors taken over all their parts."""
        layouts = [Layout.of(p) for p in self.params]
        cut = [i for i, layout in enumerate(layouts) if layout.cuts]
        gss, share = rows[:, COLUMNS.index("gss")], rows[:, COLUMNS.index("gss_share")]
        asked: dict[int, tuple[Combine, ...]] = {
            i: (Combine("max", gss[:, i].nan_to_num(nan=-1.0)), Combine("sum", share[:, i].nan_to_num(nan=0.0)))
            for i in cut
        }
        combine(asked, layouts)
        for i, (largest, summed) in asked.items():
            assert largest.answer is not None and summed.answer is not None
            gss[:, i] = torch.where(largest.answer < 0, math.nan, largest.answer)
            share[:, i] = torch.where(largest.answer < 0, math.nan, summed.answer / parts(self.params[i]))
        return rows

    def state(self) -> dict[str, Any]:
        return {"sums": self.sums.clone(), "counts": self.counts.clone()}

    def load(self, state: dict[str, Any]) -> None:
        for name in ("sums", "counts"):
            if state[name].shape == getattr(self, name).shape:  # another sample size starts anew
                getattr(self, name).copy_(state[name])


def _dense(p: Tensor) -> bool:
    return p.grad is not None and not p.grad.is_sparse and not p.grad.is_complex()


def _norms(bucket: Bucket) -> Steps[dict[str, Tensor]]:
    """Largest entry and norm of each gradient; Inf for a largest entry that is none."""
    grads = yield Gradients.measure(bucket.grads, bucket.dtype, kernels=bucket.kernels)
    grads = yield grads.with_norms()
    return {"grad_max": grads.peak, "grad_norm": grads.norms.raw}
