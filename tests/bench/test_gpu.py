"""benchmarks/gpu.py: parts that hang, raise or find no time leave the others and their own rows alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu
from gpu import ROOT, Part, Session, Stopped

WRITES = "import json, sys\nopen(sys.argv[1], 'a').write(json.dumps({'name': 'one', 'ms': 1.5}) + '\\n')\n"
PROGRAMS = {
    "steps-good": WRITES,
    "raises": WRITES + "raise ValueError('no such kernel')\n",
    # With a grandchild that would hold the log open, and a signal that is not listened to.
    "hangs": WRITES
    + "import signal, subprocess, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    + "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    + "open(sys.argv[1] + '.pid', 'w').write(str(child.pid))\n"
    + "open(sys.argv[1], 'a').write('{\"name\": \"cut o')\nsys.stdout.flush()\ntime.sleep(600)\n",
    "row-error": WRITES.replace("1.5}", "1.5, 'error': 'ValueError: odd'}") + "sys.exit(1)\n",
}


def command(part, rows):
    return [sys.executable, "-S", "-c", PROGRAMS[part.name], str(rows)]


def session(out, *parts, budget=30.0):
    return Session(out, budget, parts, command, say=lambda text: None)


def saved(out):
    return json.loads((out / "results.json").read_text())


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.1)


def test_a_part_that_fails_is_recorded_and_the_rest_goes_on(tmp_path):
    run = session(tmp_path, Part("raises", 1, 1), Part("row-error", 1, 1), Part("steps-good", 1, 1))
    assert not run.run()
    parts = saved(tmp_path)["parts"]
    assert [part["status"] for part in parts.values()] == ["failed", "failed", "passed"]
    assert "no such kernel" in parts["raises"]["last_lines"][-1] and parts["raises"]["rows"][0]["ms"] == 1.5
    page = (tmp_path / "summary.md").read_text()
    assert "no such kernel" in page and "ValueError: odd" in page and "| one |" in page
    assert saved(tmp_path)["finished"]


def test_a_part_that_hangs_is_killed_with_its_children_and_keeps_its_rows(tmp_path):
    began = time.monotonic()
    run = session(tmp_path, Part("steps-good", 1, 1), Part("hangs", 1, 0.1), Part("raises", 100, 0.1), budget=100)
    run.run()
    assert time.monotonic() - began < 30
    parts = saved(tmp_path)["parts"]
    assert [part["status"] for part in parts.values()] == ["passed", "cut", "failed"]
    assert parts["hangs"]["rows"] == [{"name": "one", "ms": 1.5}] and "not done after" in parts["hangs"]["reason"]
    child = int((tmp_path / "logs" / "hangs.jsonl.pid").read_text())
    assert not alive(child)


def alive(process):
    """Whether a process is still there five seconds after it was killed."""
    for _ in range(50):
        try:
            if "Z" in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]:
                return False
        except FileNotFoundError:
            return False
        time.sleep(0.1)
    return True


def test_what_no_longer_fits_into_the_budget_is_skipped_with_the_reason(tmp_path):
    run = session(tmp_path, Part("steps-good", 1, 0.1), Part("raises", 1, 1000), budget=20)
    assert not run.run()
    part = saved(tmp_path)["parts"]["raises"]
    assert part["status"] == "skipped" and "needs 1000" in part["reason"]


def test_the_budget_is_shared_out_and_what_is_not_used_goes_to_the_rest(tmp_path):
    parts = [Part("steps-good", 1, 1), Part("raises", 1, 1), Part("row-error", 2, 1)]
    session(tmp_path, *parts, budget=40).run()
    limits = [part["limit"] for part in saved(tmp_path)["parts"].values()]
    assert limits[0] == pytest.approx(10, abs=0.5) and limits[1] > 11 and limits[2] > 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_what_was_measured(tmp_path, request, number):
    # A shell starts its background jobs with SIGINT ignored, and what is ignored stays so.
    before = signal.signal(number, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(number, before))
    run = session(tmp_path, Part("steps-good", 1, 1), Part("hangs", 10, 1), Part("raises", 1, 1), budget=100)
    rows = tmp_path / "logs" / "hangs.jsonl.pid"

    def say(text):
        if text.startswith("hangs: at most"):
            code = f"import os, pathlib, time\nwhile not pathlib.Path({str(rows)!r}).exists(): time.sleep(0.02)\n"
            subprocess.Popen([sys.executable, "-S", "-c", code + f"os.kill({os.getpid()}, {int(number)})"])

    run.say = say
    with pytest.raises(Stopped), gpu.stopping():
        run.run()
    parts = saved(tmp_path)["parts"]
    assert [part["status"] for part in parts.values()] == ["passed", "cut", "skipped"]
    assert parts["hangs"]["rows"] and number.name in parts["raises"]["reason"] and not saved(tmp_path)["finished"]
    assert not alive(int(rows.read_text()))


def test_wrong_options_are_one_line(tmp_path):
    for words, expected in ((["--only", "stesp"], "unknown part"), (["--budget", "0"], "out of range")):
        done = subprocess.run(
            [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(tmp_path), *words],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 2 and expected in done.stderr.splitlines()[-1]


LOST = """
import sys, torch
from pathlib import Path
from gpu_parts import Context, run_cases

class Lost(Context):
    broken = False
    def usable(self):
        return not Lost.broken

def bad():
    Lost.broken = True
    raise RuntimeError("an illegal memory access was encountered")

context = Lost(torch.device("cpu"), True, Path(sys.argv[1]))
cases = {"first": lambda: {"ms": 1}, "bad": bad, "last": lambda: {"ms": 2}}
sys.exit(0 if run_cases(context, cases.items()) else 1)
"""


@pytest.mark.slow
def test_a_part_goes_on_in_a_new_process_when_an_error_has_ruined_the_device(tmp_path):
    (tmp_path / "part.py").write_text(LOST)
    paths = [str(ROOT), str(ROOT / "benchmarks")]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "part.py"), str(tmp_path / "rows")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True,
    )  # fmt: skip
    rows = gpu.read_rows(tmp_path / "rows")
    assert [row["name"] for row in rows] == ["first", "bad", "last"], done.stderr
    assert "illegal memory access" in rows[1]["error"] and done.returncode == 1


@pytest.mark.slow
def test_every_part_runs_in_miniature_without_an_installation(tmp_path):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    words = [
        str(ROOT / "benchmarks" / "gpu.py"),
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
        "--smoke",
        "--budget",
        "900",
    ]
    done = subprocess.run([sys.executable, *words], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=1000)
    parts = saved(tmp_path)["parts"]
    assert done.returncode == 0, (done.stderr[-2000:], parts)
    assert all(part["status"] == "passed" and part["rows"] for part in parts.values())
    assert "| stable_spam" in done.stdout
