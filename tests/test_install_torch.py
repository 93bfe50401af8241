"""`make demo` gets a build of torch that fits the machine, from an index that answers."""

import functools
import http.server
import importlib.util
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("install_torch", ROOT / "tools" / "install_torch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES = {
    "a CPU index that serves": ("Linux", False, {"index": True, "cpu": True}, ["index", "cpu"], "about 200 MB"),
    "one that does not answer": ("Linux", False, {"index": False, "plain": True}, ["index", "plain"], "does not serve"),
    "one that breaks off": (
        "Linux",
        False,
        {"index": True, "plain": True},
        ["index", "cpu", "plain"],
        "does not serve",
    ),
    "a driver": ("Linux", True, {"plain": True}, ["plain"], "for the NVIDIA driver"),
    "another system": ("Darwin", False, {"plain": True}, ["plain"], "about 100 MB"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_index_fits_the_machine(tool, monkeypatch, capsys, case):
    system, driver, answers, expected, words = CASES[case]
    calls = []

    def called(name):
        calls.append(name)
        return answers.get(name, False)

    monkeypatch.setattr(tool, "pip", lambda *words: called("cpu" if tool.CPU_INDEX in words else "plain"))
    monkeypatch.setattr(tool, "answers", lambda index: called("index"))
    monkeypatch.setattr(tool.platform, "system", lambda: system)
    monkeypatch.setattr(tool, "has_nvidia_driver", lambda: driver)
    assert tool.install("torch==2.13.0") == 0 and calls == expected
    assert words in capsys.readouterr().out.splitlines()[-1]


def test_a_driver_is_found_by_its_files_or_its_program(tool, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not tool.has_nvidia_driver(tmp_path / "none") and tool.has_nvidia_driver(tmp_path)
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    assert tool.has_nvidia_driver(tmp_path / "none")


def test_an_index_answers_hangs_or_fails(tool, tmp_path):
    (tmp_path / "torch").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections, and never answers
        began = time.monotonic()
        assert not tool.answers(f"http://127.0.0.1:{silent.getsockname()[1]}", patience=0.5)
        assert time.monotonic() - began < 5
    assert not tool.answers(f"file://{tmp_path}/none", patience=20)
    (tmp_path / "torch" / "index.html").write_text("torch-2.13.0+cpu")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert tool.answers(f"http://127.0.0.1:{server.server_port}", patience=20)
        server.shutdown()


def test_make_asks_the_tool_unless_torch_is_named():
    def commands(*words):
        done = subprocess.run(
            ["make", "-n", "demo", "VENV=/nonexistent", *words], cwd=ROOT, capture_output=True, text=True
        )
        return done.stdout

    assert "tools/install_torch.py torch==" in commands()
    assert 'pip install --disable-pip-version-check "torch==2.12.0"' in commands("TORCH=torch==2.12.0")
