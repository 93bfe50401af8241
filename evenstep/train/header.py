"""What a run says before its first step: what is trained, how, on what, and where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evenstep.train.config import BaseConfig
from evenstep.train.config_io import build
from evenstep.train.log import short_count
from evenstep.train.optimizers import lr_factor

if TYPE_CHECKING:
    from evenstep.train.run import Run


def header(run: Run) -> list[str]:
    """A line for each of model, optimizer, data, budget, device and folder."""
    config, train = run.config, run.config.train
    optim, schedule = config.optim, config.schedule
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    model = f"{config.model.label}, {short_count(run.model.num_parameters())} parameters"
    if trained < run.model.num_parameters():
        model += f", {short_count(trained)} of them trained"
    low = f", low-bit {config.lowbit}" if config.lowbit else ""
    before = f"{optim.before} + " if optim.before else ""
    micro = train.batch_size // run.world.data_size // run.micro_batch_size
    passes = f" in {micro} passes" if micro > 1 else ""
    processes = f", {run.world.size} processes ({config.parallel.mode})" if run.world.size > 1 else ""
    lines = {
        "model": model + low,
        "optimizer": f"{before}{optim.name}, lr {optim.lr:g}, {schedule.name}, {config.warmup_steps:,} warm-up steps",
        "data": run.describe_data(),
        "budget": f"{config.total_steps:,} steps of {train.batch_size} x {train.seq_len} tokens{passes}",
        "device": f"{run.device}, {train.dtype}{processes}",
        "folder": str(run.out),
    }
    return [f"{key:<10} {line}" for key, line in lines.items()]


def rising_rate(config: BaseConfig, trainer: dict[str, Any]) -> str | None:
    """A line where a run that is taken up with another budget trains at a higher rate than it had reached: its schedule
    is stretched over all steps. None where it does not."""
    old, done = build(trainer["config"], type(config)), trainer["step"]
    if done >= config.total_steps or done < config.warmup_steps:
        return None
    had = old.optim.lr * lr_factor(old.schedule, max(1, done), old.total_steps, old.warmup_steps)
    now = config.optim.lr * lr_factor(config.schedule, done + 1, config.total_steps, config.warmup_steps)
    if now <= had * 1.01:
        return None
    return (
        f"the learning rate rises from {had:.2e} to {now:.2e}: schedule {config.schedule.name} now takes "
        f"{config.total_steps:,} steps and not {old.total_steps:,}"
    )
