"""The optimizers of the step benchmark, one line each, with options and a note. `evenstep.baselines.catalog` has the
class of each name and the rule that turns a model into its parameter groups.

Rules for all entries: weight decay is 0, because it costs some optimizers a pass over the parameters and others
nothing. Options that decide the speed (foreach, fused, compile) are the library's default unless the name says
otherwise. Clipping that would begin only after some steps is active from the start, so that the timed steps do the work
of most steps of a training run (pytorch_optimizer's SPAM begins after one step: at the first one it would zero every
gradient for good). Work that happens once in hundreds of steps (moment resets, new projections) is not timed.

The import of this module loads neither torch nor any of the packages.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from evenstep.baselines.catalog import Baseline, baseline
from evenstep.errors import EvenstepError, nearest

if TYPE_CHECKING:
    from torch import nn

REFERENCE = "adamw_fused"
LR = 1e-4  # small, so that the parameters barely move, however many steps are timed


class Unavailable(Exception):
    """The reason why an optimizer does not take part, in a few words."""


class Steps(Protocol):
    """The methods of a torch Optimizer that the benchmark uses."""

    def step(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Entry:
    """``of``: a name of the catalog, or a baseline. ``before``: gradient transforms applied before its step."""

    of: str | Baseline
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    before: str = ""

    @property
    def baseline(self) -> Baseline:
        return baseline(self.of) if isinstance(self.of, str) else self.of

    @property
    def package(self) -> str:
        return self.baseline.package if not self.before else "evenstep"

    @property
    def home(self) -> str:
        return self.baseline.home

    @property
    def ours(self) -> bool:
        return self.package == "evenstep"

    def version(self) -> str | None:
        """The installed version of the package, or None."""
        return self.baseline.version()

    def make(self, model: nn.Module) -> Steps:
        """Build the optimizer over ``model``'s parameters. Raises Unavailable if its package is not installed, or if
        it does not fit the model."""
        if self.version() is None:
            raise Unavailable(f"not installed (pip install {self.package})")
        from evenstep.baselines.transforms import add_transforms

        try:
            return add_transforms(self.baseline.build(model, lr=LR, **self.options), self.before)
        except EvenstepError as problem:
            raise Unavailable(str(problem)) from problem


_LOW = "hidden matrices with rank = width/4; the new projection every 200 steps is not in the time"
_PO = "pytorch_optimizer"
_OWN_CHOICE = {"fused": None}

KNOWN: dict[str, Entry] = {
    "stable_spam": Entry("stable_spam"),
    "stable_spam_bf16": Entry("stable_spam", {"state": "bf16"}, "bf16 moments"),
    "stable_spam_int8": Entry("stable_spam", {"state": "int8"}, "8-bit moments"),
    "stable_spam_plain": Entry("stable_spam", {"fused": False}, "without kernels"),
    "spam": Entry("spam", {"clip_start": 0}),
    "spam_density_25": Entry("spam", {"clip_start": 0, "density": 0.25}, "a quarter of the entries"),
    "spam_plain": Entry("spam", {"clip_start": 0, "fused": False}, "without kernels"),
    "scale": Entry("scale"),
    "scale_plain": Entry("scale", {"fused": False}, "without kernels"),
    "stabilize_adamw": Entry("adamw", {}, "AdaClip, AdaGN, adamw_fused", before="adaclip + adagn"),
    REFERENCE: Entry("adamw", {}, "reference"),
    f"{REFERENCE}_again": Entry("adamw", {}, "how far from 1 is noise"),
    "adamw_foreach": Entry("adamw", {"fused": None, "foreach": True}),
    "adam": Entry("adam", _OWN_CHOICE, "torch's default form"),
    "muon": Entry("muon", {"adjust_lr_fn": None}, "hidden matrices; adamw_fused for the rest"),
    "adafactor": Entry("adafactor"),
    f"{_PO}:spam": Entry("peer_spam", {"grad_accu_steps": 2}, "dense, through a mask of ones"),
    f"{_PO}:stable_spam": Entry("peer_stable_spam"),
    f"{_PO}:lion": Entry("lion"),
    f"{_PO}:galore": Entry("galore", {}, _LOW),
    f"{_PO}:apollo": Entry("peer_apollo", {}, _LOW),
    f"{_PO}:fira": Entry("fira", {}, _LOW),
    f"{_PO}:adam_mini": Entry("adam_mini"),
    "bitsandbytes:adamw8bit": Entry("bnb_adamw8bit"),
    "torchao:adamw8bit": Entry("ao_adamw8bit", {}, "compiled"),
    "torchao:adamw4bit": Entry("ao_adamw4bit", {}, "compiled"),
    "torchao:adamwfp8": Entry("ao_adamwfp8", {}, "compiled"),
    "optimi:adamw": Entry("optimi_adamw"),
    "optimi:stableadamw": Entry("optimi_stableadamw"),
}
"""Name -> optimizer. The names are stable: ``--optimizers`` accepts them, and JSON files contain them."""


def _family(name: str) -> str:
    """The set that an optimizer belongs to: the part of its name before the colon, or its package."""
    prefix, colon, _ = name.partition(":")
    return prefix if colon else KNOWN[name].package


SETS = ("all", "ours", "peers", *dict.fromkeys(map(_family, KNOWN)))
"""Names that stand for several optimizers."""


def chosen(names: Iterable[str]) -> list[str]:
    """Expand ``names`` of optimizers and of `SETS` to optimizers, each once, always including the reference.

    Raises:
        EvenstepError: for a name that is neither an optimizer nor a set.
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
