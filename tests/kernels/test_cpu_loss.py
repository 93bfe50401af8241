"""The cross entropy on a CPU by its kernel: that of fp64, in every build and with any number of threads."""

import ctypes

import pytest
import torch
from torch.nn import functional as F

from evenstep.kernels import cpu as cpu_library
from evenstep.kernels import cpu_loss
from evenstep.models import ops

pytestmark = pytest.mark.skipif(not cpu_loss.ready(), reason="no CPU kernels here")

SHAPES = [(1, 1), (3, 2), (5, 31), (4, 32), (3, 33), (7, 1000), (2, 4099)]


@pytest.fixture(params=["default", "avx2", "avx512"])
def build(request, monkeypatch):
    """Each build that this processor runs."""
    if request.param not in cpu_library.usable():
        pytest.skip(f"this processor does not run {request.param}, or it is not built")
    loaded = ctypes.CDLL(str(cpu_library._file(request.param)))
    monkeypatch.setattr(cpu_loss, "library", lambda: loaded)
    return request.param


def example(rows, words, dtype, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, words, generator=generator) * scale).to(dtype)
    return logits, torch.randint(words, (rows, 1), generator=generator), torch.rand(rows, 1, generator=generator) < 0.8


def exact(logits, picked, counts, z_loss):
    """Sums and derivative in fp64, by autograd; the derivative of the rows that count."""
    x = logits.double().requires_grad_()
    lse = x.logsumexp(1, keepdim=True)
    each = torch.stack([(lse - x.gather(1, picked)), z_loss * lse.square()])
    sums = (each * counts).sum((1, 2))
    sums.sum().backward()
    return sums.detach(), x.grad


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("scale", [1e-3, 3.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_derivative_are_those_of_fp64(build, shape, dtype, scale, z_loss):
    logits, picked, counts = example(*shape, dtype, scale)
    want, slope = exact(logits, picked, counts, z_loss)
    given = logits.clone()
    sums, dlogits = cpu_loss.terms(given, picked, counts, z_loss, None, True)
    assert dlogits is given and sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), want, rtol=1e-6, atol=1e-5)
    relative = 2e-6 if dtype == torch.float32 else 2**-8
    most = relative * float(slope.abs().max().clamp(min=1))
    assert ((dlogits.double() - slope)[counts[:, 0]].abs() <= relative * slope[counts[:, 0]].abs() + most / 8).all()
    again = logits.clone()
    torch.testing.assert_close(cpu_loss.terms(again, picked, counts, z_loss, None, False)[0], sums, rtol=0, atol=0)
    assert torch.equal(again, logits)  # without gradients nothing is written


def test_entries_that_are_not_finite(build):
    """-Inf is a word without probability. A NaN or +Inf makes the loss NaN where the row counts, as in torch."""
    logits = torch.randn(4, 50)
    logits[0, 3] = -torch.inf
    logits[1, 3], logits[2, 3] = torch.nan, torch.inf
    picked = torch.zeros(4, 1, dtype=torch.int64)
    only = torch.tensor([[True], [False], [False], [True]])
    want = F.cross_entropy(logits[[0, 3]].double(), picked[[0, 3], 0], reduction="sum")
    given = logits.clone()
    sums, dlogits = cpu_loss.terms(given, picked, only, 0.0, None, True)
    torch.testing.assert_close(sums[0].double(), want, rtol=1e-6, atol=0)
    assert dlogits[0, 3] == 0 and dlogits[[0, 3]].isfinite().all()
    for row in (1, 2):
        counts = torch.zeros(4, 1, dtype=torch.bool)
        counts[row] = True
        assert cpu_loss.terms(logits.clone(), picked, counts, 0.0, None, True)[0][0].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_number_of_threads_changes_no_bit(dtype, monkeypatch):
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(cpu_loss, "threads", lambda threads=threads: threads)
        logits, picked, counts = example(37, 5001, dtype)
        found.append(cpu_loss.terms(logits, picked, counts, 0.01, None, True))
    for sums, dlogits in found[1:]:
        assert torch.equal(sums, found[0][0]) and torch.equal(dlogits, found[0][1])


@pytest.mark.parametrize("target", [-1, 10, 1 << 40])
def test_a_target_that_is_no_word_is_one_clear_line(target):
    logits, picked, counts = example(3, 10, torch.float32)
    picked[1] = target
    with pytest.raises(IndexError, match=f"a target is {target}; targets are 0 to 9, or -100 for none"):
        cpu_loss.terms(logits, picked, counts, 0.0, None, True)


def test_no_rows():
    sums, _ = cpu_loss.terms(*example(0, 10, torch.float32), 0.0, None, True)
    assert sums.tolist() == [0, 0]


def test_the_chunked_loss_takes_the_kernel_where_it_serves(monkeypatch):
    """fp32 and bf16 logits do; a soft-cap, fp64, and an install without kernels have the plain formulas."""
    head, targets = torch.nn.Linear(8, 20, bias=False), torch.randint(20, (6,))
    assert ops._kernel_serves()  # its comparison with the plain code is done now
    served = []
    inner = cpu_loss.terms
    monkeypatch.setattr(cpu_loss, "terms", lambda *given: served.append(given[0].dtype) or inner(*given))

    def loss(dtype=torch.float32, cap=None):
        served.clear()
        hidden = torch.ones(6, 8, dtype=dtype, requires_grad=True)
        ops.chunked_cross_entropy(hidden, head.to(dtype), targets, "mean", 4, cap=cap).backward()
        return served.copy()

    assert loss() == [torch.float32] * 2 and loss(torch.bfloat16) == [torch.bfloat16] * 2
    assert loss(torch.float64) == [] and loss(cap=30.0) == []
    ops._kernel_serves.cache_clear()
    try:
        monkeypatch.setattr(cpu_loss, "ready", lambda: False)
        assert loss() == []
    finally:
        ops._kernel_serves.cache_clear()


def test_a_kernel_that_is_wrong_is_told_and_the_plain_code_serves(monkeypatch):
    inner = cpu_loss.terms

    def wrong(*given):
        sums, dlogits = inner(*given)
        return sums, dlogits * 1.01

    ops._kernel_serves.cache_clear()
    try:
        monkeypatch.setattr(cpu_loss, "terms", wrong)
        with pytest.warns(UserWarning, match="kernel of the loss differs from the plain code by .*doctor --check"):
            assert not ops._kernel_serves()
    finally:
        ops._kernel_serves.cache_clear()


def test_sixteen_bit_gradients_are_added_in_fp32():
    """More rows than a piece, whose number is not a multiple of it."""
    to, x = torch.randn(4099, 3), torch.randn(4099, 3).bfloat16()
    want = to + x.float()
    ops._add(to, x)
    assert torch.equal(to, want)
