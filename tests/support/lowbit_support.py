"""Formats, tensors and recorded outputs that the tests of low-bit formats share."""

import dataclasses
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from evenstep.kernels import cpu_quant
from evenstep.lowbit import FORMATS, Format, fake_quant

VECTORS = Path(__file__).parents[1] / "data" / "vectors"
OURS = [name for name, fmt in FORMATS.items() if not fmt.official]
EXTRA = {
    "asymmetric": Format("int3", group=32, symmetric=False),
    "columns": Format("e2m1", group=16, axis=0),
    "blocks": Format("int4", group=5, block_rows=3),
    "bf16 scale": Format("int4", group=32, scale="bf16"),
    "fp16 scale": Format("e2m1", group=32, scale="fp16"),
    "outliers": Format("e2m1", group=256, outliers=2),
    "three outliers": Format("int4", group=16, outliers=3),
    "stochastic": dataclasses.replace(FORMATS["nvfp4-row"], rounding="stochastic"),
}
ALL = {**FORMATS, **EXTRA}


needs_kernel = pytest.mark.skipif(not cpu_quant.ready(), reason="this installation has no compiled CPU kernels")


@contextmanager
def plain_code():
    """Within it no kernel serves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_quant, "kernel_serves", lambda *args: False)
        yield


def recorded(name: str) -> dict[str, torch.Tensor]:
    with np.load(VECTORS / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if key != "recipe"}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    return torch.randn(50, 64, generator=draw), torch.randn(48, 64, generator=draw), torch.randn(50, 48, generator=draw)
