"""The calling convention of fused steps, and small vectors on a device.

A *fused step* updates all parameters of one group in one call: C++ on a CPU (cpu.py), Triton on CUDA (cuda.py). Both
take the same arguments (`Kernels`). Parameters that a set of kernels refuses take the plain code of
`evenstep.optim.functional`, which is the reference that the kernels are tested against.

`stabilize` and the telemetry read gradients outside of a step; for them kernels also offer `measure`, `clip_norms` and
`transform`.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter


class Unavailable(Exception):
    """There are no kernels on this machine. The message says why, in one line."""


STEP_OPTIONS = (
    # -1 to ascend; learning rate, weight decay before (or after) the update, SPAM's re-warm-up factor on the update.
    *("sign", "lr", "beta1", "beta2", "eps", "decay", "decay_after", "warmup"),
    *("reset", "forget", "forget_after"),  # 1 or 0: restart the age; clear the moments before, or after the update
    "eps_first",  # 1 or 0: eps enters before the bias is corrected
    # 1 or 0: apply AdaClip and AdaGN, with their decays; bound what enters their means (robust); let n restart with the
    # age (published code).
    *("stable", "gamma1", "gamma2", "gamma3", "robust", "one_counter"),
    # 1 or 0: clip as SPAM, |g| <= sqrt(cap_factor * v) + cap_spread; clip entries with v = 0 to 0 (published code).
    *("capped", "cap_factor", "cap_spread", "zero_history"),
)
"""Options of `Kernels.adam_step_`, the same for all tensors of a call; an option that is not given is 0. The order is
that of ``struct StepOptions`` in cpu_adam.h, which receives the values as one vector."""

SCALE_OPTIONS = ("sign", "lr", "decay", "momentum")
"""Numbers of `Kernels.scale_step_`, in the order in which the Triton kernels receive them."""

ADAM_SCALARS = ("age", "peak", "norm", "norm_rms", "n")
"""`StepTensors.scalars` by name, in their order; only the first is kept without AdaClip and AdaGN."""

STATS = ("grad_max", "grad_norm", "norm_after", "clip_limit", "clipped", "gain", "update_rms", "skipped")
"""Per-tensor statistics that a step returns, one row per statistic."""


@dataclass(frozen=True, slots=True)
class StepTensors:
    """The tensors of a fused step: lists with one entry for each of ``k`` parameters, in the same order.

    Hazard: kernels work on addresses. Tensors must be contiguous, whole (no shards), on one device, and none may share
    memory with another; `Kernels.refusal` rejects all else.
    """

    params: list[Tensor]
    """fp32 or bf16, written."""
    grads: list[Tensor]
    """fp32 or bf16, read."""
    exp_avg: list[Tensor] = field(default_factory=list)
    """First moments: fp32, bf16 or torchao's 8-bit blocks, written; where there is a mask, one entry per trained entry.
    Empty for SCALE without momentum."""
    exp_avg_sq: list[Tensor] = field(default_factory=list)
    """Second moments, likewise; empty for SCALE."""
    scalars: list[Tensor] = field(default_factory=list)
    """0-d fp32: the ages of all tensors; for Stable-SPAM then all peaks, norms, norm_rms and n. Written where the
    gradient is finite."""
    masks: list[Tensor] = field(default_factory=list)
    """Empty, or a uint8 tensor of packed bits for each tensor (bit i of byte j: entry 8 j + i is trained), with no
    entries for a dense tensor."""
    lost: list[Tensor] = field(default_factory=list)
    """Kahan compensation in the parameter's dtype, or empty."""
    seeds: list[Tensor] = field(default_factory=list)
    """0-d int32 seeds of stochastic rounding, or empty."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Result of one pass over ``k`` gradients: fp32 vectors ``[k]``, and sums over blocks for the next pass."""

    peak: Tensor
    """Largest absolute entry, Inf where any entry is not finite."""
    norm: Tensor
    """2-norm, accurate to 1e-6 for entries of any size; not finite where an entry is not, with Triton's kernels NaN."""
    blocks: tuple[Any, ...]
    """Maxima and square sums of blocks, from which `Kernels.clip_norms` knows the blocks that it need not read again.
    The layout is private to the kernels."""


class Kernels(Protocol):
    """Fused kernels of one kind of device.

    Methods read gradients and never write them, and wait for no device. A tensor whose gradient holds NaN or Inf keeps
    its parameter and state bit for bit. Results are the same on every run, whatever the number of threads.
    """

    name: str
    """For people: ``"cpu avx2"``, ``"triton 3.4"``."""

    def refusal(self, p: Tensor, g: Tensor, *states: Tensor) -> str | None:
        """Why a parameter with this gradient and these moments cannot be served, in words that continue "a parameter
        cannot be served:"; None if it can be."""

    def serves_all(self, tensors: list[Tensor]) -> bool:
        """Whether all of these are plain tensors on one device that `refusal` would accept. False means that each has
        to be asked about: this is the fast check, made at every step."""

    def adam_step_(self, tensors: StepTensors, options: dict[str, float | Tensor]) -> Tensor:
        """A whole step of Adam, SPAM or Stable-SPAM, in place.

        ``options``: values of `STEP_OPTIONS`; a 0-d tensor is not read on the host, so that a learning rate on a device
        stays there. Returns `STATS`, fp32 ``[len(STATS), k]``.
        """

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
        """A whole step of SCALE's matrices, in place: p <- p (1 - lr decay) - lr g / size.

        Tensors count as ``[dimension 0, rest]``. ``size`` is the ``norm`` (``"rms"`` or ``"l2"``) of each of the
        gradient's ``by`` (``"rows"`` or ``"columns"``), at least ``floor``. With moments g is the average m <- momentum
        m + (1 - momentum) g. Returns `STATS`, fp32 ``[len(STATS), k]``.
        """

    def measure(self, grads: list[Tensor]) -> Measured:
        """Largest entry and norm of each gradient, in one pass."""

    def clip_norms(
        self, grads: list[Tensor], measured: Measured, limit: Tensor, rescale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """2-norm of each gradient after its entries above ``limit`` (``[k]``) are multiplied by ``rescale``, and how
        many entries that are. Only blocks with such an entry are read."""

    def transform(
        self, out: list[Tensor], grads: list[Tensor], numbers: Tensor, columns: Sequence[int] | None = None
    ) -> None:
        """``out <- grad`` limited and scaled by ``numbers`` (fp32 ``[3, k]``: gain, limit, reduced gain); 0 where a
        gain is 0. ``columns``: the column of ``numbers`` for each gradient, where they are not all in order."""


# ---- per-tensor numbers of the Triton kernels: fp32 ``[rows, k]``, a column per tensor ----
#
# The whole-tensor part of a step (AdaClip's limit, AdaGN's gain, bias corrections) results in these factors, which are
# all that the loop over entries needs. cpu_adam.h and cpu_scale.cpp have the same ones per tensor.

ADAM_ROWS = (
    "finite",  # 1, or 0 where the gradient is not finite: nothing of the tensor is written, its results are 0
    "gain",  # what a gradient's entries are multiplied by, sign included
    "limit",  # entries above it (absolute value) are multiplied by `reduced` instead; Inf for no limit
    "reduced",
    "keep1",  # what the moments are multiplied by before the gradient enters, and the gradient on its way into them
    "keep2",
    "add1",
    "add2",
    "step_size",  # update = step_size * m / (sqrt(v) * inverse_root2 + eps)
    "inverse_root2",
    "eps",
    "shrink",  # what the parameter is multiplied by before the update is taken off
    "shrink_after",  # and after
    "after",  # what both moments are multiplied by at the end
    "cap_factor",  # SPAM's clipping: |g| <= sqrt(cap_factor * v) + cap_spread, v before this step
    "cap_spread",
)

SCALE_ROWS = (
    "finite",
    "gain",
    "keep",  # what the average gradient is multiplied by, and the gradient on its way into it
    "add",
    "rate",  # parameter <- parameter * shrink - rate * direction
    "shrink",
    "root",  # a row's 2-norm is divided by it: the root of the number of entries for the RMS, 1 for the 2-norm
)

# ---- tensors ----

PLAIN = frozenset({Tensor, Parameter})
"""Types of tensors that hold their entries themselves. A subclass may keep its numbers elsewhere, or have none."""


# Kernels take an address and know no types, so anything that is not surely plain is refused: a FakeTensor or a
# functional tensor has no memory, a DTensor's is elsewhere.


def is_plain(x: Tensor) -> bool:
    """Whether a kernel can read the entries of ``x`` at its address."""
    return type(x) in PLAIN


def all_plain(tensors: list[Tensor]) -> bool:
    """`is_plain` for all tensors, in one pass of C code."""
    return PLAIN.issuperset(map(type, tensors))


def is_coded(x: Tensor) -> bool:
    """Whether ``x`` is torchao's tensor of 8-bit blocks."""
    return type(x) not in PLAIN and hasattr(x, "codes")


def stored_moments(moments: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Moments as plain tensors, for a table with a row per tensor.

    Returns the stored numbers or codes of all; the scales of the coded ones, with empty tensors for the others (an
    empty list when none is coded); and a list with the map of codes, fp32 ``[256]``, if any is coded.
    """
    coded = [x for x in moments if is_coded(x)]
    if not coded:
        return moments, [], []
    nothing = torch.empty(0, device="cpu")
    return (
        [x.codes if is_coded(x) else x for x in moments],  # type: ignore[attr-defined]
        [x.scale if is_coded(x) else nothing for x in moments],  # type: ignore[attr-defined]
        [coded[0].qmap],  # type: ignore[attr-defined]
    )


def table(like: Tensor, *rows: Tensor | float) -> Tensor:
    """fp32 ``[len(rows), k]``: vectors in the shape ``[k]`` of ``like``, and 0-d tensors or floats, repeated ``k``
    times.

    >>> table(torch.zeros(2), torch.tensor([1.0, 2.0]), 0.5)
    tensor([[1.0000, 2.0000],
            [0.5000, 0.5000]])
    """
    return torch.stack([_row(like, row) for row in rows])


def _row(like: Tensor, row: Tensor | float) -> Tensor:
    if not isinstance(row, Tensor):
        return torch.full_like(like, row)
    if row.dim():
        return row.float()
    if row.device == like.device:
        return row.expand(like.shape).float()
    # On the CPU, such as the learning rate: as an argument of a kernel it reaches the device without a copy.
    return torch.zeros_like(like).add_(row)


# ---- small vectors on a device ----
#
# ``torch.tensor(..., device="cuda")`` waits until the GPU has done all work that was queued before. The functions here
# copy a few numbers through pinned memory instead, without waiting, and cache the result.

# Pinned memory that captured CUDA graphs read again at each replay: a few KB per capture, kept for good because the end
# of a graph cannot be observed.
_CAPTURED: list[Tensor] = []


def constant(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values`` as a vector of ``dtype`` on ``device``, without waiting for the device. On a GPU the vector is cached:
    never write to it.

    >>> constant([1, 2], torch.float32, torch.device("cpu"))
    tensor([1., 2.])
    """
    if torch.compiler.is_compiling():  # fills, which a compiler fuses; a table would be copied at each step
        return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    make = _constant.__wrapped__ if capturing(device) else _constant
    return make(tuple(values), dtype, device, stream(device), _fake_mode())


@functools.lru_cache(maxsize=256)
def _constant(
    values: tuple[float, ...], dtype: torch.dtype, device: torch.device, stream: int, fake_mode: Any
) -> Tensor:
    return uploaded(torch.tensor(values, dtype=dtype, device="cpu"), device)


def uploaded(host: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor's copy on ``device``, without waiting for the device."""
    if device.type != "cuda":
        return host.to(device)
    # The tensor may be freed before the copy is done: the allocator keeps pinned memory until then. A copy that a graph
    # captured is done again at every replay, which the allocator does not know.
    host = torch.empty(host.shape, dtype=host.dtype, device="cpu", pin_memory=True).copy_(host)
    if capturing(device):
        _CAPTURED.append(host)
    return host.to(device, non_blocking=True)


# A vector is copied on one stream and may be read too early on another; one made during a capture is filled only when
# the graph is replayed. So each stream has its own, and a capture makes new ones.


def stream(device: torch.device) -> int:
    """The current stream of ``device``, as a number."""
    if device.type != "cuda" or _fake_mode() is not None:
        return 0
    # As Triton asks for it: `torch.cuda.current_stream` makes an object, which takes twenty times as long.
    index = torch.cuda.current_device() if device.index is None else device.index
    number: int = torch._C._cuda_getCurrentRawStream(index)
    return number


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on ``device``."""
    return device.type == "cuda" and _fake_mode() is None and torch.cuda.is_current_stream_capturing()


def under_observation() -> bool:
    """Whether operators do not simply run: they are traced, have no data, or a dispatch mode intercepts them.

    Values and addresses of tensors may not be read then.
    """
    return (
        torch.compiler.is_compiling()
        or torch._guards.TracingContext.try_get() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _fake_mode() -> Any:
    """The active `FakeTensorMode`, or None. Tensors that one mode made are of no use in another."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
