import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_support import mini_model

from evenstep.baselines.catalog import Baseline
from evenstep.bench import registry
from evenstep.bench.measure import PreparedGradients, fill_parameters, outline, quiet
from evenstep.bench.registry import KNOWN, REFERENCE, SETS, Unavailable, chosen
from evenstep.errors import EvenstepError

COMPILED = [name for name, entry in KNOWN.items() if entry.note == "compiled"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in COMPILED else ()) for name in KNOWN]
)
def test_every_installed_optimizer_builds_and_steps(name):
    if KNOWN[name].version() is None:
        pytest.skip("not installed")
    if name == "stable_spam_int8":
        pytest.importorskip("torchao")
    model = mini_model()
    gradients = PreparedGradients(model, sets=2, seed=0)
    before = [p.detach().clone() for p in model.parameters()]
    with quiet():
        optimizer = KNOWN[name].make(model)
        for turn in range(3):
            gradients.give(turn)
            optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert p.isfinite().all() and not p.equal(old)
    assert isinstance(optimizer.state_dict()["state"], dict)


@pytest.mark.parametrize("name", ["galore", "apollo", "fira"])
def test_low_rank_peers_really_are_of_low_rank(name):
    pytest.importorskip("pytorch_optimizer")
    model = mini_model()
    PreparedGradients(model, sets=1, seed=0)
    optimizer = KNOWN[f"pytorch_optimizer:{name}"].make(model)
    optimizer.step()
    moment = optimizer.state[model.model.layers[0].self_attn.q_proj.weight]["exp_avg"]
    assert moment.numel() == 64 * 16  # of 64 x 64
    assert optimizer.state[model.lm_head.weight]["exp_avg"].shape == model.lm_head.weight.shape


def test_muon_gets_the_hidden_matrices_and_adamw_the_rest():
    model = mini_model()
    muon, adamw = KNOWN["muon"].make(model).optimizers
    hidden = {id(p) for p in muon.param_groups[0]["params"]}
    rest = {id(p) for p in adamw.param_groups[0]["params"]}
    assert hidden == {id(p) for n, p in model.named_parameters() if "proj" in n}
    assert len(hidden | rest) == len(list(model.parameters())) and not hidden & rest


def test_decay_is_off_everywhere():
    model = mini_model()
    for name, entry in KNOWN.items():
        if entry.version() is None or name == "stable_spam_int8":
            continue
        optimizer = entry.make(model)
        for part in getattr(optimizer, "optimizers", [optimizer]):
            assert all(group["weight_decay"] == 0 for group in part.param_groups), name


def test_what_is_not_installed_says_how_to_install_it(monkeypatch):
    missing = registry.Entry(Baseline("nowhere:Class", "no-such-package"))
    with pytest.raises(Unavailable, match="pip install no-such-package"):
        missing.make(mini_model())
    moved = registry.Entry(Baseline("torch.optim:Gone", "torch"))
    with pytest.raises(Unavailable, match="Gone"):
        moved.make(mini_model())


def test_chosen_names_and_sets():
    assert chosen(["scale"]) == ["scale", REFERENCE]
    assert chosen(["all"]) == list(KNOWN)
    assert set(chosen(["ours"])) == {n for n, e in KNOWN.items() if e.package == "evenstep"} | {REFERENCE}
    assert set(chosen(["optimi", "spam"])) == {"optimi:adamw", "optimi:stableadamw", "spam", REFERENCE}
    assert set(chosen(["ours", "peers"])) == set(KNOWN)
    for name, meant in (("stablespam", "stable_spam"), ("torchoa", "torchao"), ("adamw_fuse", "adamw_fused")):
        with pytest.raises(EvenstepError, match=f"'{name}'.*did you mean '{meant}'"):
            chosen(["ours", name])
    assert not set(SETS) & set(KNOWN)


def test_the_registry_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import evenstep.bench.registry as r; print(len(r.KNOWN))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == str(len(KNOWN)), done.stderr


def test_shapes_are_those_of_the_model():
    model = outline("60m")
    assert sum(p.numel() for p in model.parameters()) == 58_073_600 and model.lm_head.weight.is_meta
    assert sum(p.ndim == 1 for p in model.parameters()) == 17
    assert len(outline("1b:6").model.layers) == 6
    assert len(list(outline("many-small").parameters())) == 2000
    assert [p.numel() for p in outline("one-huge").parameters()] == [2**26]


@pytest.mark.parametrize("name", ["60n", "60m:0", "60m:9", "60m:x", "many-small:3", ""])
def test_unknown_shapes(name):
    with pytest.raises(EvenstepError, match="--shapes"):
        outline(name)


def test_gradients_have_spikes_in_some_tensors_and_are_drawn_again_as_they_were():
    model = outline("many-small").to_empty(device="cpu")
    fill_parameters(model, 0)
    gradients = PreparedGradients(model, sets=2, seed=1)
    first, second = gradients.sets
    spiky = [float(g.abs().max() / g.norm()) > 0.9 for g in first]
    assert 0.2 < sum(spiky) / len(spiky) < 0.3
    assert not any(a.equal(b) for a, b in zip(first, second, strict=True))
    before, sums = [g.clone() for g in first], gradients.sums()
    first[5].view(-1)[3] += first[5].abs().max()
    assert gradients.sums() != sums
    gradients.fill(2)  # set 0 again
    assert all(a.equal(b) for a, b in zip(first, before, strict=True)) and gradients.sums() == sums
    gradients.give(3)
    assert all(p.grad is g for p, g in zip(model.parameters(), second, strict=True))
    assert torch.stack([g.norm() for g in first]).isfinite().all()
