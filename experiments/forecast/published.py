"""What others published, and the claims that our runs are held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PATCHTST_ETTH1 = {96: (0.375, 0.399), 192: (0.414, 0.421), 336: (0.431, 0.436), 720: (0.449, 0.466)}
"""Horizon -> MSE, MAE of PatchTST/42 on ETTh1 (arXiv:2211.14730, Table 3: lookback 336, one seed, the last batch of the
test part left out)."""

NLINEAR_ETTH1 = {96: (0.374, 0.394), 192: (0.408, 0.415), 336: (0.429, 0.427), 720: (0.440, 0.453)}
"""The same of NLinear, one linear layer after the last value is taken off (arXiv:2205.13504)."""


@dataclass(frozen=True)
class Claim:
    """``better`` has the lower test error than ``worse`` on corrupted inputs, says ``paper``."""

    better: str
    worse: str
    paper: str


CLAIMS: Sequence[Claim] = (
    Claim("spam", "adam", "SPAM, arXiv:2501.06842"),
    Claim("stable-spam", "adam", "Stable-SPAM, arXiv:2502.17055 v1, Figure 9"),
    Claim("stable-spam", "spam", "Stable-SPAM, arXiv:2502.17055 v1, Figure 9"),
    Claim("stabilizer", "adam", "GradientStabilizer, arXiv:2502.17055 v3"),
    Claim("stabilizer", "adamw-clip", "GradientStabilizer, arXiv:2502.17055 v3"),
)
