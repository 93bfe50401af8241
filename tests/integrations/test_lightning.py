"""Lightning: closures, accumulation, clipping, checkpoints; and what the callback sees of them."""

import json

import lightning.pytorch as pl
import pytest
import torch
from integration_support import equal, weights
from torch import nn

from evenstep import SPAM, AdaGN, StableSPAM, stabilize
from evenstep.errors import EvenstepError
from evenstep.integrations.lightning import SpikeCallback
from evenstep.telemetry.schema import read_records


class Regression(pl.LightningModule):
    def __init__(self, build, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.build = build
        self.norms, self.losses = [], []

    def training_step(self, batch, _):
        x, y = batch
        loss = (self.net(x) - y).square().mean()
        self.losses.append(float(loss))
        return loss

    def validation_step(self, batch, _):
        x, y = batch
        self.log("val_loss", (self.net(x) - y).square().mean())

    def configure_optimizers(self):
        return self.build(self.parameters())

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.norms.append([float(p.grad.norm()) for p in self.parameters()])


def data(rows=24):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4, generator=draw)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)


def trainer(out, *, steps=6, callbacks=(), **options):
    return pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        default_root_dir=out,
        logger=options.pop("logger", False),
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        **options,
    )


BUILDS = {
    "StableSPAM": lambda params: StableSPAM(params, lr=1e-2, reset_interval=4),
    "SPAM sparse": lambda params: SPAM(params, lr=1e-2, density=0.25, reset_interval=4, warmup_steps=2),
    "stabilize": lambda params: stabilize(torch.optim.AdamW(params, lr=1e-2), AdaGN(), reset_interval=4),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2),
}


@pytest.mark.parametrize("name", BUILDS)
def test_lightning_resumes_to_the_same_bits(name, tmp_path):
    # An epoch is one batch, so that all steps see the same: where Lightning goes on in the data is its own affair.
    whole, half, again = (Regression(BUILDS[name], seed) for seed in (0, 0, 1))
    trainer(tmp_path).fit(whole, data(4))
    first = trainer(tmp_path, steps=3)
    first.fit(half, data(4))
    first.save_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path).fit(again, data(4), ckpt_path=tmp_path / "half.ckpt")
    assert equal(weights(whole), weights(again))
    assert not equal(weights(whole), weights(half))


@pytest.mark.parametrize("name", BUILDS)
def test_the_callback_sees_the_gradients_and_the_loss_of_each_step(name, tmp_path):
    # Lightning runs the backward pass within optimizer.step: a look before it would see the last step's gradients.
    model = Regression(BUILDS[name])
    spikes = SpikeCallback(every=1, parameters_every=1, say=None)
    trainer(tmp_path, steps=3, callbacks=[spikes], accumulate_grad_batches=2, gradient_clip_val=0.5).fit(model, data())
    records = read_records(tmp_path / "metrics.jsonl")
    seen = [record["grad_norm"] for record in records if record.get("kind") == "parameters"]
    assert len(seen) == 3
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(model.norms), rtol=1e-3, atol=1e-6)
    losses = [record["losses"][0] for record in records if record.get("kind") == "window"]
    means = torch.tensor(model.losses).view(3, 2).mean(1)
    torch.testing.assert_close(torch.tensor(losses), means, rtol=1e-3, atol=1e-6)


def weight_averaging():
    from lightning.pytorch.callbacks import EMAWeightAveraging

    return EMAWeightAveraging(decay=0.9)


@pytest.mark.parametrize(("precision", "averaged"), [("bf16-mixed", False), ("bf16-true", True)])
def test_the_callback_knows_the_loss_in_each_precision_and_beside_averaged_weights(precision, averaged, tmp_path):
    model = Regression(lambda params: StableSPAM(params, lr=1e-2, rounding="stochastic"))
    callbacks = [SpikeCallback(say=None), *([weight_averaging()] if averaged else [])]
    trainer(tmp_path, steps=3, callbacks=callbacks, precision=precision).fit(model, data())
    windows = [record for record in read_records(tmp_path / "metrics.jsonl") if record.get("kind") == "window"]
    losses = [loss for record in windows for loss in record["losses"]]
    assert len(losses) == 3 and losses == pytest.approx(model.losses, rel=1e-2)


CONFIGURATION = """
trainer:
  max_steps: 3
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: evenstep.integrations.lightning.SpikeCallback
      init_args: {path: log.jsonl, every: 1, say: null}
optimizer:
  class_path: evenstep.StableSPAM
  init_args: {lr: 0.003, betas: [0.9, 0.95], reset_interval: 7}
"""


class Configured(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)

    def training_step(self, batch, _):
        x, y = batch
        return (self.net(x) - y).square().mean()

    def train_dataloader(self):
        return data()


def test_lightnings_command_line_makes_optimizer_and_callback_from_a_configuration(tmp_path, monkeypatch):
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIGURATION)
    made = LightningCLI(Configured, args=["fit", "--config", "run.yaml"])
    [optimizer] = made.trainer.optimizers
    group = optimizer.param_groups[0]
    assert type(optimizer) is StableSPAM
    assert (group["lr"], group["betas"], group["reset_interval"]) == (0.003, (0.9, 0.95), 7)
    assert sum("losses" in record for record in read_records(tmp_path / "log.jsonl")) == 3


def test_the_callback_goes_on_from_a_checkpoint(tmp_path):
    def fit(steps, out, **how):
        spikes = SpikeCallback(tmp_path / "metrics.jsonl", every=1, parameters_every=1, say=None)
        fitted = trainer(out, steps=steps, callbacks=[spikes])
        fitted.fit(Regression(BUILDS["StableSPAM"]), data(4), data(4), **how)
        return fitted, [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]

    _, whole = fit(6, tmp_path)
    first, _ = fit(3, tmp_path)
    first.save_checkpoint(tmp_path / "half.ckpt")
    _, again = fit(6, tmp_path, ckpt_path=tmp_path / "half.ckpt")
    scores = [[r for r in records if r.get("kind") == "parameters"][-1]["gss"] for records in (whole, again)]
    assert scores[0] == scores[1]  # of step 6, over the mean of all six
    steps = [
        record["first"] + i for record in again if record.get("kind") == "window" for i in range(len(record["losses"]))
    ]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in whole if "val_loss" in record] == [1, 2, 3, 4, 5, 6]


def test_the_trainers_loggers_get_the_numbers(tmp_path):
    class Logger(pl.loggers.logger.DummyLogger):
        def __init__(self):
            super().__init__()
            self.got = []

        def log_metrics(self, metrics, step=None):
            self.got.append((step, metrics))

    logger = Logger()
    trainer(tmp_path, logger=logger, callbacks=[SpikeCallback(every=2, say=None)]).fit(
        Regression(BUILDS["AdamW"]), data()
    )
    rates = [step for step, metrics in logger.got if "telemetry/spike_rate" in metrics]
    assert rates == [2, 4, 6]


def test_an_optimizer_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(EvenstepError, match=r"optimizer=1, but the module has 1; count from 0"):
        trainer(tmp_path, callbacks=[SpikeCallback(optimizer=1)]).fit(Regression(BUILDS["AdamW"]), data())


class Pair(pl.LightningModule):
    """Two networks with an optimizer each, stepped in turn."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.nets = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 2)])
        self.automatic_optimization = False

    def training_step(self, batch, _):
        for net, optimizer in zip(self.nets, self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(net(batch[0]).square().mean())
            optimizer.step()

    def validation_step(self, batch, _):
        self.log("val_loss", self.nets[0](batch[0]).square().mean())

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in self.nets]


def steps_of(path):
    windows = [record for record in read_records(path) if record.get("kind") == "window"]
    return [window["first"] + i for window in windows for i in range(len(window["norms"]))]


def names_of(path):
    return next(record["names"] for record in read_records(path) if record.get("kind") == "start")


@pytest.mark.parametrize("paths", [("a.jsonl", "b.jsonl"), (None, None)])
def test_each_of_two_optimizers_has_a_callback_of_its_own(paths, tmp_path):
    def callbacks():
        given = [tmp_path / path if path else None for path in paths]
        return [SpikeCallback(path, optimizer=i, say=None, every=2) for i, path in enumerate(given)]

    first = trainer(tmp_path, steps=6, callbacks=callbacks())  # Lightning counts the steps of both
    first.fit(Pair(), data(12), data(4))
    files = [tmp_path / (path or f"metrics{'-2' * i}.jsonl") for i, path in enumerate(paths)]
    assert [steps_of(path) for path in files] == [[1, 2, 3], [1, 2, 3]]
    assert [names_of(path)[0] for path in files] == ["nets.0.weight", "nets.1.weight"]
    assert [[r["step"] for r in read_records(path) if "val_loss" in r] for path in files] == [[3], [3]]
    first.save_checkpoint(tmp_path / "half.ckpt")
    again = callbacks()
    trainer(tmp_path, steps=12, callbacks=again).fit(Pair(), data(12), ckpt_path=tmp_path / "half.ckpt")
    assert [steps_of(path) for path in files] == [[*range(1, 7)], [*range(1, 7)]]


def test_a_checkpoint_of_evenstep_0_1_is_taken_up(tmp_path):
    model, spikes = Regression(BUILDS["AdamW"]), SpikeCallback(every=1, say=None)
    first = trainer(tmp_path, steps=3, callbacks=[spikes])
    first.fit(model, data(4))
    first.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=False)
    saved["callbacks"] = {"SpikeCallback": next(iter(saved["callbacks"].values()))}  # the name that it had there
    torch.save(saved, tmp_path / "half.ckpt")
    again = SpikeCallback(every=1, say=None)
    trainer(tmp_path, steps=4, callbacks=[again]).fit(
        Regression(BUILDS["AdamW"]), data(4), ckpt_path=tmp_path / "half.ckpt"
    )
    assert float(again.monitor.probe.counts[0]) == 4


class Kept:
    def __init__(self):
        self.records, self.closed = [], 0

    def write(self, record):
        self.records.append(record)

    def close(self):
        self.closed += 1


def test_fit_may_be_called_again_and_sinks_of_the_callers_stay_open(tmp_path):
    kept, model = Kept(), Regression(BUILDS["AdamW"])
    spikes = SpikeCallback(every=1, say=None, sinks=kept)
    fitted = trainer(tmp_path, steps=3, callbacks=[spikes])
    fitted.fit(model, data(4))
    fitted.fit_loop.epoch_loop.max_steps = 6
    fitted.fit(model, data(4))
    assert steps_of(tmp_path / "metrics.jsonl") == [*range(1, 7)] and kept.closed == 0
    assert float(spikes.monitor.probe.counts[0]) == 6  # baselines went on
    trainer(tmp_path, steps=2, callbacks=[spikes]).fit(model, data(4))
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2]
    assert [record["step"] for record in kept.records if record.get("kind") == "window"] == [1, 2, 3, 4, 5, 6, 1, 2]


def test_a_state_of_another_model_and_loggers_that_fail_end_no_training(tmp_path):
    class Logger(pl.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            raise ConnectionError("no network")

    spikes = SpikeCallback(every=1, say=None)
    spikes._saved = {"step": 0, "names": ["other"]}
    with pytest.warns(UserWarning, match=r"other parameters|no network") as caught:
        trainer(tmp_path, steps=2, logger=Logger(), callbacks=[spikes]).fit(Regression(BUILDS["AdamW"]), data(4))
    assert len([one for one in caught if "training goes on" in str(one.message)]) == 2
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2]


def test_a_metric_that_nobody_logs_is_told_of(tmp_path):
    spikes = SpikeCallback(say=None, validation="val_los")
    with pytest.warns(UserWarning, match="no metric 'val_los' was logged; did you mean 'val_loss'"):
        trainer(tmp_path, steps=2, callbacks=[spikes]).fit(Regression(BUILDS["AdamW"]), data(4), data(4))


BAD = [
    {"path": 3},
    {"path": ""},
    {"optimizer": -1},
    {"optimizer": "critic"},
    {"optimizer": True},
    {"validation": None},
    {"ratio": 0.5},
    {"every": 0},
    {"evry": 5},
    {"sinks": [3]},
]


@pytest.mark.parametrize("given", BAD, ids=repr)
def test_a_bad_argument_fails_where_the_callback_is_made(given):
    with pytest.raises((TypeError, ValueError), match="SpikeCallback") as problem:
        SpikeCallback(**given)
    assert len(str(problem.value).splitlines()) == 1
