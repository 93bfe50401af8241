import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_support import save_checkpoint, write

from evenstep.errors import EvenstepError
from evenstep.train import checkpoint
from evenstep.train.checkpoint import find_fault, list_checkpoints, newest_checkpoint, read_manifest

ROOT = Path(__file__).parents[2]


def silent(_: str) -> None:
    pass


@pytest.fixture
def place(tmp_path):
    """Two good checkpoints of a run."""
    for step in (5, 10):
        save_checkpoint(tmp_path / "checkpoints", step, write, keep=3)
    return tmp_path / "checkpoints"


def names(place):
    return sorted(path.name for path in place.iterdir())


def test_a_checkpoint_is_whole_and_the_newest_wins(place):
    assert names(place) == ["step-000005", "step-000010"]
    assert find_fault(place / "step-000010") is None
    assert newest_checkpoint(place.parent, silent) == place / "step-000010"


def test_steps_are_ordered_as_numbers(place):
    save_checkpoint(place, 1_000_000, write, keep=3)
    save_checkpoint(place, 999_999, write, keep=3)
    assert [path.name for path in list_checkpoints(place)] == ["step-1000000", "step-999999", "step-000010"]


def test_only_the_newest_are_kept_and_deletion_comes_last(place):
    def check_then_write(directory):
        assert names(place)[-2:] == ["step-000005", "step-000010"]
        write(directory)

    save_checkpoint(place, 15, check_then_write, keep=1)
    assert names(place) == ["step-000015"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def tamper(path):
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage, word", [(truncate, "2047 bytes"), (tamper, "altered"), (Path.unlink, "missing")])
def test_a_damaged_checkpoint_is_named_and_passed_over(place, damage, word):
    damage(place / "step-000010" / "weights.safetensors")
    said: list[str] = []
    assert newest_checkpoint(place.parent, said.append) == place / "step-000005"
    assert len(said) == 1 and "step-000010" in said[0] and "weights.safetensors" in said[0] and word in said[0]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": {"a": 3}}', '{"format": 3, "files": {}}'])
def test_a_damaged_manifest_is_a_fault_like_any_other(place, content):
    (place / "step-000010" / "manifest.json").write_text(content)
    assert newest_checkpoint(place.parent, silent) == place / "step-000005"


def test_no_whole_checkpoint_is_one_clear_line(place, tmp_path):
    for path in list_checkpoints(place):
        truncate(path / "config.json")
    with pytest.raises(EvenstepError, match="all of its 2 checkpoints are damaged"):
        newest_checkpoint(place.parent, silent)
    with pytest.raises(EvenstepError, match="has no checkpoints"):
        newest_checkpoint(tmp_path / "elsewhere", silent)


@pytest.mark.parametrize(
    "problem", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("write failed\nat x")]
)
def test_a_full_disk_leaves_the_earlier_checkpoints(place, problem):
    def fill(directory):
        write(directory)
        raise problem

    with pytest.raises(EvenstepError) as caught:
        save_checkpoint(place, 15, fill, keep=1)
    message = str(caught.value)
    assert "\n" not in message and "step 15" in message and "--resume" in message
    assert "No space left" in message or "write failed" in message
    assert names(place) == ["step-000005", "step-000010"] and find_fault(place / "step-000005") is None


def test_an_interrupted_save_leaves_the_earlier_checkpoints(place):
    def stopped(directory):
        write(directory)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(place, 15, stopped, keep=1)
    assert names(place) == ["step-000005", "step-000010"]


def test_a_broken_checkpoint_of_the_same_step_is_replaced(place):
    truncate(place / "step-000010" / "weights.safetensors")
    save_checkpoint(place, 10, write, keep=3)
    assert find_fault(place / "step-000010") is None


def test_a_checkpoint_of_the_same_step_is_replaced_at_once(place, monkeypatch):
    """At no moment does the step have no checkpoint."""
    if sys.platform == "linux":
        monkeypatch.setattr(Path, "rename", None)

    def other(directory):
        write(directory)
        (directory / "config.json").write_text('{"new": 1}')

    save_checkpoint(place, 10, other, keep=3)
    assert names(place) == ["step-000005", "step-000010"] and find_fault(place / "step-000010") is None
    assert "new" in (place / "step-000010" / "config.json").read_text()


def test_where_directories_cannot_be_swapped_a_kill_loses_no_checkpoint(place, monkeypatch):
    monkeypatch.setattr(checkpoint, "_exchange", lambda first, second: False)
    rename = Path.rename

    def killed(path, target):
        if path.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(place, 10, write, keep=3)
    assert names(place) == [".step-000010.former", "step-000005"]
    monkeypatch.setattr(Path, "rename", rename)
    save_checkpoint(place, 15, write, keep=3)
    assert names(place) == ["step-000005", "step-000010", "step-000015"]
    assert find_fault(place / "step-000010") is None
    save_checkpoint(place, 10, write, keep=3)
    assert names(place) == ["step-000005", "step-000010", "step-000015"]


def test_a_kill_while_saving_leaves_the_earlier_checkpoints(place):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT / "tests/support")!r})
from pathlib import Path
from checkpoint_support import save_checkpoint
def write(directory):
    (directory / "weights.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
save_checkpoint(Path({str(place)!r}), 15, write, 1)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -signal.SIGKILL
    assert names(place) == [".step-000015.partial", "step-000005", "step-000010"]
    assert newest_checkpoint(place.parent, silent) == place / "step-000010"
    save_checkpoint(place, 20, write, keep=2)
    assert names(place) == ["step-000010", "step-000020"]


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on the size of files")
def test_a_real_write_error_in_torch_save_is_one_line(place):
    torch = pytest.importorskip("torch")
    del torch
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT / "tests/support")!r})
from pathlib import Path
import torch
from checkpoint_support import save_checkpoint
from evenstep.errors import EvenstepError
from evenstep.train.checkpoint import write_tensors
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(Path({str(place)!r}), 15, lambda d: write_tensors(d / "trainer.pt", torch.zeros(100_000)), 1)
except EvenstepError as problem:
    print(problem)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and "could not save the checkpoint of step 15" in done.stdout
    assert names(place) == ["step-000005", "step-000010"]


def test_the_manifest_lists_every_file_with_its_size(place):
    manifest = json.loads((place / "step-000005" / "manifest.json").read_text())
    assert manifest["step"] == 5
    assert {name: facts["bytes"] for name, facts in manifest["files"].items()} == {
        "config.json": 2,
        "trainer.pt": 5,
        "weights.safetensors": 2048,
    }


# ---- what a manifest may say ----


def edited(place, change):
    path = place / "step-000010" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    return place / "step-000010"


@pytest.mark.parametrize("name", ["../step-000005/weights.safetensors", "/etc/passwd", "a/b", "..", "", "a\\b"])
def test_a_manifest_may_not_point_out_of_the_checkpoint(place, name):
    path = edited(place, lambda manifest: manifest["files"].update({name: {"bytes": 1, "sha256": "0"}}))
    with pytest.raises(EvenstepError, match="outside of the checkpoint"):
        read_manifest(path)
    assert "outside" in find_fault(path)


def test_a_shard_that_the_manifest_does_not_know_is_a_fault(place):
    (place / "step-000010" / "shard-00009.safetensors").write_bytes(b"")
    assert "not in the manifest" in find_fault(place / "step-000010")


def test_a_link_in_place_of_a_file_is_a_fault(place):
    file = place / "step-000010" / "weights.safetensors"
    file.unlink()
    file.symlink_to(place / "step-000005" / "weights.safetensors")
    assert "missing" in find_fault(place / "step-000010")


def test_a_checkpoint_of_the_first_layout_says_what_to_do(place):
    for path in list_checkpoints(place):
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["format"]
        manifest["files"]["optimizer.pt"] = {"bytes": 1, "sha256": "0"}
        (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(EvenstepError, match=r"before the first release.*--model\.init"):
        newest_checkpoint(place.parent, silent)


def test_a_save_in_the_background_holds_what_was_there_when_it_began(tmp_path):
    from evenstep.train.checkpoint import read_whole
    from evenstep.train.distributed import World
    from evenstep.train.saving import Saver

    saver, x = Saver(tmp_path, World(torch.device("cpu"))), torch.zeros(3)
    for step in (1, 2, 3):
        if step == 3:  # of another size
            x = torch.zeros(5)
        x.fill_(step)
        saver.save(step, {"model.x": x}, lambda directory: None, None, wait=False)
        x.fill_(-1)  # the training goes on
    saver.wait()
    saver.close()
    for step, size in ((1, 3), (2, 3), (3, 5)):
        found = read_whole(tmp_path / f"step-{step:06d}", "model.")["x"]
        assert torch.equal(found, torch.full((size,), float(step)))
