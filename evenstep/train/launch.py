"""``evenstep pretrain`` and its kin as one process or as one of several."""

from __future__ import annotations

import os
from pathlib import Path

from evenstep.data import prepare_display
from evenstep.errors import EvenstepError
from evenstep.train.checkpoint import list_checkpoints
from evenstep.train.config import BaseConfig
from evenstep.train.distributed import launched, open_world, restarts
from evenstep.train.run import Run


def train(config: BaseConfig, directory: Path | None, *, auto: bool = False, kind: type[Run] = Run) -> None:
    """Start the run of ``config``, of that ``kind``, or go on with the one in ``directory``. ``auto``: go on with that
    in ``config.out`` if it has a checkpoint, which is also what processes do that torchrun has started anew after a
    failure.

    EvenstepError for whatever does not fit.
    """
    may_restart = launched() and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") not in ("", "0")
    if directory is None and config.out is None and (auto or may_restart):
        why = "--resume auto" if auto else "torchrun --max-restarts"
        raise EvenstepError(f"{why} needs --out DIR, where the run is found again")
    with open_world(config) as world:
        if directory is None and (auto or restarts() > 0):
            out = Path(config.out or "")
            found = world.from_first(lambda: bool(list_checkpoints(out / "checkpoints")))
            directory = out if found else None
        with prepare_display() as show:
            if directory is None:
                run = kind(config, world=world, data_progress=show)
            else:
                run = kind.resume(directory, config, world=world, data_progress=show)
        run.fit()
