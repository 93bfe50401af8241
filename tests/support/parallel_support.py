"""Runs of several processes for tests: spawned ones for what they compute, torchrun for what befalls them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from process_support import keep_groups, run_processes
from train_support import flags, quick, quick_overrides

from evenstep.train.distributed import open_world
from evenstep.train.log import read_metrics
from evenstep.train.trainer import Run

ROOT = Path(__file__).parents[2]


def silent(_: str) -> None:
    pass


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _worker(rank: int, size: int, jobs: list) -> None:
    torch.set_num_threads(1)
    for port, corpus, out, options, resume, result in jobs:
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        config = quick(Path(corpus), Path(out), **options)
        with open_world(config) as world:
            keep_groups()
            make = Run.resume if resume else Run
            run = make(out, config, world=world, say=silent) if resume else make(config, world=world, say=silent)
            if result:
                result(run)
            else:
                run.fit()


def train(size: int, corpus: Path, *jobs: tuple) -> None:
    """``jobs``: (out, options, resume, what to do with the run instead of fit()), one after the other."""
    run_processes(_worker, size, [(free_port(), str(corpus), str(job[0]), *job[1:]) for job in jobs], count=size)


def losses(out: Path) -> list[float]:
    """Training and validation losses in the order of the log."""
    return [record.get("loss", record.get("val_loss")) for record in read_metrics(out / "metrics.jsonl")]


def by_step(out: Path) -> dict[int, float]:
    log = out / "metrics.jsonl"
    return {r["step"]: r["loss"] for r in read_metrics(log) if "loss" in r} if log.exists() else {}


class Job:
    """``torchrun ... -m evenstep pretrain`` in a session of its own; leaving the block kills what is left of it."""

    def __init__(
        self, size: int, corpus: Path, out: Path, *, restarts: int = 0, limit: int | None = None, words=(), **options
    ) -> None:
        self.out, self.began = out, time.time()
        self.known: set[int] = set()
        command = [
            sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", f"--max-restarts={restarts}",
            "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--monitor-interval=0.1",
            "-m", "evenstep", "pretrain", *flags(quick_overrides(corpus, out, **options)), *words,
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.log = open(out.parent / f"{out.name}.out", "a+")  # noqa: SIM115 - lives as long as the job
        self.start = self.log.seek(0, os.SEEK_END)
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=(lambda: _limit(limit)) if limit else None,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        self.kill_all()
        self.log.close()

    def said(self) -> str:
        self.log.seek(self.start)
        return self.log.read()

    def workers(self) -> list[int]:
        """The pids of the training processes by rank (Linux)."""
        found = {}
        for task in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            try:
                for child in map(int, task.read_text().split()):
                    words = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                    found |= {int(word[5:]): child for word in words if word.startswith(b"RANK=")}
            except OSError:  # it ended meanwhile
                pass
        self.known |= set(found.values())
        return [found[rank] for rank in sorted(found)]

    def _left(self) -> list[int]:
        """Processes of this job that are still there, torchrun or not: a stopped one outlives it."""
        mine = str(self.out).encode()
        left = []
        for pid in self.known:
            with suppress(OSError):
                if mine in Path(f"/proc/{pid}/cmdline").read_bytes():
                    left.append(pid)
        return left

    def signal(self, rank: int, number: int) -> None:
        """To one training process, once it is there."""
        self.wait_for(lambda: len(self.workers()) > rank)
        os.kill(self.workers()[rank], number)

    def wait_for(self, condition, seconds: float = 200) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.said()[-4000:]
            assert time.monotonic() < deadline, f"too slow: {self.said()[-4000:]}"
            time.sleep(0.005)

    def steps(self) -> int:
        return max(by_step(self.out), default=0)

    def saving(self) -> bool:
        """Is a checkpoint being written right now? What an earlier job left half written does not count."""
        for path in (self.out / "checkpoints").glob(".step-*.partial"):
            with suppress(OSError):
                if path.stat().st_mtime > self.began:
                    return True
        return False

    def end(self, seconds: float = 400) -> int:
        """Wait for it; its exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end: {self.said()[-4000:]}") from None

    def kill_all(self) -> None:
        """SIGKILL to torchrun and all workers at once."""
        self.workers()
        if self.process.poll() is None:
            self.process.kill()
        for worker in self._left():
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        self.process.wait(30)
        deadline = time.monotonic() + 30
        while self._left() and time.monotonic() < deadline:
            time.sleep(0.01)  # the system reaps orphans


def _limit(size: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def read_json(path: Path):
    return json.loads(path.read_text())
