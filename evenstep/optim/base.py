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

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from evenstep.errors import nearest
from evenstep.transforms import CHECKS, check

Group = dict[str, Any]
State = dict[str, Any]


class EvenOptimizer(Optimizer):
    """Base class. A subclass states its hyperparameters, the official names of them, its state, and `update`."""

    ALIASES: ClassVar[dict[str, str]] = {}
    """Official name -> ours."""

    def __init__(self, params: Iterable[Any], hyper: dict[str, Any], official: Mapping[str, Any], fused: bool | None):
        if fused:
            raise ValueError("fused=True was given, but this version has no fused kernels; use fused=None or False")
        defaults = _renamed(official, self.ALIASES, type(self).__name__, set(hyper))
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
        group = self._prepare_group(
            _renamed(param_group, self.ALIASES, "param group", set(self.defaults), strict=False)
        )
        for name, value in (self.defaults | group).items():
            self._check(name, value)
        group.setdefault("t", max((other["t"] for other in self.param_groups), default=0))
        super().add_param_group(group)
        added = self.param_groups[-1]
        try:
            for index, p in enumerate(added["params"]):
                _check_parameter(p, index)
                self.state[p] = self.new_state(p, added, index)
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
        measured: list[tuple[list[Tensor], dict[str, Tensor]]] = []
        for group in self.param_groups:
            group["t"] += 1
            for params in alike(group["params"]):
                measured.append((params, self.update(group, params)))
        self.stats = in_param_order(self.param_groups, measured)
        return loss

    def update(self, group: Group, params: list[Tensor]) -> dict[str, Tensor]:
        """Update ``params``, all on one device, of one state dtype and with gradients; return their statistics, vectors
        of shape ``[k]``.
        """
        raise NotImplementedError

    def _refuse_sparse_gradients(self) -> None:
        for group in self.param_groups:
            for index, p in enumerate(group["params"]):
                if p.grad is not None and p.grad.is_sparse:
                    raise RuntimeError(
                        f"{type(self).__name__} does not take sparse gradients (parameter {index} of a group has one); "
                        "use a dense embedding (sparse=False) or another optimizer for it"
                    )

    def stacked(self, params: list[Tensor], name: str) -> Tensor:
        """A scalar of the state of each parameter, as one vector."""
        return torch.stack([self.state[p][name] for p in params])

    def store(self, params: list[Tensor], where: Tensor, **vectors: Tensor) -> None:
        """Write vectors back into the scalars of the state, for the parameters where ``where`` (bool ``[k]``) holds."""
        for name, vector in vectors.items():
            for p, keep, new in zip(params, where.unbind(), vector.unbind(), strict=True):
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
        ids = [i for group in saved["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            for name, value in saved["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.detach().to(p.device, copy=True)


def clock(group: Group) -> Tensor:
    """``group["t"]`` as a 0-d float64 tensor for the arithmetic of `evenstep.transforms.clock`."""
    return torch.tensor(float(group["t"]), dtype=torch.float64)


def hyper(value: float | Tensor) -> Tensor:
    """A hyperparameter that moves with time (the learning rate) as a 0-d tensor."""
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def state_dtype(p: Tensor) -> torch.dtype:
    """fp32, or fp64 for an fp64 parameter."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def scalar(p: Tensor) -> Tensor:
    """A zero for the scalars of a parameter's state."""
    return torch.zeros((), dtype=state_dtype(p), device=p.device)


def moment(p: Tensor) -> Tensor:
    """Zeros in the shape of ``p``, for the moments of its state."""
    return torch.zeros_like(p, dtype=state_dtype(p), memory_format=torch.preserve_format)


def alike(params: list[Tensor]) -> list[list[Tensor]]:
    """The parameters that have a gradient, split by device and state dtype."""
    buckets: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in params:
        if p.grad is not None:
            buckets.setdefault((p.device, state_dtype(p)), []).append(p)
    return list(buckets.values())


def in_param_order(groups: list[Group], measured: list[tuple[list[Tensor], dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Statistics of some parameters each, as one vector per name over all parameters; NaN for those without a
    gradient.
    """
    params = [p for group in groups for p in group["params"]]
    if len(measured) == 1 and len(measured[0][0]) == len(params):
        return measured[0][1]
    place = {p: i for i, p in enumerate(params)}
    stats: dict[str, Tensor] = {}
    for some, numbers in measured:
        for name, vector in numbers.items():
            if name not in stats:
                stats[name] = vector.new_full((len(params),), math.nan)
            where = torch.tensor([place[p] for p in some], device=stats[name].device)
            stats[name].index_copy_(0, where, vector.to(stats[name]))
    return stats


def _check_parameter(p: Tensor, index: int) -> None:
    if not p.is_floating_point():
        raise ValueError(
            f"parameter {index} of the group has dtype {p.dtype}; real floating-point parameters are supported"
        )


def _renamed(
    given: Mapping[str, Any], aliases: Mapping[str, str], what: str, known: set[str], *, strict: bool = True
) -> dict[str, Any]:
    """Official names to ours. ``strict`` refuses unknown names; otherwise only those that look like a mistyped
    hyperparameter.
    """
    result: dict[str, Any] = {}
    for name, value in given.items():
        ours = aliases.get(name, name)
        if ours in result or (ours != name and ours in given):
            raise ValueError(f"{what}: {name!r} and {ours!r} are two names of one setting; give one of them")
        if ours not in known:
            hint = nearest(name, [*known, *aliases])
            if strict:
                raise TypeError(f"{what}: unknown argument {name!r}{hint}")
            if _looks_mistyped(name, known):
                raise ValueError(f"{what}: unknown option {name!r}{hint}")
        result[ours] = value
    return result


def _looks_mistyped(name: str, known: set[str]) -> bool:
    import difflib

    return name not in known and bool(difflib.get_close_matches(name, known, n=1, cutoff=0.85))
