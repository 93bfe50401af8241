"""The kind of each parameter of a model: embedding, hidden matrix, last layer or vector.

SCALE treats these kinds differently (`scale_groups`); other optimizers exclude embedding and last layer (`is_inner`).
"""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

KINDS = ("embedding", "hidden", "last", "vector")
# Names of last layers in common models (transformers, GPT-NeoX, timm, torchtitan).
HEADS = ("lm_head", "embed_out", "head", "output", "classifier", "score")


def scale_groups(
    model: nn.Module,
    *,
    embedding: str | Iterable[str] = (),
    hidden: str | Iterable[str] = (),
    last: str | Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Param groups for `SCALE`, one for each kind: ``"embedding"``, ``"hidden"``, ``"last"`` and ``"vector"``, under
    the key ``kind``.

    Weights of ``nn.Embedding`` are embeddings; the weight of the last layer is found by its name (``lm_head``,
    ``embed_out``, ``head``, ``output``, ``classifier``, ``score``); weights of linear, bilinear, convolution and
    recurrent layers are hidden; tensors of fewer than two dimensions are vectors. A model of transformers reports the
    embedding and the last layer itself (``get_input_embeddings``, ``get_output_embeddings``). Frozen parameters are
    left out. Every other parameter is in exactly one group, as a pair ``(name, parameter)``.

    Args:
        model: the module whose parameters are grouped.
        embedding: names of parameters, or patterns such as ``"encoder.pos_*"``, that are embeddings regardless of the
            rules above. Default: none.
        hidden: the same for hidden weights.
        last: the same for the weight of the last layer.

    Returns:
        A list of dicts with ``params`` and ``kind``; kinds without parameters are left out.

    Raises:
        ValueError: a parameter that no rule classifies, a pattern that matches nothing, no last layer, several, or one
            that is tied to the embedding. The message lists the names and the argument that decides.

    Example:
        >>> from torch import nn
        >>> from evenstep import SCALE, scale_groups
        >>> model = nn.Sequential()
        >>> model.embed, model.fc, model.head = nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10, bias=False)
        >>> groups = scale_groups(model)
        >>> [(group["kind"], [name for name, _ in group["params"]]) for group in groups]
        [('embedding', ['embed.weight']), ('hidden', ['fc.weight']), ('last', ['head.weight']), ('vector', ['fc.bias'])]
        >>> optimizer = SCALE(groups, lr=1e-3)
    """
    given = {"embedding": _patterns(embedding), "hidden": _patterns(hidden), "last": _patterns(last)}
    # named_parameters yields a shared parameter once, under its first name: a tied head appears as the embedding.
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for given_kind, patterns in given.items():
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in params):
                raise ValueError(
                    f"scale_groups: {given_kind}={pattern!r} matches no trainable parameter of {type(model).__name__}"
                )

    groups: dict[str, list[tuple[str, nn.Parameter]]] = {kind: [] for kind in KINDS}
    unknown: list[str] = []  # reported together, so that one run of the program shows all
    owner = _owners(model)  # parameter name -> the module that holds it, whose type tells the kind
    ends = _Ends(model)
    for name, p in params.items():
        # The caller's patterns come before all rules.
        named = (k for k, patterns in given.items() if any(fnmatchcase(name, x) for x in patterns))
        kind = next(named, None) or _kind(name, p, owner[name], ends, find_last=not given["last"])
        if kind is None:
            unknown.append(f"{name} {tuple(p.shape)}")
        else:
            groups[kind].append((name, p))
    if unknown:
        raise ValueError(
            f"scale_groups could not classify {', '.join(unknown)}; "
            "name them in embedding=, hidden= or last= (patterns are allowed)"
        )
    # Exactly one last layer is needed: momentum there is part of the method, and a guess could be silently wrong.
    tied = _tied_heads(model, {id(p) for _, p in groups["embedding"]})
    if not groups["last"] and tied:
        raise ValueError(
            f"scale_groups: the last layer {tied[0]} shares the weight of the embedding, so it cannot be both; "
            f"untie them, or say which it is, for example last={groups['embedding'][0][0]!r}"
        )
    if not given["last"] and len(groups["last"]) > 1:
        raise ValueError(
            f"scale_groups found several last layers: {', '.join(name for name, _ in groups['last'])}; "
            "say which it is with last=, and what the others are"
        )
    if not groups["last"]:
        raise ValueError(
            f"scale_groups found no last layer in {type(model).__name__} (no trainable one is named "
            f"{', '.join(HEADS)}); name its weight, for example last='decoder.out.weight'"
        )
    # torch accepts pairs (name, parameter); states then carry the names.
    return [{"params": members, "kind": kind} for kind, members in groups.items() if members]


def is_inner(model: nn.Module) -> Callable[[str, nn.Parameter], bool]:
    """A function of a parameter's name and the parameter: whether it is a matrix between the embedding and the last
    layer. Vectors, weights of ``nn.Embedding`` (also of a last layer tied to one) and parameters in a last layer, which
    is found as in `scale_groups`, are not."""
    owner, ends = _owners(model), _Ends(model)

    def inner(name: str, p: nn.Parameter) -> bool:
        path = name.split(".")[:-1]
        # Wrappers such as modules_to_save of peft put more modules below the head.
        inside = not ends.heads and bool({*path} & {"lm_head", "classifier", "score"})
        last = ends.is_head(".".join(path), owner[name]) or inside
        return p.dim() >= 2 and not ends.is_embedding(owner[name]) and not last

    return inner


def edge_weights(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trainable matrices at both ends of the model: ``"embedding"``, the weights of ``nn.Embedding`` (also where a
    last layer is tied to one), and ``"last"``, the other matrices that `is_inner` leaves out."""
    inner, owner, ends = is_inner(model), _owners(model), _Ends(model)
    found: dict[str, list[nn.Parameter]] = {"embedding": [], "last": []}
    for name, p in model.named_parameters():
        if p.requires_grad and p.dim() >= 2 and not inner(name, p):
            kind = "embedding" if ends.is_embedding(owner[name]) else "last"
            found[kind].append(p)
    return found


def has_head(model: nn.Module) -> bool:
    """Whether the model has a last layer that `is_inner` recognises: by its name, as the last layer of a model of
    transformers, or tied to the embedding."""
    # remove_duplicate=False: a tied module may be found under its second name alone.
    names = [path for path, _ in model.named_modules(remove_duplicate=False)]
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return bool(_Ends(model).heads) or any(map(_is_head, names)) or bool(_tied_heads(model, embeddings))


class _Ends:
    """The layers at both ends of a model. A model of transformers reports them, whatever their names and classes; a
    module of another name is then no last layer, such as the matrix ``output`` in each block of RWKV."""

    def __init__(self, model: nn.Module) -> None:
        self.tables, self.heads = (_reported(model, f"get_{end}_embeddings") for end in ("input", "output"))

    def is_embedding(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding | nn.EmbeddingBag) or id(module) in self.tables

    def is_head(self, path: str, module: nn.Module) -> bool:
        return id(module) in self.heads if self.heads else _is_head(path)


def _reported(model: nn.Module, method: str) -> set[int]:
    """The modules that the ``method`` of a part of ``model`` returns, with the modules inside them, by their ids."""
    found: set[int] = set()
    for module in model.modules():
        if callable(get := getattr(module, method, None)):
            try:
                layer = get()
            except NotImplementedError:  # transformers' base class, where it does not know the layer
                continue
            if isinstance(layer, nn.Module):
                found |= {id(part) for part in layer.modules()}
    return found


def _patterns(given: str | Iterable[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _owners(model: nn.Module) -> dict[str, nn.Module]:
    """Full parameter name -> the module that holds it directly."""
    return {
        f"{path}.{name}" if path else name: module
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }


def _is_head(module_path: str) -> bool:
    return module_path.rsplit(".", 1)[-1] in HEADS


def _kind(name: str, p: nn.Parameter, owner: nn.Module, ends: _Ends, *, find_last: bool) -> str | None:
    """The kind of a parameter by the rules of `scale_groups`, None where none applies."""
    # The order of the rules matters: a head's bias is a vector, an embedding named "head" an embedding.
    if p.dim() < 2:
        return "vector"
    if ends.is_embedding(owner):
        return "embedding"
    path, _, leaf = name.rpartition(".")
    if find_last and leaf == "weight" and ends.is_head(path, owner):
        return "last"
    # A transposed layer (transformers' Conv1D of GPT-2, ConvTranspose) keeps its input dimension first and is left to
    # the user, since SCALE normalises over dimension 1.
    convolutions = nn.Conv1d | nn.Conv2d | nn.Conv3d
    recurrent = nn.RNNBase | nn.RNNCellBase
    layers = nn.Linear | nn.Bilinear | convolutions | nn.MultiheadAttention | recurrent
    return "hidden" if isinstance(owner, layers) else None


def _tied_heads(model: nn.Module, embeddings: set[int]) -> list[str]:
    """Paths of linear layers whose weight is one of ``embeddings`` (ids of parameters)."""
    return [
        path
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and id(module.weight) in embeddings
    ]
