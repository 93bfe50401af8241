"""Several processes for a test."""

from collections.abc import Callable

import torch.multiprocessing


def run_processes(worker: Callable[..., None], *args: object, count: int) -> None:
    """``worker(rank, *args)`` in ``count`` processes; raises what the first one to fail raised.

    They are spawned: forked from a server that has loaded torch they start sooner, but one was seen to hang.
    """
    torch.multiprocessing.spawn(worker, args, nprocs=count)
