"""Whole steps on a CPU: one call of cpu.cpp for all tensors of a bucket, the numbers of whole tensors included.

After a step has swept every cache, each small operation between two kernels costs ten times what it does otherwise;
with them a step over 60M parameters took 4 to 7 ms longer. These functions run eagerly and are no torch operators: a
compiled step goes the way of the operators.
"""

import numpy as np
import torch
from torch import Tensor

from evenstep.kernels.cpu_ops import call, job_table, opened, written
from evenstep.kernels.interface import STATS, WHOLE, WholeStep


def adam_step_(work: WholeStep, how: dict[str, float]) -> Tensor:
    """See `evenstep.kernels.interface.Kernels`."""
    jobs, moments = _jobs(work)
    options = np.array([how.get(name, 0.0) for name in WHOLE])
    kept = np.array([x.data_ptr() for x in work.kept], dtype=np.int64)
    stats = torch.empty(len(STATS), len(work.params), dtype=torch.float32, device="cpu")
    call("step", jobs, options, kept, stats)
    written(work.params, moments, work.lost, work.kept)
    return stats


def scale_step_(
    work: WholeStep, sign: float, lr: float, decay: float, momentum: float, norm: str, by: str, floor: float
) -> Tensor:
    """See `evenstep.kernels.interface.Kernels`."""
    jobs, moments = _jobs(work)
    stats = torch.empty(len(STATS), len(work.params), dtype=torch.float32, device="cpu")
    options = (np.float64(sign), np.float64(lr), np.float64(decay), np.float64(momentum))
    call("scale", jobs, *options, int(norm == "rms"), int(by == "columns"), float(floor), stats)
    written(work.params, moments, work.lost)
    return stats


def _jobs(work: WholeStep) -> tuple[np.ndarray, list[Tensor]]:
    """The table of jobs, and all tensors that hold moments."""
    m, m_scales, m_map = opened(work.exp_avg)
    v, v_scales, v_map = opened(work.exp_avg_sq)
    k = len(work.params)
    given = (work.grads, work.params, m, v, m_scales, v_scales, m_map * k, v_map * k)
    return job_table(*given, work.masks, work.lost, work.seeds), [*m, *v, *m_scales, *v_scales]
