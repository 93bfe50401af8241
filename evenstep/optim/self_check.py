"""The self-check of kernels: a small fused step against the same step by the plain code.

A new compiler, driver or device may compute wrong numbers. Therefore, the first time that kernels serve an optimizer on
a device, a few small tensors are stepped by both (some milliseconds on a CPU). If the results differ by more than
rounding, or the kernels raise, one warning says so and the plain code serves; with ``fused=True`` this is an error.
``evenstep doctor --check`` runs all cases on demand. No random state is read or changed.
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
from evenstep.optim.chain import Chain
from evenstep.optim.distributed import UNSHARDED, Bucket
from evenstep.optim.transforms import AdaClip, AdaGN

STEPS = 3
SHAPES = (33, 7), (16, 256), (17,)  # an odd matrix, one that 8-bit blocks and vector registers divide, a vector

# Lists of tensors of `SHAPES`: the parameters, then the gradients of each step.
Numbers = list[list[Tensor]]
# A small computation with kernels (True) or without; returns its results by name.
Work = Callable[[Numbers, bool], dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """One use of the kernels."""

    name: str
    work: Work
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    devices: tuple[str, ...] = ("cpu", "cuda")
    on_demand: bool = False  # run by ``evenstep doctor --check`` alone, not before the first fused step


def numbers(device: torch.device, dtype: torch.dtype) -> Numbers:
    """Pseudo-random tensors in [-1, 1], the same on any device. The second gradients hold a spike and a NaN."""
    # sin(0.7 n^2) has no visible pattern and needs no generator.
    sizes = [torch.Size(shape).numel() for shape in SHAPES] * (1 + STEPS)
    places = torch.arange(1, 1 + sum(sizes), dtype=torch.float64, device=device)
    flat = torch.split(places.square_().mul_(0.7).sin_().to(dtype), sizes)
    shaped = [x.view(shape).clone() for x, shape in zip(flat, SHAPES * (1 + STEPS), strict=True)]
    several = [shaped[i : i + len(SHAPES)] for i in range(0, len(shaped), len(SHAPES))]
    several[2][1][1, 1] = 1e4  # AdaClip and SPAM's clipping have something to clip
    several[2][2][1] = float("nan")  # the vector is skipped, and its state must not change
    return several


def _stepped(build: Callable[..., Any], **options: Any) -> Work:
    def work(given: Numbers, fused: bool) -> dict[str, Tensor]:
        # Clones: both runs start from the same numbers, and the optimizer writes to its parameters.
        params: list[Tensor] = [Parameter(x.clone()) for x in given[0]]
        optimizer = build(params, fused=fused, **options)
        # Global hooks (profilers, schedulers) must not see these steps.
        step = type(optimizer).step
        step = getattr(step, "__wrapped__", step)  # without the hooks that others have registered for every optimizer
        for gradients in given[1:]:
            for p, grad in zip(params, gradients, strict=True):
                p.grad = grad
            step(optimizer)
        results = {f"parameter {i}": p.detach() for i, p in enumerate(params)}
        # Parameters, state and statistics are compared: a wrong moment shows in the parameters only later.
        for i, p in enumerate(params):
            for name, value in optimizer.state[p].items():
                if isinstance(value, Tensor):
                    results[f"{name} {i}"] = value.dequantize() if hasattr(value, "codes") else value
        return results | dict(optimizer.stats)

    return work


def _transformed(given: Numbers, fused: bool) -> dict[str, Tensor]:
    """The kernels that `stabilize` uses: measure, clip, write the transformed gradients."""
    tensors = given[2]
    kernels = kernels_for(tensors[0].device.type) if fused else None
    assert not isinstance(kernels, str)
    grads = F.completed(F.Gradients.measure(tensors, torch.float32, kernels=kernels))
    # Any limit and any gain will do: this one clips in every tensor, and the gains differ.
    grads = F.completed(grads.clipped(grads.peak / 2).with_norms())
    grads = grads.amplified(grads.norm + 0.5)
    outs = [torch.empty_like(g) for g in tensors]
    grads.write(range(len(outs)), outs)
    results = {"largest entry": grads.peak, "norm": grads.norm}
    return results | {f"gradient {i}": out for i, out in enumerate(outs)}


def _chained(given: Numbers, fused: bool) -> dict[str, Tensor]:
    """The kernels that compute the numbers of AdaClip and AdaGN before another optimizer, and keep their statistics."""
    kernels = kernels_for(given[0][0].device.type) if fused else None
    assert not isinstance(kernels, str)
    chain = Chain((AdaClip(gamma3=0.5), AdaGN()), reset_interval=0)
    results: dict[str, Tensor] = {}
    for p in given[0]:
        chain.adopt(p)
    for t, tensors in enumerate(given[1:], start=1):
        bucket = Bucket(given[0], tensors, given[0], [], torch.float32, UNSHARDED, kernels)
        found = F.completed(chain.transformed(bucket, t, None))
        chain.keep([found])
        results |= {f"{name} of step {t}": x for name, x in F.statistics(found.grads, bucket.sizes(), None).items()}
    return results | {f"{name} {i}": x for i, p in enumerate(given[0]) for name, x in chain.statistics[p].items()}


@functools.cache
def cases(user: type | None = None) -> tuple[Case, ...]:
    """The cases of the optimizer class ``user``; without one, those that all optimizers and `stabilize` share."""
    both, coarse = (torch.float32, torch.bfloat16), (torch.bfloat16,)
    steps: dict[str, Callable[..., Any]] = getattr(user, "checked_steps", dict)()
    if not steps:
        # The CPU has no kernels of its own for the numbers of a chain.
        return (
            Case("measuring and transforming", _transformed),
            Case("AdaClip and AdaGN before an optimizer", _chained, devices=("cuda",)),
        )
    result = []
    for name, build in steps.items():
        result.append(Case(name, _stepped(build)))
        sparse = "density" in name  # the class's dense steps cover what a first step has to know
        # Rounding makes no difference for fp32 parameters.
        for rounding in ("stochastic", "kahan"):
            work = _stepped(build, rounding=rounding)
            result.append(Case(f"{name}, rounding {rounding}", work, coarse, on_demand=sparse))
        for state in ("bf16",) if sparse else ("bf16", "int8"):  # compact moments have no 8-bit blocks
            result.append(Case(f"{name}, state {state}", _stepped(build, state=state), both, on_demand=True))
    return tuple(result)


# ---- how far apart ----


def tolerance(dtype: torch.dtype, case: str) -> float:
    """The largest allowed difference of two results, relative to the largest entry."""
    # Sums in another order differ slightly in fp32, which may move a result by one rounding step of bf16 (2^-8) or by
    # one code of 8 bits.
    if "int8" in case:
        return 0.05
    return 2e-2 if dtype == torch.bfloat16 or "bf16" in case else 1e-4


def differences(fused_results: list[Tensor], expected: list[Tensor]) -> list[float]:
    """The largest difference of the entries of each tensor, relative to its largest expected entry; Inf where only one
    of two entries is finite.
    """
    apart = []
    for x, y in zip(fused_results, expected, strict=True):
        x, y = x.double(), y.double()
        # In fp64, relative to the largest finite expected entry. Equal infinities and NaN in both places are no
        # difference.
        unit = y.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().amax().clamp_(min=1e-12)
        off = torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, (x - y).abs_() / unit)
        apart.append(off.nan_to_num_(nan=torch.inf).amax())
    return torch.stack(apart).tolist()  # one read of the device


@dataclass(frozen=True)
class Outcome:
    """The result of a case."""

    case: Case
    dtype: torch.dtype
    apart: float  # the largest difference, Inf after an exception
    problem: str | None  # an error message; None if the kernels agree with the plain code


# Above 0 while a case runs: its optimizers use the kernels without a check, which would recurse.
_trying = 0


@torch.no_grad()
def tried(case: Case, given: Numbers) -> Outcome:
    """Run a case with the kernels and with the plain code, and compare."""
    global _trying
    dtype = given[0][0].dtype
    _trying += 1
    try:
        fused_results = case.work(given, True)
    except Exception as problem:  # whatever a compiler or a driver raises must not stop the training
        said = next(iter(str(problem).splitlines()), "")
        return Outcome(case, dtype, float("inf"), f"raises {type(problem).__name__}: {said}")
    finally:
        _trying -= 1
    expected = case.work(given, False)
    if {name: x.shape for name, x in fused_results.items()} != {name: x.shape for name, x in expected.items()}:
        return Outcome(case, dtype, float("inf"), "gives other results than the plain code")
    apart = dict(
        zip(expected, differences([fused_results[name] for name in expected], [*expected.values()]), strict=True)
    )
    allowed = tolerance(dtype, case.name)
    worst = max(apart, key=lambda name: apart[name])
    said = f"differs from the plain code by {apart[worst]:.2g} of the largest entry ({worst})"
    return Outcome(case, dtype, apart[worst], said if apart[worst] > allowed else None)


# ---- once, before kernels serve ----

# (kernels, device, dtype, optimizer class) -> the problem, None for no problem.
_known: dict[tuple[str, torch.device, torch.dtype, type | None], str | None] = {}


def failing(kernels: Kernels, p: Tensor, user: type | None) -> str | None:
    """The problem of these kernels with parameters such as ``p`` in an optimizer of class ``user``; None for none.

    The check runs at the first call for a device, a dtype and a class; a failure gives one warning.
    """
    owner = _declaring_class(user)
    key = (kernels.name, p.device, p.dtype, owner)
    try:
        return _known[key]
    except KeyError:
        pass
    if _trying or _elsewhere(p):  # not stored: a later step in plain PyTorch is checked
        return None
    _known[key] = None  # before the check, whose own steps ask again
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
    """The class that declares the ``checked_steps`` of an optimizer class, so that subclasses share its check; None for
    classes without."""
    # A subclass may inherit the method; the check belongs to the class that wrote it.
    bases: tuple[Any, ...] = user.__mro__ if user else ()
    return next((base for base in bases if "checked_steps" in base.__dict__ and base.checked_steps()), None)


def _elsewhere(p: Tensor) -> bool:
    """Whether operators do not simply compute now: they are traced, recorded in a CUDA graph, or have no data."""
    return isinstance(p, FakeTensor) or capturing(p.device) or under_observation()


# ---- on demand ----


def devices() -> Iterator[torch.device]:
    """The devices of this machine for which there may be kernels."""
    yield torch.device("cpu")
    if torch.cuda.is_available():
        yield from (torch.device("cuda", i) for i in range(torch.cuda.device_count()))


def outcomes(device: torch.device, users: Iterable[type]) -> Iterator[Outcome]:
    """The outcomes of all cases on a device, for the optimizer classes ``users``."""
    for case in (*cases(), *(case for user in users for case in cases(user))):
        if device.type in case.devices and ("int8" not in case.name or importlib.util.find_spec("torchao")):
            for dtype in case.dtypes:
                yield tried(case, numbers(device, dtype))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
