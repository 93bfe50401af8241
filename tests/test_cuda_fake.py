"""The host's side of steps on CUDA, without a GPU: nothing raises, mixes devices, blocks, or reads the device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fake_cuda_driver
import pytest

HERE = Path(__file__).parent
PARTS = {"optimizers": 70, "stabilized": 30, "baselines": 5, "monitored": 2, "lowbit": 16, "trained": 14}
"""With the least number of cases of each."""

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the stand-in for a CUDA driver is for Linux"),
    pytest.mark.skipif(
        fake_cuda_driver.compiler() is None, reason="there is no C++ compiler for a CUDA driver's stand-in"
    ),
]


def noted(*parts: str) -> dict[str, list[str]]:
    """By case, in a process of its own: it makes torch believe in a GPU."""
    fake_cuda_driver.build()
    paths = [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "fake_cuda.py"), *parts]
    done = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("part", PARTS)
def test_steps_neither_fail_nor_wait(part):
    found = noted(part)
    assert len(found) >= PARTS[part]
    wrong = {case: notes for case, notes in found.items() if notes}
    assert not wrong, json.dumps(wrong, indent=1)


def test_what_waits_is_noticed():
    """The watch itself: each of these must be told, with its kind."""
    found = noted("waiting")
    assert found and all(any(kind in note for note in notes) for kind, notes in found.items()), found
