"""Which operands of a linear layer's three matrix products are low-bit, and in which format.

    forward           y  = x W^T      over the input features
    input gradient    dx = g W        over the output features
    weight gradient   dW = g^T x      over the tokens

A recipe says for the forward product how weight and input are quantised, and for each backward product, separately,
what its two operands are. The papers' simulated training is straight-through: g is high precision, and the other
operand is the one the forward pass used, quantised (``other="forward"``).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from evenstep.errors import EvenstepError, nearest
from evenstep.lowbit.formats import FORMATS, Format, get_format


@dataclass(frozen=True)
class Backward:
    """The operands of one backward product: ``grad`` the format of the output gradient, ``other`` that of the weight
    or input: None is high precision, ``"forward"`` (default) what the forward product used. Formats group along the
    dimension that is summed over. ``hadamard``: both operands are rotated along it, before they are quantised, by a
    16 x 16 Hadamard matrix with random signs, which spreads outliers and leaves the product as it is.
    """

    grad: Format | None = None
    other: Format | str | None = "forward"
    hadamard: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.other, str) and self.other != "forward":
            object.__setattr__(self, "other", get_format(self.other))
        if isinstance(self.grad, str):
            object.__setattr__(self, "grad", get_format(self.grad))
        if self.hadamard and (self.other == "forward" or (self.grad is None and self.other is None)):
            raise EvenstepError(
                "Backward(hadamard=True) needs operands of its own: give formats for grad and other (None or a Format)"
            )


@dataclass(frozen=True)
class Recipe:
    """How the linear layers of a model are trained. ``weight`` and ``input`` are Formats, names of Formats, or None for
    high precision; ``keep_last`` is the share of the last blocks left in high precision (rounded up to whole blocks).
    ``source`` says where it comes from.
    """

    weight: Format | None = None
    input: Format | None = None
    input_grad: Backward = Backward()
    weight_grad: Backward = Backward()
    keep_last: float = 0.0
    name: str = "custom"
    source: str = ""

    def __post_init__(self) -> None:
        for field in ("weight", "input"):
            value = getattr(self, field)
            if isinstance(value, str):
                object.__setattr__(self, field, get_format(value))
        if not 0 <= self.keep_last < 1:
            raise EvenstepError(f"Recipe.keep_last is {self.keep_last}: it must be at least 0 and below 1")
        for field in ("weight", "input"):
            fmt = getattr(self, field)
            if fmt is not None and fmt.axis != -1:
                raise EvenstepError(f"Recipe.{field}: a layer's formats group along its input features (axis -1)")
        if self.input is not None and self.input.block_rows > 1:
            raise EvenstepError("Recipe.input: two-dimensional blocks would mix tokens; they are for weights")

    @property
    def causal(self) -> bool:
        """Does a token's output depend on no other token? (Every recipe but the official ones.)"""
        return self.input is None or self.input.token_local


def _alike(name: str, fmt: Format, source: str) -> Recipe:
    return Recipe(weight=fmt, input=fmt, name=name, source=source)


def _int(bits: int) -> Recipe:
    weight, input = Format(f"int{bits}", group=256, symmetric=False), Format(f"int{bits}", group=256, outliers=2)
    return Recipe(weight=weight, input=input, name=f"int{bits}", source=_CAUSAL)


def _int_official(bits: int, source: str) -> Recipe:
    weight, input = FORMATS[f"int{bits}-weight-official"], FORMATS[f"int{bits}-input-official"]
    return Recipe(weight=weight, input=input, name=f"int{bits}-official", source=source)


_CODE = "official code of arXiv:2502.17055"
_CAUSAL = "arXiv:2502.17055, with groups that end with their token"
_STOCHASTIC = dataclasses.replace(FORMATS["nvfp4-row"], rounding="stochastic")

_ALL = (
    _alike("fp4-official", FORMATS["fp4-official"], f"{_CODE}: nine even levels, flattened groups"),
    _int_official(4, f"{_CODE}, flattened groups"),
    _int_official(8, f"{_CODE} (A8W8), flattened groups"),
    _alike("a4w4", Format("int4", group=128), "plain symmetric 4-bit integers, nothing kept aside: the baseline"),
    _alike("fp4", Format("e2m1", group=256, outliers=2), f"E2M1; {_CAUSAL}"),
    _alike("e1m2", Format("e1m2", group=256, outliers=2), f"E1M2 with its 15 levels; {_CAUSAL}"),
    _int(4),
    _int(3),
    _int(2),
    _alike(
        "int8", FORMATS["int8"], "symmetric, a scale per token and output channel (as LLM.int8(), arXiv:2208.07339)"
    ),
    _alike("fp8", FORMATS["fp8"], "E4M3, a scale per token and output channel (torchao's rowwise)"),
    _alike("mxfp4", FORMATS["mxfp4"], "OCP Microscaling v1.0"),
    _alike("mxfp6", FORMATS["mxfp6"], "OCP Microscaling v1.0, E2M3"),
    _alike("mxfp8", FORMATS["mxfp8"], "OCP Microscaling v1.0, E4M3"),
    Recipe(
        weight=FORMATS["nvfp4"],
        input=FORMATS["nvfp4-row"],
        name="nvfp4",
        source="NVIDIA's two-level FP4; the second level of inputs per token instead of per tensor",
    ),
    Recipe(
        weight=FORMATS["nvfp4-16x16"],
        input=FORMATS["nvfp4-row"],
        input_grad=Backward(grad=_STOCHASTIC),
        weight_grad=Backward(grad=_STOCHASTIC, other=FORMATS["nvfp4-row"], hadamard=True),
        keep_last=0.15,
        name="nvfp4-train",
        source="NVIDIA's NVFP4 pretraining (arXiv:2509.25149), second level per token and channel",
    ),
)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}


def get_recipe(given: Recipe | str) -> Recipe:
    """A Recipe as it is, a name looked up; EvenstepError with the nearest name."""
    if isinstance(given, Recipe):
        return given
    if given not in RECIPES:
        raise EvenstepError(
            f"unknown low-bit recipe {given!r}: choose one of {', '.join(RECIPES)}{nearest(str(given), list(RECIPES))}"
        )
    return RECIPES[given]


def table() -> str:
    """The recipes as a table in Markdown, for docs/lowbit.md."""
    lines = ["| recipe | weights | inputs | bits per weight | bits per input | causal | source |"]
    lines.append("|---|---|---|---|---|---|---|")
    for recipe in RECIPES.values():
        sides = [describe(fmt) for fmt in (recipe.weight, recipe.input)]
        bits = [f"{fmt.bits_per_value():.2f}" if fmt else "-" for fmt in (recipe.weight, recipe.input)]
        cells = [f"`{recipe.name}`", *sides, *bits, "yes" if recipe.causal else "**no**", recipe.source]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def describe(fmt: Format | None) -> str:
    """A format in a few words: ``e2m1, 16 per E4M3 scale, row scale``."""
    if fmt is None:
        return "high precision"
    group = f"{fmt.block_rows} x {fmt.group}" if fmt.block_rows > 1 else str(fmt.group or "row")
    words = [
        f"{fmt.grid} {'' if fmt.symmetric else 'with zero point'}".strip(),
        f"{group} per {fmt.scale.upper()} scale",
    ]
    if fmt.scale == "e8m0":
        words.append(f"{fmt.rule} rule")
    if fmt.tensor_scale != "none":
        words.append(f"FP32 scale per {fmt.tensor_scale}")
    if fmt.outliers:
        words.append(f"{fmt.outliers} largest kept")
    if fmt.rounding == "stochastic":
        words.append("stochastic")
    if fmt.flatten:
        words.append("flattened")
    return ", ".join(words)
