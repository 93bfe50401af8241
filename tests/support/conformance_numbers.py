"""Conformance: learning rates and schedules, strange gradients, and what trainers put around an optimizer."""

import copy
import math
import warnings

import torch
from conformance_subjects import (
    LR,
    SHAPES,
    Subject,
    check,
    give,
    gradient,
    make_params,
    same,
    snapshot,
    train,
    values,
)
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler, swa_utils

RATES = "Learning rates"


@check(RATES, "a 0-d tensor as lr does what the number does")
def tensor_lr(subject: Subject) -> None:
    params, plain = make_params(), make_params()
    optimizer = subject.make(params, lr=torch.tensor(LR))
    train(optimizer, params, range(9))
    train(subject.make(plain), plain, range(9))
    torch.testing.assert_close(params, plain, rtol=1e-4, atol=1e-5)


@check(RATES, "a 0-d tensor as lr may be written in place, and is not written to")
def tensor_lr_in_place(subject: Subject) -> None:
    lr = torch.tensor(LR)
    params = make_params()
    optimizer = subject.make(params, lr=lr)
    train(optimizer, params, range(3))
    assert lr == torch.tensor(LR)
    for group in optimizer.param_groups:
        group["lr"].fill_(0.0)
    before = values(params)
    train(optimizer, params, range(3, 5))
    assert same(before, values(params))


@check(RATES, "a scheduler moves a 0-d tensor lr in place")
def tensor_lr_schedule(subject: Subject) -> None:
    params = make_params()
    optimizer = subject.make(params, lr=torch.tensor(LR))
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.5)
    held = optimizer.param_groups[0]["lr"]
    for step in range(4):
        train(optimizer, params, [step])
        schedule.step()
    assert optimizer.param_groups[0]["lr"] is held and math.isclose(float(held), LR / 16, rel_tol=1e-6)


def _warm(o: Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.LinearLR(o, 0.1, total_iters=3)


SCHEDULES = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=3),
    "LinearLR": _warm,
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, 3, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [_warm(o), lr_scheduler.CosineAnnealingLR(o, 8)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([_warm(o), lr_scheduler.ExponentialLR(o, 0.9)]),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=2),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=4),
}


@check(RATES, "follows {}", SCHEDULES)
def schedules(subject: Subject, name: str) -> None:
    def run(optimizer: Optimizer, params: list) -> list[float]:
        schedule = SCHEDULES[name](optimizer)
        seen = []
        for step in range(9):
            train(optimizer, params, [step])
            schedule.step(*[1.0] if name == "ReduceLROnPlateau" else [])
            seen.append([float(group["lr"]) for group in optimizer.param_groups])
        return seen

    plain = make_params()
    expected = [rates[0] for rates in run(torch.optim.SGD(plain, lr=LR, momentum=0.9), plain)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        params = make_params()
        found = run(subject.make(params), params)
    caught = [warning for warning in caught if "deprecat" not in str(warning.message).lower()]
    assert not caught, str(caught[0].message)
    assert all(rate == want for rates, want in zip(found, expected, strict=True) for rate in rates)
    assert all(torch.isfinite(p).all() for p in params)


NUMBERS = "Numbers"


@check(NUMBERS, "state is fp32 under {} parameters", [torch.bfloat16, torch.float16])
def wide_state(subject: Subject, dtype: torch.dtype) -> None:
    params = make_params(dtype=dtype)
    optimizer = subject.make(params)
    train(optimizer, params, range(3))
    for entries in optimizer.state_dict()["state"].values():
        for key, value in entries.items() if isinstance(entries, dict) else ():
            if torch.is_tensor(value) and value.is_floating_point():
                assert value.dtype == torch.float32, f"{key} is {value.dtype}"


BAD = {"NaN": math.nan, "Inf": math.inf, "-Inf": -math.inf}


@check(NUMBERS, "training goes on after a gradient with one {}", BAD)
def recovers(subject: Subject, bad: str) -> None:
    params = make_params()
    optimizer = subject.make(params)
    for step in range(16):
        give(params, step)
        if step == 3:
            params[2].grad[1, 2] = BAD[bad]
        before = values(params)
        optimizer.step()
        assert all(torch.isfinite(p).all() for p in params), f"not finite after step {step + 1}"
    assert all(not torch.equal(p, old) for p, old in zip(params, before, strict=True))


@check(NUMBERS, "a gradient with one {} changes neither its parameter nor its moments, and no other is held up", BAD)
def skips(subject: Subject, bad: str) -> None:
    params = make_params()
    optimizer = subject.make(params, weight_decay=0.1)
    train(optimizer, params, range(3))
    give(params, 3)
    params[2].grad[1, 2] = BAD[bad]
    before = values(params)
    state = {key: value.clone() for key, value in optimizer.state[params[2]].items() if torch.is_tensor(value)}
    optimizer.step()
    assert torch.equal(params[2], before[2])
    assert same(state, {key: value for key, value in optimizer.state[params[2]].items() if torch.is_tensor(value)})
    assert not torch.equal(params[3], before[3])


@check(NUMBERS, "a first gradient of NaN leaves a parameter that trains")
def first_is_nan(subject: Subject) -> None:
    params = make_params()
    optimizer = subject.make(params)
    start = values(params)
    for p in params:
        p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    assert same(start, values(params))
    train(optimizer, params, range(16))
    assert all(torch.isfinite(p).all() and not torch.equal(p, old) for p, old in zip(params, start, strict=True))


@check(NUMBERS, "gradients of {} stay finite and are forgotten", [1e-30, 1e20, 1e38])
def extremes(subject: Subject, size: float) -> None:
    params = make_params()
    optimizer = subject.make(params)
    for step in range(25):
        give(params, step, size if step in (1, 9) else 1.0)
        for p in params:
            p.grad.clamp_(-3e38, 3e38)
        before = values(params)
        optimizer.step()
        assert all(torch.isfinite(p).all() for p in params), f"not finite after step {step + 1}"
    assert all(not torch.equal(p, old) for p, old in zip(params, before, strict=True)), "stuck"


@check(NUMBERS, "gradients that are all 1e-30 move parameters to finite values")
def tiny(subject: Subject) -> None:
    params = make_params()
    optimizer = subject.make(params)
    for step in range(9):
        give(params, step, 1e-30)
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in params)


@check(NUMBERS, "an all-zero gradient divides by nothing, first or later")
def zeros(subject: Subject) -> None:
    params = make_params()
    optimizer = subject.make(params, weight_decay=0.0)
    start = values(params)
    for step in range(25):
        give(params, step, 0.0 if step in (0, 1, 8, 14) else 1.0)
        optimizer.step()
        assert all(torch.isfinite(p).all() for p in params), f"not finite after step {step + 1}"
        assert step > 1 or same(start, values(params))
    assert all(not torch.equal(p, old) for p, old in zip(params, start, strict=True))


@check(NUMBERS, "decoupled weight decay shrinks by lr times weight_decay")
def decay(subject: Subject) -> None:
    params = [nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    optimizer = subject.make(params, lr=0.1, weight_decay=0.5)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    touched = [p for p in params if not torch.equal(p, torch.ones_like(p))]  # sparse momentum leaves entries alone
    assert len(touched) == len(params)
    assert all(bool(((p == 1) | torch.isclose(p, torch.tensor(0.95))).all()) for p in params)


TRAINERS = "Trainers"


def _scaled(optimizer: Optimizer, params: list, scaler: torch.amp.GradScaler, step: int, bad: bool = False) -> None:
    loss = sum((p * gradient(p, step, i)).sum() for i, p in enumerate(params))
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    if bad:
        params[2].grad[0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()


@check(TRAINERS, "GradScaler gives the same result as no scaling")
def scaled(subject: Subject) -> None:
    params, plain = make_params(), make_params()
    optimizer, scaler = subject.make(params), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(16):
        _scaled(optimizer, params, scaler, step)
    train(subject.make(plain), plain, range(16))
    assert same(values(params), values(plain))


@check(TRAINERS, "a step that GradScaler skips advances nothing")
def found_inf(subject: Subject) -> None:
    params, plain = make_params(), make_params()
    optimizer, scaler = subject.make(params), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(16):
        before = snapshot(optimizer), values(params)
        _scaled(optimizer, params, scaler, 99, bad=True)
        assert same(before, (snapshot(optimizer), values(params)))
        _scaled(optimizer, params, scaler, step)
    train(subject.make(plain), plain, range(16))
    assert same(values(params), values(plain))


@check(TRAINERS, "clip_grad_norm_ and accumulation work as before any optimizer")
def accumulated(subject: Subject) -> None:
    params, plain = make_params(), make_params()
    optimizer, twin = subject.make(params), subject.make(plain)
    for step in range(9):
        optimizer.zero_grad()
        for part in (0.5, 0.5):
            sum((p * gradient(p, step, i)).sum() * part for i, p in enumerate(params)).backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        give(plain, step)
        nn.utils.clip_grad_norm_(plain, 1.0)
        twin.step()
    assert same(values(params), values(plain))


def _small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def _batch(step: int) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(step))


@check(TRAINERS, "AveragedModel, SWALR and update_bn work around it")
def averaged(subject: Subject) -> None:
    model = _small()
    optimizer = subject.make(list(model.parameters()))
    average = swa_utils.AveragedModel(model)
    schedule = swa_utils.SWALR(optimizer, swa_lr=0.05)
    for step in range(9):
        optimizer.zero_grad()
        model(_batch(step)).square().mean().backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
    swa_utils.update_bn([_batch(step) for step in range(3)], average)
    assert torch.isfinite(average(_batch(0))).all()


@check(TRAINERS, "get_ and set_optimizer_state_dict carry it bit for bit{}", ["", ", flattened"])
def by_names(subject: Subject, form: str) -> None:
    from torch.distributed.checkpoint import state_dict as names

    options = names.StateDictOptions(full_state_dict=not form, flatten_optimizer_state_dict=bool(form))

    def run(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(_batch(step)).square().mean().backward()
            optimizer.step()

    model, other = _small(), _small()
    optimizer, again = subject.make(list(model.parameters())), subject.make(list(other.parameters()))
    run(model, optimizer, range(9))
    saved = copy.deepcopy(names.get_optimizer_state_dict(model, optimizer, options=options))
    other.load_state_dict(model.state_dict())
    names.set_optimizer_state_dict(other, again, saved, options=options)
    run(model, optimizer, range(9, 20))
    run(other, again, range(9, 20))
    assert same(values(list(model.parameters())), values(list(other.parameters())))


@check(TRAINERS, "training a small model lowers its loss")
def learns(subject: Subject) -> None:
    model = _small()
    optimizer = subject.make(list(model.parameters()))
    x, y = _batch(0), torch.tensor([0, 1, 2, 0, 1, 2])
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.05
