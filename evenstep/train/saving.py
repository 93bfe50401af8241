"""The tensors of a checkpoint: their names, the background writer, and reading them back.

The tensors of the model are named ``model.NAME``, those of the optimizer ``optimizer.NAME.ENTRY``. Entries of the
optimizer's state that are not tensors of a parameter, and the options of its groups, are stored in trainer.pt.

`Saver.save` copies the tensors to the CPU (into pinned memory if there is a GPU) and returns. A thread writes the
copies with torch.distributed.checkpoint. Every process hashes its own shards; process 0 writes the manifest and renames
the directory. The next save waits for the previous one. An error in the background is raised by the next `wait`, on
all processes.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from evenstep.baselines.state_size import tensors_in
from evenstep.errors import EvenstepError
from evenstep.models.hf import require_safetensors
from evenstep.optim.distributed import is_sharded, local, num_shards, shard_like
from evenstep.optim.state import keep_dtypes
from evenstep.train.checkpoint import SHARD, begin, commit, could_not_save, facts_of, fill, quiet_dcp, shard_metadata
from evenstep.train.distributed import World

# ---- quantised state tensors: codes and scales (torchao's classes, also used for state="int8") ----

_CLASSES = {
    "OptimState8bit": "torchao.optim.subclass_8bit",
    "OptimState4bit": "torchao.optim.subclass_4bit",
    "OptimStateFp8": "torchao.optim.subclass_fp8",
}
_PARTS = ("codes", "scale")
"""The tensors inside a quantised tensor that a checkpoint stores, each under its own key. The table of code values is a
constant of the class."""


def packed_facts(value: Any) -> dict[str, Any] | None:
    """The arguments with which `empty_packed` recreates a quantised tensor; None for plain tensors. EvenstepError for
    an unknown tensor subclass."""
    if not isinstance(value, Tensor) or not is_traceable_wrapper_subclass(local(value)):
        return None
    part: Any = local(value)
    name, module = type(part).__name__, type(part).__module__
    if _CLASSES.get(name) != module:
        raise EvenstepError(
            f"a checkpoint cannot store the tensor subclass {module}.{name} of an optimizer's state; choose an "
            "optimizer whose state has plain tensors, or one of torchao"
        )
    return {
        "class": name,
        "signed": getattr(part, "signed", None),
        "block": int(part.block_size),
        "dtype": part.dtype,
    }


def packed_tensors(value: Tensor) -> dict[str, Tensor]:
    """The plain tensors inside a quantised tensor, by name; they share its memory."""
    return {name: shard_like(value, getattr(local(value), name)) for name in _PARTS}


def empty_packed(p: Tensor, facts: dict[str, Any]) -> Tensor | None:
    """A quantised tensor of zeros for the parameter ``p``, with the class and format of ``facts`` and the sharding of
    ``p``. None if a shard is not a whole number of blocks. EvenstepError for a class that is unknown or not
    installed."""
    # A block of `block` consecutive entries has one scale. A shard that ends within a block has no scale of its own.
    part, block, name = local(p), facts["block"], facts["class"]
    if part.numel() * num_shards(p) != p.numel() or not part.numel() or part.numel() % block:
        return None
    try:
        cls = getattr(importlib.import_module(_CLASSES[name]), name)
    except (KeyError, ImportError):
        raise EvenstepError(f"the checkpoint stores optimizer state as {name}; pip install torchao") from None
    signed = () if facts["signed"] is None else (facts["signed"],)
    return shard_like(p, cls.zeros(part.shape, *signed, block, part.device, dtype=facts["dtype"]))


# ---- shards ----


def write(directory: Path, tensors: dict[str, Tensor], group: Any) -> None:
    """Write ``tensors`` into shards in ``directory``. Each process of ``group`` writes its own shards; None: a single
    process."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    quiet_dcp()
    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)


# ---- the tensors of a model and of its optimizer ----


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the model by key; they share the memory of the model. A tied weight appears under its first name
    only, because safetensors refuses keys that share memory."""
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in model.named_parameters()}
    return {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items() if name not in tied}


def _names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """The names of the parameters, in the order of the optimizer."""
    known = {id(p): name for name, p in model.named_parameters()}
    return [known[id(p)] for group in optimizer.param_groups for p in group["params"]]


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the state by key, which share its memory, and the rest of ``optimizer.state_dict()``.

    The rest has the keys ``groups`` (options, and names of the parameters instead of numbers), ``values`` (entries that
    are not tensors: name -> entry -> value), ``packed`` (name -> entry -> `packed_facts` of a quantised tensor),
    ``loose`` (state that belongs to no parameter) and ``more`` (keys other than ``state`` and ``param_groups``).

    EvenstepError for state that a checkpoint cannot store.
    """
    names, saved = _names(model, optimizer), optimizer.state_dict()
    params = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {}
    held: set[int] = set()
    rest: dict[str, Any] = {"groups": [], "values": {}, "packed": {}, "loose": {}, "more": {}}
    # torch numbers the parameters through all groups. Names take the place of the numbers here, so that a resumed run
    # may divide its parameters into other groups.
    for i, state in saved["state"].items():
        if not _is_of_parameter(i, names):
            rest["loose"][i] = state
            continue
        name = names[i]
        for entry, value in state.items():
            key = f"optimizer.{name}.{entry}"
            if not isinstance(value, Tensor):
                if is_sharded(params[name]) and next(tensors_in(value), None) is not None:
                    raise EvenstepError(
                        f"the state '{entry}' of {name} has tensors inside a {type(value).__name__}, which differ "
                        "between processes and cannot be stored in a checkpoint; give parallel.mode ddp"
                    )
                rest["values"].setdefault(name, {})[entry] = value  # a number, equal on all processes
            elif (facts := packed_facts(value)) is not None:
                rest["packed"].setdefault(name, {})[entry] = facts
                tensors |= {f"{key}.{part}": tensor for part, tensor in packed_tensors(value).items()}
            else:
                # A tensor that all parameters share, such as the statistics of a global norm, is written for each of
                # them: safetensors refuses keys that share memory.
                tensors[key] = value.detach().clone() if id(value) in held else value.detach()
                held.add(id(value))
    rest["groups"] = [{**group, "params": [names[i] for i in group["params"]]} for group in saved["param_groups"]]
    rest["more"] = {key: value for key, value in saved.items() if key not in ("state", "param_groups")}
    return tensors, rest


def _is_of_parameter(key: Any, names: list[str]) -> bool:
    return type(key) is int and 0 <= key < len(names)


def load_optimizer(model: nn.Module, optimizer: Optimizer, directory: Path, rest: dict[str, Any]) -> None:
    """Restore a saved state, written by any number of processes. ``rest`` is the second result of `optimizer_tensors`.

    The groups of ``optimizer`` may be divided differently; each group gets the saved options of its first parameter.
    """
    names, fresh = _names(model, optimizer), optimizer.state_dict()
    params = dict(model.named_parameters())
    # Most optimizers have no state before their first step, so shapes come from the checkpoint, and the present state
    # is used where there is one.
    present = {name: fresh["state"].get(i, {}) for i, name in enumerate(names)}
    packed = rest.get("packed", _packed(present))
    wanted: dict[str, Tensor] = {}
    state: dict[Any, dict[str, Any]] = {}
    entries = _entries(directory, names)
    for i, name in enumerate(names):
        here = state[i] = dict(rest["values"].get(name, {}))
        parts: set[str] = set()
        for entry, facts in packed.get(name, {}).items():
            value = empty_packed(params[name], facts)
            found = (
                {f"{entry}.{part}": tensor for part, tensor in packed_tensors(value).items()}
                if value is not None
                else {}
            )
            if value is None or not found.keys() <= entries.get(name, {}).keys():
                raise EvenstepError(
                    f"the 8-bit state of {name} in {directory} is sharded for another number of processes; resume with "
                    "the number that wrote it"
                )
            here[entry] = value
            parts |= found.keys()
            wanted |= {f"optimizer.{name}.{key}": tensor for key, tensor in found.items()}
        for entry, (shape, dtype) in entries.get(name, {}).items():
            if entry not in parts:
                target = _target(params[name], present[name].get(entry), shape, dtype)
                here[entry] = wanted[f"optimizer.{name}.{entry}"] = target
    # One read for all tensors, in place: each process reads the parts of the files that its shards need.
    fill(directory, wanted)
    options = {name: group for group in rest["groups"] for name in group["params"]}
    groups = []
    for group in fresh["param_groups"]:
        old = options[names[group["params"][0]]]
        groups.append({**old, "params": group["params"]})
    state = {i: entries for i, entries in state.items() if entries} | rest.get("loose", {})
    saved = {**rest.get("more", {}), "state": state, "param_groups": groups}
    # torch casts moments to the dtype of their parameter; `keep_dtypes` puts fp32 moments of 16-bit parameters back.
    optimizer.load_state_dict(saved)
    keep_dtypes(optimizer, saved)


def _packed(present: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The `packed_facts` of a new state, for checkpoints of an older version, which do not contain them."""
    found = {name: {entry: packed_facts(value) for entry, value in state.items()} for name, state in present.items()}
    return {name: {entry: facts for entry, facts in state.items() if facts} for name, state in found.items()}


def _target(p: Tensor, present: Any, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The tensor into which a plain tensor of the state of ``p`` is read: the present one if its shape fits, else a new
    one, sharded like ``p`` if it has the shape of ``p``."""
    if isinstance(present, Tensor) and present.shape == shape and packed_facts(present) is None:
        return present.detach()
    if shape == p.shape and shape:
        return torch.zeros_like(p.detach(), dtype=dtype)
    return torch.zeros(shape, dtype=dtype, device=local(p).device)


def _entries(directory: Path, names: list[str]) -> dict[str, dict[str, tuple[torch.Size, torch.dtype]]]:
    found: dict[str, dict[str, tuple[torch.Size, torch.dtype]]] = {}
    known = set(names)
    for key, facts in shard_metadata(directory).items():
        if not key.startswith("optimizer."):
            continue
        parts = key.removeprefix("optimizer.").split(".")
        # "optimizer.NAME.ENTRY", and both parts may contain dots: NAME is the longest prefix that is a parameter.
        cut = next((k for k in range(len(parts) - 1, 0, -1) if ".".join(parts[:k]) in known), None)
        if cut is None:
            raise EvenstepError(f"the checkpoint {directory} has {key}, but the model has no such parameter")
        found.setdefault(".".join(parts[:cut]), {})[".".join(parts[cut:])] = (facts.size, facts.properties.dtype)
    return found


# ---- writing in the background ----


class Saver:
    """Writes the checkpoints of a run into ``directory``. Every process has a Saver and calls it at the same steps."""

    def __init__(self, directory: Path, world: World, alive: Callable[[], None] = lambda: None) -> None:
        require_safetensors()  # without it the first checkpoint would end the run
        self.directory, self.world = directory, world
        self._copies: dict[str, Tensor] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self.alive = alive
        """Called every few seconds during `wait`, so that a slow disk is not taken for a hang."""
        self.last: int | None = None
        """The step of the newest save."""

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        write_small: Callable[[Path], None],
        keep: int | None,
        *,
        wait: bool,
    ) -> Path:
        """Start writing the checkpoint of ``step``; returns its directory, which is complete at once with ``wait``,
        else after `wait`.

        Args:
            step: the number of the step.
            tensors: the tensors by key. They may be overwritten as soon as this method returns.
            write_small: writes the other files into a directory. Called on process 0, before this method returns.
            keep: the number of checkpoints to keep, see `evenstep.train.checkpoint.commit`.
            wait: whether to wait until the checkpoint is committed.

        Raises:
            EvenstepError: on all processes, when this save or the previous one fails. Earlier checkpoints are intact.
        """
        self.wait()  # at most one save at a time, which also bounds the memory of the copies
        partial = self.directory / f".step-{step:06d}.partial"
        try:
            with self.world.raise_on_all_ranks():
                # First on process 0, and its error on all: the other processes write into the directory that it makes.
                if self.world.rank == 0:
                    self._guarded(step, lambda: write_small(begin(self.directory, step)))
            copies, whole = self._guarded(step, lambda: self._staged(tensors))
        except BaseException:
            self._clean(partial)
            raise
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending = self._thread.submit(self._finish, copies, whole, partial, step, keep)
        self.last = step
        if wait:
            self.wait()
        return self.directory / f"step-{step:06d}"

    def _staged(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """Copies of the tensors on the CPU, and a function that waits until they are complete.

        The copies are queued on the GPU's stream, so work that is queued later may overwrite the tensors, and the
        training does not wait. The next save reuses the memory of the copies, as pinned memory is slow to allocate.
        """
        kept, self._copies = self._copies, {}
        for name, x in tensors.items():
            copy = kept.pop(name, None)
            if copy is None or not _alike(copy, x):
                copy = torch.empty_like(x, device="cpu", pin_memory=local(x).is_cuda, requires_grad=False)
            local(copy).copy_(local(x), non_blocking=True)
            self._copies[name] = copy
        if self.world.device.type != "cuda":
            return self._copies, lambda: None
        copied = torch.cuda.Event()
        copied.record()
        return self._copies, copied.synchronize

    def _finish(
        self, copies: dict[str, Tensor], whole: Callable[[], None], partial: Path, step: int, keep: int | None
    ) -> None:
        """Write the copies and commit the checkpoint. Runs in the thread."""
        world = self.world

        def own_files() -> dict[str, Any]:
            whole()  # the copies from the GPU have to be complete before their bytes are written
            write(partial, copies, world.saving)
            mine = sorted(partial.glob(f"shard-{world.rank + 1:05d}-*{SHARD}"))
            small = [path for path in sorted(partial.iterdir()) if path.suffix != SHARD] if world.rank == 0 else []
            return {path.name: facts_of(path) for path in (*mine, *small)}

        def rename(found: list[dict[str, Any]]) -> None:
            files = {name: facts for part in found for name, facts in part.items()}
            commit(partial, step, world.size, files, keep)

        try:
            # Two gathers in the group of the saving threads: the rename must not start before every shard is on the
            # disk, and no process may take the checkpoint for complete before the rename.
            found = world.gather(lambda: self._guarded(step, own_files), world.saving)
            world.gather(lambda: self._guarded(step, lambda: rename(found)) if world.rank == 0 else None, world.saving)
        finally:
            self._clean(partial)

    def _guarded(self, step: int, work: Callable[[], Any]) -> Any:
        import torch.distributed.checkpoint as dcp

        try:
            return work()
        except EvenstepError:
            raise
        except (Exception, dcp.api.CheckpointException) as problem:  # the latter derives from BaseException
            raise could_not_save(self.directory, step, problem) from problem

    def _clean(self, partial: Path) -> None:
        if self.world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)

    def failed(self) -> bool:
        """Whether the save in the background has failed. If so, `wait` raises its error."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Wait for the save in the background, if there is one. EvenstepError when it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            # In short waits, so that `alive` can tell the heartbeat that the disk is slow.
            while futures.wait([pending], timeout=5).not_done:
                self.alive()
            pending.result()

    def close(self) -> None:
        """Wait for a pending save without raising its error, and free the copies."""
        if self._pending is not None:
            self._pending.exception()
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None
        self._copies = {}


def _alike(copy: Tensor, x: Tensor) -> bool:
    """Whether the memory of ``copy`` can be reused for a copy of ``x``."""
    same = copy.dtype == x.dtype and copy.shape == x.shape and type(copy) is type(x)
    return same and (not is_sharded(x) or (copy.placements, copy.device_mesh) == (x.placements, x.device_mesh))  # type: ignore[attr-defined]
