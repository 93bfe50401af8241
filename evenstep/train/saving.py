"""Writes checkpoints while the training goes on.

`Saver.save` copies the tensors (into pinned memory on a GPU machine) and returns; a thread writes the copies by
torch.distributed.checkpoint, has every process hash its own shards, and lets process 0 write the manifest and rename
the directory. The next save waits for the one before. What goes wrong in the background is raised by the next `wait`,
on every process alike.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evenstep.errors import EvenstepError
from evenstep.models.hf import require_safetensors
from evenstep.optim.distributed import is_sharded, local
from evenstep.train.checkpoint import SHARD, begin, commit, could_not_save, facts_of
from evenstep.train.tensors import write
from evenstep.train.world import World


class Saver:
    """Writes the checkpoints of one run into ``directory``; every process makes one, and calls it at the same steps."""

    def __init__(self, directory: Path, world: World) -> None:
        require_safetensors()  # without it the first checkpoint would end the run
        self.directory, self.world = directory, world
        self._copies: dict[str, Tensor] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self.alive: Callable[[], None] = lambda: None
        """Called now and then while `wait` waits."""
        self.last: int | None = None
        """The step of the newest save."""

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        write_small: Callable[[Path], None],
        keep: int | None,
        *,
        wait: bool,
    ) -> Path:
        """Start the checkpoint of ``step``; returns where it will be, or is with ``wait``. ``write_small`` fills a
        directory with what is no tensor, on process 0, at once. ``keep``: as for `evenstep.train.checkpoint.commit`.

        EvenstepError, on all processes, when this save or the one before fails; earlier checkpoints are intact.
        """
        self.wait()
        partial = self.directory / f".step-{step:06d}.partial"
        try:
            with self.world.together():
                if self.world.rank == 0:
                    self._guarded(step, lambda: write_small(begin(self.directory, step)))
            copies, whole = self._guarded(step, lambda: self._staged(tensors))
        except BaseException:
            self._clean(partial)
            raise
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending = self._thread.submit(self._finish, copies, whole, partial, step, keep)
        self.last = step
        if wait:
            self.wait()
        return self.directory / f"step-{step:06d}"

    def _staged(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """Copies on the CPU, and what waits until they are whole: what a GPU is given after this finds the tensors free
        to be written, and is not waited for. The memory is kept for the next save.
        """
        kept, self._copies = self._copies, {}
        for name, x in tensors.items():
            copy = kept.pop(name, None)
            if copy is None or not _alike(copy, x):
                copy = torch.empty_like(x, device="cpu", pin_memory=local(x).is_cuda, requires_grad=False)
            local(copy).copy_(local(x), non_blocking=True)
            self._copies[name] = copy
        if self.world.device.type != "cuda":
            return self._copies, lambda: None
        copied = torch.cuda.Event()
        copied.record()
        return self._copies, copied.synchronize

    def _finish(
        self, copies: dict[str, Tensor], whole: Callable[[], None], partial: Path, step: int, keep: int | None
    ) -> None:
        """In the thread: from copies of the tensors to a checkpoint."""
        world = self.world

        def own_files() -> dict[str, Any]:
            whole()
            write(partial, copies, world.saving)
            mine = sorted(partial.glob(f"shard-{world.rank + 1:05d}-*{SHARD}"))
            small = [path for path in sorted(partial.iterdir()) if path.suffix != SHARD] if world.rank == 0 else []
            return {path.name: facts_of(path) for path in (*mine, *small)}

        def rename(found: list[dict[str, Any]]) -> None:
            files = {name: facts for part in found for name, facts in part.items()}
            commit(partial, step, world.size, files, keep)

        try:
            found = world.each(lambda: self._guarded(step, own_files), world.saving)
            world.each(lambda: self._guarded(step, lambda: rename(found)) if world.rank == 0 else None, world.saving)
        finally:
            self._clean(partial)

    def _guarded(self, step: int, work: Callable[[], Any]) -> Any:
        import torch.distributed.checkpoint as dcp

        try:
            return work()
        except EvenstepError:
            raise
        except (Exception, dcp.api.CheckpointException) as problem:  # the latter is no Exception
            raise could_not_save(self.directory, step, problem) from problem

    def _clean(self, partial: Path) -> None:
        if self.world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)

    def failed(self) -> bool:
        """Has the save in the background failed? Then `wait` raises."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Until the save in the background is done, if there is one. EvenstepError when it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            while futures.wait([pending], timeout=5).not_done:
                self.alive()
            pending.result()

    def close(self) -> None:
        """Wait, and free the copies; errors are not raised any more."""
        if self._pending is not None:
            self._pending.exception()
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None
        self._copies = {}


def _alike(copy: Tensor, x: Tensor) -> bool:
    """Whether a copy of ``x`` fits in the place of an earlier one."""
    same = copy.dtype == x.dtype and copy.shape == x.shape and type(copy) is type(x)
    return same and (not is_sharded(x) or (copy.placements, copy.device_mesh) == (x.placements, x.device_mesh))  # type: ignore[attr-defined]
