"""The Triton kernels: parity under the interpreter, compilation for GPUs elsewhere, what only a GPU shows."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from evenstep import SCALE, SPAM, StableSPAM
from evenstep.kernels.cuda import TritonKernels

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests/support"
gpu = pytest.mark.gpu


def run(*args, interpret=False):
    # Triton reads the variable once, when it is first imported: hence processes of their own.
    paths = [str(ROOT), str(SUPPORT), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"TRITON_INTERPRET": str(int(interpret)), "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, *args], env=env, cwd=ROOT, capture_output=True, text=True)
    if interpret and "only 0-dimensional arrays can be converted to Python scalars" in done.stdout:
        pytest.skip(f"the interpreter of Triton {version('triton')} does not work with NumPy {version('numpy')}")
    return done


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=gpu)], ids=["interpreter", "gpu"])
def test_kernels_do_what_the_plain_code_does(interpret):
    done = run(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *map(str, SUPPORT.glob("triton_parity_*.py")),
        interpret=interpret,
    )
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.parametrize(
    ("interpret", "which"),
    [
        (True, ["-k", "stochastic"]),
        pytest.param(True, [], marks=pytest.mark.slow),
        pytest.param(False, [], marks=gpu),
    ],
    ids=["interpreter", "interpreter, all", "gpu"],
)
def test_optimizers_step_by_kernels_as_by_the_plain_code(interpret, which):
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(SUPPORT / "triton_optimizers.py"), *which]
    done = run(*command, interpret=interpret)
    assert done.returncode == 0, done.stdout[-6000:]


slow = pytest.mark.slow
# Constants of a kernel -> the most registers (above 128, a processor holds fewer than four programs), and the most
# instructions per entry of its first loop. Counted with triton 3.8; the limits leave a tenth.
LIMITS = {
    ("measure_chunks", "fp32", None): (64, 5),
    ("adam_chunks", "fp32", "False"): (128, 85),
    ("adam_chunks", "fp32", "True"): (128, 130),
}


@pytest.mark.parametrize(
    "how",
    [
        ["90", "--few"],
        pytest.param(["90"], marks=slow),
        *(pytest.param([arch, "--all"], marks=slow) for arch in ("80", "89", "90", "100")),
    ],
    ids=" ".join,
)
def test_kernels_compile_without_spilling_and_move_16_bytes_at_a_time(how):
    done = run("benchmarks/registers.py", "--json", "--arch", *how)
    assert done.returncode == 0, done.stderr[-6000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    expected = {"measure_chunks", "adam_chunks"}
    expected |= set() if "--few" in how else {"clip_chunks", "adam_limits", "adam_numbers", "adam_report", "row_chunks"}
    assert expected <= {x["kernel"] for x in found}
    for kernel in found:
        constants = kernel["options"]
        assert kernel["registers"] <= 255 and kernel["stack"] <= 16, kernel
        assert kernel["wide"] > 0 or constants.get("ALIGNED", "0") == "0", kernel
        dtypes = {constants[name] for name in "PGMV" if name in constants}
        # Threads exchange entries only in the loop of a mask, or of blocks of codes.
        if dtypes and dtypes <= {"fp32", "bf16"} and constants.get("MASKED", "False") == "False":
            assert kernel["barriers"] == 0, kernel
        limits = LIMITS.get((kernel["kernel"], *dtypes, constants.get("CAPPED"))) if len(dtypes) == 1 else None
        if limits and constants["ALIGNED"] != "0" and kernel["arch"] == 90:
            assert kernel["registers"] <= limits[0] and kernel["instructions"][0] <= limits[1], kernel


def test_nothing_loads_triton_before_it_is_launched():
    code = "import sys, evenstep, evenstep.kernels.cuda as c; c.TritonKernels(); assert 'triton' not in sys.modules"
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_served_is_refused_with_a_reason():
    kernels, x = TritonKernels(), torch.zeros(4, 4)
    assert "CUDA" in kernels.refusal(x, x)


# ---- on a GPU ----

MAKERS = {
    "stable_spam": lambda ps, **o: StableSPAM(ps, **o),
    "spam": lambda ps, **o: SPAM(ps, clip_start=1, **o),
    "scale": lambda ps, **o: SCALE([{"params": ps, "kind": "hidden"}], **o),
}
every_optimizer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def stepped(make, count=4, **options):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(64, 48 + i, device="cuda")) for i in range(count)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params, make(params, fused=True, **options)


@gpu
@every_optimizer
def test_a_step_does_not_wait_for_the_device(make):
    _, optimizer = stepped(make)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@every_optimizer
def test_a_captured_step_replays_as_steps(make):
    (plain, eager), (params, optimizer) = stepped(make, capturable=True), stepped(make, capturable=True)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    junk = [torch.randn(1000, device="cuda") for _ in range(100)]  # what would overwrite tables that are not kept
    for step in range(3):
        eager.load_state_dict(optimizer.state_dict())
        for p, q in zip(plain, params, strict=True):
            q.grad.copy_(torch.randn_like(q) * (step + 1))
            p.grad.copy_(q.grad)
            p.data.copy_(q)
        eager.step()
        graph.replay()
        for p, q in zip(plain, params, strict=True):
            torch.testing.assert_close(q, p, rtol=0, atol=0)
    del junk


@gpu
@every_optimizer
def test_launches_do_not_grow_with_the_number_of_tensors(make):
    def launches(count):
        _, optimizer = stepped(make, count)
        optimizer.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            optimizer.step()
            torch.cuda.synchronize()
        return sum("_chunks" in event.name or "totals" in event.name for event in profile.events())

    assert 0 < launches(300) == launches(10) <= 6


@gpu
@pytest.mark.slow
def test_tensors_of_more_than_2_to_the_31_entries():
    n = 2**31 + 4096
    g = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    g[-1], g[5] = 3.0, -4.0
    found = TritonKernels().measure([g])
    assert found.peak.item() == 4.0 and found.norm.item() == pytest.approx(5.0)
