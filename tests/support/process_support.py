"""Several processes for a test."""

import faulthandler
import os
import sys
from collections.abc import Callable

import torch.multiprocessing

LIMIT = 540  # seconds, below the limit of a test in pyproject.toml


def run_processes(worker: Callable[..., None], *args: object, count: int) -> None:
    """``worker(rank, *args)`` in ``count`` processes; raises what the first one to fail raised.

    They are spawned: forked from a server that has loaded torch they start sooner, but one was seen to hang. A process
    that takes longer than `LIMIT` seconds prints its stack and ends, which fails the test before the test itself hangs.
    """
    torch.multiprocessing.spawn(_worked, (worker, *args), nprocs=count)


def _worked(rank: int, worker: Callable[..., None], *args: object) -> None:
    """Ends the process without Python's teardown, in which gloo's threads, kept alive by what still refers to a group,
    now and then abort it ("terminate called without an active exception") although all had passed.
    """
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    worker(rank, *args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
