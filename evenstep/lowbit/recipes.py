"""Recipes: which operands of a linear layer's three matrix products are low-bit, and in which format.

    forward           y  = x W^T      sums over the input features
    input gradient    dx = g W        sums over the output features
    weight gradient   dW = g^T x      sums over the tokens

A recipe has a format for the weight and the input of the forward product and, separately for each backward product, the
formats of its two operands. The simulated training of the papers is straight-through: g is in high precision, and the
other operand is the quantised one of the forward pass (``other="forward"``).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from evenstep.errors import EvenstepError, nearest
from evenstep.lowbit.formats import FORMATS, Format, get_format


@dataclass(frozen=True)
class Backward:
    """The operands of one backward product. Formats group along the dimension that the product sums over.

    Args:
        grad: the format of the output gradient, or its name; None (default) is high precision.
        other: the format of the other operand (the weight or the input), or its name; None is high precision, and
            ``"forward"`` (default) is the operand as the forward product used it.
        hadamard: rotate both operands along the summed dimension, before they are quantised, by a 16 x 16 Hadamard
            matrix with random signs. It spreads outliers and does not change the product.

    Raises:
        EvenstepError: an unknown format, or ``hadamard`` with an operand of the forward product.
    """

    grad: Format | None = None
    other: Format | str | None = "forward"
    hadamard: bool = False

    def __post_init__(self) -> None:
        # The dataclass is frozen: object.__setattr__ is the way to replace a name by its format on construction.
        if isinstance(self.other, str) and self.other != "forward":
            object.__setattr__(self, "other", get_format(self.other))
        if isinstance(self.grad, str):
            object.__setattr__(self, "grad", get_format(self.grad))
        # The operand of the forward product is quantised without the rotation, which would then not cancel.
        if self.hadamard and (self.other == "forward" or (self.grad is None and self.other is None)):
            raise EvenstepError(
                "Backward(hadamard=True) needs operands of its own: give formats for grad and other (None or a Format)"
            )


@dataclass(frozen=True)
class Recipe:
    """How the linear layers of a model are trained.

    Args:
        weight: the format of weights, or its name; None is high precision.
        input: the format of inputs, or its name; None is high precision.
        input_grad: the operands of the product that gives the gradient of the input.
        weight_grad: the operands of the product that gives the gradient of the weight.
        keep_last: share of the last blocks of the model that stay in high precision, rounded up to whole blocks.
        name: shown in reports.
        source: the paper or specification.

    Raises:
        EvenstepError: an unknown format, a share outside [0, 1), or a format that does not fit its operand.

    Example:
        >>> recipe = Recipe(weight="mxfp4", input="mxfp8", name="w4a8")
        >>> recipe.weight.bits_per_value(), recipe.causal
        (4.25, True)
    """

    # A str is accepted on construction and replaced by its Format, so that readers of a recipe see Formats alone.
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
        # At 1 no layer would be low-bit.
        if not 0 <= self.keep_last < 1:
            raise EvenstepError(f"Recipe.keep_last is {self.keep_last}: it must be at least 0 and below 1")
        for field in ("weight", "input"):
            fmt = getattr(self, field)
            if fmt is not None and fmt.axis != -1:
                raise EvenstepError(f"Recipe.{field}: a layer's formats group along its input features (axis -1)")
        # Rows of the input are tokens. Rows of the weight are outputs, which may share a scale.
        if self.input is not None and self.input.block_rows > 1:
            raise EvenstepError("Recipe.input: two-dimensional blocks would mix tokens; they are for weights")

    # What a later token can change: the groups of the input, where they span rows. Weights are the same for all tokens.
    @property
    def causal(self) -> bool:
        """Whether the output of a token depends on no other token, as with every recipe but the official ones."""
        return self.input is None or self.input.token_local


def _alike(name: str, fmt: Format, source: str) -> Recipe:
    return Recipe(weight=fmt, input=fmt, name=name, source=source)


def _int(bits: int) -> Recipe:
    # As in the paper's code, weights are asymmetric and inputs symmetric with their two largest entries kept.
    weight, input = Format(f"int{bits}", group=256, symmetric=False), Format(f"int{bits}", group=256, outliers=2)
    return Recipe(weight=weight, input=input, name=f"int{bits}", source=_CAUSAL)


def _int_official(bits: int, source: str) -> Recipe:
    weight, input = FORMATS[f"int{bits}-weight-official"], FORMATS[f"int{bits}-input-official"]
    return Recipe(weight=weight, input=input, name=f"int{bits}-official", source=source)


_CODE = "official code of arXiv:2502.17055"
_CAUSAL = "arXiv:2502.17055, with groups that end with their token"
# The gradient's format of nvfp4-train: rounding to nearest would bias the small entries of a block towards zero.
_STOCHASTIC = dataclasses.replace(FORMATS["nvfp4-row"], rounding="stochastic")

_ALL = (
    # Published code, for comparisons with published numbers. Groups run across tokens: not causal.
    _alike("fp4-official", FORMATS["fp4-official"], f"{_CODE}: nine even levels, flattened groups"),
    _int_official(4, f"{_CODE}, flattened groups"),
    _int_official(8, f"{_CODE} (A8W8), flattened groups"),
    # Simulated 4-bit training: 15 or 16 levels, groups within a row, fp32 scales.
    _alike("a4w4", Format("int4", group=128), "plain symmetric 4-bit integers, nothing kept aside: the baseline"),
    _alike("fp4", Format("e2m1", group=256, outliers=2), f"E2M1; {_CAUSAL}"),
    _alike("e1m2", Format("e1m2", group=256, outliers=2), f"E1M2 with its 15 levels; {_CAUSAL}"),
    _int(4),
    _int(3),
    _int(2),
    # 8 bits with one scale per token and per output channel: these multiply on CUDA hardware (backends.py).
    _alike(
        "int8", FORMATS["int8"], "symmetric, a scale per token and output channel (as LLM.int8(), arXiv:2208.07339)"
    ),
    _alike("fp8", FORMATS["fp8"], "E4M3, a scale per token and output channel (torchao's rowwise)"),
    # Microscaling, of which mxfp8 has a CUDA product.
    _alike("mxfp4", FORMATS["mxfp4"], "OCP Microscaling v1.0"),
    _alike("mxfp6", FORMATS["mxfp6"], "OCP Microscaling v1.0, E2M3"),
    _alike("mxfp8", FORMATS["mxfp8"], "OCP Microscaling v1.0, E4M3"),
    # NVFP4 has an fp32 scale of the whole tensor. Shared between tokens it would leak later tokens into earlier ones:
    # inputs have one per row.
    Recipe(
        weight=FORMATS["nvfp4"],
        input=FORMATS["nvfp4-row"],
        name="nvfp4",
        source="NVIDIA's two-level FP4; the second level of inputs per token instead of per tensor",
    ),
    # The published pretraining recipe: 16 x 16 weight blocks have the same values in W and W^T, so that both products
    # see the same weight; stochastic rounding keeps the mean of the gradients; the rotation is for the weight gradient
    # alone.
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
    """Return a Recipe as it is, or look up its name; raise ``EvenstepError`` with the nearest name if there is none."""
    if isinstance(given, Recipe):
        return given
    if given not in RECIPES:
        raise EvenstepError(
            f"unknown low-bit recipe {given!r}: choose one of {', '.join(RECIPES)}{nearest(str(given), list(RECIPES))}"
        )
    return RECIPES[given]


def table() -> str:
    """The recipes as a table in Markdown, for docs/lowbit.md."""
    # Bits in the limit of long rows; tests compare docs/lowbit.md with this table.
    lines = ["| recipe | weights | inputs | bits per weight | bits per input | causal | source |"]
    lines.append("|---|---|---|---|---|---|---|")
    for recipe in RECIPES.values():
        sides = [describe(fmt) for fmt in (recipe.weight, recipe.input)]
        bits = [f"{fmt.bits_per_value():.2f}" if fmt else "-" for fmt in (recipe.weight, recipe.input)]
        cells = [f"`{recipe.name}`", *sides, *bits, "yes" if recipe.causal else "**no**", recipe.source]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def describe(fmt: Format | None) -> str:
    """A format in a few words, such as ``e2m1, 16 per E4M3 scale, FP32 scale per row``."""
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
