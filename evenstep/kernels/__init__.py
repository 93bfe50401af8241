"""Fused optimizer steps, one set of kernels per kind of device; interface.py has the calling convention.

Neither the C++ library nor Triton is loaded before an optimizer steps on such a device.
"""

import functools
from collections.abc import Callable

from evenstep.kernels.interface import Kernels, StepTensors, Unavailable, constant, is_coded, table, uploaded

__all__ = ["Kernels", "StepTensors", "Unavailable", "constant", "is_coded", "kernels_for", "table", "uploaded"]


def _cpu() -> Kernels:
    from evenstep.kernels.cpu import CpuKernels

    return CpuKernels()


def _cuda() -> Kernels:
    from evenstep.kernels.cuda import TritonKernels

    return TritonKernels()


_DEVICES: dict[str, Callable[[], Kernels]] = {"cpu": _cpu, "cuda": _cuda}


@functools.cache
def kernels_for(device_type: str) -> Kernels | str:
    """The kernels of a kind of device, loaded on the first call and cached.

    Args:
        device_type: ``device.type`` of a tensor, such as ``"cpu"`` or ``"cuda"``.

    Returns:
        The kernels, or in one line the reason why there are none. A missing compiler or Triton is no error: the plain
        code serves.

    >>> kernels_for("meta")
    'there are no kernels for meta'
    """
    # The reason is cached too: an import that failed is not tried again at every step.
    if device_type not in _DEVICES:
        return f"there are no kernels for {device_type}"
    try:
        return _DEVICES[device_type]()
    except Unavailable as problem:
        return str(problem)
