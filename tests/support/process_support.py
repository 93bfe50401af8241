"""Several processes for a test."""

import os
import sys
from collections.abc import Callable

import torch.multiprocessing


def run_processes(worker: Callable[..., None], *args: object, count: int) -> None:
    """``worker(rank, *args)`` in ``count`` processes; raises what the first one to fail raised.

    They are spawned: forked from a server that has loaded torch they start sooner, but one was seen to hang.
    """
    torch.multiprocessing.spawn(_worked, (worker, *args), nprocs=count)


def _worked(rank: int, worker: Callable[..., None], *args: object) -> None:
    """Ends the process without Python's teardown, in which gloo's threads, kept alive by what still refers to a group,
    now and then abort it ("terminate called without an active exception") although all had passed.
    """
    worker(rank, *args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
