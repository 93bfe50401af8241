"""The optimizers that are compared: one line each, with the package it is from and how a model becomes its groups.

Rules that hold for all: weight decay is 0, since with some it costs a pass over the parameters and with others nothing;
everything that decides the speed (foreach, fused, compile) is left to the library's own choice unless the name says
otherwise; clipping that sets in only after some steps is switched on at once, so that the timed steps do what most
steps of a training do (pytorch_optimizer's SPAM: after one step, as at the first it would zero every gradient for
good). What happens once in hundreds of steps (moment resets, new projections) is not in the timed steps.

Importing this needs no torch and none of the packages.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from evenstep.errors import EvenstepError, nearest

if TYPE_CHECKING:
    from torch import nn

REFERENCE = "adamw_fused"
LR = 1e-4  # small: the parameters shall stay where they are, however many steps are timed
PLAIN: dict[str, Any] = {"lr": LR, "weight_decay": 0.0}
RANK_SHARE = 4  # rank = width / 4, as the low-rank papers have it for LLaMA-60M to 1B


class Unavailable(Exception):
    """Why an optimizer does not take part, in a few words."""


class Steps(Protocol):
    """What is measured: a torch Optimizer, or several that step as one."""

    def step(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...


class Together:
    """Optimizers of different parameters that step as one."""

    def __init__(self, *optimizers: Steps) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"state": {i: optimizer.state_dict()["state"] for i, optimizer in enumerate(self.optimizers)}}


@dataclass(frozen=True)
class Entry:
    """``home`` is ``module:class``, ``package`` the name to install it by; ``build`` gets the class and the model."""

    package: str
    home: str
    build: Callable[[Any, nn.Module], Steps]
    note: str = ""

    @property
    def ours(self) -> bool:
        return self.package == "evenstep"

    def version(self) -> str | None:
        """The installed version of the package, None when it is not installed."""
        if self.ours:
            from evenstep import __version__

            return __version__
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def make(self, model: nn.Module) -> Steps:
        """The optimizer over ``model``'s parameters. Unavailable when it is not installed or does not fit the model."""
        if self.version() is None:
            raise Unavailable(f"not installed (pip install {self.package})")
        module, _, name = self.home.partition(":")
        try:
            return self.build(getattr(importlib.import_module(module), name), model)
        except (ImportError, AttributeError) as problem:
            raise Unavailable(_first_line(problem)) from problem


def _first_line(problem: Exception) -> str:
    return next(iter(str(problem).splitlines()), type(problem).__name__)


def _kinds(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """The hidden matrices, and all other parameters."""
    from evenstep.optim import scale_groups

    groups = {group["kind"]: [p for _, p in group["params"]] for group in scale_groups(model)}
    hidden = groups.pop("hidden", [])
    if not hidden:
        raise Unavailable("these shapes have no hidden matrix, the only kind it is for")
    return hidden, [p for members in groups.values() for p in members]


def _low_rank(model: nn.Module) -> list[dict[str, Any]]:
    """Hidden matrices projected, the rest as by Adam. Without ``rank`` in the group these optimizers are plain Adam."""
    hidden, rest = _kinds(model)
    rank = max(1, min(min(p.shape) for p in hidden) // RANK_SHARE)
    return [
        {"params": hidden, "rank": rank, "update_proj_gap": 200, "scale": 0.25, "projection_type": "std"},
        {"params": rest},
    ]


def _scale(cls: Any, model: nn.Module, **options: Any) -> Steps:
    from evenstep.optim import scale_groups

    return cls(scale_groups(model), lr=LR, **options)


def _stabilized(stabilize: Any, model: nn.Module) -> Steps:
    from torch.optim import AdamW

    from evenstep.transforms import AdaClip, AdaGN

    return stabilize(AdamW(model.parameters(), **PLAIN, fused=True), AdaClip(), AdaGN())


def _muon(cls: Any, model: nn.Module) -> Steps:
    from torch.optim import AdamW

    hidden, rest = _kinds(model)
    return Together(cls(hidden, **PLAIN), AdamW(rest, **PLAIN, fused=True))


def _adam_mini(cls: Any, model: nn.Module) -> Steps:
    config: Any = getattr(model, "config", None)
    heads = {"num_embeds": config.hidden_size, "num_heads": config.num_heads} if config else {}
    return cls(model, **PLAIN, **heads)


def _optimi(cls: Any, model: nn.Module) -> Steps:
    # StableAdamW's own choice is Triton wherever that is installed, on a CPU too, where it fails.
    triton = None if next(model.parameters()).is_cuda else False
    return cls(model.parameters(), **PLAIN, triton=triton)


_LOW = "hidden matrices with rank = width/4; the new projection every 200 steps is not in the time"
_PO = "pytorch_optimizer"

KNOWN: dict[str, Entry] = {
    "stable_spam": Entry("evenstep", "evenstep.optim:StableSPAM", lambda c, m: c(m.parameters(), lr=LR)),
    "stable_spam_bf16": Entry(
        "evenstep", "evenstep.optim:StableSPAM", lambda c, m: c(m.parameters(), lr=LR, state="bf16"), "bf16 moments"
    ),
    "stable_spam_int8": Entry(
        "evenstep", "evenstep.optim:StableSPAM", lambda c, m: c(m.parameters(), lr=LR, state="int8"), "8-bit moments"
    ),
    "stable_spam_plain": Entry(
        "evenstep", "evenstep.optim:StableSPAM", lambda c, m: c(m.parameters(), lr=LR, fused=False), "without kernels"
    ),
    "spam": Entry("evenstep", "evenstep.optim:SPAM", lambda c, m: c(m.parameters(), lr=LR, clip_start=0)),
    "spam_density_25": Entry(
        "evenstep",
        "evenstep.optim:SPAM",
        lambda c, m: c(m.parameters(), lr=LR, clip_start=0, density=0.25),
        "a quarter of the entries",
    ),
    "spam_plain": Entry(
        "evenstep",
        "evenstep.optim:SPAM",
        lambda c, m: c(m.parameters(), lr=LR, clip_start=0, fused=False),
        "without kernels",
    ),
    "scale": Entry("evenstep", "evenstep.optim:SCALE", _scale),
    "scale_plain": Entry("evenstep", "evenstep.optim:SCALE", lambda c, m: _scale(c, m, fused=False), "without kernels"),
    "stabilize_adamw": Entry("evenstep", "evenstep.optim:stabilize", _stabilized, "AdaClip, AdaGN, adamw_fused"),
    REFERENCE: Entry("torch", "torch.optim:AdamW", lambda c, m: c(m.parameters(), **PLAIN, fused=True), "reference"),
    f"{REFERENCE}_again": Entry(
        "torch", "torch.optim:AdamW", lambda c, m: c(m.parameters(), **PLAIN, fused=True), "how far from 1 is noise"
    ),
    "adamw_foreach": Entry("torch", "torch.optim:AdamW", lambda c, m: c(m.parameters(), **PLAIN, foreach=True)),
    "adam": Entry("torch", "torch.optim:Adam", lambda c, m: c(m.parameters(), **PLAIN), "torch's default form"),
    "muon": Entry("torch", "torch.optim:Muon", _muon, "hidden matrices; adamw_fused for the rest"),
    "adafactor": Entry("torch", "torch.optim:Adafactor", lambda c, m: c(m.parameters(), **PLAIN)),
    f"{_PO}:spam": Entry(
        _PO, f"{_PO}:SPAM", lambda c, m: c(m.parameters(), **PLAIN, grad_accu_steps=2), "dense, through a mask of ones"
    ),
    f"{_PO}:stable_spam": Entry(_PO, f"{_PO}:StableSPAM", lambda c, m: c(m.parameters(), **PLAIN)),
    f"{_PO}:lion": Entry(_PO, f"{_PO}:Lion", lambda c, m: c(m.parameters(), **PLAIN)),
    f"{_PO}:galore": Entry(_PO, f"{_PO}:GaLore", lambda c, m: c(_low_rank(m), **PLAIN), _LOW),
    f"{_PO}:apollo": Entry(_PO, f"{_PO}:APOLLO", lambda c, m: c(_low_rank(m), **PLAIN), _LOW),
    f"{_PO}:fira": Entry(_PO, f"{_PO}:Fira", lambda c, m: c(_low_rank(m), **PLAIN), _LOW),
    f"{_PO}:adam_mini": Entry(_PO, f"{_PO}:AdamMini", _adam_mini),
    "bitsandbytes:adamw8bit": Entry(
        "bitsandbytes", "bitsandbytes.optim:AdamW8bit", lambda c, m: c(m.parameters(), **PLAIN)
    ),
    "torchao:adamw8bit": Entry(
        "torchao", "torchao.optim:AdamW8bit", lambda c, m: c(m.parameters(), **PLAIN), "compiled"
    ),
    "torchao:adamw4bit": Entry(
        "torchao", "torchao.optim:AdamW4bit", lambda c, m: c(m.parameters(), **PLAIN), "compiled"
    ),
    "torchao:adamwfp8": Entry("torchao", "torchao.optim:AdamWFp8", lambda c, m: c(m.parameters(), **PLAIN), "compiled"),
    "optimi:adamw": Entry("torch-optimi", "optimi:AdamW", _optimi),
    "optimi:stableadamw": Entry("torch-optimi", "optimi:StableAdamW", _optimi),
}
"""Name -> optimizer. The names are stable: they are what ``--optimizers`` takes and what the JSON file says."""


def _family(name: str) -> str:
    """The set an optimizer belongs to: what stands before the colon of its name, or its package."""
    prefix, colon, _ = name.partition(":")
    return prefix if colon else KNOWN[name].package


SETS = ("all", "ours", "peers", *dict.fromkeys(map(_family, KNOWN)))
"""Names that stand for several optimizers."""


def chosen(names: Iterable[str]) -> list[str]:
    """The optimizers that ``names`` (of optimizers or of `SETS`) stand for, each once, the reference always among them.
    EvenstepError for a name that is neither.
    """
    wanted = {REFERENCE, *names}
    for name in wanted:
        if name not in KNOWN and name not in SETS:
            raise EvenstepError(
                f"--optimizers: unknown optimizer '{name}'{nearest(name, [*KNOWN, *SETS])}; "
                f"'evenstep bench list' shows them, and {', '.join(SETS)} stand for several"
            )
    return [
        name
        for name, entry in KNOWN.items()
        if wanted & {name, "all", "ours" if entry.ours else "peers", _family(name)}
    ]
