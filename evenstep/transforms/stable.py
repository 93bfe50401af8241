"""AdaClip and AdaGN, the two gradient transforms of Stable-SPAM (arXiv:2502.17055); AdaGN alone is GradientStabilizer
(its v3).
"""

import math

import torch
from torch import Tensor

from evenstep.transforms.clock import bias_correction
from evenstep.transforms.gradients import Gradients


def adaclip(grads: Gradients, peak_ema: Tensor, n: Tensor, gamma3: float) -> tuple[Gradients, Tensor]:
    """Clip each tensor's entries to a bias-corrected running mean of its largest entry.

    ``peak_ema`` and ``n`` (updates of this tensor, this one included) have shape ``[k]``. Returns the clipped gradients
    and the new EMA.
    """
    peak_ema = gamma3 * peak_ema + (1 - gamma3) * grads.largest
    return grads.clipped(peak_ema / bias_correction(gamma3, n)), peak_ema


def adagn(
    norm: Tensor, norm_ema: Tensor, norm_rms: Tensor, n: Tensor, gamma1: float | Tensor, gamma2: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gain that gives each tensor the norm ``mean / root-mean-square`` of its norm's history; 0 for a gradient that
    is zero, or whose norm is below the dtype's smallest normal number, which no gain could bring back.

    All of shape ``[k]``. ``norm_rms`` holds the square *root* of the running mean of squared norms, which cannot
    overflow where the norm itself does not. Returns the gain and the two new statistics.
    """
    norm_ema = gamma1 * norm_ema + (1 - gamma1) * norm
    norm_rms = torch.hypot(math.sqrt(gamma2) * norm_rms, math.sqrt(1 - gamma2) * norm)
    span = torch.finfo(norm.dtype)
    # Rounding may take the largest norms beyond the range, and Inf / Inf is no gain.
    mean = (norm_ema / bias_correction(gamma1, n)).clamp(max=span.max)
    root = (norm_rms / bias_correction(gamma2, n).sqrt() + eps).clamp(max=span.max)
    gain = (mean / root / norm).clamp(max=span.max)
    return torch.where(norm >= span.tiny, gain, 0.0), norm_ema, norm_rms
