"""What a set of fused kernels offers, on any device.

A kernel is the twin of one function of `evenstep.transforms`: the same equation in one pass over memory, for all
tensors of a step in one call. Numbers of whole tensors (limits, gains, step sizes) are made by the plain code and come
here as one table; kernels only touch the large tensors. A set of kernels serves the tensors that it does not refuse;
the others take the plain way.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter


class Unavailable(Exception):
    """Why there are no kernels here, in one line."""


ROWS = (
    "finite",  # 1, or 0 for a tensor whose gradient is not finite: nothing of it is written, its results are 0
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
"""Rows of the table of numbers, fp32 ``[len(ROWS), k]`` on the device of the tensors, a column per tensor."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one pass over gradients found: vectors ``[k]`` in fp32, and the numbers of blocks for the next pass."""

    peak: Tensor
    """Largest absolute entry, Inf where any entry is not finite."""
    norm: Tensor
    """2-norm, right to 1e-6 for entries of any size; not finite where an entry is not."""
    blocks: tuple[Tensor, ...]
    """Maxima and square sums of blocks; how they lie is the kernels' own affair."""


@dataclass(frozen=True, slots=True)
class AdamWork:
    """What Adam's kernel works on: lists of ``k`` tensors (or parts that are here), and the table of numbers."""

    params: list[Tensor]
    """fp32 or bf16, written."""
    grads: list[Tensor]
    """fp32 or bf16, read."""
    exp_avg: list[Tensor]
    """fp32, bf16 or torchao's 8-bit blocks, written; compact where there is a mask."""
    exp_avg_sq: list[Tensor]
    numbers: Tensor
    """See `ROWS`."""
    masks: list[Tensor] = field(default_factory=list)
    """Empty, or a uint8 tensor of packed bits per tensor (bit i of byte j: entry 8 j + i is trained), without entries
    for a dense tensor.
    """
    lost: list[Tensor] = field(default_factory=list)
    """Kahan's compensation in the parameter's dtype, one per tensor, or empty."""
    seeds: list[Tensor] = field(default_factory=list)
    """0-d int32 for stochastic rounding (`evenstep.transforms.rounding`), one per tensor, or empty."""
    capped: bool = False
    """Clip by `cap_factor`."""
    zero_history: bool = False
    """An entry whose cap is 0 becomes 0; otherwise it has no cap."""
    measured: Measured | None = None
    """What was measured before, for kernels that can make use of it."""


@dataclass(frozen=True, slots=True)
class AdamFound:
    """What came of it, vectors ``[k]`` in fp32."""

    update_norm: Tensor
    """2-norm of each update, without the decay."""
    clipped_norm: Tensor
    """2-norm after SPAM's clipping (of ``gain * g``), where ``capped``."""
    clipped: Tensor
    """Entries that it changed."""


RATES = (
    "finite",  # as in `ROWS`
    "gain",
    "keep",  # what the average gradient is multiplied by, and the gradient on its way into it
    "add",
    "rate",  # parameter <- parameter * shrink - rate * direction
    "shrink",
    "root",  # a row's 2-norm is divided by it: the root of the number of entries for the RMS, 1 for the 2-norm
)
"""Rows of SCALE's table of numbers, fp32 ``[len(RATES), k]``."""


@dataclass(frozen=True, slots=True)
class RowWork:
    """What SCALE's kernel works on: ``k`` tensors of 2 or more dimensions, each row (all dimensions but the first)
    divided by its own norm, or each column by the one given.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avg: list[Tensor]
    """The average gradient, which then is what gets normalised; empty for none."""
    divisors: list[Tensor]
    """fp32, the shape of one row: what each column is divided by; empty where rows are divided by their own norms."""
    numbers: Tensor
    """See `RATES`."""
    floor: float
    """Smallest norm that a row is divided by (after ``root``)."""
    lost: list[Tensor] = field(default_factory=list)
    seeds: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RowFound:
    """What came of it."""

    direction_norm: Tensor
    """[k] 2-norm of each normalised tensor."""


WHOLE = (
    *("sign", "lr", "beta1", "beta2", "eps", "decay", "decay_after", "warmup"),
    *("reset", "forget", "forget_after"),  # 1 or 0: the age starts anew; the moments do, before or after the update
    "eps_first",  # 1 or 0: eps enters before the bias is corrected
    *("stable", "gamma1", "gamma2", "gamma3", "one_counter"),  # AdaClip and AdaGN
    *("capped", "cap_factor", "cap_spread", "zero_history"),  # SPAM's clipping
)
"""What `Kernels.adam_step_` wants to know, the same for all tensors; 0 for what is not given."""

STATS = ("grad_max", "grad_norm", "norm_after", "clip_limit", "clipped", "gain", "update_rms", "skipped")
"""What a step tells, a row each."""


@dataclass(frozen=True, slots=True)
class WholeStep:
    """What a whole step works on: as `AdamWork`, and the scalars that are kept of each tensor."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avg: list[Tensor] = field(default_factory=list)
    exp_avg_sq: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    """0-d fp32: all tensors' ages; for Stable-SPAM then their peaks, norms, norm_rms and n. Written where a gradient is
    finite.
    """
    masks: list[Tensor] = field(default_factory=list)
    lost: list[Tensor] = field(default_factory=list)
    seeds: list[Tensor] = field(default_factory=list)


class Kernels(Protocol):
    """Fused kernels of one kind of device."""

    name: str
    """For people: ``"cpu avx2"``, ``"triton 3.4"``."""
    makes_numbers: bool
    """Whether these are `WholeKernels`."""

    def refusal(self, p: Tensor, g: Tensor, *states: Tensor) -> str | None:
        """Why a parameter (the part that is here) cannot be served, None if it can."""

    def serves_all(self, tensors: list[Tensor]) -> bool:
        """Whether all of these are whole plain tensors on one device that `refusal` has nothing against. False only
        says that it takes a closer look.
        """

    def measure(self, grads: list[Tensor]) -> Measured:
        """Largest entry and norm of each gradient, in one pass."""

    def clip_norms(
        self, grads: list[Tensor], measured: Measured, limit: Tensor, rescale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The 2-norm of each gradient after its entries above ``limit`` (``[k]``) are multiplied by ``rescale``, and
        how many there are. Only blocks that hold such an entry are read.
        """

    def adam_(self, work: AdamWork) -> AdamFound:
        """Adam's step, in place."""

    def columns(self, grads: list[Tensor]) -> tuple[Measured, list[Tensor]]:
        """`measure`, and in the same pass the squared norm of each column: fp64 in the shape of one row. Not finite
        where an entry is not.
        """

    def rows_(self, work: RowWork) -> RowFound:
        """SCALE's step on matrices, in place."""

    def transformed(self, out: list[Tensor], grads: list[Tensor], numbers: Tensor) -> None:
        """``out <- grad`` limited and scaled by ``numbers`` (fp32 ``[3, k]``: gain, limit, reduced); 0 where a gain is
        0.
        """


class WholeKernels(Kernels, Protocol):
    """Kernels that can make a whole step of tensors that are whole, on the host."""

    def adam_step_(self, work: WholeStep, how: dict[str, float | Tensor]) -> Tensor:
        """All of a step of Adam, SPAM or Stable-SPAM: what the plain code does between the kernels, too. ``how`` gives
        values of `WHOLE`. Returns `STATS`, ``[len(STATS), k]``.
        """

    def scale_step_(
        self,
        work: WholeStep,
        sign: float,
        lr: float | Tensor,
        decay: float,
        momentum: float,
        norm: str,
        by: str,
        floor: float,
    ) -> Tensor:
        """The same for SCALE's matrices, divided ``by`` the norms (``"rms"`` or ``"l2"``, at least ``floor``) of their
        ``"rows"`` or ``"columns"``.
        """


_PLAIN = frozenset({Tensor, Parameter})


def is_coded(x: Tensor) -> bool:
    """Whether ``x`` is torchao's tensor of 8-bit blocks."""
    return type(x) not in _PLAIN and hasattr(x, "codes")


def opened(moments: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Moments as plain tensors: what is stored, the scales of the coded ones (empty tensors for the others; no list
    when none is coded), and their map, if any.
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
    """A table of numbers in fp32, a row each: vectors in the shape ``[k]`` of ``like``, and 0-d tensors or floats,
    which hold for all ``k``.
    """
    return torch.stack([_row(like, row) for row in rows])


def _row(like: Tensor, row: Tensor | float) -> Tensor:
    if not isinstance(row, Tensor):
        return torch.full_like(like, row)
    if row.dim():
        return row.float()
    if row.device == like.device:
        return row.expand(like.shape).float()
    # Of the CPU, such as the learning rate: as an argument of a kernel it reaches the device without a copy.
    return torch.zeros_like(like).add_(row)
