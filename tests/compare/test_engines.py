"""Engines: the same cells on local processes, on submitit's executors and on a Ray cluster of this machine."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from compare_support import plan_of

from evenstep.compare import engines
from evenstep.compare.cells import Pool, Task
from evenstep.compare.engines import PREEMPTED, Command, Job, Local, Ray, Slurm, engine_for
from evenstep.compare.grid import REQUEUES, CellList, Runner
from evenstep.errors import EvenstepError

PROGRAM = """
import signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
if sys.argv[2] == "again":
    print("resumed"); sys.exit(0)
if sys.argv[2] == "fails":
    print("evenstep: error: nothing to eat"); sys.exit(2)
if sys.argv[2] == "quick":
    sys.exit(0)
def save(*_):
    step = folder / "step-000001"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text("{}")
    sys.exit(130)
signal.signal(signal.SIGINT, save)
print("up", flush=True)
time.sleep(60)
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """``job("waits")`` runs until it is asked to save; with a checkpoint it resumes and ends well."""
    monkeypatch.setattr(engines, "list_checkpoints", lambda folder: [*folder.glob("step-*")])

    def make(what, name="one"):
        words = [sys.executable, "-c", PROGRAM, str(tmp_path / name)]
        command = Command([*words, what], [*words, "again"], tmp_path / name, tmp_path / f"{name}.log")
        return Job(name, command, lambda: None)

    return make


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.05)


def slurm(tmp_path, cluster="local"):
    pytest.importorskip("submitit")
    return Slurm(2, tmp_path / "slurm", cluster=cluster, timeout_min=2)


@pytest.mark.parametrize("make", [lambda path: Local(2), slurm], ids=["local", "slurm"])
def test_a_job_is_submitted_polled_stopped_and_fetched(tmp_path, job, make):
    engine = make(tmp_path)
    waits, fails = engine.submit(job("waits")), engine.submit(job("fails", "two"))
    until(lambda: engine.poll(fails))
    assert engine.fetch(fails) == "error: nothing to eat"
    until(lambda: (tmp_path / "one.log").exists() and "up" in (tmp_path / "one.log").read_text())
    assert not engine.poll(waits)
    engine.stop(waits, wait=False)
    engine.stop(waits)
    assert engine.poll(waits) and engine.fetch(waits).startswith(PREEMPTED)
    assert (tmp_path / "one" / "step-000001").exists()

    again = engine.submit(job("waits"))  # the same cell: it resumes
    until(lambda: engine.poll(again))
    assert engine.fetch(again) is None and "resumed" in (tmp_path / "one.log").read_text()


def test_a_job_that_slurm_preempts_saves_and_goes_into_the_queue_again(tmp_path, job):
    engine = slurm(tmp_path)
    handle = engine.submit(job("waits"))
    until(lambda: (tmp_path / "one.log").exists() and "up" in (tmp_path / "one.log").read_text())
    for process in Path("/proc").glob("[0-9]*"):  # the job itself, as SLURM knows it
        words = (process / "cmdline").read_bytes().split(b"\0") if process.exists() else []
        if b"submitit.core._submit" in words and str(tmp_path / "slurm").encode() in words:
            os.kill(int(process.name), signal.SIGUSR2)
    until(lambda: engine.poll(handle))
    assert engine.fetch(handle) is None and "resumed" in (tmp_path / "one.log").read_text()


def test_submitits_debug_executor_runs_a_job_in_this_process(tmp_path, job):
    before = signal.getsignal(signal.SIGTERM)
    engine = slurm(tmp_path, "debug")
    handle = engine.submit(job("quick"))
    assert engine.fetch(handle) is None and engine.poll(handle)
    signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_a_job_on_a_ray_cluster_of_this_machine(tmp_path, monkeypatch, job):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    engine = Ray(2, num_cpus=2, include_dashboard=False)
    try:
        waits, fails = engine.submit(job("waits")), engine.submit(job("fails", "two"))
        until(lambda: engine.poll(fails))
        assert engine.fetch(fails) == "error: nothing to eat"
        until(lambda: (tmp_path / "one.log").exists() and "up" in (tmp_path / "one.log").read_text())
        assert not engine.poll(waits)
        engine.stop(waits)
        assert engine.fetch(waits).startswith(PREEMPTED)
        until((tmp_path / "one" / "step-000001").exists)
    finally:
        ray.shutdown()


class Preempting:
    """An engine of which the first ``times`` jobs are preempted; the others are done here."""

    slots = 1

    def __init__(self, times):
        self.times, self.submitted = times, 0

    def submit(self, job):
        self.submitted += 1
        if self.submitted <= self.times:
            return f"{PREEMPTED}: the machine was needed"
        return job.here() and None

    def poll(self, handle):
        return True

    def stop(self, handle, wait=True): ...

    def fetch(self, handle):
        return handle


def work(setting, directory, say, offset=0):
    say(f"at work on {setting['seed']}")
    return {"score": setting["seed"] + offset, "lost": float("nan")}


def task(seed=0, **more):
    return Task(f"mine/{seed}", "tests.compare.test_engines:work", {"seed": seed}, ("numpy",), {"offset": 7}, **more)


@pytest.mark.parametrize("times", [1, REQUEUES, REQUEUES + 1])
def test_a_preempted_cell_is_submitted_again_but_not_for_ever(tmp_path, times):
    told = []
    runner = Runner([CellList(lambda outcomes: [task(3)])], Pool(tmp_path), Preempting(times), told.append)
    runner.run()
    assert ("mine/3" in runner.failed) == (times > REQUEUES)
    assert sum("submitted again" in line for line in told) == min(times, REQUEUES)
    if times <= REQUEUES:
        assert runner.outcomes["mine/3"].summary["score"] == 10


def test_a_task_is_done_in_a_process_of_its_own_too(tmp_path, monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{root}:{root / 'tests/support'}")
    runner = Runner([CellList(lambda outcomes: [task(0), task(1)])], Pool(tmp_path), Local(2), lambda text: None)
    runner.run()
    assert [runner.outcomes[f"mine/{seed}"].summary["score"] for seed in (0, 1)] == [7, 8]
    run = runner.outcomes["mine/1"].summary
    assert run["setting"] == {"seed": 1} and run["lost"] is None and run["versions"]["numpy"] and run["hardware"]
    assert "at work on 1" in (tmp_path / "mine" / "1.log").read_text()


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    for words, why in (
        (("lokal", 1), "--engine: 'lokal' is not one of local, slurm, ray; did you mean 'local'"),
        (("local", -1), "--jobs: -1 is out of range"),
        (("slurm", 1), "--engine slurm: "),  # no sbatch here
    ):
        if words[0] == "slurm":
            pytest.importorskip("submitit")
        with pytest.raises(EvenstepError) as caught:
            engine_for(*words, tmp_path, options={})
        assert why in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(EvenstepError, match="--processes"):
        engine_for("local", 0, tmp_path, processes=2, options={})
    with pytest.raises(EvenstepError, match="--engine-option"):
        engine_for("local", 1, tmp_path, options={"address": "auto"})
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EvenstepError, match=r"pip install 'evenstep\[ray\]'"):
        engine_for("ray", 1, tmp_path, options={})


def test_a_cell_asks_for_torchrun_where_it_is_to_use_several_gpus(tmp_path):
    plan = plan_of(tmp_path)
    [cell, *_] = plan.sweep(plan.groups[0], {})
    words = cell.job(Pool(tmp_path), print, 4).command.first
    assert words[2:7] == ["torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m"]
    assert words[7:9] == ["evenstep", "pretrain"]
