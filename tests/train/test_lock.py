"""Who may write into a run's folder: the lock, and links that lead out of it."""

import errno
import json
import os
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
from train_support import flags, quick, quick_overrides, write_corpus

from evenstep import cli
from evenstep.errors import EvenstepError
from evenstep.telemetry.runlog import load_run
from evenstep.train import files
from evenstep.train.files import hold, is_running, locked, replace_text
from evenstep.train.log import read_metrics
from evenstep.train.runs import list_runs
from evenstep.train.trainer import Run

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs flock")
ROOT = Path(__file__).parents[2]

HOLD = """
import sys
from pathlib import Path
from evenstep.train.files import hold
lock = hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def silent(_):
    pass


@contextmanager
def another_process(run):
    """Holds the lock of the run; yields its number."""
    run.mkdir(exist_ok=True)
    command = [sys.executable, "-c", HOLD, str(run)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process.pid
        process.stdin.close()


def content(directory):
    """Every file, and when it and every directory was changed."""
    there = [directory, *sorted(directory.rglob("*"))]
    return {str(path): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in there}


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    Run(quick(corpus, out, train__steps="2"), say=silent).fit()
    return out


@pytest.fixture
def run_folder(finished, tmp_path):
    import shutil

    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


# ---- one process at a time ----


def test_whoever_is_refused_writes_nothing_and_says_who_trains(corpus, run_folder, tmp_path):
    with another_process(run_folder) as pid:
        before = content(run_folder)
        for start in (lambda: Run.resume(run_folder, say=silent), lambda: Run(quick(corpus, run_folder), say=silent)):
            with pytest.raises(EvenstepError, match=rf"is being trained by another process \(process {pid} on \S+\)"):
                start()
        assert list_runs(run_folder)[0].status == "running"
        assert content(run_folder) == before
    assert list_runs(run_folder)[0].status == "finished"
    Run.resume(run_folder, say=silent)


def test_a_start_that_lost_the_race_leaves_the_winners_files(corpus, tmp_path, monkeypatch):
    """Both had found the folder free; the other one was the first to take the lock, and has written since."""
    out, started = tmp_path / "run", []
    real = files.check_creatable

    def look(directory):
        real(directory)
        if not started:
            winner = another_process(out)
            started.append(winner)
            winner.__enter__()
            (out / "config.toml").write_text("seed = 1\n")
            (out / "metrics.jsonl").write_text('{"step": 1}\n')
            started.append(content(out))

    monkeypatch.setattr("evenstep.train.files.check_creatable", look)
    try:
        with pytest.raises(EvenstepError, match="another process"):
            Run(quick(corpus, out), say=silent)
        assert content(out) == started[1]
    finally:
        started[0].__exit__(None, None, None)


def test_a_start_after_another_run_has_come_and_gone_is_refused(corpus, finished, tmp_path, monkeypatch):
    import shutil

    out = tmp_path / "run"
    monkeypatch.setattr(
        "evenstep.train.files.check_creatable", lambda _: out.exists() or shutil.copytree(finished, out)
    )
    with pytest.raises(EvenstepError, match="already has a run"):
        Run(quick(corpus, out), say=silent)


def test_a_run_holds_its_lock_from_its_first_write_to_its_end(corpus, tmp_path):
    out = tmp_path / "run"
    probe = (
        f"from pathlib import Path; from evenstep.train.files import is_running; print(is_running(Path({str(out)!r})))"
    )

    def seen():
        return subprocess.run(
            [sys.executable, "-c", probe, out], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()

    run = Run(quick(corpus, out, train__steps="1"), say=silent)
    assert seen() == "True"
    run.fit()
    assert seen() == "False", "also while the object is still there"


def test_what_a_killed_start_left_behind_is_no_run(corpus, tmp_path):
    out = tmp_path / "run"
    with another_process(out):
        pass
    (out / ".config.toml.partial").write_text("half")
    Run(quick(corpus, out), say=silent)


def test_two_runs_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    from evenstep.train.config import Config

    class Clock:
        @staticmethod
        def now():
            from datetime import datetime

            return datetime(2026, 1, 1)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "datetime", Clock)
    first = files.fresh_directory(Config())
    first.mkdir(parents=True)
    assert files.fresh_directory(Config()).name == f"{first.name}-2"


def test_listing_runs_never_keeps_one_from_starting(tmp_path, monkeypatch):
    """It holds the lock for a moment, to see whether it is free."""
    with another_process(tmp_path) as _:
        monkeypatch.setattr(time, "sleep", lambda _: None)
        with pytest.raises(EvenstepError):
            hold(tmp_path)
    tries = []
    real = files.fcntl.flock

    def busy_once(descriptor, how):
        tries.append(how)
        if len(tries) == 1:
            raise BlockingIOError(errno.EWOULDBLOCK, "busy")
        real(descriptor, how)

    monkeypatch.setattr(files.fcntl, "flock", busy_once)
    hold(tmp_path)
    assert len(tries) == 2


def test_a_lock_is_not_that_of_a_folder_that_was_deleted(tmp_path, monkeypatch):
    run, real = tmp_path / "run", files.fcntl.flock
    run.mkdir()

    def replaced(descriptor, how):
        real(descriptor, how)
        if not (run / "gone").exists():
            (run / ".lock").unlink()
            (run / "gone").touch()

    monkeypatch.setattr(files.fcntl, "flock", replaced)
    lock = hold(run)
    assert lock.key == files._key(os.stat(run / ".lock"))


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO])
def test_a_file_system_without_locks_is_told_of_and_no_other_process(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="has no locks"), locked(tmp_path):
        pass
    assert not is_running(tmp_path)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "open", refuse)
    with pytest.raises(EvenstepError, match="cannot be opened for writing"):
        hold(tmp_path)
    assert not is_running(tmp_path)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_out_that_is_a_file_is_one_line(corpus, tmp_path, kind):
    (tmp_path / "file").write_text("precious")
    out = tmp_path / "file" if kind == "file" else tmp_path / "file" / "run"
    with pytest.raises(EvenstepError, match="give another --out"):
        Run(quick(corpus, out), say=silent)
    assert (tmp_path / "file").read_text() == "precious"


# ---- links ----


def test_a_lock_that_is_a_link_is_refused_and_its_target_left_alone(tmp_path):
    (tmp_path / "mine").write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text("seed = 1\n")
    (run / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(EvenstepError, match=r"\.lock is a link"), locked(run):
        pass
    (run / ".lock").unlink()
    (run / ".lock").symlink_to(tmp_path / "new")
    with pytest.raises(EvenstepError, match=r"\.lock is a link"):
        hold(run)
    assert not is_running(run) and list_runs(run)[0].status != "running"
    assert (tmp_path / "mine").read_text() == "precious" and not (tmp_path / "new").exists()


def test_a_lock_with_something_else_in_it_or_with_another_name_is_not_written(tmp_path):
    for name, link in (("one", os.link), ("other", None)):
        run = tmp_path / name
        run.mkdir()
        (tmp_path / f"{name}.txt").write_text("" if link else "precious")
        if link:
            link(tmp_path / f"{name}.txt", run / ".lock")
        else:
            (tmp_path / f"{name}.txt").rename(run / ".lock")
        before = (run / ".lock").read_text()
        with locked(run):
            assert is_running(run)
        assert (run / ".lock").read_text() == before


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_lock_that_is_no_file_is_one_line_and_does_not_block(tmp_path, make):
    make(tmp_path / ".lock")
    assert not is_running(tmp_path)
    with pytest.raises(EvenstepError, match=r"\.lock"):
        hold(tmp_path)


def test_a_small_file_is_not_written_through_a_link(tmp_path):
    for name in ("mine", "partial"):
        (tmp_path / name).write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / "summary.json").symlink_to(tmp_path / "mine")
    (run / ".summary.json.partial").symlink_to(tmp_path / "partial")
    replace_text(run / "summary.json", "{}")
    assert (tmp_path / "mine").read_text() == (tmp_path / "partial").read_text() == "precious"
    assert (run / "summary.json").read_text() == "{}" and not (run / "summary.json").is_symlink()


LINKS = ["config.toml", "metrics.jsonl", "summary.json", "curve.png", "checkpoints", "tensorboard", "wandb"]


@pytest.mark.parametrize("name", LINKS)
def test_a_run_with_a_link_out_of_its_folder_is_not_gone_on_with(run_folder, tmp_path, name):
    """Old checkpoints are deleted, pictures replaced, logs cut: not those of another run."""
    place, outside = run_folder / name, tmp_path / "outside"
    place.rename(outside) if place.exists() else outside.mkdir()
    place.symlink_to(outside)
    before = content(tmp_path)
    with pytest.raises(EvenstepError, match=rf"{name} is a link that leads out of the run's folder"):
        Run.resume(run_folder, say=silent)
    (run_folder / ".lock").unlink(missing_ok=True)
    assert {p: v for p, v in content(tmp_path).items() if "outside" in p} == {
        p: v for p, v in before.items() if "outside" in p
    }


def test_a_run_reached_by_a_link_is_gone_on_with(run_folder, tmp_path):
    (tmp_path / "link").symlink_to(run_folder)
    assert Run.resume(tmp_path / "link", say=silent).step_number == 2


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", "summary.json"])
@pytest.mark.parametrize("target", ["file", "pipe", "loop"])
def test_runs_and_report_read_nothing_outside(run_folder, tmp_path, name, target):
    (run_folder / name).unlink()
    if target == "file":
        (tmp_path / "secret").write_text("name = 'secret'\n")
        (run_folder / name).symlink_to(tmp_path / "secret")
    elif target == "pipe":
        os.mkfifo(run_folder / name)
    else:
        (run_folder / name).symlink_to(run_folder / name)
    assert [row.status for row in list_runs(run_folder)] == ["unreadable"]
    try:
        run = load_run(run_folder)
    except EvenstepError as problem:
        assert name in str(problem)
    else:
        assert run.config.get("name") != "secret" and any(name in note for note in run.notes)


def test_a_report_is_not_written_through_a_link(run_folder, tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    (run_folder / "report.html").symlink_to(tmp_path / "mine")
    assert cli.main(["report", str(run_folder)]) == 2 and "is a link" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "precious"
    assert cli.main(["report", str(run_folder), "--out", str(tmp_path / "page.html")]) == 0


# ---- with real processes ----


WORK = """
import contextlib, io, json, sys
from evenstep import cli
import evenstep.train.run
told = sys.stdout
print("ready", file=told, flush=True)
for line in sys.stdin:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        status = cli.main(json.loads(line))
    print(json.dumps([status, said.getvalue()]), file=told, flush=True)
"""


@pytest.fixture(scope="module")
def race():
    """Two processes that call the program with the same words at the same time; gives their statuses, and what they
    said on stderr."""
    command = [sys.executable, "-c", WORK]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]

    def run(words):
        for process in both:
            process.stdin.write(json.dumps(words) + "\n")
            process.stdin.flush()
        return zip(*(json.loads(process.stdout.readline()) for process in both), strict=True)

    try:
        assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
        yield run
    finally:
        for process in both:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("resumed", [False, True], ids=["starts", "resumes"])
@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_of_two_processes_one_trains_and_its_files_are_whole(corpus, tmp_path, race, resumed, rounds):
    refused = 0
    for i in range(rounds):
        out = tmp_path / f"run{i}"
        options = {"train__steps": "30", "sample__tokens": "0", "eval__every": "0"}
        if resumed:
            Run(quick(corpus, out, **options | {"train__steps": "4"}), say=silent).fit()
            words = ["--resume", str(out), "--train.steps", "30"]
        else:
            words = flags(quick_overrides(corpus, out, **options))
        statuses, said = race(["pretrain", *words])
        if sorted(statuses) == [0, 0]:
            assert resumed, said  # the one came when the other was done
        else:
            assert sorted(statuses) == [0, 2], said
            told = said[statuses.index(2)]
            assert "is being trained by another process (process" in told or "already has a run" in told
            refused += "another process" in told
        steps = [record["step"] for record in read_metrics(out / "metrics.jsonl") if "loss" in record]
        assert steps == list(range(1, 31)), (i, steps)
        assert list_runs(out)[0].status == "finished"
    assert rounds == 1 or refused > rounds / 2, "they did not meet"


def test_warnings_are_not_raised_where_locks_work(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with locked(tmp_path):
            pass
