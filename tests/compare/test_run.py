"""Comparisons that really train, through the program's own door."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compare_support import write_table
from train_support import write_corpus

from evenstep.cli import main
from evenstep.compare import engines
from evenstep.compare.cells import HOPELESS, Pool
from evenstep.compare.engines import Inline, Local, Process
from evenstep.compare.grid import Plan, Runner
from evenstep.compare.table import load_table
from evenstep.train.files import locked
from evenstep.train.interrupts import Interrupted

ROOT = Path(__file__).parents[2]
TABLES = sorted((ROOT / "recipes" / "tables").glob("*.toml"))
FAST = ["stable-spam-3", "spam-mitigation", "scale-1"]
"""Between them: transforms in front, every kind of group rule, low bits, GaLore's projector, a claim of memory."""

SMALL = """
title = "a test"
paper = "none"
reference = "adam/high"

[grid]
rows = ["adam", "spam"]
precisions = ["high"]
sizes = ["tiny"]

[row.adam]
set.optim.name = "adam"
[row.spam]
set.optim = {{ name = "spam", reset_interval = 2, warmup_steps = 1 }}
[precision.high]

[base]
data = {{ source = "text:{corpus}", cache_dir = "{cache}", vocab_size = 300, val_fraction = 0.1 }}
train = {{ batch_size = 4, seq_len = 16, threads = 1, device = "cpu" }}
eval = {{ every = 2, max_tokens = 500 }}
log = {{ every = 1 }}

[sweep]
rates = [1e-3, 4e-3]
tokens = 256
[final]
tokens = {tokens}
seeds = [0, 1]

[[claim]]
text = "SPAM beats Adam"
rule = "lower"
better = "spam/high"
than = "adam/high"
paper = "-"

[scale.small]
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def table(directory, corpus, tokens=512, text=SMALL):
    return write_table(directory, text.format(corpus=corpus, cache=corpus.parent / "cache", tokens=tokens))


@pytest.fixture(autouse=True)
def needs():
    pytest.importorskip("tokenizers")
    pytest.importorskip("safetensors")


def test_a_table_is_trained_tabled_stored_and_not_trained_again(tmp_path, corpus, capsys, monkeypatch):
    path, out = table(tmp_path, corpus), tmp_path / "out"
    words = ["compare", str(path), "--out", str(out), "--jobs", "0", "--store", str(tmp_path / "stored")]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert told.count("validation loss") == 8  # 2 rows x (2 rates + 2 seeds)
    assert "claim (tiny): SPAM beats Adam:" in told and "tokens to reference" in told
    where = out / "tables" / "mine"
    assert {p.name for p in where.iterdir()} >= {"results.json", "table.md", "cells.csv", "mine-curves.png"}
    document = json.loads((tmp_path / "stored" / "mine.json").read_text())
    adam = document["lines"][0]
    assert [cell["seed"] for cell in adam["finals"]] == [0, 1] and len(adam["sweep"]) == 2
    assert adam["state_bytes"] == pytest.approx(2 * adam["model_bytes"], rel=0.01)
    assert document["setting"]["tokens"] == 512 and document["hardware"][0]["device"] == "cpu"
    assert not list(out.glob("cells/*/checkpoints"))

    # A dry run knows the runs of the directory, and those of the store.
    for known in (["--out", str(out)], ["--out", str(tmp_path / "new"), "--store", str(tmp_path / "stored")]):
        assert main(["compare", str(path), "--dry-run", *known]) == 0
        assert capsys.readouterr().out.startswith("0 runs")
    assert not (tmp_path / "new").exists()

    monkeypatch.setattr(Inline, "submit", None)  # nothing may be trained now
    kept = (tmp_path / "stored" / "cells.jsonl").read_text()
    assert kept.count("\n") == 8
    for again in (words, [*words[:3], str(tmp_path / "another machine"), *words[4:]]):
        assert main(again) == 0
        assert json.loads((tmp_path / "stored" / "mine.json").read_text())["lines"] == document["lines"]
        assert (tmp_path / "stored" / "cells.jsonl").read_text() == kept

    (tmp_path / "stored" / "cells.jsonl").write_text(kept + '{"name": 3}\n')
    assert main(words) == 2
    assert "cells.jsonl, line 9: not the outcome of a run" in capsys.readouterr().err


def test_a_diverged_cell_is_remembered_and_a_failed_one_is_tried_again(tmp_path, corpus, capsys):
    text = SMALL.replace("rates = [1e-3, 4e-3]", "rates = [1e-3, 1e30]")
    assert main(["compare", str(table(tmp_path, corpus, text=text)), "--out", str(tmp_path / "a"), "--jobs", "0"]) == 0
    told = capsys.readouterr().out
    assert "lr 1e+30 seed 100 (sweep, 256 tokens): diverged: the loss is" in told
    assert "stopped early: adam/high at lr 1e+30: diverged" in told
    again = ["compare", str(table(tmp_path, corpus, text=text)), "--out", str(tmp_path / "a"), "--jobs", "0"]
    assert main(again) == 0 and "diverged: the loss" not in capsys.readouterr().out.split("stopped early")[0]

    broken = SMALL.replace('name = "spam"', 'name = "spam", no_such_thing = 3')
    words = ["compare", str(table(tmp_path, corpus, text=broken)), "--out", str(tmp_path / "a"), "--jobs", "0"]
    for _ in range(2):
        assert main(words) == 2
        out, err = capsys.readouterr()
        assert "failed: error: optim.no_such_thing" in out and err.count("\n") == 1 and "2 runs failed" in err


def test_mistakes_of_the_command_line(tmp_path, corpus, capsys):
    path = str(table(tmp_path, corpus))
    for words, why in (
        ([path, "--jobs", "-1"], "--jobs: -1 is out of range"),
        ([path, path], "same name"),
        ([path, "--scale", "smal"], "did you mean 'small'"),
        ([str(tmp_path / "none.toml")], "no such file"),
        ([path, "--jbos", "1"], "did you mean '--jobs'"),
    ):
        assert main(["compare", *words]) == 2
        assert why in capsys.readouterr().err


def test_a_dry_run_lists_what_would_be_trained(tmp_path, corpus, capsys):
    assert main(["compare", str(table(tmp_path, corpus)), "--dry-run", "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert told.count("sweep") == 4 and told.count("final") == 4 and "8 runs" in told
    assert not (tmp_path / "out").exists()


class Endless:
    """An engine whose jobs train until they are stopped; a handle is the list of what the job was told."""

    slots = 2

    def __init__(self):
        self.told = []

    def submit(self, job):
        return self.told

    def poll(self, handle):
        return "stop" in handle

    def stop(self, handle, wait=True):
        handle.append("stop" if wait else "ask")

    def fetch(self, handle):
        return "stopped after step 2 of 4"


def runs(plans, cells, losses):
    """A runner in the middle of ``cells``, each halfway at one of ``losses``."""
    runner = Runner(plans, Pool(cells), Endless(), lambda text: None)
    runner.wanted()
    for cell, loss in losses.items():
        runner.pool.run(cell).mkdir(parents=True)
        lines = [json.dumps({"step": i, "tokens": 64 * i, "loss": loss}) + "\n" for i in (1, 2)]
        (runner.pool.run(cell) / "metrics.jsonl").write_text("".join(lines))
        runner.running[cell.name] = (cell, [], time.monotonic())
    return runner


def test_a_hopeless_process_is_stopped_and_remembered(tmp_path, corpus):
    plan = Plan(load_table(table(tmp_path, corpus), "small"))
    good, bad = plan.sweep(plan.groups[0], {})
    runner = runs([plan], tmp_path / "cells", {good: 3.0, bad: 5.0})
    runner._watch()
    assert [runner.engine.poll(runner.running[cell.name][1]) for cell in (good, bad)] == [False, True]
    runner._ended(bad.name)
    assert runner.outcomes[bad.name].status == HOPELESS and runner.outcomes[bad.name].tokens == 128
    assert bad.outcome(Pool(tmp_path / "cells")).status == HOPELESS
    assert plan.best_rate(plan.groups[0], runner.outcomes) is None  # the other one is not done


def other_table(directory, corpus, change):
    directory.mkdir()
    return Plan(load_table(table(directory, corpus, text=change(SMALL)), "small"))


def test_a_cell_is_not_measured_against_another_tables_setting(tmp_path, corpus):
    short = Plan(load_table(table(tmp_path, corpus), "small"))
    long = other_table(tmp_path / "long", corpus, lambda text: text.replace("seq_len = 16", "seq_len = 32"))
    bad, easy = short.sweep(short.groups[0], {})[1], long.sweep(long.groups[0], {})[0]
    runner = runs([short, long], tmp_path / "cells", {easy: 3.0, bad: 5.0})
    runner._watch()
    assert not runner.engine.poll(runner.running[bad.name][1])


def test_a_cell_that_some_table_needs_to_its_end_is_not_cut_short_and_one_that_was_is_trained_again(tmp_path, corpus):
    plan = Plan(load_table(table(tmp_path, corpus), "small"))
    whole = other_table(tmp_path / "all", corpus, lambda text: text.replace("[sweep]\n", "[sweep]\nall = true\n"))
    good, bad = plan.sweep(plan.groups[0], {})
    runner = runs([plan, whole], tmp_path / "cells", {good: 3.0, bad: 5.0})
    runner._watch()
    assert not runner.engine.poll(runner.running[bad.name][1])

    runner.pool.give_up(bad, HOPELESS, "worse", 128, 5.0)
    for plans, waits in (([plan], False), ([plan, whole], True)):
        later = Runner(plans, runner.pool, Inline(), lambda text: None)
        assert (bad.name in {cell.name for cell in later._waiting()}) == waits


def test_the_claims_of_one_table_are_settled_after_the_others_as_given(tmp_path, corpus):
    one = Plan(load_table(table(tmp_path, corpus), "small"))
    other = other_table(tmp_path / "other", corpus, lambda text: text.replace("seq_len = 16", "seq_len = 32"))
    runner = runs([other, one], tmp_path / "cells", {})
    assert [cell.config.train.seq_len for cell in runner.wanted()] == [32] * 4 + [16] * 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_every_process_to_save_before_it_waits_for_one(tmp_path, corpus, monkeypatch, number):
    engine = Endless()
    plans = [Plan(load_table(table(tmp_path, corpus), "small"))]
    runner = Runner(plans, Pool(tmp_path / "cells"), engine, lambda text: None)
    monkeypatch.setattr(runner, "_watch", lambda: os.kill(os.getpid(), number))
    # nohup has SIGHUP ignored, a shell's background SIGINT.
    usual = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {each: signal.signal(each, handler) for each, handler in usual.items()}
    try:
        with pytest.raises(Interrupted, match="is saved") as stopped:
            runner.run()
        assert {each: signal.getsignal(each) for each in usual} == usual
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert stopped.value.signal == number and engine.told == ["ask", "ask", "stop", "stop"]


def test_a_process_is_asked_once(tmp_path, corpus):
    """A second signal would end it without saving."""
    code = (
        "import signal, time, sys\nsignal.signal(2, lambda *_: print('asked', flush=True))\nprint('up', flush=True)\n"
    )
    running = subprocess.Popen([sys.executable, "-c", code + "time.sleep(3)"], stdout=subprocess.PIPE, text=True)
    assert running.stdout.readline() == "up\n"
    engine, handle = Local(1), Process(None, running)
    engine.stop(handle, wait=False)
    assert running.stdout.readline() == "asked\n"
    engine.stop(handle)
    assert running.stdout.read() == ""


def test_processes_get_a_gpu_each(tmp_path, corpus, monkeypatch):
    plan = Plan(load_table(table(tmp_path, corpus), "small"))
    [cell, *_] = plan.sweep(plan.groups[0], {})
    seen, pool = [], Pool(tmp_path / "cells")
    monkeypatch.setattr(engines.subprocess, "Popen", lambda command, **how: seen.append((command, how["env"])))
    for given, expected in (("", ["0", "1", "0"]), ("4,7", ["4", "7", "4"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        seen.clear()
        engine = Local(3, gpus=2)
        for _ in range(3):
            engine.submit(cell.job(pool, print))
        assert [env["CUDA_VISIBLE_DEVICES"] for _, env in seen] == expected
    assert seen[0][0][2:4] == ["evenstep", "pretrain"] and seen[0][0][-2] == "--out"
    Local(1, gpus=2).submit(cell.job(pool, print, processes=2))
    assert seen[-1][1]["CUDA_VISIBLE_DEVICES"] == "4,7" and "torch.distributed.run" in seen[-1][0]
    (pool.run(cell) / "checkpoints" / "step-000002").mkdir(parents=True)
    Local(1).submit(cell.job(pool, print))
    assert "--resume" in seen[-1][0]


def test_a_miniature_of_the_most_different_tables(tmp_path, capsys):
    pytest.importorskip("pytorch_optimizer")
    # One rate, so one run of a line; test_a_miniature_of_every_table has the sweeps of these tables, too.
    whole = [(ROOT / "recipes" / "tables" / f"{name}.toml").as_posix() for name in FAST]
    text = "include = ['{}']\n[scale.smoke.sweep]\nrates = [1e-3]\n"
    paths = [
        str(write_table(tmp_path, text.format(path), f"{name}.toml")) for name, path in zip(FAST, whole, strict=True)
    ]
    assert main(["compare", *paths, "--smoke", "--out", str(tmp_path / "out"), "--store", str(tmp_path / "s")]) == 0
    for name in FAST:
        document = json.loads((tmp_path / "s" / f"{name}.json").read_text())
        assert all(line["mean"] is not None for line in document["lines"]), name
        assert all(claim["verdict"] != "not measured" for claim in document["claims"]), name
    capsys.readouterr()


def test_a_report_of_what_is_done_so_far_trains_nothing(tmp_path, corpus, capsys, monkeypatch):
    path = table(tmp_path, corpus)
    words = ["compare", str(path), "--out", str(tmp_path / "out"), "--store", str(tmp_path / "s")]
    assert main([*words, "--report"]) == 0
    assert not list((tmp_path / "s").glob("*.json"))  # nothing is known yet
    assert main([*words, "--jobs", "0"]) == 0
    kept = (tmp_path / "s" / "cells.jsonl").read_text().splitlines()
    whole = json.loads((tmp_path / "s" / f"{path.stem}.json").read_text())
    (tmp_path / "s" / "cells.jsonl").write_text("\n".join(kept[:-1]) + "\n")
    monkeypatch.setattr(Inline, "submit", None)
    monkeypatch.setattr(Local, "submit", None)
    with locked(tmp_path / "out" / "cells"):  # as when another process trains
        assert main([*words[:-3], str(tmp_path / "elsewhere"), *words[-2:], "--report"]) == 0
    part = json.loads((tmp_path / "s" / f"{path.stem}.json").read_text())
    count = [sum(len(line["sweep"]) + len(line["finals"]) for line in each["lines"]) for each in (part, whole)]
    assert count[0] == count[1] - 1


@pytest.mark.slow
def test_a_miniature_of_every_table(tmp_path, capsys):
    """``make compare-smoke``, and the page of what it leaves."""
    pytest.importorskip("pytorch_optimizer")
    began = time.process_time()
    words = ["compare", *map(str, TABLES), "--smoke", "--out", str(tmp_path / "out"), "--store", str(tmp_path / "s")]
    assert main(words) == 0
    assert time.process_time() - began < 300
    assert {path.stem for path in (tmp_path / "s").glob("*.json")} == {path.stem for path in TABLES}
    assert main(["results", str(tmp_path / "s"), "--out", str(tmp_path / "results.md")]) == 0
    assert "| **not measured** |" not in (tmp_path / "results.md").read_text()
    capsys.readouterr()


@pytest.mark.slow
def test_a_stopped_comparison_goes_on_where_it_was(tmp_path, corpus):
    """Two processes at a time; Ctrl-C; the same command again gives what an uninterrupted one gives."""
    path = table(tmp_path, corpus, tokens=6_000)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(out):
        words = [sys.executable, "-m", "evenstep", "compare", str(path), "--out", str(tmp_path / out), "--jobs", "2"]
        return [*words, "--store", str(tmp_path / f"{out}-stored")]

    running = subprocess.Popen(command("a"), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        logs = [p for p in (tmp_path / "a").glob("cells/*/metrics.jsonl") if p.read_text().count('"loss"') > 15]
        if logs:
            break
        time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=120)
    assert running.returncode == 130 and b"every run is saved" in err
    stopped = [p.parent for p in (tmp_path / "a").glob("cells/*/checkpoints")]
    assert stopped and not any((run / "summary.json").exists() for run in stopped)

    for out in ("a", "b"):
        subprocess.run(command(out), cwd=ROOT, env=environment, check=True, capture_output=True, timeout=500)
    first, second = (json.loads((tmp_path / f"{out}-stored" / "mine.json").read_text()) for out in ("a", "b"))
    for one, other in zip(first["lines"], second["lines"], strict=True):
        assert [cell["loss"] for cell in one["finals"]] == [cell["loss"] for cell in other["finals"]]
