"""The state of any optimizer, seen from outside: which entries are moments, how they start anew, and how a step on some
of the parameters is undone without asking the device.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from evenstep.optim.sharding import local

MOMENTS = frozenset(
    """exp_avg exp_avg_sq exp_avg_diff exp_inf max_exp_avg_sq max_exp_avg_sqs momentum_buffer momentum square_avg
    grad_avg acc_delta sum row_var col_var variance exp_avg_sq_row exp_avg_sq_col exp_grad_adanorm
    state1 state2 absmax1 absmax2 max1 max2 new_max1 new_max2 unorm_vec gnorm_vec
    m v vmean moment1 moment2""".split()  # noqa: SIM905
)
"""State entries that hold moments (or, for 8-bit ones, their scales), as torch's optimizers, pytorch_optimizer, torchao
and bitsandbytes name them: a reset fills them with zeros.
"""

STARTS = {"step": 0, "mu_product": 1, "eta": None, "mu": None, "qmap1": None, "qmap2": None}
"""Entries that are no moments, with what they start from (None: they stay as they are). ``mu_product`` is NAdam's
product of momenta, ``eta`` and ``mu`` are ASGD's rates, ``qmap`` are bitsandbytes' tables.
"""


def reset_(state: dict[str, Any], moments: frozenset[str]) -> None:
    """Moments and step count as after construction: a count that went on would repeat the bias correction's mistake."""
    for name, value in state.items():
        start = 0 if name in moments else STARTS.get(name)
        if start is None:
            continue
        if not isinstance(value, Tensor):
            state[name] = start
        elif hasattr(local(value), "dequantize") and type(local(value)) is not Tensor:
            local(value).copy_(torch.zeros(local(value).shape, device=value.device))
        else:
            value.fill_(start)


def unknown_entries(states: Iterable[Any], moments: frozenset[str]) -> list[str]:
    """Names of floating-point entries of which it is not known whether they are moments."""
    return sorted(
        {
            name
            for state in states
            if isinstance(state, dict)  # some bases keep numbers of no parameter there
            for name, value in state.items()
            if name not in moments
            and not str(name).startswith("stabilize.")
            and name not in STARTS
            and isinstance(value, Tensor)
            and value.is_floating_point()
            and value.numel() > 0
        }
    )


def on_host(x: Tensor) -> bool:
    """Whether a value can be read without waiting for a device."""
    return x.device.type == "cpu"


def divided(accepted: dict[Tensor, Tensor], nonfinite: str) -> tuple[set[Tensor], list[Tensor]]:
    """Parameters that the base is to step, and those among them that may have to be put back afterwards, by whether
    their flags (0-d bool: the gradient is good) may be read.
    """
    read = [p for p, flag in accepted.items() if nonfinite == "skip" or (nonfinite == "restore" and on_host(flag))]
    values = _values([accepted[p] for p in read])
    stepped = set(accepted) - {p for p, good in zip(read, values, strict=True) if not good}
    return stepped, [p for p in accepted if p not in set(read)] if nonfinite == "restore" else []


def _values(flags: list[Tensor]) -> list[bool]:
    """The values of 0-d tensors: one read of the device (one each, where there are several devices)."""
    if len({flag.device for flag in flags}) == 1:
        return torch.stack(flags).tolist()
    return [bool(flag) for flag in flags]


class Snapshot:
    """Parameters and their state before a step, to be put back on the device where a step should not have been.

    It holds a copy of each tensor until then. Counts that are Python numbers, or live on another device than the
    parameter (torch's step counts on the CPU, for parameters on a GPU), cannot be put back without asking the device
    and go on.
    """

    def __init__(self, base: Optimizer, params: list[Tensor], moments: frozenset[str]):
        self.base, self.params, self.moments = base, params, moments
        self.weights = [_copies(p) for p in params]
        self.states = [
            {name: _copies(value) for name, value in base.state.get(p, {}).items() if isinstance(value, Tensor)}
            for p in params
        ]

    def restore(self, accepted: list[Tensor]) -> None:
        """Put back what belongs to the parameters whose flag (0-d bool) is False."""
        for p, flag, weights, before in zip(self.params, accepted, self.weights, self.states, strict=True):
            _put_back(p, weights, flag)
            for name, value in self.base.state.get(p, {}).items():
                if not isinstance(value, Tensor):
                    continue
                if name in before:
                    _put_back(value, before[name], flag)
                elif name in self.moments or STARTS.get(name) is not None:  # made by this step
                    _put_back(value, [torch.full_like(x, STARTS.get(name) or 0) for x in _plain(value)], flag)


def _plain(x: Tensor) -> Iterator[Tensor]:
    """The plain tensors that ``x`` is made of: the part of a DTensor that is here, codes and scales of 8-bit blocks."""
    x = local(x)
    if hasattr(type(x), "__tensor_flatten__"):
        for part in (getattr(x, name) for name in x.__tensor_flatten__()[0]):  # type: ignore[attr-defined]
            yield from _plain(part)
    else:
        yield x.detach()


def _copies(x: Tensor) -> list[Tensor]:
    return [part.clone() for part in _plain(x)]


def _put_back(x: Tensor, saved: list[Tensor], flag: Tensor) -> None:
    for part, old in zip(_plain(x), saved, strict=False):
        if part.device == flag.device and part.shape == old.shape:
            torch.where(flag, part, old, out=part)
