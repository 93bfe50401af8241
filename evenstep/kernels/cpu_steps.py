"""Whole steps on a CPU: one call of cpu.cpp for all tensors of a bucket, the numbers of whole tensors included.

After a step has swept every cache, each small operation between two kernels costs ten times what it does otherwise;
with them a step over 60M parameters took 4 to 7 ms longer.
"""

import numpy as np
import torch
from torch import Tensor

from evenstep.kernels.cpu_ops import call, job_table, written
from evenstep.kernels.interface import STATS, WHOLE, WholeStep, opened


def adam_step_(work: WholeStep, how: dict[str, float | Tensor]) -> Tensor:
    """See `evenstep.kernels.interface.Kernels`."""
    jobs, moments = _jobs(work)
    options = _numbers([how.get(name, 0.0) for name in WHOLE])
    kept = np.array(list(map(Tensor.data_ptr, work.kept)), dtype=np.int64)
    stats = torch.empty(len(STATS), len(work.params), dtype=torch.float32, device="cpu")
    call("step", jobs, options, kept, stats)
    written(work.params, moments, work.lost, work.kept)
    return stats


def scale_step_(
    work: WholeStep, sign: float, lr: float | Tensor, decay: float, momentum: float, norm: str, by: str, floor: float
) -> Tensor:
    """See `evenstep.kernels.interface.Kernels`."""
    jobs, moments = _jobs(work)
    stats = torch.empty(len(STATS), len(work.params), dtype=torch.float32, device="cpu")
    call("scale", jobs, _numbers([sign, lr, decay, momentum, norm == "rms", by == "columns", floor]), stats)
    written(work.params, moments, work.lost)
    return stats


def _numbers(given: list[float | Tensor]) -> np.ndarray | Tensor:
    """As fp64, side by side. 0-d tensors are not read here: a clock that lives on a device stays there."""
    if not any(isinstance(x, Tensor) for x in given):
        return np.array(given, dtype=np.float64)
    return torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in given])


def _jobs(work: WholeStep) -> tuple[np.ndarray, list[Tensor]]:
    """The table of jobs, and all tensors that hold moments."""
    m, m_scales, m_map = opened(work.exp_avg)
    v, v_scales, v_map = opened(work.exp_avg_sq)
    k = len(work.params)
    given = (work.grads, work.params, m, v, m_scales, v_scales, m_map * k, v_map * k)
    return job_table(*given, work.masks, work.lost, work.seeds), [*m, *v, *m_scales, *v_scales]
