"""Fused steps on a CPU: cpu*.cpp, compiled once per instruction set, called with the addresses of tensors.

One call updates all tensors of a group, whole-tensor statistics included. After a step has swept every cache, each
small operation between two kernels costs ten times what it does otherwise: with them a step over 60M parameters took 4
to 7 ms longer.

None of the functions is a torch operator: addresses are right only where tensors are those that the user holds, and a
compiler works on copies. Compiled steps take the plain code.
"""

import ctypes
import functools
import importlib.machinery
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evenstep.kernels.interface import PLAIN, STATS, STEP_OPTIONS, Measured, StepTensors, Unavailable, is_coded, opened

# ---- the builds of the C++ code: the best one that this processor runs is loaded on first use ----

BUILDS = ("avx512", "avx2", "default")
"""Instruction sets, best first."""

FORCE = "EVENSTEP_CPU_KERNELS"
"""Environment variable that names a build, or ``none``."""

FIELDS = 18
"""Of ``struct Job`` in cpu_threads.h."""


def built() -> list[str]:
    """The builds that this installation carries, best first."""
    return [name for name in BUILDS if _file(name)]


def _file(name: str) -> Path | None:
    home = Path(__file__).parent
    found = (home / f"_cpu_{name}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in found if path.exists()), None)


def usable() -> list[str]:
    """The builds among them that this processor can run, best first."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    level = next((i for i, name in enumerate(BUILDS) if name == capability), len(BUILDS) - 1)
    return [name for name in built() if BUILDS.index(name) >= level]


def forced() -> str | None:
    """What the environment asks for, if anything."""
    return os.environ.get(FORCE) or None


def chosen() -> str:
    """The build that serves. Raises `Unavailable`."""
    wanted = forced()
    if wanted == "none":
        raise Unavailable(f"{FORCE}=none is set")
    if not built():
        raise Unavailable("this installation was built without a C++ compiler; install one and reinstall evenstep")
    candidates = usable()
    if wanted:
        if wanted not in candidates:
            raise Unavailable(f"{FORCE}={wanted} is set; here are {', '.join(candidates) or 'none'} (and 'none')")
        return wanted
    if not candidates:
        raise Unavailable(f"this processor runs none of the builds here ({', '.join(built())})")
    return candidates[0]


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded build. Raises `Unavailable`."""
    path = _file(chosen())
    try:
        loaded = ctypes.CDLL(str(path))
        loaded.evenstep_block.restype = loaded.evenstep_job_fields.restype = ctypes.c_int64
        loaded.evenstep_threaded.restype = ctypes.c_int64
        loaded.evenstep_compiler.restype = ctypes.c_char_p
    except (OSError, AttributeError) as problem:
        raise Unavailable(f"{path} does not load ({problem}); reinstall evenstep") from None
    if loaded.evenstep_job_fields() != FIELDS:
        raise Unavailable(f"{path} is of another version; reinstall evenstep")
    os.register_at_fork(after_in_child=_after_fork)
    return loaded


_forked = False


def _after_fork() -> None:
    # The pool of OpenMP's threads stays with the parent, and waiting for it would never end.
    global _forked
    _forked = True


def threads() -> int:
    """As many as torch uses; one in a forked process."""
    return 1 if _forked or not threaded() else torch.get_num_threads()


def threaded() -> bool:
    """Whether the build shares work among threads."""
    return bool(library().evenstep_threaded())


def compiler() -> str:
    """What built the library."""
    name: bytes = library().evenstep_compiler()
    return name.decode()


# ---- calls ----

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
    """The table of ``struct Job`` in cpu_threads.h, a row per tensor. Empty tensors have the address 0."""
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


def _jobs(tensors: StepTensors) -> tuple[np.ndarray, list[Tensor]]:
    """The table of jobs, and all tensors that hold moments."""
    m, m_scales, m_map = opened(tensors.exp_avg)
    v, v_scales, v_map = opened(tensors.exp_avg_sq)
    k = len(tensors.params)
    given = (tensors.grads, tensors.params, m, v, m_scales, v_scales, m_map * k, v_map * k)
    return job_table(*given, tensors.masks, tensors.lost, tensors.seeds), [*m, *v, *m_scales, *v_scales]


def _numbers(values: list[float | Tensor]) -> np.ndarray | Tensor:
    """As one fp64 vector. 0-d tensors are not read here: a learning rate that is a tensor stays one."""
    if not any(isinstance(x, Tensor) for x in values):
        return np.array(values, dtype=np.float64)
    return torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in values])


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uninitialised; device and dtype are explicit, since torch's defaults may be others."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _vectors(grads: Sequence[Tensor], count: int) -> list[Tensor]:
    return [_empty(len(grads)) for _ in range(count)]


def _mark_written(*lists: Sequence[Tensor]) -> None:
    """Let autograd know, so that it refuses a backward pass through values that have changed."""
    for tensors in lists:
        torch.autograd.graph.increment_version(tensors)


# ---- the set of kernels ----

_SERVED = frozenset({torch.float32, torch.bfloat16})


class CpuKernels:
    """`evenstep.kernels.interface.Kernels` for the CPU. Raises `Unavailable`."""

    def __init__(self) -> None:
        library()
        self.name = f"cpu {chosen()}"

    def serves_all(self, tensors: list[Tensor]) -> bool:
        return (
            PLAIN.issuperset(map(type, tensors))
            and _SERVED.issuperset([x.dtype for x in tensors])
            and all(x.is_cpu for x in tensors)
            and all(map(Tensor.is_contiguous, tensors))
        )

    def refusal(self, p: Tensor, g: Tensor, *states: Tensor) -> str | None:
        for x in (p, g, *states):  # asked for every tensor of every step: the common case first
            if type(x) not in PLAIN or x.dtype not in _SERVED or not x.is_contiguous() or not x.is_cpu:
                return self._reason(p, g, *states)
        return None

    def _reason(self, p: Tensor, g: Tensor, *states: Tensor) -> str | None:
        for what, x in (("parameter", p), ("gradient", g), *(("state", x) for x in states)):
            if not x.is_cpu:
                return f"its {what} is on {x.device}"
        for what, x in (("parameter", p), ("gradient", g)):
            if type(x) not in PLAIN:
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

    def adam_step_(self, tensors: StepTensors, options: dict[str, float | Tensor]) -> Tensor:
        jobs, moments = _jobs(tensors)
        scalars = np.array(list(map(Tensor.data_ptr, tensors.scalars)), dtype=np.int64)
        stats = _empty(len(STATS), len(tensors.params))
        call("step", jobs, _numbers([options.get(name, 0.0) for name in STEP_OPTIONS]), scalars, stats)
        _mark_written(tensors.params, moments, tensors.lost, tensors.scalars)
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
        jobs, moments = _jobs(tensors)
        stats = _empty(len(STATS), len(tensors.params))
        call("scale", jobs, _numbers([sign, lr, decay, momentum, norm == "rms", by == "columns", floor]), stats)
        _mark_written(tensors.params, moments, tensors.lost)
        return stats

    def measure(self, grads: list[Tensor]) -> Measured:
        size = library().evenstep_block()
        count = sum(-(-g.numel() // size) for g in grads)
        peak, norm, block_peak, block_squares = *_vectors(grads, 2), _empty(count), _empty(count, dtype=torch.float64)
        call("measure", job_table(grads), peak, norm, block_peak, block_squares)
        return Measured(peak, norm, (block_peak, block_squares))

    def clip_norms(
        self, grads: list[Tensor], measured: Measured, limit: Tensor, rescale: Tensor
    ) -> tuple[Tensor, Tensor]:
        norm, count = _vectors(grads, 2)
        limits = limit.float().contiguous(), rescale.float().contiguous()
        call("clip_norms", job_table(grads), *measured.blocks, *limits, norm, count)
        return norm, count

    def transform(self, out: list[Tensor], grads: list[Tensor], numbers: Tensor) -> None:
        call("transformed", job_table(grads, out), numbers.contiguous())
        _mark_written(out)
