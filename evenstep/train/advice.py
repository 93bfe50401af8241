"""What to do when training falls apart, as a command that works."""

from __future__ import annotations

import shlex
from pathlib import Path

from evenstep.console import program
from evenstep.errors import EvenstepError
from evenstep.paths import unused
from evenstep.train.checkpoint import list_checkpoints
from evenstep.train.config import BaseConfig


def diverged(config: BaseConfig, step: int, what: str, rescued: Path | None = None) -> EvenstepError:
    """The error of a run that met a NaN or an infinity at ``step``; ``rescued`` is the checkpoint of the weights
    before it.

    Those weights lose nothing when the fault was a passing one, but an update may have ruined them already while they
    are still finite. So the advice for a new run starts from the checkpoint before, or from scratch.
    """
    out = Path(config.out or "")
    kept = [path for path in list_checkpoints(out / "checkpoints") if path != rescued]
    facts = [f"{what} at step {step}, training stopped"]
    if rescued:
        facts.append(f"the weights before that step are saved as {rescued}, though they may be ruined already")
    if kept:
        facts.append(f"the checkpoint before is {kept[0]}")
    if rescued or kept:
        facts.append(f"after a passing fault go on with: {program()} {config.COMMAND} --resume {shlex.quote(str(out))}")
    else:
        facts.append("no checkpoint was saved before it")
    command = [config.COMMAND, str(out / "config.toml")]
    command += ["--model.init", str(kept[0])] if kept and config.COMMAND == "pretrain" else []
    command += ["--optim.lr", f"{config.optim.lr / 10:g}", "--out", str(unused(out))]
    facts.append(
        f"else lower the rate in a new run (or lengthen schedule.warmup_steps): {program()} {shlex.join(command)}"
    )
    return EvenstepError("; ".join(facts))
