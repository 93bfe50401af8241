"""The optimizers."""

from evenstep.optim.groups import scale_groups
from evenstep.optim.scale import SCALE
from evenstep.optim.spam import SPAM
from evenstep.optim.stabilize import Stabilized, stabilize
from evenstep.optim.stable_spam import StableSPAM
from evenstep.transforms import AdaClip, AdaGN, GradientStabilizer

__all__ = [
    "SCALE",
    "SPAM",
    "AdaClip",
    "AdaGN",
    "GradientStabilizer",
    "Stabilized",
    "StableSPAM",
    "scale_groups",
    "stabilize",
]
