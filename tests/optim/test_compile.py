"""No sync and no recompile: a step asks no device for a value, and torch.compile sees one graph that stays."""

import itertools
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from evenstep import SCALE, SPAM, AdaClip, AdaGN, StableSPAM, stabilize

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parameters(dtype="float32", device="cpu"):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(device, DTYPES[dtype])) for shape in ((4, 3), (5, 4))]


def gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
    if step == 4:
        params[0].grad[0, 0] = 1000.0
    if step == 5:
        params[1].grad[0, 0] = torch.nan


def scale(params, **options):
    return SCALE([{"params": [params[0]], "kind": "embedding"}, {"params": [params[1]], "kind": "last"}], **options)


MAKERS = {
    "stable_spam": lambda ps, **o: StableSPAM(ps, reset_interval=3, total_steps=5, weight_decay=0.1, **o),
    "stable_spam_official": lambda ps, **o: StableSPAM(ps, reset_interval=3, total_steps=5, variant="official", **o),
    "spam": lambda ps, **o: SPAM(ps, reset_interval=3, warmup_steps=2, clip_start=1, threshold=5.0, **o),
    "spam_sparse": lambda ps, **o: SPAM(ps, reset_interval=3, clip_start=1, density=0.5, **o),
    "scale": lambda ps, **o: scale(ps, weight_decay=0.1, **o),
}
CASES = [(name, "float32", {}) for name in MAKERS] + [
    ("stable_spam", "bfloat16", {"rounding": "stochastic"}),
    ("scale", "bfloat16", {"rounding": "kahan"}),
    ("spam", "bfloat16", {"state": "bf16"}),
]
every_case = pytest.mark.parametrize(("name", "dtype", "options"), CASES, ids=[f"{n}-{d}-{o}" for n, d, o in CASES])


def train(name, dtype, options, steps, wrap=lambda step: step, lr=0.01, big=False):
    params = parameters(dtype)
    if big:  # moments are kept in 8 bits from 4096 entries on, also those of the half that a mask selects
        params[1] = nn.Parameter(torch.randn(128, 64, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype]))
    optimizer = MAKERS[name](params, lr=lr, **options)
    step_once = wrap(optimizer.step)
    for step in range(steps):
        gradients(params, step)
        step_once()
        for group in optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].mul_(0.9)
            else:
                group["lr"] *= 0.9
    return params, optimizer


def assert_equal(ours, theirs, **tolerance):
    (params, optimizer), (expected, reference) = ours, theirs
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, **tolerance)
        for key, value in reference.state[q].items():
            found = optimizer.state[p][key]
            if hasattr(value, "dequantize") and hasattr(value, "codes"):
                value, found = value.dequantize(), found.dequantize()
            torch.testing.assert_close(found, value, msg=key, **tolerance)


class Counter:
    """A backend that counts the graphs it is given and runs them as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return module.forward


@every_case
def test_a_compiled_step_is_one_graph_that_is_never_compiled_again(name, dtype, options):
    torch._dynamo.reset()
    counter = Counter()
    compiled = train(name, dtype, options, 8, lambda step: torch.compile(step, backend=counter))
    assert counter.graphs == 1
    # Not bit for bit: the compiler takes multiply-adds apart.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == "float32" else {"rtol": 1e-2, "atol": 1e-3}
    assert_equal(compiled, train(name, dtype, options, 8), **tolerance)


def test_the_graph_stays_under_a_tensor_lr_and_inside_a_compiled_function():
    torch._dynamo.reset()
    counter = Counter()

    def wrap(step):
        def once():
            step()

        return torch.compile(once, backend=counter)

    compiled = train("stable_spam", "float32", {}, 6, wrap, lr=torch.tensor(0.01))
    assert counter.graphs == 1
    assert_equal(compiled, train("stable_spam", "float32", {}, 6, lr=torch.tensor(0.01)), rtol=1e-5, atol=1e-6)


MAKERS["stabilize"] = lambda ps, state=None, rounding=None, **o: stabilize(
    torch.optim.AdamW(ps, **o), AdaClip(), AdaGN(), reset_interval=3
)
BACKENDS = ("eager", "aot_eager", "aot_eager_decomp_partition", "cudagraphs", "inductor")
NAMES = ("stable_spam", "stable_spam_official", "spam", "spam_sparse", "scale", "stabilize")
ROUNDINGS = ("nearest", "stochastic", "kahan")


def grid():
    """Optimizer x backend x state dtype x rounding; marked slow but for a few, in which each value is met with."""
    usual = {
        ("stable_spam", "aot_eager", "fp32", "nearest"), ("spam", "cudagraphs", "bf16", "stochastic"),
        ("scale", "aot_eager_decomp_partition", "fp32", "kahan"), ("stable_spam", "aot_eager", "int8", "stochastic"),
        ("stabilize", "inductor", "fp32", "nearest"), ("spam_sparse", "eager", "fp32", "nearest"),
    }  # fmt: skip
    for case in itertools.product(NAMES, BACKENDS, ("fp32", "bf16", "int8"), ROUNDINGS):
        name, backend, state, rounding = case
        if (name == "stabilize" and (state, rounding) != ("fp32", "nearest")) or (
            backend == "inductor"
            and (name, rounding) not in (("spam", "nearest"), ("scale", "kahan"), ("stabilize", "nearest"))
        ):
            continue
        yield pytest.param(*case, marks=[] if case in usual else pytest.mark.slow, id="-".join(case))


@pytest.mark.parametrize(("name", "backend", "state", "rounding"), list(grid()))
def test_a_compiled_step_is_exact_under_every_backend(name, backend, state, rounding):
    """State moves as in eager, resets, spikes and bad gradients included; bit for bit where nothing is compiled."""
    if state == "int8":
        pytest.importorskip("torchao")
    torch._dynamo.reset()
    dtype = "float32" if rounding == "nearest" else "bfloat16"
    options = {"state": state, "rounding": rounding}
    compiled = train(name, dtype, options, 7, lambda step: torch.compile(step, backend=backend), big=state == "int8")
    eager = train(name, dtype, options, 7, big=state == "int8")
    if name == "stabilize" or state == "int8":
        assert_equal(compiled, eager, rtol=0, atol=0)
    elif dtype == "float32" and state == "fp32":
        assert_equal(compiled, eager, rtol=1e-5, atol=1e-6)
    else:  # what differs by 1e-7 may round the other way
        assert_equal(compiled, eager, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["stable_spam", "stabilize"])
def test_a_compiled_function_may_step_with_a_closure_groups_and_rates_that_change(name):
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        params = parameters()
        groups = [{"params": params[:1], "lr": torch.tensor(0.01)}, {"params": params[1:], "lr": 0.1}]
        optimizer = StableSPAM(groups, reset_interval=3) if name == "stable_spam" else stabilize(
            torch.optim.AdamW(groups), AdaClip()
        )  # fmt: skip

        def closure(params=params, optimizer=optimizer):
            optimizer.zero_grad()
            loss = sum((p**2).sum() for p in params)
            loss.backward()
            return loss.detach()

        step = torch.compile(lambda o=optimizer, c=closure: o.step(c), backend="aot_eager") if compiled else (
            lambda o=optimizer, c=closure: o.step(c)
        )  # fmt: skip
        losses = []
        for _ in range(5):
            losses.append(step())
            optimizer.param_groups[0]["lr"].mul_(0.5)
            optimizer.param_groups[1]["lr"] *= 0.5
        results.append((params, optimizer, losses))
    (params, optimizer, losses), (others, other, theirs) = results
    torch.testing.assert_close(theirs, losses, rtol=1e-5, atol=1e-6)
    assert_equal((others, other), (params, optimizer), rtol=1e-5, atol=1e-6)


def test_no_kernel_is_called_while_a_step_is_compiled(monkeypatch):
    """Kernels are asked for in an eager step alone, with ``fused=True``, too, and for gradient release."""
    from evenstep.optim import fused

    if isinstance(fused.kernels_for("cpu"), str):
        pytest.skip("no kernels")
    torch._dynamo.reset()
    [p] = parameters()[:1]
    optimizer = StableSPAM([p], fused=True)
    gradients([p, nn.Parameter(torch.ones(1))], 0)
    step = torch.compile(optimizer.step, backend="aot_eager")

    def refuse(*args):
        raise AssertionError("a kernel was asked for")

    with monkeypatch.context() as patched:
        patched.setattr(fused, "kernels_for", refuse)
        step()
    assert float(optimizer.state[p]["age"]) == 1
    with monkeypatch.context() as patched, pytest.raises(AssertionError, match="a kernel was asked for"):
        patched.setattr(fused, "kernels_for", refuse)
        optimizer.step()


def test_importing_the_optimizers_does_not_load_the_compiler():
    names = "SCALE, SPAM, StableSPAM, stabilize"
    code = f"from evenstep.optim import {names}; import sys; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- no sync ----


class NoSync(TorchDispatchMode):
    """Refuses what would wait for a device: item, bool, float, int and whatever else reads a value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            raise AssertionError(f"{func} waits for the device")
        if func in (torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default):
            raise AssertionError(f"{func} has a size that the device knows")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_sync(monkeypatch):
    def refuse(name):
        def method(self, *args, **kwargs):
            raise AssertionError(f"Tensor.{name} waits for the device")

        return method

    def patched():
        for name in ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"):
            monkeypatch.setattr(torch.Tensor, name, refuse(name))

    return patched


@pytest.mark.parametrize("capturable", [False, True])
@every_case
def test_no_step_waits_for_the_device(name, dtype, options, capturable, no_sync):
    if capturable and name == "spam_sparse":
        pytest.skip("masks are drawn on the host")
    params = parameters(dtype)
    optimizer = MAKERS[name](params, lr=0.01, capturable=capturable, **options)
    steps = range(7)  # with two resets, a spike and a NaN
    grads = []
    for step in steps:
        gradients(params, step)
        grads.append([p.grad for p in params])
    no_sync()
    with NoSync():
        for step in steps:
            for p, grad in zip(params, grads[step], strict=True):
                p.grad = grad
            optimizer.step()


def test_a_stabilized_step_does_not_wait_for_the_device(no_sync, monkeypatch):
    """As on a device: on the host itself values are at hand, and a bad gradient is skipped by reading its flag."""
    monkeypatch.setattr("evenstep.optim.base_optimizer.on_host", lambda x: False)
    params = parameters()
    base = torch.optim.SGD(params, lr=0.01, momentum=0.9)
    optimizer = stabilize(base, AdaClip(), AdaGN(), reset_interval=3)
    gradients(params, 0)
    no_sync()
    with NoSync():
        for _ in range(7):
            optimizer.step()


def test_the_sync_detectors_detect():
    with NoSync(), pytest.raises(AssertionError, match="waits for the device"):
        float(torch.ones(()))
    with NoSync(), pytest.raises(AssertionError, match="has a size that the device knows"):
        torch.ones(3).nonzero()


# ---- capturable ----


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_capturable_gives_the_same(rounding):
    for name in ("stable_spam", "spam", "scale"):
        ours = train(name, "bfloat16", {"rounding": rounding, "capturable": True}, 8)
        assert_equal(ours, train(name, "bfloat16", {"rounding": rounding}, 8), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["stable_spam", "spam", "scale"])
def test_a_captured_cuda_graph_goes_on_in_time(name):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")

    def start():
        params = parameters(device="cuda")
        lr = torch.tensor(0.01, device="cuda")
        for p in params:
            p.grad = torch.zeros_like(p)
        return params, MAKERS[name](params, lr=lr, capturable=True), lr

    def fill(params, step):
        new = [torch.empty_like(p, requires_grad=True) for p in params]
        gradients(new, step)
        for p, source in zip(params, new, strict=True):
            p.grad.copy_(source.grad)

    params, optimizer, lr = start()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up outside of the graph, as torch asks for
        for step in range(2):
            fill(params, step)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # capturing runs nothing
        optimizer.step()
    for step in range(2, 9):
        lr.mul_(0.9)
        fill(params, step)
        graph.replay()
    expected, reference, lr = start()
    for step in range(9):
        if step >= 2:
            lr.mul_(0.9)
        fill(expected, step)
        reference.step()
    torch.cuda.synchronize()
    assert_equal((params, optimizer), (expected, reference), rtol=1e-5, atol=1e-6)
    assert int(optimizer.param_groups[0]["t"]) == 9
