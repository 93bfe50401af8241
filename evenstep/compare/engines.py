"""Engines, which run the jobs of a grid: local processes, a SLURM cluster (submitit) or a Ray cluster.

All have one interface. ``submit`` starts a `Job` and returns a handle, ``poll`` returns whether it has ended, ``stop``
asks it to save and end, and ``fetch`` returns how it ended. An engine takes ``slots`` jobs at a time. A preempted job
(one that was ended by a signal from elsewhere) is submitted again by the runner; its command then resumes from the last
checkpoint.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from evenstep.errors import EvenstepError, nearest
from evenstep.train.checkpoint import list_checkpoints

PREEMPTED = "preempted"
_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGTERM)
_ENDED_BY_SIGNAL = {*(-number for number in _SIGNALS), *(128 + number for number in _SIGNALS)}
QUEUED = 64
"""Jobs submitted to a cluster at a time unless --jobs is given; the cluster's scheduler starts them."""


@dataclass(frozen=True)
class Command:
    """A program: ``first`` starts a run, and ``again`` resumes it once there are ``checkpoints``. Can be pickled."""

    first: list[str]
    again: list[str]
    checkpoints: Path
    log: Path
    directory: str = field(default_factory=os.getcwd)

    def words(self) -> list[str]:
        return self.again if list_checkpoints(self.checkpoints) else self.first

    def start(self, **environment: str) -> subprocess.Popen[bytes]:
        """Start the program with its output in the log. It gets a process group of its own, so that Ctrl-C reaches it
        once, from the engine."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        given = {"OMP_NUM_THREADS": "1", **os.environ, **environment}
        with self.log.open("ab") as log:
            how: dict[str, Any] = {"cwd": self.directory, "env": given, "start_new_session": True}
            # A process inherits the set of blocked signals, and Ray's workers block these.
            before = signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            try:
                return subprocess.Popen(self.words(), stdout=log, stderr=log, **how)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def problem(self, status: int) -> str | None:
        """The meaning of exit ``status`` in one line; None if the run completed."""
        if status == 0:
            return None
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        lines = text.strip().splitlines()
        messages = [line for line in lines if line.startswith("evenstep: ")]
        last = (messages or lines or [f"ended with status {status}"])[-1].removeprefix("evenstep: ")
        return f"{PREEMPTED}: {last}" if status in _ENDED_BY_SIGNAL else last


@dataclass(frozen=True)
class Job:
    """``here`` does the same as ``command`` in this process. ``processes``: of the run, with one GPU each."""

    name: str
    command: Command
    here: Callable[[], object]
    processes: int = 1


class Engine(Protocol):
    """The interface of all engines; see the head of this module."""

    slots: int

    def submit(self, job: Job) -> Any: ...
    def poll(self, handle: Any) -> bool: ...
    def stop(self, handle: Any, wait: bool = True) -> None: ...
    def fetch(self, handle: Any) -> str | None: ...


class Inline:
    """Runs one job after the other in this process: for cells that take less time than the start of a process."""

    slots = 1

    def submit(self, job: Job) -> str | None:
        try:
            job.here()
        except EvenstepError as problem:
            return f"error: {problem}"
        return None

    def poll(self, handle: str | None) -> bool:
        return True

    def stop(self, handle: str | None, wait: bool = True) -> None: ...

    def fetch(self, handle: str | None) -> str | None:
        return handle


@dataclass
class Process:
    """A started command. ``slot``: its place in a `Local` engine."""

    command: Command
    running: subprocess.Popen[bytes]
    slot: int = 0
    _asked: bool = False

    def stop(self, wait: bool = True) -> None:
        """Ask the process to save and end. It gets one signal only: a second one would end it without saving."""
        if not self._asked and self.running.poll() is None:
            self._asked = True
            self.running.send_signal(signal.SIGINT)
        if wait:
            self.running.wait()


class Local:
    """Runs processes on this machine, ``slots`` at a time, each with its own GPUs if there are any."""

    def __init__(self, slots: int, gpus: int = 0) -> None:
        self.slots, self.gpus, self._used = slots, gpus, set[int]()

    def submit(self, job: Job) -> Process:
        slot = next(number for number in range(self.slots) if number not in self._used)
        environment = {}
        if self.gpus:
            first = slot * job.processes
            devices = [_visible((first + i) % self.gpus) for i in range(job.processes)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        running = job.command.start(**environment)
        self._used.add(slot)
        return Process(job.command, running, slot)

    def poll(self, handle: Process) -> bool:
        return handle.running.poll() is not None

    def stop(self, handle: Process, wait: bool = True) -> None:
        handle.stop(wait)

    def fetch(self, handle: Process) -> str | None:
        self._used.discard(handle.slot)
        return handle.command.problem(handle.running.returncode)


def _visible(index: int) -> str:
    """The name of GPU ``index`` among those that this process may use."""
    given = [word for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    return given[index] if index < len(given) else str(index)


# ---- clusters: every path must lead to the same file on all machines ----


def stop_file(command: Command) -> Path:
    """A file whose presence tells a job to save and end. Some clusters kill a job that is cancelled."""
    return command.log.with_suffix(".stop")


class Execution:
    """Runs a command to its end on another machine and returns its exit status."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self._process: Process | None = None

    def __call__(self) -> int:
        stop = stop_file(self.command)
        if stop.exists():  # created while this job was waiting for a machine
            return 128 + signal.SIGINT
        running = self.command.start()
        self._process = Process(self.command, running)
        try:
            while True:
                try:
                    return running.wait(timeout=1)
                except subprocess.TimeoutExpired:
                    if stop.exists():
                        stop.unlink()
                        self.stop(wait=False)
        except BaseException:
            self.stop()
            raise

    def stop(self, wait: bool = True) -> None:
        if self._process is not None:
            self._process.stop(wait)


class Submission(Execution):
    """The work of a SLURM job. Near the time limit, submitit calls ``checkpoint`` and queues the job again; it then
    resumes."""

    def __call__(self) -> int:
        # submitit ignores SIGTERM (scancel, preemption), on which the run has to save.
        signal.signal(signal.SIGTERM, lambda *_: self.stop(wait=False))
        return super().__call__()

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        self.stop()
        return DelayedSubmission(Submission(self.command))


class Cluster:
    """The common part of the clusters. A handle is the command and the cluster's own handle of the job."""

    PICKED_UP = 10.0
    """Seconds after which a job that has not removed its stop file is assumed to be still waiting for a machine."""

    def __init__(self, slots: int, gpus: int) -> None:
        self.slots, self.gpus, self._asked = slots, gpus, dict[Path, float]()

    def submit(self, job: Job) -> tuple[Command, Any]:
        stop_file(job.command).unlink(missing_ok=True)
        self._asked.pop(job.command.log, None)
        return job.command, self._submitted(job.command, job.processes if self.gpus else 0)

    def stop(self, handle: tuple[Command, Any], wait: bool = True) -> None:
        log, stop = handle[0].log, stop_file(handle[0])
        if log not in self._asked and not self.poll(handle):
            self._asked[log] = time.monotonic()
            stop.touch()
        while wait and not self.poll(handle):
            if stop.exists() and time.monotonic() > self._asked[log] + self.PICKED_UP:
                self._cancel(handle[1])
                return
            time.sleep(0.2)

    def poll(self, handle: tuple[Command, Any]) -> bool:
        raise NotImplementedError

    def _submitted(self, command: Command, gpus: int) -> Any:
        raise NotImplementedError

    def _cancel(self, job: Any) -> None:
        raise NotImplementedError


class Slurm(Cluster):
    """Jobs of a SLURM cluster.

    Args:
        options: those of submitit (``timeout_min``, ``slurm_partition``, ``mem_gb``, ...), and ``cluster``: "slurm", or
            "local" or "debug", with which submitit runs the jobs on this machine.
    """

    def __init__(self, slots: int, folder: Path, gpus: int = 0, **options: Any) -> None:
        super().__init__(slots, gpus)
        try:
            import submitit
        except ImportError:
            raise EvenstepError("--engine slurm needs submitit; pip install 'evenstep[slurm]'") from None
        try:
            self._executor = submitit.AutoExecutor(folder, cluster=options.pop("cluster", "slurm"))
            self._executor.update_parameters(**({"timeout_min": 24 * 60, "name": "evenstep"} | options))
        except (RuntimeError, NameError, ValueError) as problem:
            raise EvenstepError(f"--engine slurm: {str(problem).splitlines()[0]}") from None

    def _submitted(self, command: Command, gpus: int) -> Any:
        self._executor.update_parameters(gpus_per_node=gpus)
        return self._executor.submit(Submission(command))

    def poll(self, handle: tuple[Command, Any]) -> bool:
        return bool(handle[1].done())

    def _cancel(self, job: Any) -> None:
        job.cancel()

    def fetch(self, handle: tuple[Command, Any]) -> str | None:
        command, job = handle
        if (problem := job.exception()) is not None:  # lost: cancelled, out of time, or its node failed
            last = [line for line in str(problem).splitlines() if line.strip()][:1]
            return f"{PREEMPTED}: {(last or [type(problem).__name__])[0]}"
        return command.problem(job.result())


def _execute(command: Command) -> int:
    return Execution(command)()


class Ray(Cluster):
    """Tasks of a Ray cluster.

    Args:
        options: those of ``ray.init``. Without ``address``, and without RAY_ADDRESS in the environment, Ray starts a
            cluster of this machine.
    """

    def __init__(self, slots: int, gpus: int = 0, **options: Any) -> None:
        super().__init__(slots, gpus)
        try:
            import ray
        except ImportError:
            raise EvenstepError("--engine ray needs ray; pip install 'evenstep[ray]'") from None
        try:
            ray.init(**({"log_to_driver": False, "ignore_reinit_error": True} | options))
        except (ConnectionError, RuntimeError, TypeError, ValueError) as problem:
            raise EvenstepError(f"--engine ray: {str(problem).splitlines()[0]}") from None
        self._ray = ray

    def _submitted(self, command: Command, gpus: int) -> Any:
        # Ray itself repeats a task whose machine was lost; the command then resumes.
        wants = {"num_cpus": 1, "num_gpus": gpus, "max_retries": 3}
        return self._ray.remote(_execute).options(**wants).remote(command)

    def poll(self, handle: tuple[Command, Any]) -> bool:
        return bool(self._ray.wait([handle[1]], timeout=0)[0])

    def _cancel(self, job: Any) -> None:
        self._ray.cancel(job)

    def fetch(self, handle: tuple[Command, Any]) -> str | None:
        command, reference = handle
        try:
            return command.problem(self._ray.get(reference))
        except self._ray.exceptions.RayError as problem:
            return f"{PREEMPTED}: {str(problem).splitlines()[0]}"


ENGINES = ("local", "slurm", "ray")


def engine_for(name: str, jobs: int | None, folder: Path, *, processes: int = 1, options: dict[str, Any]) -> Engine:
    """Return the engine ``name``.

    Args:
        name: one of `ENGINES`.
        jobs: number of jobs at a time. None: as many as fit; 0: one after the other in this process.
        folder: directory for the engine's own files.
        processes: of one job.
        options: of the cluster, from --engine-option.
    """
    if name not in ENGINES:
        raise EvenstepError(f"--engine: '{name}' is not one of {', '.join(ENGINES)}{nearest(name, ENGINES)}")
    if jobs is not None and jobs < 0:
        raise EvenstepError(f"--jobs: {jobs} is out of range; give 1 or more, or 0 for this process")
    if processes < 1:
        raise EvenstepError(f"--processes: {processes} is out of range; give 1 or more")
    if options and name == "local":
        raise EvenstepError("--engine-option: local processes take no options; choose --engine slurm or ray")
    gpus = _gpu_count()
    if name == "slurm":
        return Slurm(jobs or QUEUED, folder / "slurm", gpus or options.pop("gpus", 0), **options)
    if name == "ray":
        return Ray(jobs or QUEUED, gpus or options.pop("gpus", 0), **options)
    if jobs == 0:
        if processes > 1:
            raise EvenstepError(f"--processes {processes} cannot run in this process (--jobs 0); give --jobs 1 or more")
        return Inline()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Local(max(1, (gpus or cores) // processes) if jobs is None else jobs, gpus)


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
