"""Gradient transforms in front of any torch optimizer.

Torch's optimizers read ``p.grad``. `stabilize` therefore swaps each ``p.grad`` for its transformed copy, steps the base
optimizer and puts the gradients back, also when the step fails. Param groups and base state are the base's own (seen
through properties, so that they cannot come apart when either object loads a state); the statistics of the transforms
are kept beside them, since an extra key in ``state[p]`` would make torch's optimizers believe that they had initialised
that parameter, and are merged under prefixed keys in ``state_dict`` (see chain.py).

A tensor whose gradient is not finite should not be stepped, but a base cannot be told so without reading the gradient's
finiteness from the device. Of an exact skip, no such read, and no extra memory, any two are possible: ``nonfinite``
chooses.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from evenstep.optim.base_optimizer import (
    MOMENTS,
    GradientSwap,
    Snapshot,
    check_base,
    check_parameters,
    checked_copy,
    partitioned,
    reset_,
    unknown_entries,
)
from evenstep.optim.chain import Chain, Transformed
from evenstep.optim.distributed import Bucket, all_reduce, buckets, rebind_sharded_params, run_batched_collectives
from evenstep.optim.functional import Gradients, statistics
from evenstep.optim.fused import Choice
from evenstep.optim.options import RANGES, TENSOR, check, comparable
from evenstep.optim.state import Group, in_param_order, is_trained, refuse_sparse_gradients
from evenstep.optim.transforms import MomentumReset, SkipStep, Transform


def stabilize(
    optimizer: Optimizer,
    *transforms: Transform,
    reset_interval: int = 0,
    moments: Iterable[str] = (),
    nonfinite: str = "restore",
    fused: bool | None = None,
) -> "Stabilized":
    """Put gradient transforms before ``optimizer``; the result is a torch Optimizer over the same groups and
    parameters.

    ``stabilize(torch.optim.AdamW(model.parameters()), AdaClip(), AdaGN(), reset_interval=1000)``. Learning-rate
    schedulers, hooks, ``state_dict`` and ``param_groups`` work as on any optimizer; step the result instead of the
    base. Its other attributes and methods (``train`` and ``eval`` of schedule-free optimizers, ``set_mask`` of `SPAM`)
    are reached and set through the result. The gradients are the user's again after the step. Without transforms, and
    while gradients are finite, it is the base to the bit.

    Args:
        optimizer: any torch Optimizer that reads ``p.grad``.
        transforms: applied in the order given; each kind at most once.
        reset_interval: every so many steps the base's moments and step counts start anew before the step; 0 (default)
            for never. Short for `MomentumReset`.
        moments: names of state entries to reset besides the known ones, for bases with names of their own.
        nonfinite: what happens to a tensor whose gradient has a NaN or Inf. It is counted (``stats["skipped"]``, and
            under ``stabilize.skipped`` in the state), and leaves the statistics as they were, in any case.

            ``"restore"`` (default): the tensor and its base state are as before the step, without waiting for a device.
            On CPU the base does not see the tensor. Elsewhere it does, and both are put back: that takes a copy of
            parameters and base state during the step, and a step count that the base keeps on the host goes on.

            ``"skip"``: the base does not see the tensor, on any device. One read of the device a step, no copy; for
            when memory is short or steps are long.

            ``"zero"``: the base sees zeros, so that its momentum and weight decay still move the tensor. No read, no
            copy.
        fused: how gradients are measured and written: None (default) by kernels where they serve, False by the plain
            code, True for an error where kernels do not serve (sharded parameters among them).

    Raises:
        TypeError: ``optimizer`` is no torch Optimizer, or one that needs its closure (LBFGS). ValueError: a complex
            parameter, ``differentiable=True``, a transform given twice, ``reset_interval`` or ``nonfinite`` out of
            range, or (at the first step of a base with unknown state) entries of which it is not known whether they are
            moments. RuntimeError: a sparse gradient. Flat shards (FSDP1, ZeRO) are refused with a ValueError or, where
            they come in later, a RuntimeError.
    """
    return Stabilized(optimizer, transforms, reset_interval, moments, nonfinite, fused)


def _statistics(grads: Gradients, bucket: Bucket) -> dict[str, Tensor]:
    """What `Stabilized.stats` holds of a bucket; the update is the base's, and its norm is not known."""
    unknown = torch.full_like(grads.peak, torch.nan)
    return statistics(grads, bucket.sizes(), unknown, sharded=bool(bucket.layout.cuts))


OWN = frozenset({"base", "moments", "nonfinite", "chain", "stats"})
"""Attributes of `Stabilized` that are not its base's, whatever the base has under these names."""


class Stabilized(Optimizer):
    """What `stabilize` returns. ``base`` is the optimizer behind the transforms, ``stats`` what they saw in the last
    step, ``chain`` the transforms with their statistics.
    """

    chain: Chain
    _known: set[Tensor]
    _checked: list[tuple[Any, ...]]

    def __init__(
        self,
        base: Optimizer,
        transforms: Iterable[Transform],
        reset_interval: int = 0,
        moments: Iterable[str] = (),
        nonfinite: str = "restore",
        fused: bool | None = None,
    ):
        check_base(base)
        check("stabilize", reset_interval=reset_interval, nonfinite=nonfinite)
        transforms = tuple(transforms)
        resets = [unit for unit in transforms if isinstance(unit, MomentumReset)]
        if resets and reset_interval:
            raise ValueError("stabilize: give reset_interval or a MomentumReset, not both")
        if nonfinite == "zero" and any(isinstance(unit, SkipStep) for unit in transforms):
            raise ValueError("stabilize: nonfinite='zero' skips nothing; with SkipStep use 'restore' or 'skip'")
        reset = resets[0] if resets else MomentumReset(reset_interval)
        self.base = base
        self.moments = MOMENTS | frozenset(moments) | frozenset(reset.moments)
        self.nonfinite = nonfinite
        self.chain = Chain(transforms, reset.every, base.chain.depth + 1 if isinstance(base, Stabilized) else 0)
        self._choice = Choice(fused)
        self._swap = GradientSwap()
        self.stats: dict[str, Tensor] = {}
        # Optimizer.__init__ would make groups and state of its own; __setstate__ sets up the rest (hooks, profiling).
        self.__setstate__({})
        for group in self.param_groups:
            self._adopt(group)

    # ---- what is not ours is the base's ----

    def __getattr__(self, name: str) -> Any:
        # Asked for what is not found here. Private names stay apart: torch keeps the hooks of each optimizer there, and
        # what a base can do for a GradScaler (`_step_supports_amp_scaling`) it would do after the transforms.
        if name.startswith("_") or name == "base":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        ours = name.startswith("_") or name in OWN or name in self.__dict__ or hasattr(type(self), name)
        if ours or not hasattr(self.base, name):
            super().__setattr__(name, value)
        else:
            setattr(self.base, name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *(name for name in dir(self.base) if not name.startswith("_"))})

    @property
    def param_groups(self) -> list[Group]:
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[Group]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base's. Named as torch names it, since accelerate looks for ``set_to_none`` in the signature."""
        if set_to_none:
            self.base.zero_grad()
        else:
            self.base.zero_grad(set_to_none=False)

    @property
    def reset_interval(self) -> int:
        return self.chain.reset_interval

    @reset_interval.setter
    def reset_interval(self, every: int) -> None:
        self.chain.reset_interval = every

    @property
    def transforms(self) -> tuple[Transform, ...]:
        return self.chain.transforms

    @property
    def statistics(self) -> dict[Tensor, dict[str, Tensor]]:
        """The statistics of the transforms of each parameter, by ``"transform.statistic"``."""
        return self.chain.statistics

    def add_param_group(self, param_group: Group) -> None:
        self.base.add_param_group(param_group)
        try:
            self._adopt(self.param_groups[-1])
        except ValueError:
            for p in self.param_groups.pop()["params"]:
                self.base.state.pop(p, None)
                self.statistics.pop(p, None)
            raise

    def _adopt(self, group: Group) -> None:
        check_parameters(group["params"])
        clock = self.chain.clock
        group.setdefault(clock, max((other.get(clock, 0) for other in self.param_groups), default=0))
        self._known.update(group["params"])
        self._start_trained([group])

    def _start_trained(self, groups: Iterable[Group]) -> None:
        """Start the statistics of parameters that are to be trained and have none yet: frozen ones need none."""
        for group in groups:
            new = [p for p in group["params"] if p not in self.statistics and is_trained(p)]
            check_parameters(new)
            for p in new:
                self._choice.check(p)
                self.chain.adopt(p)

    def _rebind_sharded_params(self) -> None:
        if rebind_sharded_params(self.param_groups, self._known, self.chain.clock):
            self.statistics.clear()
            self._start_trained(self.param_groups)

    def _check_options(self) -> None:
        """ValueError for an option, or a learning rate, that was put out of its range after construction. They are
        looked at again only where a value has changed, and tensors not at all.
        """
        units = [unit for unit in self.transforms if type(unit).__module__.startswith("evenstep.")]
        named = [(unit, [name for name in unit.options if name in RANGES]) for unit in units]
        now = [
            comparable(group.get("lr") for group in self.param_groups),
            (self.reset_interval, self.nonfinite),
            *(comparable(getattr(unit, name) for name in names) for unit, names in named),
        ]
        if now == self._checked:
            return
        for number, lr in enumerate(now[0]):
            if isinstance(lr, int | float):
                check(f"stabilize, param_groups[{number}]", lr=lr)
        check("stabilize", reset_interval=self.reset_interval, nonfinite=self.nonfinite)
        for (unit, names), values in zip(named, now[2:], strict=True):
            given = zip(names, values, strict=True)
            check(type(unit).__name__, **{name: value for name, value in given if value is not TENSOR})
        self._checked = now

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._known = {p for group in self.param_groups for p in group["params"]}
        self._checked = []

    def __getstate__(self) -> dict[str, Any]:
        own = ("base", "moments", "nonfinite", "chain", "_choice", "_swap")
        return {name: self.__dict__[name] for name in own} | {"stats": {}}

    def __repr__(self) -> str:
        chain = "".join(f"{unit!r}, " for unit in self.transforms)
        return f"stabilize({chain}reset_interval={self.reset_interval}) of {self.base!r}"

    # ---- one step ----

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Transform the gradients, step the base, put the gradients back. ``closure``, if given, runs once before; its
        value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step(loss)
        return loss

    @torch._disable_dynamo  # all is done on the host and by the base, which may compile its own step
    def _step(self, loss: Any) -> None:
        self._check_options()
        self._rebind_sharded_params()
        for group in self.param_groups:
            refuse_sparse_gradients("stabilize", self.param_groups, group["params"])
        self._start_trained(self.param_groups)
        clock, opens = self.chain.clock, getattr(self.base, "opens_step", None)
        ahead = int(opens is None or opens())  # 0 for what a sweep of step_parameter has left
        work = [
            (group, bucket) for group in self.param_groups for bucket in buckets(group["params"], None, self._choice)
        ]
        layouts = [bucket.layout for _, bucket in work]
        seen = torch.as_tensor(loss) if isinstance(loss, Tensor | float) else None
        steps = [self.chain.transformed(bucket, group[clock] + ahead, seen) for group, bucket in work]
        found = run_batched_collectives(steps, lambda requests: all_reduce(requests, layouts))
        if self._rehearses(found):
            self._swapped_step(found, [])
            for p, state in self.base.state.items():
                reset_(state, self.moments)
                # The tool that asked for this goes by the names that it finds here when it unflattens a state.
                state.update(self._named_statistics(p))
            return
        due = [group for group in self.param_groups if self.reset_interval and self._reset_due(group)]
        self._swapped_step(found, [p for group in due for p in group["params"]])
        for group in self.param_groups:
            group[clock] += ahead
        self.chain.keep(found)
        measured = [(one.bucket.params, _statistics(one.grads, one.bucket)) for one in found]
        self.stats = in_param_order(self.param_groups, measured)
        if self.reset_interval:
            self._check_moments()

    @property
    def step_parameter(self) -> Callable[[Tensor], None]:
        """As the base's, where it has one (see `evenstep.optim.base.EvenOptimizer.step_parameter`), on the transformed
        gradient. Transforms that look at the whole model, and ``reset_interval``, do not go with it.
        """
        getattr(self.base, "step_parameter")  # noqa: B009  # AttributeError where the base has none
        return self._step_parameter

    @torch._disable_dynamo
    @torch.no_grad()
    def _step_parameter(self, p: Tensor) -> None:
        whole = [type(unit).__name__ for unit in self.transforms if unit.whole_model or unit.shared]
        if whole or self.reset_interval:
            raise ValueError(
                f"stabilize: step_parameter does not go with {', '.join(whole) or 'reset_interval'}, which needs the "
                "gradients of all parameters at once; use step()"
            )
        base: Any = self.base
        group, _ = base.place(p)
        if (given := p.grad) is None:
            return
        self._check_options()
        refuse_sparse_gradients("stabilize", self.param_groups, [p])
        if p not in self.statistics:
            self.chain.adopt(p)
        if base.opens_sweep(p):
            for other in self.param_groups:
                other[self.chain.clock] += 1
        [bucket] = buckets([p], None, self._choice)
        [one] = run_batched_collectives(
            [self.chain.transformed(bucket, group[self.chain.clock], None)],
            lambda requests: all_reduce(requests, [bucket.layout]),
        )
        bad = ~one.grads.finite[0] if self.nonfinite != "zero" else one.grads.finite[0] & False
        try:
            p.grad = None
            self._swap.step(base, [(one.grads, 0, p)], lambda: base.step_parameter(p), bad)
        finally:
            p.grad = given
        self.chain.keep([one])

    def _reset_due(self, group: Group) -> bool:
        return bool((group[self.chain.clock] + 1) % self.reset_interval == 0)

    def _swapped_step(self, found: list[Transformed], resets: list[Tensor]) -> None:
        """Step the base on the transformed gradients, after a reset of some parameters' moments."""
        accepted = {
            p: flag for one in found for p, flag in zip(one.bucket.params, one.grads.finite.unbind(), strict=True)
        }
        stepped, unread = partitioned(accepted, self.nonfinite)
        snapshot = Snapshot(self.base, unread, self.moments)
        for p in resets:
            if p in stepped:
                reset_(self.base.state.get(p, {}), self.moments)
        given = {p: p.grad for p in accepted}
        work = [(one.grads, i, p) for one in found for i, p in enumerate(one.bucket.params) if p in stepped]
        try:
            for p in accepted:
                p.grad = None
            self._swap.step(self.base, work)
            if not accepted:
                self.base.step()
            snapshot.restore([accepted[p] for p in unread])
        finally:
            for p, grad in given.items():
                p.grad = grad

    def _rehearses(self, found: list[Transformed]) -> bool:
        """Whether this is the step on zero gradients at learning rate 0 with which checkpoint tools make lazy state;
        such a step changes nothing else. The values are looked at in this one case alone.
        """
        if self.base.state or not found or any(float(group.get("lr", 1)) != 0 for group in self.param_groups):
            return False
        return all(not (one.grads.origin or one.grads).peak.any() for one in found)

    def _check_moments(self) -> None:
        unknown = unknown_entries(self.base.state.values(), self.moments)
        if unknown:
            raise ValueError(
                f"stabilize(reset_interval={self.reset_interval}) does not know whether these state entries of "
                f"{type(self.base).__name__} are moments: {', '.join(unknown)}; "
                "name those that are in moments=(...), or use reset_interval=0"
            )

    # ---- saving and loading ----

    def state_dict(self) -> dict[str, Any]:
        """The base's, with the statistics of the transforms in its ``state`` under keys that start with
        ``"stabilize."``.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self._rebind_sharded_params()
        self._start_trained(self.param_groups)
        saved = self.base.state_dict()
        state = {i: dict(kept) if isinstance(kept, dict) else kept for i, kept in saved["state"].items()}
        for i, p in self._numbered(saved):
            if p in self.statistics:
                state.setdefault(i, {}).update(self._named_statistics(p))
        saved = {**saved, "state": state}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            saved = post_hook(self, saved) or saved
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave. The state of a bare base loads too: then the statistics start anew.

        Raises ValueError, before anything changes, when a statistic has another shape than the transforms given here
        keep.
        """
        self._rebind_sharded_params()
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        prefix, theirs, ours = self.chain.prefix, dict[Any, Any](), dict[Any, dict[str, Any]]()
        for i, entries in state_dict["state"].items():
            if not isinstance(entries, dict):  # of no parameter
                theirs[i] = entries
                continue
            ours[i] = {key.removeprefix(prefix): value for key, value in entries.items() if str(key).startswith(prefix)}
            rest = {key: value for key, value in entries.items() if not str(key).startswith(prefix)}
            if rest:
                theirs[i] = rest
        if len(state_dict["param_groups"]) == len(self.param_groups):  # else the base says what is wrong
            self.chain.check_saved((p, ours.get(i, {})) for i, p in self._numbered(state_dict))
            theirs = checked_copy(self.base, self._numbered(state_dict), theirs)
        self.base.load_state_dict({**state_dict, "state": theirs})
        for group in self.param_groups:
            group.setdefault(self.chain.clock, 0)
        self.chain.load([(p, ours.get(i, {})) for i, p in self._numbered(state_dict)])
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _named_statistics(self, p: Tensor) -> dict[str, Tensor]:
        return {self.chain.prefix + key: value for key, value in self.statistics.get(p, {}).items()}

    def _numbered(self, saved: dict[str, Any]) -> list[tuple[Any, Tensor]]:
        ids = [i for group in saved["param_groups"] for i in group["params"]]
        return list(zip(ids, (p for group in self.param_groups for p in group["params"]), strict=False))
