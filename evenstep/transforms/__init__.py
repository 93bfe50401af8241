"""The gradient transforms of `stabilize`; they live in `evenstep.optim.transforms`."""

from evenstep.optim.transforms import (
    AGC,
    AdaClip,
    AdaGC,
    AdaGN,
    AutoClip,
    GradientStabilizer,
    MomentumReset,
    NormClip,
    SkipStep,
    SpikeClip,
    Statistics,
    StepInfo,
    Transform,
    ValueClip,
    ZClip,
)

__all__ = [
    "AGC",
    "AdaClip",
    "AdaGC",
    "AdaGN",
    "AutoClip",
    "GradientStabilizer",
    "MomentumReset",
    "NormClip",
    "SkipStep",
    "SpikeClip",
    "Statistics",
    "StepInfo",
    "Transform",
    "ValueClip",
    "ZClip",
]
