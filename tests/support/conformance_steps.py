"""Conformance: what a call of ``step()`` does and what it leaves alone."""

import contextlib
import gc
import io
import random
import threading
import warnings
import weakref

import numpy as np
import torch
from conformance_subjects import (
    LR,
    SHAPES,
    Subject,
    check,
    give,
    gradient,
    make_params,
    refusal,
    same,
    snapshot,
    train,
    values,
)
from torch import nn
from torch.optim import optimizer as torch_optimizer

STEP = "The step"


@check(STEP, "runs a closure once, with gradients enabled, and returns its value")
def closure(subject: Subject) -> None:
    params = make_params()
    optimizer = subject.make(params)
    calls = []

    def loss() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        value = sum((p.square().sum() for p in params), torch.zeros(()))
        value.backward()
        return value

    before = values(params)
    result = optimizer.step(loss)
    assert calls == [True] and torch.is_tensor(result) and result.requires_grad
    assert all(not torch.equal(p, old) for p, old in zip(params, before, strict=True))
    assert optimizer.step() is None


@check(STEP, "takes several steps on one gradient")
def repeated(subject: Subject) -> None:
    params, others = make_params(), make_params()
    optimizer, twin = subject.make(params), subject.make(others)
    give(params, 0)
    for _ in range(9):
        optimizer.step()
        give(others, 0)
        twin.step()
    assert same(values(params), values(others))


@check(STEP, "leaves the values of gradients as they were")
def gradients_unmodified(subject: Subject) -> None:
    params = make_params()
    optimizer = subject.make(params, weight_decay=0.1, maximize=True)
    for step in range(16):
        give(params, step, scale=100.0 if step == 5 else 1.0)
        before = [p.grad.clone() for p in params]
        optimizer.step()
        assert same(before, [p.grad for p in params]), f"modified on step {step + 1}"


@check(STEP, "leaves the gradient tensors in their places")
def gradients_stay(subject: Subject) -> None:
    params = make_params()
    optimizer = subject.make(params)
    give(params, 0)
    held = [p.grad for p in params]
    optimizer.step()
    assert all(p.grad is grad for p, grad in zip(params, held, strict=True))


@check(STEP, "takes gradients that are expanded, or shared by two parameters")
def expanded_gradients(subject: Subject) -> None:
    def run(expand: bool) -> list[torch.Tensor]:
        params = make_params([(4, 5), (4, 5)])
        optimizer = subject.make(params)
        for step in range(16):
            row = gradient(params[0][:1], step, 0).detach()
            shared = row.expand(4, 5)
            for p in params:
                p.grad = shared if expand else shared.clone()
            optimizer.step()
        return values(params)

    # Not to the bit: a fused kernel may take the one and the plain code the other.
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(run(True), run(False), strict=True))


LAYOUTS = {
    "a transposed parameter": (lambda p: p.t().contiguous().t(), lambda g: g),
    "a transposed gradient": (lambda p: p, lambda g: g.t().contiguous().t()),
    "a strided parameter": (lambda p: p.repeat_interleave(2, 1)[:, ::2], lambda g: g),
    "a strided gradient": (lambda p: p, lambda g: g.repeat_interleave(2, 1)[:, ::2]),
    "both transposed": (lambda p: p.t().contiguous().t(), lambda g: g.t().contiguous().t()),
}


@check(STEP, "takes {}", LAYOUTS)
def layouts(subject: Subject, case: str) -> None:
    of_params, of_grads = LAYOUTS[case]

    def run(strange: bool, shape: tuple[int, ...]) -> torch.Tensor:
        start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        p = nn.Parameter(of_params(start) if strange else start)
        optimizer = subject.make([p])
        for step in range(16):
            grad = gradient(p, step, 0)
            grad = torch.empty(shape).copy_(grad)
            p.grad = of_grads(grad) if strange else grad
            optimizer.step()
        return p.detach()

    for shape in ((4, 5), (300, 301)):
        torch.testing.assert_close(run(True, shape), run(False, shape), rtol=1e-5, atol=1e-6)


@check(STEP, "takes channels_last parameters and gradients")
def channels_last(subject: Subject) -> None:
    def run(memory_format: torch.memory_format) -> torch.Tensor:
        p = nn.Parameter(make_params([(2, 3, 4, 4)])[0].detach().to(memory_format=memory_format))
        optimizer = subject.make([p])
        for step in range(16):
            p.grad = gradient(p, step, 0).to(memory_format=memory_format)
            optimizer.step()
        return p.detach().contiguous()

    strange, plain = run(torch.channels_last), run(torch.contiguous_format)
    torch.testing.assert_close(strange, plain, rtol=1e-5, atol=1e-6)


@check(STEP, "takes fp32 gradients of a bf16 parameter (grad_dtype)")
def wide_gradients(subject: Subject) -> None:
    params = [nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in SHAPES]
    optimizer = subject.make(params)
    for _ in range(9):
        for p in params:
            p.grad_dtype = torch.float32
            p.grad = torch.ones(p.shape)
        optimizer.step()
    assert all(torch.isfinite(p).all() and p.double().mean() < 1 for p in params)


@check(STEP, "updates parameters in place, visibly to autograd")
def in_place(subject: Subject) -> None:
    params = make_params()
    optimizer = subject.make(params)
    places, versions = [p.data_ptr() for p in params], [p._version for p in params]
    train(optimizer, params, range(9))
    assert places == [p.data_ptr() for p in params]
    assert all(p._version > old for p, old in zip(params, versions, strict=True))
    assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in params)


@check(STEP, "calls step hooks, and a pre-hook may replace the arguments")
def step_hooks(subject: Subject) -> None:
    params = make_params()
    optimizer = subject.make(params)
    seen = []
    loss = torch.ones(())

    def before(opt, args, kwargs):
        seen.append(("pre", opt is optimizer))
        return (opt, lambda: loss), {}

    handles = [
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(("post", opt is optimizer))),
    ]
    give(params, 0)
    assert optimizer.step() is loss
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert seen == [("pre", True), ("post", True)]


@check(STEP, "calls the hooks of all optimizers once")
def global_hooks(subject: Subject) -> None:
    params = make_params()
    optimizer = subject.make(params)
    seen = []
    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(lambda opt, args, kwargs: seen.append(opt is optimizer)),
        torch_optimizer.register_optimizer_step_post_hook(lambda opt, args, kwargs: seen.append(opt is optimizer)),
    ]
    try:
        train(optimizer, params, range(1))
    finally:
        for handle in handles:
            handle.remove()
    assert seen.count(True) == 2


@check(STEP, "clears gradients both ways")
def zero_grad(subject: Subject) -> None:
    params = make_params()
    optimizer = subject.make(params)
    train(optimizer, params, range(2))
    optimizer.zero_grad(set_to_none=False)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in params)
    optimizer.step()
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


@check(STEP, "steps inside post-accumulate-grad hooks, one optimizer per parameter")
def post_accumulate(subject: Subject) -> None:
    def run(hooked: bool) -> list[torch.Tensor]:
        params = make_params([(4, 5), (3,), (2, 6)])
        optimizers = {p: subject.make([p]) for p in params}

        def update(p: torch.Tensor) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad()

        if hooked:
            for p in params:
                p.register_post_accumulate_grad_hook(update)
        for step in range(16):
            sum((p * gradient(p, step, i)).sum() for i, p in enumerate(params)).backward()
            for p in params:
                if not hooked:
                    update(p)
        return values(params)

    assert same(run(True), run(False))


@check(STEP, "ascends under maximize exactly as it descends on the negative")
def maximize(subject: Subject) -> None:
    params, others = make_params(), make_params()
    up, down = subject.make(params, maximize=True), subject.make(others)
    for step in range(16):
        give(params, step)
        give(others, step, scale=-1.0)
        up.step()
        down.step()
    assert same(values(params), values(others))


@check(STEP, "refuses sparse gradients with an explanation")
def sparse(subject: Subject) -> str | None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = subject.make(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    said = refusal(optimizer.step, "sparse")
    assert said, "accepted"
    return said


@check(STEP, "a sparse gradient in a later group changes nothing of an earlier one")
def sparse_later(subject: Subject) -> str | None:
    embedding, other = nn.Embedding(5, 3, sparse=True), nn.Parameter(torch.ones(2, 3))
    optimizer = subject.make([{"params": [other]}, {"params": list(embedding.parameters())}])
    embedding(torch.tensor([1])).sum().backward()
    other.grad = torch.ones(2, 3)
    before = snapshot(optimizer)
    said = refusal(optimizer.step, "sparse")
    assert torch.equal(other, torch.ones(2, 3)) and same(before, snapshot(optimizer)), "the first group was updated"
    return said


# Accepted means honoured: what an option promises is looked for, not that it goes through.
@check(STEP, "honours {}, or says why not", ["foreach=False", "foreach=True", "fused=False", "fused=True"])
def same_result(subject: Subject, option: str) -> str | None:
    name, value = option.split("=")
    params, plain = make_params(), make_params()
    optimizers = []
    said = refusal(lambda: optimizers.append(subject.make(params, **{name: value == "True"})), name)
    if not said:
        train(optimizers[0], params, range(9))
        train(subject.make(plain), plain, range(9))
        torch.testing.assert_close(params, plain, rtol=1e-4, atol=1e-5)
    return said


@check(STEP, "honours {} as trainers pass it", ["capturable=False", "differentiable=False", "amsgrad=False"])
def inert(subject: Subject, option: str) -> None:
    params, plain = make_params(), make_params()
    train(subject.make(params, **{option.split("=")[0]: False}), params, range(9))
    train(subject.make(plain), plain, range(9))
    assert same(values(params), values(plain))


@check(STEP, "honours capturable=True (no clock on the host), or says why not")
def capturable(subject: Subject) -> str | None:
    params = make_params()
    optimizers = []

    def act() -> None:
        optimizers.append(subject.make(params, capturable=True))
        train(optimizers[0], params, range(2))

    said = refusal(act, "capturable")
    if said:
        return said
    before = snapshot(optimizers[0])
    train(optimizers[0], params, range(2, 4))
    after = optimizers[0].state_dict()
    moving = [key for i in before["state"] for key, value in before["state"][i].items() if _host_clock(value)]
    moving += [
        key
        for old, new in zip(before["param_groups"], after["param_groups"], strict=True)
        for key in old
        if key != "params" and _host_clock(old[key]) and old[key] != new[key]
    ]
    assert not moving, f"the clock {moving[0]!r} lives on the host"
    return None


def _host_clock(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@check(STEP, "honours differentiable=True (gradients flow through the step), or says why not")
def differentiable(subject: Subject) -> str | None:
    optimizers = []
    start = [nn.Parameter(torch.ones(4, 5)), nn.Parameter(torch.ones(3))]
    params = [p.clone() for p in start]
    grads = [torch.full_like(p, 0.3, requires_grad=True) for p in params]
    said = refusal(lambda: optimizers.append(subject.make(params, differentiable=True)), "differentiable")
    if said:
        return said
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    optimizers[0].step()
    found = torch.autograd.grad(sum(p.sum() for p in params), grads)
    assert all(torch.isfinite(g).all() for g in found)
    return None


@check(STEP, "honours amsgrad=True (the second moment never falls), or says why not")
def amsgrad(subject: Subject) -> str | None:
    optimizers = []
    p = nn.Parameter(torch.zeros(4, 5))
    said = refusal(lambda: optimizers.append(subject.make([p], betas=(0.5, 0.5), amsgrad=True)), "amsgrad")
    if said:
        return said
    steps = []
    for size in (100.0, *[1.0] * 5):
        p.grad = torch.full_like(p, size)
        before = p.detach().clone()
        optimizers[0].step()
        steps.append(float((before - p).max()))
    plain = nn.Parameter(torch.zeros(4, 5))
    other = subject.make([plain], betas=(0.5, 0.5))
    for size in (100.0, *[1.0] * 5):
        plain.grad = torch.full_like(plain, size)
        before = plain.detach().clone()
        other.step()
    assert steps[-1] < float((before - plain).max()), "accepted and ignored"
    return None


@check(STEP, "holds no reference cycle")
def no_cycles(subject: Subject) -> None:
    params = make_params()
    optimizer = subject.make(params)
    gc.collect()
    gc.disable()
    try:
        train(optimizer, params, range(9))
        optimizer.state_dict()
        alive = [weakref.ref(optimizer), weakref.ref(params[0])]
        del optimizer, params
        assert all(ref() is None for ref in alive), "kept alive by a cycle"
    finally:
        gc.enable()


@check(STEP, "leaves the global random state alone")
def random_state(subject: Subject) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    params = make_params()
    train(subject.make(params), params, range(16))
    assert torch.equal(before[0], torch.get_rng_state()), "torch's generator was used"
    assert before[1] == random.getstate() and (before[2] == np.random.get_state()[1]).all()


@check(STEP, "prints nothing and warns of nothing")
def silent(subject: Subject) -> None:
    out = io.StringIO()
    with (
        warnings.catch_warnings(record=True) as caught,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        warnings.simplefilter("always")
        params = make_params()
        optimizer = subject.make(params)
        train(optimizer, params, range(16))
        optimizer.load_state_dict(snapshot(optimizer))
        train(optimizer, params, range(16, 18))
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        optimizer.step()
        schedule.step()
    assert not out.getvalue() and not caught, out.getvalue() or str(caught[0].message)


@check(STEP, "serves two optimizers in two threads")
def threads(subject: Subject) -> None:
    expected = make_params()
    train(subject.make(expected), expected, range(20))
    found = [make_params() for _ in range(2)]
    failed = []

    def work(params: list) -> None:
        try:
            train(subject.make(params), params, range(20))
        except Exception as error:
            failed.append(error)

    workers = [threading.Thread(target=work, args=(params,)) for params in found]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed, failed
    assert same(values(expected), values(found[0])) and same(values(expected), values(found[1]))


@check(STEP, "is named in a profile")
def profiled(subject: Subject) -> None:
    params = make_params([(3,)])
    optimizer = subject.make(params)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(optimizer, params, range(1))
    assert any(f"Optimizer.step#{type(optimizer).__name__}.step" in event.key for event in profile.key_averages())


@check(STEP, "shows its settings in repr")
def representation(subject: Subject) -> None:
    shown = repr(subject.make(make_params()))
    assert str(LR) in shown and "weight_decay" in shown


def _under_autocast(optimizer, params) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        train(optimizer, params, range(9))


def _deterministic(optimizer, params) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        train(optimizer, params, range(9))
    finally:
        torch.use_deterministic_algorithms(False)


def _other_default_dtype(optimizer, params) -> None:
    for step in range(9):
        give(params, step)
        torch.set_default_dtype(torch.float64)
        try:
            optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)


def _other_default_device(optimizer, params) -> None:
    for step in range(9):
        give(params, step)
        with torch.device("meta"):
            optimizer.step()


MODES = {
    "autocast": _under_autocast,
    "deterministic algorithms": _deterministic,
    "another default dtype": _other_default_dtype,
    "another default device": _other_default_device,
}


@check(STEP, "gives the same result under {}", MODES)
def modes(subject: Subject, mode: str) -> None:
    params, plain = make_params(), make_params()
    MODES[mode](subject.make(params), params)
    train(subject.make(plain), plain, range(9))
    torch.testing.assert_close(params, plain, rtol=1e-6, atol=1e-7)
