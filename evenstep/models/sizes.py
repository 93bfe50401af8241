"""The named sizes of models: the shapes of the papers that evenstep follows, and ``tiny`` for a laptop.

A name is roughly the number of parameters with a vocabulary of 32000 and an untied head (100m: 32100). ``tiny`` is
evenstep's own: 1.4 million parameters with a vocabulary of 2048, which learn something in three minutes on one core.
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
    """The configuration of a named size.

    Args:
        size: a name in ``SIZES``.
        vocab_size: rows of the token table and of the head.
        changes: other fields of :class:`LlamaConfig`, by keyword.

    Raises:
        EvenstepError: a size or a field that does not exist, with the nearest name, or values that do not fit together.

    Example:
        >>> llama_config("60m", vocab_size=32000, num_layers=4).num_layers
        4
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
