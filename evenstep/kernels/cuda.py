"""Fused kernels for CUDA devices, written in Triton: the front door, which checks.

Importing this file needs torch alone; triton, which comes with CUDA builds of torch, is imported by the first launch.
The kernels serve Triton's interpreter too (``TRITON_INTERPRET=1`` before triton is imported), which runs them on CPU
tensors, slowly.
"""

import functools
import importlib.metadata
import importlib.util
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evenstep.kernels import cuda_ops
from evenstep.kernels.cuda_tables import CODED
from evenstep.kernels.interface import AdamFound, AdamWork, Measured, RowFound, RowWork, Unavailable, is_coded

FLOATS = (torch.float32, torch.bfloat16)
PLAIN = frozenset({Tensor, torch.nn.Parameter})
"""Types of what a kernel can be given; a subclass may keep its numbers elsewhere."""
_NOTHING = torch.zeros(0)


@functools.cache
def _refused(device: torch.device) -> str | None:
    """Why no tensor on a device can be served, None if they can."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"it is on {device.type}; the Triton kernels serve CUDA devices"
    if torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"the GPU has compute capability {major}.{minor}; the kernels need 8.0 or later"
    return None


@functools.cache
def _usual_map(signed: bool) -> bool:
    """Whether torchao's values are those that `nearest_code` computes places in."""
    from torchao.optim.quant_utils import create_dynamic_map

    counts = [2**i * (1 if signed else 2) for i in range(7)]
    values = [10.0 ** (i - 6) * (0.1 + 0.9 * (j + 0.5) / count) for i, count in enumerate(counts) for j in range(count)]
    usual = sorted([*values, *(-x for x in values if signed), 0.0, 1.0])
    return np.allclose(create_dynamic_map(signed), usual, rtol=1e-5, atol=0)


def _version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # under another name, such as pytorch-triton-rocm
        return "of an unknown version"


class TritonKernels:
    """`evenstep.kernels.interface.Kernels` for CUDA devices.

    Two launches for each call and group of tensors that are alike in dtypes and alignment; results of a call are the
    same on every run. Masks (sparse momentum) are refused. Raises `Unavailable` without triton.
    """

    name: str
    makes_numbers = False
    """A tensor's gradient cannot be measured by programs that update it at the same time, and would be read twice."""

    def __init__(self) -> None:
        if importlib.util.find_spec("triton") is None:
            raise Unavailable("triton is not installed (it comes with CUDA builds of torch; else pip install triton)")
        cuda_ops.register()
        self.name = f"triton {_version()}"

    def serves_all(self, tensors: list[Tensor]) -> bool:
        return False

    def refusal(self, p: Tensor, g: Tensor, *states: Tensor) -> str | None:
        why = _refused(p.device)
        if why is not None:
            return why
        for what, x in (("parameter", p), ("gradient", g)):
            if x.dtype not in FLOATS:
                return f"its {what} is {_short(x.dtype)}; fp32 and bf16 are served"
        for signed, state in zip((True, False), states, strict=False):
            if is_coded(state) and (state.signed != signed or not _usual_map(signed)):  # type: ignore[attr-defined]
                return "its 8-bit state has another map of values than torchao's usual one"
        for what, x in (("parameter", p), ("gradient", g), *(("state", state) for state in states)):
            if x.device != p.device:
                return f"its {what} is on {x.device}, it on {p.device}"
            if x.numel() != p.numel():
                return "its moments are compact; sparse momentum has no Triton kernel"
            if is_coded(x):
                if x.codes.numel() != x.scale.numel() * CODED:  # type: ignore[attr-defined]
                    return f"8-bit states come in blocks of {CODED}"
            elif x.dtype not in FLOATS or type(x) not in PLAIN:
                return f"its {what} is {type(x).__name__} of {_short(x.dtype)}"
            if not (x.codes if is_coded(x) else x).is_contiguous():  # type: ignore[attr-defined]
                return f"its {what} is not contiguous"
        return None

    def measure(self, grads: list[Tensor]) -> Measured:
        if not grads:
            return Measured(_NOTHING, _NOTHING, ())
        found, chunks = torch.ops.evenstep.cuda_measure(grads)
        return Measured(found[0], found[1], blocks=(chunks,))

    def clip_norms(
        self, grads: list[Tensor], measured: Measured, limit: Tensor, rescale: Tensor
    ) -> tuple[Tensor, Tensor]:
        if not grads:
            return _NOTHING, _NOTHING
        if not measured.blocks:  # of `columns`, which cuts otherwise
            measured = self.measure(grads)
        found = torch.ops.evenstep.cuda_clip_norms(grads, measured.blocks[0], limit, rescale)
        return found[0], found[1]

    def adam_(self, work: AdamWork) -> AdamFound:
        if any(m.numel() != p.numel() for m, p in zip(work.exp_avg, work.params, strict=True)):
            raise ValueError("the Triton kernels have no compact moments; see refusal")
        if not work.params:
            return AdamFound(_NOTHING, _NOTHING, _NOTHING)
        exp_avg, scales, maps = _parts(work.exp_avg)
        exp_avg_sq, scales_sq, maps_sq = _parts(work.exp_avg_sq)
        found = torch.ops.evenstep.cuda_adam_(
            work.params, work.grads, exp_avg, exp_avg_sq, scales, scales_sq, maps, maps_sq, work.numbers, work.lost,
            work.seeds, work.capped, work.zero_history,
        )  # fmt: skip
        return AdamFound(found[0], found[1], found[2])

    def columns(self, grads: list[Tensor]) -> tuple[Measured, list[Tensor]]:
        if not grads:
            return Measured(_NOTHING, _NOTHING, ()), []
        found, sums = torch.ops.evenstep.cuda_columns(grads)
        return Measured(found[0], found[1], blocks=()), sums

    def rows_(self, work: RowWork) -> RowFound:
        if not work.params:
            return RowFound(_NOTHING)
        exp_avg, scales, maps = _parts(work.exp_avg)
        found = torch.ops.evenstep.cuda_rows_(
            work.params, work.grads, exp_avg, scales, maps, work.divisors, work.numbers, work.floor, work.lost,
            work.seeds,
        )  # fmt: skip
        return RowFound(found[0])

    def transformed(self, out: list[Tensor], grads: list[Tensor], numbers: Tensor) -> None:
        if out:
            torch.ops.evenstep.cuda_transformed_(out, grads, numbers)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _parts(moments: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The plain tensors of moments: stored numbers or codes of all, scales and maps of the coded ones."""
    coded: list[Any] = [m for m in moments if is_coded(m)]
    stored = [m.codes if is_coded(m) else m for m in moments]  # type: ignore[attr-defined]
    return stored, [m.scale for m in coded], [m.qmap for m in coded]
