"""``evenstep doctor --check``: every kernel against the plain code, on every device of this machine."""

from __future__ import annotations

from evenstep.errors import EvenstepError
from evenstep.kernels import cpu_quant, kernels_for
from evenstep.lowbit import fake_quant
from evenstep.optim import SCALE, SPAM, StableSPAM, self_check


def print_checks() -> None:
    """A line for each kernel: how far it is from the plain code, in units of the largest entry. EvenstepError when one
    is further away than rounding explains, or raises."""
    failed = 0
    for device in self_check.devices():
        kernels = kernels_for(device.type)
        if isinstance(kernels, str):
            print(f"\n{device}: not checked, {kernels}")
            continue
        print(f"\n{device}, {kernels.name}: largest difference from the plain code, relative to the largest entry")
        for outcome in self_check.outcomes(device, (StableSPAM, SPAM, SCALE)):
            dtype = str(outcome.dtype).removeprefix("torch.")
            failed += _line(f"{outcome.case.name}, {dtype}", outcome.apart, outcome.problem)
        if device.type == "cpu" and cpu_quant.ready():
            for name, (apart, problem) in fake_quant.kernel_differences().items():
                failed += _line(f"low-bit format {name}", apart, problem)
    if failed:
        raise EvenstepError(
            f"{failed} kernels differ from the plain code, which serves in their place; please report the lines above"
        )


def _line(name: str, apart: float, problem: str | None) -> bool:
    print(f"  {name:<52} {apart:8.1e}  {problem or 'ok'}")
    return problem is not None
