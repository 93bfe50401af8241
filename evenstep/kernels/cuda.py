"""Fused steps on CUDA devices: the part of a step that runs on the host.

A step reads the gradients twice, since the update of an entry needs statistics of the whole tensor:

1. A kernel measures the largest entry and the norm of each chunk of a tensor (triton_flat.py, triton_rows.py).
2. For Stable-SPAM a kernel computes AdaClip's limits (triton_numbers.py), and another measures the norms after
   clipping; it reads only chunks with a clipped entry.
3. A kernel computes gains and step sizes, and writes the scalars of the state (triton_numbers.py).
4. A kernel updates parameters and moments.
5. A kernel adds up the statistics that step 4 has measured.

All of them serve all tensors that are alike, so a step is a few launches (cuda_launch.py). Nothing waits for the
device, and no code branches on a value of it.

Importing this file needs torch alone; triton, which comes with CUDA builds of torch, is imported by the first launch.
The kernels also run in Triton's interpreter (``TRITON_INTERPRET=1`` before triton is imported), on CPU tensors and
slowly.
"""

import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evenstep.kernels.interface import (
    SCALE_OPTIONS,
    STEP_OPTIONS,
    Measured,
    StepTensors,
    Unavailable,
    all_plain,
    capturing,
    constant,
    is_coded,
    is_plain,
)

CODED = 256  # entries per scale of torchao's 8-bit blocks
FLOATS = (torch.float32, torch.bfloat16)
_SERVED = frozenset(FLOATS)


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

    Parameters and gradients are fp32 or bf16; moments are fp32, bf16 or 8-bit, or compact under a mask. Tensors that
    are alike in dtypes and alignment share a launch. Raises `Unavailable` without triton.
    """

    name: str

    def __init__(self) -> None:
        if importlib.util.find_spec("triton") is None:
            raise Unavailable("triton is not installed (it comes with CUDA builds of torch; else pip install triton)")
        self.name = f"triton {_version()}"

    def serves_all(self, tensors: list[Tensor]) -> bool:
        """See `Kernels.serves_all`: plain, contiguous fp32 and bf16 tensors on one device. 8-bit moments and masks take
        the slow way."""
        # Each condition is one pass over all tensors. Their sizes are compared by `adam_job` (cuda_launch.py).
        device = tensors[0].device
        return (
            all_plain(tensors)
            and _refused(device) is None
            and {x.dtype for x in tensors} <= _SERVED
            and all(x.device == device for x in tensors)
            and all(map(Tensor.is_contiguous, tensors))
        )

    def refusal(self, p: Tensor, g: Tensor, *states: Tensor) -> str | None:
        """See `Kernels.refusal`. Refused are old GPUs, other dtypes, subclasses, strided tensors."""
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
            # Moments under a mask are smaller; `adam_job` (cuda_launch.py) knows the masks, and compares all sizes.
            if is_coded(x):
                if x.numel() != p.numel():
                    return "its 8-bit state is compact"
                if x.codes.numel() != x.scale.numel() * CODED:  # type: ignore[attr-defined]
                    return f"8-bit states come in blocks of {CODED}"
            elif x.dtype not in FLOATS or not is_plain(x):
                return f"its {what} is {type(x).__name__} of {_short(x.dtype)}"
            if not (x.codes if is_coded(x) else x).is_contiguous():  # type: ignore[attr-defined]
                return f"its {what} is not contiguous"
        return None

    # ---- whole steps ----

    def adam_step_(self, tensors: StepTensors, options: dict[str, float | Tensor]) -> Tensor:
        """A whole step of Adam, SPAM or Stable-SPAM: four to eight launches for tensors that are alike; see
        `Kernels.adam_step_`.
        """
        values = _vector(STEP_OPTIONS, [options.get(name, 0.0) for name in STEP_OPTIONS], tensors.params[0].device)
        # The self-check of an optimizer class covers what the flags select, which is compiled in.
        flags = [bool(options.get(name, 0.0)) for name in ("stable", "capped", "zero_history")]
        stats: Tensor = launches().adam_step_(tensors, values, *flags)
        _mark_written(tensors)
        return stats

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
        """A whole step of SCALE's matrices: four to six launches for matrices that are alike; see
        `Kernels.scale_step_`.
        """
        values = _vector(SCALE_OPTIONS, [sign, lr, decay, momentum], tensors.params[0].device)
        stats: Tensor = launches().scale_step_(tensors, values, norm == "rms", by == "columns", floor)
        _mark_written(tensors)
        return stats

    # ---- reading gradients ----

    def measure(self, grads: list[Tensor]) -> Measured:
        """See `Kernels.measure`."""
        totals, known = launches().measure(grads)
        return Measured(totals[0], totals[1], known)

    def clip_norms(
        self, grads: list[Tensor], measured: Measured, limit: Tensor, rescale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Kernels.clip_norms`."""
        norm, count = launches().clip_norms(grads, measured.blocks, limit, rescale)
        return norm, count

    def transform(
        self, out: list[Tensor], grads: list[Tensor], numbers: Tensor, columns: Sequence[int] | None = None
    ) -> None:
        """See `Kernels.transform`."""
        launches().transformed_(out, grads, numbers, range(len(grads)) if columns is None else columns)
        torch.autograd.graph.increment_version(out)

    # ---- transforms before another optimizer ----
    #
    # The numbers of whole tensors, in one launch instead of a dozen or more operators on short vectors.

    def adaclip(
        self, peak: Tensor, gain: Tensor, ema: Tensor, n: Tensor, gamma3: float | Tensor, robust: bool
    ) -> Tensor:
        """`evenstep.optim.functional.adaclip` on vectors ``[k]``: ``[3, k]`` with the limit, the rescale and T."""
        settings = _vector(("gamma3", "robust"), [gamma3, robust], peak.device)
        out: Tensor = launches().adaclip(*_fp32(peak, gain, ema, n), settings)
        return out

    def adagn(
        self,
        raw: Tensor,
        norm: Tensor,
        gain: Tensor,
        finite: Tensor,
        ema: Tensor,
        rms: Tensor,
        n: Tensor,
        options: list[float | Tensor],
    ) -> tuple[Tensor, Tensor]:
        """`evenstep.optim.functional.adagn` on vectors ``[k]``, of the norms before all transforms and after clipping:
        ``[3, k]`` with the gain, mu and sqrt(nu); and the tensors that count (bool ``[k]``). ``options``: gamma1,
        gamma2, eps, robust."""
        settings = _vector(("gamma1", "gamma2", "eps", "robust"), options, gain.device)
        vectors = _fp32(raw, norm, gain, ema, rms, n)
        out: tuple[Tensor, Tensor] = launches().adagn(*vectors, finite.contiguous(), settings)
        return out

    def scalars(self, tensors: list[Tensor]) -> Tensor | None:
        """The addresses of 0-d tensors on one device, for `read` and `keep`; None where they are not all fp32."""
        if not all_plain(tensors) or {x.dtype for x in tensors} != {torch.float32}:
            return None
        at: Tensor = launches().scalars(tensors)
        return at

    def read(self, at: Tensor) -> Tensor:
        """The values of the scalars ``at``, a vector."""
        values: Tensor = launches().read_scalars(at)
        return values

    def keep(self, at: Tensor, new: list[Tensor], finite: Tensor) -> None:
        """Write the vectors ``new`` to the scalars ``at [(1 + len(new)) k]`` where ``finite`` (bool ``[k]``) holds, and
        add 1 to the first ``k`` of them where it does not."""
        rows = torch.stack(new).float() if new else torch.empty(0, dtype=torch.float32, device=finite.device)
        launches().keep_scalars(at, rows, finite)

    # ---- undoing a step of another optimizer ----

    def save_unless(self, flags: Tensor, places: list[int], tensors: list[Tensor]) -> Any:
        """Copy tensors whose flag is False. ``flags``: a vector of bools on the device, not read on the host;
        ``places``: where the flag of each tensor is. The result reserves memory for all of them, and names those that
        are not served in ``left_out``."""
        return launches().save_unless(flags, places, tensors)

    def restore_unless(self, saved: Any) -> None:
        """Write the copies that `save_unless` has made back into their tensors."""
        launches().restore_unless(saved)


# Options that schedules and resets change from step to step.
_CHANGING = frozenset(
    "lr beta1 warmup reset forget forget_after gamma1 cap_factor cap_spread".split()  # noqa: SIM905
)
# The vector of the other options, by identity -> itself, a copy with all options, and its values of those that change.
_vectors: dict[tuple[int, torch.device], tuple[Tensor, Tensor, dict[int, float]]] = {}


def _vector(names: tuple[str, ...], values: list[float | Tensor], device: torch.device) -> Tensor:
    """``values`` as one fp64 vector on the device. Nothing is copied there after the first step: values that have
    changed are filled in, and tensors, such as a learning rate that a captured graph reads, are added on the device."""
    changing = {i: x for i, x in enumerate(values) if names[i] in _CHANGING or isinstance(x, Tensor)}
    fixed = [0.0 if i in changing else float(x) for i, x in enumerate(values)]
    given = constant(fixed, torch.float64, device)
    if capturing(device) or any(isinstance(x, Tensor) for x in changing.values()):
        vector, present = given.clone(), dict.fromkeys(changing, 0.0)
    else:
        # `given` is one object while its values, device and stream stay the same; the entry keeps it alive.
        entry = _vectors.get((id(given), device))
        if entry is None or entry[0] is not given:
            if len(_vectors) >= 64:
                _vectors.clear()
            entry = _vectors[id(given), device] = (given, given.clone(), dict.fromkeys(changing, 0.0))
        _, vector, present = entry
    for i, x in changing.items():
        if isinstance(x, Tensor):  # a 0-d tensor of the CPU reaches the device as an argument of the operator
            vector[i].add_(x.reshape(()))
        elif present[i] != x:
            vector[i].fill_(x)
            present[i] = float(x)
    return vector


def _fp32(*vectors: Tensor) -> list[Tensor]:
    return [x.float().contiguous() for x in vectors]


def _mark_written(tensors: StepTensors) -> None:
    """Let autograd know, so that it refuses a backward pass through values that have changed."""
    for written in (tensors.params, tensors.lost, tensors.scalars):
        torch.autograd.graph.increment_version(written)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
