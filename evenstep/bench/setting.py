"""Where a comparison takes place: the shared parameters and gradients, the caches to be emptied, the roof, and the
memory that all of it needs.

The optimizers step over the parameters of a LLaMA by name, or over one of two extremes, with prepared gradients. Names
and shapes come from the model itself, built on the meta device, so the tensors are exactly those of a training; nothing
is ever run forward. All optimizers of a comparison share the parameters and the gradients.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evenstep.bench.timing import Caches, last_level_cache
from evenstep.errors import EvenstepError, nearest
from evenstep.models import SIZES, Llama, llama_config
from evenstep.train.hardware import total_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_SETS = 3
STATE = 8  # bytes per parameter of the reference's moments
HEADROOM = 16  # bytes per parameter that must be free for one more: fp32 moments, and copies as foreach forms make them


@dataclass(frozen=True)
class Plan:
    """What to compare, and how. ``rounds`` are the timed steps of each; one whose rounds would take more than
    ``budget`` seconds (ours and torch's: ten times that) has fewer, at least 3. ``warmup`` steps (at least 1) come
    first, untimed."""

    shapes: str
    optimizers: Sequence[str]
    threads: int = 1
    device: str = "cpu"
    dtype: str = "fp32"
    rounds: int = 25
    warmup: int = 3
    budget: float = 10.0
    seed: int = 0


class Setting:
    """EvenstepError for unknown shapes, and when they do not fit into memory."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.device, self.dtype = torch.device(plan.device), DTYPES[plan.dtype]
        model = outline(plan.shapes)
        self.parameters = count(model)
        self._check_room()
        self.model = model.to(self.dtype).to_empty(device=self.device)
        self.params = list(self.model.parameters())
        self.reset_parameters()
        self.caches = Caches(self.device)
        # As large as the parameters, which is beyond the caches anyway from some size on.
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
        """The gradients of this turn, and cold caches."""
        self.gradients.give(turn)
        self.caches.empty()

    def stream(self) -> None:
        """The roof: read and write a buffer in place."""
        self.roof.mul_(1.0)

    def mend_parameters(self) -> bool:
        """Whether somebody has made them NaN or Inf; they are drawn anew then."""
        broken = not bool(torch.stack([p.detach().sum() for p in self.params]).isfinite().all())
        if broken:
            self.reset_parameters()
        return broken

    def mend_gradients(self) -> bool:
        """Whether somebody has changed them; they are drawn anew then."""
        changed = self.gradients.sums() != self._sums
        for index in range(len(self.gradients.sets) if changed else 0):
            self.gradients.fill(index)
        return changed

    def facts(self) -> dict[str, Any]:
        """For the JSON file."""
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
        """For one more optimizer."""
        return available_memory(self.device) > self.parameters * HEADROOM

    def _needed(self, parameters: int) -> int:
        """Parameters, one set of gradients, the roof's buffer; the reference; one optimizer beside it."""
        return parameters * (3 * self.dtype.itemsize + STATE + HEADROOM)

    def _check_room(self) -> None:
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
        """How many sets of gradients: half of what is free without the optimizers may go into them."""
        spare = available_memory(self.device) - self.parameters * (STATE + HEADROOM)
        return max(1, min(MAX_SETS, spare // (2 * self.parameter_bytes)))


def check_device(name: str) -> None:
    """EvenstepError when it is a GPU and torch sees none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own about a driver that is missing
        if name == "cuda" and not torch.cuda.is_available():
            raise EvenstepError("--device cuda: torch sees no GPU; use --device cpu")


# ---- shapes and gradients ----

VOCABULARY = 32000
SPIKE = 1000.0  # times the entry it hits
SPIKY = 4  # one tensor in so many has spikes in a given set of gradients

EXTREMES: dict[str, Callable[[], nn.Module]] = {
    "many-small": lambda: _matrices(2000, 64, 48),
    "one-huge": lambda: _matrices(1, 8192, 8192),
}


def _matrices(count: int, rows: int, columns: int) -> nn.Module:
    """``count`` matrices of which the last one is called ``lm_head``, as SCALE wants to know the last layer."""
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(columns, rows, bias=False) for _ in range(count - 1))
    model.lm_head = nn.Linear(columns, rows, bias=False)
    return model


def outline(name: str) -> nn.Module:
    """The module of shapes ``name`` on the meta device: a LLaMA size (``60m``), one with so many of its layers only
    (``1b:6``), ``many-small`` (2000 matrices of 3072 entries) or ``one-huge`` (one of 67 million). EvenstepError for
    another name.
    """
    size, colon, layers = name.partition(":")
    known = [*SIZES, *EXTREMES]
    if size not in known or (colon and size in EXTREMES):
        raise EvenstepError(f"--shapes: unknown shapes '{name}'{nearest(size, known)}; choose from {', '.join(known)}")
    if colon and not (layers.isdecimal() and 1 <= int(layers) <= SIZES[size]["num_layers"]):
        most = SIZES[size]["num_layers"]
        raise EvenstepError(f"--shapes: '{name}' wants '{layers}' layers of {size}; give {size}:1 to {size}:{most}")
    with torch.device("meta"):
        if size in EXTREMES:
            return EXTREMES[size]()
        changes = {"num_layers": int(layers)} if colon else {}
        return Llama(llama_config(size, VOCABULARY, **changes))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def fill_parameters(model: nn.Module, seed: int) -> None:
    """Matrices from N(0, 0.02), vectors (norms) at 1."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for p in model.parameters():
        _ = p.normal_(0.0, 0.02, generator=generator) if p.ndim > 1 else p.fill_(1.0)


class PreparedGradients:
    """Sets of gradients, given to the parameters in turn.

    Normal noise; each tensor has a scale of its own, from 1e-5 to 1e-3, which is up to twice larger or smaller from set
    to set, as norms go up and down in a training. In each set a quarter of the tensors has spikes: one entry in a
    million, and at least one, is 1000 times larger. So paths for clipping run in some tensors of each step, and not in
    all.
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
        """Draw set ``index``, modulo their number, anew: the same numbers each time."""
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
        """The sum of each tensor of each set: a number that tells whether somebody has changed the tensor."""
        return torch.stack([grad.sum() for grads in self.sets for grad in grads]).tolist()


# ---- bytes ----


def transient_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Peak bytes that torch had allocated during a step above what it had before: on a GPU from the allocator's own
    count, on a CPU from the profiler's record of every allocation, of the second of two steps (a release is recorded
    only of what was allocated under the profiler: in the second step those are all that the first one made). Memory
    that code takes without torch, such as a kernel's scratch from malloc, is not seen."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else every use prints two lines; read once, at the first use
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
        with torch.profiler.record_function(_MEASURED):
            step()
    return _peak(profile.profiler.kineto_results.events())


_MEASURED = "evenstep.bench: measured step"


def _peak(events: Sequence[Any]) -> int:
    """The highest running sum of allocations (positive) and releases (negative) since the measured step began."""
    began = next(event.start_ns() for event in events if event.name() == _MEASURED)
    records = [event for event in events if event.name() == "[memory]" and event.start_ns() >= began]
    now = peak = 0
    for event in sorted(records, key=lambda event: event.start_ns()):  # stable: events of one instant keep their order
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated: free on the GPU, or what Linux says is available, less when the process is
    confined to a control group. Elsewhere the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return total_memory(device)
    return min(free, _group_room())


_GROUPS = (  # limit, use: version 2 and version 1 of Linux's control groups, as seen from inside a container
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def _group_room() -> int:
    for limit, use in _GROUPS:
        try:
            return int(Path(limit).read_text()) - int(Path(use).read_text())
        except (OSError, ValueError):  # no such group, or the limit is "max"
            continue
    return 2**63
