"""Conformance: parameters, param groups, hyperparameters and learning rates."""

import torch
from conformance_subjects import (
    LR,
    SHAPES,
    Subject,
    check,
    give,
    group_of,
    make_params,
    must_refuse,
    refusal,
    same,
    snapshot,
    train,
    values,
)
from torch import nn

FORMS = {
    "a list": lambda ps: ps,
    "a generator": lambda ps: (p for p in ps),
    "named parameters": lambda ps: [(f"p{i}", p) for i, p in enumerate(ps)],
    "groups": lambda ps: [{"params": ps[:2]}, {"params": ps[2:], "lr": LR}],
    "groups of named parameters": lambda ps: [{"params": [(f"p{i}", p)]} for i, p in enumerate(ps)],
    "a group of one tensor": lambda ps: [{"params": p} for p in ps],
    "groups in several places, one empty": lambda ps: [{"params": ps[:1]}, {"params": []}, {"params": ps[1:]}],
    "an empty group first": lambda ps: [{"params": []}, {"params": ps}],
}


@check("Parameters and groups", "takes {}", FORMS)
def takes_params(subject: Subject, form: str) -> None:
    params = make_params()
    before = values(params)
    train(subject.make(FORMS[form](params)), params, range(9))
    assert all(torch.isfinite(p).all() and not torch.equal(p, old) for p, old in zip(params, before, strict=True))


@check("Parameters and groups", "keeps the names of named parameters")
def names(subject: Subject) -> None:
    params = make_params()
    optimizer = subject.make([(f"p{i}", p) for i, p in enumerate(params)])
    found = [name for group in optimizer.state_dict()["param_groups"] for name in group["param_names"]]
    assert sorted(found) == [f"p{i}" for i in range(len(params))]


REFUSED = {
    "an empty list": (lambda: [], "empty"),
    "a bare tensor": (lambda: torch.ones(2), "iterable"),
    "what is no tensor": (lambda: ["weight"], "Tensor"),
    "a tensor that is no leaf": (lambda: [torch.ones(2, 2, requires_grad=True) * 2], "leaf"),
}


@check("Parameters and groups", "refuses {}", REFUSED)
def refuses_params(subject: Subject, case: str) -> None:
    make, word = REFUSED[case]
    must_refuse(lambda: subject.make(make()), word)


@check("Parameters and groups", "refuses a parameter in two groups")
def two_groups(subject: Subject) -> None:
    p = make_params([(3, 4)])[0]
    must_refuse(lambda: subject.make([{"params": [p]}, {"params": [p]}]), "more than one parameter group")


@check("Parameters and groups", "updates a tensor of shape {}", [*SHAPES, (1,), (300, 300)])
def shapes(subject: Subject, shape: tuple[int, ...]) -> None:
    params = make_params([shape])
    before = values(params)
    train(subject.make(params), params, range(9))
    assert torch.isfinite(params[0]).all() and not torch.equal(params[0], before[0])


@check("Parameters and groups", "takes a tensor of shape {} without entries", [(0,), (3, 0), (0, 3)])
def no_entries(subject: Subject, shape: tuple[int, ...]) -> None:
    params = make_params([shape, (2, 3)])
    train(subject.make(params), params, range(9))
    assert torch.isfinite(params[1]).all()


@check("Parameters and groups", "descends in {}", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def dtypes(subject: Subject, dtype: torch.dtype) -> None:
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in SHAPES]
    optimizer = subject.make(params)
    for _ in range(9):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all(p.dtype == dtype and torch.isfinite(p).all() for p in params)
    assert all(p.double().mean() < 1 for p in params)


@check("Parameters and groups", "takes mixed dtypes in one group")
def mixed_dtypes(subject: Subject) -> None:
    kinds = [torch.float64, torch.bfloat16, torch.float32, torch.float16]
    params = [nn.Parameter(torch.ones(4, 3, dtype=dtype)) for dtype in kinds]
    alone = [nn.Parameter(p.detach().clone()) for p in params]
    train(subject.make(params), params, range(5))
    assert [p.dtype for p in params] == kinds and all(torch.isfinite(p).all() for p in params)
    assert all(not torch.equal(p, q) for p, q in zip(params, alone, strict=True))


@check("Parameters and groups", "trains complex parameters, or refuses them before anything changes")
def complex_parameters(subject: Subject) -> str | None:
    p = nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))
    before = p.detach().clone()
    p.grad = torch.full_like(p, 1j)
    said = refusal(lambda: subject.make([p], weight_decay=0.0).step(), "complex")
    assert torch.equal(p, before) if said else not torch.equal(p.imag, before.imag)
    return said


@check("Parameters and groups", "takes parameters on the meta device")
def meta(subject: Subject) -> None:
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    optimizer = subject.make(params)
    for _ in range(9):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()


@check("Parameters and groups", "takes parameters of two devices in one group")
def two_devices(subject: Subject) -> None:
    params = make_params([(4, 5), (3,)])
    far = [nn.Parameter(torch.empty(4, 5, device="meta")), nn.Parameter(torch.empty(3, device="meta"))]
    optimizer = subject.make([far[0], params[0], far[1], params[1]])
    before = values(params)
    for step in range(9):
        give(params, step)
        for p in far:
            p.grad = torch.empty_like(p)
        optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(params, before, strict=True))


OPTIONS = {"lr": 0.05, "weight_decay": 0.3, "betas": (0.5, 0.6), "eps": 0.1, "maximize": True}


@check("Parameters and groups", "takes {} per group", OPTIONS)
def per_group(subject: Subject, name: str) -> None:
    def run(first: dict, second: dict) -> list[torch.Tensor]:
        params = make_params([(4, 5), (3,), (4, 5), (3,)])
        groups = [{"params": params[:2], **first}, {"params": params[2:], **second}]
        train(subject.make(groups), params, range(9))
        return values(params)

    changed = {name: OPTIONS[name]}
    mixed, plain, special = run(changed, {}), run({}, {}), run(changed, changed)
    assert same(mixed[:2], special[:2]) and same(mixed[2:], plain[2:]), "differs from an optimizer of its own"
    assert not same(special[:2], plain[:2]), "has no effect"


BAD = {"lr": (-1.0, "rate"), "betas": ((0.9, 1.5), "beta"), "eps": (-1.0, "eps"), "weight_decay": (-1.0, "decay")}


@check("Parameters and groups", "refuses {} out of range", BAD)
def out_of_range(subject: Subject, name: str) -> None:
    value, word = BAD[name]
    must_refuse(lambda: subject.make(make_params(), **{name: value}), word, name)


@check("Parameters and groups", "refuses an unknown argument")
def unknown_argument(subject: Subject) -> None:
    must_refuse(lambda: subject.make(make_params(), weight_deacy=0.1), "weight_deacy")


@check("Parameters and groups", "a group added late trains and does not disturb the others")
def added_late(subject: Subject) -> None:
    def run(late: bool) -> list[torch.Tensor]:
        params = make_params()
        optimizer = subject.make(params)
        train(optimizer, params, range(4))
        extra = nn.Parameter(torch.ones(2, 3))
        if late:
            subject.add(optimizer, {"params": [extra], "lr": 0.2})
        for step in range(4, 20):
            give([*params, extra], step)
            optimizer.step()
        assert not late or (not torch.equal(extra, torch.ones(2, 3)) and torch.isfinite(extra).all())
        return values(params)

    assert same(run(True), run(False))


@check("Parameters and groups", "a group added late takes the defaults for what it leaves out")
def late_defaults(subject: Subject) -> None:
    params = make_params()
    optimizer = subject.make(params, weight_decay=0.25)
    extra = nn.Parameter(torch.ones(2, 3))
    subject.add(optimizer, {"params": [extra]})
    group = group_of(optimizer, extra)
    assert group["weight_decay"] == 0.25 and group["lr"] == LR


@check("Parameters and groups", "a group that is refused leaves no trace")
def refused_group(subject: Subject) -> None:
    params = make_params()
    optimizer = subject.make(params)
    before = snapshot(optimizer)
    for bad in ({"params": [params[2]]}, {"params": ["weight"]}):
        must_refuse(lambda bad=bad: subject.add(optimizer, bad), "more than one", "Tensor")
    assert same(before, snapshot(optimizer))


@check("Parameters and groups", "a missing gradient leaves parameter and state alone")
def missing_gradient(subject: Subject) -> None:
    params = make_params()
    optimizer = subject.make(params)
    train(optimizer, params, range(5))
    for step in range(5, 16):  # over two resets
        give(params, step)
        params[2].grad = None
        before, state = params[2].detach().clone(), dict(optimizer.state[params[2]])
        kept = {key: value.clone() if torch.is_tensor(value) else value for key, value in state.items()}
        optimizer.step()
        assert torch.equal(params[2], before)
        assert same(kept, dict(optimizer.state[params[2]])), "state changed"
    train(optimizer, params, range(16, 18))
    assert torch.isfinite(params[2]).all() and not torch.equal(params[2], before)


@check("Parameters and groups", "a step without any gradient changes no parameter")
def no_gradients(subject: Subject) -> None:
    params = make_params()
    optimizer = subject.make(params, weight_decay=0.1)
    before = values(params)
    for _ in range(9):
        optimizer.step()
    assert same(before, values(params))
    train(optimizer, params, range(3))
    assert all(torch.isfinite(p).all() for p in params)


@check("Parameters and groups", "a parameter frozen and unfrozen goes on training")
def frozen(subject: Subject) -> None:
    params = make_params()
    params[2].requires_grad_(False)
    optimizer = subject.make(params)
    for step in range(25):
        for p in params:
            p.grad = None
        if step == 12:
            before = params[2].detach().clone()
            params[2].requires_grad_(True)
        sum((p.square().sum() for p in params if p.requires_grad), torch.zeros(())).backward()
        optimizer.step()
    assert not torch.equal(params[2], before) and all(torch.isfinite(p).all() for p in params)


@check("Parameters and groups", "a parameter whose first gradient comes late moves like a new one")
def late_parameter(subject: Subject) -> None:
    early, late = nn.Parameter(torch.ones(4, 5)), nn.Parameter(torch.ones(3))
    optimizer = subject.make([early, late])
    for _ in range(40):
        early.grad = torch.full((4, 5), 0.1)
        optimizer.step()
    moved = []
    for _ in range(12):
        early.grad, late.grad = torch.full((4, 5), 0.1), torch.full((3,), 0.1)
        before = late.detach().clone()
        optimizer.step()
        moved.append(float((before - late).max()))
    assert sum(moved) > 3 * LR and max(moved) < 1.5 * LR, moved
