"""The optimizers: functional.py has the equations, optimizer.py the step, one file for each optimizer.

Names are loaded on first use, so that options.py can be read without torch.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

# Module -> the public names in it.
_MODULES = {
    "groups": ("scale_groups",),
    "scale": ("SCALE",),
    "spam": ("SPAM",),
    "stabilize": ("Stabilized", "stabilize"),
    "stable_spam": ("StableSPAM",),
    "transforms": (
        *("AGC", "AdaClip", "AdaGC", "AdaGN", "AutoClip", "GradientStabilizer", "MomentumReset"),
        *("NormClip", "SkipStep", "SpikeClip", "ValueClip", "ZClip"),
    ),
    "weight_rules": ("cautious_decay", "hyperball"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = [*_HOME]

if TYPE_CHECKING:  # type checkers and editors do not follow __getattr__
    from evenstep.optim.groups import scale_groups as scale_groups
    from evenstep.optim.scale import SCALE as SCALE
    from evenstep.optim.spam import SPAM as SPAM
    from evenstep.optim.stabilize import Stabilized as Stabilized
    from evenstep.optim.stabilize import stabilize as stabilize
    from evenstep.optim.stable_spam import StableSPAM as StableSPAM
    from evenstep.optim.transforms import AGC as AGC
    from evenstep.optim.transforms import AdaClip as AdaClip
    from evenstep.optim.transforms import AdaGC as AdaGC
    from evenstep.optim.transforms import AdaGN as AdaGN
    from evenstep.optim.transforms import AutoClip as AutoClip
    from evenstep.optim.transforms import GradientStabilizer as GradientStabilizer
    from evenstep.optim.transforms import MomentumReset as MomentumReset
    from evenstep.optim.transforms import NormClip as NormClip
    from evenstep.optim.transforms import SkipStep as SkipStep
    from evenstep.optim.transforms import SpikeClip as SpikeClip
    from evenstep.optim.transforms import ValueClip as ValueClip
    from evenstep.optim.transforms import ZClip as ZClip
    from evenstep.optim.weight_rules import cautious_decay as cautious_decay
    from evenstep.optim.weight_rules import hyperball as hyperball


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"evenstep.optim.{_HOME[name]}"), name)
        globals()[name] = value  # __getattr__ is asked once per name
        return value
    raise AttributeError(f"module 'evenstep.optim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


class _Package(ModuleType):
    """Python sets a submodule as an attribute of its package once it is imported. `stabilize` is the name of a
    submodule and of the function in it; the attribute is always the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "stabilize" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
