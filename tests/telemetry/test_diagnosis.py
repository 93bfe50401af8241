"""Each rule of a diagnosis on recorded numbers, and faults that are injected into small real runs."""

import json
import math
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from telemetry_support import write_run
from torch.nn import functional as F

from evenstep import SpikeMonitor, StableSPAM, cli
from evenstep.errors import EvenstepError
from evenstep.models import Llama, LlamaConfig
from evenstep.telemetry.diagnosis import as_json, as_text, diagnose, drift_finding, level_of, spike_findings
from evenstep.telemetry.foreign import _leveldb_records, load_log
from evenstep.telemetry.incidents import ALL, Evidence, Rise, cause_of, growth_before, loss_rises, rate_jumps
from evenstep.telemetry.runlog import run_of

# ---- rules, on recorded numbers ----

# Losses of the first 60 steps of a small LLaMA after its warm-up.
LOSSES = [
    3.19, 3.02, 2.96, 3.11, 2.98, 3.05, 2.87, 2.88, 3.01, 2.91, 2.96, 2.88, 2.78, 2.93, 2.84,
    2.72, 2.92, 2.79, 2.68, 2.83, 2.81, 2.86, 2.69, 2.73, 2.75, 2.84, 2.62, 2.71, 2.8, 2.66,
    2.79, 2.63, 2.67, 2.74, 2.61, 2.59, 2.72, 2.68, 2.54, 2.62, 2.7, 2.55, 2.66, 2.59, 2.48,
    2.63, 2.57, 2.51, 2.67, 2.39, 2.8, 2.32, 2.33, 2.61, 2.22, 2.42, 2.44, 2.72, 2.59, 2.59,
]  # fmt: skip


def event(kind, step, **more):
    return {"kind": "event", "event": kind, "step": step, **more}


def spike(step, ratio, *names, count=None, rows=None):
    tensors = [{"name": name, "ratio": ratio} for name in names or ("model.layers.1.mlp.up.weight",)]
    found = event("spike", step, count=count or len(tensors), tensors=tensors)
    return found | ({"rows": rows} if rows else {})


def run(losses=LOSSES, events=(), **more):
    """A run of one window with these losses, from step 1, and these events."""
    return run_of([{"kind": "window", "first": 1, "step": len(losses), "losses": losses, **more}, *events], "run")


def changed(**at):
    """`LOSSES` with other values from a step on: ``changed(s41=[6.0, 5.0])``."""
    losses = list(LOSSES)
    for step, values in at.items():
        first = int(step[1:]) - 1
        losses[first : first + len(values)] = values
    return losses


def first(losses=LOSSES, events=(), **more):
    return diagnose(run(losses, events, **more))[0]


def test_a_calm_run_is_one_sentence():
    [finding] = diagnose(run())
    assert finding.level == "good"
    assert finding.sentences == ["Calm: no gradient or loss spiked, and all of them were finite."]


def test_nothing_is_said_where_nothing_can_be_judged():
    assert diagnose(run_of([{"step": 10, "loss": 3.0}], "run")) == []
    assert level_of([]) == ""
    assert "more than 20 losses" in as_text(run_of([{"step": 10, "loss": 3.0}], "run"))


def test_a_rise_after_a_jump_of_the_learning_rate():
    rates = [1e-3] * 40 + [0.1] * 20
    found = first(changed(s42=[5.8, 6.1, 9.6, 9.8, 9.1, 6.3, 4.9] + [5.0] * 12), lrs=rates)
    assert found.sentences[0] == "Loss rose at 42; the learning rate had risen 100 times at 41."
    assert found.sentences[-1] == "The loss has not recovered from its last spike."
    assert (found.level, found.step, found.numbers["factor"], found.numbers["rate_step"]) == ("bad", 42, 100.0, 41)


def test_a_warm_up_and_a_decay_are_no_jumps():
    warm_up = [1e-3 * min(1.0, step / 10) for step in range(1, 40)]
    assert rate_jumps(range(1, 40), warm_up) == []
    assert rate_jumps(range(4), [1e-8, 1e-3, 1e-3, 1e-3]) == []  # the first rates of a warm-up
    assert growth_before(39, range(1, 40), [1.0] * 39) is None


def test_a_batch_unlike_the_others_is_told_from_a_bad_update():
    bad = spike(41, 170.0, "a", "b", count=25, rows=[1192, 1200])
    found = first(changed(s41=[7.6, 3.1]), [bad])
    assert found.sentences[0].startswith("Loss rose at 41; the batch of that step (rows 1192-1200) differs")
    assert found.rows == [1192, 1200] and found.kind == "loss_batch" and found.level == "spikes"
    # The same loss, after an update by one tensor, from which it recovers slowly.
    found = first(changed(s41=[7.6, 7.1, 6.5, 5.0, 4.0]), [spike(40, 576.0)])
    assert found.sentences[0] == "Loss rose at 41; the gradient of layers.1.mlp.up alone had spiked x576 at 40."
    assert found.tensors == ["model.layers.1.mlp.up.weight"]


def test_events_after_a_rise_are_its_consequences_and_those_before_it_are_not():
    events = [spike(30, 12.0), spike(43, 20.0), spike(44, 30.0), event("reset", 45), spike(46, 15.0)]
    findings = diagnose(run(changed(s42=[7.0, 6.9, 6.5, 5.0, 4.0]), events))
    assert "The 3 later events are consequences." in findings[0].sentences and findings[0].events == 3
    assert findings[1].sentences[0] == "Gradients spiked on 1 other step, at most x12 (layers.1.mlp.up, step 30)."
    assert len(findings) == 2


def test_rises_with_the_same_cause_are_one_finding():
    rows = [spike(step, 11.0, "a", rows=[8 * step, 8 * step + 8]) for step in (25, 51)]
    losses = changed(s25=[8.0], s51=[9.0])
    findings = diagnose(run(losses, rows))
    assert len(findings) == 1 and findings[0].rows == [408, 416]
    assert "The loss spiked 2 times and recovered within 1 step. The other was at 25." in findings[0].text


def test_a_growing_rate_is_named_where_no_jump_is():
    rates = [1e-3] * 30 + [1e-3 * 1.06**i for i in range(30)]
    found = first(changed(s50=[5.0, 5.5, 6.0] + [6.0] * 8), lrs=rates)
    assert found.sentences[0].startswith("Loss rose at 50; the learning rate had grown 3.03 times since 1.")


def test_an_early_warning_before_the_loss_is_the_cause():
    tensor = {"name": "layers.0", "value": 80.0, "usual": 20.0, "head": 1}
    warning = event("warning", 20, quantity="attention_max", count=1, tensors=[tensor])
    found = first(changed(s50=[5.0, 5.5, 6.0] + [6.0] * 8), [warning, spike(49, 12.0)])
    assert found.sentences[0].startswith("Loss rose at 50; 30 steps before, at 20, came the first warning: ")
    assert "qk_norm" in found.advice
    one, other = diagnose(run(events=[warning, warning | {"step": 25}, warning | {"quantity": "rms"}]))
    assert one.sentences[0].startswith("Early warning at step 20: ")
    assert one.sentences[1:] == ["The same was reported 1 later time."] and other.events == 1


def test_a_rise_that_nothing_explains_says_so():
    found = first(changed(s42=[7.0, 6.9, 6.5, 5.0, 4.0]))
    assert found.sentences[0] == "Loss rose at 42; nothing in the log before it explains it."


def test_a_loss_spike_of_the_log_counts_without_losses():
    events = [event("loss_spike", 30, loss_before=2.0, loss_after=9.0), event("recovered", 34, since=30, steps=4)]
    found = diagnose(run_of([{"kind": "window", "first": 1, "step": 40}, *events], "run"))[0]
    assert "recovered within 4 steps" in found.text and "It went from 2 to at most 9." in found.sentences


def test_the_40_events_after_lost_weights_are_consequences():
    lost = event("weights_nonfinite", 270, since=261, rows=[8320, 8352], nan=True, count=2, tensors=[{"name": "a"}] * 2)
    events = [spike(40, 39.0), event("nonfinite", 261, count=2, tensors=[{"name": "a"}] * 2, rows=[8320, 8352]), lost]
    later = [spike(280 + i, 50.0) for i in range(40)]
    window = {"kind": "window", "first": 1, "step": 400, "nonfinite": 140}
    findings = diagnose(run_of([window, *events, *later], "run"))
    assert findings[0].sentences[0] == (
        "Weights are NaN since step 261; the first bad batch is rows 8320-8352; the 40 later events are consequences."
    )
    assert findings[0].rows == [8320, 8352] and findings[0].events == 42
    assert [finding.kind for finding in findings] == ["weights_nonfinite", "spikes"]  # the spike of step 40


LOST = {
    "infinite": ([], {"nan": False}, "Weights are infinite since step 41; the first bad batch is rows 5-6."),
    "skipped": (
        [event("skipped", 41, count=3, tensors=[{"name": "a"}])],
        {"tensors": [{"name": "model.embed.weight"}]},
        "Weights are NaN since step 41; the optimizer skipped these gradients, so embed was not finite before them.",
    ),
    "one tensor": (
        [event("nonfinite", 41, count=1, tensors=[{"name": "model.b.weight"}])],
        {},
        "the first gradient that was not finite is that of b alone, and the loss of that step was finite (2.7)",
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_why_weights_are_lost(name):
    events, facts, sentence = LOST[name]
    lost = {"since": 41, "rows": [5, 6], "count": 1, "tensors": [{"name": "a"}]} | facts
    found = first(events=[*events, event("weights_nonfinite", 50, **lost)])
    assert sentence in found.sentences[0] and found.level == "bad"


def test_weights_that_a_rate_jump_ruined_name_the_jump():
    lost = event("weights_nonfinite", 55, since=50, rows=[5, 6], count=1, tensors=[{"name": "a"}])
    losses = [*changed(s42=[9.0] * 8)[:49], *[None] * 11]
    [found] = diagnose(run(losses, [spike(42, 80.0), lost], lrs=[1e-3] * 40 + [1.0] * 20))
    assert found.sentences[0].startswith(
        "Weights are NaN since step 50; the loss had risen at 42; the learning rate had risen 1000 times at 41"
    )
    assert found.advice.startswith("Go back to a checkpoint before step 41.")
    found = first(LOSSES[:49] + [None] * 11, [lost], lrs=[1e-3] * 49 + [1.0] * 11)
    assert "; the learning rate had risen 1000 times at 50; " in found.sentences[0]


def test_losses_that_are_not_finite_count_without_an_event():
    found = first(LOSSES[:50] + [None] * 10)
    assert found.sentences[0] == "The loss is not finite since step 51." and found.level == "bad"
    found = first(changed(s30=[None]))
    assert found.text == "The loss was not finite at step 30. The loss was not finite on 1 step."


def test_skipped_gradients_are_counted_by_the_windows():
    events = [event("skipped", step, count=1, tensors=[{"name": "a"}], rows=[step, step + 1]) for step in (30, 45)]
    found = first(events=events, nonfinite=7)
    assert found.text == (
        "The gradient of a was not finite at step 30, rows 30-31, and was skipped. "
        "Gradients were not finite on 7 steps. The others were at 45."
    )


def test_spikes_without_an_effect_are_grouped_and_an_outstanding_one_is_not():
    calm = [spike(step, 12.0 + step) for step in range(1, 9)]
    large = spike(30, 576.0, "model.layers.1.mlp.down_proj.weight", rows=[1, 2])
    one, rest = spike_findings([*calm, large, spike(31, 20.0)])
    assert one.sentences[:2] == [
        "The gradient of layers.1.mlp.down_proj alone spiked x576 at step 30, rows 1-2.",
        "The later event is a consequence.",
    ]
    assert rest.sentences[0] == "Gradients spiked on 8 other steps, at most x20 (layers.1.mlp.up, step 8)."
    assert "Most often in layers.1.mlp.up." in rest.sentences
    many = spike_findings([spike(100 * i, 100.0 + i) for i in range(1, 9)])
    assert len(many) == 2 and many[0].step == 800


def test_what_a_guard_did_is_told():
    events = [
        event("guard", 20 + i, bad_step=30 + i, action=action, reason="the loss is 9, usually 2", rows=[1, 2])
        for i, action in enumerate(["skip", "skip", "rewind"])
    ]
    [found] = diagnose(run(events=events))
    assert found.text == (
        "The guard skipped a step 2 times and rewound once, first at step 30: the loss is 9, usually 2."
    )


def test_a_loss_that_ends_above_its_lowest_level():
    slow = [4.0 - 0.05 * min(i, 40) + 0.02 * max(0, i - 40) + 0.001 * (i % 3) for i in range(100)]
    found = drift_finding(dict(enumerate(slow, 1)))
    assert found.level == "bad" and 35 <= found.step <= 50
    assert drift_finding(dict(enumerate(LOSSES, 1))) is None


def test_loss_rises_end_where_the_loss_is_back():
    losses = dict(enumerate(changed(s30=[8.0, 7.0, 5.0]), 1))
    [rise] = loss_rises(losses)
    assert (rise.step, rise.until, rise.peak) == (30, 33, 8.0)
    assert loss_rises(dict.fromkeys(range(100), 2.0)) == []
    tiny = {i: 10.0 * 0.5**i for i in range(60)} | {50: 1e-6}  # a loss that has converged doubles now and then
    assert loss_rises(tiny) == []


@pytest.mark.parametrize("seed", range(20))
def test_calm_losses_have_no_rises(seed):
    draw = np.random.default_rng(seed)
    losses = 3 + 6 * np.exp(-np.arange(400) / 60) + draw.normal(0, 0.15, 400) * (1 + draw.standard_gamma(1, 400) / 8)
    assert loss_rises(dict(enumerate(losses.tolist()))) == []
    assert drift_finding(dict(enumerate(losses.tolist()))) is None


def test_a_log_of_every_tenth_step_looks_back_as_many_records():
    train = [{"step": 10 * i, "loss": loss, "lr": 1e-3 if i < 40 else 0.1} for i, loss in enumerate(LOSSES, 1)]
    for record in train[44:]:
        record["loss"] = 8.0
    assert diagnose(run_of(train, "run"))[0].sentences[0] == (
        "Loss rose at 450; the learning rate had risen 100 times at 400."
    )


def test_the_cause_of_a_rise_is_the_newest_jump():
    log = Evidence.of(run(lrs=[1.0] * 30 + [5.0] * 5 + [50.0] * 25))
    assert cause_of(log, Rise(40, None, 2.0, 9.0)).step == 36


def test_damaged_events_do_not_break_a_diagnosis():
    odd = [
        event("spike", 30, tensors=[{"name": 5, "ratio": "x"}], rows="all", count="many"),
        event("weights_nonfinite", 40, since=[1], rows=[1], tensors=[{"name": None}], count={}),
        event("recovered", 41, since=[1]),
        event("guard", 42, action=[1], reason=3),
        event("</script>", 43),
        event("loss_spike", 20, loss_before="a", loss_after=10**400),
    ]
    whole = run(events=odd)
    assert diagnose(whole) and json.loads(as_json(whole))["level"] == "bad"


# ---- injected faults ----


def flip_exponent_bit(x):
    """The highest bit of the exponent of one entry, which multiplies it by 2**128."""
    x.view(-1).view(torch.int32)[5] ^= 1 << 30


def trained(path, fault, optimizer, at=70, steps=95):
    """A small LLaMA on few tokens, with one fault at step ``at``; returns the findings of its log."""
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2))
    optimizer = optimizer(model.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(0)
    names = dict(model.named_parameters())
    with SpikeMonitor(model, optimizer, sinks=[path], say=None) as monitor:
        for step in range(1, steps + 1):
            jumped = 100.0 if fault == "rate" and step >= at else 1.0
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * min(1.0, step / 10) * jumped
            # Text has 8 of the 64 tokens, and each one follows from the one before up to two bits.
            x = torch.randint(8, (8, 33), generator=draw)
            x[:, 1:] = (x[:, 1:] % 4 + x[:, :-1]) % 8
            if fault == "random" and step == at:
                x = torch.randint(64, (8, 33), generator=draw)
            if fault == "nan row" and step == at:
                model.get_parameter("model.embed_tokens.weight").data[3] = math.nan
            loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            if step == at and fault in ("tensor", "nan tensor"):
                grad = names["model.layers.1.mlp.down_proj.weight"].grad
                grad.mul_(1000.0) if fault == "tensor" else grad[3].fill_(math.nan)
            if step == at and fault in ("bit of a gradient", "bit of a weight"):
                p = names["model.layers.1.mlp.down_proj.weight"]
                flip_exponent_bit(p.grad if fault == "bit of a gradient" else p.data)
            monitor.observe(loss, rows=(8 * step, 8 * step + 8), step=step)
            optimizer.step()
    return diagnose(load_log(path))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, StableSPAM])
@pytest.mark.parametrize(
    ("fault", "sentence", "rows"),
    [
        ("tensor", "layers.1.mlp.down_proj alone spiked x", [560, 568]),
        ("random", "Loss rose at 70; the batch of that step (rows 560-568) differs", [560, 568]),
        ("rate", "Loss rose at 71; the learning rate had risen 100 times at 70.", None),
        ("bit of a gradient", "The gradient of layers.1.mlp.down_proj alone spiked x", [560, 568]),
        ("bit of a weight", "Loss rose at 71; between 10 and 80 a weight of layers.1.mlp.down_proj had become", None),
    ],
)
def test_an_injected_fault_is_named_first(tmp_path, fault, sentence, rows, optimizer):
    finding = trained(tmp_path / "metrics.jsonl", fault, optimizer)[0]
    assert sentence in finding.sentences[0] and str(finding.step).startswith("7")
    assert finding.rows == rows
    if fault == "tensor":
        assert "at step 70, rows 560-568" in finding.sentences[0]


def test_an_injected_nan_is_named_first(tmp_path):
    adamw = trained(tmp_path / "a.jsonl", "nan tensor", torch.optim.AdamW)[0]
    assert adamw.sentences[0].startswith(
        "Weights are NaN since step 70; the first gradient that was not finite is that of layers.1.mlp.down_proj alone"
    )
    skipped = trained(tmp_path / "b.jsonl", "nan tensor", StableSPAM)[0]
    assert skipped.sentences[0] == (
        "The gradient of layers.1.mlp.down_proj was not finite at step 70, rows 560-568, and was skipped."
    )
    row = trained(tmp_path / "c.jsonl", "nan row", torch.optim.AdamW)[0]
    assert row.sentences[0].startswith("Weights are NaN since step 7") and row.rows[0] == 8 * row.step
    written = trained(tmp_path / "d.jsonl", "nan row", StableSPAM)[0]
    assert "the optimizer skipped these gradients, so embed_tokens was not finite before them" in written.sentences[0]


def test_a_run_without_a_fault_has_no_finding_of_weight(tmp_path):
    findings = trained(tmp_path / "metrics.jsonl", None, torch.optim.AdamW)
    assert all(finding.kind in ("calm", "spikes") for finding in findings)


# ---- logs of other trainers ----


def history():
    """Losses of `LOSSES`, ten times too large from step 410 on, after a hundredfold rate at 400."""
    for i, loss in enumerate(LOSSES, 1):
        yield 10 * i, loss * (1 if i < 41 else 3), 1e-3 if i < 40 else 0.1, 1.0 + 0.01 * (i % 5)


SENTENCE = "Loss rose at 410; the learning rate had risen 100 times at 400."


def test_trainer_state_of_transformers(tmp_path):
    entries = [{"step": s, "loss": x, "learning_rate": lr, "grad_norm": g, "epoch": 0.1} for s, x, lr, g in history()]
    entries += [{"step": 405, "guard": "skip", "guard_reason": "the loss is 9, usually 3"}]
    entries += [{"step": 600, "eval_loss": 4.0}, {"step": 600, "train_runtime": 9.0, "train_loss": 99.0}]
    checkpoint = tmp_path / "out" / "checkpoint-600"
    checkpoint.mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-70").mkdir()
    (tmp_path / "out" / "checkpoint-70" / "trainer_state.json").write_text('{"log_history": []}')
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    for path in (checkpoint / "trainer_state.json", checkpoint, tmp_path / "out"):
        log = load_log(path)
        assert diagnose(log)[0].sentences[0] == SENTENCE
        assert log.series("val_loss") == ([600], [4.0]) and max(log.losses()[1]) < 99
        assert "It lacks the numbers of single tensors and data rows" in log.notes[0]
        assert "of one in 10 steps" in log.notes[0]
        assert "The guard skipped a step once, first at step 405: the loss is 9, usually 3." in as_text(log)


def test_a_nan_of_transformers_is_found(tmp_path):
    entries = [{"step": i, "loss": 2.0, "grad_norm": 1.0} for i in range(1, 50)]
    entries += [{"step": 50 + i, "loss": math.nan, "grad_norm": math.nan} for i in range(5)]
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"log_history": entries}))
    finding = diagnose(load_log(path))[0]
    assert finding.sentences[0].startswith("The loss is not finite since step 50")
    assert finding.level == "bad" and ALL not in finding.text


@pytest.mark.parametrize("heads", ["step,loss,lr", "Step;train/loss;learning-rate", "iteration,train_loss,lr-AdamW"])
def test_csv(tmp_path, heads):
    mark = ";" if ";" in heads else ","
    lines = [heads, *(mark.join(map(str, row[:3])) for row in history()), mark * 2]
    path = tmp_path / "metrics.csv"
    path.write_text("\ufeff" + "\n".join(lines))
    log = load_log(path)
    assert diagnose(log)[0].sentences[0] == SENTENCE
    assert "It lacks gradient norms" in log.notes[0]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(tmp_path / "runs" / "one")
    for step, loss, rate, _ in history():
        writer.add_scalar("train/loss", loss, step)
        writer.add_scalar("train/learning_rate", rate, step)
    writer.close()
    assert diagnose(load_log(tmp_path))[0].sentences[0] == SENTENCE


WANDB = """
import json, sys, wandb
own = wandb.init(project="x", dir=sys.argv[1], mode="offline", settings=wandb.Settings(silent=True))
for step, loss, rate, norm in json.load(sys.stdin):
    padding = {f"other/{i}": "x" * 40 for i in range(20)}  # records that cross the blocks of 32 KiB
    names = {"train/loss": loss, "train/learning_rate": rate, "train/grad_norm": norm, "train/global_step": step}
    own.log(names | padding)
own.finish()
"""


def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb")
    # A process of its own: wandb writes the last block of the file when the program ends.
    command = [sys.executable, "-c", WANDB, str(tmp_path)]
    subprocess.run(command, input=json.dumps([*history()]), text=True, check=True, capture_output=True, timeout=120)
    log = load_log(tmp_path)
    assert diagnose(log)[0].sentences[0] == SENTENCE and len(log.train) == 60


def test_records_of_a_wandb_file_that_cross_its_blocks():
    header, block = struct.Struct("<IHB"), 32768
    whole = b"a" * (block - 7 - 7 - 3)  # leaves 3 bytes in the first block, too few for a header
    pieces = b"b" * (block - 7), b"c" * (block - 7), b"d" * 5
    data = b":W&B" + b"\xe1\xbe\x00" + header.pack(0, len(whole), 1) + whole + bytes(3)
    for kind, piece in zip((2, 3, 4), pieces, strict=True):
        data += header.pack(0, len(piece), kind) + piece
    assert list(_leveldb_records(data)) == [whole, b"".join(pieces)]
    assert list(_leveldb_records(b":W&B")) == []


@pytest.mark.parametrize(("module", "file"), [("tensorboard", "events.out.tfevents.1"), ("wandb", "run.wandb")])
def test_a_missing_package_is_one_clear_line(tmp_path, monkeypatch, module, file):
    for name in [*sys.modules]:
        if name.split(".")[0] == module:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(EvenstepError, match=f"needs {module}; pip install {module}"):
        load_log(tmp_path)


MISTAKES = {
    "no.csv": ("a,b\n1,2\n", "has no steps under a name that evenstep knows; its numbers are: a, b"),
    "losses.csv": ("step,b\n1,2\n", "has no training losses"),
    "x.json": ("{", "is no JSON"),
    "y.json": ("[]", "has no log_history"),
    "z.wandb": ("", "has no steps"),
    "z.txt": ("hello", "is no metrics.jsonl"),
}


@pytest.mark.parametrize("name", [*MISTAKES, "nowhere", "."])
def test_other_files_are_one_line(tmp_path, capsys, name):
    text, message = MISTAKES.get(name, (None, "does not exist" if name == "nowhere" else "holds no log"))
    if name.endswith(".wandb"):
        pytest.importorskip("wandb")
    if text is not None:
        (tmp_path / name).write_text(text)
    status = cli.main(["diagnose", str(tmp_path / name)])
    err = capsys.readouterr().err
    assert status == 2 and message in err and err.count("\n") == 1


# ---- the command ----


def test_the_command_prints_findings_advice_and_rows(tmp_path, capsys):
    path = write_run(tmp_path / "run")
    (path / "config.toml").write_text('[data]\nsource = "stdlib"\n')
    assert cli.main(["diagnose", str(path)]) == 0
    out = capsys.readouterr().out
    assert "x143" in out and "  Try: " in out and f"evenstep rows {path} 3264-3296" in out
    assert cli.main(["diagnose", str(path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["findings"][0]["text"] and data["level"] == data["findings"][0]["level"]


def test_the_report_draws_the_log_of_another_trainer(tmp_path, capsys):
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n" + "\n".join(f"{step},{loss}" for step, loss, _, _ in history()))
    assert cli.main(["report", str(path)]) == 0
    assert "Loss rose at 410" in (tmp_path / "report.html").read_text() and "It lacks" in capsys.readouterr().out
