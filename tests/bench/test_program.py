import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from bench_support import mini_model

from evenstep import cli
from evenstep.baselines.catalog import Baseline
from evenstep.bench import measure, timing
from evenstep.bench.measure import NUMBERS, Comparison, Plan, compare
from evenstep.bench.registry import KNOWN, REFERENCE, Entry
from evenstep.bench.timing import Sample
from evenstep.errors import EvenstepError

STABLE = {"optimizer", "ms", "ratio_to_adamw_fused", "state_bytes_per_param", "transient_bytes", "gb_per_s"}


@pytest.fixture
def mini(monkeypatch):
    """The name of small shapes; the caches are small too."""
    monkeypatch.setitem(measure.EXTREMES, "mini", mini_model)
    for module in (measure, timing):
        monkeypatch.setattr(module, "last_level_cache", lambda device: 2**16)
    monkeypatch.setattr(measure, "busy_processors", lambda: 0.0)
    return "mini"


def call(capsys, *words):
    status = cli.main(["bench", *map(str, words)])
    out, err = capsys.readouterr()
    return status, out, err


def seconds_by(table):
    """A timer that takes what the table says for each class of optimizer, by the name of its step's owner."""

    def timer(step):
        step()
        owner = getattr(step, "__self__", None)
        return Sample(table[type(owner).__name__], 0.5)

    return timer


def add(monkeypatch, name, step, build=None):
    """A peer in the registry, made of a step."""

    class Peer:
        def __init__(self, model):
            self.model = model

        def step(self):
            return step(self.model)

        def state_dict(self):
            return {"state": {}}

    monkeypatch.setitem(KNOWN, name, entry("torch", build or (lambda cls, request: Peer(request.model))))


def entry(package, build):
    return Entry(Baseline("torch:Tensor", package, rule=build))


def test_the_json_file_has_the_promised_keys(capsys, tmp_path, mini):
    out = tmp_path / "bench.json"
    status, shown, err = call(
        capsys, "step-time", "--shapes", mini, "--threads", 1, "--optimizers", "stable_spam,adam", "--rounds", 3,
        "--json", out, "--plot", tmp_path / "bench.png",
    )  # fmt: skip
    assert status == 0, err
    document = json.loads(out.read_text())
    assert {"rows", "hardware", "commit", "versions", "date", "settings", "comparisons"} <= document.keys()
    assert [row["optimizer"] for row in document["rows"]] == ["stable_spam", REFERENCE, "adam"]
    for row in document["rows"]:
        assert STABLE | set(NUMBERS) <= row.keys() and row["skipped"] is None
        assert row["ms_q1"] <= row["ms"] <= row["ms_q3"] and row["rounds"] == 3 and row["shapes"] == mini
        assert row["optimizer"] in shown
    reference = document["rows"][1]
    assert reference["ratio_to_adamw_fused"] == 1.0 and reference["version"] == version("torch")
    assert reference["state_bytes_per_param"] == pytest.approx(8, rel=1e-2)
    assert document["comparisons"][0]["roof_gb_per_s"] > 0 and document["comparisons"][0]["threads"] == 1
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_busy_machine_is_a_warning(monkeypatch, mini):
    plan, said = Plan(mini, [REFERENCE, f"{REFERENCE}_again"], rounds=3), []
    monkeypatch.setattr(measure, "busy_processors", lambda: 1.4)
    monkeypatch.setattr(measure, "NOISE", -1.0)  # no two measurements are that close
    warnings = compare("step-time", [plan], said.append)["warnings"]
    assert "other processes use 1.4 of" in warnings[0] and "measured twice" in warnings[1]
    assert all(f"warning: {text}" in said for text in warnings)
    monkeypatch.setattr(measure, "busy_processors", lambda: measure.BUSY)
    monkeypatch.setattr(measure, "NOISE", 1e9)
    assert compare("step-time", [plan])["warnings"] == []


def test_ratios_bandwidth_and_cost_follow_from_the_times(mini):
    comparison = Comparison(
        Plan(mini, ["scale", REFERENCE], rounds=4),
        timer=seconds_by({"AdamW": 0.002, "SCALE": 0.001, "Workload": 0.0001}),
    )
    comparison.run()
    scale, adamw = comparison.rows["scale"], comparison.rows[REFERENCE]
    n = comparison.facts["parameters"]
    assert (scale["ms"], adamw["ms"]) == (1.0, 2.0) and scale["ratio_to_adamw_fused"] == 0.5
    assert scale["ns_per_param"] == pytest.approx(1e6 / n, abs=1e-3) and scale["cpu_ms"] == 500
    moved = 4 * n * 3 + 2 * adamw["state_bytes_per_param"] * n
    assert adamw["bytes_moved"] == pytest.approx(moved, rel=1e-4)
    assert adamw["gb_per_s"] == pytest.approx(moved / 0.002 / 1e9, rel=1e-2)
    assert comparison.facts["roof_gb_per_s"] == pytest.approx(2 * comparison.facts["roof_bytes"] / 1e-4 / 1e9, rel=1e-2)
    assert adamw["roof_share"] == pytest.approx(adamw["gb_per_s"] / comparison.facts["roof_gb_per_s"], abs=1e-3)


def test_a_failing_optimizer_is_one_line_and_the_others_go_on(capsys, monkeypatch, mini):
    def fail(model):
        raise RuntimeError("no kernel\nfor this")

    def refuse(cls, request):
        raise ValueError("not these parameters")

    add(monkeypatch, "fails", fail)
    add(monkeypatch, "refuses", None, build=refuse)
    monkeypatch.setitem(KNOWN, "absent", entry("no-such-package", refuse))
    status, out, _ = call(
        capsys, "step-time", "--shapes", mini, "--rounds", 2, "--optimizers", "fails,refuses,absent,adam"
    )
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert status == 0 and "skipped: RuntimeError: no kernel" in lines["fails"] and "for this" not in out
    assert "skipped: ValueError: not these parameters" in lines["refuses"]
    assert "pip install no-such-package" in lines["absent"]
    assert "skipped" not in lines["adam"]


def test_one_that_fails_in_a_later_round_has_no_number(monkeypatch, mini):
    calls = []

    def fail_late(model):
        calls.append(1)
        if len(calls) > 7:
            raise RuntimeError("late")

    add(monkeypatch, "late", fail_late)
    comparison = Comparison(Plan(mini, ["late", REFERENCE], rounds=6))
    comparison.run()
    assert comparison.rows["late"]["ms"] is None and "late" in comparison.rows["late"]["skipped"]
    assert comparison.rows[REFERENCE]["rounds"] == 6


def test_a_failing_reference_is_an_error(monkeypatch, mini):
    def refuse(cls, request):
        raise RuntimeError("no fused kernel")

    add(monkeypatch, REFERENCE, None, build=refuse)
    with pytest.raises(EvenstepError, match=r"adamw_fused.*no fused kernel"):
        Comparison(Plan(mini, [REFERENCE])).run()


def test_one_that_breaks_parameters_or_gradients_harms_nobody(monkeypatch, mini):
    @torch.no_grad()
    def poison(model):
        next(model.parameters()).fill_(float("nan"))

    @torch.no_grad()
    def clip(model):
        for p in model.parameters():
            p.grad.clamp_(-1e-5, 1e-5)

    add(monkeypatch, "poison", poison)
    add(monkeypatch, "clips", clip)
    seen = []

    def watch(model):
        seen.append([float(p.grad.abs().max()) for p in model.parameters()])
        assert all(p.isfinite().all() for p in model.parameters())

    add(monkeypatch, "watch", watch)
    comparison = Comparison(Plan(mini, ["poison", "clips", "watch", REFERENCE], rounds=12))
    comparison.run()
    assert "NaN" in comparison.rows["poison"]["skipped"]
    assert "changes the gradients" in comparison.rows["clips"]["note"]
    assert comparison.rows["watch"]["ms"] is not None and comparison.rows["watch"]["note"] == ""
    assert all(max(maxima) > 1e-4 for maxima in seen)


def test_slow_peers_get_fewer_rounds_and_ours_all(monkeypatch, mini):
    import time

    add(monkeypatch, "slow", lambda model: time.sleep(0.05))
    monkeypatch.setitem(KNOWN, "slow", entry("numpy", KNOWN["slow"].baseline.rule))
    comparison = Comparison(Plan(mini, ["slow", "stable_spam", REFERENCE], rounds=10, budget=0.26))
    comparison.run()
    assert 3 <= comparison.rows["slow"]["rounds"] <= 5
    assert comparison.rows["stable_spam"]["rounds"] == comparison.rows[REFERENCE]["rounds"] == 10


def test_without_memory_for_all_they_come_in_lots(monkeypatch, mini):
    lots = []
    real = measure.take_turns

    def recorded(players, *args, **kwargs):
        lots.append([player.name for player in players])
        real(players, *args, **kwargs)

    monkeypatch.setattr(measure, "take_turns", recorded)
    rooms = iter([True, False, True, False, True])  # the first alone; then beside a lot and alone by turns
    monkeypatch.setattr(measure.Workload, "has_room", lambda self: next(rooms, True))
    comparison = Comparison(Plan(mini, ["spam", "scale", "adam", REFERENCE], rounds=2))
    comparison.run()
    assert lots == [["roof", REFERENCE, "spam"], ["roof", REFERENCE, "scale"], ["roof", REFERENCE, "adam"]]
    assert all(row["ms"] for row in comparison.rows.values())


def test_shapes_that_do_not_fit_are_refused_up_front_with_what_would(monkeypatch):
    monkeypatch.setattr(measure, "available_memory", lambda device: 10**10)
    with pytest.raises(EvenstepError, match=r"1b: needs 48.* 10.0 GB are free; 1b:2, 2 of its layers, would fit"):
        Comparison(Plan("1b", [REFERENCE])).run()
    monkeypatch.setattr(measure, "available_memory", lambda device: 10**6)
    with pytest.raises(EvenstepError, match=r"9m: needs .*choose smaller shapes"):
        Comparison(Plan("9m", [REFERENCE])).run()


def test_scaling_leaves_out_what_does_not_fit_and_shows_the_rest(capsys, monkeypatch, tmp_path, mini):
    free = measure.available_memory(torch.device("cpu"))
    monkeypatch.setattr(measure, "available_memory", lambda device: min(free, 10**9))
    words = ["--shapes", f"{mini},7b", "--threads", "1,2", "--optimizers", "scale", "--rounds", 2]
    status, out, _ = call(capsys, "scaling", *words, "--json", tmp_path / "s.json", "--plot", tmp_path / "s.png")
    document = json.loads((tmp_path / "s.json").read_text())
    assert status == 0 and "7b left out" in out and "ns per parameter" in out
    assert {(row["optimizer"], row["threads"]) for row in document["rows"]} == {
        (name, threads) for name in ("scale", REFERENCE) for threads in (1, 2)
    }
    assert len(document["left_out"]) == 2 and (tmp_path / "s.png").exists()


def test_threads_are_set_and_put_back(monkeypatch, mini):
    seen, before = [], 1
    torch.set_num_threads(before)
    add(monkeypatch, "watch", lambda model: seen.append(torch.get_num_threads()))
    Comparison(Plan(mini, ["watch", REFERENCE], threads=2, rounds=1)).run()
    assert set(seen) == {2} and torch.get_num_threads() == before


def test_ctrl_c_writes_what_is_finished(capsys, monkeypatch, tmp_path, mini):
    calls = []

    def interrupted(model):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt

    add(monkeypatch, "interrupted", interrupted)
    out = tmp_path / "b.json"
    status, shown, err = call(
        capsys, "step-time", "--shapes", f"{mini},60m", "--rounds", 20, "--optimizers", "interrupted", "--json", out
    )
    document = json.loads(out.read_text())
    assert status == 130 and str(out) in err and document["interrupted"]
    assert len(document["comparisons"]) == 1 and 0 < document["rows"][0]["rounds"] < 20
    assert REFERENCE in shown


def test_ctrl_c_before_any_round_leaves_rows_without_numbers(monkeypatch, mini):
    def interrupted(model):
        raise KeyboardInterrupt

    add(monkeypatch, "interrupted", interrupted)
    document = compare("step-time", [Plan(mini, ["interrupted", REFERENCE])])
    assert document["interrupted"] and all("stopped" in row["skipped"] for row in document["rows"])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_dtypes(dtype, mini):
    comparison = Comparison(Plan(mini, ["stable_spam", REFERENCE], dtype=dtype, rounds=1))
    comparison.run()
    row, size = comparison.rows["stable_spam"], {"fp32": 4, "bf16": 2}[dtype]
    assert row["state_bytes_per_param"] == pytest.approx(8, rel=1e-2)  # fp32 moments in any case
    n = comparison.facts["parameters"]
    assert row["bytes_moved"] == pytest.approx(n * (3 * size + 16), rel=1e-2)


BAD = [
    (["step-time", "--shapes", "60n"], ["60n", "did you mean '60m'"]),
    (["step-time", "--optimizers", "stablespam"], ["stablespam", "did you mean 'stable_spam'"]),
    (["step-time", "--threads", "two"], ["--threads", "'two'"]),
    (["step-time", "--threads", "0"], ["--threads", "'0'"]),
    (["step-time", "--rounds", "0"], ["--rounds", "at least 1"]),
    (["step-time", "--budget", "nan"], ["--budget", "nan"]),
    (["step-time", "--dtype", "bf61"], ["--dtype", "did you mean 'bf16'"]),
    (["step-time", "--device", "tpu"], ["--device", "cpu, cuda"]),
    (["step-time", "--json", "/no/such/place.json"], ["--json", "a directory that exists"]),
    (["step-time", "--plot", "x.txt"], ["--plot", ".png"]),
    (["step-time", "--shapes", ","], ["--shapes", "nothing was given"]),
    (["step-time", "--rouns", "3"], ["--rouns", "did you mean '--rounds'", "evenstep bench step-time --help"]),
    (["step-tim"], ["step-tim", "step-time"]),
    ([], ["WHAT", "evenstep bench --help"]),
]


@pytest.mark.parametrize("words, told", BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_mistakes_are_one_clear_line(capsys, words, told):
    status, out, err = call(capsys, *words)
    assert status == 2 and not out and len(err.splitlines()) == 1
    for part in told:
        assert part in err


def test_list_shows_every_optimizer_and_where_it_comes_from(capsys):
    status, out, _ = call(capsys, "list")
    assert status == 0 and all(name in out for name in KNOWN) and version("torch") in out


@pytest.mark.parametrize("words", [["--help"], ["step-time", "--help"], ["list"]])
def test_help_and_list_do_not_load_torch(words):
    code = f"""
import sys
for name in "torch matplotlib rich numpy".split():
    sys.modules[name] = None  # importing it now fails
from evenstep.cli import main
sys.exit(main({["bench", *words]!r}))
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_completion_knows_the_options(capsys):
    pytest.importorskip("shtab")
    assert cli.main(["completion", "bash"]) == 0
    out = capsys.readouterr().out
    assert "--optimizers" in out and "step-time" in out
