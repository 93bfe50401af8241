"""``evenstep doctor``: which kernels serve which device, and why something is not used."""

import platform

import torch

from evenstep.kernels import cpu, kernels_for


def diagnosis() -> list[tuple[str, str]]:
    """What there is to know, as (subject, finding) pairs."""
    found = [("torch", f"{torch.__version__}, Python {platform.python_version()}, {platform.machine()}")]
    found += [("cpu kernels", _said(kernels_for("cpu"))), *_cpu()]
    if torch.cuda.is_available():
        found.append(("gpu", torch.cuda.get_device_name()))
        found.append(("gpu kernels", _said(kernels_for("cuda"))))
    else:
        found.append(("gpu kernels", "not used: torch sees no CUDA device"))
    found.append(("without kernels", "the plain PyTorch code, which gives the same results to rounding"))
    return found


def _said(found: object) -> str:
    return f"not used: {found}" if isinstance(found, str) else f"used ({getattr(found, 'name', '')})"


def _cpu() -> list[tuple[str, str]]:
    forced = cpu.forced()
    found = [
        ("processor", f"{torch.backends.cpu.get_cpu_capability()} as torch sees it"),
        ("builds here", ", ".join(cpu.built()) or "none: there was no C++ compiler when evenstep was installed"),
        ("builds it can run", ", ".join(cpu.usable()) or "none"),
        (
            "chosen by",
            f"{cpu.FORCE}={forced}" if forced else f"evenstep (set {cpu.FORCE} to a build or 'none' to change)",
        ),
    ]
    if not isinstance(kernels_for("cpu"), str):
        threads = f"{torch.get_num_threads()}, as torch (torch.set_num_threads or OMP_NUM_THREADS change it)"
        found.append(("compiled by", cpu.compiler()))
        found.append(("threads", threads if cpu.threaded() else "1: built without OpenMP"))
    return found


def print_diagnosis() -> None:
    rows = diagnosis()
    width = max(len(subject) for subject, _ in rows)
    for subject, finding in rows:
        print(f"{subject:<{width}}  {finding}")
