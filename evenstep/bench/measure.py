"""Comparisons, one for each set of shapes and number of threads, and the document that holds their rows.

Parameters and gradients are shared, so that an optimizer costs the memory of its state alone. As many optimizers as fit
are made ready and then timed in common rounds; when memory is short they come in several lots, each timed together with
the reference.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from evenstep.baselines.state_size import state_bytes
from evenstep.bench.registry import KNOWN, REFERENCE, Unavailable, chosen
from evenstep.bench.setting import DTYPES, Plan, Setting, check_device, outline, transient_bytes
from evenstep.bench.timing import (
    TIMERS,
    Sample,
    Timer,
    Turns,
    last_level_cache,
    machine_state,
    paired_ratio,
    spread,
    take_turns,
)
from evenstep.errors import EvenstepError, nearest
from evenstep.train.hardware import commit, describe_hardware, total_memory, versions

Document = dict[str, Any]

MIN_TURNS = 3
PATIENCE = 10  # times the budget for our own and torch's, so that none but a step of seconds misses a round
Say = Callable[[str], object]
NUMBERS = (
    *("ms", "ms_q1", "ms_q3", "cpu_ms", "ratio_to_adamw_fused", "ratio_q1", "ratio_q3", "ns_per_param", "rounds"),
    *("state_bytes_per_param", "transient_bytes", "transient_share", "bytes_moved", "gb_per_s", "roof_share"),
)
"""What a row measures; None in the row of an optimizer that was skipped, whose ``skipped`` says why."""


@dataclass
class Contestant:
    """An optimizer that is built and warmed up."""

    turns: Turns
    state_bytes: int
    transient_bytes: int


class Comparison:
    """``run()`` fills ``rows`` (by name) and ``facts``; what is done stays there when it is interrupted."""

    def __init__(self, plan: Plan, say: Say = lambda text: None, timer: Timer | None = None) -> None:
        self.plan, self.say = plan, say
        self.timer = timer or TIMERS[plan.device]
        self.rows: dict[str, dict[str, Any]] = {name: _row(name, plan) for name in plan.optimizers}
        self.facts: dict[str, Any] = {}
        self._roof: list[Sample] = []

    def run(self) -> None:
        """EvenstepError when the shapes do not fit or the reference fails; KeyboardInterrupt after the rows of the
        rounds so far are made."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.plan.threads)
        try:
            self._run(Setting(self.plan))
        finally:
            torch.set_num_threads(before)

    def _run(self, setting: Setting) -> None:
        self.facts = setting.facts()
        try:
            reference = self._prepared(REFERENCE, setting)
        except Exception as problem:
            raise EvenstepError(f"{REFERENCE}, the reference, does not run here: {_told(problem)}") from problem
        lot: list[Contestant] = []
        for name in self.plan.optimizers:
            if lot and not setting.has_room():
                self._time(reference, lot, setting)
                lot = []
            if name == REFERENCE:
                continue
            if not setting.has_room():
                self.rows[name]["skipped"] = "not enough memory beside the reference"
                continue
            try:
                lot.append(self._prepared(name, setting))
            except Exception as problem:
                self.rows[name]["skipped"] = _told(problem)
                self.say(f"{name}: skipped: {_told(problem)}")
        if lot or self.rows[REFERENCE]["ms"] is None:
            self._time(reference, lot, setting)

    def _prepared(self, name: str, setting: Setting) -> Contestant:
        """Built and warmed up, its memory measured. Raises whatever the optimizer raises, and Unavailable."""
        plan, entry = self.plan, KNOWN[name]
        began = time.perf_counter()
        with quiet():
            optimizer = entry.make(setting.model)
            for turn in range(max(1, plan.warmup)):
                setting.ready(turn)
                seconds = TIMERS[plan.device](optimizer.step).wall
            setting.gradients.give(plan.warmup)
            transient = transient_bytes(optimizer.step, setting.device)
        changes_gradients = setting.mend_gradients()
        if setting.mend_parameters():
            raise FloatingPointError("it made parameters NaN or infinite")
        budget = plan.budget * (PATIENCE if entry.ours or entry.package == "torch" else 1)
        rounds = min(plan.rounds, max(MIN_TURNS, int(budget / max(seconds, 1e-9))))
        turns = Turns(name, optimizer.step, rounds, setting.ready)
        if changes_gradients:
            turns.after = lambda turn: setting.gradients.fill(turn)
            self.rows[name]["note"] = "; ".join(filter(None, [entry.note, "changes the gradients"]))
        kept = state_bytes(optimizer.state_dict()["state"], chain(setting.params, *setting.gradients.sets))
        spent = time.perf_counter() - began
        self.say(f"{name}: ready after {spent:.1f} s, {seconds * 1e3:.1f} ms a step, {rounds} rounds")
        return Contestant(turns, kept, transient)

    def _time(self, reference: Contestant, lot: list[Contestant], setting: Setting) -> None:
        """The rounds of the reference, the roof and the lot, and their rows."""
        roof = Turns("roof", setting.stream, self.plan.rounds, setting.ready)
        reference.turns.samples = {}
        everyone = [reference, *lot]
        self.say(f"timing {len(lot)} optimizers and the reference: {self.plan.rounds} rounds")
        try:
            take_turns([roof, *(c.turns for c in everyone)], self.plan.rounds, self.timer, seed=self.plan.seed)
        finally:
            self._roof += roof.samples.values()
            if self._roof:
                best = spread([sample.wall for sample in self._roof])
                self.facts["roof_gb_per_s"] = round(2 * setting.roof.nbytes / best.median / 1e9, 3)
            for contestant in everyone:
                self._fill(contestant, reference, setting)

    def _fill(self, contestant: Contestant, reference: Contestant, setting: Setting) -> None:
        turns, row = contestant.turns, self.rows[contestant.turns.name]
        ratio = paired_ratio(turns.samples, reference.turns.samples)
        if turns.problem is not None or ratio is None:
            row["skipped"] = _told(turns.problem) if turns.problem is not None else row["skipped"]
            return
        wall = spread([sample.wall for sample in turns.samples.values()])
        cpu = spread([sample.cpu for sample in turns.samples.values()])
        # Read and write the parameters, read the gradients, read and write the state.
        moved = 3 * setting.parameter_bytes + 2 * contestant.state_bytes
        speed = moved / wall.median / 1e9
        numbers = (
            *(wall.median * 1e3, wall.q1 * 1e3, wall.q3 * 1e3, cpu.median * 1e3, ratio.median, ratio.q1, ratio.q3),
            *(wall.median * 1e9 / setting.parameters, len(turns.samples)),
            *(contestant.state_bytes / setting.parameters, contestant.transient_bytes),
            contestant.transient_bytes / setting.parameter_bytes,
            *(moved, speed, speed / self.facts["roof_gb_per_s"]),
        )
        row |= {key: round(value, 4) for key, value in zip(NUMBERS, numbers, strict=True)} | {"skipped": None}


def _row(name: str, plan: Plan) -> dict[str, Any]:
    entry = KNOWN[name]
    facts = {"package": entry.package, "version": entry.version(), "note": entry.note}
    where = {"shapes": plan.shapes, "threads": plan.threads, "dtype": plan.dtype}
    return {"optimizer": name, **dict.fromkeys(NUMBERS), **facts, **where, "skipped": "stopped before its first round"}


def _told(problem: Exception) -> str:
    """Why an optimizer is out, in one line."""
    first = next((line for line in str(problem).splitlines() if line.strip()), "")
    return first if isinstance(problem, Unavailable) else f"{type(problem).__name__}: {first}"


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and log lines that packages emit on import and on a first step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disabled = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(disabled)


# ---- several comparisons ----


def compare(command: str, plans: Sequence[Plan], say: Callable[[str], object] = lambda text: None) -> Document:
    """Run the plans one after the other; the contents of the JSON file. Ctrl-C ends it with ``interrupted`` set and
    what is measured so far. EvenstepError when nothing can be measured at all."""
    device = torch.device(plans[0].device)
    document: Document = {
        "command": command,
        "rows": [],
        "comparisons": [],
        "left_out": [],
        "interrupted": False,
        "hardware": _hardware(device),
        "versions": versions() | {e.package: e.version() for e in KNOWN.values() if e.version() is not None},
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "settings": {key: getattr(plans[0], key) for key in ("device", "dtype", "rounds", "warmup", "budget", "seed")},
    }
    for plan in plans:
        say(f"{plan.shapes} shapes, {plan.threads} thread{'s' if plan.threads > 1 else ''}, {plan.dtype}")
        comparison = Comparison(plan, say)
        try:
            comparison.run()
        except EvenstepError as problem:
            if len(plans) == 1:
                raise
            say(str(problem))
            document["left_out"].append({"shapes": plan.shapes, "threads": plan.threads, "why": str(problem)})
            continue
        except KeyboardInterrupt:
            document["interrupted"] = True
        document["rows"] += comparison.rows.values()
        document["comparisons"].append(comparison.facts)
        if document["interrupted"]:
            break
    if not document["rows"]:
        raise EvenstepError("nothing was measured: " + document["left_out"][0]["why"])
    return document


def plans_from(args: argparse.Namespace) -> list[Plan]:
    """One plan for each shape and number of threads; EvenstepError for values that are not allowed."""
    for flag, value, allowed in (("device", args.device, TIMERS), ("dtype", args.dtype, DTYPES)):
        if value not in allowed:
            raise EvenstepError(f"--{flag}: '{value}' is not one of {', '.join(allowed)}{nearest(value, [*allowed])}")
    for flag, value, least in (("rounds", args.rounds, 1), ("warmup", args.warmup, 1), ("seed", args.seed, 0)):
        if value < least:
            raise EvenstepError(f"--{flag}: {value} is out of range; it must be at least {least}")
    if not (math.isfinite(args.budget) and args.budget >= 0):
        raise EvenstepError(f"--budget: {args.budget} is out of range; give seconds, 0 or more")
    check_device(args.device)
    optimizers = chosen(_words("optimizers", args.optimizers))
    shapes = _words("shapes", args.shapes)
    for name in shapes:
        outline(name)
    common = {key: getattr(args, key) for key in ("device", "dtype", "rounds", "warmup", "budget", "seed")}
    return [
        Plan(name, optimizers, threads, **common)
        for threads in map(_threads, _words("threads", args.threads))
        for name in shapes
    ]


def _words(flag: str, given: str) -> list[str]:
    words = [word.strip() for word in given.split(",") if word.strip()]
    if not words:
        raise EvenstepError(f"--{flag}: nothing was given; give names with commas between them")
    return list(dict.fromkeys(words))


def _threads(word: str) -> int:
    if not (word.isdecimal() and int(word) > 0):
        raise EvenstepError(f"--threads: '{word}' is no number of threads; give whole numbers from 1, such as 1,2")
    return int(word)


def _hardware(device: torch.device) -> dict[str, Any]:
    facts = describe_hardware(device) | machine_state()
    del facts["threads"]  # each row has its own
    return facts | {"memory": total_memory(device), "last_level_cache": last_level_cache(device)}
