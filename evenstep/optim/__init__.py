"""The optimizers."""

from evenstep.optim.groups import scale_groups
from evenstep.optim.scale import SCALE
from evenstep.optim.spam import SPAM
from evenstep.optim.stabilize import Stabilized, stabilize
from evenstep.optim.stable_spam import StableSPAM
from evenstep.transforms import (
    AGC,
    AdaClip,
    AdaGN,
    AutoClip,
    GradientStabilizer,
    MomentumReset,
    NormClip,
    SkipStep,
    SpikeClip,
    ValueClip,
    ZClip,
)

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
