"""SpikeGuard: bad steps are found and acted on, calm ones are left alone, and a rewind leaves nothing behind."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from process_support import run_processes
from torch import nn

from evenstep import SCALE, SPAM, AdaClip, AdaGN, SpikeGuard, SpikeMonitor, StableSPAM, scale_groups, stabilize
from evenstep.baselines.chained import ChainedOptimizer
from evenstep.telemetry.diagnosis import diagnose
from evenstep.telemetry.foreign import load_log
from evenstep.telemetry.schema import read_records

OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
    "adamw_fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
    "sgd_momentum": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
    "stable_spam": lambda model: StableSPAM(model.parameters(), lr=1e-3, reset_interval=20),
    "stable_spam_bf16": lambda model: StableSPAM(model.parameters(), lr=1e-3, state="bf16"),
    "stable_spam_int8": lambda model: StableSPAM(model.parameters(), lr=1e-3, state="int8"),
    "spam": lambda model: SPAM(model.parameters(), lr=1e-3, reset_interval=20),
    "spam_density": lambda model: SPAM(model.parameters(), lr=1e-3, density=0.25, reset_interval=20),
    "scale": lambda model: SCALE(scale_groups(model, last="4.weight"), lr=1e-3),
    "stabilized": lambda model: stabilize(torch.optim.AdamW(model.parameters(), lr=1e-3), AdaClip(), AdaGN()),
}


class Data:
    """Rows of numbers that follow one another; a loader that can be repositioned."""

    def __init__(self, bad=(), harm="scale"):
        self.at, self.bad, self.harm = 0, set(bad), harm

    def next(self):
        row, self.at = self.at, self.at + 1
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(row))
        y = x.sum(1, keepdim=True).sin()
        if row in self.bad:
            y = {"scale": y * 1e3, "nan": y * math.nan, "inf": y * math.inf}[self.harm]
        return row, x, y

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class Training:
    """A small training with dropout and a scheduler, so that random states and the rate matter."""

    def __init__(self, name="adamw", bad=(), harm="scale", **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.2), nn.Linear(32, 1))
        self.optimizer = OPTIMIZERS[name](self.model)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda t: 1 / (1 + t / 50))
        self.data = Data(bad, harm)
        options = {"loss_rise": 0.5, "snapshot_every": 10} | options
        self.guard = SpikeGuard(self.model, self.optimizer, data=[self.data], schedulers=[self.schedule], **options)
        self.taken = []

    def run(self, steps, leave_out=()):
        for _ in range(steps):
            row, x, y = self.data.next()
            if row in leave_out or not self.guard.wanted(row):
                continue
            self.optimizer.zero_grad()
            loss = (self.model(x) - y).square().mean()
            loss.backward()
            if self.guard.step(loss, rows=row):
                self.schedule.step()
                self.taken.append(row)
        return self

    def bits(self):
        return [x.clone() for x in (*self.model.parameters(), *self.model.buffers())]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def actions(training):
    return [(event["step"], event["action"]) for event in training.guard.events]


@pytest.mark.parametrize("seed", range(3))
def test_a_calm_training_is_left_alone(seed):
    training = Training()
    torch.manual_seed(seed)
    training.run(400)
    assert not training.guard.events and training.taken == [*range(400)]


CALM = np.load(Path(__file__).parents[1] / "data" / "calm_runs.npz")
"""The numbers that the guard judged in twenty trainings of 400 steps: ``python -m lab.calm --write FILE``."""


def judged(numbers):
    """The steps at which a guard acts on recorded ``numbers`` [steps, 2 + k]: the loss, the norm of all gradients, and
    the norm of each."""
    params = [nn.Parameter(torch.zeros(1)) for _ in range(numbers.shape[1] - 2)]
    guard = SpikeGuard(nn.ParameterList(params), torch.optim.SGD(params, lr=0.0), ladder=("skip",))
    steps = iter(torch.from_numpy(numbers))
    guard._numbers = lambda loss: next(steps)
    for _ in numbers:
        guard.step(0.0)
    return [event["step"] for event in guard.events]


@pytest.mark.parametrize("name", CALM.files)
def test_recorded_calm_runs_raise_no_alarm_and_spikes_in_them_do(name):
    numbers = CALM[name].astype(np.float32)
    assert not judged(numbers)
    numbers[150, 1] *= 30  # the norm of all gradients
    numbers[300, 5] *= 300  # that of one
    numbers[390, 0] += 3  # the loss
    assert {150, 390} <= set(judged(numbers)) <= {150, 300, 390}


def test_many_spikes_do_not_make_the_next_one_usual():
    """A spike enters the window at the limit that it exceeded. At its own size, eleven in a window of twenty would be
    its median, and nothing would be judged large after them."""
    bad = range(40, 53)
    training = Training(bad=bad, ladder=("skip",), window=20, budget=50).run(60)
    assert actions(training) == [(step, "skip") for step in bad]


@pytest.mark.parametrize("harm", ["scale", "nan", "inf"])
def test_a_bad_step_is_skipped_and_named(harm):
    training = Training(bad=[40], harm=harm).run(40)
    before = copy.deepcopy(training.optimizer.state_dict()["state"])
    weights = [p.detach().clone() for p in training.model.parameters()]
    training.run(1)
    assert actions(training) == [(40, "skip")] and training.guard.events[0]["rows"] == 40
    assert same(weights, [p.detach() for p in training.model.parameters()])
    after = training.optimizer.state_dict()["state"]
    assert all(torch.equal(before[i][key], after[i][key]) for i in before for key in before[i])
    reason = training.guard.events[0]["reason"]
    assert ("usually" in reason) if harm == "scale" else ("not finite" in reason)
    training.run(30)
    assert len(training.guard.events) == 1 and training.taken == [*range(40), *range(41, 71)]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_infinity_is_not_a_large_number(what):
    """Without a history only what is not finite is bad."""
    model = nn.Linear(4, 1)
    guard = SpikeGuard(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for p in model.parameters():
        p.grad = torch.full_like(p, math.inf if what == "gradient" else 1.0)
    assert not guard.step(math.inf if what == "loss" else 1.0)
    assert "not finite" in guard.events[0]["reason"]


class Counting(torch.optim.Optimizer):
    """Keeps a number that is no tensor, and moves the parameters by it."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1e-4})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["steps"] = self.state[p].get("steps", 0) + 1
            p.sub_(p.grad.sign(), alpha=1e-4 / self.state[p]["steps"])


def test_a_rewind_restores_every_optimizer_of_a_chain(monkeypatch):
    def chained(model):
        first, *others = model.parameters()
        return ChainedOptimizer(Counting([first]), torch.optim.AdamW(others, lr=1e-3))

    monkeypatch.setitem(OPTIMIZERS, "chained", chained)
    test_a_rewind_leaves_nothing_of_the_bad_rows("chained", "nan", 1)


def test_a_spike_of_one_gradient_is_named_after_its_parameter():
    training = Training(loss_rise=1e9).run(40)
    _, x, y = training.data.next()
    training.optimizer.zero_grad()
    loss = (training.model(x) - y).square().mean()
    loss.backward()
    training.model[4].bias.grad.mul_(1e4)
    assert not training.guard.step(loss)
    assert "norm" in training.guard.events[0]["reason"]
    quiet = Training(loss_rise=1e9, norm_ratio=1e6).run(40)
    quiet.optimizer.zero_grad()
    (quiet.model(x) - y).square().mean().backward()
    quiet.model[4].bias.grad.mul_(math.nan)
    assert not quiet.guard.step(loss)
    assert "4.bias" in quiet.guard.events[0]["reason"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("harm", "check_every"), [("scale", 1), ("nan", 1), ("nan", 7)])
def test_a_rewind_leaves_nothing_of_the_bad_rows(name, harm, check_every):
    if name.endswith("int8"):
        pytest.importorskip("torchao")
    bad = [33, 34, 47]
    guarded = Training(name, bad, harm, ladder=("rewind",), check_every=check_every).run(100)
    clean = Training(name, ladder=("rewind",)).run(guarded.data.at, leave_out=bad)
    assert {event["rows"] for event in guarded.guard.events} == set(bad) == guarded.guard.excluded
    assert guarded.data.at == clean.data.at and same(guarded.bits(), clean.bits())
    for one, other in zip(guarded.optimizer.param_groups, clean.optimizer.param_groups, strict=True):
        assert {k: v for k, v in one.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}
    assert guarded.guard.num_steps == clean.guard.num_steps


def test_steps_are_judged_once_in_some_steps_and_a_rewind_undoes_those_that_were_taken(monkeypatch):
    training = Training(bad=[33], harm="nan", ladder=("rewind", "stop"), check_every=8, snapshot_every=16)
    judged = []
    reason = training.guard._reason
    monkeypatch.setattr(
        training.guard, "_reason", lambda numbers: judged.append(len(training.taken)) or reason(numbers)
    )
    training.run(36)
    assert training.taken[-1] == 35 and not training.guard.events
    assert len(set(judged)) == 5  # the first step, two rounds of eight, two snapshots
    training.run(100)
    assert actions(training) == [(33, "rewind")] and training.guard.events[0]["to"] == 32
    assert all(torch.isfinite(x).all() for x in training.bits())


def test_the_ladder_is_climbed_and_starts_again_after_calm_steps():
    bad = [40, 42, 44, 46, 48, 50]
    training = Training(bad=bad, harm="nan", skips=2, patience=30).run(50)
    assert [action for _, action in actions(training)] == ["skip", "skip", "lower_lr", "rewind"]
    training.run(60)  # rows 40 to 46 are left out now
    assert [action for _, action in actions(training)][4:] == ["stop"]
    assert training.guard.stopped and not training.guard.step(1.0)

    calm = Training(bad=[40, 75, 110, 145], harm="nan", skips=1, patience=30).run(160)
    assert [action for _, action in actions(calm)] == ["skip"] * 4 and not calm.guard.stopped


def test_rates_are_lowered_for_some_steps_and_the_scheduler_sees_its_own():
    training = Training(bad=[30], ladder=("lower_lr",), lr_factor=0.5, lr_steps=4, check_every=1)
    seen = []
    training.optimizer.register_step_pre_hook(lambda *_: seen.append(training.optimizer.param_groups[0]["lr"]))
    training.run(40)
    clean = Training(ladder=("lower_lr",))
    expected = []
    clean.optimizer.register_step_pre_hook(lambda *_: expected.append(clean.optimizer.param_groups[0]["lr"]))
    clean.run(39)
    assert seen == expected[:30] + [rate * 0.5 for rate in expected[30:34]] + expected[34:]


def test_a_spent_budget_stops_or_lets_finite_spikes_pass():
    stopping = Training(bad=range(40, 60, 2), harm="nan", ladder=("skip", "stop"), skips=50, budget=3).run(60)
    assert [action for _, action in actions(stopping)] == ["skip", "skip", "skip", "stop"] and stopping.guard.stopped
    mixed = Training(bad=range(40, 60, 2), ladder=("skip",), budget=3).run(60)
    assert [action for _, action in actions(mixed)] == ["skip"] * 3 and 46 in mixed.taken
    lost = Training(bad=range(40, 60, 2), harm="nan", ladder=("skip",), budget=3).run(60)
    assert len(lost.guard.events) == 10 and all(torch.isfinite(x).all() for x in lost.model.parameters())


def test_a_lasting_change_of_level_is_accepted_in_time():
    training = Training(ladder=("skip",), budget=1000, window=40)
    training.run(60)
    training.data.bad = set(range(60, 300))
    training.run(240)
    assert training.taken[-20:] == [*range(280, 300)]


def test_gradients_below_the_floor_are_no_spikes():
    def run(**options):
        model = nn.Linear(4, 1)
        guard = SpikeGuard(model, torch.optim.SGD(model.parameters(), lr=0.0), ladder=("skip",), **options)
        for step in range(60):
            for p in model.parameters():
                p.grad = torch.full_like(p, 1e-13 if step != 50 else 1e-10)
            guard.step(0.0)
        return [event["step"] for event in guard.events]

    assert run() == [] and run(floor=1e-12) == [50]


def test_a_resumed_guard_judges_as_the_one_that_went_on():
    options = {"bad": [30, 55, 57, 59, 61], "skips": 2, "ladder": ("skip", "lower_lr", "stop")}
    whole = Training(**options).run(80)
    first = Training(**options).run(56)
    random = torch.get_rng_state()
    second = Training(**options)
    for part in ("model", "optimizer", "schedule", "data", "guard"):
        getattr(second, part).load_state_dict(copy.deepcopy(getattr(first, part).state_dict()))
    torch.set_rng_state(random)
    second.run(24)
    assert [action for _, action in actions(whole)] == ["skip", "skip", "lower_lr", "stop"]
    assert actions(second) == actions(whole) and list(second.guard.events) == list(whole.guard.events)


def test_nothing_is_asked_of_parameters_without_gradients_and_frozen_ones():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 1))
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    guard = SpikeGuard(model, optimizer)
    for _ in range(30):
        loss = model[1](model[0](torch.ones(2, 4))).square().mean()
        loss.backward()
        assert guard.step(loss)
        optimizer.zero_grad()


def test_another_way_to_take_the_step_is_used():
    training, calls = Training(), []
    loss = training.model(torch.ones(4, 8)).square().mean()
    loss.backward()
    assert training.guard.step(loss, take=lambda: calls.append(1)) and calls == [1]


def test_a_monitor_dates_a_step_that_was_judged_late(tmp_path):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    with SpikeMonitor(model, optimizer, sinks=tmp_path / "metrics.jsonl", say=None) as monitor:
        guard = SpikeGuard(model, optimizer, ladder="stop", check_every=10, on_event=monitor.record)
        for step in range(40):
            loss = (model(torch.ones(2, 4)) * (1e6 if step == 33 else 1)).square().mean()
            loss.backward()
            guard.step(loss)
            optimizer.zero_grad()
    [decision] = [record for record in read_records(tmp_path / "metrics.jsonl") if record.get("event") == "guard"]
    assert guard.events[0]["step"] == 33 and guard.events[0]["late"] == 6
    assert (decision["step"], decision["bad_step"], decision["action"]) == (39, 34, "stop")


@pytest.mark.parametrize("rows", [30, (240, 248), "a.txt"])
def test_a_monitor_writes_the_decisions_of_a_guard_with_the_steps_that_it_saw(rows, tmp_path):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    path, said = tmp_path / "metrics.jsonl", []
    with SpikeMonitor(model, optimizer, sinks=path, say=said.append) as monitor:
        guard = SpikeGuard(model, optimizer, ladder="skip", on_event=monitor.record)
        for step in range(40):
            loss = (model(torch.ones(2, 4)) * (math.nan if step in (20, 30) else 1)).square().mean()
            loss.backward()
            monitor.observe(loss)
            assert guard.step(loss, rows=rows) == (step not in (20, 30))
            optimizer.zero_grad()
    records = read_records(path)
    decisions = [record for record in records if record.get("event") == "guard"]
    # The monitor counts from 1, and steps that were taken only.
    assert [(one["step"], one["bad_step"], one["action"]) for one in decisions] == [(20, 21, "skip"), (29, 30, "skip")]
    decision = decisions[0]
    assert decision["reason"] == "the loss is not finite" and decision["reason"] in "".join(said)
    assert decision.get("rows") == {30: [30, 31], (240, 248): [240, 248], "a.txt": None}[rows]
    assert [record["step"] for record in records] == sorted(record["step"] for record in records)
    assert "guard" in [finding.kind for finding in diagnose(load_log(path))]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ladder": ("jump",)}, "ladder holds 'jump'; allowed are skip, lower_lr, rewind, stop"),
        ({"ladder": ()}, "give each action once"),
        ({"ladder": ("rewind", "skip")}, "in the order"),
        ({"ladder": ("skip", "skip")}, "give each action once"),
        ({"sigma": 0}, "sigma=0"), ({"sigma": math.nan}, "sigma=nan"), ({"norm_ratio": 1.0}, "norm_ratio=1.0"),
        ({"lr_factor": 1.0}, "lr_factor=1.0"), ({"budget": 0}, "budget=0"), ({"window": 2.5}, "window=2.5"),
        ({"snapshot_every": True}, "snapshot_every=True"), ({"min_history": 200}, "min_history=200 exceeds window=100"),
        ({"loss_rise": "x"}, "loss_rise='x'"),
    ],
)  # fmt: skip
def test_bad_arguments_are_told_at_once(options, said):
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        SpikeGuard(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


# ---- several processes ----


def _two_processes(rank, size, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    for harm in ("loss", "gradient"):
        training = Training(ladder=("skip", "rewind"), skips=1)
        taken = []
        for step in range(60):
            row, x, y = training.data.next()
            training.optimizer.zero_grad()
            loss = (training.model(x) - y).square().mean()
            loss.backward()
            if rank == 1 and step == 40:  # this process alone sees it
                loss = loss * 1e6 if harm == "loss" else loss
                if harm == "gradient":
                    training.model[0].weight.grad[0, 0] = math.nan
            taken.append(training.guard.step(loss, rows=row))
        assert taken == [step != 40 for step in range(60)], (rank, harm)
        found = [None] * size
        dist.all_gather_object(found, [dict(event) for event in training.guard.events])
        assert found[0] == found[1] and len(found[0]) == 1


def test_all_processes_act_together_on_what_one_of_them_sees():
    from parallel_support import free_port

    run_processes(_two_processes, 2, free_port(), count=2)
