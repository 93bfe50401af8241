"""The functions of cpu.cpp. They take lists of tensors and write a table of their addresses for the library.

None of them is a torch operator: tensors are handed over by address, which is right only where they are what the user
holds. A compiler works on copies of them, so compiled steps are made of the plain code alone.
"""

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from evenstep.kernels.cpu_library import FIELDS, library, threads

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}


def job_table(
    grads: Sequence[Tensor],
    params: Sequence[Tensor] = (),
    exp_avg: Sequence[Tensor] = (),
    exp_avg_sq: Sequence[Tensor] = (),
    m_scales: Sequence[Tensor] = (),
    v_scales: Sequence[Tensor] = (),
    m_map: Sequence[Tensor] = (),
    v_map: Sequence[Tensor] = (),
    masks: Sequence[Tensor] = (),
    lost: Sequence[Tensor] = (),
    seeds: Sequence[Tensor] = (),
) -> np.ndarray:
    """The table of cpu.cpp's struct Job, a row per tensor. Empty tensors have the address 0."""
    table = np.zeros((len(grads), FIELDS), dtype=np.int64)
    table[:, 0] = list(map(Tensor.numel, grads))
    table[:, 1] = [shape[0] if (shape := g.shape) else 1 for g in grads]
    _check_sizes(table[:, 0], params, exp_avg, exp_avg_sq, masks)
    for column, tensors in ((2, params), (3, grads), (4, exp_avg), (5, exp_avg_sq)):
        if tensors:
            table[:, column] = [_TYPES[x.dtype] for x in tensors]
    for column, tensors in (
        (6, params),
        (7, grads),
        (8, exp_avg),
        (9, exp_avg_sq),
        (10, m_scales),
        (11, v_scales),
        (12, m_map),
        (13, v_map),
        (14, masks),
        (16, lost),
        (17, seeds),
    ):
        if tensors:
            table[:, column] = list(map(Tensor.data_ptr, tensors))
    if masks:
        table[:, 15] = [m.numel() for m in exp_avg]
    return table


def _check_sizes(sizes: np.ndarray, params: Sequence[Tensor], *moments: Sequence[Tensor]) -> None:
    """ValueError where raw pointers would lead out of a tensor. The last of ``moments`` are masks, with whose entries
    moments are compact."""
    *moments, masks = moments  # type: ignore[assignment]
    bits = np.array(list(map(Tensor.numel, masks)), dtype=np.int64)
    dense = bits == 0 if masks else True
    if masks and ((bits != -(-sizes // 8)) & ~dense).any():
        i = int(((bits != -(-sizes // 8)) & ~dense).argmax())
        raise ValueError(f"a gradient has {sizes[i]} entries, its mask is one of {bits[i]} bytes")
    for what, tensors, looked_at in (("its parameter", params, True), *(("a moment", m, dense) for m in moments)):
        if not tensors:
            continue
        found = np.array(list(map(Tensor.numel, tensors)), dtype=np.int64)
        wrong = (found != sizes) & looked_at
        if wrong.any():
            i = int(wrong.argmax())
            raise ValueError(
                f"a gradient has {sizes[i]} entries, {what} {found[i]}: parameters keep the size they were given with"
            )


def call(function: str, jobs: np.ndarray, *arguments: Tensor | np.ndarray | int | float) -> None:
    """Tensors and arrays go by address, integers as 64 bits, floats as fp32."""
    # Threads cost more than they bring for what fits a cache.
    several = threads() if jobs[:, 0].sum() > 1 << 16 else 1
    getattr(library(), f"evenstep_{function}")(
        ctypes.c_void_p(jobs.ctypes.data),
        ctypes.c_int64(len(jobs)),
        ctypes.c_int64(several),
        *(_argument(x) for x in arguments),
    )


def _argument(x: Tensor | np.ndarray | int | float) -> object:
    if isinstance(x, Tensor):
        return ctypes.c_void_p(x.data_ptr())
    if isinstance(x, np.ndarray):
        return ctypes.c_void_p(x.ctypes.data)
    return ctypes.c_float(x) if isinstance(x, float) else ctypes.c_int64(x)


def _empty(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Told device and dtype, whatever torch's defaults are."""
    return torch.empty(n, dtype=dtype, device="cpu")


def _vectors(grads: Sequence[Tensor], count: int) -> list[Tensor]:
    return [_empty(len(grads)) for _ in range(count)]


def _blocks(grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    size = library().evenstep_block()
    count = sum(-(-g.numel() // size) for g in grads)
    return _empty(count), _empty(count, torch.float64)


def written(*several: Sequence[Tensor]) -> None:
    """Let autograd know: it refuses a backward pass through what has changed since."""
    for tensors in several:
        torch.autograd.graph.increment_version(tensors)


def measure(grads: list[Tensor]) -> tuple[Tensor, ...]:
    found = (*_vectors(grads, 2), *_blocks(grads))
    call("measure", job_table(grads), *found)
    return found


def clip_norms(
    grads: list[Tensor], block_peak: Tensor, block_squares: Tensor, limit: Tensor, rescale: Tensor
) -> tuple[Tensor, ...]:
    found = _vectors(grads, 2)
    call("clip_norms", job_table(grads), block_peak, block_squares, limit.contiguous(), rescale.contiguous(), *found)
    return tuple(found)


def adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    m_scales: list[Tensor],
    v_scales: list[Tensor],
    m_map: list[Tensor],
    v_map: list[Tensor],
    masks: list[Tensor],
    lost: list[Tensor],
    seeds: list[Tensor],
    numbers: Tensor,
    capped: bool,
    zero_history: bool,
    block_peak: Tensor | None,
) -> list[Tensor]:
    jobs = job_table(
        grads,
        params,
        exp_avg,
        exp_avg_sq,
        m_scales,
        v_scales,
        m_map * len(grads),
        v_map * len(grads),
        masks,
        lost,
        seeds,
    )
    found = _vectors(grads, 3)
    peaks = _empty(0) if block_peak is None else block_peak
    call("adam", jobs, numbers.contiguous(), int(capped), int(zero_history), *found, peaks)
    written(params, exp_avg, exp_avg_sq, m_scales, v_scales, lost)
    return found


def columns(grads: list[Tensor]) -> tuple[Tensor, ...]:
    lengths = [g[0].numel() if len(g) else 0 for g in grads]
    squares = _empty(sum(lengths), torch.float64).zero_()
    starts = _addresses(squares.split(lengths))
    found = _vectors(grads, 2)
    call("columns", job_table(grads), starts, *found)
    return (*found, squares)


def rows_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    scales: list[Tensor],
    map: list[Tensor],
    divisors: list[Tensor],
    lost: list[Tensor],
    seeds: list[Tensor],
    numbers: Tensor,
    floor: float,
) -> Tensor:
    jobs = job_table(grads, params, exp_avg, m_scales=scales, m_map=map * len(grads), lost=lost, seeds=seeds)
    dividing = _addresses(divisors) if divisors else np.zeros(len(grads), dtype=np.int64)
    [direction_norm] = _vectors(grads, 1)
    call("rows", jobs, numbers.contiguous(), dividing, float(floor), direction_norm)
    written(params, exp_avg, scales, lost)
    return direction_norm


def transformed_(out: list[Tensor], grads: list[Tensor], numbers: Tensor) -> None:
    call("transformed", job_table(grads, out), numbers.contiguous())
    written(out)


def _addresses(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.array([x.data_ptr() for x in tensors], dtype=np.int64)
