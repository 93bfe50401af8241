"""The CPU kernels: cpu.cpp behind the interface that all kernels have."""

import torch
from torch import Tensor
from torch.nn import Parameter

from evenstep.kernels import cpu_ops, cpu_steps
from evenstep.kernels.cpu_library import chosen, library
from evenstep.kernels.interface import AdamFound, AdamWork, Measured, RowFound, RowWork, WholeStep, is_coded, opened

_PLAIN = frozenset({Tensor, Parameter})
_SERVED = frozenset({torch.float32, torch.bfloat16})


class CpuKernels:
    """See `evenstep.kernels.interface.Kernels`. Raises `Unavailable`."""

    makes_numbers = True

    def __init__(self) -> None:
        library()
        self.name = f"cpu {chosen()}"

    def serves_all(self, tensors: list[Tensor]) -> bool:
        return (
            _PLAIN.issuperset(map(type, tensors))
            and _SERVED.issuperset([x.dtype for x in tensors])
            and all(x.is_cpu for x in tensors)
            and all(map(Tensor.is_contiguous, tensors))
        )

    def refusal(self, p: Tensor, g: Tensor, *states: Tensor) -> str | None:
        for x in (p, g, *states):  # asked for every tensor of every step: the common case first
            if type(x) not in _PLAIN or x.dtype not in _SERVED or not x.is_contiguous() or not x.is_cpu:
                return self._reason(p, g, *states)
        return None

    def _reason(self, p: Tensor, g: Tensor, *states: Tensor) -> str | None:
        for what, x in (("parameter", p), ("gradient", g), *(("state", x) for x in states)):
            if not x.is_cpu:
                return f"its {what} is on {x.device}"
        for what, x in (("parameter", p), ("gradient", g)):
            if type(x) not in _PLAIN:
                return f"its {what} is a {type(x).__name__}"
            if x.dtype not in _SERVED:
                return f"its {what} is {x.dtype}; fp32 and bf16 are served"
            if not x.is_contiguous():
                return f"its {what} is not contiguous"
        for x in states:
            if is_coded(x):
                if x.block_size != 256 or x.codes.numel() != p.numel():  # type: ignore[attr-defined]
                    return "its 8-bit state is compact, or in other blocks than 256 entries"
                if len(states) == 1 and p.numel() % (256 * max(1, len(p))):
                    return "its rows, which are worked on one by one, share blocks of its 8-bit state"
            elif x.dtype not in _SERVED:
                return f"its state is {x.dtype}; fp32, bf16 and int8 are served"
            elif not x.is_contiguous():
                return "its state is not contiguous"
        return None

    def measure(self, grads: list[Tensor]) -> Measured:
        peak, norm, block_peak, block_squares = cpu_ops.measure(grads)
        return Measured(peak, norm, (block_peak, block_squares))

    def clip_norms(
        self, grads: list[Tensor], measured: Measured, limit: Tensor, rescale: Tensor
    ) -> tuple[Tensor, Tensor]:
        peaks, squares = measured.blocks
        norm, count = cpu_ops.clip_norms(grads, peaks, squares, limit.float(), rescale.float())
        return norm, count

    def adam_(self, work: AdamWork) -> AdamFound:
        m, m_scales, m_maps = opened(work.exp_avg)
        v, v_scales, v_maps = opened(work.exp_avg_sq)
        update_norm, clipped_norm, clipped = cpu_ops.adam_(
            work.params,
            work.grads,
            m,
            v,
            m_scales,
            v_scales,
            m_maps,
            v_maps,
            work.masks,
            work.lost,
            work.seeds,
            work.numbers,
            work.capped,
            work.zero_history,
            work.measured.blocks[0] if work.measured is not None else None,
        )
        return AdamFound(update_norm, clipped_norm, clipped)

    def columns(self, grads: list[Tensor]) -> tuple[Measured, list[Tensor]]:
        peak, norm, squares = cpu_ops.columns(grads)
        shapes = [(1, *g.shape[1:]) for g in grads]
        parts = squares.split([g[0].numel() if len(g) else 0 for g in grads])
        return Measured(peak, norm, ()), [x.view(shape) for x, shape in zip(parts, shapes, strict=True)]

    def rows_(self, work: RowWork) -> RowFound:
        m, m_scales, m_maps = opened(work.exp_avg)
        direction_norm = cpu_ops.rows_(
            work.params,
            work.grads,
            m,
            m_scales,
            m_maps,
            work.divisors,
            work.lost,
            work.seeds,
            work.numbers,
            work.floor,
        )
        return RowFound(direction_norm)

    def adam_step_(self, work: WholeStep, how: dict[str, float | Tensor]) -> Tensor:
        return cpu_steps.adam_step_(work, how)

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
        return cpu_steps.scale_step_(work, sign, lr, decay, momentum, norm, by, floor)

    def transformed(self, out: list[Tensor], grads: list[Tensor], numbers: Tensor) -> None:
        cpu_ops.transformed_(out, grads, numbers)
