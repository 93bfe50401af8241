"""The page of the suite: what holds and what does not, from the outcomes of the cells.

A loss is compared with the lowest one of any remedy for the same variant and seed (regret), and where there is a fault,
with the loss of the same remedy and seed without it (damage).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

from evenstep.compare.cells import Outcome
from evenstep.compare.claims import CONFIRMED, OPEN, OPPOSITE, UNCONFIRMED, UNMEASURED, judge, settled
from evenstep.compare.report import table
from evenstep.console import counted
from evenstep.errors import EvenstepError
from evenstep.stability.remedies import Remedy
from evenstep.stability.study import CLAIMS, WATCHED, Claim, Scale
from evenstep.stability.tasks import FAMILIES, TASKS, Task, Variant, baseline
from evenstep.stability.trial import EVERY
from evenstep.train.files import replace_text
from evenstep.train.hardware import short_commit

NEAR = 0.1  # nats: a run whose loss is within it of the best counts for the headline
LEVEL = 0.05  # nats: remedies that differ by less are recommended alike
LEARNT = 0.3  # nats below the loss of a model that knows token frequencies only: survival
SEPARATED = 0.1  # nats between the best and the worst remedy below which a variant separates nothing

Trial = dict[str, Any]
Key = tuple[str, str]
"""Name of a task and of a variant."""


@dataclass(frozen=True)
class Results:
    """Everything that the page says, from the trials: (task, variant) -> remedy -> seed -> trial."""

    trials: Mapping[Key, Mapping[str, Mapping[int, Trial]]]
    tuned: Mapping[str, Mapping[str, Any]]
    """"family remedy" -> the summary of its tuning."""
    baselines: Mapping[str, float]
    """Family -> loss of a model that knows token frequencies only."""
    costs: Mapping[str, float] = field(default_factory=dict)
    """Remedy -> cost of a step in units of one with Adam."""
    alarms: Mapping[Key, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """The results of `trial.watch`, of the runs with a SpikeMonitor."""

    def common(self) -> Results:
        """The results of the seeds that every remedy of a variant has. Where a seed has fewer remedies the best of them
        is worse, and every regret smaller, so that remedies with other seeds could not be compared."""
        trials = {}
        for key, by_remedy in self.trials.items():
            seeds = set.intersection(*({*by_seed} for by_seed in by_remedy.values()))
            trials[key] = {name: {seed: by_seed[seed] for seed in seeds} for name, by_seed in by_remedy.items()}
        return replace(self, trials=trials)

    def keys(self, task: str) -> list[Key]:
        return [key for key in self.trials if key[0] == task]

    def loss(self, key: Key, remedy: str, seed: int) -> float:
        """Infinite if the run did not end with finite weights; NaN if it is not measured."""
        trial = self.trials.get(key, {}).get(remedy, {}).get(seed)
        return math.nan if trial is None else math.inf if trial["loss"] is None else trial["loss"]

    def losses(self, key: Key, remedy: str) -> list[float]:
        return [self.loss(key, remedy, seed) for seed in sorted(self.trials[key].get(remedy, {}))]

    def regrets(self, key: Key, remedy: str) -> dict[int, float]:
        """Loss above the lowest one of any remedy, by seed."""
        return {
            seed: self.loss(key, remedy, seed) - min(self.loss(key, other, seed) for other in self._having(key, seed))
            for seed in self.trials[key].get(remedy, {})
        }

    def _having(self, key: Key, seed: int) -> list[str]:
        return [remedy for remedy, by_seed in self.trials[key].items() if seed in by_seed]

    def damages(self, key: Key, remedy: str) -> list[float]:
        """Loss above that of the undisturbed run of the same remedy and seed."""
        pairs = [
            (self.loss(key, remedy, seed), self.loss(CONTROL, remedy, seed))
            for seed in self.trials[key].get(remedy, {})
        ]
        return [loss - calm for loss, calm in pairs if not math.isnan(calm)]

    def lost_share(self, key: Key, remedy: str) -> list[float]:
        """The share of the training that a fault undid, by seed: how much earlier the undisturbed run of the same
        remedy and seed had the loss that the faulty run ended with. 1 for a run that was never as good."""
        shares = []
        for seed in self.trials[key].get(remedy, {}):
            calm = self.trials.get(CONTROL, {}).get(remedy, {}).get(seed)
            if calm is None or None in calm["curve"] or not calm["curve"]:
                continue
            last = self.loss(key, remedy, seed)
            reached = next((i for i, loss in enumerate(calm["curve"]) if loss <= last), len(calm["curve"]) - 1)
            earlier = _crossing(calm["curve"], reached, last)
            shares.append(1 - earlier / len(calm["curve"]))
        return shares

    def survived(self, key: Key, remedy: str) -> tuple[int, int]:
        """Runs that ended well below the loss of token frequencies, of how many."""
        family = next(task.family for task in TASKS if task.name == key[0])
        losses = self.losses(key, remedy)
        return sum(loss <= self.baselines[family] - LEARNT for loss in losses), len(losses)

    def near(self, remedy: str) -> tuple[float, int]:
        """The share of seeds whose regret is at most `NEAR`, as a mean over the variants that the remedy has, and the
        number of these."""
        shares = [mean(x <= NEAR for x in self.regrets(key, remedy).values()) for key in self.having(remedy)]
        return (mean(shares) if shares else math.nan), len(shares)

    def having(self, remedy: str) -> list[Key]:
        """The variants that the remedy has runs of."""
        return [key for key, by_remedy in self.trials.items() if by_remedy.get(remedy)]

    def separates(self, key: Key) -> bool:
        means = [mean(self.losses(key, remedy)) for remedy in self.trials[key]]
        return max(means) - min(means) > SEPARATED


def _crossing(curve: Sequence[float], i: int, loss: float) -> float:
    """The number of intervals after which ``curve``, whose point i is the first one at or below ``loss`` or else the
    last, had that loss: between its points i - 1 and i. 0 where it was there at its first point."""
    if curve[i] > loss:
        return i + 1.0
    return i + (curve[i - 1] - loss) / (curve[i - 1] - curve[i]) if i else 0.0


CONTROL: Key = ("control", "tuned rate")
RAISED = ("rates", "lowbit", "logits")
"""Tasks that raise the learning rate on purpose."""


def results_of(outcomes: Mapping[str, Outcome], scale: Scale, remedies: Sequence[Remedy]) -> Results:
    """The results among the outcomes, tasks and remedies in the order of their lists."""
    found: dict[Key, dict[str, dict[int, Trial]]] = {}
    tuned, costs = {}, {}
    alarms: dict[Key, list[Mapping[str, Any]]] = {}
    for outcome in outcomes.values():
        setting, remedy = outcome.summary["setting"], outcome.summary["setting"]["remedy"]["name"]
        if "chosen" in outcome.summary:
            tuned[f"{setting['family']['name']} {remedy}"] = outcome.summary
            continue
        if "cost" in outcome.summary:
            costs[remedy] = outcome.summary["cost"]["ratio"]
            continue
        if "alarms" in outcome.summary:
            for variant, watched in outcome.summary["alarms"].items():
                alarms.setdefault((setting["task"], variant), []).extend(watched)
            continue
        for variant, trials in outcome.summary["trials"].items():
            by_remedy = found.setdefault((setting["task"], variant), {})
            by_remedy.setdefault(remedy, {}).update({trial["seed"]: trial for trial in trials})
    names = [remedy.name for remedy in remedies]
    ordered: dict[Key, dict[str, dict[int, Trial]]] = {}
    for task in TASKS:
        for variant in task.variants:
            by_remedy = found.get((task.name, variant.name), {})
            if by_remedy and task.name in scale.tasks:
                ordered[task.name, variant.name] = {name: by_remedy[name] for name in names if name in by_remedy}
    families = {task.family for task in TASKS if any(key[0] == task.name for key in ordered)}
    baselines = {name: baseline(scale.source, scale.families[name].vocab_size) for name in families}
    return Results(ordered, tuned, baselines, costs, alarms)


# ---- claims ----


def verdicts(results: Results) -> list[dict[str, Any]]:
    """The registered claims with their verdicts, corrected by Holm's method."""
    judged = []
    for claim in CLAIMS:
        first, second = (_by_seed(results, claim, remedy) for remedy in (claim.better, claim.than))
        verdict, gap = judge(first, second)
        verdict = UNMEASURED if verdict == OPEN else verdict
        ours = f"{gap.first:.3f} against {gap.second:.3f} ({gap.mean:+.3f} ± {gap.within:.3f})" if gap else ""
        p = gap.p if gap else 1.0
        judged.append({"text": claim.text, "verdict": verdict, "ours": ours, "p": p, "seeds": gap.seeds if gap else 0})
    return settled(judged)


def _by_seed(results: Results, claim: Claim, remedy: str) -> dict[int, float]:
    """The mean loss over the variants of the claim, of each seed that has all of them."""
    keys = [key for key in results.keys(claim.task) if not claim.variants or key[1] in claim.variants]
    seeds = set.intersection(*({*results.trials[key].get(remedy, {})} for key in keys)) if keys else set()
    return {seed: mean(results.loss(key, remedy, seed) for key in keys) for seed in sorted(seeds)}


# ---- words ----


def number(x: float) -> str:
    return "-" if math.isnan(x) else "dead" if x == math.inf else f"{x:.2f}"


def lead(results: Results, told: Sequence[Mapping[str, Any]], remedies: Sequence[Remedy]) -> str:
    """The first words of the page: the share of runs near the best and the lost runs, for the remedies that have every
    variant; and the claims by verdict. Lost runs are counted over all seeds."""
    every, results = results, results.common()
    near = {remedy.name: results.near(remedy.name) for remedy in remedies}
    most = max(variants for _, variants in near.values())
    whole = {name: share for name, (share, variants) in near.items() if variants == most}
    order = sorted(whole, key=lambda name: -whole[name])
    shown = [*order[:3], *(name for name in _NAMED if name in whole and name not in order[:3])]
    shares = ", ".join(f"{name} in {whole[name]:.0%}" for name in shown)
    calm = [key for key in results.trials if key[0] not in RAISED]
    lost = {name: _lost(every, name, calm) for name in whole}
    held = [name for name in order if not lost[name][0]]
    survivors = f"{', '.join(held)} lost no run" if held else "every remedy lost a run"
    variants = counted(most, "variant")
    sentences = [
        f"**No remedy is best everywhere.** Over {variants} of the tasks, a remedy is within {NEAR} nats of the best "
        f"one: {shares}.",
        f"Outside of the tasks that raise the learning rate on purpose, {survivors}"
        + "".join(f"; {name} lost {lost[name][0]} of {lost[name][1]}" for name in shown if lost[name][0])
        + ".",
    ]
    blocks = [" ".join(sentences)]
    for verdict in (CONFIRMED, OPPOSITE, UNCONFIRMED, UNMEASURED):
        found = [one for one in told if one["verdict"] == verdict]
        lines = [f"- {one['text']}{': ' if one['ours'] else ''}{one['ours']}" for one in found]
        blocks += ["\n".join([f"{verdict.capitalize()} (loss in nats):\n", *lines])] if lines else []
    return "\n\n".join(blocks)


def _lost(results: Results, remedy: str, keys: Iterable[Key]) -> tuple[int, int]:
    """The number of lost runs, and that of all runs."""
    counts = [results.survived(key, remedy) for key in keys if remedy in results.trials[key]]
    return sum(runs - alive for alive, runs in counts), sum(runs for _, runs in counts)


def overview(results: Results, remedies: Sequence[Remedy]) -> str:
    """A line for each remedy over all tasks, by the share of runs near the best: first the remedies that have every
    variant, then the others. Lost runs are counted over all seeds."""
    every, results = results, results.common()
    faulty = [(task.name, variant.name) for task in TASKS for variant in task.variants if variant.fault]
    rows: list[tuple[int, float, tuple[str, ...]]] = []
    for remedy in remedies:
        share, variants = results.near(remedy.name)
        if not variants:
            continue
        keys = results.having(remedy.name)
        damages = [x for key in faulty if key in keys for x in results.damages(key, remedy.name)]
        alive = [x for x in damages if x < math.inf]
        undone = [x for key in faulty if key in keys for x in results.lost_share(key, remedy.name)]
        trials = [trial for key in keys for trial in results.trials[key][remedy.name].values()]
        episodes = sum(trial["episodes"] for trial in trials) / len(trials)
        premium = mean(results.regrets(CONTROL, remedy.name).values()) if CONTROL in keys else math.nan
        damage = f"{mean(alive):.2f}" if alive else "-"
        lost = []
        for raised in (False, True):
            gone, runs = _lost(every, remedy.name, [key for key in keys if (key[0] in RAISED) == raised])
            lost.append(f"{gone} of {runs}" if runs else "-")
        words = (
            *lost, damage, f"{mean(undone):.0%}" if undone else "-", f"{episodes:.2f}", number(premium),
            f"{results.costs[remedy.name]:.2f}" if remedy.name in results.costs else "-",
        )  # fmt: skip
        rows.append((variants, share, (remedy.name, f"{share:.0%}", *words)))
    most = max(variants for variants, _, _ in rows)
    heads = (
        "remedy", f"within {NEAR} of the best", "lost", "lost at raised rates", "mean damage", "run undone by a fault",
        "spike episodes", "regret undisturbed", "cost of a step",
    )  # fmt: skip
    order = sorted(rows, key=lambda row: -row[1])
    text = table(heads, [words for variants, _, words in order if variants == most])
    fewer = [(*words, str(variants)) for variants, _, words in order if variants < most]
    if fewer:
        text += (
            f"\nThese remedies were run in fewer than {counted(most, 'variant')}. Their shares and means cannot be "
            "compared with those above, nor with each other where the numbers of variants differ.\n\n"
        )
        text += table((*heads, "variants"), fewer)
    return text


_NAMED = ("Adam", "Adam + clip 1", "Adam + tuned clip", "Stable-SPAM .7/.9", "Stable-SPAM .85/.99999", "SPAM")
"""Remedies that the first paragraph always names."""


def choices(results: Results) -> str:
    """The table "if this breaks, use that": for each task the remedies with the lowest mean loss and, where there is a
    fault, those with the least damage; and the regret of the usual ones."""
    rows = []
    for task in TASKS:
        keys = results.keys(task.name)
        if not keys or task.name == "control":
            continue
        names = [name for name in results.trials[keys[0]] if all(name in results.trials[key] for key in keys)]
        regret = {name: mean(x for key in keys for x in results.regrets(key, name).values()) for name in names}
        level = not any(results.separates(key) for key in keys)
        faults = [v.name for v in task.variants if v.fault]
        # Without the undisturbed runs, as with `--only data`, there is no damage.
        harm = {name: [x for key in keys for x in results.damages(key, name)] for name in names if faults}
        damage = {name: mean(values) for name, values in harm.items() if values}
        usual = [number(regret.get(name, math.nan)) for name in _NAMED[:5]]
        lowest = "nothing: level" if level else _best(regret, LEVEL)
        rows.append((task.title, lowest, _best(damage, LEVEL / 2) if damage else "", *usual))
    return table(("if this breaks", "lowest loss", "least damage", *_NAMED[:5]), rows)


def _best(values: Mapping[str, float], within: float) -> str:
    """The names whose value is within so much of the lowest, the best first, at most four of them."""
    best = sorted((name for name in values if values[name] <= min(values.values()) + within), key=values.__getitem__)
    return ", ".join(f"{name} ({number(values[name])})" for name in best[:4]) + (", ..." if len(best) > 4 else "")


def task_section(results: Results, task: Task, remedies: Sequence[Remedy]) -> str:
    """The numbers of one task: mean loss, the damage of a fault, and the runs that did not survive."""
    keys, shared = results.keys(task.name), results.common()
    variants = {variant.name: variant for variant in task.variants}
    rows = []
    for remedy in remedies:
        if not any(remedy.name in results.trials[key] for key in keys):
            continue
        cells = [_cell(results, key, remedy.name, variants[key[1]]) for key in keys]
        regrets = [x for key in keys for x in shared.regrets(key, remedy.name).values()]
        seeds = {len(results.trials[key][remedy.name]) for key in keys if remedy.name in results.trials[key]}
        count = "-".join(str(n) for n in sorted({min(seeds), max(seeds)}))
        rows.append((remedy.name, *cells, number(mean(regrets)), count, _recovery(results, keys, remedy.name)))
    order = sorted(rows, key=lambda row: float("inf") if row[-3] in ("-", "dead") else float(row[-3]))
    family = FAMILIES[task.family]
    level = [key[1] for key in keys if not shared.separates(key)]
    note = f"\nNo remedy differs from another by more than {SEPARATED} nats: {', '.join(level)}.\n" if level else ""
    text = (
        f"## {task.title}\n\n{task.question} Source: {task.source}. Model `{family.name}`; a loss of "
        f"{results.baselines[family.name]:.2f} knows token frequencies only. "
        f"`evenstep stability --only {task.name}`\n{note}\n"
    )
    heads = ("remedy", *(key[1] for key in keys), "regret", "seeds", "recovery")
    if not any(variants[key[1]].fault for key in keys):
        heads, order = heads[:-1], [row[:-1] for row in order]
    return text + table(heads, order)


def _cell(results: Results, key: Key, remedy: str, variant: Variant) -> str:
    if remedy not in results.trials[key]:
        return "-"
    text = number(mean(results.losses(key, remedy)))
    if variant.fault:
        damages = results.damages(key, remedy)
        text += f" ({mean(damages):+.2f})" if damages and max(damages) < math.inf else ""
    alive, runs = results.survived(key, remedy)
    return text if alive == runs else f"{text}, {runs - alive}/{runs} lost"


def _recovery(results: Results, keys: Sequence[Key], remedy: str) -> str:
    """The mean number of steps from the start of a fault until the validation loss is back at its value before it, over
    the runs that got there, and how many did not."""
    steps, never = [], 0
    for key in keys:
        for trial in results.trials[key].get(remedy, {}).values():
            # The number of validations before the fault; 0 in miniatures.
            before = (trial["fault"] or 0) // EVERY
            if not before:
                continue
            known = trial["curve"][before - 1]
            back = next((i for i, x in enumerate(trial["curve"]) if i >= before and x is not None and x <= known), None)
            if back is None:
                never += 1
            else:
                steps.append((back + 1) * EVERY - trial["fault"])
    if not steps and not never:
        return "-"
    return (f"{mean(steps):.0f}" if steps else "-") + (f", {never} never" if never else "")


def alarm_section(results: Results, remedies: Sequence[Remedy]) -> str:
    """How often the monitor and the guards act without a fault, and how late with one."""
    rows = []
    if results.alarms:
        runs = [run for watched in results.alarms.values() for run in watched]
        calm = [run["before"] for run in results.alarms.get(CONTROL, ())]
        delays = [run["delay"] for run in runs if run["fault"] is not None]
        before = sum(run["before"] for run in runs if run["fault"] is not None)
        rows.append((f"SpikeMonitor, {WATCHED}", *_alarms(calm, before, delays)))
    for remedy in remedies:
        if not remedy.ladder:
            continue
        trials = [t for by_remedy in results.trials.values() for t in by_remedy.get(remedy.name, {}).values()]
        calm = [t["false"] for t in results.trials.get(CONTROL, {}).get(remedy.name, {}).values()]
        struck = [t for t in trials if t["fault"] is not None]
        rows.append((remedy.name, *_alarms(calm, sum(t["false"] for t in struck), [t["first"] for t in struck])))
    if not rows:
        return ""
    heads = ("", "alarms in undisturbed runs", "before a fault", "faults seen", "steps until then")
    text = (
        "An alarm is a step with an event `spike`, `loss_spike` or `nonfinite` of the monitor, or an action of the "
        f"guard.\n\n{table(heads, rows)}"
    )
    return f"## What the monitor and the guard saw\n\n{text}"


def _alarms(calm: Sequence[int], before: int, delays: Sequence[int | None]) -> tuple[str, ...]:
    seen = [delay for delay in delays if delay is not None]
    late = f"{mean(seen):.1f} (largest {max(seen)})" if seen else "-"
    runs = len(delays)
    return f"{sum(calm)} in {len(calm)} runs", f"{before} in {runs} runs", f"{len(seen)} of {runs}", late


def tuning_section(results: Results, remedies: Sequence[Remedy]) -> str:
    families = [name for name in FAMILIES if any(key.startswith(f"{name} ") for key in results.tuned)]
    rows = []
    for remedy in remedies:
        cells = []
        for family in families:
            found = results.tuned.get(f"{family} {remedy.name}")
            chosen = found["chosen"] if found else None
            at = "" if not chosen or chosen["threshold"] is None else f", threshold {chosen['threshold']:g}"
            cells.append(f"{chosen['lr']:g}{at}" if chosen else "-")
        rows.append((remedy.name, *cells, f"`{remedy.command}`"))
    return "## Options and tuned rates\n\n" + table(("remedy", *families, "options of evenstep pretrain"), rows)


RULES = """\
## Rules

Written before the runs. The learning rate of a remedy is tuned for each model, on undisturbed training of full length
at loss scale 1, with seeds 100 and 101: in steps of 2, and beyond the edge as long as the best rate is at the edge. It
then holds for every variant, other loss scales and faults included, except where the variant has its own rate. The
tested seeds are others. A fault starts at a step between half and three quarters of the run, which depends on the seed;
a rewind leaves out the rows of the bad step, and with them the fault. Claims are registered in the code, compared over
pairs of equal seeds (Student's t, 95 %), and corrected by Holm's method over all of them.

*Regret* is the loss above that of the best remedy for the same variant and seed, in nats. It is a mean over the seeds
that all remedies of the variant have, as is every number above the claims but that of lost runs, which is of all seeds.
Losses and damages below the claims are means over the number of seeds in the column *seeds*. *(+0.12)* after a loss is
the damage: the loss above that of the same remedy and seed without the fault. *Lost* are runs with weights that are not
finite, or within {learnt} nats of a model that knows token frequencies only. *Run undone by a fault* is the share of
the training that the fault took back: how much earlier the undisturbed run of the same remedy and seed had the final
loss of the faulty one. A *spike episode* is a rise of the training loss by 0.5 nats above its lowest smoothed value,
counted per run. The *cost of a step* is processor time in units of a step with Adam, of forward and backward pass,
clipping, guard and optimizer together. *Recovery* is the mean number of steps until the validation loss is back where
it was before the fault.
"""

LIMITS = """\
## What this does not show

The models are small and the runs short, so that a cell costs seconds. A fault that a large model meets after weeks
may differ; ranks of remedies are evidence, sizes of differences are not. SPAM's resets and Stable-SPAM's moment resets
are set for runs of thousands of steps; SPAM resets every 100 steps here, Stable-SPAM does not reset in so few.
A rank that alone sees a fault is not a task here: it is tested in `tests/train/test_guard.py`. Reinforcement learning
without clipping and series with corrupted inputs have pages of their own ([RL](results-rl.md),
[forecasting](results-forecast.md)).
"""


def text_of(
    results: Results, scale: Scale, remedies: Sequence[Remedy], outcomes: Mapping[str, Outcome], store: Path
) -> str:
    summaries = [outcome.summary for outcome in outcomes.values()]
    command = f"evenstep stability --scale {scale.name} --store {store}"
    commits = sorted({short_commit(s["commit"], 7) for s in summaries if s.get("commit")})
    hardware = sorted({f"{s['hardware'].get('gpu') or s['hardware']['cpu']}" for s in summaries if "hardware" in s})
    seeds = sorted({seed for by_remedy in results.trials.values() for one in by_remedy.values() for seed in one})
    runs = sum(len(one) for by_remedy in results.trials.values() for one in by_remedy.values())
    hours = sum(s.get("seconds", 0) for s in summaries) / 3600
    claims = [
        (one["text"], one["ours"], "" if one["holm"] is None else f"{one['holm']:.3f}", f"**{one['verdict']}**")
        for one in verdicts(results)
    ]
    parts = [
        f"# Where training breaks\n\n<!-- Written by `{command} --report`. Change the program, not the page. -->\n",
        lead(results, verdicts(results), remedies) + "\n",
        f"{runs:,} runs, seeds {', '.join(map(str, seeds))}, {hours:.1f} hours of one core with tuning. "
        f"{'; '.join(hardware)}. Commits {', '.join(commits) or 'unknown'}. Repeat with `{command}`.\n",
        "![Regret of every remedy in every task](stability.png)\n",
        "## All tasks\n",
        overview(results, remedies),
        "## If this breaks, use that\n",
        "Means in nats over the variants of a task: regret, and damage by the fault. The last columns are regrets.\n",
        choices(results.common()),
        "## Claims\n",
        table(("claim", "loss", "p (Holm)", "verdict"), claims),
        RULES.format(learnt=LEARNT),
        *(task_section(results, task, remedies) for task in TASKS if results.keys(task.name)),
        alarm_section(results, remedies),
        tuning_section(results, remedies) if results.tuned else "",
        LIMITS,
    ]
    return "\n".join(filter(None, parts))


# ---- the picture ----

ROOF = 1.0  # nats: the darkest colour


def draw(results: Results, remedies: Sequence[Remedy], path: Path) -> Path:
    """A heat map: a row for each remedy, a column for each variant, coloured by the mean regret; a cross where every
    run was lost. Raises EvenstepError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise EvenstepError("pictures need matplotlib; pip install 'evenstep[plots]'") from None
    results = results.common()
    keys = list(results.trials)
    names = [r.name for r in remedies if any(r.name in results.trials[key] for key in keys)]
    grid = [
        [min(ROOF, mean(found.values())) if (found := results.regrets(key, name)) else math.nan for key in keys]
        for name in names
    ]
    figure = Figure(figsize=(2.6 + 0.32 * len(keys), 1.9 + 0.24 * len(names)), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(grid, cmap="YlOrRd", vmin=0, vmax=ROOF, aspect="auto", interpolation="nearest")
    for row, name in enumerate(names):
        for column, key in enumerate(keys):
            if name in results.trials[key] and results.survived(key, name)[0] == 0:
                axes.text(column, row, "×", ha="center", va="center", fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xticks(range(len(keys)), [key[1] for key in keys], rotation=90, fontsize=6)
    starts = [i for i, key in enumerate(keys) if i == 0 or keys[i - 1][0] != key[0]]
    for start in starts:
        axes.axvline(start - 0.5, color="white", linewidth=2)
        axes.text(start - 0.4, -0.7, keys[start][0], fontsize=7, rotation=30, ha="left", va="bottom")
    axes.set_frame_on(False)
    figure.colorbar(shown, ax=axes, label="nats above the best (1 and more: darkest)", shrink=0.6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def write(
    outcomes: Mapping[str, Outcome], scale: Scale, remedies: Sequence[Remedy], where: Path, store: Path
) -> list[Path]:
    """Write the page, and beside it the picture stability.png; returns their paths."""
    results = results_of(outcomes, scale, remedies)
    where.parent.mkdir(parents=True, exist_ok=True)
    replace_text(where, text_of(results, scale, remedies, outcomes, store))
    return [where, draw(results, remedies, where.with_name("stability.png"))]
