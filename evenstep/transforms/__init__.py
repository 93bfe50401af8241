"""What the optimizers are made of: each equation of the papers, once, as functions on lists of tensors."""

from evenstep.transforms.adam import AdamStep, Weights, adam_, close, filled, opened
from evenstep.transforms.blocks import blocks
from evenstep.transforms.checks import CHECKS, check, host_values
from evenstep.transforms.clock import bias_correction, cosine_factor, reset_due, rewarm_factor
from evenstep.transforms.column_norm import FLOOR, floored, row_blocks, row_norms, squared_norms
from evenstep.transforms.gradients import Gradients
from evenstep.transforms.lockstep import Combine, Steps, combined, lockstep
from evenstep.transforms.model_wide import AutoClip, NormClip, SkipStep, ZClip
from evenstep.transforms.momentum_reset import MomentumReset
from evenstep.transforms.rounding import noise_seeds
from evenstep.transforms.spike_clip import EntryClip
from evenstep.transforms.stable import adaclip, adagn
from evenstep.transforms.transform import Now, Statistics, Transform, shared_dtype
from evenstep.transforms.units import AGC, AdaClip, AdaGN, GradientStabilizer, SpikeClip, ValueClip

__all__ = [
    "AGC",
    "CHECKS",
    "FLOOR",
    "AdaClip",
    "AdaGN",
    "AdamStep",
    "AutoClip",
    "Combine",
    "EntryClip",
    "GradientStabilizer",
    "Gradients",
    "MomentumReset",
    "NormClip",
    "Now",
    "SkipStep",
    "SpikeClip",
    "Statistics",
    "Steps",
    "Transform",
    "ValueClip",
    "Weights",
    "ZClip",
    "adaclip",
    "adagn",
    "adam_",
    "bias_correction",
    "blocks",
    "check",
    "close",
    "combined",
    "cosine_factor",
    "filled",
    "floored",
    "host_values",
    "lockstep",
    "noise_seeds",
    "opened",
    "reset_due",
    "rewarm_factor",
    "row_blocks",
    "row_norms",
    "shared_dtype",
    "squared_norms",
]
