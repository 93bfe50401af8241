"""examples/torchtitan_guard.py, with a stand-in for what it uses of torchtitan."""

import importlib.util
import logging
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from integration_support import equal, weights
from torch import nn

EXAMPLE = Path(__file__).parents[2] / "examples" / "torchtitan_guard.py"


class Loader:
    """Batches of numbers. Like torchdata's StatefulDataLoader it says where it is, and a loaded state applies to the
    next iterator, not to one that runs."""

    def __init__(self, left_out=()):
        self.left_out, self.at, self.start = left_out, 0, 0

    def __iter__(self):
        self.at, self.start = self.start, 0
        while self.at < 400:
            self.at += 1
            if self.at - 1 not in self.left_out:
                x = torch.randn(8, 4, generator=torch.Generator().manual_seed(self.at - 1))
                yield {"input": x}, x.sum(1, keepdim=True).sin()

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.start = state["at"]


class Exhausted(Exception):
    pass


class Container:
    """One optimizer or schedule for each part of the model."""

    def __init__(self, made):
        self.optimizers = self.schedulers = made

    def step(self):
        for one in self.optimizers:
            one.step()

    def zero_grad(self):
        for one in self.optimizers:
            one.zero_grad()

    def state_dict(self):
        return self.schedulers[0].state_dict()

    def load_state_dict(self, state):
        for one in self.schedulers:
            one.load_state_dict(state)


class Trainer:
    """The order of events of torchtitan's trainer."""

    def __init__(self, config):
        torch.manual_seed(0)
        self.config, self.step, self.ntokens_seen = config, 0, 0
        self.gradient_accumulation_steps = config.accumulation
        self.parallel_dims = types.SimpleNamespace(get_optional_mesh=lambda name: None, ep_enabled=False)
        self.model_parts = [
            nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.3)),
            nn.Sequential(nn.Tanh(), nn.Linear(16, 1)),
        ]
        optimizers = [torch.optim.AdamW(part.parameters(), lr=1e-2) for part in self.model_parts]
        schedules = [torch.optim.lr_scheduler.LambdaLR(one, lambda t: 1 / (1 + t / 20)) for one in optimizers]
        self.optimizers, self.lr_schedulers = Container(optimizers), Container(schedules)
        self.dataloader = Loader(config.left_out)
        self.seen = []

    def batch_generator(self, data_iterable):
        data_iterator = iter(data_iterable)
        while True:
            try:
                inputs, labels = next(data_iterator)
            except StopIteration as problem:
                raise Exhausted from problem
            self.ntokens_seen += labels.numel()
            yield inputs, labels

    def forward_backward_step(self, *, input_dict, labels, global_valid_tokens):
        prediction = self.model_parts[1](self.model_parts[0](input_dict["input"]))
        loss = (prediction - labels).square().sum() / global_valid_tokens
        loss.backward()
        return loss

    def train_step(self, data_iterator):
        self.optimizers.zero_grad()
        batches = [next(data_iterator) for _ in range(self.gradient_accumulation_steps)]
        valid = sum(labels.numel() for _, labels in batches)
        for inputs, labels in batches:
            self.forward_backward_step(input_dict=inputs, labels=labels, global_valid_tokens=valid)
        if (self.dataloader.at - 1) // self.gradient_accumulation_steps in self.config.bad:
            self.model_parts[0][0].weight.grad *= self.config.factor
        params = [p for part in self.model_parts for p in part.parameters()]
        clip(params, self.config.training.max_norm)
        self.optimizers.step()
        self.lr_schedulers.step()
        self.seen.append(self.step)

    def train(self):
        data_iterator = self.batch_generator(self.dataloader)
        while self.should_continue_training():
            self.step += 1
            try:
                self.train_step(data_iterator)
            except Exhausted:
                break

    def should_continue_training(self):
        return self.step < self.config.training.steps

    def state_dict(self):
        return {"step": self.step, "ntokens_seen": self.ntokens_seen}

    def load_state_dict(self, state):
        self.step, self.ntokens_seen = state["step"], state["ntokens_seen"]


def clip(params, max_norm, foreach=None, pp_mesh=None, ep_enabled=False):
    return torch.nn.utils.clip_grad_norm_(params, max_norm, foreach=foreach)


@pytest.fixture
def guarded(monkeypatch):
    """The example's trainer."""
    members = {
        "torchtitan": {},
        "torchtitan.distributed": {"utils": types.SimpleNamespace(clip_grad_norm_=clip)},
        "torchtitan.tools": {},
        "torchtitan.tools.logging": {"logger": logging.getLogger("torchtitan")},
        "torchtitan.trainer": {"Trainer": Trainer},
    }
    for name, content in members.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("torchtitan_guard", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example.GuardedTrainer


def trained(cls, *, bad=(), factor=1000.0, left_out=(), steps=40, accumulation=2, **options):
    training = types.SimpleNamespace(max_norm=0.1, steps=steps)
    config = types.SimpleNamespace(
        training=training, accumulation=accumulation, bad=bad, factor=factor,
        left_out=[row * accumulation + i for row in left_out for i in range(accumulation)],
    )  # fmt: skip
    if options:
        cls = type("Configured", (cls,), {"guard_options": options})
    trainer = cls(config)
    trainer.train()
    assert training.max_norm == 0.1
    return trainer


def bits(trainer):
    return weights(nn.ModuleList(trainer.model_parts))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_calm_training_is_left_alone_bit_for_bit(guarded, accumulation):
    plain, watched = (trained(cls, accumulation=accumulation) for cls in (Trainer, guarded))
    assert equal(bits(plain), bits(watched)) and not watched.guard.events


@pytest.mark.parametrize("factor", [1000.0, math.inf])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_rewound_training_equals_one_that_never_saw_the_bad_batches(guarded, factor, accumulation, caplog):
    options = {"ladder": ("skip", "rewind"), "skips": 1, "snapshot_every": 10}
    trainer = trained(guarded, bad=[25, 26], factor=factor, accumulation=accumulation, **options)
    clean = trained(guarded, left_out=[25, 26], accumulation=accumulation, **options)
    assert [(event["rows"], event["action"]) for event in trainer.guard.events] == [(25, "skip"), (26, "rewind")]
    assert equal(bits(trainer), bits(clean)) and trainer.step == clean.step == 40
    assert trainer.seen == [*range(1, 27), 20, *range(21, 41)]
    assert [one.last_epoch for one in trainer.lr_schedulers.schedulers] == [40, 40]
    assert sum("SpikeGuard" in record.message for record in caplog.records) == 2


def test_a_stopped_training_ends(guarded):
    trainer = trained(guarded, bad=range(25, 60), ladder=("lower_lr", "stop"), check_every=1)
    assert trainer.guard.stopped and trainer.step == 27
