"""cpu_quant.cpp as a torch operator: a tensor through a low-bit format and back in one pass.

Results equal those of evenstep/lowbit/formats.py bit for bit. ``torch.ops.evenstep.cpu_fake_quantize`` exists once
`ready` has returned True. Unlike the fused steps this is an operator, which torch.compile keeps as one call: it returns
a new tensor, and its input may be a compiler's copy.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from evenstep.kernels.cpu import library, threads
from evenstep.kernels.interface import Unavailable

# Fields of a format, passed as integers in this order; ``struct QuantPlan`` of cpu_quant.cpp explains them.
FIELDS = ("group", "integer", "mantissa", "low", "top_exponent", "scale", "rule", "total", "asymmetric", "official",
          "outliers")  # fmt: skip
# Values of ``scale``, ``rule`` and ``total``; their indices are the enums of cpu_quant.cpp.
SCALES, RULES, TOTALS = ("fp32", "e8m0", "e4m3"), ("floor", "ceil", "even", "rceil"), ("none", "row", "tensor")
# Entries of a group that may be kept exactly: the kernel is compiled for each number.
MOST_OUTLIERS = 4
# Dtypes of the input; the output has the same, or bf16.
DTYPES = (torch.float32, torch.bfloat16)

# `after` is not read. A compiler that sees it among the arguments makes that tensor before this call; otherwise it
# could fuse the two and change the rounding.
_SCHEMA = "(Tensor x, int width, int[] plan, float top, ScalarType dtype, Tensor? after) -> Tensor"

_known: torch.library.Library | None = None


def constant_result(function: Callable[[], bool]) -> Callable[[], bool]:
    """Mark ``function`` as `torch.compiler.assume_constant_result` does: torch.compile takes its answer as a constant.

    The decorator of torch loads the compiler when a module is imported, which costs more than a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_result
def ready() -> bool:
    """Whether the CPU library is there and has this kernel; registers the operator on the first call.

    torch.compile takes the answer as a constant instead of tracing the loading of a library.
    """
    return _ready()


@functools.cache
def _ready() -> bool:
    global _known
    try:
        loaded = library()
        loaded.evenstep_quant_fields.restype = ctypes.c_int64
        # A plan also has the number of rows, their width, and the dtypes of input and output.
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
    """Quantise and dequantise ``x`` (fp32 or bf16) into a new tensor of its shape in ``dtype``.

    ``x`` counts as rows of ``width`` entries, each cut into groups that share a scale; the last group of a row may be
    shorter. ``plan``: the format, `FIELDS`. ``top``: the largest value of its grid.
    """
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device="cpu")
    rows = x.numel() // width
    # ``struct QuantPlan``; a group of 0 entries stands for the whole row.
    numbers = (rows, width, min(plan[0], width) or width, *(DTYPES.index(t) for t in (x.dtype, dtype)), *plan[1:])
    library().evenstep_fake_quantize(
        (ctypes.c_int64 * len(numbers))(*numbers),
        # Below 2^16 entries, which fit a cache, starting threads costs more than they save.
        ctypes.c_int64(threads() if x.numel() > 1 << 16 else 1),
        ctypes.c_float(top),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
    )
    return out


def _meta_cpu_fake_quantize(
    x: Tensor, width: int, plan: Sequence[int], top: float, dtype: torch.dtype, after: Tensor | None
) -> Tensor:
    """The result's shape and dtype, for tracing and the meta device."""
    return x.new_empty(x.shape, dtype=dtype)
