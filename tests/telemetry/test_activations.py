"""Early warnings: what the forward pass shows, and that nothing of the run changes by it."""

import copy
import math
import shutil
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from telemetry_support import write_run
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from train_support import quick, write_corpus

from evenstep import SpikeMonitor, StableSPAM
from evenstep.models import Llama, LlamaConfig
from evenstep.telemetry import activations
from evenstep.telemetry.activations import ActivationProbe, attention_numbers, find_blocks, unit_numbers
from evenstep.telemetry.detect import Warnings
from evenstep.telemetry.lines import event_line
from evenstep.telemetry.runlog import load_run
from evenstep.telemetry.schema import BLOCK_KEYS, HEAD_KEYS, OUTPUT_KEYS, read_records, to_line
from evenstep.telemetry.sinks import scalars
from evenstep.telemetry.trouble import Troubles
from evenstep.train.trainer import Run
from tests.optim.test_sharded import run, setup

SHAPE = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2)


def llama(**options):
    torch.manual_seed(0)
    return Llama(LlamaConfig(**(vars(SHAPE) | options)))


def tokens(rows=2, length=13):
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(1))


def numbers(sample):
    """(module, key) -> its vector."""
    layout, flat = sample
    parts = flat.split([n for _, _, n in layout])
    return {(module, key): part for (module, key, _), part in zip(layout, parts, strict=True)}


def probe_of(model):
    return ActivationProbe(model, Troubles("test"))


class Kept(list):
    write = list.append

    def close(self):
        pass

    def of(self, kind):
        return [record for record in self if record["kind"] == kind]


# ---- the numbers ----


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
def test_attention_is_measured_as_if_it_were_written_out(mask, heads):
    draw = torch.Generator().manual_seed(0)
    q = 4 * torch.randn(2, 4, 9, 8, generator=draw)
    k, v = (4 * torch.randn(2, heads, 9, 8, generator=draw) for _ in range(2))
    seen = torch.ones(9, 9).tril().bool() if mask != "none" else torch.ones(9, 9).bool()
    options = {
        "none": {},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": seen},
        "float": {"attn_mask": torch.zeros(9, 9).masked_fill(~seen, torch.finfo(torch.float32).min)},
    }[mask]
    found = attention_numbers(q, k, v, scale=0.3, enable_gqa=heads != 4, **options)
    logits = (q[0] @ k[0].repeat_interleave(4 // heads, 0).mT * 0.3).masked_fill(~seen, -math.inf)
    p = logits.softmax(-1)
    torch.testing.assert_close(found["attention_max"], logits.amax((1, 2)))
    torch.testing.assert_close(found["attention_logsumexp"], logits.logsumexp(-1).mean(-1))
    torch.testing.assert_close(found["attention_entropy"], -(p * p.clamp(min=1e-30).log()).sum(-1).mean(-1))


def test_a_query_without_a_key_does_not_count():
    q = torch.ones(1, 1, 3, 4)
    mask = torch.tensor([[False, False, False], [True, True, False], [True, True, True]])
    found = attention_numbers(q, q, q, mask)
    assert float(found["attention_max"]) == 2.0
    assert float(found["attention_entropy"]) == pytest.approx((math.log(2) + math.log(3)) / 2)


def test_long_sequences_are_sampled_up_to_the_last_query():
    q = torch.zeros(1, 1, 1000, 2)
    q[0, 0, -1] = 30.0
    found = attention_numbers(q, torch.ones(1, 1, 1000, 2), q, is_causal=True)
    assert float(found["attention_max"]) == pytest.approx(60 / math.sqrt(2))


def test_dead_and_saturated_units_are_those_that_are_so_for_all_tokens():
    z = torch.tensor([[[-9.0, 9.0, -9.0, 0.0], [-8.0, 8.0, 9.0, 0.1]]])
    found = unit_numbers(z, 4.6)
    assert float(found["dead"]) == 0.25 and float(found["saturated"]) == 0.25


@pytest.mark.parametrize("chunk", [None, 4])
def test_a_pass_of_the_model_shows_all_keys_of_every_block_and_of_the_head(chunk):
    model = llama()
    probe = probe_of(model)
    probe.arm()
    x = tokens()
    model.loss(x, x, chunk=chunk).backward()
    found = numbers(probe.take())
    blocks = [f"model.layers.{i}" for i in range(2)]
    assert set(found) == {(b, key) for b in blocks for key in HEAD_KEYS + BLOCK_KEYS} | {
        ("lm_head", key) for key in OUTPUT_KEYS
    }
    assert all(len(x) == (2 if key in HEAD_KEYS else 1) for (_, key), x in found.items())
    with torch.no_grad():
        hidden = model.model.embed_tokens(x)
        cos, sin = model.model._rotation(torch.arange(13))
        for name, block in zip(blocks, model.model.layers, strict=True):
            hidden = block(hidden, cos, sin)
            torch.testing.assert_close(found[name, "rms"][0], hidden[0].square().mean().sqrt())
        logits = model(x)[0]
    torch.testing.assert_close(found["lm_head", "logit_max"][0], logits.abs().max())
    torch.testing.assert_close(found["lm_head", "logsumexp"][0], logits.logsumexp(-1).mean())


def test_only_the_first_pass_after_arming_is_measured(monkeypatch):
    model = llama()
    probe = probe_of(model)
    x = tokens()
    model(x)
    assert probe.take() is None
    probe.arm()
    model.eval()
    model(x.flip(0))
    model.train()
    model(x)
    first = numbers(probe.take())
    probe.arm()
    calls = []
    measure = activations.attention_numbers
    monkeypatch.setattr(activations, "attention_numbers", lambda *a, **k: calls.append(1) or measure(*a, **k))
    for each in (x, x.flip(1)):  # micro batches
        model(each)
    second = numbers(probe.take())
    assert len(calls) == 2  # blocks, not micro batches
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


class Other(nn.Module):
    """A block of another library, with softmax or MultiheadAttention."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        if self.kind == "mha":
            return self.attention(x, x, x, need_weights=False)[0]
        q = self.linear(x).view(*x.shape[:2], 2, 4).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, q, q) if self.kind == "sdpa" else (q @ q.mT / 2).softmax(-1) @ q
        return torch.relu(y.transpose(1, 2).flatten(2)), None


@pytest.mark.parametrize("kind", ["sdpa", "softmax", "mha"])
def test_blocks_of_other_models_are_seen_as_far_as_their_functions_are(kind):
    torch.manual_seed(0)
    block = Other(kind)
    model = nn.ModuleDict({"h": nn.ModuleList([block])})
    probe = probe_of(model)
    probe.arm()
    x = torch.randn(2, 5, 8)
    block(x)
    found = {key for _, key in numbers(probe.take())}
    assert found == {"rms", "kurtosis"} | (set() if kind == "mha" else {*HEAD_KEYS, "dead", "saturated"})


def test_softmax_and_sdpa_agree():
    torch.manual_seed(0)
    found = []
    block, x = Other("sdpa"), torch.randn(2, 5, 8)
    for kind in ("sdpa", "softmax"):
        block.kind = kind
        probe = probe_of(nn.ModuleList([block]))
        probe.arm()
        block(x)
        found.append(numbers(probe.take()))
        probe.close()
    assert all(torch.allclose(found[0][key], found[1][key]) for key in found[0])


# ---- nothing changes ----


def trained(monitored, *, steps=6, compile_="", checkpointing=False, chunk=None):
    model = llama()
    model.activation_checkpointing = checkpointing
    if compile_ == "blocks":
        for block in model.model.layers:
            block.compile(backend="aot_eager")
    optimizer = StableSPAM(model.parameters(), lr=1e-2)
    sink = Kept()
    monitor = SpikeMonitor(model, optimizer, sinks=sink, say=None, activations=2) if monitored else None
    if compile_ == "body":
        model.model.compile(backend="aot_eager")
    losses = []
    for step in range(steps):
        x = tokens().roll(step, 1)
        loss = model.loss(x, x.roll(1, 1), chunk=chunk)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    if monitor:
        monitor.close()
    return [*losses, *(p.detach() for p in model.parameters())], sink


@pytest.mark.parametrize(
    "options", [{}, {"checkpointing": True}, {"chunk": 5}], ids=["plain", "checkpointing", "chunk"]
)
def test_a_training_is_the_same_to_the_last_bit(options):
    without, _ = trained(False, **options)
    measured, sink = trained(True, **options)
    assert all(torch.equal(a, b) for a, b in zip(without, measured, strict=True))
    records = sink.of("activations")
    assert [record["step"] for record in records] == [2, 4, 6]
    assert set(records[0]["modules"]["model.layers.1"]) == {*HEAD_KEYS, *BLOCK_KEYS}


def test_checkpointing_measures_what_a_plain_pass_measures():
    plain, recomputed = (trained(True, checkpointing=on)[1].of("activations") for on in (False, True))
    assert plain == recomputed


@pytest.mark.slow
@pytest.mark.parametrize("place", ["blocks", "body"])
def test_compiled_blocks_are_left_alone_and_one_line_says_so(place):
    torch._dynamo.reset()
    without, _ = trained(False, compile_=place)
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        measured, sink = trained(True, compile_=place)
    assert all(torch.equal(a, b) for a, b in zip(without, measured, strict=True))
    (line,) = [str(one.message) for one in said if "forward pass" in str(one.message)]
    assert "torch.compile" in line
    assert all(set(record["modules"]) == {"lm_head"} for record in sink.of("activations"))


def test_selective_checkpointing_is_not_disturbed():
    policy = [torch.ops.aten.mm.default, torch.ops.aten.bmm.default]

    def gradients(measured):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        probe = probe_of(nn.ModuleList([block]))
        if measured:
            probe.arm()
        x = torch.ones(2, 3, 8, requires_grad=True)
        contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            checkpoint(block, x, use_reentrant=False, context_fn=contexts).sum().backward()
        assert any("selective" in str(one.message) for one in said) == measured
        return x.grad, block[0].weight.grad

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))


def test_nothing_waits_for_the_device():
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = SpikeMonitor(model, optimizer, say=None, activations=1, every=50, samples=0)
    x = tokens()
    model.loss(x, x).backward()
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss = model.loss(x, x)
        loss.backward()
        sample = monitor.activations.take()
    assert sample is not None
    waits = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero")
    assert not [event.key for event in profile.key_averages() if event.key in waits]


def test_a_failed_pass_leaves_no_mode_behind_and_a_failed_measurement_is_told_once(monkeypatch):
    model = llama()
    probe = probe_of(model)
    probe.arm()
    broken = model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens())
    assert torch.overrides._get_current_function_mode() is None
    broken.remove()
    monkeypatch.setattr("evenstep.telemetry.activations.attention_numbers", lambda *_, **__: 1 / 0)
    for _ in range(2):
        probe.arm()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model(tokens())
    assert {key for _, key in numbers(probe.take())} == {*BLOCK_KEYS, *OUTPUT_KEYS} and not said


def test_a_copy_of_the_model_is_not_measured_and_close_removes_the_hooks():
    model = llama()
    probe = probe_of(model)
    twin = copy.deepcopy(model)
    hooks = [hook for m in twin.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert len(hooks) == 6 and all(hook.act is activations._nothing for hook in hooks)
    twin(tokens())
    probe.arm()
    probe.close()
    model(tokens())
    assert probe.take() is None and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---- warnings ----


def fed(values, quantity="attention_max", name="layers.0"):
    judge, events = Warnings(), []
    for step, value in enumerate(values):
        events += judge.feed(step, quantity, [name, "calm"], np.array([value, 1.0]), np.array([3, 0]))
    return events


def test_growth_beyond_the_limit_warns_once_until_it_is_calm_again():
    events = fed([10.0] * 10 + [60.0, 70.0, 80.0, 40.0, 90.0] + [10.0] * 5 + [60.0])
    assert [event["step"] for event in events] == [10, 20]
    assert events[0]["tensors"] == [{"name": "layers.0", "value": 60.0, "usual": 10.0, "head": 3}]
    assert events[0]["quantity"] == "attention_max" and events[0]["count"] == 1


@pytest.mark.parametrize(
    "values",
    [[60.0] * 30, [1.0 + i for i in range(49)], [0.1] * 20 + [45.0], [60.0, math.nan, 60.0, math.inf], [1.0, 99.0]],
    ids=["always there", "below the limit", "a jump below it", "not finite", "too few"],
)
def test_neither_a_large_nor_a_growing_number_alone_warns(values):
    assert not fed(values)


def test_a_resumed_judge_goes_on():
    values = [10.0] * 10 + [60.0, 70.0]
    judge = Warnings()
    for step, value in enumerate(values):
        if step == 11:
            state, judge = judge.state(), Warnings()
            judge.load(state)
        events = judge.feed(step, "attention_max", ["a"], np.array([value]))
        assert len(events) == (step == 10)


def test_a_saved_monitor_keeps_the_history_of_its_warnings(tmp_path):
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = (SpikeMonitor(model, optimizer, say=None, activations=5) for _ in range(2))
    for step in range(8):
        first.warnings.feed(step, "rms", ["layers.0"], np.array([1.0 if step < 7 else 50.0]))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.warnings.open == {"rms": ["layers.0"]}
    assert second.warnings.history["rms"].tolist() == [[1.0]] * 7 + [[50.0]]
    old = {key: value for key, value in first.state_dict().items() if key != "warnings"}
    second.load_state_dict(old)  # of an older version


def test_growing_attention_and_large_updates_are_events_with_their_place():
    model, sink = llama(), Kept()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    said = []
    monitor = SpikeMonitor(model, optimizer, sinks=sink, say=said.append, activations=1, every=1, samples=8)
    x = tokens()
    for step in range(1, 13):
        if step == 9:
            with torch.no_grad():
                model.model.layers[1].self_attn.q_proj.weight.mul_(1e4)
        if step == 11:
            optimizer.param_groups[0]["lr"] = 1e3
        loss = model.loss(x, x)
        loss.backward()
        monitor.observe(rows=(step, step + 1))
        optimizer.step()
        optimizer.zero_grad()
    monitor.close()
    events = [event for event in sink.of("event") if event["event"] == "warning"]
    first = events[0]
    assert first["step"] == 9 and first["quantity"] == "attention_max" and first["rows"] == [9, 10]
    assert [tensor["name"] for tensor in first["tensors"]] == ["model.layers.1"] and "head" in first["tensors"][0]
    assert any(event["quantity"] == "update_ratio" and event["step"] == 11 for event in events)
    assert event_line(first).startswith("step 9 warning: attention logit") and event_line(first) in said
    assert "in layers.1 head" in event_line(first)


def test_a_model_without_blocks_is_told_of_and_trains():
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="no blocks"):
        monitor = SpikeMonitor(model, optimizer, say=None, activations=1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    monitor.close()
    assert not find_blocks(model) and monitor.lost == 0


# ---- records and runs ----


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def quiet(*_):
    pass


def test_a_run_measures_by_default_trains_the_same_and_its_log_is_read_back(corpus, tmp_path):
    ends = []
    for every in ("20", "0"):
        out = tmp_path / every
        run = Run(quick(corpus, out, telemetry__activations=every, train__steps="40", eval__every="10"), say=quiet)
        run.fit()
        ends.append([p.detach() for p in run.model.parameters()])
    assert run.config.telemetry.activations == 0
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    log = load_run(tmp_path / "20")
    assert [record["step"] for record in log.activations] == [20, 40] and not log.notes
    found = scalars(log.activations[0])
    assert f"activations/model.layers.0/{HEAD_KEYS[0]}" in found and "activations/lm_head/logit_rms" in found
    assert not load_run(tmp_path / "0").activations and not [e for e in log.events if e["event"] == "warning"]


def test_a_resumed_run_has_the_measurements_of_one_never_stopped(corpus, tmp_path):
    options = {"telemetry__activations": "5", "train__steps": "30", "log__every": "3", "eval__every": "0"}
    options |= {"checkpoint__every": "12", "checkpoint__keep": "9", "train__micro_batch_size": "2"}
    Run(quick(corpus, tmp_path / "whole", **options), say=quiet).fit()
    Run(quick(corpus, tmp_path / "cut", **options), say=quiet).fit()
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-000030")
    Run.resume(tmp_path / "cut", say=quiet).fit()
    logs = [
        [record for record in read_records(tmp_path / name / "metrics.jsonl") if record.get("kind")]
        for name in ("whole", "cut")
    ]
    assert logs[0] == logs[1]
    assert [r["step"] for r in logs[0] if r["kind"] == "activations"] == [5, 10, 15, 20, 25, 30]


def test_a_damaged_record_is_left_out_and_counted(tmp_path):
    out = write_run(tmp_path / "run", steps=20)
    with open(out / "metrics.jsonl", "a") as file:
        file.write(to_line({"kind": "activations", "step": 20, "modules": {"a": 3}}))
    log = load_run(out)
    assert not log.activations and any("did not fit" in note for note in log.notes)


# ---- several processes ----


def _sharded_worker(rank, world, path, mode, out):
    setup(rank, world, path)
    model = llama()
    if mode == "fsdp":
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = dist.init_device_mesh("cpu", (world,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "loss")
        loss_of = model.loss
    else:
        ddp = nn.parallel.DistributedDataParallel(model)
        loss_of = lambda x, y: F.cross_entropy(ddp(x).flatten(0, 1), y.flatten())  # noqa: E731
    measured(model, loss_of, f"{out}/{mode}{rank}.jsonl")


def measured(model, loss_of, path):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with SpikeMonitor(model, optimizer, sinks=path, say=None, activations=2) as monitor:
        for step in range(1, 7):
            x = tokens()
            loss_of(x, x.roll(1, 1)).backward()
            monitor.observe(step=step)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_measure_what_one_does(tmp_path, mode):
    model = llama()
    measured(model, model.loss, tmp_path / "single.jsonl")
    run(_sharded_worker, tmp_path, mode, str(tmp_path))
    single, several = (
        [record for record in read_records(tmp_path / f"{name}.jsonl") if record["kind"] == "activations"]
        for name in ("single", f"{mode}0")
    )
    assert not (tmp_path / f"{mode}1.jsonl").exists()  # one writes
    assert [record["step"] for record in several] == [2, 4, 6]
    for one, other in zip(single, several, strict=True):
        assert one["modules"].keys() == other["modules"].keys()
        for name, module in one["modules"].items():
            for key, value in module.items():
                np.testing.assert_allclose(other["modules"][name][key], value, rtol=5e-3, atol=1e-5)
