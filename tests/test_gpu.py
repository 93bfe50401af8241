"""What a GPU has to prove, in about two minutes: ``pytest -m gpu tests/test_gpu.py``.

Kernels and plain code take the same way, a captured step replays as steps, no step waits for the device, low-bit layers
compute what they compute on a CPU, a run resumes to the bit. ``EVENSTEP_GPU_TEST_DEVICE=cpu`` runs the same tests on a
CPU, to try the tests themselves; those of graphs and of synchronisation are left out there.
"""

import contextlib
import functools
import math
import os

import pytest
import torch
from torch import nn
from train_support import quick, write_corpus

from evenstep import (
    AGC,
    SCALE,
    SPAM,
    AdaClip,
    AdaGN,
    AutoClip,
    GradientStabilizer,
    NormClip,
    SkipStep,
    SpikeClip,
    SpikeMonitor,
    StableSPAM,
    ValueClip,
    ZClip,
    quantize_,
    stabilize,
)
from evenstep.kernels import kernels_for
from evenstep.lowbit import FORMATS, RECIPES, fake_quantize
from evenstep.models import Llama, llama_config
from evenstep.telemetry.sinks import Sink
from evenstep.train.log import read_metrics
from evenstep.train.trainer import Run

DEVICE = os.environ.get("EVENSTEP_GPU_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.gpu
on_gpu_alone = pytest.mark.skipif(DEVICE == "cpu", reason="has no meaning on a CPU")

FP32, BF16 = torch.float32, torch.bfloat16
SHAPES = {"embedding": (70, 48), "hidden": (64, 300), "last": (40, 48), "vector": (33,)}
STEPS = 8
SPIKE, NAN = 4, 6  # the steps with a spike and with a gradient that is not finite


@pytest.fixture(autouse=True)
def calm():
    """Every test frees what it held, and leaves torch's debugging as it was."""
    torch.manual_seed(0)
    yield
    if DEVICE != "cpu":
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def no_waiting():
    """Within it an operation that waits for the device raises RuntimeError."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- optimizers ----


def scale(params, **options):
    return SCALE([{"params": [p], "kind": kind} for p, kind in zip(params, SHAPES, strict=True)], **options)


def behind(*transforms, **more):
    """AdamW behind transforms; ``fused`` is the option of `stabilize` itself."""

    def make(params, lr=1e-3, fused=None, capturable=False):
        adamw = torch.optim.AdamW(params, lr=lr, fused=True, capturable=capturable)
        return stabilize(adamw, *transforms, fused=fused, **more)

    return make


OPTIMIZERS = {
    "stable_spam": functools.partial(StableSPAM, weight_decay=0.1, gamma3=0.5, reset_interval=5, total_steps=STEPS),
    "stable_spam_official": functools.partial(StableSPAM, gamma3=0.5, reset_interval=5, variant="official"),
    "spam": functools.partial(SPAM, weight_decay=0.1, threshold=2, clip_start=1, reset_interval=5, warmup_steps=3),
    "spam_official": functools.partial(SPAM, threshold=2, clip_start=1, reset_interval=5, variant="official"),
    "scale": functools.partial(scale, weight_decay=0.1),
}
NOT_CAPTURABLE = {"spam_sparse": functools.partial(SPAM, density=0.5, clip_start=1, reset_interval=5)}
TRANSFORMS = {
    "adaclip_adagn": behind(AdaClip(), AdaGN()),
    "gradient_stabilizer": behind(GradientStabilizer()),
    "agc": behind(AGC()),
    "norm_clip": behind(NormClip()),
    "value_clip": behind(ValueClip()),
    "zclip": behind(ZClip()),
    "autoclip": behind(AutoClip()),
}
ON_THE_HOST = {  # they count on the host, or read the base's state there
    "spike_clip": behind(SpikeClip(threshold=2, clip_start=1)),
    "skip_step": behind(SkipStep()),
    "nonfinite_zero": behind(AdaClip(), nonfinite="zero", reset_interval=5),
}
EVERY = OPTIMIZERS | NOT_CAPTURABLE | TRANSFORMS | ON_THE_HOST
LOW = [
    (name, dtype, options)
    for name in ("stable_spam", "spam", "spam_sparse", "scale")
    for dtype, options in (
        (BF16, {"rounding": "nearest"}),
        (BF16, {"rounding": "stochastic"}),
        (BF16, {"rounding": "kahan"}),
        (FP32, {"state": "bf16"}),
        (BF16, {"state": "bf16", "rounding": "stochastic"}),
    )
]
CASES = [(name, FP32, {}) for name in EVERY] + LOW
every_case = pytest.mark.parametrize(
    ("name", "dtype", "options"),
    CASES,
    ids=["-".join(map(str, (n, str(d).removeprefix("torch."), *o.values()))) for n, d, o in CASES],
)


def parameters(dtype=FP32, device=DEVICE):
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter((torch.randn(shape, generator=draw) * 0.5).to(device, dtype)) for shape in SHAPES.values()]


def give_gradients(params, step):
    """The same on every device, into the same tensors, as a captured graph reads them."""
    draw = torch.Generator().manual_seed(step)
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=draw) * 10.0 ** (i % 4 - 2)
        if step == SPIKE and i == 1:
            g[0, 5] = 500.0
        if step == NAN and i == 2:
            g[3, 3] = math.nan
        if p.grad is None:
            p.grad = torch.empty_like(p)
        p.grad.copy_(g)


def trained(name, dtype=FP32, options=(), device=DEVICE, fused=None):
    """Parameters after some steps, and the statistics of each step."""
    params, stats = parameters(dtype, device), []
    optimizer = EVERY[name](params, lr=0.01, fused=fused, **dict(options))
    for step in range(STEPS):
        give_gradients(params, step)
        optimizer.step()
        stats.append({key: value.float().cpu() for key, value in optimizer.stats.items()})
    return [p.detach().float().cpu() for p in params], stats


def assert_alike(found, expected, low=False):
    """Equal to rounding. ``low``: in bf16 a result between two numbers may go to either, and be two away later."""
    for x, y in zip(found, expected, strict=True):
        assert torch.isfinite(x).all()
        torch.testing.assert_close(x, y, rtol=2e-2 if low else 1e-4, atol=2e-3 if low else 2e-5)


@on_gpu_alone
def test_there_are_kernels_for_the_device():
    assert not isinstance(kernels_for(DEVICE), str), kernels_for(DEVICE)


@pytest.mark.filterwarnings("error:.*kernel")  # one that is found to be wrong steps aside with a warning
@every_case
def test_kernels_take_the_way_of_the_plain_code(name, dtype, options):
    (mine, stats), (plain, expected) = (trained(name, dtype, options, fused=fused) for fused in (None, False))
    low = dtype == BF16 or "state" in options
    assert_alike(mine, plain, low=low)
    if dtype == BF16:
        assert all((x != y).float().mean() < 0.05 for x, y in zip(mine, plain, strict=True))
    for step, (found, wanted) in enumerate(zip(stats, expected, strict=True)):
        for key, values in wanted.items():
            close = {"rtol": 0.02 if low else 1e-4, "atol": 1e-3 if low else 1e-6}
            torch.testing.assert_close(found[key], values, **close, equal_nan=True, msg=f"{key} at step {step}")


@pytest.mark.parametrize("name", EVERY)
def test_the_device_takes_the_way_of_the_cpu(name):
    assert_alike(trained(name)[0], trained(name, device="cpu", fused=False)[0])


def test_8_bit_states_follow_the_plain_code():
    pytest.importorskip("torchao")
    ways = []
    for fused in (None, False):
        p = nn.Parameter(torch.linspace(-1, 1, 64 * 256, device=DEVICE).view(64, 256).clone())
        optimizer = StableSPAM([p], lr=0.01, state="int8", fused=fused)
        for step in range(STEPS):
            give_gradients([p], step)
            optimizer.step()
        ways.append(p.detach().cpu())
    difference = (ways[0] - ways[1]).abs()  # another code for a few entries, which move a step's length otherwise
    assert difference.max() <= STEPS * 0.01 and difference.mean() < 1e-4


GRAPHS = [(name, FP32, {}) for name in (*OPTIMIZERS, *TRANSFORMS)]
GRAPHS += [case for case in LOW if case[0] in OPTIMIZERS]


@on_gpu_alone
@pytest.mark.parametrize(("name", "dtype", "options"), GRAPHS, ids=[f"{n}-{d}-{o}" for n, d, o in GRAPHS])
def test_a_captured_step_replays_as_steps(name, dtype, options):
    def start():
        params, rate = parameters(dtype), torch.tensor(0.01, device=DEVICE)
        give_gradients(params, 0)
        return params, EVERY[name](params, lr=rate, capturable=True, **options), rate

    (params, optimizer, rate), (plain, eager, other_rate) = start(), start()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(2):
            give_gradients(params, step)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # capturing runs nothing
        optimizer.step()
    junk = [torch.randn(1000, device=DEVICE) for _ in range(100)]  # would overwrite tables that nothing keeps
    for step in range(STEPS):
        give_gradients(plain, step)
        if step >= 2:
            rate.mul_(0.9)
            other_rate.mul_(0.9)
            give_gradients(params, step)
            graph.replay()
        eager.step()
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6 if dtype == FP32 else 0, atol=1e-7 if dtype == FP32 else 0)
    del junk


@on_gpu_alone
@pytest.mark.parametrize("fused", [None, False], ids=["kernels", "plain"])
@every_case
def test_a_step_does_not_wait_for_the_device(name, dtype, options, fused):
    params = parameters(dtype)
    optimizer = EVERY[name](params, lr=0.01, fused=fused, **options)
    for step in range(2):  # what happens once: states, tables, kernels that are compiled
        give_gradients(params, step)
        optimizer.step()
    prepared = []
    for step in range(2, STEPS):
        give_gradients(params, step)
        prepared.append([p.grad.clone() for p in params])
    with no_waiting():
        for gradients in prepared:
            for p, g in zip(params, gradients, strict=True):
                p.grad = g
            optimizer.step()


@on_gpu_alone
@pytest.mark.parametrize("name", ["stable_spam", "spam", "scale", "adaclip_adagn"])
def test_launches_do_not_grow_with_the_number_of_tensors(name):
    def launched(times):
        params = [q for _ in range(times) for q in parameters()[:1]]
        give_gradients(params, 1)
        optimizer = SCALE([{"params": params, "kind": "hidden"}]) if name == "scale" else EVERY[name](params)
        optimizer.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            optimizer.step()
            torch.cuda.synchronize()
        return sum("_chunks" in event.name or "totals" in event.name for event in profile.events())

    assert 0 < launched(200) == launched(10) <= 8


# ---- low bits ----


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FORMATS)
def test_formats_round_as_on_a_cpu(name, dtype):
    x = torch.randn(64, 320, generator=torch.Generator().manual_seed(3)).mul_(3).to(dtype)
    x[5] *= 1e-4
    x[7, 7] = 300.0
    found, expected = fake_quantize(x.to(DEVICE), name).cpu(), fake_quantize(x, name)
    assert found.dtype == dtype and torch.isfinite(found).all()
    if FORMATS[name].rounding == "stochastic":
        found, expected = (found.float() - x).abs().mean(), (expected.float() - x).abs().mean()
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0)
    else:  # a value in the middle between two numbers may go to the other one
        assert (found != expected).float().mean() < 2e-3


@pytest.mark.filterwarnings("ignore:recipe .* groups of the inputs span tokens")
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", RECIPES)
def test_layers_compute_what_they_compute_on_a_cpu(name, dtype):
    def passed(device, recipe):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 128)).to(device, dtype)
        x = torch.randn(128, 256, generator=torch.Generator().manual_seed(1)).to(device, dtype).requires_grad_()
        model.train()
        if recipe:
            quantize_(model, recipe)
        y = model(x)
        (y.float() * torch.linspace(-1, 1, 128, device=device)).sum().backward()
        return [t.detach().float().cpu() for t in (y, x.grad, *(p.grad for p in model.parameters()))]

    stochastic = "train" in name
    found, expected, plain = passed(DEVICE, name), passed("cpu", name), passed("cpu", None)
    for mine, theirs, exact in zip(found, expected, plain, strict=True):
        assert torch.isfinite(mine).all()
        error, noise = (mine - theirs).norm() / theirs.norm(), (theirs - exact).norm() / exact.norm()
        # Rounding of the products, and of the few values whose neighbour is as near; stochastic: the noise itself.
        assert error < 0.02 + (2 * noise if stochastic else 0.05 * noise), f"{error:.3f}, noise {noise:.3f}"


@on_gpu_alone
@pytest.mark.filterwarnings("ignore:recipe .* groups of the inputs span tokens")
@pytest.mark.parametrize("name", ["fp4", "int8", "fp8", "nvfp4"])
def test_low_bit_layers_do_not_wait_for_the_device(name):
    model = quantize_(Llama(llama_config("tiny", 512)).to(DEVICE, BF16), name)
    tokens = torch.randint(512, (4, 65), device=DEVICE)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    for _ in range(2):
        model.loss(inputs, targets).backward()
    with no_waiting():
        model.loss(inputs, targets).backward()


# ---- telemetry and runs ----


class Kept(Sink):
    def __init__(self):
        self.records = []

    def write(self, record):
        self.records.append(record)

    def close(self):
        pass


@pytest.mark.parametrize("name", ["stable_spam", "adaclip_adagn", "adamw"])
def test_telemetry_sees_on_the_device_what_it_sees_on_a_cpu(name):
    late = 30

    def watched(device):
        params = parameters(device=device)
        model = nn.Module()
        for key, p in zip(SHAPES, params, strict=True):
            model.register_parameter(key, p)
        optimizer = torch.optim.AdamW(params) if name == "adamw" else EVERY[name](params)
        sink = Kept()
        with SpikeMonitor(model, optimizer, every=4, sinks=[sink], say=None) as monitor:
            for step in range(late + 3):
                give_gradients(params, {late: SPIKE, late + 1: NAN}.get(step, 10 + step))
                monitor.observe(torch.tensor(3.0, device=device), rows=(step, step + 1))
                optimizer.step()
        return [(r["event"], r["step"], r.get("parameter")) for r in sink.records if r["kind"] == "event"]

    found = watched(DEVICE)
    assert found == watched("cpu")
    assert {step for event, step, _ in found if event != "reset"} >= {late + 1, late + 2}, "the spike, and the NaN"


@on_gpu_alone
def test_telemetry_does_not_wait_for_the_device_until_it_is_drained():
    params = parameters()
    optimizer = StableSPAM(params)
    model = nn.ParameterList(params)
    give_gradients(params, 0)
    with SpikeMonitor(model, optimizer, every=100, say=None) as monitor:
        optimizer.step()
        loss = torch.ones((), device=DEVICE)
        optimizer.step()
        with no_waiting():
            for _ in range(3):
                monitor.observe(loss)
                optimizer.step()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    for package in ("tokenizers", "safetensors"):
        pytest.importorskip(package)
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def run_of(corpus, out, **options):
    return Run(quick(corpus, out, train__device=DEVICE, **options), say=lambda text: None)


RUNS = {
    "stable_spam": {"optim__name": "stable_spam", "optim__reset_interval": "3"},
    "spam_sparse": {"optim__name": "spam", "optim__density": "0.25", "optim__reset_interval": "3"},
    "scale": {"optim__name": "scale", "train__micro_batch_size": "2"},
    "stabilize": {"optim__name": "adamw", "optim__before": "adaclip + adagn", "train__clip_norm": "1"},
    "autocast": {"optim__name": "stable_spam", "train__dtype": "bf16-autocast"},
    "bf16": {"optim__name": "stable_spam", "train__dtype": "bf16", "optim__rounding": "stochastic"},
    "lowbit": {"optim__name": "stable_spam", "train__dtype": "bf16", "lowbit": "fp8"},
    "guard": {"optim__name": "stable_spam", "train__clip_norm": "1", "guard__ladder": "rewind,stop"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes_to_the_bit(corpus, tmp_path, name):
    options, steps, stop = RUNS[name], 6, 4
    whole = run_of(corpus, tmp_path / "whole", train__steps=str(steps), **options)
    losses = [whole.step().loss.item() for _ in range(steps)]
    cut = run_of(corpus, tmp_path / "cut", train__steps=str(steps), **options)
    head = [cut.step().loss.item() for _ in range(stop)]
    cut.save()
    torch.manual_seed(99)  # whatever the process did meanwhile
    resumed = Run.resume(tmp_path / "cut", say=lambda text: None)
    tail = [resumed.step().loss.item() for _ in range(steps - stop)]
    assert head + tail == losses and all(map(math.isfinite, losses))
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert p.device.type == DEVICE and torch.equal(p, q)


def test_a_run_goes_to_its_end_and_learns(corpus, tmp_path):
    options = {"optim__name": "stable_spam", "train__steps": "20", "checkpoint__every": "10", "eval__every": "10"}
    result = run_of(corpus, tmp_path / "run", **options).fit()
    assert (tmp_path / "run" / "summary.json").exists() and result
    losses = [record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in record]
    assert losses[-1] < losses[0]


def test_a_run_rewinds_past_a_bad_batch(corpus, tmp_path):
    """A NaN in step 8 is noticed at the log step 10 and undone; the run then equals one that never saw the batch."""
    options = {"optim__name": "stable_spam", "train__steps": "15", "log__every": "5", "eval__every": "0"}
    run = run_of(corpus, tmp_path / "run", **options, guard__ladder="rewind", guard__snapshot_every="3")
    real, bad = run.model.loss, (28, 32)
    run.model.loss = lambda *args, **more: real(*args, **more) * (math.nan if run.loader.position == bad[1] else 1.0)
    run.fit()
    assert run.skipped == [bad] and [event["action"] for event in run.guard.events] == ["rewind"]
    clean = run_of(corpus, tmp_path / "clean", **options)
    clean.skipped = [bad]
    clean.fit()
    for p, q in zip(run.model.parameters(), clean.model.parameters(), strict=True):
        assert torch.equal(p, q)


@on_gpu_alone
@pytest.mark.parametrize("name", RUNS)
def test_a_training_step_does_not_wait_for_the_device(corpus, tmp_path, name):
    options = {"log__every": "1000", "train__steps": "500", "checkpoint__every": "0", "eval__every": "0"}
    run = run_of(corpus, tmp_path / "run", **{**options, **RUNS[name], "optim__lr": "0.001"})
    for _ in range(3):
        run.step()
    with no_waiting():
        for _ in range(3):
            run.step()
