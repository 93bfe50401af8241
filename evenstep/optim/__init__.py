"""The optimizers: functional.py has the equations, optimizer.py the step, one file for each optimizer.

Names are loaded on first use, so that options.py can be read without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "AGC": "transforms",
    "AdaClip": "transforms",
    "AdaGN": "transforms",
    "AutoClip": "transforms",
    "GradientStabilizer": "transforms",
    "MomentumReset": "transforms",
    "NormClip": "transforms",
    "SCALE": "scale",
    "SPAM": "spam",
    "SkipStep": "transforms",
    "SpikeClip": "transforms",
    "Stabilized": "stabilize",
    "StableSPAM": "stable_spam",
    "ValueClip": "transforms",
    "ZClip": "transforms",
    "scale_groups": "groups",
    "stabilize": "stabilize",
}
__all__ = [
    "AGC",
    "SCALE",
    "SPAM",
    "AdaClip",
    "AdaGN",
    "AutoClip",
    "GradientStabilizer",
    "MomentumReset",
    "NormClip",
    "SkipStep",
    "SpikeClip",
    "Stabilized",
    "StableSPAM",
    "ValueClip",
    "ZClip",
    "scale_groups",
    "stabilize",
]

if TYPE_CHECKING:
    from evenstep.optim.groups import scale_groups as scale_groups
    from evenstep.optim.scale import SCALE as SCALE
    from evenstep.optim.spam import SPAM as SPAM
    from evenstep.optim.stabilize import Stabilized as Stabilized
    from evenstep.optim.stabilize import stabilize as stabilize
    from evenstep.optim.stable_spam import StableSPAM as StableSPAM
    from evenstep.optim.transforms import AGC as AGC
    from evenstep.optim.transforms import AdaClip as AdaClip
    from evenstep.optim.transforms import AdaGN as AdaGN
    from evenstep.optim.transforms import AutoClip as AutoClip
    from evenstep.optim.transforms import GradientStabilizer as GradientStabilizer
    from evenstep.optim.transforms import MomentumReset as MomentumReset
    from evenstep.optim.transforms import NormClip as NormClip
    from evenstep.optim.transforms import SkipStep as SkipStep
    from evenstep.optim.transforms import SpikeClip as SpikeClip
    from evenstep.optim.transforms import ValueClip as ValueClip
    from evenstep.optim.transforms import ZClip as ZClip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"evenstep.optim.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'evenstep.optim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
