"""``guard.*``: a run that skips bad batches, lowers the rate, rewinds or stops."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from parallel_support import ROOT, by_step, silent, train
from train_support import quick, write_corpus

from evenstep.errors import EvenstepError
from evenstep.train.checkpoint import list_checkpoints, load_model_state
from evenstep.train.config_io import load_config
from evenstep.train.memory import least_memory, model_shape
from evenstep.train.trainer import Run

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

SIZE = 4  # sequences per step: step k reads the rows from 4 (k - 1)
OPTIONS = {
    "optim__name": "stable_spam", "train__steps": "44", "eval__every": "20", "checkpoint__every": "11",
    "guard__snapshot_every": "8",
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def harmed(run, positions, factor=1000.0):
    """The loss and its gradients are ``factor`` times larger on the batches that start at ``positions``."""
    real, loader = run.model.loss, run.loader

    def loss(*args, **options):
        bad = loader.position - SIZE in positions and run.model.training
        return real(*args, **options) * (factor if bad else 1.0)

    run.model.loss = loss
    return run


def guarded(corpus, out, ladder, positions, say=silent, factor=1000.0, **more):
    return harmed(Run(quick(corpus, out, **(OPTIONS | {"guard__ladder": ladder} | more)), say=say), positions, factor)


def never_saw(corpus, out, positions, **more):
    """A run without a guard whose loader leaves the batches at ``positions`` out."""
    run = Run(quick(corpus, out, **(OPTIONS | more)), say=silent)
    run.skipped = [(position, position + SIZE) for position in positions]
    run.fit()
    return run


def assert_same(run, expected):
    assert by_step(run.out) == by_step(expected.out)
    for p, q in zip(run.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(p, q)


def actions(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == "guard"]


BAD = [25 * SIZE, 38 * SIZE]


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory):
    """The run that never saw the batches at `BAD`."""
    return never_saw(corpus, tmp_path_factory.mktemp("expected") / "plain", BAD)


@pytest.mark.parametrize("factor", [1000.0, float("nan")], ids=["finite", "nan"])
@pytest.mark.parametrize("ladder", ["skip", "rewind", "all"])
def test_a_run_with_bad_batches_equals_one_that_never_saw_them(corpus, tmp_path, expected, ladder, factor):
    bad = BAD
    said = []
    run = guarded(corpus, tmp_path / "run", ladder, bad, said.append, factor)
    summary = run.fit()
    assert_same(run, expected)
    assert summary["steps"] == 44 and summary["skipped_sequences"] == 2 * SIZE
    found = actions(run.out)
    assert [record["rows"][0] for record in found] == bad
    assert {record["action"] for record in found} == {"rewind" if ladder == "rewind" else "skip"}
    if ladder == "rewind":
        assert [record["step"] for record in found] == [24, 32], "back to the snapshots"
        assert any("back to" in line and "step-000024" in line for line in said)


def test_steps_that_are_judged_late_are_undone(corpus, tmp_path):
    """As on a GPU, where the guard reads the device once in some steps."""
    bad = [26 * SIZE]
    run = guarded(corpus, tmp_path / "run", "rewind", bad, log__every="5", eval__every="10")
    run.guard.check_every = 5
    flushed, flush = [], run.guard.flush
    run.guard.flush = lambda: (flushed.append(run.step_number), flush())
    run.fit()
    assert [record["bad_step"] for record in actions(run.out)] == [27]
    # Log steps, checkpoints and snapshots have to know the verdict; the other steps do not wait for it.
    assert set(flushed) <= {step for step in range(45) if step % 5 == 0 or step % 8 == 0 or step % 11 == 0}
    assert_same(run, never_saw(corpus, tmp_path / "plain", bad, log__every="5", eval__every="10"))


def test_a_rewind_after_skips_removes_checkpoints_of_steps_that_are_undone(corpus, tmp_path):
    # The first bad batch comes at step 30; the checkpoint of step 33 is saved before the ladder reaches the rewind.
    bad = [position * SIZE for position in (29, 31, 33, 36)]
    run = guarded(corpus, tmp_path / "run", "skip,rewind,stop", bad)
    kept = []
    real = run._drop_undone_steps

    def drop():
        kept.append([path.name for path in list_checkpoints(run.out / "checkpoints")])
        real()
        kept.append([path.name for path in list_checkpoints(run.out / "checkpoints")])

    run._drop_undone_steps = drop
    run.fit()
    assert kept == [["step-000033", "step-000022"], ["step-000024", "step-000022"]]
    told = [(record["step"], record["bad_step"], record["action"]) for record in actions(run.out)]
    assert told == [(24, 30, "skip"), (24, 31, "skip"), (24, 32, "skip"), (24, 34, "rewind")], (
        "none was cut from the log"
    )
    assert_same(run, never_saw(corpus, tmp_path / "plain", bad))


class Killed(BaseException):
    pass


def _until_killed(run, progress, stop):
    real = run.step

    def step():
        if run.skipped and run.step_number == 26:
            raise Killed
        return real()

    run.step = step
    type(run).train(run, progress, stop)


def test_a_run_killed_after_a_rewind_resumes_as_if_it_had_not_been(corpus, tmp_path):
    bad = [25 * SIZE]
    run = guarded(corpus, tmp_path / "run", "rewind,stop", bad)
    run.train = functools.partial(_until_killed, run)
    with pytest.raises(Killed):
        run.fit()
    again = Run.resume(tmp_path / "run", say=silent)
    assert again.step_number == 24 and again.skipped == [(100, 104)]
    assert [event["action"] for event in again.guard.events] == ["rewind"]
    harmed(again, bad).fit()
    assert_same(again, never_saw(corpus, tmp_path / "plain", bad))


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.train.test_guard import OPTIONS, SIZE, harmed, silent
from train_support import quick
from evenstep.train.checkpoint import list_checkpoints
from evenstep.train.trainer import Run

corpus, out, at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
if list_checkpoints(out / "checkpoints"):
    run = Run.resume(out, say=silent)
else:
    run = Run(quick(corpus, out, **OPTIONS, guard__ladder="skip,rewind,stop"), say=silent)
harmed(run, {position * SIZE for position in (29, 31, 33, 36)})
calls = 0

def count(event, arguments):
    # Every system call of Python that changes a file, while the run rewinds and in the steps after it.
    global calls
    writes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")
    if event == "open" and isinstance(arguments[1], str):
        writes = set(arguments[1]) & set("wax+")
    if rewinding and writes:
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)

rewinding, real = False, run._rewind

def rewind():
    global rewinding
    rewinding = True
    return real()

run.guard.rewind = rewind
sys.addaudithook(count)
run.fit()
print("calls", calls)
"""


@pytest.mark.slow
def test_kills_during_rewinds_lose_nothing(corpus, tmp_path):
    """A process that is killed at each of its first 20 changes of a file after the start of a rewind, and goes on."""
    bad = [position * SIZE for position in (29, 31, 33, 36)]
    expected = by_step(never_saw(corpus, tmp_path / "plain", bad).out)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}"}
    for at in range(1, 21):
        out = tmp_path / f"run-{at}"
        for limit in (at, 10**9):
            words = [sys.executable, "-c", KILLED, str(corpus), str(out), str(limit)]
            done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
            assert done.returncode == (0 if limit == 10**9 else -9), done.stderr[-2000:]
        assert by_step(out) == expected, at


def test_the_end_of_the_ladder_stops_with_a_checkpoint_and_the_run_can_go_on(corpus, tmp_path):
    run = guarded(corpus, tmp_path / "run", "stop", [25 * SIZE])
    with pytest.raises(EvenstepError, match=r"the loss is \S+, usually \S+ at step 26, training stopped"):
        run.fit()
    newest = list_checkpoints(run.out / "checkpoints")[0]
    assert newest.name == "step-000025"
    saved = load_model_state(newest)
    assert all(torch.equal(saved[name], p) for name, p in run.model.named_parameters())
    run.lock = None
    again = Run.resume(tmp_path / "run", say=silent)
    again.fit()
    assert_same(again, never_saw(corpus, tmp_path / "plain", []))


def test_a_spent_budget_ends_the_run(corpus, tmp_path):
    everything_from_25 = set(range(25 * SIZE, 1000, SIZE))
    run = guarded(corpus, tmp_path / "run", "skip", everything_from_25, factor=float("nan"), guard__budget="5")
    with pytest.raises(EvenstepError, match="the loss is not finite, for the 6th time since the last checkpoint"):
        run.fit()


def test_a_lowered_rate_is_in_the_log_and_ends(corpus, tmp_path):
    said = []
    constant = {"schedule__name": "constant", "schedule__warmup_steps": "0"}
    run = guarded(corpus, tmp_path / "run", "lower_lr", [21 * SIZE], said.append, **constant)
    run.fit()
    rates = {
        record["step"]: record["lr"]
        for record in map(json.loads, (run.out / "metrics.jsonl").read_text().splitlines())
        if "lr" in record and "kind" not in record
    }
    low = [step for step, rate in rates.items() if rate < 0.002]
    assert low == list(range(22, 42))
    assert any("the next 20 steps use 0.1 of the learning rate" in line for line in said)


def test_a_calm_run_is_the_same_with_and_without_a_guard(corpus, tmp_path):
    run = guarded(corpus, tmp_path / "run", "all", [])
    run.fit()
    assert not run.guard.events and not actions(run.out)
    assert_same(run, never_saw(corpus, tmp_path / "plain", []))


def test_a_rate_that_is_lowered_late_keeps_the_batch_that_was_applied(corpus, tmp_path):
    said = []
    run = guarded(corpus, tmp_path / "run", "lower_lr", [26 * SIZE], said.append, 50.0, log__every="5")
    run.guard.check_every = 5
    run.fit()
    assert run.skipped == [] and any("sequences 104 to 107 are kept; the next 20 steps" in line for line in said), said


def test_a_run_without_a_guard_resumes_with_one(corpus, tmp_path):
    more = {**OPTIONS, "train__steps": "22"}
    Run(quick(corpus, tmp_path / "run", **more), say=silent).fit()
    config = quick(corpus, tmp_path / "run", **OPTIONS, guard__ladder="all")
    run = Run.resume(tmp_path / "run", config, say=silent)
    bad = [43 * SIZE]
    harmed(run, bad).fit()
    assert [event["step"] for event in run.guard.events] == [43]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"guard.ladder": "jump"}, "guard.ladder: 'jump' is not"),
        ({"guard.ladder": "stop,skip"}, "guard.ladder: 'stop,skip' is not"),
        ({"guard.ladder": ",stop"}, "guard.ladder: ',stop' is not"),
        ({"guard.ladder": "skip", "train.on_nan": "skip"}, "train.on_nan skip has no effect with guard.ladder skip"),
        ({"guard.norm_ratio": "1"}, "guard.norm_ratio: 1.0 is out of range"),
    ],
)
def test_what_does_not_fit_is_told_at_once(options, words):
    with pytest.raises(EvenstepError, match=words):
        load_config(None, [("data.source", "text:x"), *options.items()])


def test_a_snapshot_is_part_of_the_memory_that_a_run_needs():
    plain, guarded = (load_config(None, [("data.source", "text:x"), ("guard.ladder", way)]) for way in ("off", "all"))
    shape = model_shape(plain, 300)
    before, after = least_memory(plain, shape, 1, 1), least_memory(guarded, shape, 1, 1)
    assert after.pop("snapshot of the guard") == before["parameters"] + before["optimizer state"] and after == before


def _rewinds(run):
    if run.world.rank == 1:  # it alone sees the spike
        harmed(run, {25 * SIZE})
    run.fit()
    assert run.skipped == [(100, 104)], run.skipped


def _skips(run):
    run.skipped = [(100, 104)]
    run.fit()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_all_processes_rewind_together(corpus, tmp_path, mode):
    options = OPTIONS | {"parallel__mode": mode}
    train(2, corpus, (tmp_path / "run", options | {"guard__ladder": "rewind,stop"}, False, _rewinds))
    train(2, corpus, (tmp_path / "plain", options, False, _skips))
    assert by_step(tmp_path / "run") == by_step(tmp_path / "plain")
