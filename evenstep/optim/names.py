"""Names of hyperparameters: the official ones, those that mean nothing here, and the mistyped."""

from collections.abc import Mapping
from typing import Any

from evenstep.errors import nearest

_INERT = {
    "foreach": "evenstep chooses its own loops and kernels; leave it out",
    "differentiable": "the step is not differentiable; leave it out",
    "amsgrad": "it is not part of the papers' rules; leave it out",
}
"""Arguments that trainers pass to any optimizer; accepted while they ask for nothing."""


def without_inert(given: Mapping[str, Any]) -> dict[str, Any]:
    for name, why in _INERT.items():
        if given.get(name):
            raise ValueError(f"{name}={given[name]!r} is not supported: {why}")
    return {name: value for name, value in given.items() if name not in _INERT}


def renamed(
    given: Mapping[str, Any], aliases: Mapping[str, str], what: str, known: set[str], *, strict: bool = True
) -> dict[str, Any]:
    """Official names to ours. ``strict`` refuses unknown names; otherwise only those that look like a mistyped
    hyperparameter.
    """
    result: dict[str, Any] = {}
    for name, value in given.items():
        ours = aliases.get(name, name)
        if ours in result or (ours != name and ours in given):
            raise ValueError(f"{what}: {name!r} and {ours!r} are two names of one setting; give one of them")
        if ours not in known:
            hint = nearest(name, [*known, *aliases])
            if strict:
                raise TypeError(f"{what}: unknown argument {name!r}{hint}")
            if _looks_mistyped(name, known):
                raise ValueError(f"{what}: unknown option {name!r}{hint}")
        result[ours] = value
    return result


def _looks_mistyped(name: str, known: set[str]) -> bool:
    import difflib

    return name not in known and bool(difflib.get_close_matches(name, known, n=1, cutoff=0.85))
