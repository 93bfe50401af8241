"""The base class of evenstep's optimizers: groups, clocks, state, the step, exact saving and loading.

One call of `EvenOptimizer.step` runs ``_begin`` (checks, new state, the clock, the list of buckets) on the host, then
``_update`` (one fused call or one plain step per bucket), then ``_end`` (statistics). A subclass adds its state and the
two forms of its update; see stable_spam.py for an example.

The rules that keep a run exact, wherever it is stopped and resumed:

* One clock per meaning. ``group["t"]`` counts ``step()`` calls and drives schedules and resets; ``n`` of a parameter
  counts the updates that entered its statistics; ``age`` counts its updates since its moments were last reset. None of
  them is kept on the optimizer itself.
* State is created when a parameter is added, in fp32 (fp64 for fp64 parameters), and loaded bit for bit: torch casts
  loaded state to the parameter's dtype, which would round it under bf16 parameters, so the exact values are put back
  afterwards. A frozen parameter (``requires_grad=False``) has no state; it is created at the start of the first step
  after it was unfrozen, as for a parameter that is added then.
* ``step()`` reads ``p.grad`` and never writes to it, reads no value back from a device, and never branches on a
  tensor: a gradient with a NaN or Inf leaves its parameter and state as they were by arithmetic.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from evenstep.kernels.interface import PLAIN, Kernels, StepTensors
from evenstep.optim.convert_state import convert_state_dict
from evenstep.optim.distributed import (
    Bucket,
    Steps,
    all_reduce,
    rebind_sharded_params,
    run_batched_collectives,
    state_dtype,
)
from evenstep.optim.functional import Gradients, Weights
from evenstep.optim.fused import MOMENTS, Choice, buckets
from evenstep.optim.options import RANGES, TENSOR, Option, aliases, check, comparable, renamed, without_inert
from evenstep.optim.state import (
    BucketStats,
    Group,
    State,
    check_parameter,
    in_param_order,
    is_trained,
    latest_clock,
    place_clock,
    refuse_sparse_gradients,
    restore_exactly,
    rounding,
    with_tensor_clock,
)

Work = tuple[Group, Bucket]  # the arguments of one call of `EvenOptimizer.update`


class EvenOptimizer(Optimizer):
    """Base class of the optimizers. A subclass declares its options (``OPTIONS``), its state (`new_state`), the plain
    step of a bucket (`update`) and the same step by kernels (`fused_step`).

    ``given`` holds the constructor's arguments by name, of which the declared options become defaults of the groups;
    ``official`` holds the arguments under the published code's names. For ``fused`` see `StableSPAM`.
    """

    OPTIONS: ClassVar[tuple[Option, ...]] = ()  # the hyperparameters, declared in options.py
    ALIASES: ClassVar[dict[str, str]] = {}  # name in the published code -> name here, derived from OPTIONS

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "OPTIONS" in cls.__dict__:  # a user's subclass without options of its own keeps those of its parent
            cls.ALIASES = aliases(cls.OPTIONS)

    def __init__(
        self, params: Iterable[Any], given: Mapping[str, Any], official: Mapping[str, Any], fused: bool | None
    ):
        # Kept on the optimizer and out of the groups: a saved state must load on a machine without kernels.
        self._choice = Choice(fused, type(self))
        # ``given`` is the constructor's locals(), so that a hyperparameter is named in one place less.
        hyper = {option.name: given[option.name] for option in self.OPTIONS}
        defaults = renamed(without_inert(official), self.ALIASES, type(self).__name__, set(hyper))
        self.stats: dict[str, Tensor] = {}  # of the last step, a vector over all parameters for each name
        self._places: dict[Tensor, tuple[int, int]] = {}  # numbers of a parameter's group, and in the group
        self._known: set[Tensor] = set()  # to notice parameters that were replaced by their shards
        self._checked: list[tuple[Any, ...]] = []  # option values that have passed the check of their range
        super().__init__(params, hyper | defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # copy and pickle pass groups, state and the choice of kernels (`__getstate__`); older pickles lack the last.
        self.__dict__.setdefault("stats", {})
        self.__dict__.setdefault("_choice", Choice(None, type(self)))
        self._places = {}
        self._known = {p for group in self.param_groups for p in group["params"]}
        self._checked = []

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_choice": self._choice}

    # ---- groups and state ----

    def add_param_group(self, param_group: Group) -> None:
        """As in torch. Names of the published code are translated, every hyperparameter is checked, and the state is
        created at once.

        A group that is added late starts at the clock of the others. Raises ValueError for a value out of range or a
        mistyped name, TypeError for a group that is no dict.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"a param group is a dict with 'params' and options, got {type(param_group).__name__}")
        group = self._prepare_group(renamed(param_group, self.ALIASES, "param group", set(self.defaults), strict=False))
        # With the defaults, so that the constructor's arguments are checked by the first group.
        for name, value in (self.defaults | group).items():
            self._check(name, value)
        # Schedules and resets of a group that is added late go on in step with the others.
        group.setdefault("t", latest_clock([other["t"] for other in self.param_groups]))
        super().add_param_group(group)
        added = self.param_groups[-1]
        added["betas"] = tuple(added["betas"])  # a sequence of a configuration's own type could not be loaded again
        try:
            place_clock(added)
            self._start_trained([added])
        except Exception:  # the optimizer stays as it was before the call
            for p in self.param_groups.pop()["params"]:
                self.state.pop(p, None)
            raise
        self._known.update(added["params"])

    def _prepare_group(self, group: Group) -> Group:
        """A hook for subclasses: ``group`` as given to `add_param_group`, before it is checked."""
        return group

    def _check(self, name: str, value: Any) -> None:
        if name in self.defaults and name in RANGES:
            check(type(self).__name__, **{name: value})

    def fresh_state(self, p: Tensor, group: Group, index: int) -> State:
        """The complete state of a new parameter: `new_state`, and Kahan compensation where the group asks for it."""
        state = self.new_state(p, group, index)
        if group["rounding"] == "kahan" and p.dtype != state_dtype(p):  # nothing is lost in fp32 parameters
            state["compensation"] = torch.zeros_like(p)
        return state

    def new_state(self, p: Tensor, group: Group, index: int) -> State:
        """The state of a new parameter, the ``index``-th of its group."""
        raise NotImplementedError

    def _check_groups(self) -> None:
        """ValueError for a hyperparameter that was set out of its range after construction, by a scheduler or by hand.

        The values are compared with those of the last check first, since a comparison is much cheaper than the checks.
        Tensors are left out: reading them would wait for their device.
        """
        # One tuple of comparable values per group.
        names = [name for name in self.defaults if name in RANGES]
        now = [comparable(group.get(name) for name in names) for group in self.param_groups]
        if now == self._checked:
            return
        for number, (group, values) in enumerate(zip(self.param_groups, now, strict=True)):
            for name, value in zip(names, values, strict=True):
                if name in group and value is not TENSOR:
                    check(f"{type(self).__name__}, param_groups[{number}]", **{name: value})
        self._checked = now

    def _rebind_sharded_params(self) -> None:
        """Start the state anew where accelerate has put shards into the groups in place of whole parameters."""
        if rebind_sharded_params(self.param_groups, self._known, "t"):
            self.state.clear()
            self._places = {}
            self._start_trained(self.param_groups)

    def _start_trained(self, groups: Iterable[Group]) -> None:
        """Create the state of trained parameters that have none yet."""
        for group in groups:
            for index, p in enumerate(group["params"]):
                if p not in self.state and is_trained(p):
                    self._start(p, group, index)

    def _start(self, p: Tensor, group: Group, index: int) -> None:
        """Create the state of a parameter. ValueError for one that cannot be updated."""
        check_parameter(p, index)
        self._choice.check(p)
        self.state[p] = self.fresh_state(p, group, index)

    # ---- one step ----

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. ``closure``, if given, is called once with gradients
        enabled; its value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Under torch.compile, `_update` with the plain code is the compiled graph; `_begin` and `_end` run outside.
        if torch.compiler.is_compiling() and not self._compiles():
            self._step_outside_of_graphs()
            return loss
        work = self._begin(torch.compiler.is_compiling())
        self._end(work, self._update(work))
        return loss

    @_disable_dynamo
    def _compiles(self) -> bool:
        """Whether a compiled step gives the right result. Compilers lose writes into the inner tensors of tensor
        subclasses (shards, 8-bit blocks); steps on these run outside of the graph.
        """
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        states = [x for state in self.state.values() for x in state.values() if isinstance(x, Tensor)]
        return PLAIN.issuperset(map(type, (*params, *(p.grad for p in params), *states)))

    @_disable_dynamo
    def _step_outside_of_graphs(self) -> None:
        work = self._begin(False)
        self._end(work, self._update(work))

    # Host work stays out of a compiled step. The decorator is torch's internal one, which unlike torch.compiler.disable
    # does not load the compiler when this module is imported.

    @_disable_dynamo
    def _begin(self, compiling: bool) -> list[Work]:
        """The host's part before a step. All errors are raised here, before any parameter or state changes."""
        self._check_groups()
        self._rebind_sharded_params()
        for group in self.param_groups:
            refuse_sparse_gradients(type(self).__name__, self.param_groups, group["params"])
        # State of newly unfrozen parameters comes before the clock advances, as for parameters that are added now.
        self._start_trained(self.param_groups)
        if self.opens_step():
            self._advance()
        for group in self.param_groups:
            if "sweep" in group:  # gradient release: this call closes the sweep of `step_parameter`
                group["sweep"] = 0
        return self._work(((group, group["params"]) for group in self.param_groups), compiling)

    def opens_step(self) -> bool:
        """Whether `step` would advance the clock. After a sweep of `step_parameter` it updates the remaining parameters
        at the same ``t``.
        """
        return not any("sweep" in group and group["sweep"] == group["t"] for group in self.param_groups) or any(
            self._had_its_turn(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None
        )

    def opens_sweep(self, p: Tensor) -> bool:
        """Whether `step_parameter` of ``p`` would begin a new sweep and advance the clock."""
        group, _ = self.place(p)
        return group.get("sweep") != group["t"] or self._had_its_turn(group, p)

    def _advance(self) -> None:
        # All groups together, also those without gradients: one clock for all schedules.
        for group in self.param_groups:
            group["t"] += 1

    def _work(self, chosen: Iterable[tuple[Group, list[Tensor]]], compiling: bool) -> list[Work]:
        """The buckets of a step with their options, for the given parameters of each group."""
        # Kernels get addresses of tensors, where a compiler works on copies: a compiled step takes the plain code.
        choice = Choice(False) if compiling else self._choice
        work = []
        for group, params in chosen:
            # New masks of SPAM come before the buckets, which hold references to the state.
            self.prepare(group, [p for p in params if p.grad is not None])
            for bucket in buckets(params, self.state, choice):
                # Seeds of stochastic rounding depend on a parameter's place, which is the same after a resume.
                places = [self.place(p)[1] for p in bucket.params] if group["rounding"] == "stochastic" else []
                # "given": t and lr as they are in the group, for the fused step, which takes numbers as they are.
                given = {"places": places, "given": (group["t"], group["lr"])}
                numbers = bucket.kernels is not None and not any(isinstance(x, Tensor) for x in given["given"])
                work.append(((group if numbers else with_tensor_clock(group)) | given, bucket))
        return work

    def prepare(self, group: Group, params: list[Tensor]) -> None:
        """A hook for subclasses: host work before a step on ``params``, which have gradients. It may replace their
        state, as SPAM does with the moments of a new mask."""

    def _update(self, work: list[Work]) -> list[BucketStats]:
        """The two execution tiers: one fused call for each bucket that has kernels. The plain steps of the others
        advance together, so that their collectives are batched. Returns the statistics of each bucket."""
        # Statistics are kept by number of the bucket, since the two tiers are run one after the other.
        stats: dict[int, BucketStats] = {
            i: self._fused(*one) for i, one in enumerate(work) if one[1].kernels is not None
        }
        plain = [i for i in range(len(work)) if i not in stats]
        layouts = [work[i][1].layout for i in plain]
        # Generators: nothing has run before run_batched_collectives advances them.
        steps = [self.update(*work[i]) for i in plain]
        results = run_batched_collectives(steps, lambda requests: all_reduce(requests, layouts))
        stats |= dict(zip(plain, results, strict=True))
        return [stats[i] for i in range(len(work))]

    def _fused(self, group: Group, bucket: Bucket) -> Tensor:
        assert bucket.kernels is not None
        # Kernels take numbers as arguments without a copy to the device, where numbers were given. A clock or a
        # learning rate that is on a device (CUDA graphs) stays there.
        t, lr = group["given"]
        now = group if group["capturable"] else group | {"t": t}
        if not isinstance(lr, Tensor):
            now = now | {"lr": lr}
        return self.fused_step(now, bucket, bucket.kernels)

    def update(self, group: Group, bucket: Bucket) -> Steps[dict[str, Tensor]]:
        """The plain step: update the parameters of ``bucket`` in place and return their statistics, vectors ``[k]``.

        ``group`` is a copy with ``t`` and ``lr`` as 0-d tensors. A statistic of whole tensors is requested by
        ``yield`` (see `evenstep.optim.distributed`).
        """
        raise NotImplementedError

    def fused_step(self, group: Group, bucket: Bucket, kernels: Kernels) -> Tensor:
        """The same step as `update`, in one call of ``kernels``. ``t`` and ``lr`` of ``group`` are numbers, or tensors
        if they were given as tensors. Returns the statistics named in `STATS`, ``[len(STATS), k]``."""
        raise NotImplementedError

    def adam_options(self, group: Group, **special: Any) -> dict[str, Any]:
        """The options of a fused Adam step (`STEP_OPTIONS`): those that are the same for all optimizers, and
        ``special`` ones in addition or instead."""
        beta1, beta2 = group["betas"]
        common = {"sign": -1.0 if group["maximize"] else 1.0, "lr": group["lr"], "beta1": beta1, "beta2": beta2}
        # No re-warm-up: the factor of the step size is 1, where an option that is not given counts as 0.
        return common | {"eps": group["eps"], "decay": group["weight_decay"], "warmup": 1.0} | special

    @classmethod
    def checked_steps(cls) -> dict[str, Callable[..., EvenOptimizer]]:
        """Constructors of optimizers for the self-check of the kernels, by name: ``(params, **options) -> optimizer``.

        The self-check steps three small tensors (two matrices and a vector) with each; the options should lead through
        every branch of `fused_step`.
        """
        return {}

    def step_tensors(self, group: Group, bucket: Bucket, *scalars: str, masks: Iterable[Tensor] = ()) -> StepTensors:
        """The tensors of a fused step. ``scalars`` names the scalars of the state, in the order that kernels expect."""
        lost, seeds = rounding(group, bucket)
        # SCALE's matrices have no second moment, and most of them no first one.
        exp_avg, exp_avg_sq = (bucket.state_tensors(name) if name in bucket.states[0] else [] for name in MOMENTS)
        # By name first: all ages, then all peaks, ... so that kernels find the scalars of a name in a row.
        values = [state[name] for name in scalars for state in bucket.states]
        return StepTensors(
            bucket.shards, bucket.grads, exp_avg, exp_avg_sq, values, list(masks), _filled(lost), _filled(seeds)
        )

    @_disable_dynamo
    def _end(self, work: list[Work], stats: list[BucketStats]) -> None:
        """Put the statistics of all buckets together as `stats`. They stay on the device until someone reads them."""
        measured = [(bucket.params, numbers) for (_, bucket), numbers in zip(work, stats, strict=True)]
        self.stats = in_param_order(self.param_groups, measured)

    @torch.no_grad()
    def step_parameter(self, p: Tensor) -> None:
        """Update one parameter from its gradient, for gradient release: the gradient of each parameter is used and
        freed while the backward pass goes on.

        The result is that of ``step()`` bit for bit, since no statistic is taken over several tensors. The calls of one
        backward pass are a sweep, with one value of the clock.

        Call ``step()`` after the backward pass as usual: it updates the parameters that still have a gradient and
        closes the sweep. Without that call, the next sweep begins (and the clock advances) with the first parameter
        that comes a second time. `stats` does not change. Sharded parameters cost messages of their own, and every rank
        must release them in the same order.

        Raises:
            ValueError: ``p`` is not in this optimizer, or a group is capturable.
            RuntimeError: a sparse gradient.

        Example:
            >>> import torch
            >>> from evenstep import StableSPAM
            >>> layer = torch.nn.Linear(3, 2)
            >>> optimizer = StableSPAM(layer.parameters())
            >>> def release(p):
            ...     optimizer.step_parameter(p)
            ...     p.grad = None
            >>> hooks = [p.register_post_accumulate_grad_hook(release) for p in layer.parameters()]
            >>> layer(torch.ones(3)).sum().backward()
            >>> layer.weight.grad is None, optimizer.param_groups[0]["t"]
            (True, 1)
        """
        self._step_parameter(p)

    @_disable_dynamo
    def _step_parameter(self, p: Tensor) -> None:
        if work := self._begin_parameter(p):
            self._update(work)

    def _begin_parameter(self, p: Tensor) -> list[Work]:
        group, (_, index) = self.place(p)
        if any(other["capturable"] for other in self.param_groups):
            raise ValueError("step_parameter counts on the host; it does not go with capturable=True")
        if p.grad is None:  # as step() skips it
            return []
        self._check_groups()
        refuse_sparse_gradients(type(self).__name__, self.param_groups, [p])
        opens = self.opens_sweep(p)
        if opens:  # before the clock advances, as in step(): sparse masks are drawn by its number
            self._start_trained(self.param_groups)
        if p not in self.state:
            self._start(p, group, index)
        if opens:
            self._advance()
            # Marks the sweep in every group, so that step() knows that the clock has advanced already. It is saved with
            # the groups.
            for other in self.param_groups:
                other["sweep"] = other["t"]
        # In the state and not on the optimizer, so that a run can be saved and resumed within a sweep.
        self.state[p]["released_at"] = group["t"]
        return self._work([(group, [p])], False)

    # "released_at" is kept under the parameter and compared with the group's clock, both of which are saved.
    def _had_its_turn(self, group: Group, p: Tensor) -> bool:
        """Whether ``p`` was updated in the present sweep."""
        return p in self.state and bool(self.state[p].get("released_at") == group["t"])

    def place(self, p: Tensor) -> tuple[Group, tuple[int, int]]:
        """The group of a parameter, and the numbers of the group and of the parameter in it. ValueError for one that is
        not in this optimizer."""
        # The cached place is verified, since trainers replace and reorder the lists of groups by hand.
        if p not in self._places or not self._is_at(p, self._places[p]):  # new, or moved by hand
            groups = enumerate(self.param_groups)
            self._places = {q: (i, j) for i, group in groups for j, q in enumerate(group["params"])}
        if p not in self._places:
            raise ValueError(f"a parameter of shape {tuple(p.shape)} is not in this optimizer")
        place = self._places[p]
        return self.param_groups[place[0]], place

    def _is_at(self, p: Tensor, place: tuple[int, int]) -> bool:
        # Slices instead of indices: groups and parameters may have been removed.
        groups = self.param_groups[place[0] : place[0] + 1]
        # ``is``: == on tensors compares their entries.
        return any(q is p for group in groups for q in group["params"][place[1] : place[1] + 1])

    def gradients(self, group: Group, bucket: Bucket) -> Steps[Gradients]:
        """The gradients of ``bucket`` with their largest entries. One all-reduce where they are sharded."""
        grads: Gradients = yield Gradients.measure(bucket.grads, bucket.dtype, -1.0 if group["maximize"] else 1.0)
        return grads

    def weights(self, group: Group, bucket: Bucket, finite: Tensor) -> Weights:
        """The parameters of ``bucket``, to be written where ``finite`` ``[k]``."""
        return Weights(bucket.shards, finite, *rounding(group, bucket))

    # ---- saving and loading ----

    def state_dict(self) -> dict[str, Any]:
        """As in torch. Parameters that were unfrozen since the last step are included, with fresh state."""
        self._rebind_sharded_params()
        self._start_trained(self.param_groups)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but state keeps its own dtype bit for bit, whatever the dtype of the parameters.

        The state of torch's Adam and AdamW, of the published classes and of pytorch_optimizer's is converted: moments
        and step counts are kept, missing entries start anew, and a UserWarning lists both (see
        `evenstep.optim.convert_state`). Raises ValueError, before anything changes, for a state of other shapes or of
        an unknown optimizer.
        """
        self._rebind_sharded_params()
        # Filled by `translate` while torch loads: the state before torch has cast it, and the warning.
        final: dict[str, Any] = {}
        summaries: list[str] = []

        def translate(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            converted, summary = convert_state_dict(self, given)
            final.update(converted)
            summaries.append(summary)
            return converted

        # As hooks, so that `translate` sees the state after the user's pre-hooks, and exact values are in place before
        # the user's post-hooks. torch casts the state to the dtype of the parameters in between.
        hooks = [
            self.register_load_state_dict_pre_hook(translate),
            self.register_load_state_dict_post_hook(lambda _: restore_exactly(self, final), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:  # also after an error, or the next load would run them twice
            for hook in hooks:
                hook.remove()
        if summaries[0]:
            warnings.warn(summaries[0], stacklevel=2)


def _filled(tensors: list[Tensor | None]) -> list[Tensor]:
    """For kernels, which take lists of tensors: an empty list where all are None, else empty tensors for None."""
    given = [x for x in tensors if x is not None]
    return [given[0].new_empty(0) if x is None else x for x in tensors] if given else []
