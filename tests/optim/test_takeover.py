"""Going on in mid-run with the state of another optimizer: moments and counts go on, the rest starts anew."""

import copy
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from evenstep import SCALE, SPAM, StableSPAM, scale_groups

VECTORS = Path(__file__).parents[1] / "data" / "vectors"


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))


def losses(net, optimizer, steps):
    found = []
    for step in steps:
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(step))
        loss = nn.functional.mse_loss(net(x), x[:, :4] * x[:, 2:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def taken_over(optimizer, state):
    """Load, and return what was said of it."""
    before = copy.deepcopy(state)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.load_state_dict(state)
    assert len(caught) == 1 and caught[0].filename == __file__
    for i, entries in before["state"].items():
        for name, value in entries.items() if isinstance(entries, dict) else ():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(state["state"][i][name])), (
                "the state was changed"
            )
    return str(caught[0].message)


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("cls", [SPAM, StableSPAM])
def test_a_run_of_adam_goes_on_smoothly(base, cls):
    net = model()
    old = base(net.parameters(), lr=3e-3, weight_decay=0.01)
    before = losses(net, old, range(200))
    reference, twin = copy.deepcopy((net, old))
    new = cls(net.parameters(), lr=1.0)
    said = taken_over(new, old.state_dict())
    assert "age, exp_avg, exp_avg_sq from the state of Adam or AdamW at step 200" in said
    assert ("n, norm, norm_rms, peak start anew" in said) == (cls is StableSPAM)
    assert ("weight decay as part of the gradient" in said) == (base is torch.optim.Adam)
    group = new.param_groups[0]
    assert (group["t"], group["lr"], group["weight_decay"]) == (200, 3e-3, 0.01)
    assert "step" not in group and "amsgrad" not in group and "foreach" not in group
    for p in net.parameters():
        assert torch.equal(new.state[p]["exp_avg"], old.state[p]["exp_avg"]) and new.state[p]["age"] == 200
    after, expected = losses(net, new, range(200, 230)), losses(reference, twin, range(200, 230))
    assert max(after) < 1.2 * max(max(before[-30:]), max(expected))
    assert np.mean(after) == pytest.approx(np.mean(expected), rel=0.1)


def test_spam_without_clipping_or_decay_is_adam_from_there():
    net = model()
    old = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.1)
    losses(net, old, range(20))
    reference, twin = copy.deepcopy((net, old))
    new = SPAM(net.parameters(), threshold=0, reset_interval=0)
    taken_over(new, old.state_dict())
    assert losses(net, new, range(20, 60)) == pytest.approx(losses(reference, twin, range(20, 60)), rel=1e-4)


def test_the_moments_of_adam_are_gathered_under_a_sparse_mask():
    net = model()
    old = torch.optim.AdamW(net.parameters())
    losses(net, old, range(5))
    new = SPAM(net.parameters(), density=0.25)
    taken_over(new, old.state_dict())
    p = net[0].weight
    assert torch.equal(new.state[p]["exp_avg"], old.state[p]["exp_avg"][new.get_mask(p)])


def test_a_last_layer_and_vectors_of_scale_take_over_adams_moments():
    net = nn.Sequential()
    net.add_module("body", nn.Linear(6, 16))
    net.add_module("head", nn.Linear(16, 4))
    groups = scale_groups(net)
    ordered = [[p for _, p in group["params"]] for group in groups]
    old = torch.optim.AdamW([{"params": params} for params in ordered], lr=3e-3)
    losses(net, old, range(20))
    new = SCALE(groups)
    taken_over(new, old.state_dict())
    assert [group["kind"] for group in new.param_groups] == [group["kind"] for group in groups]
    assert torch.equal(new.state[net.head.weight]["exp_avg"], old.state[net.head.weight]["exp_avg"])
    assert new.state[net.head.bias]["age"] == 20 and not new.state[net.body.weight]


def replayed(name):
    """The recording, its parameters where it ended, and its state in the form in which the published class saved it."""
    with np.load(VECTORS / f"{name}.npz") as recorded:
        z = {key: recorded[key] for key in recorded.files}
    meta = json.loads(bytes(z["meta"]))
    state, names = {}, list(meta["shapes"])
    for i, n in enumerate(names):
        entries = {key.split("/")[2]: z[key] for key in z if key.startswith(f"state/{n}/")}
        state[i] = {key: int(value) if key == "step" else torch.tensor(value) for key, value in entries.items()}
    group = {key: meta["hyper"][key] for key in ("lr", "betas", "eps", "weight_decay")}
    group |= {"params": list(range(len(names)))}
    group |= {"correct_bias": True} if meta["algo"] == "SPAM" else {"amsgrad": False}
    params = [nn.Parameter(torch.tensor(z[f"params/{n}"][-1])) for n in names]
    return z, meta, params, {"state": state, "param_groups": [group]}


@pytest.mark.parametrize("name", ["stablespam_default", "stablespam_spikes"])
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_the_published_stable_spam_goes_on_as_if_ours_had_run_from_the_start(name, variant):
    z, meta, params, state = replayed(name)
    new = StableSPAM(params, reset_interval=1000, variant=variant)
    assert "exp_avg, exp_avg_sq, n, norm, norm_rms, peak from the state of the published StableSPAM at step 40" in (
        taken_over(new, state)
    )
    whole = [nn.Parameter(torch.tensor(z[f"init/{n}"])) for n in meta["shapes"]]
    other = StableSPAM(whole, variant=variant, **{key: meta["hyper"][key] for key in ("lr", "eps", "weight_decay")})
    for t in range(meta["T"] + 20):
        for p, n in zip(whole, meta["shapes"], strict=True):
            p.grad = torch.tensor(z[f"grads/{n}"][t % meta["T"]])
        other.step()
        if t >= meta["T"]:
            for p, q in zip(params, whole, strict=True):
                p.grad = q.grad
            new.step()
    for p, q in zip(params, whole, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        for key in ("peak", "norm", "norm_rms", "n", "age"):
            torch.testing.assert_close(new.state[p][key], other.state[q][key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "density"), [("spam_d30_w10", 1.0), ("spam_density025", 0.25)])
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_the_published_spam_goes_on_with_its_age_since_the_last_reset(name, density, variant):
    _, _, params, state = replayed(name)
    new = SPAM(params, reset_interval=30, density=density, variant=variant)
    assert "from the state of the published SPAM at step 75" in taken_over(new, state)
    assert new.param_groups[0]["t"] == 75
    for i, p in enumerate(params):
        assert new.state[p]["age"] == (75 if variant == "official" else 16)  # resets at 30 and 60
        assert torch.equal(new.state[p]["exp_avg"], state["state"][i]["exp_avg"])
    if density < 1:
        assert torch.equal(new.get_mask(params[0]), state["state"][0]["mask"])
    for p in params:
        p.grad = torch.ones_like(p)
    new.step()


def test_a_sparse_state_goes_on_dense():
    _, _, params, state = replayed("spam_density025")
    new = SPAM(params)
    taken_over(new, state)
    saved = state["state"][0]
    assert torch.equal(new.state[params[0]]["exp_avg"][saved["mask"]], saved["exp_avg"])
    assert (new.state[params[0]]["exp_avg"][~saved["mask"]] == 0).all()


def test_the_published_scale_goes_on():
    meta, params, state = _scale()
    emb, w, head, g = params
    kinds = zip(params, ("embedding", "hidden", "last", "vector"), strict=True)
    new = SCALE([{"params": [p], "kind": kind} for p, kind in kinds])
    assert "exp_avg, exp_avg_sq from the state of the published SCALE at step 40" in taken_over(new, state)
    assert torch.equal(new.state[head]["exp_avg"], state["state"][2]["moment1"]) and new.state[g]["age"] == meta["T"]
    assert not new.state[emb] and not new.state[w]


def _scale():
    with np.load(VECTORS / "scale_default.npz") as recorded:
        z = {key: recorded[key] for key in recorded.files}
    meta = json.loads(bytes(z["meta"]))
    state, params = {}, []
    for i, n in enumerate(meta["shapes"]):
        entries = {key.split("/")[2]: torch.tensor(z[key]) for key in z if key.startswith(f"state/{n}/")}
        if entries:
            state[i] = entries
        params.append(nn.Parameter(torch.tensor(z[f"params/{n}"][-1])))
    groups = [{"params": [i], "lr": 1e-4, "momentum": 0.9, "wd": 0.0} for i in range(len(params))]
    return meta, params, {"state": state, "param_groups": groups}


@pytest.mark.parametrize(("name", "cls"), [("SPAM", SPAM), ("StableSPAM", StableSPAM)])
def test_pytorch_optimizers_states_go_on_smoothly(name, cls):
    theirs = pytest.importorskip("pytorch_optimizer")
    net = model()
    old = getattr(theirs, name)(net.parameters(), lr=3e-3, update_proj_gap=70)
    before = losses(net, old, range(100))
    new = cls(net.parameters(), reset_interval=70)
    said = taken_over(new, copy.deepcopy(old.state_dict()))
    assert f"from the state of pytorch_optimizer's {name} at step 100" in said and "start anew" not in said
    assert new.param_groups[0]["t"] == 100
    for p in net.parameters():
        assert torch.equal(new.state[p]["exp_avg"].flatten(), old.state[p]["exp_avg"].flatten())
        assert new.state[p]["age"] == 31  # the reset on step 70 counts as 1
        if cls is StableSPAM:
            assert new.state[p]["n"] == 100
            torch.testing.assert_close(new.state[p]["norm_rms"] ** 2, old.state[p]["v_norm_t"])
    after = losses(net, new, range(100, 120))
    assert max(after) < 1.2 * max(before[-30:]) and np.mean(after) < np.mean(before[-20:]) * 1.05


def test_published_names_of_settings_are_translated():
    p = nn.Parameter(torch.ones(3))
    state = {
        "state": {0: {"step": 4, "exp_avg": torch.zeros(3), "exp_avg_sq": torch.ones(3)}},
        "param_groups": [{"params": [0], "lr": 0.1, "DeltaT": 50, "initial_lr": 0.3, "correct_bias": True}],
    }
    new = SPAM([p], warmup_steps=7)
    taken_over(new, state)
    group = new.param_groups[0]
    assert group["reset_interval"] == 50 and group["warmup_steps"] == 7 and group["initial_lr"] == 0.3
    assert "DeltaT" not in group and "correct_bias" not in group


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"square_avg": torch.ones(3), "step": 1}, "belongs to no optimizer that can be taken over"),
        ({"step": 1, "exp_avg": torch.ones(4), "exp_avg_sq": torch.ones(4)}, r"'exp_avg' of parameter 0 has the shape"),
        ({"step": 1, "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(())}, r"'exp_avg_sq' of parameter 0"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(entries, message):
    p = nn.Parameter(torch.ones(3))
    new = StableSPAM([p], lr=0.5)
    p.grad = torch.ones(3)
    new.step()
    before = copy.deepcopy(new.state_dict())
    with pytest.raises(ValueError, match=message):
        new.load_state_dict({"state": {0: entries}, "param_groups": [{"params": [0], "lr": 0.1}]})
    after = new.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][0][key], value) for key, value in before["state"][0].items())


def test_settings_out_of_range_are_refused_and_change_nothing():
    p = nn.Parameter(torch.ones(3))
    new = StableSPAM([p])
    with pytest.raises(ValueError, match="lr=-1"):
        new.load_state_dict({"state": {}, "param_groups": [{"params": [0], "lr": -1.0}]})
    assert new.param_groups[0]["lr"] == 1e-3


def test_a_state_that_lacks_an_entry_starts_anew_what_belongs_to_it():
    net = model()
    old, new = StableSPAM(net.parameters()), StableSPAM(net.parameters())
    losses(net, old, range(5))
    state = copy.deepcopy(old.state_dict())
    del state["state"][0]["peak"]
    said = taken_over(new, state)
    assert "the state lacks n, norm, norm_rms, peak of 1 parameters" in said
    first, second = new.param_groups[0]["params"][:2]
    assert new.state[first]["n"] == 0 and new.state[first]["age"] == 5 and new.state[second]["n"] == 5


def test_its_own_state_loads_without_a_word():
    net = model()
    for make in (StableSPAM, SPAM, lambda ps: SPAM(ps, density=0.5), lambda ps: SPAM(ps, rounding="kahan")):
        old, new = make(net.parameters()), make(net.parameters())
        losses(net, old, range(3))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            new.load_state_dict(copy.deepcopy(old.state_dict()))
