"""A comparison: the shared parameters and gradients, memory in bytes, the rounds, and the rows of results.

The optimizers step over the parameters of a LLaMA, or of one of two extreme sets of shapes, with prepared gradients.
Names and shapes come from the model itself, built on the meta device, so the tensors are exactly those of a training
run; no forward pass is ever made. All optimizers of a comparison share the parameters and the gradients, so each one
costs only the memory of its state. As many optimizers as fit into memory are warmed up and then timed in common rounds;
if memory is short they come in several lots, each of which is timed together with the reference.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from evenstep.baselines.state_size import state_bytes
from evenstep.bench.registry import KNOWN, REFERENCE, Unavailable, chosen
from evenstep.bench.timing import (
    TIMERS,
    Caches,
    Sample,
    Timer,
    Turns,
    busy_processors,
    last_level_cache,
    machine_state,
    paired_ratio,
    spread,
    take_turns,
)
from evenstep.console import counted
from evenstep.errors import EvenstepError, nearest
from evenstep.models import SIZES, Llama, llama_config
from evenstep.train.hardware import available_memory, commit, describe_hardware, total_memory, versions

Document = dict[str, Any]
Say = Callable[[str], object]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_SETS = 3
STATE = 8  # bytes per parameter of the reference's two fp32 moments
HEADROOM = 16  # bytes per parameter free for one more optimizer: fp32 moments, and the copies of a foreach step
MIN_TURNS = 3
BUSY = 0.25  # processors that others may use, and the ratio of AdamW to itself may be off by NOISE, without a warning
NOISE = 0.03
PATIENCE = 10  # factor on the budget of torch's and our optimizers, so that only steps of seconds miss rounds


@dataclass(frozen=True)
class Plan:
    """The contents and options of a comparison.

    Args:
        shapes: a name that `outline` knows.
        optimizers: names of `evenstep.bench.registry.KNOWN`.
        threads: CPU threads of torch.
        rounds: timed steps of each optimizer. An optimizer whose rounds would take more than ``budget`` seconds (ten
            times that for ours and torch's) makes fewer, at least 3.
        warmup: untimed steps before the rounds, at least 1.
        seed: of the parameters, the gradients and the order within a round.
    """

    shapes: str
    optimizers: Sequence[str]
    threads: int = 1
    device: str = "cpu"
    dtype: str = "fp32"
    rounds: int = 25
    warmup: int = 3
    budget: float = 10.0
    seed: int = 0


class Workload:
    """The parameters, gradients and buffers of a comparison.

    Raises:
        EvenstepError: for unknown shapes, and for shapes that do not fit into memory.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.device, self.dtype = torch.device(plan.device), DTYPES[plan.dtype]
        model = outline(plan.shapes)
        self.parameters = count(model)
        self._check_memory()
        self.model = model.to(self.dtype).to_empty(device=self.device)
        self.params = list(self.model.parameters())
        self.reset_parameters()
        self.caches = Caches(self.device)
        # As large as the parameters, up to a size that exceeds the caches in any case.
        size = min(self.parameters * self.dtype.itemsize, 16 * last_level_cache(self.device))
        self.roof = torch.ones(size // 4, dtype=torch.float32, device=self.device)
        self.gradients = PreparedGradients(self.model, self._affordable_sets(), plan.seed)
        self._sums = self.gradients.sums()

    @property
    def parameter_bytes(self) -> int:
        return self.parameters * self.dtype.itemsize

    def reset_parameters(self) -> None:
        fill_parameters(self.model, self.plan.seed)

    def ready(self, turn: int) -> None:
        """Assign the gradients of this turn and flush the caches."""
        self.gradients.give(turn)
        self.caches.empty()

    def stream(self) -> None:
        """Read and write a buffer in place, once: the memory bandwidth that no step can exceed (the roof)."""
        self.roof.mul_(1.0)

    def restore_parameters(self) -> bool:
        """Redraw the parameters if a step has made one of them NaN or infinite; return whether it has."""
        broken = not bool(torch.stack([p.detach().sum() for p in self.params]).isfinite().all())
        if broken:
            self.reset_parameters()
        return broken

    def restore_gradients(self) -> bool:
        """Redraw the gradients if a step has changed them; return whether it has."""
        changed = self.gradients.sums() != self._sums
        for index in range(len(self.gradients.sets) if changed else 0):
            self.gradients.fill(index)
        return changed

    def facts(self) -> dict[str, Any]:
        """The facts about the tensors that go into the JSON file."""
        return {
            "shapes": self.plan.shapes,
            "threads": self.plan.threads,
            "dtype": self.plan.dtype,
            "parameters": self.parameters,
            "tensors": len(self.params),
            "gradient_sets": len(self.gradients.sets),
            "flushed_bytes": self.caches.buffer.nbytes,
            "roof_bytes": self.roof.nbytes,
        }

    # ---- memory ----

    def has_room(self) -> bool:
        """Whether one more optimizer fits into memory."""
        return available_memory(self.device) > self.parameters * HEADROOM

    def _needed(self, parameters: int) -> int:
        """Bytes of the parameters, one set of gradients, the roof's buffer, the reference and one other optimizer."""
        return parameters * (3 * self.dtype.itemsize + STATE + HEADROOM)

    def _check_memory(self) -> None:
        needed, free = self._needed(self.parameters), available_memory(self.device)
        if needed <= free:
            return
        advice, size = "choose smaller shapes", self.plan.shapes.partition(":")[0]
        if size not in EXTREMES:
            one, two = (count(outline(f"{size}:{layers}")) for layers in (1, 2))
            layers = 1 + (free // self._needed(1) - one) // (two - one)
            advice = f"{size}:{layers}, {layers} of its layers, would fit" if layers >= 1 else advice
        raise EvenstepError(
            f"--shapes {self.plan.shapes}: needs {needed / 1e9:.1f} GB, of which {free / 1e9:.1f} GB are free; {advice}"
        )

    def _affordable_sets(self) -> int:
        """Number of gradient sets: they may take half of the memory that the optimizers leave free."""
        spare = available_memory(self.device) - self.parameters * (STATE + HEADROOM)
        return max(1, min(MAX_SETS, spare // (2 * self.parameter_bytes)))


def check_device(name: str) -> None:
    """Raise EvenstepError if ``name`` is a GPU and torch sees none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about a missing driver
        if name == "cuda" and not torch.cuda.is_available():
            raise EvenstepError("--device cuda: torch sees no GPU; use --device cpu")


# ---- shapes and gradients ----

VOCABULARY = 32000
SPIKE = 1000.0  # factor on the entry that becomes a spike
SPIKY = 4  # one tensor in SPIKY has spikes in a given set of gradients

EXTREMES: dict[str, Callable[[], nn.Module]] = {
    "many-small": lambda: _matrices(2000, 64, 48),
    "one-huge": lambda: _matrices(1, 8192, 8192),
}


def _matrices(count: int, rows: int, columns: int) -> nn.Module:
    """``count`` matrices; the last one is called ``lm_head``, by which SCALE knows the last layer."""
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(columns, rows, bias=False) for _ in range(count - 1))
    model.lm_head = nn.Linear(columns, rows, bias=False)
    return model


def outline(name: str) -> nn.Module:
    """Return a module with the shapes ``name``, on the meta device.

    Args:
        name: a LLaMA size (``60m``), a size with fewer layers (``1b:6``), ``many-small`` (2000 matrices of 3072
            entries) or ``one-huge`` (one matrix of 67 million). Any other name raises EvenstepError.
    """
    size, colon, layers = name.partition(":")
    known = [*SIZES, *EXTREMES]
    if size not in known or (colon and size in EXTREMES):
        raise EvenstepError(f"--shapes: unknown shapes '{name}'{nearest(size, known)}; choose from {', '.join(known)}")
    if colon and not (layers.isdecimal() and 1 <= int(layers) <= SIZES[size]["num_layers"]):
        most = SIZES[size]["num_layers"]
        raise EvenstepError(f"--shapes: '{name}' asks for '{layers}' layers of {size}; give {size}:1 to {size}:{most}")
    with torch.device("meta"):
        if size in EXTREMES:
            return EXTREMES[size]()
        changes = {"num_layers": int(layers)} if colon else {}
        return Llama(llama_config(size, VOCABULARY, **changes))


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def fill_parameters(model: nn.Module, seed: int) -> None:
    """Draw matrices from N(0, 0.02) and set vectors (norm weights) to 1."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for p in model.parameters():
        _ = p.normal_(0.0, 0.02, generator=generator) if p.ndim > 1 else p.fill_(1.0)


class PreparedGradients:
    """Sets of gradients, assigned to the parameters in turn.

    The gradients are normal noise. Each tensor has its own scale, from 1e-5 to 1e-3, which changes by up to a factor of
    two from set to set, as gradient norms do in training. In each set a quarter of the tensors has spikes: one entry in
    a million, and at least one, is 1000 times larger. So the clipping code runs for some tensors of each step, and not
    for all.
    """

    def __init__(self, model: nn.Module, sets: int, seed: int) -> None:
        self.params = list(model.parameters())
        self.seed = seed
        self.sets = [[torch.empty_like(p, requires_grad=False) for p in self.params] for _ in range(sets)]
        for index in range(sets):
            self.fill(index)
        self.give(0)

    @torch.no_grad()
    def fill(self, index: int) -> None:
        """Draw set ``index`` (modulo the number of sets) again: the same numbers each time."""
        index %= len(self.sets)
        of_tensor = torch.Generator().manual_seed(self.seed)
        of_set = torch.Generator().manual_seed(self.seed + 1 + index)
        entries = torch.Generator(self.params[0].device).manual_seed(self.seed + 1 + index)
        for grad in self.sets[index]:
            drawn, moved = (torch.rand((), generator=g).item() for g in (of_tensor, of_set))
            grad.normal_(0.0, 10 ** (2 * drawn - 5) * 4 ** (moved - 0.5), generator=entries)
            if torch.randint(SPIKY, (), generator=of_set) == 0:
                where = torch.randint(grad.numel(), (math.ceil(grad.numel() / 1e6),), generator=of_set)
                grad.view(-1)[where.to(grad.device)] *= SPIKE

    def give(self, turn: int) -> None:
        for p, grad in zip(self.params, self.sets[turn % len(self.sets)], strict=True):
            p.grad = grad

    def sums(self) -> list[float]:
        """The sum of each tensor of each set: it shows whether a step has changed the tensor."""
        return torch.stack([grad.sum() for grads in self.sets for grad in grads]).tolist()


# ---- bytes ----


def transient_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Peak bytes that torch allocates during a step, above those allocated before it.

    On a GPU this is the allocator's own count. On a CPU it comes from the profiler's record of allocations, of the
    second of two steps: the profiler records the release of a block only if it saw the allocation, so blocks from
    before the first step would be missed. Memory allocated without torch, such as the scratch space of a C++ kernel, is
    not counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # suppresses two lines per use; read once, at the first use
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
        with torch.profiler.record_function(_MEASURED):
            step()
    return _peak(profile.profiler.kineto_results.events())


_MEASURED = "evenstep.bench: measured step"


def _peak(events: Sequence[Any]) -> int:
    """The highest running sum of allocations (positive) and releases (negative) since the start of the measured
    step."""
    began = next(event.start_ns() for event in events if event.name() == _MEASURED)
    records = [event for event in events if event.name() == "[memory]" and event.start_ns() >= began]
    now = peak = 0
    for event in sorted(records, key=lambda event: event.start_ns()):  # stable: simultaneous events keep their order
        now += event.nbytes()
        peak = max(peak, now)
    return peak


# ---- one comparison ----

NUMBERS = (
    *("ms", "ms_q1", "ms_q3", "cpu_ms", "ratio_to_adamw_fused", "ratio_q1", "ratio_q3", "ns_per_param", "rounds"),
    *("state_bytes_per_param", "transient_bytes", "transient_share", "bytes_moved", "gb_per_s", "roof_share"),
)
"""The measured keys of a row. They are None in the row of a skipped optimizer, whose ``skipped`` gives the reason."""


@dataclass
class Contestant:
    """An optimizer that has been built and warmed up."""

    turns: Turns
    state_bytes: int
    transient_bytes: int


class Comparison:
    """``run()`` fills ``rows`` (by optimizer name) and ``facts``. An interruption leaves the completed part in them."""

    def __init__(self, plan: Plan, say: Say = lambda text: None, timer: Timer | None = None) -> None:
        self.plan, self.say = plan, say
        self.timer = timer or TIMERS[plan.device]
        self.rows: dict[str, dict[str, Any]] = {name: _row(name, plan) for name in plan.optimizers}
        self.facts: dict[str, Any] = {}
        self._roof: list[Sample] = []

    def run(self) -> None:
        """Measure all optimizers of the plan.

        Raises:
            EvenstepError: if the shapes do not fit into memory or the reference optimizer fails.
            KeyboardInterrupt: after the rows of the rounds so far have been filled.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(self.plan.threads)
        try:
            self._run(Workload(self.plan))
        finally:
            torch.set_num_threads(before)

    def _run(self, workload: Workload) -> None:
        self.facts = workload.facts()
        try:
            reference = self._prepared(REFERENCE, workload)
        except Exception as problem:
            raise EvenstepError(f"{REFERENCE}, the reference, does not run here: {_reason(problem)}") from problem
        lot: list[Contestant] = []
        for name in self.plan.optimizers:
            if lot and not workload.has_room():
                self._time(reference, lot, workload)
                lot = []
            if name == REFERENCE:
                continue
            if not workload.has_room():
                self.rows[name]["skipped"] = "not enough memory beside the reference"
                continue
            try:
                lot.append(self._prepared(name, workload))
            except Exception as problem:
                self.rows[name]["skipped"] = _reason(problem)
                self.say(f"{name}: skipped: {_reason(problem)}")
        if lot or self.rows[REFERENCE]["ms"] is None:
            self._time(reference, lot, workload)

    def _prepared(self, name: str, workload: Workload) -> Contestant:
        """Build and warm up an optimizer and measure its memory. Raises Unavailable, or any error of the optimizer."""
        plan, entry = self.plan, KNOWN[name]
        began = time.perf_counter()
        with quiet():
            optimizer = entry.make(workload.model)
            for turn in range(max(1, plan.warmup)):
                workload.ready(turn)
                seconds = TIMERS[plan.device](optimizer.step).wall
            workload.gradients.give(plan.warmup)
            transient = transient_bytes(optimizer.step, workload.device)
        changes_gradients = workload.restore_gradients()
        if workload.restore_parameters():
            raise FloatingPointError("it made parameters NaN or infinite")
        budget = plan.budget * (PATIENCE if entry.ours or entry.package == "torch" else 1)
        rounds = min(plan.rounds, max(MIN_TURNS, int(budget / max(seconds, 1e-9))))
        turns = Turns(name, optimizer.step, rounds, workload.ready)
        if changes_gradients:
            turns.after = lambda turn: workload.gradients.fill(turn)
            self.rows[name]["note"] = "; ".join(filter(None, [entry.note, "changes the gradients"]))
        kept = state_bytes(optimizer.state_dict()["state"], chain(workload.params, *workload.gradients.sets))
        spent = time.perf_counter() - began
        self.say(f"{name}: ready after {spent:.1f} s, {seconds * 1e3:.1f} ms a step, {rounds} rounds")
        return Contestant(turns, kept, transient)

    def _time(self, reference: Contestant, lot: list[Contestant], workload: Workload) -> None:
        """Time the reference, the roof and the lot in common rounds, and fill their rows."""
        roof = Turns("roof", workload.stream, self.plan.rounds, workload.ready)
        reference.turns.samples = {}
        everyone = [reference, *lot]
        self.say(f"timing {len(lot)} optimizers and the reference: {self.plan.rounds} rounds")
        try:
            take_turns([roof, *(c.turns for c in everyone)], self.plan.rounds, self.timer, seed=self.plan.seed)
        finally:
            self._roof += roof.samples.values()
            if self._roof:
                best = spread([sample.wall for sample in self._roof])
                self.facts["roof_gb_per_s"] = round(2 * workload.roof.nbytes / best.median / 1e9, 3)
            for contestant in everyone:
                self._fill(contestant, reference, workload)

    def _fill(self, contestant: Contestant, reference: Contestant, workload: Workload) -> None:
        turns, row = contestant.turns, self.rows[contestant.turns.name]
        ratio = paired_ratio(turns.samples, reference.turns.samples)
        if turns.problem is not None or ratio is None:
            row["skipped"] = _reason(turns.problem) if turns.problem is not None else row["skipped"]
            return
        wall = spread([sample.wall for sample in turns.samples.values()])
        cpu = spread([sample.cpu for sample in turns.samples.values()])
        # Bytes moved: read and write the parameters, read the gradients, read and write the state.
        moved = 3 * workload.parameter_bytes + 2 * contestant.state_bytes
        speed = moved / wall.median / 1e9
        numbers = (
            *(wall.median * 1e3, wall.q1 * 1e3, wall.q3 * 1e3, cpu.median * 1e3, ratio.median, ratio.q1, ratio.q3),
            *(wall.median * 1e9 / workload.parameters, len(turns.samples)),
            *(contestant.state_bytes / workload.parameters, contestant.transient_bytes),
            contestant.transient_bytes / workload.parameter_bytes,
            *(moved, speed, speed / self.facts["roof_gb_per_s"]),
        )
        row |= {key: round(value, 4) for key, value in zip(NUMBERS, numbers, strict=True)} | {"skipped": None}


def _row(name: str, plan: Plan) -> dict[str, Any]:
    entry = KNOWN[name]
    facts = {"package": entry.package, "version": entry.version(), "note": entry.note}
    where = {"shapes": plan.shapes, "threads": plan.threads, "dtype": plan.dtype}
    return {"optimizer": name, **dict.fromkeys(NUMBERS), **facts, **where, "skipped": "stopped before its first round"}


def _reason(problem: Exception) -> str:
    """The reason why an optimizer was skipped, in one line."""
    first = next((line for line in str(problem).splitlines() if line.strip()), "")
    return first if isinstance(problem, Unavailable) else f"{type(problem).__name__}: {first}"


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the warnings and log lines that packages emit on import and at a first step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disabled = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(disabled)


# ---- several comparisons ----

SHARED = ("device", "dtype", "rounds", "warmup", "budget", "seed")
"""Options that all plans of a command share."""


def compare(command: str, plans: Sequence[Plan], say: Say = lambda text: None) -> Document:
    """Run the plans one after the other and return the contents of the JSON file.

    Ctrl-C ends the run early: the document then holds the rows measured so far, and ``interrupted`` is True.

    Raises:
        EvenstepError: if nothing could be measured at all.
    """
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
        "settings": {key: getattr(plans[0], key) for key in SHARED},
    }
    document["warnings"] = [] if (warning := _busy(device)) is None else [warning]
    for text in document["warnings"]:
        say(f"warning: {text}")
    for plan in plans:
        say(f"{plan.shapes} shapes, {counted(plan.threads, 'thread')}, {plan.dtype}")
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
        if (warning := _noise(comparison)) is not None:
            document["warnings"].append(warning)
            say(f"warning: {warning}")
        if document["interrupted"]:
            break
    if not document["rows"]:
        raise EvenstepError("nothing was measured: " + document["left_out"][0]["why"])
    return document


def _busy(device: torch.device) -> str | None:
    """A warning if other processes keep processors busy, which also share caches and memory bandwidth."""
    used = busy_processors() if device.type == "cpu" else None
    if used is None or used <= BUSY:
        return None
    return (
        f"other processes use {used:.1f} of {os.cpu_count()} processors: ratios may be off by a tenth or more; repeat "
        "the measurement when they have ended"
    )


def _noise(comparison: Comparison) -> str | None:
    """A warning if fused AdamW differs from itself."""
    ratio = comparison.rows.get(f"{REFERENCE}_again", {}).get("ratio_to_adamw_fused")
    if ratio is None or abs(ratio - 1) <= NOISE:
        return None
    plan = comparison.plan
    return (
        f"{plan.shapes}, {counted(plan.threads, 'thread')}: {REFERENCE} took {ratio:.2f} of its own time when measured "
        "twice, so the machine is not steady; repeat the measurement, or take more --rounds"
    )


def plans_from(args: argparse.Namespace) -> list[Plan]:
    """Return one plan for each combination of shapes and threads. Raises EvenstepError for a value out of range."""
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
    common = {key: getattr(args, key) for key in SHARED}
    return [
        Plan(name, optimizers, threads, **common)
        for threads in map(_threads, _words("threads", args.threads))
        for name in shapes
    ]


def _words(flag: str, given: str) -> list[str]:
    words = [word.strip() for word in given.split(",") if word.strip()]
    if not words:
        raise EvenstepError(f"--{flag}: nothing was given; give names separated by commas")
    return list(dict.fromkeys(words))


def _threads(word: str) -> int:
    if not (word.isdecimal() and int(word) > 0):
        raise EvenstepError(f"--threads: '{word}' is not a number of threads; give whole numbers from 1, such as 1,2")
    return int(word)


def _hardware(device: torch.device) -> dict[str, Any]:
    facts = describe_hardware(device) | machine_state()
    del facts["threads"]  # every row has its own number
    return facts | {"memory": total_memory(device), "last_level_cache": last_level_cache(device)}
