"""cpu_quant.cpp as a torch operator: a tensor through a low-bit format and back in one pass, to the bit what
``evenstep/lowbit/formats.py`` computes. ``torch.ops.evenstep.cpu_fake_quantize`` exists once ``ready()`` said yes.
"""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from evenstep.kernels.cpu import library, threads
from evenstep.kernels.interface import Unavailable

FIELDS = ("group", "integer", "mantissa", "low", "top_exponent", "scale", "rule", "total", "asymmetric", "official",
          "outliers")  # fmt: skip
"""Of a format, as integers, in the order that the operator takes; see cpu_quant.cpp."""
SCALES, RULES, TOTALS = ("fp32", "e8m0", "e4m3"), ("floor", "ceil", "even", "rceil"), ("none", "row", "tensor")
"""What ``scale``, ``rule`` and ``total`` count through."""
MOST_OUTLIERS = 4
DTYPES = (torch.float32, torch.bfloat16)
"""Of the input; of the output the same, or bf16."""

_SCHEMA = "(Tensor x, int width, int[] plan, float top, ScalarType dtype, Tensor? after) -> Tensor"

_known: torch.library.Library | None = None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def ready() -> bool:
    """Whether there is a library with this kernel; registers the operator."""
    return _ready()


@functools.cache
def _ready() -> bool:
    global _known
    try:
        loaded = library()
        loaded.evenstep_quant_fields.restype = ctypes.c_int64
        if loaded.evenstep_quant_fields() != len(FIELDS) + 4:
            return False
    except (Unavailable, AttributeError):  # an older build lacks the function
        return False
    # The library is kept: torch removes the operator when its library is freed.
    _known = torch.library.Library("evenstep", "FRAGMENT")  # type: ignore[no-untyped-call, unused-ignore]
    _known.define(f"cpu_fake_quantize{_SCHEMA}")  # type: ignore[no-untyped-call, unused-ignore]
    _known.impl("cpu_fake_quantize", _cpu_fake_quantize, "CPU")  # type: ignore[no-untyped-call, unused-ignore]
    torch.library.register_fake("evenstep::cpu_fake_quantize", _meta_cpu_fake_quantize, lib=_known)
    return True


def _cpu_fake_quantize(
    x: Tensor, width: int, plan: Sequence[int], top: float, dtype: torch.dtype, after: Tensor | None
) -> Tensor:
    """``x`` as rows of ``width`` entries, each row in groups by ``plan`` (``FIELDS``). ``after`` is not read: a
    compiler that sees it there cannot do this before it has made that tensor."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device="cpu")
    rows = x.numel() // width
    numbers = (rows, width, min(plan[0], width) or width, *(DTYPES.index(t) for t in (x.dtype, dtype)), *plan[1:])
    # Threads cost more than they bring for what fits a cache.
    library().evenstep_fake_quantize(
        (ctypes.c_int64 * len(numbers))(*numbers),
        ctypes.c_int64(threads() if x.numel() > 1 << 16 else 1),
        ctypes.c_float(top),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
    )
    return out


def _meta_cpu_fake_quantize(
    x: Tensor, width: int, plan: Sequence[int], top: float, dtype: torch.dtype, after: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)
