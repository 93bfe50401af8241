"""transformers' Trainer: our optimizers by both of its doors, resumed bit for bit; telemetry; low bits."""

import json
import math

import pytest
import torch
from integration_support import equal, tiny_model, tiny_trainer, weights

from evenstep import SCALE, SPAM, AdaGN, StableSPAM, quantize_, scale_groups, stabilize
from evenstep.integrations.transformers import SpikeCallback
from evenstep.lowbit import LowBitLinear, dequantize_
from evenstep.telemetry.schema import read_records


def by_class(cls, **options):
    return lambda model: {"optimizer": (cls, {"lr": 1e-2, **options})}


def by_object(build):
    return lambda model: {"optimizers": (build(model), None)}


DOORS = {
    "StableSPAM": by_class(StableSPAM, reset_interval=4),
    "SPAM sparse": by_class(SPAM, density=0.25, reset_interval=4, warmup_steps=2),
    "SCALE": by_object(lambda model: SCALE(scale_groups(model), lr=1e-2)),
    "stabilize": by_object(lambda model: stabilize(torch.optim.AdamW(model.parameters(), lr=1e-2), AdaGN())),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_trainer_resumes_to_the_same_bits(door, tmp_path):
    whole = tiny_trainer(tmp_path / "whole", model := tiny_model(), **DOORS[door](model))
    whole.train()
    again = tiny_trainer(tmp_path / "again", model := tiny_model(seed=1), **DOORS[door](model))
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert equal(weights(whole.model), weights(again.model))
    assert not equal(weights(whole.model), weights(tiny_model()))
    losses = [line["loss"] for line in whole.state.log_history if "loss" in line]
    assert len(losses) == 6


def test_the_trainers_groups_and_schedule_reach_the_optimizer(tmp_path):
    options = {"lr": 1e-2, "gamma1": 0.85, "update_proj_gap": 50}
    trainer = tiny_trainer(
        tmp_path,
        tiny_model(),
        optimizer=(StableSPAM, options),
        weight_decay=0.1,
        lr_scheduler_type="linear",
    )
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is StableSPAM
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {(group["gamma1"], group["reset_interval"], int(group["t"])) for group in optimizer.param_groups} == {
        (0.85, 50, 6)
    }
    assert optimizer.param_groups[0]["lr"] == 0.0  # where the linear schedule ends


def step_losses(path):
    windows = [record for record in read_records(path) if record.get("kind") == "window"]
    return {window["first"] + i: x for window in windows for i, x in enumerate(window["losses"])}


@pytest.mark.parametrize("optimizer", [StableSPAM, torch.optim.AdamW])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_callback_knows_every_step_and_its_loss(optimizer, accumulation, tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        tiny_model(),
        callbacks=[SpikeCallback(every=4, say=None)],
        optimizer=(optimizer, {"lr": 1e-2}),
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
    )
    trainer.train()
    logged = {line["step"]: line["loss"] for line in trainer.state.log_history if "loss" in line}
    seen = step_losses(tmp_path / "metrics.jsonl")
    assert seen.keys() == logged.keys() == set(range(1, 7))
    assert all(abs(seen[step] - logged[step]) < 1e-3 for step in logged)
    assert all("spike_rate" in line and "spikes" in line for line in trainer.state.log_history if "loss" in line)


TREATMENTS = {
    "low bits, checkpointing, bf16": (True, {"gradient_checkpointing": True, "bf16": True}),
    "compiled": (False, {"torch_compile": True, "torch_compile_backend": "eager"}),
}


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_the_callback_hears_every_loss_however_the_trainer_runs_the_model(treatment, tmp_path):
    low, arguments = TREATMENTS[treatment]
    trainer = tiny_trainer(
        tmp_path,
        quantize_(tiny_model(), "fp4") if low else tiny_model(),
        callbacks=[SpikeCallback(say=None)],
        optimizer=(StableSPAM, {"lr": 1e-2}),
        steps=3,
        **arguments,
    )
    trainer.train()
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    seen = step_losses(tmp_path / "metrics.jsonl")
    assert [*seen] == [1, 2, 3] and [*seen.values()] == pytest.approx(logged, abs=1e-3)
    assert load_names(tmp_path)[0] == "model.embed_tokens.weight"


def load_names(out):
    return next(record["names"] for record in read_records(out / "metrics.jsonl") if record.get("kind") == "start")


@pytest.mark.parametrize("schedule", ["polynomial", "reduce_lr_on_plateau", "greedy"])
def test_schedules_that_look_into_the_optimizer_move_its_rate(schedule, tmp_path):
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 6}
    patience = {"reduce_lr_on_plateau": {"patience": 0}, "greedy": {"patience": 0, "smooth": False}}
    trainer = tiny_trainer(
        tmp_path,
        tiny_model(),
        optimizer=(StableSPAM, {"lr": 1e-2}),
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=patience.get(schedule, {}),
        **evaluated,
    )
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] != 1e-2


def adapted(seed=0):
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def test_adapters_train_and_resume_to_the_same_bits_and_the_rest_stays(tmp_path):
    def trainer(out, seed):
        return tiny_trainer(
            tmp_path / out,
            adapted(seed),
            callbacks=[SpikeCallback(say=None)],
            optimizer=(StableSPAM, {"lr": 1e-2, "reset_interval": 4}),
        )

    whole, again = trainer("whole", 0), trainer("again", 1)
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert equal(weights(whole.model), weights(again.model))
    before, after = weights(adapted()), weights(whole.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "lora_" in name} == {*load_names(tmp_path / "whole")}


def test_the_callback_goes_on_after_a_resume_without_a_line_twice(tmp_path):
    def train(**how):
        trainer = tiny_trainer(
            tmp_path,
            tiny_model(),
            callbacks=[SpikeCallback(say=None)],
            optimizer=(StableSPAM, {"lr": 1e-2}),
            eval_strategy="steps",
            eval_steps=3,
        )
        trainer.train(**how)
        return [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]

    before = train()
    after = train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for records in (before, after):
        assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4, 5, 6]
        assert [record["step"] for record in records if "val_loss" in record] == [3, 6]
        assert [record["first"] for record in records if record.get("kind") == "window"] == [1, 2, 3, 4, 5, 6]
    scores = [[r["gss"] for r in records if r.get("kind") == "parameters"][-1] for records in (before, after)]
    assert scores[0] == scores[1]  # means over all six steps, not over the last three


def test_a_low_bit_model_trains_and_its_checkpoint_is_a_plain_one(tmp_path):
    model = quantize_(tiny_model(), "fp4")
    trainer = tiny_trainer(tmp_path, model, optimizer=(StableSPAM, {"lr": 1e-2}), save_steps=6)
    trainer.train()
    assert sum(isinstance(module, LowBitLinear) for module in model.modules()) == 7
    assert not equal(weights(model), weights(tiny_model()))
    plain = type(model).from_pretrained(tmp_path / "checkpoint-6")
    assert equal(weights(plain), weights(dequantize_(model)))
    assert not any(isinstance(module, LowBitLinear) for module in plain.modules())


class Kept(list):
    write = list.append

    def close(self):
        """Nothing is held."""


def test_training_twice_and_resuming_with_one_callback(tmp_path):
    kept = Kept()
    spikes = SpikeCallback(every=1, say=None, sinks=[kept])
    trainer = tiny_trainer(tmp_path, tiny_model(), callbacks=[spikes], optimizer=(StableSPAM, {"lr": 1e-2}))
    trainer.train()
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    seen = [record["step"] for record in kept if record.get("kind") == "window"]
    assert seen == [*range(1, 7), *range(1, 7), *range(4, 7)]
    assert [*step_losses(tmp_path / "metrics.jsonl")] == [*range(1, 7)]
    assert float(spikes.monitor.probe.counts[0]) == 6


def test_several_callbacks_watch_one_trainer(tmp_path):
    def train(**how):
        callbacks = [SpikeCallback(say=None), SpikeCallback(say=None), SpikeCallback(tmp_path / "x.jsonl", say=None)]
        trainer = tiny_trainer(tmp_path, tiny_model(), callbacks=callbacks, optimizer=(StableSPAM, {"lr": 1e-2}))
        trainer.train(**how)

    train()
    train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name in ("metrics.jsonl", "metrics-2.jsonl", "x.jsonl"):
        assert [*step_losses(tmp_path / name)] == [*range(1, 7)], name
    assert (tmp_path / "checkpoint-6" / "spike_monitor-x.pt").exists()


def test_a_broken_state_in_a_checkpoint_ends_no_training(tmp_path):
    def train(**how):
        callbacks = [SpikeCallback(say=None)]
        tiny_trainer(tmp_path, tiny_model(), callbacks=callbacks, optimizer=(StableSPAM, {"lr": 1e-2})).train(**how)

    train()
    (tmp_path / "checkpoint-3" / "spike_monitor.pt").write_bytes(b"no tensors")
    with pytest.warns(UserWarning, match="training goes on without it"):
        train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [*step_losses(tmp_path / "metrics.jsonl")] == [*range(1, 7)]


@pytest.mark.parametrize(
    "given", [{"path": 3}, {"ratio": math.nan}, {"window": 0}, {"evry": 3}, {"sinks": [3]}], ids=repr
)
def test_a_bad_argument_fails_where_the_callback_is_made(given):
    with pytest.raises((TypeError, ValueError), match="SpikeCallback") as problem:
        SpikeCallback(**given)
    assert len(str(problem.value).splitlines()) == 1
