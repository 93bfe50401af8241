"""Converting the state of another optimizer, or of an older version of this one, on loading.

A run that began with AdamW or with the published code can continue here: moments and step counts are kept where they
mean the same thing, the rest starts anew, and a warning lists both. Everything is checked and converted before the
optimizer changes; a state of another model is refused.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from evenstep.optim.distributed import is_sharded, local, region
from evenstep.optim.functional import opened
from evenstep.optim.state import Group, State, is_trained, moment, pack, place_clock, unpack, untouched


class Target(Protocol):
    """The part of `EvenOptimizer` that a conversion needs. A Protocol, because optimizer.py imports this module."""

    ALIASES: ClassVar[dict[str, str]]
    param_groups: list[Group]
    defaults: dict[str, Any]

    def fresh_state(self, p: Tensor, group: Group, index: int) -> State:
        """A new state for parameter ``p``."""

    def _check(self, name: str, value: Any) -> None: ...


@dataclass(frozen=True)
class Source:
    """An optimizer whose state can be converted, recognised by the entries that it keeps per parameter."""

    name: str
    entries: frozenset[str]  # that every state has
    optional: frozenset[str] = frozenset()
    group_mark: str = ""  # a key of its param groups, where the entries alone are ambiguous
    restarts: bool = True  # its step count starts again when its moments do (or neither ever does)


# The first that fits is taken, so the more specific one comes first.
SOURCES = (
    Source(
        "the published SPAM", frozenset({"step", "exp_avg", "exp_avg_sq"}), frozenset({"mask"}), "correct_bias", False
    ),
    Source("the published SPAM", frozenset({"step", "exp_avg", "exp_avg_sq", "mask"}), restarts=False),
    Source("pytorch_optimizer's SPAM", frozenset({"exp_avg", "exp_avg_sq", "mask"}), group_mark="step", restarts=False),
    Source("Adam or AdamW", frozenset({"step", "exp_avg", "exp_avg_sq"}), frozenset({"max_exp_avg_sq"})),
    Source(
        "the published StableSPAM",
        frozenset({"step", "exp_avg", "exp_avg_sq", "m_norm_t", "v_norm_t", "m_max_t"}),
        frozenset({"max_exp_avg_sq"}),
    ),
    Source(
        "pytorch_optimizer's StableSPAM",
        frozenset({"exp_avg", "exp_avg_sq", "m_norm_t", "v_norm_t", "m_max_t"}),
        group_mark="step",
    ),
    Source("the published SCALE", frozenset({"moment1"}), frozenset({"moment2", "step"})),
)

# Entry of the source -> entry here. `norm_rms` is the root of `v_norm_t`: the mean square overflows in fp32.
NAMES = {"moment1": "exp_avg", "moment2": "exp_avg_sq", "m_max_t": "peak", "m_norm_t": "norm", "v_norm_t": "norm_rms"}

# Keys of the sources' param groups that have no counterpart here.
MEANINGLESS = frozenset(
    "foreach fused capturable differentiable amsgrad decoupled_weight_decay correct_bias step".split()  # noqa: SIM905
)

# All entries of evenstep's optimizers. Others in a state of evenstep are the user's, and are kept.
OURS = frozenset("exp_avg exp_avg_sq age mask peak norm norm_rms n compensation".split())  # noqa: SIM905
# Entries that start anew together when one of them is missing: a mean without its count has no meaning.
TOGETHER = ({"exp_avg", "exp_avg_sq", "age", "mask"}, {"peak", "norm", "norm_rms", "n"})


def convert_state_dict(optimizer: Target, given: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """``given`` as a complete state dict of ``optimizer``, and a warning for the user ("" if nothing was converted).

    Neither ``given`` nor ``optimizer`` is changed. A state with another number of groups or parameters is returned as
    it is, for torch to refuse.

    Raises ValueError for the state of an unknown optimizer or of a model of other shapes.
    """
    # torch numbers the parameters through all groups; `ids` are those numbers in the saved state.
    here, there = optimizer.param_groups, given["param_groups"]
    if [len(group["params"]) for group in here] != [len(group["params"]) for group in there]:
        return given, ""
    ids = {i for group in there for i in group["params"]}
    states = {i: entries for i, entries in given["state"].items() if i in ids}
    # A state of evenstep has the clock "t" in its groups and needs no translation, only its missing entries.
    source = None if any("t" in group for group in there) else _source(there, states)
    reader = _Reader(source, optimizer, given)
    groups = [reader.group(ours, theirs) for ours, theirs in zip(here, there, strict=True)]
    state: dict[int, State] = {}
    for group, ours, theirs in zip(groups, here, there, strict=True):
        place_clock(dict(group, params=ours["params"]))  # refuses what does not go together
        for index, (i, p) in enumerate(zip(group["params"], ours["params"], strict=True)):
            saved = states.get(i, {})
            # A frozen parameter has no state. Its saved moments are kept, though, if it was trained before.
            if not is_trained(p) and untouched(saved):
                continue
            # The group as it will be after loading decides which entries there are (density, state, rounding).
            fresh = optimizer.fresh_state(p, group | {"params": ours["params"]}, index)
            who = f"parameter {_named(group, index, i)}"
            state[i] = reader.state(p, group, fresh, {"step": theirs.get("step")} | saved, who)
    return {"state": state, "param_groups": groups}, reader.summary(states)


def _named(group: Group, index: int, i: Any) -> str:
    names = group.get("param_names")
    return f"{i} ({names[index]})" if names else str(i)


def _source(groups: list[Group], states: Mapping[Any, State]) -> Source | None:
    """The optimizer that wrote the state; None for an empty one. ValueError for an unknown optimizer."""
    names = {name for entries in states.values() for name in entries}
    if names <= {"mask"}:  # before the first step
        return None
    for source in SOURCES:
        fits = source.entries <= names <= source.entries | source.optional
        if fits and (not source.group_mark or any(source.group_mark in group for group in groups)):
            return source
    known = "; ".join(f"{source.name}: {', '.join(sorted(source.entries))}" for source in SOURCES[1:])
    raise ValueError(
        f"load_state_dict: a state with the entries {', '.join(sorted(map(str, names)))} belongs to no optimizer that "
        f"can be taken over ({known}); nothing was loaded"
    )


class _Reader:
    """Converts groups and states of one source, and records the conversions for the warning."""

    def __init__(self, source: Source | None, optimizer: Target, given: Mapping[str, Any]):
        self.source = source
        self.optimizer = optimizer
        self.new: dict[str, int] = {}  # entry -> number of parameters for which it starts anew
        self.offered: set[str] = set()  # entries that the source has
        self.taken: set[str] = set()  # entries that were kept
        self.dropped: set[str] = set()  # settings without a counterpart
        # The step clock counts all steps of the run, so it is the largest count that occurs anywhere.
        self.t = max(_counts(given), default=0)

    def group(self, ours: Group, theirs: Group) -> Group:
        """A param group: the saved options under the names used here, and the optimizer's own for missing ones."""
        known = {name: ours[name] for name in ("kind", *self.optimizer.defaults) if name in ours}
        if "t" in theirs:  # a group of evenstep; options that are newer than the state are filled in
            return known | theirs
        saved = {}
        for name, value in theirs.items():
            if name in MEANINGLESS:
                if name == "amsgrad" and value:
                    self.dropped.add("amsgrad")
                if name == "decoupled_weight_decay" and not value and theirs.get("weight_decay"):
                    self.dropped.add("weight decay as part of the gradient (it is decoupled here)")
                continue
            name = self.optimizer.ALIASES.get(name, name)
            self.optimizer._check(name, value)  # a value out of range is refused as in the constructor
            saved[name] = value
        return known | saved | {"t": self.t}

    def state(self, p: Tensor, group: Group, fresh: State, saved: State, who: str) -> State:
        """The state of one parameter: ``saved`` converted, and ``fresh`` where entries are missing."""
        # 1. The entries under the names used here. 2. Those that exist in the fresh state, in its shape and storage.
        # 3. Entries that depend on a missing one start anew with it.
        converted = self._translated(p, group, saved)
        result = dict(fresh)
        if "mask" in fresh and is_sharded(p):  # compact moments are plain tensors of the local shard
            converted, p = self._of_shard(p, converted, who), local(p)
        mask = self._mask(p, converted.pop("mask", None), who)
        if "mask" in fresh and mask is not None:
            result["mask"] = pack(mask).to(p.device)
        for name, value in converted.items():
            if name in fresh and isinstance(value, Tensor):
                result[name] = self._fitted(p, name, value, mask, fresh, group, who)
            elif self.source is None and name not in OURS:  # an entry that the user has added
                result[name] = value
        missing = {name for name in fresh if isinstance(fresh[name], Tensor) and name not in converted} - {"mask"}
        for together in TOGETHER:
            if missing & together:
                missing |= together & fresh.keys() - {"mask"}
        for name in missing:
            result[name] = fresh[name]
            self.new[name] = self.new.get(name, 0) + 1
        if "mask" in fresh and "exp_avg" in missing:  # new moments have the size of the new mask
            result["mask"] = fresh["mask"]
        self.taken |= converted.keys() & fresh.keys() - missing
        self.offered |= converted.keys()
        return result

    # ---- one parameter ----

    def _translated(self, p: Tensor, group: Group, saved: State) -> State:
        """The saved entries under the names used here, with the counts ``age`` and ``n`` derived from ``step``."""
        step = saved.get("step")
        converted = {NAMES.get(name, name): value for name, value in saved.items() if name != "step"}
        if self.source is None:
            return converted
        for name in ("peak", "norm", "norm_rms"):
            if name in converted:
                converted[name] = torch.as_tensor(converted[name])
        if "norm_rms" in converted:
            converted["norm_rms"] = converted["norm_rms"].sqrt()
        if step is not None and "exp_avg" in converted:
            converted["age"] = torch.tensor(self._age(float(step), group), dtype=torch.float64)
            # n counts the updates of the statistics, which no reset touches.
            if "peak" in converted:  # pytorch_optimizer counts both; the published StableSPAM has one counter for all
                whole = self.source.group_mark == "step"
                converted["n"] = torch.tensor(float(self.t if whole else step), dtype=torch.float64)
        return converted

    def _age(self, step: float, group: Group) -> float:
        """Updates since the moments were last reset, from a count ``step`` that may go through resets."""
        # The published SPAM counts on through its resets, which happen on multiples of the interval. The reset step is
        # the first update of the new moments.
        every = group.get("reset_interval", 0)
        if self.source is None or self.source.restarts or group.get("variant") == "official":
            return step
        return step - (step // every) * every + 1 if every and step >= every else step

    def _of_shard(self, p: Tensor, converted: State, who: str) -> State:
        """``converted`` with the local shard's part of the mask and the moments, one value per entry of the shard."""
        flags = None if is_sharded(converted.get("mask")) else self._mask(p, converted.get("mask"), who)  # whole
        result = dict(converted)
        for name in {"mask", "exp_avg", "exp_avg_sq"} & converted.keys():
            x: Tensor = converted[name]
            if is_sharded(x):
                self._demand(x.shape == p.shape, who, name, x, tuple(p.shape))
                result[name] = local(x)
                continue
            if name == "mask":
                assert flags is not None
                x = flags
            elif flags is not None and x.shape != p.shape:  # the compact moments of a whole tensor
                self._demand(x.shape == (int(flags.sum()),), who, name, x, (int(flags.sum()),))
                x = opened(x, x.dtype).to(p.device)
                x = torch.zeros_like(flags, dtype=x.dtype).masked_scatter_(flags, x)
            self._demand(x.shape == p.shape, who, name, x, tuple(p.shape))
            result[name] = x[region(p)]
        return result

    def _mask(self, p: Tensor, mask: Tensor | None, who: str) -> Tensor | None:
        """A mask in the shape of ``p``, from bools or from packed bits."""
        if mask is None:
            return None
        # 0 or 1 for each entry: the published code's masks, and states that were saved from shards.
        if mask.dtype == torch.bool or mask.shape == p.shape:
            self._demand(tuple(mask.shape) == tuple(p.shape), who, "mask", mask, tuple(p.shape))
            return mask.to(p.device).bool()
        # Packed bits, eight entries per byte.
        packed = (math.ceil(p.numel() / 8),)
        self._demand(tuple(mask.shape) == packed, who, "mask", mask, packed)
        return unpack(mask.to(p.device), p.numel()).view(p.shape)

    def _fitted(
        self, p: Tensor, name: str, value: Tensor, mask: Tensor | None, fresh: State, group: Group, who: str
    ) -> Tensor:
        """``value`` in the shape and storage of the present state: dense or compact, fp32, bf16 or 8-bit. The tensor
        itself is returned where nothing differs, so that loading an own state is exact."""
        target: Tensor = fresh[name]
        if name not in ("exp_avg", "exp_avg_sq"):
            fits = value.shape == target.shape or value.numel() == target.numel() == 1
            self._demand(fits, who, name, value, tuple(target.shape))
        else:
            # Moments under a saved mask are compact, or (from shards) in the shape of the parameter.
            spread = mask is not None and value.shape == p.shape
            compact = (int(mask.sum()),) if mask is not None and not spread else None
            self._demand(tuple(value.shape) == (compact or tuple(p.shape)), who, name, value, compact or tuple(p.shape))
            if "mask" in fresh and compact is None:  # one value per entry there, sparse here
                flags = unpack(fresh["mask"], p.numel()) if mask is None else mask.reshape(-1)
                value = opened(value, value.dtype).reshape(-1)[flags.to(value.device)]
            elif "mask" not in fresh and compact is not None:  # sparse there, dense here
                whole = torch.zeros(p.shape, dtype=value.dtype, device=p.device)
                whole[mask] = opened(value, value.dtype).to(p.device)
                value = whole
            if value.shape != target.shape:
                target = moment(p.new_empty(value.shape), group["state"], signed=name == "exp_avg")
        # 8-bit moments of equal size are kept as codes: decoding and encoding again may change them.
        if type(value) is type(target) and value.dtype == target.dtype:
            return value if value.shape == target.shape else value.reshape(target.shape)
        return target.clone().copy_(opened(value, torch.float64 if value.dtype == torch.float64 else torch.float32))

    @staticmethod
    def _demand(holds: bool, who: str, name: str, value: Tensor, expected: tuple[int, ...]) -> None:
        if not holds:
            raise ValueError(
                f"load_state_dict: {name!r} of {who} has the shape {tuple(value.shape)} where {expected} is expected; "
                "the state belongs to another model, and nothing was loaded"
            )

    # ---- the warning ----

    def summary(self, states: Mapping[Any, State]) -> str:
        """One line that lists the entries that were kept, started anew and left out; "" if nothing was converted."""
        if self.source is None and not self.new:
            return ""
        new = ", ".join(sorted(self.new))
        if self.source is None:
            return f"load_state_dict: the state lacks {new} of {max(self.new.values())} parameters; these start anew"
        taken = ", ".join(sorted(self.taken)) or "nothing"
        said = [f"load_state_dict: took over {taken} from the state of {self.source.name} at step {self.t}"]
        if new:
            said.append(f"{new} start anew")
        dropped = self.dropped | (self.offered - self.taken - self.new.keys() - {"age", "n", "mask"})
        if dropped:
            said.append(f"left out: {', '.join(sorted(dropped))}")
        return "; ".join(said)


def _counts(given: Mapping[str, Any]) -> Iterator[int]:
    """All step counts in a state of any optimizer: per parameter, per group, or of the whole optimizer."""
    state = given["state"]
    # pytorch_optimizer keeps the count of all steps beside the parameters, as "total_step".
    for holder in (given, state):
        if isinstance(holder.get("total_step"), int):
            yield holder["total_step"]
    yield from (int(group.get("t", group.get("step", 0))) for group in given["param_groups"])
    yield from (int(entries["step"]) for entries in state.values() if isinstance(entries, dict) and "step" in entries)
