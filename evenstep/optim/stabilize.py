"""Gradient transforms in front of any torch optimizer.

Torch's optimizers read ``p.grad``. `stabilize` therefore swaps each ``p.grad`` for its transformed copy, steps the base
optimizer and puts the gradients back, also when the step fails. Param groups and base state are the base's own (seen
through properties, so that they cannot come apart when either object loads a state); the statistics of the transforms
are kept beside them, since an extra key in ``state[p]`` would make torch's optimizers believe that they had initialised
that parameter, and are merged under prefixed keys in ``state_dict``.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from evenstep.optim.sharding import Bucket, buckets, combine, local
from evenstep.optim.state import Group, in_param_order, scalar, statistics
from evenstep.transforms import Gradients, Steps, Transform, blocks, check, lockstep

PREFIX = "stabilize."
CLOCK = "stabilize_t"

MOMENTS = frozenset(
    """exp_avg exp_avg_sq exp_avg_diff exp_inf max_exp_avg_sq max_exp_avg_sqs momentum_buffer momentum square_avg
    grad_avg acc_delta sum row_var col_var variance exp_avg_sq_row exp_avg_sq_col state1 state2 m v vmean
    moment1 moment2""".split()  # noqa: SIM905
)
"""State entries that hold moments, as torch's optimizers and the common libraries name them: a reset fills them with
zeros.
"""


def stabilize(
    optimizer: Optimizer, *transforms: Transform, reset_interval: int = 0, moments: Iterable[str] = ()
) -> "Stabilized":
    """Put gradient transforms before ``optimizer``; the result is a torch Optimizer over the same groups and
    parameters.

    ``stabilize(torch.optim.AdamW(model.parameters()), AdaClip(), AdaGN(), reset_interval=1000)``. Learning-rate
    schedulers, hooks, ``state_dict`` and ``param_groups`` work as on any optimizer; step the result instead of the
    base. The gradients are the user's again after the step. A gradient with a NaN or Inf reaches the base as zeros and
    leaves the statistics as they were.

    Args:
        optimizer: any torch Optimizer that reads ``p.grad``.
        transforms: applied in the order given; each kind at most once.
        reset_interval: every so many steps the base's moments and step counts start anew before the step; 0 (default)
            for never.
        moments: names of state entries to reset besides the known ones (`MOMENTS`), for bases with names of their own.

    Raises:
        TypeError: ``optimizer`` is no torch Optimizer. ValueError: a transform given twice, ``reset_interval`` out of
            range, or (at the first step of a base with unknown state) entries of which it is not known whether they are
            moments. RuntimeError: a sparse gradient.
    """
    return Stabilized(optimizer, transforms, reset_interval, frozenset(moments))


class Stabilized(Optimizer):
    """What `stabilize` returns. ``base`` is the optimizer behind the transforms, ``stats`` what they saw in the last
    step.
    """

    def __init__(self, base: Optimizer, transforms: Iterable[Transform], reset_interval: int, moments: frozenset[str]):
        if not isinstance(base, Optimizer):
            raise TypeError(f"stabilize expects a torch Optimizer, got {type(base).__name__}")
        check("stabilize", reset_interval=reset_interval)
        self.transforms = tuple(transforms)
        names = [transform.name for transform in self.transforms]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"stabilize: {', '.join(twice)} is given more than once; each kind of transform goes once")
        self.base = base
        self.reset_interval = reset_interval
        self.moments = MOMENTS | moments
        self.statistics: dict[Tensor, dict[str, Tensor]] = {}
        self.stats: dict[str, Tensor] = {}
        # Optimizer.__init__ would make groups and state of its own; __setstate__ sets up the rest (hooks, profiling).
        self.__setstate__({})
        for group in self.param_groups:
            self._adopt(group)

    # ---- groups and state are the base's ----

    @property
    def param_groups(self) -> list[Group]:  # type: ignore[override]
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.base.defaults

    def add_param_group(self, param_group: Group) -> None:
        self.base.add_param_group(param_group)
        self._adopt(self.param_groups[-1])

    def _adopt(self, group: Group) -> None:
        group.setdefault(CLOCK, max((other.get(CLOCK, 0) for other in self.param_groups), default=0))
        for p in group["params"]:
            self.statistics[p] = {key: scalar(p) for key in self._keys()}

    def _keys(self) -> list[str]:
        return [f"{transform.name}.{name}" for transform in self.transforms for name in transform.scalars]

    def __getstate__(self) -> dict[str, Any]:
        own = ("base", "transforms", "reset_interval", "moments", "statistics")
        return {name: self.__dict__[name] for name in own} | {"stats": {}}

    def __repr__(self) -> str:
        chain = ", ".join(map(repr, self.transforms))
        return f"stabilize({chain}, reset_interval={self.reset_interval}) of {self.base!r}"

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
        for group in self.param_groups:
            for index, p in enumerate(group["params"]):
                if p.grad is not None and p.grad.is_sparse:
                    raise RuntimeError(
                        f"stabilize does not take sparse gradients (parameter {index} of its group has one)"
                    )
        self._advance()
        work = [bucket for group in self.param_groups for bucket in buckets(group["params"])]
        layouts = [bucket.layout for bucket in work]
        transformed = lockstep(
            [self._transformed(bucket) for bucket in work], lambda requests: combine(requests, layouts)
        )
        given: list[tuple[Tensor, Tensor]] = []
        try:
            for bucket, grads in zip(work, transformed, strict=True):
                for i, p in enumerate(bucket.params):
                    assert p.grad is not None
                    given.append((p, p.grad))
                    p.grad = _copied(grads, i, p.grad)
            self.base.step()
        finally:
            for p, grad in given:
                p.grad = grad
        measured = [
            (bucket.params, statistics(grads, bucket, torch.full_like(grads.peak, torch.nan)))
            for bucket, grads in zip(work, transformed, strict=True)
        ]
        self.stats = in_param_order(self.param_groups, measured)
        if self.reset_interval:
            self._check_moments()
        return loss

    def _transformed(self, bucket: Bucket) -> Steps[Gradients]:
        grads = yield from Gradients.measure(bucket.grads, bucket.dtype)
        finite = grads.finite.unbind()
        for transform in self.transforms:
            keys = {name: f"{transform.name}.{name}" for name in transform.scalars}
            state = {name: torch.stack([self.statistics[p][key] for p in bucket.params]) for name, key in keys.items()}
            grads, new = yield from transform(grads, state)
            for name, vector in new.items():
                for p, accepted, value in zip(bucket.params, finite, vector.unbind(), strict=True):
                    old = self.statistics[p][keys[name]]
                    old.copy_(torch.where(accepted, value, old))
        return (yield from grads.with_norms())

    # ---- moment resets ----

    def _advance(self) -> None:
        for group in self.param_groups:
            group[CLOCK] += 1
            if self.reset_interval and group[CLOCK] % self.reset_interval == 0:
                for p in group["params"]:
                    if p.grad is not None:
                        self._reset(self.base.state.get(p, {}))

    def _reset(self, state: dict[str, Any]) -> None:
        """Moments and step count as after construction: a count that went on would repeat the bias correction's
        mistake.
        """
        for name, value in state.items():
            if name in self.moments and isinstance(value, Tensor):
                value.zero_()
            elif name == "mu_product" and isinstance(value, Tensor):  # NAdam's product of momenta
                value.fill_(1)
            elif name == "step":
                state[name] = value.zero_() if isinstance(value, Tensor) else 0

    def _check_moments(self) -> None:
        known = self.moments | {"step", "mu_product"}
        unknown = sorted(
            {
                name
                for state in self.base.state.values()
                for name, value in state.items()
                if name not in known and isinstance(value, Tensor) and value.is_floating_point()
            }
        )
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
        saved = self.base.state_dict()
        state = {i: dict(entries) for i, entries in saved["state"].items()}
        for i, p in self._numbered(saved):
            state.setdefault(i, {}).update({PREFIX + key: value for key, value in self.statistics[p].items()})
        saved = {**saved, "state": state}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            saved = post_hook(self, saved) or saved
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave. The state of a bare base loads too: then the statistics start anew."""
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        theirs, ours = {}, {}
        for i, entries in state_dict["state"].items():
            ours[i] = {key.removeprefix(PREFIX): value for key, value in entries.items() if str(key).startswith(PREFIX)}
            rest = {key: value for key, value in entries.items() if not str(key).startswith(PREFIX)}
            if rest:
                theirs[i] = rest
        self.base.load_state_dict({**state_dict, "state": theirs})
        for group in self.param_groups:
            group.setdefault(CLOCK, 0)
        for i, p in self._numbered(state_dict):
            self.statistics[p] = {key: scalar(p) for key in self._keys()}
            for key, value in ours.get(i, {}).items():
                if key in self.statistics[p]:
                    self.statistics[p][key].copy_(value)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _numbered(self, saved: dict[str, Any]) -> list[tuple[Any, Tensor]]:
        ids = [i for group in saved["param_groups"] for i in group["params"]]
        return list(zip(ids, (p for group in self.param_groups for p in group["params"]), strict=True))


def _copied(grads: Gradients, i: int, like: Tensor) -> Tensor:
    """The transformed gradient ``i`` as a tensor like the one that came."""
    result = torch.empty_like(like)
    read = grads.reader(i)
    for piece, out in blocks(grads.tensors[i], local(result)):
        out.copy_(read(piece))
    return result
