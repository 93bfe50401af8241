"""Fused optimizer steps, one set of kernels per kind of device: see interface.py for what they share.

Nothing is loaded before an optimizer steps on such a device.
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
    """The kernels of a kind of device (``"cpu"``, ``"cuda"``), or why there are none."""
    if device_type not in _DEVICES:
        return f"there are no kernels for {device_type}"
    try:
        return _DEVICES[device_type]()
    except Unavailable as problem:
        return str(problem)
