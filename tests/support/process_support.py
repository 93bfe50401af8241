"""Several processes for a test."""

import faulthandler
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

LIMIT = 300  # seconds, below the limit of a test in pyproject.toml; the longest test takes 30 on two free cores
GRACE = 10  # seconds in which the other processes may fail too, so that the first cause is among what is reported


def run_processes(worker: Callable[..., None], *args: object, count: int) -> None:
    """Run ``worker(rank, *args)`` in ``count`` processes. Raises AssertionError with the traceback of every process
    that failed; of one that took longer than `LIMIT` seconds, with the stack of its threads.

    The processes are spawned: forked from a server that has loaded torch they start sooner, but one was seen to hang.
    They end without Python's teardown, whether they failed or not: gloo's threads, kept alive by what still refers to
    a group, can abort it or hang in it, and the other processes would then wait for a peer that is gone. For the same
    reason a worker does not destroy its group at its end: a group that is freed with the worker's other variables waits
    for gloo's threads while it holds the interpreter's lock, which one of these threads may need.
    """
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder) / str(rank) for rank in range(count)]
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=_work, args=(reports[rank], rank, worker, *args)) for rank in range(count)]
        try:
            for process in processes:
                process.start()
            _wait(processes)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        codes = [process.exitcode for process in processes]
        if any(codes):
            said = [report.read_text() if report.exists() else "" for report in reports]
            lines = [f"-- process {rank} ended with {codes[rank]}\n{said[rank]}" for rank in range(count)]
            raise AssertionError("\n".join(["a process failed; -9 was ended by this test", *lines]))


def _wait(processes: list[multiprocessing.process.BaseProcess]) -> None:
    """Until all have ended, or `GRACE` seconds after the first one that failed."""
    end, running = time.monotonic() + LIMIT + GRACE, list(processes)
    while running and time.monotonic() < end:
        wait([process.sentinel for process in running], timeout=max(0.0, end - time.monotonic()))
        ended = [process for process in running if not process.is_alive()]
        running = [process for process in running if process not in ended]
        if any(process.exitcode for process in ended):
            end = min(end, time.monotonic() + GRACE)


def _work(report: Path, rank: int, worker: Callable[..., None], *args: object) -> None:
    with report.open("w") as file:
        faulthandler.dump_traceback_later(LIMIT, exit=True, file=file)
        code = 0
        try:
            worker(rank, *args)
        except BaseException:
            traceback.print_exc(file=file)
            code = 1
        file.flush()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
