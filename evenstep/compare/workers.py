"""Training cells: in processes of their own, one for each core or GPU, or one after the other in this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Protocol

from evenstep.compare.cells import DIVERGED, Cell, Pool
from evenstep.errors import EvenstepError
from evenstep.train.checkpoint import list_checkpoints

FAILED = "failed"


class Worker(Protocol):
    """Something that trains one cell."""

    def done(self) -> bool: ...
    def ask(self) -> None:
        """Ask it to save and end."""

    def stop(self) -> None:
        """Ask it, and wait until it has."""

    def problem(self) -> str | None:
        """Why it did not get to the end, in a line; None when it did."""


@dataclass
class Process:
    """A cell in a process of its own; its log takes what the run says."""

    cell: Cell
    pool: Pool
    running: subprocess.Popen[bytes]
    asked: bool = False

    @classmethod
    def start(cls, cell: Cell, pool: Pool, slot: int, gpus: int) -> Process:
        command = [sys.executable, "-m", "evenstep", "pretrain"]
        where = pool.run(cell)
        if list_checkpoints(where / "checkpoints"):
            command += ["--resume", str(where)]
        else:
            command += [str(pool.recipe(cell)), "--out", str(where)]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = _visible(slot % gpus)
        with pool.log(cell).open("ab") as log:
            # Not in our process group: Ctrl-C is passed on by us, once.
            running = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        return cls(cell, pool, running)

    def done(self) -> bool:
        return self.running.poll() is not None

    def ask(self) -> None:
        if not self.asked and not self.done():  # a second signal would end it without saving
            self.asked = True
            self.running.send_signal(signal.SIGINT)

    def stop(self) -> None:
        self.ask()
        self.running.wait()

    def problem(self) -> str | None:
        if self.running.returncode == 0:
            return None
        lines = self.pool.log(self.cell).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        told = [line for line in lines if line.startswith("evenstep: ")]
        return (told or lines or [f"ended with status {self.running.returncode}"])[-1].removeprefix("evenstep: ")


def _visible(index: int) -> str:
    """The ``index``-th of the GPUs that this process may use."""
    given = [word for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    return given[index] if index < len(given) else str(index)


@dataclass
class Here:
    """A cell in this process, trained when it is started: for cells of a second, where a process takes longer."""

    error: str | None

    @classmethod
    def start(cls, cell: Cell, pool: Pool, slot: int, gpus: int) -> Here:
        import dataclasses
        import shutil
        from contextlib import redirect_stdout

        from evenstep.train.trainer import Run

        where = pool.run(cell)
        if where.exists():
            shutil.rmtree(where)  # cells trained here are too short to be taken up again
        try:
            config = dataclasses.replace(cell.config, out=str(where))
            with pool.log(cell).open("a") as log, redirect_stdout(log):
                Run(config, say=lambda text: None).fit()
        except EvenstepError as problem:
            return cls(f"error: {problem}")
        return cls(None)

    def done(self) -> bool:
        return True

    def ask(self) -> None: ...

    def stop(self) -> None: ...

    def problem(self) -> str | None:
        return self.error


def settle(cell: Cell, pool: Pool, problem: str) -> str:
    """What the ``problem`` of a run means: a divergence is remembered, anything else (a missing package, a full disk)
    is not, so that the next call tries again."""
    if "training stopped" in problem:
        at = pool.training(cell)
        pool.give_up(cell, DIVERGED, problem.split(";")[0].removeprefix("error: "), at[-1][0] if at else 0, None)
        return DIVERGED
    return FAILED


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
