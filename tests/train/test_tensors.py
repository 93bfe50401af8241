"""What an optimizer keeps goes into a checkpoint and comes back to the bit, whoever wrote the optimizer."""

import warnings

import pytest
import torch
from torch import nn
from train_support import quick, write_corpus

from evenstep.baselines.catalog import BASELINES
from evenstep.baselines.transforms import TRANSFORMS
from evenstep.errors import EvenstepError
from evenstep.models import Llama, llama_config
from evenstep.train.checkpoint import read_tensors, write_tensors
from evenstep.train.config import OptimConfig
from evenstep.train.distributed import World
from evenstep.train.optimizers import build_optimizer
from evenstep.train.saving import Saver, fill, load_optimizer, model_tensors, optimizer_tensors
from evenstep.train.trainer import Run

COMPILED = [name for name, entry in BASELINES.items() if entry.note == "compiled"]
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in COMPILED else ()) for name in BASELINES]


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    return Llama(llama_config("tiny", 256, hidden_size=64, intermediate_size=96, num_layers=1, num_heads=2)).to(dtype)


def train(model, optimizer, turns):
    for turn in turns:
        torch.manual_seed(turn)  # for those that draw
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()


def save(directory, model, optimizer):
    """The directory of a checkpoint with the state of both, written as a run writes it."""
    tensors, rest = optimizer_tensors(model, optimizer)
    saver = Saver(directory, World(torch.device("cpu")))
    try:
        place = saver.save(
            1, model_tensors(model) | tensors, lambda to: write_tensors(to / "trainer.pt", rest), None, wait=True
        )
    finally:
        saver.close()
    return place


def resume(checkpoint, model, optimizer):
    fill(checkpoint, model_tensors(model))
    load_optimizer(model, optimizer, checkpoint, read_tensors(checkpoint / "trainer.pt"))


def assert_goes_on_exactly(make, build, directory, steps=3):
    """``steps`` steps, a checkpoint, a fresh model and optimizer from it: then both take the same way, to the bit."""
    model = make()
    optimizer = build(model)
    train(model, optimizer, range(steps))
    checkpoint = save(directory, model, optimizer)
    other = make()
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    again = build(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resume(checkpoint, other, again)
    for turn in range(steps, 2 * steps):
        train(model, optimizer, [turn])
        train(other, again, [turn])
        for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            assert p.isfinite().all() and torch.equal(p, q), f"{name} is another at step {turn + 1}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_resumes_bit_for_bit(name, dtype, tmp_path):
    if BASELINES[name].version() is None:
        pytest.skip(f"{BASELINES[name].package} is not installed")
    config = OptimConfig(name=name, lr=1e-3, weight_decay=0.1)
    assert_goes_on_exactly(lambda: llama(dtype), lambda model: build_optimizer(model, config), tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_transforms_in_front_change_nothing_about_that(name, tmp_path):
    if BASELINES[name].version() is None:
        pytest.skip(f"{BASELINES[name].package} is not installed")
    config = OptimConfig(name=name, lr=1e-3, before="adagn + spike_clip")
    assert_goes_on_exactly(llama, lambda model: build_optimizer(model, config), tmp_path)


def test_a_tied_weight_goes_on_exactly(tmp_path):
    def tied():
        model = llama()
        model.lm_head.weight = model.model.embed_tokens.weight
        return model

    assert_goes_on_exactly(tied, lambda model: build_optimizer(model, OptimConfig(name="adam", lr=1e-3)), tmp_path)


@pytest.mark.parametrize("before", sorted(TRANSFORMS))
def test_every_transform_goes_on_exactly(before, tmp_path):
    """Some keep one tensor for all parameters."""
    config = OptimConfig(name="adam", lr=1e-3, before=before)
    assert_goes_on_exactly(llama, lambda model: build_optimizer(model, config), tmp_path)


@pytest.mark.parametrize("name", ["lora", "relora", "apollo", "apollo_mini"])
def test_counts_and_norms_stay_exact_under_bf16_weights(name, tmp_path):
    """bf16 has no 1001, and no norm to more than two digits; torch rounds loaded state to the weights' format."""
    model = llama(torch.bfloat16)
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=1e-3))
    train(model, optimizer, [0])
    for state in optimizer.state.values():
        for entry in state.keys() & {"step", "a_step", "b_step", "norm"}:
            assert state[entry].dtype == torch.float32
            state[entry].fill_(1001)
    again = build_optimizer(llama(torch.bfloat16), OptimConfig(name=name, lr=1e-3))
    again.load_state_dict(optimizer.state_dict())
    found = [value for state in again.state.values() for value in state.values() if value.ndim == 0]
    assert len(found) >= 7 and all(value.dtype == torch.float32 and value == 1001 for value in found)


# ---- state of any shape ----


class Odd(torch.optim.SGD):
    """Keeps whatever ``kept`` gives for a parameter, and what ``beside`` gives in no parameter's name."""

    kept = staticmethod(lambda p: {})
    beside = {}  # noqa: RUF012

    def step(self, closure=None):
        super().step(closure)
        for p in (p for group in self.param_groups for p in group["params"]):
            if p not in self.state or not self.state[p]:
                self.state[p] = type(self).kept(p)
        for key, value in type(self).beside.items():
            self.state.setdefault(key, value)


def odd(kept=lambda p: {}, **beside):
    made = type("Odd", (Odd,), {"kept": staticmethod(kept), "beside": beside})
    return lambda model: made(model.parameters(), lr=0.1)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def resumed(build, directory):
    """What a fresh optimizer holds after the checkpoint of one that did a step."""
    model = net()
    optimizer = build(model)
    train(model, optimizer, [0])
    checkpoint, other = save(directory, model, optimizer), net()
    again = build(other)
    resume(checkpoint, other, again)
    return model, optimizer, other, again


@pytest.mark.parametrize("names", [("codes", "scale"), ("scale", "x.scale", "x.codes"), ("qmap", "codes")])
def test_entries_may_have_the_names_of_our_own_parts(names, tmp_path):
    def kept(p):
        return {name: torch.full((5,), float(i)) for i, name in enumerate(names)} | {"other": torch.ones_like(p)}

    _, _, other, again = resumed(odd(kept), tmp_path)
    for p in other.parameters():
        assert set(again.state[p]) == {*names, "other"}
        assert [again.state[p][name].tolist() for name in names] == [[float(i)] * 5 for i in range(len(names))]


def test_state_of_no_parameter_is_kept(tmp_path):
    beside = {"count": 3, "table": torch.arange(4.0), "nested": {"a": [1, torch.ones(2)]}}
    _, _, _, again = resumed(odd(**beside), tmp_path)
    assert again.state["count"] == 3 and again.state["table"].tolist() == [0, 1, 2, 3]
    assert again.state["nested"]["a"][1].tolist() == [1, 1]


def test_keys_beside_state_and_groups_reach_the_optimizer(tmp_path):
    class Counting(torch.optim.SGD):
        steps = 0

        def step(self, closure=None):
            self.steps += 1
            return super().step(closure)

        def state_dict(self):
            return {**super().state_dict(), "steps": self.steps}

        def load_state_dict(self, saved):
            super().load_state_dict(saved)
            self.steps = saved["steps"]

    assert resumed(lambda model: Counting(model.parameters(), lr=0.1), tmp_path)[3].steps == 1


def test_a_tensor_made_of_others_that_is_not_known_is_refused_in_one_line(tmp_path):
    from torch.testing._internal.two_tensor import TwoTensor

    def kept(p):
        return {"twice": TwoTensor(torch.zeros_like(p), torch.zeros_like(p))}

    with pytest.raises(EvenstepError, match=r"cannot store the tensor subclass .*TwoTensor.*plain tensors") as no:
        resumed(odd(kept), tmp_path)
    assert "\n" not in str(no.value)


def test_our_own_eight_bit_states_resume_from_a_checkpoint_of_before(tmp_path):
    """One that does not say what is packed: the fresh state does."""
    pytest.importorskip("torchao")
    config = OptimConfig(name="stable_spam", lr=1e-3, options={"state": "int8"})
    model = llama()
    optimizer = build_optimizer(model, config)
    train(model, optimizer, range(3))
    checkpoint = save(tmp_path, model, optimizer)
    rest = read_tensors(checkpoint / "trainer.pt")
    assert any(rest["packed"].values())
    for older in ({"groups", "values"}, set(rest)):
        other = llama()
        again = build_optimizer(other, config)
        fill(checkpoint, model_tensors(other))
        load_optimizer(other, again, checkpoint, {key: rest[key] for key in older})
        source = build_optimizer(there := llama(), config)
        fill(checkpoint, model_tensors(there))
        source.load_state_dict(optimizer.state_dict())
        train(other, again, [3])
        train(there, source, [3])
        assert all(torch.equal(p, q) for p, q in zip(other.parameters(), there.parameters(), strict=True))


def test_eight_bit_states_that_a_checkpoint_lacks_or_names_falsely_are_refused(tmp_path):
    pytest.importorskip("torchao")
    config = OptimConfig(name="stable_spam", lr=1e-3, options={"state": "int8"})
    model = llama()
    optimizer = build_optimizer(model, config)
    train(model, optimizer, [0])
    checkpoint = save(tmp_path, model, optimizer)
    rest = read_tensors(checkpoint / "trainer.pt")
    name = next(name for name, entries in rest["packed"].items() if entries)
    for change, why in (
        ({"block": 100}, "another number of processes"),
        ({"class": "os.system"}, "pip install torchao"),
    ):
        facts = rest["packed"][name]["exp_avg"] | change
        packed = rest["packed"] | {name: rest["packed"][name] | {"exp_avg": facts}}
        with pytest.raises(EvenstepError, match=why):
            load_optimizer(model, optimizer, checkpoint, rest | {"packed": packed})


class Keeper(torch.optim.SGD):
    """Keeps an object of its own."""

    def step(self, closure=None):
        super().step(closure)
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p]["mine"] = Thing()


class Thing:
    pass


def test_state_that_could_not_be_read_again_ends_the_first_save_in_one_line(tmp_path):
    config = quick(write_corpus(tmp_path / "c.jsonl"), tmp_path / "run", optim__name="tests.train.test_tensors:Keeper")
    run = Run(config, say=lambda _: None)
    run.step()
    with pytest.raises(
        EvenstepError, match=r"tests.train.test_tensors:Keeper: its state contains \S*Thing.* so the run could not"
    ) as no:
        run.save()
    assert "\n" not in str(no.value) and not list((tmp_path / "run/checkpoints").iterdir())


def test_only_the_first_save_is_read_back(tmp_path, monkeypatch):
    from evenstep.train import trainer

    reads = []
    monkeypatch.setattr(trainer, "read_trainer", lambda directory: reads.append(directory))
    run = Run(quick(write_corpus(tmp_path / "c.jsonl"), tmp_path / "run"), say=lambda _: None)
    for _ in range(3):
        run.step()
        run.save()
    assert len(reads) == 1
