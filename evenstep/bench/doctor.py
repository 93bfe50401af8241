"""``evenstep doctor``: which kernels serve which device, and why kernels are not used. With ``--check``: whether every
kernel agrees with the plain code on every device of this machine."""

from __future__ import annotations

import platform

import torch

from evenstep.errors import EvenstepError
from evenstep.kernels import cpu, cpu_loss, cpu_quant, kernels_for
from evenstep.train.hardware import bf16_speed


def print_diagnosis() -> None:
    """Print the findings of `diagnosis`, one line each."""
    rows = diagnosis()
    width = max(len(subject) for subject, _ in rows)
    for subject, finding in rows:
        print(f"{subject:<{width}}  {finding}")


def diagnosis() -> list[tuple[str, str]]:
    """Return (subject, finding) pairs about torch, the kernels of each device, and their builds."""
    rows = [("torch", f"{torch.__version__}, Python {platform.python_version()}, {platform.machine()}")]
    rows += [("cpu kernels", _status("cpu")), *_cpu_builds()]
    if torch.cuda.is_available():
        rows += [("gpu", torch.cuda.get_device_name()), ("gpu kernels", _status("cuda"))]
    else:
        rows.append(("gpu kernels", "not used: torch sees no CUDA device"))
    rows.append(("without kernels", "the plain PyTorch code, which gives the same results to rounding"))
    return rows


def _status(device: str) -> str:
    kernels = kernels_for(device)
    return f"not used: {kernels}" if isinstance(kernels, str) else f"used ({kernels.name})"


def _cpu_builds() -> list[tuple[str, str]]:
    forced = cpu.forced()
    chosen_by = f"{cpu.FORCE}={forced}" if forced else f"evenstep (set {cpu.FORCE} to a build or 'none' to change)"
    rows = [
        ("processor", f"{torch.backends.cpu.get_cpu_capability()} as torch sees it"),
        ("bf16", f"matrix products at {bf16_speed():.2g} times the speed of fp32"),
        ("builds here", ", ".join(cpu.built()) or "none: there was no C++ compiler when evenstep was installed"),
        ("builds it can run", ", ".join(cpu.usable()) or "none"),
        ("chosen by", chosen_by),
    ]
    if not isinstance(kernels_for("cpu"), str):
        threads = f"{torch.get_num_threads()}, as torch (torch.set_num_threads or OMP_NUM_THREADS change it)"
        rows.append(("compiled by", cpu.compiler()))
        rows.append(("threads", threads if cpu.threaded() else "1: built without OpenMP"))
    return rows


def print_checks() -> None:
    """Print, for each kernel, its largest difference from the plain code relative to the largest entry.

    Raises:
        EvenstepError: if a kernel raises, or differs by more than rounding explains.
    """
    from evenstep.lowbit import fake_quant
    from evenstep.models import ops
    from evenstep.optim import SCALE, SPAM, StableSPAM, self_check

    failed = 0
    for device in self_check.devices():
        kernels = kernels_for(device.type)
        if isinstance(kernels, str):
            print(f"\n{device}: not checked, {kernels}")
            continue
        print(f"\n{device}, {kernels.name}: largest difference from the plain code, relative to the largest entry")
        for outcome in self_check.outcomes(device, (StableSPAM, SPAM, SCALE)):
            dtype = str(outcome.dtype).removeprefix("torch.")
            failed += _check_failed(f"{outcome.case.name}, {dtype}", outcome.apart, outcome.problem)
        if device.type == "cpu" and cpu_quant.ready():
            for name, (apart, problem) in fake_quant.kernel_differences().items():
                failed += _check_failed(f"low-bit format {name}", apart, problem)
        if device.type == "cpu" and cpu_loss.ready():
            for name, (apart, problem) in ops.kernel_differences().items():
                failed += _check_failed(f"cross entropy, {name}", apart, problem)
    if failed:
        raise EvenstepError(
            f"{failed} kernels differ from the plain code, which serves in their place; please report the lines above"
        )


def _check_failed(name: str, apart: float, problem: str | None) -> bool:
    print(f"  {name:<52} {apart:8.1e}  {problem or 'ok'}")
    return problem is not None
