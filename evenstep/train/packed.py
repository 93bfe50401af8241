"""The state tensors of torchao, which are made of codes and scales: taken apart for a checkpoint, and made anew for it.

Ours of ``state="int8"`` are among them. Only these classes are known: a checkpoint names the class of what it holds,
and must not name one that runs code when it is imported.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from evenstep.errors import EvenstepError
from evenstep.optim.distributed import local
from evenstep.optim.distributed import num_shards as parts
from evenstep.optim.distributed import shard_like as like

_CLASSES = {
    "OptimState8bit": "torchao.optim.subclass_8bit",
    "OptimState4bit": "torchao.optim.subclass_4bit",
    "OptimStateFp8": "torchao.optim.subclass_fp8",
}
_PARTS = ("codes", "scale")
"""What changes of them; each is a tensor of its own in a shard. The table of code values is the class's own."""


def facts_of(value: Any) -> dict[str, Any] | None:
    """What `blank` makes such a tensor again from, None for other tensors. EvenstepError for a tensor that is made of
    others in a way that is not known here."""
    if not isinstance(value, Tensor) or not is_traceable_wrapper_subclass(local(value)):
        return None
    part: Any = local(value)
    name, module = type(part).__name__, type(part).__module__
    if _CLASSES.get(name) != module:
        raise EvenstepError(
            f"a checkpoint cannot hold a {module}.{name}, a tensor made of others, in an optimizer's "
            "state; take an optimizer that keeps plain tensors, or torchao's"
        )
    return {
        "class": name,
        "signed": getattr(part, "signed", None),
        "block": int(part.block_size),
        "dtype": part.dtype,
    }


def taken_apart(value: Tensor) -> dict[str, Tensor]:
    """The plain tensors that one with `facts_of` is made of, sharing its memory, by name."""
    return {name: like(value, getattr(local(value), name)) for name in _PARTS}


def blank(p: Tensor, facts: dict[str, Any]) -> Tensor | None:
    """Zeros for the parameter ``p``, kept as ``facts`` say and cut as ``p`` is; None where its parts are no whole
    blocks. EvenstepError for a class that is not known, or not installed."""
    part, block, name = local(p), facts["block"], facts["class"]
    if part.numel() * parts(p) != p.numel() or not part.numel() or part.numel() % block:
        return None
    try:
        cls = getattr(importlib.import_module(_CLASSES[name]), name)
    except (KeyError, ImportError):
        raise EvenstepError(f"the checkpoint holds an optimizer's state as {name}; pip install torchao") from None
    signed = () if facts["signed"] is None else (facts["signed"],)
    return like(p, cls.zeros(part.shape, *signed, block, part.device, dtype=facts["dtype"]))
