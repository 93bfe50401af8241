"""Operations of `stabilize` on the optimizer behind it, of which it knows only the interface of torch.optim.

The checks of the optimizer and of a state that it loads; the entries of its state that are moments, and their reset
(`reset_`); undoing its step on some parameters without reading from a device (`Snapshot`); and stepping it on
transformed gradients (`GradientSwap`).
"""

import inspect
import itertools
import math
import operator
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

# Whether the step of a parameter counts: a vector of bools on its device, and the parameter's place in it.
Flag = tuple[Tensor, int]


def flags_of(several: Iterable[tuple[list[Tensor], Tensor]]) -> dict[Tensor, Flag]:
    """The flag of each parameter, from lists of ``k`` parameters with their flags (bool ``[k]``). All flags of a device
    are in one vector."""
    by_device: dict[torch.device, list[tuple[list[Tensor], Tensor]]] = {}
    for params, flags in several:
        by_device.setdefault(flags.device, []).append((params, flags))
    found = {}
    for lists in by_device.values():
        vector = lists[0][1] if len(lists) == 1 else torch.cat([flags for _, flags in lists])
        found.update({p: (vector, i) for i, p in enumerate(p for params, _ in lists for p in params)})
    return found


def on_host(x: Tensor) -> bool:
    """Whether a value can be read without waiting for a device."""
    return x.device.type == "cpu"


def split_by_flag(accepted: dict[Tensor, Flag], nonfinite: str) -> tuple[set[Tensor], dict[Tensor, Flag]]:
    """The parameters that the base does not step, and those that it steps and that may have to be put back afterwards.

    A parameter is left out of the step only where its flag may be read, which depends on ``nonfinite`` (see
    `stabilize`).
    """
    # "skip" reads everywhere, "restore" where no device has to be waited for, "zero" nowhere. One read for each device.
    vectors = {id(vector): vector for vector, _ in accepted.values()}
    read = [x for x in vectors.values() if nonfinite == "skip" or (nonfinite == "restore" and on_host(x))]
    if not read:
        return set(), accepted if nonfinite == "restore" else {}
    values: dict[int, list[bool]] = {id(x): x.tolist() for x in read}
    left_out = {p for p, (x, i) in accepted.items() if id(x) in values and not values[id(x)][i]}
    unread = {p: flag for p, flag in accepted.items() if id(flag[0]) not in values}
    return left_out, unread if nonfinite == "restore" else {}


class Snapshot:
    """Parameters of one device and their state before a step, from which the step is undone for some of them.

    ``flags`` (a vector of bools) has the flag of each parameter at its place in ``places``; none is read on the host.
    With ``kernels`` only the tensors whose flag is False are copied, and copied back: memory for all of them is
    reserved, but the usual step moves nothing. Without, everything is copied, and ``torch.where`` chooses.

    Counts that are Python numbers, or live on another device than the parameter (torch's step counts on the CPU, for
    parameters on a GPU), cannot be put back without reading from the device: they keep the value after the step.
    """

    def __init__(
        self,
        base: Optimizer,
        flags: Tensor,
        places: Mapping[Tensor, int],
        moments: frozenset[str],
        kernels: TritonKernels | None = None,
    ):
        self.base, self.flags, self.places, self.moments, self.kernels = base, flags, places, moments, kernels
        self.before = self._entries()
        self.tensors, counts = _all_parts(self.before)
        # The kernel knows addresses alone, and a base may give a tensor other memory (``p.data = ...``): it is kept.
        self.memory = list(map(Tensor.untyped_storage, self.tensors))
        left = range(len(self.tensors))
        if kernels is not None:
            of_flags = list(itertools.chain(*map(itertools.repeat, places.values(), counts)))
            self.saved = kernels.save_unless(flags, of_flags, self.tensors)
            left = self.saved.left_out
        # Copies of the tensors that the kernel does not serve, by number.
        self.copies = {i: self.tensors[i].detach().clone() for i in left if self.tensors[i].device == flags.device}

    def _entries(self) -> list[dict[Any, Any]]:
        """For each parameter: itself (None), and its state by name."""
        state = self.base.state
        return [{None: p, **state.get(p, {})} for p in self.places]

    def restore(self) -> None:
        """Put back the parameters whose flag is False, and their state."""
        now = self._entries()
        if self.kernels is not None:
            self.kernels.restore_unless(self.saved)
            tensors, _ = _all_parts(now)
            same = len(tensors) == len(self.tensors) and all(map(operator.is_, tensors, self.tensors))
            if same and not self.copies and list(map(Tensor.data_ptr, tensors)) == self.saved.pointers:
                return  # as usual: the step has made no other tensor, and the kernel has put back everything
        numbers = itertools.count()
        for place, entries, before in zip(self.places.values(), now, self.before, strict=True):
            known = {name: [next(numbers) for _ in _parts(x)] for name, x in before.items()}
            for name, x in entries.items():
                if known.get(name):
                    for part, i in zip(_parts(x), known[name], strict=False):
                        self._put_back(part, i, self.flags[place])
                elif name in self.moments or STARTS.get(name) is not None:  # created by this step: back to the start
                    for part in _parts(x):
                        _restore_where_false(part, torch.full_like(part, STARTS.get(name) or 0), self.flags[place])

    def _put_back(self, x: Tensor, i: int, flag: Tensor) -> None:
        """Put back ``x``, which was tensor ``i`` before."""
        if i in self.copies:
            _restore_where_false(x, self.copies[i], flag)
        elif self.kernels is not None and x.untyped_storage()._cdata != self.memory[i]._cdata:
            # The kernel has put the old memory back; the step has made other memory in its place.
            old, memory = self.tensors[i], self.memory[i]
            start = self.saved.pointers[i] - memory.data_ptr()
            if x.device == flag.device and start + old.nbytes <= memory.nbytes():
                before = old.new_empty(0).set_(memory, start // old.element_size(), (old.numel(),), (1,))
                _restore_where_false(x, before.view(old.shape), flag)


def _parts(x: Any) -> list[Tensor]:
    """The plain tensors of which an entry consists; none of a number."""
    if type(x) in PLAIN:
        return [x]
    return list(plain_parts(x)) if isinstance(x, Tensor) else []


def _all_parts(several: list[dict[Any, Any]]) -> tuple[list[Tensor], list[int]]:
    """The plain tensors of the entries of several parameters, and how many each parameter has."""
    tensors = [x for entries in several for x in entries.values()]
    if PLAIN.issuperset(map(type, tensors)):  # as usual
        return tensors, list(map(len, several))
    lists = [[part for x in entries.values() for part in _parts(x)] for entries in several]
    return list(itertools.chain(*lists)), list(map(len, lists))


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
        # Shape, dtype, device and contiguity of the gradients of the last step, and their turns: see `_divided`.
        self.layout: list[tuple[Any, ...]] = []
        self.turns: list[tuple[int, int, list[Tensor | None]]] = []

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return GradientSwap, ()  # copies and pickles do without the scratch memory

    def step(
        self,
        base: Optimizer,
        work: Sequence[Work],
        step: Callable[[], Any] | None = None,
        bad: Tensor | None = None,
        before: Callable[[list[Tensor]], list[Snapshot]] | None = None,
    ) -> None:
        """Step ``base`` (by calling ``step``, if given) on the transformed gradients ``work``.

        ``p.grad`` of all parameters must be None before, and is None again afterwards. Where ``bad`` (0-d bool) is True
        the gradients are NaN instead, for a base that leaves such tensors unchanged. ``before`` is called with the
        parameters of each turn, and the step is undone by the snapshots that it returns.
        """
        # Computed once for all turns; the plain code reads its factors tensor by tensor.
        factors = {id(g): g.factors() for g in {id(g): g for g, _, _ in work}.values() if g.kernels is not None}
        for turn, outs in self._turns(work) if goes_in_turns(base) else _one_turn(work):
            for grads, indices, targets in _by_bucket(turn, outs):
                grads.write(indices, targets, factors.get(id(grads)))
            if bad is not None:
                for out in outs:
                    out.masked_fill_(bad, math.nan)
            for (_, _, p), out in zip(turn, outs, strict=True):
                p.grad = shard_like(p, out, p.shape, p.stride()) if is_sharded(p) else out
            try:
                snapshots = before([p for _, _, p in turn]) if before else []
                (step or base.step)()
                for snapshot in snapshots:
                    snapshot.restore()
            finally:  # also after an error, and before the next turn: a base must see each gradient once
                for _, _, p in turn:
                    p.grad = None

    def _turns(self, work: Sequence[Work]) -> list[tuple[Sequence[Work], list[Tensor]]]:
        """The turns, with a tensor for each of their gradients, like it in shape and dtype, in the scratch memory."""
        given = [_original(grads, i) for grads, i, _ in work]
        layout = [(g.shape, g.dtype, g.device, g.is_contiguous()) for g in given]
        if layout != self.layout:
            self.layout, self.turns = layout, self._divided(given)
        if len(self.turns) < 2:
            return _one_turn(work)
        # Other memory formats, such as channels_last, are kept, in memory of their own.
        return [
            (work[begin:end], [torch.empty_like(given[begin + i]) if x is None else x for i, x in enumerate(outs)])
            for begin, end, outs in self.turns
        ]

    def _divided(self, given: list[Tensor]) -> list[tuple[int, int, list[Tensor | None]]]:
        """The turns of these gradients: first and end among them, and the tensors of their copies (None for a gradient
        that is not contiguous). A turn takes neighbours on one device whose sizes together are no larger than the
        largest gradient, or than `MIN_TURN_BYTES`."""
        # A turn ends before a gradient that would not fit, and where the device changes.
        sizes = [_aligned_bytes(g) for g in given]
        begins, used = [0], 0
        for i, g in enumerate(given):
            if g.device != given[begins[-1]].device or used + sizes[i] > max(*sizes, MIN_TURN_BYTES):
                begins.append(i)
                used = 0
            used += sizes[i]
        turns = list(itertools.pairwise([*begins, len(given)]))
        if len(turns) < 2:
            return [(begin, end, []) for begin, end in turns]
        # The scratch memory grows to the largest turn in the first step, then stays.
        for begin, end in turns:
            device, size = given[begin].device, sum(sizes[begin:end])
            if device not in self.scratch or self.scratch[device].numel() < size:
                self.scratch[device] = torch.empty(size, dtype=torch.uint8, device=device)
        return [(begin, end, self._allocated(given[begin:end])) for begin, end in turns]

    def _allocated(self, given: list[Tensor]) -> list[Tensor | None]:
        outs: list[Tensor | None] = []
        start = 0
        for g in given:
            room = self.scratch[g.device][start : start + g.numel() * g.element_size()]
            outs.append(room.view(g.dtype).view(g.shape) if g.is_contiguous() else None)
            start += _aligned_bytes(g)
        return outs


def _one_turn(work: Sequence[Work]) -> list[tuple[Sequence[Work], list[Tensor]]]:
    """All gradients at once, in new memory, for a base that has to see them together."""
    return [(work, [torch.empty_like(_original(grads, i)) for grads, i, _ in work])] if work else []


def _original(grads: Gradients, i: int) -> Tensor:
    """The local gradient before all transforms, whose shape, dtype and device the transformed copy has."""
    return (grads.origin or grads).tensors[i]


def _aligned_bytes(g: Tensor) -> int:
    """Bytes of a tensor, rounded up to whole cache lines of 64, which keeps every copy aligned."""
    return -(-g.numel() * g.element_size() // 64) * 64


def _by_bucket(turn: Sequence[Work], outs: list[Tensor]) -> Iterator[tuple[Gradients, list[int], list[Tensor]]]:
    """For each `Gradients` object, which writes its tensors in one call: their numbers and outputs."""
    found: dict[int, tuple[Gradients, list[int], list[Tensor]]] = {}
    for (grads, i, _), out in zip(turn, outs, strict=True):
        _, indices, targets = found.setdefault(id(grads), (grads, [], []))
        indices.append(i)
        targets.append(out)
    yield from found.values()
