"""`stabilize` stands in for its base: what tools look for on an optimizer is found, what must be refused is refused."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from evenstep import AGC, SCALE, SPAM, AdaClip, AdaGN, NormClip, SpikeClip, StableSPAM, ValueClip, stabilize


class Moded(torch.optim.SGD):
    """With modes and settings of its own, as schedule-free optimizers have."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        self.modes, self.cleared, self.temperature = [], 0, 1.0

    def train(self):
        self.modes.append("train")

    def eval(self):
        self.modes.append("eval")

    def zero_grad(self, set_to_none=True):
        self.cleared += 1
        super().zero_grad(set_to_none)


def parameter():
    return nn.Parameter(torch.ones(3, 4))


def wrapped(depth, base):
    for transform in (AdaClip(), AdaGN(), ValueClip())[:depth]:
        base = stabilize(base, transform)
    return base


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_methods_and_attributes_of_the_base_are_reached_and_set(depth):
    base = Moded([parameter()])
    optimizer = wrapped(depth, base)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert hasattr(optimizer, "train") and callable(optimizer.train) and "temperature" in dir(optimizer)
    optimizer.train()
    optimizer.eval()
    optimizer.zero_grad(set_to_none=False)
    assert base.modes == ["train", "eval"] and base.cleared == 1
    optimizer.temperature = 2.0
    optimizer.remark = "ours"
    assert base.temperature == 2.0 and not hasattr(base, "remark")
    optimizer.defaults = {"lr": 0.5}
    assert base.defaults == {"lr": 0.5}
    groups = optimizer.param_groups = [dict(base.param_groups[0], lr=0.25)]
    assert base.param_groups is groups
    del optimizer.param_groups[0]["lr"]
    assert "lr" not in base.param_groups[0]


def test_what_the_base_lacks_is_lacking():
    optimizer = stabilize(torch.optim.SGD([parameter()], lr=0.1), AdaClip())
    for name in ("train", "eval", "step_parameter", "set_mask", "_step_supports_amp_scaling", "__len__"):
        assert not hasattr(optimizer, name)
    fused = torch.optim.AdamW([parameter()], fused=True)
    assert hasattr(
        fused, "_step_supports_amp_scaling"
    )  # a GradScaler has to unscale before the transforms all the same
    assert not hasattr(stabilize(fused), "_step_supports_amp_scaling")


def test_its_own_names_stay_its_own():
    """`SPAM` has statistics of its own, and a chain within has a chain."""
    p = parameter()
    base = SPAM([p], density=0.5)
    optimizer = stabilize(stabilize(base, AdaClip(), nonfinite="zero"), AdaGN())
    p.grad = torch.ones(3, 4)
    optimizer.step()
    assert not base.stats["gain"].isnan().any() and optimizer.stats is not base.stats
    assert optimizer.nonfinite == "restore" and optimizer.base.nonfinite == "zero"
    assert [type(unit) for unit in optimizer.transforms] == [AdaGN]
    optimizer.set_mask(p, torch.ones(3, 4, dtype=torch.bool))
    assert base.get_mask(p).all()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_copies_and_saved_states_go_on_alike(depth):
    def trained(optimizer, p, steps):
        for step in steps:
            p.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(step)) * 3
            optimizer.step()

    p = parameter()
    optimizer = wrapped(depth, torch.optim.AdamW([p], lr=0.1))
    trained(optimizer, p, range(4))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = nn.Parameter(p.detach().clone())
    resumed = wrapped(depth, torch.optim.AdamW([again], lr=0.1))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), resumed]
    trained(optimizer, p, range(4, 8))
    for one in copies:
        [q] = one.param_groups[0]["params"]
        trained(one, q, range(4, 8))
        assert torch.equal(p, q)
        assert all(torch.equal(x, one.statistics[q][key]) for key, x in optimizer.statistics[p].items())


def test_chains_within_one_another_count_their_steps_and_keep_their_statistics_apart():
    def trained(optimizer, p):
        for step in range(7):
            p.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(step)) * (100 if step == 5 else 1)
            optimizer.step()

    p, q = parameter(), parameter()
    nested = stabilize(stabilize(torch.optim.AdamW([p], lr=0.1), AdaGN(), reset_interval=4), SpikeClip(clip_start=2))
    one = stabilize(torch.optim.AdamW([q], lr=0.1), SpikeClip(clip_start=2), AdaGN())
    one.reset_interval = 4
    trained(nested, p)
    for unit in one.transforms:  # in a chain of its own it is not told about the resets of the other
        unit.clip_start = 2
    trained(one, q)
    assert nested.param_groups[0]["stabilize_t"] == nested.param_groups[0]["stabilize_t2"] == 7
    entries = nested.state_dict()["state"][0]
    assert {"stabilize.adagn.n", "stabilize.skipped", "stabilize.stabilize.skipped"} <= entries.keys()
    assert float(entries["stabilize.adagn.n"]) == float(one.statistics[q]["adagn.n"]) == 7


@pytest.mark.parametrize("nested", [False, True])
def test_gradient_release_behind_transforms_is_step_bit_for_bit(nested):
    results = []
    for released in (False, True):
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(5, 4, generator=generator)) for _ in range(3)]
        base = SPAM(params, lr=0.01, reset_interval=4, clip_start=1, threshold=2.0)
        optimizer = stabilize(base, AdaClip(), AdaGN(), SpikeClip(clip_start=2))
        if nested:
            optimizer = stabilize(optimizer, ValueClip(0.5))
        for step in range(9):
            for p in params:
                p.grad = torch.randn(5, 4, generator=generator)
            if step == 5:
                params[1].grad[0, 0] = torch.nan
            for p in reversed(params[1:] if step % 2 else params) if released else ():
                optimizer.step_parameter(p)
                p.grad = None
            optimizer.step()
        results.append((params, optimizer))
    (params, optimizer), (others, other) = results
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(x, other.statistics[q][key]) for key, x in optimizer.statistics[p].items())
    assert optimizer.param_groups[0]["stabilize_t"] == other.param_groups[0]["stabilize_t"] == 9


@pytest.mark.parametrize(
    "build", [lambda base: stabilize(base, NormClip()), lambda base: stabilize(base, reset_interval=5)]
)
def test_gradient_release_refuses_what_needs_all_gradients(build):
    p = parameter()
    optimizer = build(SPAM([p]))
    p.grad = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"step_parameter does not go with (NormClip|reset_interval)"):
        optimizer.step_parameter(p)


# ---- trainers ----


def schedule_free(params, library):
    if library == "schedulefree":
        return pytest.importorskip("schedulefree").AdamWScheduleFree(params, lr=0.1)
    return pytest.importorskip("pytorch_optimizer").ScheduleFreeAdamW(params, lr=0.1)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("library", ["schedulefree", "pytorch_optimizer"])
def test_accelerate_evaluates_schedule_free_weights_where_they_are_meant(library, depth):
    accelerate = pytest.importorskip("accelerate")

    def evaluated(wrap):
        p = nn.Parameter(torch.ones(8))
        base = schedule_free([p], library)
        base.train()
        optimizer = accelerate.Accelerator(cpu=True).prepare_optimizer(wrap(base))
        for step in range(5):
            p.grad = torch.randn(8, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        optimizer.eval()
        return p.detach().clone()

    def wrap(base):
        for _ in range(depth):
            base = stabilize(base)
        return base

    assert torch.equal(evaluated(lambda base: base), evaluated(wrap))


def wrapping(p):
    schedulefree = pytest.importorskip("schedulefree")
    return schedulefree.ScheduleFreeWrapper(stabilize(torch.optim.SGD([p], lr=0.1), AdaClip()), momentum=0.9)


def around(p):
    library = pytest.importorskip("pytorch_optimizer")
    return stabilize(library.ScheduleFreeWrapper(torch.optim.SGD([p], lr=0.1), momentum=0.9), AdaClip())


@pytest.mark.parametrize("build", [wrapping, around])
def test_schedule_free_wrappers_take_it_and_are_taken(build):
    p = parameter()
    optimizer = build(p)
    optimizer.train()
    for _ in range(3):
        p.grad = torch.ones(3, 4)
        optimizer.step()
    trained = p.detach().clone()
    optimizer.eval()
    assert not torch.equal(p, trained) and (p < 1).all()


# ---- flat shards ----

BUILDS = {
    "stabilize": lambda ps: stabilize(torch.optim.AdamW(ps), AdaClip()),
    "nested": lambda ps: stabilize(stabilize(torch.optim.AdamW(ps), AdaClip()), AdaGN()),
    "without transforms": lambda ps: stabilize(torch.optim.AdamW(ps)),
    "stable_spam": StableSPAM,
    "spam": SPAM,
    "scale": lambda ps: SCALE([{"kind": "vector", "params": list(ps)}]),
}
every_build = pytest.mark.parametrize("name", BUILDS)


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def flat(model, use_orig_params):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))


@every_build
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_flat_shards_of_fsdp1_are_refused(name, use_orig_params, one_process):
    with pytest.raises(ValueError, match=r"is a flat shard \(FullyShardedDataParallel\).*use FSDP2"):
        BUILDS[name](flat(nn.Linear(3, 4), use_orig_params).parameters())


@every_build
def test_a_model_flattened_after_construction_is_refused_at_the_step(name, one_process):
    model = nn.Linear(4, 4) if name != "scale" else nn.LayerNorm(4)
    optimizer = BUILDS[name](model.parameters())
    sharded = flat(model, True)
    sharded(torch.ones(2, 4)).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="is a flat shard"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    with pytest.raises(ValueError, match="is a flat shard"):
        optimizer.add_param_group({"params": [next(flat(nn.Linear(3, 4), False).parameters())], "kind": "vector"})
    assert len(optimizer.param_groups) == 1


@every_build
def test_flat_shards_of_zero_are_refused(name):
    """Stages 1 and 2 put flat fp32 partitions into the groups, stage 3 cuts the parameters before that."""
    optimizer = BUILDS[name]([nn.Parameter(torch.ones(8))])
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.ones(4))]
    optimizer.param_groups[0]["params"][0].grad = torch.ones(4)
    for act in (optimizer.step, optimizer.state_dict):
        with pytest.raises(RuntimeError, match=r"without add_param_group.*flat shard \(ZeRO\)"):
            act()
    partitioned = nn.Parameter(torch.ones(0))
    partitioned.ds_tensor = torch.ones(4)
    with pytest.raises(ValueError, match="partitioned by DeepSpeed ZeRO stage 3"):
        BUILDS[name]([partitioned])


# ---- settings put out of range after construction ----

BEYOND = 10**400  # a float raises OverflowError at it
SETTINGS = [
    ("lr", float("nan")), ("lr", float("inf")), ("lr", -1e-3), ("lr", None), ("betas", (0.9, 1.0)),
    ("betas", (float("nan"), 0.9)), ("eps", -1.0), ("eps", float("nan")), ("weight_decay", float("inf")),
    ("rounding", "up"), ("maximize", 2), ("state", "fp8"), ("threshold", float("nan")), ("density", 0.0),
    ("density", 2), ("reset_interval", -1), ("reset_interval", 1.5), ("warmup_steps", -1), ("clip_start", -1),
    ("gamma1", 1.0),
    ("gamma2", -0.1), ("gamma3", float("nan")), ("total_steps", 0), ("eta_min", 2.0), ("momentum", 1.0),
    ("norm", "l1"), ("variant", "mine"), ("eps", BEYOND), ("reset_interval", BEYOND), ("density", BEYOND),
]  # fmt: skip


@pytest.mark.parametrize("fused", [None, False], ids=["kernels", "plain"])
@pytest.mark.parametrize(("setting", "value"), SETTINGS, ids=[f"{name}={value!s:.9}" for name, value in SETTINGS])
def test_a_setting_out_of_range_is_an_error_before_anything_changes(setting, value, fused):
    for cls in (StableSPAM, SPAM, SCALE):
        p = parameter()
        optimizer = cls([{"params": [p], "kind": "last"}], fused=fused)
        if setting not in optimizer.defaults:
            continue
        p.grad = torch.ones(3, 4)
        optimizer.step()
        weights, state = p.detach().clone(), copy.deepcopy(optimizer.state_dict())
        good, optimizer.param_groups[0][setting] = optimizer.param_groups[0][setting], value
        for act in (optimizer.step, lambda optimizer=optimizer, p=p: optimizer.step_parameter(p)):
            with pytest.raises(ValueError, match=rf"^{cls.__name__}, param_groups\[0\]: {setting}=.* is not [^\n]*$"):
                act()
        optimizer.param_groups[0][setting] = good
        found = optimizer.state_dict()
        assert torch.equal(p, weights) and found["param_groups"] == state["param_groups"]
        assert all(torch.equal(x, found["state"][0][key]) for key, x in state["state"][0].items())
        optimizer.step()
        assert not torch.equal(p, weights)


def test_settings_are_looked_at_again_only_where_one_has_changed(monkeypatch):
    import evenstep.optim.optimizer as base

    looked = []
    monkeypatch.setattr(base, "check", lambda owner, **options: looked.append(options))
    p = parameter()
    optimizer = StableSPAM([p])
    p.grad = torch.ones(3, 4)
    optimizer.step()
    looked.clear()
    optimizer.step()
    assert not looked
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert {"lr": 0.5} in looked


def test_a_tensor_is_left_alone(monkeypatch):
    p, lr = parameter(), torch.tensor(0.01)
    optimizers = [StableSPAM([p], lr=lr), stabilize(torch.optim.SGD([p], lr=lr), AdaClip())]
    p.grad = torch.ones(3, 4)

    def refuse(self, *args):
        raise AssertionError("a value was read")

    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = torch.tensor(-1.0)
        with monkeypatch.context() as patched:
            for name in ("item", "__bool__", "__float__", "tolist"):
                patched.setattr(torch.Tensor, name, refuse)
            optimizer._check_groups() if isinstance(optimizer, StableSPAM) else optimizer._check_options()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o.param_groups[0].update(lr=float("nan")), r"stabilize, param_groups\[0\]: lr=nan"),
        (lambda o: o.param_groups[0].update(lr=-1.0), r"stabilize, param_groups\[0\]: lr=-1.0"),
        (lambda o: setattr(o, "reset_interval", -1), "stabilize: reset_interval=-1"),
        (lambda o: setattr(o, "nonfinite", "drop"), "stabilize: nonfinite='drop'"),
        (lambda o: setattr(o.transforms[0], "gamma3", 1.5), "AdaClip: gamma3=1.5"),
        (lambda o: setattr(o.transforms[1], "eps", float("nan")), "AdaGN: eps=nan"),
        (lambda o: setattr(o.transforms[2], "threshold", -1), "SpikeClip: threshold=-1"),
        (lambda o: setattr(o.transforms[3], "clipping", 0), "AGC: clipping=0"),
    ],
)
def test_settings_of_stabilize_are_looked_at_alike(change, message):
    p = parameter()
    optimizer = stabilize(torch.optim.SGD([p], lr=0.1), AdaClip(), AdaGN(), SpikeClip(), AGC())
    p.grad = torch.ones(3, 4)
    optimizer.step()
    weights, statistics = p.detach().clone(), copy.deepcopy(optimizer.statistics[p])
    change(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(p, weights) and optimizer.param_groups[0]["stabilize_t"] == 1
    assert all(torch.equal(x, optimizer.statistics[p][key]) for key, x in statistics.items())
