"""Finds out who is missing when a collective hangs.

A process that waits in a collective for one that never comes is stuck in C++ and cannot say so; torch's own timeouts
end it without a name. So a thread in every process publishes how far its process has come into torchrun's store, and
looks at the others when its own has stood still for ``parallel.timeout`` seconds: the one that is furthest behind, or
whose thread has fallen silent too, is the one all wait for. It is named, and the process ends, so that torchrun may
start all of them anew.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from evenstep.train.world import World, restarts

EXIT_STATUS = 75
"""EX_TEMPFAIL of sysexits.h: trying again may help."""


class Heartbeat:
    """``beat(step, place)`` at every stage of a run, ``with Heartbeat(...):`` around it. Alone it does nothing."""

    def __init__(self, world: World, timeout: float) -> None:
        self.world, self.timeout = world, timeout
        self.count, self.step, self.place = 0, 0, "starting"
        self.moved = time.monotonic()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, step: int, place: str) -> None:
        """This process has reached ``place`` of ``step``; all processes pass the same places in the same order."""
        self.count += 1
        self.step, self.place = step, place
        self.moved = time.monotonic()

    def alive(self) -> None:
        """This process still stands where it was, and rightly so: it waits for its own disk."""
        self.moved = time.monotonic()

    def __enter__(self) -> Heartbeat:
        if self.world.control is not None:
            import torch.distributed as dist

            own: Any = dist.distributed_c10d._get_default_store()
            store = dist.PrefixStore(f"evenstep/heartbeat/{restarts()}", own.clone())
            self.moved = time.monotonic()
            self._over.clear()
            self._publish(store, 0)  # at once, so that whoever hangs early has a name
            self._thread = threading.Thread(target=self._watch, args=(store,), daemon=True, name="heartbeat")
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _publish(self, store: Any, pulse: int) -> None:
        with suppress(Exception):  # the store may go away first, when the run ends
            store.set(str(self.world.rank), json.dumps([self.count, self.step, self.place, pulse, _name()]))

    # ---- in the thread ----

    def _watch(self, store: Any) -> None:
        period = min(5.0, self.timeout / 4)
        told, heard, pulse = -1, {}, 0
        while not self._over.wait(period):
            pulse += 1
            self._publish(store, pulse)
            still = time.monotonic() - self.moved
            if still < self.timeout:
                told = -1
                continue
            if told != self.count:  # one more period, so that all have published where they stand
                told, heard = self.count, self._others(store)
                continue
            message = self._explain(heard, self._others(store), still)
            if message and not self._over.is_set():
                with suppress(Exception):
                    print(f"evenstep: error: {message}", file=sys.stderr, flush=True)
                os._exit(EXIT_STATUS)

    def _others(self, store: Any) -> dict[int, list[Any]]:
        found = {}
        for rank in range(self.world.size):
            with suppress(Exception):
                if store.check([str(rank)]):
                    found[rank] = json.loads(store.get(str(rank)))
        return found

    def _explain(self, before: dict[int, list[Any]], now: dict[int, list[Any]], still: float) -> str:
        """Who is missing, in one line; empty when another process is to tell."""
        ranks = range(self.world.size)
        silent = [rank for rank in ranks if rank not in now or (before.get(rank) or [0] * 4)[3] == now[rank][3]]
        counts = {rank: now[rank][0] if rank in now else -1 for rank in ranks}
        behind = [rank for rank in ranks if counts[rank] < max(counts.values())]
        missing = sorted({*silent, *behind} - {self.world.rank}) or [self.world.rank] * bool(behind)
        tellers = [rank for rank in ranks if rank not in missing]
        if tellers and self.world.rank != tellers[0]:
            time.sleep(1)  # let it speak first
            os._exit(EXIT_STATUS)
        where = f"at step {self.step} ({self.place}) for {still:.0f} s"
        if not missing:
            return f"all {self.world.size} processes stand still {where}: the network between them may be down"
        names = [f"process {rank} {self._last(now.get(rank), rank in silent)}" for rank in missing]
        return f"waited {where}; missing: {', '.join(names)} (parallel.timeout {self.timeout:g})"

    @staticmethod
    def _last(fact: list[Any] | None, silent: bool) -> str:
        if fact is None:
            return "(never heard of)"
        return f"on {fact[4]} (last at step {fact[1]}, {fact[2]}{'; it does not answer' if silent else ''})"


def _name() -> str:
    return f"{socket.gethostname()}, pid {os.getpid()}"
