"""What all optimizers of evenstep share: groups, clocks, state, and exact resume.

The rules that keep a run exact, wherever it is stopped and resumed:

* One clock per meaning. ``group["t"]`` counts ``step()`` calls and drives schedules and resets; ``n`` of a parameter
  counts the updates that entered its statistics; ``age`` counts its updates since its moments were last reset. None of
  them is kept on the optimizer itself.
* State is created when a parameter is added, in fp32 (fp64 for fp64 parameters), and loaded bit for bit: torch casts
  loaded state to the parameter's dtype, which would round it under bf16 parameters, so the exact values are put back
  afterwards.
* ``step()`` reads ``p.grad`` and never writes to it, asks no device for a value, and decides nothing by a tensor's
  value: a gradient with a NaN or Inf leaves its parameter and state as they were by arithmetic, not by a branch.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from evenstep.optim.names import renamed, without_inert
from evenstep.optim.sharding import Bucket, buckets, combine, local, state_dtype
from evenstep.optim.state import Group, State, in_param_order, place_clock
from evenstep.transforms import CHECKS, Gradients, Steps, Weights, check, lockstep


class EvenOptimizer(Optimizer):
    """Base class. A subclass states its hyperparameters, the official names of them, its state, and `update`."""

    ALIASES: ClassVar[dict[str, str]] = {}
    """Official name -> ours."""

    def __init__(self, params: Iterable[Any], hyper: dict[str, Any], official: Mapping[str, Any], fused: bool | None):
        if fused:
            raise ValueError("fused=True was given, but this version has no fused kernels; use fused=None or False")
        defaults = renamed(without_inert(official), self.ALIASES, type(self).__name__, set(hyper))
        self.stats: dict[str, Tensor] = {}
        super().__init__(params, hyper | defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("stats", {})  # not part of a copy or a saved state

    # ---- groups and state ----

    def add_param_group(self, param_group: Group) -> None:
        """As torch's. Official names are translated, every hyperparameter is checked, and the state is created at once.

        A group added late starts at the clock of the others. Raises ValueError for a value out of range or a mistyped
        name.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"a param group is a dict with 'params' and options, got {type(param_group).__name__}")
        group = self._prepare_group(renamed(param_group, self.ALIASES, "param group", set(self.defaults), strict=False))
        for name, value in (self.defaults | group).items():
            self._check(name, value)
        group.setdefault("t", max((int(other["t"]) for other in self.param_groups), default=0))
        super().add_param_group(group)
        added = self.param_groups[-1]
        try:
            place_clock(added)
            for index, p in enumerate(added["params"]):
                _check_parameter(p, index)
                self.state[p] = self.new_state(p, added, index)
                if added["rounding"] == "kahan" and p.dtype != state_dtype(p):
                    self.state[p]["compensation"] = torch.zeros_like(p)
        except Exception:
            self.param_groups.pop()
            raise

    def _prepare_group(self, group: Group) -> Group:
        return group

    def _check(self, name: str, value: Any) -> None:
        if name in self.defaults and name in CHECKS:
            check(type(self).__name__, **{name: value})

    def new_state(self, p: Tensor, group: Group, index: int) -> State:
        """The state of a new parameter, the ``index``-th of its group."""
        raise NotImplementedError

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
        self._refuse_sparse_gradients()
        for group in self.param_groups:
            group["t"] += 1
        self._update([(group, bucket) for group in self.param_groups for bucket in buckets(group["params"])])
        return loss

    def _update(self, work: list[tuple[Group, Bucket]]) -> None:
        layouts = [bucket.layout for _, bucket in work]
        steps = [self.update(group, bucket) for group, bucket in work]
        numbers = lockstep(steps, lambda requests: combine(requests, layouts))
        measured = [(bucket.params, found) for (_, bucket), found in zip(work, numbers, strict=True)]
        self.stats = in_param_order(self.param_groups, measured)

    def update(self, group: Group, bucket: Bucket) -> Steps[dict[str, Tensor]]:
        """Update the parameters of ``bucket``; return their statistics, vectors of shape ``[k]``."""
        raise NotImplementedError

    def gradients(self, group: Group, bucket: Bucket) -> Steps[Gradients]:
        return Gradients.measure(bucket.grads, bucket.dtype, -1.0 if group["maximize"] else 1.0)

    def weights(self, group: Group, bucket: Bucket) -> Weights:
        """The parameters of ``bucket`` with what their rounding needs."""
        if group["rounding"] == "nearest" or all(p.dtype == bucket.dtype for p in bucket.here):
            return Weights(bucket.here)
        if group["rounding"] == "kahan":
            return Weights(bucket.here, lost=self.parts(bucket, "compensation"))
        index = {p: i for i, p in enumerate(group["params"])}
        place = next(i for i, other in enumerate(self.param_groups) if other is group)
        # Seeded by step and place: resumable, equal on replicas, and the global generators stay as they are.
        seeds = [((int(group["t"]) * 1_000_003 + place) * 1_000_003 + index[p]) % 2**62 for p in bucket.params]
        noise = [torch.Generator(p.device).manual_seed(seed) for p, seed in zip(bucket.here, seeds, strict=True)]
        return Weights(bucket.here, noise=noise)

    def parts(self, bucket: Bucket, name: str) -> list[Tensor]:
        """What is here of one entry of the state of each parameter."""
        return [local(self.state[p][name]) for p in bucket.params]

    def _refuse_sparse_gradients(self) -> None:
        for group in self.param_groups:
            for index, p in enumerate(group["params"]):
                if p.grad is not None and p.grad.is_sparse:
                    raise RuntimeError(
                        f"{type(self).__name__} does not take sparse gradients (parameter {index} of a group has one); "
                        "use a dense embedding (sparse=False) or another optimizer for it"
                    )

    def stacked(self, bucket: Bucket, name: str) -> Tensor:
        """A scalar of the state of each parameter, as one vector."""
        return torch.stack([self.state[p][name] for p in bucket.params])

    def store(self, bucket: Bucket, where: Tensor, **vectors: Tensor) -> None:
        """Write vectors back into the scalars of the state, for the parameters where ``where`` (bool ``[k]``) holds."""
        for name, vector in vectors.items():
            for p, keep, new in zip(bucket.params, where.unbind(), vector.unbind(), strict=True):
                old = self.state[p][name]
                old.copy_(torch.where(keep, new, old))

    # ---- saving and loading ----

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps its own dtype bit for bit whatever the dtype of the parameters."""
        final: dict[str, Any] = {}
        hooks = [
            self.register_load_state_dict_pre_hook(lambda _, given: final.update(given)),
            self.register_load_state_dict_post_hook(lambda _: self._restore_exactly(final), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _restore_exactly(self, saved: dict[str, Any]) -> None:
        for group in self.param_groups:
            place_clock(group)
        ids = [i for group in saved["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            for name, value in saved["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.detach().to(p.device, copy=True)


def _check_parameter(p: Tensor, index: int) -> None:
    if not p.is_floating_point():
        raise ValueError(
            f"parameter {index} of the group has dtype {p.dtype}; real floating-point parameters are supported"
        )
