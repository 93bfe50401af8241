"""How a model's parameters become an optimizer's groups: which matrices are projected or orthogonalised, which layers
get Adam. One function each; its docstring's first line is what ``evenstep optimizers`` shows.

Torch is imported where it is needed, so that the list of names costs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evenstep.errors import EvenstepError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

Groups = list[dict[str, Any]]
RANK_SHARE = 4
"""rank = width / 4, as the low-rank papers have it for LLaMA-60M to 1B."""
DENSITY_OF = ("all", "hidden")
"""Which matrices SPAM's density is for."""


@dataclass(frozen=True)
class Request:
    """What is to be built. ``decay``: "matrices" gives parameters of fewer than two dimensions weight_decay 0, "all"
    none. ``values`` are constructor arguments, ``own`` the options that the rule itself reads."""

    model: nn.Module
    lr: float
    weight_decay: float
    decay: str
    values: dict[str, Any]
    own: dict[str, Any]

    def made(self, cls: Callable[..., Optimizer], groups: Groups, **more: Any) -> Optimizer:
        values = {**self.values, **more}
        groups = [group for group in groups if group["params"]]
        return cls(self.decayed(groups), **{"lr": self.lr, "weight_decay": self.weight_decay, **values})

    def decayed(self, groups: Groups) -> Groups:
        if not self.weight_decay or self.decay != "matrices":
            return groups
        return [part for group in groups for part in split_by_decay(group)]


Rule = Callable[[Callable[..., "Optimizer"], Request], "Optimizer"]


def every(cls: Callable[..., Optimizer], request: Request) -> Optimizer:
    """every parameter alike"""
    return request.made(cls, [{"params": [(n, p) for n, p in request.model.named_parameters() if p.requires_grad]}])


def sparse(cls: Callable[..., Optimizer], request: Request) -> Optimizer:
    """every parameter alike; with density_of hidden, the embedding, the last layer and vectors are dense"""
    wanted = request.own["density_of"]
    if wanted not in DENSITY_OF:
        raise EvenstepError(f"optim.density_of {wanted}: give all (matrices), or hidden (ones alone)")
    if wanted == "all" or request.values.get("density", 1.0) == 1:
        return every(cls, request)
    hidden, rest = split(request.model)
    return request.made(cls, [{"params": hidden}, {"params": rest, "density": 1.0}])


def roles(cls: Callable[..., Optimizer], request: Request) -> Optimizer:
    """hidden matrices and the embedding: normalised columns; the last layer: with momentum; vectors: Adam"""
    from evenstep.optim import scale_groups

    return request.made(cls, scale_groups(request.model))


def projected(cls: Callable[..., Optimizer], request: Request) -> Optimizer:
    """hidden matrices: moments of a projection to rank r; embedding, last layer, vectors: Adam

    The libraries read ``rank`` from the param group: a group without it is plain Adam, silently.
    """
    hidden, rest = hidden_and_rest(request.model)
    own = dict(request.own)
    own["rank"] = own["rank"] or default_rank(p for _, p in hidden)
    return request.made(cls, [{"params": hidden, **own}, {"params": rest}])


def ranked(cls: Callable[..., Optimizer], request: Request) -> Optimizer:
    """hidden matrices: with rank r (LoRA: frozen, with trained adapters; APOLLO: scaled by a projection); embedding,
    last layer, vectors: Adam
    """
    hidden, rest = hidden_and_rest(request.model)
    values = dict(request.values)
    rank = values.pop("rank", None) or default_rank(p for _, p in hidden)
    made = dataclasses.replace(request, values=values)
    return made.made(cls, [{"params": hidden, "rank": rank}, {"params": rest, "rank": 0}])


def muon(cls: Callable[..., Optimizer], request: Request) -> Optimizer:
    """hidden matrices: orthogonalised momentum; embedding, last layer, vectors: AdamW with rate adam_lr"""
    from torch.optim import AdamW

    from evenstep.baselines.together import Together

    hidden, rest = hidden_and_rest(request.model)
    own = request.own
    adam = Request(request.model, own["adam_lr"] or request.lr, request.weight_decay, request.decay, {}, {})
    orthogonal = request.made(cls, [{"params": hidden}])
    if not rest:
        return orthogonal
    return Together(orthogonal, adam.made(AdamW, [{"params": rest}], betas=tuple(own["adam_betas"]), fused=True))


def blocks(cls: Callable[..., Optimizer], request: Request) -> Optimizer:
    """one second moment for each head of query and key, one for every other hidden matrix or vector (later versions
    of the paper: for each output); embedding and last layer: Adam
    """
    config: Any = getattr(request.model, "config", None)
    heads = {"num_embeds": config.hidden_size, "num_heads": config.num_heads} if config else {}
    return cls(request.model, lr=request.lr, weight_decay=request.weight_decay, **heads, **request.values)


def optimi(cls: Callable[..., Optimizer], request: Request) -> Optimizer:
    """every parameter alike"""
    # Its own choice is Triton wherever that is installed, on a CPU too, where it fails.
    triton = None if next(request.model.parameters()).is_cuda else False
    return request.made(cls, [{"params": [p for p in request.model.parameters() if p.requires_grad]}], triton=triton)


def describe(rule: Rule) -> str:
    return " ".join((rule.__doc__ or "").split("\n\n")[0].split())


def hidden_and_rest(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """`split`, for optimizers that are for hidden matrices alone. EvenstepError when there is none, or when the last
    layer is not known by its name, so that it would pass for one."""
    from evenstep.optim.groups import HEADS, has_head

    hidden, rest = split(model)
    if not hidden:
        raise EvenstepError("this model has no hidden matrix, the only kind this optimizer is for")
    if not has_head(model):
        raise EvenstepError(
            f"found no last layer in {type(model).__name__}: none is named {', '.join(HEADS)}; name it so"
        )
    return hidden, rest


def split(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """The matrices between the embedding and the last layer, and all other trainable parameters, as named ones."""
    from evenstep.optim.groups import is_inner

    inner = is_inner(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [item for item in trained if inner(*item)], [item for item in trained if not inner(*item)]


def default_rank(matrices: Any) -> int:
    return max(1, min(min(p.shape) for p in matrices) // RANK_SHARE)


def split_by_decay(group: dict[str, Any]) -> Groups:
    """The group's matrices with its decay, then its vectors without."""
    rest = {key: value for key, value in group.items() if key != "params"}
    matrices = [item for item in group["params"] if _tensor(item).ndim >= 2]
    vectors = [item for item in group["params"] if _tensor(item).ndim < 2]
    parts: Groups = [{**rest, "params": matrices}] if matrices else []
    return [*parts, {**rest, "params": vectors, "weight_decay": 0.0}] if vectors else parts


def _tensor(item: Any) -> Any:
    return item[1] if isinstance(item, tuple) else item
