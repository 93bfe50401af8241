"""stabilize() over torch's optimizers: still an Optimizer, and the gradients stay the user's."""

import copy
import pickle

import pytest
import torch
from torch import nn

from evenstep import AdaClip, AdaGN, GradientStabilizer, scale_groups, stabilize
from evenstep.optim import Stabilized


def pair(base=torch.optim.AdamW, transforms=(), **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    optimizer = stabilize(base(model.parameters(), lr=0.01), *transforms, **options)
    return model, optimizer


def step(model, optimizer, seed):
    optimizer.zero_grad()
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
    loss = model(x).square().sum()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_without_transforms_it_is_the_base():
    plain_model, plain = pair()
    base_model, _ = pair()
    base = torch.optim.AdamW(base_model.parameters(), lr=0.01)
    assert [step(plain_model, plain, i) for i in range(8)] == [step(base_model, base, i) for i in range(8)]


def test_schedulers_groups_and_zero_grad_work_as_on_any_optimizer():
    model, optimizer = pair(transforms=(AdaClip(), AdaGN()))
    assert isinstance(optimizer, torch.optim.Optimizer) and isinstance(optimizer, Stabilized)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    for i in range(5):
        step(model, optimizer, i)
        schedule.step()
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.param_groups[0]["lr"] == optimizer.base.param_groups[0]["lr"] == schedule.get_last_lr()[0]
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_loaded_state_and_the_base_stay_one():
    model, optimizer = pair(transforms=(AdaGN(),))
    step(model, optimizer, 0)
    state = copy.deepcopy(optimizer.state_dict())
    again_model, again = pair(transforms=(AdaGN(),))
    again.load_state_dict(state)
    again.param_groups[0]["lr"] = 0.5
    assert again.base.param_groups[0]["lr"] == 0.5 and again.state is again.base.state
    again_model.load_state_dict(model.state_dict())
    optimizer.param_groups[0]["lr"] = 0.5
    assert [step(model, optimizer, i) for i in range(4)] == [step(again_model, again, i) for i in range(4)]


def test_the_base_state_alone_loads_and_statistics_start_anew():
    model, plain = pair()
    step(model, plain, 0)
    bare = copy.deepcopy(plain.base.state_dict())
    _, optimizer = pair(transforms=(AdaGN(),))
    optimizer.load_state_dict(bare)
    assert all(float(value) == 0 for entries in optimizer.statistics.values() for value in entries.values())
    assert all("exp_avg" in optimizer.state[p] for p in optimizer.param_groups[0]["params"])


def test_saving_before_the_first_step_leaves_lazy_bases_lazy():
    model, optimizer = pair(transforms=(AdaGN(),))
    saved = copy.deepcopy(optimizer.state_dict())
    fresh_model, fresh = pair(transforms=(AdaGN(),))
    fresh.load_state_dict(saved)
    assert [step(model, optimizer, i) for i in range(3)] == [step(fresh_model, fresh, i) for i in range(3)]


def test_gradients_come_back_when_the_base_fails():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("out of memory")

    model, optimizer = pair(Failing, (AdaGN(),))
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    grads = [p.grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert all(p.grad is g and (g == 3).all() for p, g in zip(model.parameters(), grads, strict=True))


def test_groups_added_later_get_statistics():
    model, optimizer = pair(transforms=(AdaGN(),))
    step(model, optimizer, 0)
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra], "lr": 0.1})
    extra.grad = torch.full((3,), 1e6)
    optimizer.step()
    assert optimizer.base.param_groups[1]["lr"] == 0.1 and optimizer.param_groups[1]["stabilize_t"] == 2
    assert torch.isfinite(extra).all() and not torch.equal(extra, torch.ones(3))


@pytest.mark.parametrize(
    "base", ["AdamW", "Adam", "SGD", "RMSprop", "Adagrad", "NAdam", "RAdam", "Adamax", "Adafactor", "Adadelta"]
)
def test_a_reset_makes_any_known_base_new(base):
    """After a reset the next update is that of a fresh optimizer from the same weights."""
    options = {"SGD": {"momentum": 0.9}}.get(base, {})
    make = lambda params: getattr(torch.optim, base)(params, lr=0.01, **options)  # noqa: E731
    model, optimizer = pair(lambda params, lr: make(params), reset_interval=4)
    for i in range(3):
        step(model, optimizer, i)
    twin = copy.deepcopy(model)
    fresh = make(twin.parameters())
    step(model, optimizer, 9)
    step(twin, fresh, 9)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7)


def test_unknown_moments_are_listed_and_can_be_named():
    class Odd(torch.optim.Optimizer):
        def __init__(self, params, lr=0.1):
            super().__init__(params, {"lr": lr})

        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                state = self.state.setdefault(p, {"velocity": torch.zeros_like(p)})
                state["velocity"].add_(p.grad)

    model, optimizer = pair(Odd, reset_interval=3)
    with pytest.raises(ValueError, match=r"Odd are moments: velocity; name those"):
        step(model, optimizer, 0)
    model, optimizer = pair(Odd, reset_interval=3, moments=["velocity"])
    for i in range(3):
        step(model, optimizer, i)
    p = next(model.parameters())
    assert torch.equal(optimizer.state[p]["velocity"], p.grad)


def test_wrong_arguments_are_refused():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="expects a torch Optimizer"):
        stabilize([p], AdaClip())
    with pytest.raises(ValueError, match="adaclip is given more than once"):
        stabilize(torch.optim.SGD([p], lr=1), AdaClip(), AdaClip())
    with pytest.raises(ValueError, match="reset_interval=-1"):
        stabilize(torch.optim.SGD([p], lr=1), reset_interval=-1)
    for make in (lambda: AdaClip(1.0), lambda: AdaGN(gamma1=-0.1), lambda: GradientStabilizer(gamma2=2)):
        with pytest.raises(ValueError, match="is not a number"):
            make()


def test_it_pickles():
    model, optimizer = pair(transforms=(AdaClip(), AdaGN()))
    step(model, optimizer, 0)
    model2, optimizer2 = pickle.loads(pickle.dumps((model, optimizer)))
    assert [step(model, optimizer, i) for i in range(3)] == [step(model2, optimizer2, i) for i in range(3)]


class Language(nn.Module):
    def __init__(self, tie=False, positions=False):
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 4)
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 8)
        self.lm_head = nn.Linear(4, 10, bias=False)
        if positions:
            self.positions = nn.Parameter(torch.zeros(6, 4))
        if tie:
            self.lm_head.weight = self.embed_tokens.weight


def kinds(groups):
    return {group["kind"]: [name for name, _ in group["params"]] for group in groups}


def test_scale_groups_puts_each_parameter_where_it_belongs():
    model = Language()
    model.up.bias.requires_grad_(False)
    assert kinds(scale_groups(model)) == {
        "embedding": ["embed_tokens.weight"],
        "hidden": ["up.weight"],
        "last": ["lm_head.weight"],
        "vector": ["norm.weight", "norm.bias"],
    }


def test_scale_groups_says_what_it_cannot_classify():
    with pytest.raises(ValueError, match=r"could not classify positions \(6, 4\); name them in"):
        scale_groups(Language(positions=True))
    assert kinds(scale_groups(Language(positions=True), embedding="pos*"))["embedding"] == [
        "positions",
        "embed_tokens.weight",
    ]
    with pytest.raises(ValueError, match="shares the weight of the embedding"):
        scale_groups(Language(tie=True))
    tied = kinds(scale_groups(Language(tie=True), last="embed_tokens.weight"))
    assert tied["last"] == ["embed_tokens.weight"] and "embedding" not in tied
    with pytest.raises(ValueError, match="found no last layer in Sequential"):
        scale_groups(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="matches no trainable parameter"):
        scale_groups(Language(), last="decoder.*")
    several = nn.ModuleList([nn.ModuleDict({"output": nn.Linear(3, 3)}) for _ in range(2)])
    with pytest.raises(ValueError, match=r"several last layers: 0.output.weight, 1.output.weight"):
        scale_groups(several)
    with pytest.raises(ValueError, match=r"could not classify 0\.weight"):
        scale_groups(nn.Sequential(nn.ConvTranspose1d(2, 3, 4)))
