"""What frameworks do around a step: hooks, schedulers, closures, scaled losses, checkpoints; no reads of the device."""

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from evenstep import (
    AGC,
    AdaClip,
    AdaGN,
    AutoClip,
    NormClip,
    SkipStep,
    SpikeClip,
    ValueClip,
    ZClip,
    stabilize,
)


def make(*transforms, base=torch.optim.SGD, lr=0.1, **options):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, stabilize(base(model.parameters(), lr=lr), *transforms, **options)


def backward(model, scale=1.0):
    model.zero_grad()
    (model(torch.ones(4, 3)).square().sum() * scale).backward()


def test_hooks_run_in_order_and_the_base_sees_the_transformed_gradients():
    model, optimizer = make(ValueClip(0.01))
    order, seen = [], {}

    def note(name):
        def hook(*_):
            order.append(name)
            seen[name] = model.weight.grad.abs().max().item()

        return hook

    handles = [
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.base.register_step_pre_hook(note("base pre")),
        optimizer.base.register_step_post_hook(note("base post")),
        optimizer.register_step_post_hook(note("post")),
    ]
    backward(model)
    optimizer.step()
    assert order == ["pre", "base pre", "base post", "post"]
    assert seen["pre"] == seen["post"] > 1 and math.isclose(seen["base pre"], 0.01, rel_tol=1e-6)
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(order) == 4


def test_global_hooks_see_the_wrapper_first_and_the_base_within():
    model, optimizer = make(NormClip())
    order = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: order.append(("pre", type(o).__name__))),
        register_optimizer_step_post_hook(lambda o, *_: order.append(("post", type(o).__name__))),
    ]
    backward(model)
    optimizer.step()
    for handle in handles:
        handle.remove()
    assert order == [("pre", "Stabilized"), ("pre", "SGD"), ("post", "SGD"), ("post", "Stabilized")]


def test_state_dict_hooks_run_and_may_change_what_is_saved():
    _, optimizer = make(AdaGN())
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, saved: calls.append(saved.pop("extra")))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    calls = []
    saved = optimizer.state_dict()
    assert saved["extra"] == 1
    optimizer.load_state_dict(saved)
    assert calls == ["pre", 1, "loaded"]


SCHEDULES = {
    "StepLR": {"step_size": 2},
    "ExponentialLR": {"gamma": 0.9},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "LinearLR": {},
    "ConstantLR": {},
    "PolynomialLR": {},
    "MultiStepLR": {"milestones": [2, 4]},
    "LambdaLR": {"lr_lambda": lambda t: 1 / (t + 1)},
    "MultiplicativeLR": {"lr_lambda": lambda t: 0.9},
    "OneCycleLR": {"max_lr": 0.2, "total_steps": 8},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.2},
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_moves_it_as_it_moves_the_base(name):
    results = []
    for wrapped in (True, False):
        model, optimizer = make(base=lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9))
        stepped = optimizer if wrapped else optimizer.base
        schedule = getattr(torch.optim.lr_scheduler, name)(stepped, **SCHEDULES[name])
        for _ in range(6):
            backward(model)
            stepped.step()
            schedule.step()
        results.append((schedule.get_last_lr(), model.weight.detach().clone()))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


def test_reduce_on_plateau_reaches_the_base():
    _, optimizer = make()
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for loss in (1.0, 2.0, 3.0):
        schedule.step(loss)
    assert optimizer.base.param_groups[0]["lr"] < 0.1


def test_a_closure_is_called_once_with_gradients_on_and_its_value_returned():
    model, optimizer = make(NormClip(), AdaGN())
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        backward(model)
        return 3.5

    with torch.no_grad():
        assert optimizer.step(closure) == 3.5
    assert calls == [True]


def test_a_learning_rate_may_be_a_tensor():
    model, optimizer = make(NormClip(), base=torch.optim.AdamW, lr=torch.tensor(0.1))
    twin, plain = make(NormClip(), base=torch.optim.AdamW, lr=0.1)
    for m, o in ((model, optimizer), (twin, plain)):
        for _ in range(3):
            backward(m)
            o.step()
    torch.testing.assert_close(model.weight, twin.weight)


def test_a_scaled_loss_is_unscaled_before_the_transforms_and_an_overflow_steps_nothing():
    model, optimizer = make(NormClip(0.5), AdaGN())
    twin, plain = make(NormClip(0.5), AdaGN())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        model.zero_grad()
        scaler.scale(model(torch.ones(4, 3)).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        backward(twin)
        plain.step()
    torch.testing.assert_close(model.weight, twin.weight)
    before = copy.deepcopy(optimizer.state_dict())
    model.weight.grad.fill_(math.inf)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    after = optimizer.state_dict()
    assert torch.equal(model.weight, twin.weight) or torch.allclose(model.weight, twin.weight)
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(v, after["state"][i][k]) for i, s in before["state"].items() for k, v in s.items())


class Reads(TorchDispatchMode):
    """Notes operations that bring a value from the device to the host."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__ if hasattr(func, "__name__") else str(func)
        if any(bad in str(func) for bad in ("_local_scalar_dense", "nonzero.default", "equal.default", "is_nonzero")):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


UNITS = [AdaClip, AdaGN, SpikeClip, ValueClip, AGC, NormClip, ZClip, AutoClip, SkipStep]


@pytest.mark.parametrize("bad", [1.0, math.nan])
@pytest.mark.parametrize("nonfinite", ["restore", "zero"])
def test_the_step_reads_nothing_from_the_device(monkeypatch, nonfinite, bad):
    monkeypatch.setattr("evenstep.optim.base_optimizer.on_host", lambda x: False)
    units = [unit for unit in UNITS if nonfinite == "restore" or unit is not SkipStep]
    model, optimizer = make(*(unit() for unit in units), reset_interval=2, nonfinite=nonfinite)
    backward(model)
    optimizer.step()
    for scale in (1.0, bad, 1.0):
        backward(model, scale)
        with Reads() as reads:
            optimizer.step()
        assert reads.found == []


def test_skipping_on_the_host_reads_once():
    model, optimizer = make(AdaGN(), nonfinite="skip")
    backward(model)
    optimizer.step()
    backward(model)
    reads = []
    real = torch.Tensor.tolist
    torch.Tensor.tolist = lambda self: (reads.append(self.shape), real(self))[1]
    try:
        optimizer.step()
    finally:
        torch.Tensor.tolist = real
    assert len(reads) == 1


def test_gradients_and_their_memory_stay_the_users():
    model, optimizer = make(*(unit() for unit in UNITS))
    backward(model)
    grads = [p.grad for p in model.parameters()]
    values = [g.clone() for g in grads]
    optimizer.step()
    assert all(p.grad is g and torch.equal(g, v) for p, g, v in zip(model.parameters(), grads, values, strict=True))


def test_the_zero_step_of_checkpoint_tools_changes_nothing():
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    chain = lambda: (AdaClip(), ZClip(), AutoClip(window=4))  # noqa: E731
    base = lambda params, lr: torch.optim.AdamW(params, lr=lr, weight_decay=0.5)  # noqa: E731
    model, optimizer = make(*chain(), base=base)
    weights = model.weight.detach().clone()
    get_optimizer_state_dict(model, optimizer)
    assert torch.equal(weights, model.weight) and optimizer.param_groups[0]["stabilize_t"] == 0
    assert all((value == 0).all() for state in optimizer.statistics.values() for value in state.values())
    assert all(float(state["step"]) == 0 for state in optimizer.state.values())

    untouched, plain = make(*chain(), base=base)
    for m, o in ((model, optimizer), (untouched, plain)):
        for _ in range(3):
            backward(m)
            o.step()
    assert torch.equal(model.weight, untouched.weight)
    model.zero_grad()
    for flatten in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        again, resumed = make(*chain(), base=base)
        set_optimizer_state_dict(again, resumed, saved, options=options)
        for p, q in zip(model.parameters(), again.parameters(), strict=True):
            assert all(torch.equal(v, resumed.statistics[q][k]) for k, v in optimizer.statistics[p].items())
            moments = ("step", "exp_avg", "exp_avg_sq")
            assert all(torch.equal(optimizer.state[p][k], resumed.state[q][k]) for k in moments)


def test_a_step_at_rate_zero_with_gradients_counts():
    model, optimizer = make(AdaGN(), base=torch.optim.AdamW, lr=0.0)
    backward(model)
    optimizer.step()
    assert optimizer.param_groups[0]["stabilize_t"] == 1
    assert float(optimizer.statistics[model.weight]["adagn.n"]) == 1


def test_parameters_without_gradients_and_empty_groups_are_left_alone():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = stabilize(torch.optim.AdamW([{"params": [p]}, {"params": []}, {"params": [q]}]), AdaGN(), ZClip())
    optimizer.step()
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(q, torch.ones(2)) and not torch.equal(p, torch.ones(3))
    assert q not in optimizer.state and math.isnan(float(optimizer.stats["grad_norm"][1]))
    q.grad = torch.ones(2)
    optimizer.step()
    assert not torch.equal(q, torch.ones(2))


def test_a_failed_step_counts_nothing():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("out of memory")

    model, optimizer = make(AdaGN(), base=Failing)
    backward(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert optimizer.param_groups[0]["stabilize_t"] == 0
    assert float(optimizer.statistics[model.weight]["adagn.n"]) == 0


def test_it_is_collected_without_the_cycle_collector():
    gc.collect()
    gc.disable()
    try:
        model, optimizer = make(AdaGN(), ZClip())
        backward(model)
        optimizer.step()
        gone = weakref.ref(optimizer)
        del optimizer
        assert gone() is None
    finally:
        gc.enable()
