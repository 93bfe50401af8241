"""Each baseline does what its paper says, and all of them live in a run: groups, state, saving, transforms in front."""

import copy
import sys
import types

import pytest
import torch
from torch import nn

import evenstep
from evenstep.baselines.catalog import BASELINES, baseline
from evenstep.baselines.state_size import state_bytes
from evenstep.baselines.transforms import TRANSFORMS, add_transforms, build_transforms, parse
from evenstep.cli import main
from evenstep.errors import EvenstepError
from evenstep.models import Llama, llama_config
from evenstep.optim import SpikeClip, scale_groups
from evenstep.train.config import OptimConfig
from evenstep.train.optimizers import LearningRates, build_optimizer, check_optimizer

COMPILED = [name for name, entry in BASELINES.items() if entry.note == "compiled"]
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in COMPILED else ()) for name in BASELINES]


def model():
    torch.manual_seed(0)
    return Llama(llama_config("tiny", 256, hidden_size=64, intermediate_size=96, num_layers=1, num_heads=2))


def gradients(m, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in m.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def stepped(name, m, steps=1, **options):
    optimizer = build_optimizer(m, OptimConfig(name=name, lr=1e-3, options=options))
    for turn in range(steps):
        gradients(m, turn)
        optimizer.step()
    return optimizer


def kind(m, wanted):
    return next([p for _, p in group["params"]] for group in scale_groups(m) if group["kind"] == wanted)


def kept(optimizer, params):
    """State bytes an entry."""
    return sum(state_bytes(optimizer.state[p]) for p in params) / sum(p.numel() for p in params)


@pytest.fixture(autouse=True)
def installed(request):
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    if name in BASELINES and BASELINES[name].version() is None:
        pytest.skip(f"{BASELINES[name].package} is not installed")


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_goes_on_from_its_saved_state(name, tmp_path):
    m = model()
    optimizer = stepped(name, m, 2)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(m.parameters()))
    other = copy.deepcopy(m)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = build_optimizer(other, OptimConfig(name=name, lr=1e-3))
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for running, target in ((optimizer, m), (again, other)):
        torch.manual_seed(1)
        for turn in (2, 3):
            gradients(target, turn)
            running.step()
    for p, q in zip(m.parameters(), other.parameters(), strict=True):
        assert p.isfinite().all() and torch.allclose(p, q, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_the_schedule_reaches_every_parameter(name):
    m = model()
    optimizer = build_optimizer(m, OptimConfig(name=name, lr=1e-3))
    LearningRates(optimizer).set(optimizer, 1e-12)
    before = [p.detach().clone() for p in m.parameters()]
    gradients(m, 0)
    optimizer.step()
    moved = [float((p.detach() - old).abs().max()) for p, old in zip(m.parameters(), before, strict=True)]
    assert max(moved) < 1e-6


@pytest.mark.parametrize("name", ["galore", "fira"])
def test_state_of_projected_matrices_shrinks_with_the_rank(name):
    found = []
    for rank in (4, 8, 16):
        m = model()
        optimizer = stepped(name, m, rank=rank)
        q, mlp = m.model.layers[0].self_attn.q_proj.weight, m.model.layers[0].mlp.gate_proj.weight
        for p in (q, mlp):
            # Two moments of the projection along the longer side, and the projector.
            assert optimizer.state[p]["exp_avg"].numel() == rank * max(p.shape)
            assert state_bytes(optimizer.state[p]) == pytest.approx(4 * rank * (2 * max(p.shape) + min(p.shape)), abs=8)
        for p in [*kind(m, "embedding"), *kind(m, "last"), *kind(m, "vector")]:
            assert optimizer.state[p]["exp_avg"].shape == p.shape
        found.append(kept(optimizer, kind(m, "hidden")))
    assert found[0] < found[1] < found[2] < 8


def test_the_rank_is_a_quarter_of_the_width_unless_given():
    groups = build_optimizer(model(), OptimConfig(name="galore")).param_groups
    assert [group.get("rank") for group in groups] == [16, None]


def test_galore_moves_a_matrix_within_its_rank_and_fira_beyond():
    def rank_of_change(name):
        m = model()
        q = m.model.layers[0].self_attn.q_proj.weight
        before = q.detach().clone()
        stepped(name, m, 3, rank=4)
        change = torch.linalg.svdvals((q - before).double())
        return int((change > 1e-4 * change[0]).sum())

    assert rank_of_change("galore") == 4 and rank_of_change("fira") > 4 and rank_of_change("apollo") == 64


def test_apollo_mini_has_rank_one_and_one_factor_for_a_tensor():
    m = model()
    q = m.model.layers[0].self_attn.q_proj.weight
    before = q.detach().clone()
    optimizer = stepped("apollo_mini", m)
    assert optimizer.state[q]["exp_avg"].numel() == 64 and kept(optimizer, kind(m, "hidden")) < 0.15
    ratio = (q.detach() - before) / q.grad
    assert ratio.std() / ratio.mean().abs() < 1e-2
    m = model()
    q = m.model.layers[0].self_attn.q_proj.weight
    before = q.detach().clone()
    stepped("apollo", m)
    ratio = (q.detach() - before) / q.grad
    assert torch.allclose(ratio.std(dim=1) / ratio.mean().abs(), torch.zeros(64), atol=1e-2)  # one for each row
    assert ratio.mean(dim=1).std() / ratio.mean().abs() > 1e-2


def test_apollo_keeps_two_moments_of_the_projection_and_nothing_else():
    m = model()
    optimizer = stepped("apollo", m, rank=4)
    for p in kind(m, "hidden"):
        assert state_bytes(optimizer.state[p]) == 4 * (2 * 4 * max(p.shape) + 1)


def test_apollo_is_the_papers_rule():
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
    optimizer = baseline("apollo").load()([{"params": [w], "rank": 2}], lr=0.1, update_proj_gap=3, eps=1e-8)
    m = v = torch.zeros(2, 6, dtype=torch.float64)
    before, last, limited = w.detach().clone(), None, []
    for t in range(1, 8):
        w.grad = torch.randn(6, 4, dtype=torch.float64) * (10 if t == 5 else 1)
        g = w.grad.T
        group = {**optimizer.param_groups[0], "t": t}
        low = optimizer._projection(g, 2, group, 0) @ g
        m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low**2
        adam = m / (v.sqrt() + 1e-8)
        change = g * (adam.norm(dim=0) / low.norm(dim=0))
        if last is not None and change.norm() > 1.01 * last:
            change = change * (1.01 * last / change.norm())
            limited.append(t)
        last = change.norm()
        before = before - 0.1 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * change.T
        optimizer.step()
        assert torch.allclose(w, before, atol=1e-5)
    assert 5 in limited and len(limited) < 6


@pytest.mark.parametrize("kind", ["channel", "tensor"])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_apollo_steps_as_pytorch_optimizers_under_a_projection_that_loses_nothing(shape, kind):
    """An orthogonal projection to the full rank: scaled before it is projected back or not, the step is one."""
    galore = pytest.importorskip("pytorch_optimizer.optimizer.utils.galore")
    torch.manual_seed(0)
    rank = min(shape)
    turned = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64))[0]
    ours, theirs = (nn.Parameter(torch.ones(shape, dtype=torch.float64)) for _ in range(2))
    optimizer = baseline("apollo").load()([{"params": [ours], "rank": rank}], lr=0.01, scale_type=kind)
    optimizer._projection = lambda *_: turned
    options = {"rank": rank, "update_proj_gap": 10**9, "scale": 1.0, "projection_type": "std"}
    peer = baseline("peer_apollo").load()([{"params": [theirs], **options}], lr=0.01, scale_type=kind)
    projector = peer.state[theirs]["projector"] = galore.GaLoreProjector(**options)
    projector.ortho_matrix = turned if shape[0] >= shape[1] else turned.T
    drift = torch.randn(shape, dtype=torch.float64)
    for _ in range(60):  # a gradient that keeps its direction, so that the growth of early steps is limited
        ours.grad = drift + 0.3 * torch.randn(shape, dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        peer.step()
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)  # ours keeps its norm in fp32


def test_muon_is_for_hidden_matrices_alone_and_orthogonalises_them():
    m = model()
    q = m.model.layers[0].self_attn.q_proj.weight
    before = q.detach().clone()
    optimizer = stepped("muon", m)
    assert all(set(optimizer.state[p]) == {"momentum_buffer"} for p in kind(m, "hidden"))
    for p in [*kind(m, "embedding"), *kind(m, "last"), *kind(m, "vector")]:
        assert {"exp_avg", "exp_avg_sq"} <= set(optimizer.state[p])
    values = torch.linalg.svdvals(q.detach() - before)
    assert values[0] / values[-1] < 4 < torch.linalg.svdvals(q.grad)[0] / torch.linalg.svdvals(q.grad)[-1]


def test_muons_vectors_do_not_decay_and_its_adam_has_its_own_rate():
    config = OptimConfig(name="muon", lr=1e-3, weight_decay=0.1, options={"adam_lr": 5e-4})
    found = {
        (type_of(p), group["lr"], group["weight_decay"])
        for group in build_optimizer(model(), config).param_groups
        for p in group["params"]
    }
    assert found == {("matrix", 1e-3, 0.1), ("matrix", 5e-4, 0.1), ("vector", 5e-4, 0.0)}


def test_normuons_rows_are_of_one_size_and_its_groups_are_those_of_muon():
    """Algorithm 1 of arXiv:2510.05491: rows over the root of their mean square, then RMS 0.2."""
    pytest.importorskip("pytorch_optimizer")
    m = model()
    q = m.model.layers[0].self_attn.q_proj.weight
    before = q.detach().clone()
    config = OptimConfig(name="normuon", lr=1e-3, weight_decay=0.1, options={"adam_lr": 5e-4})
    optimizer = build_optimizer(m, config)
    found = {(type_of(p), g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found == {("matrix", 1e-3, 0.1), ("matrix", 5e-4, 0.1), ("vector", 5e-4, 0.0)}
    gradients(m, 0)
    optimizer.step()
    update = (before * (1 - 1e-3 * 0.1) - q.detach()).double() / 1e-3
    rows = update.square().mean(dim=1).sqrt()
    assert rows.std() / rows.mean() < 1e-2 and update.square().mean().sqrt() == pytest.approx(0.2, rel=1e-2)


def type_of(p):
    return "matrix" if p.ndim == 2 else "vector"


def test_adam_mini_keeps_one_second_moment_for_a_head_or_a_matrix():
    m = model()
    optimizer = stepped("adam_mini", m)
    layer = m.model.layers[0]
    assert optimizer.state[layer.self_attn.q_proj.weight]["v_mean"].numel() == 2  # heads
    assert optimizer.state[layer.mlp.gate_proj.weight]["v_mean"].numel() == 1
    assert optimizer.state[m.lm_head.weight]["v"].shape == m.lm_head.weight.shape
    assert kept(optimizer, kind(m, "hidden")) == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize("name, least, most", [("lion", 4, 4), ("sgd", 4, 4), ("adamw", 8, 8.2), ("adafactor", 0, 0.3)])
def test_state_bytes_of_matrices(name, least, most):
    m = model()
    assert least <= kept(stepped(name, m), kind(m, "hidden")) <= most


def test_eight_bit_states_take_about_two_bytes():
    pytest.importorskip("bitsandbytes")
    m = model()
    assert kept(stepped("bnb_adamw8bit", m), kind(m, "embedding")) < 2.5


def test_lion_moves_every_entry_by_the_rate():
    m = model()
    before = [p.detach().clone() for p in m.parameters()]
    stepped("lion", m)
    for p, old in zip(m.parameters(), before, strict=True):
        assert torch.allclose((p - old).abs(), torch.full_like(p, 1e-3), rtol=1e-3, atol=1e-6)


# ---- LoRA, ReLoRA ----


def test_lora_trains_its_adapters_alone():
    m = model()
    start = {name: p.detach().clone() for name, p in m.named_parameters()}
    optimizer = stepped("lora", m, 5, rank=4)
    for name, p in m.named_parameters():
        change = p.detach() - start[name]
        assert change.abs().max() > 0
        if "proj" in name:
            state = optimizer.state[p]
            assert torch.allclose(change, state["b"] @ state["a"] * (32 / 4), atol=1e-5)
            assert state_bytes(state) == 4 * (3 * 4 * sum(p.shape) + 2)


def test_lora_is_pefts():
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    ours = nn.Sequential(nn.Linear(12, 20, bias=False), nn.Tanh(), nn.Linear(20, 6, bias=False))
    theirs = copy.deepcopy(ours)
    x, y = torch.randn(32, 12), torch.randn(32, 6)
    adapters = baseline("lora").load()(
        [{"params": [ours[0].weight], "rank": 3}, {"params": [ours[2].weight], "rank": 0}], lr=1e-2, alpha=6.0, eps=1e-3
    )
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"])
    theirs = peft.inject_adapter_in_model(config, theirs)
    layer = theirs[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(adapters.state[ours[0].weight]["a"])
    theirs[2].weight.requires_grad_(True)
    reference = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=1e-2, eps=1e-3, weight_decay=0.0
    )
    for _ in range(30):
        for net, optimizer in ((ours, adapters), (theirs, reference)):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()
    merged = layer.base_layer.weight + layer.get_delta_weight("default")
    assert torch.allclose(ours[0].weight, merged, atol=2e-5) and torch.allclose(
        ours[2].weight, theirs[2].weight, atol=2e-5
    )
    assert (layer.get_delta_weight("default")).abs().max() > 0.1


def test_relora_restarts_keep_the_weights_and_raise_the_rank():
    def trained(name, **options):
        m = model()
        q = m.model.layers[0].self_attn.q_proj.weight
        start = q.detach().clone()
        optimizer = stepped(name, m, 9, rank=4, **options)
        change = torch.linalg.svdvals((q - start).double())
        return optimizer, q, int((change > 1e-3 * change[0]).sum())

    assert trained("lora")[2] == 4
    optimizer, q, rank = trained("relora", reset_interval=4, warmup_steps=1)
    assert rank == 12  # restarts at steps 4 and 8
    assert optimizer.state[q]["a_exp_avg_sq"].ne(0).any()


def test_relora_prunes_the_moments_and_warms_up_again():
    m = model()
    optimizer = build_optimizer(
        m, OptimConfig(name="relora", lr=1e-3, options={"rank": 4, "reset_interval": 4, "warmup_steps": 2})
    )
    q = m.model.layers[0].self_attn.q_proj.weight
    for turn in range(3):
        gradients(m, turn)
        optimizer.step()
    before = q.detach().clone()
    old = optimizer.state[q]["a_exp_avg_sq"].clone()
    for p in m.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # the fourth: a restart
    found = optimizer.state[q]["a_exp_avg_sq"]
    assert (found > 0).sum() == pytest.approx(0.01 * found.numel(), abs=2) and found.max() <= old.max()
    assert torch.allclose(q, before, atol=1e-2)
    assert optimizer.state[q]["b"].ne(0).float().mean() < 0.05  # new adapters: only what the kept moments moved
    assert optimizer._rate(optimizer.param_groups[0]) == 0.5e-3
    gradients(m, 5)
    optimizer.step()
    assert optimizer._rate(optimizer.param_groups[0]) == 1e-3


def test_an_adapter_on_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match="needs a matrix, got a tensor of 1-D"):
        baseline("lora").load()([nn.Parameter(torch.zeros(3))], rank=2)


# ---- names, dotted paths, missing packages ----


def test_any_class_by_its_path_with_options():
    config = OptimConfig(name="torch.optim:NAdam", lr=0.5, options={"betas": [0.8, 0.9], "momentum_decay": 0.1})
    optimizer = build_optimizer(model(), config)
    assert type(optimizer).__name__ == "NAdam" and optimizer.param_groups[0]["momentum_decay"] == 0.1
    with pytest.raises(EvenstepError, match=r"torch.optim:NAdam has no such hyperparameter; did you mean 'betas'"):
        check_optimizer(OptimConfig(name="torch.optim:NAdam", options={"beats": 1}))
    others = [("os:system", "not a torch Optimizer"), ("torch.nn:Linear", "not a torch Optimizer")]
    for name, why in (*others, ("torch.optim:Gone", "Gone"), ("nowhere_at_all.x:Y", "pip install nowhere_at_all")):
        with pytest.raises(EvenstepError, match=why) as caught:
            check_optimizer(OptimConfig(name=name))
        assert "\n" not in str(caught.value)


class Signs(torch.optim.Optimizer):
    """Moves every entry against the sign of its gradient."""

    def __init__(self, params, lr=1e-3, weight_decay=0.0, power=1.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "power": power})


def test_an_optimizer_of_ones_own_has_a_name_and_options():
    try:
        evenstep.register_optimizer("signs", Signs)
        evenstep.register_optimizer("signs", Signs)  # as when a notebook's cell runs twice
        optimizer = build_optimizer(model(), OptimConfig(name="signs", lr=0.5, options={"power": 2.0}))
        assert type(optimizer) is Signs and {group["power"] for group in optimizer.param_groups} == {2.0}
        with pytest.raises(EvenstepError, match=r"signs has no such hyperparameter; did you mean 'power'"):
            check_optimizer(OptimConfig(name="signs", options={"powr": 2.0}))
    finally:
        BASELINES.pop("signs", None)
    with pytest.raises(EvenstepError, match="optimizer name 'adamw' is taken"):
        evenstep.register_optimizer("adamw", Signs)

    class Local(Signs):
        pass

    with pytest.raises(EvenstepError, match="is not at the top level of its module"):
        evenstep.register_optimizer("local", Local)


def test_the_command_lists_them_and_shows_one(capsys):
    assert main(["optimizers"]) == 0
    told = capsys.readouterr().out
    assert all(f"\n{name} " in told for name in BASELINES) and "adaclip" in told
    assert main(["optimizers", "scale"]) == 0
    told = capsys.readouterr().out
    assert "evenstep.optim:SCALE" in told and "norm = rms" in told
    hidden = next(line for line in told.splitlines() if line.startswith("hidden matrices"))
    assert hidden.split()[-1] == "0.00"  # bytes an entry
    for name, why in (("scael", "did you mean 'scale'"), ("os:system", "not a torch Optimizer")):
        assert main(["optimizers", name]) == 2 and why in capsys.readouterr().err


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(EvenstepError, match=r"needs the package pytorch_optimizer.*pip install 'evenstep\[peers\]'"):
        check_optimizer(OptimConfig(name="lion"))


def test_a_model_without_hidden_matrices_is_refused():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(4, 4)
            self.lm_head = nn.Linear(4, 4)

    with pytest.raises(EvenstepError, match="no hidden matrix"):
        baseline("muon").build(Bare(), lr=1e-3)


# ---- transforms in front ----


def test_transforms_are_read_in_order_with_their_arguments():
    assert parse("adaclip + adagn(gamma1=0.7, eps=1e-6)") == [("adaclip", {}), ("adagn", {"gamma1": 0.7, "eps": 1e-6})]
    assert parse(" ") == []
    assert [type(unit).__name__ for unit in build_transforms("norm_clip(max_norm=2) + zclip")] == ["NormClip", "ZClip"]
    assert build_transforms("nullify(threshold=50)")[0].spikes == "zero"
    for name in TRANSFORMS:
        assert len(build_transforms(name)) == 1


@pytest.mark.parametrize(
    "text, why",
    [
        ("adagnn", "did you mean 'adagn'"),
        ("adagn(gama1=0.5)", "did you mean 'gamma1'"),
        ("adagn(0.5)", "cannot be read"),
        ("adagn +", "cannot be read"),
        ("adagn - adaclip", "cannot be read"),
        ("adagn(gamma1=x)", "neither a number nor a text"),
        ("adagn(gamma1=7)", "gamma1=7 is not"),
        ("nullify(spikes='clip')", "no argument 'spikes'"),
        ("adagn + adagn", "more than once"),
    ],
)
def test_a_mistake_in_the_transforms_is_one_line(text, why):
    with pytest.raises(EvenstepError, match=r"optim\.before") as caught:
        add_transforms(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), text)
    assert why in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["lion", "adam_mini", "muon", "galore", "lora"])
def test_transforms_stand_in_front_of_any(name):
    m, plain = model(), model()
    config = OptimConfig(name=name, lr=1e-3, before="value_clip(limit=1e-3)")
    optimizer = build_optimizer(m, config)
    bare = build_optimizer(plain, OptimConfig(name=name, lr=1e-3))
    if name == "lora":
        for p, q in zip(m.parameters(), plain.parameters(), strict=True):
            if "a" in bare.state[q]:
                bare.state[q]["a"].copy_(optimizer.state[p]["a"])
    for turn in range(2):
        gradients(m, turn)
        optimizer.step()
        for p, q in zip(m.parameters(), plain.parameters(), strict=True):
            q.grad = p.grad.clamp(-1e-3, 1e-3)
        bare.step()
    for p, q in zip(m.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_nullify_zeroes_what_spike_clip_limits():
    now = types.SimpleNamespace(t=100, reset_interval=0, since_reset=lambda: 100)
    from evenstep.optim import stabilize

    p = nn.Parameter(torch.zeros(4))
    for spikes, expected in (("clip", 5.0), ("zero", 0.0)):
        optimizer = stabilize(
            torch.optim.SGD([p], lr=1.0), SpikeClip(threshold=25.0, clip_start=0, beta2=0.5, spikes=spikes)
        )
        with torch.no_grad():
            p.zero_()
        optimizer.statistics[p]["spike_clip.exp_avg_sq"].fill_(1.0)
        p.grad = torch.tensor([1.0, -100.0, 3.0, 0.0])
        optimizer.step()
        assert torch.allclose(p.detach(), torch.tensor([-1.0, expected, -3.0, 0.0])) and now.t


def test_a_density_of_hidden_matrices_leaves_the_rest_dense():
    """As the authors' code has it: matrices of attention and MLP alone have masks."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model().model
            self.classifier = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))

    for m in (model(), Head()):
        optimizer = build_optimizer(
            m, OptimConfig(name="spam", lr=1e-3, options={"density": 0.1, "density_of": "hidden"})
        )
        gradients(m, 0)
        before = {name: p.detach().clone() for name, p in m.named_parameters()}
        optimizer.step()
        for name, p in m.named_parameters():
            inner = "_proj" in name
            changed = (p != before[name]).float().mean().item()
            assert ("mask" in optimizer.state[p]) == inner, name
            assert changed == pytest.approx(0.1 if inner else 1.0, abs=0.01), name
    with pytest.raises(EvenstepError, match="density_of some"):
        build_optimizer(model(), OptimConfig(name="spam", lr=1e-3, options={"density_of": "some"}))


@pytest.mark.parametrize("name", ["spam", "galore", "fira", "apollo", "muon"])
def test_where_hidden_matrices_alone_are_trained_there_is_no_empty_group(name):
    """As with LoRA, whose adapters are all there is to train."""
    m = model()
    for parameter_name, p in m.named_parameters():
        p.requires_grad_("_proj" in parameter_name)
    options = {"density": 0.1, "density_of": "hidden"} if name == "spam" else {}
    optimizer = build_optimizer(m, OptimConfig(name=name, lr=1e-3, options=options))
    assert all(group["params"] for group in optimizer.param_groups)
    for p in m.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    before = [p.detach().clone() for p in m.parameters()]
    optimizer.step()
    changed = [not torch.equal(p, b) for p, b in zip(m.parameters(), before, strict=True)]
    assert changed == [p.requires_grad for p in m.parameters()]


def test_a_last_layer_that_nothing_tells_is_not_taken_for_a_hidden_one():
    unnamed = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    with pytest.raises(EvenstepError, match="no last layer in Sequential: none is named lm_head"):
        build_optimizer(unnamed, OptimConfig(name="galore", lr=1e-3))
    options = {"density": 0.5, "density_of": "hidden"}
    assert build_optimizer(unnamed, OptimConfig(name="spam", lr=1e-3, options=options))
    with pytest.raises(EvenstepError, match="no hidden matrix"):
        build_optimizer(nn.LayerNorm(4), OptimConfig(name="muon", lr=1e-3))
    assert build_optimizer(nn.LayerNorm(4), OptimConfig(name="spam", lr=1e-3, options=options))
