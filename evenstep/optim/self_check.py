"""Kernels that check themselves: a small step by kernels against the same step by the plain code.

A compiler, a driver or a device that nobody has tried may give other numbers than it should. So the first time that
kernels serve an optimizer on a device, a few small tensors are stepped both ways (some milliseconds on a CPU). Where
the results differ by more than rounding, or the kernels raise, one warning says so and the plain code serves; with
``fused=True`` that is an error. ``evenstep doctor --check`` does it on demand. No random state is touched.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from evenstep.kernels import Kernels, kernels_for
from evenstep.kernels.constants import capturing, under_observation

STEPS = 3
SHAPES = (33, 7), (16, 256), (17,)

Numbers = list[list[Tensor]]
"""Tensors of `SHAPES`: parameters, and the gradients of each step."""
Work = Callable[[Numbers, bool], dict[str, Tensor]]
"""Does a small piece of work with kernels, or without; returns what came of it, by name."""


@dataclass(frozen=True)
class Case:
    """One use of the kernels, which serves the optimizers of class ``user`` (a name; "" for all)."""

    name: str
    user: str
    work: Work
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    devices: tuple[str, ...] = ("cpu", "cuda")
    at_once: bool = True
    """Whether it runs before kernels serve for the first time, not only on demand."""


def numbers(device: torch.device, dtype: torch.dtype) -> Numbers:
    """In [-1, 1] without a pattern, the same on any device. The second gradients hold a spike, and one that is not
    finite."""
    sizes = [torch.Size(shape).numel() for shape in SHAPES] * (1 + STEPS)
    places = torch.arange(1, 1 + sum(sizes), dtype=torch.float64, device=device)
    found = places.square_().mul_(0.7).sin_().to(dtype).split(sizes)
    shaped = [x.view(shape).clone() for x, shape in zip(found, SHAPES * (1 + STEPS), strict=True)]
    several = [shaped[i : i + len(SHAPES)] for i in range(0, len(shaped), len(SHAPES))]
    several[2][1][1, 1] = 1e4
    several[2][2][1] = float("nan")
    return several


def _stepped(build: Callable[[list[Tensor], bool], Any]) -> Work:
    def work(given: Numbers, fused: bool) -> dict[str, Tensor]:
        params: list[Tensor] = [Parameter(x.clone()) for x in given[0]]
        optimizer = build(params, fused)
        step = type(optimizer).step
        step = getattr(step, "__wrapped__", step)  # without the hooks that others have put around every optimizer's
        for gradients in given[1:]:
            for p, grad in zip(params, gradients, strict=True):
                p.grad = grad
            step(optimizer)
        found = {f"parameter {i}": p.detach() for i, p in enumerate(params)}
        for i, p in enumerate(params):
            for name, value in optimizer.state[p].items():
                if isinstance(value, Tensor):
                    found[f"{name} {i}"] = value.dequantize() if hasattr(value, "codes") else value
        return found | dict(optimizer.stats)

    return work


def _stable_spam(**options: Any) -> Work:
    from evenstep.optim.stable_spam import StableSPAM

    given = {"weight_decay": 0.1, "reset_interval": STEPS, **options}
    return _stepped(lambda params, fused: StableSPAM(params, fused=fused, **given))


def _spam(**options: Any) -> Work:
    from evenstep.optim.spam import SPAM

    given = {"threshold": 50.0, "clip_start": 1, "reset_interval": 0, "weight_decay": 0.1, **options}
    serve = None if "density" in options else True  # not all kernels know masks
    return _stepped(lambda params, fused: SPAM(params, fused=fused and serve, **given))


def _scale(kinds: tuple[str, str], **options: Any) -> Work:
    from evenstep.optim.scale import SCALE

    def build(params: list[Tensor], fused: bool) -> Any:
        groups = [{"params": [p], "kind": kind} for p, kind in zip(params, (*kinds, "vector"), strict=True)]
        return SCALE(groups, weight_decay=0.1, fused=fused, **options)

    return _stepped(build)


def _transformed(given: Numbers, fused: bool) -> dict[str, Tensor]:
    """What `stabilize` uses: measure, clip, write the transformed gradients."""
    from evenstep.optim.swapped import _write
    from evenstep.transforms import Gradients, lockstep

    tensors = given[2]
    kernels = kernels_for(tensors[0].device.type) if fused else None
    assert not isinstance(kernels, str)
    [grads] = lockstep([Gradients.measure(tensors, torch.float32, kernels=kernels)], lambda requests: None)
    [grads] = lockstep([grads.clipped(grads.peak / 2).with_norms()], lambda requests: None)
    grads = grads.amplified(grads.norm + 0.5)
    outs = [torch.empty_like(g) for g in tensors]
    _write([(grads, i, g) for i, g in enumerate(tensors)], outs)
    found = {"largest entry": grads.peak, "norm": grads.norm}
    return found | {f"gradient {i}": out for i, out in enumerate(outs)}


@functools.cache
def cases() -> tuple[Case, ...]:
    """All uses of the kernels."""
    both, coarse = (torch.float32, torch.bfloat16), (torch.bfloat16,)
    found = [Case("measuring and transforming", "", _transformed)]
    optimizers: tuple[tuple[str, str, Callable[..., Work]], ...] = (
        ("Stable-SPAM", "StableSPAM", _stable_spam),
        ("SPAM", "SPAM", _spam),
        ("SCALE by rows and columns", "SCALE", functools.partial(_scale, ("hidden", "embedding"))),
        ("SCALE with momentum", "SCALE", functools.partial(_scale, ("hidden", "last"))),
    )
    for name, user, make in optimizers:
        found.append(Case(name, user, make()))
        for rounding in ("stochastic", "kahan"):
            found.append(Case(f"{name}, rounding {rounding}", user, make(rounding=rounding), coarse))
        for state in ("bf16", "int8"):
            found.append(Case(f"{name}, state {state}", user, make(state=state), both, at_once=False))
    found.append(Case("SPAM, density 0.5", "SPAM", _spam(density=0.5), devices=("cpu",)))
    return tuple(found)


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

_known: dict[tuple[str, torch.device, torch.dtype, str], str | None] = {}
"""Kernels, device, dtype and user -> what is wrong."""


def failing(kernels: Kernels, p: Tensor, user: type | None) -> str | None:
    """Why these kernels are not to be trusted with parameters such as ``p`` of an optimizer of class ``user``; None if
    they are. Looked into the first time alone, with one warning.
    """
    role = _role(user)
    key = (kernels.name, p.device, p.dtype, role)
    try:
        return _known[key]
    except KeyError:
        pass
    if _trying or _elsewhere(p):
        return None
    _known[key] = None
    given = numbers(p.device, p.dtype)
    for case in cases():
        if case.at_once and case.user in ("", role) and p.dtype in case.dtypes and p.device.type in case.devices:
            outcome = tried(case, given)
            if outcome.problem is not None:
                what = f"the kernel for {case.name} ({kernels.name}, {_short(p.dtype)}, {p.device}) {outcome.problem}"
                _known[key] = what
                warnings.warn(f"{what}; the plain code serves instead (see evenstep doctor --check)", stacklevel=2)
                break
    return _known[key]


@functools.cache
def _role(user: type | None) -> str:
    """Which optimizer of `cases` a class is, or comes from; "" for none of them."""
    roles = {case.user for case in cases()}
    return next((base.__name__ for base in (user.__mro__ if user else ()) if base.__name__ in roles), "")


def _elsewhere(p: Tensor) -> bool:
    """Whether operators now do not run as they stand: traced, recorded, or without data."""
    return isinstance(p, FakeTensor) or capturing(p.device) or under_observation()


# ---- on demand ----


def devices() -> Iterator[torch.device]:
    """Those for which there may be kernels."""
    yield torch.device("cpu")
    if torch.cuda.is_available():
        yield from (torch.device("cuda", i) for i in range(torch.cuda.device_count()))


def outcomes(device: torch.device) -> Iterator[Outcome]:
    """Of every case that a device has."""
    for case in cases():
        if device.type in case.devices and ("int8" not in case.name or importlib.util.find_spec("torchao")):
            for dtype in case.dtypes:
                yield tried(case, numbers(device, dtype))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
