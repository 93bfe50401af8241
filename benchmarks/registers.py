"""What the Triton kernels compile to, for GPUs that need not be here: registers, spills, instructions, access widths.

    python benchmarks/registers.py [--arch 80 90 100] [--few | --all] [--json]

``--all`` compiles every combination of dtypes that a step may meet (minutes), ``--few`` the two kernels that read most;
without either the kernels of a step in fp32 and bf16. Launches on CPU tensors ask for the compilation; nothing runs.

Instructions are those of the loops in SASS, per entry: the body of every loop over the entries that one pass of it
treats. An H100 reads 3.35 TB/s and issues 2.9e13 instructions a second (each of one lane). By these figures of the
vendor, memory sets the pace of a loop that has fewer than 9 instructions per byte that it moves.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "tests/support")]
import torch  # noqa: E402
import triton  # noqa: E402
import triton_support  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from evenstep.kernels import cuda  # noqa: E402
from evenstep.kernels.cuda import TritonKernels  # noqa: E402
from evenstep.kernels.interface import ADAM_ROWS, SCALE_ROWS, StepTensors  # noqa: E402
from evenstep.optim import SCALE, SPAM, StableSPAM, fused  # noqa: E402
from evenstep.optim.state import moment  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
FLOAT, BF16 = torch.float32, torch.bfloat16


class Elsewhere:
    """A driver without a device."""

    arch = 90

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def disassembled(cubin: bytes) -> tuple[int, int, list[tuple[int, str]]]:
    """Registers and bytes of stack of a kernel, and its instructions with their addresses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = lambda *a: subprocess.run(a, capture_output=True, text=True, check=True).stdout  # noqa: E731
        usage = run(TOOLS / "cuobjdump", "-res-usage", file.name)
        code = run(TOOLS / "cuobjdump", "-sass", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", code)
    return registers, stack, [(int(at, 16), text.strip()) for at, text in lines]


def loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """The bodies of the innermost loops: from the target of a backward branch to the branch."""
    found = []
    for at, text in code:
        branch = re.search(r"\bBRA\S*\s.*0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < at:
            found.append((int(branch[1], 16), at))
    inner = [(a, b) for a, b in found if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in found)]
    return [[text for at, text in code if a <= at <= b] for a, b in inner]


def width(text: str) -> int:
    """Bytes per thread of a global access."""
    sizes = {r"\.128": 16, r"\.64": 8, r"\.[US]16": 2, r"\.[US]8": 1}
    return next((size for mark, size in sizes.items() if re.search(mark, text)), 4)


FOUND: list[dict[str, object]] = []


def compiled(self, *args, grid, warmup, _run=JITFunction.run, **options):
    kernel = _run(self, *args, grid=grid, warmup=True, **options)
    registers, stack, code = disassembled(kernel.asm["cubin"])
    ptx, bodies = kernel.asm["ptx"], loops(code)
    # A pass of a loop treats TILE entries, or several times as many where the compiler has unrolled it. A body that
    # holds several loads of 16 bytes from the same stream tells so only for kernels that read one stream.
    entries = options.get("TILE", 0) / (32 * options["num_warps"])
    if self.__name__ in ("measure_chunks", "clip_chunks"):
        size = 4 if options["G"] is triton.language.float32 else 2
        counts = [len(b) * size / (sum(width(x) for x in b if "LDG" in x) or size) for b in bodies]
    else:
        counts = [len(b) / entries for b in bodies] if entries else []
    found = {
        "arch": driver.active.arch,
        "kernel": self.__name__,
        "options": {name: str(value) for name, value in options.items() if name.isupper()},
        "registers": registers,
        "stack": stack,
        "instructions": [round(count, 1) for count in counts],
        "barriers": sum("BAR.SYNC" in x for b in bodies for x in b),
        "widths": sorted({width(x) for b in bodies for x in b if re.search(r"\b(LDG|STG)", x)}, reverse=True),
        "wide": len(re.findall(r"(?:ld|st)\.global[\w.:]*\.(?:v4\.b32|v8\.b16|v2\.b64)", ptx)),
    }
    if found not in FOUND:
        FOUND.append(found)
    return kernel


def adam(p, g, state, capped=False, zero_history=False, **lists):
    n = 4096
    moments = [[moment(torch.zeros(n), state, signed=signed)] for signed in (True, False)]
    tensors = StepTensors([torch.zeros(n, dtype=p)], [torch.zeros(n, dtype=g)], *moments, **lists)
    table = torch.ones(len(ADAM_ROWS), 1)
    cuda.launches().adam_update_(cuda.launches().adam_job(tensors), tensors, table, capped, zero_history)


def rows(shape, state=None, divisors=(), dtype=FLOAT):
    x = torch.zeros(shape, dtype=dtype)
    averages = [moment(x, state)] if state else []
    triton_support.rows_([x], [x], averages, list(divisors), torch.ones(len(SCALE_ROWS), 1))


def step(make, *shapes):
    """A whole step, for the kernels of whole tensors."""
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.zeros_like(p)
    make(params).step()


def compile_all(kernels: TritonKernels, few: bool, every: bool) -> None:
    # CPU tensors are let through: nothing is launched.
    fused.kernels_for, fused.failing, cuda._refused = lambda device: kernels, lambda *a: None, lambda device: None
    x = torch.zeros(4096)
    adam(FLOAT, FLOAT, "bf16")
    plan, at = cuda.launches()._flat_plan([x])
    cuda.launches()._measure(plan, at, 1, torch.zeros(2, plan.chunks))
    if few:
        return
    step(StableSPAM, (8, 512))
    step(SPAM, (8, 512))
    step(lambda ps: SCALE([{"params": ps, "kind": "hidden"}]), (8, 512))
    adam(BF16, BF16, "bf16")
    one, flag = torch.ones(1), torch.ones(1, dtype=torch.bool)
    kernels.adaclip(one, one, one, one, 0.999, False)
    kernels.adagn(one, one, one, flag, one, one, one, [0.7, 0.9, 1e-8, False])
    at = kernels.scalars([torch.ones(()), torch.ones(())])
    kernels.read(at)
    kernels.keep(at, [one], flag)
    if not every:
        return
    step(lambda ps: SPAM(ps, density=0.25), (8, 512))
    for kind in ("embedding", "last"):
        step(lambda ps, kind=kind: SCALE([{"params": ps, "kind": kind}]), (512, 512))
    for p, g, state in itertools.product((FLOAT, BF16), (FLOAT, BF16), ("fp32", "bf16", "int8")):
        adam(p, g, state)
    adam(BF16, BF16, "fp32", lost=[x.bfloat16()])
    adam(BF16, BF16, "fp32", seeds=[torch.tensor(1, dtype=torch.int32)], capped=True, zero_history=True)
    for state, shape in itertools.product((None, "fp32", "bf16", "int8"), ((8, 512), (8, 1376), (400, 5))):
        rows(shape, state)
    rows((8, 512), divisors=[torch.ones(1, 512)], dtype=BF16)
    triton_support.columns([torch.zeros(512, 512), torch.zeros(512, 5, dtype=BF16)])
    kernels.transform([x], [x.bfloat16()], torch.ones(3, 1))
    kernels.measure([x.bfloat16(), torch.zeros(4099)])
    kernels.restore_unless(kernels.save_unless(flag, [0], [x]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], help="compute capabilities, such as 90")
    parser.add_argument("--all", action="store_true", help="every combination of dtypes")
    parser.add_argument("--few", action="store_true", help="two kernels")
    parser.add_argument("--json", action="store_true", help="a line of JSON per kernel instead of the table")
    given = parser.parse_args()
    JITFunction.run = compiled
    driver.set_active(elsewhere := Elsewhere())
    kernels = TritonKernels()
    for arch in given.arch:
        elsewhere.arch = arch
        for function in (f for m in map(sys.modules.get, MODULES) for f in vars(m).values()):
            if isinstance(function, JITFunction):
                function.device_caches.clear()
        compile_all(kernels, given.few, given.all)
    if given.json:
        print(*map(json.dumps, FOUND), sep="\n")
        return
    print(
        "| sm | kernel | constants | registers | stack | instructions per entry | barriers | widths |\n|" + "---|" * 8
    )
    for x in FOUND:
        names = {k: v for k, v in x["options"].items() if k not in ("CHUNK", "ALIGNED") and v != "False"}
        named = " ".join(k if v == "True" else f"{k}={v}" for k, v in names.items())
        cells = [x["arch"], x["kernel"], named, x["registers"], x["stack"], " + ".join(map(str, x["instructions"]))]
        print("|", " | ".join(map(str, [*cells, x["barriers"], ", ".join(map(str, x["widths"]))])), "|")


MODULES = [f"evenstep.kernels.triton_{name}" for name in ("flat", "numbers", "rows")]

if __name__ == "__main__":
    main()
