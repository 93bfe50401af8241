"""Hyperparameters of the optimizers most used, and their defaults, for ``--help``, completion and the reference page.

The truth is each constructor's signature, which training checks options against. This copy exists because reading a
signature needs torch, and ``evenstep pretrain --help`` has to be quick; a test holds the two equal. The others are told
of by ``evenstep optimizers NAME``.
"""

from __future__ import annotations

from typing import Any

from evenstep.baselines.rules import DENSITY_OF

HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "stable_spam": {
        "betas": (0.9, 0.999), "eps": 1e-8, "gamma1": 0.7, "gamma2": 0.9, "gamma3": 0.999, "total_steps": None,
        "eta_min": 0.5, "reset_interval": 1000, "variant": "paper", "rounding": "nearest", "state": "fp32",
    },
    "spam": {
        "betas": (0.9, 0.999), "eps": 1e-6, "threshold": 5000.0, "reset_interval": 500, "warmup_steps": 150,
        "clip_start": 20, "density": 1.0, "variant": "paper", "rounding": "nearest", "state": "fp32",
        "density_of": "all",
    },
    "scale": {
        "momentum": 0.9, "adam_lr": None, "betas": (0.9, 0.999), "eps": 1e-8, "norm": "rms", "rounding": "nearest",
        "state": "fp32",
    },
    "adamw": {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False},
    "adam": {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False, "decoupled_weight_decay": False},
    "sgd": {"momentum": 0.9, "dampening": 0, "nesterov": False},
}  # fmt: skip

CHOICES: dict[str, tuple[str, ...]] = {
    "variant": ("paper", "official"),
    "norm": ("rms", "l2"),
    "density_of": DENSITY_OF,
    "rounding": ("nearest", "stochastic", "kahan"),
    "state": ("fp32", "bf16", "int8"),
    "amsgrad": ("true", "false"),
    "decoupled_weight_decay": ("true", "false"),
    "nesterov": ("true", "false"),
}


def owners() -> dict[str, dict[str, Any]]:
    """Hyperparameter -> optimizer -> default, in the order of the table."""
    found: dict[str, dict[str, Any]] = {}
    for optimizer, values in HYPERPARAMETERS.items():
        for name, default in values.items():
            found.setdefault(name, {})[optimizer] = default
    return found
