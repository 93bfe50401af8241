"""What a checkpoint of a run holds, and how it is put back: see `evenstep.train.checkpoint` for the layout."""

from __future__ import annotations

import hashlib
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from evenstep.data import TokenData
from evenstep.errors import EvenstepError
from evenstep.train.checkpoint import TRAINER, read_trainer, write_tensors
from evenstep.train.config_io import new_run, to_tables
from evenstep.train.saving import fill, load_optimizer

if TYPE_CHECKING:
    from evenstep.train.run import Run


def trainer_state(run: Run, optimizer: dict[str, Any]) -> dict[str, Any]:
    """Everything that moves and is no tensor of the model or its ``optimizer`` (whose numbers are given). What each
    process has of its own is gathered from all."""
    telemetry = run.telemetry.state()
    own = {"rng": rng_state(), "probe": telemetry.pop("probe") if telemetry else None}
    return {
        "step": run.step_number,
        "tokens": run.tokens,
        "position": run.loader.position,
        "skipped": [list(rows) for rows in run.skipped],
        "seconds": run.seconds,
        "step_seconds": run.step_seconds,
        "window_loss": run.window.loss.cpu(),
        "window_steps": run.window.steps,
        "tokenizer": run.tokenizer.fingerprint,
        "data": run.data_identity(),
        "config": to_tables(run.config),
        "optimizer": optimizer,
        "telemetry": telemetry,
        "processes": run.world.each(lambda: own),
    }


def write_small(run: Run, trainer: dict[str, Any], directory: Path) -> None:
    """What a checkpoint holds beside the shards and the manifest. EvenstepError where the first one of a process could
    not be read again: what an optimizer keeps may be written and be refused when it is read."""
    run.save_shape(directory)
    run.tokenizer.save(directory)
    write_tensors(directory / TRAINER, trainer)
    if run.saver.last is not None:
        return
    try:
        read_trainer(directory)
    except EvenstepError as problem:
        found = re.search(r"GLOBAL (\S+)", str(problem.__cause__))
        what = found[1] if found else "objects"
        raise EvenstepError(
            f"optim.name {run.config.optim.name}: its state holds {what}, which a checkpoint cannot give back, so that "
            "no run could go on from it; take an optimizer whose state_dict() holds tensors and plain values alone"
        ) from problem


def restore_state(run: Run, checkpoint: Path, trainer: dict[str, Any]) -> None:
    """Put the checkpoint into a run whose model has its shape.

    EvenstepError when the text or the tokenizer are not those of the checkpoint any more.
    """
    if trainer["tokenizer"] != run.tokenizer.fingerprint:
        raise EvenstepError(
            f"{checkpoint} was trained with another tokenizer than '{run.config.data.tokenizer}' is now; "
            f"bring back the one it had, or start a new run with: {_again(run, weights=False)}"
        )
    if trainer["data"] != run.data_identity():
        raise EvenstepError(
            f"{checkpoint} was trained on other tokens than {run.config.data.source} gives now (the text has changed); "
            f"bring back the text, or start a new run from its weights with: {_again(run)}"
        )
    fill(checkpoint, run.tensors())
    load_optimizer(run.model, run.optimizer, checkpoint, trainer["optimizer"])
    run.step_number, run.tokens = trainer["step"], trainer["tokens"]
    run.seconds, run.step_seconds = trainer["seconds"], trainer["step_seconds"]
    run.loader.position = trainer["position"]
    run.skipped = [(start, stop) for start, stop in trainer["skipped"]]
    run.window.loss.copy_(trainer["window_loss"])
    run.window.steps = trainer["window_steps"]
    processes = trainer["processes"]
    own = processes[run.world.rank] if len(processes) == run.world.size else None
    telemetry = trainer["telemetry"]
    run.telemetry.load(telemetry and telemetry | {"probe": own["probe"] if own else None})
    if own:
        set_rng_state(own["rng"])
    else:  # another number of processes: numbers that nothing has drawn yet, the same for all copies of a parameter
        torch.manual_seed(hash((run.config.seed, run.step_number)) % 2**63)


def _again(run: Run, *, weights: bool = True) -> str:
    return new_run(run.config.COMMAND, run.out, weights=weights)


def data_identity(data: TokenData) -> str:
    """A hash of the counts and of both ends of the token stream: quick for any corpus, different for another text."""
    train, val = data.train, data.val
    digest = hashlib.sha256(repr((len(train), len(val), train.num_bytes, val.num_bytes)).encode())
    for start in (0, max(0, len(train) - 65536)):
        digest.update(train.read(start, min(start + 65536, len(train))).astype("<u4").tobytes())
    return digest.hexdigest()


def rng_state() -> dict[str, Any]:
    """Every random state of the process, in types that ``torch.load(weights_only=True)`` reads."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(np.array(keys, dtype=np.int64)), position, has_gauss, cached],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
