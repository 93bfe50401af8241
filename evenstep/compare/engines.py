"""Where cells are trained: local processes, a SLURM cluster (submitit) or a Ray cluster, behind one interface.

``submit`` starts a `Job` and returns a handle; ``poll`` tells whether it has ended, ``stop`` asks it to save and end,
and ``fetch`` tells how it ended. An engine takes ``slots`` jobs at a time. A job that was preempted (ended by a signal
that nobody here sent) is submitted again by the runner, and its command then resumes from the last checkpoint.
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
"""Jobs that are handed to a cluster at a time unless --jobs says otherwise; its scheduler does the rest."""


@dataclass(frozen=True)
class Command:
    """``first`` starts a run; ``again`` resumes it once there are ``checkpoints``. Can be pickled."""

    first: list[str]
    again: list[str]
    checkpoints: Path
    log: Path
    directory: str = field(default_factory=os.getcwd)

    def words(self) -> list[str]:
        return self.again if list_checkpoints(self.checkpoints) else self.first

    def start(self, **environment: str) -> subprocess.Popen[bytes]:
        """Its output goes to the log. Not in our process group: Ctrl-C is passed on by us, once."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        given = {"OMP_NUM_THREADS": "1", **os.environ, **environment}
        with self.log.open("ab") as log:
            how: dict[str, Any] = {"cwd": self.directory, "env": given, "start_new_session": True}
            # A process inherits which signals are blocked, and Ray's workers block them.
            before = signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            try:
                return subprocess.Popen(self.words(), stdout=log, stderr=log, **how)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def problem(self, status: int) -> str | None:
        """What exit ``status`` means, in one line; None when the run got to its end."""
        if status == 0:
            return None
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        lines = text.strip().splitlines()
        told = [line for line in lines if line.startswith("evenstep: ")]
        last = (told or lines or [f"ended with status {status}"])[-1].removeprefix("evenstep: ")
        return f"{PREEMPTED}: {last}" if status in _ENDED_BY_SIGNAL else last


@dataclass(frozen=True)
class Job:
    """``here`` does the same as ``command`` in this process; ``processes`` is the number of GPUs that it wants."""

    name: str
    command: Command
    here: Callable[[], object]
    processes: int = 1


class Engine(Protocol):
    slots: int

    def submit(self, job: Job) -> Any: ...
    def poll(self, handle: Any) -> bool: ...
    def stop(self, handle: Any, wait: bool = True) -> None: ...
    def fetch(self, handle: Any) -> str | None: ...


class Inline:
    """In this process, one job after the other: for cells of a second, for which a process takes longer to start."""

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
    command: Command
    running: subprocess.Popen[bytes]
    slot: int = 0
    asked: bool = False


class Local:
    """Processes on this machine, ``slots`` at a time; each has GPUs of its own where there are any."""

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
        if not handle.asked and not self.poll(handle):  # a second signal would end it without saving
            handle.asked = True
            handle.running.send_signal(signal.SIGINT)
        if wait:
            handle.running.wait()

    def fetch(self, handle: Process) -> str | None:
        self._used.discard(handle.slot)
        return handle.command.problem(handle.running.returncode)


def _visible(index: int) -> str:
    """The ``index``-th of the GPUs that this process may use."""
    given = [word for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    return given[index] if index < len(given) else str(index)


# ---- clusters: paths have to mean the same on all machines ----


def stop_file(command: Command) -> Path:
    """A job that finds it saves and ends. To cancel a job would on some clusters kill it."""
    return command.log.with_suffix(".stop")


class Execution:
    """Runs a command to its end, on another machine; gives its exit status."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self._running: subprocess.Popen[bytes] | None = None
        self._asked = False

    def __call__(self) -> int:
        stop = stop_file(self.command)
        if stop.exists():  # it came while this job waited for a machine
            return 128 + signal.SIGINT
        self._running = self.command.start()
        try:
            while True:
                try:
                    return self._running.wait(timeout=1)
                except subprocess.TimeoutExpired:
                    if stop.exists():
                        stop.unlink()
                        self.ask()
        except BaseException:
            self.ask(wait=True)
            raise

    def ask(self, wait: bool = False) -> None:
        if self._running is None:
            return
        if not self._asked and self._running.poll() is None:  # a second signal would end it without saving
            self._asked = True
            self._running.send_signal(signal.SIGINT)
        if wait:
            self._running.wait()


class Submission(Execution):
    """What a SLURM job runs. Near the time limit submitit calls ``checkpoint`` and puts the job into the queue again,
    where it resumes."""

    def __call__(self) -> int:
        # submitit ignores SIGTERM (scancel, preemption); the run is to save.
        signal.signal(signal.SIGTERM, lambda *_: self.ask())
        return super().__call__()

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        self.ask(wait=True)
        return DelayedSubmission(Submission(self.command))


class Cluster:
    """What the clusters have in common. A handle is the command and what the cluster calls the job."""

    PICKED_UP = 10.0
    """Seconds after which a job that has left its stop file alone is taken to wait for a machine still."""

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
    """Jobs of a SLURM cluster. ``options`` are submitit's (``timeout_min``, ``slurm_partition``, ``mem_gb``, ...), and
    ``cluster``: "slurm", or "local" and "debug", which submitit runs on this machine."""

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
        return handle[1].done()

    def _cancel(self, job: Any) -> None:
        job.cancel()

    def fetch(self, handle: tuple[Command, Any]) -> str | None:
        command, job = handle
        if (problem := job.exception()) is not None:  # the job was lost: cancelled, its node died, out of time
            last = [line for line in str(problem).splitlines() if line.strip()][:1]
            return f"{PREEMPTED}: {(last or [type(problem).__name__])[0]}"
        return command.problem(job.result())


def _execute(command: Command) -> int:
    return Execution(command)()


class Ray(Cluster):
    """Tasks of a Ray cluster. ``options`` are those of ``ray.init``; with no ``address`` and none in RAY_ADDRESS, a
    cluster of this machine is started."""

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
    """The engine ``name``. ``jobs`` at a time; None: as many as fit; 0: in this process. ``folder`` takes its files."""
    if name not in ENGINES:
        raise EvenstepError(f"--engine: '{name}' is not one of {', '.join(ENGINES)}{nearest(name, ENGINES)}")
    if jobs is not None and jobs < 0:
        raise EvenstepError(f"--jobs: {jobs} is out of range; give 1 or more, or 0 for this process")
    if processes < 1:
        raise EvenstepError(f"--processes: {processes} is out of range; give 1 or more")
    if options and name == "local":
        raise EvenstepError("--engine-option: local processes take none; choose --engine slurm or ray")
    gpus = gpu_count()
    if name == "slurm":
        return Slurm(jobs or QUEUED, folder / "slurm", gpus or options.pop("gpus", 0), **options)
    if name == "ray":
        return Ray(jobs or QUEUED, gpus or options.pop("gpus", 0), **options)
    if jobs == 0:
        if processes > 1:
            raise EvenstepError("--processes: several need processes of their own; give --jobs 1 or more")
        return Inline()
    return Local(max(1, default_jobs(gpus) // processes) if jobs is None else jobs, gpus)


def default_jobs(gpus: int) -> int:
    """One process for each GPU, else for each core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return gpus or cores


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
