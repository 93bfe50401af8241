"""What the parity tests of the Triton kernels share: the device, awkward tensors, how close is equal."""

import os

import pytest
import torch

from evenstep.kernels import cuda_launch
from evenstep.kernels.cuda import TritonKernels
from evenstep.kernels.interface import Measured, StepTensors
from evenstep.optim.functional import completed

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if INTERPRETED:
    import triton_interpreter

    triton_interpreter.mend()
    cuda_launch.CHUNK, cuda_launch.TILE = 512, 256  # several chunks and rounds in small tensors
    cuda_launch.COLUMN_ROWS = 32
KERNELS = TritonKernels()
FLOAT, BF16 = torch.float32, torch.bfloat16
NUMBERS = torch.Generator().manual_seed(0)
# A float that is computed another way may round to the bf16 number beside.
CLOSE = {FLOAT: {"rtol": 1e-6, "atol": 1e-9}, BF16: {"rtol": 8e-3, "atol": 1e-9}}


def randn(*shape, dtype=FLOAT, scale=1.0):
    return (torch.randn(shape, generator=NUMBERS) * scale).to(dtype).to(DEVICE)


def unaligned(*shape, dtype=FLOAT):
    n = torch.Size(shape).numel()
    return randn(n + 1, dtype=dtype)[1:].view(shape)


def sample():
    """Gradients of every awkward kind."""
    return [
        randn(1300),
        randn(33, 7, dtype=BF16),
        torch.zeros(0, 5, device=DEVICE),
        torch.zeros(70, device=DEVICE),
        randn(),
        unaligned(1025),
        unaligned(513, dtype=BF16),
        randn(512, scale=1e30),
        randn(40, scale=3e19),  # its squares overflow where what is kept of them does not
        randn(600, scale=1e-30),
        torch.cat([randn(700), torch.tensor([1e30], device=DEVICE)]),
        torch.cat([randn(600), torch.tensor([float("nan")], device=DEVICE), randn(40)]),
        torch.cat([torch.tensor([float("-inf")], device=DEVICE), randn(40)]),
        randn(16, 32),
    ]


@pytest.fixture(autouse=True)
def seeded():
    NUMBERS.manual_seed(0)


run = completed


def adam_(params, grads, exp_avg, exp_avg_sq, numbers, lost=(), seeds=(), capped=False, zero_history=False):
    """Launch Adam's kernel: norm of the update, norm after clipping by history, entries clipped; ``[k]`` each."""
    tensors = StepTensors(params, grads, exp_avg, exp_avg_sq, lost=list(lost), seeds=list(seeds))
    job = cuda_launch.adam_job(tensors)
    cuda_launch.adam_update_(job, tensors, numbers, capped, zero_history)
    found = cuda_launch._totals(job.plan, job.partial, maxima=0, norms=1 + capped, sums=int(capped)).unbind()
    return found if capped else (*found, torch.zeros_like(found[0]), torch.zeros_like(found[0]))


def rows_(params, grads, exp_avg, divisors, numbers, lost=(), seeds=()):
    """Launch SCALE's kernel: norm of each normalised tensor ``[k]``."""
    tensors = StepTensors(params, grads, exp_avg, lost=list(lost), seeds=list(seeds))
    job = cuda_launch.scale_job(tensors, False, divisors)
    cuda_launch.scale_update_(job, tensors, numbers, bool(divisors), 1e-8)
    return cuda_launch._totals(job.updating, job.directions, maxima=0, norms=1, sums=0)[0]


def columns(grads):
    """Largest entries and norms ``[k]``, the squared norms of columns in the shape of one row, and the columns' RMS."""
    job, k = cuda_launch.scale_job(StepTensors(grads, grads), True), len(grads)
    cuda_launch.scale_columns(job, k, True, 1e-8)
    peak, norm = cuda_launch._totals(job.measuring, job.partial, maxima=1, norms=1, sums=0)
    lengths = [g[0].numel() if len(g) else g.shape[1] for g in grads]
    parts = torch.split(
        job.sums, [-(-len(g) // cuda_launch.COLUMN_ROWS) * n for g, n in zip(grads, lengths, strict=True)]
    )
    sums = [x.view(-1, n).sum(0).view(1, *g.shape[1:]) for x, n, g in zip(parts, lengths, grads, strict=True)]
    return Measured(peak, norm, ()), sums, torch.split(job.divisors, lengths)


def vector(k, low, high):
    return (torch.rand(k, generator=NUMBERS) * (high - low) + low).to(DEVICE)


def same(found, expected, **how):
    torch.testing.assert_close(found, expected.to(found.dtype), **(how or CLOSE[FLOAT]))


def copies(tensors):
    """Copies with their own memory and the same alignment."""
    return [
        x.clone() if hasattr(x, "codes") else torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        for x in tensors
    ]


def fill(stored, values):
    stored.copy_(values)
    return stored
