"""Gradient transforms before any torch optimizer.

Torch's optimizers read ``p.grad``. `stabilize` therefore swaps each ``p.grad`` for its transformed copy, steps the base
optimizer and puts the gradients back, also when the step fails. Param groups and state are those of the base, reached
through properties, so that the two objects cannot diverge when either loads a state. The statistics of the transforms
are kept beside the state (an extra key in ``state[p]`` would make torch's optimizers believe that they had initialised
that parameter) and are merged into ``state_dict`` under prefixed keys (see chain.py).

A tensor whose gradient is not finite should not be stepped, but the base cannot be told so without reading the
gradient's finiteness from the device. At most two of these are possible: an exact skip, no device read, no extra
memory. The option ``nonfinite`` chooses.

Read in this order: `stabilize` (the options), `Stabilized._step`, chain.py (one pass through the transforms),
base_optimizer.py (the swap of gradients, resets, undoing a step).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from evenstep.kernels.cuda import TritonKernels
from evenstep.optim.base_optimizer import (
    MOMENTS,
    GradientSwap,
    Snapshot,
    check_base,
    check_parameters,
    checked_copy,
    flags_of,
    reset_,
    split_by_flag,
    unknown_entries,
)
from evenstep.optim.chain import Chain, Transformed
from evenstep.optim.distributed import Bucket, all_reduce, rebind_sharded_params, run_batched_collectives
from evenstep.optim.functional import Gradients, statistics
from evenstep.optim.fused import Choice, buckets
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
    """Put gradient transforms before ``optimizer``. The result is a torch Optimizer over the same groups and
    parameters.

    Step the result instead of the base. Learning-rate schedulers, hooks, ``state_dict`` and ``param_groups`` work as on
    any optimizer. Other attributes and methods of the base (``train`` and ``eval`` of schedule-free optimizers,
    ``set_mask`` of `SPAM`) are reached and set through the result. After the step ``p.grad`` is the user's gradient
    again. Without transforms, and while gradients are finite, the steps are those of the base bit for bit.

    Args:
        optimizer: any torch Optimizer that reads ``p.grad``.
        transforms: applied in the order given, each kind at most once. See `evenstep.optim.transforms`.
        reset_interval: number of steps between resets of the base's moments and step counts; 0 (default) for never. A
            short form of `MomentumReset`.
        moments: names of state entries to reset besides the known ones, for bases with names of their own.
        nonfinite: treatment of a tensor whose gradient has a NaN or Inf. In any case the tensor is counted
            (``stats["skipped"]``, and ``stabilize.skipped`` in the state), and its statistics do not change.

            ``"restore"`` (default): the tensor and its base state are as before the step, without waiting for a device.
            On CPU the base does not see the tensor. On other devices the base steps it, and both are put back; a step
            count that the base keeps on the host advances. On CUDA only such a tensor is copied, so other steps cost no
            bandwidth. The memory for it is reserved during the step: for the optimizers of torch, which are stepped on
            some parameters at a time, that of the largest parameter with its state; for others, and without the
            kernels (``fused=False``, shards), that of all parameters with their state.

            ``"skip"``: the base does not see the tensor, on any device. This reads from the device once per step and
            copies nothing; for when memory is short or steps are long.

            ``"zero"``: the base sees zeros, so that its momentum and weight decay still move the tensor. No read, no
            copy.
        fused: the code that measures and writes gradients: None (default) for kernels where they serve, False for the
            plain code, True for an error where kernels do not serve (for example sharded parameters).

    Raises:
        TypeError: ``optimizer`` is no torch Optimizer, or needs its closure (LBFGS).
        ValueError: a complex parameter, a flat shard (FSDP1, ZeRO), ``differentiable=True``, a transform given twice,
            ``reset_interval`` or ``nonfinite`` out of range; at the first step with ``reset_interval``, state entries
            of an unknown base that may or may not be moments.
        RuntimeError: a sparse gradient, or flat shards that replace the parameters later.

    Example:
        >>> import torch
        >>> from evenstep import AdaClip, AdaGN, stabilize
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = stabilize(torch.optim.AdamW([w], lr=0.1), AdaClip(), AdaGN(), reset_interval=1000)
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        >>> w.grad, optimizer.stats["norm_after"].round()  # AdamW has seen a gradient of norm 1
        (tensor([3., 4.]), tensor([1.]))
        >>> optimizer
        stabilize(AdaClip(gamma3=0.999, robust=False), AdaGN(gamma1=0.7, gamma2=0.9, eps=1e-08, robust=False), ...
    """
    return Stabilized(optimizer, transforms, reset_interval, moments, nonfinite, fused)


def _statistics(grads: Gradients, bucket: Bucket) -> dict[str, Tensor]:
    """The part of `Stabilized.stats` of one bucket. The base computes the update, so its norm is unknown: NaN."""
    return statistics(grads, bucket.sizes(), None)


# Attributes that belong to `Stabilized` even if the base has some under these names.
OWN = frozenset({"base", "moments", "nonfinite", "chain", "stats"})


class Stabilized(Optimizer):
    """The optimizer that `stabilize` returns. ``base`` is the optimizer behind the transforms, ``stats`` holds the
    per-parameter statistics of the last step (vectors over all parameters), ``chain`` the transforms with their state.
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
        resets = [transform for transform in transforms if isinstance(transform, MomentumReset)]
        if resets and reset_interval:
            raise ValueError("stabilize: give reset_interval or a MomentumReset, not both")
        if nonfinite == "zero" and any(isinstance(transform, SkipStep) for transform in transforms):
            raise ValueError("stabilize: nonfinite='zero' skips nothing; with SkipStep use 'restore' or 'skip'")
        # The chain passes over a MomentumReset; the reset itself is a matter of this object and the base.
        reset = resets[0] if resets else MomentumReset(reset_interval)
        self.base = base
        self.moments = MOMENTS | frozenset(moments) | frozenset(reset.moments)
        self.nonfinite = nonfinite
        # A stabilised base (transforms before transforms) has keys of its own in states and groups.
        self.chain = Chain(transforms, reset.every, base.chain.depth + 1 if isinstance(base, Stabilized) else 0)
        self._choice = Choice(fused)  # no optimizer class: only the kernels of measuring and writing are used
        self._swap = GradientSwap()
        self.stats: dict[str, Tensor] = {}  # of the last step, a vector over all parameters for each name
        # Optimizer.__init__ would make groups and state of its own; __setstate__ sets up the rest (hooks, profiling).
        self.__setstate__({})
        for group in self.param_groups:
            self._adopt(group)

    # ---- delegation: all other attributes are those of the base ----

    def __getattr__(self, name: str) -> Any:
        # Called for names that are not found here. Private names are not delegated: torch keeps the hooks of each
        # optimizer in them, and a base that unscales gradients itself (`_step_supports_amp_scaling`) would do so after
        # the transforms.
        if name.startswith("_") or name == "base":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # An attribute goes to the base only if the base has it and this object does not.
        ours = name.startswith("_") or name in OWN or name in self.__dict__ or hasattr(type(self), name)
        if ours or not hasattr(self.base, name):
            super().__setattr__(name, value)
        else:
            setattr(self.base, name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *(name for name in dir(self.base) if not name.startswith("_"))})

    # Properties with setters, because torch's Optimizer assigns these attributes when it loads a state.

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
        """As in the base. The argument keeps its name: accelerate looks for ``set_to_none`` in the signature."""
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
        except ValueError:  # both objects stay as they were before the call
            for p in self.param_groups.pop()["params"]:
                self.base.state.pop(p, None)
                self.statistics.pop(p, None)
            raise

    def _adopt(self, group: Group) -> None:
        """Start the clock and the statistics of a group that the base has."""
        check_parameters(group["params"])
        clock = self.chain.clock
        # In the base's group, so that it is saved with it and checkpoint tools carry it along. A group that is added
        # late starts at the clock of the others.
        group.setdefault(clock, max((other.get(clock, 0) for other in self.param_groups), default=0))
        self._known.update(group["params"])
        self._start_trained([group])

    def _start_trained(self, groups: Iterable[Group]) -> None:
        """Start the statistics of trained parameters that have none yet. Frozen parameters need none."""
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
        """ValueError for an option or a learning rate that was set out of its range after construction.

        The values are compared with those of the last check first. Tensors are left out: reading them would wait for
        their device. Transforms of the user's own have names and ranges that are not known here.
        """
        # One tuple for the learning rates, one for the options of `stabilize`, one for each transform.
        builtin = [transform for transform in self.transforms if type(transform).__module__.startswith("evenstep.")]
        named = [(transform, [name for name in transform.options if name in RANGES]) for transform in builtin]
        now = [
            comparable(group.get("lr") for group in self.param_groups),
            (self.reset_interval, self.nonfinite),
            *(comparable(getattr(transform, name) for name in names) for transform, names in named),
        ]
        if now == self._checked:
            return
        for number, lr in enumerate(now[0]):
            if isinstance(lr, int | float):  # None for a base without learning rates
                check(f"stabilize, param_groups[{number}]", lr=lr)
        check("stabilize", reset_interval=self.reset_interval, nonfinite=self.nonfinite)
        for (transform, names), values in zip(named, now[2:], strict=True):
            given = zip(names, values, strict=True)
            check(type(transform).__name__, **{name: value for name, value in given if value is not TENSOR})
        self._checked = now

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Derived from the groups, so not part of a copy.
        self._known = {p for group in self.param_groups for p in group["params"]}
        self._checked = []

    def __getstate__(self) -> dict[str, Any]:
        # The hooks of torch's Optimizer are left out, since closures cannot be pickled.
        own = ("base", "moments", "nonfinite", "chain", "_choice", "_swap")
        return {name: self.__dict__[name] for name in own} | {"stats": {}}

    def __repr__(self) -> str:
        chain = "".join(f"{transform!r}, " for transform in self.transforms)
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

    @_disable_dynamo  # host work; the base may compile its own step
    def _step(self, loss: Any) -> None:
        # 1. Checks. All errors are raised before anything changes.
        self._check_options()
        self._rebind_sharded_params()
        for group in self.param_groups:
            refuse_sparse_gradients("stabilize", self.param_groups, group["params"])
        self._start_trained(self.param_groups)
        # `opens_step` of an EvenOptimizer: whether its clock would advance too. Both clocks stay equal.
        clock, opens = self.chain.clock, getattr(self.base, "opens_step", None)
        ahead = int(opens is None or opens())  # 0 for what a sweep of step_parameter has left
        # 2. Pass the gradients through the chain. Nothing is written yet: limits and gains are kept beside them.
        work = [
            (group, bucket) for group in self.param_groups for bucket in buckets(group["params"], None, self._choice)
        ]
        layouts = [bucket.layout for _, bucket in work]
        # For SkipStep(watch="loss"); a closure may return anything.
        seen = torch.as_tensor(loss) if isinstance(loss, Tensor | float) else None
        steps = [self.chain.transformed(bucket, group[clock] + ahead, seen) for group, bucket in work]
        results = run_batched_collectives(steps, lambda requests: all_reduce(requests, layouts))
        if self._rehearses(results):
            self._swapped_step(results, [])
            for p, state in self.base.state.items():
                reset_(state, self.moments)  # the step counts back to 0
                # The tool that asked for this goes by the names that it finds here when it unflattens a state.
                state.update(self._named_statistics(p))
            return
        # 3. Reset the moments where due, and step the base on the transformed gradients.
        due = [group for group in self.param_groups if self.reset_interval and self._reset_due(group)]
        self._swapped_step(results, [p for group in due for p in group["params"]])
        # 4. Advance the clock and keep the new statistics, where the gradients were finite.
        for group in self.param_groups:
            group[clock] += ahead
        self.chain.keep(results)
        # NaN for parameters without a gradient.
        measured = [(result.bucket.params, _statistics(result.grads, result.bucket)) for result in results]
        self.stats = in_param_order(self.param_groups, measured)
        if self.reset_interval:  # after a step, when lazy bases have their state
            self._check_moments()

    @property
    def step_parameter(self) -> Callable[[Tensor], None]:
        """The base's `evenstep.optim.optimizer.EvenOptimizer.step_parameter`, if it has one, on the transformed
        gradient. ValueError together with ``reset_interval`` or transforms of the whole model (`NormClip`, ...).
        """
        # A property, so that hasattr() tells trainers whether the base can release gradients.
        getattr(self.base, "step_parameter")  # noqa: B009  # AttributeError where the base has none
        return self._step_parameter

    @_disable_dynamo
    @torch.no_grad()
    def _step_parameter(self, p: Tensor) -> None:
        # Their statistics need all gradients of a step at once, of which most are freed already.
        whole = [type(transform).__name__ for transform in self.transforms if transform.whole_model or transform.shared]
        if whole or self.reset_interval:
            raise ValueError(
                f"stabilize: step_parameter does not go with {', '.join(whole) or 'reset_interval'}, which needs the "
                "gradients of all parameters at once; use step()"
            )
        base: Any = self.base
        group, _ = base.place(p)  # ValueError for a parameter of another optimizer
        if (given := p.grad) is None:
            return
        self._check_options()
        refuse_sparse_gradients("stabilize", self.param_groups, [p])
        if p not in self.statistics:
            self.chain.adopt(p)
        if base.opens_sweep(p):  # the first parameter of a backward pass advances the clock of all groups
            for other in self.param_groups:
                other[self.chain.clock] += 1
        [bucket] = buckets([p], None, self._choice)
        [result] = run_batched_collectives(
            [self.chain.transformed(bucket, group[self.chain.clock], None)],
            lambda requests: all_reduce(requests, [bucket.layout]),
        )
        # A 0-d bool on the device. The base has no entry for a flag; it leaves a gradient of NaN alone.
        bad = ~result.grads.finite[0] if self.nonfinite != "zero" else result.grads.finite[0] & False
        try:
            p.grad = None
            self._swap.step(base, [(result.grads, 0, p)], lambda: base.step_parameter(p), bad)
        finally:
            p.grad = given
        self.chain.keep([result])

    def _reset_due(self, group: Group) -> bool:
        """Whether the step that begins now resets the moments: its number is a multiple of the interval."""
        return bool((group[self.chain.clock] + 1) % self.reset_interval == 0)

    def _swapped_step(self, results: list[Transformed], resets: list[Tensor]) -> None:
        """Step the base on the transformed gradients, after a reset of some parameters' moments."""
        # The flag of each parameter: its gradient is finite and the step is not skipped.
        accepted = flags_of((result.bucket.params, result.grads.finite) for result in results)
        # The base does not see `left_out`. Others whose flag was not read may have to be put back afterwards.
        left_out, unread = split_by_flag(accepted, self.nonfinite)
        kernels = {result.bucket.kernels for result in results}
        [served] = kernels if len(kernels) == 1 else [None]
        triton = served if isinstance(served, TritonKernels) else None

        def before(params: list[Tensor]) -> list[Snapshot]:
            # None where all flags were read (on CPU, and with "skip").
            devices: dict[int, tuple[Tensor, dict[Tensor, int]]] = {}
            for p in params:
                if (flag := unread.get(p)) is not None:
                    vector, place = flag
                    devices.setdefault(id(vector), (vector, {}))[1][p] = place
            several = [Snapshot(self.base, *flags, self.moments, triton) for flags in devices.values()]
            for p in params if due else ():  # a tensor that is skipped keeps its moments, also on the step of a reset
                if p in due:
                    reset_(self.base.state.get(p, {}), self.moments)
            return several

        due = set(resets)
        # The user's gradients, to be put back as the same tensor objects.
        given = [(p, p.grad) for p in accepted]
        work = [(result.grads, i, p) for result in results for i, p in enumerate(result.bucket.params)]
        work = [item for item in work if item[2] not in left_out] if left_out else work
        try:
            for p in accepted:  # a base skips parameters without a gradient
                p.grad = None
            self._swap.step(self.base, work, before=before)
            if not accepted:  # no gradient at all: the base may count steps of its own
                self.base.step()
        finally:  # also after an error in the base: the gradients belong to the user
            for p, grad in given:
                p.grad = grad

    def _rehearses(self, results: list[Transformed]) -> bool:
        """Whether this is the step on zero gradients at learning rate 0 by which torch.distributed.checkpoint makes
        optimizers initialise their state; such a step must change nothing else. The values are read from the device in
        this case alone.
        """
        # Cheap host checks first: almost every step ends here.
        if self.base.state or not results or any(float(group.get("lr", 1)) != 0 for group in self.param_groups):
            return False
        return all(not (result.grads.origin or result.grads).peak.any() for result in results)

    def _check_moments(self) -> None:
        # A silent guess would either keep spikes in moments or destroy state that is not a moment.
        unknown = unknown_entries(self.base.state.values(), self.moments)
        if unknown:
            raise ValueError(
                f"stabilize(reset_interval={self.reset_interval}) does not know whether these state entries of "
                f"{type(self.base).__name__} are moments: {', '.join(unknown)}; "
                "name those that are in moments=(...), or use reset_interval=0"
            )

    # ---- saving and loading ----

    def state_dict(self) -> dict[str, Any]:
        """The state dict of the base, with the statistics of the transforms in its ``state`` under keys that start with
        ``"stabilize."``.
        """
        # This object's own hooks run here; the base runs its own in its state_dict.
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self._rebind_sharded_params()
        self._start_trained(self.param_groups)
        saved = self.base.state_dict()
        # Copied one level deep: the base's dicts must not get our keys.
        state = {i: dict(kept) if isinstance(kept, dict) else kept for i, kept in saved["state"].items()}
        for i, p in self._numbered(saved):
            if p in self.statistics:
                state.setdefault(i, {}).update(self._named_statistics(p))
        saved = {**saved, "state": state}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            saved = post_hook(self, saved) or saved
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that `state_dict` returned. The state of a bare base loads too; the statistics then start anew.

        Raises ValueError, before anything changes, when a statistic has another shape than in the transforms given
        here, or a state entry another shape than its parameter.
        """
        self._rebind_sharded_params()
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        # Separate the entries of the base (theirs) from those of the chain (ours).
        prefix, theirs, ours = self.chain.prefix, dict[Any, Any](), dict[Any, dict[str, Any]]()
        for i, entries in state_dict["state"].items():
            if not isinstance(entries, dict):  # a global number of the base
                theirs[i] = entries
                continue
            ours[i] = {key.removeprefix(prefix): value for key, value in entries.items() if str(key).startswith(prefix)}
            rest = {key: value for key, value in entries.items() if not str(key).startswith(prefix)}
            if rest:
                theirs[i] = rest
        if len(state_dict["param_groups"]) == len(self.param_groups):  # else the base says what is wrong
            self.chain.check_saved((p, ours.get(i, {})) for i, p in self._numbered(state_dict))
            # Everything is checked before the base changes.
            theirs = checked_copy(self.base, self._numbered(state_dict), theirs)
        # The base's errors come before the chain's statistics change.
        self.base.load_state_dict({**state_dict, "state": theirs})
        for group in self.param_groups:
            group.setdefault(self.chain.clock, 0)  # a state of the bare base has no clock of ours
        self.chain.load([(p, ours.get(i, {})) for i, p in self._numbered(state_dict)])
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _named_statistics(self, p: Tensor) -> dict[str, Tensor]:
        """The statistics of a parameter under the keys of a saved state."""
        return {self.chain.prefix + key: value for key, value in self.statistics.get(p, {}).items()}

    def _numbered(self, saved: dict[str, Any]) -> list[tuple[Any, Tensor]]:
        """Pairs of a parameter's number in ``saved`` and the parameter."""
        ids = [i for group in saved["param_groups"] for i in group["params"]]
        return list(zip(ids, (p for group in self.param_groups for p in group["params"]), strict=False))
