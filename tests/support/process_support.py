"""Several processes for a test."""

import atexit
import faulthandler
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIMIT = 300  # seconds, below the limit of a test in pyproject.toml; the longest test takes 30 on two free cores
GRACE = 10  # seconds in which the other processes may fail too, so that the first cause is among what is reported


@dataclass(eq=False)
class _Helper:
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    report: Path  # the stacks of its threads, if it took too long


_helpers: list[_Helper] = []
"""Processes of earlier tests, by rank. To start one takes 4 s of CPU time, most of it for the import of torch."""


def run_processes(worker: Callable[..., None], *args: object, count: int) -> None:
    """Run ``worker(rank, *args)`` in ``count`` processes. Raises AssertionError with the traceback of every process
    that failed; of one that took longer than `LIMIT` seconds, with the stack of its threads.

    The processes serve all tests that run after one another in this process of pytest, and all end after a failure. A
    worker may leave behind its environment, its process group and torch's random state, which are put back after it,
    and nothing else that another test would notice.

    The processes are spawned: forked from a server that has loaded torch they start sooner, but one was seen to hang.
    They end without Python's teardown, whether they failed or not: gloo's threads, kept alive by what still refers to
    a group, can abort it or hang in it, and the other processes would then wait for a peer that is gone.
    """
    while len(_helpers) < count:
        _helpers.append(_start())
    chosen = _helpers[:count]
    answers: dict[_Helper, str] = {}
    try:
        for rank, helper in enumerate(chosen):
            helper.pipe.send((worker, rank, *args))
        answers = _wait(chosen)
    finally:  # also after a signal
        failed = len(answers) < count or any(answers.values())
        if failed:
            _end()
    if failed:
        said = [f"-- process {rank}\n{answers.get(each, 'ended by this test')}" for rank, each in enumerate(chosen)]
        raise AssertionError("\n".join(["a process failed", *said]))


def _wait(helpers: list[_Helper]) -> dict[_Helper, str]:
    """What each process answers, "" for success, until all have answered or `GRACE` seconds after the first failure."""
    end, answers = time.monotonic() + LIMIT + GRACE, {}
    running = {helper.pipe: helper for helper in helpers}
    while running and time.monotonic() < end:
        for pipe in wait([*running], timeout=max(0.0, end - time.monotonic())):
            helper = running.pop(pipe)  # type: ignore[call-overload]
            try:
                answers[helper] = helper.pipe.recv()
            except EOFError:
                helper.process.join()
                answers[helper] = f"ended with {helper.process.exitcode}\n{helper.report.read_text()}"
            if answers[helper]:
                end = min(end, time.monotonic() + GRACE)
    return answers


def _start() -> _Helper:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    handle, report = tempfile.mkstemp(prefix="evenstep-test-")
    os.close(handle)
    process = context.Process(target=_serve, args=(theirs, Path(report)), daemon=True)
    process.start()
    theirs.close()  # else the end of the process would not be seen here
    return _Helper(process, ours, Path(report))


def _end() -> None:
    for helper in _helpers:
        helper.process.kill()
        helper.process.join()
        helper.pipe.close()
        helper.report.unlink()
    _helpers.clear()


atexit.register(_end)


# ---- in the processes ----

_kept: list[Any] = []


def keep_groups() -> None:
    """Keep the process groups for good. A group that is freed waits for gloo's threads while it holds the interpreter's
    lock, which one of these threads may need."""
    _kept.extend(dist.distributed_c10d._world.pg_map)


def leave_groups() -> None:
    """Make another default group possible."""
    keep_groups()
    dist.destroy_process_group()


def _serve(pipe: Connection, report: Path) -> None:
    """Runs what comes through ``pipe``, until its other end is closed or a worker fails."""
    environment, seed = dict(os.environ), torch.initial_seed()
    with report.open("w") as file:
        while True:
            try:
                worker, rank, *args = pipe.recv()
            except EOFError:
                os._exit(0)
            faulthandler.dump_traceback_later(LIMIT, exit=True, file=file)
            try:
                torch.manual_seed(seed)
                worker(rank, *args)
            except BaseException:
                pipe.send(traceback.format_exc())
                os._exit(1)
            faulthandler.cancel_dump_traceback_later()
            if dist.is_initialized():
                leave_groups()
            os.environ.clear()
            os.environ.update(environment)
            pipe.send("")
