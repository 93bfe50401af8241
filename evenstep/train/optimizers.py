"""The optimizer of a run, built from ``[optim]``, and its learning rate schedule.

`evenstep.baselines.catalog` lists the optimizers. Hyperparameters are checked against the signature of the constructor,
so a new optimizer needs no list of options here. The learning rate depends only on the step, so a checkpoint does not
contain a state of the schedule.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from evenstep.baselines.catalog import BASELINES, baseline, check_options
from evenstep.baselines.rules import hidden_and_rest
from evenstep.baselines.transforms import add_transforms, build_transforms
from evenstep.errors import EvenstepError, first_line
from evenstep.optim.groups import edge_weights
from evenstep.optim.weight_rules import cautious_decay, hyperball
from evenstep.train.config import BaseConfig, ScheduleConfig
from evenstep.train.config_io import shown

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from evenstep.train.config import OptimConfig


def check_optimizer(config: OptimConfig) -> None:
    """EvenstepError for an option that the constructor of the optimizer does not have, a package that is not installed,
    or invalid transforms. Does not build the optimizer."""
    check_options(config.name, config.options)
    build_transforms(config.before)
    for option in ("decay_correction", "cautious_decay"):
        if getattr(config, option) and not baseline(config.name).decoupled:
            able = ", ".join(name for name, one in BASELINES.items() if one.decoupled)
            raise EvenstepError(
                f"optim.{option} true is for decoupled weight decay, which {config.name} does not have; give one of "
                f"{able}"
            )


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """The optimizer of ``config`` over every trainable parameter of ``model``, with its gradient transforms.

    With ``decay = "matrices"``, parameters of fewer than two dimensions are in a separate group with weight_decay 0:
    norms and biases are scales and offsets, for which small values are no simpler. The embedding and the output layer
    are in groups of their own where ``lr_scale`` gives them another learning rate. ``cautious_decay`` and ``hyperball``
    change the ``step`` of the optimizer, see `evenstep.optim.weight_rules`. EvenstepError for options or values
    that the constructor refuses.
    """
    check_optimizer(config)
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in config.options.items()}
    try:
        optimizer = baseline(config.name).build(
            model,
            lr=config.lr,
            weight_decay=config.weight_decay,
            decay=config.decay,
            lr_scales=config.lr_scales,
            ends_apart=bool(config.decay_correction),
            **values,
        )
    except EvenstepError:
        raise
    except (ValueError, TypeError) as problem:
        raise EvenstepError(f"optim: {config.name} refuses its options: {first_line(problem)}") from problem
    optimizer = add_transforms(optimizer, config.before)
    try:
        if config.cautious_decay:
            cautious_decay(optimizer)
        if config.hyperball is not None:
            hidden, _ = hidden_and_rest(model)
            hyperball(optimizer, [p for _, p in hidden], config.hyperball)
    except ValueError as problem:  # weights of 16 bits
        raise EvenstepError(f"optim.{first_line(problem)}") from problem
    return optimizer


def try_optimizer(config: OptimConfig) -> None:
    """EvenstepError for options and values that the constructor refuses. Builds a tiny model on the meta device instead
    of the model of the run."""
    check_optimizer(config)
    if baseline(config.name).package not in ("evenstep", "torch"):  # others may need a real device
        return
    from evenstep.models import Llama, llama_config

    with torch.device("meta"):
        model = Llama(llama_config("tiny", 8, num_layers=1))
    build_optimizer(model, config)


class LearningRates:
    """Multiplies the learning rate of every group by the factor of the schedule. Groups may have different rates, such
    as Muon's ``adam_lr``, and those of ``optim.lr_scale``.

    With a ``model`` the weight decay is multiplied too, except that of the embedding and the last layer: AdamC
    (arXiv:2506.02285). A matrix before a norm then shrinks by the factor 1 - lr^2 / lr_max * weight_decay, which keeps
    the ratio of its gradient to its norm while the rate decays; with AdamW gradients grow at the end of a run."""

    def __init__(self, optimizer: Optimizer, model: nn.Module | None = None) -> None:
        ends = edge_weights(model) if model is not None else {}
        kept = {id(p) for members in ends.values() for p in members}
        # None: the weight decay of the group does not change.
        self.decay = [
            group["weight_decay"] if model is not None and id(group["params"][0]) not in kept else None
            for group in optimizer.param_groups
        ]
        # Taken before a state is loaded: saved groups contain the rate of their step, not the peak.
        self.base = [group["lr"] for group in optimizer.param_groups]

    def set(self, optimizer: Optimizer, factor: float) -> None:
        for group, rate, decay in zip(optimizer.param_groups, self.base, self.decay, strict=True):
            group["lr"] = rate * factor
            if decay is not None:
                group["weight_decay"] = decay * factor


# ---- the schedule ----


def lr_factor(schedule: ScheduleConfig, step: int, total_steps: int, warmup_steps: int) -> float:
    """The factor of the learning rate in optimizer step ``step`` (1-based) of ``total_steps``.

    * Warm-up: step / warmup_steps, so the first step has a rate above zero and the last warm-up step the full rate.
    * After the warm-up, with x = (step - warmup) / (total - warmup) in (0, 1]:

      - cosine: min + (1 - min) (1 + cos(pi x)) / 2, exactly ``min_lr_ratio`` in the last step;
      - wsd: 1, then linear to ``min_lr_ratio`` over the last ``decay_fraction`` of all steps;
      - constant: 1.

    Steps beyond the total have the last value.

    >>> schedule = ScheduleConfig(name="cosine", min_lr_ratio=0.1)
    >>> [round(lr_factor(schedule, step, 100, 10), 3) for step in (1, 10, 55, 100)]
    [0.1, 1.0, 0.55, 0.1]
    """
    if step <= warmup_steps:
        return step / warmup_steps
    step = min(step, total_steps)
    return _SHAPES[schedule.name](schedule, step, total_steps, warmup_steps)


def _cosine(schedule: ScheduleConfig, step: int, total: int, warmup: int) -> float:
    low = schedule.min_lr_ratio
    return low + (1 - low) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def _wsd(schedule: ScheduleConfig, step: int, total: int, warmup: int) -> float:
    # The decay starts after the warm-up, even if decay_fraction and the warm-up together exceed the run.
    decay_steps = min(max(1, round(schedule.decay_fraction * total)), total - warmup)
    remaining = (total - step) / decay_steps
    return min(1.0, schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * remaining)


def _constant(schedule: ScheduleConfig, step: int, total: int, warmup: int) -> float:
    return 1.0


_SHAPES = {"cosine": _cosine, "wsd": _wsd, "constant": _constant}


def changed_state(old: OptimConfig, new: OptimConfig) -> str | None:
    """The first option because of which the state of an optimizer with the options ``old`` does not serve one with the
    options ``new``, with both values; None if the state serves. Numbers such as the learning rate may differ."""
    pairs: dict[str, tuple[Any, Any]] = {"name": (old.name, new.name), "before": (old.before, new.before)}
    pairs |= {key: (old.options.get(key), new.options.get(key)) for key in sorted({*old.options, *new.options})}
    for key, (was, now) in pairs.items():
        shapes = [x for x in (was, now) if isinstance(x, str | bool)]
        if was != now and (shapes or key == "density"):
            return f"optim.{key} was {shown(was)} and is {shown(now)}"
    return None


def rising_rate(old: BaseConfig, new: BaseConfig, done: int) -> str | None:
    """A warning if a run that is resumed at step ``done`` with another budget continues at a higher learning rate than
    it had reached, because the schedule is stretched over all steps; else None."""
    if done >= new.total_steps or done < new.warmup_steps:
        return None
    had = old.optim.lr * lr_factor(old.schedule, max(1, done), old.total_steps, old.warmup_steps)
    now = new.optim.lr * lr_factor(new.schedule, done + 1, new.total_steps, new.warmup_steps)
    if now <= had * 1.01:
        return None
    return (
        f"the learning rate rises from {had:.2e} to {now:.2e}: schedule {new.schedule.name} now has "
        f"{new.total_steps:,} steps instead of {old.total_steps:,}"
    )
