"""The optimizers that the conformance checks are run on, and what the checks are made of.

A check is a function of one `Subject`. It returns nothing when the promise holds, a sentence when the optimizer refuses
with an explanation, and raises otherwise.
"""

import copy
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evenstep import SCALE, SPAM, AdaClip, AdaGN, StableSPAM, stabilize

SHAPES = ((), (3,), (4, 5), (2, 3, 4), (2, 3, 2, 2))
LR = 0.01


@dataclass(frozen=True)
class Subject:
    """An optimizer under test: ``build(params, **options)`` makes it, with resets every 7 steps where it has resets."""

    name: str
    build: Callable[..., Optimizer]
    groups: Callable[[Any], Any] = lambda params: params
    """What its constructor needs instead of plain params."""
    base: "Subject | None" = None
    """What it wraps."""

    def make(self, params: Any, **options: Any) -> Optimizer:
        return self.build(self.groups(params), **{"lr": LR, **options})

    def add(self, optimizer: Optimizer, group: dict[str, Any]) -> None:
        for part in self.groups([group]):
            optimizer.add_param_group(part)


def with_kinds(params: Any) -> Any:
    """Groups for SCALE: vectors, the last matrix, and the other matrices, each group split where it holds several."""
    if isinstance(params, Tensor):
        return params
    given = list(params)
    if not given:
        return given
    groups = given if isinstance(given[0], dict) else [{"params": given}]
    split = []
    for group in groups:
        members = group["params"]
        members = [members] if isinstance(members, Tensor) else list(members)
        tensors = [member[1] if isinstance(member, tuple) else member for member in members]
        matrices = [m for m, x in zip(members, tensors, strict=True) if not isinstance(x, Tensor) or x.dim() > 1]
        vectors = [m for m, x in zip(members, tensors, strict=True) if isinstance(x, Tensor) and x.dim() < 2]
        parts = {"hidden": matrices[:-1], "last": matrices[-1:], "vector": vectors}
        kinds = [kind for kind, some in parts.items() if some] or ["hidden"]
        split += [group | {"params": parts[kind], "kind": kind} for kind in kinds]
    return split


def _adamw(params: Any, **options: Any) -> Optimizer:
    return torch.optim.AdamW(params, **options)


def _port(name: str) -> Callable[..., Optimizer]:
    def build(params: Any, **options: Any) -> Optimizer:
        import pytorch_optimizer

        own = {"warmup_epoch": 3, "grad_accu_steps": 2} if name == "SPAM" else {}
        return getattr(pytorch_optimizer, name)(params, **{"update_proj_gap": 7, **own, **options})

    return build


OTHERS = (
    Subject("torch AdamW", _adamw),
    Subject("pytorch_optimizer SPAM", _port("SPAM")),
    Subject("pytorch_optimizer StableSPAM", _port("StableSPAM")),
)
_SPAM = {"reset_interval": 7, "warmup_steps": 3, "clip_start": 2}
OURS = (
    Subject("SPAM", lambda ps, **options: SPAM(ps, **_SPAM, **options)),
    Subject("SPAM, density 0.25", lambda ps, **options: SPAM(ps, **_SPAM, density=0.25, **options)),
    Subject("StableSPAM", lambda ps, **options: StableSPAM(ps, reset_interval=7, **options)),
    Subject("SCALE", SCALE, with_kinds),
    Subject(
        "stabilize(AdamW)",
        lambda ps, **options: stabilize(_adamw(ps, **options), AdaClip(), AdaGN(), reset_interval=7),
        base=OTHERS[0],
    ),
)


# ---- the table of checks ----


@dataclass(frozen=True)
class Check:
    area: str
    title: str
    run: Callable[[Subject], str | None]


CHECKS: list[Check] = []


def check(area: str, title: str, cases: Iterable[Any] | None = None) -> Callable[..., Any]:
    """Enter a function into the table; with ``cases`` once for each, ``{}`` in the title standing for the case."""

    def enter(function: Callable[..., str | None]) -> Callable[..., str | None]:
        if cases is None:
            CHECKS.append(Check(area, title, function))
        else:
            for case in cases:
                CHECKS.append(Check(area, title.format(case), lambda subject, case=case: function(subject, case)))
        return function

    return enter


def outcome(entry: Check, subject: Subject) -> tuple[str, str]:
    """("passes" | "refuses" | "fails", what it said)."""
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said = entry.run(subject)
    except Exception as error:
        return "fails", f"{type(error).__name__}: {error}".splitlines()[0]
    return ("refuses", said) if said else ("passes", "")


def refusal(act: Callable[[], Any], *words: str) -> str | None:
    """What ``act`` says when it raises an error that names one of ``words``; None when it does not raise.

    An error that says nothing of the matter is a failure and goes on.
    """
    try:
        act()
    except Exception as error:
        if any(word in str(error) for word in words):
            return f"{type(error).__name__}: {error}"
        raise
    return None


def must_refuse(act: Callable[[], Any], *words: str) -> None:
    assert refusal(act, *words), "accepted without a word"


# ---- material ----


def make_params(shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def gradient(p: Tensor, step: int, place: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + place)
    return torch.randn(p.shape, generator=generator).to(p)


def give(params: Sequence[Tensor], step: int, scale: float = 1.0) -> None:
    for place, p in enumerate(params):
        p.grad = gradient(p, step, place) * scale


def train(optimizer: Optimizer, params: Sequence[Tensor], steps: Iterable[int]) -> None:
    for step in steps:
        give(params, step)
        optimizer.step()


def values(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def same(a: Any, b: Any) -> bool:
    """Bitwise, with NaN equal to NaN, through dicts and sequences."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def snapshot(optimizer: Optimizer) -> dict[str, Any]:
    return copy.deepcopy(optimizer.state_dict())


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint goes: saved, and loaded with weights_only."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def group_of(optimizer: Optimizer, p: Tensor) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if any(q is p for q in group["params"]))
