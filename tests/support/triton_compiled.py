"""Compile the Triton kernels for a GPU that need not be here, as launches on CPU tensors would ask for, and say what
came of it: a line of JSON per kernel. Arguments: compute capability (90), and ``all`` for every combination of dtypes.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton_support
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from evenstep.kernels.cuda import TritonKernels
from evenstep.kernels.interface import ADAM_ROWS, SCALE_ROWS
from evenstep.optim.state import moment

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
FLOAT, BF16 = torch.float32, torch.bfloat16


class Elsewhere:
    """A driver without a device."""

    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compiled(self, *args, grid, warmup, _run=JITFunction.run, **options):
    kernel = _run(self, *args, grid=grid, warmup=True, **options)
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    found = {
        "kernel": self.__name__,
        "options": {name: str(value) for name, value in options.items() if name.isupper()},
        "registers": registers,
        "stack": stack,
        "wide": len(re.findall(r"(?:ld|st)\.global[\w.:]*\.(?:v4\.b32|v8\.b16|v2\.b64)", ptx)),
    }
    print(json.dumps(found))


def adam(p, g, state, **options):
    n = 4096
    moments = [[moment(torch.zeros(n), state, signed=signed)] for signed in (True, False)]
    table = torch.ones(len(ADAM_ROWS), 1)
    triton_support.adam_([torch.zeros(n, dtype=p)], [torch.zeros(n, dtype=g)], *moments, table, **options)


def rows(shape, state=None, divisors=(), dtype=FLOAT):
    x = torch.zeros(shape, dtype=dtype)
    averages = [moment(x, state)] if state else []
    triton_support.rows_([x], [x], averages, list(divisors), torch.ones(len(SCALE_ROWS), 1))


if __name__ == "__main__":
    driver.set_active(Elsewhere())
    JITFunction.run = compiled
    KERNELS = TritonKernels()
    x = torch.zeros(4096)
    KERNELS.clip_norms([x], KERNELS.measure([x]), torch.ones(1), torch.ones(1))
    adam(FLOAT, FLOAT, "fp32", capped=True)
    rows((8, 512))
    if "all" in sys.argv:
        for p, g, state in itertools.product((FLOAT, BF16), (FLOAT, BF16), ("fp32", "bf16", "int8")):
            adam(p, g, state)
        adam(BF16, BF16, "fp32", lost=[x.bfloat16()])
        adam(BF16, BF16, "fp32", seeds=[torch.tensor(1, dtype=torch.int32)], capped=True, zero_history=True)
        for state, shape in itertools.product((None, "fp32", "bf16", "int8"), ((8, 512), (8, 1376), (400, 5))):
            rows(shape, state)
        rows((8, 512), divisors=[torch.ones(1, 512)], dtype=BF16)
        triton_support.columns([torch.zeros(512, 512), torch.zeros(512, 5, dtype=BF16)])
        KERNELS.transform([x], [x.bfloat16()], torch.ones(3, 1))
        KERNELS.measure([x.bfloat16(), torch.zeros(4099)])
