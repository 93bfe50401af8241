"""Kernels check themselves before they serve; broken ones give way to the plain code, with one warning."""

import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from evenstep import SCALE, SPAM, AdaClip, StableSPAM, stabilize
from evenstep.cli import main
from evenstep.kernels import kernels_for
from evenstep.lowbit import fake_quant as lowbit
from evenstep.lowbit import fake_quantize
from evenstep.optim import self_check
from evenstep.telemetry.probe import Probe

KERNELS = kernels_for("cpu")
pytestmark = pytest.mark.skipif(isinstance(KERNELS, str), reason="this installation has no compiled CPU kernels")


@pytest.fixture(autouse=True)
def unknown(monkeypatch):
    """As in a new process, where nothing was checked yet."""
    monkeypatch.setattr(self_check, "_known", {})
    monkeypatch.setattr(lowbit, "_checked", False)
    monkeypatch.setattr(lowbit, "_problem", None)


def parameters(dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in ((6, 8), (5,))]
    for p in params:
        p.grad = torch.randn(p.shape, generator=draw).to(dtype)
    return params


def scale(params, **options):
    kinds = ("hidden", "vector")
    return SCALE([{"params": [p], "kind": kind} for p, kind in zip(params, kinds, strict=True)], **options)


def stabilized(params, fused=None):
    return stabilize(torch.optim.SGD(params, lr=0.1), AdaClip(), fused=fused)


MAKERS = {"Stable-SPAM": StableSPAM, "SPAM": SPAM, "SCALE": scale, "transforming": stabilized}
METHODS = {"Stable-SPAM": "adam_step_", "SPAM": "adam_step_", "SCALE": "scale_step_", "transforming": "transform"}


def off(name, monkeypatch):
    """Let a kernel write numbers that are wrong by a thousandth, in bf16 by a tenth."""
    true = getattr(type(KERNELS), name)

    def wrong(self, *args, **kwargs):
        found = true(self, *args, **kwargs)
        for x in args[0].params if hasattr(args[0], "params") else args[0]:
            x.detach().mul_(1.001 if x.dtype == torch.float32 else 1.1)
        return found

    monkeypatch.setattr(type(KERNELS), name, wrong)


def raising(name, monkeypatch):
    def wrong(*args, **kwargs):
        raise OSError("illegal instruction")

    monkeypatch.setattr(type(KERNELS), name, wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("broken", [off, raising])
@pytest.mark.parametrize("name", MAKERS)
def test_a_broken_kernel_warns_once_and_the_plain_code_serves(name, broken, dtype, monkeypatch):
    expected = parameters(dtype)
    MAKERS[name](expected, fused=False).step()
    broken(METHODS[name], monkeypatch)
    params = parameters(dtype)
    optimizer = MAKERS[name](params)
    with pytest.warns(UserWarning) as told:
        optimizer.step()
    [warning] = told
    assert name in str(warning.message) and "the plain code serves instead" in str(warning.message)
    assert ("illegal instruction" if broken is raising else "differs") in str(warning.message)
    for p, q in zip(params, expected, strict=True):
        assert torch.equal(p, q)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        MAKERS[name](parameters(dtype)).step()
    with pytest.raises(RuntimeError, match=f"fused=True: .*{name}"):
        MAKERS[name](parameters(dtype), fused=True).step()


def test_what_only_measures_gives_way_too(monkeypatch):
    raising("measure", monkeypatch)
    params = parameters()
    with pytest.warns(UserWarning, match="measuring"):
        probe = Probe(torch.optim.SGD(params), samples=2)
        probe.before(weights=False)
    torch.testing.assert_close(probe.measured["grad_norm"], torch.stack([p.grad.norm() for p in params]))


@pytest.mark.parametrize("broken", ["off", "raising"])
def test_a_broken_low_bit_kernel_warns_once_and_the_plain_code_serves(broken, monkeypatch):
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    expected = fake_quantize(x, "int4")
    true = lowbit.kernel_fake_quantize

    def wrong(*args):
        if broken == "raising":
            raise OSError("illegal instruction")
        return true(*args) * 1.01

    monkeypatch.setattr(lowbit, "_checked", False)
    monkeypatch.setattr(lowbit, "kernel_fake_quantize", wrong)
    with pytest.warns(UserWarning, match="low-bit formats") as told:
        assert torch.equal(fake_quantize(x, "int4"), expected)
        assert torch.equal(fake_quantize(x, "int4"), expected)
    assert len(told) == 1


def test_kernels_that_are_right_serve_and_leave_no_trace():
    hooked = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: hooked.append(optimizer))
    params = parameters()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    try:
        for make in MAKERS.values():
            make(params).step()
        fake_quantize(params[0].detach(), "int4")
    finally:
        handle.remove()
    assert len(hooked) == 5  # each once, and the base of stabilize
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert set(self_check._known.values()) == {None} and len(self_check._known) == 4 and lowbit._checked


def test_nothing_is_checked_while_operators_are_traced_or_watched(monkeypatch):
    monkeypatch.setattr(self_check, "tried", lambda *args: pytest.fail("checked"))
    monkeypatch.setattr(lowbit, "kernel_differences", lambda *args: pytest.fail("checked"))
    params = parameters()

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Mode():
        StableSPAM(params).step()
    with torch._subclasses.FakeTensorMode():
        StableSPAM([torch.nn.Parameter(torch.ones(3))]).step()
    torch.compile(lambda x: fake_quantize(x, "int4"), backend="eager")(params[0].detach())
    assert not self_check._known and not lowbit._checked


def test_doctor_prints_the_differences_and_fails_where_a_kernel_is_broken(monkeypatch, capsys):
    assert main(["doctor", "--check"]) == 0
    said = capsys.readouterr().out
    assert "Stable-SPAM, rounding kahan, bfloat16" in said and "low-bit format nvfp4" in said
    assert not [line for line in said.splitlines() if line.startswith("  ") and not line.endswith("ok")]
    off("scale_step_", monkeypatch)
    assert main(["doctor", "--check"]) == 2
    told = capsys.readouterr()
    wrong = [line.split(",")[0].strip() for line in told.out.splitlines() if "differs" in line]
    assert wrong and all(line.startswith("SCALE") for line in wrong) and "kernels differ" in told.err


def test_importing_evenstep_checks_nothing_and_loads_no_kernels():
    code = (
        "import sys, evenstep; assert not [m for m in sys.modules if m.startswith(('evenstep.optim', 'evenstep.ker'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
