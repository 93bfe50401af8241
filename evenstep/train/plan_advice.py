"""What to change so that a plan fits: the fewest changes that do, found by trying all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from evenstep.errors import EvenstepError
from evenstep.train.config import Config
from evenstep.train.plan import Plan, make_plan
from evenstep.train.plan_tensors import SPLIT
from evenstep.train.sections import ParallelConfig

MOST_GPUS = 4096

Change = tuple[str, str, Any]
"""Section, option, value."""


def advice(plan: Plan, per_node: int) -> list[str]:
    """Ways to make it fit, each with as few changes as any, in words; none when it fits. More GPUs are the last
    resort."""
    if plan.fits:
        return []
    gpus = plan.grid.gpus
    while gpus <= MOST_GPUS:
        found: dict[tuple[str, ...], str] = {}
        for changes in _candidates(plan, gpus):
            options = tuple(option for _, option, _ in changes)
            if options not in found and _fits(plan, changes, gpus, per_node):  # the mildest value comes first
                words = [f"{section}.{option} {_word(value)}" for section, option, value in changes]
                found[options] = " and ".join([*words, f"{gpus} GPUs"] if gpus > plan.grid.gpus else words)
        if found:
            fewest = min(map(len, found))
            return [words for options, words in found.items() if len(options) == fewest]
        gpus *= 2
    return ["a smaller model.size or train.seq_len, or GPUs with more memory"]


def _word(value: object) -> str:
    return "true" if value is True else str(value)


def _candidates(plan: Plan, gpus: int) -> Iterator[list[Change]]:
    """Every combination of changes, milder values first."""
    config, micro = plan.config, plan.config.micro_batch_size
    whole = config.train.batch_size // max(1, gpus // plan.grid.tensor)  # one pass: FSDP keeps no whole gradients
    sizes = [micro // 2**i for i in range(1, 12) if micro % 2**i == 0] + [whole] * (whole > micro)
    states = [] if config.optim.name in ("adam", "adamw") else ["bf16", "int8"]
    given = config.optim.options.get("state", "fp32")
    states = states[states.index(given) + 1 :] if given in states else states
    modes = [mode for mode in ("fsdp", "tp+fsdp") if mode != config.parallel.mode and gpus > 1]
    several: list[list[Change | None]] = [
        [None, *([] if config.train.activation_checkpointing else [("train", "activation_checkpointing", True)])],
        [None, *(("train", "micro_batch_size", size) for size in sizes)],
        [None, *(("optim", "state", state) for state in states)],
        [None, *(("parallel", "mode", mode) for mode in modes)],
    ]
    for chosen in product(*several):
        yield [change for change in chosen if change is not None]


def _changed(config: Config, changes: list[Change]) -> Config:
    for section, option, value in changes:
        if section == "optim":
            config = replace(config, optim=replace(config.optim, options={**config.optim.options, option: value}))
        elif section == "train":
            config = replace(config, train=replace(config.train, **{option: value}))
        else:
            config = in_mode(config, str(value))
    return config


def in_mode(config: Config, mode: str) -> Config:
    """``config`` with another parallel mode, and that mode's own defaults."""
    if config.parallel.mode == mode:
        return config
    given = config.parallel
    return replace(config, parallel=ParallelConfig(mode=mode, reshard=given.reshard, timeout=given.timeout))


def _fits(plan: Plan, changes: list[Change], gpus: int, per_node: int) -> bool:
    try:
        config = _changed(plan.config, changes)
        more = gpus > plan.grid.gpus and config.parallel.mode not in SPLIT  # copies stay as large
        return not more and make_plan(config, plan.shape, gpus, per_node, plan.gpu_memory).fits
    except EvenstepError:  # the batch or the model does not divide so
        return False
