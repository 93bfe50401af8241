"""Fused steps on CUDA devices: the part of a step that runs on the host.

A step reads the gradients twice, since the update of an entry needs statistics of the whole tensor:

1. A kernel measures the largest entry and the norm of each tensor.
2. The functions of `evenstep.optim.functional`, those of the plain code, make limits, gains and step sizes from them:
   vectors ``[k]`` on the device, some dozens of operators on ``k`` numbers each.
3. For Stable-SPAM a kernel measures the norms after clipping; it reads only chunks with a clipped entry.
4. A kernel updates parameters and moments.

Nothing waits for the device, and no code branches on a value of it.

Importing this file needs torch alone; triton, which comes with CUDA builds of torch, is imported by the first launch.
The kernels also run in Triton's interpreter (``TRITON_INTERPRET=1`` before triton is imported), on CPU tensors and
slowly.
"""

import functools
import importlib.metadata
import importlib.util
import math
import os
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evenstep.kernels.interface import (
    ADAM_ROWS,
    SCALE_ROWS,
    STATS,
    STEP_OPTIONS,
    Measured,
    StepTensors,
    Unavailable,
    constant,
    is_coded,
    is_plain,
    stored_moments,
    table,
)

CODED = 256  # entries per scale of torchao's 8-bit blocks
FLOATS = (torch.float32, torch.bfloat16)


@functools.cache
def _refused(device: torch.device) -> str | None:
    """Why no tensor on a device can be served, None if they can."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    # ROCm builds of torch have no ``version.cuda``, and number their devices otherwise.
    if device.type != "cuda":
        return f"it is on {device.type}; the Triton kernels serve CUDA devices"
    if torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"the GPU has compute capability {major}.{minor}; the kernels need 8.0 or later"
    return None


@functools.cache
def _usual_map(signed: bool) -> bool:
    """Whether torchao's map of codes is the one whose codes `nearest_code` (triton_math.py) computes."""
    from torchao.optim.quant_utils import create_dynamic_map

    # Seven decades of 2^i values (twice as many without a sign), evenly spaced, and 0 and 1.
    counts = [2**i * (1 if signed else 2) for i in range(7)]
    values = [10.0 ** (i - 6) * (0.1 + 0.9 * (j + 0.5) / count) for i, count in enumerate(counts) for j in range(count)]
    usual = sorted([*values, *(-x for x in values if signed), 0.0, 1.0])
    return np.allclose(create_dynamic_map(signed), usual, rtol=1e-5, atol=0)


def _version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # under another name, such as pytorch-triton-rocm
        return "of an unknown version"


def launches() -> ModuleType:
    """The functions of cuda_launch.py, imported late because the import of triton is slow."""
    from evenstep.kernels import cuda_launch

    return cuda_launch


class TritonKernels:
    """`evenstep.kernels.interface.Kernels` for CUDA devices of compute capability 8.0 or later.

    Parameters and gradients are fp32 or bf16; moments are fp32, bf16 or 8-bit. Masks (sparse momentum) are refused.
    Tensors that are alike in dtypes and alignment share a launch. Raises `Unavailable` without triton.
    """

    name: str

    def __init__(self) -> None:
        if importlib.util.find_spec("triton") is None:
            raise Unavailable("triton is not installed (it comes with CUDA builds of torch; else pip install triton)")
        self.name = f"triton {_version()}"

    def serves_all(self, tensors: list[Tensor]) -> bool:
        """Always False: each tensor is asked about. The host has time for it while the device works."""
        return False

    def refusal(self, p: Tensor, g: Tensor, *states: Tensor) -> str | None:
        """See `Kernels.refusal`. Refused are old GPUs, other dtypes, compact moments, subclasses, strided tensors."""
        why = _refused(p.device)
        if why is not None:
            return why
        for what, x in (("parameter", p), ("gradient", g)):
            if x.dtype not in FLOATS:
                return f"its {what} is {_short(x.dtype)}; fp32 and bf16 are served"
        # The first moment has a sign, the second none.
        for signed, state in zip((True, False), states, strict=False):
            if is_coded(state) and (state.signed != signed or not _usual_map(signed)):  # type: ignore[attr-defined]
                return "its 8-bit state has another map of values than torchao's usual one"
        for what, x in (("parameter", p), ("gradient", g), *(("state", state) for state in states)):
            if x.device != p.device:
                return f"its {what} is on {x.device}, it on {p.device}"
            # A kernel takes the size of the parameter for all: a smaller tensor would be read beyond its end.
            if x.numel() != p.numel():
                return "its moments are compact; sparse momentum has no Triton kernel"
            if is_coded(x):
                if x.codes.numel() != x.scale.numel() * CODED:  # type: ignore[attr-defined]
                    return f"8-bit states come in blocks of {CODED}"
            elif x.dtype not in FLOATS or not is_plain(x):
                return f"its {what} is {type(x).__name__} of {_short(x.dtype)}"
            if not (x.codes if is_coded(x) else x).is_contiguous():  # type: ignore[attr-defined]
                return f"its {what} is not contiguous"
        return None

    # ---- whole steps ----

    def adam_step_(self, tensors: StepTensors, options: dict[str, float | Tensor]) -> Tensor:
        """A whole step of Adam, SPAM or Stable-SPAM: four to six launches for tensors that are alike, and operators
        on vectors ``[k]``; see `Kernels.adam_step_`.
        """
        from evenstep.optim import functional as F  # late: functional imports this package

        o: dict[str, Any] = dict.fromkeys(STEP_OPTIONS, 0.0) | options
        k, stable, capped = len(tensors.params), bool(o["stable"]), bool(o["capped"])
        # [1, k] the ages, or [5, k] for Stable-SPAM: age, T, mu, sqrt(nu), n. Copies: what is stored stays as it is
        # until it is known which tensors are finite.
        scalars = torch.stack(tensors.scalars).view(-1, k)
        age = scalars[0] * (1 - o["reset"]) + 1  # [k]; MoRet: the reset step counts as 1
        # (1) Largest entries and norms. `completed` runs the generator without all-reduces: no tensor is sharded here.
        grads = F.completed(F.Gradients.measure(tensors.grads, torch.float32, o["sign"], self))
        # (2) From here to the update all tensors are vectors [k]; see functional.py for the equations.
        if stable:
            _, peak, norm, norm_rms, n = scalars.unbind()
            n = n + 1
            # AdaClip: T_t = gamma3 T + (1 - gamma3) max|g|. (3) The norm r after clipping takes a pass over the chunks
            # with a clipped entry.
            grads, peak = F.adaclip(grads, peak, n, o["gamma3"], bool(o["robust"]))
            grads = F.completed(grads.with_norms()).within_range()
            # AdaGN: g * mu_hat / (sqrt(nu_hat) + eps) / r.
            gain, norm, norm_rms = F.adagn(
                grads.norm, norm, norm_rms, n, o["gamma1"], o["gamma2"], o["eps"], bool(o["robust"])
            )
            grads = grads.amplified(gain)
            new = [age, peak, norm, norm_rms, age if o["one_counter"] else n]
        else:  # v holds squares of entries, and one that overflows would make it Inf for good
            grads = grads.squares_within(torch.finfo(torch.float32).max)
            new = [age]
        plan = F.AdamPlan.of(
            grads.finite,
            age,
            o["forget"],
            lr=o["lr"],
            betas=(o["beta1"], o["beta2"]),
            eps=o["eps"],
            weight_decay=o["decay"],
            warmup=o["warmup"],
            eps_before_correction=bool(o["eps_first"]),
            forget_after=o["forget_after"],
            weight_decay_after=o["decay_after"],
        )
        gain, limit, reduced = grads.numbers()
        # One number per tensor for each row of ADAM_ROWS; `table` repeats those that are the same for all tensors.
        rows: dict[str, Any] = {
            "finite": grads.finite,
            "gain": gain,
            "limit": limit,
            "reduced": reduced,
            "keep1": plan.keep1,
            "keep2": plan.keep2,
            "add1": plan.add1,
            "add2": plan.add2,
            "step_size": plan.step_size,
            "inverse_root2": 1 / plan.root_bias2,  # a product per entry instead of a division
            "eps": plan.eps,
            "shrink": 1.0 if plan.shrink is None else plan.shrink,
            "shrink_after": 1.0 if plan.shrink_after is None else plan.shrink_after,
            "after": 1.0 if plan.after is None else plan.after,
            "cap_factor": o["cap_factor"],
            "cap_spread": o["cap_spread"],
        }
        exp_avg, scales, maps = stored_moments(tensors.exp_avg)
        exp_avg_sq, scales_sq, maps_sq = stored_moments(tensors.exp_avg_sq)
        # (4) Parameters and moments. All numbers travel in one table [16, k].
        update_norm, clipped_norm, clipped = launches().adam_(
            tensors.params, tensors.grads, exp_avg, exp_avg_sq, scales, scales_sq, maps, maps_sq,
            table(grads.peak, *(rows[name] for name in ADAM_ROWS)), tensors.lost, tensors.seeds,
            capped, bool(o["zero_history"]),
        )  # fmt: skip
        # A tensor that is skipped keeps its scalars. All k or 5 k of them are written by one operator.
        torch._foreach_copy_(tensors.scalars, torch.where(grads.finite, torch.stack(new), scalars).view(-1).unbind())
        _mark_written(tensors)
        sizes = _sizes(tensors.params)
        stats = F.statistics(F.completed(grads.with_norms()), sizes, update_norm)
        if capped:  # SPAM clips inside the kernel, by the history of each entry
            stats |= {"norm_after": clipped_norm, "clipped": clipped / sizes}
        return torch.stack([stats[name] for name in STATS])

    def scale_step_(
        self,
        tensors: StepTensors,
        sign: float,
        lr: float | Tensor,
        decay: float,
        momentum: float,
        norm: str,
        by: str,
        floor: float,
    ) -> Tensor:
        """A whole step of SCALE's matrices: four or five launches for matrices that are alike; see
        `Kernels.scale_step_`.
        """
        from evenstep.optim import functional as F

        shapes = [p.shape for p in tensors.params]
        # Entries that a norm is taken over, for the RMS.
        counts = [shape[0] if by == "columns" else math.prod(shape[1:]) for shape in shapes]
        divisors: list[Tensor] = []  # the norms of columns, in the shape of one row
        measured = None
        # A row's norm is taken by the program that updates the row. A column's is known only once all rows are read,
        # so columns are summed in the pass that measures.
        if by == "columns":
            measured, squares = self._columns(tensors.grads)
            divisors = [F.floored(x.sqrt().float(), n, norm) for x, n in zip(squares, counts, strict=True)]
        grads = F.completed(F.Gradients.measure(tensors.grads, torch.float32, sign, self, measured))
        # ||x|| / sqrt(count) is the RMS.
        roots = [math.sqrt(max(count, 1)) if norm == "rms" else 1.0 for count in counts]
        rows: dict[str, Any] = {
            "finite": grads.finite,
            "gain": grads.gain * sign,
            "keep": momentum,
            "add": 1 - momentum,
            "rate": lr,
            "shrink": 1 - lr * decay,  # decoupled weight decay
            "root": constant(roots, grads.peak.dtype, grads.peak.device),
        }
        exp_avg, scales, maps = stored_moments(tensors.exp_avg)
        # With moments first the average, then rows or columns of it; the numbers in one table [7, k].
        [directions] = launches().rows_(
            tensors.params, tensors.grads, exp_avg, scales, maps, divisors,
            table(grads.peak, *(rows[name] for name in SCALE_ROWS)), floor, tensors.lost, tensors.seeds,
        )  # fmt: skip
        _mark_written(tensors)
        grads = F.completed(grads.with_norms())
        stats = F.scale_statistics(grads, _sizes(tensors.params), directions, lr)
        return torch.stack([stats[name] for name in STATS])

    # ---- reading gradients ----

    def measure(self, grads: list[Tensor]) -> Measured:
        """See `Kernels.measure`."""
        totals, chunks = launches().measure(grads)
        return Measured(totals[0], totals[1], blocks=(chunks,))

    def clip_norms(
        self, grads: list[Tensor], measured: Measured, limit: Tensor, rescale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Kernels.clip_norms`."""
        norm, count = launches().clip_norms(grads, measured.blocks[0], limit, rescale)
        return norm, count

    def transform(self, out: list[Tensor], grads: list[Tensor], numbers: Tensor) -> None:
        """See `Kernels.transform`."""
        launches().transformed_(out, grads, numbers)
        torch.autograd.graph.increment_version(out)

    def _columns(self, grads: list[Tensor]) -> tuple[Measured, list[Tensor]]:
        """`measure`, and in the same pass the squared norms of columns: fp64 in the shape of one row."""
        totals, squares = launches().columns(grads)
        return Measured(totals[0], totals[1], blocks=()), squares


def _sizes(params: list[Tensor]) -> Tensor:
    """Entries of each tensor, at least 1, ``[k]``."""
    return constant([max(p.numel(), 1) for p in params], torch.float32, params[0].device)


def _mark_written(tensors: StepTensors) -> None:
    """Let autograd know, so that it refuses a backward pass through values that have changed."""
    for written in (tensors.params, tensors.lost):
        torch.autograd.graph.increment_version(written)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
