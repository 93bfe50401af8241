import io
import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from train_support import quick, write_corpus

from evenstep import SCALE, SPAM, AdaClip, AdaGN, SpikeMonitor, StableSPAM, scale_groups, stabilize
from evenstep.errors import EvenstepError
from evenstep.telemetry.detect import Detector, Rolling
from evenstep.telemetry.lines import event_line, short
from evenstep.telemetry.probe import COLUMNS, Probe
from evenstep.telemetry.records import digits
from evenstep.telemetry.schema import read_records
from evenstep.telemetry.sinks import JsonlSink
from evenstep.train.config_io import to_tables
from evenstep.train.log import read_metrics
from evenstep.train.trainer import Run


class Kept:
    """A sink that keeps what it gets."""

    def __init__(self):
        self.records = []
        self.closed = 0

    def write(self, record):
        self.records.append(json.loads(json.dumps(record)))

    def close(self):
        self.closed += 1

    def of(self, kind):
        return [record for record in self.records if record.get("kind") == kind]


def test_the_rate_of_a_run_is_that_of_groups_without_a_scale():
    model, kept = model_of(), Kept()
    groups = [{"params": model[0].parameters(), "lr": 0.1, "lr_scale": 10.0}, {"params": model[1:].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.01)
    with SpikeMonitor(model, optimizer, sinks=[kept], say=None) as monitor:
        train(monitor, model, optimizer, 3)
    assert kept.of("window")[-1]["lr"] == 0.01


def model_of(width=6):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, width, bias=False))


OPTIMIZERS = {
    "stable_spam": lambda m: StableSPAM(m.parameters(), lr=1e-3),
    "spam": lambda m: SPAM(m.parameters(), lr=1e-3),
    "scale": lambda m: SCALE(scale_groups(m, last="2.weight"), lr=1e-3),
    "stabilize": lambda m: stabilize(torch.optim.SGD(m.parameters(), lr=1e-3), AdaClip(), AdaGN()),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-3),
}


def train(monitor, model, optimizer, steps, *, spike=None, accumulate=1, seed=0):
    """Steps on noise as gradients; ``spike``: (step, parameter name, factor)."""
    draw = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        for name, p in model.named_parameters():
            p.grad = None
            for _ in range(accumulate):
                noise = torch.randn(p.shape, generator=draw) * 1e-2
                p.grad = noise if p.grad is None else p.grad + noise
            if spike and spike[:2] == (step, name):
                p.grad *= spike[2]
        if monitor:
            monitor.observe(torch.tensor(3.0 + 0.01 * (step % 3)), rows=(8 * step, 8 * step + 8))
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_injected_spike_is_found_named_and_dated_and_nothing_else(name):
    model, sink = model_of(), Kept()
    optimizer = OPTIMIZERS[name](model)
    with SpikeMonitor(model, optimizer, sinks=[sink], say=None) as monitor:
        train(monitor, model, optimizer, 97, spike=(63, "2.weight", 1000.0))
    spikes = [event for event in sink.of("event") if event["event"] == "spike"]
    assert len(spikes) == 1
    (event,) = spikes
    assert event["step"] == 63 and event["count"] == 1 and event["tensors"][0]["name"] == "2.weight"
    assert 300 < event["tensors"][0]["ratio"] < 3000 and event["rows"] == [504, 512]
    assert event["loss_before"] == pytest.approx(3.02) and event["loss_after"] == pytest.approx(3.01)
    assert not [event for event in sink.of("event") if event["event"] not in ("spike", "reset")]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_calm_run_has_no_events(name):
    model, sink = model_of(), Kept()
    optimizer = OPTIMIZERS[name](model)
    with SpikeMonitor(model, optimizer, sinks=[sink], say=None) as monitor:
        train(monitor, model, optimizer, 120)
    assert not sink.of("event")
    assert sink.of("window")[-1]["spike_rate"] == 0 and sink.closed == 1


def test_one_wild_entry_among_thousands_is_a_spike():
    p = nn.Parameter(torch.zeros(200, 200))
    optimizer, sink = torch.optim.SGD([p], lr=0.1), Kept()
    monitor = SpikeMonitor(nn.ParameterList([p]), optimizer, sinks=[sink], say=None)
    for step in range(40):
        p.grad = torch.randn(200, 200, generator=torch.Generator().manual_seed(step))
        if step == 30:
            p.grad[3, 5] = 200.0
        optimizer.step()
    monitor.close()
    assert [(event["step"], event["event"]) for event in sink.of("event")] == [(31, "spike")]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_watching_changes_nothing(name):
    ends = []
    for watched in (False, True):
        model = model_of()
        optimizer = OPTIMIZERS[name](model)
        monitor = SpikeMonitor(model, optimizer, every=3, say=None) if watched else None
        train(monitor, model, optimizer, 20, spike=(15, "0.weight", 1e4))
        ends.append(([p.detach().clone() for p in model.parameters()], torch.rand(3)))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_measured_numbers_are_those_of_the_gradient():
    model, sink = model_of(), Kept()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = SpikeMonitor(model, optimizer, every=1, parameters_every=1, sinks=[sink], say=None)
    train(monitor, model, optimizer, 1, accumulate=3)
    norms = [float(p.grad.norm()) for p in model.parameters()]
    peaks = [float(p.grad.abs().max()) for p in model.parameters()]
    monitor.close()
    (record,) = sink.of("parameters")
    np.testing.assert_allclose(record["grad_norm"], norms, rtol=1e-3)
    np.testing.assert_allclose(record["grad_max"], peaks, rtol=1e-3)
    np.testing.assert_allclose(record["update_rms"], 1e-3, rtol=0.05)  # Adam's first step moves every entry by lr
    weights = [float(p.detach().square().mean().sqrt()) for p in model.parameters()]
    np.testing.assert_allclose(record["weight_rms"], weights, rtol=1e-2, atol=2e-3)
    assert sink.of("window")[0]["norms"] == digits([math.sqrt(sum(n * n for n in norms))])
    assert sink.of("start")[0]["names"] == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_are_measured_alike_with_and_without_kernels(fused, monkeypatch):
    if not fused:
        monkeypatch.setattr("evenstep.optim.fused.kernels_for", lambda device: "switched off")
    draw = torch.Generator().manual_seed(1)
    grads = [torch.randn(300, 300, generator=draw), torch.randn(7, generator=draw).bfloat16()]
    grads += [torch.randn(5, 5, generator=draw).double(), torch.randn(40, 30, generator=draw).t(), torch.zeros(3)]
    grads += [torch.full((9,), 1e25), torch.full((9,), 1e-30), torch.zeros(0), torch.tensor([1.0, math.nan, 2.0])]
    params = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    probe = Probe(torch.optim.SGD(params), 0)
    probe.before(weights=False)
    found = dict(zip(COLUMNS, probe.after(), strict=True))
    peaks = [float(g.abs().max()) if g.numel() else 0.0 for g in grads[:-1]]
    torch.testing.assert_close(found["grad_max"], torch.tensor([*peaks, math.inf]))
    norms = torch.tensor([float(g.double().norm()) for g in grads[:-1]])
    torch.testing.assert_close(found["grad_norm"][:-1], norms)
    assert not math.isfinite(found["grad_norm"][-1])


@pytest.mark.slow
def test_watching_costs_less_than_one_per_cent_of_a_step(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "telemetry_cost.py"
    words = [sys.executable, script, "--size", "60m", "--steps", "20", "--json", tmp_path / "cost.json"]
    subprocess.run(words, check=True)
    rows = json.loads((tmp_path / "cost.json").read_text())["rows"]
    assert len(rows) == 4 and all(row["share"] < 0.01 for row in rows), rows


def test_gss_is_the_papers_score_of_single_coordinates():
    p = nn.Parameter(torch.zeros(1))
    optimizer, sink = torch.optim.SGD([p], lr=0.1), Kept()
    monitor = SpikeMonitor(nn.ParameterList([p]), optimizer, sinks=[sink], say=None, parameters_every=1, every=1)
    sizes = [1.0] * 99 + [150.0]
    for size in sizes:
        p.grad = torch.tensor([-size])
        optimizer.step()
    monitor.close()
    last = sink.of("parameters")[-1]
    assert last["gss"] == digits([150 / np.mean(sizes)]) and last["gss_share"] == [1.0]
    assert sink.of("parameters")[-2]["gss_share"] == [0.0]


def test_nothing_waits_for_the_device_between_log_steps():
    waits = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                waits.append(op)
            return op(*args, **(kwargs or {}))

    for name in ("stable_spam", "adamw"):
        model = model_of()
        optimizer = OPTIMIZERS[name](model)
        if name == "adamw":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # torch's AdamW itself reads its step counts
        monitor = SpikeMonitor(model, optimizer, every=50, say=None)
        train(monitor, model, optimizer, 2)
        with Watch():
            train(monitor, model, optimizer, 20)
        assert not waits
    assert len(monitor.seen) == 22  # and nothing was drained


def test_nonfinite_gradients_are_told_apart_from_spikes():
    for name, expected in (("stable_spam", "skipped"), ("adagrad", "nonfinite")):
        model, sink = model_of(), Kept()
        optimizer = OPTIMIZERS[name](model)
        with SpikeMonitor(model, optimizer, sinks=[sink], say=None) as monitor:
            train(monitor, model, optimizer, 40, spike=(33, "0.bias", math.nan))
        events = [(e["step"], e["event"], e["tensors"][0]["name"]) for e in sink.of("event")]
        assert events == [(33, expected, "0.bias")]


def test_resets_are_dated():
    for build in (
        lambda m: StableSPAM(m.parameters(), reset_interval=7),
        lambda m: stabilize(torch.optim.Adam(m.parameters()), AdaGN(), reset_interval=7),
    ):
        model, sink = model_of(), Kept()
        optimizer = build(model)
        with SpikeMonitor(model, optimizer, sinks=[sink], say=None, every=4) as monitor:
            train(monitor, model, optimizer, 30)
        assert [event["step"] for event in sink.of("event")] == [7, 14, 21, 28]


def fed(losses, **options):
    detector = Detector(["p"], **options)
    events = []
    row = {name: np.array([1.0]) for name in ("grad_max", "grad_norm", "clipped", "gain")} | {"skipped": np.zeros(1)}
    for step, loss in enumerate(losses, 1):
        events += detector.feed(step, dict(row), loss, None)
    return events, detector


def test_a_loss_spike_ends_when_the_loss_is_back():
    calm = [3.0 + 0.02 * (i % 2) for i in range(60)]
    events, detector = fed([*calm, 9.0, 7.0, 5.0, 3.0, *calm])
    assert [(e["step"], e["event"]) for e in events] == [(61, "loss_spike"), (64, "recovered")]
    assert events[1]["steps"] == 3 and events[1]["peak"] == 9.0
    assert detector.spike_rates()[-1] == pytest.approx(3 / 124)


def test_a_loss_that_stays_up_has_not_recovered():
    events, _ = fed([3.0 + 0.02 * (i % 2) for i in range(60)] + [9.0] * 40)
    assert [event["event"] for event in events] == ["loss_spike"]


def test_growth_is_no_spike_and_a_long_spike_is_one():
    detector = Detector(["p"])
    other = {"grad_norm": np.ones(1), "clipped": np.zeros(1), "gain": np.ones(1), "skipped": np.zeros(1)}
    peaks = [1e-6 * 1.25**i for i in range(80)] + [1e-6 * 1.25**80] * 100 + [1e6] * 5 + [1e-6 * 1.25**80] * 20
    events = []
    for step, peak in enumerate(peaks, 1):
        events += detector.feed(step, {"grad_max": np.array([peak]), **other}, 3.0, None)
    assert [event["step"] for event in events] == [181]


def test_one_spike_does_not_hide_the_next():
    detector = Detector(["p"])
    other = {"grad_norm": np.ones(1), "clipped": np.zeros(1), "gain": np.ones(1), "skipped": np.zeros(1)}
    peaks = [1.0] * 30 + [1e6] + [1.0] * 20 + [30.0] + [1.0] * 20
    events = []
    for step, peak in enumerate(peaks, 1):
        events += detector.feed(step, {"grad_max": np.array([peak]), **other}, 3.0, None)
    assert [event["step"] for event in events] == [31, 52]


def test_a_record_of_many_steps_keeps_the_largest_and_the_mean():
    model, sink = model_of(), Kept()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with SpikeMonitor(model, optimizer, sinks=[sink], say=None) as monitor:
        train(monitor, model, optimizer, 10, spike=(4, "0.weight", 1000.0))
    (record,) = sink.of("parameters")
    draw = torch.Generator().manual_seed(0)
    grads = [[torch.randn(p.shape, generator=draw) * 1e-2 for p in model.parameters()] for _ in range(10)]
    first = [grad[0] * (1000 if step == 3 else 1) for step, grad in enumerate(grads)]
    assert record["grad_max"][0] == pytest.approx(max(float(g.abs().max()) for g in first), rel=1e-3)
    assert record["grad_norm"][0] == pytest.approx(np.mean([float(g.norm()) for g in first]), rel=1e-3)


def test_rolling_means_are_those_of_numpy():
    draw = np.random.default_rng(0)
    values = draw.normal(5, 2, (230, 3))
    values[draw.random(values.shape) < 0.2] = np.nan
    rolling = Rolling(3, 50)
    for row in values:
        rolling.push(row)
    np.testing.assert_allclose(rolling.mean(), np.nanmean(values[-50:], 0))
    np.testing.assert_allclose(rolling.deviation(), np.nanstd(values[-50:], 0))


def test_digits_are_four_and_json():
    draw = np.random.default_rng(0)
    values = 10 ** draw.uniform(-20, 20, 500) * draw.choice([-1, 1], 500)
    assert digits(values) == pytest.approx([float(f"{x:.4g}") for x in values], rel=1e-12)
    assert digits([0.0, math.nan, math.inf, 0.123456]) == [0.0, None, None, 0.1235]


def test_the_line_of_an_event():
    tensor = {"name": "model.layers.3.mlp.down_proj.weight", "ratio": 143.2, "clipped": 0.00012}
    event = {"event": "spike", "step": 812, "count": 1, "tensors": [tensor], "loss_before": 3.41, "loss_after": 3.44}
    assert event_line(event | {"rows": [51968, 52000]}) == (
        "step 812 spike x143 in layers.3.mlp.down_proj, 0.012 % clipped, loss 3.41 -> 3.44, data rows 51968-52000"
    )


def test_names_are_short_but_say_something():
    assert short("model.layers.3.mlp.down_proj.weight") == "layers.3.mlp.down_proj"
    assert (short("3.weight"), short("features.3.weight"), short("3.bias")) == (
        "3.weight",
        "features.3.weight",
        "3.bias",
    )


def test_events_are_told_and_many_are_counted():
    model, said = model_of(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = SpikeMonitor(model, optimizer, say=said.append, every=40)
    for base in range(0, 40, 8):
        train(monitor, model, optimizer, 8, spike=(8, "2.weight", 10.0 ** (3 + base)) if base > 20 else None, seed=base)
    train(monitor, model, optimizer, 40)
    monitor.close()
    assert len(said) == 2 and said[0].startswith("step 32 spike x") and "2" in said[0]


def test_names_lose_the_prefixes_of_wrappers():
    model = model_of()
    wrapped = nn.Module()
    wrapped.module = model
    monitor = SpikeMonitor(wrapped, torch.optim.SGD(model.parameters(), lr=0.1), say=None)
    assert monitor.names[0] == "0.weight"
    loose = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([loose], lr=0.1)
    assert SpikeMonitor(model, optimizer, say=None).names == ["group0.parameter0"]


@pytest.mark.parametrize(
    "options, message",
    [({"every": 0}, "every=0"), ({"ratio": -1.0}, "ratio"), ({"samples": -1}, "samples"), ({"window": 0}, "window")],
)
def test_bad_options_are_refused(options, message):
    model = model_of()
    with pytest.raises(ValueError, match=message):
        SpikeMonitor(model, torch.optim.SGD(model.parameters()), **options)
    with pytest.raises(TypeError, match="torch optimizer"):
        SpikeMonitor(model, model)


def test_after_close_the_optimizer_is_alone():
    model, sink = model_of(), Kept()
    optimizer = StableSPAM(model.parameters())
    monitor = SpikeMonitor(model, optimizer, sinks=[sink], say=None)
    train(monitor, model, optimizer, 5)
    monitor.close()
    count = len(sink.records)
    train(monitor, model, optimizer, 25)
    monitor.close()
    assert len(sink.records) == count and sink.of("window")[-1]["step"] == 5


def test_missing_gradients_and_embeddings_are_no_problem():
    model = nn.ModuleDict({"e": nn.Embedding(10, 4, sparse=True), "l": nn.Linear(4, 4), "unused": nn.Linear(2, 2)})
    sink, optimizer = Kept(), torch.optim.SGD(model.parameters(), lr=0.1)
    with SpikeMonitor(model, optimizer, sinks=[sink], say=None, every=2, parameters_every=2):
        for _ in range(4):
            optimizer.zero_grad()
            model["l"](model["e"](torch.tensor([1, 2]))).sum().backward()
            optimizer.step()
    last = sink.of("parameters")[-1]
    known = dict(zip(sink.of("start")[0]["names"], last["grad_norm"], strict=True))
    assert known["e.weight"] is None and known["unused.bias"] is None and known["l.weight"] > 0


def test_a_quantised_layer_whose_gradients_drown_is_told_of_once():
    model, sink = model_of(), Kept()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {"0": {"saturation": 0.1, "gradient_error": 0.2}}
    with SpikeMonitor(model, optimizer, sinks=[sink], say=None, every=5, lowbit=lambda: state) as monitor:
        train(monitor, model, optimizer, 10)
        state["0"]["gradient_error"] = torch.tensor(0.6)  # above 1 / sqrt(3)
        train(monitor, model, optimizer, 20)
    assert [record["layers"]["0"]["gradient_error"] for record in sink.of("lowbit")][:3] == [0.2, 0.2, 0.6]
    assert [(event["event"], event["step"]) for event in sink.of("event")] == [("useless", 15)]


# ---- a run ----


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def quiet(*_):
    pass


def telemetry_of(out):
    return [record for record in read_records(out / "metrics.jsonl") if "kind" in record]


def test_a_run_trains_the_same_with_and_without(corpus, tmp_path):
    ends = []
    for name, on in (("on", "true"), ("off", "false")):
        run = Run(quick(corpus, tmp_path / name, telemetry__enabled=on, optim__name="stable_spam"), say=quiet)
        run.fit()
        ends.append([p.detach() for p in run.model.parameters()])
        losses = [record.get("loss") for record in read_metrics(tmp_path / name / "metrics.jsonl")]
        ends[-1].append(torch.tensor([loss for loss in losses if loss is not None]))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)
    assert telemetry_of(tmp_path / "on") and not telemetry_of(tmp_path / "off")


@pytest.mark.parametrize("log_every", ["3", pytest.param("1", marks=pytest.mark.slow)])
def test_a_resumed_runs_telemetry_is_that_of_one_never_stopped(corpus, tmp_path, log_every):
    options = {"log__every": log_every, "telemetry__every": "3", "optim__name": "stable_spam", "train__steps": "30"}
    options |= {"checkpoint__every": "12", "checkpoint__keep": "9", "eval__every": "0"}
    whole = Run(quick(corpus, tmp_path / "whole", **options), say=quiet)
    whole.fit()
    run = Run(quick(corpus, tmp_path / "cut", **options), say=quiet)
    run.fit()
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-000030")  # as if it had been killed while saving the last
    resumed = Run.resume(tmp_path / "cut", say=quiet)
    resumed.fit()
    assert telemetry_of(tmp_path / "cut") == telemetry_of(tmp_path / "whole")


def test_the_rows_of_an_event_are_those_of_its_batch(corpus, tmp_path):
    run = Run(quick(corpus, tmp_path / "run", train__steps="40", optim__name="stable_spam", eval__every="0"), say=quiet)
    name, p = next((n, p) for n, p in run.model.named_parameters() if "layers.1.mlp.down" in n)
    p.register_hook(lambda grad: grad * 1000 if run.step_number == 29 else grad)
    run.fit()
    events = [record for record in telemetry_of(tmp_path / "run") if record.get("event") == "spike"]
    assert [(e["step"], e["tensors"][0]["name"], e["rows"]) for e in events if e["step"] > 25] == [
        (30, name, [116, 120])
    ]


def test_a_run_that_diverges_has_written_its_last_steps(corpus, tmp_path):
    run = Run(quick(corpus, tmp_path / "run", log__every="50", checkpoint__every="0", train__steps="60"), say=quiet)
    loss = run.model.loss
    run.model.loss = lambda *a, **k: loss(*a, **k) * (math.nan if run.step_number == 37 else 1)
    with pytest.raises(EvenstepError, match="loss"):
        run.fit()
    assert max(record["step"] for record in telemetry_of(tmp_path / "run")) == 37


def test_a_full_disk_stops_telemetry_and_not_the_training():
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sink, other = JsonlSink("/dev/null"), Kept()
    sink._file = Full()
    monitor = SpikeMonitor(model, optimizer, sinks=[sink, other], say=None, every=5)
    with pytest.warns(UserWarning, match="JsonlSink could not write .*No space left"):
        train(monitor, model, optimizer, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(monitor, model, optimizer, 20)
        monitor.close()
    assert other.of("window")[-1]["step"] == 26


def test_the_configuration_carries_telemetry(corpus, tmp_path):
    config = quick(corpus, tmp_path, telemetry__samples="0", telemetry__wandb="offline")
    assert to_tables(config)["telemetry"]["samples"] == 0 and config.telemetry.wandb == "offline"


def test_the_live_table_shows_the_worst_first():
    rich_console = pytest.importorskip("rich.console")
    from evenstep.telemetry.lines import worst_table

    names = ["model.layers.0.[red]q.weight", "b", "c"]
    record = {"first": 1, "step": 10, "ratio": [1.0, 30.0, None], "clipped": [0.0, 0.5, None]}
    out = io.StringIO()
    rich_console.Console(file=out, width=100).print(worst_table(names, record))
    lines = out.getvalue().splitlines()
    assert re.search(r"b +x30.0 +50.00%", lines[1]) and "[red]q" in lines[2] and lines[3].split() == ["c", "-", "-"]


def test_steps_may_begin_at_zero_and_jump():
    model, kept = model_of(), Kept()
    optimizer = torch.optim.AdamW(model.parameters())
    with SpikeMonitor(model, optimizer, sinks=[kept], say=None) as monitor:
        for step in (0, 1, 2, 5, 6):
            model.zero_grad()
            sum(p.sum() for p in model.parameters()).backward()
            monitor.observe(float(step), step=step)
            optimizer.step()
        with pytest.raises(ValueError, match=r"one number, got the shape \[3\]"):
            monitor.observe(torch.zeros(3))
    windows = [record for record in kept.records if record["kind"] == "window"]
    assert [(w["first"], w["step"], w["losses"]) for w in windows] == [(0, 2, [0.0, 1.0, 2.0]), (5, 6, [5.0, 6.0])]
    assert kept.records[0]["kind"] == "start" and kept.records[0]["step"] == 0


def test_a_tensor_that_wakes_up_is_judged_again():
    detector = Detector(["awake", "late"])
    for step in range(1, 200):
        values = np.array([1.0, float(step > 40)])
        values[1] *= 500.0 if step == 180 else 1.0
        row = {
            "grad_norm": values,
            "grad_max": values,
            "skipped": np.zeros(2),
            "clipped": np.zeros(2),
            "gain": np.ones(2),
        }
        events = detector.feed(step, row, 3.0, None)
        assert [event["event"] for event in events] == (["spike"] if step == 181 else []), step
    assert detector.spike_rates()[1] <= 2 / 199


def test_a_group_added_later_and_complex_gradients_stop_nothing():
    for optimizer_class in (torch.optim.AdamW, StableSPAM):
        model = model_of()
        first, *others = model.parameters()
        optimizer = optimizer_class([first])
        with SpikeMonitor(model, optimizer, say=None):
            sum(p.sum() for p in model.parameters()).backward()
            optimizer.step()
            optimizer.add_param_group({"params": others})
            optimizer.step()
    model = nn.ParameterDict({"c": nn.Parameter(torch.ones(4, dtype=torch.complex64))})
    optimizer = torch.optim.AdamW(model.parameters())
    with SpikeMonitor(model, optimizer, say=None):
        model["c"].grad = torch.ones_like(model["c"])
        optimizer.step()
