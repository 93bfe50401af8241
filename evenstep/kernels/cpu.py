"""Fused steps on a CPU: cpu*.cpp, compiled once per instruction set, called through ctypes with addresses of tensors.

One call updates all tensors of a group, whole-tensor statistics included. A step sweeps every cache, so a small
operation between two kernels costs ten times as much as elsewhere: with the statistics in Python a step over 60M
parameters took 4 to 7 ms longer.

None of the functions is a torch operator: an address is right only where a tensor is the one that the user holds, and a
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

from evenstep.kernels.interface import (
    PLAIN,
    STATS,
    STEP_OPTIONS,
    Measured,
    StepTensors,
    Unavailable,
    all_plain,
    is_coded,
    stored_moments,
)

# ---- the builds of the C++ code: the best one that this processor runs is loaded on first use ----

# Instruction sets, best first: names of torch's `get_cpu_capability` in lower case. setup.py has the compiler's flags.
BUILDS = ("avx512", "avx2", "default")

# Environment variable that names a build, or "none" for the plain code.
FORCE = "EVENSTEP_CPU_KERNELS"

# Fields of ``struct Job`` in cpu_threads.h, in that order, 64 bits each.
JOB = (
    *("size", "rows", "p_type", "g_type", "m_type", "v_type"),
    *("p", "g", "m", "v", "m_scale", "v_scale", "m_map", "v_map", "mask", "trained", "lost", "seed"),
)


def built() -> list[str]:
    """The builds that this installation contains, best first; empty where there was no C++ compiler."""
    return [name for name in BUILDS if _file(name)]


def _file(name: str) -> Path | None:
    home = Path(__file__).parent
    found = (home / f"_cpu_{name}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in found if path.exists()), None)


def usable() -> list[str]:
    """The builds among them that this processor can run, best first."""
    # torch's capability honours ATEN_CPU_CAPABILITY too. One that is none of ours (ARM's) runs the default build.
    capability = torch.backends.cpu.get_cpu_capability().lower()
    level = next((i for i, name in enumerate(BUILDS) if name == capability), len(BUILDS) - 1)
    return [name for name in built() if BUILDS.index(name) >= level]


def forced() -> str | None:
    """The build that the environment variable names, None where it is not set or empty."""
    return os.environ.get(FORCE) or None


def chosen() -> str:
    """The name of the build to load: the one that the environment names, else the best usable one. `Unavailable` where
    there is none, or the named one cannot be used."""
    wanted = forced()
    if wanted == "none":
        raise Unavailable(f"{FORCE}=none is set")
    if not built():
        raise Unavailable("this installation was built without a C++ compiler; install one and reinstall evenstep")
    candidates = usable()
    if wanted:
        # Never silently another build: who forces one compares results or speed.
        if wanted not in candidates:
            raise Unavailable(f"{FORCE}={wanted} is set; here are {', '.join(candidates) or 'none'} (and 'none')")
        return wanted
    if not candidates:
        raise Unavailable(f"this processor runs none of the builds here ({', '.join(built())})")
    return candidates[0]


@functools.cache
def library() -> ctypes.CDLL:
    """The shared library of the chosen build, loaded once. `Unavailable` where there is none, or it does not fit this
    version of evenstep."""
    path = _file(chosen())
    try:
        # CDLL releases the GIL during a call, so other Python threads run while a step does. ctypes takes the result of
        # a function to be a C int unless told.
        loaded = ctypes.CDLL(str(path))
        loaded.evenstep_block.restype = loaded.evenstep_job_fields.restype = ctypes.c_int64
        loaded.evenstep_threaded.restype = ctypes.c_int64
        loaded.evenstep_compiler.restype = ctypes.c_char_p
    except (OSError, AttributeError) as problem:
        raise Unavailable(f"{path} does not load ({problem}); reinstall evenstep") from None
    # An older library would read the table of jobs with other columns, and write to wrong addresses.
    if loaded.evenstep_job_fields() != len(JOB):
        raise Unavailable(f"{path} is of another version; reinstall evenstep")
    os.register_at_fork(after_in_child=_after_fork)
    return loaded


_forked = False


def _after_fork() -> None:
    # The pool of OpenMP's threads stays with the parent, and waiting for it would never end.
    global _forked
    _forked = True


def threads() -> int:
    """Threads of a call: as many as torch uses; one in a forked process, or in a build without OpenMP."""
    return 1 if _forked or not threaded() else torch.get_num_threads()


def threaded() -> bool:
    """Whether the build divides work among threads (OpenMP)."""
    return bool(library().evenstep_threaded())


def compiler() -> str:
    """Name and version of the compiler that built the library."""
    name: bytes = library().evenstep_compiler()
    return name.decode()


# ---- calls ----

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}  # ``enum Type`` of cpu_threads.h
_COLUMN = {name: i for i, name in enumerate(JOB)}


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
    """The table of ``struct Job`` in cpu_threads.h, int64 ``[k, len(JOB)]``: sizes, dtypes and addresses, a row per
    tensor. Each argument is empty or has ``k`` entries. Empty tensors have the address 0, as do fields not given.
    ValueError where a tensor has another size than its gradient.

    Hazard: a table holds bare addresses. The caller keeps all tensors alive until the call that takes it has returned.
    """
    # Columns are filled one at a time: a model has hundreds of tensors, and a loop over them would cost more than the
    # step of a small one.
    table = np.zeros((len(grads), len(JOB)), dtype=np.int64)
    sizes = table[:, 0]
    sizes[:] = list(map(Tensor.numel, grads))
    table[:, _COLUMN["rows"]] = [shape[0] if (shape := g.shape) else 1 for g in grads]
    _check_sizes(sizes, params, exp_avg, exp_avg_sq, masks)
    for name, tensors in (("p_type", params), ("g_type", grads), ("m_type", exp_avg), ("v_type", exp_avg_sq)):
        if tensors:
            table[:, _COLUMN[name]] = [_TYPES[x.dtype] for x in tensors]
    for name, tensors in (
        ("p", params),
        ("g", grads),
        ("m", exp_avg),
        ("v", exp_avg_sq),
        ("m_scale", m_scales),
        ("v_scale", v_scales),
        ("m_map", m_map),
        ("v_map", v_map),
        ("mask", masks),
        ("lost", lost),
        ("seed", seeds),
    ):
        if tensors:
            table[:, _COLUMN[name]] = list(map(Tensor.data_ptr, tensors))
    if masks:
        table[:, _COLUMN["trained"]] = [m.numel() for m in exp_avg]
    return table


def _check_sizes(
    sizes: np.ndarray,
    params: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    masks: Sequence[Tensor],
) -> None:
    """ValueError where a kernel would read or write beyond the end of a tensor. ``sizes [k]``: those of gradients."""
    # A mask has a bit for each entry of the gradient. Moments are compact under one, and their size is not checked.
    dense = np.full(len(sizes), True)
    if masks:
        mask_bytes = np.array(list(map(Tensor.numel, masks)), dtype=np.int64)
        dense = mask_bytes == 0
        wrong = (mask_bytes != -(-sizes // 8)) & ~dense
        if wrong.any():
            i = int(wrong.argmax())
            raise ValueError(f"a gradient has {sizes[i]} entries, its mask is one of {mask_bytes[i]} bytes")
    for what, tensors in (("its parameter", params), ("a moment", exp_avg), ("a moment", exp_avg_sq)):
        if not tensors:
            continue
        given = np.array(list(map(Tensor.numel, tensors)), dtype=np.int64)
        wrong = (given != sizes) & (dense | (tensors is params))
        if wrong.any():
            i = int(wrong.argmax())
            raise ValueError(
                f"a gradient has {sizes[i]} entries, {what} {given[i]}: parameters keep the size they were given with"
            )


def call(function: str, jobs: np.ndarray, *arguments: Tensor | np.ndarray | int | float) -> None:
    """Call ``evenstep_{function}(jobs, k, threads, *arguments)`` of the library. Tensors and arrays are passed by
    address, integers as 64 bits, floats as fp32.
    """
    # Below 2^16 entries, which fit a cache, starting threads costs more than they save. Results do not depend on it.
    several = threads() if jobs[:, 0].sum() > 1 << 16 else 1
    getattr(library(), f"evenstep_{function}")(
        ctypes.c_void_p(jobs.ctypes.data),
        ctypes.c_int64(len(jobs)),
        ctypes.c_int64(several),
        *(_argument(x) for x in arguments),
    )


# Hazard: the functions have no declared argument types, so each argument has to have the exact C type of the signature;
# a plain Python int would be passed with 32 bits.
def _argument(x: Tensor | np.ndarray | int | float) -> object:
    if isinstance(x, Tensor):
        return ctypes.c_void_p(x.data_ptr())
    if isinstance(x, np.ndarray):
        return ctypes.c_void_p(x.ctypes.data)
    # A bool is an int.
    return ctypes.c_float(x) if isinstance(x, float) else ctypes.c_int64(x)


def _jobs(tensors: StepTensors) -> tuple[np.ndarray, list[Tensor]]:
    """The table of jobs, and all tensors that hold moments."""
    m, m_scales, m_map = stored_moments(tensors.exp_avg)
    v, v_scales, v_map = stored_moments(tensors.exp_avg_sq)
    k = len(tensors.params)  # all coded moments of a list share one map
    # Fields of fp32 moments in these columns are not read: m_type and v_type say which apply.
    given = (tensors.grads, tensors.params, m, v, m_scales, v_scales, m_map * k, v_map * k)
    return job_table(*given, tensors.masks, tensors.lost, tensors.seeds), [*m, *v, *m_scales, *v_scales]


def _numbers(values: list[float | Tensor]) -> np.ndarray | Tensor:
    """``values`` as one fp64 vector."""
    # A learning rate that is a tensor is not read with `item()`: a step asks no tensor for its value.
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
    # Writes by address bypass the version counters that torch's own in-place operators raise.
    for tensors in lists:
        torch.autograd.graph.increment_version(tensors)


# ---- the set of kernels ----

_SERVED = frozenset({torch.float32, torch.bfloat16})


class CpuKernels:
    """`evenstep.kernels.interface.Kernels` for the CPU.

    Parameters and gradients are fp32 or bf16; moments are fp32, bf16 or 8-bit, or compact under a mask. Raises
    `Unavailable` where no build can be loaded.
    """

    def __init__(self) -> None:
        library()
        self.name = f"cpu {chosen()}"

    def serves_all(self, tensors: list[Tensor]) -> bool:
        """See `Kernels.serves_all`: plain, contiguous fp32 and bf16 tensors on the CPU."""
        # Each condition is one pass by C code over all tensors; 8-bit states take the slow way.
        return (
            all_plain(tensors)
            and _SERVED.issuperset([x.dtype for x in tensors])
            and all(x.is_cpu for x in tensors)
            and all(map(Tensor.is_contiguous, tensors))
        )

    def refusal(self, p: Tensor, g: Tensor, *states: Tensor) -> str | None:
        """See `Kernels.refusal`. Refused are other devices and dtypes, tensor subclasses, strided tensors."""
        # Asked for every tensor of every step, so the common case comes first; `_reason` repeats it at leisure, and
        # accepts 8-bit states too.
        for x in (p, g, *states):
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
            # Gradients too: kernels number entries by their place in memory, which is another for a transposed one.
            if not x.is_contiguous():
                return f"its {what} is not contiguous"
        for x in states:
            if is_coded(x):
                # Blocks of threads are multiples of 256 entries, so that no two threads write one scale. SCALE, which
                # has one state, works row by row instead.
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
        """A whole step of Adam, SPAM or Stable-SPAM in C++ (cpu.cpp); see `Kernels.adam_step_`."""
        jobs, moments = _jobs(tensors)
        # Addresses of the 0-d scalars, int64 [k] or [5 k]: the step reads and writes them in place.
        scalars = np.array(list(map(Tensor.data_ptr, tensors.scalars)), dtype=np.int64)
        # [8, k]: the library has a row for each name in STATS, in that order (cpu_measure.h).
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
        """A whole step of SCALE's matrices in C++ (cpu_scale.cpp); see `Kernels.scale_step_`."""
        jobs, moments = _jobs(tensors)
        stats = _empty(len(STATS), len(tensors.params))
        call("scale", jobs, _numbers([sign, lr, decay, momentum, norm == "rms", by == "columns", floor]), stats)
        _mark_written(tensors.params, moments, tensors.lost)
        return stats

    def measure(self, grads: list[Tensor]) -> Measured:
        """See `Kernels.measure`."""
        # Results of blocks, in the order of the tensors: `clip_norms` reads them again, with the same division.
        size = library().evenstep_block()
        count = sum(-(-g.numel() // size) for g in grads)
        peak, norm, block_peak, block_squares = *_vectors(grads, 2), _empty(count), _empty(count, dtype=torch.float64)
        call("measure", job_table(grads), peak, norm, block_peak, block_squares)
        return Measured(peak, norm, (block_peak, block_squares))

    def clip_norms(
        self, grads: list[Tensor], measured: Measured, limit: Tensor, rescale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Kernels.clip_norms`."""
        norm, count = _vectors(grads, 2)
        # Kept in a variable: an address does not keep a temporary tensor alive.
        limits = limit.float().contiguous(), rescale.float().contiguous()
        call("clip_norms", job_table(grads), *measured.blocks, *limits, norm, count)
        return norm, count

    def transform(
        self, out: list[Tensor], grads: list[Tensor], numbers: Tensor, columns: Sequence[int] | None = None
    ) -> None:
        """See `Kernels.transform`."""
        if columns is not None and len(columns) < numbers.shape[1]:
            numbers = numbers.index_select(1, torch.tensor(columns, device="cpu"))
        call("transformed", job_table(grads, out), numbers.contiguous())
        _mark_written(out)
