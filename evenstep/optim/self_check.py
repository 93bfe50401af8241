"""The self-check of kernels: a small fused step against the same step by the plain code.

A compiler, a driver or a device that nobody has tried may compute wrong numbers. So the first time that kernels serve
an optimizer on a device, a few small tensors are stepped both ways (some milliseconds on a CPU). Where the results
differ by more than rounding, or the kernels raise, one warning says so and the plain code serves; with ``fused=True``
that is an error. ``evenstep doctor --check`` runs all cases on demand. No random state is touched.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from evenstep.kernels import Kernels, kernels_for
from evenstep.kernels.interface import capturing, under_observation
from evenstep.optim import functional as F

STEPS = 3
SHAPES = (33, 7), (16, 256), (17,)

Numbers = list[list[Tensor]]
"""Tensors of `SHAPES`: parameters, and the gradients of each step."""
Work = Callable[[Numbers, bool], dict[str, Tensor]]
"""Does a small piece of work with kernels, or without; returns what came of it, by name."""


@dataclass(frozen=True)
class Case:
    """One use of the kernels."""

    name: str
    work: Work
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    devices: tuple[str, ...] = ("cpu", "cuda")
    on_demand: bool = False
    """Whether it runs for ``evenstep doctor --check`` alone, not before kernels serve for the first time."""


def numbers(device: torch.device, dtype: torch.dtype) -> Numbers:
    """In [-1, 1] without a pattern, the same on any device. The second gradients hold a spike, and one that is not
    finite."""
    sizes = [torch.Size(shape).numel() for shape in SHAPES] * (1 + STEPS)
    places = torch.arange(1, 1 + sum(sizes), dtype=torch.float64, device=device)
    found = torch.split(places.square_().mul_(0.7).sin_().to(dtype), sizes)
    shaped = [x.view(shape).clone() for x, shape in zip(found, SHAPES * (1 + STEPS), strict=True)]
    several = [shaped[i : i + len(SHAPES)] for i in range(0, len(shaped), len(SHAPES))]
    several[2][1][1, 1] = 1e4
    several[2][2][1] = float("nan")
    return several


def _stepped(build: Callable[..., Any], **options: Any) -> Work:
    def work(given: Numbers, fused: bool) -> dict[str, Tensor]:
        params: list[Tensor] = [Parameter(x.clone()) for x in given[0]]
        optimizer = build(params, fused=fused, **options)
        step = type(optimizer).step
        step = getattr(step, "__wrapped__", step)  # without the hooks that others have registered for every optimizer
        for gradients in given[1:]:
            for p, grad in zip(params, gradients, strict=True):
                p.grad = grad
            step(optimizer)
        results = {f"parameter {i}": p.detach() for i, p in enumerate(params)}
        for i, p in enumerate(params):
            for name, value in optimizer.state[p].items():
                if isinstance(value, Tensor):
                    results[f"{name} {i}"] = value.dequantize() if hasattr(value, "codes") else value
        return results | dict(optimizer.stats)

    return work


def _transformed(given: Numbers, fused: bool) -> dict[str, Tensor]:
    """What `stabilize` uses: measure, clip, write the transformed gradients."""
    tensors = given[2]
    kernels = kernels_for(tensors[0].device.type) if fused else None
    assert not isinstance(kernels, str)
    grads = F.completed(F.Gradients.measure(tensors, torch.float32, kernels=kernels))
    grads = F.completed(grads.clipped(grads.peak / 2).with_norms())
    grads = grads.amplified(grads.norm + 0.5)
    outs = [torch.empty_like(g) for g in tensors]
    grads.write(range(len(outs)), outs)
    results = {"largest entry": grads.peak, "norm": grads.norm}
    return results | {f"gradient {i}": out for i, out in enumerate(outs)}


@functools.cache
def cases(user: type | None = None) -> tuple[Case, ...]:
    """The uses of the kernels that serve every optimizer, and those of the optimizer class ``user``."""
    both, coarse = (torch.float32, torch.bfloat16), (torch.bfloat16,)
    steps: dict[str, Callable[..., Any]] = getattr(user, "checked_steps", dict)()
    if not steps:
        return (Case("measuring and transforming", _transformed),)
    result = []
    for name, build in steps.items():
        if "density" in name:  # sparse momentum: C++ alone
            result.append(Case(name, _stepped(build), devices=("cpu",)))
            continue
        result.append(Case(name, _stepped(build)))
        for rounding in ("stochastic", "kahan"):
            result.append(Case(f"{name}, rounding {rounding}", _stepped(build, rounding=rounding), coarse))
        for state in ("bf16", "int8"):
            result.append(Case(f"{name}, state {state}", _stepped(build, state=state), both, on_demand=True))
    return tuple(result)


# ---- how far apart ----


def tolerance(dtype: torch.dtype, case: str) -> float:
    """How far two results may be apart, in units of the largest entry: sums in another order, a rounding step of bf16,
    a code of 8 bits.
    """
    if "int8" in case:
        return 0.05
    return 2e-2 if dtype == torch.bfloat16 or "bf16" in case else 1e-4


def differences(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """The largest difference of the entries of each tensor, in units of the largest expected one; Inf where one is not
    finite as the other is.
    """
    apart = []
    for x, y in zip(found, expected, strict=True):
        x, y = x.double(), y.double()
        unit = y.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().amax().clamp_(min=1e-12)
        off = torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, (x - y).abs_() / unit)
        apart.append(off.nan_to_num_(nan=torch.inf).amax())
    return torch.stack(apart).tolist()


@dataclass(frozen=True)
class Outcome:
    case: Case
    dtype: torch.dtype
    apart: float
    """The largest difference, Inf after an exception."""
    problem: str | None
    """What is wrong; None for nothing."""


_trying = 0
"""Whether kernels do the work of a case now, and are not to be checked for it."""


@torch.no_grad()
def tried(case: Case, given: Numbers) -> Outcome:
    """Do the work of a case both ways."""
    global _trying
    dtype = given[0][0].dtype
    _trying += 1
    try:
        found = case.work(given, True)
    except Exception as problem:
        said = next(iter(str(problem).splitlines()), "")
        return Outcome(case, dtype, float("inf"), f"raises {type(problem).__name__}: {said}")
    finally:
        _trying -= 1
    expected = case.work(given, False)
    if {name: x.shape for name, x in found.items()} != {name: x.shape for name, x in expected.items()}:
        return Outcome(case, dtype, float("inf"), "gives other results than the plain code")
    apart = dict(zip(expected, differences([found[name] for name in expected], [*expected.values()]), strict=True))
    allowed = tolerance(dtype, case.name)
    worst = max(apart, key=lambda name: apart[name])
    said = f"differs from the plain code by {apart[worst]:.2g} of the largest entry ({worst})"
    return Outcome(case, dtype, apart[worst], said if apart[worst] > allowed else None)


# ---- once, before kernels serve ----

_known: dict[tuple[str, torch.device, torch.dtype, type | None], str | None] = {}
"""Kernels, device, dtype and user -> what is wrong."""


def failing(kernels: Kernels, p: Tensor, user: type | None) -> str | None:
    """Why these kernels are not to be trusted with parameters such as ``p`` of an optimizer of class ``user``; None if
    they are. Checked the first time alone, with one warning on failure.
    """
    owner = _declaring_class(user)
    key = (kernels.name, p.device, p.dtype, owner)
    try:
        return _known[key]
    except KeyError:
        pass
    if _trying or _elsewhere(p):
        return None
    _known[key] = None
    given = numbers(p.device, p.dtype)
    checks = cases() if owner is None else (*cases(), *cases(owner))
    for case in checks:
        if not case.on_demand and p.dtype in case.dtypes and p.device.type in case.devices:
            outcome = tried(case, given)
            if outcome.problem is not None:
                what = f"the kernel for {case.name} ({kernels.name}, {_short(p.dtype)}, {p.device}) {outcome.problem}"
                _known[key] = what
                warnings.warn(f"{what}; the plain code serves instead (see evenstep doctor --check)", stacklevel=2)
                break
    return _known[key]


@functools.cache
def _declaring_class(user: type | None) -> type | None:
    """The class whose ``checked_steps`` an optimizer class has; None for those without."""
    bases: tuple[Any, ...] = user.__mro__ if user else ()
    return next((base for base in bases if "checked_steps" in base.__dict__ and base.checked_steps()), None)


def _elsewhere(p: Tensor) -> bool:
    """Whether operators now do not run as they stand: traced, recorded, or without data."""
    return isinstance(p, FakeTensor) or capturing(p.device) or under_observation()


# ---- on demand ----


def devices() -> Iterator[torch.device]:
    """Those for which there may be kernels."""
    yield torch.device("cpu")
    if torch.cuda.is_available():
        yield from (torch.device("cuda", i) for i in range(torch.cuda.device_count()))


def outcomes(device: torch.device, users: Iterable[type]) -> Iterator[Outcome]:
    """Of every case that a device has, for the optimizer classes ``users``."""
    for case in (*cases(), *(case for user in users for case in cases(user))):
        if device.type in case.devices and ("int8" not in case.name or importlib.util.find_spec("torchao")):
            for dtype in case.dtypes:
                yield tried(case, numbers(device, dtype))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
