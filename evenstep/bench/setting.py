"""Where a comparison takes place: the shared parameters and gradients, the caches to be emptied, the roof, and the
memory that all of it needs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evenstep.bench.memory import available_memory
from evenstep.bench.shapes import EXTREMES, PreparedGradients, count, fill_parameters, outline
from evenstep.bench.timing import Caches, last_level_cache
from evenstep.errors import EvenstepError

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
