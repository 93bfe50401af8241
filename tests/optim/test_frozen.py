"""Parameters that do not require gradients: no state, no checks; unfreezing starts their state as if they were new."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from evenstep import SCALE, SPAM, AdaClip, AdaGN, SpikeClip, StableSPAM, stabilize
from evenstep.baselines.state_size import state_bytes


def scale(params, **options):
    matrices, vectors = [p for p in params if p.dim() > 1], [p for p in params if p.dim() < 2]
    groups = [{"kind": "last", "params": matrices}, {"kind": "vector", "params": vectors}]
    return SCALE([group for group in groups if group["params"]], **options)


MAKERS = {
    "stable_spam": lambda ps: StableSPAM(ps, lr=0.01, reset_interval=5),
    "spam": lambda ps: SPAM(ps, lr=0.01, reset_interval=5, clip_start=1, threshold=5.0),
    "spam_sparse": lambda ps: SPAM(ps, lr=0.01, reset_interval=5, clip_start=1, density=0.5),
    "spam_stochastic": lambda ps: SPAM(ps, lr=0.01, rounding="stochastic"),
    "spam_kahan": lambda ps: SPAM(ps, lr=0.01, rounding="kahan", state="bf16"),
    "scale": lambda ps: scale(ps, lr=0.01),
    "stabilize": lambda ps: stabilize(torch.optim.AdamW(ps, lr=0.01), AdaClip(), AdaGN(), SpikeClip()),
    "stabilized_spam": lambda ps: stabilize(SPAM(ps, lr=0.01, density=0.5), AdaClip()),
}
every_optimizer = pytest.mark.parametrize("name", MAKERS)


def parameters(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in ((6, 4), (4,), (5, 6), (5,))]


def train(params, optimizer, steps):
    """Gradients depend on the step and the place alone; frozen parameters get none."""
    for step in steps:
        for i, p in enumerate(params):
            generator = torch.Generator().manual_seed(1000 * i + step)
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = grad if p.requires_grad else None
        optimizer.step()


def kept(optimizer):
    """Everything that is kept of each parameter, by its place."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [
        {**optimizer.state.get(p, {}), **getattr(optimizer, "statistics", {}).get(p, {})} for p in params
    ]  # fmt: skip


def same(a, b):
    assert all(torch.equal(p, q) for p, q in zip(a[0], b[0], strict=True))
    for ours, theirs in zip(kept(a[1]), kept(b[1]), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(theirs[key])) for key, x in ours.items())


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_optimizer
def test_frozen_parameters_have_no_state_and_no_place_in_a_checkpoint(name):
    params = parameters()
    for p in params[:2]:
        p.requires_grad_(False)
    optimizer = MAKERS[name](params)
    train(params, optimizer, range(3))
    assert not any(p in optimizer.state for p in params[:2])
    assert sum(len(entries) > 0 for entries in optimizer.state_dict()["state"].values()) == 2
    alone = MAKERS[name](parameters()[2:])
    train(alone.param_groups[0]["params"], alone, range(3))
    assert state_bytes([kept(optimizer)]) == state_bytes([kept(alone)])


@every_optimizer
def test_an_unfrozen_parameter_starts_as_one_that_is_added_then(name):
    params, expected = parameters(), parameters()
    late = params[2]
    late.requires_grad_(False)
    optimizer = MAKERS[name](params)
    reference = MAKERS[name](expected)
    for p in expected:
        p.requires_grad_(p is not expected[2])
    for p in (expected[2],):  # what was made at the start is thrown away: the state made now has to be what counts
        reference.state.pop(p, None)
        getattr(reference, "statistics", {}).pop(p, None)
    for one, ps in ((optimizer, params), (reference, expected)):
        train(ps, one, range(3))
    late.requires_grad_(True)
    expected[2].requires_grad_(True)
    base = getattr(reference, "base", reference)
    if hasattr(base, "fresh_state"):
        group, (_, index) = base.place(expected[2])
        base.state[expected[2]] = base.fresh_state(expected[2], group, index)
    for one, ps in ((optimizer, params), (reference, expected)):
        train(ps, one, range(3, 9))
    same((params, optimizer), (expected, reference))


@every_optimizer
@pytest.mark.parametrize("frozen_at_the_start", [True, False])
def test_it_resumes_to_the_bit_whenever_it_was_saved(name, frozen_at_the_start):
    """Frozen, unfrozen at step 3, frozen again at step 6, and saved at every step."""

    def freeze(params, step):
        params[2].requires_grad_(3 <= step < 6 or (step < 3 and not frozen_at_the_start))

    params = parameters()
    freeze(params, 0)
    optimizer, points = MAKERS[name](params), {}
    for step in range(9):
        freeze(params, step)
        points[step] = [p.detach().clone() for p in params], through_a_file(optimizer.state_dict())
        train(params, optimizer, [step])
    for start, (weights, state) in points.items():
        again = parameters()
        freeze(again, start)
        resumed = MAKERS[name](again)
        for p, w in zip(again, weights, strict=True):
            p.data.copy_(w)
        resumed.load_state_dict(state)
        for step in range(start, 9):
            freeze(again, step)
            train(again, resumed, [step])
        same((params, optimizer), (again, resumed))


@every_optimizer
def test_what_freezing_leaves_is_kept_and_goes_on(name):
    params = parameters()
    optimizer = MAKERS[name](params)
    train(params, optimizer, range(3))
    place = [p is params[2] for group in optimizer.param_groups for p in group["params"]].index(True)
    before = copy.deepcopy(kept(optimizer)[place])
    params[2].requires_grad_(False)
    train(params, optimizer, range(3, 5))
    after = kept(optimizer)[place]
    assert before.keys() == after.keys()
    assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(after[key])) for key, x in before.items())


@pytest.mark.parametrize("name", ["stable_spam", "spam", "scale", "stabilize"])
def test_a_state_of_0_1_loads_and_what_was_never_trained_is_let_go(name):
    """0.1.0 made and saved state for frozen parameters, too."""
    params = parameters(torch.float32)
    old = MAKERS[name](params)
    params[2].requires_grad_(False)
    train(params, old, range(3))
    saved = through_a_file(old.state_dict())
    assert len(saved["state"]) == 4
    again = parameters(torch.float32)
    again[2].requires_grad_(False)
    optimizer = MAKERS[name](again)
    optimizer.load_state_dict(saved)
    assert again[2] not in optimizer.state and again[0] in optimizer.state
    for p, q in zip(again, params, strict=True):
        p.data.copy_(q)
    for ps, one in ((params, old), (again, optimizer)):
        ps[2].requires_grad_(True)
        train(ps, one, range(3, 6))
    same((params, old), (again, optimizer))


@every_optimizer
def test_frozen_parameters_of_any_dtype_are_taken_as_adamw_takes_them(name):
    for dtype in (torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn):
        frozen = nn.Parameter(torch.ones(4, 6).to(dtype), requires_grad=False)
        params = [*parameters(), frozen]
        optimizer = MAKERS[name](params)
        train(params, optimizer, range(2))
        assert frozen not in optimizer.state
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
        train(params, optimizer, range(2, 4))
    if "stabil" not in name:
        with pytest.raises(ValueError, match="real floating-point parameters are supported"):
            MAKERS[name]([nn.Parameter(torch.ones(4, 6, dtype=torch.complex64))])


def test_a_state_of_adamw_that_never_saw_the_frozen_ones_is_taken_over():
    params = parameters(torch.float32)
    params[0].requires_grad_(False)
    base = torch.optim.AdamW(params, lr=0.01)
    train(params, base, range(3))
    optimizer = StableSPAM(params)
    with pytest.warns(UserWarning, match="took over age, exp_avg, exp_avg_sq"):
        optimizer.load_state_dict(base.state_dict())
    assert params[0] not in optimizer.state
    assert torch.equal(optimizer.state[params[2]]["exp_avg"], base.state[params[2]]["exp_avg"])


@every_optimizer
def test_groups_added_later_keep_to_it(name):
    params = parameters()
    optimizer = MAKERS[name](params)
    train(params, optimizer, range(2))
    frozen = [nn.Parameter(torch.ones(6, 4), requires_grad=False)]
    optimizer.add_param_group({"params": frozen} | ({"kind": "last"} if name == "scale" else {}))
    train(params + frozen, optimizer, range(2, 4))
    assert frozen[0] not in optimizer.state and frozen[0] not in getattr(optimizer, "statistics", {})
    frozen[0].requires_grad_(True)
    train(params + frozen, optimizer, range(4, 6))
    assert frozen[0] in optimizer.state and not torch.equal(frozen[0], torch.ones_like(frozen[0]))


def test_gradient_release_starts_the_state_of_what_was_unfrozen():
    results = []
    for released in (False, True):
        params = parameters()
        params[2].requires_grad_(False)
        optimizer = MAKERS["spam_sparse"](params)
        for step in range(6):
            params[2].requires_grad_(step >= 2)
            for i, p in enumerate(params):
                grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * i + step)).to(p.dtype)
                p.grad = grad if p.requires_grad else None
            for p in params if released else ():
                optimizer.step_parameter(p)
                p.grad = None
            optimizer.step()
        results.append(params)
    for p, q in zip(*results, strict=True):  # masks are drawn before the clock advances, or after
        assert torch.equal(p, q) or p is results[0][2]


@pytest.fixture
def mesh():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["stable_spam", "spam", "scale", "stabilize"])
def test_sharded_parameters_and_those_exchanged_later_keep_to_it(name, mesh):
    params = parameters(torch.float32)
    params[2].requires_grad_(False)
    optimizer = MAKERS[name](params)
    shards = []
    for group in optimizer.param_groups:
        group["params"] = [
            nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]), requires_grad=p.requires_grad)
            for p in group["params"]
        ]
        shards += group["params"]
    for _ in range(3):
        for p in shards:
            p.grad = torch.ones_like(p) if p.requires_grad else None
        optimizer.step()
    assert [p in optimizer.state for p in shards] == [p.requires_grad for p in shards]
    assert sum(p.requires_grad for p in shards) == 3


def lora_7b():
    """The shapes of a 7B LLaMA with adapters of rank 16 beside the projections of attention."""
    hidden, middle, layers, rank = 4096, 11008, 32, 16
    with torch.device("meta"):
        base = [nn.Parameter(torch.empty(32000, hidden, dtype=torch.bfloat16)) for _ in range(2)]
        adapters = []
        for _ in range(layers):
            base += [nn.Parameter(torch.empty(hidden, hidden, dtype=torch.bfloat16)) for _ in range(4)]
            base += [nn.Parameter(torch.empty(hidden, middle, dtype=torch.bfloat16)) for _ in range(3)]
            for _ in range(4):
                adapters += [nn.Parameter(torch.empty(rank, hidden)), nn.Parameter(torch.empty(hidden, rank))]
    for p in base:
        p.requires_grad_(False)
    return base, adapters


@pytest.mark.parametrize(
    "make",
    [StableSPAM, SPAM, lambda ps: SPAM(ps, state="bf16"), lambda ps: stabilize(StableSPAM(ps), SpikeClip())],
    ids=["stable_spam", "spam", "spam bf16", "stabilize"],
)
def test_lora_on_7b_allocates_state_for_the_adapters_alone(make):
    base, adapters = lora_7b()
    assert sum(p.numel() for p in base) > 6.5e9
    both, alone = make([*base, *adapters]), make(adapters)
    size, expected = (state_bytes([one.state, getattr(one, "statistics", {})]) for one in (both, alone))
    assert size == expected and 4 * sum(p.numel() for p in adapters) <= size < 300e6
    assert not any(p in both.state for p in base)
    assert len(both.state_dict()["state"]) == len(adapters)


def test_a_parameter_unfrozen_in_a_sweep_gets_the_mask_that_a_step_would_give_it():
    def trained(release):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(8, 8)) for _ in range(2)]
        params[1].requires_grad_(False)
        optimizer = SPAM(params, density=0.5)
        for step in range(4):
            params[1].requires_grad_(step > 1)
            for p in params:
                p.grad = torch.randn_like(p) if p.requires_grad else None
            if release:
                for p in params:
                    optimizer.step_parameter(p)
                    p.grad = None
            optimizer.step()
        return [p.detach() for p in params]

    for a, b in zip(trained(True), trained(False), strict=True):
        assert torch.equal(a, b)
