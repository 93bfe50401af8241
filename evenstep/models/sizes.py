"""The named sizes: one table, the shapes of the papers this package follows, and ``tiny`` for a laptop.

The names say roughly how many parameters a size has with a vocabulary of 32000 and an untied head (100m: 32100).
``tiny`` is ours: 1.4 million parameters with a vocabulary of 2048, small enough to learn something in three minutes on
one CPU core.
"""

from __future__ import annotations

from typing import Any

from evenstep.errors import EvenstepError, nearest
from evenstep.models.llama import LlamaConfig

_SHAPES = {  # hidden, intermediate, layers, heads
    "tiny": (128, 384, 4, 4),
    "9m": (128, 352, 4, 4),
    "20m": (256, 688, 4, 4),
    "35m": (384, 1024, 6, 8),
    "40m": (416, 1024, 8, 8),
    "60m": (512, 1376, 8, 8),
    "71m": (512, 1368, 12, 8),
    "100m": (640, 1708, 12, 10),
    "130m": (768, 2048, 12, 12),
    "250m": (768, 2560, 24, 16),
    "350m": (1024, 2736, 24, 16),
    "1b": (2048, 5461, 24, 32),
    "3b": (2560, 6848, 32, 32),
    "7b": (4096, 11008, 32, 32),
}
_FIELDS = ("hidden_size", "intermediate_size", "num_layers", "num_heads")

SIZES: dict[str, dict[str, int]] = {name: dict(zip(_FIELDS, shape, strict=True)) for name, shape in _SHAPES.items()}


def llama_config(size: str, vocab_size: int, **changes: Any) -> LlamaConfig:
    """The configuration of a named size, with any field of :class:`LlamaConfig` changed by keyword.

    Raises ``EvenstepError`` for a size or a field that does not exist (naming the nearest) and for values that do not
    fit together.
    """
    if size not in SIZES:
        raise EvenstepError(
            f"unknown model size {size!r}: choose one of {', '.join(SIZES)}{nearest(size, list(SIZES))}"
        )
    allowed = [name for name in LlamaConfig.__dataclass_fields__ if name != "vocab_size"]
    for name in changes:
        if name not in allowed:
            raise EvenstepError(
                f"unknown model field {name!r}: choose from {', '.join(allowed)}{nearest(name, allowed)}"
            )
    return LlamaConfig(**{"vocab_size": vocab_size, **SIZES[size], **changes})
