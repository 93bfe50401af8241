"""SpikeGuard in Lightning and in a loop of accelerate: bad steps are found and acted on, and what follows equals a
training that never saw them, bit for bit."""

import math
import os

import lightning.pytorch as pl
import pytest
import torch
from integration_support import done, equal, weights
from process_support import run_processes
from torch import nn

from evenstep import AdaGN, SpikeGuard, StableSPAM, stabilize
from evenstep.integrations import lightning
from evenstep.telemetry.runlog import load_run

# ---- Lightning ----


class Regression(pl.LightningModule):
    """Numbers with dropout; the gradient of one weight is multiplied by ``factor`` during the steps ``at``."""

    def __init__(self, at=(), factor=1000.0, optimizer=torch.optim.AdamW, manual=False, rank=0):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 1))
        self.at, self.factor, self.optimizer, self.rank, self.rates = at, factor, optimizer, rank, []
        self.automatic_optimization = not manual
        self.number = 0

    def on_train_start(self):
        torch.manual_seed(0)

    def training_step(self, batch, index):
        x, y = batch
        loss = (self.net(x) - y).square().mean()
        if self.number + 1 in self.at and self.trainer.global_rank == self.rank:
            self.net[0].weight.register_hook(lambda gradient: gradient.abs() * self.factor)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def on_train_batch_end(self, *_):
        self.number = self.trainer.global_step
        self.net[0].weight._backward_hooks = None

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters(), lr=1e-2)
        optimizer.register_step_post_hook(lambda o, *_: self.rates.append(o.param_groups[0]["lr"]))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t / 20))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def numbers(batch=8, left_out=(), count=100):
    """Batches of numbers in their order, without the batches ``left_out`` (from 1)."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(count, batch, 4, generator=draw)
    kept = [i for i in range(count) if i + 1 not in left_out]
    rows = torch.utils.data.TensorDataset(x[kept].flatten(0, 1), x[kept].flatten(0, 1).sum(1, keepdim=True).sin())
    return torch.utils.data.DataLoader(rows, batch_size=batch)


def pl_trainer(steps, *callbacks, **options):
    options = {"devices": 1, **options}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        max_steps=steps, accelerator="cpu", callbacks=list(callbacks), enable_checkpointing=False, **quiet,
        **options,
    )  # fmt: skip


def fitted(module, *, steps=40, left_out=(), options=None, **given):
    """The guard's callback after a fit, and the lines that it said."""
    said = []
    guard = lightning.SpikeGuardCallback(say=said.append, **given)
    pl_trainer(steps, guard, **(options or {})).fit(module, numbers(left_out=left_out))
    return guard, said


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}], ids=str)
def test_lightnings_calm_training_is_left_alone_bit_for_bit(manual, options):
    if manual and options:
        pytest.skip("Lightning accumulates and clips in automatic optimization only")
    one, other = Regression(manual=manual), Regression(manual=manual)
    pl_trainer(40, **options).fit(one, numbers())
    guard, said = fitted(other, options=options)
    assert equal(weights(one), weights(other)) and one.rates == other.rates
    assert not said and guard.guard.num_steps == 40
    assert not {"configure_gradient_clipping", "lr_scheduler_step"} & vars(other).keys()


def test_gradients_are_judged_before_lightning_clips_them():
    """All gradients are 20 times larger, which nothing tells once their norm has been clipped."""

    class All(Regression):
        def on_after_backward(self):
            for p in self.parameters():
                p.grad *= 20 if self.number + 1 == 30 else 1

    guard, _ = fitted(All(), ladder="skip", options={"gradient_clip_val": 0.01})
    assert done(guard) == [(30, "skip")]


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("factor", [1000.0, math.inf])
@pytest.mark.parametrize("clip", [0.1, None])
def test_lightning_rewinds_to_the_bits_of_a_training_without_the_batches(manual, factor, clip):
    options = {"gradient_clip_val": None if manual else clip}
    given = {"ladder": ("skip", "rewind"), "skips": 1, "snapshot_every": 10, "options": options}
    module, clean = Regression([25, 26], factor, manual=manual), Regression(manual=manual)
    guard, said = fitted(module, **given)
    fitted(clean, steps=34, left_out=range(21, 27), **given)
    assert done(guard) == [(25, "skip"), (26, "rewind")] and guard.guard.events[1]["to"] == 20
    assert equal(weights(module), weights(clean))
    if not manual:  # else the schedule is the module's own affair
        assert module.rates[-14:] == clean.rates[-14:]
    assert "net.0.weight" in said[0] or "the norm of the gradients" in said[0]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_that_lightning_skips_does_not_advance_the_schedule(precision):
    module = Regression([30])
    guard, said = fitted(module, ladder="skip", options={"accumulate_grad_batches": 2, "precision": precision})
    assert done(guard) == [(30, "skip")] and len(said) == 1
    assert module.rates == pytest.approx([1e-2 / (1 + t / 20) for t in range(39)])
    assert guard._trainer.global_step == 40


@pytest.mark.parametrize("order", [1, -1])
def test_the_log_of_lightnings_callback_has_the_decisions_of_the_guard(order, tmp_path):
    watch = lightning.SpikeCallback(tmp_path / "metrics.jsonl", say=None)
    guard = lightning.SpikeGuardCallback(say=None, ladder="skip")
    pl_trainer(40, *[watch, guard][::order]).fit(Regression([30]), numbers())
    [decision] = [event for event in load_run(tmp_path).events if event["event"] == "guard"]
    assert (decision["bad_step"], decision["action"], decision["rows"]) == (30, "skip", None)


def test_lightning_leaves_an_overflow_to_the_gradscaler():
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    overflown, spiked = Regression([25], math.inf), Regression([25])
    for module, actions in ((overflown, []), (spiked, [(25, "skip")])):
        guard, _ = fitted(module, ladder="skip", options={"plugins": [precision], "gradient_clip_val": 0.1})
        assert done(guard) == actions and len(module.rates) == 39
        assert scaler.get_scale() == 2.0**9  # lowered by the overflow alone


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, StableSPAM])
def test_lightning_stops_and_fits_again(optimizer):
    module = Regression(range(30, 60), optimizer=optimizer)
    guard = lightning.SpikeGuardCallback(ladder="stop", check_every=1, say=None)
    trainer = pl_trainer(60, guard)
    trainer.fit(module, numbers())
    assert guard.guard.stopped and trainer.global_step == 30
    module.at = ()
    first = guard.guard
    pl_trainer(60, guard).fit(module, numbers())
    assert guard.guard is not first and guard.guard.num_steps == 60 and not guard.guard.events


def test_a_second_fit_and_a_resume_judge_as_the_one_that_went_on(tmp_path):
    """The bad step comes six after the second start, too few to know what is usual without the saved state."""

    def callback():
        return lightning.SpikeGuardCallback(ladder="skip", say=None)

    whole = callback()
    pl_trainer(40, whole).fit(Regression([30]), numbers())
    first, module = callback(), Regression([30])
    trainer = pl_trainer(24, first)
    trainer.fit(module, numbers())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    trainer.fit_loop.epoch_loop.max_steps = 40
    trainer.fit(module, numbers())
    resumed, again = callback(), Regression([30])
    again.number = 24
    pl_trainer(40, resumed).fit(again, numbers(), ckpt_path=tmp_path / "half.ckpt")
    assert [done(one) for one in (whole, first, resumed)] == [[(30, "skip")]] * 3
    assert torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"][resumed.state_key]["number"] == 24


def test_lightnings_command_line_takes_the_options_of_the_guard(tmp_path, monkeypatch):
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIGURATION)
    made = LightningCLI(Plain, args=["--config", "run.yaml"], run=False)
    [guard] = [one for one in made.trainer.callbacks if isinstance(one, lightning.SpikeGuardCallback)]
    assert (guard.options["ladder"], guard.options["norm_ratio"], guard.say) == (["skip", "stop"], 5.0, None)


class Plain(pl.LightningModule):
    """A module without arguments for the command line."""


CONFIGURATION = """
trainer:
  accelerator: cpu
  logger: false
  callbacks:
    - class_path: evenstep.integrations.lightning.SpikeGuardCallback
      init_args: {say: null, ladder: [skip, stop], norm_ratio: 5.0}
"""


class Pair(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.nets = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])
        self.automatic_optimization = False

    def training_step(self, batch, index):
        for i, (net, optimizer) in enumerate(zip(self.nets, self.optimizers(), strict=True)):
            optimizer.zero_grad()
            self.manual_backward((net(batch[0]) - batch[1]).square().mean() * (1e6 if i == 1 and index == 30 else 1))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.01) for net in self.nets]


def test_each_of_two_optimizers_has_a_guard_of_its_own():
    guards = [lightning.SpikeGuardCallback(i, ladder="skip", say=None) for i in range(2)]
    pl_trainer(80, *guards).fit(Pair(), numbers())
    assert [done(guard) for guard in guards] == [[], [(31, "skip")]]
    assert guards[1].guard.events[0]["reason"].startswith("the loss")
    for bad, said in (({"optimizer": 2, "ladder": "skip"}, "has 2; count from 0"), ({}, "ladder without 'rewind'")):
        with pytest.raises(ValueError, match=f"SpikeGuardCallback: .*{said}"):
            pl_trainer(2, lightning.SpikeGuardCallback(**bad)).fit(Pair(), numbers())


@pytest.mark.parametrize(
    "options",
    [{"optimizer": -1}, {"optimizer": "x"}, {"sigma": -1}, {"laddr": "skip"}, {"data": []}, {"say": 3}],
    ids=str,
)
def test_a_bad_argument_of_lightnings_callback_fails_where_it_is_made(options):
    with pytest.raises((TypeError, ValueError), match="SpikeGuardCallback: ") as problem:
        lightning.SpikeGuardCallback(**options)
    assert len(str(problem.value).splitlines()) == 1


def _lightning_in_two_processes(rank, port):
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    module, clean = Regression([26], rank=1), Regression()
    given = {"ladder": "rewind", "check_every": 1, "snapshot_every": 10}
    options = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    guard, said = fitted(module, options=options, **given)
    assert done(guard) == [(26, "rewind")] and len(said) == (rank == 0)
    fitted(clean, steps=34, left_out=range(21, 27), options=options, **given)
    assert equal(weights(module), weights(clean))


@pytest.mark.slow
def test_two_processes_of_lightning_act_together_on_what_one_of_them_sees():
    from parallel_support import free_port

    run_processes(_lightning_in_two_processes, free_port(), count=2)


# ---- accelerate ----


def accelerated(build, *, at=(), factor=1000.0, steps=40, left_out=(), accumulation=2):
    """The loop of docs/guard.md."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 1))
    optimizer = build(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t / 20))
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    guard = SpikeGuard(model, optimizer, schedulers=[schedule], ladder=("skip", "rewind"), skips=1, snapshot_every=10)

    def take():
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()

    batches = iter(numbers(left_out=[2 * step - i for step in left_out for i in range(accumulation)]))
    for step in range(1, steps + 1):
        for _ in range(accumulation):
            x, y = next(batches)
            with accelerator.accumulate(model):
                loss = (model(x) - y).square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    if step in at:
                        model[0].weight.grad *= factor
                    if guard.step(loss, rows=step, take=take):
                        schedule.step()
                optimizer.zero_grad()
    AcceleratorState._reset_state(reset_partial_state=True)
    return model, schedule, [(event["rows"], event["action"]) for event in guard.events]


BUILDS = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "StableSPAM": lambda params: StableSPAM(params, lr=1e-2),
    "stabilize": lambda params: stabilize(torch.optim.AdamW(params, lr=1e-2), AdaGN()),
}


@pytest.mark.parametrize("name", BUILDS)
def test_a_loop_of_accelerate_rewinds_to_the_bits_of_one_without_the_batches(name):
    clean, unmoved, none = accelerated(BUILDS[name], steps=34, left_out=range(21, 27))
    assert none == []
    for factor in (1000.0, math.inf):
        model, schedule, events = accelerated(BUILDS[name], at=[25, 26], factor=factor)
        assert events == [(25, "skip"), (26, "rewind")]
        assert equal(weights(model), weights(clean))
        assert schedule.scheduler.last_epoch == unmoved.scheduler.last_epoch == 34
