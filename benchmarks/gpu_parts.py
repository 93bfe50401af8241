"""The measurements of gpu.py, one process for each part.

    python benchmarks/gpu_parts.py PART ROWS [--device cpu] [--smoke]

Every case of a part appends its row to the file ROWS (JSON, one object per line) as soon as it is measured. A case that
raises leaves a row with its ``error``, and the next case begins. After an error that leaves the CUDA context unusable,
the process restarts itself and continues after the last row. The exit status is 1 if a row has an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from evenstep import quantize_
from evenstep.baselines.state_size import state_bytes
from evenstep.bench.measure import Plan, Workload, quiet
from evenstep.bench.registry import KNOWN, REFERENCE, Entry
from evenstep.bench.timing import Sample, Step, Turns, last_level_cache, paired_ratio, spread, take_turns
from evenstep.kernels import kernels_for
from evenstep.lowbit.linear import LowBitLinear
from evenstep.models import Llama, llama_config
from evenstep.stability.study import SCALES, measure, wanted
from evenstep.train.hardware import commit, describe_hardware, peak_flops, peak_memory, total_memory, versions
from evenstep.train.memory import chunk_rows

ROOT = Path(__file__).resolve().parents[1]
OPTIMIZERS = (REFERENCE, "stable_spam", "spam", "scale", "spam_density_25", "stabilize_adamw")
TRAINED = (REFERENCE, "stable_spam", "scale")
RECIPES = ("fp8", "int8", "fp4")
WARMUP = 3
Row = dict[str, Any]
Case = tuple[str, Callable[[], Row]]


@dataclass(frozen=True)
class Context:
    """The device to measure on, and the file for the rows. ``smoke``: tiny sizes, few rounds, no compilation."""

    device: torch.device
    smoke: bool
    rows: Path

    @cached_property
    def done(self) -> frozenset[str]:
        """Names of the cases that had a row when this process started."""
        return frozenset(row["name"] for row in rows_in(self.rows))

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def rounds(self) -> int:
        return 3 if self.smoke else 25

    @property
    def vocabulary(self) -> int:
        return 2048 if self.smoke else 32000

    def size(self, name: str) -> str:
        return "tiny" if self.smoke else name

    def emit(self, name: str, row: Row) -> None:
        with self.rows.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"name": name} | row, default=str) + "\n")

    def usable(self) -> bool:
        """Whether the device works. After an error such as an illegal address, every call on it fails."""
        try:
            if self.cuda:
                torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def start_again(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *sys.argv])

    def clear(self) -> None:
        """Free the memory of the last case."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def rows_in(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def run_cases(context: Context, cases: Iterable[Case]) -> bool:
    """Run the cases without a row; returns whether no row has an error, including rows of earlier processes."""
    done = context.done
    for name, work in cases:
        if name in done:
            continue
        try:
            row = work()
        except Exception as problem:
            row = {"error": told(problem)}
            print(f"{name}:", file=sys.stderr)
            sys.excepthook(type(problem), problem, problem.__traceback__)
            del problem
        context.emit(name, row)
        if not context.usable():
            context.start_again()
        context.clear()
    return not any("error" in row for row in rows_in(context.rows))


def told(problem: BaseException) -> str:
    first = next((line for line in str(problem).splitlines() if line.strip()), "")
    return f"{type(problem).__name__}: {first[:300]}"


# ---- clocks and counts ----


def timer(device: torch.device) -> Callable[[Step], Sample]:
    """A timer. ``wall``: between two events around a step that begins on an idle device, so it includes the launches
    for which the device waits. ``cpu``: until the call returns and the host is free again."""

    def on_cpu(step: Step) -> Sample:
        began = time.perf_counter()
        step()
        seconds = time.perf_counter() - began
        return Sample(seconds, seconds)

    def on_gpu(step: Step) -> Sample:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        began = time.perf_counter()
        start.record()
        step()
        stop.record()
        host = time.perf_counter() - began
        stop.synchronize()
        return Sample(start.elapsed_time(stop) / 1e3, host)

    return on_gpu if device.type == "cuda" else on_cpu


def median(step: Step, rounds: int, device: torch.device) -> float:
    clock = timer(device)
    clock(step)
    return spread([clock(step).wall for _ in range(rounds)]).median


def copy_bandwidth(context: Context) -> float:
    """Bytes read and written per second, in a copy that is far larger than the caches."""
    size = 2**25 if context.smoke else max(2**28, 8 * last_level_cache(context.device))
    source = torch.zeros(size, dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    return 2 * size / median(lambda: target.copy_(source), 10, context.device)


def graph_of(step: Step) -> Step:
    """The step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def launches(step: Step) -> Row:
    """Kernels and copies (with memset) of one step, by the profiler; empty if the profiler sees no device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    on_device = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Optimizer.", "ProfilerStep"))
    ]
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in on_device)
    return {"kernels": len(on_device) - copies, "copies": copies} if on_device else {}


def synchronisations(step: Step) -> int:
    """How often a step waits for the device, by torch's warnings; ``synchronize()`` itself gives none."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in said)


def counts(step: Step, context: Context) -> Row:
    return launches(step) | {"syncs": synchronisations(step)} if context.cuda else {}


def milliseconds(seconds: float) -> float:
    return round(1e3 * seconds, 4)


# ---- the parts ----


def machine(context: Context) -> Iterator[Case]:
    yield "versions", partial(found_versions, context.device)
    if context.cuda:
        yield "clocks", clocks
    yield "speed", partial(speed, context)


def found_versions(device: torch.device) -> Row:
    facts: Row = {"commit": commit(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    facts |= versions("triton", "numpy", "tokenizers", "safetensors")
    kernels = kernels_for(device.type)
    facts |= describe_hardware(device) | {"kernels": kernels if isinstance(kernels, str) else kernels.name}
    if device.type == "cuda":
        of = torch.cuda.get_device_properties(device)
        facts |= {"capability": f"{of.major}.{of.minor}", "processors": of.multi_processor_count}
        facts |= {"l2_cache": last_level_cache(device)}
    return facts


SMI = (
    *("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit"),
    *("temperature.gpu", "persistence_mode", "compute_mode", "mig.mode.current", "utilization.gpu", "memory.used"),
)


def clocks() -> Row:
    """Clocks and limits from nvidia-smi while the device is busy, or the error if it cannot be run."""
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    for _ in range(200):
        a @ a
    try:
        command = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader", "--id=0"]
        line = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as problem:
        return {"nvidia-smi": told(problem)}
    return dict(zip(SMI, (word.strip() for word in line.splitlines()[0].split(",")), strict=False))


def speed(context: Context) -> Row:
    n = 256 if context.smoke else 8192
    a = torch.randn(n, n, device=context.device, dtype=torch.bfloat16)
    product = 2 * n**3 / median(lambda: a @ a, 10, context.device)
    return {"copy_gb_per_s": round(copy_bandwidth(context) / 1e9, 1), "bf16_tflops": round(product / 1e12, 1)}


def tests(context: Context) -> bool:
    """Run the tests marked ``gpu`` and the parity tests of the Triton kernels, with a row for each. On a CPU, run only
    those of test_gpu.py, which work there."""
    place = ROOT / "tests"
    marked = [path for path in sorted(place.rglob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]
    first = place / "test_gpu.py"
    files = [first, *sorted(place.glob("triton_parity_*.py")), *(path for path in marked if path != first)]
    if not context.cuda:
        os.environ["EVENSTEP_GPU_TEST_DEVICE"] = "cpu"
        files = [first]
    # sys: the log remains the standard output of the process after it restarts itself
    options = ["-m", "gpu", "-v", "--tb=short", "--capture=sys", "-p", "no:cacheprovider"]
    recorder = Recorder(context)
    code = pytest.main([*options, *map(str, files)], plugins=[recorder])
    return code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) and not recorder.failed


class Recorder:
    """A pytest plugin that writes a row for every test, and skips tests that have a row."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.failed = any(row["outcome"] == "failed" for row in rows_in(context.rows))
        self.row: Row = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for item in items:
            if item.path.name.startswith("triton_parity"):  # usually run by test_kernels_triton.py as one test
                item.add_marker(pytest.mark.gpu)
        again = "test_kernels_do_what_the_plain_code_does[gpu]"
        items[:] = [item for item in items if item.nodeid not in self.context.done and item.name != again]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.context.emit(report.nodeid, {"outcome": "failed", "error": report.longreprtext[-2000:]})
            self.failed = True

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "setup":
            self.row = {"outcome": "passed", "seconds": 0.0}
        self.row["seconds"] = round(self.row["seconds"] + report.duration, 2)
        if report.failed:
            reason = next((line for line in report.longreprtext.splitlines()[::-1] if line.startswith("E ")), "")
            self.row |= {"outcome": "failed", "error": reason[1:].strip()[:300] or report.longreprtext[-300:]}
        elif report.skipped and self.row["outcome"] == "passed":
            self.row |= {"outcome": "skipped", "why": str(report.longrepr[-1] if report.longrepr else "")[:200]}
        if report.when == "teardown":
            self.context.emit(report.nodeid, self.row)
            self.failed |= self.row["outcome"] == "failed"
            if self.row["outcome"] == "failed" and not self.context.usable():
                print(report.nodeid, "left the device unusable")
                self.context.start_again()


class Steps:
    """Optimizer steps over the shapes of a LLaMA with prepared gradients."""

    def __init__(self, context: Context, size: str, dtype: str) -> None:
        self.context = context
        self.plan = Plan(context.size(size), OPTIMIZERS, device=context.device.type, dtype=dtype)

    @cached_property
    def workload(self) -> Workload:
        return Workload(self.plan)

    @cached_property
    def reference(self) -> Step:
        return self.prepared(KNOWN[REFERENCE]).step

    @cached_property
    def reference_graph(self) -> Step:
        return self.graph(KNOWN[REFERENCE])

    @cached_property
    def bandwidth(self) -> float:
        return copy_bandwidth(self.context)

    def cases(self) -> Iterator[Case]:
        for name in OPTIMIZERS:
            yield name, partial(self.row, name)

    def prepared(self, entry: Entry) -> Any:
        """The optimizer after its first steps."""
        optimizer = entry.make(self.workload.model)
        for turn in range(WARMUP):
            self.workload.ready(turn)
            optimizer.step()
        return optimizer

    def graph(self, entry: Entry) -> Step:
        self.workload.gradients.give(0)
        capturable = dataclasses.replace(entry, options=entry.options | {"capturable": True})
        return graph_of(capturable.make(self.workload.model).step)

    def row(self, name: str) -> Row:
        workload, rounds = self.workload, self.context.rounds
        with quiet():
            optimizer, reference = self.prepared(KNOWN[name]), self.reference
        row = self.timed(optimizer.step, reference)
        row |= {"host_ms": row.pop("cpu_ms")}
        kept = state_bytes(optimizer.state_dict()["state"], chain(workload.params, *workload.gradients.sets))
        # As in evenstep.bench: read and write parameters and state, read the gradients once.
        moved = 3 * workload.parameter_bytes + 2 * kept
        row |= {"state_bytes_per_param": round(kept / workload.parameters, 3), "bytes_moved": moved, "rounds": rounds}
        row |= {"floor_ms": milliseconds(moved / self.bandwidth), "copy_gb_per_s": round(self.bandwidth / 1e9, 1)}
        row |= counts(optimizer.step, self.context)
        if self.context.cuda:
            row |= self.graph_row(name)
        if workload.restore_parameters():
            row["error"] = "it made parameters NaN or infinite"
        return row

    def graph_row(self, name: str) -> Row:
        """Times of the step as a CUDA graph, or the reason why the optimizer cannot be captured."""
        try:
            with quiet():
                replay, reference = self.graph(KNOWN[name]), self.reference_graph
        except ValueError as refused:
            return {"graph": told(refused)}
        except Exception as problem:
            return {"error": f"as a graph: {told(problem)}"}
        return {f"graph_{key}": value for key, value in self.timed(replay, reference).items() if key != "cpu_ms"}

    def timed(self, step: Step, reference: Step) -> Row:
        rounds = self.context.rounds
        players = [Turns(str(i), work, rounds, self.workload.ready) for i, work in enumerate((step, reference))]
        take_turns(players, rounds, timer(self.context.device))
        for player in players:
            if player.problem is not None:
                raise player.problem
        samples = players[0].samples
        wall, host = (spread([sample[i] for sample in samples.values()]) for i in range(2))
        ratio = paired_ratio(samples, players[1].samples)
        assert ratio is not None
        row: Row = {"ms": milliseconds(wall.median), "ms_q1": milliseconds(wall.q1), "ms_q3": milliseconds(wall.q3)}
        return row | {"ratio": round(ratio.median, 3), "cpu_ms": milliseconds(host.median)}


def model_and_batch(context: Context, size: str, rows: int, length: int) -> tuple[Llama, Step]:
    """A model in bf16, and its forward and backward pass on random tokens."""
    torch.manual_seed(0)
    with context.device:
        model = Llama(llama_config(context.size(size), context.vocabulary, max_seq_len=length)).to(torch.bfloat16)
        tokens = torch.randint(context.vocabulary, (rows, length + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    chunk = chunk_rows(rows * length, context.vocabulary, total_memory(context.device))  # the trainer's rule

    def run() -> torch.Tensor:
        loss = model.loss(inputs, targets, chunk=chunk)
        loss.backward()
        return loss.detach()

    return model, run


def compile_blocks(model: Llama, context: Context) -> None:
    model.compile_loss = True
    for block in model.model.layers:
        block.compile(dynamic=False, backend="aot_eager" if context.smoke else "inductor")


def train(context: Context, size: str) -> Iterator[Case]:
    for name in TRAINED:
        yield name, partial(trained, context, size, name)


def trained(context: Context, size: str, name: str) -> Row:
    rows, length = (2, 64) if context.smoke else (128, 256)
    model, run = model_and_batch(context, size, rows, length)
    compile_blocks(model, context)
    optimizer: Any = KNOWN[name].make(model)
    losses: list[torch.Tensor] = []

    def step() -> None:
        losses.append(run())
        optimizer.step()
        optimizer.zero_grad()

    clock = timer(context.device)
    first = clock(step).wall
    for _ in range(WARMUP):
        once = clock(step).wall
    row = counts(step, context)
    if context.cuda:
        torch.cuda.reset_peak_memory_stats()
    steps = 3 if context.smoke else max(5, min(50, int(5 / once)))
    hosts: list[float] = []

    def several() -> None:
        for _ in range(steps):
            began = time.perf_counter()
            step()
            hosts.append(time.perf_counter() - began)

    seconds = clock(several).wall / steps
    tokens, peak = rows * length / seconds, peak_flops(context.device, "bf16")
    row |= {"tokens_per_second": round(tokens), "ms": milliseconds(seconds), "host_ms": milliseconds(min(hosts))}
    row |= {"mfu": round(model.flops_per_token(length) * tokens / peak, 4) if peak else None}
    row |= {"peak_gb": gigabytes(context), "first_step_s": round(first, 2), "tokens_per_step": rows * length}
    row |= {"first_loss": round(float(losses[0]), 4), "last_loss": round(float(losses[-1]), 4)}
    if not math.isfinite(row["last_loss"]):
        row["error"] = "the loss is not finite"
    return row


def gigabytes(context: Context) -> float | None:
    peak = peak_memory(context.device)
    return round(peak / 1e9, 3) if peak else None


def lowbit(context: Context) -> Iterator[Case]:
    for compiled in (False, True):
        for recipe in RECIPES:
            name = f"{recipe} {'compiled' if compiled else 'eager'}"
            yield name, partial(low_step, context, recipe, compiled)


def low_step(context: Context, recipe: str, compiled: bool) -> Row:
    """A training step of the 60m model with a recipe, alternating with the plain one."""
    rows, length = (2, 64) if context.smoke else (32, 256)

    def built(quantised: bool) -> tuple[Llama, Step]:
        model, run = model_and_batch(context, "60m", rows, length)
        if quantised:
            quantize_(model, recipe)
        if compiled:
            compile_blocks(model, context)
        optimizer: Any = KNOWN[REFERENCE].make(model)

        def step() -> None:
            run()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(WARMUP):
            step()
        return model, step

    model, low = built(True)
    peak = gigabytes(context)  # of this model alone
    _, plain = built(False)
    rounds = 3 if context.smoke else 15
    players = [Turns("low", low, rounds), Turns("plain", plain, rounds)]
    take_turns(players, rounds, timer(context.device))
    for player in players:
        if player.problem is not None:
            raise player.problem
    walls = [spread([sample.wall for sample in player.samples.values()]).median for player in players]
    ratio = paired_ratio(players[0].samples, players[1].samples)
    assert ratio is not None
    used = {m.kernel.name if m.kernel else "emulated" for m in model.modules() if isinstance(m, LowBitLinear)}
    row: Row = {"ms": milliseconds(walls[0]), "plain_ms": milliseconds(walls[1]), "ratio": round(ratio.median, 3)}
    return row | {"peak_gb": peak, "product": ", ".join(sorted(used))} | counts(low, context)


def stability(context: Context) -> Iterator[Case]:
    """The cells of the stability suite, as many as there is time for."""
    scale = SCALES["gpu"]
    if context.smoke:
        small = {"tasks": ("gradient",), "remedies": ("Adam", "Stable-SPAM .7/.9"), "source": scale.source}
        scale = dataclasses.replace(SCALES["smoke"], **small)
    for cell in wanted(scale, scale.chosen(), {}):
        if cell.work.endswith(":measure"):  # the others measure the cost of a step, and alarms
            yield cell.name, partial(final_losses, dict(cell.setting))


def final_losses(setting: dict[str, Any]) -> Row:
    """The final validation loss of each variant of a cell, None for a model that is lost."""
    trials = measure(setting, Path(), lambda text: None)["trials"]
    return {name: found[0]["loss"] for name, found in trials.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device; test the script on a CPU with --device cpu --smoke", file=sys.stderr)
        return 1
    context = Context(torch.device(args.device), args.smoke, args.rows)
    kind, *of = args.part.split("-")
    if not context.cuda:
        torch.set_num_threads(1)
    if kind == "tests":
        return 0 if tests(context) else 1
    cases = {"machine": machine, "steps": lambda c, *of: Steps(c, *of).cases(), "train": train, "lowbit": lowbit}
    cases["stability"] = stability
    return 0 if run_cases(context, cases[kind](context, *of)) else 1


if __name__ == "__main__":
    sys.exit(main())
