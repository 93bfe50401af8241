"""What befalls a run of several processes, one function a fault, and what must hold after each. The tests do each once,
the soak (tests/support/soak.py) for as long as one likes.

Every function starts the run in ``out`` (or takes it up), lets the fault happen, and returns how many steps were lost:
those in the log that have to be done again. AssertionError when something did not survive.
"""

import random
import signal
import time
from pathlib import Path

from parallel_support import Job, by_step

from evenstep.train.checkpoint import find_fault, list_checkpoints, read_manifest

SIZE = 2
OPTIONS = {
    "parallel__mode": "fsdp",
    "parallel__timeout": "60",  # longer than a busy machine may pause
    "optim__name": "stable_spam",
    "optim__reset_interval": "7",
    "train__batch_size": "4",
    "train__steps": "40",
    "checkpoint__every": "3",
    "eval__every": "0",
    "sample__tokens": "0",
    "telemetry__every": "3",
}


def job(corpus: Path, out: Path, *, size: int = SIZE, restarts: int = 0, limit=None, words=(), **more: str) -> Job:
    """The run of ``out``, from its newest checkpoint if it has one."""
    return Job(
        size, corpus, out, restarts=restarts, limit=limit, words=["--resume", "auto", *words], **{**OPTIONS, **more}
    )


def newest(out: Path) -> int:
    return max((int(path.name[5:]) for path in list_checkpoints(out / "checkpoints")), default=0)


def all_whole(out: Path) -> None:
    for path in list_checkpoints(out / "checkpoints"):
        assert find_fault(path) is None, f"{path}: {find_fault(path)}"


def ahead(running: Job, draw: random.Random, least: int = 1) -> None:
    """Until the run has come a little further than it was."""
    start = running.steps()
    goal = start + draw.randint(least, 4)
    running.wait_for(lambda: start < running.steps() >= goal or running.process.poll() is not None)


def lose_one(running: Job, out: Path, draw: random.Random) -> tuple[int, int]:
    """kill -9 of one process; torchrun starts all of them anew, and they go on by themselves. Returns the steps that
    were done, and those that were saved."""
    running.wait_for(lambda: newest(out) > 0)
    ahead(running, draw)
    before = running.workers()
    running.signal(draw.randrange(SIZE), signal.SIGKILL)
    done = running.steps()
    running.wait_for(lambda: len(running.workers()) == SIZE and not set(before) & set(running.workers()))
    running.wait_for(lambda: "resumed from" in running.said().rpartition("error")[2] or running.steps() > done)
    saved = newest(out)
    running.wait_for(lambda: running.steps() > saved)
    return done, saved


def kill_one(corpus: Path, out: Path, draw: random.Random, **more: str) -> int:
    """The fault of `lose_one`, then the end of the job."""
    with job(corpus, out, restarts=2, **more) as running:
        done, saved = lose_one(running, out, draw)
        running.kill_all()
    all_whole(out)
    return max(0, done - saved)


def kill_all(corpus: Path, out: Path, draw: random.Random, **more: str) -> int:
    """kill -9 of everything, torchrun too, at any moment."""
    with job(corpus, out, **more) as running:
        running.wait_for(lambda: running.steps() > newest(out))
        ahead(running, draw)
        time.sleep(draw.random() * 0.1)
        running.kill_all()
        done = running.steps()
    all_whole(out)
    return done - newest(out)


def kill_in_save(corpus: Path, out: Path, draw: random.Random, **more: str) -> int:
    """kill -9 of everything while a checkpoint is being written."""
    with job(corpus, out, **more) as running:
        running.wait_for(running.saving)
        time.sleep(draw.random() * 0.06)
        running.kill_all()
        done = running.steps()
    all_whole(out)
    return done - newest(out)


def terminate(corpus: Path, out: Path, draw: random.Random, **more: str) -> int:
    """SIGTERM, as SLURM sends before it takes the machine away: all save the same step and end."""
    with job(corpus, out, **more) as running:
        running.wait_for(lambda: running.steps() > newest(out))
        ahead(running, draw)
        running.process.send_signal(signal.SIGTERM)
        running.end()
        done, said = running.steps(), running.said()
    all_whole(out)
    assert newest(out) == done, f"saved {newest(out)}, done {done}: {said[-2000:]}"
    assert read_manifest(out / "checkpoints" / f"step-{done:06d}")["world_size"] == SIZE
    return 0


def stand_still(corpus: Path, out: Path, draw: random.Random, **more: str) -> int:
    """A process stops without ending; the others name it and end, so that the job can be started anew."""
    with job(corpus, out, **{"parallel__timeout": "10", **more}) as running:
        running.wait_for(lambda: running.steps() > newest(out))
        ahead(running, draw)
        rank = draw.randrange(SIZE)
        running.signal(rank, signal.SIGSTOP)
        done = running.steps()
        try:
            running.wait_for(lambda: "missing: " in running.said())
        finally:
            running.kill_all()
        said = running.said()
    assert f"missing: process {rank} on" in said, said[-2000:]
    all_whole(out)
    return max(done, max(by_step(out), default=0)) - newest(out)


def disk_full(corpus: Path, out: Path, draw: random.Random, **more: str) -> int:
    """No file may grow beyond 200 KB, so no checkpoint can be written; the run ends with one line."""
    saved = newest(out)
    with job(corpus, out, limit=200_000, **more) as running:
        assert running.end() != 0
        said, done = running.said(), running.steps()
    assert "could not save the checkpoint" in said and "File too large" in said, said[-3000:]
    assert "Traceback" not in said.split("could not save")[0]
    assert newest(out) == saved
    all_whole(out)
    return done - saved


def _spoil(corpus: Path, out: Path, spoil, word: str, **more: str) -> int:
    path = list_checkpoints(out / "checkpoints")[0]
    step, done = newest(out), max(by_step(out))
    spoil(sorted(path.glob("shard-*"))[-1])
    before = list_checkpoints(out / "checkpoints")[1]
    with job(corpus, out, **more) as running:
        running.wait_for(lambda: "resumed from" in running.said())
        said = running.said()
        assert f"{path} skipped" in said and word in said and f"resumed from {before}" in said, said[-2000:]
        running.wait_for(lambda: newest(out) >= step and find_fault(path) is None)  # saved again
        running.kill_all()
    all_whole(out)
    return done - int(before.name[5:])


def flip_a_byte(corpus: Path, out: Path, draw: random.Random, **more: str) -> int:
    """One bit of a shard has changed: that checkpoint is passed over."""

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)

    return _spoil(corpus, out, flip, "was altered", **more)


def lose_a_shard(corpus: Path, out: Path, draw: random.Random, **more: str) -> int:
    """A shard is gone: that checkpoint is passed over."""
    return _spoil(corpus, out, Path.unlink, "is missing", **more)


_ALL = (kill_one, kill_all, kill_in_save, terminate, stand_still, disk_full, flip_a_byte, lose_a_shard)
FAULTS = {fault.__name__: fault for fault in _ALL}
