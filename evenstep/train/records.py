"""What a step gives, what is gathered between log lines, and the lines of metrics.jsonl, whose keys are stable
names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from evenstep.telemetry.clocks import steps_to_reset
from evenstep.train.hardware import peak_flops, peak_memory

if TYPE_CHECKING:
    from evenstep.train.run import Run


@dataclass(frozen=True)
class StepResult:
    """``loss``: mean over the step's tokens, 0-d on the device. ``grad_norm``: of all gradients before clipping, on
    log steps or when clipping."""

    step: int
    loss: Tensor
    lr: float
    grad_norm: Tensor | None


@dataclass
class Window:
    """What has been gathered since the last training line of the log; its loss is part of a checkpoint, its times
    are not."""

    loss: Tensor
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0

    def add(self, loss: Tensor, tokens: int, seconds: float, data_seconds: float) -> None:
        """One more step."""
        self.loss += loss
        self.steps += 1
        self.tokens += tokens
        self.seconds += seconds
        self.data_seconds += data_seconds


def train_record(run: Run, result: StepResult, loss: float, seconds: float) -> dict[str, Any]:
    """A training line: ``loss`` is the mean over the steps since the last line, ``seconds`` the time they took in
    this process.

    ``data_share`` is the share of that time spent waiting for batches, ``memory`` the peak in bytes, ``mfu`` (GPU
    alone) the model's FLOPs over the GPU's peak, ``steps_to_reset`` there when the optimizer resets its moments.
    """
    window, config = run.window, run.config
    speed = window.tokens / seconds
    record: dict[str, Any] = {
        "step": result.step,
        "tokens": run.tokens,
        "loss": loss,
        "lr": result.lr,
        "grad_norm": result.grad_norm.item() if result.grad_norm is not None else None,
        "tokens_per_second": speed,
        "data_share": window.data_seconds / seconds,
        "memory": peak_memory(run.device),
        "seconds": run.seconds,
    }
    peak = peak_flops(run.device, config.train.dtype)
    if peak:
        record["mfu"] = speed * run.model.flops_per_token(config.train.seq_len) / (peak * run.world.size)
    wait = steps_to_reset(run.optimizer)
    if wait is not None:
        record["steps_to_reset"] = wait
    return record


def validation_record(run: Run, result: Any) -> dict[str, Any]:
    return {"step": run.step_number, "tokens": run.tokens, **result.fields(), "seconds": run.seconds}
