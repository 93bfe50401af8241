"""State of parameters and groups: clocks, fp32, bf16 and 8-bit moments, exact loading, and statistics by parameter.

The functions here are the parts of `evenstep.optim.optimizer` that are not the step itself. Everything that is saved is
a tensor in ``state[p]`` or a number in a param group, under a name of its meaning.
"""

import functools
import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from evenstep.kernels.interface import STATS, constant, is_coded, uploaded
from evenstep.optim.distributed import (
    Bucket,
    first_entry,
    local,
    num_shards,
    refuse_flat_shard,
    shard_like,
    state_dtype,
)
from evenstep.optim.functional import opened
from evenstep.optim.rounding import noise_seeds

Group = dict[str, Any]  # a param group: "params", the options by name, and the step clock "t"
State = dict[str, Any]  # the state of one parameter, by name

# ---- clocks ----


def with_tensor_clock(group: Group) -> Group:
    """The options of a group for the plain step, with ``t`` and ``lr``, which change with time, as 0-d tensors.

    Both are float64 (a tensor given as ``lr`` keeps its dtype), so that ``cos(pi t / T)`` is exact for long runs. A
    compiled step takes tensors as inputs; Python numbers would be compiled in, with a new graph at every step.
    """
    # On the CPU: a 0-d CPU tensor mixes with tensors of any device without a copy.
    t, lr = group["t"], group["lr"]
    return group | {
        # fp64 counts to 2^53 exactly; fp32 would stop at 2^24 steps.
        "t": t.to(torch.float64)
        if isinstance(t, Tensor)
        else torch.tensor(float(t), dtype=torch.float64, device="cpu"),
        "lr": lr.reshape(()) if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64, device="cpu"),
    }


def latest_clock(clocks: list[Any]) -> Any:
    """The largest of the clocks of several groups, 0 for none. A clock on a device is not read: the result is then a
    tensor there."""
    # Groups under `capturable` have tensors, others numbers; both kinds may occur together.
    if not any(isinstance(t, Tensor) for t in clocks):
        return max(clocks, default=0)
    device = next(t.device for t in clocks if isinstance(t, Tensor))  # the first capturable group's
    return torch.stack([torch.as_tensor(t, dtype=torch.int64).to(device) for t in clocks]).amax()


def place_clock(group: Group) -> None:
    """Under ``capturable`` the clock lives on the device, where a replayed CUDA graph can advance it."""
    if group["capturable"]:
        if group.get("density", 1) != 1:  # a replayed graph would train with one mask for ever
            raise ValueError("capturable=True does not go with density < 1, whose masks are drawn on the host")
        device = group["params"][0].device if group["params"] else "cpu"
        # A copy, because groups advance their clocks in place.
        group["t"] = torch.as_tensor(group["t"], dtype=torch.int64).to(device, copy=True)
    else:
        group["t"] = int(group["t"])


def is_trained(p: Tensor) -> bool:
    """Whether a parameter needs state: it is not frozen, or it has a gradient although it is."""
    return p.requires_grad or p.grad is not None


def untouched(entries: State) -> bool:
    """Whether saved entries belong to a parameter that was never updated, so that they need not be loaded: all are
    zero, and there is no mask.
    """
    return "mask" not in entries and all(
        isinstance(x, Tensor) and not x.is_meta and not opened(local(x), torch.float32).any() for x in entries.values()
    )


# ---- checks and exact loading ----


def check_parameter(p: Tensor, index: int) -> None:
    """ValueError for a parameter (number ``index`` of its group) that no optimizer of evenstep can update: integers,
    complex numbers, flat shards."""
    if not p.is_floating_point():
        raise ValueError(
            f"parameter {index} of the group has dtype {p.dtype}; real floating-point parameters are supported"
        )
    refuse_flat_shard(p)


def restore_exactly(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Replace the loaded state of ``optimizer`` by the values in ``saved``, bit for bit.

    Hazard: ``torch.optim.Optimizer.load_state_dict`` casts every floating-point entry to the dtype of its parameter,
    which rounds fp32 moments under bf16 parameters.
    """
    for group in optimizer.param_groups:
        place_clock(group)
    for p, entries in _numbered(optimizer, saved):
        for name, value in entries.items():
            if isinstance(value, Tensor):  # cloned: the caller may go on with its state dict
                optimizer.state[p][name] = value.detach().to(p.device).clone()


def keep_dtypes(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """`restore_exactly` for optimizers of any kind, after they have loaded ``saved``: a tensor is replaced only where
    its dtype differs from the saved one, and stays on the device that the optimizer chose."""
    # Used for optimizers of other libraries, whose groups and clocks are not known here.
    for p, entries in _numbered(optimizer, saved):
        state = optimizer.state.get(p, {})
        for name, value in entries.items():
            loaded = state.get(name)
            if isinstance(value, Tensor) and isinstance(loaded, Tensor) and loaded.dtype != value.dtype:
                state[name] = value.detach().to(loaded.device).clone()


def _numbered(optimizer: Optimizer, saved: dict[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
    """Pairs of a parameter and its entries in ``saved``."""
    # A saved state numbers the parameters through all groups.
    # strict: torch has compared the numbers of groups and parameters before.
    ids = [i for group in saved["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [(p, saved["state"].get(i, {})) for i, p in zip(ids, params, strict=True)]


# ---- state of a parameter ----


def rounding(group: Group, bucket: Bucket) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The inputs of rounding for each parameter of a bucket: Kahan compensation and seeds of stochastic rounding, None
    where the option ``rounding`` of the group does not need them."""
    lost: list[Tensor | None] = [None] * len(bucket.shards)
    seeds: list[Tensor | None] = [None] * len(bucket.shards)
    if group["rounding"] == "kahan":
        lost = [local(state["compensation"]) if "compensation" in state else None for state in bucket.states]
    elif group["rounding"] == "stochastic":
        # One tensor of k seeds, made of step and place; unbound into 0-d views.
        starts = [first_entry(p) for p in bucket.params] if bucket.layout.cuts else None
        seeds[:] = noise_seeds(torch.as_tensor(group["t"]), group["places"], bucket.shards[0].device, starts)
    return lost, seeds


def scalar(p: Tensor) -> Tensor:
    """A zero for the scalars of a parameter's state: 0-d, fp32 or fp64. In bf16 a running mean with decay 0.999 stalls,
    because its increments are below half of the gap between neighbours."""
    return torch.zeros((), dtype=state_dtype(p), device=p.device)


@functools.cache
def _eight_bit_blocks() -> Any:
    """The class of torchao's 8-bit codes, extended by ``clone``, which copying an optimizer needs."""
    # On a CPU, torchao 0.18 logs several warnings about its libraries for GPUs while it is imported.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        # At construction, not in the middle of a run.
        raise ImportError("state='int8' needs torchao (pip install torchao); state='bf16' does without") from error
    finally:
        logging.disable(before)

    # torchao dispatches by operator, and copy.deepcopy calls clone, which its class does not implement.
    def clone(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        x = args[0]
        return OptimState8bit(x.codes.clone(), x.scale.clone(), x.qmap.clone(), x.signed, x.dtype)

    OptimState8bit.implements(torch.ops.aten.clone.default)(clone)
    return OptimState8bit


def moment(p: Tensor, stored: str = "fp32", *, signed: bool = True) -> Tensor:
    """Zeros in the shape of ``p`` for a moment of its state: fp32 (fp64 for fp64 parameters), bf16 or 8-bit blocks.

    The 8-bit format is torchao's: blocks of 256 entries with an fp32 scale each and a dynamic map of 256 values,
    ``signed`` for first moments. As in torchao, tensors of fewer than 4096 entries, or not a multiple of 256, stay
    fp32.
    """
    # zeros_like of a DTensor is a DTensor, so that checkpoints know how a moment is sharded.
    if stored == "int8":
        blocks = _eight_bit_blocks()
        shard = local(p)
        # A block may not cross the border of a shard, and all shards must have the same size.
        if shard.numel() * num_shards(p) == p.numel() >= 4096 and shard.numel() % 256 == 0:
            return shard_like(p, blocks.zeros(shard.shape, signed, 256, p.device))
    # preserve_format: a channels_last parameter has channels_last moments, so that all are read in one order.
    dtype = torch.bfloat16 if stored == "bf16" else state_dtype(p)
    return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)


def adam_moments(p: Tensor, stored: str) -> State:
    """The first and second moment of Adam for ``p``, zero. Codes of second moments need no sign."""
    return {"exp_avg": moment(p, stored), "exp_avg_sq": moment(p, stored, signed=False)}


def largest_stored(moments: Iterable[Tensor], dtype: torch.dtype) -> float:
    """The largest number of ``dtype`` that all of these moments can hold. bf16 and 8-bit blocks count as fp32, whose
    exponents bf16 and the blocks' scales have."""
    # fp64 moments of fp64 parameters alone hold squares above 3.4e38.
    whole = dtype == torch.float64 and all(x.dtype == torch.float64 and not is_coded(x) for x in moments)
    return torch.finfo(torch.float64 if whole else torch.float32).max


# ---- masks: one bit per entry ----


def pack(mask: Tensor) -> Tensor:
    """A bool tensor as packed bits (uint8 ``[ceil(n / 8)]``), in the order of the flattened tensor, on its device."""
    return torch.from_numpy(np.packbits(mask.detach().reshape(-1).cpu().numpy(), bitorder="little")).to(mask.device)


def unpack(bits: Tensor, n: int) -> Tensor:
    """The first ``n`` bits as a flat bool tensor."""
    # Little endian: bit i of byte j is entry 8 j + i, as kernels/interface.py says.
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(1) >> shifts) & 1).view(-1)[:n].bool()


# ---- statistics ----


# Statistics of a bucket: a vector ``[k]`` for each name; or one tensor with the rows `STATS`, from a fused step.
BucketStats = dict[str, Tensor] | Tensor


def in_param_order(groups: list[Group], measured: Sequence[tuple[list[Tensor], BucketStats]]) -> dict[str, Tensor]:
    """Statistics of all parameters, one vector per name in the order of the groups; NaN for parameters without a
    gradient.

    ``measured`` has the parameters of each bucket with their statistics. Nothing waits for a device.
    """
    if not measured:  # no parameter has a gradient, or none is left in the groups
        return {}
    params = [p for group in groups for p in group["params"]]
    measured_params = [p for bucket, _ in measured for p in bucket]
    several = [numbers for _, numbers in measured]
    names = _names(several[0])
    # Usually the buckets hold all parameters in order, and their vectors are concatenated.
    complete = len(measured_params) == len(params) and all(_names(numbers) == names for numbers in several)
    if complete and all(p is q for p, q in zip(measured_params, params, strict=True)):
        if len(several) == 1:
            return dict(_named(several[0]))
        # All names together: [names, k] per bucket, so that the number of launches does not grow with the names.
        rows = [x if isinstance(x, Tensor) else torch.stack(list(x.values())) for x in several]
        like = torch.empty(0, dtype=rows[0].dtype, device=_home(rows))
        return dict(zip(names, torch.cat([_brought(row, like) for row in rows], dim=1).unbind(), strict=True))
    # Otherwise each value is written to the place of its parameter.
    place = {p: i for i, p in enumerate(params)}
    stats: dict[str, Tensor] = {}
    device = _home([vector for numbers in several for _, vector in _named(numbers)])
    for bucket, numbers in measured:
        where = [place[p] for p in bucket]
        for name, vector in _named(numbers):
            if name not in stats:
                stats[name] = vector.new_full((len(params),), math.nan, device=device)
            stats[name].index_copy_(0, constant(where, torch.int64, device), _brought(vector, stats[name]))
    return stats


def _names(numbers: BucketStats) -> list[str]:
    return list(STATS if isinstance(numbers, Tensor) else numbers)


def _named(numbers: BucketStats) -> Iterable[tuple[str, Tensor]]:
    """Pairs of a name and its vector."""
    return zip(STATS, numbers.unbind(), strict=True) if isinstance(numbers, Tensor) else numbers.items()


def _home(tensors: list[Tensor]) -> torch.device:
    """The device for statistics of parameters on several devices: the first that is not the CPU, because a copy to the
    CPU would wait for the device."""
    devices = [x.device for x in tensors]
    return next((device for device in devices if device.type != "cpu"), devices[0] if devices else torch.device("cpu"))


def _brought(vector: Tensor, like: Tensor) -> Tensor:
    """``vector`` on the device and in the dtype of ``like``, without waiting for it."""
    # Through pinned memory: an ordinary copy from the CPU waits until the device has done its queued work.
    if vector.device.type == "cpu" != like.device.type:
        vector = uploaded(vector, like.device)
    return vector.to(like)


def refuse_sparse_gradients(who: str, groups: list[Group], params: Iterable[Tensor]) -> None:
    """RuntimeError where one of ``params``, which belong to ``groups``, has a sparse gradient. ``who`` begins it."""
    for p in params:
        # Only now is the place of the parameter searched: the step itself needs one attribute per parameter.
        if (grad := p.grad) is not None and grad.is_sparse:
            place, index = next(
                (i, j) for i, group in enumerate(groups) for j, q in enumerate(group["params"]) if q is p
            )
            raise RuntimeError(
                f"{who} does not take sparse gradients (parameter {index} of group {place} has one); use a dense "
                "embedding (sparse=False) or another optimizer for it"
            )
