"""The processes of a run: who this one is, how they begin and end, and what they agree on beside gradients.

``torchrun`` starts them and says who is who in the environment; a program started without it is alone. Beside the
group for tensors (NCCL on GPUs, gloo on CPUs) there are two of gloo: one in which the training loops agree on small
things, and one for the thread that writes checkpoints, which may talk at the same time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from evenstep.errors import EvenstepError
from evenstep.train.config import BaseConfig
from evenstep.train.hardware import pick_device

T = TypeVar("T")

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class SharedError(EvenstepError):
    """An error that all processes raise; ``teller`` is the one that is to print it."""

    def __init__(self, message: str, teller: int) -> None:
        super().__init__(message)
        self.teller = teller


@dataclass(frozen=True)
class World:
    """``data_rank`` of ``data_size``: which part of each batch this process reads; processes that share matrix products
    read the same."""

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    control: Any = None
    """The gloo group of the training loops; None when alone."""
    saving: Any = None
    """The gloo group of the threads that write checkpoints."""
    tensor: int = 1
    """Processes that share each matrix product."""

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor

    @property
    def data_size(self) -> int:
        return self.size // self.tensor

    @property
    def speaks(self) -> bool:
        return self.rank == 0

    # ---- what is agreed on ----

    def each(self, work: Callable[[], T], group: Any = None) -> list[T]:
        """What ``work`` gives on every process, on all of them. SharedError, on all, when it raised EvenstepError on
        one."""
        if self.control is None:
            return [work()]
        result: Any = None
        problem: str | None = None
        try:
            result = work()
        except EvenstepError as error:
            problem = str(error)
        answers: list[Any] = [None] * self.size
        dist.all_gather_object(answers, (problem, result), group=group or self.control)
        for rank, (message, _) in enumerate(answers):
            if message is not None:
                raise SharedError(message, rank)
        return [answer for _, answer in answers]

    @contextmanager
    def together(self) -> Iterator[None]:
        """All leave the block, or all raise SharedError."""
        problem: EvenstepError | None = None
        try:
            yield
        except EvenstepError as error:
            if self.control is None:
                raise
            problem = error

        def outcome() -> None:
            if problem is not None:
                raise problem

        if self.control is not None:
            self.each(outcome)

    def from_first(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on process 0, on all of them."""
        return self.each(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def in_turn(self, work: Callable[[], T]) -> T:
        """``work`` on process 0 first, then on the first of each machine, then on the others: whoever comes later finds
        what was prepared. It may take days. SharedError when it raises EvenstepError."""
        if self.control is None:
            return work()
        result: list[T] = []
        mine = 0 if self.rank == 0 else 1 if self.local_rank == 0 else 2
        for turn in range(3):
            problem: EvenstepError | None = None
            if mine == turn:
                try:
                    result.append(work())
                except EvenstepError as error:
                    problem = error
            self._wait_for(range(0, self.size, self.local_size) if turn else range(1), turn)

            def outcome(problem: EvenstepError | None = problem) -> None:
                if problem is not None:
                    raise problem

            self.each(outcome)
        return result[0]

    def _wait_for(self, ranks: range, turn: int) -> None:
        """Until ``ranks`` have come here. In the store, where waiting has no timeout of a few minutes."""
        store: Any = dist.distributed_c10d._get_default_store()
        store.set(f"evenstep/turn/{turn}/{self.rank}", "done")
        store.wait([f"evenstep/turn/{turn}/{rank}" for rank in ranks], timedelta(days=30))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the parts of the data, in place; as it is when there is one."""
        if self.control is not None and self.data_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.SUM)
            if self.tensor > 1:
                tensor /= self.tensor
        return tensor


def launched() -> bool:
    """Was this program started by torchrun, or by something that sets the same environment?"""
    return "RANK" in os.environ or "WORLD_SIZE" in os.environ


def restarts() -> int:
    """How often torchrun has restarted the processes after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") or 0)


def _environment(config: BaseConfig) -> dict[str, int]:
    missing = [name for name in _VARIABLES if name not in os.environ]
    mode = config.parallel.mode
    if missing:
        if not launched():
            raise EvenstepError(
                f"parallel.mode {mode} needs several processes: start them with torchrun --nproc-per-node N "
                "-m evenstep pretrain ..., or give --parallel.mode none for one"
            )
        raise EvenstepError(
            f"{missing[0]} is not in the environment, {'RANK' if 'RANK' in os.environ else 'WORLD_SIZE'} is; start the "
            "processes with torchrun, which sets all of them"
        )
    try:
        return {name: int(os.environ[name]) for name in _VARIABLES if name != "MASTER_ADDR"}
    except ValueError as problem:
        raise EvenstepError(f"the environment of torchrun is damaged: {problem}") from None


def check_world(config: BaseConfig, size: int, local_size: int) -> int:
    """How many processes share each matrix product. EvenstepError when the configuration does not fit so many
    processes."""
    parallel, train = config.parallel, config.train
    if parallel.mode == "none" and size > 1:
        raise EvenstepError(
            f"parallel.mode is none, but there are {size} processes; give --parallel.mode ddp (a copy of the model in "
            "each) or fsdp (a part in each)"
        )
    tensor = (parallel.tensor or local_size) if parallel.mode == "tp+fsdp" else 1
    if size % tensor:
        raise EvenstepError(
            f"parallel.tensor {tensor} does not divide the {size} processes; give a divisor, or another number of "
            "processes"
        )
    replicate = parallel.replicate
    if replicate and size % replicate:
        raise EvenstepError(f"parallel.replicate {replicate} does not divide the {size} processes; give a divisor")
    data = size // tensor
    if train.batch_size % data:
        raise EvenstepError(
            f"train.batch_size {train.batch_size} is not divisible by the {data} processes that read data; give a "
            f"multiple of {data}"
        )
    if (train.batch_size // data) % min(config.micro_batch_size, train.batch_size // data):
        raise EvenstepError(
            f"train.batch_size {train.batch_size} over {data} processes is {train.batch_size // data} sequences each, "
            f"not divisible by train.micro_batch_size {config.micro_batch_size}; each pass takes as many"
        )
    if tensor > 1 and config.lowbit:
        raise EvenstepError(
            f"lowbit {config.lowbit} does not go with parallel.tensor {tensor}: the scales of a cut matrix are not "
            "those of the whole; give parallel.mode fsdp"
        )
    if tensor > 1 and config.optim.options.get("state") == "int8":
        raise EvenstepError("optim.state int8 does not go with parallel.mode tp+fsdp; give bf16, or parallel.mode fsdp")
    return tensor


def _store(patience: timedelta) -> Any:
    """Where the processes find each other. torchrun's own store outlives a restart (2.13 makes one per agent and not
    one per attempt), and in it the addresses of the dead: whoever reads them first cannot connect. So each attempt has
    a part of it to itself."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        int(os.environ["WORLD_SIZE"]),
        is_master=not agent and os.environ["RANK"] == "0",
        timeout=patience,
        multi_tenant=not agent,
    )
    return dist.PrefixStore(f"evenstep/attempt/{restarts()}", store)


@contextmanager
def open_world(config: BaseConfig) -> Iterator[World]:
    """Join the other processes, and part from them at the end. EvenstepError for an environment or configuration that
    does not fit; nothing is waited for before that is known."""
    if not launched() and config.parallel.mode == "none":
        yield World(pick_device(config.train.device))
        return
    places = _environment(config)
    size, local = places["WORLD_SIZE"], places["LOCAL_RANK"]
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    tensor = check_world(config, size, local_size)
    device = pick_device(config.train.device)
    if size == 1 and config.parallel.mode == "none":
        yield World(device)
        return
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise EvenstepError(
                f"process {local} of this machine has no GPU: torch sees {torch.cuda.device_count()}; give torchrun "
                "--nproc-per-node that number"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    # The heartbeat speaks first, and names who is missing; the timeout of a collective is what is left without it.
    patience = timedelta(seconds=config.parallel.timeout * 1.5 + 10)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=_store(patience), rank=places["RANK"], world_size=size, timeout=patience)
    world = World(device, places["RANK"], size, local, local_size, tensor=tensor)
    world = replace(
        world,
        control=dist.new_group(backend="gloo", timeout=patience),
        saving=dist.new_group(backend="gloo", timeout=timedelta(hours=2)),
    )
    try:
        yield world
        world._wait_for(range(1), 3)  # the closing work of process 0 may take long
        dist.barrier(group=world.control)
    finally:
        dist.destroy_process_group()
