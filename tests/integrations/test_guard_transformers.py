"""SpikeGuard in the Trainer of transformers: bad steps are found and acted on, and what follows equals a training that
never saw them, bit for bit.

Lightning is not imported here: the processes of a distributed test import the file of their worker.
"""

import math
import os
import types

import pytest
import torch
from integration_support import done, equal, tiny_model, tiny_trainer, weights
from process_support import run_processes
from torch import nn

from evenstep import StableSPAM
from evenstep.integrations.transformers import SpikeCallback, SpikeGuardCallback
from evenstep.telemetry.diagnosis import diagnose
from evenstep.telemetry.runlog import load_run

BAD = 30
"""Number of the bad step, the first is 1."""


class Rows(torch.utils.data.IterableDataset):
    """Rows of tokens, without the batches ``left_out`` (numbers from 1), each row in its own place in all of them."""

    def __init__(self, batch, left_out=(), count=400):
        draw = torch.Generator().manual_seed(1)
        tokens = torch.randint(32, (count, 8), generator=draw)
        gone = {(number - 1) * batch + i for number in left_out for i in range(batch)}
        self.rows = [{"input_ids": row, "labels": row} for i, row in enumerate(tokens) if i not in gone]

    def __iter__(self):
        return iter(self.rows)


class Harm(SpikeCallback):
    """Multiplies the gradient of one parameter by ``factor`` during the steps ``at``, on the process ``rank``."""

    def __init__(self, at, factor, rank=0, name="model.layers.0.mlp.up_proj.weight"):
        super().__init__(say=None)
        self.at, self.factor, self.rank, self.name, self.step = at, factor, rank, name, 0

    def on_train_begin(self, args, state, control, model=None, **_):
        def scaled(gradient):
            mine = args.process_index == self.rank and state.global_step + 1 in self.at
            # Of one sign: over two batches, infinities of both would be NaN.
            return gradient.abs() * self.factor if mine else gradient

        self.handle = dict(model.named_parameters())[self.name].register_hook(scaled)

    def on_pre_optimizer_step(self, *args, **kwargs):
        """Nothing: only the gradient matters."""

    on_log = on_save = on_pre_optimizer_step

    def on_train_end(self, *args, **kwargs):
        self.handle.remove()


def guarded(out, *, at=(), factor=1000.0, steps=40, left_out=(), dropout=0.0, callbacks=(), train=True, **given):
    """A Trainer after its training, its guard's callback, and the lines that it said."""
    model, said = tiny_model(), []
    model.config.attention_dropout = dropout
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = dropout
    names = ("ladder", "snapshot_every", "check_every", "skips", "min_history", "budget", "on_event")
    options = {name: given.pop(name) for name in names if name in given}
    guard = SpikeGuardCallback(say=said.append, **options)
    accumulation = given.get("gradient_accumulation_steps", 1)
    schedule = {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 5, "save_strategy": "no"}
    given = {"optimizer": (torch.optim.AdamW, {"lr": 1e-2}), **schedule, **given}
    trainer = tiny_trainer(out, model, steps=steps, callbacks=[Harm(at, factor), guard, *callbacks], **given)
    trainer.train_dataset = Rows(2 * accumulation, left_out)
    if train:
        trainer.train()
    return trainer, guard, said


CLIPS = {"clipped": 0.5, "not clipped": 0.0}


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_calm_training_is_left_alone_bit_for_bit(clip, accumulation, tmp_path):
    given = {"max_grad_norm": CLIPS[clip], "gradient_accumulation_steps": accumulation}
    plain = tiny_trainer(
        tmp_path, tiny_model(), steps=40, optimizer=(torch.optim.AdamW, {"lr": 1e-2}),
        lr_scheduler_type="inverse_sqrt", warmup_steps=5, **given,
    )  # fmt: skip
    plain.train_dataset = Rows(2 * accumulation)
    plain.train()
    trainer, guard, said = guarded(tmp_path, **given)
    assert not guard.guard.events and not said and guard.guard.num_steps == 40
    assert equal(weights(trainer.model), weights(plain.model))
    assert trainer.args.max_grad_norm == CLIPS[clip]
    norms = [[line["grad_norm"] for line in one.state.log_history if "grad_norm" in line] for one in (trainer, plain)]
    assert norms[0] == norms[1]


@pytest.fixture(scope="module")
def without_the_batch(tmp_path_factory):
    """Trainings that never saw the bad batch, by their options, as they are asked for."""
    found = {}

    def training(**given):
        key = tuple(sorted(given.items()))
        if key not in found:
            found[key], _, _ = guarded(tmp_path_factory.mktemp("clean"), steps=39, left_out=[BAD], **given)
        return found[key]

    return training


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("factor", [1000.0, math.inf, math.nan])
def test_a_skipped_step_leaves_all_as_without_its_batch(clip, accumulation, factor, without_the_batch, tmp_path):
    given = {"max_grad_norm": CLIPS[clip], "gradient_accumulation_steps": accumulation, "ladder": "skip"}
    trainer, guard, said = guarded(tmp_path, at=[BAD], factor=factor, **given)
    clean = without_the_batch(**given)
    assert done(guard) == [(BAD, "skip")] and trainer.state.global_step == 40
    assert equal(weights(trainer.model), weights(clean.model))
    assert trainer.lr_scheduler.last_epoch == clean.lr_scheduler.last_epoch == 39
    assert len(said) == 1 and said[0].startswith("SpikeGuard: step 30 is bad: ")
    # A NaN is in every gradient once the Trainer has divided by the norm.
    assert math.isnan(factor) or "the norm of the gradients" in said[0] or "up_proj" in said[0]
    [line] = [line for line in trainer.state.log_history if "guard" in line]
    assert (line["step"], line["guard"]) == (BAD, "skip") and line["guard_reason"] in said[0]


@pytest.mark.parametrize("ladder", [("rewind",), ("skip", "rewind")])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, StableSPAM])
def test_a_rewound_training_equals_one_without_the_batches_since_the_snapshot(ladder, optimizer, tmp_path):
    """With dropout, so that random states matter too."""
    given = {"optimizer": (optimizer, {"lr": 1e-2}), "dropout": 0.3, "snapshot_every": 10, "skips": 1}
    at = [26] if len(ladder) == 1 else [25, 26]
    trainer, guard, said = guarded(tmp_path, at=at, ladder=ladder, steps=60, check_every=4, **given)
    rewound = guard.guard.events[-1]
    assert rewound["action"] == "rewind" and rewound["rows"] == 26 and rewound["to"] == 20
    found = int(next(line["step"] for line in trainer.state.log_history if "guard" in line))
    assert found in at and "the data goes on from here" in said[-1]
    # A ladder without "skip" judges every fourth step, the last time for the snapshot after step 20.
    seen_at = 28 if len(ladder) == 1 else 26
    left_out = range(21, seen_at + 1)
    clean, _, _ = guarded(tmp_path, steps=60 - len(left_out), left_out=left_out, **given)
    assert equal(weights(trainer.model), weights(clean.model))
    assert trainer.lr_scheduler.last_epoch == clean.lr_scheduler.last_epoch


def test_the_rate_is_lowered_for_some_steps_and_the_schedule_is_not(tmp_path):
    rates = []

    class Rates(SpikeGuardCallback):
        def on_train_begin(self, *args, **kwargs):
            super().on_train_begin(*args, **kwargs)
            kwargs["optimizer"].optimizer.register_step_post_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))

    trainer = tiny_trainer(
        tmp_path, tiny_model(), steps=40, optimizer=(torch.optim.AdamW, {"lr": 1e-2}),
        callbacks=[Harm([BAD], 1000.0), Rates(say=None, ladder="lower_lr", lr_steps=5, check_every=1)],
    )  # fmt: skip
    trainer.train()
    assert rates == pytest.approx([1e-2] * 29 + [1e-3] * 5 + [1e-2] * 5)
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize("ladder", ["stop", ("rewind", "stop")])
def test_a_stopped_training_ends(ladder, tmp_path):
    given = {"steps": 60, "check_every": 1, "snapshot_every": 10}
    trainer, guard, said = guarded(tmp_path, at=range(BAD, 60), ladder=ladder, **given)
    assert guard.guard.stopped and trainer.state.global_step == BAD + (ladder != "stop")
    assert "the training stops" in said[-1]
    again = trainer.train()
    assert again.global_step < 60 and guard.guard.num_steps < 60


def test_the_guard_serves_every_training_anew_and_gives_the_optimizer_back(tmp_path):
    trainer, guard, _ = guarded(tmp_path, at=[BAD], ladder="skip")
    first = guard.guard
    trainer.train()
    assert guard.guard is not first and done(guard) == [(BAD, "skip")] and guard.guard.num_steps == 40
    trainer.remove_callback(guard)
    trainer.train()
    assert guard.guard.num_steps == 40 and trainer.state.global_step == 40

    class Failure(Exception):
        pass

    def fail(event):
        raise Failure

    trainer, guard, _ = guarded(tmp_path, at=[BAD], max_grad_norm=0.5, on_event=fail, train=False)
    with pytest.raises(Failure):
        trainer.train()
    guard.options["on_event"] = None
    trainer.train()
    assert done(guard) == [(BAD, "skip")] and trainer.args.max_grad_norm == 0.5 and guard.guard.num_steps == 40


def test_a_resumed_training_judges_as_the_one_that_went_on(tmp_path):
    """The bad step comes six after the resume, too few to know what is usual without the saved state."""
    given = {"save_strategy": "steps", "save_steps": 24, "max_grad_norm": 0.5}
    whole, guard, _ = guarded(tmp_path / "whole", at=[BAD], **given)
    again, resumed, _ = guarded(tmp_path / "whole", at=[BAD], train=False, **given)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-24"))
    assert done(guard) == done(resumed) == [(BAD, "skip")]
    assert list(guard.guard.events) == list(resumed.guard.events)
    assert equal(weights(whole.model), weights(again.model))


def test_a_checkpoint_is_judged_before_it_is_written(tmp_path):
    """A ladder without "skip" has not judged the newest steps when the Trainer saves: it does so first."""
    given = {"ladder": "rewind", "check_every": 10, "snapshot_every": 10, "save_strategy": "steps", "save_steps": 28}
    guarded(tmp_path, at=[26], steps=28, **given)
    clean, _, _ = guarded(tmp_path / "clean", steps=20, snapshot_every=10)
    saved = type(clean.model).from_pretrained(tmp_path / "checkpoint-28")
    assert equal(weights(saved), weights(clean.model))


def test_gradients_are_judged_before_the_trainer_clips_them(tmp_path):
    """All gradients are 20 times larger, which nothing tells once their norm has been clipped."""

    class All(SpikeGuardCallback):
        def on_train_begin(self, args, state, control, model=None, **rest):
            super().on_train_begin(args, state, control, model=model, **rest)
            for p in model.parameters():
                p.register_hook(lambda gradient: gradient * 20 if state.global_step + 1 == BAD else gradient)

    guard = All(say=None, ladder="skip")
    given = {"optimizer": (torch.optim.AdamW, {"lr": 1e-2}), "max_grad_norm": 0.1, "save_strategy": "no"}
    tiny_trainer(tmp_path, tiny_model(), steps=32, callbacks=[guard], **given).train()
    assert done(guard) == [(BAD, "skip")]


@pytest.mark.parametrize(
    ("kind", "version", "name"), [("DEEPSPEED", 2, "DEEPSPEED"), ("XLA", 2, "XLA"), ("FSDP", 1, "FSDP 1")]
)
def test_engines_that_take_the_step_themselves_are_refused(kind, version, name):
    from accelerate.utils import DistributedType

    plugin = types.SimpleNamespace(fsdp_version=version)
    accelerated = types.SimpleNamespace(distributed_type=DistributedType(kind), fsdp_plugin=plugin)
    optimizer = types.SimpleNamespace(accelerator_state=accelerated)
    with pytest.raises(ValueError, match=f"SpikeGuardCallback: does not work with {name}; use one process, DDP or"):
        SpikeGuardCallback().on_train_begin(None, None, None, model=tiny_model(), optimizer=optimizer)


def test_monitor_and_guard_share_a_training(tmp_path):
    for first in (True, False):
        monitor = SpikeCallback(every=1, say=None)
        _, guard, _ = guarded(tmp_path, at=[BAD], callbacks=[monitor] if first else [], ladder="skip")
        assert done(guard) == [(BAD, "skip")]
        # The report of the training has the decision, with the Trainer's number of the step and without data rows
        if first:
            [decision] = [event for event in load_run(tmp_path).events if event["event"] == "guard"]
            assert (decision["bad_step"], decision["action"], decision["rows"]) == (BAD, "skip", None)
            assert decision["reason"] == guard.guard.events[0]["reason"]
            [finding] = [finding for finding in diagnose(load_run(tmp_path)) if finding.kind == "guard"]
            assert f"The guard skipped a step once, first at step {BAD}: the" in finding.sentences[0]
    # A step that is not taken is none for the monitor.
    assert float(monitor.monitor.probe.counts[0]) == 39 if first else True


def test_without_a_loss_of_the_model_gradients_are_judged(tmp_path):
    _, guard, _ = guarded(tmp_path, at=[BAD], ladder="skip", label_smoothing_factor=0.1)
    assert done(guard) == [(BAD, "skip")] and "norm" in guard.guard.events[0]["reason"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ladder": "jump"}, "ladder holds 'jump'"), ({"sigma": -1}, "sigma=-1"), ({"laddr": "skip"}, "did you mean"),
        ({"data": []}, "unknown argument 'data'"), ({"say": 3}, "say=3"), ({"on_event": 3}, "on_event=3"),
        ({"min_history": 200}, "min_history=200 exceeds"), ({"window": "x"}, "window='x'"),
    ],
)  # fmt: skip
def test_a_bad_argument_fails_where_the_callback_is_made(options, said):
    with pytest.raises((TypeError, ValueError), match="SpikeGuardCallback: ") as problem:
        SpikeGuardCallback(**options)
    assert said in str(problem.value) and len(str(problem.value).splitlines()) == 1


def _two_processes(rank, out, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    given = {"max_grad_norm": 0.5, "ddp_backend": "gloo"}
    for action in ("rewind", "skip"):
        trainer, guard, said = guarded(out, at=[BAD], ladder=action, **given)
        assert done(guard) == [(BAD, action)]
        assert len(said) == (rank == 0)
    clean, _, _ = guarded(out, steps=39, left_out=[2 * BAD - 1, 2 * BAD], **given)
    assert equal(weights(trainer.model), weights(clean.model))


def test_two_processes_act_together(tmp_path):
    from parallel_support import free_port

    run_processes(_two_processes, tmp_path, free_port(), count=2)


def test_an_overflow_is_left_to_the_gradscaler_and_a_spike_is_not(tmp_path):
    """The steps of a Trainer with fp16, on a CPU, where the Trainer itself refuses fp16."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import TrainerControl, TrainerState, TrainingArguments

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    args, state, control = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(), TrainerControl()
    Accelerator(cpu=True)  # whose state the optimizer reads; the arguments above have reset it
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = AcceleratedOptimizer(inner, device_placement=False, scaler=scaler)
    schedule = torch.optim.lr_scheduler.LambdaLR(inner, lambda t: 1.0)
    guard = SpikeGuardCallback(say=None, ladder="skip")
    guard.on_train_begin(args, state, control, model=model, optimizer=optimizer, lr_scheduler=schedule)
    skipped, scales = [], []
    for step in range(1, 41):
        guard.on_step_begin(args, state, control)
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        scaler.scale((model(x) - 1).square().mean()).backward()
        model.weight.grad *= {10: math.inf, BAD: 1000.0}.get(step, 1.0)
        scaler.unscale_(inner)
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        before = weights(model)
        optimizer.step()
        if optimizer.step_was_skipped:
            assert equal(before, weights(model))
            skipped.append(step)
        scales.append(scaler.get_scale())
        model.zero_grad()
        state.global_step = step
    assert skipped == [10, BAD] and done(guard) == [(BAD, "skip")]
    assert scales == [2.0**10] * 9 + [2.0**9] * 31
