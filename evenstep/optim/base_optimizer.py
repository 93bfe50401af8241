"""Operations of `stabilize` on the optimizer behind it, of which it knows only the interface of torch.optim.

The checks of the optimizer and of a state that it loads; the entries of its state that are moments, and their reset
(`reset_`); undoing its step on some parameters without reading from a device (`Snapshot`); and stepping it on
transformed gradients (`GradientSwap`).
"""

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from evenstep.kernels.cuda import TritonKernels
from evenstep.kernels.interface import PLAIN
from evenstep.optim.chain import PREFIX
from evenstep.optim.distributed import is_sharded, local, plain_parts, refuse_flat_shard, shard_like
from evenstep.optim.functional import Gradients

# ---- checks ----

# Names that torch's optimizers give to tensors in the shape of their parameter.
IN_SHAPE = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "exp_inf", "square_avg"})

# Where one of these entries exists, moments are compact (the masked entries, or a low-rank projection).
PARTIAL = frozenset({"mask", "projector"})

# Entries that Adam and AdamW need together: with one missing they would fail in the next step.
ADAM = frozenset({"step", "exp_avg", "exp_avg_sq"})


def check_base(base: Any) -> None:
    """TypeError for an object that is no torch Optimizer or needs its closure, ValueError for a differentiable one."""
    if not isinstance(base, Optimizer):
        raise TypeError(f"stabilize expects a torch Optimizer, got {type(base).__name__}")
    # LBFGS declares `closure` without a default; all others of torch have closure=None.
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{type(base).__name__} evaluates its closure many times a step, and transforms would not see those "
            "gradients; stabilize takes optimizers whose step() needs no closure"
        )
    # differentiable=True would need the graph of the transformed gradients.
    if any(group.get("differentiable") for group in base.param_groups):
        raise ValueError("stabilize: differentiable=True is not supported, the transforms are not differentiable")


def check_parameters(params: Iterable[Tensor]) -> None:
    """ValueError for parameters that transforms cannot treat: complex ones, and flat shards."""
    for index, p in enumerate(params):
        refuse_flat_shard(p)
        if p.is_complex() and p.requires_grad:
            raise ValueError(f"stabilize does not take complex parameters (parameter {index} of a group is {p.dtype})")


def checked_copy(base: Optimizer, numbered: list[tuple[Any, Tensor]], states: dict[Any, Any]) -> dict[Any, Any]:
    """A copy of ``states`` for ``base`` to load: torch keeps and changes the very tensors that it is given.

    ``numbered`` pairs each number in ``states`` with its parameter. Raises ValueError where an entry is missing or does
    not fit its parameter, which torch notices in the middle of a later step or never.
    """
    copied = dict(states)
    for i, p in numbered:
        saved = states.get(i)
        if not isinstance(saved, dict) or any(isinstance(value, dict) for value in saved.values()):
            continue  # nested in a way that only its library (bitsandbytes) knows
        # Checkpoint tools leave the transforms' own entries in the base's state; those are checked by their Chain.
        present = {name: x for name, x in base.state.get(p, {}).items() if not str(name).startswith(PREFIX)}
        # Entries that the base has already, or for Adam those that its first step would not create any more.
        needed = ADAM if saved.keys() & ADAM == saved.keys() and isinstance(base, torch.optim.Adam) else present.keys()
        missing = sorted(str(name) for name in needed if name not in saved)
        if missing and saved:
            raise ValueError(
                f"load_state_dict: the state of parameter {i} lacks {', '.join(missing)}; nothing was loaded"
            )
        for name, value in saved.items():
            if isinstance(value, Tensor):
                _check_shape(p, i, name, value, present.get(name), not saved.keys().isdisjoint(PARTIAL))
        copied[i] = {name: _copy(value) for name, value in saved.items()}
    return copied


def _check_shape(p: Tensor, i: Any, name: str, value: Tensor, present: Any, partial: bool) -> None:
    """ValueError where a saved entry has not the shape of the present one or, if it is a known moment, of ``p``."""
    if partial or (isinstance(present, Tensor) and present.shape == value.shape):
        return
    # Other entries (factored moments of Adafactor, scales) have shapes that only their optimizer knows.
    expected = tuple(present.shape) if isinstance(present, Tensor) else tuple(p.shape) if name in IN_SHAPE else None
    if expected is not None and tuple(value.shape) != expected and not value.numel() == p.numel() == 1:
        raise ValueError(
            f"load_state_dict: {name!r} of parameter {i} has the shape {tuple(value.shape)} where {expected} is "
            "expected; the state belongs to another model, and nothing was loaded"
        )


def _copy(value: Any) -> Any:
    # Quantised tensors of torchao cannot be cloned; they are loaded as they are.
    quantised = type(value) is not Tensor and hasattr(value, "dequantize") and not is_sharded(value)
    return value.detach().clone() if isinstance(value, Tensor) and not quantised else value


# ---- moments ----

# An entry that is missing here is found by `unknown_entries` at the first step with a reset, and named in the error.
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
"""Entries that are no moments, with their initial values (None: a reset leaves them). ``mu_product`` is NAdam's product
of momenta, ``eta`` and ``mu`` are ASGD's rates, ``qmap`` are bitsandbytes' tables.
"""


def reset_(state: dict[str, Any], moments: frozenset[str]) -> None:
    """Set moments and step counts to their initial values, in place.

    The counts belong to the moments: with a count that went on, the bias correction of small new moments would be that
    of old ones.
    """
    for name, value in state.items():
        start = 0 if name in moments else STARTS.get(name)
        if start is None:
            continue
        if not isinstance(value, Tensor):  # a count that the base keeps as a Python number
            state[name] = start
        elif hasattr(local(value), "dequantize") and type(local(value)) is not Tensor:
            # 8-bit codes: the code of 0 is not the number 0, so zeros are encoded by the tensor itself.
            local(value).copy_(torch.zeros(local(value).shape, device=value.device))
        else:
            value.fill_(start)


def unknown_entries(states: Iterable[Any], moments: frozenset[str]) -> list[str]:
    """Names of floating-point entries that may or may not be moments, so that a reset could do harm either way."""
    return sorted(
        {
            name
            for state in states
            if isinstance(state, dict)  # some bases keep global numbers in their state
            for name, value in state.items()
            if name not in moments
            and not str(name).startswith("stabilize.")
            and name not in STARTS
            and isinstance(value, Tensor)
            and value.is_floating_point()
            and value.numel() > 0
        }
    )


# ---- tensors whose gradient is not finite ----


def on_host(x: Tensor) -> bool:
    """Whether a value can be read without waiting for a device."""
    return x.device.type == "cpu"


def split_by_flag(accepted: dict[Tensor, Tensor], nonfinite: str) -> tuple[set[Tensor], set[Tensor]]:
    """The parameters that the base steps, and those among them that may have to be put back afterwards.

    ``accepted`` has a flag for each parameter with a gradient (0-d bool on its device): the gradient is finite. A
    parameter is left out of the step only where its flag may be read, which depends on ``nonfinite`` (see `stabilize`).
    """
    # "skip" reads everywhere, "restore" where no device has to be waited for, "zero" nowhere.
    read = [p for p, flag in accepted.items() if nonfinite == "skip" or (nonfinite == "restore" and on_host(flag))]
    values = _values([accepted[p] for p in read])
    stepped, was_read = set(accepted) - {p for p, good in zip(read, values, strict=True) if not good}, set(read)
    return stepped, set(accepted) - was_read if nonfinite == "restore" else set()


def _values(flags: list[Tensor]) -> list[bool]:
    """The values of 0-d tensors. One read of the device for all, or one each where there are several devices."""
    if len({flag.device for flag in flags}) == 1:
        return torch.stack(flags).tolist()
    return [bool(flag) for flag in flags]


class Snapshot:
    """Parameters and their state before a step, from which the step is undone for some of them.

    ``accepted`` says for each parameter (0-d bool on its device) whether its step counts; no flag is read on the host.
    With ``kernels`` only the tensors whose flag is False are copied, and copied back: memory for all of them is
    reserved, but the usual step moves nothing. Without, everything is copied, and ``torch.where`` chooses.

    Counts that are Python numbers, or live on another device than the parameter (torch's step counts on the CPU, for
    parameters on a GPU), cannot be put back without reading from the device: they keep the value after the step.
    """

    def __init__(
        self,
        base: Optimizer,
        accepted: Mapping[Tensor, Tensor],
        moments: frozenset[str],
        kernels: TritonKernels | None = None,
    ):
        self.base, self.accepted, self.moments, self.kernels = base, accepted, moments, kernels
        # The plain tensors of each parameter (None) and of each entry of its state. They are aliases that keep the
        # memory: a base may give a parameter other memory (``p.data = ...``), and the kernel knows addresses alone.
        self.before = {p: {name: _parts(x) for name, x in self._entries(p)} for p in accepted}
        self.copies: dict[int, Tensor] = {}  # id of a tensor that the kernel does not serve -> its copy
        flags: dict[torch.device, list[Tensor]] = {}  # one launch for each device
        served: dict[torch.device, list[tuple[int, Tensor]]] = {}  # number of the flag, and tensor
        for p, flag in accepted.items():
            of_device = flags.setdefault(flag.device, [])
            of_device.append(flag)
            for part in (part for parts in self.before[p].values() for part in parts):
                if kernels is not None and part.is_contiguous() and part.device == flag.device:
                    served.setdefault(flag.device, []).append((len(of_device) - 1, part))
                else:
                    self.copies[id(part)] = part.clone()
        self.saved = [kernels.save_unless(flags[device], served[device]) for device in served] if kernels else []

    def _entries(self, p: Tensor) -> Iterator[tuple[Any, Tensor]]:
        yield None, p
        yield from ((name, x) for name, x in self.base.state.get(p, {}).items() if isinstance(x, Tensor))

    def restore(self) -> None:
        """Put back the parameters whose flag is False, and their state."""
        for saved in self.saved:
            self.kernels.restore_unless(saved)  # type: ignore[union-attr]
        for p, flag in self.accepted.items():
            for name, x in self._entries(p):
                parts = _parts(x)
                if name in self.before[p]:
                    for part, old in zip(parts, self.before[p][name], strict=False):
                        if id(old) in self.copies:
                            _restore_where_false(part, self.copies[id(old)], flag)
                        # The kernel has put the old memory back; the step may have made other memory in its place.
                        elif part.untyped_storage()._cdata != old.untyped_storage()._cdata:
                            _restore_where_false(part, old, flag)
                elif name in self.moments or STARTS.get(name) is not None:  # created by this step: back to the start
                    for part in parts:
                        _restore_where_false(part, torch.full_like(part, STARTS.get(name) or 0), flag)


def _parts(x: Tensor) -> list[Tensor]:
    return [part.detach() for part in ([x] if type(x) in PLAIN else plain_parts(x))]


def _restore_where_false(x: Tensor, old: Tensor, flag: Tensor) -> None:
    """Overwrite ``x`` by ``old`` where ``flag`` is False, without reading the flag."""
    # Another device: see the class. Another shape: replaced by the step, for example a mask with its moments.
    if x.device == flag.device and x.shape == old.shape:
        torch.where(flag, x.detach(), old, out=x.detach())


# ---- transformed gradients ----
#
# Torch's optimizers read ``p.grad``. A second copy of all gradients would add a quarter to the memory of training
# (parameters, gradients, two moments). Where the base allows it, it is therefore stepped on some parameters at a time
# (a turn), and the copies of each turn reuse the same memory, of the size of the largest gradient. The memory is kept
# from step to step, because the operating system is slow to hand out new pages.

# Smallest size of a turn, in bytes of gradients: one step of a base costs some 0.1 ms, however small.
MIN_TURN_BYTES = 1 << 20

# Optimizers that update each parameter from its own gradient and state alone, so that several steps, each on some of
# the parameters, equal one step on all. Subclasses may differ and are not included.
PARAMETER_BY_PARAMETER = frozenset(
    getattr(torch.optim, name)
    for name in (
        "ASGD Adadelta Adafactor Adagrad Adam AdamW Adamax Muon NAdam RAdam RMSprop Rprop SGD".split()  # noqa: SIM905
    )
    if hasattr(torch.optim, name)
)

# Transformed gradients, the number of a tensor among them, and its parameter.
Work = tuple[Gradients, int, Tensor]


def goes_in_turns(base: Optimizer) -> bool:
    """Whether ``base`` may be stepped on some parameters at a time with the same result. Hooks would run repeatedly."""
    # Hooks that are registered for all optimizers (profilers) are not in these.
    hooks = base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks
    return type(base) in PARAMETER_BY_PARAMETER and not any(hooks)


class GradientSwap:
    """Puts transformed gradients into ``p.grad`` and steps a base on them."""

    def __init__(self) -> None:
        self.scratch: dict[torch.device, Tensor] = {}  # uint8, reused by every turn and every step

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return GradientSwap, ()  # copies and pickles do without the scratch memory

    def step(
        self,
        base: Optimizer,
        work: Sequence[Work],
        step: Callable[[], Any] | None = None,
        bad: Tensor | None = None,
        before: Callable[[list[Tensor]], Snapshot] | None = None,
    ) -> None:
        """Step ``base`` (by calling ``step``, if given) on the transformed gradients ``work``.

        ``p.grad`` of all parameters must be None before, and is None again afterwards. Where ``bad`` (0-d bool) is True
        the gradients are NaN instead, for a base that leaves such tensors unchanged. ``before`` is called with the
        parameters of each turn, and the step is undone by the snapshot that it returns.
        """
        # Computed once for all turns; the plain code reads its factors tensor by tensor.
        factors = {id(g): g.factors() for g in {id(g): g for g, _, _ in work}.values() if g.kernels is not None}
        # One turn holds all gradients at once, in new memory, if the base has to see them together.
        for turn in (turns := _turns(work) if goes_in_turns(base) else [list(work)] if work else []):
            outs = self._allocate(turn) if len(turns) > 1 else [torch.empty_like(_original(g, i)) for g, i, _ in turn]
            for several, targets in _by_bucket(turn, outs):
                grads = several[0][0]
                grads.write([i for _, i, _ in several], targets, factors.get(id(grads)))
            if bad is not None:
                for out in outs:
                    out.masked_fill_(bad, math.nan)
            for (_, _, p), out in zip(turn, outs, strict=True):
                p.grad = shard_like(p, out, p.shape, p.stride())
            try:
                snapshot = before([p for _, _, p in turn]) if before else None
                (step or base.step)()
                if snapshot is not None:
                    snapshot.restore()
            finally:  # also after an error, and before the next turn: a base must see each gradient once
                for _, _, p in turn:
                    p.grad = None

    def _allocate(self, turn: list[Work]) -> list[Tensor]:
        """A tensor for each gradient of a turn, like it in shape and dtype, in the scratch memory."""
        given = [_original(grads, i) for grads, i, _ in turn]
        # Grows to the largest turn in the first step, then stays.
        size, device = sum(map(_aligned_bytes, given)), given[0].device
        if device not in self.scratch or self.scratch[device].numel() < size:
            self.scratch[device] = torch.empty(size, dtype=torch.uint8, device=device)
        outs, start = [], 0
        for g in given:
            room = self.scratch[device][start : start + g.numel() * g.element_size()]
            # Other memory formats, such as channels_last, are kept, in memory of their own.
            outs.append(room.view(g.dtype).view(g.shape) if g.is_contiguous() else torch.empty_like(g))
            start += _aligned_bytes(g)
        return outs


def _original(grads: Gradients, i: int) -> Tensor:
    """The local gradient before all transforms, whose shape, dtype and device the transformed copy has."""
    return (grads.origin or grads).tensors[i]


def _aligned_bytes(g: Tensor) -> int:
    """Bytes of a tensor, rounded up to whole cache lines of 64, which keeps every copy aligned."""
    return -(-g.numel() * g.element_size() // 64) * 64


def _turns(work: Sequence[Work]) -> list[list[Work]]:
    """Split ``work`` into turns: neighbours on one device whose gradients together are no larger than the largest
    gradient, or than `MIN_TURN_BYTES`."""
    # A turn ends before a gradient that would not fit, and where the device changes.
    most = max([_aligned_bytes(_original(grads, i)) for grads, i, _ in work], default=0)
    turns: list[list[Work]] = []
    used, device = 0, None  # bytes and device of the present turn
    for grads, i, p in work:
        g = _original(grads, i)
        if not turns or g.device != device or used + _aligned_bytes(g) > max(most, MIN_TURN_BYTES):
            turns.append([])
            used, device = 0, g.device
        turns[-1].append((grads, i, p))
        used += _aligned_bytes(g)
    return turns


def _by_bucket(turn: list[Work], outs: list[Tensor]) -> Iterator[tuple[list[Work], list[Tensor]]]:
    """The items of a turn and their outputs, grouped by the `Gradients` object that writes them in one call."""
    for _, pairs in itertools.groupby(zip(turn, outs, strict=True), key=lambda pair: id(pair[0][0])):
        several = list(pairs)
        yield [item for item, _ in several], [out for _, out in several]
