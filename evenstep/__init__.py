"""evenstep: training that holds steady.

The public names are loaded on first use, so that ``import evenstep`` costs next to nothing, prints nothing and touches
no device.
"""

from typing import TYPE_CHECKING, Any

from evenstep.version import __version__ as __version__

_HOME = {
    "SPAM": "evenstep.optim",
    "StableSPAM": "evenstep.optim",
    "SCALE": "evenstep.optim",
    "scale_groups": "evenstep.optim",
    "stabilize": "evenstep.optim",
    "quantize_": "evenstep.lowbit",
    "AdaClip": "evenstep.optim",
    "AdaGN": "evenstep.optim",
    "GradientStabilizer": "evenstep.optim",
    "ZClip": "evenstep.optim",
    "ValueClip": "evenstep.optim",
    "SpikeClip": "evenstep.optim",
    "SkipStep": "evenstep.optim",
    "NormClip": "evenstep.optim",
    "MomentumReset": "evenstep.optim",
    "AdaGC": "evenstep.optim",
    "AutoClip": "evenstep.optim",
    "AGC": "evenstep.optim",
    "SpikeGuard": "evenstep.telemetry.guard",
    "SpikeMonitor": "evenstep.telemetry.monitor",
    "register_optimizer": "evenstep.baselines.catalog",
}
__all__ = [*sorted(_HOME), "__version__"]

if TYPE_CHECKING:
    from evenstep.baselines.catalog import register_optimizer as register_optimizer
    from evenstep.lowbit import quantize_ as quantize_
    from evenstep.optim import AGC as AGC
    from evenstep.optim import SCALE as SCALE
    from evenstep.optim import SPAM as SPAM
    from evenstep.optim import AdaClip as AdaClip
    from evenstep.optim import AdaGC as AdaGC
    from evenstep.optim import AdaGN as AdaGN
    from evenstep.optim import AutoClip as AutoClip
    from evenstep.optim import GradientStabilizer as GradientStabilizer
    from evenstep.optim import MomentumReset as MomentumReset
    from evenstep.optim import NormClip as NormClip
    from evenstep.optim import SkipStep as SkipStep
    from evenstep.optim import SpikeClip as SpikeClip
    from evenstep.optim import StableSPAM as StableSPAM
    from evenstep.optim import ValueClip as ValueClip
    from evenstep.optim import ZClip as ZClip
    from evenstep.optim import scale_groups as scale_groups
    from evenstep.optim import stabilize as stabilize
    from evenstep.telemetry.guard import SpikeGuard as SpikeGuard
    from evenstep.telemetry.monitor import SpikeMonitor as SpikeMonitor


def __getattr__(name: str) -> Any:
    if name in _HOME:
        import importlib

        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'evenstep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
