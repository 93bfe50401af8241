"""What the optimizers are made of: each equation of the papers, once, as functions on lists of tensors."""

from evenstep.transforms.adam import AdamStep, Weights, adam_, opened
from evenstep.transforms.blocks import blocks
from evenstep.transforms.checks import CHECKS, check
from evenstep.transforms.clock import bias_correction, cosine_factor, reset_due, rewarm_factor
from evenstep.transforms.column_norm import floored, row_blocks, row_norms, squared_norms
from evenstep.transforms.gradients import Gradients
from evenstep.transforms.lockstep import Combine, Steps, combined, lockstep
from evenstep.transforms.rounding import ROUNDINGS, write
from evenstep.transforms.spike_clip import SpikeClip
from evenstep.transforms.stable import adaclip, adagn
from evenstep.transforms.units import AdaClip, AdaGN, GradientStabilizer, Transform

__all__ = [
    "CHECKS",
    "ROUNDINGS",
    "AdaClip",
    "AdaGN",
    "AdamStep",
    "Combine",
    "GradientStabilizer",
    "Gradients",
    "SpikeClip",
    "Steps",
    "Transform",
    "Weights",
    "adaclip",
    "adagn",
    "adam_",
    "bias_correction",
    "blocks",
    "check",
    "combined",
    "cosine_factor",
    "floored",
    "lockstep",
    "opened",
    "reset_due",
    "rewarm_factor",
    "row_blocks",
    "row_norms",
    "squared_norms",
    "write",
]
