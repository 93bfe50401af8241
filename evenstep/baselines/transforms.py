"""Gradient transforms by name, applied before any optimizer: ``"adaclip + adagn(gamma1=0.7)"``.

The text is the value of the option ``optim.before``. Torch is imported when transforms are built, so that the list of
names costs nothing.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from evenstep.errors import EvenstepError, nearest

if TYPE_CHECKING:
    from torch.optim import Optimizer

# Name -> class in evenstep.optim.transforms, and the arguments that the name implies.
TRANSFORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "adaclip": ("AdaClip", {}),
    "adagn": ("AdaGN", {}),
    "gradient_stabilizer": ("GradientStabilizer", {}),
    "momentum_reset": ("MomentumReset", {}),
    "norm_clip": ("NormClip", {}),
    "value_clip": ("ValueClip", {}),
    "spike_clip": ("SpikeClip", {}),
    "nullify": ("SpikeClip", {"spikes": "zero"}),
    "agc": ("AGC", {}),
    "zclip": ("ZClip", {}),
    "adagc": ("AdaGC", {}),
    "autoclip": ("AutoClip", {}),
    "skip_step": ("SkipStep", {}),
}

_HOW = "give names with + between them, with arguments where needed, such as 'adaclip + adagn(gamma1=0.7)'"


def parse(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The names in ``text``, in order, with their keyword arguments. ``EvenstepError`` for any other text.

    Example:
        >>> parse("norm_clip + adagn(gamma1=0.7)")
        [('norm_clip', {}), ('adagn', {'gamma1': 0.7})]
    """
    if not text.strip():
        return []
    # Python's own grammar reads the text, and literal_eval the arguments: nothing is executed.
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise EvenstepError(f"optim.before: {text!r} cannot be read; {_HOW}") from None
    return [_term(node, text) for node in _terms(tree)]


def _terms(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from _terms(node.left)
        yield from _terms(node.right)
    else:
        yield node


def _term(node: ast.expr, text: str) -> tuple[str, dict[str, Any]]:
    call = node if isinstance(node, ast.Call) else None
    name = call.func if call else node
    if not isinstance(name, ast.Name) or (call and (call.args or not all(k.arg for k in call.keywords))):
        raise EvenstepError(f"optim.before: {text!r} cannot be read; {_HOW}")
    if name.id not in TRANSFORMS:
        raise EvenstepError(
            f"optim.before: unknown transform '{name.id}'{nearest(name.id, [*TRANSFORMS])} "
            f"(there are: {', '.join(TRANSFORMS)})"
        )
    try:
        return name.id, {str(k.arg): ast.literal_eval(k.value) for k in (call.keywords if call else [])}
    except ValueError:
        raise EvenstepError(
            f"optim.before: {text!r} has an argument that is neither a number nor a text; {_HOW}"
        ) from None


def build_transforms(text: str) -> list[Any]:
    """The transforms that ``text`` names, in order.

    Raises:
        EvenstepError: a name or an argument that does not exist, or a value out of range.

    Example:
        >>> [type(transform).__name__ for transform in build_transforms("adaclip + nullify")]
        ['AdaClip', 'SpikeClip']
    """
    import evenstep.optim.transforms as known

    found = []
    for name, arguments in parse(text):
        cls_name, fixed = TRANSFORMS[name]
        cls = getattr(known, cls_name)
        # The signature of the constructor is the list of arguments. Those that the name implies ("nullify" is SpikeClip
        # with spikes="zero") cannot be given.
        allowed = [key for key in inspect.signature(cls).parameters if key not in fixed]
        for key in arguments:
            if key not in allowed:
                raise EvenstepError(
                    f"optim.before: {name} has no argument '{key}'{nearest(key, allowed)} "
                    f"(it has: {', '.join(allowed) or 'none'})"
                )
        try:
            found.append(cls(**fixed, **arguments))
        except (TypeError, ValueError) as problem:
            raise EvenstepError(f"optim.before: {problem}") from None
    return found


def add_transforms(optimizer: Optimizer, text: str) -> Optimizer:
    """``optimizer`` with the transforms of ``text`` applied to its gradients; itself when ``text`` is empty."""
    units = build_transforms(text)
    if not units:
        return optimizer
    from evenstep.optim import stabilize

    try:
        return stabilize(optimizer, *units)
    except (TypeError, ValueError) as problem:
        raise EvenstepError(f"optim.before: {problem}") from None
