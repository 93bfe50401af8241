"""Rules on how a step moves the weights, for an optimizer of any kind: cautious weight decay and the hyperball.

Both need to know the update ``u_t`` of the optimizer and not how it was computed. They therefore keep a copy of the
weights during a step, take the difference ``W_t - W_{t+1} = lr u_t``, and write the weights that the rule asks for. The
copy needs as much memory as the weights that the rule applies to. Neither rule has state, so checkpoints do not change.

* `cautious_decay`: weight decay of the entries that the update moves towards 0 (arXiv:2510.12402).
* `hyperball`: matrices keep their norm, and the size of an update is a fraction of it (AdamH, MuonH).

Sharded parameters (DTensors) are treated as whole tensors. Parameters of 16 bits are refused: rounding would hide the
update in the difference of the weights.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from evenstep.optim.distributed import Layout, Reduction, Steps, all_reduce, local, reduced, run_batched_collectives

Group = dict[str, Any]
Moved = tuple[Group, Tensor, Tensor]  # a param group, a parameter of it, and the local shard before the step


def cautious_decay(optimizer: Optimizer) -> None:
    """Apply the weight decay of ``optimizer`` only where its update moves an entry towards 0 (Cautious Weight Decay,
    arXiv:2510.12402): ``W <- W - lr (u + wd * [u W > 0] W)``, from now on and in every group.

    An entry that the step does not move has no decay, because SPAM's untrained entries and tensors with a NaN gradient
    have to stay as they are; the paper's condition is ``u W >= 0``. The option is not part of a saved state.

    Args:
        optimizer: an optimizer whose ``weight_decay`` is decoupled, such as AdamW, Muon, or any of evenstep. Its
            ``step`` is replaced on the object.

    Raises:
        ValueError: a parameter of 16 bits.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        >>> optimizer = torch.optim.SGD([w], lr=0.1, weight_decay=0.5)
        >>> cautious_decay(optimizer)
        >>> w.grad = torch.tensor([1.0, 1.0])
        >>> optimizer.step()  # both move by -0.1; the first, which moves towards 0, also decays by 5 %
        >>> w.data
        tensor([ 0.8500, -1.1000])
    """
    _refuse_16_bits("cautious_decay", (p for group in optimizer.param_groups for p in group["params"]))

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        decays = [(group, group["weight_decay"]) for group in optimizer.param_groups]
        moved = _copies((group, p) for group, decay in decays if decay for p in group["params"])
        try:
            for group, _ in decays:
                group["weight_decay"] = 0.0
            yield
        finally:  # also after an error: the groups are saved with a checkpoint
            for group, decay in decays:
                group["weight_decay"] = decay
        for group, p, old in moved:
            new = local(p)
            # 1 where u and W have the same sign. The signs are multiplied, since u W itself could underflow.
            aligned = (old - new).sign_().mul_(old.sign()).clamp_(min=0)
            new.sub_(aligned.mul_(old).mul_(group["lr"] * group["weight_decay"]))

    _step_within(optimizer, around)


def hyperball(optimizer: Optimizer, params: Iterable[Tensor], scale: float = 1.0) -> None:
    """Keep the norm of each of ``params``, and make the norm of its update the fraction ``scale * lr`` of it.

    This is Hyperball Optimization, AdamH with AdamW and MuonH with Muon (Wen, Dang, Lyu, Ma and Liang, December 2025,
    https://whenwen.github.io/wd_blog/public/hyperball-part-1.html)::

        V = W_t - scale lr ||W_t|| u_t / ||u_t||,    W_{t+1} = V ||W_t|| / ||V||

    with the Frobenius norms of whole tensors. The norm stays that of the initial weights up to rounding. Only the
    direction of the optimizer's update counts, so factors of its size, such as SPAM's re-warm-up, have no effect.

    Args:
        optimizer: any optimizer. Its ``step`` is replaced on the object.
        params: the matrices to keep on their sphere, usually those between the embedding and the last layer.
        scale: the relative step is this times the learning rate of the parameter's group. Default 1.0. The authors'
            relative steps are about 0.02, larger than usual learning rates of the other parameters.

    Raises:
        ValueError: a parameter of 16 bits, one that is not in ``optimizer``, or one with weight decay.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = torch.optim.SGD([w], lr=0.1)
        >>> hyperball(optimizer, [w])
        >>> w.grad = torch.tensor([[4.0, -3.0]])
        >>> optimizer.step()  # a turn by atan(0.1)
        >>> w.data, w.data.norm()
        (tensor([[2.5871, 4.2787]]), tensor(5.))
    """
    chosen = set(params)
    _refuse_16_bits("hyperball", chosen)
    found = {p: group for group in optimizer.param_groups for p in group["params"] if p in chosen}
    if len(found) < len(chosen):
        raise ValueError(f"hyperball: {len(chosen) - len(found)} of the parameters are not in the optimizer")
    if any(group.get("weight_decay") for group in found.values()):
        raise ValueError("hyperball: the norms are fixed, so weight decay has no use; give these groups weight_decay=0")

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        groups = optimizer.param_groups
        moved = _copies((group, p) for group in groups for p in group["params"] if p in chosen)
        yield
        layouts = [Layout.of(p) for _, p, _ in moved]
        steps = [_on_sphere(p, old, scale * group["lr"]) for group, p, old in moved]
        # Two rounds, with one message each for all parameters where they are sharded.
        run_batched_collectives(steps, lambda requests: all_reduce(requests, layouts))

    _step_within(optimizer, around)


def _on_sphere(p: Tensor, old: Tensor, fraction: Any) -> Steps[None]:
    """Write ``p`` as `hyperball` says; ``old`` is its local shard before the step, ``fraction`` scale * lr."""
    new = local(p)
    squares = yield from reduced(Reduction("sum", torch.stack([_squared_norm(old), _squared_norm(old - new)])))
    radius, length = squares[0].sqrt().unbind()  # ||W_t|| and lr ||u_t||, 0-d, fp64
    # W_t + c (W_{t+1} - W_t). Where the step has not moved the tensor c is 0: it was skipped.
    c = torch.where(length > 0, fraction * radius / length, 0.0)
    new.copy_(torch.lerp(old, new, c.to(old.dtype)))
    [square] = yield from reduced(Reduction("sum", _squared_norm(new).view(1)))
    new.mul_(torch.where(length > 0, radius / square[0].sqrt(), 1.0).to(new.dtype))


def _squared_norm(x: Tensor) -> Tensor:
    square: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64).square()
    return square


def _copies(params: Iterable[tuple[Group, Tensor]]) -> list[Moved]:
    """The parameters that the next step moves, with copies of their local shards."""
    return [(group, p, local(p).detach().clone()) for group, p in params if p.grad is not None]


def _step_within(optimizer: Optimizer, around: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
    """Replace ``optimizer.step`` by one that runs within ``around()``."""
    # torch's hooks of a step would not run after an error, and could not restore the groups then.
    inner = optimizer.step

    @torch.no_grad()
    def step(_: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:  # the weights are copied after it
            with torch.enable_grad():
                loss = closure()
        with around():
            inner()
        return loss

    # A bound method, because torch's learning rate schedulers take its __func__.
    optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]


def _refuse_16_bits(who: str, params: Iterable[Tensor]) -> None:
    for p in params:
        if p.dtype.itemsize < 4:
            raise ValueError(f"{who}: a parameter has dtype {p.dtype}, which would round the update away; use float32")
