"""Bad arguments fail in the call that gives them; nothing of the monitor fails within a step or ends a training."""

import math
import re
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from evenstep import SPAM, AdaGN, SpikeMonitor, StableSPAM, stabilize
from evenstep.telemetry.detect import FLOOR, Detector
from evenstep.telemetry.lines import event_line
from evenstep.telemetry.schema import read_records
from evenstep.telemetry.sinks import JsonlSink


class Kept(list):
    write = list.append

    def close(self):
        """Nothing is held."""

    def of(self, kind):
        return [record for record in self if record.get("kind") == kind]

    def events(self):
        return [(event["step"], event["event"]) for event in self.of("event")]


OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2),
    "stable_spam": lambda params: StableSPAM(params, lr=1e-2),
    "spam": lambda params: SPAM(params, lr=1e-2),
    "stabilize": lambda params: stabilize(torch.optim.AdamW(params, lr=1e-2), AdaGN()),
}


def model_of(width=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, 1))


def backward(model, seed=0):
    model.zero_grad()
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
    loss = model(x).square().mean()
    loss.backward()
    return loss


# ---- arguments ----


def _name(value):
    """A test's name: without addresses, which differ between the processes that run the suite."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


BAD_OPTIONS = [
    *[{"ratio": value} for value in (0.5, 1, 0, -3.0, math.nan, math.inf, "10", None, True)],
    *[{"sigma": value} for value in (0, -1, math.nan, "7", None, [7])],
    *[{"window": value} for value in (0, -1, 2.5, math.nan, "1000", None, True, 10**11)],
    *[{"every": value} for value in (0, 1.5, None, "10", math.nan, 10**11)],
    *[{"parameters_every": value} for value in (0, None, 0.5)],
    *[{"samples": value} for value in (-1, 0.5, None, "64", 10**11)],
    *[{"say": value} for value in (3, "print", [print])],
    *[{"lowbit": value} for value in ({}, 3, [])],
    *[{"sinks": value} for value in (3, [3], [None], [print], [object()], [JsonlSink], {"file": "m.jsonl"})],
]


def one_line(problem):
    return len(str(problem.value).splitlines()) == 1


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=_name)
def test_a_bad_option_fails_at_once_in_one_line_that_names_it(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = model_of()
    with pytest.raises((TypeError, ValueError), match=next(iter(options))) as problem:
        SpikeMonitor(model, torch.optim.SGD(model.parameters()), **options)
    assert one_line(problem) and not [*tmp_path.iterdir()]


def test_a_text_file_and_a_sink_without_close_are_refused_and_a_missing_folder_is_named(tmp_path):
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters())
    with open(tmp_path / "text", "w") as file, pytest.raises(TypeError, match="give the path"):
        SpikeMonitor(model, optimizer, sinks=[file])

    class Half:
        def write(self, record):
            """Without close."""

    with pytest.raises(TypeError, match="close"):
        SpikeMonitor(model, optimizer, sinks=[Half()])
    with pytest.raises(OSError, match="none"):
        SpikeMonitor(model, optimizer, sinks=[tmp_path / "none" / "m.jsonl"])
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("pair", [(3, None), (None, 3), ("model", None)])
def test_what_is_no_model_or_no_optimizer_is_refused(pair):
    model = model_of()
    given = [model if x is None and i == 0 else x for i, x in enumerate(pair)]
    given[1] = torch.optim.SGD(model.parameters()) if pair[1] is None else pair[1]
    with pytest.raises(TypeError, match="expected a torch"):
        SpikeMonitor(*given)


@pytest.mark.parametrize("several", [True, False])
def test_a_path_is_a_sink(tmp_path, several):
    path, model = tmp_path / "m.jsonl", model_of()
    optimizer = torch.optim.SGD(model.parameters())
    with SpikeMonitor(model, optimizer, sinks=[str(path)] if several else path, say=None):
        backward(model)
        optimizer.step()
    assert [record["kind"] for record in read_records(path)] == ["start", "window", "parameters"]


def test_numbers_of_numpy_are_options():
    model, kept = model_of(), Kept()
    optimizer = torch.optim.SGD(model.parameters())
    options = {"every": np.int64(1), "ratio": np.float32(8), "window": np.int32(50)}
    with SpikeMonitor(model, optimizer, sinks=kept, say=None, **options):
        backward(model)
        optimizer.step()
    assert kept.of("start")[0]["rules"] == {"ratio": 8.0, "sigma": 7.0, "window": 50}
    assert type(kept.of("start")[0]["rules"]["window"]) is int


LOSSES = [
    (None, None),
    (2.5, 2.5),
    (3, 3.0),
    (True, 1.0),
    (np.float32(2.5), 2.5),
    (np.float64(2.5), 2.5),
    (np.int64(2), 2.0),
    (np.array(2.5), 2.5),
    (np.array([2.5], np.float32), 2.5),
    (torch.tensor(2.5, requires_grad=True), 2.5),
    (torch.tensor([[2.5]], dtype=torch.bfloat16), 2.5),
    (torch.tensor(2), 2.0),
    (math.nan, None),
    (torch.tensor(math.inf), None),
]


@pytest.mark.parametrize(("loss", "seen"), LOSSES, ids=[repr(loss) for loss, _ in LOSSES])
def test_a_loss_may_be_any_one_number(loss, seen):
    model, kept = model_of(), Kept()
    optimizer = torch.optim.SGD(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with SpikeMonitor(model, optimizer, every=2, sinks=[kept], say=None) as monitor:
            for given in (1.0, loss):
                backward(model)
                monitor.observe(given)
                optimizer.step()
    assert kept.of("window")[0]["losses"] == [1.0, seen] and monitor.lost == 0


ROWS = [
    (3, [3, 4]),
    (np.int64(3), [3, 4]),
    (torch.tensor(3), [3, 4]),
    ((3, 7), [3, 7]),
    ([3, 7], [3, 7]),
    (range(3, 7), [3, 7]),
    (slice(3, 7), [3, 7]),
    (np.array([3, 7]), [3, 7]),
    (torch.tensor([3, 7]), [3, 7]),
]


@pytest.mark.parametrize(("rows", "seen"), ROWS, ids=[repr(rows) for rows, _ in ROWS])
def test_rows_may_be_given_in_several_ways(rows, seen):
    model, kept = model_of(), Kept()
    optimizer = torch.optim.AdamW(model.parameters())
    with SpikeMonitor(model, optimizer, every=1, sinks=[kept], say=None) as monitor:
        backward(model)
        model[0].weight.grad[0, 0] = math.nan
        monitor.observe(1.0, rows=rows)
        optimizer.step()
    assert kept.of("event")[0]["rows"] == seen


BAD_FACTS = [
    *[{"loss": value} for value in ("3.0", b"3", [1.0, 2.0], {"loss": 1.0}, torch.zeros(2), np.zeros(3), object())],
    *[{"loss": value} for value in (torch.tensor(1j), 1j, torch.zeros(0))],
    *[{"rows": value} for value in ("3-7", 2.5, (3,), (1, 2, 3), (7, 3), (3, 3), (-1, 3), {3, 7}, (0.0, 2.0), True)],
    *[{"rows": value} for value in (range(0, 8, 2), slice(3, None), (None, 3))],
    *[{"step": value} for value in (-1, 2.5, "3", True, math.nan)],
]


@pytest.mark.parametrize("facts", BAD_FACTS, ids=_name)
def test_what_is_no_fact_of_a_step_fails_in_observe(facts):
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters())
    monitor = SpikeMonitor(model, optimizer, say=None)
    with pytest.raises((TypeError, ValueError), match=r"SpikeMonitor.observe: .*") as problem:
        monitor.observe(**facts)
    assert one_line(problem)
    backward(model)
    optimizer.step()  # the step after it is measured as ever
    monitor.close()
    assert monitor.step == 1 and monitor.lost == 0


def test_steps_may_be_counted_from_zero():
    model, kept = model_of(), Kept()
    optimizer = torch.optim.SGD(model.parameters())
    with SpikeMonitor(model, optimizer, sinks=[kept], say=None) as monitor:
        for step in range(3):
            monitor.observe(backward(model), step=np.int64(step))
            optimizer.step()
    assert (kept.of("window")[0]["first"], kept.of("window")[0]["step"], monitor.step) == (0, 2, 2)


# ---- within a step ----


@pytest.fixture(params=OPTIMIZERS)
def build(request):
    return OPTIMIZERS[request.param]


def watched_steps(model, optimizer, change, *, told=None, steps=6, **options):
    """Steps, with ``change(step)`` before each; the records. ``told``: what the one warning says."""
    kept = Kept()
    expected = pytest.warns(UserWarning, match=told) if told else nullcontext()
    with expected as caught, warnings.catch_warnings():
        if not told:
            warnings.filterwarnings("error", message=".*SpikeMonitor.*")
        with SpikeMonitor(model, optimizer, every=2, parameters_every=2, sinks=[kept], say=None, **options) as monitor:
            for step in range(1, steps + 1):
                change(step)
                optimizer.step()
    if told:
        assert len([one for one in caught if "SpikeMonitor" in str(one.message)]) == 1
    assert monitor.step == steps and sum(len(w.get("norms", [0, 0])) for w in kept.of("window")) >= 2
    return monitor, kept


def last_norms(kept):
    return dict(zip(kept.of("start")[0]["names"], kept.of("parameters")[-1]["grad_norm"], strict=True))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2])
def test_frozen_parameters_of_any_kind_are_passed_over(dtype):
    model = nn.ParameterList([nn.Parameter(torch.zeros(3, 4).to(dtype), requires_grad=False)])
    model.append(nn.Parameter(torch.ones(3)))

    def change(step):
        model[1].grad = torch.full((3,), float(step))

    monitor, kept = watched_steps(model, torch.optim.AdamW(model.parameters()), change)
    assert last_norms(kept) == {"0": None, "1": pytest.approx(5.5 * 3**0.5, rel=1e-3)} and monitor.lost == 0
    assert kept.of("parameters")[-1]["weight_rms"][0] is None


@pytest.mark.parametrize("make", [lambda: torch.ones(3, device="meta"), lambda: torch.ones(3).to_sparse()])
def test_frozen_parameters_without_values_of_their_own_are_passed_over(make):
    model = nn.ParameterList([nn.Parameter(make(), requires_grad=False), nn.Parameter(torch.ones(3))])

    def change(step):
        model[1].grad = torch.ones(3)

    monitor, kept = watched_steps(model, torch.optim.SGD(model.parameters()), change)
    assert last_norms(kept)["1"] == pytest.approx(3**0.5, rel=1e-3) and monitor.lost == 0


class Packed(torch.Tensor):
    """A tensor that knows no arithmetic, such as those of quantising packages."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.detach.default:
            return Packed(args[0].inner)
        raise NotImplementedError(f"{op} of packed tensors")


def test_subclasses_that_cannot_be_read_are_passed_over():
    model = nn.ParameterList([nn.Parameter(Packed(torch.zeros(3, dtype=torch.int8)), requires_grad=False)])
    model.append(nn.Parameter(torch.ones(3)))

    def change(step):
        model[1].grad = torch.ones(3)

    monitor, kept = watched_steps(model, torch.optim.SGD(model.parameters()), change)
    assert last_norms(kept)["1"] == pytest.approx(3**0.5, rel=1e-3) and monitor.lost == 0


def test_a_gradient_that_cannot_be_measured_leaves_out_itself_alone():
    model = nn.ParameterList([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))])

    class Idle(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self):
            """A group has no lr either."""

    def change(step):
        model[1].grad = torch.ones(3)
        model[0].grad = Packed(torch.zeros(3))

    monitor, kept = watched_steps(model, Idle(model.parameters()), change)
    assert last_norms(kept) == {"0": None, "1": pytest.approx(3**0.5, rel=1e-3)} and monitor.lost == 0
    assert kept.of("window")[0]["lr"] is None or math.isnan(kept.of("window")[0]["lr"])


def test_torchao_and_lazy_parameters_are_passed_over():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def change(step):
        model.zero_grad()
        model(torch.ones(2, 5)).sum().backward()

    monitor, kept = watched_steps(model, optimizer, change)
    assert last_norms(kept)["0.weight"] > 0 and monitor.lost == 0
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda module, name: name == "0")
    model[0].requires_grad_(False)

    def step_of(step):
        model.zero_grad()
        model(torch.ones(2, 64)).sum().backward()

    monitor, kept = watched_steps(model, torch.optim.SGD(model.parameters(), lr=0.1), step_of)
    assert last_norms(kept)["1.weight"] > 0 and monitor.lost == 0


def test_steps_without_gradients_are_steps(build):
    model = model_of()

    def change(step):
        model.zero_grad()
        if step > 4:
            backward(model)

    monitor, kept = watched_steps(model, build(model.parameters()), change)
    assert monitor.lost == 0 and [w.get("norms") is None for w in kept.of("window")] == [True, True, False]


def test_sparse_and_complex_gradients_stop_nothing():
    model = nn.ModuleDict({"e": nn.Embedding(5, 2, sparse=True), "c": nn.ParameterList([torch.ones(2) * 1j])})

    def change(step):
        model.zero_grad()
        (model["e"](torch.tensor([1])).sum() + model["c"][0].abs().sum()).backward()

    monitor, _ = watched_steps(model, torch.optim.SGD(model.parameters(), lr=0.1), change)
    assert monitor.lost == 0


def test_parameters_may_change_their_size_and_dtype(build):
    model = nn.ParameterList([nn.Parameter(torch.ones(30)), nn.Parameter(torch.ones(3))])
    optimizer = build(model.parameters())

    def change(step):
        if step == 3:  # the state that the optimizer holds is of the old size
            optimizer.state.clear()
            model[0].data = torch.ones(4, dtype=torch.float64)
            model[0].grad = None
        for p in model:
            p.grad = torch.ones_like(p) if p is model[1] or step < 3 else None

    monitor, kept = watched_steps(model, torch.optim.SGD(model.parameters()), change)
    assert monitor.lost == 0 and last_norms(kept)["1"] == pytest.approx(3**0.5, rel=1e-3)
    model[0].grad = torch.ones(4, dtype=torch.float64)
    with SpikeMonitor(model, torch.optim.SGD(model.parameters()), say=None) as monitor:
        monitor.optimizer.step()
    assert monitor.lost == 0


def test_parameters_may_move_to_another_device():
    model, kept = nn.Linear(3, 1), Kept()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with SpikeMonitor(model, optimizer, every=1, sinks=[kept], say=None) as monitor:
        monitor.probe.device = torch.device("meta")  # where the parameters were when the monitor was made
        monitor.rows, monitor.losses = torch.zeros_like(monitor.rows), torch.zeros_like(monitor.losses)
        monitor.observe(model(torch.ones(1, 3)).sum())
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert monitor.probe.device.type == "cpu" and monitor.lost == 0 and kept.of("window")[0]["norms"][0] > 0


@pytest.mark.parametrize("name", ["sgd", "stable_spam"])
def test_groups_that_come_and_go_keep_the_numbers_at_their_names(name):
    model = nn.ParameterDict({key: nn.Parameter(torch.ones(1)) for key in "abcd"})
    sizes = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    optimizer = OPTIMIZERS[name]([{"params": [model[key]]} for key in "abc"])

    def change(step):
        for key, size in sizes.items():
            model[key].grad = torch.full((1,), size)
        if step == 3:
            optimizer.add_param_group({"params": [model["d"]]})
        if step == 5:
            del optimizer.param_groups[0]

    monitor, kept = watched_steps(model, optimizer, change, told="1 parameters have joined")
    assert last_norms(kept) == {"a": None, "b": 2.0, "c": 3.0} and monitor.lost == 0


def test_parameters_that_are_exchanged_in_their_places_keep_their_names():
    model = nn.ParameterDict({key: nn.Parameter(torch.ones(1)) for key in "ab"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def change(step):
        if step == 3:
            optimizer.param_groups[0]["params"] = [nn.Parameter(torch.ones(2)) for _ in "ab"]
        for p, size in zip(optimizer.param_groups[0]["params"], (1.0, 2.0), strict=True):
            p.grad = torch.full_like(p, size)

    monitor, kept = watched_steps(model, optimizer, change)
    assert last_norms(kept) == digits_of({"a": 2**0.5, "b": 8**0.5}) and monitor.lost == 0


def digits_of(numbers):
    return {name: pytest.approx(number, rel=1e-3) for name, number in numbers.items()}


def test_an_optimizer_emptied_of_its_parameters_stops_nothing():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def change(step):
        backward(model)
        if step == 3:
            optimizer.param_groups.clear()

    monitor, _ = watched_steps(model, optimizer, change)
    assert monitor.lost == 0


def test_a_step_that_calls_the_step_of_its_base_is_one_also_after_one_that_failed():
    class Own(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model = model_of()
    optimizer = Own(model.parameters(), lr=0.1)

    def change(step):
        loss = backward(model)
        if step == 4:
            with pytest.raises(ZeroDivisionError):
                optimizer.step(lambda: 1 / 0)
        assert loss > 0

    monitor, kept = watched_steps(model, optimizer, change)
    assert monitor.step == 6 and [len(w["norms"]) for w in kept.of("window")] == [2, 2, 2]


def test_stats_of_an_optimizer_of_someone_elses_are_not_ours():
    class Own(torch.optim.SGD):
        stats: dict = {}  # noqa: RUF012

        def step(self, closure=None):
            self.stats = {"grad_norm": 3, "calls": [1]}
            return super().step(closure)

    model = model_of()
    monitor, kept = watched_steps(model, Own(model.parameters(), lr=0.1), lambda step: backward(model))
    assert monitor.lost == 0 and kept.of("window")[-1]["norms"][0] > 0


def test_a_step_that_cannot_be_measured_is_counted_and_told_of_once(build, monkeypatch):
    model = model_of()
    optimizer = build(model.parameters())

    def change(step):
        backward(model, step)
        if step in (3, 4):
            monkeypatch.setattr("evenstep.telemetry.probe.Probe._spike_scores", lambda self: 1 / 0)
        else:
            monkeypatch.undo()

    monitor, kept = watched_steps(model, optimizer, change, told="could not measure a step .ZeroDivisionError")
    assert monitor.lost == 2 and [w.get("lost", 0) for w in kept.of("window")] == [0, 2, 0]
    assert [len(w["norms"]) for w in kept.of("window") if "lost" not in w] == [2, 2]


def test_a_drain_that_fails_is_counted_and_told_of_once(monkeypatch):
    model = model_of()

    def change(step):
        backward(model, step)
        if step in (2, 4):
            monkeypatch.setattr("evenstep.telemetry.detect.Detector.feed", lambda *_: 1 / 0)
            if step == 4:  # counted once, though both fail
                monkeypatch.setattr("evenstep.telemetry.probe.Probe.after", lambda *_: 1 / 0)
        else:
            monkeypatch.undo()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = Kept()
    with pytest.warns(UserWarning, match="could not transfer its numbers to the host") as caught:
        monitor = SpikeMonitor(model, optimizer, every=1, sinks=[kept], say=None)
        for step in range(1, 6):
            change(step)
            optimizer.step()
        monitor.close()
    assert len(caught) == 2 and monitor.lost == 2
    assert [(w["step"], w.get("lost", 0)) for w in kept.of("window")] == [(1, 0), (3, 1), (5, 1)]


def test_a_function_that_says_or_gives_nothing_stops_nothing():
    def fails(*_):
        raise BrokenPipeError("gone")

    model, kept = model_of(), Kept()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = SpikeMonitor(model, optimizer, every=1, sinks=[kept], say=fails, lowbit=fails)
    with pytest.warns(UserWarning, match=r"could not (print|ask)") as caught:
        for _ in range(3):
            backward(model)
            model[0].weight.grad[0, 0] = math.inf
            optimizer.step()
        monitor.close()
    assert len(caught) == 2 and monitor.lost == 0 and len(kept.of("window")) == 3


def test_sinks_that_fail_lose_their_own_records_alone():
    class Failing(Kept):
        def write(self, record):
            raise OSError(28, "No space left on device")

    class Stuck(Kept):
        def close(self):
            raise RuntimeError("cannot be closed")

    model, kept, stuck = model_of(), Kept(), Stuck()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = SpikeMonitor(model, optimizer, every=1, sinks=[Failing(), stuck, kept], say=None)
    with pytest.warns(UserWarning, match="training goes on without it") as caught:
        for _ in range(3):
            backward(model)
            optimizer.step()
        monitor.close()
    assert len(caught) == 2 and len(stuck) == len(kept) and monitor.sinks[0].lost == len(kept) > 3


def test_two_monitors_may_share_a_sink(tmp_path):
    sink, model = JsonlSink(tmp_path / "m.jsonl"), model_of()
    for lr in (0.1, 0.2):
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        with SpikeMonitor(model, optimizer, sinks=[sink], say=None):
            backward(model)
            optimizer.step()
    assert [r["lr"] for r in read_records(tmp_path / "m.jsonl") if r["kind"] == "window"] == [0.1, 0.2]


def test_a_closure_keeps_what_it_returns_and_raises_and_its_companions():
    class Two(torch.optim.SGD):
        def step(self, closure=None, extra=None):
            return closure(), extra

    model = model_of()
    optimizer = Two(model.parameters(), lr=0.1)
    with SpikeMonitor(model, optimizer, say=None) as monitor:
        for value in ({"loss": 1}, "text", None, 3.0):
            assert optimizer.step(lambda value=value: value, "more") == (value, "more")
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
    assert monitor.step == 4 and monitor.lost == 0


@pytest.mark.parametrize("rate", [torch.tensor(0.5), 0.5, 1])
def test_the_rate_of_every_step_is_written_where_it_moves(rate):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    kept = Kept()
    with SpikeMonitor(model, optimizer, every=3, sinks=[kept], say=None):
        for step in range(6):
            optimizer.param_groups[0]["lr"] = rate * (1 if step < 3 else 1 / (step - 1))
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    first, second = kept.of("window")
    assert first["lr"] == float(rate) and "lrs" not in first
    assert second["lrs"] == [pytest.approx(float(rate) / n, rel=1e-3) for n in (2, 3, 4)]


def test_a_step_that_is_captured_is_left_alone(monkeypatch):
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = SpikeMonitor(model, optimizer, say=None)
    monkeypatch.setattr(monitor, "_captured", lambda: True)
    monkeypatch.setattr(monitor.probe, "before", lambda **_: 1 / 0)
    backward(model)
    with pytest.warns(UserWarning, match="captured graph runs no hooks"):
        optimizer.step()
    assert monitor.step == 0 and monitor.lost == 0


# ---- compiled ----


@pytest.mark.parametrize("how", ["function", "attribute", "model", "all"])
@pytest.mark.parametrize("name", ["sgd", "adamw", "stable_spam"])
def test_compiled_steps_are_measured_as_others(how, name):
    torch._dynamo.reset()
    model, kept, norms = model_of(), Kept(), []
    optimizer = OPTIMIZERS[name](model.parameters())
    with SpikeMonitor(model, optimizer, every=2, sinks=[kept], say=None) as monitor:
        if how == "attribute":
            optimizer.step = torch.compile(optimizer.step, backend="eager")
        run = torch.compile(model, backend="eager") if how == "model" else model
        step = torch.compile(lambda: optimizer.step(), backend="eager") if how == "function" else optimizer.step

        def whole(x, number):
            loss = run(x).square().mean()
            loss.backward()
            monitor.observe(loss, rows=(3, 5))
            step()
            return loss

        if how == "all":
            whole = torch.compile(whole, backend="eager")
        losses = []
        for number in range(4):
            model.zero_grad()
            losses.append(float(whole(torch.full((2, 4), 1.0 + number), number)))
            norms.append(float(torch.stack([p.grad.norm() for p in model.parameters()]).norm()))
    seen = [x for window in kept.of("window") for x in window["norms"]]
    assert seen == pytest.approx(norms, rel=1e-3) and monitor.lost == 0
    assert [x for window in kept.of("window") for x in window["losses"]] == pytest.approx(losses, rel=1e-3)
    assert monitor.names[0] == "0.weight"


# ---- names ----


class Held(nn.Module):
    """As many wrappers keep their module."""

    def __init__(self, module, name="module"):
        super().__init__()
        setattr(self, name, module)


class DataParallel(Held):
    """By its name: making torch's own needs a group of processes or a GPU."""


class Part(nn.Module):
    """A model of which ``module`` is a part."""

    def __init__(self):
        super().__init__()
        self.module, self.weight = nn.Linear(2, 2), nn.Parameter(torch.ones(2))


def names(model):
    return SpikeMonitor(model, torch.optim.SGD(model.parameters(), 0.1), say=None).names


def test_names_are_those_of_the_model_under_every_wrapper():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def compiled(module):
        return torch.compile(module, backend="eager")

    plain = ["0.weight", "0.bias", "1.weight", "1.bias"]

    def make(wrap):
        return nn.Sequential(wrap(nn.Linear(2, 2)), nn.Linear(2, 2))

    for wrap in (checkpoint_wrapper, compiled, DataParallel, lambda m: Held(m, "_fsdp_wrapped_module")):
        assert names(make(wrap)) == plain
        assert names(compiled(Held(make(wrap)))) == plain
        assert names(Held(compiled(make(wrap)))) == plain
        assert names(Held(Held(Held(make(wrap), "_forward_module")))) == plain
    assert names(Part()) == ["weight", "module.weight", "module.bias"]
    assert names(Held(Part())) == ["weight", "module.weight", "module.bias"]
    assert names(nn.Sequential(Held(nn.Linear(2, 2)))) == ["0.module.weight", "0.module.bias"]


def test_a_state_saved_under_a_wrapper_loads_without():
    model = model_of()
    wrapped = SpikeMonitor(model, torch.optim.SGD(model.parameters()), say=None).state_dict()
    wrapped["names"] = ["module._orig_mod." + name for name in wrapped["names"]]
    SpikeMonitor(model, torch.optim.SGD(model.parameters()), say=None).load_state_dict(wrapped)
    with pytest.raises(ValueError, match="other parameters"):
        SpikeMonitor(nn.Linear(1, 1), torch.optim.SGD(nn.Linear(1, 1).parameters()), say=None).load_state_dict(wrapped)


# ---- gradients that are not finite ----


def diverging(optimizer_name, bad, *, steps=60, every=10):
    model, kept, said = model_of(), Kept(), []
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    with SpikeMonitor(model, optimizer, every=every, sinks=[kept], say=said.append) as monitor:
        for step in range(1, steps + 1):
            model.zero_grad()
            x = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
            x[0, 0] = math.nan if step in bad else x[0, 0]
            loss = model(x).square().mean()
            loss.backward()
            monitor.observe(loss, rows=(32 * step, 32 * step + 32))
            optimizer.step()
    return kept, said


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weights_that_are_nan_are_told_of_once_with_the_first_bad_rows(name):
    kept, said = diverging(name, {26})
    assert kept.events() == [(26, "nonfinite"), (30, "weights_nonfinite")]
    last = kept.of("event")[-1]
    assert (last["since"], last["rows"], last["count"], last["nan"]) == (26, [832, 864], 6, True)
    assert said[-1] == ("step 30 weights are NaN since step 26 in 0.weight and 5 more tensors, first bad rows 832-864")
    assert sum(window.get("nonfinite", 0) for window in kept.of("window")) == 35


@pytest.mark.parametrize("bad", [{33}, {33, 35}, {33, 34, 35}])
def test_single_bad_batches_that_are_skipped_are_told_of_one_by_one(bad):
    kept, _ = diverging("stable_spam", bad)
    assert kept.events() == [(step, "skipped") for step in sorted(bad)]


def test_gradients_that_stay_bad_though_weights_are_fine_are_told_of_once_more():
    kept, _ = diverging("stable_spam", {*range(23, 45)})
    assert kept.events() == [(23, "skipped"), (24, "skipped"), (25, "skipped"), (30, "stays_nonfinite")]
    assert kept.of("event")[-1]["since"] == 23
    assert event_line(kept.of("event")[-1]).endswith("not been finite since step 23, first bad rows 736-768")


def test_weights_that_spoil_some_batches_alone_are_told_of_once():
    model, kept = nn.Embedding(4, 2), Kept()  # a row of it becomes NaN, and is used now and then
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with SpikeMonitor(model, optimizer, every=5, sinks=[kept], say=None):
        for step in range(1, 61):
            model.zero_grad()
            row = 3 if step % 7 == 0 else step % 3
            (model(torch.tensor([row])).sum() * (math.nan if step == 7 else 1.0)).square().backward()
            optimizer.step()
    assert kept.events() == [(7, "nonfinite"), (14, "nonfinite"), (15, "weights_nonfinite")]


def test_a_resumed_monitor_tells_it_not_again():
    model = model_of()
    optimizer, kept = torch.optim.SGD(model.parameters(), lr=0.1), Kept()
    monitor = SpikeMonitor(model, optimizer, every=3, sinks=[kept], say=None)
    for step in range(1, 10):
        backward(model)
        if step == 4:
            model[0].weight.grad[0, 0] = math.nan
        optimizer.step()
        if step == 7:
            state = monitor.state_dict()
            monitor.close()
            monitor = SpikeMonitor(model, optimizer, every=3, sinks=[kept], say=None)
            monitor.load_state_dict(state)
    monitor.close()
    assert kept.events() == [(4, "nonfinite"), (6, "weights_nonfinite")]


# ---- a floor for spikes ----


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("size", [5e-10, 1e-15])
def test_rounding_noise_has_no_spikes_and_ordinary_gradients_do(name, size):
    model = nn.ParameterDict({"noise": nn.Parameter(torch.ones(50)), "real": nn.Parameter(torch.ones(50))})
    optimizer, kept = OPTIMIZERS[name](model.parameters()), Kept()
    draw = torch.Generator().manual_seed(0)
    with SpikeMonitor(model, optimizer, sinks=[kept], say=None, parameters_every=1):
        for step in range(1, 61):
            model["noise"].grad = torch.randn(50, generator=draw) * size * (17 if step == 40 else 1)
            model["real"].grad = torch.randn(50, generator=draw) * 1e-2 * (17 if step == 50 else 1)
            optimizer.step()
    assert kept.events() == [(50, "spike")]
    noise = kept.of("start")[0]["names"].index("noise")
    assert all(record["ratio"][noise] < 10 for record in kept.of("parameters") if "ratio" in record)


def test_gradients_that_are_all_small_have_spikes_where_they_matter():
    for name, expected in (("stable_spam", [(40, "spike")]), ("sgd", [(40, "spike")]), ("adamw", [])):
        model = nn.Linear(8, 8, bias=False)
        optimizer, kept = OPTIMIZERS[name](model.parameters()), Kept()
        draw = torch.Generator().manual_seed(0)
        with SpikeMonitor(model, optimizer, sinks=[kept], say=None):
            for step in range(1, 61):  # all below Adam's eps of 1e-8, which a norm of one's own lifts
                model.weight.grad = torch.randn(8, 8, generator=draw) * 1e-10 * (30 if step == 40 else 1)
                optimizer.step()
        assert kept.events() == expected, name


def test_the_floor_is_a_share_of_the_norm_of_all():
    detector = Detector(["small", "large"])
    other = {"clipped": np.zeros(2), "gain": np.ones(2), "skipped": np.zeros(2)}
    for step in range(1, 40):
        small = FLOOR * 0.1 * (50.0 if step == 30 else 200.0 if step == 36 else 1.0)
        values = np.array([small, 1.0])
        events = detector.feed(step, {"grad_max": values, "grad_norm": values, **other}, 3.0, None)
        assert [event["event"] for event in events] == (["spike"] if step == 37 else []), step


def test_a_loss_spike_says_where():
    model, kept, said = model_of(), Kept(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with SpikeMonitor(model, optimizer, sinks=[kept], say=said.append) as monitor:
        for step in range(1, 60):
            for p in model.parameters():
                p.grad = torch.full_like(p, 1e-2)
            model[2].weight.grad *= 5 if step == 50 else 1
            monitor.observe(9.0 if step == 50 else 3.0 + 0.01 * (step % 2))
            optimizer.step()
    [event] = [event for event in kept.of("event") if event["event"] == "loss_spike"]
    assert [tensor["name"] for tensor in event["tensors"]] == ["2.weight"]
    assert said[0].startswith("step 50 loss spike, loss 3.00") and "largest gradient in 2.weight (x5.0)" in said[0]
