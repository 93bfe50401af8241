"""The host's side of steps on CUDA, without a GPU: nothing raises, mixes devices, blocks, or reads the device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fake_cuda_driver
import pytest

ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "tests/support"
PARTS = {"optimizers": 80, "stabilized": 36, "baselines": 4, "monitored": 2, "guarded": 2, "lowbit": 30, "trained": 9}
"""With the least number of their cases."""

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the stand-in for a CUDA driver is for Linux"),
    pytest.mark.skipif(fake_cuda_driver.compiler() is None, reason="no C++ compiler for the stand-in of a CUDA driver"),
]


def noted(every: int, *parts: str) -> dict[str, list[str]]:
    """What every n-th case noted, in a process of its own: it makes torch believe in a GPU."""
    fake_cuda_driver.build()
    paths = [str(ROOT), str(SUPPORT), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SUPPORT / "fake_cuda.py"), str(every), *parts]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def wrong(found: dict[str, list[str]]) -> str:
    return "\n".join(f"{case}: {note}" for case, notes in found.items() for note in notes)


def test_a_sample_of_steps_neither_fails_nor_waits():
    """Every seventh case, so that all options have their turn; the rest is slow."""
    found = noted(7, *PARTS)
    assert {case.split(":")[0] for case in found} == PARTS.keys()
    assert not wrong(found), wrong(found)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_steps_neither_fail_nor_wait(part):
    found = noted(1, part)
    assert len(found) >= PARTS[part]
    assert not wrong(found), wrong(found)


def test_a_step_launches_few_kernels():
    found = noted(1, "counted")
    assert found.pop("counted: one too many"), "launches are not counted as they were: set the limits anew"
    assert len(found) >= 4
    assert not wrong(found), wrong(found)


def test_what_fails_or_waits_is_noticed():
    found = noted(1, "waiting")
    for case, notes in found.items():
        kind = case.removeprefix("waiting: ")
        assert not notes if kind.startswith("nothing") else any(kind in note for note in notes), (kind, notes)
